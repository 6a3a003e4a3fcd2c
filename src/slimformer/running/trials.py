"""Files of a model, tried on validation examples: what they score, lose and gain there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimformer import registry
from slimformer.data.material import Material, subset
from slimformer.exporters.base import FILES, Artifact, Exporter, Variant
from slimformer.log import Log
from slimformer.measuring import machine
from slimformer.running.bundle import Bundle, Run
from slimformer.running.stages import VALIDATION_ROWS
from slimformer.saving.files import in_turn, remove_parts, write_text
from slimformer.tasks.base import Split, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimformer.core.ranges import Ranges
    from slimformer.runtimes.base import Runner

SATURATES = (
    "this processor has no VNNI: its int8 sums can overflow, which costs accuracy that other processors do not lose. All losses are "
    "measured here; if int8 loses too much, set `reduce_range: true` under `export` in a recipe (7-bit weights)."
)
TEACHER_FILES = "teacher-files"
NOTES = "notes.json"  # beside exported files: file -> what its artifact notes


def export_files(
    model: PreTrainedModel,
    material: Material,
    folder: Path,
    variants: Sequence[str],
    log: Log,
    *,
    exporter: Exporter | None = None,
    ranges: Ranges | None = None,
) -> dict[str, Artifact]:
    """The model as ONNX files in `folder`, the fp32 ones proven against the model on real batches.

    No int8 file is refused here: each is judged by what it loses on validation examples.
    """
    from slimformer.families.base import family_of

    options: Exporter = exporter or registry.find("exporters", "onnx")(agreement=0.0)
    batches = material.batches(family_of(model.config.model_type).inputs(model))
    paths = {variant: folder / options.files[variant].name for variant in variants}
    made = options.export_all(model, batches, paths, material.task.outputs, ranges)
    keep_notes(folder, made.values(), log)
    return made


def keep_notes(folder: Path, made: Iterable[Artifact], log: Log) -> None:
    """Writes down what is known of exported files: in the log, and beside them for the card."""
    notes = read_notes(folder)
    for artifact in made:
        log.event("exported", **{key: str(value) for key, value in asdict(artifact).items()})
        notes[artifact.path.name] = list(artifact.notes)
    write_text(folder / NOTES, json.dumps(notes, indent=1))


def read_notes(folder: Path) -> dict[str, list[str]]:
    """What `keep_notes` wrote, by the name of the file."""
    file = folder / NOTES
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


@dataclass(frozen=True)
class Trial:
    """One file on validation examples: its score, the points it loses to the teacher, its speed over the teacher's fp32 file."""

    variant: str
    score: float
    loss: float
    speed_32: float
    speed_1: float
    size_bytes: int


def load_file(path: Path, threads: int) -> Runner:
    """A file in ONNX Runtime."""
    runner: Runner = registry.find("runtimes", "onnxruntime")().load(path, threads)
    return runner


@dataclass(frozen=True)
class Reference:
    """The teacher's scores that losses are counted from.

    A model that came tuned may have been tuned on the validation examples, where it then looks better than it is; on examples that
    teacher and student have both seen, the student looks better than it is. The truth lies between the two, and the mean is taken.
    A teacher that was tuned here has not seen the validation examples, and they alone count.
    """

    validation: float
    seen: float
    trusted: bool


def reference_of(bundle: Bundle, run: Run) -> Reference:
    """Scores of the teacher's fp32 file on validation and on training examples, each with what is fitted there; kept beside the file."""
    if machine.saturates(machine.environment().flags) and not run.memo.get(SATURATES):
        run.memo[SATURATES] = True
        run.log.say(SATURATES)
    fused, material = teacher_files(bundle, run)[Variant.FUSED], bundle.material
    rows = repr((material.task, [material.examples[split] for split in (Split.VALIDATION, Split.TRAIN)]))
    file = fused.with_name(f"scores-{_digest(rows)}.json")
    with _teacher_turn(fused.parent, run):
        if not file.is_file():
            runner = load_file(fused, run.threads)
            write_text(file, json.dumps([_score(runner, material, split) for split in (Split.VALIDATION, Split.TRAIN)]))
    validation, seen = json.loads(file.read_text(encoding="utf-8"))
    return Reference(validation, seen, bundle.tuned_here)


def _score(runner: Runner, material: Material, split: Split) -> float:
    from slimformer.measuring.scoring import evaluate

    features, examples = subset(material, split, VALIDATION_ROWS)
    outputs = evaluate(runner, features, 32)
    return material.task.tune(outputs, features, examples).score(outputs, features, examples)[material.task.metric]


def _tuned(runner: Runner, material: Material) -> Task:
    """The task with what is fitted on validation examples for this file."""
    from slimformer.measuring.scoring import evaluate

    if not material.task.tunes:
        return material.task
    features, examples = subset(material, Split.VALIDATION, VALIDATION_ROWS)
    return material.task.tune(evaluate(runner, features, 32), features, examples)


def _fitted(task: Task, tuned: Task) -> dict[str, Any]:
    """The options in which a tuned task differs."""
    before, after = vars(task), vars(tuned)
    return {name: value for name, value in after.items() if value != before[name]}


def try_out(
    files: Mapping[str, Path], baseline: Path, bundle: Bundle, run: Run, reference: Reference, *, seconds: float = 10.0
) -> list[Trial]:
    """Each file on validation examples, side by side with the teacher's fp32 file."""
    from slimformer.measuring.machine import quiet
    from slimformer.measuring.sessions import open_session
    from slimformer.measuring.timing import Rounds, compare, ratio, workloads

    material = bundle.material
    sessions = {str(variant): open_session(path, run.threads) for variant, path in files.items()}
    scores, losses = {}, {}
    for name, session in sessions.items():
        scores[name], losses[name] = loss_of(session, material, reference)
    sessions["teacher"] = open_session(baseline, run.threads)
    state = quiet(run.wait_seconds)
    speeds: dict[str, list[float]] = {name: [] for name in sessions}
    features, _ = subset(material, Split.VALIDATION, 640)
    for workload in workloads(features, limit=20)[::-1]:
        timings = compare(sessions, workload, Rounds(30, seconds=seconds), state)
        for name, timing in timings.items():
            speeds[name].append(ratio(timings["teacher"], timing).median)
    trials = [
        Trial(variant, scores[name], losses[name], speeds[name][0], speeds[name][1], files[variant].stat().st_size)
        for variant, name in ((variant, str(variant)) for variant in files)
    ]
    for trial in trials:
        run.log.event("trial", **asdict(trial))
    for trial, speed in slower(trials):
        run.log.say(
            f"on this machine {FILES[trial.variant].name} is slower than float: {trial.speed_32:.2f} times the teacher's fp32 speed at "
            f"batch 32, float has {speed:.2f}."
        )
    return trials


def slower(trials: Sequence[Trial]) -> list[tuple[Trial, float]]:
    """Int8 files that are slower than the float file beside them, or where there is none than the teacher's; with its speed."""
    float_speed = next((trial.speed_32 for trial in trials if trial.variant == Variant.FLOAT), 1.0)
    return [(trial, float_speed) for trial in trials if FILES[trial.variant].int8 and trial.speed_32 < float_speed]


def loss_of(runner: Runner, material: Material, reference: Reference) -> tuple[float, float]:
    """A file's score on validation examples, and the points that it loses there to the teacher."""
    sign = 100 if material.task.higher_is_better else -100
    score = _score(runner, material, Split.VALIDATION)
    loss = sign * (reference.validation - score)
    if not reference.trusted:
        loss = (loss + sign * (reference.seen - _score(runner, material, Split.TRAIN))) / 2
    return score, loss


def teacher_files(bundle: Bundle, run: Run) -> dict[Variant, Path]:
    """The teacher's own files: fp32 fused (the baseline), fp32 standard, int8. Exported once a run, or once a cache."""
    folder = _teacher_home(bundle, run)
    wanted = (Variant.FUSED, Variant.FLOAT, Variant.INT8_DYNAMIC)
    with _teacher_turn(folder, run):
        missing = [variant for variant in wanted if not (folder / FILES[variant].name).is_file()]
        if missing:
            export_files(bundle.teacher, bundle.material, folder, missing, run.log)
    return {variant: folder / FILES[variant].name for variant in wanted}


def _teacher_home(bundle: Bundle, run: Run) -> Path:
    """The folder of what is made of the teacher: the run's own, or one in its cache for the same weights, rows and packages."""
    if run.cache is None:
        return run.root / TEACHER_FILES
    from slimformer.training.runstate import features_digest, model_digest

    rows = [features_digest(bundle.material.features[split]) for split in (Split.VALIDATION, Split.TRAIN)]
    parts = [model_digest(bundle.teacher), *rows, *map(str, machine.environment().packages.items())]
    return run.cache / TEACHER_FILES / _digest(" ".join(parts))


@contextmanager
def _teacher_turn(home: Path, run: Run) -> Iterator[None]:
    """Owns the folder of a teacher's files, without what a killed run left there; waits for another run that is at work in it."""
    with in_turn(home, lambda: run.log.say("another run makes files of this teacher: waiting for it.")):
        remove_parts(home)
        yield


def choose_trial(trials: Sequence[Trial], max_loss: float) -> Trial:
    """The fastest at batch 32 of those that lose at most `max_loss` points; else the one that loses least."""
    good = [trial for trial in trials if trial.loss <= max_loss]
    if good:
        return max(good, key=lambda trial: trial.speed_32)
    return min(trials, key=lambda trial: trial.loss)


def _digest(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:12]


def save_trials(path: Path, trials: Sequence[Trial]) -> None:
    """Keeps what was tried, for a resumed run."""
    write_text(path, json.dumps([asdict(trial) for trial in trials]))


def read_trials(path: Path) -> list[Trial]:
    """What `save_trials` kept."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [Trial(**row) for row in rows]
