"""Measures what heads and neurons cost on this machine: the table behind `cost: latency`.

A few uniform cuts of the model (all layers with 8 heads, all with none, ...) are exported as int8 and timed side by side with the
dense fp32 file; the cost of one sublayer at a level is the difference to the model without any, shared over its layers. It is an
estimate for a search: what a finished model really takes is always measured on its own file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slimformer import registry
from slimformer.core.anatomy import Anatomy, Kind
from slimformer.core.cost import Cost, latency
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.data.material import Material, subset
from slimformer.exporters.base import Variant
from slimformer.families.base import Subject
from slimformer.log import Log
from slimformer.measuring.machine import Quiet
from slimformer.measuring.sessions import open_session
from slimformer.measuring.timing import Rounds, compare, workloads
from slimformer.rules import NotNegative, Positive, check_options
from slimformer.tasks.base import Split

SHARES = (1.0, 0.5, 0.25, 0.08, 0.0)  # levels of each kind, as shares of its units
SECONDS = 20.0  # of timing, all levels together


@dataclass(frozen=True)
class Levels:
    """What was timed: int8 milliseconds per example of one sublayer, by kind and units kept; a recipe may carry it.

    `fixed_ms` is what a model without any sublayer takes, `dense_fp32_ms` the uncut one in fp32.
    """

    fixed_ms: NotNegative
    dense_fp32_ms: Positive
    heads: Mapping[int, float]
    neurons: Mapping[int, float]

    def __post_init__(self) -> None:
        check_options(self)
        for name, times in (("heads", self.heads), ("neurons", self.neurons)):
            if not times or not all(0 <= units <= 1e9 and 0 <= ms <= 1e9 for units, ms in times.items()):
                raise ValueError(f"{name} must hold a time in milliseconds, from 0 on, for each number of units")


@dataclass(frozen=True)
class Latency:
    """`cost`: int8 milliseconds per example, as curves; `dense_fp32_ms`: the baseline, timed in the same rounds."""

    cost: Cost
    dense_fp32_ms: float
    levels: Levels

    @staticmethod
    def of(anatomy: Anatomy, levels: Levels) -> Latency:
        """The curves that these levels give for a model of this anatomy."""
        table = {Kind.HEADS: levels.heads, Kind.NEURONS: levels.neurons}
        return Latency(latency(anatomy, levels.fixed_ms, table), levels.dense_fp32_ms, levels)


def measure_levels(subject: Subject, material: Material, folder: Path, threads: int, log: Log, quiet: Quiet) -> Levels:
    """Times this model's sublayers in ONNX Runtime int8, batch 32 of validation examples; scratch files lie in `folder`."""
    anatomy, model = subject.anatomy, subject.model
    exporter = registry.find("exporters", "onnx")(agreement=0.0)  # the answers of a model cut like this are of no interest
    batches = material.batches(subject.inputs)[:4]
    plans = {f"{kind}-{units}": _uniform(anatomy, kind, units) for kind in _kinds(anatomy) for units in _levels(anatomy, kind)}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as name:
        files = {}
        with log.track("timing levels", len(plans) + 1) as advance:
            for done, (level, plan) in enumerate(plans.items()):
                files[level] = Path(name) / f"{level}.onnx"
                exporter.export(
                    shrink(model, anatomy, plan), batches, files[level], Variant.INT8_DYNAMIC, material.task.outputs
                )
                advance(done + 1)
            files["fp32"] = Path(name) / "fp32.onnx"
            exporter.export(model, batches, files["fp32"], Variant.FUSED, material.task.outputs)
            advance(len(plans) + 1)
        sessions = {level: open_session(file, threads) for level, file in files.items()}
        features, _ = subset(material, Split.VALIDATION, 640)
        workload = workloads(features, limit=12)[1]
        timings = compare(sessions, workload, Rounds(40, seconds=SECONDS), quiet.load())
    rounds = {level: timing.round_ms() / sum(timing.sizes) for level, timing in timings.items()}  # (rounds,) ms per example
    fp32 = float(np.median(rounds["fp32"]))
    ms = {level: float(np.median(values / rounds["fp32"])) * fp32 for level, values in rounds.items()}
    table: dict[Kind, dict[int, float]] = {Kind.HEADS: {}, Kind.NEURONS: {}}
    for kind in _kinds(anatomy):
        without = ms[f"{kind}-0"]
        count = len(anatomy.of_kind(kind))
        table[kind] = {
            units: round(max(0.0, (ms[f"{kind}-{units}"] - without) / count), 7) for units in _levels(anatomy, kind) if units
        }
    full = {kind: max(_levels(anatomy, kind)) for kind in _kinds(anatomy)}
    dense = min(ms[f"{kind}-{units}"] for kind, units in full.items())
    inside = sum(len(anatomy.of_kind(kind)) * table[kind][units] for kind, units in full.items())
    return Levels(round(max(0.0, dense - inside), 7), round(fp32, 7), table[Kind.HEADS], table[Kind.NEURONS])


def _kinds(anatomy: Anatomy) -> list[Kind]:
    return [kind for kind in (Kind.HEADS, Kind.NEURONS) if anatomy.of_kind(kind)]


def _levels(anatomy: Anatomy, kind: Kind) -> list[int]:
    """Units of each level: rounded to what matrix kernels like, at least one, and none."""
    size = max(site.size for site in anatomy.of_kind(kind))
    step = 16 if kind is Kind.NEURONS and size >= 64 else 1
    return sorted({min(size, max(step, round(share * size / step) * step)) if share else 0 for share in SHARES})


def _uniform(anatomy: Anatomy, kind: Kind, units: int) -> Plan:
    """The first `units` of each site of a kind, all of the other kinds."""
    keep: dict[str, tuple[int, ...]] = {}
    for site in anatomy.of_kind(kind):
        if units == 0:
            assert site.sublayer is not None
            keep[site.sublayer] = ()
        elif units < site.size:
            keep[site.id] = tuple(range(units))
    return Plan(keep)
