"""Trains recipes side by side on the nodes of a Ray cluster, and measures them one at a time on nodes that are kept for it.

Where many rows have the same teacher's outputs to learn from, the nodes first compute these together (`teaching.py`): else one training
would compute them all, and the others wait for it.

Ray places the trainings, starts one anew if its worker or node dies, and moves no model: all nodes see the output folder under one path,
as Ray Train asks too. A training leaves its state there once a minute, and goes on from it on whichever node takes it over.

Training needs no quiet machine and measuring does. So trainings share nodes by processors and memory, while a measurement takes all
processors of a node that was started with the resource `measure`, and no two measurements run at once.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import slimformer
from slimformer.core.anatomy import Kind
from slimformer.data.tokenizer import max_length_of
from slimformer.errors import ExtraError, OutputError, ProcessError, SlimformerError, readable
from slimformer.families.base import anatomy_of
from slimformer.files import in_turn, write_text
from slimformer.log import Log
from slimformer.measuring.machine import cores
from slimformer.running.fresh import Fresh
from slimformer.running.reader import parse_recipe
from slimformer.running.recipe import Recipe
from slimformer.running.runner import run, train_stages
from slimformer.running.teaching import has_many_rows, shared_stage, teach_share
from slimformer.saving import checkpoint
from slimformer.saving.hub import local_folder
from slimformer.training.stage import Train
from slimformer.training.teacher import RowShare

LOCAL = "local"  # as an address: a cluster of this machine alone, which ends with the command
MEASURES = "measure"  # the resource of nodes where speed may be measured
RETRIES = 5  # a training is started anew so often if its worker or node dies
KNOCK_SECONDS = 10.0  # for the first node to answer at all
LOOK_SECONDS = 60.0  # for each node to say what it sees
WAIT_SECONDS = 1.0  # between two looks at what has ended

BASE_BYTES = 0.7e9  # Python, the libraries and the rows of a task
WEIGHT_BYTES = 16  # a trained weight: itself, its gradient, and two moments
TEACHER_BYTES = 4  # a teacher's weight
HIDDEN_FLOATS = 24  # for each hidden unit, token and layer: what one forward pass keeps for the backward pass
SPARE = 1.7  # methods keep scores, statistics of the matrices that they cut, and copies of batches


@dataclass(frozen=True)
class Job:
    """A recipe and the folder it runs in; `options`: those of `run` for the measurement."""

    recipe: Recipe
    folder: Path
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Ended:
    """How a job ended on a node: `why` is empty if all went well."""

    node: str = ""
    minutes: float = 0.0
    why: str = ""


class Cluster:
    """The nodes of a Ray cluster that is connected; `connected` gives one."""

    def __init__(self, nodes: Sequence[Mapping[str, Any]], log: Log) -> None:
        self._log = log
        self._nodes = {str(node["NodeID"]): node["Resources"] for node in nodes}

    @property
    def processors(self) -> int:
        """The processors of all nodes."""
        return int(sum(resources.get("CPU", 0) for resources in self._nodes.values()))

    @property
    def measures(self) -> bool:
        """Whether a node is kept for measurements."""
        return any(resources.get(MEASURES, 0) > 0 for resources in self._nodes.values())

    def told(self) -> str:
        """The cluster in a clause."""
        measuring = sum(resources.get(MEASURES, 0) > 0 for resources in self._nodes.values())
        who = f"{measuring} of them measure{'s' if measuring == 1 else ''}" if measuring else "this machine measures"
        return f"{_counted(len(self._nodes), 'node')} with {_counted(self.processors, 'processor')} ({who})"

    def check(self, folder: Path) -> None:
        """OutputError if a node does not see `folder`, or has another version of slimformer."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        mark = folder.resolve() / f".part-{uuid.uuid4().hex}"
        write_text(mark, "seen")
        try:
            looks = {
                node: _remote(_look, num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                    str(mark)
                )
                for node in self._nodes
            }
            facts = [fact for look in looks.values() if (fact := self._fault_of(look))]
        finally:
            mark.unlink(missing_ok=True)
        if facts:
            raise OutputError(
                "these nodes of the cluster cannot take part.",
                facts=facts,
                help="choose an --out on a file system that all nodes mount under one path; install one version everywhere.",
            )

    def _fault_of(self, look: Any) -> str:
        import ray

        try:
            host, version, sees = ray.get(look, timeout=LOOK_SECONDS)
        except (ray.exceptions.RayError, TimeoutError) as error:  # GetTimeoutError is both
            return f"a node does not answer: {readable(str(error).splitlines()[0])}"
        if version != slimformer.__version__:
            return f"{host} has slimformer {version}, this machine {slimformer.__version__}"
        return "" if sees else f"{host} does not see the folder"

    def carry_out(
        self, jobs: Mapping[str, Job], each: int | None = None, until: Callable[[], bool] | None = None
    ) -> dict[str, Ended]:
        """`teach`, `train`, and what trained well is measured if a node is kept for that; the minutes are those of the last two."""
        self.teach(jobs, each)
        ended = self.train(jobs, each, until)
        good = {name: jobs[name] for name, item in ended.items() if not item.why}
        measured = self.measure(good) if self.measures and good else {}
        return ended | {name: replace(item, minutes=item.minutes + ended[name].minutes) for name, item in measured.items()}

    def train(
        self, jobs: Mapping[str, Job], each: int | None = None, until: Callable[[], bool] | None = None
    ) -> dict[str, Ended]:
        """Trains all jobs side by side; no job begins once `until` holds, and those that did not are missing in the answer.

        `each`: processors for one training; by default all are shared out, as long as one node has so many.
        """
        count = min(each or max(1, self.processors // len(jobs)), self._widest())
        self._log.say(f"{_counted(len(jobs), 'training')} on {self.told()}, {_counted(count, 'processor')} for each.")

        def start(name: str) -> Any:
            needed, most = training_bytes(jobs[name].recipe), self._most_memory
            if needed > most:
                gigabytes = f"{needed / 2**30:.1f} GiB, and the largest node has {most / 2**30:.1f}"
                self._log.say(f"{name} needs about {gigabytes}: it runs alone there.")
            place = {"num_cpus": count, "memory": int(min(needed, most)), "max_retries": RETRIES}
            return _remote(_trained, **place).remote(*_sent(jobs[name]))

        return self._collected(list(jobs), start, "trained", max(1, self.processors // count), until)

    def teach(self, jobs: Mapping[str, Job], each: int | None = None) -> dict[str, Ended]:
        """Computes outputs of teachers in shares, one for each training that the cluster could run at once; a share that fails is left
        to the training that reads it.

        Trainings that differ in their seeds alone have the same outputs, unless rows are augmented.
        """
        count = min(each or 1, self._widest())
        shares = self.processors // count
        wanted: dict[str, tuple[Job, RowShare]] = {}
        seen = set[str]()  # recipes that were looked at
        for name, job in jobs.items() if shares > 1 else ():
            stage = shared_stage(job.recipe) if job.options.get("cache") else None
            if stage is None:
                continue
            alike = repr(job.recipe if stage.augment else replace(job.recipe, seed=0))
            if alike not in seen and has_many_rows(job.recipe, stage):
                wanted |= {
                    f"{name}, share {number + 1} of {shares}": (job, RowShare(number, shares)) for number in range(shares)
                }
            seen.add(alike)
        if not wanted:
            return {}
        self._log.say(
            f"outputs of {_counted(len(wanted) // shares, 'teacher')} in {_counted(shares, 'share')} on {self.told()}."
        )

        def start(name: str) -> Any:
            job, share = wanted[name]
            needed = int(min(training_bytes(job.recipe), self._most_memory))
            place = {"num_cpus": count, "memory": needed, "max_retries": RETRIES}
            return _remote(_taught, **place).remote(*_sent(job), share.number, share.count)

        return self._collected(list(wanted), start, "computed", shares, None)

    def _widest(self) -> int:
        """The most processors of a node; ProcessError if there is none."""
        widest = max((int(resources.get("CPU", 0)) for resources in self._nodes.values()), default=0)
        if widest < 1:
            raise ProcessError("no node of the cluster has a processor for trainings.", help="start nodes with --num-cpus.")
        return widest

    @property
    def _most_memory(self) -> float:
        """Bytes of the largest node."""
        return max(float(resources.get("memory", 0)) for resources in self._nodes.values())

    def measure(self, jobs: Mapping[str, Job]) -> dict[str, Ended]:
        """Runs what is left of each job on a node that is kept for measurements, one after another."""
        processors = min(int(r.get("CPU", 0)) for r in self._nodes.values() if r.get(MEASURES, 0) > 0)
        place = {"num_cpus": processors, "resources": {MEASURES: 1}, "max_retries": RETRIES}

        def start(name: str) -> Any:
            return _remote(_measured, **place).remote(*_sent(jobs[name]), dict(jobs[name].options))

        return self._collected(list(jobs), start, "measured", 1, lambda: False)

    def _collected(
        self, names: list[str], start: Callable[[str], Any], word: str, at_once: int, until: Callable[[], bool] | None
    ) -> dict[str, Ended]:
        """The answers of tasks as they end, each with a line. With `until`, at most `at_once` are begun and have not ended."""
        import ray

        running: dict[Any, str] = {}
        found: dict[str, Ended] = {}
        begin, total = time.monotonic(), len(names)
        while names or running:
            while names and (until is None or (len(running) < at_once and not until())):
                name = names.pop(0)
                running[start(name)] = name
            if not running:
                break  # `until` holds
            ready, _ = ray.wait(list(running), num_returns=1, timeout=WAIT_SECONDS)
            for task in ready:
                name = running.pop(task)
                found[name] = ended = _answer(task)
                to_go, took = total - len(found), (time.monotonic() - begin) / 60
                left = f"; {to_go} to go, about {took / len(found) * to_go:.0f} min" if to_go else ""
                self._log.say(f"{name}: {ended.why or f'{word} on {ended.node} in {ended.minutes:.1f} min'}{left}.")
        return found


@contextmanager
def connected(address: str, log: Log) -> Iterator[Cluster]:
    """The Ray cluster at an address ("auto", "host:6379", "ray://host:10001"), or one of this machine alone ("local").

    ExtraError without Ray; ProcessError if no cluster answers there.
    """
    if find_spec("ray") is None:
        raise ExtraError("--ray needs Ray, which is not installed.", help="pip install 'slimformer[ray]' on every node")
    import ray

    options: dict[str, Any] = {"num_cpus": cores(), "include_dashboard": False} if address == LOCAL else {}
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        if port.isdigit():  # Ray itself waits for most of a minute
            socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="slimformer", **options)
    except (ray.exceptions.RayError, ConnectionError, ValueError, RuntimeError, OSError, OverflowError) as error:
        raise ProcessError(
            f"no Ray cluster answers at '{address}'.",
            facts=[f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"],
            help="start one (`ray start --head` on the first machine), or say --ray local for this machine alone.",
        ) from None
    try:
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        yield Cluster([node for node in nodes if node["Alive"]], log)
    finally:
        ray.shutdown()  # tasks that still run end with it


def training_bytes(recipe: Recipe) -> float:
    """About how much memory the trainings of a recipe take at most, in bytes, counted from shapes alone.

    Weights, gradients and moments, the teacher's weights, and what a forward pass over the longest batch keeps: for each layer and token
    some floats a hidden unit and neuron, and the attention scores of each head.
    """
    if isinstance(recipe.model, Fresh):
        model = checkpoint.skeleton(local_folder(str(recipe.teacher)), recipe.task.auto_class) if recipe.teacher else None
    else:
        model = checkpoint.skeleton(local_folder(recipe.model), recipe.task.auto_class)
    if model is None:  # trained from scratch, by the numbers of its config
        return 2 * BASE_BYTES
    anatomy = anatomy_of(model)
    weights = sum(parameter.numel() for parameter in model.parameters())
    longest = min(
        getattr(recipe.task, "max_length", None) or 512, max_length_of(local_folder(str(recipe.teacher or recipe.model)))
    )
    sizes = [stage.batch_size for stage in recipe.stages if isinstance(stage, Train)]
    tokens = max(sizes, default=32) * longest
    kept = 0.0
    for site in anatomy.of_kind(Kind.NEURONS):
        kept += tokens * (HIDDEN_FLOATS * anatomy.hidden_size + 3 * site.size)
    for site in anatomy.of_kind(Kind.HEADS):
        kept += 2 * tokens * longest * site.size
    return BASE_BYTES + SPARE * ((WEIGHT_BYTES + TEACHER_BYTES) * weights + 4 * kept)


# -- What runs on a node -------------------------------------------------------------------------------------------------------


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _remote(work: Callable[..., Any], **place: Any) -> Any:
    import ray

    return ray.remote(**place)(work)


def _sent(job: Job) -> tuple[dict[str, Any], str, str | None]:
    """A job as plain data; its paths are relative to its folder, which is absolute."""
    folder, cache = job.folder.resolve(), job.options.get("cache")
    return job.recipe.seen_from(folder).to_data(), str(folder), None if cache is None else str(Path(cache).resolve())


def _look(mark: str) -> tuple[str, str, bool]:
    return platform.node(), slimformer.__version__, os.path.exists(mark)


def _trained(data: dict[str, Any], folder: str, cache: str | None) -> Ended:
    """Trains a recipe; a worker that was here before may still be ending, and has its turn first."""
    return _done(lambda recipe: train_stages(recipe, folder, wait_seconds=0.0, cache=cache), data, folder)


def _taught(data: dict[str, Any], folder: str, cache: str, number: int, count: int) -> Ended:
    """Computes a share of what the training of a recipe will read."""
    quiet = Log(None, quiet=True)
    return _done(lambda recipe: teach_share(recipe, RowShare(number, count), Path(cache), quiet), data, folder)


def _measured(data: dict[str, Any], folder: str, cache: str | None, options: dict[str, Any]) -> Ended:
    return _done(lambda recipe: run(recipe, folder, **options | {"cache": cache}), data, folder)


def _done(work: Callable[[Recipe], Any], data: dict[str, Any], folder: str) -> Ended:
    begin = time.monotonic()
    try:
        with in_turn(Path(folder), lambda: None):
            pass
        work(parse_recipe(data, base=Path(folder)))
    except SlimformerError as error:
        return Ended(platform.node(), (time.monotonic() - begin) / 60, str(error).splitlines()[0])
    return Ended(platform.node(), (time.monotonic() - begin) / 60)


def _answer(task: Any) -> Ended:
    """What a task says; one that could not end says why."""
    import ray

    try:
        ended: Ended = ray.get(task)
    except ray.exceptions.RayTaskError as error:  # a mistake of ours: its traceback says where
        with suppress(AttributeError):
            return Ended(why=readable(f"{type(error.cause).__name__}: {error.cause}"))
        return Ended(why=readable(str(error).strip().splitlines()[-1]))
    except ray.exceptions.RayError as error:
        return Ended(why=readable(f"its node or worker died {RETRIES + 1} times: {str(error).strip().splitlines()[0]}"))
    return ended
