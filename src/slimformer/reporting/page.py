"""Writes report.html: one self-contained page on a set of records, wide or narrow, light or dark, without scripts.

`sections` turns records into words and figures, and `templates/report.html` puts them on the page.
"""

from __future__ import annotations

import json
import logging
import os.path
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from slimformer.errors import DataError, OutputError, readable
from slimformer.files import write_text
from slimformer.measuring.records import Record
from slimformer.reporting.answers import ChangedAnswer, shortened_answer
from slimformer.reporting.ledger import LEDGER, groups, read_ledgers, several_teachers
from slimformer.reporting.sections import section_of

_log = logging.getLogger(__name__)

PAGE = "report.html"
SHOWN = 40  # changed answers on the page; all of them are in changed.jsonl


@dataclass(frozen=True)
class Details:
    """What the page shows beyond the records: changed answers, and the command that made it."""

    changed: tuple[ChangedAnswer, ...] = ()
    command: str = ""


def report(runs: str | Path | Sequence[str | Path], out: str | Path) -> list[Record]:
    """Writes report.html on all records of these runs into the folder `out`, and returns the records.

    Args:
        runs: One or several runs. A run is a folder that `compress` or `run` left, a folder of such folders, or a ledger.
        out: The folder for report.html; not the folder of a run, whose own page stands there.

    Returns:
        All records of the runs, each with the name of its run; a row that stands in several ledgers counts once.

    Raises:
        DataError: There is no record.
        OutputError: `out` is a file, or holds the page that a run wrote.

    Example:
        >>> import slimformer
        >>> records = slimformer.report(["small"], "page")
        >>> [record.name for record in records]
        ['int8']
    """
    runs = [runs] if isinstance(runs, (str, os.PathLike)) else runs
    _refuse_runs(Path(out))
    ledgers: list[Path] = []
    for folder in map(Path, runs):
        inside = [folder] if os.path.isfile(folder) else []
        if os.path.isdir(folder):
            inside = sorted(folder.glob(LEDGER)) or sorted(folder.glob(f"*/{LEDGER}"))
        if not inside:
            _log.warning("%s holds no %s; skipped.", readable(str(folder)), LEDGER)
        ledgers.extend(inside)
    names = _run_names(list(dict.fromkeys(ledgers)))
    records = [replace(record, run=names[ledger]) for ledger, rows in read_ledgers(names).items() for record in rows]
    if not records:
        raise DataError(
            f"no records in {', '.join(map(str, runs)) or 'nothing'}.",
            help="name run folders: they hold a ledger.jsonl after `slimformer compress` or `slimformer run`.",
        )
    write_page(records, Path(out) / PAGE, Details(command="slimformer report " + " ".join(map(str, runs))))
    return records


def _refuse_runs(out: Path) -> None:
    if os.path.exists(out) and not out.is_dir():
        raise OutputError(f"{out} is a file.", help="choose a folder as --out; it is made if there is none.")
    if (out / LEDGER).is_file() and (out / PAGE).is_file():
        raise OutputError(
            f"{out / PAGE} is the page that a run wrote; it is not overwritten.", help="choose another folder as --out."
        )


def _run_names(ledgers: Sequence[Path]) -> dict[Path, str]:
    """A name for each ledger: that of its folder, with so many of the folders above it that no two have the same."""
    parts = {ledger: _parts(ledger) for ledger in ledgers}
    names = dict[Path, str]()
    for ledger, own in parts.items():
        others = [other for path, other in parts.items() if path != ledger]
        length = next((size for size in range(1, len(own)) if all(other[-size:] != own[-size:] for other in others)), len(own))
        names[ledger] = "/".join(own[-length:])
    return names


def _parts(ledger: Path) -> tuple[str, ...]:
    whole = ledger.resolve()
    return whole.parent.parts if whole.name == LEDGER else whole.with_suffix("").parts


def rendered(template: str, **values: Any) -> str:
    """A page from the template of that name; all values are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    jinja = Environment(
        loader=PackageLoader("slimformer.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return jinja.get_template(template).render(**values)


def write_page(records: Sequence[Record], path: Path, details: Details = Details()) -> None:
    """Writes a self-contained HTML page on the records, with a section for each teacher and task.

    If answers changed, changed.jsonl is written beside it. DataError if there is no record.
    """
    if not records:
        raise DataError("there are no records to report on.", help="run `slimformer compress` or `slimformer bench` first.")
    changed = details.changed
    html = rendered(
        "report.html",
        sections=[section_of(part, weights=several_teachers(records)) for part in groups(records).values()],
        changed=[shortened_answer(answer) for answer in changed[:SHOWN]],
        changed_total=len(changed),
        changed_lost=sum(answer.gain < 0 for answer in changed),
        changed_won=sum(answer.gain > 0 for answer in changed),
        command=details.command,
        date=max(record.date for record in records)[:10],
        version=records[-1].environment.packages.get("slimformer", ""),
    )
    write_text(path, html)
    if changed:
        lines = "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in changed)
        write_text(path.with_name("changed.jsonl"), lines)
