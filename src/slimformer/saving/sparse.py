"""The sparse file: model.safetensors with matrices that have many exact zeros stored without them, and large ones in smaller values.

docs/sparse-file.md gives the layout, byte by byte. `pack` picks a layout for each matrix: every weight and no index, if smaller values
are enough; blocks with a column number each, if the values come in blocks (1x4 above all: a kernel can compute from it as it stands, so
it goes before bits that would take less); else single values with a bit for every weight, or with a column number each, whichever is
smaller. float32 comes back bit for bit. Smaller values are rounded first and packed after, so that reading and packing again gives the
same file. `read_tensors` trusts nothing: it checks shapes, counts and indices before it makes a matrix.
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

KEY = "slimformer.sparse"  # a key of the file's metadata
VERSION = 2
READ = (1, 2)  # version 1 had no index "none" and no tensors of three dimensions
LEAST_VALUES = 4096  # a matrix without zeros that has fewer keeps float32: its names in the header would cost what it saves
LEAST_ZEROS = 0.3  # if a smaller share of a matrix is zero, a bit for every weight saves too little
BLOCKS = ((32, 32), (16, 16), (8, 8), (4, 4), (1, 4))  # the first that is full is taken: one column number for many values
FULL = 0.95  # the least share of values that are not zero, over all blocks that are not empty
COLUMNS = 1 << 16  # a column number is below this
SMALLEST_ROW = 2.0**-90  # a row whose largest value is below this becomes 0 as int8: its scale would lose digits
LARGEST_SCALE = np.finfo(np.float32).max / 127  # the product with any code stays a float32
TOP_CODES = (127, 31, 7)  # the largest codes of the grids of `quantization`: 8, 6 and 4 bits
CHUNK_ROWS = 4096  # rows that are rounded at a time: a word table has a quarter of a million
FIRST_COLUMNS = 64  # columns that are checked first; rows that fail here are skipped
DTYPES: Mapping[Values, tuple[str, Any]] = {
    "float32": ("F32", np.float32),
    "float16": ("F16", np.float16),
    "int8": ("I8", np.int8),
}


@dataclass(frozen=True)
class Layout:
    """How one matrix is stored. Blocks of several weights have column numbers; without an index, each row is a block."""

    shape: tuple[int, int]
    block: tuple[int, int]
    index: Index
    values: Values

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks from top to bottom and from left to right."""
        return self.shape[0] // self.block[0], self.shape[1] // self.block[1]

    def parts(self, count: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors that hold it if `count` blocks are not empty: name -> safetensors' dtype and shape."""
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
    """The tensors, split into parts if that saves bytes, and the metadata that `read_tensors` needs; no metadata if none is split.

    `values` says how large and sparse matrices are stored: "float16" and "int8" (with a scale for each output, or each word of a table)
    round them, except those named in `exact`.
    """
    import torch

    packed: dict[str, Tensor] = {}
    layouts: dict[str, Any] = {}
    for name, tensor in tensors.items():
        own = _values_of(tensor, "float32" if name in exact else values)
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
    """The largest error of `pack`, as a share of the largest value of the matrix; 0 if all values come back exactly."""
    worst = 0.0
    for name, tensor in tensors.items():
        if values != "float32" and name not in exact and _values_of(tensor, values) is not None:
            matrix = _matrix(tensor)
            gap = np.abs(unpack_matrix(*pack_matrix(matrix, values, name)) - matrix).max()
            worst = max(worst, float(gap / (np.abs(matrix).max() or 1.0)))
    return worst


def _values_of(tensor: Tensor, values: Values) -> Values | None:
    """The values that a tensor's parts have if `values` are asked for; None if it is stored whole."""
    import torch

    if tensor.dtype != torch.float32 or tensor.ndim < 2 or not tensor.numel():
        return None
    if values != "float32" and tensor.numel() >= LEAST_VALUES:
        return values
    return values if int((tensor == 0).sum()) >= LEAST_ZEROS * tensor.numel() else None


def _matrix(tensor: Tensor) -> np.ndarray:
    """A tensor as rows: all axes before the last are rows (a sum of products has one more axis for its terms)."""
    return tensor.detach().cpu().flatten(0, -2).numpy()


def pack_matrix(matrix: np.ndarray, values: Values, name: str = "the matrix") -> tuple[Layout, dict[str, np.ndarray]]:
    """One float32 matrix in parts, whatever its zeros; ModelError if its values do not fit."""
    if values != "float32" and not np.isfinite(matrix).all():
        raise ModelError(f"{name} has values that are not finite, which {values} cannot hold.", help="store float32.")
    codes, scales = _rounded(np.ascontiguousarray(matrix), values)
    if not np.isfinite(codes).all() and values == "float16":
        raise ModelError(f"{name} has values above 65,504, which float16 cannot hold.", help="store float32 or int8.")
    used = codes.view(np.uint32) != 0 if values == "float32" else codes != 0  # its bits count: -0.0 is no zero
    block, index = _choose_layout(used, codes.itemsize)
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
    """The values as they are stored, and for int8 the scale of each row.

    A row whose values are whole multiples of one number keeps that number as its scale, and comes back exactly. Any other scale has 16
    significant bits: its product with any code is exact in float32, so that values that were read round to the same codes again.
    """
    if values == "float32":
        return matrix, None
    if values == "float16":
        with np.errstate(over="ignore"):
            rounded = matrix.astype(np.float16)
        rounded[rounded == 0] = 0  # no -0.0
        return rounded, None
    largest = np.abs(matrix).max(axis=1, initial=0.0)  # (rows,)
    scales = (np.where(largest < SMALLEST_ROW, 0, largest) / np.float32(127)).astype(np.float32)
    scales = (scales.view(np.uint32) & np.uint32(0xFFFFFF00)).view(np.float32)
    steps = _steps(matrix, largest)
    scales = np.where(steps > 0, steps, scales)
    codes = np.zeros(matrix.shape, dtype=np.int8)
    for rows in _chunks(np.flatnonzero(scales > 0)):
        codes[rows] = np.clip(np.round(matrix[rows] / scales[rows, None]), -127, 127)
    return codes, scales


def _chunks(rows: np.ndarray) -> list[np.ndarray]:
    """The same rows, a few thousand at a time."""
    return np.array_split(rows, -(-len(rows) // CHUNK_ROWS)) if len(rows) else []


def _steps(matrix: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """For each row the number of which all its values are whole multiples, by at most 127; 0 if there is none: (rows,).

    It is searched among the steps that training with fake quantization uses: one for each row, or one for all. `largest`: (rows,).
    """
    found = np.zeros(len(matrix), dtype=np.float32)
    for span in (largest, np.full_like(largest, largest.max(initial=0.0))):
        for top in TOP_CODES:
            step = np.where(largest < SMALLEST_ROW, 0, span / np.float32(top)).astype(np.float32)
            for near in (
                step,
                np.nextafter(step, np.float32(0)),
                np.nextafter(step, np.float32(np.inf)),
            ):  # top * step was rounded
                rows = np.flatnonzero((found == 0) & (step > 0) & (near <= LARGEST_SCALE))
                rows = rows[_are_multiples(matrix[rows, :FIRST_COLUMNS], near[rows])]
                for some in _chunks(rows):
                    right = some[_are_multiples(matrix[some], near[some])]
                    found[right] = near[right]
    return found


def _are_multiples(matrix: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Whether a row is codes from -127 to 127 times its step, to the last bit: (rows,)."""
    with np.errstate(over="ignore"):
        codes = np.round(matrix / steps[:, None])
        return np.asarray(((codes * steps[:, None] == matrix) & (np.abs(codes) <= 127)).all(axis=1))


def _choose_layout(used: np.ndarray, size: int) -> tuple[tuple[int, int], Index]:
    """The block and the index of values with `size` bytes: no index if that takes less than bits, else the largest block that is full."""
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


def read_tensors(file: Path, expected: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """All tensors of a model file, with sparse matrices made whole; ModelError, before a matrix is made, if the file contradicts itself.

    `expected`: the shapes of the model's tensors. The caller compares dense ones, this function compares sparse ones.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file
    from torch import from_numpy

    try:
        with safe_open(file, framework="pt") as stream:
            metadata = (stream.metadata() or {}).get(KEY)
            if metadata is None:
                return load_file(file)
            matrices = _read_metadata(file, metadata)
            header = _header(stream)
            tensors: dict[str, Tensor] = {}
            taken: set[str] = set()
            for name, facts in matrices.items():
                with _naming(file, name):
                    layout = _layout(facts, _rows(expected.get(name)))
                    names = _checked_parts(name, layout, header)
                    taken |= set(names.values())
                    parts = {part: stream.get_tensor(full).numpy() for part, full in names.items()}
                    tensors[name] = from_numpy(unpack_matrix(layout, parts)).view(*expected[name])
            tensors |= {name: stream.get_tensor(name) for name in header if name not in taken}
    except SafetensorError as error:
        raise ModelError(f"{file} cannot be read: {error}.", help=_AGAIN) from None
    return tensors


def zero_shares(file: Path, expected: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """The share of zeros that were left out of each matrix, from the file's header alone; refuses what `read_tensors` refuses there."""
    from safetensors import SafetensorError, safe_open

    found = {}
    try:
        with safe_open(file, framework="pt") as stream:
            metadata = (stream.metadata() or {}).get(KEY)
            matrices = _read_metadata(file, metadata) if metadata is not None else {}
            header = _header(stream) if matrices else {}
            for name, facts in matrices.items():
                with _naming(file, name):
                    layout = _layout(facts, _rows(expected.get(name)))
                    stored = header[_checked_parts(name, layout, header)["values"]][1]
                if layout.index != "none":
                    found[name] = 1 - math.prod(stored) / math.prod(layout.shape)
    except SafetensorError as error:
        raise ModelError(f"{file} cannot be read: {error}.", help=_AGAIN) from None
    return found


_AGAIN = "copy the file again, or make it again."


class _Wrong(Exception):
    """A fault of a matrix: the end of a sentence that begins with it."""


@contextmanager
def _naming(file: Path, name: str) -> Iterator[None]:
    """Turns a _Wrong inside into a ModelError that names file and matrix."""
    try:
        yield
    except _Wrong as wrong:
        raise ModelError(f"{file}: the sparse matrix '{name}' {wrong}.", help=_AGAIN) from None


def _header(stream: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor, by name; no tensor is read."""
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
    """The shape of a tensor's matrix, as `_matrix` makes it; None if it has none."""
    return (math.prod(shape[:-1]), shape[-1]) if shape is not None and len(shape) > 1 else None


def _layout(facts: Any, expected: tuple[int, int] | None) -> Layout:
    """The layout in the metadata; _Wrong if it is none, or of a matrix that the model does not have."""
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
    """The full names of its parts; _Wrong unless exactly these are there, with the dtypes and shapes of one number of blocks."""
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
    """The float32 matrix in parts of the right dtypes and shapes; _Wrong, before it is made, if an index is invalid."""
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
    if not ((scales >= 0) & (scales <= LARGEST_SCALE)).all() or (codes < -127).any():
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
