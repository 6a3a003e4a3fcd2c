"""Runs a recipe: preflight, an open run, the bundle, the stages, the candidate, the rivals, the delivery.

`compress` goes the same way (`search.py`); there a search proposes the stages that a recipe brings here.
"""

from __future__ import annotations

import json
import os.path
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from slimformer.errors import DataError, OutputError
from slimformer.files import (
    claim,
    finished_wish,
    mark_finished,
    owned_purpose,
    refuse_other_purpose,
    remove_folder,
)
from slimformer.log import Log
from slimformer.measuring.latency import Levels
from slimformer.measuring.machine import Quiet, cores
from slimformer.options import changed_options
from slimformer.reporting.ledger import FACTS_FILE, FAMILY_FILE
from slimformer.running.bundle import Run
from slimformer.running.candidate import candidate_of
from slimformer.running.delivery import Order, deliver_model, finish
from slimformer.running.fresh import Fresh
from slimformer.running.given import given_models, given_recipe, moved, refuse_gone
from slimformer.running.preflight import lacks_head, preflight
from slimformer.running.prepare import prepare_bundle
from slimformer.running.recipe import Bench, Recipe
from slimformer.running.rescue import rescue
from slimformer.running.result import Result
from slimformer.running.rivals import rivals_of
from slimformer.running.stages import advance
from slimformer.running.trials import judge_of
from slimformer.tasks.base import Task
from slimformer.training.processes import shared

WORK = "work"  # the scratch folder in an output folder; it is gone when a run is finished


@dataclass(frozen=True)
class Conditions:
    """How a request is carried out, as the caller said.

    See `run` for the meaning of each.
    """

    log: Log | None = None
    threads: int | None = None
    wait_seconds: float = 60.0
    cache: str | Path | None = None


@shared
def run(
    recipe: Recipe | str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    model: Any = None,
    data: Any = None,
    tokenizer: Any = None,
    log: Log | None = None,
    command: str = "",
    threads: int | None = None,
    wait_seconds: float = 60.0,
    cache: str | Path | None = None,
) -> Result:
    """Runs a recipe into the folder `out`, going on after the last finished stage if a former run was cut off.

    Args:
        recipe: What to do: a `Recipe`, the path of a YAML file, or its content as a dict. The models of a `Recipe` may be in memory
            (a PreTrainedModel); they are then written into `out`.
        out: The folder for the result. It must not hold other files, nor a run of another recipe. If it holds the finished run of
            this one, nothing is done, and its result is returned.
        model: The model to take instead of the recipe's, such as its folder on this machine.
        data: The data to take instead of those that the recipe's task names: a path, a name, or rows in memory.
        tokenizer: The tokenizer of models in memory.
        log: By default the lines go to Python's logger `slimformer` and to `out`/log.jsonl; `show_log` prints them.
        command: The command line that the page shows.
        threads: How many threads each timing uses; all cores by default.
        wait_seconds: It waits at most so long in all, in seconds, until nothing else runs on the machine; 0 does not wait.
        cache: A folder for the teacher's outputs, its exported files and their scores. Other runs with the same teacher and rows
            read them there. It may grow to gigabytes, and it is never removed.

    Returns:
        The folder, and everything that was measured.

    Raises:
        RecipeError: The recipe has mistakes.
        ModelError: A model cannot be loaded, or does not suit the task.
        DataError: The data cannot be read, or do not suit the model.
        TargetError: A budget is out of reach.
        OutputError: `out` or `cache` cannot be used, or `out` belongs to another run.

    Example:
        >>> from slimformer import read_recipe, run
        >>> result = run(read_recipe("one-shot.yaml"), "finished", wait_seconds=0)
        >>> print(result)  # doctest: +ELLIPSIS
        finished: ... times as fast at batch 32, ...; best file onnx/model...onnx
    """
    with ExitStack() as stack:
        recipe = stack.enter_context(given_models(moved(given_recipe(recipe), model, data), tokenizer, Path(out)))
        result = finished_result(Path(out), recipe_purpose(recipe, Path(out)), _may_change(recipe), recipe.task, log)
        if result is not None:
            return result
        refuse_gone(recipe)
        checked = preflight(recipe)
        state = stack.enter_context(open_recipe(recipe, Path(out), Conditions(log, threads, wait_seconds, cache)))
        bundle, stages = prepare_bundle(checked, state)
        made = advance(stages, bundle, state)
        order = Order(recipe, model_name(recipe.model), recipe.task.title(), command=command)
        if recipe.task.pretraining:
            deliver_model(made, order, state, Path(out), headless=lacks_head(recipe, checked.teacher or checked.source))
            remove_folder(state.root)
            return Result(Path(out))
        judge = judge_of(made.bundle, state)
        state.log.say("exporting, and comparing the files on validation examples.")
        exporter = recipe.export.exporter()
        candidate = candidate_of(made, stages, state.root / "export", judge, state, exporter)
        if recipe.export.floats == "auto":
            candidate = rescue(candidate, judge, state, order.max_loss, exporter=exporter) or candidate
        rivals = rivals_of(made, stages, recipe.bench.rivals, judge, state)
        measurement = finish(candidate, rivals, order, judge, state, Path(out))
        remove_folder(state.root)
    return Result(Path(out), measurement.records)


@shared
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
    with ExitStack() as stack:
        recipe = stack.enter_context(given_models(recipe, None, Path(out)))
        checked = preflight(recipe)
        state = stack.enter_context(open_recipe(recipe, Path(out), Conditions(log, None, wait_seconds, cache)))
        bundle, stages = prepare_bundle(checked, state)
        advance(stages, bundle, state)


def open_recipe(recipe: Recipe, out: Path, conditions: Conditions) -> AbstractContextManager[Run]:
    """The output folder, claimed for this very recipe."""
    wish = partial(wish_of, recipe.task, _may_change(recipe))
    return open_run(out, recipe_purpose(recipe, out), recipe.seed, conditions, recipe.latency, wish)


def recipe_purpose(recipe: Recipe, out: Path) -> str:
    """The purpose of a folder that a recipe runs in: all but how it is measured, which may change while it resumes."""
    return f"recipe {json.dumps(replace(recipe.seen_from(out), bench=Bench()).to_data(), default=str)}"


def _may_change(recipe: Recipe) -> dict[str, Any]:
    return {"bench": json.loads(json.dumps(changed_options(recipe.bench)))}


def wish_of(task: Task, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a finished run notes beside its purpose: options that may change while it resumes, and what its data held."""
    return {**options, "data": _content_of(task)}


def finished_result(folder: Path, purpose: str, options: Mapping[str, Any], task: Task, log: Log | None) -> Result | None:
    """The result of a finished run with the same purpose and options, read from its folder; None if there is no finished run.

    OutputError as `is_done` raises it.
    """
    return Result.read(folder) if is_done(folder, purpose, options, task, log) else None


def is_done(folder: Path, purpose: str, options: Mapping[str, Any], task: Task, log: Log | None) -> bool:
    """Whether a folder holds the finished run with the same purpose and options; if so, a line says it.

    OutputError if the folder belongs to another purpose, or holds a finished run with other options, or of data that has changed.
    """
    if owned_purpose(folder) is None or not is_finished(folder):
        return False
    refuse_other_purpose(folder, purpose)
    there = finished_wish(folder)
    if there is not None:
        now = wish_of(task, options)
        changed = [name for name in options if there.get(name) != now[name]]
        facts = [f"{_named(name, now[name])} {_shown(there.get(name))}, you ask {_shown(now[name])}" for name in changed]
        if now["data"] is not None and there.get("data") not in (None, now["data"]):
            facts.append("the data was changed since")
        if facts:
            raise OutputError(
                f"{folder} holds a finished run of another wish.",
                facts=facts,
                help="choose another --out for this one, or delete the folder to start over.",
            )
    remove_folder(folder / WORK)  # of a run that was killed while it did so
    (log or Log(None)).say(f"{folder} is finished already, and this is its result; choose another --out to run it anew.")
    return True


def _named(name: str, value: Any) -> str:
    """An option of a command; of a recipe, the stage that holds the options."""
    return f"stage {name}:" if isinstance(value, Mapping) else f"--{name.replace('_', '-')}"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, Mapping) else str(value)


def is_finished(folder: Path) -> bool:
    """Whether a folder holds the whole result of a run."""
    return any((folder / name).is_file() for name in (FACTS_FILE, FAMILY_FILE)) and not (folder / WORK).exists()


def _content_of(task: Task) -> str | None:
    """What names the data of a task; None if it can no longer be read."""
    try:
        return task.content_digest()
    except DataError:
        return None


@contextmanager
def open_run(
    folder: Path,
    purpose: str,
    seed: int,
    conditions: Conditions,
    levels: Levels | None = None,
    wish: Callable[[], Mapping[str, Any]] = dict,
) -> Iterator[Run]:
    """The output folder, claimed for one purpose and one process. `wish` gives what is noted once the result is delivered.

    A finished run is no error here: callers ask `finished_result` first.
    """
    cache = conditions.cache
    if cache is not None and os.path.exists(cache) and not os.path.isdir(cache):
        raise OutputError(f"{cache} is a file.", help="choose a folder as --cache; it is made if there is none.")
    with claim(folder, purpose):
        scratch, log = folder / WORK, conditions.log or Log(folder)
        if scratch.exists():
            log.say(f"resuming the run in {folder}{_last_stage(scratch)}.")
        with log.keeping():
            yield Run(
                root=scratch,
                folder=scratch,
                log=log,
                seed=seed,
                threads=conditions.threads or cores(),
                levels=levels,
                quiet=Quiet(conditions.wait_seconds),
                cache=None if cache is None else Path(cache),
            )
        if is_finished(folder):
            mark_finished(folder, wish())


def _last_stage(scratch: Path) -> str:
    """ " after stage 2 (train)": the last one that a former run finished."""
    done = sorted(scratch.rglob("made/effort.json"), key=lambda file: file.stat().st_mtime)
    number, _, kind = done[-1].parent.parent.name.rpartition("-")[0].partition("-") if done else ("", "", "")
    return f" after stage {number} ({kind})" if kind else ""


def model_name(path: str | Fresh) -> str:
    """The name of a model in tables: that of its folder, or of the folder above if its own is only "model"."""
    if isinstance(path, Fresh):
        return path.use
    folder = Path(path).resolve()
    return folder.parent.name if folder.name in {"model", "checkpoint"} and folder.parent.name else folder.name
