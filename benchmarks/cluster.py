"""What a second node of a Ray cluster gives, and what the death of one costs: trainings in an hour, and whether any number changes.

    python benchmarks/cluster.py --out results/reliability/cluster.jsonl    # some ten minutes on two quiet cores

The nodes are processes of this machine, each with a core of its own, so they share memory and caches, and no network lies between them.
Each training distils a cut MiniLM on the built-in sentences for some steps, on one thread; seeds differ. It is done on one node, on two,
and on two of which one is killed when its first training is half done. The weights that come out are compared bit by bit. Needs the
extras `demo` and `ray`, and Linux.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from slimformer import __version__
from slimformer.demo import encoder
from slimformer.log import Log, show_log
from slimformer.methods.distillation import Distillation
from slimformer.methods.fisher import Fisher
from slimformer.running.cluster import Job, connected
from slimformer.running.recipe import Recipe
from slimformer.running.runner import train_stages
from slimformer.tasks.intents import Intents
from slimformer.training.stage import Calibrate, Train

TRAININGS = 4
STORE_BYTES = 80 * 2**20
HALF = 0.5


def recipe(steps: int, seed: int, teacher: str) -> Recipe:
    """A cut and its distillation."""
    stages = (
        Calibrate(Fisher(keep=0.5, cost="macs", examples=32, damage_examples=8, repair_tokens=1000)),
        Train(methods=(Distillation(),), steps=steps, lr=3e-4, task_weight=0.1),
    )
    return Recipe(teacher, Intents(examples=1200, dev=200), stages, seed=seed)


class Nodes:
    """Ray nodes on this machine, each on a core of its own."""

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < count:
            raise SystemExit(f"this needs {count} cores, and there are {len(cores)}.")
        head = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        self._nodes: list[Any] = [self._cluster.head_node]
        self._nodes += [self._cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES) for _ in range(count - 1)]
        for node, core in zip(self._nodes, cores, strict=False):
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            for process in (raylet, *raylet.children(recursive=True)):
                with suppress(psutil.Error):
                    process.cpu_affinity([core])  # workers inherit it

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def kill_last(self) -> None:
        self._cluster.remove_node(self._nodes[-1], allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


def timed(
    count: int, steps: int, teacher: str, home: Path, log: Log, kill: Callable[[Nodes], None] | None = None
) -> tuple[float, list[str]]:
    """Minutes from the first training to the last, and the digest of the weights that each left."""
    nodes = Nodes(count)
    jobs = {f"seed-{seed}": Job(recipe(steps, seed, teacher), home / f"seed-{seed}", {}) for seed in range(TRAININGS)}
    try:
        with connected(nodes.address, log) as cluster:
            home.mkdir()
            if kill is not None:
                threading.Thread(target=kill, args=(nodes,), daemon=True).start()
            begin = time.perf_counter()
            ended = cluster.train(jobs, 1)
            minutes = (time.perf_counter() - begin) / 60
    finally:
        nodes.close()
    assert not any(item.why for item in ended.values()), [item.why for item in ended.values()]
    return minutes, [digest(job.folder) for job in jobs.values()]


def digest(folder: Path) -> str:
    """Names the weights that the last stage of a run left."""
    return hashlib.sha256(weights_of(folder).read_bytes()).hexdigest()[:16]


def weights_of(folder: Path) -> Path:
    """The weights that were written last."""
    return max((folder / "work").rglob("made/**/model.safetensors"), key=lambda found: found.stat().st_mtime)


def main() -> None:
    """Measures all three, and adds their rows to --out."""
    parser = argparse.ArgumentParser(description="What a second node of a Ray cluster gives.")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    log, teacher = Log(None), str(encoder())
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="cluster-") as place, show_log():
        home = Path(place)
        tuned = home / "tuned"
        train_stages(Recipe(teacher, Intents(examples=1200, dev=200), (Train(epochs=1.0, lr=3e-4),)), tuned, wait_seconds=0.0)
        teacher = str(weights_of(tuned).parent)
        one, alone = timed(1, given.steps, teacher, home / "one", log)
        two, both = timed(2, given.steps, teacher, home / "two", log)
        share = HALF * two / (TRAININGS / 2) * 60

        def kill(nodes: Nodes) -> None:
            time.sleep(share)
            nodes.kill_last()

        hurt, survived = timed(2, given.steps, teacher, home / "killed", log, kill)
        for nodes, killed, minutes, weights in ((1, 0, one, alone), (2, 0, two, both), (2, 1, hurt, survived)):
            rows.append(
                {
                    "nodes": nodes,
                    "killed": killed,
                    "trainings": TRAININGS,
                    "minutes": round(minutes, 2),
                    "per_hour": round(60 * TRAININGS / minutes, 1),
                    "same_weights": sum(ours == theirs for ours, theirs in zip(weights, alone, strict=True)),
                    "steps": given.steps,
                    "version": __version__,
                    "date": datetime.now(UTC).date().isoformat(),
                }
            )
            print(rows[-1])
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
