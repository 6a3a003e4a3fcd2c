"""Runs ten rows of the tables of methods again, drawn by a seed: do they fall inside their own intervals?

    python results/again.py --seed 22 --of 10     # draws the runs, and keeps their names in results/again.json
    python results/again.py --plan                # then as for the tables: run, stop, start again
    python results/again.py

A run can be drawn if its recipe can be run here, because its models and its data lie where it says. It is run by the recipe beside
its rows, with the same seed; on another processor, or with another number of threads, the weights differ all the same.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from pages import HOME, METHODS, Run, runs_of, table, wrapped
from sweep import Job, main
from work import interval_of, ours_in

from slimformer.errors import SlimformerError
from slimformer.exporters.base import Variant
from slimformer.files import write_text
from slimformer.running.reader import read_recipe

TABLE = "again"
COMMAND = "python results/again.py"
DRAWN = HOME / "again.json"


def draw(seed: int, count: int) -> None:
    """Draws the runs, of all that can be run here, and keeps their names."""
    folders = {run.folder for run in runs_of(HOME / METHODS)}
    rows = [folder for folder in folders if not {TABLE, "teachers"} & set(folder.parts) and folder.name != "teacher"]
    able = sorted(folder.as_posix() for folder in rows if _can_run(HOME / folder))
    names = sorted(random.Random(seed).sample(able, min(count, len(able))))
    write_text(DRAWN, json.dumps({"seed": seed, "of": len(able), "names": names}, indent=1) + "\n")


def _can_run(folder: Path) -> bool:
    try:
        recipe = read_recipe(folder / "recipe.yaml")
    except SlimformerError:
        return False
    places = [
        recipe.model,
        *([recipe.teacher] if recipe.teacher else []),
        *(getattr(recipe.task, name) for name in recipe.task.paths),
        *(str(file) for stage in recipe.stages for file in stage.files),
    ]
    return all(not isinstance(place, str) or Path(place).exists() for place in places)


@cache
def jobs() -> tuple[Job, ...]:
    """The runs that were drawn."""
    names = json.loads(DRAWN.read_text(encoding="utf-8"))["names"] if DRAWN.is_file() else []
    below = [Path(name).relative_to(METHODS).as_posix() for name in names]
    return tuple(Job(f"{TABLE}/{name}", read_recipe(HOME / METHODS / name / "recipe.yaml")) for name in below)


def part() -> list[str]:
    """The part of a page that shows the runs beside their first rows; empty if none was drawn."""
    if not DRAWN.is_file():
        return []
    facts = json.loads(DRAWN.read_text(encoding="utf-8"))
    first = {run.folder.as_posix(): run for run in runs_of(HOME / METHODS)}
    rows, inside, there = [], 0, 0
    for name in facts["names"]:
        before, after = first[name], first.get(f"{METHODS}/{TABLE}/{Path(name).relative_to(METHODS).as_posix()}")
        rows.append((Path(name).relative_to(METHODS).as_posix(), *_beside(before, after)))
        there += after is not None
        inside += rows[-1][-1] == "yes"
    intro = (
        f"{len(facts['names'])} of the {facts['of']} runs that can be repeated here, drawn with the seed {facts['seed']}, were run again "
        f"by the recipes beside their rows (`{COMMAND}`). {inside} of {there} lost as much as lies inside the 95 % interval of the first "
        "run, over examples alone."
    )
    return ["## Run again", "", *wrapped(intro), "", *table(("run", "points lost", "again", "inside"), rows), ""]


def _beside(before: Run, after: Run | None) -> tuple[str, str, str]:
    old = ours_in(before, Variant.FLOAT)
    new = ours_in(after, Variant.FLOAT) if after else None
    if old is None or old.loss is None or new is None or new.loss is None:
        return (interval_of(old.loss) if old else "", "not run yet", "")
    value = new.loss.value
    return (interval_of(old.loss), interval_of(new.loss), "yes" if old.loss.low <= value <= old.loss.high else "no")


def choose(arguments: Sequence[str]) -> Mapping[str, int] | None:
    """The seed and the count, if runs are to be drawn."""
    reader = argparse.ArgumentParser(add_help=False)
    reader.add_argument("--seed", type=int)
    reader.add_argument("--of", type=int, default=10)
    chosen, _ = reader.parse_known_args(arguments)
    return None if chosen.seed is None else {"seed": chosen.seed, "count": chosen.of}


if __name__ == "__main__":
    asked = choose(sys.argv[1:])
    if asked is not None:
        draw(**asked)
        print(f"drawn: {DRAWN.name}. Now run `{COMMAND} --plan`.")
        sys.exit(0)
    sys.exit(main(jobs(), lambda: None, sys.argv[1:]))
