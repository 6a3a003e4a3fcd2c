"""Stores a graph as one file, or as two if it is large, and opens it in ONNX Runtime. Equal matrices are stored once.

A protobuf message ends at 2 GB. The weights of a larger graph lie beside its file as "external data", under the name that other
exporters give them; whoever copies the file copies both.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
from onnx_ir.passes.common import DeduplicateHashedInitializersPass

from slimformer.exporters.base import WEIGHTS_BESIDE

ONE_FILE_BYTES = 2_000_000_000  # protobuf ends at 2**31, and the rest of a graph needs room too
SMALL_BYTES = 1024  # constants up to this size stay in the file: shapes and scales are read before the weights are


def weights_name(file: str) -> str:
    """The name of the file that holds the weights of a large ONNX file."""
    return file + WEIGHTS_BESIDE[0]


def save_graph(program: onnx_ir.Model, path: Path, one_file_bytes: int) -> None:
    """Writes a graph to `path`, with its weights beside it if they take more than `one_file_bytes`."""
    _store_equal_ones_once(program)
    if _weights_bytes(program) <= one_file_bytes:
        onnx_ir.save(program, path)
    else:
        onnx_ir.save(program, path, external_data=weights_name(path.name), size_threshold_bytes=SMALL_BYTES)


def open_graph(program: onnx_ir.Model, one_file_bytes: int) -> Any:
    """A graph in ONNX Runtime on the CPU."""
    if _weights_bytes(program) <= one_file_bytes:
        return open_model(onnx_ir.to_proto(program).SerializeToString())
    with tempfile.TemporaryDirectory(prefix="slimformer-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "model.onnx"
        save_graph(program, path, one_file_bytes)
        return open_model(path)


def open_model(model: bytes | Path) -> Any:
    """A serialized graph, or a file, in ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _store_equal_ones_once(program: onnx_ir.Model) -> None:
    for value in _constants(program):
        array = None if value.const_value is None else value.const_value.numpy()
        if array is not None and not array.flags.c_contiguous:  # the pass reads the memory as it lies
            value.const_value = onnx_ir.tensor(np.ascontiguousarray(array), name=value.name)
    DeduplicateHashedInitializersPass()(program)


def _weights_bytes(program: onnx_ir.Model) -> int:
    return sum(value.const_value.nbytes for value in _constants(program) if value.const_value is not None)


def _constants(program: onnx_ir.Model) -> list[onnx_ir.Value]:
    """Those of the graph and of the branches in it."""
    return [value for graph in program.graphs() for value in graph.initializers.values()]
