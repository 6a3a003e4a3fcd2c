"""`frontier` makes a family of models in one run: each is cut from the one before, trained on, and kept; what is needless is dropped.

The one idea: a model that was cut to twice the speed and trained is a better start for four times than the uncut one is (gradual pruning
under a measured budget: Kurtic, Frantar, Alistarh, ZipLM, NeurIPS 2023, section 3.3). So levels of rising speed cost little more than
the last of them alone, and leave a curve to pick from. All levels learn from the same outputs of the teacher, which are computed once. At
the end every model, the dense one and the rivals run in one race, and a model that another row makes needless is not delivered.

A model may be asked for by the size of its file, too. Speed and size are had by other means: of a small encoder half of the bytes are the
word table, which takes no time. So the slowest of the models whose file is small enough once the table is kept as codes gets that table;
if none is, the fastest is cut further, by what its heads and neurons weigh.

What a level needs is that of `compress` (budgets, lessons, trials, rivals, delivery); here are only the levels and who dominates whom.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimformer import registry
from slimformer.core.cost import parameters
from slimformer.errors import RecipeError, TargetError
from slimformer.exporters.base import Variant
from slimformer.files import remembered, remove_folder
from slimformer.log import Log
from slimformer.measuring.latency import Levels
from slimformer.measuring.records import Goal, Record, Standing
from slimformer.measuring.scoring import Measurement
from slimformer.reporting.family import FamilyPoint, HeldResult, ModelFamily, read_family, write_family
from slimformer.reporting.verdicts import dominator, megabytes
from slimformer.reporting.words import MEGABYTE, listed, size_text
from slimformer.running.bundle import Bundle, Made, Run
from slimformer.running.candidate import Candidate, candidate_of, cut_candidate, repeating
from slimformer.running.delivery import Order, best_file, deliver, fitted_tasks, side_by_side
from slimformer.running.given import given_model, given_task, told_model
from slimformer.running.lessons import blocks_left, distillation, fewest_blocks
from slimformer.running.outline import Outline, final_seconds, full_diet
from slimformer.running.reader import read_levels
from slimformer.running.recipe import RIVALS, Recipe, RivalName
from slimformer.running.rivals import Contestant, rivals_of, without_small_dense
from slimformer.running.runner import Conditions, is_done, model_name, open_run, wish_of
from slimformer.running.scale import AS_TOLD, Probe, Scale, Speeds, by_table, out_of_reach
from slimformer.running.schedule import FEWEST_STEPS, Part, Schedule, cut_step, forecast, rival_place, rounded_passes
from slimformer.running.stages import latency_of, training_of
from slimformer.running.start import checked_wish, opened
from slimformer.running.trials import Trial, judge_of
from slimformer.running.wanted import WAIT_SHARE, EngineChoice, VocabularyChoice, Wanted
from slimformer.tasks.base import Task, refuse_pretraining
from slimformer.training.estimate import estimate
from slimformer.training.processes import shared
from slimformer.training.stage import Calibrate, Stage, Train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPEEDUPS = (2.0, 3.0, 4.0, 6.0, 8.0)
AIMED = 0.98  # of the bytes that are asked for is aimed at: names, shapes and scales are not counted beforehand
POINTS = "points"  # the folder of the models, in that of the run
UNCUT = "uncut"
WITHIN = 0.5  # points: a faster int8 file may lose so much more than the best one of its model, which held examples hardly tell apart
NO_CUT = 0.995  # a budget of so much of the model before is none


@shared
def compress_family(
    model: str | Path | PreTrainedModel,
    task: Task | str | Mapping[str, Any],
    out: str | Path,
    *,
    tokenizer: Any = None,
    speedups: Sequence[float] = SPEEDUPS,
    megabytes: Sequence[float] = (),
    max_loss: float = 1.0,
    epochs: float | None = None,
    lr: float | None = None,
    batch_size: int = 32,
    seed: int = 17,
    rivals: RivalName | Sequence[RivalName] = RIVALS,
    minutes: float | None = None,
    vocabulary: VocabularyChoice = "whole",
    engine: EngineChoice = "onnx",
    latency: Levels | str | Path | None = None,
    log: Log | None = None,
    command: str = "",
    threads: int | None = None,
    wait_seconds: float = 60.0,
) -> ModelFamily:
    """Makes models of several speeds for `task` in one run, each from the one before, and leaves them in the folder `out`.

    Args:
        model: As in `compress`, like `task` and `tokenizer`.
        task: Where the examples come from and how they are scored.
        out: The folder for the result, with a folder below `points` for each model. The same call resumes a run that was stopped, and
            returns what a finished one left.
        tokenizer: The tokenizer of a model in memory.
        speedups: How many times as fast as the dense model in fp32 in ONNX Runtime, at batch 32: rising, above 1, at most 100.
        megabytes: How many megabytes (1,000,000 bytes) the best int8 file has at most, for models that are asked for by their size:
            falling. The word table of each is kept as codes (`codebook`), and heads and neurons go as far as that needs.
        max_loss: Points of the metric within which models are recommended; those that lose more are delivered too.
        epochs: Epochs of the distillation of each level; by default the size of the data decides.
        lr: The peak learning rate of the distillation; by default the width of the model decides.
        batch_size: Rows of a training step.
        seed: The seed of all random numbers.
        rivals: The baselines to measure; "small-dense" trains as long as the model of the middle speed, and is delivered with the others.
        minutes: A budget for everything. Each level gets as many passes as the others.
        vocabulary: As in `compress`: "trim" cuts the word table of all models to the pieces that the training texts need.
        engine: As in `compress`: with "kernels" whole blocks of weights go before heads and neurons, half of them at
            first and then four fifths, and the best file of a model may be one that only slimformer-kernels runs.
        latency: The latency table of another machine, or its file, as `slimformer bench --levels` writes it there. The speeds are then
            those of that machine, as the table predicts them; what is measured is measured here.
        log: As in `run`, like `command`, `threads` and `wait_seconds`.
        command: The command line that the pages show.
        threads: How many threads each timing uses; all cores by default.
        wait_seconds: How long it waits at most until nothing else runs on the machine.

    Returns:
        The models, and everything that was measured.

    Raises:
        RecipeError: An option is out of range, the speeds do not rise, the sizes do not fall, the latency table cannot be read or is
            given with "kernels", or `minutes` are too few; the message says how many would do, and for which speeds they suffice.
        ModelError: The model cannot be loaded, or does not suit the task, or its word table cannot be kept as codes.
        DataError: The data cannot be read, or do not suit the model.
        TargetError: All speeds are out of reach; the message names the highest possible.
        OutputError: `out` cannot be used, or belongs to another run.

    Example:
        >>> from slimformer.running.frontier import compress_family
        >>> family = compress_family("my-bert", task, "family", speedups=(2, 4), minutes=30)  # doctest: +SKIP
        >>> family.picks  # doctest: +SKIP
        {'fastest at batch 32': '4x', 'fastest at batch 1': '4x', 'smallest file': '4x'}
    """
    began = time.monotonic()
    aims, sizes = rising(speedups), falling(megabytes)
    chosen = (rivals,) if isinstance(rivals, str) else tuple(rivals)
    table = read_levels(latency) if isinstance(latency, (str, Path)) else latency
    wanted = Wanted(aims[0], max_loss, epochs, lr, batch_size, seed, 1, chosen, minutes, vocabulary, engine)
    if engine == "kernels" and table is not None:
        raise RecipeError(
            "a latency table does not tell what zeros take, by which models for the kernels become fast.",
            help="leave out --latency, or --engine kernels.",
        )
    if minutes is not None:
        wait_seconds = min(wait_seconds, WAIT_SHARE * 60 * minutes)
    settled = given_task(task)
    refuse_pretraining(settled, "frontier")
    place = Path(out)
    with given_model(model, tokenizer, place) as given, told_model(given, settled, place) as name:
        purpose = _purpose(name, settled, aims, sizes, wanted, table)
        if is_done(place, purpose, {}, settled, log):
            return read_family(place)
        checked = checked_wish(name, settled, wanted, [Calibrate(codebook())] if sizes else [])
        conditions, wish = Conditions(log, threads, wait_seconds), partial(wish_of, settled, {})
        with open_run(place, purpose, seed, conditions, table, wish) as run:
            with Schedule(run.root, minutes, run.log, began) as schedule:
                asked = _levels_of(aims, sizes)
                bundle, outline, recipe = opened(checked, wanted, [level.pace for level in asked], schedule, run, sizes)
                levels = _Levels(bundle, recipe, asked, wanted, outline, schedule, run)
                family = _finished(levels, model_name(name), command, place)
                schedule.compare()
            remove_folder(run.root)
    return family


def rising(speedups: Sequence[float]) -> tuple[float, ...]:
    """The speeds, checked.

    >>> rising([2, 4.5])
    (2.0, 4.5)
    """
    if isinstance(speedups, str) or not speedups:
        raise RecipeError("no speeds are named.", help="name some, in rising order: --speedups 2,3,4.")
    for speed in speedups:
        if not 1 < speed <= 100:
            raise RecipeError(f"a speed must be above 1 and at most 100, not {speed:g}.", help="correct --speedups.")
    for slow, fast in pairwise(speedups):
        if fast <= slow:
            raise RecipeError(
                f"the speeds must rise, and {fast:g} comes after {slow:g}.",
                help="each model is cut from the one before: --speedups 2,3,4.",
            )
    return tuple(map(float, speedups))


def falling(megabytes: Sequence[float]) -> tuple[float, ...]:
    """The sizes, checked; none may be asked for.

    >>> falling([8, 2.5])
    (8.0, 2.5)
    """
    if isinstance(megabytes, str):
        raise RecipeError("megabytes are numbers.", help="name them in falling order: --megabytes 8,5.")
    for size in megabytes:
        if not 0.001 <= size <= 1e6:
            raise RecipeError(f"a file must have from 0.001 to 1,000,000 megabytes, not {size:g}.", help="correct --megabytes.")
    for large, small in pairwise(megabytes):
        if small >= large:
            raise RecipeError(f"the sizes must fall, and {small:g} comes after {large:g}.", help="say --megabytes 8,5.")
    return tuple(map(float, megabytes))


def codebook() -> Any:
    """The method that keeps a word table as codes."""
    return registry.find("methods", "codebook")()


def _purpose(
    model: str, task: Task, aims: Sequence[float], sizes: Sequence[float], wanted: Wanted, table: Levels | None
) -> str:
    """The purpose of a folder."""
    usual = {"vocabulary": "whole", "engine": "onnx"}
    left_out = ("speedup", "tries", *(name for name, choice in usual.items() if getattr(wanted, name) == choice))
    options = {name: value for name, value in asdict(wanted).items() if name not in left_out}
    own: dict[str, Any] = {} if table is None else {"latency": table.to_data()}
    own |= {"megabytes": sizes} if sizes else {}
    asked = {"model": model, "task": repr(task), "speedups": aims, **options, **own}
    return f"frontier {json.dumps(asked, sort_keys=True, default=str)}"


# -- The levels ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Level:
    """A model that is asked for, by its speed or by the size of its file; a step of its training takes as long as at the speed `pace`."""

    name: str
    pace: float
    aim: float | None = None
    megabytes: float | None = None


def _levels_of(aims: Sequence[float], sizes: Sequence[float]) -> tuple[_Level, ...]:
    """What is asked for, in the order in which it is made."""
    return (
        *(_Level(f"{aim:g}x", aim, aim=aim) for aim in aims),
        *(_Level(f"{size:g}MB", aims[-1], megabytes=size) for size in sizes),
    )


@dataclass(frozen=True)
class _Point:
    """A model of the family before it is measured."""

    name: str
    candidate: Candidate
    aim: float | None
    megabytes: float | None = None
    probed: Speeds = AS_TOLD  # how much faster an untrained model was than the latency table has it
    predicted: Speeds | None = None


class _Levels:
    """Trains a model for each speed, each from the one before, then for each size, and a smaller dense one beside the middle speed."""

    def __init__(
        self,
        bundle: Bundle,
        recipe: Recipe,
        asked: tuple[_Level, ...],
        wanted: Wanted,
        outline: Outline,
        schedule: Schedule,
        run: Run,
    ) -> None:
        self.bundle, self.recipe, self.wanted, self.outline, self.schedule = bundle, recipe, wanted, outline, schedule
        self.diet, self.asked, self.notes = outline.diet, asked, list[str]()
        self.state, self.elsewhere = run, run.levels is not None  # the speeds are those of another machine, by its table
        if self.elsewhere:
            self._remark(
                "the speeds that are asked for and predicted are those of another machine; all others were measured here"
            )
        with schedule.part(Part.UNCUT):
            self.judge = judge_of(bundle, run)
            self.exporter = recipe.export.exporter()
        with schedule.part(Part.TRYING):
            self.whole = self._tried(Made(bundle), (), run.root / UNCUT, run)
        with schedule.part(Part.CUTTING):
            self.table = latency_of(bundle.subject, bundle.material, run, self.judge.teacher)
        self.state = replace(run, levels=self.table.levels)  # every level counts by the table of the uncut model

    def _tried(self, made: Made, stages: Sequence[Stage], home: Path, run: Run) -> Candidate:
        return candidate_of(made, stages, home, self.judge, run, self.exporter, seconds=self.diet.trial_seconds)

    @property
    def paces(self) -> tuple[float, ...]:
        """The speeds at which steps are planned, of all models that are made."""
        return tuple(level.pace for level in self.asked)

    def points(self) -> list[_Point]:
        """The uncut model, and one for each speed and each size that can be reached."""
        found = [_Point(UNCUT, self.whole, None)]
        aims = self._within_reach(tuple(level.aim for level in self.asked if level.aim is not None))
        self.asked = tuple(level for level in self.asked if level.aim is None or level.aim in aims)
        beyond: set[bool] = set()  # whether speeds, or sizes, are out of reach from here on
        for place, level in enumerate(self.asked):
            if (level.aim is None) in beyond:
                continue
            before = found[-1] if level.aim is not None else self._small_enough(level, found)
            fast = self.speed(before.candidate)
            if level.megabytes is not None:
                self._pace_sizes(found)
                level = self.asked[place]
            if level.aim is not None and place and fast >= level.aim:
                self._remark(f"there is no model for {level.aim:g} times: {found[-1].name} is {fast:.2f} times as fast already")
                continue
            smaller = next((point for point in found if self._is_as_small(point, level)), None)
            if smaller is not None:
                size = size_text(self.bytes(smaller.candidate))
                self._remark(f"there is no model for {level.name}: {smaller.name} has {size} already")
                continue
            if not self._has_time(level, place):
                rest = listed([other.name for other in self.asked[place:]])
                self._remark(f"there is no model for {rest}: the time that is left does not suffice")
                break
            try:
                found.append(self._level(place, before))
            except TargetError as error:
                self._remark(f"there is no model for {level.name}: {error.what.removesuffix('.')}")
                beyond.add(level.aim is None)
                continue
            made = found[-1].candidate
            self.state.log.say(f"{level.name}: {made.told(self.best(made))}.")
            if level.megabytes and self.bytes(made) > level.megabytes * MEGABYTE:
                self._remark(f"the file of {level.name} has {size_text(self.bytes(made))}")
        return [self._foretold(point) for point in found]

    def _foretold(self, point: _Point) -> _Point:
        """A model with the speeds that it was thought to have before it was trained.

        They are those of the latency table for files of its kind, times what an untrained model of its budget made of the table's word.
        None for the uncut model, which scales the table, and for a model of zeros, which it does not tell of.
        """
        candidate = point.candidate
        if (candidate is self.whole and not self.elsewhere) or blocks_left(candidate.stages) < 1:
            return point
        told = self._scaled(self._by_table(candidate), self.best(candidate).variant)
        return replace(point, predicted=told.times(point.probed))

    def _within_reach(self, aims: tuple[float, ...]) -> tuple[float, ...]:
        """The speeds that need a cut and can be reached by one."""
        alone, levels, plain = self.speed(self.whole), self.table.levels, self.best(self.whole).variant
        most = self._scaled(Speeds(levels.dense_fp32_ms / max(1e-9, levels.fixed_ms)), plain).large
        needless = [aim for aim in aims if aim <= alone]
        beyond = [aim for aim in aims if aim > max(alone, most)]
        if needless:
            names = listed([f"{aim:g}" for aim in needless])
            self._remark(
                f"there is no model for {names} times: int8 alone is {alone:.2f} times as fast, and nothing needs to be cut"
            )
        if beyond:
            if len(beyond) == len(self.asked):
                raise out_of_reach(beyond[0], most)
            names = listed([f"{aim:g}" for aim in beyond])
            self._remark(f"there is no model for {names} times: with every layer cut, {most:.1f} would be the speed")
        return tuple(aim for aim in aims if aim not in (*needless, *beyond))

    def _is_as_small(self, point: _Point, level: _Level) -> bool:
        return level.megabytes is not None and self.bytes(point.candidate) <= level.megabytes * MEGABYTE

    def _remark(self, why: str) -> None:
        self.notes.append(f"{why[0].upper()}{why[1:]}.")
        self.state.log.say(f"{why}.")

    def _has_time(self, level: _Level, place: int) -> bool:
        """Whether a level can be trained for the fewest steps and delivered; one that has begun goes on."""
        if self.wanted.minutes is None or self._noted(level).is_file():
            return True
        sizes, pace = self.outline.sizes, self.outline.pace
        one = forecast(sizes, pace, self.diet.untrained, level.pace)
        rows = FEWEST_STEPS * self.wanted.batch_size
        least = rows * sizes.row_tokens * cut_step(pace, level.pace)
        slow = self._slowness()
        return self.schedule.left >= slow * (one[Part.CUTTING] + one[Part.TRYING]) + least + self._measuring(place + 1)

    def _slowness(self) -> float:
        """How much longer than announced things take here, by the part that is over before the first level."""
        return max(1.0, self.schedule.slowness(Part.UNCUT))

    def _measuring(self, count: int) -> float:
        """Seconds of the final measurement of so many levels."""
        return forecast(self.outline.sizes, self.outline.pace, self.diet.untrained, *self.paces[:count])[Part.MEASURING]

    def _noted(self, level: _Level) -> Path:
        return self.state.root / level.name / "passes.json"

    def _level(self, place: int, point: _Point) -> _Point:
        """The next model: one that is there already, cut to a speed or to a size, trained on, exported and tried."""
        level, before, probed = self.asked[place], point.candidate, point.probed
        below = self.state.under(level.name)
        with self.schedule.part(Part.CUTTING):
            scale = Scale(before.made.bundle, self.judge, self.diet, self.exporter, below)
            if level.aim is not None:
                cuts, blocks, probed = self._faster(level.aim, before, scale)
            else:
                (cuts, probed), blocks = self._smaller(level, before, scale, probed), blocks_left(before.stages)
        lesson = partial(self._lesson, place=place, blocks=blocks)
        home, seconds = self.state.root / level.name, self.diet.trial_seconds
        made = cut_candidate(
            before.made, before.stages, cuts, lesson, home, self.judge, self.schedule, below, self.exporter, seconds=seconds
        )
        return _Point(level.name, made, level.aim, level.megabytes, probed)

    def _faster(self, aim: float, before: Candidate, scale: Scale) -> tuple[tuple[Stage, ...], float, Speeds]:
        """What cuts a model to a speed, the share of each matrix's blocks that is left, and what an untrained one made of the table.

        A repair would fill its zeros.
        """
        left, probed = blocks_left(before.stages), AS_TOLD
        if self.elsewhere:
            keep, blocks = self.table.dense_fp32_ms / aim / scale.cost.dense, left
        else:
            fewer = fewest_blocks(self.wanted, before.made.bundle)
            keep, blocks = scale.budget(aim, self.speed(before), left=left, fewer=fewer)
            if keep == 1.0 and blocks < left:
                return (), blocks, probed
            if not fewer:
                probed = self._corrected(scale.nearest(aim), scale)
        cut = replace(scale.fisher, keep=min(round(keep, 4), NO_CUT), repair=left == 1.0)
        return (Calibrate(cut),), blocks, probed

    def _corrected(self, probe: Probe, scale: Scale) -> Speeds:
        """How much faster an untrained model was than the latency table has it."""
        return probe.measured.over(self._scaled(probe.by_table, scale.variant))

    def _smaller(self, level: _Level, before: Candidate, scale: Scale, probed: Speeds) -> tuple[tuple[Stage, ...], Speeds]:
        """What cuts a model to a size: codes in the place of the word table, and before that heads and neurons if they must go. And how
        much faster an untrained one was than the latency table has it; `probed`: the same of the model before."""
        assert level.megabytes is not None
        codes, over = Calibrate(codebook()), self.in_codes(before) - AIMED * level.megabytes * MEGABYTE
        if over <= 0:
            return (codes,), probed
        subject, left = before.made.bundle.subject, blocks_left(before.stages)
        weights = parameters(subject.model, subject.anatomy)
        share = (
            left if self.file(before).variant == Variant.INT8_KERNELS else 1.0
        )  # in that, only blocks that are left take bytes
        inside = share * (weights.dense - weights.fixed)
        if over > inside:
            least = size_text(round(self.in_codes(before) - inside))
            raise TargetError(f"with every layer cut, the file would have {least}.", help="ask for more.")
        keep = math.floor(1e4 * (1 - over / (share * weights.dense))) / 1e4
        cut = replace(scale.fisher, cost="parameters", keep=min(keep, NO_CUT), repair=left == 1.0)
        if left == 1.0 and not self.elsewhere:
            probed = self._corrected(scale.of_weights(cut.keep), scale)
        return (Calibrate(cut), codes), probed

    def _small_enough(self, level: _Level, found: Sequence[_Point]) -> _Point:
        """The model that one of this size is made from: the slowest that is small enough with codes, or else the fastest."""
        assert level.megabytes is not None
        models = [point for point in found if point.megabytes is None]
        most = AIMED * level.megabytes * MEGABYTE
        return next((point for point in models if self.in_codes(point.candidate) <= most), models[-1])

    def _pace_sizes(self, found: Sequence[_Point]) -> None:
        """Plans the steps of the models for sizes at the speeds of those that they are made from, now that these are known."""
        self.asked = tuple(
            level
            if level.megabytes is None
            else replace(level, pace=self._small_enough(level, found).aim or self.speed(self.whole))
            for level in self.asked
        )

    def _lesson(self, small: Bundle, *, place: int, blocks: float) -> Train:
        """The distillation of a level: all of them see the same rows, so that the teacher's outputs serve them all.

        With a budget, as many passes over them as leave the same to each level that is still to come. Codes are rough, and what they
        name has to learn.
        """
        level = self.asked[place]
        if level.megabytes is None:
            distil = distillation(small, self.wanted, self.diet.passes, blocks)
        else:  # beside codes no other zeros are sought
            distil = distillation(small, self.wanted, self.diet.passes)
            held = (registry.find("methods", "keep_zeros")(),) if blocks < 1 else ()
            distil = replace(distil, freeze="nothing", methods=(*held, *distil.methods))
        if self.wanted.minutes is None:
            return distil
        epochs = remembered(self._noted(level), lambda: self._epochs(distil, small, place), float)
        if abs(epochs - distil.epochs) > 0.1 * distil.epochs:
            self.state.log.say(
                f"{level.name}: the time that is left allows {epochs:.2g} epochs; {distil.epochs:.2g} were planned."
            )
        return replace(distil, epochs=epochs)

    def _epochs(self, distil: Train, small: Bundle, place: int) -> float:
        """The epochs that the time allows each level that is left: the trainings before tell how long one takes, or a few real steps."""
        sizes, pace, left = self.outline.sizes, self.outline.pace, self.asked[place:]
        rows = (distil.rows or sizes.train_rows) * (1 + distil.augment)
        tokens = rows * sizes.row_tokens  # of an epoch
        later, one = (
            forecast(sizes, pace, self.diet.untrained, *(level.pace for level in levels)) for levels in (left, left[:1])
        )
        slow = self._slowness()
        busy = slow * (
            later[Part.CUTTING] - one[Part.CUTTING] + len(left) * one[Part.TRYING] + self._measuring(len(self.asked))
        )
        busy += tokens * pace.read if place == 0 else 0.0
        seconds = self._token_seconds(tokens, place)
        if (
            seconds is None or left[0].megabytes is not None
        ):  # beside codes all weights are trained, which takes longer than before
            training = training_of(replace(distil, rows=None, augment=0), small, self.state)
            seconds = max(seconds or 0.0, 1 / estimate(training, seconds=1.0).tokens_per_second)
        first = cut_step(pace, left[0].pace) / seconds
        relative = {level: cut_step(pace, level.pace) / first for level in self.asked}
        steps = sum(relative[level] for level in left)  # seconds a token, of all levels that are left
        if self.diet.rival:
            faster = [level for level in self.asked if level.aim is not None]
            # The smaller dense model repeats their training, and is about as fast as the last of them from the beginning.
            copied = faster[: rival_place(self.paces[: len(faster)]) + 1]
            step = relative[copied[-1]] if copied else 0.0
            busy += one[Part.RIVAL] + tokens * step * sum(self._trained(level) for level in copied if level not in left)
            steps += step * sum(level in left for level in copied)
        fit = (self.schedule.left - busy) / (tokens * steps)
        least = FEWEST_STEPS * self.wanted.batch_size / rows
        most = distil.epochs * full_diet(small, self.wanted, sizes).passes / self.diet.passes
        return rounded_passes(min(most, max(least, fit)), 2)

    def _trained(self, level: _Level) -> float:
        """Epochs that a level was trained; 0 if it was not."""
        file = self._noted(level)
        return remembered(file, lambda: 0.0, float) if file.is_file() else 0.0

    def _token_seconds(self, tokens: float, place: int) -> float | None:
        """Seconds that a token of this level's training takes, as in the trainings before; None if there are none.

        A few steps of its own may meet a busy moment, and are faster than many. The trainings before had `tokens` in an epoch, and the
        first of them waited for the teacher.
        """
        pace = self.outline.pace
        seen = sum(tokens * self._trained(level) * cut_step(pace, level.pace) for level in self.asked[:place])
        lasted = self.schedule.taken(Part.DISTILLING) - tokens * pace.read
        return lasted / seen * cut_step(pace, self.asked[place].pace) if seen and lasted > 0 else None

    # -- What a model of the family is good for --

    def allowed(self, candidate: Candidate) -> float:
        """Points within which the fastest file of a model is its best: those of the wish, or a little more than its int8 files lose."""
        least = min(trial.loss for trial in candidate.trials if candidate.kinds[trial.variant].int8)
        return max(self.wanted.max_loss, least + WITHIN)

    def best(self, candidate: Candidate) -> Trial:
        """The trial of a model's best file."""
        return candidate.best(self.allowed(candidate))

    def file(self, candidate: Candidate) -> Trial:
        """The trial of a model's best int8 file, whose size counts."""
        return candidate.best_int8(self.allowed(candidate))

    def bytes(self, candidate: Candidate) -> int:
        """Bytes of that file."""
        return self.file(candidate).size_bytes

    def in_codes(self, candidate: Candidate) -> int:
        """About the same if its word table were codes; in an int8 file, a code takes a byte, and so does a number."""
        anatomy = candidate.made.bundle.subject.anatomy
        plan = codebook().foresee(anatomy, None)
        coded = anatomy.after(plan).matrices
        return self.bytes(candidate) - sum(anatomy.matrices[name].parameters - coded[name].parameters for name in plan.forms)

    def speed(self, candidate: Candidate) -> float:
        """Times as fast as dense fp32 that a model is: on held examples, or on the machine of the table."""
        return self._by_table(candidate).large if self.elsewhere else self.best(candidate).speed_32

    def _by_table(self, candidate: Candidate) -> Speeds:
        return by_table(candidate.made.bundle.subject.anatomy, self.table.levels)

    def _scaled(self, speeds: Speeds, variant: str) -> Speeds:
        """Speeds of the table, which was timed with plain int8 files, for files of another kind: by those of the uncut model."""
        alone = next((trial for trial in self.whole.trials if trial.variant == variant), None)
        if self.elsewhere or alone is None:
            return speeds
        return speeds.times(Speeds(alone.speed_32, alone.speed_1).over(self._by_table(self.whole)))

    # -- The rivals --

    def rivals(self, points: Sequence[_Point]) -> tuple[list[Contestant], _Point | None]:
        """The baseline and the rivals; and the smaller dense model with all of its files, if one was trained."""
        cut = [point for point in points if point.aim is not None]
        with self.schedule.part(Part.RIVAL):
            names = self.wanted.rivals if self._may_train_rival(cut) else without_small_dense(self.wanted.rivals)
            middle = cut[rival_place([0.0] * len(cut))].candidate if cut else self.whole
            found = rivals_of(middle.made, middle.stages, names, self.judge, self.state)
            small = next((rival for rival in found if rival.made is not None), None)
            if small is None or small.made is None:
                return found, None
            candidate = self._tried(small.made, small.stages, self.state.root / "dense", self.state)
        name = small.name.removesuffix(" int8").replace(" dense", "").replace(" + ", "+").replace(" ", "-")  # "3-layers"
        dense = self._foretold(_Point(name, candidate, None))
        return [rival for rival in found if rival is not small], dense

    def _may_train_rival(self, cut: Sequence[_Point]) -> bool:
        """Whether a smaller dense model can be trained in the time that is left."""
        if not cut or not self.diet.rival:
            return False
        file = self.state.root / "rival.json"
        needed = self._rival_seconds(cut) + self._measuring(len(self.asked))
        fits = remembered(file, lambda: self.schedule.left >= needed, bool)
        if not fits:
            self.state.log.say("no smaller dense rival is trained: the time that is left does not suffice.")
        return fits

    def _rival_seconds(self, cut: Sequence[_Point]) -> float:
        sizes, pace = self.outline.sizes, self.outline.pace
        middle = cut[rival_place([0.0] * len(cut))]
        trained = [stage for stage in middle.candidate.stages if isinstance(stage, Train)]
        passes = sum(stage.epochs * (stage.rows or sizes.train_rows) * (1 + stage.augment) for stage in trained)
        aim = middle.aim or 1.0
        return passes * sizes.row_tokens * cut_step(pace, aim) + forecast(sizes, pace, self.diet.untrained, aim)[Part.RIVAL]


# -- The race, and who is needless -----------------------------------------------------------------------------------------------


def _finished(levels: _Levels, name: str, command: str, out: Path) -> ModelFamily:
    """Trains all levels, measures everything in one race, and delivers the models that nothing makes needless."""
    points, run = levels.points(), levels.state
    rivals, dense = levels.rivals(points)
    points += [dense] if dense else []
    places = {point.name: out / POINTS / point.name for point in points}
    with levels.schedule.part(Part.MEASURING):
        seconds = final_seconds(levels.outline, levels.schedule, run, *(levels.paces or (levels.wanted.speedup,)))
        orders = {point.name: _order(point, levels, name, command, seconds) for point in points}
        files = {
            point.name: best_file(point.candidate, orders[point.name], run, places[point.name], point.name) for point in points
        }
        if dense:
            files[dense.name] = replace(files[dense.name], standing=Standing.SMALL_DENSE)
        first = orders[points[0].name]
        race = [(rival, points[0].candidate) for rival in rivals]
        race += [(files[point.name], point.candidate) for point in points]
        _, measurement = side_by_side(race, first, run, each_other=True)
        family = _judged(points, files, measurement, levels, command, out)
        remove_folder(out / POINTS)  # of a run that was killed here
        for point, found in zip(points, family.points, strict=True):
            if found.folder:
                own = _alone(found, family, measurement, dense)
                tasks = fitted_tasks(point.candidate, run.threads)
                deliver(point.candidate, orders[point.name], own, tasks, run, places[point.name])
        write_family(family)
    for line in family.dropped()[: -len(family.notes) or None]:
        run.log.say(line)
    return family


def _order(point: _Point, levels: _Levels, name: str, command: str, seconds: float) -> Order:
    """What the delivery of a model tells of how it was made."""
    wanted = levels.wanted
    rivals = wanted.rivals if levels.diet.rival else without_small_dense(wanted.rivals)
    table = levels.table.levels if point.aim is not None or point.megabytes is not None else None
    recipe = repeating(levels.recipe, point.candidate, rivals, seconds, table)
    goal = None if point.aim is None or levels.elsewhere else Goal(point.aim, wanted.max_loss)
    return Order(recipe, name, recipe.task.title(), goal, command, levels.allowed(point.candidate))


def _judged(
    points: Sequence[_Point],
    files: Mapping[str, Contestant],
    measurement: Measurement,
    levels: _Levels,
    command: str,
    out: Path,
) -> ModelFamily:
    """The family: which of the models are delivered, and what makes the others needless."""
    rows = {record.name: record for record in measurement.records}

    def judged(point: _Point) -> FamilyPoint:
        row = rows[files[point.name].name]
        others = [other for other in measurement.records if point.megabytes is None or megabytes(other) <= megabytes(row)]
        best, better = levels.best(point.candidate), dominator(row, others)
        large, single = row.times_faster(32), row.times_faster(1)
        return FamilyPoint(
            name=point.name,
            row=row.name,
            aim=point.aim,
            megabytes=point.megabytes,
            folder="" if better else f"{POINTS}/{point.name}",
            held=HeldResult(best.loss, best.speed_32, best.speed_1),
            size_bytes=best.size_bytes,
            measured=large.median if large else None,
            measured_1=single.median if single else None,
            predicted=point.predicted.large if point.predicted else None,
            predicted_1=point.predicted.single if point.predicted else None,
            beaten_by=better.name if better else "",
            elsewhere=levels.elsewhere,
        )

    made, notes = tuple(map(judged, points)), tuple(levels.notes)
    return ModelFamily(out, made, notes, levels.wanted.max_loss, measurement.records, command, levels.table.levels)


def _alone(point: FamilyPoint, family: ModelFamily, measurement: Measurement, dense: _Point | None) -> Measurement:
    """The rows for the folder of one model: its own, the rivals', and that of the smaller dense one.

    In the folder of the smaller dense model, that one is ours, and the one of the middle speed stands beside it as the cut one.
    """
    others = {other.row: other for other in family.points if other.name != point.name}
    is_dense = dense is not None and point.name == dense.name
    cut = [other for other in family.points if other.aim is not None]
    middle = cut[rival_place([0.0] * len(cut))].row if cut else ""

    def seen(record: Record) -> Record | None:
        if record.name == point.row:
            return replace(record, role=Standing.OURS)
        if record.name not in others:
            return record
        if is_dense and record.name == middle:
            return replace(record, role=Standing.CUT, chosen=False, target=None)
        return replace(record, chosen=False) if record.role == Standing.SMALL_DENSE else None

    records = tuple(found for record in measurement.records if (found := seen(record)) is not None)
    names = {record.name for record in records}
    kept = tuple(
        replace(record, versus={name: lost for name, lost in record.versus.items() if name in names}) for record in records
    )
    return Measurement(kept, measurement.scored)
