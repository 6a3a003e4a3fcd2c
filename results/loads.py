"""The table of docs/serving.md, from what benchmarks/serving.py wrote into results/serving/load.jsonl."""

from __future__ import annotations

import json

from pages import table
from work import ROOT

LOADS = ROOT / "results" / "serving" / "load.jsonl"
PAGE = ROOT / "docs" / "serving.md"
MODELS = {  # the rows' models, as the page calls them
    "minilm-sst2": "dense fp32, fused operators",
    "layers-even": "half of the layers, int8 ([`layers-even`](methods/survey.md))",
}


def load_table() -> str:
    """A line for each row, in their order."""
    head = (
        "model",
        "connections",
        "requests",
        "a second",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "wrong answers",
        "hostile requests amiss",
    )
    rows = []
    for line in LOADS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        times = (f"{row[name]:.1f}" for name in ("p50_ms", "p95_ms", "p99_ms"))
        speed = f"{row['requests_per_second']:.0f}"
        counts = (str(row[name]) for name in ("wrong", "hostile_wrong"))
        rows.append((MODELS[row["model"]], str(row["connections"]), f"{row['200']:,}", speed, *times, *counts))
    return "\n".join(table(head, rows))
