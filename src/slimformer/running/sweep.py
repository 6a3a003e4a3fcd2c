"""Runs several recipes, or one with several seeds: one after another here, or side by side on a Ray cluster.

Each run lies in a folder of its own, exactly as `run` alone would leave it, and resumes by itself. So a sweep may be stopped and
started at will, by another machine too, and grow by recipes that are added later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from slimformer.errors import OutputError, RecipeError, SlimformerError, readable
from slimformer.log import Log
from slimformer.measuring.records import Record
from slimformer.reporting.ledger import LEDGER
from slimformer.reporting.page import report
from slimformer.reporting.words import mb_text
from slimformer.running.cluster import Cluster, Job, connected
from slimformer.running.fresh import Fresh
from slimformer.running.given import moved
from slimformer.running.preflight import preflight
from slimformer.running.reader import read_recipe
from slimformer.running.recipe import Recipe
from slimformer.running.result import Result
from slimformer.running.runner import is_finished, run
from slimformer.running.students import check_student
from slimformer.saving.hub import local_folder

CACHE = "cache"  # below `out`: the outputs of teachers, which all runs share


@dataclass(frozen=True)
class Ran:
    """One run of a sweep.

    Attributes:
        name: That of the recipe's file, and its seed if there are several.
        why: Why it failed, in a clause; empty if it did not.
        result: What it left; None if it failed.
    """

    name: str
    why: str = ""
    result: Result | None = None

    @property
    def record(self) -> Record | None:
        """What was measured of its best file, if there is one."""
        return self.result.record if self.result is not None and self.result.records else None


@dataclass(frozen=True)
class Sweep:
    """What `run_several` leaves.

    Attributes:
        out: The folder with a folder for each run, and report.html.
        ran: One entry for each run, in the order of the recipes.
        seeds: The seeds of each recipe; none if each ran with its own.
    """

    out: Path
    ran: tuple[Ran, ...]
    seeds: tuple[int, ...] = ()

    @property
    def failed(self) -> tuple[Ran, ...]:
        """Runs that did not end."""
        return tuple(item for item in self.ran if item.why)

    def lines(self) -> list[str]:
        """The outcome in lines of a terminal; behind the runs of several seeds their means."""
        width = max(len("mean of 2") if self.seeds else 0, *(len(item.name) for item in self.ran))
        lines = []
        for group in self._groups():
            lines += [f"{item.name:<{width}}  {_told(item)}" for item in group]
            records = [item.record for item in group if item.record is not None]
            losses = [record.loss.value for record in records if record.loss]
            if len(losses) > 1 and self.seeds:
                speeds = [speed.median for record in records if (speed := record.times_faster(32))]
                faster = f", {mean(speeds):.1f}x at batch 32" if speeds else ""
                spread = f"{min(losses):+.1f} to {max(losses):+.1f}"
                lines.append(f"{'mean of ' + str(len(losses)):<{width}}  {mean(losses):+.1f} points lost ({spread}){faster}")
        return lines

    def _groups(self) -> Iterator[Sequence[Ran]]:
        """The runs of one recipe together."""
        size = len(self.seeds) or 1
        for first in range(0, len(self.ran), size):
            yield self.ran[first : first + size]


def run_several(
    recipes: Sequence[Recipe | str | Path],
    out: str | Path,
    *,
    seeds: Sequence[int] = (),
    cluster: str | None = None,
    processors: int | None = None,
    model: str | Path | None = None,
    data: Any = None,
    threads: int | None = None,
    wait_seconds: float = 60.0,
    cache: str | Path | None = None,
    log: Log | None = None,
) -> Sweep:
    """Runs several recipes, each into a folder below `out` that is called after its file.

    Without a cluster they run one after another. On a cluster they are trained side by side, and then measured one at a time, on nodes
    that were started with the resource `measure`, or on this machine if there are none. A run whose worker or node dies goes on on
    another node from its last state, which is at most a minute old, and ends with the same numbers.

    Args:
        recipes: Files, or recipes. A mistake in any of them is said before anything runs.
        out: The folder for the runs and the page. On a cluster all nodes see it, and all models and data, under the same path.
        seeds: Seeds that each recipe is run with; by default each has its own.
        cluster: The address of a Ray cluster ("auto", "host:6379"), or "local" for one of this machine alone.
        processors: Processors for each training on the cluster; by default all are shared out. Their number can change last digits.
        model: The model to take instead of the recipes'.
        data: The data to take instead of those that the recipes name.
        threads: How many threads each timing uses; all cores by default.
        wait_seconds: How long each run waits at most until nothing else runs on its machine before it measures.
        cache: A folder for the outputs of teachers; by default one below `out`, which all runs share.
        log: By default the lines go to Python's logger `slimformer`; `show_log` prints them.

    Returns:
        What became of each run.

    Raises:
        RecipeError: There is no recipe, two have one name, or some have mistakes, all of which are named.
        OutputError: `out` cannot be used, or a node does not see it.
        ProcessError: No cluster answers at the address.
        ExtraError: Ray is asked for and not installed.

    Example:
        >>> run_several(["one.yaml", "two.yaml"], "runs", seeds=(1, 2, 3), cluster="auto")  # doctest: +SKIP
    """
    place, log = Path(out), log or Log(None)
    if place.exists() and not place.is_dir():
        raise OutputError(f"{place} is a file.", help="choose another --out.")
    if (place / LEDGER).is_file():
        raise OutputError(
            f"{place} holds a run, and several runs are written beside each other.",
            help="choose another --out; the run may be moved into it.",
        )
    chains = _with_seeds(named_recipes(recipes, model, data), tuple(dict.fromkeys(seeds)))
    if not chains:
        raise RecipeError("there is nothing to run.", help="name a recipe.")
    check_recipes(chains)
    options = {"threads": threads, "wait_seconds": wait_seconds, "cache": str(cache or place / CACHE)}
    jobs = {name: Job(recipe, place / name, options) for name, recipe in chains.items()}
    failed: dict[str, str] = {}
    if cluster is not None:
        with connected(cluster, log) as nodes:
            failed = run_on(nodes, jobs, place, processors)
    ran = []
    for number, (name, job) in enumerate(jobs.items(), 1):
        if len(jobs) > 1 and name not in failed:
            log.say(f"{name}, {number} of {len(jobs)}:")
        ran.append(_delivered(name, job, failed.get(name, "")))
    if any(item.record for item in ran):
        report([place / item.name for item in ran if item.record], place)
    return Sweep(place, tuple(ran), tuple(dict.fromkeys(seeds)))


def run_on(nodes: Cluster, jobs: Mapping[str, Job], place: Path, processors: int | None) -> dict[str, str]:
    """Trains jobs on a cluster, and measures them if it has a node for that; why some failed, by name."""
    left = {name: job for name, job in jobs.items() if not is_finished(job.folder)}
    if not left:
        return {}
    nodes.check(place)
    return {name: item.why for name, item in nodes.carry_out(left, processors).items() if item.why}


def named_recipes(
    recipes: Sequence[Recipe | str | Path], model: str | Path | None = None, data: Any = None
) -> dict[str, Recipe]:
    """Recipes by the names of their files, with the model and data that are to be taken; RecipeError if two have one name."""
    found: dict[str, Recipe] = {}
    for number, item in enumerate(recipes, 1):
        name = f"recipe-{number}" if isinstance(item, Recipe) else Path(item).stem
        recipe = item if isinstance(item, Recipe) else read_recipe(item)
        if name in found:
            raise RecipeError(f"two recipes are called {readable(name)}.", help="give their files other names.")
        found[name] = moved(recipe, model, data)
    return found


def check_recipes(chains: Mapping[str, Recipe], facts: Sequence[str] = (), done: str = "run") -> None:
    """RecipeError with every mistake, those in `facts` first, if some of the recipes could not be run; `done`: what is to be done."""
    wrong = list(facts)
    for name, recipe in chains.items():
        try:
            if not isinstance(recipe.model, Fresh):
                preflight(recipe)
            elif recipe.teacher is not None:  # it is built when it runs
                teacher = local_folder(recipe.teacher)
                check_student(recipe.model.use, teacher, recipe.task, recipe.stages, recipe.model.vocabulary)
        except SlimformerError as error:
            wrong.append(f"{name}: {str(error).splitlines()[0]}")
    if wrong:
        raise RecipeError(f"these recipes cannot be {done}.", facts=wrong, help="correct them, or leave some out.")


def figures(record: Record) -> str:
    """Points lost, speed at both batches and megabytes of a file, in a clause."""
    speeds = [record.times_faster(batch) for batch in (32, 1)]
    lost = f"{record.loss.value:+.1f} points lost" if record.loss else ""
    times = ", ".join(f"{speed.median:.1f}x at batch {batch}" for speed, batch in zip(speeds, (32, 1), strict=True) if speed)
    return ", ".join(part for part in (lost, times, f"{mb_text(record.size_bytes or 0)} MB") if part)


def _with_seeds(chains: Mapping[str, Recipe], seeds: Sequence[int]) -> dict[str, Recipe]:
    if not seeds:
        return dict(chains)
    return {f"{name}-seed-{seed}": replace(recipe, seed=seed) for name, recipe in chains.items() for seed in seeds}


def _delivered(name: str, job: Job, why: str) -> Ran:
    """The result of a job: measured here if that is left to do."""
    if why:
        return Ran(name, why)
    try:
        return Ran(name, "", run(job.recipe, job.folder, **job.options))
    except SlimformerError as error:
        return Ran(name, str(error).splitlines()[0])


def _told(item: Ran) -> str:
    if item.why:
        return f"failed: {item.why}"
    return figures(item.record) if item.record is not None else "a model for others to start from"
