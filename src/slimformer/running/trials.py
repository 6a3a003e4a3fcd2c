"""Tries files: what they score on validation examples, what they lose there to the teacher, and how much faster they are.

All choices are made by these trials. Of the dev examples, which are reported, they know how long the texts are, for the speed, and
never what the answers are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from slimformer.data.material import Material, subset, timed_rows
from slimformer.digests import digest
from slimformer.exporters.base import FILES, FileKind, Variant
from slimformer.files import remembered
from slimformer.log import Log
from slimformer.measuring import machine
from slimformer.measuring.records import Forecast
from slimformer.measuring.scoring import evaluate
from slimformer.measuring.sessions import Session, open_session
from slimformer.measuring.timing import Ratio, Rounds, Workload, compare, ratio, workloads
from slimformer.running.bundle import Bundle, Run
from slimformer.running.exports import teacher_files, teacher_turn
from slimformer.running.stages import VALIDATION_ROWS
from slimformer.tasks.base import Split, Task

WRITTEN_ROWS = 500  # texts are written for so many validation examples when a file is tried
TRIAL_SECONDS = 10.0  # of timing, for each of the two workloads
SATURATES = (
    "this processor has no VNNI: its int8 sums can overflow, which costs accuracy that other processors do not lose. All losses are "
    "measured here; if int8 loses too much, set `reduce_range: true` under `export` in a recipe (7-bit weights)."
)


@dataclass(frozen=True)
class Trial:
    """One file on validation examples: its score, the points it loses to the teacher, its speed over the teacher's fp32 file."""

    variant: str
    score: float
    loss: float
    speed_32: float
    speed_1: float
    size_bytes: int
    forecast: Forecast | None = None  # the speed at batch 32 with its spread, and the loss, for the record of the file


@dataclass(frozen=True)
class Reference:
    """The teacher's scores that losses are counted from.

    A model that came tuned may have been tuned on the validation examples, and then scores too high there; on examples that
    teacher and student have both seen, the student scores too high. The truth lies between the two, so the mean is taken.
    A teacher that was tuned here has not seen the validation examples, and they alone count: `seen` is then None.
    """

    validation: float
    seen: float | None


@dataclass(frozen=True)
class Judge:
    """Tries files beside the teacher's fp32 file; the same for all candidates of a run.

    `material`: the data as the files read them. The teacher has scored them with its own tokenizer, which may be another, and is timed on
    the texts as that splits them (`read`; None: as `material`).
    """

    material: Material
    teacher: Mapping[str, Path]
    reference: Reference
    threads: int
    quiet: machine.Quiet
    log: Log
    read: Material | None = None

    def reading(self, material: Material) -> Judge:
        """The judge of files that read other rows of the same examples."""
        return replace(self, material=material)

    def loss_of(self, session: Session) -> tuple[float, float]:
        """A file's score on validation examples, and the points that it loses there to the teacher."""
        sign = 100 if self.material.task.higher_is_better else -100
        score = _score(session, self.material, Split.VALIDATION)
        loss = sign * (self.reference.validation - score)
        if self.reference.seen is not None:
            loss = (loss + sign * (self.reference.seen - _score(session, self.material, Split.TRAIN))) / 2
        return score, loss

    def try_out(
        self,
        files: Mapping[str, Path],
        kinds: Mapping[str, FileKind] = FILES,
        *,
        seconds: float = TRIAL_SECONDS,
        reads: Mapping[str, Material] | None = None,
    ) -> list[Trial]:
        """Each file on validation examples, timed in turn with the teacher's; a file slower than float is named in the log.

        `reads`: the data as those files read them that have another tokenizer than the others.
        """
        sessions = {variant: open_session(path, self.threads) for variant, path in files.items()}
        read = {name: (reads or {}).get(name, self.material) for name in files}
        losses = {name: self.reading(read[name]).loss_of(session) for name, session in sessions.items()}
        sessions["teacher"] = open_session(self.teacher[Variant.FUSED], self.threads)
        load = self.quiet.load()
        speeds: dict[str, list[Ratio]] = {name: [] for name in sessions}
        rounds = 0
        for places in self._places({**read, "teacher": self.read or self.material})[::-1]:
            timings = compare(sessions, places, Rounds(30, seconds=seconds), load)
            for name, timing in timings.items():
                speeds[name].append(ratio(timings["teacher"], timing))
            rounds = rounds or timings["teacher"].rounds  # of the larger batch, which comes first
        trials = [
            Trial(
                name,
                losses[name][0],
                losses[name][1],
                speeds[name][0].median,
                speeds[name][1].median,
                path.stat().st_size,
                Forecast(speeds[name][0], rounds, losses[name][1]),
            )
            for name, path in files.items()
        ]
        for trial in trials:
            self.log.event("trial", **asdict(trial))
        for trial, speed in slower(trials, kinds):
            self.log.say(
                f"on this machine {kinds[trial.variant].name} is slower than float: {trial.speed_32:.2f} times the teacher's fp32 "
                f"speed at batch 32, float has {speed:.2f}."
            )
        return trials

    def _places(self, read: Mapping[str, Material]) -> list[dict[str, Workload]]:
        """Some dev examples at batch 1 and 32, for each session as its tokenizer splits them."""
        own = timed_rows(self.material)
        works: dict[int, tuple[Workload, Workload]] = {}
        for material in read.values():
            if id(material) not in works:
                given = timed_rows(material)
                if len(given) != len(own):  # windows of long texts: the rows are not the same ones
                    given = own
                works[id(material)] = workloads(given, limit=20, lengths=own.lengths())
        return [{name: works[id(material)][place] for name, material in read.items()} for place in range(2)]


def judge_of(bundle: Bundle, run: Run) -> Judge:
    """The judge of a run: the teacher's files, and its scores on validation and training examples, kept beside the files."""
    if machine.saturates(machine.environment().flags):
        run.log.say_once(SATURATES)
    files, material = teacher_files(bundle, run), bundle.uncut.material
    alone = bundle.tuned_here or not material.task.labelled
    splits = (Split.VALIDATION,) if alone else (Split.VALIDATION, Split.TRAIN)
    fused = files[Variant.FUSED]
    kept = fused.with_name(
        f"scores-{digest(repr((material.task.settings, [material.examples[split] for split in splits])))}.json"
    )

    def scores() -> list[float]:
        session = open_session(fused, run.threads)
        return [_score(session, material, split) for split in splits]

    with teacher_turn(fused.parent, run):
        validation, *seen = remembered(kept, scores, list[float])
    reference = Reference(validation, seen[0] if seen else None)
    return Judge(bundle.material, files, reference, run.threads, run.quiet, run.log, material)


def tried_rows(task: Task) -> int:
    """How many examples a file is tried on at most; writing a text for each takes long."""
    return WRITTEN_ROWS if task.stand_in else VALIDATION_ROWS


def _score(session: Session, material: Material, split: Split) -> float:
    features, examples = subset(material, split, tried_rows(material.task))
    outputs = evaluate(session, features, 32)
    return material.task.counted(material.task.tune(outputs, features, examples).score(outputs, features, examples))


def tuned_task(session: Session, material: Material) -> Task:
    """The task with the options that are fitted on validation examples for this file."""
    if not material.task.tunes:
        return material.task
    features, examples = subset(material, Split.VALIDATION, VALIDATION_ROWS)
    return material.task.tune(evaluate(session, features, 32), features, examples)


def fitted_options(task: Task, tuned: Task) -> dict[str, Any]:
    """The options in which a fitted task differs from the original."""
    return {name: value for name, value in vars(tuned).items() if value != vars(task)[name]}


def slower(trials: Sequence[Trial], kinds: Mapping[str, FileKind] = FILES) -> list[tuple[Trial, float]]:
    """Int8 files that are slower than the float file beside them (or, without one, than the teacher's), each with that speed."""
    float_speed = next((trial.speed_32 for trial in trials if trial.variant == Variant.FLOAT), 1.0)
    return [(trial, float_speed) for trial in trials if kinds[trial.variant].int8 and trial.speed_32 < float_speed]


def choose_trial(trials: Sequence[Trial], max_loss: float) -> Trial:
    """The fastest at batch 32 of those that lose at most `max_loss` points; else the one that loses least, and of these the fastest."""
    good = [trial for trial in trials if trial.loss <= max_loss]
    if good:
        return max(good, key=lambda trial: trial.speed_32)
    return min(trials, key=lambda trial: (trial.loss, -trial.speed_32))
