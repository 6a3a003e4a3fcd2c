"""The sparse file: matrices with many exact zeros in model.safetensors without them, and any large one in smaller values.

docs/sparse-file.md is the layout, byte by byte. `pack` picks one for each matrix: every weight and no index, where smaller values are
enough; blocks with a column number each, where values come in blocks (1x4 above all: a kernel can compute from it as it stands, so it
goes before bits that would take less); else single values with a bit for every weight or a column number each, whichever is smaller.
float32 comes back bit for bit. Smaller values are rounded first and packed after, so that what was read and packed again is the same
file. `read` trusts nothing: shapes, counts and indices are checked before a matrix is made. Nothing here computes with a model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np

from slimformer.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

Values = Literal["float32", "float16", "int8"]
Index = Literal["bits", "columns", "none"]

KEY = "slimformer.sparse"  # of the file's metadata
VERSION = 2
READ = (1, 2)  # 1 knew no index "none", and no tensors of three dimensions
LARGE = 4096  # values of a matrix without zeros that smaller values are worth a name in the header for
LEAST_ZEROS = 0.3  # of a matrix; below, a bit for every weight saves too little to be worth an own layout
BLOCKS = ((32, 32), (16, 16), (8, 8), (4, 4), (1, 4))  # the first that is FULL is taken: a column number for many values
FULL = 0.95  # of a block's values are not zero, over all blocks that are not empty
COLUMNS = 1 << 16  # what a column number can tell apart
SMALLEST = 2.0**-90  # a row below is 0 as int8: its scale would lose digits that it needs
LARGEST = np.finfo(np.float32).max / 127  # of a scale: the product with any code stays a float32
TOPS = (127, 31, 7)  # largest codes of the grids that `quantization` leaves weights on: 8, 6 and 4 bits
ROWS = 4096  # that are rounded at a time: a word table has a quarter of a million
SEEN = 64  # columns that tell of nearly every row whether it is worth a look at all of it
DTYPES: Mapping[Values, tuple[str, Any]] = {
    "float32": ("F32", np.float32),
    "float16": ("F16", np.float16),
    "int8": ("I8", np.int8),
}


@dataclass(frozen=True)
class Layout:
    """How one matrix is stored. Blocks larger than one weight have column numbers; without an index they are the rows, all of them."""

    shape: tuple[int, int]
    block: tuple[int, int]
    index: Index
    values: Values

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks from top to bottom and from left to right."""
        return self.shape[0] // self.block[0], self.shape[1] // self.block[1]

    def parts(self, count: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors that hold it where `count` blocks are not empty: name -> safetensors' dtype and shape."""
        rows, columns = self.shape
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        if self.index == "none":
            count = rows
        elif self.index == "bits":
            found = {"bits": ("U8", (-(-rows * columns // 8),))}
        else:
            found = {"starts": ("I32", (self.grid[0] + 1,)), "columns": ("U16", (count,))}
        found["values"] = (DTYPES[self.values][0], (count, self.block[0] * self.block[1]))
        if self.values == "int8":
            found["scales"] = ("F32", (rows,))
        return found


# -- Writing -------------------------------------------------------------------------------------------------------------------


def pack(
    tensors: Mapping[str, Tensor], values: Values = "float32", exact: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same tensors with those that are worth it in parts, and the metadata that `read` needs; none of it where none is.

    `values` is how large and sparse matrices are stored: "float16" and "int8" (with a scale for each output, or each word of a table)
    round them, but not those named in `exact`.
    """
    import torch

    packed: dict[str, Tensor] = {}
    layouts: dict[str, Any] = {}
    for name, tensor in tensors.items():
        own = _values(tensor, "float32" if name in exact else values)
        if own is None:
            packed[name] = tensor
            continue
        layout, parts = pack_matrix(_matrix(tensor), own, name)
        layouts[name] = asdict(layout)
        packed |= {_part(name, part): torch.from_numpy(array) for part, array in parts.items()}
    metadata = {KEY: json.dumps({"version": VERSION, "matrices": layouts}, sort_keys=True)} if layouts else {}
    return packed, metadata


def size_bytes(tensors: Mapping[str, Tensor], values: Values = "float32", exact: Collection[str] = ()) -> int:
    """Bytes of all tensors as `pack` stores them; a file has some kilobytes of header on top."""
    return sum(tensor.nbytes for tensor in pack(tensors, values, exact)[0].values())


def rounding(tensors: Mapping[str, Tensor], values: Values, exact: Collection[str] = ()) -> float:
    """By how much `pack` rounds values at most, as a share of the largest of their matrix; 0 where what is read is what was there."""
    worst = 0.0
    for name, tensor in tensors.items():
        if values != "float32" and name not in exact and _values(tensor, values) is not None:
            matrix = _matrix(tensor)
            gap = np.abs(unpack_matrix(*pack_matrix(matrix, values, name)) - matrix).max()
            worst = max(worst, float(gap / (np.abs(matrix).max() or 1.0)))
    return worst


def _values(tensor: Tensor, values: Values) -> Values | None:
    """What a tensor is stored in by parts where `values` are asked for; None where it is left as it is."""
    import torch

    if tensor.dtype != torch.float32 or tensor.ndim < 2 or not tensor.numel():
        return None
    if values != "float32" and tensor.numel() >= LARGE:
        return values
    return values if int((tensor == 0).sum()) >= LEAST_ZEROS * tensor.numel() else None


def _matrix(tensor: Tensor) -> np.ndarray:
    """Its rows, whatever stands before the last dimension: a Kronecker factor has its terms there."""
    return tensor.detach().cpu().flatten(0, -2).numpy()


def pack_matrix(matrix: np.ndarray, values: Values, name: str = "the matrix") -> tuple[Layout, dict[str, np.ndarray]]:
    """One float32 matrix in parts, whatever its zeros; ModelError where its values do not fit."""
    if values != "float32" and not np.isfinite(matrix).all():
        raise ModelError(f"{name} has values that are not finite, which {values} cannot hold.", help="store float32.")
    codes, scales = _rounded(np.ascontiguousarray(matrix), values)
    if not np.isfinite(codes).all() and values == "float16":
        raise ModelError(f"{name} has values above 65,504, which float16 cannot hold.", help="store float32 or int8.")
    used = codes.view(np.uint32) != 0 if values == "float32" else codes != 0  # by its bits, -0.0 is no zero
    block, index = _choose(used, codes.itemsize)
    layout = Layout((matrix.shape[0], matrix.shape[1]), block, index, values)
    scaled = {} if scales is None else {"scales": scales}
    if index == "none":
        return layout, {"values": codes, **scaled}
    down, across = layout.grid
    tiles = codes.reshape(down, block[0], across, block[1])
    occupied = used.reshape(tiles.shape).any(axis=(1, 3))  # (down, across)
    where = np.nonzero(occupied)
    parts: dict[str, np.ndarray] = {}
    if index == "bits":
        parts["bits"] = np.packbits(occupied.reshape(-1), bitorder="little")
    else:
        parts["starts"] = np.concatenate([[0], occupied.sum(1).cumsum()]).astype(np.int32)
        parts["columns"] = where[1].astype(np.uint16)
    parts["values"] = np.ascontiguousarray(tiles[where[0], :, where[1], :].reshape(len(where[0]), block[0] * block[1]))
    return layout, parts | scaled


def _rounded(matrix: np.ndarray, values: Values) -> tuple[np.ndarray, np.ndarray | None]:
    """The values as they are stored, and the scale of each row for int8.

    A row whose values are whole multiples of one number keeps that as its scale, and comes back exactly. Any other scale has 16
    significant bits: the product with any code is then exact in float32, and what was read rounds to the same codes.
    """
    if values == "float32":
        return matrix, None
    if values == "float16":
        with np.errstate(over="ignore"):
            rounded = matrix.astype(np.float16)
        rounded[rounded == 0] = 0  # no -0.0
        return rounded, None
    largest = np.abs(matrix).max(axis=1, initial=0.0)  # (rows,)
    scales = (np.where(largest < SMALLEST, 0, largest) / np.float32(127)).astype(np.float32)
    scales = (scales.view(np.uint32) & np.uint32(0xFFFFFF00)).view(np.float32)
    steps = _steps(matrix, largest)
    scales = np.where(steps > 0, steps, scales)
    codes = np.zeros(matrix.shape, dtype=np.int8)
    for rows in _some(np.flatnonzero(scales > 0)):
        codes[rows] = np.clip(np.round(matrix[rows] / scales[rows, None]), -127, 127)
    return codes, scales


def _some(rows: np.ndarray) -> list[np.ndarray]:
    """The same rows, some thousand at a time."""
    return np.array_split(rows, -(-len(rows) // ROWS)) if len(rows) else []


def _steps(matrix: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """The number that all values of a row are whole multiples of, at most 127, in float32; 0 for a row without one: (rows,).

    It is looked for where training with fake quantization puts it: a bucket per row, or one for all. `largest`: (rows,).
    """
    found = np.zeros(len(matrix), dtype=np.float32)
    for span in (largest, np.full_like(largest, largest.max(initial=0.0))):
        for top in TOPS:
            step = np.where(largest < SMALLEST, 0, span / np.float32(top)).astype(np.float32)
            for near in (
                step,
                np.nextafter(step, np.float32(0)),
                np.nextafter(step, np.float32(np.inf)),
            ):  # top * step was rounded
                rows = np.flatnonzero((found == 0) & (step > 0) & (near <= LARGEST))
                rows = rows[_are_multiples(matrix[rows, :SEEN], near[rows])]
                for some in _some(rows):
                    right = some[_are_multiples(matrix[some], near[some])]
                    found[right] = near[right]
    return found


def _are_multiples(matrix: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Rows that are codes from -127 to 127 times their step, to the last bit: (rows,)."""
    with np.errstate(over="ignore"):
        codes = np.round(matrix / steps[:, None])
        return np.asarray(((codes * steps[:, None] == matrix) & (np.abs(codes) <= 127)).all(axis=1))


def _choose(used: np.ndarray, size: int) -> tuple[tuple[int, int], Index]:
    """All values of `size` bytes where that takes less than bits; the largest block that is nearly full; else single ones."""
    rows, columns = used.shape
    count = int(used.sum())
    if used.size and size * used.size <= size * count + -(-used.size // 8):
        return (1, columns), "none"
    for block in BLOCKS:
        if count and not (rows % block[0] or columns % block[1]) and columns // block[1] <= COLUMNS:
            tiles = used.reshape(rows // block[0], block[0], columns // block[1], block[1]).any(axis=(1, 3))
            if count >= FULL * int(tiles.sum()) * block[0] * block[1]:
                return block, "columns"
    numbers = 2 * count + 4 * (rows + 1)
    return (1, 1), "columns" if columns <= COLUMNS and numbers < -(-rows * columns // 8) else "bits"


def _part(name: str, part: str) -> str:
    return f"{name}.sparse.{part}"


# -- Reading -------------------------------------------------------------------------------------------------------------------


def read(file: Path, expected: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """All tensors of a model file, sparse matrices whole again; ModelError where one is not what it says, before it is made.

    `expected`: the shapes of the model's tensors. Dense ones are compared by the caller, sparse ones here.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file
    from torch import from_numpy

    try:
        with safe_open(file, framework="pt") as stream:
            told = (stream.metadata() or {}).get(KEY)
            if told is None:
                return load_file(file)
            matrices = _read_metadata(file, told)
            header = _header(stream)
            tensors: dict[str, Tensor] = {}
            taken: set[str] = set()
            for name, facts in matrices.items():
                with _told(file, name):
                    layout = _layout(facts, _rows(expected.get(name)))
                    names = _checked_parts(name, layout, header)
                    taken |= set(names.values())
                    parts = {part: stream.get_tensor(full).numpy() for part, full in names.items()}
                    tensors[name] = from_numpy(unpack_matrix(layout, parts)).view(*expected[name])
            tensors |= {name: stream.get_tensor(name) for name in header if name not in taken}
    except SafetensorError as error:
        raise ModelError(f"{file} cannot be read: {error}.", help=_AGAIN) from None
    return tensors


def zeros(file: Path, expected: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Share of zeros that were left out of each matrix, where any were, by the file's header alone; refuses what `read` does there."""
    from safetensors import SafetensorError, safe_open

    found = {}
    try:
        with safe_open(file, framework="pt") as stream:
            told = (stream.metadata() or {}).get(KEY)
            matrices = _read_metadata(file, told) if told is not None else {}
            header = _header(stream) if matrices else {}
            for name, facts in matrices.items():
                with _told(file, name):
                    layout = _layout(facts, _rows(expected.get(name)))
                    stored = header[_checked_parts(name, layout, header)["values"]][1]
                if layout.index != "none":
                    found[name] = 1 - math.prod(stored) / math.prod(layout.shape)
    except SafetensorError as error:
        raise ModelError(f"{file} cannot be read: {error}.", help=_AGAIN) from None
    return found


_AGAIN = "copy the file again, or make it again."


class _Wrong(Exception):
    """What is wrong with a matrix: the end of a sentence that begins with it."""


@contextmanager
def _told(file: Path, name: str) -> Iterator[None]:
    """Turns a _Wrong inside into a ModelError that names file and matrix."""
    try:
        yield
    except _Wrong as wrong:
        raise ModelError(f"{file}: the sparse matrix '{name}' {wrong}.", help=_AGAIN) from None


def _header(stream: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor, by name; nothing of the tensors is read."""
    pieces = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118  # it is no mapping
    return {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in pieces.items()}


def _read_metadata(file: Path, text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or set(data) != {"version", "matrices"} or not isinstance(data["matrices"], dict):
        raise ModelError(f"{file}: its metadata do not tell how matrices are stored.", help=_AGAIN)
    if type(data["version"]) is not int or data["version"] not in READ:
        raise ModelError(
            f"{file}: its sparse matrices have the layout {data['version']!r}, this slimformer reads {' and '.join(map(str, READ))}.",
            help="install the slimformer that wrote it, or make the file again.",
        )
    return cast(dict[str, Any], data["matrices"])


def _rows(shape: Sequence[int] | None) -> tuple[int, int] | None:
    """The shape of a tensor's matrix, as `_matrix` makes it; None where there is none."""
    return (math.prod(shape[:-1]), shape[-1]) if shape is not None and len(shape) > 1 else None


def _layout(facts: Any, expected: tuple[int, int] | None) -> Layout:
    """The layout that metadata tell of; _Wrong where it is none, or not of a matrix that the model has."""
    if not isinstance(facts, dict) or set(facts) != {"shape", "block", "index", "values"}:
        raise _Wrong("is not told as shape, block, index and values")
    shape, block = (_pair(facts[key], key) for key in ("shape", "block"))
    if facts["index"] not in get_args(Index) or facts["values"] not in tuple(DTYPES):
        raise _Wrong(f"has the index {facts['index']!r} and the values {facts['values']!r}, which nothing writes")
    if expected is None:
        raise _Wrong("is none of the model's")
    if shape != expected:
        raise _Wrong(f"is {shape}, expected {expected}")
    if min(block) < 1 or shape[0] % block[0] or shape[1] % block[1]:
        raise _Wrong(f"is {shape}, which blocks of {block} do not divide")
    layout = Layout(shape, block, facts["index"], facts["values"])
    if layout.index == "bits" and block != (1, 1):
        raise _Wrong("has bits for blocks, which nothing writes")
    if layout.index == "none" and block != (1, shape[1]):
        raise _Wrong("has blocks that are no rows, and no index")
    return layout


def _pair(value: Any, key: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or any(type(item) is not int or item < 0 for item in value):
        raise _Wrong(f"has the {key} {value!r}, not two whole numbers")
    return value[0], value[1]


def _checked_parts(name: str, layout: Layout, header: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, str]:
    """The full names of its parts; _Wrong unless they are all there, no other, in the dtypes and shapes of one count of blocks."""
    there = {full: facts for full, facts in header.items() if full.startswith(_part(name, "")) or full == name}
    shape = header.get(_part(name, "values"), ("", ()))[1]
    count = shape[0] if shape else 0
    wanted = {_part(name, part): facts for part, facts in layout.parts(count).items()}
    for full in sorted(set(wanted) ^ set(there)):
        raise _Wrong(f"has {'no part' if full in wanted else 'a part too many,'} '{full}'")
    for full, facts in wanted.items():
        if there[full] != facts:
            raise _Wrong(f"needs '{full}' as {facts[0]} of {facts[1]}, it is {there[full][0]} of {there[full][1]}")
    if count > layout.grid[0] * layout.grid[1]:
        raise _Wrong(f"has {count} blocks where there is room for {layout.grid[0] * layout.grid[1]}")
    return {part: _part(name, part) for part in layout.parts(count)}


def unpack_matrix(layout: Layout, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """The float32 matrix that parts of the right dtypes and shapes hold; _Wrong before it is made where an index is no good."""
    down, across = layout.grid
    values, rows = parts["values"], layout.shape[0]
    if layout.values == "int8":
        _check_codes(values, parts["scales"])
    if layout.index == "none":
        codes = values
    elif layout.index == "bits":
        _check_bits(parts["bits"], len(values), down * across)
        occupied = np.unpackbits(parts["bits"], count=down * across, bitorder="little").view(bool)
        flat = np.zeros(down * across, dtype=values.dtype)
        flat[occupied] = values[:, 0]
        codes = flat.reshape(layout.shape)
    else:
        starts, columns = parts["starts"], parts["columns"]
        _check_columns(starts, columns, across)
        places = np.repeat(np.arange(down), np.diff(starts))
        tiles = np.zeros((down, layout.block[0], across, layout.block[1]), dtype=values.dtype)
        tiles[places, :, columns.astype(np.int64), :] = values.reshape(-1, *layout.block)
        codes = tiles.reshape(layout.shape)
    if layout.values == "float32":
        return codes
    if layout.values == "float16":
        return codes.astype(np.float32)
    return codes.astype(np.float32) * parts["scales"].reshape(rows, 1)


def _check_codes(codes: np.ndarray, scales: np.ndarray) -> None:
    if not ((scales >= 0) & (scales <= LARGEST)).all() or (codes < -127).any():
        raise _Wrong("has scales below 0 or beyond float32, or codes below -127")


def _check_bits(bits: np.ndarray, count: int, places: int) -> None:
    found = int(np.bitwise_count(bits).sum(dtype=np.int64))
    spare = -places % 8
    if spare and bits[-1] >> (8 - spare):
        raise _Wrong(f"has a bit beyond its {places} weights")
    if found != count:
        raise _Wrong(f"has {found} bits set and {count} values")


def _check_columns(starts: np.ndarray, columns: np.ndarray, across: int) -> None:
    if starts[0] != 0 or starts[-1] != len(columns) or (np.diff(starts.astype(np.int64)) < 0).any():
        raise _Wrong(f"has row starts that do not lead from 0 to its {len(columns)} blocks")
    if len(columns) and int(columns.max()) >= across:
        raise _Wrong(f"has the block column {int(columns.max())} of {across}")
    rising = np.diff(columns.astype(np.int64)) > 0
    rising[starts[1:-1][(starts[1:-1] > 0) & (starts[1:-1] < len(columns))] - 1] = True  # a new row begins
    if not rising.all():
        raise _Wrong("has block columns that do not rise within a row")
