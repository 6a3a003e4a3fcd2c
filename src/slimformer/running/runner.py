"""Runs a recipe: the folder, the bundle, the stages, the delivery."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimformer.core.plan import Plan
from slimformer.data.material import Material, prepare
from slimformer.errors import ModelError, OutputError, RecipeError
from slimformer.log import Log
from slimformer.measuring.latency import Levels
from slimformer.running.bundle import Bundle, Run
from slimformer.running.stages import Stage, advance, torch_outputs
from slimformer.running.trials import choose_trial, export_files, reference_of, teacher_files, try_out
from slimformer.saving import checkpoint
from slimformer.saving.files import claim
from slimformer.saving.hub import local_folder
from slimformer.tasks.base import Split

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimformer.measuring.records import Goal
    from slimformer.measuring.scoring import Measurement
    from slimformer.running.trials import Trial
from slimformer.running.order import _lead
from slimformer.running.preflight import _trained_on, look
from slimformer.running.recipe import Recipe, named_options

TRIED = 100  # validation examples on which a model that came tuned is looked at


@dataclass(frozen=True)
class Outcome:
    """What a run ends with: the folder, and all that was measured."""

    out: Path
    measurement: Measurement


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    log: Log | None = None,
    command: str = "",
    threads: int | None = None,
    wait_seconds: float = 60.0,
    cache: str | Path | None = None,
) -> Outcome:
    """Runs a recipe into the folder `out`, going on after the last finished stage where a former run was cut off.

    `cache`: a folder for what is made of teachers (outputs, exported files, their scores), which other runs with the same teacher and
    rows will read instead of making it again; gigabytes may lie there, and stay.
    """
    look(recipe)
    given = Given(log, threads, wait_seconds, _folder(cache))
    with _staged(recipe, Path(out), given) as (bundle, stages, state):
        measurement = finish(bundle, stages, recipe, state, Path(out), command=command)
        tidy(state)
    return Outcome(Path(out), measurement)


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    log: Log | None = None,
    wait_seconds: float = 60.0,
    cache: str | Path | None = None,
) -> None:
    """Runs the stages of a recipe and delivers nothing: `run` with the same recipe and folder goes on from there.

    What is trained needs no quiet machine, what is measured does: several recipes can be trained side by side, then delivered in turn.
    """
    look(recipe)
    with _staged(recipe, Path(out), Given(log, None, wait_seconds, _folder(cache))):
        pass


def _folder(cache: str | Path | None) -> Path | None:
    if cache is not None and Path(cache).exists() and not Path(cache).is_dir():
        raise OutputError(f"{cache} is a file.", help="choose a folder as --cache; it is made where there is none.")
    return None if cache is None else Path(cache)


@contextmanager
def _staged(recipe: Recipe, out: Path, given: Given) -> Iterator[tuple[Bundle, tuple[Stage, ...], Run]]:
    """The bundle after all stages, and those that ran after the teacher was ready; the folder is claimed meanwhile."""
    with working(out, f"recipe {_digest(recipe)}", recipe.seed, given, recipe.latency) as state:
        bundle, stages = begin(recipe, state)
        state.root.mkdir(exist_ok=True)
        yield advance(stages, bundle, state), stages, state


@dataclass(frozen=True)
class Given:
    """How a run talks and what it may use, as the caller said."""

    log: Log | None
    threads: int | None
    wait_seconds: float
    cache: Path | None = None


@contextmanager
def working(folder: Path, purpose: str, seed: int, given: Given, levels: Levels | None = None) -> Iterator[Run]:
    """The output folder, claimed for one purpose and one process; RecipeError where it is finished already."""
    with claim(folder, purpose):
        if (folder / "report.html").is_file() and not (folder / "work").exists():
            raise RecipeError(f"{folder} is finished already.", help="look at its report.html, or choose another --out.")
        scratch = folder / "work"
        threads = given.threads or _cores()
        yield Run(scratch, scratch, given.log or Log(folder), seed, threads, levels, given.wait_seconds, given.cache)


def _digest(recipe: Recipe) -> str:
    import hashlib

    return hashlib.sha256(recipe.to_yaml().encode()).hexdigest()[:12]


def _cores() -> int:
    from slimformer.measuring.machine import cores

    return cores()


def tidy(state: Run) -> None:
    """Removes what only a resumed run would need."""
    import shutil

    shutil.rmtree(state.root)


def begin(recipe: Recipe, state: Run) -> tuple[Bundle, tuple[Stage, ...]]:
    """The bundle with a teacher that is ready, and the stages still to run; `look` has checked the recipe.

    A model that is not tuned, or whose config says that it was tuned on data of another kind, is first tuned by the recipe's leading
    plain `train` stages, and is then its own teacher. Where the recipe names a teacher, such a model itself is the student.
    """
    source = local_folder(recipe.model)
    config = checkpoint.read_config(source)
    tuned = checkpoint.is_tuned(source, recipe.task.auto_class)
    ready = tuned
    if tuned:
        marks = _trained_on(recipe)
        ready = all(config.get(name, value) == value for name, value in marks.items())
        task = recipe.task.bind(config | marks)
        model, plan, ranges = checkpoint.load(source), checkpoint.load_plan(source), checkpoint.load_ranges(source)
        for name, value in marks.items():
            setattr(model.config, name, value)  # reaches a file only with the weights that a stage has trained
    else:
        ranges = None
        # a named teacher knows the order of the classes, which the fresh head must share
        task = recipe.task.bind(checkpoint.read_config(local_folder(recipe.teacher))) if recipe.teacher else recipe.task
        model, plan = checkpoint.load_dense(source, task.auto_class, task.configure(), state.seed), Plan()
        task = task.bind(model.config.to_dict())
    material = prepare(task, source)
    _tell(material, state.log)
    stages = recipe.stages
    if recipe.teacher:
        teacher_config = checkpoint.read_config(local_folder(recipe.teacher))
        task.bind(teacher_config)
        teacher = checkpoint.load(local_folder(recipe.teacher))
        if teacher.config.vocab_size != model.config.vocab_size:
            raise ModelError(
                f"the teacher {recipe.teacher} has another vocabulary ({teacher.config.vocab_size} tokens) than the model "
                f"({model.config.vocab_size}).",
                help="teacher and student must read the same token ids.",
            )
        _try_out(teacher, material)
        return Bundle(model, plan, material, teacher, ranges=ranges), stages
    if ready:
        if not _lead(stages):  # else the first stage may teach it what it lacks
            _try_out(model, material)
        return Bundle(model, plan, material, model, ranges=ranges), stages
    lead = _lead(stages)
    bundle = advance(stages[:lead], Bundle(model, plan, material, model), state.under("teacher"))
    return Bundle(bundle.model, bundle.plan, material, bundle.model, tuned_here=not tuned), stages[lead:]


def _try_out(model: PreTrainedModel, material: Material) -> None:
    """The task's own look at a model that came tuned."""
    material.task.check_model(model.config, lambda: torch_outputs(model, material, Split.VALIDATION, TRIED))


def _tell(material: Any, log: Log) -> None:
    train, dev = material.examples[Split.TRAIN], material.examples[Split.DEV]
    validation = material.examples[Split.VALIDATION]
    log.say(f"{len(train):,} examples to train on, {len(validation):,} set aside to choose on, {len(dev):,} to report on.")
    for note in material.task.notes():
        log.say(note)
    for split, features in material.features.items():
        if features.truncated:
            share = features.truncated / max(1, len(material.examples[split]))
            log.say(f"{features.truncated:,} inputs of {split} ({share:.1%}) are cut off at {material.max_length} tokens.")


@dataclass(frozen=True)
class Ready:
    """Files that were exported and tried on validation examples already."""

    folder: Path
    trials: tuple[Trial, ...]


def finish(
    bundle: Bundle,
    stages: Sequence[Stage],
    recipe: Recipe,
    state: Run,
    out: Path,
    *,
    target: Goal | None = None,
    command: str = "",
    ready: Ready | None = None,
) -> Measurement:
    """Exports, chooses on validation examples, measures beside the rivals on dev, and fills `out`."""
    from slimformer.exporters.base import SHIPPED, Variant
    from slimformer.running import delivery, rivals
    from slimformer.running import rescue as floats

    log = state.log
    teacher = teacher_files(bundle, state)
    allowed = target.max_loss if target else recipe.export.choose_within
    if ready is None:
        log.say("exporting, and comparing the files on validation examples.")
        folder, exporter = state.root / "export", recipe.export.exporter()
        files = export_files(bundle.model, bundle.material, folder, SHIPPED, log, exporter=exporter, ranges=bundle.ranges)
        paths = {variant: artifact.path for variant, artifact in files.items()}
        reference = reference_of(bundle, state)
        ready = Ready(folder, tuple(try_out(paths, teacher[Variant.FUSED], bundle, state, reference)))
        if recipe.export.floats == "auto":
            found = floats.rescue(bundle, folder, ready.trials, state, reference, allowed, exporter=exporter)
            ready = ready if found is None else Ready(found.folder, found.trials)
    best = choose_trial(ready.trials, allowed)
    competitors = rivals.rivals(bundle, stages, recipe.bench.rivals, teacher, state)
    if recipe.bench.fused:
        export_files(bundle.model, bundle.material, ready.folder, (Variant.FUSED,), log)
    log.say("measuring everything side by side on the dev examples.")
    return delivery.deliver(
        bundle,
        ready.folder,
        out,
        state,
        best=best,
        rivals=competitors,
        recipe=recipe.to_yaml(),
        target=target,
        task_options=named_options(bundle.material.task),
        model_name=model_name(recipe.model),
        task_name=recipe.task.title(),
        command=command,
        seconds=recipe.bench.seconds,
        openvino=recipe.bench.openvino,
        fused=recipe.bench.fused,
        openvino_file=recipe.export.openvino,
        values=recipe.export.values,
    )


def model_name(path: str) -> str:
    """How a model is called in tables: its folder, or the one above where the folder is only called "model"."""
    folder = Path(path).resolve()
    return folder.parent.name if folder.name in {"model", "checkpoint"} and folder.parent.name else folder.name
