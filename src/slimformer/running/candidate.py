"""A model that may be delivered: its files, how they did on validation examples, and how it was made."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slimformer.exporters.base import FILES, Exporter, FileKind, Variant
from slimformer.files import remembered
from slimformer.measuring.latency import Levels
from slimformer.reporting.words import lost_text, size_text
from slimformer.running.bundle import Bundle, Made, Run
from slimformer.running.exports import export_files, plain_exporter
from slimformer.running.recipe import Recipe, RivalName
from slimformer.running.rivals import drops_layers, without_small_dense
from slimformer.running.schedule import Part, Schedule
from slimformer.running.stages import advance
from slimformer.running.trials import TRIAL_SECONDS, Judge, Trial, choose_trial
from slimformer.training.stage import Stage, Train, TrimVocabulary


@dataclass(frozen=True)
class Candidate:
    """One model, carried through to its files."""

    made: Made
    stages: tuple[Stage, ...]  # they made it from the teacher
    kinds: Mapping[str, FileKind]  # the kinds of the exporter's files, by variant
    trials: tuple[Trial, ...]
    folder: Path | None = None  # it holds all files that ship, if they are written
    floats: tuple[str, ...] = ()  # the matrices of these points stay in float in its int8 files

    def best(self, max_loss: float) -> Trial:
        """The file to name best: the fastest within the loss, or the one that loses least."""
        return choose_trial(self.trials, max_loss)

    def best_int8(self, max_loss: float) -> Trial:
        """The best of the int8 files."""
        return choose_trial([trial for trial in self.trials if self.kinds[trial.variant].int8], max_loss)

    @property
    def files(self) -> dict[str, Path]:
        """The files that ship, by variant."""
        assert self.folder is not None, "the files of this candidate are not written"
        return {variant: self.folder / kind.name for variant, kind in self.kinds.items() if kind.shipped}

    def told(self, trial: Trial) -> str:
        """One of its trials in a clause."""
        return (
            f"{trial.speed_32:.2f} times as fast, {abs(trial.loss):.2f} points {lost_text(trial.loss)} on validation examples "
            f"({self.kinds[trial.variant].name}, {size_text(trial.size_bytes)})"
        )

    def after(self, minutes: float) -> Candidate:
        """The same candidate with this time as its effort."""
        made = self.made
        return replace(self, made=replace(made, effort=replace(made.effort, minutes=minutes)))


def candidate_of(
    made: Made,
    stages: Sequence[Stage],
    folder: Path,
    judge: Judge,
    run: Run,
    exporter: Exporter | None = None,
    *,
    seconds: float = TRIAL_SECONDS,
) -> Candidate:
    """Exports all files that ship into a folder under `folder` and tries them; a resumed run reads what it tried."""
    exporter = exporter or plain_exporter()
    bundle = made.bundle
    kinds, judge = exporter.kinds_for(bundle.subject.model), judge.reading(bundle.material)
    home = folder / bundle.digest()  # the data may have changed since a kill, and with them the model
    files = home / "files"
    shipped = [variant for variant, kind in kinds.items() if kind.shipped]

    def trials() -> list[Trial]:
        shutil.rmtree(files, ignore_errors=True)  # a killed run may have left some files
        paths = export_files(bundle.subject, bundle.material, files, shipped, run.log, exporter=exporter, ranges=bundle.ranges)
        return judge.try_out(paths, kinds, seconds=seconds)

    tried = remembered(home / f"trials-{run.threads}.json", trials, list[Trial])
    return Candidate(made, tuple(stages), kinds, tuple(tried), files)


def teacher_candidate(
    made: Made, judge: Judge, run: Run, exporter: Exporter | None = None, *, seconds: float = TRIAL_SECONDS
) -> Candidate:
    """The bundle whose student is still the teacher, in int8: a search may always fall back on it. Its files are not written."""
    bundle, home = made.bundle, run.root / "whole" / made.bundle.digest()
    exporter = exporter or plain_exporter()
    kinds = exporter.kinds_for(bundle.subject.model)
    own = exporter.quick_variant if exporter.quick_variant not in FILES else Variant.INT8_DYNAMIC

    def tried() -> list[Trial]:
        files: dict[str, Path] = {own: judge.teacher[own]} if own in judge.teacher else {}
        if bundle.whole is not None or not files:  # the teacher's own file has the whole vocabulary
            files = export_files(bundle.subject, bundle.material, home / "int8", [own], run.log, exporter=exporter)
        return judge.try_out(files, kinds, seconds=seconds)

    trials = remembered(home / f"int8-{run.threads}.json", tried, list[Trial])
    return Candidate(made, (), kinds, tuple(trials))


def cut_candidate(
    made: Made,
    stages: Sequence[Stage],
    cuts: Sequence[Stage],
    lesson: Callable[[Bundle], Train],
    home: Path,
    judge: Judge,
    schedule: Schedule,
    run: Run,
    exporter: Exporter,
    *,
    seconds: float,
) -> Candidate:
    """Cuts a model that `stages` made, teaches it, exports and tries the files; all of it is kept for a resumed run.

    `lesson` gives the training of the model that the cuts leave; `home` is the folder of the files, `run` has that of the stages.
    """
    with schedule.part(Part.CUTTING):
        cut = advance(cuts, made.bundle, run)
    with schedule.part(Part.DISTILLING):
        taught = lesson(cut.bundle)
        learnt = advance([taught], cut.bundle, run.under("distilled"))
    with schedule.part(Part.TRYING):
        whole = Made(learnt.bundle, made.effort.then(cut.effort).then(learnt.effort))
        return candidate_of(whole, (*stages, *cuts, taught), home, judge, run, exporter, seconds=seconds)


def repeating(
    recipe: Recipe, chosen: Candidate, rivals: Sequence[RivalName], seconds: float, levels: Levels | None = None
) -> Recipe:
    """The recipe that leads to a candidate again; `recipe` is the one that its search began with.

    Without the `levels` that a budget was counted in, the same recipe would measure its own and cut a little otherwise.
    """
    bundle = chosen.made.bundle
    lead = recipe.stages if bundle.tuned_here else ()
    trim = (TrimVocabulary(),) if bundle.vocabulary is not None else ()
    export = replace(recipe.export, floats=chosen.floats)
    names = without_small_dense(rivals) if drops_layers(chosen.stages) else tuple(rivals)
    bench = replace(recipe.bench, seconds=seconds, rivals=names)
    return replace(recipe, stages=(*lead, *trim, *chosen.stages), latency=levels, export=export, bench=bench)
