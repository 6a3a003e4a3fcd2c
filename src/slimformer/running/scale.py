"""The budget for a speed: the latency table gives a guess, and a few untrained exports correct it.

The speed of a file does not depend on its weights, so nothing has to be trained to know it.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from slimformer import registry
from slimformer.core.anatomy import Anatomy
from slimformer.core.shrink import shrink
from slimformer.data.material import timed_rows
from slimformer.errors import TargetError
from slimformer.exporters.base import Exporter, Variant
from slimformer.families.base import Subject, subject_of
from slimformer.files import remembered
from slimformer.measuring.beside import make_readable
from slimformer.measuring.latency import Latency, Levels, usual_length
from slimformer.measuring.sessions import open_session
from slimformer.measuring.timing import Rounds, compare, ratio, workloads
from slimformer.running.bundle import Bundle, Run
from slimformer.running.lessons import BLOCK_PATTERN
from slimformer.running.schedule import Diet
from slimformer.running.stages import context_of, latency_of
from slimformer.running.trials import Judge

MARGIN = 1.04  # the search aims this much above the requested speed, because a measured ratio spreads by a few per cent
PROBE_SECONDS = 4.0  # of timing each untrained export
PROBE_SINGLE_SECONDS = 2.0  # the same at batch 1


@dataclass(frozen=True)
class Speeds:
    """Times as fast as dense fp32 at batch 32, and at batch 1; None if that was not timed."""

    large: float
    single: float | None = None

    def over(self, other: Speeds) -> Speeds:
        """Each of these over the other one.

        >>> Speeds(3.0, 2.0).over(Speeds(4.0, 2.0)), Speeds(3.0).over(Speeds(2.0))
        (Speeds(large=0.75, single=1.0), Speeds(large=1.5, single=None))
        """
        single = None if self.single is None or other.single is None else self.single / other.single
        return Speeds(self.large / other.large, single)

    def times(self, other: Speeds) -> Speeds:
        """Each of these as many times as the other one says.

        >>> Speeds(3.0, 2.0).times(Speeds(0.5, 2.0))
        Speeds(large=1.5, single=4.0)
        """
        single = None if self.single is None or other.single is None else self.single * other.single
        return Speeds(self.large * other.large, single)


AS_TOLD = Speeds(1.0, 1.0)  # of what was measured over what the latency table has


@dataclass(frozen=True)
class Probe:
    """An untrained model of a budget: its speeds as they were measured, and as the latency table has them."""

    keep: float
    measured: Speeds
    by_table: Speeds


@dataclass(frozen=True)
class _Found:
    """The budget for a speed, and what was timed to find it."""

    keep: float
    probes: tuple[Probe, ...]


class Scale:
    """Finds the budget for a speed: the latency table gives a guess, a few untrained exports correct it.

    The speed of a file does not depend on its weights, so nothing has to be trained to know it.
    """

    def __init__(self, bundle: Bundle, judge: Judge, diet: Diet, exporter: Exporter, run: Run) -> None:
        self.bundle, self.judge, self.probes, self.exporter, self.state = bundle, judge, diet.probes, exporter, run
        self.variant = exporter.quick_variant
        self.fisher = registry.find("methods", "fisher")(
            cost="latency", examples=diet.examples, damage_examples=max(64, diet.examples // 8), repair_tokens=6 * diet.examples
        )
        table = latency_of(bundle.subject, bundle.material, run, judge.teacher)
        self.context = context_of(bundle, run, bundle.subject, "latency")
        self.cost, self.dense_fp32_ms, self.levels = table.cost, table.dense_fp32_ms, table.levels

    @cached_property
    def weighed(self) -> Any:
        """The importance of each head, neuron and sublayer of the model."""
        self.state.log.say("measuring how much each head and neuron matters.")
        return self.fisher.weigh(self.context)

    def keep(self, speedup: float) -> float:
        """The share of the dense int8 latency that makes the exported int8 file `speedup` times as fast as dense fp32."""
        return self._found(speedup).keep

    def nearest(self, speedup: float) -> Probe:
        """The untrained model whose budget is the nearest to that for a speed."""
        found = self._found(speedup)
        return min(found.probes, key=lambda probe: abs(probe.keep - found.keep))

    def _found(self, speedup: float) -> _Found:
        file = self.state.folder / f"budget-{speedup:.4f}-{self.state.threads}.json"
        return remembered(file, lambda: self._probed(speedup), _Found)

    def budget(self, speedup: float, now: float, *, left: float = 1.0, fewer: Sequence[float] = ()) -> tuple[float, float]:
        """What is left for a speed: the share of the latency after a cut, and the share of each matrix's blocks.

        The model is `now` times as fast and has a share `left` of its blocks; `fewer`: the shares that may be left, falling. Blocks go
        first, because a model of zeros is cut finer than one of fewer heads and neurons; only what the fewest blocks do not reach is left
        to a cut.
        """
        fewer = [share for share in fewer if share < left]
        speeds = {share: self.with_blocks(share) for share in fewer}
        enough = next((share for share, speed in speeds.items() if speed >= speedup), None)
        if enough is not None:
            return 1.0, enough
        return (self.keep(speedup * now / speeds[fewer[-1]]), fewer[-1]) if fewer else (self.keep(speedup), left)

    def _probed(self, speedup: float) -> _Found:
        aim = speedup * MARGIN
        keep = min(1.0, self.dense_fp32_ms / aim / self.cost.dense)
        probes: list[Probe] = []
        for _ in range(self.probes):
            probes.append(self._probe(keep, speedup))
            speed = probes[-1].measured.large
            self.state.log.event("probe", keep=round(keep, 4), speedup=round(speed, 3), wanted=aim)
            if speedup * 1.01 <= speed <= speedup * 1.1:
                return _Found(keep, tuple(probes))
            keep = nearer([(probe.keep, probe.measured.large) for probe in probes], aim)
        speeds = {probe.keep: probe.measured.large for probe in probes}
        if not min(speeds.values()) < aim <= max(speeds.values()):  # else it is between two that were timed
            enough = [budget for budget, speed in speeds.items() if speed >= speedup]
            keep = max(enough) if enough else min(speeds, key=lambda budget: abs(speeds[budget] - aim))
        return _Found(keep, tuple(probes))

    def _probe(self, keep: float, wanted: float) -> Probe:
        """An untrained model of this budget, as int8."""
        anatomy = self.context.anatomy
        try:
            plan = replace(self.fisher, keep=keep).plan(self.context, self.weighed)
        except TargetError:
            raise out_of_reach(wanted, self.dense_fp32_ms / self.cost.fixed) from None
        small = subject_of(shrink(self.bundle.subject.model, anatomy, plan))
        speeds = self._timed(small)
        if speeds.large < wanted / 1.1 and not small.anatomy.units:
            raise out_of_reach(wanted, speeds.large)
        return Probe(keep, speeds, by_table(small.anatomy, self.levels))

    def of_weights(self, keep: float) -> Probe:
        """An untrained model with a share of the weights, as int8."""

        def timed() -> Probe:
            context = context_of(self.bundle, self.state, self.bundle.subject, "parameters")
            plan = replace(self.fisher, cost="parameters", keep=keep).plan(context, self.weighed)
            small = subject_of(shrink(self.bundle.subject.model, context.anatomy, plan))
            return Probe(keep, self._timed(small), by_table(small.anatomy, self.levels))

        return remembered(self.state.folder / f"weights-{keep:.4f}-{self.state.threads}.json", timed, Probe)

    def with_blocks(self, left: float) -> float:
        """The same of the model with a share of each matrix's blocks, the largest ones."""

        def timed() -> float:
            small = subject_of(copy.deepcopy(self.bundle.subject.model))
            rows, columns = map(int, BLOCK_PATTERN.split("x"))
            for matrix in small.anatomy.matrices.values():
                if not matrix.table:
                    weight = small.model.get_submodule(matrix.module).weight
                    assert isinstance(weight, torch.Tensor)
                    blocks = weight.data.view(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)
                    size = blocks.square().sum(dim=(1, 3), keepdim=True)
                    blocks *= size >= size.flatten().quantile(1 - left)
            return self._timed(small).large

        return remembered(self.state.folder / f"blocks-{left:g}-{self.state.threads}.json", timed, float)

    def _timed(self, small: Subject) -> Speeds:
        """How many times as fast as dense fp32 the quickest int8 file of a model is."""
        material, run, exporter = self.bundle.material, self.state, self.exporter
        with tempfile.TemporaryDirectory(dir=run.root, prefix=".part-") as name:
            file = Path(name) / exporter.kinds_for(small.model)[self.variant].name
            batches = material.batches(small.inputs)[:4]  # its answers are of no interest
            exporter.export(small.model, batches, file, self.variant, material.task.outputs)
            make_readable(small, material.source, file.parent)
            length = usual_length(small, material)
            sessions = {
                "ours": open_session(file, run.threads, generation=length),
                "dense": open_session(self.judge.teacher[Variant.FUSED], run.threads, generation=length),
            }
            one, many = workloads(timed_rows(material), limit=20)
            load = run.quiet.load()
            large, single = (
                compare(sessions, work, Rounds(40, seconds=seconds), load)
                for work, seconds in ((many, PROBE_SECONDS), (one, PROBE_SINGLE_SECONDS))
            )
        return Speeds(*(ratio(timings["dense"], timings["ours"]).median for timings in (large, single)))


def by_table(anatomy: Anatomy, levels: Levels) -> Speeds:
    """The speeds that a latency table gives a model, as plain int8."""
    tables = [table for table in (levels, levels.single) if table is not None]
    return Speeds(*(table.dense_fp32_ms / Latency.of(anatomy, table).cost.dense for table in tables))


def nearer(probes: Sequence[tuple[float, float]], wanted: float) -> float:
    """The budget to try next for a speed, from (budget, speed) pairs: between the nearest on both sides, or on from the last."""
    above = [probe for probe in probes if probe[1] >= wanted]
    below = [probe for probe in probes if probe[1] < wanted]
    if not above or not below:
        keep, speed = probes[-1]
        return min(1.0, keep * (speed / wanted) ** 1.2)
    (small, fast), (large, slow) = max(above), min(below)
    share = math.log(fast / wanted) / math.log(fast / slow)  # speed and budget are about a power of each other
    return small * (large / small) ** min(0.9, max(0.1, share))


def out_of_reach(wanted: float, best: float) -> TargetError:
    return TargetError(
        f"{wanted:g} times as fast is out of reach: with every layer cut, {best:.1f} would be.",
        help=f"ask for less, at most about {max(1.0, 0.7 * best):.1f}.",
    )
