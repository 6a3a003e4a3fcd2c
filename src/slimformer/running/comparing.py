"""`slimformer compare` tries several recipes within some hours, and leaves the models that no other beats.

Each recipe is first run with a part of its training. Those that another one beats in everything are out; the others are run whole, as far
as the time goes. What goes on is chosen on validation examples; the figures on the page are those of the dev split. Each run lies in a
folder of its own and resumes, and the hours that were used count, so the command may be stopped and started at will.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slimformer.digests import digest_files
from slimformer.errors import RecipeError, SlimformerError
from slimformer.files import remembered
from slimformer.log import Log
from slimformer.measuring.records import Record
from slimformer.methods.distillation import Distillation
from slimformer.reporting.page import report
from slimformer.reporting.verdicts import worthless
from slimformer.running.cluster import Cluster, Ended, Job, connected
from slimformer.running.fresh import Fresh
from slimformer.running.order import leading_stages
from slimformer.running.recipe import Bench, Recipe
from slimformer.running.runner import is_finished, run
from slimformer.running.shapes import StudentShape, timed_shapes, worth_trying
from slimformer.running.stages import Clock
from slimformer.running.sweep import CACHE, check_recipes, figures, named_recipes
from slimformer.saving import checkpoint
from slimformer.saving.hub import local_folder
from slimformer.training.stage import Stage, Train

TRIAL_TIME = 0.5  # of the hours, at most, are for the short runs
SHORT_SECONDS = 5.0  # a short run is timed for so long
SHORT, WHOLE = "short", "whole"  # folders below `out`


@dataclass(frozen=True)
class Tried:
    """One recipe: how far it came, why it stopped there, and what was measured last.

    Attributes:
        name: That of the recipe's file.
        end: "kept": it was run whole; "worthless": it was, and is worse than doing nothing; "beaten": another beats its short run in
            everything; "no time"; or "failed".
        why: In a clause.
        record: The row of its best file; None if there is none.
        minutes: How long its runs took.
    """

    name: str
    end: str
    why: str = ""
    record: Record | None = None
    minutes: float = 0.0

    @property
    def values(self) -> tuple[float, float, float, float]:
        """Points lost on validation examples, time at batch 32 and at batch 1 relative to the dense model, megabytes: less is better."""
        assert self.record is not None, "only a run that ended has values"
        return values_of(self.record)


@dataclass(frozen=True)
class Comparison:
    """What `compare_recipes` leaves.

    Attributes:
        out: The folder with a folder for each run that was whole, and report.html.
        tried: One entry for each recipe, in the order in which they were named.
    """

    out: Path
    tried: tuple[Tried, ...]

    @property
    def kept(self) -> tuple[Tried, ...]:
        """Those that were run whole and that no other beats, the fastest at batch 32 first."""
        whole = [item for item in self.tried if item.end == "kept"]
        best = [item for item in whole if beaten_by(item, whole) is None]
        return tuple(sorted(best, key=lambda item: item.values[1]))

    def lines(self) -> list[str]:
        """The outcome in lines of a terminal."""
        width = max(len(item.name) for item in self.tried)
        found = [f"{item.name:<{width}}  {_told(item)}" for item in self.tried]
        names = ", ".join(item.name for item in self.kept) or "none"
        return [*found, f"no other beats: {names}"]


def compare_recipes(
    recipes: Sequence[Recipe | str | Path],
    out: str | Path,
    *,
    hours: float,
    part: float = 0.25,
    model: str | Path | None = None,
    data: Any = None,
    students: int = 0,
    threads: int | None = None,
    wait_seconds: float = 60.0,
    cluster: str | None = None,
    processors: int | None = None,
    log: Log | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Comparison:
    """Tries several recipes for one task within some hours, and leaves the models that no other beats.

    Args:
        recipes: Files, or recipes. They are for one task, with the same data; each is called after its file.
        out: The folder for the runs and the page.
        hours: The time for all of it. Half of it at most is for short runs. A run that has begun is not stopped.
        part: The share of each recipe's passes that its short run has.
        model: The tuned model to take instead of the recipes' models and teachers. Their leading stages of plain fine-tuning are then
            left out. A recipe that builds a student keeps it, and learns from this model.
        data: The data to take instead of those that the recipes name.
        students: How many students of smaller shapes of `model` are tried too, each distilled with as many passes as the longest recipe
            has. Of all shapes those are taken that are fast for their size on this machine; see `shapes`.
        threads: How many threads each timing uses; all cores by default.
        wait_seconds: How long each run waits at most until nothing else runs on the machine.
        cluster: The address of a Ray cluster ("auto", "host:6379"), or "local" for one of this machine alone: trainings then run side
            by side on its nodes, and are measured one at a time; see `run_several`.
        processors: Processors for each training on the cluster; by default all are shared out.
        log: By default the lines go to Python's logger `slimformer`; `show_log` prints them.
        clock: What tells the seconds.

    Returns:
        What became of each recipe.

    Raises:
        RecipeError: There are fewer than two recipes, two of one name, or two for other tasks; or some have mistakes, all of which are
            named before anything runs.
        OutputError: `out` cannot be used.

    Example:
        >>> compare_recipes(["one.yaml", "two.yaml"], "compared", hours=2)  # doctest: +SKIP
    """
    place, began, log = Path(out), clock(), log or Log(None)
    chains = {name: _from_model(recipe, model) for name, recipe in named_recipes(recipes, None, data).items()}
    if students:
        chains |= _students(chains, model, students, threads, log, place)
    if len(chains) < 2:
        raise RecipeError("there is nothing to compare: name two recipes or more.", help="slimformer run is for one.")
    _check(chains)
    options: dict[str, Any] = {"threads": threads, "wait_seconds": wait_seconds, "cache": place / CACHE}
    with ExitStack() as stack:
        used = stack.enter_context(Clock(place))
        left = Budget(hours * 60, clock, began - 60 * used.minutes)
        nodes = stack.enter_context(connected(cluster, log)) if cluster is not None else None
        if nodes is not None:
            nodes.check(place)
        many = _Many(nodes, processors, left, options)
        short = many.tried(
            {name: (short_run(recipe, part), place / SHORT / name) for name, recipe in chains.items()}, TRIAL_TIME
        )
        ended = [item for item in short.values() if item.record is not None]
        outcome = dict(short)
        for item in ended:
            better = beaten_by(item, ended)
            if better is not None:
                outcome[item.name] = replace(item, end="beaten", why=f"{better.name} is better in everything")
        going = sorted((item for item in ended if outcome[item.name] is item), key=lambda entry: entry.values[0])
        expected = {item.name: item.minutes / part for item in going}
        whole = many.tried({item.name: (chains[item.name], place / WHOLE / item.name) for item in going}, 1.0, expected)
    for item in going:
        last = whole[item.name]
        outcome[item.name] = replace(last, record=last.record or item.record, minutes=last.minutes + item.minutes)
    if any(item.end in ("kept", "worthless") for item in outcome.values()):
        report([place / WHOLE], place)
    return Comparison(place, tuple(outcome.values()))


# -- The order of things ---------------------------------------------------------------------------------------------------------


@dataclass
class Budget:
    """The minutes for everything, and what runs have taken so far."""

    minutes: float
    clock: Callable[[], float]
    begin: float
    longest: float = 0.0  # minutes of the longest run so far

    @property
    def spent(self) -> float:
        """Minutes since the beginning."""
        return (self.clock() - self.begin) / 60

    def allows(self, expected: float, share: float) -> bool:
        """Whether a run of so many minutes would end within a share of the time."""
        return self.spent + expected <= share * self.minutes


def short_run(recipe: Recipe, part: float) -> Recipe:
    """The recipe with a part of its passes, and a quick bench without rivals."""

    def shorter(stage: Stage) -> Stage:
        if not isinstance(stage, Train):
            return stage
        if stage.steps is not None:
            return replace(stage, steps=max(1, round(part * stage.steps)))
        return replace(stage, epochs=part * stage.epochs)

    bench = Bench(rivals=(), seconds=min(SHORT_SECONDS, recipe.bench.seconds))
    return replace(recipe, stages=tuple(map(shorter, recipe.stages)), bench=bench)


def values_of(record: Record) -> tuple[float, float, float, float]:
    """Points lost, on validation examples if the file was chosen there; relative time at batch 32 and at batch 1; megabytes."""
    loss = record.forecast.loss if record.forecast else record.loss.value if record.loss else 0.0
    speeds = [record.times_faster(batch) for batch in (32, 1)]
    slow, single = (1 / speed.median if speed else 1.0 for speed in speeds)
    return loss, slow, single, (record.size_bytes or 0) / 1e6


def beaten_by(item: Tried, others: Sequence[Tried]) -> Tried | None:
    """One that is as good in everything, and better in something; None if there is none."""
    for other in others:
        if other.record is None or other is item:
            continue
        pairs = list(zip(other.values, item.values, strict=True))
        if all(theirs <= ours for theirs, ours in pairs) and any(theirs < ours for theirs, ours in pairs):
            return other
    return None


def _students(
    chains: Mapping[str, Recipe], model: str | Path | None, count: int, threads: int | None, log: Log, place: Path
) -> dict[str, Recipe]:
    """Recipes for students of a model, which see the rows as often as the longest of the recipes lets its model see them.

    Their shapes are timed once and noted in `place`: timed anew, others could be chosen when the comparison resumes.
    """
    if model is None or not chains:
        raise RecipeError("students are made from a model, for the task of a recipe: name both.", help="say --model ./my-bert.")
    first = next(iter(chains.values()))
    teacher = local_folder(str(model))
    passes = max(sum(stage.epochs for stage in item.stages if isinstance(stage, Train)) for item in chains.values()) or 1.0
    answers = Train(methods=(Distillation(hidden=0.0),), lr=4e-4, epochs=passes, task_weight=0.1, dropout=False)
    kind = checkpoint.base_type(checkpoint.read_config(teacher))
    place.mkdir(parents=True, exist_ok=True)
    timed = remembered(
        place / f"shapes-{digest_files([teacher])}.json",
        lambda: timed_shapes(teacher, first.task, log, threads=threads),
        list[StudentShape],
    )
    shapes = worth_trying(timed, count)
    log.say("students: " + ", ".join(f"{shape.name} ({shape.ms:.2f} ms a text)" for shape in shapes))
    return {
        shape.name: replace(first, model=Fresh(kind, config=dict(shape.config)), teacher=str(teacher), stages=(answers,))
        for shape in shapes
    }


def _from_model(recipe: Recipe, model: str | Path | None) -> Recipe:
    if model is None:
        return recipe
    stages = recipe.stages[leading_stages(recipe.stages) :]
    if isinstance(recipe.model, Fresh):
        return replace(recipe, stages=stages or recipe.stages, teacher=str(model))
    return replace(recipe, model=str(model), teacher=None, stages=stages)


def _check(chains: Mapping[str, Recipe]) -> None:
    """RecipeError with every mistake if some of the recipes could not be run, or are for other tasks."""
    first, *others = chains
    other = [f"{name}: another task or other data than {first}" for name in others if chains[name].task != chains[first].task]
    check_recipes(chains, other, "compared")


@dataclass(frozen=True)
class _Many:
    """Runs recipes as far as the time goes: one after another, or trained side by side on a cluster before they are measured."""

    nodes: Cluster | None
    processors: int | None
    left: Budget
    options: Mapping[str, Any]

    def tried(
        self, recipes: Mapping[str, tuple[Recipe, Path]], share: float, expected: Mapping[str, float] | None = None
    ) -> dict[str, Tried]:
        """Each with its folder, if its minutes are there; `expected`: how many those are, the longest so far if that is not known."""
        jobs = {name: Job(recipe, folder, self.options) for name, (recipe, folder) in recipes.items()}
        ahead = self._ahead(jobs, share, expected or {})
        return {name: self._one(name, job, share, (expected or {}).get(name), ahead) for name, job in jobs.items()}

    def _ahead(self, jobs: Mapping[str, Job], share: float, expected: Mapping[str, float]) -> dict[str, Ended] | None:
        """What the cluster has trained; None without one."""
        if self.nodes is None:
            return None
        left = self.left
        begun = {name: job for name, job in jobs.items() if left.allows(expected.get(name, left.longest), share)}
        if not begun:
            return {}
        return self.nodes.carry_out(begun, self.processors, until=lambda: not left.allows(0.0, share))

    def _one(self, name: str, job: Job, share: float, expected: float | None, ahead: Mapping[str, Ended] | None) -> Tried:
        left = self.left
        begin, minutes = left.spent, left.longest if expected is None else expected
        begins = name in ahead if ahead is not None else left.allows(minutes, share)
        if not begins and not is_finished(job.folder):
            return Tried(name, "no time", f"it needs some {minutes:.0f} minutes")
        before = (ahead or {}).get(name, Ended())
        if before.why:
            return Tried(name, "failed", before.why, minutes=before.minutes)
        try:
            result = run(job.recipe, job.folder, **job.options)
            record = result.record
        except SlimformerError as error:
            return Tried(name, "failed", str(error).splitlines()[0], minutes=before.minutes + left.spent - begin)
        noted = job.folder.with_name(f".minutes-{name}.json")  # so that a resumed comparison knows how long it took
        took = remembered(noted, lambda: before.minutes + left.spent - begin, float)
        left.longest = max(left.longest, took)
        if expected is not None and worthless(record, result.records):
            return Tried(name, "worthless", "worse than doing nothing", record, took)
        return Tried(name, "kept", "", record, took)


def _told(item: Tried) -> str:
    """What became of a recipe, in a line."""
    known = figures(item.record) if item.record is not None else ""
    ended = {"kept": "", "worthless": "", "beaten": "short run only: ", "no time": "no time left: ", "failed": "failed: "}[
        item.end
    ] + item.why
    return "; ".join(part for part in (known, ended) if part)
