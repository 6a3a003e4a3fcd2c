"""`compress` searches the fastest model within an allowed loss, and delivers the best one that it finds.

The model is tuned first if it has no head for the task. `fisher` then cuts it to the speed on this machine; the student is distilled,
quantized to int8 and tried on validation examples. If only int8 loses too much, the matrices that cost most may stay in float
(`rescue.py`); otherwise a gentler budget is tried, as far back towards the uncut model as the loss says. If no candidate meets both
limits, the best one is delivered, and a message says so. `slimformer run` repeats the recipe that is delivered with it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimformer.exporters.base import SEARCH_SECONDS
from slimformer.files import remembered, remove_folder
from slimformer.log import Log
from slimformer.measuring.records import Goal, Standing
from slimformer.measuring.scoring import Measurement
from slimformer.reporting.words import lost_text
from slimformer.running.bundle import Bundle, Made, Run
from slimformer.running.candidate import Candidate, candidate_of, cut_candidate, repeating, teacher_candidate
from slimformer.running.delivery import Order, finish
from slimformer.running.facts import facts_of
from slimformer.running.given import given_model, given_task, told_model
from slimformer.running.lessons import distillation, fewest_blocks
from slimformer.running.outline import Outline, final_seconds, full_diet
from slimformer.running.preflight import Checked
from slimformer.running.recipe import RIVALS, Recipe, RivalName
from slimformer.running.rescue import rescue
from slimformer.running.result import Result
from slimformer.running.rivals import Contestant, drops_layers, equal_layers, rivals_of, small_dense, without_small_dense
from slimformer.running.runner import Conditions, finished_result, model_name, open_run, wish_of
from slimformer.running.scale import Scale
from slimformer.running.schedule import (
    FEWEST_STEPS,
    Part,
    Schedule,
    forecast,
    passes_within,
    rounded_passes,
)
from slimformer.running.stages import Clock, training_of
from slimformer.running.start import checked_wish, opened
from slimformer.running.trials import Trial, judge_of
from slimformer.running.wanted import CHANGEABLE, TRIES, WAIT_SHARE, EngineChoice, VocabularyChoice, Wanted
from slimformer.tasks.base import Task, refuse_pretraining
from slimformer.training.estimate import estimate
from slimformer.training.processes import shared
from slimformer.training.stage import Calibrate, Train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLOSE = 0.99  # a speed counts as reached from this share on: two timings of one file differ by more
WORTHWHILE = 1.05  # times as fast as the uncut model is what a cut has to be
CLEARLY = 1.05  # times as fast as the cut model is what the smaller dense one must be: two timings of one file differ by less
REDUCED = 0.3  # of a planned distillation is worth another budget that the smaller dense rival makes way for


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
    with given_model(model, tokenizer, Path(out)) as given, told_model(given, settled, Path(out)) as name:
        return _compress_named(name, settled, Path(out), wanted, conditions, command, began)


def _compress_named(
    model: str, task: Task, out: Path, wanted: Wanted, conditions: Conditions, command: str, began: float
) -> Result:
    """`compress` for a model that has a path or a name on the hub."""
    options = {name: value for name, value in asdict(wanted).items() if name in CHANGEABLE}
    result = finished_result(out, wanted.purpose(Recipe(model, task, ())), options, task, conditions.log)
    if result is not None:
        return result
    checked = checked_wish(model, task, wanted)
    wish = partial(wish_of, task, options)
    with open_run(out, wanted.purpose(checked.recipe), wanted.seed, conditions, wish=wish) as run:
        with Schedule(run.root, wanted.minutes, run.log, began) as schedule:
            measurement = _compress(checked, wanted, command, schedule, run, out)
            schedule.compare()
        remove_folder(run.root)
    return Result(out, measurement.records)


def _compress(checked: Checked, wanted: Wanted, command: str, schedule: Schedule, run: Run, out: Path) -> Measurement:
    """Plans, tunes if need be, searches, trains the rivals, measures and delivers."""
    bundle, outline, recipe = opened(checked, wanted, (wanted.speedup,), schedule, run)
    with Clock(run.root) as clock:  # of the search and all budgets tried: what the user waits for, without the rivals
        search = _Search(bundle, recipe, wanted, outline, schedule, run)
        chosen = search.run().after(clock.minutes)
    chosen, rivals = search.contest(search.written(chosen))
    recipe, task = search.recipe_of(chosen), checked.recipe.task
    order = Order(recipe, model_name(recipe.model), task.title(), Goal(wanted.speedup, wanted.max_loss), command)
    with schedule.part(Part.MEASURING):
        return finish(chosen, rivals, order, search.judge, run, out)


# -- The search ----------------------------------------------------------------------------------------------------------------


class _Search:
    """Proposes budgets until one meets the loss, and picks the best candidate of all it has seen."""

    def __init__(self, bundle: Bundle, recipe: Recipe, wanted: Wanted, outline: Outline, schedule: Schedule, run: Run) -> None:
        self.bundle, self.recipe, self.wanted, self.state = bundle, recipe, wanted, run
        self.outline, self.schedule, self.diet = outline, schedule, outline.diet
        with schedule.part(Part.UNCUT):
            self.judge = judge_of(bundle, run)
            self.exporter = recipe.export.exporter()
            self.whole = teacher_candidate(
                Made(bundle), self.judge, run, self.exporter, seconds=min(5.0, self.diet.trial_seconds)
            )
        self.rival = self.diet.rival
        self.uncut = wanted.speedup <= self.whole.trials[0].speed_32

    @cached_property
    def scale(self) -> Scale:
        """The scale that gives budgets; it measures this machine when it is first used."""
        return Scale(self.bundle, self.judge, self.diet, self.exporter, self.state)

    def run(self) -> Candidate:
        """The best candidate."""
        wanted, log = self.wanted, self.state.log
        candidates = self._without_cut() if self.uncut else self._with_cuts()
        chosen = pick([*candidates, self.whole], wanted.max_loss)
        best = chosen.best_int8(wanted.max_loss)
        if not chosen.stages and not self.uncut:
            close = any(item.best_int8(wanted.max_loss).loss <= wanted.max_loss for item in candidates)
            why = (
                "no cut that stays within the loss is faster than" if close else "no cut stays within the loss that is allowed:"
            )
            log.say(f"{why} the uncut model in its best file, which is delivered.{'' if close else self._hint(candidates[-1])}")
        if best.loss > wanted.max_loss or best.speed_32 < wanted.speedup * CLOSE:
            log.say(
                f"not all that was asked for was found; this is the best: {best.speed_32:.2f} times as fast (asked: "
                f"{wanted.speedup:g}), {abs(best.loss):.2f} points {lost_text(best.loss)} on validation examples (allowed: "
                f"{wanted.max_loss:g})."
            )
        return chosen

    def _hint(self, last: Candidate) -> str:
        """What to ask for after no cut stayed within the loss."""
        wanted, slow = self.wanted, self.whole.trials[0].speed_32
        trial, least = last.best_int8(wanted.max_loss), self.whole.best_int8(wanted.max_loss).loss
        aim = gentler(trial.speed_32, slow, trial.loss, least, wanted.max_loss)
        longer = ", or give it more --minutes" if wanted.minutes is not None else ""
        return (
            f" A gentler cut may stay within it: ask for about --speedup {aim:.2g}{longer}." if aim / slow >= WORTHWHILE else ""
        )

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
        for number in range(1, wanted.tries + 1):
            with self.schedule.part(Part.CUTTING):
                keep, blocks = self._budget(aim)
            candidate = self._cut_to(keep, blocks)
            candidates.append(candidate)
            best = candidate.best_int8(wanted.max_loss)
            log.say(f"{candidate.told(best)}.")
            if best.loss <= wanted.max_loss:
                break
            aim = gentler(aim, slow, best.loss, self.whole.best_int8(wanted.max_loss).loss, wanted.max_loss)
            if self._has_time(Part.TRYING, Part.RIVAL, more=SEARCH_SECONDS):
                with self.schedule.part(Part.TRYING):
                    rescued = rescue(candidate, self.judge, self.state, wanted.max_loss, exporter=self.exporter)
                if rescued is not None:
                    candidates.append(rescued)
                    if rescued.best_int8(wanted.max_loss).speed_32 >= aim:
                        break  # a gentler cut would not be faster
            if aim / slow < WORTHWHILE or number == wanted.tries or not self._another(aim):
                break
        return candidates

    def _another(self, aim: float) -> bool:
        """Whether another budget is tried; if only the time of the smaller dense rival allows it, there will be no rival."""
        lost = f"more than {self.wanted.max_loss:g} points are lost"
        shorter = REDUCED * self.schedule.announced[Part.DISTILLING]

        def room() -> list[bool]:
            """Whether there is time for it with a rival, and without."""
            beside = self._has_time(Part.CUTTING, Part.DISTILLING, Part.TRYING, Part.RIVAL)
            return [beside, beside or self._has_time(Part.CUTTING, Part.TRYING, more=shorter)]

        beside, alone = remembered(self.state.root / f"another-{aim:.4f}.json", room, list[bool])
        if not alone:
            self.state.log.say(f"{lost}, and the time that is left allows no other budget.")
            return False
        self.rival = self.rival and beside
        instead = ", in the time of the smaller dense rival" if self.diet.rival and not self.rival else ""
        self.state.log.say(f"{lost}: trying a model {aim:.2f} times as fast{instead}.")
        return True

    def _has_time(self, *parts: Part, more: float = 0.0) -> bool:
        """Whether the time that is left allows these parts and `more` seconds, beside a short final measurement."""
        return self.schedule.left >= sum(self.schedule.announced[part] for part in parts) + self._rest[Part.MEASURING] + more

    @property
    def _rest(self) -> dict[Part, float]:
        """Seconds of each part without any training, with the shortest final measurement."""
        return forecast(self.outline.sizes, self.outline.pace, self.diet.untrained, self.wanted.speedup)

    def _budget(self, aim: float) -> tuple[float, float]:
        """What is left for a speed: the share of the dense latency after a cut, and the share of each matrix's blocks."""
        return self.scale.budget(aim, self.whole.trials[0].speed_32, fewer=fewest_blocks(self.wanted, self.bundle))

    def _cut_to(self, keep: float, blocks: float) -> Candidate:
        """Cuts to the budget, distils, exports and tries the files; all of it is kept for a resumed run."""
        name = f"keep-{keep:.4f}" if blocks == 1.0 else f"keep-{keep:.4f}-blocks-{blocks:g}"
        home, below = self.state.root / name, self.state.under(name)
        cuts = () if keep == 1.0 and blocks < 1.0 else (Calibrate(replace(self.scale.fisher, keep=round(keep, 4))),)
        lesson = partial(self._lesson, file=home / "passes.json", blocks=blocks)
        return cut_candidate(
            Made(self.bundle),
            (),
            cuts,
            lesson,
            home,
            self.judge,
            self.schedule,
            below,
            self.exporter,
            seconds=self.diet.trial_seconds,
        )

    def _lesson(self, small: Bundle, *, file: Path, blocks: float = 1.0) -> Train:
        """The distillation of a cut model: as announced, or as the budget allows by now, from a few real steps of this model."""
        distil = distillation(small, self.wanted, self.diet.passes, blocks)
        if self.wanted.minutes is None:
            return distil

        def passes() -> float:
            sizes, pace, slow = self.outline.sizes, self.outline.pace, self.schedule.slowness(Part.UNCUT, Part.CUTTING)
            cost = estimate(training_of(replace(distil, rows=None, augment=0), small, self.state), seconds=1.0)
            pace = replace(pace, read=cost.teacher_seconds / sizes.train_tokens)
            later = (Part.TRYING, Part.MEASURING, *([Part.RIVAL] if self.rival else []))
            needed = sum(slow * self._rest[part] for part in later)
            most = full_diet(small, self.wanted, sizes).passes
            fit = passes_within(sizes, pace, self.schedule.left - needed, most, (1 + self.rival) / cost.tokens_per_second)
            least = FEWEST_STEPS * self.wanted.batch_size / sizes.train_rows
            return rounded_passes(max(fit, least), 2)

        fit = remembered(file, passes, float)
        if abs(fit - self.diet.passes) > 0.1 * self.diet.passes:
            self.state.log.say(
                f"the time that is left allows {fit:.2g} epochs of distillation; {self.diet.passes:.2g} were planned."
            )
        return distillation(small, self.wanted, fit, blocks)

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
                if not deeper or tries >= self.diet.tries or not self._has_time(Part.RIVAL):
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
        best, bundles = chosen.best_int8(self.wanted.max_loss), (chosen.made.bundle, small.made.bundle)
        files: dict[str, Path] = {best.variant: chosen.files[best.variant], small.variant: small.path}
        reads = {name: bundle.material for name, bundle in zip(files, bundles, strict=True)}
        pair = f"{bundles[0].digest()}-{bundles[1].digest()}-{self.state.threads}.json"
        mine, its = remembered(
            self.state.root / "contest" / pair,
            lambda: self.judge.try_out(files, chosen.kinds, seconds=self.diet.trial_seconds, reads=reads),
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
        return self.wanted.rivals if self.rival else without_small_dense(self.wanted.rivals)

    def written(self, candidate: Candidate) -> Candidate:
        """The candidate with all files that ship: those of the uncut model are written only if they are asked for."""
        if candidate.folder is not None:
            return candidate
        with self.schedule.part(Part.TRYING):
            home, seconds = self.state.root / "whole", self.diet.trial_seconds
            return candidate_of(candidate.made, (), home, self.judge, self.state, self.exporter, seconds=seconds)

    def recipe_of(self, chosen: Candidate) -> Recipe:
        """The recipe that leads to the chosen candidate again."""
        levels = self.scale.levels if chosen.stages and not drops_layers(chosen.stages) else None
        seconds = final_seconds(self.outline, self.schedule, self.state, self.wanted.speedup)
        return repeating(self.recipe, chosen, self.rival_names, seconds, levels)


def gentler(speed: float, slow: float, lost: float, least: float, allowed: float) -> float:
    """The speed to try after a model `speed` times as fast lost too much; the uncut one of speed `slow` loses `least` points.

    Losses grow at least with the square of the way from `slow` to `speed`, on a logarithmic axis: on SQuAD cuts to 3.6, 4.4 and 5.5
    times the speed lost 0.1, 2.9 and 5.4 points, and 2.3 times is uncut. A quarter of the way is gone back at least, and at most
    three quarters of it.
    """
    way = math.sqrt(max(0.0, allowed - least) / (lost - least)) if lost > max(least, allowed) else 0.5
    return slow * (speed / slow) ** min(0.75, max(0.25, way))


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
