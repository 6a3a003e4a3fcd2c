"""`slimformer bench MODEL --levels FILE` times what heads and neurons cost on one machine, for a recipe that runs on another.

The table is what a run measures for a budget in latency. A recipe names the file under `latency:`, so that a model for a small machine is
made on a large one: `run` then shares out the budget by the small machine's times.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from slimformer.files import write_text
from slimformer.log import Log
from slimformer.measuring.latency import Levels
from slimformer.measuring.machine import cores, environment
from slimformer.running.preflight import preflight
from slimformer.running.prepare import prepare_bundle
from slimformer.running.recipe import Recipe
from slimformer.running.runner import Conditions, open_recipe
from slimformer.running.stages import latency_of
from slimformer.tasks.base import Task


def measure_table(
    model: str | Path, task: Task, *, threads: int | None = None, wait_seconds: float = 60.0, log: Log | None = None
) -> Levels:
    """Times what heads and neurons of a model cost on this machine.

    Args:
        model: A folder of a transformers model.
        task: Whose dev texts say how long texts are.
        threads: How many threads the timing uses; all cores by default.
        wait_seconds: How long it waits at most until nothing else runs on the machine.
        log: By default the lines go to Python's logger `slimformer`; `show_log` prints them.

    Returns:
        The table, as a recipe carries it under `latency`.

    Raises:
        ModelError: The model cannot be loaded, or has no layers.
        DataError: The data cannot be read.

    Example:
        >>> measure_table("./my-bert", task)  # doctest: +SKIP
    """
    recipe = Recipe(str(model), task, ())
    with tempfile.TemporaryDirectory(prefix="slimformer-levels-") as place:
        checked = preflight(recipe)
        conditions = Conditions(log or Log(None), threads, wait_seconds, None)
        with open_recipe(recipe, Path(place) / "run", conditions) as run:
            run.root.mkdir(parents=True, exist_ok=True)
            bundle, _ = prepare_bundle(checked, run)
            return latency_of(bundle.subject, bundle.material, run).levels


def write_levels(levels: Levels, file: Path, model: str, threads: int | None) -> None:
    """Writes a table as YAML that a recipe may name, with the machine and the model in its first lines."""
    import yaml

    machine = environment()
    head = [
        "# Milliseconds of a text in int8 at batch 32, and at batch 1 under `single`, by heads or neurons that are left;",
        "# for `latency:` in a recipe.",
        f"# model: {model}; machine: {machine.cpu}, {threads or cores()} of {machine.cores} cores, {machine.os}",
    ]
    write_text(file, "\n".join([*head, yaml.safe_dump(levels.to_data(), sort_keys=False)]))
