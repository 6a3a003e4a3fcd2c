"""Says where the time, the bytes and the operations of a model go, by component and layer, in PyTorch and in ONNX Runtime.

In PyTorch a clock runs while a module computes, and stands still for it while a module inside computes: each moment is counted once.
In ONNX Runtime the times are those of its own profile, and an operator belongs to the part whose parameters it reads, or to what its
inputs come from. The runs that nobody watches are timed in turn with the watched ones: the parts should add up to them.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Kind
from slimformer.errors import ModelError
from slimformer.families.base import Subject
from slimformer.forms.base import Formed
from slimformer.measuring.components import REST, Component, Components, Spot, components_of

if TYPE_CHECKING:
    import onnx

_Clock = Callable[[], float]
_QUANTIZE = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
_NORMS = {"LayerNormalization", "SkipLayerNormalization", "InstanceNormalization", "SimplifiedLayerNormalization"}


@dataclass(frozen=True)
class Texts:
    """The size of what a run reads: `batch` texts of `length` tokens."""

    batch: int
    length: int


@dataclass(frozen=True)
class Profile:
    """Where the time of a run goes. `ms`: of each place, in the fastest of the watched runs. `whole_ms`: the fastest that nobody watched.

    `working`: the bytes that the largest operator (in PyTorch: module) of a place reads and writes beside its parameters.
    """

    name: str
    runtime: str
    load: Texts
    ms: Mapping[Spot, float]
    whole_ms: float
    working: Mapping[Spot, int] = field(default_factory=dict)

    @property
    def total_ms(self) -> float:
        """All places together."""
        return sum(self.ms.values())

    def of(self, component: Component) -> float:
        """Milliseconds of a component, in all layers."""
        return sum(ms for place, ms in self.ms.items() if place.component is component)

    def of_layer(self, layer: int | None) -> float:
        """Milliseconds of a layer, or of what lies outside of them."""
        return sum(ms for place, ms in self.ms.items() if place.layer == layer)

    def peak(self, component: Component) -> int:
        """Bytes that the largest operator of a component reads and writes."""
        return max((size for place, size in self.working.items() if place.component is component), default=0)


@dataclass(frozen=True)
class Counted:
    """Parameters and their bytes as PyTorch holds them, and multiply-accumulates of one text."""

    parameters: int = 0
    bytes: int = 0
    macs: float = 0.0


def count_parts(subject: Subject, length: int) -> dict[Spot, Counted]:
    """What each place of a model holds and computes for a text of `length` tokens; a tied tensor counts where it stands first."""
    components = components_of(subject)
    found: dict[Spot, list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for name, parameter in subject.model.named_parameters():
        cell = found[components.of(name) or REST]
        cell[0] += parameter.numel()
        cell[1] += parameter.numel() * parameter.element_size()
    products = _linears(subject.model)

    def count(path: str, rows: int) -> None:
        found[components.of(path) or REST][2] += rows * products[path]

    with ExitStack() as stack, torch.no_grad(), subject.evaluating():
        for path in products:
            hook = subject.model.get_submodule(path).register_forward_pre_hook(_rows(path, count))
            stack.callback(hook.remove)
        subject.model(**random_texts(subject, Texts(1, length)))
    for site in subject.anatomy.of_kind(Kind.HEADS):
        found[Spot(Component.CORE, site.layer)][2] += 2 * site.size * site.taps[0].unit * length**2
    return {place: Counted(int(cell[0]), int(cell[1]), cell[2]) for place, cell in found.items()}


def random_texts(subject: Subject, load: Texts) -> dict[str, Tensor]:
    """Random ids without padding, the same for each model of a vocabulary."""
    generator = torch.Generator().manual_seed(0)
    size = min(1000, int(subject.model.config.vocab_size))
    shape = (load.batch, load.length)
    columns = {
        "input_ids": torch.randint(size // 2, size, shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "token_type_ids": torch.zeros(shape, dtype=torch.long),
    }
    return {name: columns[name] for name in subject.inputs}


def check_profiled(subject: Subject, loads: Sequence[Texts]) -> None:
    """ModelError if a model cannot be profiled, or has no positions for so many tokens."""
    if len(subject.anatomy.stacks) > 1:
        raise ModelError(
            f"{type(subject.model).__name__} is an encoder-decoder, and only encoders are profiled.",
            help="leave --profile out, or name an encoder such as a BERT.",
        )
    if not subject.anatomy.layers:
        raise ModelError(
            f"{type(subject.model).__name__} has no layers to tell apart.",
            help="leave --profile out: `bench` times the whole model.",
        )
    if subject.anatomy.exits or subject.anatomy.sieves:
        raise ModelError(
            "a model with exits or sieves computes other parts of each text, and a profile is of all layers.",
            help="profile the model as it was before it got them.",
        )
    most = subject.family.positions(subject.model.config.to_dict())
    longest = max(load.length for load in loads)
    if most is not None and longest > most:
        raise ModelError(f"the model has positions for {most} tokens, not for {longest}.", help=f"ask for {most} at most.")


# -- PyTorch -------------------------------------------------------------------------------------------------------------------


def profile_torch(subject: Subject, load: Texts, name: str, *, rounds: int = 5, clock: _Clock = time.perf_counter) -> Profile:
    """The profile of a model in PyTorch, as many threads as it has now; `rounds` runs are watched, as many are not."""
    texts, components = random_texts(subject, load), components_of(subject)
    watched: list[_Watch] = []
    alone: list[float] = []
    with torch.no_grad(), subject.evaluating():
        subject.model(**texts)
        for _ in range(rounds):
            begin = clock()
            subject.model(**texts)
            alone.append(clock() - begin)
            with _watching(subject.model, components, clock) as watch:
                subject.model(**texts)
            watched.append(watch)
    best = min(watched, key=lambda watch: sum(watch.seconds.values()))
    ms = {place: 1000 * seconds for place, seconds in best.seconds.items()}
    return Profile(name, "PyTorch", load, ms, 1000 * min(alone), dict(best.working))


class _Watch:
    """Counts the seconds of each place: the clock of a module stands still while one inside of it computes."""

    def __init__(self, clock: _Clock) -> None:
        self.seconds: dict[Spot, float] = defaultdict(float)
        self.working: dict[Spot, int] = defaultdict(int)
        self._clock, self._open, self._last = clock, list[Spot](), 0.0

    def enter(self, place: Spot) -> None:
        self._note()
        self._open.append(place)

    def leave(self, place: Spot, size: int) -> None:
        self._note()
        self._open.pop()
        self.working[place] = max(self.working[place], size)

    def _note(self) -> None:
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1]] += now - self._last
        self._last = now


@contextmanager
def _watching(model: nn.Module, components: Components, clock: _Clock) -> Iterator[_Watch]:
    watch = _Watch(clock)
    there = dict(model.named_modules())
    places = {path: place for path, place in components.places.items() if path in there} | {"": REST}
    with ExitStack() as stack:
        for path, place in places.items():
            before, after = _hooks(watch, place)
            stack.callback(there[path].register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(there[path].register_forward_hook(after, with_kwargs=True).remove)
        yield watch


def _hooks(watch: _Watch, place: Spot) -> tuple[Any, Any]:
    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        watch.enter(place)

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        watch.leave(place, _bytes([args, list(kwargs.values()), output]))

    return before, after


def _bytes(values: Any) -> int:
    if isinstance(values, Tensor):
        return values.numel() * values.element_size()
    inner = values.values() if isinstance(values, Mapping) else values if isinstance(values, (list, tuple)) else ()
    return sum(_bytes(item) for item in inner)


def _linears(model: nn.Module) -> dict[str, int]:
    """The multiply-accumulates of one row in each Linear, and in each module that stands for one."""
    products = {}
    for path, module in model.named_modules():
        if isinstance(module, Formed) and not module.table:
            products[path] = module.form.macs(module.shape)
        elif isinstance(module, nn.Linear):
            products[path] = module.weight.numel()
    return {path: macs for path, macs in products.items() if not _inside(path, model)}


def _inside(path: str, model: nn.Module) -> bool:
    """Whether a module lies in one that stands for a matrix, and is counted with it."""
    above = path.rpartition(".")[0]
    return bool(above) and (isinstance(model.get_submodule(above), Formed) or _inside(above, model))


def _rows(path: str, count: Callable[[str, int], None]) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        count(path, args[0].numel() // args[0].shape[-1])

    return hook


# -- ONNX Runtime --------------------------------------------------------------------------------------------------------------


def profile_onnx(file: Path, subject: Subject, load: Texts, name: str, *, threads: int, rounds: int = 5) -> Profile:
    """The profile of an .onnx file that an exporter made of `subject`'s model, or of one that was cut of it."""
    from slimformer.runtimes.onnxruntime import open_plain

    texts = {key: value.numpy() for key, value in random_texts(subject, load).items()}
    with tempfile.TemporaryDirectory() as scratch:
        plain, watched = (open_plain(file, threads, Path(scratch) / "p" if watch else None) for watch in (False, True))
        feeds = {item.name: texts[item.name] for item in plain.get_inputs() if item.name in texts}
        if len(feeds) < len(plain.get_inputs()):
            raise ModelError(f"{file} reads other inputs than the model.", help="name a file that was exported from it.")
        alone = []
        for session in (plain, watched):
            session.run(None, feeds)
        for _ in range(rounds):
            begin = time.perf_counter()
            plain.run(None, feeds)
            alone.append(time.perf_counter() - begin)
            watched.run(None, feeds)
        events = json.loads(Path(watched.end_profiling()).read_text(encoding="utf-8"))
        places = place_nodes(_graph(Path(scratch) / "p.onnx"), components_of(subject))
    runs = _runs(events)[1:]  # the first one warms up
    best = min(runs, key=lambda run: run[0])
    ms: dict[Spot, float] = defaultdict(float)
    working: dict[Spot, int] = defaultdict(int)
    for event in best[1]:
        place = places.get(event["name"].removesuffix("_kernel_time"), REST)
        ms[place] += event["dur"] / 1000
        size = sum(int(event["args"].get(key, 0)) for key in ("activation_size", "output_size"))
        working[place] = max(working[place], size)
    return Profile(name, "ONNX Runtime", load, dict(ms), 1000 * min(alone), dict(working))


def _runs(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, list[Mapping[str, Any]]]]:
    """The microseconds of each run in a profile of ONNX Runtime, with the operators in it."""
    runs = [event for event in events if event.get("cat") == "Session" and event["name"] == "model_run"]
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    return [(run["dur"], [node for node in nodes if run["ts"] <= node["ts"] <= run["ts"] + run["dur"]]) for run in runs]


def _graph(file: Path) -> onnx.GraphProto:
    import onnx

    return onnx.load(str(file), load_external_data=False).graph


def place_nodes(graph: onnx.GraphProto, components: Components) -> dict[str, Spot]:
    """The place of each operator of an exported graph, by its name.

    Exporters keep the names of parameters, though not of all of them: a product with a nameless matrix belongs where its bias does. What
    reads no parameter goes on with what its inputs come from: after queries, keys and values comes the core, after a matrix that
    ends a sublayer come the residual and the norm.
    """
    constants, named = {item.name for item in graph.initializer}, _named_by_readers(graph, components)
    flows: dict[str, tuple[int, Spot]] = {}  # tensor -> the number of the operator that made it, and what goes on with it
    places: dict[str, Spot] = {}
    for number, node in enumerate(graph.node):
        paths = named[number]
        own = [components.places[path] for path in paths]
        before = max((flows[item] for item in node.input if item in flows), default=(0, REST), key=_latest)[1]
        place = next((item for item in own if item.component is Component.NORMS), own[-1] if own else before)
        if node.op_type in _QUANTIZE and not set(node.input) <= constants:
            place, after = Spot(Component.QUANTIZE, before.layer), before
        elif node.op_type in _NORMS:
            place = after = Spot(Component.NORMS, place.layer)
        else:
            after = _after(place, ended=bool(components.ends & set(paths)))
        places[node.name] = place
        flows |= dict.fromkeys(node.output, (number + 1, after))
    return places


def _named_by_readers(graph: onnx.GraphProto, components: Components) -> list[list[str]]:
    """For each operator the modules whose parameters it reads; of a product with a nameless matrix, those of what reads it alone."""
    constants = {item.name for item in graph.initializer}
    readers: dict[str, list[int]] = defaultdict(list)
    for number, node in enumerate(graph.node):
        for item in node.input:
            readers[item].append(number)
    named = [[path for item in node.input if item in constants and (path := components.path_of(item))] for node in graph.node]
    for number in reversed(range(len(graph.node))):
        node = graph.node[number]
        after = readers[node.output[0]]
        if not named[number] and len(after) == 1 and constants & set(node.input) and "MatMul" in node.op_type:
            named[number] = [path for path in named[after[0]] if components.places[path].component is not Component.NORMS]
    return named


def _latest(flow: tuple[int, Spot]) -> tuple[bool, int]:
    return flow[1].component is not Component.REST, flow[0]


def _after(place: Spot, *, ended: bool) -> Spot:
    """What an operator belongs to that reads no parameter and goes on from this place; `ended`: a matrix ended a sublayer there."""
    if place.component is Component.LINEAR_BEFORE:
        return Spot(Component.CORE, place.layer)
    if ended and place.component is not Component.NORMS:
        return Spot(Component.NORMS, place.layer)
    return place


# -- Several at once -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profiled:
    """A model and what stands beside it, profiled; `counts` are those of the model, for a text of `length` tokens."""

    name: str
    length: int
    counts: Mapping[Spot, Counted]
    profiles: tuple[Profile, ...]


def profile_all(
    model: Subject, name: str, others: Mapping[str, Subject | Path], texts: Sequence[Texts], *, threads: int, rounds: int = 5
) -> Profiled:
    """Profiles a model, and beside it other models and .onnx files of it, by their names; ModelError if that cannot be."""
    check_profiled(model, texts)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        profiles = []
        for load in texts:
            profiles.append(profile_torch(model, load, name, rounds=rounds))
            for other, item in others.items():
                if isinstance(item, Path):
                    profiles.append(profile_onnx(item, model, load, other, threads=threads, rounds=rounds))
                else:
                    check_profiled(item, [load])
                    profiles.append(profile_torch(item, load, other, rounds=rounds))
    finally:
        torch.set_num_threads(before)
    longest = max(load.length for load in texts)
    return Profiled(name, longest, count_parts(model, longest), tuple(profiles))
