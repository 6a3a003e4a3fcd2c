"""Opens ONNX files that call the compiled kernels, in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slimformer.errors import ModelError
from slimformer.kernels.library import processor_path
from slimformer.runtimes.onnxruntime import open_with_kernels

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions


def session(path: str | Path, threads: int = 0, options: SessionOptions | None = None) -> InferenceSession:
    """An ONNX Runtime session for a file that calls the kernels; it also opens any other file.

    threads: of ONNX Runtime's pool, which the kernels use too; 0: as many as cores. options: your own, with which `threads` is
    ignored; the library is registered with them. ExtraError if the kernels are not installed or cannot run here, ModelError if the
    file is damaged or needs a newer version.
    """
    import onnxruntime

    if not Path(path).is_file():
        raise ModelError(f"there is no file {path}.")
    processor_path()
    if options is None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return open_with_kernels(Path(path), options)
