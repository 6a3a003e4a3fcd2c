"""Measures what heads and neurons cost on this machine: the table behind `cost: latency`.

Short models with a few sublayers of one kind (8 heads, 1 head, none, ...) are exported as int8 and timed side by side with the dense
files; the cost of one sublayer at a level is the difference to the model with none. Only the dense files hold all layers, because
tracing takes seconds and grows with the layers. It is an estimate for a search: what a finished model really takes is always
measured on its own file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slimformer import registry
from slimformer.core.anatomy import Anatomy, Kind, Site
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

# Levels of each kind, as shares of its units: a product takes some time for a call, and some for each unit.
SHARES = (1.0, 0.08, 0.0)
PROBED = 2  # sublayers of a kind that a short model has
SECONDS = 8.0  # of timing, all levels together


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


def measure_levels(
    subject: Subject,
    material: Material,
    folder: Path,
    threads: int,
    log: Log,
    quiet: Quiet,
    dense: Mapping[str, Path] | None = None,
) -> Levels:
    """Times this model's sublayers in ONNX Runtime int8, batch 32 of validation examples; scratch files lie in `folder`.

    `dense`: its own files by variant, fused fp32 and dynamic int8, if there are some already.
    """
    anatomy, model = subject.anatomy, subject.model
    exporter = registry.find("exporters", "onnx")(agreement=0.0)  # the answers of a model cut like this are of no interest
    batches = material.batches(subject.inputs)[:4]
    plans = _short_plans(anatomy)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as name:
        if dense is None:
            dense = {variant: Path(name) / f"{variant}.onnx" for variant in (Variant.FUSED, Variant.INT8_DYNAMIC)}
            exporter.export_all(model, batches, dense, material.task.outputs)
        files = {"fp32": dense[Variant.FUSED], "int8": dense[Variant.INT8_DYNAMIC]}
        with log.track("timing levels", len(plans)) as advance:
            for done, (level, plan) in enumerate(plans.items()):
                files[level] = Path(name) / f"{level}.onnx"
                small = shrink(model, anatomy, plan)
                exporter.export(small, batches, files[level], Variant.INT8_DYNAMIC, material.task.outputs)
                advance(done + 1)
        sessions = {level: open_session(file, threads) for level, file in files.items()}
        features, _ = subset(material, Split.VALIDATION, 640)
        workload = workloads(features, limit=12)[1]
        timings = compare(sessions, workload, Rounds(40, seconds=SECONDS), quiet.load())
    rounds = {level: timing.round_ms() / sum(timing.sizes) for level, timing in timings.items()}  # (rounds,) ms per example
    fp32 = float(np.median(rounds["fp32"]))
    ms = {level: float(np.median(values / rounds["fp32"])) * fp32 for level, values in rounds.items()}
    table: dict[Kind, dict[int, float]] = {Kind.HEADS: {}, Kind.NEURONS: {}}
    for kind in _kinds(anatomy):
        count = len(_probed(anatomy, kind))
        table[kind] = {
            units: max(0.0, (ms[f"{kind}-{units}"] - ms["last"]) / count) for units in _levels(anatomy, kind) if units
        }
    inside = sum(len(anatomy.of_kind(kind)) * table[kind][max(table[kind])] for kind in _kinds(anatomy))
    fixed = max(0.0, min(ms["none"], ms["int8"]))
    share = (
        (ms["int8"] - fixed) / inside if inside else 1.0
    )  # the last layer of a classifier computes one token only: it costs less
    scaled = {kind: {units: round(share * value, 7) for units, value in levels.items()} for kind, levels in table.items()}
    return Levels(round(fixed, 7), round(fp32, 7), scaled[Kind.HEADS], scaled[Kind.NEURONS])


def _short_plans(anatomy: Anatomy) -> dict[str, Plan]:
    """The models that are timed, by name: nothing at all, the last sublayer of attention alone, and at each level some before it."""
    every = {site.sublayer for kind in _kinds(anatomy) for site in anatomy.of_kind(kind) if site.sublayer is not None}
    last = anatomy.of_kind(_kinds(anatomy)[0])[-1]

    def keeping(sites: Sequence[Site], units: int) -> Plan:
        """Only the last sublayer of attention, which reads all tokens, and these sites with so many units."""
        gone = every - {site.sublayer for site in (*sites, last)}
        cut = {site.id: tuple(range(units)) for site in sites if units < site.size}
        return Plan({**dict.fromkeys(sorted(gone), ()), **cut})

    plans = {"none": Plan(dict.fromkeys(sorted(every), ())), "last": keeping((), 0)}
    for kind in _kinds(anatomy):
        for units in _levels(anatomy, kind):
            if units:
                plans[f"{kind}-{units}"] = keeping(_probed(anatomy, kind), units)
    return plans


def _probed(anatomy: Anatomy, kind: Kind) -> Sequence[Site]:
    """The sites of a kind that are timed: the first ones, but not the last layer, which may compute one token only."""
    return anatomy.of_kind(kind)[: max(1, min(PROBED, len(anatomy.of_kind(kind)) - 1))]


def _kinds(anatomy: Anatomy) -> list[Kind]:
    return [kind for kind in (Kind.HEADS, Kind.NEURONS) if anatomy.of_kind(kind)]


def _levels(anatomy: Anatomy, kind: Kind) -> list[int]:
    """Units of each level: rounded to what matrix kernels like, at least one, and none."""
    size = max(site.size for site in anatomy.of_kind(kind))
    step = 16 if kind is Kind.NEURONS and size >= 64 else 1
    return sorted({min(size, max(step, round(share * size / step) * step)) if share else 0 for share in SHARES})
