"""Reads tables of examples (TSV, CSV, JSON lines, JSON, Parquet, Arrow, hub data sets) and says exactly what is wrong with a bad one.

Text files are read with the standard library, because only then can an error name the line, and GLUE's literal quotes survive.
Parquet files go through pyarrow and hub names through `datasets`; each is imported only if it is needed. What the columns mean is the
business of tasks.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from slimformer.data.columnar import read_arrow, read_parquet
from slimformer.data.json_rows import json_rows, split_rows
from slimformer.data.splits import SPLIT_NAMES
from slimformer.data.texts import PACKED, read_bytes, read_text, stream_lines, suffix_of
from slimformer.errors import DataError, ExtraError, nearest, shown
from slimformer.log import remark

SUFFIXES = (".tsv", ".csv", ".txt", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
_TEXTS = (".tsv", ".csv", ".txt", ".jsonl", ".ndjson", ".json")
_HEAD, _HEAD_LINES = 4096, 200  # characters and lines, in which a header or the first rows of JSON name their columns
SHARD = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]{16})?$")  # older versions of `datasets` put a digest behind
FIELD_LIMIT = 1 << 30  # characters in a field; the standard library's own limit of 131,072 is less than some documents
_HUB_NAME = re.compile(  # ./reviews and ../reviews are paths
    r"(?P<name>\w[\w.-]*/[\w.-]+)(?P<parts>(:[\w.-]+|@[\w.-]+(/[\w.-]+){0,2}){0,2})", re.ASCII
)
_SEPARATORS = {".tsv": "\t,;|", ".txt": "\t,;|", ".csv": ",;\t|"}
_SEPARATOR_NAMES = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}
_LOOKED_AT = 200  # rows that tell the separator
_RULE = re.compile(r"\s*:?-{3,}:?\s*")  # under the head of a table in Markdown
_MOST_FIELDS = 50  # of nested objects that become columns
_FEW = 5  # lines; in so few, quotes that do not fit are a mistake rather than a habit
_PLAIN = {
    "Value",
    "ClassLabel",
    "Sequence",
    "List",
    "LargeList",
    "Translation",
    "TranslationVariableLanguages",
}  # kinds of columns of `datasets` that are read: no images, no audio


@dataclass(frozen=True)
class Table:
    """Columns of equal length, and for each row the place a person finds it at."""

    where: str  # file or hub name
    columns: Mapping[str, Sequence[Any]]
    places: Sequence[int]  # line in the file, or row counted from 1
    unit: Literal["line", "row"] = "line"
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # column -> names of its ids, if the data has any
    twice: frozenset[str] = frozenset()  # names that several columns have: none of them can be meant

    def __len__(self) -> int:
        return len(self.places)

    def place(self, row: int) -> str:
        """Where a person finds row `row` (from 0): "reviews.csv, line 17"."""
        return f"{self.where}, {self.unit} {self.places[row]}"

    def column(self, name: str) -> Sequence[Any]:
        """The column of that name; DataError with the nearest name if there is none, and if there are two."""
        if name in self.twice:
            raise DataError(
                f"{self.where} has two columns {shown(name)}.", help="give each column a name of its own in the first line."
            )
        if name not in self.columns:
            raise DataError(
                f"{self.where} has no column '{name}'.",
                facts=[self.named_columns()],
                help=f"{nearest(name, self.columns)}."
                + (" The first line must name the columns." if self.unit == "line" else ""),
            )
        return self.columns[name]

    def named_columns(self) -> str:
        """The names of the columns, as a fact of an error."""
        names = [shown(name, 40) for name in self.columns]
        return f"columns: {', '.join(names[:20])}" + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def read_table(path: Path, *, header: Sequence[str] | None = None, literal: bool = False, extra: bool = False) -> Table:
    """The table in a file, read by its suffix; DataError for whatever is wrong with it.

    `header` names the columns if the first line is data already; `literal` takes the quotes of a TSV as they stand; `extra` allows
    surplus fields at the end of a row.
    """
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        if path.suffix.lower() == ".zip":
            read_bytes(path)  # it says what is wrong with the archive
        if suffix in {".xlsx", ".xls", ".ods"}:
            raise DataError(f"{path} is not a kind of table that can be read: a spreadsheet.", help="save it as 'CSV UTF-8'.")
        if ".tar" in path.suffixes:
            raise DataError(f"{path} is an archive (tar).", help="unpack it, and name the folder or one of its files.")
        raise DataError(
            f"{path} is not a kind of table that can be read.",
            help=f"known: {', '.join(SUFFIXES)}, packed as {', '.join(PACKED)}.",
        )
    if suffix in {".parquet", ".arrow"}:
        found = read_parquet(path) if suffix == ".parquet" else read_arrow(path)
        columns = dict(zip(found.names, found.values, strict=True))
        return Table(str(path), columns, range(1, found.rows + 1), "row", found.class_names, _names_of_several(found.names))
    text = read_text(path)
    if suffix in {".json", ".jsonl", ".ndjson"}:
        return _json(path, text, suffix)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        remark(f"{path}, line {line}: there are NUL characters in this file; perhaps it is damaged.")
    if literal:
        return _table(path, _literal(text, "\t"), header, extra)
    return _table(path, _rows(path, text, suffix, extra), header, extra)


def read_splits(path: Path) -> dict[str, Table]:
    """The tables of a file that holds several splits, by their names there; none if it is no such file.

    Either a .json file has a list of rows for each, or a column `split` tells each row's.
    """
    rows = split_rows(read_text(path)) if suffix_of(path) == ".json" else {}
    if rows:
        return {name: _as_table(f"{path}, {name}", list(enumerate(some, 1)), "row") for name, some in rows.items() if some}
    if suffix_of(path) not in _TEXTS or not _names_split(path):
        return {}
    table = spread(read_table(path))
    column = next((name for name in table.columns if name.strip().lower() == "split"), None)
    return {} if column is None else _by_column(table, column)


def _names_split(path: Path) -> bool:
    """Whether the beginning of a text file names a column `split`; a file that cannot be read does not, and its reader says why."""
    try:
        head = "\n".join(islice(stream_lines(path), _HEAD_LINES))
    except DataError:
        return False
    return re.search(r"\bsplit\b", head[:_HEAD], re.IGNORECASE) is not None


def _by_column(table: Table, column: str) -> dict[str, Table]:
    """The rows of each split that a column names; none if it names anything else."""
    told = [str(value).strip().lower() for value in table.columns[column]]
    if not {*told} <= {*SPLIT_NAMES} or len({*told}) < 2:
        return {}
    parts = {}
    for name in dict.fromkeys(told):
        rows = [row for row, value in enumerate(told) if value == name]
        columns = {other: [values[row] for row in rows] for other, values in table.columns.items() if other != column}
        places = [table.places[row] for row in rows]
        parts[name] = replace(table, where=f"{table.where} [{name}]", columns=columns, places=places)
    return parts


def join_tables(tables: Sequence[Table]) -> Table:
    """The shards as one table; DataError if their columns differ."""
    first = tables[0]
    if len(tables) == 1:
        return first
    for table in tables[1:]:
        if list(table.columns) != list(first.columns):
            raise DataError(
                f"{table.where} and {first.where} have different columns.",
                facts=[f"{item.where}: {item.named_columns()}" for item in (first, table)],
                help="shards of one split must have the same columns.",
            )
    columns = {name: [value for table in tables for value in table.columns[name]] for name in first.columns}
    places = range(1, 1 + sum(len(table) for table in tables))
    return Table(f"{first.where} and {len(tables) - 1} more", columns, places, "row", first.class_names, first.twice)


# -- The hub -------------------------------------------------------------------------------------------------------------------


def is_hub_name(name: str) -> bool:
    """Whether a name that is no file or folder here may be one of the hub's: owner/name, with :config or @revision behind it."""
    return _HUB_NAME.fullmatch(name) is not None and suffix_of(Path(name)) not in SUFFIXES


def read_hub(name: str) -> dict[str, Table]:
    """Splits of a hub data set, `owner/name`, `owner/name:config` or with `@revision`, as tables of their plain columns."""
    return {split: hub_table(f"{name} [{split}]", data) for split, data in load_hub(name).items()}


def load_hub(name: str) -> dict[str, Any]:
    """Splits of a hub data set as `datasets` gives them. No other code of tasks uses the network."""
    try:
        import datasets
    except ImportError:
        raise ExtraError("hub data sets need the package datasets.", help="pip install datasets") from None
    match = _HUB_NAME.fullmatch(name)
    hub, parts = (match["name"], match["parts"]) if match else (name, "")
    config, revision = (re.search(pattern, parts) for pattern in (r":([\w.-]+)", r"@([\w./-]+)"))
    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        options = {} if revision is None else {"revision": revision[1]}
        splits = datasets.load_dataset(hub, config[1] if config else None, **options)
        return {str(split): splits[split] for split in splits}
    except Exception as error:  # network, names and formats fail in as many ways as there are data sets
        reason = str(error).strip().splitlines()
        if "scripts are no longer supported" in str(error):
            raise DataError(
                f"the hub data set '{name}' is made by a script, and such are never run.",
                help=f"for most of them the hub keeps a copy as Parquet: {hub}@refs/convert/parquet.",
            ) from None
        raise DataError(
            f"'{name}' is no file or folder here and could not be loaded from the hub.",
            facts=[f"{type(error).__name__}: {reason[0] if reason else ''}"],
            help="for a file, check the path; for a hub data set with several parts, name one: owner/name:part.",
        ) from None
    finally:
        if not silent:
            datasets.enable_progress_bars()


def hub_table(where: str, data: Any) -> Table:
    """A `datasets.Dataset` as a table of its plain columns."""
    # images and audio would be decoded when read: only plain values can be texts, labels or answers
    plain = [name for name, kind in data.features.items() if type(kind).__name__ in _PLAIN or isinstance(kind, (dict, list))]
    kinds = {
        name: getattr(data.features[name], "feature", data.features[name]) for name in plain
    }  # of a list, that of its items
    names = {name: tuple(kind.names) for name, kind in kinds.items() if type(kind).__name__ == "ClassLabel"}
    return Table(where, dict(data.with_format(None).select_columns(plain)[:]), range(1, len(data) + 1), "row", names)


# -- Rows of separated fields --------------------------------------------------------------------------------------------------

Rows = list[tuple[int, list[str]]]  # the line that each row begins in, and its fields
_INNER_RETURN = re.compile(r"\r(?!\r*\n)")  # csv takes it for the end of a row
_STAND_IN = "\ue00d"  # for it, a character of private use


def _rows(path: Path, text: str, suffix: str, extra: bool) -> Rows:
    """The rows of a table, its separator told by its rows; quotes enclose fields unless they cannot."""
    if text.startswith("__label__"):
        raise DataError(
            f"{path} is in fastText's form: a label begins each line.",
            help="write a table: a line 'text<tab>label', then a text and its label on each line.",
        )
    first, _, rest = text.partition("\n")
    excel = re.fullmatch(r'"?sep=(.)"?\r?', first)
    if excel:
        rows = _separated(path, rest, excel[1], extra)
        return [(place + 1, fields) for place, fields in rows]
    separator = _separator(text, suffix)
    if separator != _SEPARATORS[suffix][0]:
        remark(f"{path}: its fields are separated by {_SEPARATOR_NAMES[separator]}.")
    return _separated(path, text, separator, extra)


def _separator(text: str, suffix: str) -> str:
    """The separator that gives the first rows the same number of fields, and more than one; the usual one of the suffix if none does."""
    marks = _SEPARATORS[suffix]
    end = 0
    for _ in range(_LOOKED_AT):
        end = text.find("\n", end) + 1
        if not end:
            break
    part = text[:end] if end else text
    ranks = []
    for rank, mark in enumerate(marks):
        if mark not in part.partition("\n")[0]:
            continue
        for literal, rows in enumerate((_fields(part, mark), _literal(part, mark))):
            sizes = Counter(len(fields) for _, fields in rows or ())
            if sizes and len(sizes) == 1 and next(iter(sizes)) > 1:
                ranks.append((literal, rank, mark))
                break
    # several may be even, such as a comma in every text: that whose quotes fit comes first, then that of the suffix
    return min(ranks)[2] if ranks else next((mark for mark in marks if mark in part.partition("\n")[0]), marks[0])


def _separated(path: Path, text: str, separator: str, extra: bool) -> Rows:
    """The rows of a text; if quotes do not close, or close lines later around whole rows, they stand for themselves."""
    if '"' not in text:
        return _literal(text, separator)
    try:
        quoted, mistake = _quoted(path, text, separator), None
    except DataError as error:
        quoted, mistake = [], error
    if quoted and _is_even(quoted, extra) and not any("\n" in field for _, fields in quoted for field in fields):
        return quoted
    if not quoted and '\\"' in text:
        escaped = _fields(text, separator, escape="\\")
        if escaped and _is_even(escaped, extra):
            remark(f"{path}: a backslash stands before its quotes, and is left out.")
            return escaped
    literal = _literal(text, separator)
    enough = separator == "\t" or len(literal) > _FEW
    if _is_even(literal, extra) and enough and (not _is_even(quoted, extra) or _lines_are_rows(quoted, literal)):
        remark(f"{path}: its quotes stand for themselves, because they do not enclose fields.")
        return literal
    if mistake is not None:
        raise mistake
    return quoted


def _is_even(rows: Rows, extra: bool) -> bool:
    return bool(rows) and all(
        len(fields) == len(rows[0][1]) or (extra and len(fields) > len(rows[0][1])) for _, fields in rows[1:]
    )


def _lines_are_rows(quoted: Rows, literal: Rows) -> bool:
    """Whether quoted fields swallowed rows: the lines inside them hold values that the same column has in rows of one line."""
    single = {place: fields for place, fields in quoted[1:] if not any("\n" in field for field in fields)}
    inside = [fields for place, fields in literal[1:] if place not in single]
    for column in range(len(quoted[0][1])):
        values = {fields[column] for fields in single.values()}
        if 2 * len(values) <= len(single) and all(fields[column] in values for fields in inside):
            return True
    return False


def _literal(text: str, separator: str) -> Rows:
    rows = ((number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1))
    return [(number, line.split(separator)) for number, line in rows if line]


def _fields(text: str, separator: str, escape: str | None = None) -> Rows | None:
    """Rows with quoted fields, those of a text that may be cut off; None if quotes do not fit."""
    try:
        return _quoted(Path(), text, separator, escape)
    except DataError:
        return None


def _quoted(path: Path, text: str, separator: str, escape: str | None = None) -> Rows:
    """Rows with the line that each one begins in; DataError if quotes do not close. A \\r inside a line ends no row."""
    limit = csv.field_size_limit(FIELD_LIMIT)
    rows: Rows = []
    inner = _INNER_RETURN.search(text) is not None and _STAND_IN not in text
    if inner:
        text = _INNER_RETURN.sub(_STAND_IN, text)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, strict=True, escapechar=escape, doublequote=escape is None
    )
    begin = 1
    try:
        for fields in reader:
            if fields:
                rows.append((begin, [field.replace(_STAND_IN, "\r") for field in fields] if inner else fields))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {begin}: {error}.",
            help='a field that holds a quote must stand in quotes, with its own quotes doubled: "she said ""no""".',
        ) from None
    finally:
        csv.field_size_limit(limit)
    return rows


def _table(path: Path, rows: Rows, header: Sequence[str] | None, extra: bool) -> Table:
    if header is None and rows and _lacks_names(rows):
        header = _made_names(path, rows)
    first = list(header) if header is not None else rows[0][1] if rows else []
    names = [name.strip() or f"column {index}" for index, name in enumerate(first, 1)]
    body = rows if header is not None else rows[1:]
    if header is None:
        body = _without_headers(path, body, rows[0][1] if rows else [])
    body = [row for row in body if any(field.strip() for field in row[1])]  # spreadsheets leave rows of separators alone
    if body and len(names) > 1 and all(_RULE.fullmatch(field) or not field.strip() for field in body[0][1]):
        remark(f"{path}: the line of dashes under the column names is left out.")
        body = body[1:]
    if body and all(len(fields) > len(names) and not any(map(str.strip, fields[len(names) :])) for _, fields in body):
        body = [(place, fields[: len(names)]) for place, fields in body]
    if not body:
        raise DataError(
            f"{path} has a line of column names and no rows.",
            facts=[f"columns: {', '.join(shown(name, 40) for name in names[:20])}"],
            help="the first line is read as column names.",
        )
    for place, fields in body:
        if len(fields) != len(names) and not (extra and len(fields) > len(names)):
            raise DataError(
                f"{path}, line {place}: {len(fields)} fields, the first line has {len(names)}.",
                facts=[
                    f"the line begins: {shown(' | '.join(fields)[:200], 100)}",
                    f"columns: {', '.join(map(repr, names))[:200]}",
                ],
                help="a separator inside a text must stand in quotes, or a field is missing.",
            )
    columns = {name: [fields[index] for _, fields in body] for index, name in enumerate(names)}
    return Table(str(path), columns, [place for place, _ in body], twice=_names_of_several(names))


def _names_of_several(names: Sequence[str]) -> frozenset[str]:
    return frozenset(name for name, count in Counter(names).items() if count > 1)


def _lacks_names(rows: Rows) -> bool:
    """Whether the first line is data already: one of its fields is a value that its column repeats, and none of them names a column."""
    first, body = rows[0][1], rows[1:]
    if len(first) < 2 or len(body) < 4 or not all(len(fields) == len(first) for _, fields in body):
        return False
    counted = [name for name in first if name.strip()]
    if counted == [str(place) for place in range(len(counted))] and len(first) - len(counted) < 2 and len(counted) > 1:
        return False  # how pandas calls columns without names, behind the index
    if {"text", "label"} <= {name.strip().lower() for name in first}:
        return False
    repeated = [column for column, name in enumerate(first) if _repeats(name, [fields[column] for _, fields in body])]
    same = sum(fields == first for _, fields in body)  # a header that was joined in again
    return bool(repeated) and not same


def _repeats(value: str, column: Sequence[str]) -> bool:
    counts = Counter(column)
    return bool(value.strip()) and counts[value] > 0 and 2 * len(counts) <= len(column)


def _made_names(path: Path, rows: Rows) -> list[str]:
    """Names for a table of two columns without any; DataError for more, because which is which would be a guess."""
    first, body = rows[0][1], rows[1:]
    repeated = [column for column, name in enumerate(first) if _repeats(name, [fields[column] for _, fields in body])]
    if len(first) != 2 or len(repeated) != 1:
        raise DataError(
            f"{path}: its first line is data, not the names of columns: {shown(first[repeated[0]], 40)} is a value of other rows too.",
            facts=[f"the line begins: {shown(' | '.join(first)[:200], 100)}"],
            help="put a line of column names before it, such as: " + " ".join(["text", "label", "..."]) + ".",
        )
    names = ["text", "text"]
    names[repeated[0]] = "label"
    remark(f"{path} has no line of column names: taking column {repeated[0] + 1} for the label, the other for the text.")
    return names


def _without_headers(path: Path, body: Rows, names: Sequence[str]) -> Rows:
    kept = [row for row in body if row[1] != names]
    if len(kept) < len(body):
        remark(f"{path}: lines that repeat the column names are left out ({len(body) - len(kept):,}).")
    return kept


def _json(path: Path, text: str, suffix: str) -> Table:
    return _as_table(str(path), *json_rows(path, text, suffix))


def _as_table(where: str, items: Sequence[tuple[int, Mapping[str, Any]]], unit: Literal["line", "row"]) -> Table:
    names = dict.fromkeys(name for _, item in items for name in item)
    if not names:
        raise DataError(
            f"{where} holds no rows with columns.", help='each line must be an object: {"text": "fine", "label": 1}.'
        )
    columns = {name: [item.get(name) for _, item in items] for name in names}
    return Table(where, columns, [place for place, _ in items], unit)


def spread(table: Table) -> Table:
    """The table with columns of objects as a column for each of their fields: {"data": {"text": ...}} becomes "data.text"."""
    columns: dict[str, Sequence[Any]] = {}
    nested = False
    for name, column in table.columns.items():
        fields = dict.fromkeys(str(key) for value in column if isinstance(value, dict) for key in value)
        if not 0 < len(fields) <= _MOST_FIELDS or not all(value is None or isinstance(value, dict) for value in column):
            columns[name] = column
            continue
        nested = True
        for field_name in fields:
            columns[f"{name}.{field_name}"] = [None if value is None else value.get(field_name) for value in column]
    return spread(replace(table, columns=columns)) if nested else table
