"""Measures the compiled kernels beside ONNX Runtime's int8: the four linear layers of one encoder layer, dense and with zeros in blocks.

Both are operators of an ONNX graph in ONNX Runtime, with the same threads, and take float rows to float rows: ours quantizes each row
by its own extremes, ONNX Runtime's (QuantizeLinear and MatMulIntegerToFloat, as in our files) by a fixed grid. They run in turn; the
figures are the best time of each and the median over rounds of the ratio. `peak` is the share of the operations of a loop of dot
products in registers, run on one thread in the same process, times the threads.

    python benchmarks/kernels.py --threads 2
    python benchmarks/kernels.py --hidden 768 --tokens 4096 128
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from slimformer.kernels import library, session
from slimformer.measuring.machine import environment

CASES = ((0, 0.0), (1, 0.5), (1, 0.8), (1, 0.9), (4, 0.8), (4, 0.9))  # outputs of a block, and the share of blocks that are 0


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--tokens", type=int, nargs="+", default=[768, 25])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    hidden = options.hidden
    shapes = {f"{a}->{b}": (a, b) for a, b in ((1, 4), (4, 1), (1, 3), (1, 1))}
    peak = library.peak_operations() * options.threads
    machine = environment()
    print(f"{machine.cpu}, {machine.cores} cores, {' '.join(machine.flags)}, onnxruntime {machine.packages['onnxruntime']}")
    print(f"path {library.processor_path()}, peak of {options.threads} threads {peak / 1e9:.0f} GOP/s")
    with tempfile.TemporaryDirectory() as folder:
        for tokens in options.tokens:
            print(f"\n{tokens} tokens, hidden size {hidden}; microseconds; times as fast as ONNX Runtime's dense int8")
            for rows, zeros in CASES:
                total, base, ratios, operations = 0.0, 0.0, [], 0.0
                for inputs, outputs in ((hidden * a, hidden * b) for a, b in shapes.values()):
                    run = {
                        "ours": opened(our_graph(inputs, outputs, rows, zeros), Path(folder), options.threads),
                        "theirs": opened(their_graph(inputs, outputs), Path(folder), options.threads),
                    }
                    times = in_turn(run, tokens, inputs, options.rounds)
                    total, base = total + min(times["ours"]), base + min(times["theirs"])
                    ratios.append([b / a for a, b in zip(times["ours"], times["theirs"], strict=True)])
                    operations += 2.0 * tokens * inputs * outputs * (1 - zeros)
                ratio = statistics.median(sum(parts) / len(parts) for parts in zip(*ratios, strict=True))
                name = f"{rows}x4 blocks, {zeros:.0%} zeros" if rows else "dense"
                print(
                    f"{name:22} ours {total * 1e6:7.0f}  theirs {base * 1e6:7.0f}  best by best {base / total:5.2f}x"
                    f"  median {ratio:5.2f}x  peak {operations / total / peak:4.0%}"
                )


def in_turn(run: dict[str, Callable[[np.ndarray], Any]], tokens: int, inputs: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round."""
    x = np.random.default_rng(1).normal(size=(tokens, inputs)).astype(np.float32)
    times: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(rounds + 2):
        for name, call in run.items():
            begin = time.perf_counter()
            call(x)
            times[name].append(time.perf_counter() - begin)
    return {name: items[2:] for name, items in times.items()}  # two rounds warm up


def opened(graph: onnx.ModelProto, folder: Path, threads: int) -> Callable[[np.ndarray], Any]:
    """A graph in ONNX Runtime."""
    path = folder / "graph.onnx"
    onnx.save(graph, path)
    ready = session(path, threads)
    return lambda x: ready.run(None, {"x": x})


def our_graph(inputs: int, outputs: int, block_rows: int, zeros: float) -> onnx.ModelProto:
    """One `Linear` of the kernels."""
    draw = np.random.default_rng(0)
    height = max(1, block_rows)
    mask = np.kron(draw.random((outputs // height, inputs // 4)) >= zeros, np.ones((height, 4)))
    weights = (draw.integers(-127, 128, (outputs, inputs)) * mask).astype(np.int8)
    packed = library.pack_weights(weights, np.full(outputs, 0.01), draw.normal(size=outputs), block_rows)
    node = helper.make_node("Linear", ["x", "w"], ["y"], domain="slimformer")
    return graph_of([node], {"w": packed}, inputs, outputs)


def their_graph(inputs: int, outputs: int) -> onnx.ModelProto:
    """The same product by ONNX Runtime's own int8 operators."""
    draw = np.random.default_rng(0)
    constants: dict[str, np.ndarray] = {
        "step": np.array(0.03, np.float32),
        "zero": np.array(128, np.uint8),
        "w": draw.integers(-127, 128, (inputs, outputs)).astype(np.int8),
        "s": np.full(outputs, 0.01, np.float32),
        "b": draw.normal(size=outputs).astype(np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"]),
        helper.make_node("MatMulIntegerToFloat", ["q", "w", "step", "s", "zero", "", "b"], ["y"], domain="com.microsoft"),
    ]
    return graph_of(nodes, constants, inputs, outputs)


def graph_of(nodes: list[Any], constants: dict[str, np.ndarray], inputs: int, outputs: int) -> onnx.ModelProto:
    """(tokens, inputs) in, (tokens, outputs) out."""
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in (("x", inputs), ("y", outputs))
    ]
    held = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], held)
    versions = [helper.make_opsetid(domain, version) for domain, version in (("", 17), ("com.microsoft", 1), ("slimformer", 1))]
    return helper.make_model(graph, opset_imports=versions, ir_version=8)


if __name__ == "__main__":
    onnxruntime.set_default_logger_severity(3)
    main()
