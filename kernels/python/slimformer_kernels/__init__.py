"""The compiled kernels of slimformer: where the library is. `slimformer.kernels` uses it; so can any program, by ctypes or cffi.

The library exports the C functions of include/slimformer_kernels.h.
"""

from pathlib import Path

__all__ = ["library_path"]


def library_path() -> str:
    """The compiled library, beside this file."""
    here = Path(__file__).parent
    for name in ("libslimformer_kernels.so", "libslimformer_kernels.dylib"):
        if (here / name).is_file():
            return str(here / name)
    raise FileNotFoundError(f"no compiled library in {here}: install slimformer-kernels again")
