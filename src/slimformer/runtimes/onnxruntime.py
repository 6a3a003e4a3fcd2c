"""Runs .onnx files in ONNX Runtime on the CPU.

All files, ours and the baselines, get the same session options. Each option was measured to matter, and none is tuned to one graph
(docs/decisions/0002-onnx-graphs.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from slimformer.errors import ExtraError, ModelError
from slimformer.runtimes.base import Runner, Runtime

if TYPE_CHECKING:
    from slimformer.tasks.base import Task


@final
@dataclass(frozen=True)
class OnnxRuntime(Runtime):
    """ONNX Runtime's CPU provider."""

    extra: ClassVar[str | None] = None
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime", "tokenizers", "numpy")

    def available(self) -> bool:
        return find_spec("onnxruntime") is not None

    def version(self) -> str:
        import onnxruntime

        return str(onnxruntime.__version__)

    def accepts(self, path: Path) -> bool:
        return path.is_file() and path.suffix == ".onnx"

    def load(self, path: Path, threads: int) -> Runner:
        if not self.available():
            raise ExtraError("the runtime 'onnxruntime' is not installed.", help="pip install onnxruntime")
        import onnxruntime

        try:
            session = onnxruntime.InferenceSession(str(path), _options(threads), providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common public type
            raise ModelError(
                f"ONNX Runtime {self.version()} cannot load {path}.",
                facts=str(error).strip().splitlines()[:1],
                help="export the model again, or update onnxruntime.",
            ) from error
        names = [item.name for item in session.get_inputs()]
        outputs = [item.name for item in session.get_outputs()]

        def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return dict(zip(outputs, session.run(outputs, {name: inputs[name] for name in names}), strict=True))

        return run

    def snippet(self, task: Task, folder: Path, file: str, texts: Sequence[tuple[str, ...]], max_length: int) -> str:
        return task.snippet(folder, file, texts, max_length)


def _options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1  # encoders are one chain of operators: nothing runs side by side
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it slows down whoever runs next
    return options
