"""`compress` searches the fastest model within an allowed loss, and delivers the best one that it finds.

The model is tuned first if it has no head for the task. `fisher` then cuts it to the speed on this machine; the student is distilled,
quantized to int8 and tried on validation examples. If only int8 loses too much, the matrices that cost most may stay in float
(`rescue.py`); otherwise a gentler budget is tried, by bisection on the speed. If no candidate meets both limits, the best one is
delivered, and a message says so. `slimformer run` repeats the recipe that is delivered with it.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch

from slimformer import registry
from slimformer.core.shrink import shrink
from slimformer.data.material import spaced_rows, subset
from slimformer.errors import RecipeError, TargetError
from slimformer.exporters.base import SEARCH_SECONDS, Exporter, Variant
from slimformer.families.base import Subject, family_of, subject_of
from slimformer.files import remembered, remove_folder
from slimformer.log import Log
from slimformer.measuring.beside import make_readable
from slimformer.measuring.latency import usual_length
from slimformer.measuring.records import Goal, Standing
from slimformer.measuring.scoring import Measurement
from slimformer.measuring.sessions import open_session
from slimformer.measuring.timing import Rounds, compare, ratio, workloads
from slimformer.reporting.words import lost_text, size_text
from slimformer.rules import Count, Points, Positive, Seed, mistakes_in, real_number
from slimformer.running.bundle import Bundle, Made, Run
from slimformer.running.candidate import Candidate, candidate_of, teacher_candidate
from slimformer.running.delivery import Order, finish
from slimformer.running.facts import facts_of
from slimformer.running.given import given_model, given_task
from slimformer.running.preflight import Checked, check_kept, preflight
from slimformer.running.prepare import load_bundle, teach_bundle
from slimformer.running.recipe import RIVALS, Bench, Export, Recipe, RivalName, Rivals
from slimformer.running.rescue import rescue
from slimformer.running.result import Result
from slimformer.running.rivals import Contestant, drops_layers, equal_layers, rivals_of, small_dense
from slimformer.running.runner import Conditions, finished_result, model_name, open_run, wish_of
from slimformer.running.schedule import (
    FEWEST_STEPS,
    FULL_BENCH,
    PASSES,
    SHORTEST_BENCH,
    Diet,
    Pace,
    Part,
    Schedule,
    Sizes,
    copies_of,
    diet_for,
    duration,
    forecast,
    passes_within,
    savings,
)
from slimformer.running.stages import Clock, advance, context_of, latency_of, training_of
from slimformer.running.students import refuse_student
from slimformer.running.trials import Judge, Trial, judge_of, tried_rows
from slimformer.saving import checkpoint
from slimformer.saving.hub import local_folder
from slimformer.tasks.base import Features, Split, Task, refuse_pretraining
from slimformer.training.estimate import estimate
from slimformer.training.processes import shared
from slimformer.training.stage import Calibrate, Train, TrimVocabulary
from slimformer.training.teacher import cached_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MARGIN = 1.04  # the search aims this much above the requested speed, because a measured ratio spreads by a few per cent
CLOSE = 0.99  # a speed counts as reached from this share on: two timings of one file differ by more
CLEARLY = 1.05  # times as fast as the cut model is what the smaller dense one must be: two timings of one file differ by less
TRIES = 3  # at most so many budgets are trained
PROBES = 4  # so many untrained exports find the budget for a speed; each takes seconds
PROBE_SECONDS = 4.0  # of timing each
DISTIL_TOKENS = 3_000_000  # the distillation sees so many by default: minutes on two cores for a small model
TUNE_TOKENS = 1_000_000
SAID = 3  # reads of a token among others take about as long as saying one on a beam
WAIT_SHARE = 0.05  # of a budget that may go into waiting for a quiet machine
CACHED_BYTES = 8 << 30  # disk limit for a teacher's scores and hidden states; above it, attention scores are not distilled

Speedup = Annotated[float, real_number("above 1 and at most 100", lambda value: 1 < value <= 100, 1.0, 101.0)]
Minutes = Annotated[float, real_number("above 0", lambda value: value > 0, 0.0, 1e5)]
VocabularyChoice = Literal["whole", "trim"]
EngineChoice = Literal["onnx", "kernels"]  # the exporters whose files are searched for
_BLOCKS = "4x4"  # weights that the kernels skip together (decision 0020)
_BLOCKS_LEFT = (0.5, 0.2)  # shares of a matrix's blocks that may be left, for the kernels
LARGE_TABLE = 0.5  # a share of the parameters that is worth a line
CHANGEABLE = ("speedup", "max_loss", "tries")  # these may change when a run resumes: earlier results stay valid


@dataclass(frozen=True)
class Wanted:
    """The options of a compression; `compress` explains each of them."""

    speedup: Speedup = 3.0
    max_loss: Points = 1.0
    epochs: Positive | None = None
    lr: Positive | None = None
    batch_size: Count = 32
    seed: Seed = 17
    tries: Count = TRIES
    rivals: Rivals = RIVALS
    minutes: Minutes | None = None
    vocabulary: VocabularyChoice = "whole"
    engine: EngineChoice = "onnx"

    def __post_init__(self) -> None:
        for name in ("speedup", "max_loss", "epochs", "lr", "minutes"):  # 2 and 2.0 are the same purpose
            if isinstance(getattr(self, name), int):
                object.__setattr__(self, name, float(getattr(self, name)))
        wrong = mistakes_in(self)
        if wrong:
            raise RecipeError("these options cannot be used.", facts=wrong, help="see `slimformer compress --help`.")

    def purpose(self, recipe: Recipe) -> str:
        """The purpose of a folder."""
        fixed = {name: value for name, value in asdict(self).items() if name not in CHANGEABLE}
        if self.vocabulary == "whole":
            del fixed["vocabulary"]  # as before there was a choice
        if self.engine == "onnx":
            del fixed["engine"]
        options = {"model": recipe.model, "task": repr(recipe.task), **fixed}
        return f"compress {json.dumps(options, sort_keys=True, default=str)}"


@shared
def compress(
    model: str | Path | PreTrainedModel,
    task: Task | str | Mapping[str, Any],
    out: str | Path,
    *,
    tokenizer: Any = None,
    speedup: float = 3.0,
    max_loss: float = 1.0,
    epochs: float | None = None,
    lr: float | None = None,
    batch_size: int = 32,
    seed: int = 17,
    tries: int = TRIES,
    rivals: RivalName | Sequence[RivalName] = RIVALS,
    minutes: float | None = None,
    vocabulary: VocabularyChoice = "whole",
    engine: EngineChoice = "onnx",
    log: Log | None = None,
    command: str = "",
    threads: int | None = None,
    wait_seconds: float = 60.0,
) -> Result:
    """Makes `model` smaller and faster for `task`, leaves everything in the folder `out`, and resumes if it was cut off.

    Args:
        model: A folder with config.json, tokenizer and model.safetensors, an id on the hub ("owner/name", "owner/name@revision"), or
            a transformers model in memory, which is written into `out`. A model without a head for this kind of task is tuned first.
        task: Where the examples come from and how they are scored, such as `Classification(data="./reviews")`, or the same as in a
            recipe, `{"use": "classification", "data": "./reviews"}`.
        out: The folder for the result. It must not hold other files, nor a run of another model or task. If it holds the finished
            run of this very call, nothing is done, and its result is returned.
        tokenizer: The tokenizer of a model in memory. A pipeline or a CrossEncoder brings its own.
        speedup: How many times as fast as the dense model in fp32 in ONNX Runtime, at batch 32; above 1, at most 100.
        max_loss: Points of the task's metric that may be lost (0.01 of accuracy is one point). If no model meets both limits, the
            best one is delivered, and a message says so.
        epochs: Epochs of the distillation; by default the size of the data decides.
        lr: The peak learning rate of the distillation; by default the width of the model decides.
        batch_size: Rows of a training step.
        seed: The seed of all random numbers.
        tries: At most so many budgets are trained.
        rivals: The baselines to measure; "small-dense" trains as long as the result itself.
        minutes: A budget for everything, rivals and the final measurement included. What is left out or shortened for it is said
            before it starts. Without one everything is as thorough as the size of the data asks for.
        vocabulary: "trim" cuts the word table to the pieces that the training texts need, before the search (`TrimVocabulary`). No
            file becomes faster by that; other texts may be split otherwise, and the card says how many of dev are.
        engine: "kernels" searches for the compiled kernels of slimformer-kernels, which skip zeros: whole blocks of weights may go
            beside heads and neurons, and the best file may be one that only they run. The files for any runtime lie beside it.
        log: As in `run`, like `command`, `threads` and `wait_seconds`.

    Returns:
        The folder, and everything that was measured.

    Raises:
        RecipeError: An option is out of range, `minutes` are too few, or the task is none.
        ModelError: The model cannot be loaded, or does not suit the task.
        DataError: The data cannot be read, or do not suit the model.
        TargetError: The speed is out of reach; the message names the highest possible.
        OutputError: `out` cannot be used, or belongs to another run.

    Example:
        >>> from slimformer import compress
        >>> from slimformer.tasks.classification import Classification
        >>> result = compress("my-bert", Classification(data="reviews"), "compressed", speedup=1.5, max_loss=5, tries=1)
        >>> print(result)  # doctest: +ELLIPSIS
        compressed: ... times as fast at batch 32, ...; best file onnx/model...onnx
    """
    began = time.monotonic()
    wanted = Wanted(
        speedup,
        max_loss,
        epochs,
        lr,
        batch_size,
        seed,
        tries,
        (rivals,) if isinstance(rivals, str) else tuple(rivals),
        minutes,
        vocabulary,
        engine,
    )
    if wanted.minutes is not None:
        wait_seconds = min(wait_seconds, WAIT_SHARE * 60 * wanted.minutes)
    conditions, settled = Conditions(log, threads, wait_seconds), given_task(task)
    refuse_pretraining(settled, "compress")
    with given_model(model, tokenizer, Path(out)) as name:
        return _compress_named(name, settled, Path(out), wanted, conditions, command, began)


def _compress_named(
    model: str, task: Task, out: Path, wanted: Wanted, conditions: Conditions, command: str, began: float
) -> Result:
    """`compress` for a model that has a path or a name on the hub."""
    options = {name: value for name, value in asdict(wanted).items() if name in CHANGEABLE}
    result = finished_result(out, wanted.purpose(Recipe(model, task, ())), options, task, conditions.log)
    if result is not None:
        return result
    source = local_folder(model)
    tune = Train(lr=_tune_lr(source), batch_size=wanted.batch_size)
    tuned = checkpoint.is_tuned(source, task.auto_class)
    recipe = Recipe(
        model,
        task,
        () if tuned else (tune,),
        seed=wanted.seed,
        export=Export(to=wanted.engine),
        bench=Bench(rivals=wanted.rivals),
    )
    trim = (TrimVocabulary(),) if wanted.vocabulary == "trim" else ()
    checked = replace(preflight(replace(recipe, stages=(*recipe.stages, *trim))), recipe=recipe)
    refuse_student(source)
    check_kept(source, (tune,))  # all searched stages train, whether the model came tuned or not
    wish = partial(wish_of, task, options)
    with open_run(out, wanted.purpose(recipe), wanted.seed, conditions, wish=wish) as run:
        with Schedule(run.root, wanted.minutes, run.log, began) as schedule:
            measurement = _compress(checked, wanted, command, schedule, run, out, tuned=tuned)
            schedule.compare()
        remove_folder(run.root)
    return Result(out, measurement.records)


def _compress(
    checked: Checked, wanted: Wanted, command: str, schedule: Schedule, run: Run, out: Path, *, tuned: bool
) -> Measurement:
    """Plans, tunes if need be, searches, trains the rivals, measures and delivers."""
    first = load_bundle(checked, run)
    outline = _outline(first, wanted, schedule, run, tuned=tuned)
    if not tuned:
        tune = _tuning(checked.source, outline.diet, outline.sizes, wanted)
        checked = replace(checked, recipe=replace(checked.recipe, stages=(tune,)))
    with schedule.part(Part.TUNING):
        bundle, _ = teach_bundle(first, checked, run)
    bundle = _trimmed(bundle, wanted, run)
    with Clock(run.root) as clock:  # of the search and all budgets tried: what the user waits for, without the rivals
        search = _Search(bundle, checked.recipe, wanted, outline, schedule, run)
        chosen = search.run().after(clock.minutes)
    chosen, rivals = search.contest(search.written(chosen))
    recipe, task = search.recipe_of(chosen), checked.recipe.task
    order = Order(recipe, model_name(recipe.model), task.title(), Goal(wanted.speedup, wanted.max_loss), command)
    with schedule.part(Part.MEASURING):
        return finish(chosen, rivals, order, search.judge, run, out)


def _trimmed(bundle: Bundle, wanted: Wanted, run: Run) -> Bundle:
    """The bundle with the vocabulary that is wanted; of a large table that stays whole, a line says so."""
    if wanted.vocabulary == "trim":
        return advance((TrimVocabulary(),), bundle, run.under("vocabulary")).bundle
    tables = sum(matrix.parameters for matrix in bundle.subject.anatomy.matrices.values() if matrix.table)
    share = tables / bundle.subject.model.num_parameters()
    if share > LARGE_TABLE:
        run.log.say(
            f"the word table has {share:.0%} of the parameters: `--vocabulary trim` keeps the pieces that your texts need."
        )
    return bundle


# -- What the sizes of model and data decide -----------------------------------------------------------------------------------


def _hidden_size(source: Path) -> int:
    config = checkpoint.read_config(source)
    return family_of(checkpoint.base_type(config)).width(config) or 768


def _tune_lr(source: Path) -> float:
    """4e-5 for a width of 768, more for narrower models: 8e-5 for 384."""
    return float(f"{4e-5 * 768 / _hidden_size(source):.2g}")


def _fast_lr(source: Path) -> float:
    """8e-4 up to a width of 384, for which it was measured; it falls with the square of the width: 2e-4 for 768, which we chose."""
    return float(f"{8e-4 * min(1.0, 384 / _hidden_size(source)) ** 2:.2g}")


def _tuning(source: Path, diet: Diet, sizes: Sizes, wanted: Wanted) -> Train:
    """The tuning of a model that came without a head. The fewer tokens it sees, the higher the rate (decision 0013)."""
    seen = diet.tune_passes * sizes.train_tokens
    faster = min(4.0, max(1.0, (TUNE_TOKENS / 2 / seen) ** 0.75))
    lr, passes = float(f"{_tune_lr(source) * faster:.2g}"), round(diet.tune_passes, 2)
    return Train(lr=lr, epochs=passes, batch_size=wanted.batch_size)


def _distillation(bundle: Bundle, wanted: Wanted, passes: float, left: float = 1.0) -> Train:
    """The distillation that a budget gets; of each matrix, a share of its blocks is `left`.

    Small data is augmented, for as many steps; its copies have no labels of their own. With attention scores the student may learn
    five times as fast, and loses less (decision 0009). They grow with the square of a text's length; if they do not fit on disk, the
    student learns outputs and hidden states alone.
    """
    source, features = bundle.material.source, bundle.material.features[Split.TRAIN]
    if bundle.subject.beams is not None:
        return _word_level(bundle, wanted, passes)
    copies = copies_of(passes)
    rows = None if passes >= PASSES else max(1, round(len(features) * passes / PASSES))
    distillation = registry.find("methods", "distillation")
    method, lr, weight = distillation(), 2 * _tune_lr(source), 0.0 if copies else 0.1
    lengths = spaced_rows(features, rows).lengths() if rows else features.lengths()
    scored = distillation(temperature=1.0, hidden=6.0, scores=6.0, relative=False)
    if (1 + copies) * cached_bytes(bundle.teacher.anatomy, lengths, scored.effects().needs) <= CACHED_BYTES:
        method, lr, weight = scored, max(lr, _fast_lr(source)), 0.0
    zeros = () if left == 1.0 else (registry.find("methods", "knowledge_sparse")(keep=left, pattern=_BLOCKS),)
    return Train(
        methods=(*zeros, method),
        epochs=round((PASSES if rows else passes) / (1 + copies), 2),
        lr=wanted.lr or lr,
        batch_size=wanted.batch_size,
        task_weight=weight,
        dropout=False,
        freeze="embeddings",
        rows=rows,
        augment=copies,
    )


def _word_level(bundle: Bundle, wanted: Wanted, passes: float) -> Train:
    """The distillation of a model that writes texts: the next word after the right ones (Kim and Rush 2016), and hidden states.

    Nothing is augmented: another word in what is read asks for another text. The teacher runs beside the student, because what it says
    of a whole vocabulary at each token would fill the disk.
    """
    rows = None if passes >= PASSES else max(1, round(len(bundle.material.features[Split.TRAIN]) * passes / PASSES))
    method = registry.find("methods", "distillation")(temperature=1.0)
    return Train(
        methods=(method,),
        epochs=round(PASSES if rows else passes, 2),
        lr=wanted.lr or max(2 * _tune_lr(bundle.material.source), 0.5 * _fast_lr(bundle.material.source)),
        batch_size=wanted.batch_size,
        task_weight=0.1,
        dropout=False,
        rows=rows,
    )


# -- The plan ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outline:
    """What was measured and decided before anything started; a resumed run goes by the same."""

    sizes: Sizes
    pace: Pace
    diet: Diet
    disk_bytes: int


def _outline(first: Bundle, wanted: Wanted, schedule: Schedule, run: Run, *, tuned: bool) -> _Outline:
    """Measures a few real steps, fits everything into the budget if there is one, and says what will be done and how long it takes."""
    file = run.root / "outline.json"
    new = not file.is_file()
    outline = remembered(file, lambda: _planned(first, wanted, schedule, run, tuned=tuned), _Outline)
    schedule.announced = forecast(outline.sizes, outline.pace, outline.diet, wanted.speedup)
    if new:
        _announce(outline, _full(first, wanted, outline.sizes), first, wanted, schedule, run)
    return outline


def _planned(first: Bundle, wanted: Wanted, schedule: Schedule, run: Run, *, tuned: bool) -> _Outline:
    material = first.material
    features = {split: material.features[split] for split in Split}
    chosen, _ = subset(material, Split.VALIDATION, tried_rows(material.task))
    tokens = int(features[Split.TRAIN].lengths().sum())
    sizes = Sizes(
        layers=len(first.subject.anatomy.layers),
        train_tokens=tokens,
        train_rows=len(features[Split.TRAIN]),
        validation_tokens=_read_tokens(chosen, first.subject) * (2 if tuned else 1),
        dev_tokens=_read_tokens(features[Split.DEV], first.subject),
        tuned=tuned,
        searches=1 if first.subject.beams in (None, 1) else 2,
    )
    full = _full(first, wanted, sizes)
    distil = _distillation(first, wanted, full.passes)
    cost = estimate(training_of(replace(distil, rows=None, augment=0), first, run), seconds=1.5)
    pace = Pace(1 / cost.tokens_per_second, cost.teacher_seconds / tokens, cost.peak_rss_bytes)
    diet = (
        full
        if wanted.minutes is None
        else diet_for(sizes, pace, full, wanted.speedup, schedule.left, wanted.batch_size, schedule.spent)
    )
    learnt = _distillation(first, wanted, diet.passes)
    lengths = features[Split.TRAIN].lengths()[: learnt.rows]
    needs = learnt.methods[-1].effects().needs if first.subject.beams is None else ()
    return _Outline(sizes, pace, diet, (1 + learnt.augment) * cached_bytes(first.teacher.anatomy, lengths, needs))


def _read_tokens(features: Features, subject: Subject) -> int:
    """The tokens of these rows; of texts that are to be written, what saying them on each beam takes as long as to read."""
    targets = features.target_lengths()
    said = 0 if targets is None else SAID * (subject.beams or 1) * int(targets.sum())
    return int(features.lengths().sum()) + said


def _full(first: Bundle, wanted: Wanted, sizes: Sizes) -> Diet:
    """Everything as thorough as the sizes ask for."""
    tune = min(5.0, max(2.0, TUNE_TOKENS / sizes.train_tokens))
    passes = wanted.epochs or min(12.0, max(3.0, DISTIL_TOKENS / sizes.train_tokens))
    return Diet(
        tune_passes=0.0 if sizes.tuned else round(tune, 1),
        passes=round(passes, 1),
        probes=PROBES,
        tries=wanted.tries,
        rival="small-dense" in wanted.rivals,
    )


def _announce(outline: _Outline, full: Diet, first: Bundle, wanted: Wanted, schedule: Schedule, run: Run) -> None:
    """Says what is about to happen, how long it takes, what it needs, and what was left out for the budget."""
    diet, sizes, pace, say = outline.diet, outline.sizes, outline.pace, run.log.say
    distil = _distillation(first, wanted, diet.passes)
    steps = distil.steps_of((distil.rows or sizes.train_rows) * (1 + distil.augment))
    if not sizes.tuned:
        say(
            f"this model has no head for the task yet: it is tuned first, for {diet.tune_passes:.2g} epochs at lr "
            f"{_tuning(first.material.source, diet, sizes, wanted).lr:g}, {duration(schedule.announced[Part.TUNING])}."
        )
    say(
        f"plan: cut to {wanted.speedup:g} times the speed, distil for {diet.passes:.2g} epochs ({steps:,} steps; uncut "
        f"{1 / pace.step:,.0f} tokens a second), int8, verify; up to {diet.tries} budget{'s' if diet.tries > 1 else ''}."
    )
    schedule.announce(schedule.announced)
    if diet.tries > 1:
        again = sum(schedule.announced[part] for part in (Part.CUTTING, Part.DISTILLING, Part.TRYING))
        say(f"if too much is lost, each further budget takes {duration(again)}.")
    busy = f"up to {run.quiet.left:.0f} seconds more if the machine is busy; " if run.quiet.left else ""
    say(
        f"{busy}about {pace.peak_rss_bytes / 2**30:.1f} GiB of memory, "
        + (
            f"{size_text(outline.disk_bytes)} of disk for the teacher's outputs."
            if first.subject.beams is None
            else "and the teacher runs beside the student."
        )
    )
    if wanted.minutes is not None and diet != full:
        say(f"to fit {wanted.minutes:g} minutes: {'; '.join(savings(full, diet, distil.rows, sizes))}.")


# -- The search ----------------------------------------------------------------------------------------------------------------


class _Search:
    """Proposes budgets until one meets the loss, and picks the best candidate of all it has seen."""

    def __init__(self, bundle: Bundle, recipe: Recipe, wanted: Wanted, outline: _Outline, schedule: Schedule, run: Run) -> None:
        self.bundle, self.recipe, self.wanted, self.state = bundle, recipe, wanted, run
        self.outline, self.schedule, self.diet = outline, schedule, outline.diet
        with schedule.part(Part.UNCUT):
            self.judge = judge_of(bundle, run)
            self.exporter = recipe.export.exporter()
            self.whole = teacher_candidate(
                Made(bundle), self.judge, run, self.exporter, seconds=min(5.0, self.diet.trial_seconds)
            )
        self.uncut = wanted.speedup <= self.whole.trials[0].speed_32

    @cached_property
    def scale(self) -> _Scale:
        """The scale that gives budgets; it measures this machine when it is first used."""
        return _Scale(self.bundle, self.judge, self.diet, self.exporter, self.state)

    def run(self) -> Candidate:
        """The best candidate."""
        wanted, log = self.wanted, self.state.log
        candidates = self._without_cut() if self.uncut else self._with_cuts()
        chosen = pick([*candidates, self.whole], wanted.max_loss)
        best = chosen.best_int8(wanted.max_loss)
        if not chosen.stages and not self.uncut:
            log.say("no cut stays within the loss that is allowed: delivering the uncut model in its best file.")
        if best.loss > wanted.max_loss or best.speed_32 < wanted.speedup * CLOSE:
            log.say(
                f"not all that was asked for was found; this is the best: {best.speed_32:.2f} times as fast (asked: "
                f"{wanted.speedup:g}), {abs(best.loss):.2f} points {lost_text(best.loss)} on validation examples (allowed: "
                f"{wanted.max_loss:g})."
            )
        return chosen

    def _without_cut(self) -> list[Candidate]:
        """The uncut model; if its first int8 file loses too much, its others, with matrices in float if that is needed."""
        whole, allowed = self.whole, self.wanted.max_loss
        speed = whole.trials[0].speed_32
        self.state.log.say(f"int8 alone is {speed:.2f} times as fast; nothing needs to be cut for {self.wanted.speedup:g}.")
        if whole.best_int8(allowed).loss <= allowed:
            return [whole]
        others = self.written(whole)
        if others.best_int8(allowed).loss <= allowed:
            return [others]
        rescued = rescue(others, self.judge, self.state, allowed, exporter=self.exporter)
        return [others] if rescued is None else [others, rescued]

    def _with_cuts(self) -> list[Candidate]:
        """One candidate for each budget that is tried, from the speed asked for down to that of the uncut model."""
        wanted, log = self.wanted, self.state.log
        slow, aim = self.whole.trials[0].speed_32, wanted.speedup
        candidates: list[Candidate] = []
        for left in range(self.diet.tries - 1, -1, -1):
            with self.schedule.part(Part.CUTTING):
                keep, blocks = self._budget(aim)
            candidate = self._cut_to(keep, blocks)
            candidates.append(candidate)
            best = candidate.best_int8(wanted.max_loss)
            log.say(
                f"{best.speed_32:.2f} times as fast, {abs(best.loss):.2f} points {lost_text(best.loss)} on validation examples "
                f"({candidate.kinds[best.variant].name}, {size_text(best.size_bytes)})."
            )
            if best.loss <= wanted.max_loss:
                break
            aim = math.sqrt(slow * aim)
            if not self._has_time(Part.TRYING, more=SEARCH_SECONDS):
                log.say(f"more than {wanted.max_loss:g} points are lost, and the time that is left allows no other try.")
                break
            with self.schedule.part(Part.TRYING):
                rescued = rescue(candidate, self.judge, self.state, wanted.max_loss, exporter=self.exporter)
            if rescued is not None:
                candidates.append(rescued)
                if rescued.best_int8(wanted.max_loss).speed_32 >= aim:
                    break  # a gentler cut would not be faster
            if aim / slow < 1.05:
                break
            if left and not self._has_time(Part.CUTTING, Part.DISTILLING, Part.TRYING):
                log.say(f"more than {wanted.max_loss:g} points are lost, and the time that is left allows no other budget.")
                break
            if left:
                log.say(f"more than {wanted.max_loss:g} points are lost: trying a model {aim:.2f} times as fast.")
        return candidates

    def _has_time(self, *parts: Part, more: float = 0.0) -> bool:
        """Whether the time that is left allows these parts and `more` seconds, beside the rivals and the final measurement."""
        needed = sum(self.schedule.announced[part] for part in (*parts, Part.RIVAL, Part.MEASURING))
        return self.schedule.left >= needed + more

    def _budget(self, aim: float) -> tuple[float, float]:
        """What is left for a speed: the share of the dense latency after a cut, and the share of each matrix's blocks.

        For the kernels blocks go first, because a model of zeros is cut finer than one of fewer heads and neurons; only what the fewest
        blocks do not reach is left to a cut.
        """
        if self.wanted.engine == "onnx" or self.bundle.subject.beams is not None:
            return self.scale.keep(aim), 1.0
        speeds = {left: self.scale.with_blocks(left) for left in _BLOCKS_LEFT}
        enough = next((left for left, speed in speeds.items() if speed >= aim), None)
        if enough is not None:
            return 1.0, enough
        least, dense = _BLOCKS_LEFT[-1], self.whole.trials[0].speed_32
        return self.scale.keep(aim * dense / speeds[least]), least

    def _cut_to(self, keep: float, blocks: float) -> Candidate:
        """Cuts to the budget, distils, exports and tries the files; all of it is kept for a resumed run."""
        name = f"keep-{keep:.4f}" if blocks == 1.0 else f"keep-{keep:.4f}-blocks-{blocks:g}"
        home, below = self.state.root / name, self.state.under(name)
        cuts = () if keep == 1.0 and blocks < 1.0 else (Calibrate(replace(self.scale.fisher, keep=round(keep, 4))),)
        with self.schedule.part(Part.CUTTING):
            before = advance(cuts, self.bundle, below)
        with self.schedule.part(Part.DISTILLING):
            distil = self._lesson(before.bundle, home / "passes.json", blocks)
            made = advance([distil], before.bundle, below.under("distilled"))
        with self.schedule.part(Part.TRYING):
            made = replace(made, effort=before.effort.then(made.effort))
            return candidate_of(
                made, (*cuts, distil), home, self.judge, self.state, self.exporter, seconds=self.diet.trial_seconds
            )

    def _lesson(self, small: Bundle, file: Path, blocks: float = 1.0) -> Train:
        """The distillation of a cut model: as announced, or as the budget allows by now, from a few real steps of this model."""
        distil = _distillation(small, self.wanted, self.diet.passes, blocks)
        if self.wanted.minutes is None:
            return distil

        def passes() -> float:
            sizes, pace, slow = self.outline.sizes, self.outline.pace, self.schedule.slowness(Part.UNCUT, Part.CUTTING)
            cost = estimate(training_of(replace(distil, rows=None, augment=0), small, self.state), seconds=1.0)
            pace = replace(pace, read=cost.teacher_seconds / sizes.train_tokens)
            rest = replace(self.diet, passes=0.0, bench_seconds=min(self.diet.bench_seconds, SHORTEST_BENCH))
            later = forecast(sizes, pace, rest, self.wanted.speedup)
            needed = sum(slow * later[part] for part in (Part.TRYING, Part.RIVAL, Part.MEASURING))
            most = _full(small, self.wanted, sizes).passes
            fit = passes_within(sizes, pace, self.schedule.left - needed, most, self.diet.rival, 1 / cost.tokens_per_second)
            least = FEWEST_STEPS * self.wanted.batch_size / sizes.train_rows
            return round(max(fit, least), 2)

        fit = remembered(file, passes, float)
        if abs(fit - self.diet.passes) > 0.1 * self.diet.passes:
            self.state.log.say(
                f"the time that is left allows {fit:.2g} epochs of distillation; {self.diet.passes:.2g} were planned."
            )
        return _distillation(small, self.wanted, fit, blocks)

    def contest(self, chosen: Candidate) -> tuple[Candidate, list[Contestant]]:
        """The candidate to deliver, and its rivals, trained.

        If a smaller dense model passes the gate better than the cut one, it is delivered, and the cut one is its rival. The first has
        as many multiply-accumulates as the cut one; if it loses too much, one of a layer more is tried, as long as that would be
        faster than the cut one. None is made if the budget no longer allows it.
        """
        with self.schedule.part(Part.RIVAL):
            rivals = rivals_of(chosen.made, chosen.stages, self.rival_names, self.judge, self.state)
            small = next((rival for rival in rivals if rival.made is not None), None)
            layers, tries = equal_layers(chosen.made.bundle), 1
            while small is not None:
                mine, its = self._race(chosen, small)
                if better(its, mine, self.wanted.max_loss):
                    made = [chosen.made, *(rival.made for rival in rivals if rival.made is not None)]
                    winner = self._delivered(small, mine, its).after(sum(each.effort.minutes for each in made))
                    return winner, [*(rival for rival in rivals if rival is not small), self._loser(chosen)]
                deeper = deeper_may_win(its, mine, layers, self.wanted.max_loss) and layers + 1 < self.outline.sizes.layers
                if not deeper or tries >= self.diet.tries or not self._has_time():
                    break
                self.state.log.say(
                    f"{layers} dense layer{'s' * (layers > 1)} lost {abs(its.loss):.2f} points, more than is allowed, at "
                    f"{its.speed_32 / mine.speed_32:.2f} times the speed of the cut model: trying one more."
                )
                layers, tries = layers + 1, tries + 1
                small = small_dense(chosen.made, chosen.stages, layers, self.state)
                small = replace(small, material=chosen.made.bundle.uncut.material)
                rivals.append(small)
        return chosen, rivals

    def _race(self, chosen: Candidate, small: Contestant) -> tuple[Trial, Trial]:
        """The trials of the cut model's best int8 file and of the smaller dense one's, in one race on validation examples."""
        assert small.made is not None
        best = chosen.best_int8(self.wanted.max_loss)
        files: dict[str, Path] = {best.variant: chosen.files[best.variant], small.variant: small.path}
        pair = f"{chosen.made.bundle.digest()}-{small.made.bundle.digest()}.json"
        mine, its = remembered(
            self.state.root / "contest" / pair,
            lambda: self.judge.try_out(files, chosen.kinds, seconds=self.diet.trial_seconds),
            list[Trial],
        )
        return mine, its

    def _delivered(self, small: Contestant, mine: Trial, its: Trial) -> Candidate:
        """The smaller dense model as a candidate."""
        assert small.made is not None
        self.state.log.say(
            f"the smaller dense model has {abs(its.loss):.2f} points {lost_text(its.loss)} on validation examples at "
            f"{its.speed_32 / mine.speed_32:.2f} times the speed of the cut one: it is delivered, and the cut one stands beside it."
        )
        home, seconds = self.state.root / "dense", self.diet.trial_seconds
        return candidate_of(small.made, small.stages, home, self.judge, self.state, self.exporter, seconds=seconds)

    def _loser(self, chosen: Candidate) -> Contestant:
        """The cut model as a rival."""
        best = chosen.best_int8(self.wanted.max_loss)
        facts = facts_of(chosen.made, self.state, "")
        own = chosen.made.bundle.material
        return Contestant("cut model int8", Standing.CUT, chosen.files[best.variant], best.variant, facts=facts, material=own)

    @property
    def rival_names(self) -> tuple[RivalName, ...]:
        """The rivals that are wanted and that the budget allows."""
        return self.wanted.rivals if self.diet.rival else _without_small_dense(self.wanted.rivals)

    def bench_seconds(self) -> float:
        """Seconds for each of the two workloads of the final measurement: as planned, but no more than is left."""
        if self.wanted.minutes is None:
            return self.diet.bench_seconds
        idle = forecast(self.outline.sizes, self.outline.pace, replace(self.diet, bench_seconds=0.0), self.wanted.speedup)
        free = (self.schedule.left - idle[Part.MEASURING]) / (2 * self.outline.sizes.searches)
        planned = remembered(self.state.root / "bench.json", lambda: min(FULL_BENCH, max(SHORTEST_BENCH, free)), float)
        return round(planned, 1)

    def written(self, candidate: Candidate) -> Candidate:
        """The candidate with all files that ship: those of the uncut model are written only if they are asked for."""
        if candidate.folder is not None:
            return candidate
        with self.schedule.part(Part.TRYING):
            home, seconds = self.state.root / "whole", self.diet.trial_seconds
            return candidate_of(candidate.made, (), home, self.judge, self.state, self.exporter, seconds=seconds)

    def recipe_of(self, chosen: Candidate) -> Recipe:
        """The recipe that leads to the chosen candidate again."""
        lead = self.recipe.stages if self.bundle.tuned_here else ()
        # without the levels, the same recipe would measure its own and cut a little otherwise
        dense = drops_layers(chosen.stages)
        levels = self.scale.levels if chosen.stages and not dense else None
        export = replace(self.recipe.export, floats=chosen.floats)
        rivals = _without_small_dense(self.rival_names) if dense else self.rival_names
        bench = replace(self.recipe.bench, seconds=self.bench_seconds(), rivals=rivals)
        trim = (TrimVocabulary(),) if chosen.made.bundle.vocabulary is not None else ()
        return replace(self.recipe, stages=(*lead, *trim, *chosen.stages), latency=levels, export=export, bench=bench)


def _without_small_dense(names: Sequence[RivalName]) -> tuple[RivalName, ...]:
    return tuple(name for name in names if name != "small-dense")


def better(dense: Trial, cut: Trial, max_loss: float) -> bool:
    """Whether the smaller dense model is to be delivered instead of the cut one.

    It is, if it alone keeps to the loss, or if both do and it is clearly faster; if neither does, if it loses less.
    """
    if cut.loss > max_loss:
        return dense.loss < cut.loss
    return dense.loss <= max_loss and dense.speed_32 > CLEARLY * cut.speed_32


def deeper_may_win(dense: Trial, cut: Trial, layers: int, max_loss: float) -> bool:
    """Whether a dense model with one layer more than `layers` is worth training: this one lost too much, and that one would still be
    clearly faster than the cut model, even if all of its time were in its layers.
    """
    return dense.loss > max_loss and dense.speed_32 * layers / (layers + 1) > CLEARLY * cut.speed_32


def pick(candidates: Sequence[Candidate], max_loss: float) -> Candidate:
    """The fastest candidate that loses at most what is allowed; if there is none, the one that loses least."""
    good = [candidate for candidate in candidates if candidate.best_int8(max_loss).loss <= max_loss]
    if good:
        return max(good, key=lambda candidate: candidate.best_int8(max_loss).speed_32)
    return min(candidates, key=lambda candidate: candidate.best_int8(max_loss).loss)


class _Scale:
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
        """The importance of each head, neuron and sublayer of the uncut model."""
        self.state.log.say("measuring how much each head and neuron matters.")
        return self.fisher.weigh(self.context)

    def keep(self, speedup: float) -> float:
        """The share of the dense int8 latency that makes the exported int8 file `speedup` times as fast as dense fp32."""
        return remembered(self.state.root / f"budget-{speedup:.4f}.json", lambda: self._probed(speedup), float)

    def _probed(self, speedup: float) -> float:
        aim = speedup * MARGIN
        keep = min(1.0, self.dense_fp32_ms / aim / self.cost.dense)
        probes: list[tuple[float, float]] = []  # (budget, speed)
        for _ in range(self.probes):
            speed = self.speed(keep, speedup)
            probes.append((keep, speed))
            self.state.log.event("probe", keep=round(keep, 4), speedup=round(speed, 3), wanted=aim)
            if speedup * 1.01 <= speed <= speedup * 1.1:
                return keep
            keep = nearer(probes, aim)
        if min(probe[1] for probe in probes) < aim <= max(probe[1] for probe in probes):
            return keep  # between two that were timed
        enough = [probe for probe in probes if probe[1] >= speedup]
        return max(enough)[0] if enough else min(probes, key=lambda probe: abs(probe[1] - aim))[0]

    def speed(self, keep: float, wanted: float) -> float:
        """How many times as fast as dense fp32 an untrained model of this budget is, as int8, batch 32."""
        anatomy = self.context.anatomy
        try:
            plan = replace(self.fisher, keep=keep).plan(self.context, self.weighed)
        except TargetError:
            raise _out_of_reach(wanted, self.dense_fp32_ms / self.cost.fixed) from None
        small = subject_of(shrink(self.bundle.subject.model, anatomy, plan))
        speed = self._timed(small)
        if speed < wanted / 1.1 and not small.anatomy.units:
            raise _out_of_reach(wanted, speed)
        return speed

    def with_blocks(self, left: float) -> float:
        """The same of the uncut model with a share of each matrix's blocks, the largest ones."""

        def timed() -> float:
            small = subject_of(copy.deepcopy(self.bundle.subject.model))
            rows, columns = map(int, _BLOCKS.split("x"))
            for matrix in small.anatomy.matrices.values():
                if not matrix.table:
                    weight = small.model.get_submodule(matrix.module).weight
                    assert isinstance(weight, torch.Tensor)
                    blocks = weight.data.view(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)
                    size = blocks.square().sum(dim=(1, 3), keepdim=True)
                    blocks *= size >= size.flatten().quantile(1 - left)
            return self._timed(small)

        return remembered(self.state.root / f"blocks-{left:g}.json", timed, float)

    def _timed(self, small: Subject) -> float:
        """How many times as fast as dense fp32 the quickest int8 file of a model is, batch 32."""
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
            features, _ = subset(material, Split.VALIDATION, 640)
            workload = workloads(features, limit=20)[1]
            timings = compare(sessions, workload, Rounds(40, seconds=PROBE_SECONDS), run.quiet.load())
        return ratio(timings["dense"], timings["ours"]).median


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


def _out_of_reach(wanted: float, best: float) -> TargetError:
    return TargetError(
        f"{wanted:g} times as fast is out of reach: with every layer cut, {best:.1f} would be.",
        help=f"ask for less, at most about {max(1.0, 0.7 * best):.1f}.",
    )
