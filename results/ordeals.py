"""The tables of docs/reliability.md, docs/cluster.md and docs/scaling.md, from what three benchmarks wrote into results/reliability."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pages import bullets, table
from work import ROOT

from slimformer.reporting.words import listed

ORDEALS = ROOT / "results" / "reliability" / "gauntlet.jsonl"
NODES = ROOT / "results" / "reliability" / "cluster.jsonl"
CLUSTER = ROOT / "docs" / "cluster.md"
RELIABILITY = ROOT / "docs" / "reliability.md"
SIZES = ROOT / "results" / "reliability" / "scaling.jsonl"
SCALING = ROOT / "docs" / "scaling.md"
ALL = 100_000_000  # sentences of the run that is foretold
NODES_OF_IT = (1, 10, 100)
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


# -- Scale ---------------------------------------------------------------------------------------------------------------------


def _sizes() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    found = [json.loads(line) for line in SIZES.read_text(encoding="utf-8").splitlines()]
    return [row for row in found if "model" in row], [row for row in found if "rows" in row]


def exponent(causes: Sequence[float], effects: Sequence[float]) -> float:
    """The power of the cause by which an effect grows: the slope of the line through their logarithms."""
    return float(np.polyfit(np.log(causes), np.log(effects), 1)[0])


def model_table() -> str:
    """A line for each model of benchmarks/scaling.py, and the exponents of each phase."""
    models, _ = _sizes()
    phases = list(models[0]["seconds"])
    rows = [
        (
            row["model"].replace("x", " × "),
            f"{row['params'] / 1e6:.0f} M",
            f"{row['macs'] / 1e9:.2f} G",
            *(f"{row['seconds'][phase]:.3g}" for phase in phases),
            f"{row['training_gib']:.1f}",
            f"{row['peak_gib']:.1f}",
        )
        for row in models
    ]
    work = [row["macs"] for row in models]
    slopes = ["", "", "exponent", *(f"{exponent(work, [row['seconds'][phase] for row in models]):.2f}" for phase in phases)]
    slopes += [
        f"{exponent([row['params'] for row in models], [row[key] for row in models]):.2f}"
        for key in ("training_gib", "peak_gib")
    ]
    head = ("layers × width", "parameters", "MACs a row", *(f"{phase}, s" for phase in phases), "GiB, training", "GiB, all")
    return "\n".join((*table(head, [*rows, tuple(slopes)]), "", _circumstances(models[0])))


def rows_table() -> str:
    """A line for each number of rows, of both kinds."""
    _, counts = _sizes()
    rows = [
        (
            row["kind"],
            f"{row['rows']:,}",
            f"{row['read']:,}",
            f"{row['seconds']:.3g}",
            f"{row['peak_gib']:.2f}",
            f"{row['file_mb']:,.1f}",
            f"{row['outputs_mb']:,.0f}",
        )
        for row in counts
    ]
    head = (
        "what",
        "rows",
        "trained on",
        "s to read and encode",
        "GiB",
        "MB of the file",
        "MB of a MiniLM's outputs and hidden states",
    )
    return "\n".join(table(head, rows))


def foretold() -> str:
    """What the largest model would take on a hundred million sentences, by its own row."""
    models, _ = _sizes()
    largest, seconds = models[-1], models[-1]["seconds"]
    teacher, training = (seconds[f"{name}, 1,000 rows"] * ALL / 1_000 / 3600 for name in ("teacher", "training"))
    hidden = 2 * int(largest["model"].partition("x")[2]) * largest["tokens"] * ALL / 1e12  # of one layer, in half precision
    hours = [f"{(teacher + training) / nodes:,.0f} on {nodes}" for nodes in NODES_OF_IT]
    return "\n".join(
        bullets(
            (
                f"The teacher's pass takes {teacher:,.0f} hours of such a machine, the student's {training:,.0f} at full size; a cut one "
                "takes its share of the operations. Shared out evenly by accelerate's data parallelism these are, in hours, "
                f"{listed(hours)} such machines.",
                f"A classifier's outputs fit anywhere. The hidden states of one layer would take {hidden:,.0f} TB, far above what is "
                "kept, so that the teacher runs beside the student.",
                "Memory does not grow with texts that are streamed. A table of a hundred million rows is read whole, and does not fit: "
                "give a part of it.",
            )
        )
    )


def _circumstances(row: dict[str, Any]) -> str:
    return (
        f"Random weights, {row['tokens']:.0f} tokens a row on average, two threads, training in {row['precision']} "
        f"(`benchmarks/scaling.py`, {row['date']})."
    )


SCALING_PARTS: Mapping[str, Callable[[], str]] = {
    "scaling-models": model_table,
    "scaling-rows": rows_table,
    "scaling-foretold": foretold,
}
