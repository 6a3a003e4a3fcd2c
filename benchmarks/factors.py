"""Times a factored matrix in ONNX Runtime, in each order of its two products, beside the dense matrix.

For the shapes of the two published Kronecker models: it prints milliseconds of one matrix at batch 32 and batch 1 of a given length,
the least over rounds in which all take turns. `*` marks the order that `forms/kronecker.py` takes; MACs are relative to the dense matrix.

    python benchmarks/factors.py --threads 1
    python benchmarks/factors.py --width 384 --length 40
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from slimformer.core.anatomy import Matrix, Role
from slimformer.exporters._onnx import rewrite
from slimformer.exporters._onnx.graph import Editor, strip
from slimformer.forms.kronecker import Kronecker, write_product
from slimformer.methods.kronecker import NAMED

ORDERS = {  # steps -> which factor multiplies from the right
    ("turn", "a", "b", "turn"): "a",
    ("turn", "b", "a", "turn"): "a",
    ("a", "b"): "b",
    ("b", "a"): "b",
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    width = options.width
    shapes = {Role.QUERY: (width, width), Role.FFN_IN: (4 * width, width), Role.FFN_OUT: (width, 4 * width)}
    names = [" ".join(steps) for steps in ORDERS]
    print(f"| model | matrix | MACs | batch | dense ms | {' | '.join(names)} |")
    print("|---" * (5 + len(names)) + "|")
    for model, known in NAMED.items():
        for role, shape in shapes.items():
            form = known.form(Matrix(str(role), str(role), shape, role), 1)
            runs = {"dense": session(dense(shape), options.threads)}
            runs |= {
                " ".join(steps): session(factored(form, shape, steps, right), options.threads)
                for steps, right in ORDERS.items()
            }
            for batch in (32, 1):
                taken = times(runs, (options.length, batch, shape[1]), options.rounds)
                chosen = " ".join(form.steps(shape))
                cells = [f"{taken[name]:.3f}{' *' if name == chosen else ''}" for name in names]
                share = form.macs(shape) / (shape[0] * shape[1])
                print(f"| {model} | {role} | {share:.1%} | {batch} | {taken['dense']:.3f} | {' | '.join(cells)} |", flush=True)


def times(runs: dict[str, Any], shape: tuple[int, ...], rounds: int) -> dict[str, float]:
    """The least milliseconds of each."""
    value = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    best = dict.fromkeys(runs, np.inf)
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run.run(None, {"x": value})
            best[name] = min(best[name], 1000 * (time.perf_counter() - begin))
    return best


def session(model: ir.Model, threads: int) -> Any:
    """The graph in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def dense(shape: tuple[int, int]) -> ir.Model:
    """A product with a plain matrix."""
    source = given("x", ("seq", "batch", shape[1]))
    return model_of(source, ir.node("MatMul", [source, noise("weight", shape[::-1])]))


def factored(form: Kronecker, shape: tuple[int, int], steps: tuple[str, ...], right: str) -> ir.Model:
    """The product by two factors, in these steps, as the exporter writes it."""
    source = given("x", ("seq", "batch", shape[1]))
    a, b = (random((1, *of)) for of in (form.a, form.b(shape)))
    domain, name = rewrite.FORMED
    model = model_of(source, marker := ir.node(name, [source], domain=domain))
    editor = Editor(model.graph)
    result = write_product(rewrite.Writer(editor, marker, "matrix"), source, a, b, steps, right)
    editor.replace(marker.outputs[0], result)
    editor.remove(marker)
    strip(model)
    return model


def model_of(source: ir.Value, node: ir.Node) -> ir.Model:
    constants = [value for value in node.inputs if value is not None and value.const_value is not None]
    result = node.outputs[0]
    result.name, result.type, result.shape = "y", source.type, ir.Shape(["seq", "batch", None])
    graph = ir.Graph([source], [result], nodes=[node], initializers=constants, opset_imports={"": 18, rewrite.FORMED[0]: 1})
    return ir.Model(graph, ir_version=9)


def given(name: str, shape: tuple[str | int, ...]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def random(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def noise(name: str, shape: tuple[int, ...]) -> ir.Value:
    tensor = ir.tensor(random(shape), name=name)
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


if __name__ == "__main__":
    main()
