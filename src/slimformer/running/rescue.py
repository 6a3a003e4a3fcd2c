"""Which matrices must stay in float: those that int8 makes slower here, and those that make the int8 file lose too much.

Post-training int8 often fails in a few matrices. Each is left out of int8 in turn and the squared error of the outputs tells what it
costs; then the costliest stay in float, as few as bring the loss on validation examples within what is allowed. What a matrix gains is
timed on this machine for its shape. Every matrix gets a verdict with its reason. Nothing is trained; time is limited.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from slimformer import registry
from slimformer.errors import ExportError
from slimformer.exporters.base import FILES, SHIPPED, Draft, Exporter, Variant
from slimformer.running.bundle import Bundle, Run
from slimformer.running.trials import (
    Reference,
    Trial,
    choose_trial,
    keep_notes,
    load_file,
    loss_of,
    read_trials,
    save_trials,
    teacher_files,
    try_out,
)
from slimformer.saving.files import write_text
from slimformer.tasks.base import Split

SECONDS = 180.0  # a search takes at most about this long
ROUNDS = 30  # of each timing of a shape
TRIED = Variant.INT8_FUSED


@dataclass(frozen=True)
class Verdict:
    """What becomes of the matrices that read a point, and why."""

    point: str
    small: bool  # int8
    reason: str

    def __str__(self) -> str:
        return f"{self.point}: {'int8' if self.small else 'float'}; {self.reason}"


@dataclass(frozen=True)
class Choice:
    """Points whose matrices stay in float, the verdict on each, and what the file then loses on validation examples."""

    floats: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    loss: float
    within: bool


def search(
    gains: Mapping[str, float],
    error: Callable[[Sequence[str]], float],
    loss: Callable[[Sequence[str]], float],
    allowed: float,
    *,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Choice:
    """The fewest points to keep in float, after those that int8 does not make faster, so that the loss is allowed.

    `gains`: how many times as fast int8 is, per point; `error` and `loss` of a file with these points in float. Half of the time
    may go into ranking. Where nothing is within the loss, the choice that loses least.
    """
    begin = clock()
    slow = tuple(point for point, gain in gains.items() if gain <= 1)
    lost: dict[int, float] = {0: loss(slow)}
    shares: dict[str, float] = {}  # of the squared error that leaving a point in float takes away
    if lost[0] > allowed:
        whole = error(slow)
        for point in gains:
            if point not in slow and clock() - begin < seconds / 2:
                shares[point] = 1 - error((*slow, point)) / max(whole, 1e-12)
    order = sorted((point for point, share in shares.items() if share > 0), key=lambda point: -shares[point])

    def good(count: int) -> bool:
        if count not in lost:
            lost[count] = loss((*slow, *order[:count]))
        return lost[count] <= allowed

    searched = lost[0] > allowed
    if searched:
        low, high = 0, min(1, len(order))  # with `low` of them it loses too much
        while not good(high) and high < len(order) and clock() - begin < seconds:
            low, high = high, min(2 * high, len(order))
        while good(high) and high - low > 1 and clock() - begin < seconds:
            middle = (low + high) // 2
            low, high = (low, middle) if good(middle) else (middle, high)
    count = min(lost, key=lambda number: (lost[number] > allowed, number if lost[number] <= allowed else lost[number]))
    floats = (*slow, *order[:count])
    verdicts = tuple(_verdict(point, gains[point], floats, slow, shares, searched) for point in gains)
    return Choice(tuple(point for point in gains if point in floats), verdicts, lost[count], lost[count] <= allowed)


def _verdict(
    point: str, gain: float, floats: Sequence[str], slow: Sequence[str], shares: Mapping[str, float], searched: bool
) -> Verdict:
    if point in slow:
        return Verdict(point, False, f"int8 is {gain:.2f} times as fast on this machine")
    if point in floats:
        return Verdict(
            point, False, f"in int8 it makes {shares[point]:.0%} of the outputs' squared error, and the file loses too much"
        )
    reason = f"{gain:.2f} times as fast on this machine"
    if point in shares:
        return Verdict(point, True, f"{reason}, {max(0.0, shares[point]):.0%} of the outputs' squared error")
    return Verdict(point, True, f"{reason}; not tried in float, the time was up" if searched else reason)


# -- On a real model -----------------------------------------------------------------------------------------------------------


def choose(
    bundle: Bundle,
    run: Run,
    reference: Reference,
    allowed: float,
    *,
    exporter: Exporter | None = None,
    seconds: float = SECONDS,
) -> tuple[Choice, Draft]:
    """The search on a bundle's model, with the draft from which its files can be written."""
    from slimformer.families.base import family_of

    options: Exporter = exporter or registry.find("exporters", "onnx")(agreement=0.0)
    material = bundle.material
    batches = material.batches(family_of(bundle.model.config.model_type).inputs(bundle.model))
    draft = options.draft(bundle.model, batches, material.task.outputs, bundle.ranges)
    if draft is None:
        name = registry.name_of(options)
        raise ExportError(
            f"the exporter '{name}' cannot leave single matrices in float.", help="take `floats` out of `export`."
        )
    lengths = material.features[Split.TRAIN].lengths()
    with tempfile.TemporaryDirectory(dir=run.root, prefix=".part-") as name:
        folder = Path(name)

        def loss(floats: Sequence[str]) -> float:
            try:
                draft.write(folder / "tried.onnx", TRIED, floats)
            except ExportError:
                return math.inf  # its outputs are no numbers
            return loss_of(load_file(folder / "tried.onnx", run.threads), material, reference)[1]

        shapes = {point.id: products_of(bundle.model, point.modules) for point in draft.points}
        found = dict(zip(shapes, gains(shapes.values(), 32 * int(lengths.mean()), run.threads, folder), strict=True))
        choice = search(found, lambda floats: draft.error(TRIED, floats), loss, allowed, seconds=seconds)
    return choice, draft


@dataclass(frozen=True)
class Rescue:
    """All files that ship, those in int8 with the matrices that read `floats` in float, and how they do on validation examples."""

    folder: Path
    trials: tuple[Trial, ...]
    floats: tuple[str, ...]

    def best(self, allowed: float) -> Trial:
        """The best of the int8 files."""
        return choose_trial([trial for trial in self.trials if trial.variant != Variant.FLOAT], allowed)


def rescue(
    bundle: Bundle,
    files: Path,
    trials: Sequence[Trial],
    run: Run,
    reference: Reference,
    allowed: float,
    *,
    exporter: Exporter | None = None,
) -> Rescue | None:
    """The files again, with those matrices in float that int8 costs most or does not make faster; kept for a resumed run.

    `files` and `trials`: the same model without that. None where nothing is found that is within the loss and faster than all of
    them that are. Why each matrix is stored as it is goes into the log, and into the notes of the files that are kept.
    """
    float_file = next(trial for trial in trials if trial.variant == Variant.FLOAT)
    if float_file.loss > allowed:
        return None  # the model itself loses too much: no int8 file can lose less
    name = f"floats-{allowed:g}"
    folder, found, tried = (files.with_name(f"{name}{end}") for end in ("", ".json", "-trials.json"))
    if not found.is_file():
        run.log.say("the model itself is within the loss that is allowed: looking for matrices that have to stay in float.")
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
        choice, draft = choose(bundle, run, reference, allowed, exporter=exporter)
        for verdict in choice.verdicts:
            run.log.event("verdict", point=verdict.point, int8=verdict.small, reason=verdict.reason)
        made = [float_file]
        if choice.within and choice.floats:
            made += _written(bundle, files, folder, run, reference, choice, draft)
        save_trials(tried, made)
        write_text(found, json.dumps(list(choice.floats)))
    kept = tuple(json.loads(found.read_text(encoding="utf-8")))
    made = read_trials(tried)
    rescued = Rescue(folder, tuple(made), kept)
    best = rescued.best(allowed) if len(made) > 1 else None
    if not kept:
        run.log.say("int8 makes every matrix faster, and loses no more than allowed: none stays in float.")
        return None
    if best is None or best.loss > allowed:
        run.log.say("no choice of matrices in float was found that stays within it.")
        return None
    bar = max(trial.speed_32 for trial in trials if trial.loss <= allowed)
    if best.speed_32 <= bar:
        run.log.say(f"with {len(kept)} of its inputs in float, int8 is not faster than the best file without: left out.")
        return None
    run.log.say(
        f"with {len(kept)} inputs of matrices in float: {best.speed_32:.2f} times as fast, {best.loss:+.2f} points lost "
        f"on validation examples ({best.variant}, {best.size_bytes / 1e6:.1f} MB)."
    )
    return rescued


def _written(
    bundle: Bundle, files: Path, folder: Path, run: Run, reference: Reference, choice: Choice, draft: Draft
) -> list[Trial]:
    """Writes the choice into a copy of the files, with the reasons as notes, and tries its int8 files."""
    shutil.copytree(files, folder)
    small = [variant for variant in SHIPPED if variant is not Variant.FLOAT]
    made = [draft.write(folder / FILES[variant].name, variant, choice.floats) for variant in small]
    reasons = tuple(map(str, choice.verdicts))
    keep_notes(folder, [replace(file, notes=(*file.notes, *reasons)) for file in made], run.log)
    baseline = teacher_files(bundle, run)[Variant.FUSED]
    return try_out({file.variant: file.path for file in made}, baseline, bundle, run, reference)


@dataclass(frozen=True)
class Products:
    """Products that read one activation: rows of it for each token, its width, and the widths of what they give."""

    width: int
    outs: tuple[int, ...]
    rows: int = 1


def products_of(model: Any, modules: Sequence[str]) -> Products:
    """What these Linears, or products with the larger factor of each term, multiply."""
    from slimformer.forms.base import weight_of
    from slimformer.forms.kronecker import KroneckerLinear

    weights = [model.get_parameter(weight_of(model, name)) for name in modules]
    outs = tuple(weight.shape[-2] for weight in weights for _ in range(len(weight) if weight.ndim == 3 else 1))
    around = model.get_submodule(modules[0].rpartition(".")[0])
    rows = around.form.rows(around.shape) if isinstance(around, KroneckerLinear) else 1
    return Products(weights[0].shape[-1], outs, rows)


def gains(shapes: Iterable[Products], tokens: int, threads: int, folder: Path) -> list[float]:
    """How many times as fast as in float products of these shapes are in int8, quantizing included: median of rounds in turn."""
    known: dict[Products, float] = {}
    found = []
    for shape in shapes:
        if shape not in known:
            paths = {small: folder / f"{'int8' if small else 'float'}.onnx" for small in (False, True)}
            for small, path in paths.items():
                path.write_bytes(_products(shape, small))
            runners = {small: load_file(path, threads) for small, path in paths.items()}
            inputs = {"x": np.random.default_rng(0).normal(size=(tokens * shape.rows, shape.width)).astype(np.float32)}
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(ROUNDS):
                for small, runner in runners.items():
                    begin = time.perf_counter()
                    runner(inputs)
                    times[small].append(time.perf_counter() - begin)
            known[shape] = float(np.median(np.divide(times[False], times[True])[1:]))  # the first round warms up
        found.append(known[shape])
    return found


def _products(shape: Products, small: bool) -> bytes:
    """A graph that multiplies (tokens, in) by each matrix and adds a bias, in float or as int8 files do."""
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(0)
    width, outs = shape.width, shape.outs
    constants: dict[str, Any] = {"step": np.float32(0.03), "zero": np.uint8(128)}
    nodes = [helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"])] if small else []
    for index, out in enumerate(outs):
        constants[f"b{index}"] = draw.normal(size=out).astype(np.float32)
        if small:
            constants[f"w{index}"] = draw.integers(-127, 128, (width, out)).astype(np.int8)
            constants[f"s{index}"] = np.full(out, 0.01, dtype=np.float32)
            inputs = ["q", f"w{index}", "step", f"s{index}", "zero", "", f"b{index}"]
            nodes.append(helper.make_node("MatMulIntegerToFloat", inputs, [f"y{index}"], domain="com.microsoft"))
        else:
            constants[f"w{index}"] = draw.normal(size=(width, out)).astype(np.float32)
            nodes.append(helper.make_node("MatMul", ["x", f"w{index}"], [f"m{index}"]))
            nodes.append(helper.make_node("Add", [f"m{index}", f"b{index}"], [f"y{index}"]))
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", width])],
        [helper.make_tensor_value_info(f"y{index}", TensorProto.FLOAT, ["tokens", out]) for index, out in enumerate(outs)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())
