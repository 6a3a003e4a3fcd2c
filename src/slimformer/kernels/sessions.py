"""Opens ONNX files that call the compiled kernels, in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slimformer.errors import ExtraError, ModelError
from slimformer.kernels.library import library_path, processor_path

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
    try:
        options.register_custom_ops_library(library_path())
    except Exception as error:  # its exceptions have no common public type
        raise ExtraError(
            f"ONNX Runtime {onnxruntime.__version__} refuses the kernels.",
            facts=str(error).strip().splitlines()[:1],
            help="pip install -U onnxruntime: 1.17 or newer is needed.",
        ) from error
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelError(f"ONNX Runtime cannot open {path}.", facts=str(error).strip().splitlines()[:1]) from error
