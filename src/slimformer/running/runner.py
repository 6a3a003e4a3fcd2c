"""Runs a recipe: preflight, an open run, the bundle, the stages, the candidate, the rivals, the delivery.

`run` is the corridor that `compress` walks too (`search.py`), only that a recipe brings its stages and a search proposes them.
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
from slimformer.measuring.machine import cores
from slimformer.measuring.scoring import Measurement
from slimformer.running.bundle import Run
from slimformer.running.candidate import candidate_of
from slimformer.running.delivery import Order, finish
from slimformer.running.preflight import preflight
from slimformer.running.prepare import prepare_bundle
from slimformer.running.recipe import Recipe
from slimformer.running.rescue import rescue
from slimformer.running.stages import advance
from slimformer.running.trials import judge_of


@dataclass(frozen=True)
class Outcome:
    """What a run ends with: the folder, and all that was measured."""

    out: Path
    measurement: Measurement


@dataclass(frozen=True)
class Conditions:
    """How a request is carried out, as the caller said.

    `log` None writes into the output folder and shows lines on the terminal; `threads` None takes all cores; `wait_seconds`: at most,
    before each timing, until nothing else runs; `cache`: a folder that runs share.
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

    `log`: by default the lines go to the terminal and to `out`/log.jsonl. `command`: the command line that the page shows.
    `threads`: of all timings; all cores by default. `wait_seconds`: at most, before each timing, until nothing else runs.
    `cache`: a folder for what is made of teachers (outputs, exported files, their scores), which other runs with the same teacher
    and rows read instead of making it again. It may grow to gigabytes, and it stays.

    Raises a SlimformerError if the recipe, the model or the data are no good, or if `out` cannot be used.
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
        measurement = finish(candidate, order, judge, state, Path(out))
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
    return open_run(out, f"recipe {digest(recipe.to_yaml())}", recipe.seed, conditions, recipe.latency)


@contextmanager
def open_run(folder: Path, purpose: str, seed: int, conditions: Conditions, levels: Levels | None = None) -> Iterator[Run]:
    """The output folder, claimed for one purpose and one process; RecipeError if it is finished already."""
    cache = conditions.cache
    if cache is not None and Path(cache).exists() and not Path(cache).is_dir():
        raise OutputError(f"{cache} is a file.", help="choose a folder as --cache; it is made where there is none.")
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
            wait_seconds=conditions.wait_seconds,
            cache=None if cache is None else Path(cache),
        )


def model_name(path: str) -> str:
    """How a model is called in tables: its folder, or the one above if the folder is only called "model"."""
    folder = Path(path).resolve()
    return folder.parent.name if folder.name in {"model", "checkpoint"} and folder.parent.name else folder.name
