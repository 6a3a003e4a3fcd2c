"""Two processes at one run: the numbers of one process, one voice, and nothing lost if one of them is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny_folder import write_data, write_model

from slimformer.core.plan import Plan
from slimformer.training.devices import share_of
from slimformer.training.launching import wanted_processes

RECIPE = """
model: model
task: {use: classification, data: data}
stages:
  - train: {methods: [{use: gates, keep: 0.9}], steps: 6, batch_size: 11, lr: 0.001, dropout: false, precision: fp32}
  - train: {methods: [{use: distillation, scores: 1}], steps: 6, batch_size: 16, lr: 0.001, dropout: false, precision: fp32}
  - train: {methods: [quantization], steps: 6, batch_size: 16, lr: 0.001, dropout: false, precision: fp32}
"""
SCRIPT = """
import sys
from slimformer import read_recipe
from slimformer.log import show_log
from slimformer.running.runner import train_stages
from slimformer.training import loop
loop.STATE_SECONDS = 0.0
with show_log():
    train_stages(read_recipe("recipe.yaml"), sys.argv[1], wait_seconds=0)
print("returned")
"""
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    write_data(tmp_path / "data", train=80, dev=8)
    (tmp_path / "recipe.yaml").write_text(textwrap.dedent(RECIPE), encoding="utf-8")
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    return tmp_path


def call(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def made(out: Path, stage: int) -> Path:
    return next((out / "work").glob(f"{stage}-*/made"))


def losses(out: Path) -> list[list[float]]:
    events = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [event["losses"] for event in events if event["kind"] == "trained"]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_shares_of_a_batch_hold_each_row_once_and_weigh_as_one(count: int, world: int) -> None:
    lengths = torch.randint(3, 60, (100,), generator=torch.Generator().manual_seed(count)).tolist()
    rows = list(range(40, 40 + count))
    shares = [share_of(rows, lengths, rank, world) for rank in range(world)]
    assert sorted(row for mine, weight in shares if weight for row in mine) == rows
    assert all(mine for mine, _ in shares)
    assert sum(weight for _, weight in shares) == pytest.approx(world)
    mean = sum(weight * sum(lengths[row] for row in mine) / len(mine) for mine, weight in shares) / world
    assert mean == pytest.approx(sum(lengths[row] for row in rows) / count)  # a mean over rows is the same
    assert share_of(rows, lengths, 0, 1) == (rows, 1.0)
    if count == 32:
        tokens = [sum(lengths[row] for row in mine) for mine, _ in shares]
        assert max(tokens) - min(tokens) < 2 * 60  # less than two rows


@pytest.mark.parametrize(
    ("command", "count"),
    [
        (["python", "accelerate", "launch", "--num_processes", "2", "--cpu", "-m", "slimformer", "run"], 2),
        (["accelerate", "launch", "--num-processes=4", "--cpu", "-m", "slimformer"], 4),
        (["accelerate", "launch", "--cpu", "-m", "slimformer"], 1),
        (["accelerate", "launch", "--num_processes"], 1),
        ([], 1),
    ],
)
def test_the_processes_that_accelerate_was_asked_for(command: list[str], count: int) -> None:
    assert wanted_processes(command) == count


@pytest.mark.slow
def test_two_processes_run_a_recipe_as_one(tmp_path: Path) -> None:
    """Rows weigh the same, so gates end where one process does; means over tokens and rounded numbers come close."""
    home = folder(tmp_path)
    alone = call([sys.executable, "train.py", "one"], home)
    both = call([*LAUNCHER, "train.py", "two"], home)
    assert both.count("returned") == 2
    assert both.count("examples to train on") == alone.count("examples to train on") == 1
    for one, two, near in zip(losses(home / "one"), losses(home / "two"), (1e-5, 0.01, 0.05), strict=True):
        assert two == pytest.approx(one, rel=near)
    for stage, near in ((1, 1e-5), (2, 0.01), (3, 0.02)):
        one, two = (made(home / name, stage) for name in ("one", "two"))
        assert Plan.from_json((one / "plan.json").read_text()) == Plan.from_json((two / "plan.json").read_text())
        left, right = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
        for name, tensor in left.items():
            if not name.endswith("key.bias"):  # softmax is blind to it: its gradient is rounding, which Adam blows up
                torch.testing.assert_close(right[name], tensor, atol=near, rtol=0)


@pytest.mark.slow
def test_a_killed_helper_ends_the_run_and_one_process_goes_on(tmp_path: Path) -> None:
    home = folder(tmp_path)
    text = (home / "recipe.yaml").read_text(encoding="utf-8").replace("steps: 6, batch_size: 16", "steps: 400, batch_size: 16")
    (home / "recipe.yaml").write_text(text.partition("  - train: {methods: [quantization]")[0], encoding="utf-8")
    command = [*LAUNCHER, "train.py", "out"]
    launcher = subprocess.Popen(command, cwd=home, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not list((home / "out" / "work").glob("2-*/state/step-*/state.json")) and time.monotonic() < end:
        time.sleep(0.05)
    workers = [child for child in psutil.Process(launcher.pid).children() if "train.py" in child.cmdline()]
    workers[1].send_signal(signal.SIGKILL)
    launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    said = call([sys.executable, "train.py", "out"], home)
    assert "stage 1 (train) is done already; going on from it." in said
    assert "continuing after step" in said
