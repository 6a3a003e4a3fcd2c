"""Kills runs at random, fills their disks, takes network and home away, and counts what was lost.

    python benchmarks/gauntlet.py                # 200 kills, 50 full disks: some hours
    python benchmarks/gauntlet.py --short        # 20 kills, 5 full disks: about ten minutes on two quiet cores
    python benchmarks/gauntlet.py --only network --only clock

Each trial begins a command on a tiny model in a folder of its own, does something to it, and gives the same command again until it
ends. Then these must hold: it ended with 0; what the folder showed at any time was a whole result or none; a `run` has the weights
and the scores of one that nothing happened to, bit by bit (`compress` and `frontier` have minutes, so they may train for more or
fewer steps); once more the same command ends with 0 and changes nothing; nothing was left in the home and among temporary files; other
files on the disk are as they were; and no process looked up a name in a pickle, which an audit hook watches. Full disks, a read-only
home and no network need Linux and `unshare`, and are left out with a word where that is not allowed. --out adds a row for each kind of
trial to a ledger, from which docs/reliability.md is drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

MOST_KILLS = 4  # of one trial, before it may end
PATIENCE = 1200.0  # seconds that a command may take on a machine that does other work too
SMALLEST, LARGEST = 0.1, 0.95  # a full disk holds this share of what a run writes
HIDDEN = {"log.jsonl", "work"}  # what a folder shows, beside dot files, before it has a result
HOOK = """
import os, sys, time
if os.environ.get("GAUNTLET_PICKLES"):
    def _watch(event, arguments):
        if event == "pickle.find_class":
            with open(os.environ["GAUNTLET_PICKLES"], "a") as file:
                file.write(f"{os.getpid()} {arguments[0]}.{arguments[1]}\\n")
    sys.addaudithook(_watch)
if os.environ.get("GAUNTLET_CLOCK"):
    _clock, _begun, _random = time.time, time.time(), __import__("random").Random(0)
    time.time = lambda: _clock() + (0 if _clock() - _begun < 1 else _random.choice((-7200.0, 0.0, 86400.0)))
"""
RECIPE = """
model: model
task: {use: classification, data: data}
stages:
  - train: {epochs: 3, lr: 1.0e-3}
  - calibrate: {method: {use: fisher, keep: 0.7}}
  - train: {epochs: 4, lr: 1.0e-3, task_weight: 0.1, methods: [{use: distillation}]}
  - export: {choose_within: 100.0}
  - bench: {seconds: 1, rivals: [teacher-int8]}
"""


@dataclass(frozen=True)
class Course:
    """A command that ends in a folder; `exact` if two runs of it have the same numbers."""

    name: str
    words: tuple[str, ...]
    exact: bool = False

    def command(self, out: Path) -> list[str]:
        return [sys.executable, "-m", "slimformer", *self.words, "--out", str(out)]


COURSES = (
    Course("run", ("run", "recipe.yaml", "--wait", "0"), exact=True),
    Course(
        "compress",
        ("compress", "model", "--data", "data", "--minutes", "3", "--max-loss", "20", "--speedup", "1.2", "--wait", "0"),
    ),
    Course("frontier", ("frontier", "model", "--data", "data", "--minutes", "4", "--speedups", "1.2,1.5", "--wait", "0")),
)


@dataclass
class Ground:
    """A folder with a model, data and a recipe, in which commands are tried."""

    home: Path
    faults: list[str] = field(default_factory=list)
    straight: dict[str, tuple[float, Any]] = field(default_factory=dict)  # CPU seconds and numbers of what nothing happened to

    @property
    def environment(self) -> dict[str, str]:
        given = {
            "TMPDIR": self.home / "tmp",
            "XDG_CACHE_HOME": self.home / "cache",
            "GAUNTLET_PICKLES": self.home / "pickles.txt",
        }
        paths = (str(self.home / "hook"), os.environ.get("PYTHONPATH", ""))
        return {
            **os.environ,
            **{name: str(path) for name, path in given.items()},
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }

    def prepare(self) -> None:
        from tiny_folder import write_data, write_model

        write_data(self.home / "data")
        write_model(self.home / "model")
        (self.home / "recipe.yaml").write_text(RECIPE)
        for name in ("tmp", "cache", "hook", "out", "user"):
            (self.home / name).mkdir()
        (self.home / "hook" / "sitecustomize.py").write_text(HOOK)

    def start(self, command: Sequence[str], **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.home,
            env=self.environment | more,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, command: Sequence[str], **more: str) -> tuple[int, str]:
        """The exit status of a command and what it said; a hang is a fault."""
        process = self.start(command, **more)
        try:
            said, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.faults.append(f"{shlex.join(command)} did not end in {PATIENCE:g} s")
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
        return process.returncode, said

    def check(self, holds: bool, what: str, said: str = "") -> None:
        if not holds:
            self.faults.append(f"{what}\n{said[-2000:]}".rstrip())

    def unpickled(self) -> list[str]:
        """The names that were looked up in pickles since this was last asked."""
        file = self.home / "pickles.txt"
        found = [line.partition(" ")[2] for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
        file.unlink(missing_ok=True)
        return found

    def check_end(self, course: Course, out: Path, where: str, status: int, said: str) -> None:
        """What must hold once the command has ended; the folder is removed if it does."""
        before = len(self.faults)
        self.check(status == 0, f"{where}: ended with {status}", said)
        if status == 0:
            self.check(is_whole(out), f"{where}: the result is not whole: {sorted(visible(out))}")
            if course.exact and not taught_live(out):
                self.check(numbers_of(out) == self.straight[course.name][1], f"{where}: other numbers than without it")
            stamps = stamps_of(out)
            status, said = self.finish(course.command(out))
            self.check(status == 0, f"{where}: the same command on the finished folder ended with {status}", said)
            self.check(stamps_of(out) == stamps, f"{where}: the same command changed the finished folder")
        self.check(
            not any((self.home / "tmp").iterdir()), f"{where}: left {os.listdir(self.home / 'tmp')} among temporary files"
        )
        if len(self.faults) == before:
            shutil.rmtree(out, ignore_errors=True)
        for item in (self.home / "tmp").iterdir():
            shutil.rmtree(item, ignore_errors=True)

    def walk(self, course: Course) -> None:
        """The command with nothing in its way."""
        out = self.home / "out" / f"straight-{course.name}"
        begin = resource.getrusage(resource.RUSAGE_CHILDREN)
        status, said = self.finish(course.command(out))
        if status:
            sys.exit(f"{course.name} does not even end without trouble:\n{said[-3000:]}")
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.straight[course.name] = (end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime, numbers_of(out))
        self.unpickled()


def outlasts(process: subprocess.Popen[str], seconds: float) -> bool:
    """Waits until a process has used so many seconds of CPU time, which a busy machine does not change; False if it ended before."""
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            times = psutil.Process(process.pid).cpu_times()
            if times.user + times.system + times.children_user + times.children_system >= seconds:
                return True
        time.sleep(0.05)
    return False


# ---- what a folder holds


def visible(out: Path) -> set[str]:
    return {item.name for item in out.iterdir() if not item.name.startswith(".")} if out.is_dir() else set()


def is_whole(out: Path) -> bool:
    """Whether a folder has a result whose files can all be opened: that of one model, or those of a family."""
    import onnxruntime

    from slimformer.reporting.ledger import read_records

    models = list((out / "points").iterdir()) if (out / "points").is_dir() else [out]
    for model in models:
        files = [
            file for file in model.rglob("*.onnx") if file.name != "model_slim.onnx"
        ]  # that one needs the compiled kernels
        if not files or not (model / "README.md").is_file():
            return False
        for file in files:
            onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return bool(models and (out / "report.html").is_file() and read_records([out / "ledger.jsonl"]))


def numbers_of(out: Path) -> Any:
    """The digest of the weights, and the scores of each row."""
    from hashlib import sha256

    from slimformer.reporting.ledger import read_records

    weights = {str(file.relative_to(out)): sha256(file.read_bytes()).hexdigest() for file in out.rglob("model.safetensors")}
    return weights, {record.name: record.scores for record in read_records([out / "ledger.jsonl"])}


def taught_live(out: Path) -> bool:
    """Whether the disk had no room for the teacher's outputs, so that these were computed beside the student, unrounded."""
    events = (json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [event["teacher_seconds"] for event in events if event["kind"] == "trained"][-1] == 0


def stamps_of(folder: Path) -> Mapping[str, tuple[int, int]]:
    """Size and time of each file that a person sees; the log may say one line more."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "log.jsonl" and "/." not in str(file))
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


# ---- what is done to a command


def kill(ground: Ground, course: Course, number: int, draw: random.Random) -> int:
    """Kills a command once or more, then lets it end; returns how often it was killed."""
    out, where = ground.home / "out" / f"kill-{course.name}-{number}", f"kill -9, {course.name} {number}"
    killed, wanted = 0, draw.randint(1, MOST_KILLS)
    left = ground.straight[course.name][0]
    while killed < wanted:
        process = ground.start(course.command(out))
        delay = draw.uniform(0.0, left)
        if outlasts(process, delay):
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            killed += 1
            shown = visible(out)
            ground.check(shown <= HIDDEN or is_whole(out), f"{where}: half a result after {delay:.1f} s: {sorted(shown)}")
            continue
        said, _ = process.communicate()
        if process.returncode != 0:
            ground.check(False, f"{where}: ended with {process.returncode} after {killed} kills", said)
        break
    status, said = ground.finish(course.command(out))
    ground.check_end(course, out, where, status, said)
    shutil.rmtree(ground.home / "tmp", ignore_errors=True)  # a killed process cannot clear up behind itself
    (ground.home / "tmp").mkdir()
    return killed


def fill(ground: Ground, course: Course, number: int, draw: random.Random) -> int:
    """Lets the disk of a command run full, makes it larger, and gives the command again; returns 1 if it ran full."""
    where, disk = f"full disk, {course.name} {number}", ground.home / f"disk-{number}"
    disk.mkdir()
    need = sum(file.stat().st_size for file in (ground.home / "out" / f"straight-{course.name}").rglob("*") if file.is_file())
    size = int(need * draw.uniform(SMALLEST, LARGEST)) // 4096 * 4096 + 65536
    out, kept = disk / "out", ground.home / "out" / f"disk-{course.name}-{number}"
    command = shlex.join(course.command(out))
    status, said = ground.finish(
        [
            *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c"),
            f"mount -t tmpfs -o size={size} none {disk} && echo kept > {disk}/other.txt || exit 99\n"
            f"{command}; echo first-status=$?\n"
            f"ls -A {out} 2>/dev/null | tr '\\n' ' ' | sed 's/^/shown=/'; echo\n"
            f"mount -o remount,size=4g {disk} || exit 98\n"
            f"{command}; status=$?\n"
            f"grep -q kept {disk}/other.txt || exit 97\n"
            f"cp -a {out} {kept}; exit $status",
        ]
    )
    first = next((line.partition("=")[2] for line in said.splitlines() if line.startswith("first-status=")), "?")
    shown = next((set(line.partition("=")[2].split()) for line in said.splitlines() if line.startswith("shown=")), set())
    ground.check(first in ("0", "2"), f"{where} of {size:,} bytes: the command ended with {first}", said)
    if first == "2":
        ground.check("the disk is full" in said, f"{where} of {size:,} bytes: the cause is not told", said)
        seen = {name for name in shown if not name.startswith(".")}
        ground.check(seen <= HIDDEN, f"{where}: half a result: {sorted(seen)}", said)
    ground.check("Traceback" not in said, f"{where}: a traceback", said)
    ground.check_end(course, kept, where, status, said)
    disk.rmdir()
    return int(first == "2")


def twice(ground: Ground, course: Course, number: int, draw: random.Random) -> int:
    """Two commands at one folder: one ends well, the other says why it does not begin, or comes to the same."""
    out, where = ground.home / "out" / f"twice-{course.name}-{number}", f"two at once, {course.name} {number}"
    first = ground.start(course.command(out))
    outlasts(first, draw.uniform(0.0, ground.straight[course.name][0] / 2))
    status, said = ground.finish(course.command(out))
    whole, _ = first.communicate(timeout=PATIENCE)
    ended = sorted((first.returncode, status))
    ground.check(ended in ([0, 0], [0, 2]), f"{where}: ended with {ended}", said + whole)
    ground.check("Traceback" not in said + whole, f"{where}: a traceback", said + whole)
    ground.check_end(course, out, where, min(ended), said + whole)
    return 1


def beside(ground: Ground, course: Course, number: int, draw: random.Random) -> int:
    """Two commands with one cache, each in a folder of its own, one of them killed."""
    where, cache = f"one cache, {course.name} {number}", ground.home / f"shared-{number}"
    outs = [ground.home / "out" / f"beside-{course.name}-{number}-{name}" for name in ("a", "b")]
    commands = [[*course.command(out), "--cache", str(cache)] for out in outs]
    first = ground.start(commands[0])
    second = ground.start(commands[1])
    if outlasts(first, draw.uniform(0.0, ground.straight[course.name][0])):
        os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    said, _ = second.communicate(timeout=PATIENCE)
    ground.check(second.returncode == 0, f"{where}: the other one ended with {second.returncode}", said)
    if second.returncode == 0 and course.exact:
        ground.check(numbers_of(outs[1]) == ground.straight[course.name][1], f"{where}: other numbers")
    status, said = ground.finish(commands[0])
    ground.check(status == 0, f"{where}: ended with {status}", said)
    if status == 0 and course.exact:
        ground.check(numbers_of(outs[0]) == ground.straight[course.name][1], f"{where}: other numbers")
    shutil.rmtree(cache, ignore_errors=True)
    return 1


def offline(ground: Ground, course: Course, number: int, _: random.Random) -> int:
    """A name space without any network."""
    out = ground.home / "out" / f"network-{course.name}-{number}"
    status, said = ground.finish(["unshare", "--user", "--map-root-user", "--net", *course.command(out)])
    ground.check_end(course, out, f"no network, {course.name} {number}", status, said)
    return 1


def closed(ground: Ground, course: Course, number: int, _: random.Random) -> int:
    """A home, with the model and the data in it, and a cache, that nobody may write to."""
    out, shut = ground.home / "out" / f"home-{course.name}-{number}", ground.home / f"home-{number}"
    shut.mkdir()
    words = [word if word not in ("model", "data", "recipe.yaml") else str(ground.home / word) for word in course.command(out)]
    inside = f"mount -t tmpfs -o ro none {shut} && mount -o bind,ro {ground.home}/model {ground.home}/model && exec {shlex.join(words)}"
    status, said = ground.finish(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside],
        HOME=str(shut),
        XDG_CACHE_HOME=str(shut / "cache"),
    )
    ground.check_end(course, out, f"read-only home, {course.name} {number}", status, said)
    shut.rmdir()
    return 1


def clock(ground: Ground, course: Course, number: int, _: random.Random) -> int:
    """A clock that jumps by hours, back and forth, at each look."""
    out = ground.home / "out" / f"clock-{course.name}-{number}"
    status, said = ground.finish(course.command(out), GAUNTLET_CLOCK="1")
    ground.check_end(course, out, f"clock, {course.name} {number}", status, said)
    return 1


@dataclass(frozen=True)
class Ordeal:
    """Something that is done to commands: how often for each course, at length and in short."""

    name: str
    do: Callable[[Ground, Course, int, random.Random], int]
    long: Mapping[str, int]
    short: Mapping[str, int]
    needs_unshare: bool = False


ORDEALS = (
    Ordeal("kill", kill, {"run": 130, "compress": 50, "frontier": 20}, {"run": 14, "compress": 6, "frontier": 0}),
    Ordeal("disk", fill, {"run": 40, "compress": 8, "frontier": 2}, {"run": 5, "compress": 0, "frontier": 0}, True),
    Ordeal("twice", twice, {"run": 4, "compress": 2, "frontier": 1}, {"run": 1}),
    Ordeal("cache", beside, {"run": 4}, {"run": 1}),
    Ordeal("network", offline, {"run": 1, "compress": 1, "frontier": 1}, {"run": 1}, True),
    Ordeal("home", closed, {"run": 1, "compress": 1, "frontier": 1}, {"run": 1}, True),
    Ordeal("clock", clock, {"run": 2, "compress": 2, "frontier": 1}, {"run": 1}),
)


def can_unshare() -> bool:
    """Whether this machine lets a process have a disk and a network of its own."""
    trial = ["unshare", "--user", "--map-root-user", "--mount", "--net", "sh", "-c", "mount -t tmpfs none /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(trial, capture_output=True, check=False).returncode == 0


def gauntlet(
    ground: Ground, ordeals: Sequence[Ordeal], courses: Sequence[Course], short: bool, seed: int
) -> Iterator[dict[str, Any]]:
    """A row for each ordeal and course, as soon as it is done: how often something was done, and what was amiss."""
    for ordeal in ordeals:
        for course in courses:
            wanted = (ordeal.short if short else ordeal.long).get(course.name, 0)
            if not wanted:
                continue
            if course.name not in ground.straight:
                ground.walk(course)
                print(f"{course.name}: {ground.straight[course.name][0]:.0f} s of CPU time with nothing in its way", flush=True)
            draw = random.Random(f"{seed} {ordeal.name} {course.name}")
            before, done, trials, begin = len(ground.faults), 0, 0, time.monotonic()
            while done < wanted and trials < 3 * wanted:
                done += ordeal.do(ground, course, trials, draw)
                trials += 1
                left = (time.monotonic() - begin) / trials * (wanted - done) / max(done / trials, 0.3) / 60
                print(
                    f"{ordeal.name}, {course.name}: {done} of {wanted}, {len(ground.faults)} faults, {left:.0f} min left",
                    flush=True,
                )
            faults, names = ground.faults[before:], ground.unpickled()
            counts = {"times": done, "trials": trials, "faults": len(faults), "pickles": len(names)}
            minutes = round((time.monotonic() - begin) / 60, 1)
            faults += [f"a pickle named {name}" for name in sorted({*names})]
            for fault in faults:
                print(f"FAULT {fault}\n", flush=True)
            yield {"ordeal": ordeal.name, "course": course.name, **counts, "minutes": minutes}


def main() -> int:
    import slimformer

    reader = argparse.ArgumentParser(description="Kills runs, fills disks, and counts what was lost.")
    reader.add_argument("--short", action="store_true", help="about ten minutes")
    reader.add_argument("--only", action="append", choices=[ordeal.name for ordeal in ORDEALS], help="these alone")
    reader.add_argument("--course", action="append", choices=[course.name for course in COURSES], help="these commands alone")
    reader.add_argument("--seed", type=int, default=0)
    reader.add_argument("--out", type=Path, help="a ledger for the rows")
    chosen = reader.parse_args()
    some = [ordeal for ordeal in ORDEALS if not chosen.only or ordeal.name in chosen.only]
    if not can_unshare():
        left_out = [ordeal.name for ordeal in some if ordeal.needs_unshare]
        some = [ordeal for ordeal in some if not ordeal.needs_unshare]
        print(f"left out, because unshare is not allowed here: {', '.join(left_out)}" if left_out else "", flush=True)
    home = Path(tempfile.mkdtemp(prefix="gauntlet-"))
    ground = Ground(home)
    ground.prepare()
    courses = [course for course in COURSES if not chosen.course or course.name in chosen.course]
    facts = {"seed": chosen.seed, "version": slimformer.__version__, "date": time.strftime("%Y-%m-%d")}
    rows = []
    for row in gauntlet(ground, some, courses, chosen.short, chosen.seed):
        rows.append(row)
        if chosen.out is not None:
            with chosen.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | facts) + "\n")
    for row in rows:
        print(f"{row['ordeal']:8} {row['course']:9} {row['times']:4} times, {row['faults']} faults, {row['minutes']} minutes")
    amiss = sum(row["faults"] + row["pickles"] for row in rows)
    if not amiss:
        shutil.rmtree(home)
        return 0
    print(f"{amiss} faults; the folders are in {home}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
