"""The table of docs/reliability.md, from what benchmarks/gauntlet.py wrote into results/reliability/gauntlet.jsonl."""

from __future__ import annotations

import json

from pages import table
from work import ROOT

ORDEALS = ROOT / "results" / "reliability" / "gauntlet.jsonl"
RELIABILITY = ROOT / "docs" / "reliability.md"
DONE = {
    "kill": "killed (`kill -9`)",
    "disk": "disk full",
    "twice": "two at one folder",
    "cache": "two with one cache, one killed",
    "network": "no network",
    "home": "read-only home, model and cache",
    "clock": "clock that jumps by hours",
}


def ordeal_table() -> str:
    """A line for each thing that was done, and a column for each command: times and faults of all rows together."""
    found = [json.loads(line) for line in ORDEALS.read_text(encoding="utf-8").splitlines()]
    courses = list(dict.fromkeys(row["course"] for row in found))
    rows = []
    for ordeal, said in DONE.items():
        cells = []
        for course in courses:
            some = [row for row in found if (row["ordeal"], row["course"]) == (ordeal, course)]
            cells.append(f"{sum(row['times'] for row in some)}: {sum(row['faults'] for row in some)}" if some else "")
        if any(cells):
            rows.append((said, *cells))
    head = ("what was done", *(f"`{course}`, times: faults" for course in courses))
    dates = sorted({row["date"] for row in found})
    return "\n".join(
        (
            *table(head, rows),
            "",
            f"Names looked up in pickles: {sum(row['pickles'] for row in found)}. Last tried: {dates[-1]}.",
        )
    )
