"""Measures what heads and neurons cost on this machine: the table behind `cost: latency`.

Short models with a few sublayers of one kind (8 heads, 1 head, none, ...) are exported as int8 and timed side by side with the dense
files; the cost of one sublayer at a level is the difference to the model with none. The last layer of an encoder is timed by itself: for
a classifier it computes one token, and what is cut there saves little. Only the dense files hold all layers, because tracing takes
seconds and grows with the layers. It is an estimate for a search: what a finished model really takes is always measured on its own file.

Of an encoder-decoder both halves are timed, and each of the decoder's two attentions: whole texts of the usual length are written on
the model's own beams, because a decoder's time is that of its steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from slimformer import registry
from slimformer.core.anatomy import Anatomy, Kind, Site
from slimformer.core.cost import Cost, group, latency
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.data.material import Material, timed_rows
from slimformer.errors import TargetError
from slimformer.exporters.base import Variant
from slimformer.families.base import Subject, subject_of
from slimformer.log import Log
from slimformer.measuring.beside import make_readable
from slimformer.measuring.machine import Quiet
from slimformer.measuring.sessions import open_session
from slimformer.measuring.timing import Rounds, Timing, compare, workloads
from slimformer.rules import NotNegative, Positive, check_options
from slimformer.tasks.base import Split

# Levels of each kind, as shares of its units: a product takes some time for a call, and some for each unit.
SHARES = (1.0, 0.08, 0.0)
GROUPS = (  # of sites that cost alike; fields of `Levels`
    "heads",
    "neurons",
    "last_heads",
    "last_neurons",
    "decoder_heads",
    "cross_heads",
    "decoder_neurons",
)
PROBED = 2  # sublayers of a kind that a short model has
SECONDS = 8.0  # of timing, all levels together
SINGLE_SECONDS = 4.0  # the same of single texts


@dataclass(frozen=True)
class Levels:
    """What was timed: int8 milliseconds per example of one sublayer, by kind and units kept; a recipe may carry it.

    `fixed_ms` is what a model without any sublayer takes, `dense_fp32_ms` the uncut one in fp32. `heads` and `neurons` are the
    encoder's; of an encoder alone, its last attention and the feed-forward after it have their own (`last_heads`, `last_neurons`),
    because a classifier computes one token there; without these they count as the others. A decoder has its own, and `cross_heads` that
    ask the encoder. All are times at batch 32; `single` is the same table at batch 1, if that was timed.
    """

    fixed_ms: NotNegative
    dense_fp32_ms: Positive
    heads: Mapping[int, float]
    neurons: Mapping[int, float]
    last_heads: Mapping[int, float] = field(default_factory=dict)
    last_neurons: Mapping[int, float] = field(default_factory=dict)
    decoder_heads: Mapping[int, float] = field(default_factory=dict)
    cross_heads: Mapping[int, float] = field(default_factory=dict)
    decoder_neurons: Mapping[int, float] = field(default_factory=dict)
    single: Levels | None = None

    def __post_init__(self) -> None:
        check_options(self)
        for name in GROUPS:
            times = getattr(self, name)
            if not times and name not in GROUPS[:2]:
                continue
            if not times or not all(0 <= units <= 1e9 and 0 <= ms <= 1e9 for units, ms in times.items()):
                raise ValueError(f"{name} must hold a time in milliseconds, from 0 on, for each number of units")
        if self.single is not None and self.single.single is not None:
            raise ValueError("single must not hold a table of its own")

    def to_data(self) -> dict[str, Any]:
        """The table as plain data, without what it lacks.

        >>> Levels(0.1, 2.0, {1: 0.25}, {8: 0.5}).to_data()
        {'fixed_ms': 0.1, 'dense_fp32_ms': 2.0, 'heads': {1: 0.25}, 'neurons': {8: 0.5}}
        """
        known = {name: part for name, part in asdict(replace(self, single=None)).items() if part not in ({}, None)}
        return known if self.single is None else known | {"single": self.single.to_data()}


@dataclass(frozen=True)
class Latency:
    """`cost`: int8 milliseconds per example, as curves; `dense_fp32_ms`: the baseline, timed in the same rounds."""

    cost: Cost
    dense_fp32_ms: float
    levels: Levels

    @staticmethod
    def of(anatomy: Anatomy, levels: Levels) -> Latency:
        """The curves that these levels give for a model of this anatomy."""
        table = {name: getattr(levels, name) for name in GROUPS}
        groups = {group(anatomy, site).removeprefix("last_") for site in anatomy.units}
        lacking = sorted(name for name in groups if not table[name])
        if lacking:
            raise TargetError(
                f"the latency table tells nothing of {lacking[0].replace('_', ' ')}: it was measured for another kind of model.",
                help="leave `latency` out of the recipe: the table is measured anew.",
            )
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
    """Times this model's sublayers in ONNX Runtime int8, on batches of 32 and single dev examples; scratch files lie in `folder`.

    `dense`: its own files by variant, fused fp32 and dynamic int8, if there are some already.
    """
    anatomy, model = subject.anatomy, subject.model
    exporter = registry.find("exporters", "onnx")(agreement=0.0)  # the answers of a model cut like this are of no interest
    kinds, length = exporter.kinds_for(model), usual_length(subject, material)
    batches = material.batches(subject.inputs)[:4]
    plans = _short_plans(anatomy)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as name:
        if dense is None:
            dense = {variant: Path(name) / kinds[variant].name for variant in (Variant.FUSED, Variant.INT8_DYNAMIC)}
            exporter.export_all(model, batches, dense, material.task.outputs)
            make_readable(subject, material.source, Path(name))
        files = {"fp32": dense[Variant.FUSED], "int8": dense[Variant.INT8_DYNAMIC]}
        with log.track("timing levels", len(plans)) as advance:
            for done, (level, plan) in enumerate(plans.items()):
                files[level] = Path(name) / level / kinds[Variant.INT8_DYNAMIC].name
                files[level].parent.mkdir()
                small = subject_of(shrink(model, anatomy, plan))
                exporter.export(small.model, batches, files[level], Variant.INT8_DYNAMIC, material.task.outputs)
                make_readable(small, material.source, files[level].parent)
                advance(done + 1)
        sessions = {level: open_session(file, threads, generation=length) for level, file in files.items()}
        one, many = workloads(timed_rows(material), limit=12)
        large, single = (
            _levels_of(anatomy, compare(sessions, work, Rounds(40, seconds=seconds), quiet.load()))
            for work, seconds in ((many, SECONDS), (one, SINGLE_SECONDS))
        )
    return replace(large, single=single)


def _levels_of(anatomy: Anatomy, timings: Mapping[str, Timing]) -> Levels:
    """What a sublayer takes at each level, from the times of short models and of the dense files."""
    rounds = {level: timing.round_ms() / sum(timing.sizes) for level, timing in timings.items()}  # (rounds,) ms per example
    fp32 = float(np.median(rounds["fp32"]))
    return _table(anatomy, {level: float(np.median(values / rounds["fp32"])) * fp32 for level, values in rounds.items()})


def _table(anatomy: Anatomy, ms: Mapping[str, float]) -> Levels:
    """The same from milliseconds per example."""
    groups = _groups(anatomy)
    table: dict[str, dict[int, float]] = {}
    for part, sites in groups.items():
        beside = _beside(groups, part)
        base = ms[f"last_heads-{beside[0].size}" if beside else "none"]
        count = len(_probed(sites))
        table[part] = {units: max(0.0, (ms[f"{part}-{units}"] - base) / count) for units in _levels(sites) if units}
    inside = sum(len(sites) * table[part][max(table[part])] for part, sites in groups.items())
    fixed = max(0.0, min(ms["none"], ms["int8"]))
    share = (ms["int8"] - fixed) / inside if inside else 1.0  # short models are not quite what the layers of a whole one are
    for part in GROUPS[:2]:
        table.setdefault(part, table.get(f"last_{part}", {}))  # of a single layer
    scaled: dict[str, Any] = {
        part: {units: round(share * value, 7) for units, value in levels.items()} for part, levels in table.items()
    }
    return Levels(round(fixed, 7), round(ms["fp32"], 7), **scaled)


def usual_length(subject: Subject, material: Material) -> dict[str, int] | None:
    """The options with which every text gets the mean length of the task's; None if the model writes none.

    A model that was cut and not trained yet says what it likes, and may never end: only at one length for all are times comparable.
    """
    lengths = material.features[Split.TRAIN].target_lengths()
    if subject.beams is None or lengths is None:
        return None
    mean = max(1, round(float(lengths.mean())))
    return {"min_new_tokens": mean, "max_new_tokens": mean}


def _short_plans(anatomy: Anatomy) -> dict[str, Plan]:
    """The models that are timed, by name: nothing at all, and at each level some sublayers of a group.

    Of an encoder alone the last attention stays in them, which reads all tokens; it is timed by itself.
    """
    groups = _groups(anatomy)
    every = {site.sublayer for sites in groups.values() for site in sites if site.sublayer is not None}
    plans = {"none": Plan(dict.fromkeys(sorted(every), ()))}
    for part, sites in groups.items():
        probed, beside = _probed(sites), _beside(groups, part)
        gone = dict.fromkeys(sorted(every - {site.sublayer for site in (*probed, *beside)}), ())
        for units in _levels(sites):
            if units:
                cut = {site.id: tuple(range(units)) for site in probed if units < site.size}
                plans[f"{part}-{units}"] = Plan({**gone, **cut})
    return plans


def _beside(groups: Mapping[str, Sequence[Site]], part: str) -> Sequence[Site]:
    """What stays in the short models of a group: the last attention of an encoder alone, if it is not the one that is timed."""
    return () if part == "last_heads" else groups.get("last_heads", ())


def _groups(anatomy: Anatomy) -> dict[str, list[Site]]:
    """The sites that cost alike, in the order of their layers; heads first."""
    found: dict[str, list[Site]] = {}
    for kind in (Kind.HEADS, Kind.NEURONS):
        for site in anatomy.of_kind(kind):
            found.setdefault(group(anatomy, site), []).append(site)
    return found


def _probed(sites: Sequence[Site]) -> Sequence[Site]:
    """The sites of a group that are timed: the first ones."""
    return sites[:PROBED]


def _levels(sites: Sequence[Site]) -> list[int]:
    """Units of each level: rounded to what matrix kernels like, at least one, and none."""
    size = max(site.size for site in sites)
    step = 16 if sites[0].kind is Kind.NEURONS and size >= 64 else 1
    return sorted({min(size, max(step, round(share * size / step) * step)) if share else 0 for share in SHARES})
