"""Several recipes at once: what is refused, what is said, and two nodes of a real Ray cluster of which one is killed half-way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_folder import recipe_in as recipe
from tiny_folder import write_data, write_home

from slimformer import cli
from slimformer.errors import ProcessError, RecipeError
from slimformer.measuring.machine import environment
from slimformer.measuring.records import Interval, Record
from slimformer.measuring.timing import SINGLE, SORTED, Ratio
from slimformer.methods.distillation import Distillation
from slimformer.methods.fisher import Fisher
from slimformer.methods.gates import Gates
from slimformer.running.cluster import BASE_BYTES, Ended, Job, _done, _look, _sent, _taught, training_bytes
from slimformer.running.recipe import Bench, Recipe
from slimformer.running.result import Result
from slimformer.running.runner import train_stages
from slimformer.running.sweep import Ran, Sweep, named_recipes, run_several
from slimformer.running.teaching import has_many_rows, shared_stage
from slimformer.tasks.classification import Classification
from slimformer.training import teacher as teacher_cache
from slimformer.training.stage import Calibrate, Train, TrimVocabulary

FIXED = Train(epochs=2.0, methods=(Distillation(),), precision="fp32")  # else each process times which precision is faster


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return write_home(tmp_path)


def test_mistakes_of_all_recipes_are_said_before_anything_runs(home: Path) -> None:
    good = recipe(home, Train(epochs=1.0))
    (home / "one.yaml").write_text(good.to_yaml(), encoding="utf-8")
    with pytest.raises(RecipeError, match="two recipes are called one"):
        run_several([home / "one.yaml", home / "one.yaml"], home / "out")
    with pytest.raises(RecipeError, match="nothing to run"):
        run_several([], home / "out")
    with pytest.raises(RecipeError) as error:
        run_several(
            [good, replace(good, model=str(home / "gone")), replace(good, task=Classification(data=str(home / "nothing")))],
            home / "out",
        )
    assert "recipe-2: " in str(error.value)
    assert "recipe-3: " in str(error.value)
    assert not (home / "out").exists()


@pytest.mark.parametrize(
    "command", [["--seeds", "1,x"], ["--seeds", "1.5"], ["--seeds", ","], ["--seeds", "inf"], ["--processors", "2"]]
)
@pytest.mark.slow
def test_options_that_cannot_be_meant_are_refused(
    home: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "one.yaml").write_text(recipe(home, Train(epochs=1.0)).to_yaml(), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["slimformer", "run", str(home / "one.yaml"), "--out", str(home / "out"), *command])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert command[0] in capsys.readouterr().err


def row(loss: float, speed: float) -> Record:
    ratios = {SORTED: Ratio(speed, speed, speed), SINGLE: Ratio(2.0, 2.0, 2.0)}
    made = Record("ours", "ours", "my-bert", "reviews", "dev", "accuracy", {"accuracy": 0.9}, "2026-01-02", environment())
    return replace(
        made, file="onnx/model.onnx", chosen=True, loss=Interval(loss, loss - 1, loss + 1), speed=ratios, size_bytes=10**6
    )


def test_lines_tell_each_run_and_the_mean_of_its_seeds() -> None:
    results = [Result(Path("out"), (row(loss, speed),)) for loss, speed in ((0.5, 3.0), (1.5, 5.0))]
    ran = (
        Ran("a-seed-1", "", results[0]),
        Ran("a-seed-2", "", results[1]),
        Ran("b-seed-1", "the data is gone."),
        Ran("b-seed-2"),
    )
    lines = Sweep(Path("out"), ran, (1, 2)).lines()
    assert lines[0] == "a-seed-1   +0.5 points lost, 3.0x at batch 32, 2.0x at batch 1, 1.0 MB"
    assert lines[2] == "mean of 2  +1.0 points lost (+0.5 to +1.5), 4.0x at batch 32"
    assert lines[3] == "b-seed-1   failed: the data is gone."
    assert len(lines) == 5
    assert Sweep(Path("out"), ran).failed == (ran[2],)


@pytest.mark.slow
def test_memory_grows_with_weights_batches_and_lengths(home: Path) -> None:
    small = training_bytes(recipe(home, Train(epochs=1.0, batch_size=8)))
    assert small > BASE_BYTES
    large = training_bytes(recipe(home, Train(epochs=1.0, batch_size=32)))
    longest = training_bytes(
        replace(recipe(home, Train(epochs=1.0, batch_size=8)), task=Classification(data=str(home / "data"), max_length=8))
    )
    assert longest < small < large
    assert (large - BASE_BYTES) / (small - BASE_BYTES) < 4  # the weights are the same


@pytest.mark.slow
def test_a_job_is_sent_as_plain_data_and_read_wherever_its_folder_is_seen(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    chain = Recipe("./model", Classification(data="data"), (Calibrate(Fisher(keep=0.5)),), bench=Bench(rivals=()))
    data, folder, cache = _sent(Job(chain, Path("runs/one"), {"cache": "runs/cache"}))
    assert json.loads(json.dumps(data)) == data
    assert (folder, cache) == (str(home / "runs/one"), str(home / "runs/cache"))
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    found: list[Recipe] = []
    ended = _done(found.append, data, folder)
    assert ended == Ended(ended.node, ended.minutes)
    assert Path(str(found[0].model)).resolve() == home / "model"
    assert found[0].task.settings == replace(chain.task, data=str(home / "data")).settings  # type: ignore[call-arg]

    def refuses(_: Recipe) -> None:
        raise RecipeError("it is wrong.", help="correct it.")

    assert _done(refuses, data, folder).why == "it is wrong."
    assert _look(str(home / "data"))[2]
    assert not _look(str(home / "nothing"))[2]


@pytest.mark.slow
def test_names_are_those_of_the_files(home: Path) -> None:
    for name in ("one", "two"):
        (home / f"{name}.yaml").write_text(recipe(home, Train(epochs=1.0)).to_yaml(), encoding="utf-8")
    found = named_recipes([home / "one.yaml", home / "two.yaml"], data=str(home / "model"))
    assert list(found) == ["one", "two"]
    assert {chain.task.data for chain in found.values()} == {str(home / "model")}  # type: ignore[attr-defined]


@pytest.mark.slow
def test_outputs_that_shares_computed_are_those_that_a_training_reads(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(home / "data", train=200, dev=40)
    chain = recipe(home, FIXED)
    for number in (1, 0):
        ended = _taught(*_sent(Job(chain, home / "spread", {"cache": str(home / "cache")})), number, 2)  # type: ignore[arg-type]
        assert ended == Ended(ended.node, ended.minutes)
    parts = {place.name for place in home.glob("cache/teacher/*/parts/*")}
    assert len(parts) == 2
    fill = teacher_cache._Filler.fill
    monkeypatch.setattr(teacher_cache._Filler, "fill", None)  # nothing is left to compute
    train_stages(chain, home / "spread", wait_seconds=0, cache=home / "cache")
    monkeypatch.setattr(teacher_cache._Filler, "fill", fill)
    train_stages(chain, home / "alone", wait_seconds=0)
    spread, alone = (
        load_file(next(home.glob(f"{name}/work/1-train-*/made/model.safetensors"))) for name in ("spread", "alone")
    )
    assert all(torch.equal(spread[name], alone[name]) for name in spread)


@pytest.mark.slow
def test_only_a_teacher_that_is_there_is_asked_beforehand(home: Path) -> None:
    lesson = Train(epochs=1.0, methods=(Distillation(),))
    found = recipe(home, Calibrate(Fisher(keep=0.6)), Train(methods=(Gates(),)), lesson)
    assert shared_stage(found) == lesson
    assert has_many_rows(found, replace(lesson, augment=400))
    assert not has_many_rows(found, replace(lesson, augment=400, rows=8))
    (home / "lines.txt").write_text("a line\n\n" * 3, encoding="utf-8")
    some = replace(lesson, text=str(home / "lines.txt"), augment=6_666)
    assert has_many_rows(found, some)  # 3 x 6,667
    assert not has_many_rows(found, replace(some, augment=6_665))
    assert shared_stage(recipe(home, Train(epochs=1.0), lesson)) is None  # its teacher is the model that the first stage makes
    assert shared_stage(recipe(home, TrimVocabulary(), lesson)) is None  # its words are still to be chosen
    assert shared_stage(recipe(home, Train(methods=(Gates(),)))) is None


# -- On a cluster --------------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
from slimformer import read_recipe
from slimformer.log import Log, show_log
from slimformer.running import teaching
from slimformer.running.cluster import Job, connected
from slimformer.running.sweep import run_several

teaching.MANY_ROWS = 0
store = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **store})
second = cluster.add_node(num_cpus=1, object_store_memory=store["object_store_memory"])

def kill():
    while len(list(Path("spread").glob("*/work"))) < 2:
        time.sleep(0.05)
    print("killed")
    cluster.remove_node(second, allow_graceful=False)

threading.Thread(target=kill, daemon=True).start()
with show_log():
    found = run_several(["one.yaml"], "spread", seeds=(1, 2), cluster=cluster.address, processors=1, wait_seconds=0)
print("\\n".join(found.lines()))
chain = read_recipe("one.yaml")
with connected(cluster.address, Log(None)) as nodes:  # one processor is left: one training begins, and none after it
    begun = nodes.train({name: Job(chain, Path("late") / name, {}) for name in ("first", "second")}, until=lambda: Path("late").exists())
print("begun:", *begun)
cluster.shutdown()
"""

ALONE = """
from dataclasses import replace
from slimformer import read_recipe
from slimformer.running.runner import train_stages

for seed in (1, 2):
    train_stages(replace(read_recipe("one.yaml"), seed=seed), f"alone-{seed}", wait_seconds=0)
"""


def call(home: Path, *command: str) -> str:
    plain: dict[str, Any] = {"cwd": home, "capture_output": True, "text": True, "timeout": 500}
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"},
        **plain,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_node_that_dies_changes_no_number(home: Path) -> None:
    pytest.importorskip("ray")
    write_data(home / "data", train=200, dev=40)  # more than one batch of outputs: each share has rows
    chain = recipe(home, Calibrate(Fisher(keep=0.6, cost="macs", examples=40)), FIXED)
    (home / "one.yaml").write_text(
        replace(chain, model="./model", task=Classification(data="./data")).to_yaml(), encoding="utf-8"
    )
    (home / "spread.py").write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    text = call(home, "spread.py")
    assert "killed" in text
    assert "2 trainings on 2 nodes with 2 processors (this machine measures), 1 processor for each." in text
    assert "outputs of 1 teacher in 2 shares on 2 nodes" in text  # of both seeds
    assert [line.split(": computed on ")[0] for line in text.splitlines() if ": computed on " in line] in (
        [f"one-seed-1, share {first} of 2", f"one-seed-1, share {second} of 2"] for first, second in ((1, 2), (2, 1))
    )
    (facts,) = home.glob("spread/cache/teacher/*/facts.json")
    assert len(json.loads(facts.read_text(encoding="utf-8"))["parts"]) == 2
    assert "is done already; going on from it" in text  # what the nodes trained is not trained again here
    assert "is made again" not in text
    assert "begun: first\n" in text
    call(home, "-c", ALONE)
    for seed in (1, 2):
        (trained,) = (home / f"alone-{seed}" / "work").glob("2-train-*/made")
        spread, alone = (
            load_file(place / "model.safetensors") for place in (home / "spread" / f"one-seed-{seed}" / "model", trained)
        )
        assert spread.keys() == alone.keys()
        assert all(torch.equal(spread[name], alone[name]) for name in spread)


def test_an_address_where_nothing_answers_is_said(home: Path) -> None:
    pytest.importorskip("ray")
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"):
        with pytest.raises(ProcessError, match=f"no Ray cluster answers at '{address}'"):
            run_several([recipe(home, Train(epochs=1.0))], home / "out", cluster=address)
    assert not (home / "out").exists()
