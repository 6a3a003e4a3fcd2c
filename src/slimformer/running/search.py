"""`compress` searches the fastest model within an allowed loss, and delivers the best one that it finds.

The model is tuned first if it has no head for the task. `fisher` then cuts it to the speed on this machine; the student is distilled,
quantized to int8 and tried on validation examples. If only int8 loses too much, the matrices that cost most may stay in float
(`rescue.py`); otherwise a gentler budget is tried, by bisection on the speed. If no candidate meets both limits, the best one is
delivered, and a message says so. `slimformer run` repeats the recipe that is delivered with it.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from slimformer import registry
from slimformer.core.shrink import shrink
from slimformer.data.material import sampled_lengths, subset
from slimformer.errors import RecipeError, TargetError
from slimformer.exporters.base import Variant
from slimformer.families.base import family_of, subject_of
from slimformer.files import remembered, remove_folder
from slimformer.log import Log
from slimformer.measuring.records import Goal
from slimformer.measuring.sessions import open_session
from slimformer.measuring.timing import Rounds, compare, ratio, workloads
from slimformer.rules import Count, Points, Positive, Seed, mistakes_in, real_number
from slimformer.running.bundle import Bundle, Made, Run
from slimformer.running.candidate import Candidate, candidate_of, teacher_candidate
from slimformer.running.delivery import Order, finish
from slimformer.running.exports import export_files
from slimformer.running.preflight import check_kept, preflight
from slimformer.running.prepare import prepare_bundle
from slimformer.running.recipe import RIVALS, Bench, Recipe, RivalName, Rivals
from slimformer.running.rescue import rescue
from slimformer.running.runner import Conditions, Outcome, model_name, open_run
from slimformer.running.stages import Clock, advance, context_of, latency_of, training_of
from slimformer.running.trials import Judge, judge_of
from slimformer.saving import checkpoint
from slimformer.saving.hub import local_folder
from slimformer.tasks.base import Split, Task
from slimformer.training.estimate import Estimate, estimate
from slimformer.training.stage import Calibrate, Stage, Train
from slimformer.training.teacher import cached_bytes

MARGIN = 1.04  # the search aims this much above the requested speed, because a measured ratio spreads by a few per cent
CLOSE = 0.99  # a speed counts as reached from this share on: two timings of one file differ by more
TRIES = 3  # at most so many budgets are trained
PROBES = 4  # so many untrained exports find the budget for a speed; each takes seconds
DISTIL_TOKENS = 3_000_000  # distillation sees so many, unless epochs are given: minutes on two cores for a small model
TUNE_TOKENS = 1_000_000
CACHED_BYTES = 8 << 30  # disk limit for a teacher's scores and hidden states; above it, attention scores are not distilled
MANY_EPOCHS = 6.0  # from here on, copies of the rows with other words teach more than the same rows again
MOST_COPIES = 4


Speedup = Annotated[float, real_number("above 1 and at most 100", lambda value: 1 < value <= 100, 1.0, 101.0)]


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

    def __post_init__(self) -> None:
        for name in ("speedup", "max_loss", "epochs", "lr"):  # 2 and 2.0 are the same, also in the purpose of a folder
            if isinstance(getattr(self, name), int):
                object.__setattr__(self, name, float(getattr(self, name)))
        wrong = mistakes_in(self)
        if wrong:
            raise RecipeError("these options cannot be used.", facts=wrong, help="see `slimformer compress --help`.")

    def purpose(self, recipe: Recipe) -> str:
        """The purpose of a folder. Speed, loss and tries may change when a run resumes: earlier results stay valid."""
        fixed = {name: value for name, value in asdict(self).items() if name not in {"speedup", "max_loss", "tries"}}
        options = {"model": recipe.model, "task": repr(recipe.task), **fixed}
        return f"compress {json.dumps(options, sort_keys=True, default=str)}"


def compress(
    model: str | Path,
    task: Task,
    out: str | Path,
    *,
    speedup: float = 3.0,
    max_loss: float = 1.0,
    epochs: float | None = None,
    lr: float | None = None,
    batch_size: int = 32,
    seed: int = 17,
    tries: int = TRIES,
    rivals: Sequence[RivalName] = RIVALS,
    log: Log | None = None,
    command: str = "",
    threads: int | None = None,
    wait_seconds: float = 60.0,
) -> Outcome:
    """Makes `model` smaller and faster for `task`, leaves everything in the folder `out`, and resumes if it was cut off.

    Args:
        model: A folder with config.json, tokenizer and model.safetensors, or an id on the hub. A model without a head for this kind
            of task is tuned first.
        task: Where the examples come from and how they are scored, such as `Classification(data="./reviews")`.
        out: The folder for the result. It must not hold other files, nor a finished run.
        speedup: How many times as fast as the dense model in fp32 in ONNX Runtime, at batch 32; above 1, at most 100.
        max_loss: Points of the task's metric that may be lost (0.01 of accuracy is one point). If no model meets both limits, the
            best one is delivered, and a message says so.
        epochs: Epochs of the distillation; by default the size of the data decides.
        lr: The peak learning rate of the distillation; by default the width of the model decides.
        batch_size: Rows of a training step.
        seed: The seed of all random numbers.
        tries: At most so many budgets are trained.
        rivals: The baselines to measure; "small-dense" trains as long as the result itself.
        log: As in `run`, like `command`, `threads` and `wait_seconds`.

    Returns:
        The folder, and everything that was measured.

    Raises:
        RecipeError: An option is out of range, or `out` holds a finished run.
        ModelError: The model cannot be loaded, or does not suit the task.
        DataError: The data cannot be read, or do not suit the model.
        TargetError: The speed is out of reach; the message names the highest possible.
        OutputError: `out` cannot be used.

    Example:
        >>> from slimformer import compress
        >>> from slimformer.tasks.classification import Classification
        >>> outcome = compress("my-bert", Classification(data="reviews"), "small", speedup=3, max_loss=1)  # doctest: +SKIP
        >>> outcome.out  # doctest: +SKIP
        PosixPath('small')
    """
    wanted = Wanted(speedup, max_loss, epochs, lr, batch_size, seed, tries, tuple(rivals))
    source = local_folder(model)
    tune = Train(lr=_tune_lr(source), epochs=1, batch_size=wanted.batch_size)
    tuned = checkpoint.is_tuned(source, task.auto_class)
    recipe = Recipe(str(model), task, () if tuned else (tune,), seed=wanted.seed, bench=Bench(rivals=wanted.rivals))
    checked = preflight(recipe)
    check_kept(source, (tune,))  # all searched stages train, whether the model came tuned or not
    conditions = Conditions(log, threads, wait_seconds)
    with open_run(Path(out), wanted.purpose(recipe), wanted.seed, conditions) as run:
        if not tuned:
            tune = replace(tune, epochs=_epochs(task, source, TUNE_TOKENS, 2.0, 5.0))
            checked = replace(checked, recipe=replace(recipe, stages=(tune,)))
        bundle, _ = prepare_bundle(checked, run)
        with Clock(run.root) as clock:  # of the search and all budgets tried: what the user waits for, without the rivals
            search = _Search(bundle, checked.recipe, wanted, run)
            chosen = search.run().after(clock.minutes)
        order = Order(
            search.recipe_of(chosen),
            model_name(recipe.model),
            task.title(),
            Goal(wanted.speedup, wanted.max_loss),
            command,
        )
        measurement = finish(search.written(chosen), order, search.judge, run, Path(out))
        remove_folder(run.root)
    return Outcome(Path(out), measurement)


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


def _epochs(task: Task, source: Path, tokens: int, least: float, most: float) -> float:
    """Epochs that see about this many tokens."""
    total = float(sampled_lengths(task, source).mean()) * len(task.split(Split.TRAIN))
    return float(min(most, max(least, round(tokens / total, 1))))


def _distillation(bundle: Bundle, recipe: Recipe, wanted: Wanted) -> Train:
    """The distillation that every budget gets. Small data is augmented, for as many steps; its copies have no labels of their own.

    With attention scores the student may learn five times as fast, and loses less (decision 0009). They grow with the square of a
    text's length; if they do not fit on disk, the student learns outputs and hidden states alone.
    """
    source = bundle.material.source
    epochs = wanted.epochs or _epochs(bundle.material.task, source, DISTIL_TOKENS, 3.0, 12.0)
    copies = min(MOST_COPIES, int(epochs // 3)) if epochs >= MANY_EPOCHS else 0
    distillation = registry.find("methods", "distillation")
    method, lr, weight = distillation(), 2 * _tune_lr(source), 0.0 if copies else 0.1
    lengths = bundle.material.features[Split.TRAIN].lengths()
    scored = distillation(temperature=1.0, hidden=6.0, scores=6.0, relative=False)
    if (1 + copies) * cached_bytes(bundle.teacher.anatomy, lengths, scored.effects().needs) <= CACHED_BYTES:
        method, lr, weight = scored, max(lr, _fast_lr(source)), 0.0
    return Train(
        methods=(method,),
        epochs=round(epochs / (1 + copies), 2),
        lr=wanted.lr or lr,
        batch_size=wanted.batch_size,
        task_weight=weight,
        dropout=False,
        freeze="embeddings",
        augment=copies,
    )


# -- The search ----------------------------------------------------------------------------------------------------------------


class _Search:
    """Proposes budgets until one meets the loss, and picks the best candidate of all it has seen."""

    def __init__(self, bundle: Bundle, recipe: Recipe, wanted: Wanted, run: Run) -> None:
        self.bundle, self.recipe, self.wanted, self.state = bundle, recipe, wanted, run
        self.distil = _distillation(bundle, recipe, wanted)
        _announce(bundle, self.distil, wanted, run)
        self.judge = judge_of(bundle, run)
        self.whole = teacher_candidate(Made(bundle), self.judge, run)
        self.uncut = wanted.speedup <= self.whole.trials[0].speed_32

    @cached_property
    def scale(self) -> _Scale:
        """The scale that gives budgets; it measures this machine when it is first used."""
        return _Scale(self.bundle, self.judge, self.state)

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
                f"{wanted.speedup:g}), {best.loss:+.2f} points lost on validation examples (allowed: {wanted.max_loss:g})."
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
        rescued = rescue(others, self.judge, self.state, allowed)
        return [others] if rescued is None else [others, rescued]

    def _with_cuts(self) -> list[Candidate]:
        """One candidate for each budget that is tried, from the speed asked for down to that of the uncut model."""
        wanted, log = self.wanted, self.state.log
        slow, aim = self.whole.trials[0].speed_32, wanted.speedup
        candidates: list[Candidate] = []
        for left in range(wanted.tries - 1, -1, -1):
            candidate = self._cut_to(self.scale.keep(aim))
            candidates.append(candidate)
            best = candidate.best_int8(wanted.max_loss)
            log.say(
                f"{best.speed_32:.2f} times as fast, {best.loss:+.2f} points lost on validation examples "
                f"({best.variant}, {best.size_bytes / 1e6:.1f} MB)."
            )
            if best.loss <= wanted.max_loss:
                break
            aim = math.sqrt(slow * aim)
            rescued = rescue(candidate, self.judge, self.state, wanted.max_loss)
            if rescued is not None:
                candidates.append(rescued)
                if rescued.best_int8(wanted.max_loss).speed_32 >= aim:
                    break  # a gentler cut would not be faster
            if aim / slow < 1.05:
                break
            if left:
                log.say(f"more than {wanted.max_loss:g} points are lost: trying a model {aim:.2f} times as fast.")
        return candidates

    def _cut_to(self, keep: float) -> Candidate:
        """Cuts to the budget, distils, exports and tries the files; all of it is kept for a resumed run."""
        fisher = registry.find("methods", "fisher")
        stages: tuple[Stage, ...] = (Calibrate(fisher(keep=round(keep, 4), cost="latency")), self.distil)
        name = f"keep-{keep:.4f}"
        made = advance(stages, self.bundle, self.state.under(name))
        return candidate_of(made, stages, self.state.root / name, self.judge, self.state)

    def written(self, candidate: Candidate) -> Candidate:
        """The candidate with all files that ship: those of the uncut model are written only if they are asked for."""
        if candidate.folder is not None:
            return candidate
        return candidate_of(candidate.made, (), self.state.root / "whole", self.judge, self.state)

    def recipe_of(self, chosen: Candidate) -> Recipe:
        """The recipe that leads to the chosen candidate again."""
        lead = self.recipe.stages if self.bundle.tuned_here else ()
        # without the levels, the same recipe would measure its own and cut a little otherwise
        levels = self.scale.levels if chosen.stages else None
        export = replace(self.recipe.export, floats=chosen.floats)
        return replace(self.recipe, stages=(*lead, *chosen.stages), latency=levels, export=export)


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

    def __init__(self, bundle: Bundle, judge: Judge, run: Run) -> None:
        self.bundle, self.judge, self.state = bundle, judge, run
        self.fisher = registry.find("methods", "fisher")()
        self.context = context_of(bundle, run, bundle.subject, "latency")
        table = latency_of(bundle.subject, bundle.material, run)
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
        for _ in range(PROBES):
            speed = self.speed(keep, speedup)
            probes.append((keep, speed))
            self.state.log.event("probe", keep=round(keep, 4), speedup=round(speed, 3), wanted=aim)
            if speedup * 1.01 <= speed <= speedup * 1.1:
                break
            keep = nearer(probes, aim)
        enough = [probe for probe in probes if probe[1] >= speedup]
        return max(enough)[0] if enough else min(probes, key=lambda probe: abs(probe[1] - aim))[0]

    def speed(self, keep: float, wanted: float) -> float:
        """How many times as fast as dense fp32 an untrained model of this budget is, as int8, batch 32."""
        anatomy, material, run = self.context.anatomy, self.bundle.material, self.state
        try:
            plan = replace(self.fisher, keep=keep).plan(self.context, self.weighed)
        except TargetError:
            raise _out_of_reach(wanted, self.dense_fp32_ms / self.cost.fixed) from None
        with tempfile.TemporaryDirectory(dir=run.root, prefix=".part-") as name:
            small = subject_of(shrink(self.bundle.subject.model, anatomy, plan))
            files = export_files(small, material, Path(name), [Variant.INT8_DYNAMIC], run.log)
            sessions = {
                "ours": open_session(files[Variant.INT8_DYNAMIC], run.threads),
                "dense": open_session(self.judge.teacher[Variant.FUSED], run.threads),
            }
            features, _ = subset(material, Split.VALIDATION, 640)
            workload = workloads(features, limit=20)[1]
            timings = compare(sessions, workload, Rounds(40, seconds=8.0), run.quiet.load())
        speed = ratio(timings["dense"], timings["ours"]).median
        if speed < wanted / 1.1 and all(site.sublayer is None for site in small.anatomy.sites.values()):
            raise _out_of_reach(wanted, speed)
        return speed


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


def _announce(bundle: Bundle, distil: Train, wanted: Wanted, run: Run) -> None:
    """Says what is about to happen, how long it will take and how much memory it needs, from a few real steps."""
    file = run.root / "estimate.json"
    if file.is_file():
        return
    cost = remembered(file, lambda: estimate(training_of(distil, bundle, run), seconds=5.0), Estimate)
    once, passes = cost.seconds / 60, round(distil.epochs * (1 + distil.augment), 1)
    rival = once if "small-dense" in wanted.rivals else 0.0
    run.log.say(
        f"plan: cut to {wanted.speedup:g} times the speed, distil for {passes:g} epochs ({cost.steps:,} steps at "
        f"{cost.tokens_per_second:,.0f} tokens a second uncut), int8, verify; up to {wanted.tries} budgets."
    )
    run.log.say(
        f"at most {_minutes(once)} for a budget{f', {_minutes(rival)} for the rival' if rival else ''}, less as the model "
        f"shrinks; about {cost.peak_rss_bytes / 2**30:.1f} GiB of memory."
    )


def _minutes(value: float) -> str:
    return f"{value:.0f} minutes" if value >= 1.5 else f"{value * 60:.0f} seconds"
