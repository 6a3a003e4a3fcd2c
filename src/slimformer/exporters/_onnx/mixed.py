"""Mixed precision: which matrices of an int8 file stay in float, because int8 makes them slower here or makes the file lose too much.

Post-training int8 often fails in a few matrices. The search leaves each out of int8 in turn, and the squared error of the outputs tells
what it costs; then the costliest stay in float, as few as bring the loss within what is allowed. The speedup of int8 is timed on this
machine for the shape of each matrix. Each gets a reason. Nothing is trained, and the time is limited.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from slimformer import registry
from slimformer.exporters.base import SEARCH_SECONDS, Assignment, MixedPrecision
from slimformer.forms.base import ProductShape, formed_around

SHAPE_ROUNDS = 30  # of each timing of a shape

Products = tuple[ProductShape, ...]  # that read one activation


def search_floats(
    speedups: Mapping[str, float],
    error: Callable[[Sequence[str]], float],
    loss: Callable[[Sequence[str]], float],
    allowed: float,
    *,
    seconds: float = SEARCH_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> MixedPrecision:
    """The fewest points to keep in float, beside those that int8 does not make faster, so that the loss is allowed.

    `speedups`: of int8 over float, by point; `error` and `loss` of a file with these points in float. Half of the time may go into
    ranking. If no choice is within the loss, the one that loses least.
    """
    begin = clock()
    slow = tuple(point for point, speedup in speedups.items() if speedup <= 1)
    losses: dict[int, float] = {0: loss(slow)}
    shares: dict[str, float] = {}  # of the squared error that leaving a point in float takes away
    if losses[0] > allowed:
        whole = error(slow)
        for point in speedups:
            if point not in slow and clock() - begin < seconds / 2:
                shares[point] = 1 - error((*slow, point)) / max(whole, 1e-12)
    order = sorted((point for point, share in shares.items() if share > 0), key=lambda point: -shares[point])

    def is_allowed(count: int) -> bool:
        if count not in losses:
            losses[count] = loss((*slow, *order[:count]))
        return losses[count] <= allowed

    searched = losses[0] > allowed
    if searched:
        low, high = 0, min(1, len(order))  # with `low` of them it loses too much
        while not is_allowed(high) and high < len(order) and clock() - begin < seconds:
            low, high = high, min(2 * high, len(order))
        while is_allowed(high) and high - low > 1 and clock() - begin < seconds:
            middle = (low + high) // 2
            low, high = (low, middle) if is_allowed(middle) else (middle, high)
    count = min(losses, key=lambda number: (losses[number] > allowed, number if losses[number] <= allowed else losses[number]))
    floats = (*slow, *order[:count])
    assignments = tuple(_assign(point, speedups[point], floats, slow, shares, searched) for point in speedups)
    return MixedPrecision(
        tuple(point for point in speedups if point in floats), assignments, losses[count], losses[count] <= allowed
    )


def _assign(
    point: str, speedup: float, floats: Sequence[str], slow: Sequence[str], shares: Mapping[str, float], searched: bool
) -> Assignment:
    if point in slow:
        return Assignment(point, False, f"int8 is {speedup:.2f} times as fast on this machine")
    if point in floats:
        reason = f"in int8 it makes {shares[point]:.0%} of the outputs' squared error, and the file loses too much"
        return Assignment(point, False, reason)
    reason = f"{speedup:.2f} times as fast on this machine"
    if point in shares:
        return Assignment(point, True, f"{reason}, {max(0.0, shares[point]):.0%} of the outputs' squared error")
    return Assignment(point, True, f"{reason}; not tried in float, the time was up" if searched else reason)


# -- Timing --------------------------------------------------------------------------------------------------------------------


def products_at(model: nn.Module, modules: Sequence[str]) -> Products:
    """The products of the modules that read one point, with plain matrices or with those of a form."""
    shapes: list[ProductShape] = []
    for name in modules:
        formed = formed_around(model, name)
        if formed is None:
            out, width = model.get_parameter(f"{name}.weight").shape
            shapes.append(ProductShape(1, int(width), int(out)))
        else:
            reader = "" if formed is model.get_submodule(name) else name.rpartition(".")[2]
            shapes.extend(formed.form.products_at(reader, formed.shape))
    return tuple(shapes)


def int8_speedups(every: Iterable[Products], tokens: int, threads: int, folder: Path) -> list[float]:
    """The speedup of int8 over float for each, quantizing included: the median of alternating rounds in ONNX Runtime."""
    runtime = registry.find("runtimes", "onnxruntime")()
    known: dict[Products, float] = {}
    speedups = []
    for shapes in every:
        if shapes not in known:
            paths = {int8: folder / f"{'int8' if int8 else 'float'}.onnx" for int8 in (False, True)}
            for int8, path in paths.items():
                path.write_bytes(product_graph(shapes, int8))
            runners = {int8: runtime.load(path, threads) for int8, path in paths.items()}
            rows, width = shapes[0].rows, shapes[0].width
            inputs = {"x": np.random.default_rng(0).normal(size=(tokens * rows, width)).astype(np.float32)}
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(SHAPE_ROUNDS):
                for int8, runner in runners.items():
                    begin = time.perf_counter()
                    runner(inputs)
                    times[int8].append(time.perf_counter() - begin)
            known[shapes] = float(np.median(np.divide(times[False], times[True])[1:]))  # the first round warms up
        speedups.append(known[shapes])
    return speedups


def product_graph(shapes: Products, int8: bool) -> bytes:
    """A graph that multiplies (tokens, in) by a matrix of each shape and adds a bias, in float or as int8 files do."""
    draw = np.random.default_rng(0)
    width, outs = shapes[0].width, [shape.out for shape in shapes]
    constants: dict[str, Any] = {"step": np.float32(0.03), "zero": np.uint8(128)}
    nodes = [helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"])] if int8 else []
    for index, out in enumerate(outs):
        constants[f"b{index}"] = draw.normal(size=out).astype(np.float32)
        if int8:
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
