"""The short command: a tuned model, its data, a speed and a loss that is allowed; out comes the best model that was found.

Tune if need be; let `fisher` choose what fits the wanted speed on this machine; distil; int8; verify the exported file on
validation examples. If only int8 loses too much, the matrices that cost most may stay in float (`floats.py`); else a gentler
budget is tried (bisection on the speed); in the end the best is delivered with a clear word, never nothing. What was done is
written down as a recipe that `slimformer run` repeats.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimformer import registry
from slimformer.data.material import sampled_lengths, subset
from slimformer.errors import RecipeError, TargetError
from slimformer.exporters.base import SHIPPED, Variant
from slimformer.families.base import anatomy_of, family_of
from slimformer.log import Log
from slimformer.running.bundle import Bundle, Run
from slimformer.running.preflight import look, look_at_gains
from slimformer.running.recipe import RIVALS, Bench, Recipe, RivalName
from slimformer.running.runner import Given, Outcome, Ready, begin, finish, tidy, working
from slimformer.running.stages import Calibrate, Clock, Stage, Train, advance, context_of
from slimformer.running.trials import (
    Reference,
    Trial,
    choose_trial,
    export_files,
    read_trials,
    reference_of,
    save_trials,
    teacher_files,
    try_out,
)
from slimformer.saving import checkpoint
from slimformer.saving.files import write_text
from slimformer.saving.hub import local_folder
from slimformer.tasks.base import Split, Task

if TYPE_CHECKING:
    from slimformer.training.loop import Estimate

MARGIN = 1.04  # the search aims this much above the wanted speed: a measured ratio spreads by a few per cent
CLOSE = 0.99  # of the wanted speed counts as reached: two timings of one file differ by more
TRIES = 3  # budgets that are trained, at most
SHOTS = 4  # exports, untrained, that find the budget for a speed; seconds each
DISTIL_TOKENS = 3_000_000  # seen while distilling, unless epochs are given: minutes on two cores for a small model
TUNE_TOKENS = 1_000_000
KEPT_BYTES = 8 << 30  # of a teacher's scores and hidden states on disk: with more, attention scores are left out of the lesson
MANY_EPOCHS = 6.0  # from here on, copies of the rows with other words in them teach more than the rows once more
MOST_COPIES = 4


@dataclass(frozen=True)
class Wishes:
    """What is asked for. `epochs` and `lr` are those of the distillation; None lets the size of data and model decide."""

    speedup: float = 3.0  # over the dense model in fp32 in ONNX Runtime, batch 32
    max_loss: float = 1.0  # points of the task's metric
    epochs: float | None = None
    lr: float | None = None
    batch_size: int = 32
    seed: int = 17
    tries: int = TRIES
    rivals: tuple[RivalName, ...] = RIVALS

    def __post_init__(self) -> None:
        for name in ("speedup", "max_loss", "epochs", "lr"):  # 2 and 2.0 are the same wish, also in what a folder is for
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))
        wrong = [
            f"{name}: {getattr(self, name)}, must be {rule}"
            for name, rule, good in (
                ("speedup", "above 1 and at most 100", 1 < self.speedup <= 100),
                ("max_loss", "from 0 to 100", 0 <= self.max_loss <= 100),
                ("epochs", "above 0", self.epochs is None or 0 < self.epochs < math.inf),
                ("lr", "above 0", self.lr is None or 0 < self.lr < math.inf),
                ("batch_size", "at least 1", self.batch_size >= 1),
                ("tries", "at least 1", self.tries >= 1),
                ("seed", "0 or above", self.seed >= 0),
            )
            if not good
        ]
        if wrong:
            raise RecipeError("these options cannot be used.", facts=wrong, help="see `slimformer compress --help`.")


def compress(
    model: str | Path,
    task: Task,
    out: str | Path,
    wishes: Wishes | None = None,
    *,
    log: Log | None = None,
    command: str = "",
    threads: int | None = None,
    wait_seconds: float = 60.0,
) -> Outcome:
    """Makes `model` smaller and faster for `task` and leaves everything in the folder `out`; resumes where it was cut off.

    Raises a SlimformerError where the input is no good, and TargetError, naming the best possible, where the speed is out of reach.
    """
    wishes = wishes or Wishes()
    source = local_folder(model)
    tune = Train(lr=_tune_lr(source), epochs=1, batch_size=wishes.batch_size)
    tuned = checkpoint.is_tuned(source, task.auto_class)
    stages = () if tuned else (tune,)
    recipe = Recipe(str(model), task, stages, seed=wishes.seed, bench=Bench(rivals=wishes.rivals))
    look(recipe)
    look_at_gains(source, (tune,))  # what follows trains, tuned or not
    given = Given(log, threads, wait_seconds)
    with working(Path(out), f"compress {_purpose(recipe, wishes)}", wishes.seed, given) as state:
        if not tuned:
            recipe = replace(recipe, stages=(replace(tune, epochs=_epochs(task, source, TUNE_TOKENS, 2.0, 5.0)),))
        bundle, _ = begin(recipe, state)
        state.root.mkdir(exist_ok=True)
        return _search(bundle, recipe, wishes, state, Path(out), command)


def _purpose(recipe: Recipe, wishes: Wishes) -> str:
    """What a folder is for. Speed, loss and tries may change on the way: what was made for others of them stays good."""
    fixed = {name: value for name, value in asdict(wishes).items() if name not in {"speedup", "max_loss", "tries"}}
    return json.dumps({"model": recipe.model, "task": repr(recipe.task), **fixed}, sort_keys=True, default=str)


def _hidden_size(source: Path) -> int:
    config = checkpoint.read_config(source)
    return family_of(checkpoint.base_type(config)).width(config) or 768


def _tune_lr(source: Path) -> float:
    """4e-5 for a width of 768, more for narrower models: 8e-5 for 384."""
    return float(f"{4e-5 * 768 / _hidden_size(source):.2g}")


def _epochs(task: Task, source: Path, tokens: int, least: float, most: float) -> float:
    """Epochs that see about this many tokens."""
    total = float(sampled_lengths(task, source).mean()) * len(task.split(Split.TRAIN))
    return float(min(most, max(least, round(tokens / total, 1))))


# -- The search ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Attempt:
    """One budget, carried through: its stages, its model, and its files on validation examples."""

    keep: float
    stages: tuple[Stage, ...]
    bundle: Bundle
    trials: tuple[Trial, ...]
    files: Path | None = None  # all that ship, where they are written already
    floats: tuple[str, ...] = ()  # points whose matrices stay in float in its int8 files

    def best(self, max_loss: float) -> Trial:
        return choose_trial([trial for trial in self.trials if trial.variant != Variant.FLOAT], max_loss)


def _search(bundle: Bundle, recipe: Recipe, wishes: Wishes, state: Run, folder: Path, command: str) -> Outcome:
    from slimformer.measuring.records import Goal

    log = state.log
    clock = Clock(state.root)
    lead = recipe.stages if bundle.tuned_here else ()
    distil = _distil(bundle, recipe, wishes)
    _announce(bundle, distil, wishes, state)
    reference = reference_of(bundle, state)
    attempts: list[_Attempt] = []
    whole = _whole(bundle, state, reference)
    slow, aim = whole.trials[0].speed_32, wishes.speedup
    uncut = aim <= slow
    if uncut:
        log.say(f"int8 alone is {slow:.2f} times as fast; nothing needs to be cut for {wishes.speedup:g}.")
        attempts += _uncut(whole, wishes, state, reference)
    scale: _Scale | None = None
    tries = 0
    while tries < wishes.tries and not uncut:
        tries += 1
        scale = scale or _Scale(bundle, state)
        keep = scale.keep(aim)
        attempt = _try(bundle, keep, distil, state, reference)
        attempts.append(attempt)
        best = attempt.best(wishes.max_loss)
        log.say(
            f"{best.speed_32:.2f} times as fast, {best.loss:+.2f} points lost on validation examples "
            f"({best.variant}, {best.size_bytes / 1e6:.1f} MB)."
        )
        if best.loss <= wishes.max_loss:
            break
        aim = math.sqrt(slow * aim)
        rescued = _rescue(attempt, wishes, state, reference)
        if rescued is not None:
            attempts.append(rescued)
            if rescued.best(wishes.max_loss).speed_32 >= aim:
                break  # a gentler cut would not be faster
        if aim / slow < 1.05:
            break
        if tries < wishes.tries:
            log.say(f"that is more than {wishes.max_loss:g}: trying {aim:.2f} times as fast.")
    minutes = clock.stop()  # the search and all budgets tried: what the user waited for, without the rivals
    chosen = _pick([*attempts, whole], wishes)
    chosen = replace(chosen, bundle=replace(chosen.bundle, minutes=minutes))
    best = chosen.best(wishes.max_loss)
    if not chosen.stages and not uncut:
        log.say("no cut stays within the loss that is allowed: delivering the uncut model in its best file.")
    if best.loss > wishes.max_loss or best.speed_32 < wishes.speedup * CLOSE:
        log.say(
            f"not all that was asked for was found; this is the best: {best.speed_32:.2f} times as fast (asked: "
            f"{wishes.speedup:g}), {best.loss:+.2f} points lost on validation examples (allowed: {wishes.max_loss:g})."
        )
    target = Goal(wishes.speedup, wishes.max_loss)
    # without the levels, the same recipe would measure its own and cut a little otherwise
    levels = scale.levels if scale is not None and chosen.stages else None
    export = replace(recipe.export, floats=chosen.floats)
    final = replace(recipe, stages=(*lead, *chosen.stages), latency=levels, export=export)
    ready = Ready(chosen.files, chosen.trials) if chosen.files else None
    measurement = finish(chosen.bundle, chosen.stages, final, state, folder, target=target, command=command, ready=ready)
    tidy(state)
    return Outcome(folder, measurement)


def _distil(bundle: Bundle, recipe: Recipe, wishes: Wishes) -> Train:
    """The distillation that every budget gets. Small data is augmented, for as many steps; its copies have no labels of their own.

    With attention scores the student may learn five times as fast, and loses less (decision 0009); they grow with the square of a
    text's length, and where they do not fit on disk outputs and hidden states must do.
    """
    from slimformer.training.teacher import kept_bytes

    source = local_folder(recipe.model)
    epochs = wishes.epochs or _epochs(bundle.material.task, source, DISTIL_TOKENS, 3.0, 12.0)
    copies = min(MOST_COPIES, int(epochs // 3)) if epochs >= MANY_EPOCHS else 0
    distillation = registry.find("methods", "distillation")
    method, lr, weight = distillation(), 2 * _tune_lr(source), 0.0 if copies else 0.1
    lengths = bundle.material.features[Split.TRAIN].lengths()
    scored = distillation(temperature=1.0, hidden=6.0, scores=6.0, relative=False)
    if (1 + copies) * kept_bytes(anatomy_of(bundle.teacher), lengths, scored.effects().needs) <= KEPT_BYTES:
        method, lr, weight = scored, max(lr, _fast_lr(source)), 0.0
    return Train(
        methods=(method,),
        epochs=round(epochs / (1 + copies), 2),
        lr=wishes.lr or lr,
        batch_size=wishes.batch_size,
        task_weight=weight,
        dropout=False,
        freeze="embeddings",
        augment=copies,
    )


def _fast_lr(source: Path) -> float:
    """8e-4 up to a width of 384, where it was measured; less for wider models, by the square: 2e-4 for 768, which we chose."""
    return float(f"{8e-4 * min(1.0, 384 / _hidden_size(source)) ** 2:.2g}")


def _whole(bundle: Bundle, state: Run, reference: Reference) -> _Attempt:
    """The uncut teacher in int8: what a search may always fall back on."""
    file = state.root / "whole.json"
    if not file.is_file():
        path = teacher_files(bundle, state)[Variant.INT8_DYNAMIC]
        baseline = teacher_files(bundle, state)[Variant.FUSED]
        save_trials(file, try_out({Variant.INT8_DYNAMIC: path}, baseline, bundle, state, reference))
    return _Attempt(1.0, (), replace(bundle, model=bundle.teacher), tuple(read_trials(file)))


class _Scale:
    """Finds the budget for a speed: the table gives a guess, a few untrained exports correct it.

    The speed of a file does not depend on its weights, so nothing has to be trained to know it.
    """

    def __init__(self, bundle: Bundle, state: Run) -> None:
        from slimformer.measuring.latency import measured

        self.bundle, self.state = bundle, state
        self.fisher = registry.find("methods", "fisher")()
        self.context = context_of(bundle, state, bundle.model, "latency")
        found = measured(bundle.model, self.context.anatomy, bundle.material, state)
        self.cost, self.dense_fp32_ms, self.levels = found.cost, found.dense_fp32_ms, found.levels

    @cached_property
    def weighed(self) -> Any:
        """What each head, neuron and sublayer of the uncut model is worth."""
        self.state.log.say("measuring how much each head and neuron matters.")
        return self.fisher.weigh(self.context)

    def keep(self, speedup: float) -> float:
        """The share of the dense int8 latency that makes the exported int8 file `speedup` times as fast as dense fp32."""
        file = self.state.root / f"budget-{speedup:.4f}.json"
        if file.is_file():
            return float(json.loads(file.read_text(encoding="utf-8")))
        wanted = speedup * MARGIN
        keep = min(1.0, self.dense_fp32_ms / wanted / self.cost.dense)
        seen: list[tuple[float, float]] = []
        for _ in range(SHOTS):
            seen.append((keep, self.speed(keep, speedup)))
            self.state.log.event("shot", keep=round(keep, 4), speedup=round(seen[-1][1], 3), wanted=wanted)
            if speedup * 1.01 <= seen[-1][1] <= speedup * 1.1:
                break
            keep = nearer(seen, wanted)
        enough = [pair for pair in seen if pair[1] >= speedup]
        best = max(enough)[0] if enough else min(seen, key=lambda pair: abs(pair[1] - wanted))[0]
        write_text(file, json.dumps(best))
        return best

    def speed(self, keep: float, wanted: float) -> float:
        """How many times as fast as dense fp32 an untrained model of this budget is, as int8, batch 32."""
        from slimformer.core.shrink import shrink
        from slimformer.measuring.machine import quiet
        from slimformer.measuring.sessions import open_session
        from slimformer.measuring.timing import Rounds, compare, ratio, workloads

        anatomy = self.context.anatomy
        try:
            plan = replace(self.fisher, keep=keep).plan(self.context, self.weighed)
        except TargetError:
            raise _out_of_reach(wanted, self.dense_fp32_ms / self.cost.fixed) from None
        baseline = teacher_files(self.bundle, self.state)[Variant.FUSED]
        with tempfile.TemporaryDirectory(dir=self.state.root, prefix=".part-") as name:
            small = shrink(self.bundle.model, anatomy, plan)
            made = export_files(small, self.bundle.material, Path(name), [Variant.INT8_DYNAMIC], self.state.log)
            threads = self.state.threads
            sessions = {
                "ours": open_session(made[Variant.INT8_DYNAMIC].path, threads),
                "dense": open_session(baseline, threads),
            }
            features, _ = subset(self.bundle.material, Split.VALIDATION, 640)
            workload = workloads(features, limit=20)[1]
            timings = compare(sessions, workload, Rounds(40, seconds=8.0), quiet(self.state.wait_seconds))
        found = ratio(timings["dense"], timings["ours"]).median
        if found < wanted / 1.1 and all(site.sublayer is None for site in anatomy.after(plan).sites.values()):
            raise _out_of_reach(wanted, found)
        return found


def nearer(seen: Sequence[tuple[float, float]], wanted: float) -> float:
    """The budget to try next for a speed, from (budget, speed) pairs: between the nearest on both sides, or on from the last."""
    above = [pair for pair in seen if pair[1] >= wanted]
    below = [pair for pair in seen if pair[1] < wanted]
    if not above or not below:
        keep, speed = seen[-1]
        return min(1.0, keep * (speed / wanted) ** 1.2)
    (small, fast), (large, slow) = max(above), min(below)
    share = math.log(fast / wanted) / math.log(fast / slow)  # speed and budget are about a power of each other
    return small * (large / small) ** min(0.9, max(0.1, share))


def _out_of_reach(wanted: float, best: float) -> TargetError:
    return TargetError(
        f"{wanted:g} times as fast is out of reach: with every layer cut, {best:.1f} would be.",
        help=f"ask for less, at most about {max(1.0, 0.7 * best):.1f}.",
    )


def _try(bundle: Bundle, keep: float, distil: Train, state: Run, reference: Reference) -> _Attempt:
    """Cuts to the budget, distils, exports, and tries the files on validation examples; all of it kept for a resumed run."""
    fisher = registry.find("methods", "fisher")
    stages: tuple[Stage, ...] = (Calibrate(fisher(keep=round(keep, 4), cost="latency")), distil)
    made = advance(stages, bundle, state.under(f"keep-{keep:.4f}"))
    return _exported(_Attempt(keep, stages, made, ()), state.root / f"keep-{keep:.4f}", state, reference)


def _exported(attempt: _Attempt, folder: Path, state: Run, reference: Reference) -> _Attempt:
    """The attempt with all files that ship, and how they do on validation examples."""
    made = attempt.bundle
    file = folder / "trials.json"
    files = folder / "files"
    if not file.is_file():
        shutil.rmtree(files, ignore_errors=True)  # what a killed run left
        exported = export_files(made.model, made.material, files, SHIPPED, state.log, ranges=made.ranges)
        paths = {variant: artifact.path for variant, artifact in exported.items()}
        baseline = teacher_files(made, state)[Variant.FUSED]
        save_trials(file, try_out(paths, baseline, made, state, reference))
    return replace(attempt, trials=tuple(read_trials(file)), files=files)


def _uncut(whole: _Attempt, wishes: Wishes, state: Run, reference: Reference) -> list[_Attempt]:
    """What can be had without a cut: the uncut model, and where its first int8 file loses too much, its others, rescued if need be."""
    if whole.best(wishes.max_loss).loss <= wishes.max_loss:
        return [whole]
    others = _exported(whole, state.root / "whole", state, reference)
    if others.best(wishes.max_loss).loss <= wishes.max_loss:
        return [whole, others]
    rescued = _rescue(others, wishes, state, reference)
    return [whole, others] if rescued is None else [whole, others, rescued]


def _rescue(attempt: _Attempt, wishes: Wishes, state: Run, reference: Reference) -> _Attempt | None:
    """The same model with those matrices in float that int8 costs most; None where that is not within the loss, or not faster."""
    from slimformer.running import rescue as floats

    if attempt.files is None:
        return None
    found = floats.rescue(attempt.bundle, attempt.files, attempt.trials, state, reference, wishes.max_loss)
    return None if found is None else replace(attempt, trials=found.trials, files=found.folder, floats=found.floats)


def _pick(attempts: Sequence[_Attempt], wishes: Wishes) -> _Attempt:
    """The fastest that loses at most what is allowed; where none does, the one that loses least."""
    best = {id(attempt): attempt.best(wishes.max_loss) for attempt in attempts}
    good = [attempt for attempt in attempts if best[id(attempt)].loss <= wishes.max_loss]
    if good:
        return max(good, key=lambda attempt: best[id(attempt)].speed_32)
    return min(attempts, key=lambda attempt: best[id(attempt)].loss)


def _announce(bundle: Bundle, distil: Train, wishes: Wishes, state: Run) -> None:
    """Says what is about to happen, how long it will take and how much memory it needs, from a few real steps."""
    from slimformer.training.loop import estimate

    file = state.root / "estimate.json"
    if file.is_file():
        return
    context = distil.prepared(bundle, state)
    found: Estimate = estimate(context, distil.rows(bundle, state), distil.methods, distil.settings(wishes.seed), seconds=5.0)
    write_text(file, json.dumps(asdict(found)))
    once, passes = found.seconds / 60, round(distil.epochs * (1 + distil.augment), 1)
    rival = once if "small-dense" in wishes.rivals else 0.0
    log = state.log
    log.say(
        f"plan: cut to {wishes.speedup:g} times the speed, distil for {passes:g} epochs ({found.steps:,} steps at "
        f"{found.tokens_per_second:,.0f} tokens a second uncut), int8, verify; up to {wishes.tries} budgets."
    )
    log.say(
        f"at most {_minutes(once)} for a budget{f', {_minutes(rival)} for the rival' if rival else ''}, less as the model "
        f"shrinks; about {found.peak_rss_bytes / 2**30:.1f} GiB of memory."
    )


def _minutes(value: float) -> str:
    return f"{value:.0f} minutes" if value >= 1.5 else f"{value * 60:.0f} seconds"
