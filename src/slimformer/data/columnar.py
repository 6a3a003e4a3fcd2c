"""Reads files that hold their rows by columns: Parquet and Arrow, also those that `datasets` saves to disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimformer.data.texts import PACKED, most_bytes, too_large
from slimformer.errors import DataError, ExtraError, shown


@dataclass(frozen=True)
class Columns:
    """The columns of a file by their names, which need not differ, and for columns of class ids the names of the classes."""

    names: Sequence[str]
    values: Sequence[Sequence[Any]]
    rows: int
    class_names: Mapping[str, tuple[str, ...]]


def read_parquet(path: Path) -> Columns:
    """The columns of a Parquet file; DataError if it is damaged, empty, or larger than the memory."""
    if not path.is_file():
        raise DataError(f"{path} does not exist.", help="check the path.")
    if path.suffix.lower() in PACKED:
        raise DataError(f"{path} is a packed Parquet file.", help="unpack it; Parquet is packed already.")
    try:
        import pyarrow.parquet
    except ImportError:
        raise ExtraError("Parquet files need the package pyarrow.", help="pip install pyarrow") from None
    try:
        # one file by itself: the default would read a Hive partition out of the folder names
        file = pyarrow.parquet.ParquetFile(path)
        names = list(map(str, file.schema_arrow.names))
        columns = _parquet_columns(path, file)
        class_names = _arrow_names(file.schema_arrow.metadata)
    except DataError:
        raise
    except Exception as error:  # damaged files fail in many places, with Arrow's, the system's and Python's errors
        raise DataError(
            f"{path} cannot be read as Parquet: {(str(error).splitlines() or [type(error).__name__])[0]}",
            help="write it again; a file that was cut off while copying looks like this.",
        ) from None
    rows = file.metadata.num_rows
    if not rows:
        raise DataError(f"{path} has no rows.", help="a table needs at least one row.")
    short = next((name for name, values in zip(names, columns, strict=True) if len(values) != rows), None)
    if short is not None:
        raise DataError(
            f"{path} is damaged: its column {shown(short)} has another number of values than the {rows:,} rows it tells of.",
            help="write it again.",
        )
    return Columns(names, columns, rows, class_names)


def read_arrow(path: Path) -> Columns:
    """The columns of an Arrow file, as `datasets` and Feather write them; DataError as for Parquet."""
    try:
        import pyarrow.ipc
    except ImportError:
        raise ExtraError("Arrow files need the package pyarrow.", help="pip install pyarrow") from None
    most = most_bytes()
    try:
        with pyarrow.memory_map(str(path)) as source:
            whole = source.read(6) == b"ARROW1"
            source.seek(0)
            table = (pyarrow.ipc.open_file(source) if whole else pyarrow.ipc.open_stream(source)).read_all()
            if table.nbytes > most:
                raise too_large(path, table.nbytes)
            columns = [column.to_pylist() for column in table.columns]
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.", help="check the path.") from None
    except Exception as error:
        raise DataError(
            f"{path} cannot be read as Arrow: {(str(error).splitlines() or [type(error).__name__])[0]}",
            help="write it again; a file that was cut off while copying looks like this.",
        ) from None
    if not table.num_rows:
        raise DataError(f"{path} has no rows.", help="a table needs at least one row.")
    return Columns(list(map(str, table.column_names)), columns, table.num_rows, _arrow_names(table.schema.metadata))


def _parquet_columns(path: Path, file: Any) -> list[list[Any]]:
    """The columns as Python values; DataError as soon as they are more than the memory holds: packed text can be a thousandth."""
    import pyarrow

    meta, most = file.metadata, most_bytes()
    columns: list[list[Any]] = [[] for _ in file.schema_arrow.names]
    told = sum(meta.row_group(group).column(place).total_uncompressed_size
               for group in range(meta.num_row_groups) for place in range(meta.num_columns))  # fmt: skip
    total = meta.num_rows * len(columns) * 8
    if max(told, total) > most:
        raise too_large(path, max(told, total))
    # equal values stay one value: a column that repeats a long text is small in the file, and stays small here
    texts = [
        item.name
        for item in file.schema_arrow
        if pyarrow.types.is_string(item.type) or pyarrow.types.is_large_string(item.type)
    ]
    file = type(file)(path, read_dictionary=texts)
    for batch in file.iter_batches(batch_size=4096):
        for column, values in zip(columns, batch.columns, strict=True):
            if pyarrow.types.is_dictionary(values.type):
                words = values.dictionary.to_pylist()
                sizes = [len(word or "") for word in words]
                indices = values.indices.to_pylist()
                total += sum(sizes[index] for index in indices if index is not None)
                column += [None if index is None else words[index] for index in indices]
            else:
                total += values.nbytes
                column += values.to_pylist() if total <= most else []
            if total > most:
                raise too_large(path, int(total / max(1, len(column)) * meta.num_rows))
    return columns


def _arrow_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """Class names that `datasets` writes into the schema of its Parquet files; those of a list are those of its items."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {
            name: kind[0] if isinstance(kind, list) else kind.get("feature", kind) for name, kind in features.items() if kind
        }
        return {
            name: tuple(map(str, kind["names"]))
            for name, kind in kinds.items()
            if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}
