"""Reads tables of examples (TSV, CSV, JSON lines, JSON, Parquet, hub data sets) and says exactly what is wrong with a bad one.

Text files are read with the standard library, because only then can an error name the line, and GLUE's literal quotes survive.
Parquet files go through pyarrow and hub names through `datasets`; each is imported only if it is needed. What the columns mean is the
business of tasks.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from slimformer.errors import DataError, ExtraError, nearest

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?", re.ASCII)  # ./reviews and ../reviews are paths
SHARD = re.compile(r"-\d{5}-of-\d{5}$")
FIELD_LIMIT = 1 << 30  # characters in a field; the standard library's own limit of 131,072 is less than some documents


@dataclass(frozen=True)
class Table:
    """Columns of equal length, and for each row the place a person finds it at."""

    where: str  # file or hub name
    columns: Mapping[str, Sequence[Any]]
    places: Sequence[int]  # line in the file, or row counted from 1
    unit: Literal["line", "row"] = "line"
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # column -> names of its ids, if the data has any

    def __len__(self) -> int:
        return len(self.places)

    def place(self, row: int) -> str:
        """Where a person finds row `row` (from 0): "reviews.csv, line 17"."""
        return f"{self.where}, {self.unit} {self.places[row]}"

    def column(self, name: str) -> Sequence[Any]:
        """The column of that name; DataError with the nearest name if there is none."""
        if name not in self.columns:
            raise DataError(
                f"{self.where} has no column '{name}'.",
                facts=[f"columns: {', '.join(map(repr, self.columns))}"],
                help=f"{nearest(name, self.columns)}."
                + (" The first line must name the columns." if self.unit == "line" else ""),
            )
        return self.columns[name]


def read_table(path: Path, *, header: Sequence[str] | None = None, literal: bool = False, extra: bool = False) -> Table:
    """The table in a file, read by its suffix; DataError for whatever is wrong with it.

    `header` names the columns if the first line is data already; `literal` takes the quotes of a TSV as they stand; `extra` allows
    surplus fields at the end of a row.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path} is not a kind of table that can be read.", help=f"known: {', '.join(SUFFIXES)}.")
    if suffix == ".parquet":
        return _parquet(path)
    text = read_text(path)
    if suffix in {".json", ".jsonl"}:
        return _json(path, text)
    if suffix == ".csv":
        first = text.partition("\n")[0]
        separator = next((mark for mark in ",;\t" if mark in first), ",")
        return _table(path, _quoted(path, text, separator), header, extra)
    if literal:
        return _table(path, _literal(text), header, extra)
    return _tsv(path, text, header, extra)


def join_tables(tables: Sequence[Table]) -> Table:
    """The shards as one table; DataError if their columns differ."""
    first = tables[0]
    if len(tables) == 1:
        return first
    for table in tables[1:]:
        if list(table.columns) != list(first.columns):
            raise DataError(
                f"{table.where} and {first.where} have different columns.",
                facts=[f"{item.where}: {', '.join(item.columns)}" for item in (first, table)],
                help="shards of one split must have the same columns.",
            )
    columns = {name: [value for table in tables for value in table.columns[name]] for name in first.columns}
    places = range(1, 1 + sum(len(table) for table in tables))
    return Table(f"{first.where} and {len(tables) - 1} more", columns, places, "row", first.class_names)


def is_hub_name(name: str) -> bool:
    """Whether a name that is no file or folder here may be one of the hub's."""
    return _HUB_NAME.fullmatch(name) is not None and Path(name).suffix.lower() not in SUFFIXES


def read_hub(name: str) -> dict[str, Table]:
    """Splits of a hub data set, `owner/name` or `owner/name:config`, as tables of their plain columns."""
    return {split: _hub_table(f"{name} [{split}]", data) for split, data in load_hub(name).items()}


def load_hub(name: str) -> dict[str, Any]:
    """Splits of a hub data set as `datasets` gives them. No other code of tasks uses the network."""
    try:
        import datasets
    except ImportError:
        raise ExtraError("hub data sets need the package datasets.", help="pip install datasets") from None
    hub, _, config = name.partition(":")
    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(hub, config or None)
        return {str(split): found[split] for split in found}
    except Exception as error:  # network, names and formats fail in as many ways as there are data sets
        reason = str(error).strip().splitlines()
        raise DataError(
            f"'{name}' is no file or folder here and could not be loaded from the hub.",
            facts=[f"{type(error).__name__}: {reason[0] if reason else ''}"],
            help="for a file, check the path; for a hub data set with several parts, name one: owner/name:part.",
        ) from None
    finally:
        if not silent:
            datasets.enable_progress_bars()


def _hub_table(where: str, data: Any) -> Table:
    # images and audio would be decoded when read: only plain values can be texts or labels
    plain = [name for name, kind in data.features.items() if type(kind).__name__ in {"Value", "ClassLabel"}]
    names = {name: tuple(data.features[name].names) for name in plain if type(data.features[name]).__name__ == "ClassLabel"}
    return Table(where, dict(data.select_columns(plain)[:]), range(1, len(data) + 1), "row", names)


def read_text(path: Path, shape: str = "a table needs a line of column names and at least one row.") -> str:
    """The text of a UTF-8 file; DataError if it is empty (`shape` says what it should hold) or not UTF-8, with the place."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.", help=_beside(path)) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.", help="check the path and its permissions.") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} is not UTF-8: byte {error.start} (0x{content[error.start]:02x}), in line {line}, is no character.",
            help="save it as UTF-8, for instance: iconv -f latin1 -t utf-8 old > new.",
        ) from None
    if not text.strip():
        raise DataError(f"{path} is empty.", help=shape)
    return text


def repair_text(text: str) -> str:
    """The text without halves of surrogate pairs, as cut-off JSON escapes leave them; tokenizers refuse those."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _beside(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else None
    if folder is None:
        return "check the path."
    return f"in {folder}: {nearest(path.name, (item.name for item in folder.iterdir()))}."


def _literal(text: str) -> list[tuple[int, list[str]]]:
    lines = text.split("\n")
    windows = lines[0].endswith("\r")
    rows = ((number, line[:-1] if windows and line.endswith("\r") else line) for number, line in enumerate(lines, 1))
    return [(number, line.split("\t")) for number, line in rows if line]


def _quoted(path: Path, text: str, separator: str) -> list[tuple[int, list[str]]]:
    """Rows with the line that each one begins in; DataError if quotes do not close."""
    limit = csv.field_size_limit(FIELD_LIMIT)
    rows: list[tuple[int, list[str]]] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    begin = 1
    try:
        for fields in reader:
            if fields:
                rows.append((begin, fields))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {begin}: {error}.",
            help='a field that holds a quote must stand in quotes, with its own quotes doubled: "she said ""no""".',
        ) from None
    finally:
        csv.field_size_limit(limit)
    return rows


def _tsv(path: Path, text: str, header: Sequence[str] | None, extra: bool) -> Table:
    """A TSV whose quotes enclose fields, if every one closes and all rows have as many fields; otherwise quotes are literal."""
    if re.search(r'(^|[\t\r\n])"', text):
        try:
            return _table(path, _quoted(path, text, "\t"), header, extra)
        except DataError:
            pass
    return _table(path, _literal(text), header, extra)


def _table(path: Path, rows: list[tuple[int, list[str]]], header: Sequence[str] | None, extra: bool) -> Table:
    names = list(header) if header is not None else rows[0][1] if rows else []
    body = rows if header is not None else rows[1:]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path} has two columns '{twice[0]}'.", help="give each column a name of its own in the first line.")
    if not body:
        raise DataError(
            f"{path} has a line of column names and no rows.",
            facts=[f"columns: {', '.join(map(repr, names))}"],
            help="the first line is read as column names.",
        )
    for place, fields in body:
        if len(fields) != len(names) and not (extra and len(fields) > len(names)):
            raise DataError(
                f"{path}, line {place}: {len(fields)} fields, the first line has {len(names)}.",
                facts=[f"the line begins: {' | '.join(fields)[:100]!r}", f"columns: {', '.join(map(repr, names))[:200]}"],
                help="a separator inside a text must stand in quotes, or a field is missing.",
            )
    columns = {name: [fields[index] for _, fields in body] for index, name in enumerate(names)}
    return Table(str(path), columns, [place for place, _ in body])


def _json(path: Path, text: str) -> Table:
    if text.lstrip().startswith("["):
        rows = _parsed(path, text, None)
        items = list(enumerate(rows, 1))
        unit: Literal["line", "row"] = "row"
    else:
        # only \n ends a line: JSON texts may hold other characters that Python's splitlines breaks at
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        items = [(number, _parsed(path, line, number)) for number, line in lines]
        unit = "line"
    names: dict[str, None] = {}
    for place, item in items:
        if not isinstance(item, dict):
            raise DataError(
                f"{path}, {unit} {place}: {json.dumps(item)[:60]} is not an object.",
                help='each line must be one object, such as {"text": "fine", "label": 1}.',
            )
        names.update(dict.fromkeys(item))
    if not items or not names:
        raise DataError(
            f"{path} holds no rows with columns.", help='each line must be an object: {"text": "fine", "label": 1}.'
        )
    columns = {name: [item.get(name) for _, item in items] for name in names}
    return Table(str(path), columns, [place for place, _ in items], unit)


def _parsed(path: Path, text: str, line: int | None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        at = f", line {line}" if line is not None else ""
        raise DataError(
            f"{path}{at}: not JSON: {error}.",
            help='a .jsonl file has one object per line, a .json file may also be one list of objects: [{"text": ...}, ...].',
        ) from None


def _parquet(path: Path) -> Table:
    if not path.is_file():
        raise DataError(f"{path} does not exist.", help=_beside(path))
    try:
        import pyarrow.parquet
    except ImportError:
        raise ExtraError("Parquet files need the package pyarrow.", help="pip install pyarrow") from None
    try:
        # one file by itself: the default would read a Hive partition out of the folder names
        data = pyarrow.parquet.ParquetFile(path).read()
        columns = {name: data.column(index).to_pylist() for index, name in enumerate(data.column_names)}
        names = _arrow_names(data.schema.metadata)
    except Exception as error:  # damaged files fail in many places, with Arrow's, the system's and Python's errors
        raise DataError(
            f"{path} cannot be read as Parquet: {(str(error).splitlines() or [''])[0]}",
            help="write it again; a file that was cut off while copying looks like this.",
        ) from None
    if not data.num_rows:
        raise DataError(f"{path} has no rows.", help="a table needs at least one row.")
    return Table(str(path), columns, range(1, data.num_rows + 1), "row", names)


def _arrow_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """Class names that `datasets` writes into the schema of its Parquet files."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: tuple(map(str, kind["names"]))
            for name, kind in features.items()
            if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}
