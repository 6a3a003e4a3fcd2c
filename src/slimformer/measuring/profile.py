"""Says where the time, the bytes and the operations of a model go, by component and layer, in PyTorch and in ONNX Runtime.

In PyTorch a clock runs while a module computes, and stands still for it while a module inside computes: each moment is counted once.
In ONNX Runtime the times are those of its own profile, and an operator belongs to the part whose parameters it reads, or to what its
inputs come from. The runs that nobody watches are timed in turn with the watched ones: the parts should add up to them.

What a model with exits or sieves computes depends on the text: of such a one times and counts are means over texts.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Kind
from slimformer.core.asking import positions_unheard
from slimformer.core.sieving import all_words
from slimformer.errors import ModelError
from slimformer.exporters.base import LAYERS
from slimformer.families.base import Subject
from slimformer.forms.base import Formed
from slimformer.measuring.components import REST, Component, Components, Spot, components_of
from slimformer.measuring.operators import decides_by_text, graph_of, operator_runs, place_nodes
from slimformer.measuring.reach import Reached, Read, reached_by, told_layers, told_words

_Clock = Callable[[], float]
LEAST_READ = 32  # texts, at least, that are read if it depends on them what is computed


@dataclass(frozen=True)
class Texts:
    """The size of what a run reads: `batch` texts of `length` tokens; or, if they are a user's `own`, of so many at most."""

    batch: int
    length: int
    own: bool = False


@dataclass(frozen=True)
class Profile:
    """Where the time of a run goes. `ms`: of each place, in the fastest of the watched runs. `whole_ms`: the fastest that nobody watched.

    If several batches are read, these are means over them. `working`: the bytes that the largest operator (in PyTorch: module) of a place
    reads and writes beside its parameters. `note`: which texts were read and what became of them, if that is not plain.
    """

    name: str
    runtime: str
    load: Texts
    ms: Mapping[Spot, float]
    whole_ms: float
    working: Mapping[Spot, int] = field(default_factory=dict)
    note: str = ""

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


def count_parts(subject: Subject, length: int, reads: Sequence[Read] = ()) -> dict[Spot, Counted]:
    """What each place of a model holds and computes for a text of `length` tokens; a tied tensor counts where it stands first.

    `reads`: texts, over which a mean is taken instead: of the layers that each comes to, for the words that are left there.
    """
    components = components_of(subject)
    found: dict[Spot, list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for name, parameter in subject.model.named_parameters():
        cell = found[components.of(name) or REST]
        cell[0] += parameter.numel()
        cell[1] += parameter.numel() * parameter.element_size()
    texts = [text for read in reads or [random_texts(subject, Texts(1, length))] for text in reached_by(subject, read)]
    products: dict[int, dict[Spot, float]] = {}
    for text in texts:
        if text.words not in products:
            products[text.words] = _products(subject, components, text.words)
        for place, macs in products[text.words].items():
            found[place][2] += macs * _share(place, text) / len(texts)
        for site in subject.anatomy.of_kind(Kind.HEADS):
            found[Spot(Component.CORE, site.layer)][2] += (
                site.products * site.size * site.taps[0].unit * text.attention[site.layer or 0] ** 2 / len(texts)
            )
    return {place: Counted(int(cell[0]), int(cell[1]), cell[2]) for place, cell in found.items()}


def _products(subject: Subject, components: Components, length: int) -> dict[Spot, float]:
    """The multiply-accumulates of the matrices in each place, for a text of which all layers compute all words."""
    found: dict[Spot, float] = defaultdict(float)
    products = _linears(subject.model)

    def count(path: str, rows: int) -> None:
        found[components.of(path) or REST] += rows * products[path]

    with ExitStack() as stack, torch.no_grad(), subject.evaluating(), all_words(subject.model):
        for path in products:
            hook = subject.model.get_submodule(path).register_forward_pre_hook(_rows(path, count))
            stack.callback(hook.remove)
        stack.enter_context(positions_unheard(subject.model))
        subject.model(**subject.feed(random_texts(subject, Texts(1, length))))
    return found


def _share(place: Spot, text: Reached) -> float:
    """How much of a place is computed for a text."""
    if place.component is Component.HEAD:
        return float(text.share(place.layer) > 0)
    return text.share(place.layer, behind=place.component is Component.FFN)


def random_texts(subject: Subject, load: Texts, seed: int = 0) -> dict[str, Tensor]:
    """Random ids without padding, the same for each model of a vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    size = min(1000, int(subject.model.config.vocab_size))
    shape = (load.batch, load.length)
    return {
        "input_ids": torch.randint(size // 2, size, shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "token_type_ids": torch.zeros(shape, dtype=torch.long),
    }


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
    most = subject.family.positions(subject.model.config.to_dict())
    longest = max(load.length for load in loads)
    if most is not None and longest > most:
        raise ModelError(f"the model has positions for {most} tokens, not for {longest}.", help=f"ask for {most} at most.")


# -- PyTorch -------------------------------------------------------------------------------------------------------------------


def profile_torch(
    subject: Subject, load: Texts, name: str, *, rounds: int = 5, clock: _Clock = time.perf_counter, reads: Sequence[Read] = ()
) -> Profile:
    """The profile of a model in PyTorch, as many threads as it has now; `rounds` runs are watched, as many are not.

    `reads`: the batches that are run so, one after the other; one of random words by default.
    """
    components, reads = components_of(subject), reads or [random_texts(subject, load)]
    ms: dict[Spot, float] = defaultdict(float)
    working: dict[Spot, int] = defaultdict(int)
    whole = 0.0
    with torch.no_grad(), subject.evaluating():
        for texts in map(subject.feed, reads):
            watched: list[_Watch] = []
            alone: list[float] = []
            subject.model(**texts)
            for _ in range(rounds):
                begin = clock()
                subject.model(**texts)
                alone.append(clock() - begin)
                with _watching(subject.model, components, clock) as watch:
                    subject.model(**texts)
                watched.append(watch)
            whole += 1000 * min(alone) / len(reads)
            best = min(watched, key=lambda watch: sum(watch.seconds.values()))
            for place, seconds in best.seconds.items():
                ms[place] += 1000 * seconds / len(reads)
                working[place] = max(working[place], best.working[place])
    decided = [text for read in reads for text in reached_by(subject, read)] if _decides(subject) else []
    note = _told(reads, load, told_words(subject, decided) if decided else "")
    return Profile(name, "PyTorch", load, dict(ms), whole, dict(working), note)


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
        stack.enter_context(positions_unheard(model))
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


def profile_onnx(
    file: Path, subject: Subject, load: Texts, name: str, *, threads: int, rounds: int = 5, reads: Sequence[Read] = ()
) -> Profile:
    """The profile of an .onnx file that an exporter made of `subject`'s model, or of one that was cut of it; `reads`: as in PyTorch."""
    from slimformer.runtimes.onnxruntime import open_plain

    reads = reads or [random_texts(subject, load)]
    alone, layers = [], list[int]()
    with tempfile.TemporaryDirectory() as scratch:
        plain, watched = (open_plain(file, threads, Path(scratch) / "p" if watch else None) for watch in (False, True))
        wanted, given = [item.name for item in plain.get_inputs()], [item.name for item in plain.get_outputs()]
        if not set(wanted) <= set(subject.inputs) & set(reads[0]):
            raise ModelError(f"{file} reads other inputs than the model.", help="name a file that was exported from it.")
        batches = [{key: value.numpy() for key, value in read.items() if key in wanted} for read in reads]
        watched.run(None, batches[0])
        for feeds in batches:
            outputs = dict(zip(given, plain.run(None, feeds), strict=True))
            layers += outputs[LAYERS].tolist() if LAYERS in outputs else []
            seconds = []
            for _ in range(rounds):
                begin = time.perf_counter()
                plain.run(None, feeds)
                seconds.append(time.perf_counter() - begin)
                watched.run(None, feeds)
            alone.append(min(seconds))
        events = json.loads(Path(watched.end_profiling()).read_text(encoding="utf-8"))
        places = place_nodes(graph_of(Path(scratch) / "p.onnx"), components_of(subject))
    runs = operator_runs(events)[1:]  # the first one warms up
    ms: dict[Spot, float] = defaultdict(float)
    working: dict[Spot, int] = defaultdict(int)
    for start in range(0, len(runs), rounds):
        for item in min(runs[start : start + rounds], key=lambda run: run[0])[1]:
            place = places.get(item.name, REST)
            ms[place] += item.us / 1000 / len(batches)
            working[place] = max(working[place], item.bytes)
    note = _told(reads, load, f"{told_layers(layers)}." if layers else "")
    return Profile(name, "ONNX Runtime", load, dict(ms), 1000 * sum(alone) / len(alone), dict(working), note)


# -- Several at once -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profiled:
    """A model and what stands beside it, profiled; `counts` are those of the model, for a text of `length` tokens.

    `own`: for texts that were given, of `length` tokens at most, on average. `note`: what texts the counts are of, if that matters.
    """

    name: str
    length: int
    counts: Mapping[Spot, Counted]
    profiles: tuple[Profile, ...]
    own: bool = False
    note: str = ""


def profile_all(
    model: Subject,
    name: str,
    others: Mapping[str, Subject | Path],
    texts: Sequence[Texts],
    *,
    threads: int,
    rounds: int = 5,
    given: Callable[[str, Texts], Sequence[Read]] | None = None,
) -> Profiled:
    """Profiles a model, and beside it other models and .onnx files of it, by their names; ModelError if that cannot be.

    `given`: the batches of a user's texts for a model by its name. Without them words are random, and if any of the models decides by
    text how much it computes, each reads `LEAST_READ` texts.
    """
    for subject in [model, *(item for item in others.values() if not isinstance(item, Path))]:
        check_profiled(subject, texts)
    several = any(_decides(item) for item in [model, *others.values()])

    def reads_of(subject: Subject, called: str, load: Texts) -> Sequence[Read]:
        if given is not None:
            return given(called, load)
        return [random_texts(subject, load, seed) for seed in range(max(1, LEAST_READ // load.batch) if several else 1)]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        profiles = []
        for load in texts:
            profiles.append(profile_torch(model, load, name, rounds=rounds, reads=reads_of(model, name, load)))
            for other, item in others.items():
                if isinstance(item, Path):
                    reads = reads_of(model, name, load)
                    profiles.append(profile_onnx(item, model, load, other, threads=threads, rounds=rounds, reads=reads))
                else:
                    profiles.append(profile_torch(item, load, other, rounds=rounds, reads=reads_of(item, other, load)))
        longest = max(texts, key=lambda load: load.length)
        reads = reads_of(model, name, replace(longest, batch=1))
        counts = count_parts(model, longest.length, reads)
    finally:
        torch.set_num_threads(before)
    note = f"MACs: on average over {_texts_of(reads, longest)}." if len(reads) > 1 else ""
    return Profiled(name, longest.length, counts, tuple(profiles), longest.own, note)


def _decides(item: Subject | Path) -> bool:
    """Whether a model or file computes more of some texts than of others."""
    if isinstance(item, Path):
        return item.is_file() and decides_by_text(graph_of(item))
    return bool(item.anatomy.exits or item.anatomy.sieves)


def _told(reads: Sequence[Read], load: Texts, what: str) -> str:
    """Which texts were read, and what became of them; nothing if there is nothing to tell."""
    return f"{_texts_of(reads, load)}: {what}" if what else f"{_texts_of(reads, load)}." if load.own else ""


def _texts_of(reads: Sequence[Read], load: Texts) -> str:
    count = sum(len(read["input_ids"]) for read in reads)
    words = sum(int(read["attention_mask"].sum()) for read in reads) / count
    return f"{count:,} given texts, {words:.1f} tokens on average" if load.own else f"{count:,} texts of random words"
