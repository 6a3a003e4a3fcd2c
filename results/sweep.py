"""Runs the recipes of one table, one after another: says first how many hours they need, skips the rows that stand,
resumes.

The one idea: a table of the docs is a list of jobs, each a recipe and the folder that its rows belong to. Scratch lies
under runs/, so a sweep that was stopped resumes; a finished job leaves ledger.jsonl and recipe.yaml under
results/methods/, and is never run again. Small models use one core better than two: jobs can train side by side, and
are then measured one after the other, alone. Nothing is drawn here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from slimformer.cli import prefer_environment
from slimformer.data.tokenizer import load_tokenizer, max_length_of
from slimformer.demo import encoder
from slimformer.digests import digest
from slimformer.errors import SlimformerError
from slimformer.files import whole_folder, write_text
from slimformer.log import show_log
from slimformer.measuring.machine import cores
from slimformer.reporting.ledger import LEDGER, append_record, read_records
from slimformer.running.recipe import Recipe
from slimformer.running.runner import run, train_stages
from slimformer.tasks.base import Split, Task
from slimformer.training.stage import Train

HOME = Path(__file__).resolve().parent
RUNS = HOME.parent / "runs"
LINK = RUNS / "encoder"  # recipes name the demo's encoder so, wherever it is installed
RATE = 20_000.0  # tokens a second through a layer of a small encoder, in training on two cores; only the forecast depends on it
LETTERS = 4.5  # bytes of a text for each of its tokens
LOOK = 0.4  # the teacher's pass over a row takes this share of a training step
TEACHERS = RUNS / "sweep" / "teachers"  # a cache that the runs of a task share: gigabytes
AROUND = 2.5 / 60  # hours for exports, trials and the bench of one job


@dataclass(frozen=True)
class Job:
    """One row of a table: `folder` below results/methods/, and the share of the dense cost that stays after the first cut."""

    folder: str
    recipe: Recipe
    share: float = 1.0
    needs: str = ""  # the folder of a job that makes this one's model
    before: Callable[[], None] | None = None  # makes the model that the recipe starts from, if it does not exist
    more: Callable[[Job], None] | None = None  # adds rows to the ledger in `scratch`, or files, once the run is finished
    files: tuple[str, ...] = ()  # the names of such files, which are kept beside the rows

    @property
    def home(self) -> Path:
        return HOME / "methods" / self.folder

    @property
    def scratch(self) -> Path:
        return RUNS / "sweep" / self.folder

    @property
    def measured(self) -> bool:
        """Whether the run leaves rows; one on plain text leaves a model that others start from."""
        return not self.recipe.task.pretraining

    @property
    def stands(self) -> bool:
        return (self.home / LEDGER if self.measured else self.scratch / "config.json").is_file()

    def hours(self) -> float:
        """A forecast: tokens seen while training, at the speed of the model that each stage trains."""
        share, seen = 1.0, 0.0
        for stage in self.recipe.stages:
            deciding = not isinstance(stage, Train) or any(method.effects().chooses for method in stage.methods)
            if isinstance(stage, Train):
                tokens = (1 + stage.augment) * _tokens(self.recipe.task, str(self.recipe.model), stage.text)
                seen += stage.epochs * tokens * share
                if any(method.effects().needs_teacher for method in stage.methods):
                    seen += LOOK * tokens * min(1.0, stage.epochs)  # kept on disk
            share = min(share, self.share) if deciding else share
        return seen * _depth(self.recipe.teacher or str(self.recipe.model)) / RATE / 3600 + AROUND


@cache
def _tokens(task: Task, model: str, text: str | None) -> float:
    """Tokens in an epoch, from 500 examples, or from the size of a text file. A model to come splits words as the demo's does."""
    if text is not None and Path(text).is_file():
        return Path(text).stat().st_size / LETTERS
    source = _there(model)
    examples = task.split(Split.TRAIN)
    some = examples[:: max(1, len(examples) // 500)]
    features = task.encode(some, load_tokenizer(source), min(task.max_length, max_length_of(source)))
    return float(features.lengths().sum()) / len(some) * len(examples)


def _there(model: str) -> Path:
    """The folder of a model; the demo's encoder for one that is still to be made."""
    return Path(model) if (Path(model) / "config.json").is_file() else encoder()


def _depth(model: str) -> int:
    """Layers of a model."""
    return int(json.loads((_there(model) / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])


def due(jobs: Sequence[Job]) -> list[Job]:
    """The jobs to run: those without rows, and before them those that make a model they start from, if it is gone."""
    gone = {job.folder for job in jobs if not (job.scratch / "config.json").is_file()}
    return _with_makers(jobs, {job.folder for job in jobs if not job.stands}, gone)


def _with_makers(jobs: Sequence[Job], some: set[str], gone: set[str]) -> list[Job]:
    """Some of the jobs, and those that make a model that is gone; a maker comes before its users."""
    found = set(some)
    for job in reversed(jobs):
        if job.folder in found:
            found |= {job.needs} & gone
    return [job for job in jobs if job.folder in found]


def forecast(jobs: Sequence[Job]) -> str:
    """The plan as a table: each job, whether its rows stand, and its hours."""
    lines = [f"{'job':56} {'hours':>6}"]
    left = due(jobs)
    lines += [f"{job.folder:56} {f'{job.hours():.2f}' if job in left else 'stands':>6}" for job in jobs]
    lines.append(f"{len(left)} of {len(jobs)} jobs to run, about {sum(job.hours() for job in left):.1f} hours on two cores.")
    return "\n".join(lines)


def sweep(jobs: Sequence[Job], beside: int = 1, wait_seconds: float = 60.0) -> int:
    """Runs the jobs without rows and returns how many failed; a failure is reported, and the others go on.

    `beside`: jobs that train at a time. `wait_seconds`: how long each waits for a quiet machine before it is measured.
    """
    failed = 0
    for some in rounds(due(jobs), beside):
        if len(some) > 1:
            train_beside(some)
        failed += sum(not _finish(job, wait_seconds) for job in some)
    return failed


def _finish(job: Job, wait_seconds: float) -> bool:
    """Runs a job to its end and keeps its rows; False if it failed."""
    begin = time.monotonic()
    print(f"== {job.folder}", flush=True)
    try:
        finished = (job.scratch / LEDGER).is_file()
        if finished and _stages_in(job.scratch) != job.recipe.to_data()["stages"]:
            print(f"   failed: {job.scratch} holds a finished run of other stages; move it away.", flush=True)
            return False
        if not finished:
            if job.before is not None:
                job.before()
            command = f"slimformer run results/methods/{job.folder}/recipe.yaml"
            run(job.recipe, job.scratch, command=command, cache=TEACHERS, wait_seconds=wait_seconds)
    except Exception as error:  # one job's fault must not keep the others from running
        traceback.print_exc() if not isinstance(error, SlimformerError) else print(f"   failed: {error}", flush=True)
        return False
    if job.measured and not job.stands:
        if job.more is not None:
            job.more(job)
        _keep(job)
        print(f"   {(time.monotonic() - begin) / 60:.1f} minutes", flush=True)
    return True


def _stages_in(folder: Path) -> Any:
    return yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))["stages"]


def _keep(job: Job) -> None:
    """Copies a finished job's rows, with a recipe whose paths are seen from its new place, and so has a digest of its own."""
    text, rows = job.recipe.seen_from(job.home).to_yaml(), read_records([job.scratch / LEDGER])
    with whole_folder(job.home) as part:
        write_text(part / "recipe.yaml", text)
        for row in rows:
            append_record(part / LEDGER, replace(row, recipe=row.recipe and digest(text)))
        for name in job.files:
            write_text(part / name, (job.scratch / name).read_text(encoding="utf-8"))


def rounds(jobs: Sequence[Job], beside: int) -> list[list[Job]]:
    """Jobs in groups of `beside`, in order; a job is in a later group than the one that makes its model."""
    found: list[list[Job]] = []
    for job in jobs:
        if found and len(found[-1]) < beside and all(other.folder != job.needs for other in found[-1]):
            found[-1].append(job)
        else:
            found.append([job])
    return found


def train_beside(jobs: Sequence[Job]) -> None:
    """Trains jobs side by side, each in a process with its share of the cores; failures are reported at the end of the job."""
    print(f"== training side by side: {', '.join(job.folder for job in jobs)}", flush=True)
    print(
        f"   their progress: {', '.join(str((job.scratch / 'log.jsonl').relative_to(HOME.parent)) for job in jobs)}", flush=True
    )
    for job in jobs:
        if job.before is not None:
            with suppress(Exception):  # reported when the job is finished
                job.before()  # here, so that two do not make the same
    share = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores() // len(jobs)))}
    command = [sys.executable, str(Path(sys.argv[0]).resolve()), "--train", "--only"]
    quiet = subprocess.DEVNULL
    at_work = [
        subprocess.Popen([*command, f"^{re.escape(job.folder)}$"], env=share, stdout=quiet, stderr=quiet) for job in jobs
    ]
    try:
        for process in at_work:
            process.wait()
    finally:
        for process in at_work:
            process.terminate()


def train_alone(jobs: Sequence[Job], wait_seconds: float = 60.0) -> int:
    """Trains jobs and measures none of them; those that make the model of another run to their end. Returns how many of these failed.

    A job whose model could not be made is left out.
    """
    makers, failed = {job.needs for job in jobs}, set[str]()
    for job in jobs:
        if job.needs and job.needs in failed:
            print(f"   {job.folder} is left out: {job.needs} makes its model, and has failed.", flush=True)
        elif job.folder in makers:
            failed |= set() if _finish(job, wait_seconds) else {job.folder}
        elif not (job.scratch / LEDGER).is_file():
            if job.before is not None:
                job.before()
            train_stages(job.recipe, job.scratch, cache=TEACHERS)
    return len(failed)


@show_log()
def main(jobs: Sequence[Job], draw: Callable[[], None], arguments: Sequence[str]) -> int:
    """The command line of a table."""
    prefer_environment()
    reader = argparse.ArgumentParser(description="Runs the recipes of a table and draws it; stop and start it at will.")
    reader.add_argument("--plan", action="store_true", help="only say what would run, and for how long")
    reader.add_argument("--draw", action="store_true", help="only draw the page from the rows that stand")
    reader.add_argument("--only", default="", help="a regular expression on the names of jobs")
    reader.add_argument("--beside", type=int, default=1, help="jobs that train at a time, each on its share of the cores")
    reader.add_argument("--wait", type=float, default=60.0, help="seconds that each job waits at most for a quiet machine")
    reader.add_argument("--train", action="store_true", help=argparse.SUPPRESS)  # train only: train_beside starts it
    chosen = reader.parse_args(arguments)
    named = {job.folder for job in jobs if re.search(chosen.only, job.folder)}
    some = _with_makers(jobs, named, {job.folder for job in jobs})
    if not chosen.draw:
        print(forecast(some), flush=True)
    if chosen.plan:
        return 0
    if chosen.train:
        return 1 if train_alone(due(some), chosen.wait) else 0
    if not (chosen.draw or LINK.exists()):
        RUNS.mkdir(exist_ok=True)
        LINK.unlink(missing_ok=True)  # a link of another environment
        LINK.symlink_to(encoder())
    failed = 0 if chosen.draw else sweep(some, chosen.beside, chosen.wait)
    draw()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit("this is what the tables share: run results/structured.py")
