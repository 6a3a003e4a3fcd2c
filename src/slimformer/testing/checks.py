"""Contract checks for every kind of plug-in: the laws, on tiny models, for all that the registry finds.

Third parties run them with `slimformer check NAME`, our own tests on all that is installed. Each check is a function
that raises AssertionError with a sentence; `checks_of` lists those that belong to a kind.
"""

from __future__ import annotations

import atexit
import copy
import dataclasses
import inspect
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slimformer import registry
from slimformer.core import cost
from slimformer.core.anatomy import Anatomy, Kind, Matrix, PointRole, Stack
from slimformer.core.plan import Decision, Plan
from slimformer.core.shrink import shrink, unshrink
from slimformer.core.token_ids import named_ids
from slimformer.errors import PlanError, SlimformerError
from slimformer.exporters.base import Exporter, FileKind, Variant
from slimformer.families.base import Family, Subject, anatomy_of, subject_of
from slimformer.forms.base import Form, Formed
from slimformer.hooks.capture import Capture, Captured, capturing
from slimformer.hooks.gating import gated
from slimformer.measuring import machine
from slimformer.methods.base import Batch, Context, Held, Method, Progress, Step
from slimformer.options import named_options
from slimformer.rules import rules_of
from slimformer.runtimes.base import Runtime
from slimformer.saving import checkpoint
from slimformer.testing.tiny import batch, tiny

TOLERANCE = 2e-5  # sums of float32 in another order differ by less
UNDONE = 2e-4  # so far off may be a norm that is undone by the next one: the epsilon of the first is lost
FEW_HIDDEN = 8  # over fewer numbers a norm divides by next to nothing, and the order of sums shows


def check(name: str | None = None) -> Iterator[tuple[str, bool]]:
    """Checks that plug-ins keep their contracts, on tiny models.

    Args:
        name: The name of a family, method, form, task, exporter or runtime, ours or a third party's; all of them without it.

    Returns:
        A line for each check, and whether it passed. A check runs when its line is asked for.

    Raises:
        SlimformerError: Nothing has this name.

    Example:
        >>> from slimformer import check
        >>> all(passed for line, passed in check("intents"))
        True
    """
    found = [(kind, item) for kind in registry.KINDS for item in registry.names(kind) if name in (None, item)]
    if not found:
        raise SlimformerError(f"there is nothing called '{name}' to check.", help="`slimformer list` shows the names.")
    for kind, item in found:
        cls = registry.find(kind, item)
        for holds in checks_of(kind):
            line = f"{kind} {item}: {(holds.__doc__ or holds.__name__).splitlines()[0]}"
            try:
                holds(cls)
            except AssertionError as error:
                yield f"{line} {error}", False
            else:
                yield line, True


def checks_of(kind: str) -> tuple[Callable[[Any], None], ...]:
    """The checks that a class of this kind must pass."""
    return {
        "families": (
            gate_is_cut,
            soft_gates_fold,
            plans_compose,
            anatomy_follows,
            saved_is_loaded,
            unshrunk_is_the_same,
            predicted_is_counted,
            slices_fit,
            vocabulary_is_cut,
            points_are_reached,
            config_is_read,
        ),
        "methods": (
            is_frozen,
            round_trips,
            checks_its_options,
            attaches_neutrally,
            leaves_no_trace,
            decides_what_fits,
            works_on_decoders,
        ),
        "forms": (
            is_frozen,
            comes_back_from_a_plan,
            counts_what_it_stores,
            computes_its_matrix,
            knows_its_matrix,
            is_exported,
        ),
        "tasks": (is_frozen, declares_its_outputs, names_its_own_options),
        "exporters": (is_frozen, names_its_files, writes_what_the_model_computes),
        "runtimes": (is_frozen, tells_whether_it_is_there, runs_what_is_written),
    }[kind]


def random_plan(anatomy: Anatomy, generator: np.random.Generator, *, forms: bool = False) -> Plan:
    """A plan that cuts about half of the sites at random, whole sublayers now and then; with `forms`, some matrices
    take one."""
    keep: dict[str, tuple[int, ...]] = {}
    for site in anatomy.sites.values():
        if anatomy.factored(site):
            continue
        if site.kind is Kind.SUBLAYER:
            if generator.random() < 0.25:
                keep[site.id] = ()
        elif generator.random() < (0.3 if site.kind is Kind.HIDDEN else 0.6):
            least = FEW_HIDDEN if site.kind is Kind.HIDDEN else 1
            count = int(generator.integers(min(least, site.size), site.size + 1))
            keep[site.id] = tuple(int(unit) for unit in np.sort(generator.choice(site.size, count, replace=False)))
    if not forms:
        return Plan(keep)
    kinds = [registry.find("forms", name) for name in registry.names("forms")]
    cut = [anatomy.cut(matrix, Plan(keep)) for matrix in anatomy.matrices.values() if matrix.dense and matrix.tied is None]
    some = [matrix for matrix in cut if generator.random() < 0.3]
    drawn = [kinds[int(generator.integers(len(kinds)))].example(matrix.shape, table=matrix.table) for matrix in some]
    suits = [form.problem(matrix.shape, table=matrix.table) is None for matrix, form in zip(some, drawn, strict=True)]
    return Plan(keep, {matrix.id: form for matrix, form, fits in zip(some, drawn, suits, strict=True) if fits})


# -- Laws of families --------------------------------------------------------------------------------------------------


def _each(family: type[Family], plans: int = 3, *, forms: bool = False) -> Iterator[tuple[Any, Anatomy, list[Plan]]]:
    """A tiny model of each type, its anatomy, and some random plans."""
    for model_type in family.model_types:
        model = tiny(model_type)
        anatomy = anatomy_of(model)
        generator = np.random.default_rng(0)
        yield model, anatomy, [random_plan(anatomy, generator, forms=forms) for _ in range(plans)]


def gate_is_cut(family: type[Family]) -> None:
    """law 1: a unit gated to zero and the same unit cut give the same output."""
    for model, anatomy, plans in _each(family):
        for plan in plans:
            gates = {name: _open(anatomy.sites[name].size, kept) for name, kept in plan.keep.items()}
            assert_same(model, anatomy, gates, shrink(model, anatomy, plan))


def soft_gates_fold(family: type[Family]) -> None:
    """law 1, folded: soft gates and the cut model with scales folded in give the same output."""
    generator = torch.Generator().manual_seed(0)
    for model, anatomy, plans in _each(family):
        for plan in plans:
            gone = {name for name, kept in plan.keep.items() if not kept}
            scales = {
                site.id: torch.rand(site.size, generator=generator) + 0.5 for site in anatomy.units if site.sublayer not in gone
            }
            gates = {name: _open(anatomy.sites[name].size, kept) for name, kept in plan.keep.items()}
            gates |= {name: _open(anatomy.sites[name].size, plan.keep.get(name)) * scale for name, scale in scales.items()}
            gates |= {name: torch.zeros(1) for name in gone}
            assert_same(model, anatomy, gates, shrink(model, anatomy, Decision(plan, scales=scales)))


def plans_compose(family: type[Family]) -> None:
    """law 2: cutting twice equals cutting once by the composed plan, bit for bit; the empty plan is neutral."""
    generator = np.random.default_rng(1)
    for model, anatomy, plans in _each(family, forms=True):
        assert_equal(model, shrink(model, anatomy, Plan()))
        for first in plans:
            small = shrink(model, anatomy, first)
            second = random_plan(anatomy.after(first), generator, forms=True)
            twice = shrink(small, anatomy_of(small), second)
            assert_equal(twice, shrink(model, anatomy, first.then(second)))
            third = random_plan(anatomy.after(first).after(second), generator, forms=True)
            assert first.then(second).then(third) == first.then(second.then(third)), "`then` is not associative"
            assert Plan().then(first) == first == first.then(Plan()), "the empty plan is not neutral"


def anatomy_follows(family: type[Family]) -> None:
    """law 3: the anatomy of the cut model is the predicted one."""
    for model, anatomy, plans in _each(family, forms=True):
        for plan in plans:
            found = anatomy_of(shrink(model, anatomy, plan))
            assert found == anatomy.after(plan), f"{model.config.model_type}: the anatomy after {plan.to_json()} is another"


def saved_is_loaded(family: type[Family]) -> None:
    """law 4: a saved model loads strictly, bit for bit."""
    for model, anatomy, plans in _each(family, plans=2, forms=True):
        for plan in plans:
            small = shrink(model, anatomy, plan)
            with tempfile.TemporaryDirectory() as name:
                checkpoint.save(small, plan, Path(name) / "model", tokenizer_from=Path(name))
                loaded = checkpoint.load(Path(name) / "model")
                assert checkpoint.load_plan(Path(name) / "model") == plan, "the plan came back another"
            assert_equal(small, loaded)
            inputs = batch(small)
            with torch.no_grad():
                assert torch.equal(small(**inputs).logits, loaded(**inputs).logits), "the loaded model answers otherwise"


def unshrunk_is_the_same(family: type[Family]) -> None:
    """a cut model in the shapes before the cut, with zeros for what is gone, gives the same output."""
    for model, anatomy, plans in _each(family, forms=True):
        for plan in plans:
            small = shrink(model, anatomy, plan)
            try:
                wide = unshrink(small, copy.deepcopy(model), anatomy, plan)
            except PlanError as error:  # no norm of its width lies in front of a stack's first sublayer
                if any(anatomy.sites[name].kind is Kind.HIDDEN for name in plan.keep):
                    continue  # a norm would count the zeros
                first = {min(_sublayers(anatomy, stack), key=list(anatomy.sites).index) for stack in anatomy.stacks}
                assert anatomy.gone(plan) & first, f"cannot be undone: {error.what}"
                continue
            assert {name: tensor.shape for name, tensor in wide.state_dict().items()} == {
                name: tensor.shape for name, tensor in model.state_dict().items()
            }, "has other shapes than before the cut"
            inputs = batch(model)
            with torch.no_grad():
                expected = small(**inputs).logits
                gap = float((wide(**inputs).logits - expected).abs().max())
            allowed = UNDONE if anatomy.gone(plan) else TOLERANCE
            assert gap <= allowed * (1 + float(expected.abs().max())), f"is off by {gap:.1e}"


def _sublayers(anatomy: Anatomy, stack: Stack) -> list[str]:
    return [site.id for site in anatomy.of_kind(Kind.SUBLAYER) if anatomy.stack_of(site.layer) is stack]


def predicted_is_counted(family: type[Family]) -> None:
    """law 5: predicted parameters and bytes equal those counted."""
    for model, anatomy, plans in _each(family, forms=True):
        predicted, work = cost.parameters(model, anatomy), cost.macs(anatomy, np.array([7]))
        for plan in plans:
            small = shrink(model, anatomy, plan)
            again = cost.macs(anatomy_of(small), np.array([7])).dense
            assert abs(work.of(plan, anatomy) - again) <= 1e-9 * again, "MACs predicted and counted differ"
            counted = small.num_parameters()
            assert predicted.of(plan, anatomy) == counted, f"predicted {predicted.of(plan, anatomy)}, counted {counted}"
            buffers = dict(small.named_buffers())
            stored = sum(tensor.nbytes for name, tensor in checkpoint.unshared(small).items() if name not in buffers)
            codes = [item for item in small.parameters() if not item.is_floating_point()]  # of a form, in a few bytes each
            due = 4 * (counted - sum(item.numel() for item in codes)) + sum(item.nbytes for item in codes)
            assert stored == due, f"{stored} bytes for {counted} parameters"


def slices_fit(family: type[Family]) -> None:
    """law 9: each slice covers its axis, no two sites claim one axis, and every tap is a module."""
    for model, anatomy, _ in _each(family, plans=0):
        shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
        claimed: set[tuple[str, int]] = set()
        for site in anatomy.sites.values():
            for piece in site.slices:
                assert piece.param in shapes, f"{site.id}: there is no parameter {piece.param}"
                size = piece.count(site.size) * piece.unit * piece.parts
                axis = shapes[piece.param][piece.dim]
                assert size == axis, f"{site.id}: {piece.param} has {axis} along {piece.dim}, the slice covers {size}"
                assert (piece.param, piece.dim) not in claimed, f"two sites claim {piece.param}, axis {piece.dim}"
                claimed.add((piece.param, piece.dim))
            assert site.taps, f"{site.id} has no tap"
            for tap in site.taps:
                model.get_submodule(tap.module)
        for matrix in anatomy.matrices.values():
            assert tuple(shapes[f"{matrix.module}.weight"]) == matrix.shape, f"{matrix.id} has another shape"
        embeddings = [stack.embedding for stack in anatomy.stacks if stack.embedding is not None]
        for name in (*anatomy.layers, *embeddings, *anatomy.attentions.values()):
            model.get_submodule(name)


def vocabulary_is_cut(family: type[Family]) -> None:
    """texts whose pieces stay get the same answers from a cut vocabulary, in a model that is cut elsewhere too, saved and loaded."""
    generator = np.random.default_rng(2)
    for model, anatomy, plans in _each(family, plans=1):
        if anatomy.vocabulary is None:
            continue  # a model may have several vocabularies
        before, inputs = shrink(model, anatomy, plans[0]), batch(model)
        ids = [name for name in inputs if name.endswith("input_ids")]
        needed = {int(piece) for name in ids for piece in inputs[name].flatten()} | set(named_ids(model))
        needed |= set(range(family().settled_pieces(model.config.to_dict())))
        keep = sorted(needed | {int(piece) for piece in generator.integers(0, anatomy.vocabulary.size, 20)})
        later = Plan({anatomy.vocabulary.id: tuple(keep)})
        plan = plans[0].then(later)
        cut = shrink(model, anatomy, plan)
        assert_equal(cut, shrink(before, anatomy_of(before), later))
        assert anatomy_of(cut) == anatomy.after(plan), "the anatomy after a cut of the vocabulary is another"
        predicted = cost.parameters(model, anatomy).of(plan, anatomy)
        assert predicted == cut.num_parameters(), f"predicted {predicted}, counted {cut.num_parameters()}"
        place = {old: new for new, old in enumerate(keep)}
        moved = {name: inputs[name].clone().apply_(place.__getitem__) if name in ids else inputs[name] for name in inputs}
        with tempfile.TemporaryDirectory() as name, torch.no_grad():
            checkpoint.save(cut, plan, Path(name) / "model", tokenizer_from=Path(name))
            loaded = checkpoint.load(Path(name) / "model")
            assert_equal(cut, loaded)
            expected, answers = before(**inputs).logits, loaded(**moved).logits
        if expected.shape[-1] == anatomy.vocabulary.size:
            assert torch.allclose(answers, expected[..., keep], rtol=0, atol=TOLERANCE), (
                "the scores of the pieces that stay differ"
            )
        else:
            assert torch.equal(answers, expected), "a text whose pieces all stay gets another answer"
        assert [place[old] for old in named_ids(model)] == list(named_ids(loaded)), (
            "the ids that the config names do not follow"
        )


def points_are_reached(family: type[Family]) -> None:
    """each point is passed once in a forward pass, that of a factored matrix once for each of its products, and each
    Linear is read at one point; observing a point changes nothing and leaves nothing behind."""
    from slimformer.hooks.points import touched

    for model, anatomy, plans in _each(family, plans=2, forms=True):
        for plan in (Plan(), *plans):
            small = shrink(model, anatomy, plan)
            after = anatomy.after(plan)
            points = after.points
            if not points:
                return  # a family need not have points; its models cannot be trained with fake quantization then
            factored = [item for item in after.matrices.values() if not item.dense and not item.table]
            inner = {
                point.id: len(item.form.products_at(reader, item.shape))
                for item in factored
                for reader, point in item.points.items()
            }
            read = [
                name for point in points.values() if point.role in (PointRole.MATRIX, PointRole.HEAD) for name in point.modules
            ]
            linears = [name for name, module in small.named_modules() if isinstance(module, torch.nn.Linear)]
            linears = [name for name in linears if name not in after.distance_matrices]
            linears += [f"{item.module}.{reader}" for item in factored for reader in item.form.reads]
            assert sorted(read) == sorted(linears), f"points read {sorted(set(read) ^ set(linears))} or not"
            seen: list[str] = []

            def passed(name: str, seen: list[str] = seen) -> Any:
                def change(values: torch.Tensor) -> torch.Tensor:
                    seen.append(name)
                    return values

                return change

            inputs, hooks = batch(small), _hooks(small)
            with torch.no_grad():
                expected = small(**inputs).logits
                with touched(small, anatomy_of(small), {name: passed(name) for name in points}):
                    found = small(**inputs).logits
                due = [name for name in points for _ in range(inner.get(name, 1))]
                assert sorted(seen) == sorted(due), f"passed {sorted(set(points) - set(seen))[:3]} not, or some too often"
                assert torch.allclose(found, expected, atol=1e-5), "passing changed the output"
                assert torch.equal(small(**inputs).logits, expected), "something was left"
            assert _hooks(small) == hooks, "hooks are left"


def config_is_read(family: type[Family]) -> None:
    """tells the width and the positions of a model from its config alone: as many tokens run, one more does not."""
    for model, anatomy, _ in _each(family, plans=0):
        config = model.config.to_dict()
        width, positions = family().width(config), family().positions(config)
        assert width == anatomy.hidden_size, f"says a width of {width}, the model has {anatomy.hidden_size}"
        if positions is None:
            continue  # a family whose positions have no end
        with torch.no_grad():
            longest = batch(model, rows=1, seq=positions)
            assert bool(torch.isfinite(model(**longest).logits).all()), f"gives no finite numbers for {positions} tokens"
            try:
                model(**batch(model, rows=1, seq=positions + 1))
            except (IndexError, RuntimeError):
                continue
        raise AssertionError(f"the model runs on more than {positions} tokens")


def _open(size: int, kept: tuple[int, ...] | None) -> torch.Tensor:
    gate = torch.ones(size) if kept is None else torch.zeros(size)
    if kept:
        gate[list(kept)] = 1.0
    return gate


def assert_same(model: Any, anatomy: Anatomy, gates: dict[str, torch.Tensor], small: Any) -> None:
    """The gated model's outputs are the small one's, up to the order of float32 sums."""
    inputs = batch(model)
    with torch.no_grad():
        with gated(model, anatomy, gates):
            masked = model(**inputs).logits
        cut = small(**inputs).logits
    gap = float((masked - cut).abs().max())
    assert gap < TOLERANCE * (1 + float(masked.abs().max())), f"{model.config.model_type}: outputs differ by {gap:.1e}"


def assert_equal(one: Any, other: Any) -> None:
    """Two models hold the same tensors under the same names, bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second), f"names differ: {sorted(set(first) ^ set(second))[:3]}"
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs"


# -- Contracts of methods ----------------------------------------------------------------------------------------------


class TinyTask:
    """Random classes, or the next word of random texts: just enough of a task for a method to train on."""

    outputs = ("logits",)
    labelled = True

    def loss(self, output: Any, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(output["logits"].movedim(-1, 1), batch["labels"])

    def terms(self, batch: Any) -> int:
        return int((batch["labels"] >= 0).sum())

    def divergence(self, student: Any, teacher: Any, batch: Any, temperature: float) -> torch.Tensor:
        return (student["logits"] - teacher["logits"]).square().mean() * temperature**2


def tiny_context(model_type: str = "bert", unit: str = "macs", most: int = 8) -> Context:
    """A context around a tiny model, for any method, with at most so many batches."""
    student, teacher = subject_of(tiny(model_type)), subject_of(tiny(model_type))
    model, anatomy = student.model, student.anatomy
    counted = cost.parameters(model, anatomy) if unit == "parameters" else cost.macs(anatomy, np.array([7]))

    def batches(count: int) -> Iterator[dict[str, torch.Tensor]]:
        for seed in range(min(most, max(1, count // 4))):
            inputs = batch(model, rows=4, seed=seed)
            if "decoder_input_ids" in inputs:
                blind = inputs["decoder_attention_mask"] == 0
                yield inputs | {"labels": inputs["decoder_input_ids"].roll(-1, 1).masked_fill(blind, -100)}
            else:
                yield inputs | {"labels": torch.arange(4) % 3}

    def held() -> Iterator[dict[str, torch.Tensor]]:
        return batches(8)

    def score(outputs: Mapping[str, np.ndarray]) -> float:
        labels = np.concatenate([inputs["labels"].numpy() for inputs in held()])
        return float((outputs["logits"].argmax(-1) == labels).mean())

    return Context(
        subject=student,
        plan=Plan(),
        task=TinyTask(),  # type: ignore[arg-type]
        cost=counted,
        teacher=teacher,
        batches=batches,
        generator=torch.Generator().manual_seed(0),
        held=Held(held, score),
    )


def is_frozen(cls: type[Any]) -> None:
    """is a frozen dataclass with a docstring, in a file with one."""
    assert dataclasses.is_dataclass(cls), "is not a dataclass"
    assert cls.__dataclass_params__.frozen, "is not frozen"  # type: ignore[attr-defined]
    assert inspect.getdoc(cls), "has no docstring"
    assert inspect.getdoc(inspect.getmodule(cls)), "its file has no docstring"


def round_trips(cls: type[Method]) -> None:
    """law 10: builds from its defaults and comes back from YAML the same."""
    import yaml
    from pydantic import TypeAdapter

    method = cls()
    data = yaml.safe_load(yaml.safe_dump(named_options(method)))
    again = TypeAdapter(registry.find("methods", data.pop("use"))).validate_python(data)
    assert again == method, f"came back as {again}"


def checks_its_options(cls: type[Method]) -> None:
    """refuses a wrong value of any option when it is built, with a message that names the option."""
    rules = rules_of(cls)
    for entry in dataclasses.fields(cls):  # type: ignore[arg-type]
        assert entry.name in rules, f"`{entry.name}` has no rule: give it a type of slimformer.rules"
        for value in rules[entry.name].wrong:
            try:
                cls(**{entry.name: value})
            except ValueError as error:
                assert entry.name in str(error), f"`{entry.name}={value!r}` is refused without its name: {error}"
            else:
                raise AssertionError(f"`{entry.name}={value!r}` is not refused")


def attaches_neutrally(cls: type[Method]) -> None:
    """law 7: attaching changes no output, if the method promises it."""
    if not cls().effects().neutral:
        return
    context = tiny_context()
    inputs = batch(context.model)
    with torch.no_grad():
        before = context.model(**inputs).logits
        state = cls().attach(context)
        try:
            after = context.model(**inputs).logits
        finally:
            state.close()
    assert torch.equal(before, after), "outputs changed"


def leaves_no_trace(cls: type[Method]) -> None:
    """law 6: after close, the model has the names and the hooks it had before."""
    context = tiny_context()
    names, hooks = list(context.model.state_dict()), _hooks(context.model)
    state = cls().attach(context)
    state.close()
    assert list(context.model.state_dict()) == names, "parameter names changed"
    assert _hooks(context.model) == hooks, "hooks are left"
    assert state.groups() == [] or all(group["weight_decay"] == 0 for group in state.groups()), "its parameters decay"


def decides_what_fits(cls: type[Method]) -> None:
    """decides a plan that fits, within its budget, and the shrunk model runs."""
    _decides(cls(), "bert")


def works_on_decoders(cls: type[Method]) -> None:
    """does the same on an encoder-decoder of each family, or refuses it: steps, a plan within the budget, nothing left on the model."""
    for name in registry.names("families"):
        family = registry.find("families", name)
        if not family().decodes:
            continue
        around = tiny_context(family.model_types[0], cls().cost)
        try:
            cls().check(around.anatomy, around.cost)
            if cls().effects().encoders_only:
                cls().attach(around)
        except SlimformerError:
            continue
        if cls().effects().encoders_only:
            raise AssertionError(f"says that it is for encoders only, and takes a {family.model_types[0]}")
        _decides(cls(), family.model_types[0], most=2)


def _decides(method: Method, model_type: str, most: int = 8) -> None:
    """Lets a method take some steps on a tiny model, and holds what it decides against its promises."""
    effects = method.effects()
    needs = effects.needs | {Capture.LOGITS}
    context = tiny_context(model_type, method.cost, most)
    names, hooks = list(context.model.state_dict()), _hooks(context.model)
    assert context.teacher is not None
    learner, guide = context.subject, context.teacher
    state = method.attach(context)
    try:
        if not effects.one_shot:
            for number, inputs in enumerate(context.batches(32)):
                student = _seen(learner, inputs, needs)
                with torch.no_grad():
                    teacher = _seen(guide, inputs, needs)
                step = Step(context.model, inputs, student, teacher, Progress(number, 8), context.task)
                penalty = method.penalty(state, step)
                assert penalty is None or (penalty.ndim == 0 and bool(torch.isfinite(penalty))), "penalty is no finite scalar"
                if penalty is not None and penalty.requires_grad:
                    penalty.backward()
                method.advance(state, Progress(number + 1, 8))
        decision = method.decide(state, context)
    finally:
        state.close()
    assert list(context.model.state_dict()) == names, f"{model_type}: parameter names changed"
    assert _hooks(context.model) == hooks, f"{model_type}: hooks are left"
    decision.plan.check(context.anatomy)
    foreseen = method.foresee(context.anatomy, context.cost)
    if foreseen is not None:
        sizes = [_sizes(context.anatomy.after(plan)) for plan in (foreseen, decision.plan)]
        assert sizes[0] == sizes[1], f"{model_type}: foresees other sizes or forms than it decides"
    small = shrink(context.model, context.anatomy, decision)
    with torch.no_grad():
        assert bool(torch.isfinite(small(**batch(small)).logits).all()), f"the cut {model_type} gives no finite numbers"
    if not effects.chooses:
        given = Plan(junctions=decision.plan.junctions, patterns=decision.plan.patterns)
        assert given == decision.plan, "cuts although it says that it does not choose"
        assert effects.patterns or not decision.plan.patterns, "gives heads patterns although it says that it gives none"
        own = effects.adapts or effects.divides
        assert own or not decision.plan.junctions, "puts junctions in although it says that nothing branches, leaves or divides"
        return
    if method.keep is not None:
        left = context.cost.of(decision.plan, context.anatomy) / context.cost.dense
        assert left <= method.keep + 1e-9, f"{left:.3f} of the cost remains, {method.keep} was allowed"


def _sizes(anatomy: Anatomy) -> dict[tuple[str, str], int]:
    """The numbers in matrices of each role and form."""
    found: dict[tuple[str, str], int] = {}
    for matrix in anatomy.matrices.values():
        key = str(matrix.role), type(matrix.form).__name__
        found[key] = found.get(key, 0) + int(np.prod(matrix.shape))
    return found


def _seen(subject: Subject, inputs: Batch, needs: Collection[Capture]) -> Captured:
    with capturing(subject.model, subject.anatomy, needs) as recorder:
        return recorder.take({"logits": subject.model(**subject.feed(inputs))["logits"]})


def _hooks(model: torch.nn.Module) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


# -- Contracts of forms ------------------------------------------------------------------------------------------------


def _examples(cls: type[Form]) -> Iterator[tuple[Matrix, Form, torch.nn.Module, torch.nn.Module]]:
    """Each matrix of a tiny model: itself, a form of it, its dense module, and the one that the form puts there."""
    model = tiny("bert")
    anatomy = anatomy_of(model)
    forms = {matrix.id: cls.example(matrix.shape, table=matrix.table) for matrix in anatomy.matrices.values()}
    small = shrink(model, anatomy, Plan(forms=forms))
    for matrix in anatomy.matrices.values():
        yield matrix, forms[matrix.id], model.get_submodule(matrix.module), small.get_submodule(matrix.module)


def comes_back_from_a_plan(cls: type[Form]) -> None:
    """comes back from plan.json the same."""
    for matrix, form, _, _ in _examples(cls):
        plan = Plan(forms={matrix.id: form})
        assert Plan.from_json(plan.to_json()) == plan, f"{form} came back another"
        assert form.problem(matrix.shape, table=matrix.table) is None, f"its own example does not fit {matrix.id}"


def counts_what_it_stores(cls: type[Form]) -> None:
    """law 5: stores as many numbers as it says, and leaves the bias alone."""
    for matrix, form, dense, formed in _examples(cls):
        bias = 0 if getattr(dense, "bias", None) is None else dense.bias.numel()  # type: ignore[union-attr, operator]
        stored = sum(parameter.numel() for parameter in formed.parameters())
        assert stored == form.parameters(matrix.shape) + bias, f"{form} stores {stored - bias} numbers"
        assert form.macs(matrix.shape) > 0, f"{form} multiplies nothing"


def computes_its_matrix(cls: type[Form]) -> None:
    """gives the product with the matrix it stands for, for inputs of any number of axes."""
    generator = torch.Generator().manual_seed(0)
    for matrix, form, dense, formed in _examples(cls):
        assert isinstance(formed, Formed), f"{type(formed).__name__} is no Formed"
        whole = formed.matrix()
        assert tuple(whole.shape) == matrix.shape, f"{form} stands for a matrix of {tuple(whole.shape)}"
        for leading in ((5,), (2, 3), (2, 1, 3)):
            with torch.no_grad():
                if isinstance(dense, torch.nn.Embedding):
                    inputs = torch.randint(matrix.shape[0], leading, generator=generator)
                    expected = whole[inputs]
                else:
                    inputs = torch.randn(*leading, matrix.shape[1], generator=generator)
                    expected = torch.nn.functional.linear(inputs, whole, dense.bias)  # type: ignore[arg-type]
                gap = float((formed(inputs) - expected).abs().max())
            assert gap < TOLERANCE * (1 + float(expected.abs().max())), f"{form} is off by {gap:.1e}"


def knows_its_matrix(cls: type[Form]) -> None:
    """law 3: a module knows its own form and the shape it stands for."""
    for matrix, form, _, formed in _examples(cls):
        assert isinstance(formed, Formed), f"{type(formed).__name__} is no Formed"
        assert (formed.form, formed.shape) == (form, matrix.shape), f"says {formed.form} of {formed.shape}"


def is_exported(cls: type[Form]) -> None:
    """law 8: an ONNX file of a model in this form gives the model's outputs, in float, and in int8 if sums are exact."""
    model = tiny("bert", num_hidden_layers=1)
    anatomy = anatomy_of(model)
    free = [matrix for matrix in anatomy.matrices.values() if matrix.tied is None]
    small = shrink(model, anatomy, Plan(forms={matrix.id: cls.example(matrix.shape, table=matrix.table) for matrix in free}))
    with tempfile.TemporaryDirectory() as name:
        for exported in _export(registry.find("exporters", "onnx"), small, Path(name), (Variant.FLOAT, Variant.INT8_STATIC)):
            _assert_same_outputs(exported, registry.find("runtimes", "onnxruntime")())


# -- Contracts of the rest ---------------------------------------------------------------------------------------------


def declares_its_outputs(cls: Any) -> None:
    """names an Auto class of transformers, or ours, and its outputs."""
    from slimformer.saving.heads import auto_class_named

    try:
        auto_class_named(cls.auto_class)
    except AttributeError:
        raise AssertionError(f"transformers has no {cls.auto_class}") from None
    assert cls.outputs, "names no outputs"
    assert set(cls.per_token) <= set(cls.outputs), "answers for each token by outputs that it does not have"


def names_its_own_options(cls: Any) -> None:
    """names as paths and in short names only options that it has, and says of each flag what it does."""
    options = cls.__dataclass_fields__
    unknown = {*cls.paths, *(name for settled in cls.aliases.values() for name in settled)} - set(options)
    assert not unknown, f"has no option {', '.join(sorted(unknown))}"
    for flag, item in cls.flags().items():
        assert flag.startswith("--"), f"the flag {flag} does not begin with --"
        assert item.metadata["help"].endswith("."), f"the help of {flag} is no sentence"


# -- Contracts of exporters and runtimes -----------------------------------------------------------------------------------

SEEN, UNSEEN = ((1, 5), (3, 7), (8, 12)), ((1, 3), (4, 9), (2, 31))  # (rows, seq) of the batches of an export, and of its check
FILE_TOLERANCE = 1e-4  # share of the largest output; a file computes in another order than the model, and fuses operators
INT8_ERROR = 0.1  # share of the squared outputs that an int8 file of a random model may be off by


@dataclass(frozen=True)
class _Exported:
    """A file, the batches to check it with, and the model's outputs on them."""

    path: Path
    int8: bool
    batches: Sequence[Mapping[str, np.ndarray]]
    expected: Sequence[np.ndarray]


@cache
def _exported(exporter: Any) -> tuple[_Exported, ...]:
    """The files of a dense model and of one whose layers differ; they are removed at the end of the process."""
    folder = Path(tempfile.mkdtemp(prefix="slimformer-check-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    exported: list[_Exported] = []
    for name, model, _ in _dense_and_cut() if exporter().available() else ():
        (folder / name).mkdir()
        exported += _export(exporter, model, folder / name, tuple(exporter.files))
    return tuple(exported)


def _export(exporter: type[Exporter], model: Any, folder: Path, variants: Sequence[str]) -> list[_Exported]:
    """The variants of one model as files. If int8 sums saturate on this processor, int8 is left out: it may compute otherwise."""
    saturates = machine.saturates(machine.environment().flags)
    kinds = {variant: exporter.files[variant] for variant in variants if not (saturates and exporter.files[variant].int8)}
    seen, unseen = (_arrays(model, shapes) for shapes in (SEEN, UNSEEN))
    artifacts = exporter().export_all(model, seen, {variant: folder / kind.name for variant, kind in kinds.items()})
    expected = [_logits(model, inputs) for inputs in unseen]
    for variant, kind in kinds.items():
        assert artifacts[variant].path == folder / kind.name, f"wrote {artifacts[variant].path.name} instead of {kind.name}"
        assert (folder / kind.name).exists(), f"left no {kind.name}"
    return [_Exported(folder / kind.name, kind.int8, unseen, expected) for kind in kinds.values()]


def _dense_and_cut() -> Iterator[tuple[str, Any, Plan]]:
    """A tiny model, and the same with heads, neurons, hidden units and a sublayer cut, in each layer others."""
    model = tiny("bert", num_hidden_layers=2)
    yield "dense", model, Plan()
    anatomy = anatomy_of(model)
    heads, neurons, sublayers = (anatomy.of_kind(kind) for kind in (Kind.HEADS, Kind.NEURONS, Kind.SUBLAYER))
    hidden = {site.id: tuple(range(site.size - 8)) for site in anatomy.of_kind(Kind.HIDDEN)}
    plan = Plan({heads[0].id: (1,), neurons[0].id: (0, 3, 4), sublayers[-1].id: ()} | hidden)
    yield "cut", shrink(model, anatomy, plan), plan


def _arrays(model: Any, shapes: Sequence[tuple[int, int]]) -> list[dict[str, np.ndarray]]:
    names, made = subject_of(model).inputs, []
    for seed, (rows, seq) in enumerate(shapes):
        inputs = {name: value.numpy() for name, value in batch(model, rows, seq, seed).items()}
        made.append({name: inputs.get(name, np.zeros_like(inputs["input_ids"])) for name in names})
    return made


def _logits(model: Any, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy())


def _assert_same_outputs(exported: _Exported, runtime: Runtime) -> None:
    """A file gives the model's outputs in a runtime."""
    run = runtime.load(exported.path, 1)
    for inputs, expected in zip(exported.batches, exported.expected, strict=True):
        outputs = run(inputs)
        file = f"{exported.path.parent.name} {exported.path.name}"
        assert "logits" in outputs, f"{file} gives {', '.join(outputs)}, no logits"
        logits = outputs["logits"]
        assert logits.shape == expected.shape, f"{file} gives {logits.shape} for {expected.shape}"
        if exported.int8:
            error = float(np.square(logits - expected).sum() / np.square(expected).sum())
            assert error < INT8_ERROR, f"{file}: {error:.0%} of the squared outputs are error"
        else:
            gap = float(np.abs(logits - expected).max())
            bound = FILE_TOLERANCE * max(1.0, float(np.abs(expected).max()))
            assert gap <= bound, f"{file} is off by {gap:.1e} on a batch of {inputs['input_ids'].shape}"


def _installed_runtimes() -> list[Runtime]:
    every = [registry.find("runtimes", name)() for name in registry.names("runtimes")]
    return [runtime for runtime in every if runtime.available()]


def names_its_files(cls: Any) -> None:
    """names each file that it writes, no two alike, and at least one that a run delivers."""
    kinds = list(cls.files.values())
    assert all(isinstance(kind, FileKind) for kind in kinds), "names something that is no FileKind"
    assert any(kind.shipped for kind in kinds), "writes nothing that a run delivers"
    assert len({kind.name for kind in kinds}) == len(kinds), "gives two variants one name"


def writes_what_the_model_computes(cls: Any) -> None:
    """law 8: each file gives the model's outputs, dense or cut, on batches of other shapes than it was made with."""
    for exported in _exported(cls):
        runtimes = [runtime for runtime in _installed_runtimes() if runtime.accepts(exported.path)]
        assert runtimes, f"no installed runtime accepts {exported.path.name}"
        _assert_same_outputs(exported, runtimes[0])


def tells_whether_it_is_there(cls: Any) -> None:
    """tells whether its engine is installed, and refuses a file that is not for it."""
    runtime = cls()
    if runtime.available():
        assert runtime.version(), "has no version"
    assert not runtime.accepts(Path("notes.txt")), "accepts a text file"


def runs_what_is_written(cls: Any) -> None:
    """gives the model's outputs for each file of an exporter, and each saved model, that it accepts."""
    runtime = cls()
    if not runtime.available():
        return
    exporters: list[Any] = [registry.find("exporters", name) for name in registry.names("exporters")]
    accepted = [file for exporter in exporters for file in _exported(exporter) if runtime.accepts(file.path)]
    with tempfile.TemporaryDirectory() as name:
        for kind, model, plan in _dense_and_cut():
            folder = Path(name) / kind
            checkpoint.save(model, plan, folder, tokenizer_from=Path(name))
            if runtime.accepts(folder):
                unseen = _arrays(model, UNSEEN)
                accepted.append(_Exported(folder, False, unseen, [_logits(model, inputs) for inputs in unseen]))
        assert accepted or runtime.foreign, "accepts no file of any exporter, and no saved model"
        for exported in accepted:
            _assert_same_outputs(exported, runtime)
