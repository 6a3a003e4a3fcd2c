"""Measures which engines skip zeros fast on this CPU: the six products of one encoder layer, dense and sparse.

Weights are random, pruned to each density in each pattern; all engines compute the same products on the same tokens, in turn, each on
the layout of activations that it likes best. The figure is the median over rounds of the ratio to PyTorch's dense product; an engine
whose results are wrong is left out, one that cannot run a pattern says why.

- PyTorch CSR and BSR: `torch.sparse` on a CPU, beta; BSR takes square blocks only.
- PyTorch int8 1x4: QNNPACK's block-sparse kernel, deprecated by PyTorch; beside it QNNPACK's dense int8.
- SciPy CSR and BSR: one thread, whatever is asked for.
- ONNX Runtime and OpenVINO: their dense products of the same zeros, float32, and int8 for the first: sparsity has to beat these.
  OpenVINO is asked to compress sparse weights, which it does only for int8 on CPUs with AMX.

DeepSparse, which did run zeros fast, is no longer maintained and not measured here.

    python benchmarks/sparse.py --threads 2
    python benchmarks/sparse.py --hidden 768 --tokens 4096 128
    python benchmarks/sparse.py --out results/methods/numbers/engines.json    # then: make docs
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is imported

import numpy as np
import torch

from slimformer.measuring.machine import environment

PATTERNS = (("unstructured", (1, 1)), ("1x4", (1, 4)), ("32x32", (32, 32)))
DENSITIES = (0.2, 0.1, 0.05)
DENSE = "PyTorch dense"
TOLERANCE = {"int8": 0.05, "": 1e-3}  # of the largest result

Products = Callable[[], list[torch.Tensor | np.ndarray]]  # each (tokens, out), or (out, tokens)
Engine = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], Products]  # weights (out, in), inputs (tokens, in)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--tokens", type=int, nargs="+", default=[800, 25])  # 32 sentences of 25 tokens, and one
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="a JSON file for the rows, which docs/methods/numbers.md is drawn from")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=UserWarning)  # the head of this file says "beta" and "deprecated" already
    circumstances = f"hidden size {options.hidden}, {options.threads} threads, {options.rounds} rounds, {machine()}"
    head = [
        "pattern",
        "zeros",
        "engine",
        *(f"{count} tokens: {what}" for count in options.tokens for what in ("ms a layer", "×")),
    ]
    print(f"{circumstances}\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    rows: list[list[str]] = []
    for pattern, block in PATTERNS:
        for density in DENSITIES:
            weights = layer(options.hidden, density, block)
            cells: dict[str, list[str]] = {}
            for count in options.tokens:
                for name, cell in row(weights, block, count, options.threads, options.rounds).items():
                    cells.setdefault(name, []).append(cell)
            for name, found in cells.items():
                rows.append([pattern, f"{1 - density:.0%}", name, *" | ".join(found).split(" | ")])
                print(f"| {' | '.join(rows[-1])} |", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(
            json.dumps({"circumstances": circumstances, "head": head, "rows": rows}, indent=1) + "\n", "utf-8"
        )


def machine() -> str:
    """The processor and the versions, on which all figures depend."""
    facts = environment()
    versions = (f"{name} {version(name)}" for name in ("torch", "scipy", "onnxruntime", "openvino") if find_spec(name))
    return ", ".join((facts.cpu, *versions))


def layer(hidden: int, density: float, block: tuple[int, int]) -> list[torch.Tensor]:
    """The six matrices of a layer with this share of their blocks, the same for every engine."""
    generator = torch.Generator().manual_seed(0)
    weights = []
    for rows, columns in [(hidden, hidden)] * 4 + [(4 * hidden, hidden), (hidden, 4 * hidden)]:
        grid = (rows // block[0], columns // block[1])
        kept = torch.zeros(grid[0] * grid[1])
        kept[torch.randperm(len(kept), generator=generator)[: round(density * len(kept))]] = 1
        mask = kept.view(grid).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        weights.append(torch.randn(rows, columns, generator=generator) * mask)
    return weights


def row(weights: Sequence[torch.Tensor], block: tuple[int, int], tokens: int, threads: int, rounds: int) -> dict[str, str]:
    """Milliseconds and ratio of each engine on this many tokens, or why there are none."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(tokens, weight.shape[1], generator=generator) for weight in weights]
    expected = [torch.nn.functional.linear(x, weight) for x, weight in zip(inputs, weights, strict=True)]
    runs: dict[str, Products] = {}
    cells: dict[str, str] = {}
    for name, engine in engines(block, threads):
        cells[name] = ""
        try:
            products = engine(weights, inputs)
            gap = max(difference(found, good) for found, good in zip(products(), expected, strict=True))
        except (RuntimeError, ValueError, NotImplementedError) as error:
            cells[name] = f"{str(error).splitlines()[0][:60]} | -"
            continue
        if gap > TOLERANCE["int8" if "int8" in name else ""]:
            cells[name] = f"wrong by {gap:.2g} | -"
            continue
        runs[name] = products
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, products in runs.items():
            products()
            begin = time.perf_counter()
            products()
            times[name].append(1e3 * (time.perf_counter() - begin))
    for name, taken in times.items():
        ratio = statistics.median(dense / own for dense, own in zip(times[DENSE], taken, strict=True))
        cells[name] = f"{statistics.median(taken):.2f} | {ratio:.2f}"
    return cells


def difference(found: torch.Tensor | np.ndarray, good: torch.Tensor) -> float:
    """Largest gap over the largest result; a result may lie the other way round."""
    found = torch.as_tensor(found)
    found = found if found.shape == good.shape else found.T
    return float((found - good).abs().max() / good.abs().max())


# -- Engines -------------------------------------------------------------------------------------------------------------------


def engines(block: tuple[int, int], threads: int) -> Iterator[tuple[str, Engine]]:
    """Each engine that is installed, with its name; the dense one first."""
    yield DENSE, _dense
    yield "PyTorch CSR", lambda weights, inputs: _left([weight.to_sparse_csr() for weight in weights], inputs)
    if block != (1, 1):
        yield (
            f"PyTorch BSR {block[0]}x{block[1]}",
            lambda weights, inputs: _left([w.to_sparse_bsr(block) for w in weights], inputs),
        )
    if "qnnpack" in torch.backends.quantized.supported_engines:
        yield "PyTorch int8 dense (QNNPACK)", lambda weights, inputs: _int8(weights, inputs, sparse=False)
        yield "PyTorch int8 1x4 (QNNPACK)", lambda weights, inputs: _int8(weights, inputs, sparse=True)
    yield "SciPy CSR", lambda weights, inputs: _scipy(weights, inputs, (1, 1))
    if block != (1, 1):
        yield f"SciPy BSR {block[0]}x{block[1]}", lambda weights, inputs: _scipy(weights, inputs, block)
    yield "ONNX Runtime", lambda weights, inputs: _onnxruntime(_graph(weights), inputs, threads)
    yield "ONNX Runtime int8 dense", lambda weights, inputs: _onnxruntime(_int8_graph(weights), inputs, threads)
    if find_spec("openvino") is not None:
        yield "OpenVINO", lambda weights, inputs: _openvino(weights, inputs, threads)


def _dense(weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Products:
    return lambda: [torch.nn.functional.linear(x, weight) for x, weight in zip(inputs, weights, strict=True)]


def _left(weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Products:
    """Sparse times dense, on activations that lie with the tokens as columns: F.linear of a sparse weight is several times slower."""
    turned = [x.T.contiguous() for x in inputs]
    return lambda: [weight @ x for x, weight in zip(turned, weights, strict=True)]


def _int8(weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], sparse: bool) -> Products:
    torch.backends.quantized.engine = "qnnpack"
    packed = []
    for weight in weights:
        scale = weight.abs().amax(1).clamp_min(1e-6) / 127
        codes = torch.quantize_per_channel(weight, scale, torch.zeros(len(weight), dtype=torch.long), 0, torch.qint8)
        bias = torch.zeros(len(weight))
        packed.append(
            torch.ops.sparse.qlinear_prepack(codes, bias, 1, 4) if sparse else torch.ops.quantized.linear_prepack(codes, bias)
        )
    compute = torch.ops.sparse.qlinear_dynamic if sparse else torch.ops.quantized.linear_dynamic
    return lambda: [compute(x, weight) for x, weight in zip(inputs, packed, strict=True)]


def _scipy(weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], block: tuple[int, int]) -> Products:
    from scipy.sparse import bsr_matrix, csr_matrix

    made = [csr_matrix(w.numpy()) if block == (1, 1) else bsr_matrix(w.numpy(), blocksize=block) for w in weights]
    turned = [np.ascontiguousarray(x.numpy().T) for x in inputs]
    return lambda: [weight @ x for x, weight in zip(turned, made, strict=True)]


def _graph(weights: Sequence[torch.Tensor]) -> bytes:
    """All six products as one ONNX graph, inputs x0.. (tokens, in)."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"y{i}"]) for i in range(len(weights))]
    inputs = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, ["tokens", w.shape[1]]) for i, w in enumerate(weights)]
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["tokens", w.shape[0]]) for i, w in enumerate(weights)]
    constants = [numpy_helper.from_array(np.ascontiguousarray(w.numpy().T), f"w{i}") for i, w in enumerate(weights)]
    graph = helper.make_graph(nodes, "layer", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def _int8_graph(weights: Sequence[torch.Tensor]) -> bytes:
    """The same in int8 by ONNX Runtime's own tool, inputs quantized as they come."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "int8.onnx"
        quantize_dynamic(onnx.load_from_string(_graph(weights)), made, per_channel=True, weight_type=QuantType.QInt8)
        return made.read_bytes()


def _onnxruntime(model: bytes, inputs: Sequence[torch.Tensor], threads: int) -> Products:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it slows down the engine that comes next
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {f"x{i}": x.numpy() for i, x in enumerate(inputs)}
    return lambda: session.run(None, feed)


def _openvino(weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], threads: int) -> Products:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.5,
    }
    request = core.compile_model(core.read_model(_graph(weights)), "CPU", settings).create_infer_request()
    feed = {f"x{i}": x.numpy() for i, x in enumerate(inputs)}
    return lambda: list(request.infer(feed, share_inputs=True, share_outputs=True).values())


if __name__ == "__main__":
    main()
