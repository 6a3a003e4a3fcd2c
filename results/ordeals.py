"""The tables of docs/reliability.md and docs/cluster.md, from what two benchmarks wrote into results/reliability."""

from __future__ import annotations

import json

from pages import table
from work import ROOT

ORDEALS = ROOT / "results" / "reliability" / "gauntlet.jsonl"
NODES = ROOT / "results" / "reliability" / "cluster.jsonl"
CLUSTER = ROOT / "docs" / "cluster.md"
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


def cluster_table() -> str:
    """A line for each trial of benchmarks/cluster.py."""
    found = [json.loads(line) for line in NODES.read_text(encoding="utf-8").splitlines()]
    first = found[0]
    rows = [
        (
            f"{row['nodes']} node{'s' if row['nodes'] > 1 else ''}" + (", one killed half-way" if row["killed"] else ""),
            f"{row['minutes']:.1f}",
            f"{row['per_hour']:.0f}",
            f"{row['per_hour'] / first['per_hour']:.2f}",
            f"{row['same_weights']} of {row['trainings']}",
        )
        for row in found
    ]
    head = ("", "minutes", "trainings an hour", "over one node", "the same weights, bit by bit")
    said = (
        f"{first['trainings']} trainings of {first['steps']} steps, one thread each, on nodes that are processes of one machine, with "
        f"a core each (`benchmarks/cluster.py`, {first['date']})."
    )
    return "\n".join((*table(head, rows), "", said))
