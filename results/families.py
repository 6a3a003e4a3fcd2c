"""Families of models: the commands behind docs/methods/families.md, and the page itself.

    python results/families.py --plan          # which families stand; each takes an hour
    python results/families.py --only sst2     # make those; a run that was stopped goes on
    python results/families.py --draw          # only draw the page

A family is kept as `slimformer frontier` leaves it: its rows, frontier.json, and the recipe of each model that was delivered.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from choosing import SCATTER_STYLE
from pages import Run, bullets, interval, row_times, safe, table, turns, wrapped
from sweep import HOME, RUNS
from work import DATA, ROOT, SQUAD_TEACHER, SST2_TEACHER, glue, small_squad, write

from slimformer.cli import prefer_environment
from slimformer.demo import encoder
from slimformer.files import whole_folder
from slimformer.log import show_log
from slimformer.measuring.records import Standing
from slimformer.reporting.family import (
    FamilyPoint,
    ModelFamily,
    family_figure,
    percent_text,
    read_family,
    sizes_figure,
)
from slimformer.reporting.ledger import FAMILY_FILE, LEDGER
from slimformer.reporting.verdicts import Conclusion, all_of, within
from slimformer.reporting.words import listed, mb_text
from slimformer.running.frontier import compress_family
from slimformer.tasks.base import Task
from slimformer.tasks.classification import Classification

COMMAND = "python results/families.py"
KEPT = HOME / "methods" / "families"
PAGE = ROOT / "docs" / "methods" / "families.md"
MINUTES = 60.0
POINTS = 5  # models that nothing makes needless, at least
OFF = 10.0  # percent that a foretold time may be off
AIM, ALLOWED = 4.0, 1.0  # the model of this speed loses so many points at most


@dataclass(frozen=True)
class Command:
    """One family: its name, its model, its task, and what is asked for besides the speeds."""

    name: str
    model: Callable[[], str]
    task: Callable[[], Task]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return KEPT / self.name

    @property
    def out(self) -> Path:
        return RUNS / "families" / self.name

    @property
    def stands(self) -> bool:
        return (self.home / FAMILY_FILE).is_file()


def commands() -> list[Command]:
    """All families, in the order in which they are made."""
    sizes = {"megabytes": (8.0, 3.0)}
    return [
        Command("sst2", lambda: SST2_TEACHER, lambda: Classification(data=f"{DATA}/glue/SST-2"), sizes),
        Command("mrpc", lambda: str(encoder()), lambda: glue("mrpc"), sizes),
        Command("stsb", lambda: str(encoder()), lambda: glue("stsb"), sizes),
        Command("squad1", lambda: SQUAD_TEACHER, small_squad, sizes),
    ]


def make(command: Command) -> None:
    """Runs a command, and keeps what the page is drawn from."""
    options = {"megabytes": (), **command.options}
    family = compress_family(command.model(), command.task(), command.out, minutes=MINUTES, command=COMMAND, **options)
    keep(family.out, command.home)


def keep(out: Path, home: Path) -> None:
    """Copies a finished family's rows, figures and recipes."""
    with whole_folder(home) as part:
        for name in (LEDGER, FAMILY_FILE):
            shutil.copyfile(out / name, part / name)
        for recipe in sorted(out.glob("points/*/recipe.yaml")):
            shutil.copyfile(recipe, part / f"{recipe.parent.name}.yaml")


# -- The page --------------------------------------------------------------------------------------------------------------------

READING = (
    "**Made for**: the speed at batch 32, or the size, that was asked for. Each model is cut from the one before and trained on; those "
    "for a size have their word table as codes.",
    "**Points lost**: points of the metric below the dense model in fp32, on the exported int8 file and the whole dev split, with the "
    "95 % interval of the paired bootstrap. **MB**: that file.",
    "**×**: times as fast as that model in ONNX Runtime fp32: the median over rounds in which all files take turns, with the 10th to "
    "90th percentile.",
    "**Off**: how much more time was foretold than was measured, in percent. It was foretold before the model was trained, by the "
    "latency table and an untrained file of the same budget.",
    "**Bold**: delivered. The others are needless: another row is as fast and as good at least, and surely faster or surely better.",
)


def pages() -> dict[Path, str]:
    """The page and its pictures, as the families that stand give them."""
    found = {command.name: read_family(command.home) for command in commands() if command.stands}
    runs = [Run(Path(name), family.records) for name, family in found.items()]
    drawn = (
        f"Drawn from the ledgers under [`results/methods/families/`](../../results/README.md) by `{COMMAND} --draw`. Each family is one "
        "command, [`slimformer frontier`](../frontier.md), on two cores; without that option the script makes those that are missing."
    )
    lines = ["# Families of models, each made by one command", "", *wrapped(drawn), "", *bullets((*READING, *turns(runs))), ""]
    if found:
        lines += [*_aims(found), ""]
    left = [command.name for command in commands() if not command.stands]
    if left:
        lines += [f"Still to be made, an hour each: {listed(left)}.", ""]
    made: dict[Path, str] = {}
    for name, family in found.items():
        lines += _family(name, family)
        for kind, (picture, _) in (("speed", family_figure(family)), ("size", sizes_figure(family))):
            if picture:
                made[PAGE.parent / f"families-{name}-{kind}.svg"] = picture.replace(">", f">{SCATTER_STYLE}", 1) + "\n"
                lines += [f"![Quality against {kind}](families-{name}-{kind}.svg)", ""]
    return {PAGE: "\n".join(lines).rstrip() + "\n", **made}


def _aims(found: dict[str, ModelFamily]) -> list[str]:
    """What was asked of each family, and whether it came out so."""
    rows = []
    for family in found.values():
        four = next((point for point in family.points if point.aim == AIM), None)
        loss = family.record_of(four).loss if four else None
        rows.append(
            (
                safe(family.records[0].task),
                f"{len(family.kept)}: {_word(len(family.kept) >= POINTS)}",
                f"{_worst(family.kept)}",
                f"{interval(family.record_of(four))}: {within(loss.low, loss.high, ALLOWED)}" if four and loss else "",
            )
        )
    head = (
        "task",
        f"at least {POINTS} models that nothing makes needless",
        f"times foretold within {OFF:.0f} %: the worst at batch 32 and at batch 1",
        f"points that {AIM:g}x loses, at most {ALLOWED:g}",
    )
    return table(head, rows)


def _word(holds: bool) -> Conclusion:
    return Conclusion.YES if holds else Conclusion.NO


def _worst(points: Sequence[FamilyPoint]) -> str:
    """The largest errors of foretold times, and whether all are small enough."""
    large = [point.error for point in points if point.error is not None]
    single = [point.error_1 for point in points if point.error_1 is not None]
    if not large:
        return ""
    said = ", ".join(percent_text(max(errors, key=abs), "") for errors in (large, single) if errors)
    return f"{said}: {all_of([_word(abs(error) <= OFF) for error in (*large, *single)])}"


def _family(name: str, family: ModelFamily) -> list[str]:
    """One family: what to take, its table, and what was dropped."""
    points = {point.row: point for point in family.points}
    rows = []
    for record in family.records:
        point = points.get(record.name)
        bold = "**" if point is not None and point.folder else ""
        recipe = f"../../results/methods/families/{name}/{point.name}.yaml" if point is not None and point.folder else ""
        label = f"[{safe(record.name)}]({recipe})" if recipe else safe(record.name)
        rows.append(
            (
                f"{bold}{label}{bold}",
                _asked(point),
                f"{record.score:.4f}",
                interval(record) if record.role != Standing.TEACHER_FP32 else "",
                mb_text(record.size_bytes),
                *(row_times(record, batch) for batch in (32, 1)),
                *(percent_text(error, "") for error in ((point.error, point.error_1) if point else (None, None))),
            )
        )
    metric = safe(family.records[0].metric.replace("_", " "))
    head = ("file", "made for", metric, "points lost", "MB", "× batch 32", "× batch 1", "off at 32", "off at 1")
    first = family.records[0]
    dropped = family.dropped()
    return [
        f"## {safe(first.task)}",
        "",
        *wrapped(safe(f"{first.model}, {MINUTES:g} minutes. {family.advice()}")),
        "",
        *table(head, rows),
        "",
        *bullets(map(safe, dropped)),
        *([""] if dropped else []),
    ]


def _asked(point: FamilyPoint | None) -> str:
    if point is None:
        return ""
    return f"{point.aim:g}x" if point.aim is not None else f"{point.megabytes:g} MB" if point.megabytes is not None else ""


@show_log()
def main(arguments: Sequence[str]) -> int:
    """The command line."""
    prefer_environment()
    reader = argparse.ArgumentParser(description="Makes families of models and draws their page.")
    reader.add_argument("--plan", action="store_true", help="only say which families stand")
    reader.add_argument("--draw", action="store_true", help="only draw the page")
    reader.add_argument("--only", default="", help="a regular expression on the names of families")
    chosen = reader.parse_args(arguments)
    some = [command for command in commands() if re.search(chosen.only, command.name)]
    for command in some:
        print(f"{command.name:8} {'stands' if command.stands else f'{MINUTES:g} minutes'}", flush=True)
    if chosen.plan:
        return 0
    for command in some:
        if not chosen.draw and not command.stands:
            make(command)
    write(pages())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
