"""ONNX Runtime on the CPU: runs any .onnx file.

Threads do not spin while they wait: a spinning session slows down whoever runs next, and in a comparison that is the next model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import final

import numpy as np

from slimformer.errors import ExtraError
from slimformer.runtimes.base import Runner, Runtime


@final
@dataclass(frozen=True)
class OnnxRuntime(Runtime):
    """`spinning`: whether threads wait actively; a little faster alone, slower for all beside."""

    spinning: bool = False

    def available(self) -> bool:
        return find_spec("onnxruntime") is not None

    def version(self) -> str:
        return version("onnxruntime")

    def accepts(self, path: Path) -> bool:
        return path.suffix == ".onnx"

    def load(self, path: Path, threads: int) -> Runner:
        if not self.available():
            raise ExtraError("ONNX Runtime is not installed.", help="pip install onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self.spinning)))
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = [item.name for item in session.get_inputs()]
        outputs = [item.name for item in session.get_outputs()]

        def run(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            found = session.run(outputs, {name: batch[name] for name in inputs})
            return dict(zip(outputs, found, strict=True))

        return run
