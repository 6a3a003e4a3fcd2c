"""Runs a recipe: preflight, an open run, the bundle, the stages, the candidate, the rivals, the delivery.

`compress` goes the same way (`search.py`); there a search proposes the stages that a recipe brings here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from slimformer.digests import digest
from slimformer.errors import OutputError, RecipeError
from slimformer.files import claim, remove_folder
from slimformer.log import Log
from slimformer.measuring.latency import Levels
from slimformer.measuring.machine import Quiet, cores
from slimformer.measuring.scoring import Measurement
from slimformer.running.bundle import Run
from slimformer.running.candidate import candidate_of
from slimformer.running.delivery import Order, finish
from slimformer.running.preflight import preflight
from slimformer.running.prepare import prepare_bundle
from slimformer.running.recipe import Recipe
from slimformer.running.rescue import rescue
from slimformer.running.rivals import rivals_of
from slimformer.running.stages import advance
from slimformer.running.trials import judge_of


@dataclass(frozen=True)
class Outcome:
    """The result of a run: its folder, and everything that was measured."""

    out: Path
    measurement: Measurement


@dataclass(frozen=True)
class Conditions:
    """How a request is carried out, as the caller said.

    See `run` for the meaning of each.
    """

    log: Log | None = None
    threads: int | None = None
    wait_seconds: float = 60.0
    cache: str | Path | None = None


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
    """Runs a recipe into the folder `out`, going on after the last finished stage if a former run was cut off.

    Args:
        recipe: What to do; `read_recipe` reads one from YAML.
        out: The folder for the result. It must not hold other files, nor a finished run.
        log: By default the lines go to Python's logger `slimformer` and to `out`/log.jsonl; `show_log` prints them.
        command: The command line that the page shows.
        threads: How many threads each timing uses; all cores by default.
        wait_seconds: It waits at most so long in all, in seconds, until nothing else runs on the machine; 0 does not wait.
        cache: A folder for the teacher's outputs, its exported files and their scores. Other runs with the same teacher and rows
            read them there. It may grow to gigabytes, and it is never removed.

    Returns:
        The folder, and everything that was measured.

    Raises:
        RecipeError: The recipe has mistakes, or `out` holds a finished run.
        ModelError: A model cannot be loaded, or does not suit the task.
        DataError: The data cannot be read, or do not suit the model.
        TargetError: A budget is out of reach.
        OutputError: `out` or `cache` cannot be used.

    Example:
        >>> from slimformer import read_recipe, run
        >>> outcome = run(read_recipe("recipe.yaml"), "small")  # doctest: +SKIP
        >>> outcome.measurement.records[0].score  # doctest: +SKIP
        0.9175
    """
    checked = preflight(recipe)
    with open_recipe(recipe, Path(out), Conditions(log, threads, wait_seconds, cache)) as state:
        bundle, stages = prepare_bundle(checked, state)
        made = advance(stages, bundle, state)
        judge = judge_of(made.bundle, state)
        state.log.say("exporting, and comparing the files on validation examples.")
        order = Order(recipe, model_name(recipe.model), recipe.task.title(), command=command)
        exporter = recipe.export.exporter()
        candidate = candidate_of(made, stages, state.root / "export", judge, state, exporter)
        if recipe.export.floats == "auto":
            candidate = rescue(candidate, judge, state, order.max_loss, exporter=exporter) or candidate
        rivals = rivals_of(made, stages, recipe.bench.rivals, judge, state)
        measurement = finish(candidate, rivals, order, judge, state, Path(out))
        remove_folder(state.root)
    return Outcome(Path(out), measurement)


def train_stages(
    recipe: Recipe,
    out: str | Path,
    *,
    log: Log | None = None,
    wait_seconds: float = 60.0,
    cache: str | Path | None = None,
) -> None:
    """Runs the stages of a recipe and delivers nothing: `run` with the same recipe and folder goes on from there.

    Training needs no quiet machine and measuring does: several recipes can be trained side by side, then delivered in turn.
    """
    checked = preflight(recipe)
    with open_recipe(recipe, Path(out), Conditions(log, None, wait_seconds, cache)) as state:
        bundle, stages = prepare_bundle(checked, state)
        advance(stages, bundle, state)


def open_recipe(recipe: Recipe, out: Path, conditions: Conditions) -> AbstractContextManager[Run]:
    """The output folder, claimed for this very recipe."""
    return open_run(out, f"recipe {digest(recipe.seen_from(out).to_yaml())}", recipe.seed, conditions, recipe.latency)


@contextmanager
def open_run(folder: Path, purpose: str, seed: int, conditions: Conditions, levels: Levels | None = None) -> Iterator[Run]:
    """The output folder, claimed for one purpose and one process; RecipeError if it is finished already."""
    cache = conditions.cache
    if cache is not None and Path(cache).exists() and not Path(cache).is_dir():
        raise OutputError(f"{cache} is a file.", help="choose a folder as --cache; it is made if there is none.")
    with claim(folder, purpose):
        if (folder / "report.html").is_file() and not (folder / "work").exists():
            raise RecipeError(f"{folder} is finished already.", help="look at its report.html, or choose another --out.")
        scratch = folder / "work"
        yield Run(
            root=scratch,
            folder=scratch,
            log=conditions.log or Log(folder),
            seed=seed,
            threads=conditions.threads or cores(),
            levels=levels,
            quiet=Quiet(conditions.wait_seconds),
            cache=None if cache is None else Path(cache),
        )


def model_name(path: str) -> str:
    """The name of a model in tables: that of its folder, or of the folder above if its own is only "model"."""
    folder = Path(path).resolve()
    return folder.parent.name if folder.name in {"model", "checkpoint"} and folder.parent.name else folder.name
