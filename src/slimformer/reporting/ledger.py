"""Writes and reads ledgers (a JSON line for each record) and slimformer.json, the facts of an exported folder.

A ledger is only ever added to, a row in one write, so that a run killed at any moment loses one row at most. A torn or foreign
line is skipped with a warning.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, cast

from slimformer.errors import DataError, ModelError, OutputError, output_errors
from slimformer.files import write_text
from slimformer.measuring.records import Facts, Record

_log = logging.getLogger(__name__)
FACTS_FILE = "slimformer.json"
LEDGER = "ledger.jsonl"


def write_facts(folder: Path, facts: Facts) -> None:
    """Writes slimformer.json into an exported folder."""
    write_text(folder / FACTS_FILE, json.dumps(asdict(facts), indent=2, sort_keys=True) + "\n")


def read_facts(folder: Path) -> Facts | None:
    """slimformer.json of a folder, None if there is none; ModelError if it cannot be read."""
    file = folder / FACTS_FILE
    if not file.is_file():
        return None
    try:
        return cast(Facts, _reader(Facts).validate_python(json.loads(file.read_text(encoding="utf-8"))))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {_first_line(error)}", help="copy the whole folder again.") from None


@cache
def _reader(kind: type[Any]) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ", ".join(lines[1:3]) if len(lines) > 1 else (lines or [type(error).__name__])[0]


def append_record(path: Path, record: Record) -> None:
    """Adds a row at the end of a ledger, in one write: if it is killed at any moment, this row at most is lost."""
    line = json.dumps(asdict(record), sort_keys=True).encode() + b"\n"
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            end = os.fstat(handle).st_size
            # A row torn by an earlier kill must not swallow this one.
            torn = end > 0 and os.pread(handle, 1, end - 1) != b"\n"
            data = b"\n" + line if torn else line
            if os.write(handle, data) != len(data):
                raise OutputError(f"cannot write all of a row to {path}: the disk is full.", help="free some space.")
            os.fsync(handle)
        finally:
            os.close(handle)


def read_records(paths: Iterable[Path]) -> list[Record]:
    """The rows of one or more ledgers, in order. DataError without a file; a torn or foreign line is skipped with a warning."""
    records = []
    for path in paths:
        try:
            lines = Path(path).read_bytes().split(b"\n")
        except OSError as error:
            raise DataError(
                f"the ledger {path} cannot be read: {error.strerror}.", help="name a run folder or a ledger.jsonl."
            ) from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = _reader(Record).validate_python(json.loads(line))
                if record.metric not in record.scores:
                    raise ValueError(f"no score for its metric '{record.metric}'")
                records.append(record)
            except (ValueError, RecursionError) as error:
                what = "was cut off while it was written" if number == len(lines) else f"is no record ({_first_line(error)})"
                _log.warning("%s, line %d %s; skipped.", path, number, what)
    return records


def groups(records: Iterable[Record]) -> dict[tuple[str, str, str, str], list[Record]]:
    """The records by what they must share to stand in one table: teacher, task, split and metric."""
    parts: dict[tuple[str, str, str, str], list[Record]] = {}
    for record in records:
        parts.setdefault((record.model, record.task, record.split, record.metric), []).append(record)
    return parts
