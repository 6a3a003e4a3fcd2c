"""What is said of an exported file: which ONNX Runtime reads it, and zeros that give no speed; and counts that must be right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir
from torch import nn

from slimformer.errors import ExportError
from slimformer.exporters._onnx.parity import REPORT

RUNTIMES = {17: "1.12", 18: "1.14", 19: "1.15", 20: "1.17"}  # the first ONNX Runtime that reads an opset
MANY_ZEROS = 0.3  # share of the weights; `saving/sparse.py` stores a matrix with as many without them


def needed_runtime(path: Path | onnx_ir.Model) -> str:
    """Which ONNX Runtime reads an exported file: "opset 17, IR version 8: ONNX Runtime 1.12 or newer"."""
    program = onnx_ir.load(path) if isinstance(path, Path) else path
    opset = program.graph.opset_imports[""]
    return f"opset {opset}, IR version {program.ir_version}: needs ONNX Runtime {RUNTIMES[opset]} or newer"


def zeros(model: nn.Module) -> Iterator[str]:
    """A note on matrices that are full of zeros, for users who expect zeros to give speed."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    share = sum(int((weight == 0).sum()) for weight in weights) / max(1, sum(weight.numel() for weight in weights))
    if share > MANY_ZEROS:
        yield f"{share:.0%} of the matrices' weights are 0: zeros are stored and give no speed here"


def check_count(what: str, count: int, expected: int) -> None:
    """ExportError unless as many are in the graph as in the model."""
    if count != expected:
        raise ExportError(f"the graph has {count} {what}, the model has {expected}.", help=REPORT)


def in_model(weight: str) -> str:
    """The name of a weight in the model, from its name in the graph, which holds the model as `model`."""
    return weight.removeprefix("model.").removesuffix(".transposed").removesuffix(".smooth")
