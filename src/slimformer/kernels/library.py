"""The functions of the compiled library, on numpy arrays.

The library comes with the package slimformer-kernels; its header `slimformer_kernels.h` says what each function does. Nothing here
is needed to run a model: ONNX Runtime calls the library itself.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np

from slimformer.errors import ExtraError, ModelError

INTERFACE = 2
_PACKAGE = "slimformer_kernels"
Activation = Literal["none", "relu", "gelu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("none", "relu", "gelu", "gelu_tanh")
BLOCK_ROWS = (0, 1, 2, 4, 16)  # outputs of a block; 0: all weights are stored
ALIGNMENT = 64


class _Product(ctypes.Structure):
    """sfk_product."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("x_codes", ctypes.c_void_p),
        ("x_scale", ctypes.c_void_p),
        ("x_zero", ctypes.c_void_p),
        ("per_row", ctypes.c_int),
        ("activation", ctypes.c_int),
        ("residual", ctypes.c_void_p),
        ("norm_gain", ctypes.c_void_p),
        ("norm_shift", ctypes.c_void_p),
        ("norm_epsilon", ctypes.c_float),
        ("y", ctypes.c_void_p),
        ("y_sums", ctypes.c_void_p),
        ("y_codes", ctypes.c_void_p),
        ("y_scale", ctypes.c_float),
        ("y_zero", ctypes.c_uint8),
        ("parallel", ctypes.c_void_p),
        ("pool", ctypes.c_void_p),
        ("threads", ctypes.c_int),
    )


class _Texts(ctypes.Structure):
    """sfk_texts."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("ids", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("types", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("parallel", ctypes.c_void_p),
        ("pool", ctypes.c_void_p),
        ("threads", ctypes.c_int),
    )


def installed() -> bool:
    """Whether the package with the compiled library is there."""
    return find_spec(_PACKAGE) is not None


def library_path() -> str:
    """The compiled library; ExtraError if it is not installed."""
    if not installed():
        raise ExtraError(
            "the compiled kernels are not installed.",
            help="pip install 'slimformer[kernels]', or `make kernels` in a clone of the repository.",
        )
    import slimformer_kernels

    return str(slimformer_kernels.library_path())


def processor_path() -> str:
    """The processor path in use: "avx512vnni", "avxvnni", "avx2", "neon" or "scalar".

    ExtraError if SLIMFORMER_KERNELS_PATH names one that cannot run here.
    """
    name = _library().sfk_path()
    if name is None:
        raise ExtraError(f"the kernels cannot run: {_message()}.", help="unset SLIMFORMER_KERNELS_PATH.")
    return str(name.decode())


def set_processor_path(name: str) -> bool:
    """Changes the path for the whole process, for tests; False if it cannot run here."""
    return bool(_library().sfk_set_path(name.encode()) == 0)


def pack_weights(weights: np.ndarray, scales: np.ndarray, bias: np.ndarray | None = None, block_rows: int = 0) -> np.ndarray:
    """A matrix in the packed format, as bytes aligned to 64.

    weights: int8, (outputs, inputs); scales: (outputs,): y = scales * (weights @ x) + bias. block_rows: 0 stores all weights; 1, 2, 4
    or 16 stores only blocks of that many outputs by 4 inputs that are not all zero.
    """
    values = np.ascontiguousarray(weights, np.int8)
    outputs, inputs = values.shape
    steps = np.ascontiguousarray(np.broadcast_to(scales, (outputs,)), np.float32)
    shift = None if bias is None else np.ascontiguousarray(np.broadcast_to(bias, (outputs,)), np.float32)
    size = ctypes.c_size_t()
    _check(_library().sfk_pack_size(block_rows, outputs, inputs, _pointer(values), ctypes.byref(size)))
    packed = aligned(size.value)
    _check(
        _library().sfk_pack(
            block_rows, outputs, inputs, _pointer(values), _pointer(steps), _pointer(shift), _pointer(packed), packed.nbytes
        )
    )
    return packed


def aligned(size: int) -> np.ndarray:
    """That many bytes of zeros, at an address that is a multiple of 64."""
    room = np.zeros(size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + size]


class Linear:
    """A packed matrix that is ready to multiply; ModelError if the bytes are damaged, of a newer format, or no matrix."""

    def __init__(self, packed: np.ndarray) -> None:
        self._packed = np.ascontiguousarray(packed, np.uint8)
        self._handle = ctypes.c_void_p()
        _check(_library().sfk_open(_pointer(self._packed), self._packed.nbytes, ctypes.byref(self._handle)))
        weakref.finalize(self, _library().sfk_close, self._handle)
        self.outputs = int(_library().sfk_outputs(self._handle))
        self.inputs = int(_library().sfk_inputs(self._handle))
        self.blocks = int(_library().sfk_blocks(self._handle))

    def __call__(
        self,
        x: np.ndarray,
        scale: np.ndarray | None = None,
        zero: np.ndarray | None = None,
        *,
        activation: Activation = "none",
        residual: np.ndarray | None = None,
        norm: tuple[np.ndarray, np.ndarray, float] | None = None,
        out: np.ndarray | None = None,
        out_scale: float = 1.0,
        out_zero: int = 0,
    ) -> np.ndarray:
        """One product, in this thread.

        x: (rows, inputs), float32, or uint8 with x = (code - zero) * scale. scale, zero: one for all rows or one for each; float rows
        without them are quantized by their own extremes. norm: gain, shift and epsilon of a LayerNorm over each result. out: where
        the result is written, by default a new float32 array; int32 gives the sums of (code - zero) * weight, uint8 gives codes.
        """
        rows = len(x)
        if x.ndim != 2 or x.shape[1] != self.inputs or x.dtype not in (np.float32, np.uint8):
            raise ModelError(
                f"the input has shape {list(x.shape)} and type {x.dtype}; the matrix takes {self.inputs} values a row."
            )
        result = np.empty((rows, self.outputs), np.float32) if out is None else out
        if result.shape != (rows, self.outputs) or not result.flags.c_contiguous:
            raise ModelError(f"the result has shape {[rows, self.outputs]}, `out` has {list(result.shape)}, or gaps.")
        values = np.ascontiguousarray(x)
        steps = None if scale is None else np.ascontiguousarray(np.atleast_1d(scale), np.float32)
        zeros = None if zero is None else np.ascontiguousarray(np.atleast_1d(zero), np.uint8)
        counts = {len(item) for item in (steps, zeros) if item is not None}
        if len(counts) > 1 or not counts <= {1, rows}:
            raise ModelError("there must be one scale and one zero for all rows, or one of each for each row.")
        product = _Product(rows=rows, activation=ACTIVATIONS.index(activation), y_scale=out_scale, y_zero=out_zero)
        setattr(product, "x_codes" if x.dtype == np.uint8 else "x", _pointer(values))
        product.x_scale, product.x_zero = _pointer(steps), _pointer(zeros)
        product.per_row = int(steps is not None and len(steps) == rows)
        held = [values, steps, zeros]  # the arrays behind the pointers
        if residual is not None:
            added = np.ascontiguousarray(np.broadcast_to(residual, result.shape), np.float32)
            product.residual = _pointer(added)
            held.append(added)
        if norm is not None:
            gain, shift = (np.ascontiguousarray(np.broadcast_to(item, (self.outputs,)), np.float32) for item in norm[:2])
            product.norm_gain, product.norm_shift, product.norm_epsilon = _pointer(gain), _pointer(shift), norm[2]
            held += [gain, shift]
        targets = {"float32": "y", "int32": "y_sums", "uint8": "y_codes"}
        setattr(product, targets[result.dtype.name], _pointer(result))
        _check(_library().sfk_multiply(self._handle, ctypes.byref(product)))
        return result


class Encoder:
    """A packed encoder that is ready to run, in this thread; ModelError if the bytes are damaged or of a newer format."""

    def __init__(self, packed: np.ndarray) -> None:
        self._packed = np.ascontiguousarray(packed, np.uint8)
        self._handle = ctypes.c_void_p()
        _check(_library().sfk_encoder_open(_pointer(self._packed), self._packed.nbytes, ctypes.byref(self._handle)))
        weakref.finalize(self, _library().sfk_encoder_close, self._handle)
        self.hidden = int(_library().sfk_encoder_hidden(self._handle))
        self.first_only = bool(_library().sfk_encoder_first_only(self._handle))

    def __call__(self, ids: np.ndarray, mask: np.ndarray | None = None, types: np.ndarray | None = None) -> np.ndarray:
        """Hidden states, (rows, columns, hidden), 0 where the mask is; or (rows, hidden) of the first columns."""
        inputs = [None if item is None else np.ascontiguousarray(item, np.int64) for item in (ids, mask, types)]
        shape = np.shape(ids)
        if len(shape) != 2 or any(item is not None and item.shape != shape for item in inputs):
            raise ModelError("ids, mask and types must have the same shape, (rows, columns).")
        result = np.empty((shape[0], self.hidden) if self.first_only else (*shape, self.hidden), np.float32)
        texts = _Texts(shape[0], shape[1], *(_pointer(item) for item in inputs), _pointer(result))
        _check(_library().sfk_encoder_run(self._handle, ctypes.byref(texts)))
        return result


def encoder_digest(packed: np.ndarray) -> int:
    """The digest that belongs in the header of a packed encoder."""
    return int(_library().sfk_digest(_pointer(packed), packed.nbytes))


def peak_operations() -> float:
    """Integer operations a second of one thread, two for each product, in a loop of dot products that stays in registers."""
    return float(_library().sfk_peak_operations())


def peak_bytes(buffer: int) -> float:
    """Bytes a second that one thread reads from a buffer of that many bytes."""
    return float(_library().sfk_peak_bytes(buffer))


@cache
def _library() -> Any:
    library = ctypes.CDLL(library_path())
    if library.sfk_interface() != INTERFACE:
        raise ExtraError(
            f"slimformer-kernels has interface {library.sfk_interface()}; this slimformer needs {INTERFACE}.",
            help="install slimformer and slimformer-kernels of the same version.",
        )
    whole, size, pointer, text = ctypes.c_int64, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_char_p
    matrix: list[Any] = [ctypes.c_int, whole, whole, pointer]
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "message": (text, []),
        "path": (text, []),
        "set_path": (ctypes.c_int, [text]),
        "pack_size": (ctypes.c_int, [*matrix, pointer]),
        "pack": (ctypes.c_int, [*matrix, pointer, pointer, pointer, size]),
        "open": (ctypes.c_int, [pointer, size, pointer]),
        "close": (None, [pointer]),
        "outputs": (whole, [pointer]),
        "inputs": (whole, [pointer]),
        "blocks": (whole, [pointer]),
        "multiply": (ctypes.c_int, [pointer, pointer]),
        "encoder_open": (ctypes.c_int, [pointer, size, pointer]),
        "encoder_close": (None, [pointer]),
        "encoder_hidden": (whole, [pointer]),
        "encoder_first_only": (ctypes.c_int, [pointer]),
        "encoder_run": (ctypes.c_int, [pointer, pointer]),
        "digest": (ctypes.c_uint64, [pointer, size]),
        "peak_operations": (ctypes.c_double, []),
        "peak_bytes": (ctypes.c_double, [size]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"sfk_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def _message() -> str:
    return str(_library().sfk_message().decode())


def _check(status: int) -> None:
    if status:
        raise ModelError(f"the kernels refuse: {_message()}.")


def _pointer(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data
