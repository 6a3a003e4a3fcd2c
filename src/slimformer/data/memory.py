"""Data that a person holds in memory: it is written once, whole, into a folder named by its content, and read from there.

So a recipe can name it, a killed run finds it again, and changed data is other data. The folder is private and lies in the user's
cache: `$XDG_CACHE_HOME/slimformer/data`, by default `~/.cache/slimformer/data`. No library is imported here: data is known by the
names of its types.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimformer.data.files import Table, hub_table, read_table
from slimformer.data.sources import of_splits
from slimformer.data.splits import SPLIT_NAMES
from slimformer.digests import digest_all
from slimformer.errors import DataError, OutputError, shown
from slimformer.files import whole_folder
from slimformer.log import remark

_NAMES_FILE = ".class-names.json"  # beside train.jsonl: split -> column -> names of its ids there
_ROWS_HELP = 'give a list of rows, [{"text": "fine", "label": "good"}, ...], a DataFrame, a Dataset, or a path.'


def data_source(data: Any, *, paths: bool = True) -> str:
    """The path or hub name that stands for `data`: itself, or the folder that data from memory is written to.

    In memory it may be a list of dicts, a dict of columns, a DataFrame of pandas or polars, a Dataset or DatasetDict of `datasets`, a
    Table of pyarrow, or a dict of any of these, or of `paths`, by split: train, dev (or validation), test. DataError for anything else.

    >>> folder = data_source([{"text": "I liked it.", "label": "good"}, {"text": "I did not.", "label": "bad"}])
    >>> Path(folder).name, Path(folder, "train.jsonl").read_text().splitlines()[0]
    ('rows-a478659dd085', '{"text": "I liked it.", "label": "good"}')
    """
    if data is None:
        return ""
    if isinstance(data, (str, os.PathLike)):
        return os.fsdecode(data)
    kind, tables = _tables(data, paths)
    for name, table in tables.items():
        if not table.columns or not len(table):
            raise DataError(f"the data in memory has no rows under '{name}'.", help=_ROWS_HELP)
    texts = {name: [json.dumps(row) for row in _rows(table)] for name, table in tables.items()}
    names = {split: dict(table.class_names) for split, table in tables.items() if table.class_names}
    parts = [
        kind,
        json.dumps(names, sort_keys=True),
        *(part for name in sorted(texts) for part in (f"\n{name}\n", *texts[name])),
    ]
    folder = _home() / f"{kind}-{digest_all(parts)}"
    if not folder.is_dir():
        _write(folder, texts, names)
    count = ", ".join(f"{len(rows):,} rows of {name}" for name, rows in texts.items())
    remark(f"data from memory ({count}) is kept in {folder}")
    return str(folder)


def with_kept_names(table: Table, file: Path) -> Table:
    """A table that was read from a folder of `data_source`, with the class names that its data had in memory."""
    kept = file.parent / _NAMES_FILE
    if not kept.is_file():
        return table
    names = json.loads(kept.read_text("utf-8")).get(file.stem, {})
    return replace(table, class_names={column: tuple(found) for column, found in names.items()})


def _home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimformer" / "data"


def _write(folder: Path, texts: Mapping[str, Sequence[str]], names: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with whole_folder(folder) as part:
            for name, rows in texts.items():
                (part / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
            if names:
                (part / _NAMES_FILE).write_text(json.dumps(names), encoding="utf-8")
    except (OSError, OutputError) as error:
        raise DataError(
            f"the data in memory cannot be written to {folder}: {getattr(error, 'strerror', None) or error}",
            help="set XDG_CACHE_HOME to a folder that can be written, or save the data yourself and name its path.",
        ) from None


# -- From any type to tables ---------------------------------------------------------------------------------------------------


def _tables(data: Any, paths: bool) -> tuple[str, dict[str, Table]]:
    """What kind of data it is, for the name of its folder, and its tables by split."""
    if isinstance(data, Mapping) and not _refusal(data):
        folded = {str(name).strip().lower(): value for name, value in data.items()}
        if any(name in SPLIT_NAMES for name in folded):
            splits = of_splits(folded, "the dict of splits")
            if not paths and any(isinstance(value, (str, os.PathLike)) for value in splits.values()):
                raise DataError(
                    "data is a dict of paths, which this task does not take.",
                    help="name the folder of the files, or the training file as data and the other as dev.",
                )
            unused = [name for name, value in folded.items() if not any(value is used for used in splits.values())]
            if unused:
                remark(f"the splits {', '.join(unused)} are not used.")
            return "splits", {kind: _table(value, f"data['{kind}']") for kind, value in splits.items()}
    kinds = {"DataFrame": "dataframe", "Dataset": "dataset", "Table": "table"}
    return kinds.get(type(data).__name__, "rows"), {"train": _table(data, "data")}


def _table(data: Any, where: str) -> Table:
    if isinstance(data, (str, os.PathLike)):
        file = Path(os.path.expanduser(os.fsdecode(data)))
        return read_table(file)
    refusal = _refusal(data)
    if refusal:
        raise DataError(f"{where} is {refusal[0]}.", help=refusal[1])
    module, name = _type_of(data)
    if name == "DataFrame" and module == "pandas":
        return _frame(data, where)
    if name == "DataFrame" and module == "polars":
        return _columns({column.name: column.to_list() for column in data.get_columns()}, where)
    if name == "Table" and module == "pyarrow":
        return _columns({column: data.column(place).to_pylist() for place, column in enumerate(data.column_names)}, where)
    if name == "Dataset" and module == "datasets":
        return hub_table(where, data)
    if isinstance(data, Mapping):
        return _columns(data, where)
    return _of_rows(data, where)


def _of_rows(data: Any, where: str) -> Table:
    if not isinstance(data, (list, tuple)):
        raise DataError(f"{where} is a {type(data).__name__}, which is no kind of data that can be read.", help=_ROWS_HELP)
    for number, row in enumerate(data):
        if not isinstance(row, Mapping):
            raise DataError(
                f"{where}[{number}] is a {type(row).__name__}, and a row must be a dict: {shown(row, 60)}.",
                help='for pairs, write [{"text": text, "label": label} for text, label in data].',
            )
    names = dict.fromkeys(str(name) for row in data for name in row)
    rows = [{str(name): value for name, value in row.items()} for row in data]
    return Table(where, {name: [row.get(name) for row in rows] for name in names}, range(1, len(rows) + 1), "row")


def _columns(data: Mapping[Any, Any], where: str) -> Table:
    columns: dict[str, list[Any]] = {}
    for name, column in data.items():
        if hasattr(column, "tolist"):  # a column of numpy or pandas
            column = column.tolist()
        if not isinstance(column, (list, tuple)):
            raise DataError(
                f"{where} is a dict, and '{name}' is neither the name of a split nor a column: it is a {type(column).__name__}.",
                facts=[f"splits are called: {', '.join(SPLIT_NAMES)}"],
                help=_ROWS_HELP,
            )
        columns[str(name)] = list(column)
    sizes = {len(column) for column in columns.values()}
    if len(sizes) > 1:
        raise DataError(
            f"{where} is a dict of columns of different lengths.",
            facts=[f"'{name}': {len(column):,}" for name, column in columns.items()],
            help="each row needs a value in every column.",
        )
    return Table(where, columns, range(1, 1 + max(sizes, default=0)), "row")


def _frame(data: Any, where: str) -> Table:
    """A DataFrame of pandas. The order of the categories of a column is the order of its classes."""
    names = [name if isinstance(name, str) else " ".join(map(str, name)) if isinstance(name, tuple) else str(name)
             for name in data.columns]  # fmt: skip
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{where} has two columns {shown(twice)}.", help="give each column a name of its own.")
    columns, classes = {}, {}
    for place, name in enumerate(names):
        column = data.iloc[:, place]
        columns[name] = column.tolist()
        categories = [str(item) for item in column.cat.categories] if hasattr(column, "cat") else []
        if categories and not any(item.lstrip("+-").isdigit() for item in categories):
            classes[name] = tuple(categories)
    return Table(where, columns, range(1, len(data) + 1), "row", classes)


def _refusal(data: Any) -> tuple[str, str] | None:
    """What the data is and what to do with it instead, if it is of a type that is not taken."""
    mro = {f"{cls.__module__}.{cls.__name__}" for cls in type(data).__mro__}
    module, name = _type_of(data)
    if name in {"IterableDataset", "IterableDatasetDict"} and module == "datasets":
        return (
            f"an {name}, which is streamed",
            "load it whole (without streaming=True), or give a list: list(data.take(10_000)).",
        )
    if any(item.startswith("torch.utils.data") for item in mro):
        kind = "a DataLoader" if name == "DataLoader" else "a Dataset of PyTorch"
        return f"{kind}, which gives tensors, and the texts are needed", _ROWS_HELP
    if module == "torch":
        return "a tensor, and the texts are needed", _ROWS_HELP
    if module == "tensorflow":
        return "a data set of TensorFlow", _ROWS_HELP
    if name == "ndarray":
        return (
            "a numpy array, whose columns have no names",
            "give a dict of columns: {'text': data[:, 0], 'label': data[:, 1]}.",
        )
    if name == "Series" and module in {"pandas", "polars"}:
        return "a Series, which is one column", "give the DataFrame with the texts and the labels."
    if name == "LazyFrame":
        return "a LazyFrame", "give data.collect()."
    if hasattr(data, "__next__"):
        return f"a {name}, which can be read only once", "give a list: list(data)."
    return None


def _type_of(data: Any) -> tuple[str, str]:
    return type(data).__module__.partition(".")[0], type(data).__name__


# -- From tables to JSON -------------------------------------------------------------------------------------------------------


def _rows(table: Table) -> Iterator[dict[str, Any]]:
    columns = {}
    for name, column in table.columns.items():
        try:
            columns[name] = [_value(value) for value in column]
        except TypeError as error:
            remark(f"{table.where}: the column '{name}' is left out: {error}")
    for row in range(len(table)):
        yield {name: column[row] for name, column in columns.items()}


def _value(value: Any) -> Any:
    """A value as JSON has it; TypeError for images and other objects, whose text would say nothing."""
    if value is None or isinstance(value, (str, bool, int)):
        return str(value) if type(value) not in (str, int, bool) and isinstance(value, str) else value
    if isinstance(value, float):
        return None if math.isnan(value) else float(value)
    if isinstance(value, Mapping):
        return {str(name): _value(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_value(item) for item in value]
    if type(value).__name__ in {"NAType", "NaTType"}:
        return None
    if hasattr(value, "tolist"):  # of numpy: an array or a scalar
        return _value(value.tolist())
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    if type(value).__name__ in {"Decimal", "UUID"}:
        return str(value)
    raise TypeError(f"it holds values of the type {type(value).__name__}")
