"""The whole path on a tiny trained BERT: killed, gone on with, delivered, loaded, repeated from its recipe; and what is not found.

One compression is shared by most tests. Times are real but short; no test asserts a speed.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_folder import LABELS, refusing, write_data, write_model
from tiny_hurry import count_speeds, hurry

import slimformer
from slimformer import cli
from slimformer.core.plan import Plan
from slimformer.data.batching import collate, in_order
from slimformer.data.material import prepare
from slimformer.errors import OutputError, TargetError
from slimformer.exporters.base import FILES, Variant
from slimformer.families.base import anatomy_of, subject_of
from slimformer.measuring.records import Standing
from slimformer.measuring.sessions import open_session
from slimformer.registry import name_of
from slimformer.reporting.ledger import read_facts, read_records
from slimformer.running import lessons, search, trials
from slimformer.running.bundle import Bundle, Run
from slimformer.running.reader import parse_recipe, read_recipe
from slimformer.running.runner import run, train_stages
from slimformer.running.scale import nearer
from slimformer.running.schedule import Part
from slimformer.running.search import compress, gentler
from slimformer.running.trials import Trial
from slimformer.running.wanted import Wanted
from slimformer.saving import checkpoint
from slimformer.tasks.base import Split
from slimformer.tasks.classification import Classification
from slimformer.training.stage import Calibrate, Train

pytestmark = pytest.mark.slow


OPTIONS = ("--data", "data", "--speedup", "1.5", "--max-loss", "100", "--epochs", "2", "--tries", "1", "--threads", "1")
DELIVERED = {
    *("config.json", "tokenizer.json", "tokenizer_config.json", "slimformer.json"),
    *("onnx/model.onnx", "onnx/model_quantized.onnx", "onnx/model_int8.onnx"),
    *("onnx/config.json", "onnx/tokenizer.json", "onnx/tokenizer_config.json"),
    *("model/config.json", "model/plan.json", "model/model.safetensors", "model/tokenizer.json", "model/tokenizer_config.json"),
    *("README.md", "report.html", "ledger.jsonl", "recipe.yaml", "log.jsonl"),
}


def kill_in_the_middle() -> None:
    """Called in a process of its own: a run state after each step, and `kill -9` once five steps of the distillation are done."""
    import os

    from slimformer.training import loop as training
    from slimformer.training import runstate

    patch = pytest.MonkeyPatch()
    hurry(patch)
    patch.setattr(training, "STATE_SECONDS", 0.0)
    patch.setattr(training, "STATE_SHARE", float("inf"))
    save = runstate.save_state

    def save_and_die(folder: Path, state: runstate.RunState) -> None:
        save(folder, state)
        if state.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    patch.setattr(runstate, "save_state", save_and_die)
    cli.main()


@dataclass(frozen=True)
class Done:
    """What the shared compression left."""

    home: Path
    out: Path
    at_the_kill: frozenset[str]  # names in the folder then
    shown: str

    def said(self) -> list[str]:
        return said(self.out)


def said(out: Path) -> list[str]:
    lines = map(json.loads, (out / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["text"] for line in lines if line["kind"] == "say"]


def delivered(out: Path) -> set[str]:
    """The files in a folder, by their paths in it."""
    return {str(item.relative_to(out)) for item in out.rglob("*") if item.is_file()}


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["kind"] == kind]


def python(code: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", textwrap.dedent(code)], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """`slimformer compress` from the command line, killed while it distils, and the same command once more."""
    home = tmp_path_factory.mktemp("home")
    write_data(home / "data")
    write_model(home / "model")
    arguments = ["slimformer", "compress", "model", *OPTIONS, "--out", "small"]
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); sys.argv = {arguments!r}\n"
    killed = python(code + "import test_compression; test_compression.kill_in_the_middle()", home)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    names = frozenset(item.name for item in (home / "small").iterdir())
    shown = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(shown):
        hurry(patch)
        patch.chdir(home)
        patch.setenv("COLUMNS", "120")
        patch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 0, shown.getvalue()
    return Done(home, home / "small", names, shown.getvalue())


def test_a_killed_run_goes_on_where_it_was(done: Done) -> None:
    assert done.at_the_kill == {".lock", ".slimformer", "log.jsonl", "work"}
    lines = done.said()
    assert lines.count("stage 1 (calibrate) is done already; going on from it.") == 1
    assert lines.count("continuing after step 5 of 20.") == 1
    assert sum(line.startswith("plan: cut to 1.5 times the speed") for line in lines) == 1
    assert lines.count("timing what heads and neurons cost on this machine.") == 1


def test_the_folder_holds_all_that_was_promised(done: Done) -> None:
    names = delivered(done.out) - {"changed.jsonl", "onnx/model_slim.onnx"}  # there if an answer changed, and if it is fast
    assert names == DELIVERED | {".lock", ".slimformer"}
    found = read_facts(done.out)
    assert found is not None
    assert (done.out / found.best).is_file()
    assert found.task["use"] == "classification"
    assert "model: small" in done.shown.replace("\n", " ")
    assert "page: small/report.html" in done.shown.replace("\n", " ")


def test_something_was_cut_and_the_plan_says_what(done: Done) -> None:
    plan = checkpoint.load_plan(done.out)
    assert plan != Plan()
    small, dense = slimformer.load(done.out), slimformer.load(done.home / "model")
    assert small.num_parameters() < dense.num_parameters()
    facts = read_facts(done.out)
    assert facts is not None
    assert facts.params == small.num_parameters()
    assert facts.plan == plan.digest()


def test_the_float_file_answers_as_the_loaded_model(done: Done) -> None:
    model = slimformer.load(done.out)
    task = Classification(data=str(done.home / "data")).bind(model.config.to_dict())
    features = prepare(task, done.out).features[Split.DEV]
    runner = open_session(done.out / FILES[Variant.FLOAT].place, 1)
    right = 0
    for rows in (*in_order(len(features), 1)[:3], *in_order(len(features), 16)):
        batch = collate(features, rows, ("input_ids", "attention_mask", "token_type_ids"))
        with torch.no_grad():
            wanted = model(**{name: torch.from_numpy(array) for name, array in batch.items()}).logits.numpy()
        np.testing.assert_allclose(runner(batch)["logits"], wanted, atol=1e-4, rtol=1e-4)
        right += int((wanted.argmax(-1) == collate(features, rows, ("labels",))["labels"]).sum())
    assert right > 0.9 * (len(features) + 3)  # distilled, not merely cut


def test_the_snippet_of_the_card_runs_without_slimformer(done: Done) -> None:
    card = (done.out / "README.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found is not None
    guard = refusing("slimformer", "torch", "transformers")
    ran = python(guard + found[1], done.out, "-I")
    assert ran.returncode == 0, ran.stderr
    dev = (done.home / "data" / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:3]
    assert ran.stdout.strip() == str([line.split("\t")[1] for line in dev])
    assert {line.split("\t")[1] for line in dev} == set(LABELS)


def test_the_ledger_holds_ours_and_the_rivals(done: Done) -> None:
    records = read_records([done.out / "ledger.jsonl"])
    ours = [record for record in records if record.role == Standing.OURS]
    files = {"onnx/model.onnx", "onnx/model_quantized.onnx", "onnx/model_int8.onnx"}
    assert {record.file for record in ours if record.precision != Variant.INT8_KERNELS} == files
    assert [str(record.role) for record in records[:3]] == [Standing.TEACHER_FP32, Standing.TEACHER_INT8, Standing.SMALL_DENSE]
    assert {record.plan for record in ours} == {checkpoint.load_plan(done.out).digest()}
    assert sum(record.chosen for record in records) == 1
    for record in records:
        assert record.examples == 60
        assert {timing.batch_size for timing in record.timings} == {1, 32}
        assert record.size_bytes
        assert record.task == "classification data"
    facts = read_facts(done.out)
    assert facts is not None
    assert next(record.file for record in records if record.chosen) == facts.best


def test_the_page_is_well_formed_and_needs_nothing_else(done: Done) -> None:
    void = {"meta", "br", "hr", "img", "input", "link", "col", "path", "circle", "line", "rect", "polyline", "wbr"}
    opened: list[str] = []

    class Balanced(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert not any(name in {"src", "srcset"} for name, _ in attrs)
            if tag not in void:
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in void:
                assert opened.pop() == tag

    page = (done.out / "report.html").read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert opened == []
    assert "slimformer compress model --data data" in page


def test_a_finished_folder_is_not_started_again(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(done.home)
    before = {name: (done.out / name).stat().st_mtime_ns for name in DELIVERED}
    rivals = ("teacher-int8", "small-dense")
    ours = next(record for record in read_records([done.out / "ledger.jsonl"]) if record.chosen)
    options: dict[str, Any] = {"epochs": 2, "tries": 1, "rivals": rivals, "max_loss": 100}
    again = compress("model", Classification(data="data"), "small", speedup=1.5, **options)
    assert next(record for record in again.records if record.chosen) == ours
    with pytest.raises(OutputError, match=r"(?s)small holds a finished run of another wish.*--speedup 1.5, you ask 50"):
        compress("model", Classification(data="data"), "small", speedup=50, **options)
    with pytest.raises(OutputError, match=r"(?s)small belongs to another run.*epochs: 2.0 there, 3.0 now"):
        compress("model", Classification(data="data"), "small", epochs=3)
    assert {name: (done.out / name).stat().st_mtime_ns for name in DELIVERED} == before


def test_the_recipe_repeats_it_to_the_same_plan(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(done.home)
    hurry(monkeypatch)
    recipe = read_recipe(done.out / "recipe.yaml")
    assert [type(stage) for stage in recipe.stages] == [Calibrate, Train]
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    train_stages(recipe, "again", wait_seconds=0)
    assert not Path("again/onnx").exists()
    result = run(recipe, "again", threads=1, wait_seconds=0)
    assert result.out == Path("again")
    assert sum("is done already" in line for line in said(Path("again"))) == len(recipe.stages)
    assert {record.threads for record in result.records if record.role == Standing.OURS} == {1}
    assert checkpoint.load_plan("again").digest() == checkpoint.load_plan(done.out).digest()
    assert delivered(Path("again")) >= DELIVERED
    assert read_recipe("again/recipe.yaml") == recipe
    assert not any("timing what" in line for line in said(Path("again")))
    assert len(run(recipe, "again").records) == len(result.records)


def test_bench_needs_neither_torch_nor_transformers(done: Done) -> None:
    code = refusing("torch", "transformers") + textwrap.dedent("""
        sys.argv = ["slimformer", "bench", "small", "--wait", "0", "--seconds", "0", "--threads", "1"]
        from slimformer.cli import main
        try:
            main()
        finally:
            assert not {"torch", "transformers"} & set(sys.modules)
        """)
    ran = python(code, done.home)
    assert ran.returncode == 0, ran.stderr
    for name in ("model in onnx/", "model.onnx", "model_quantized.onnx", "model_int8.onnx"):
        assert name in ran.stdout


def test_an_untuned_encoder_is_tuned_and_what_is_not_found_is_said(
    done: Done, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a teacher that no student can equal, nothing stays within the loss; the best is delivered all the same.

    Where only the time of the smaller dense rival is left, it goes into a gentler cut.
    """
    write_model(tmp_path / "encoder", trained=False, bare=True)
    hurry(monkeypatch)
    count_speeds(monkeypatch)

    def hard(bundle: Bundle, state: Run) -> trials.Judge:
        return replace(trials.judge_of(bundle, state), reference=trials.Reference(validation=2.0, seen=None))

    monkeypatch.setattr(search, "judge_of", hard)
    task = Classification(data=str(done.home / "data"))
    monkeypatch.setattr(search._Search, "_has_time", lambda _, *parts, **__: Part.RIVAL not in parts)
    options = {"speedup": 1.5, "max_loss": 0, "epochs": 1, "tries": 2, "minutes": 60, "rivals": ("small-dense",)}
    out = tmp_path / "small"
    compress(tmp_path / "encoder", task, out, **options, threads=1, wait_seconds=0)
    assert [event["stage"] for event in events(out, "stage")] == ["train", *2 * ["calibrate", "train"]]
    lines = said(out)
    gentler = [line for line in lines if line.startswith("more than 0 points are lost: trying a model ")]
    assert len(gentler) == 1
    assert gentler[0].endswith(" times as fast, in the time of the smaller dense rival.")
    assert not any("training the smaller dense model" in line for line in lines)
    assert any(line.startswith("not all that was asked for was found; this is the best: ") for line in lines)
    assert any(line.startswith("this model has no head for the task yet: it is tuned first, for ") for line in lines)
    assert any(re.match(r"it took [\d.]+ (seconds|minutes), announced were", line) for line in lines)
    assert delivered(out) >= DELIVERED
    stages = read_recipe(out / "recipe.yaml").stages
    assert stages[0] == Train(lr=stages[0].lr, epochs=stages[0].epochs)  # type: ignore[attr-defined]
    assert not (out / "work").exists()
    assert slimformer.load(out).config.id2label == dict(enumerate(LABELS))


def test_a_smaller_dense_model_that_wins_is_delivered(done: Done, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hurry(monkeypatch)
    monkeypatch.setattr(search, "CLEARLY", 0.0)
    count_speeds(monkeypatch)
    monkeypatch.chdir(done.home)
    out, options = tmp_path / "small", {"speedup": 1.5, "max_loss": 100, "epochs": 1, "tries": 1, "rivals": ("small-dense",)}
    result = compress("model", Classification(data="data"), out, **options, threads=1, wait_seconds=0)
    roles = [record.role for record in result.records if record.precision != Variant.INT8_KERNELS]
    assert roles == [Standing.TEACHER_FP32, Standing.CUT, *[Standing.OURS] * 3]
    assert any(line.endswith("it is delivered, and the cut one stands beside it.") for line in said(out))
    assert delivered(out) >= DELIVERED
    recipe = read_recipe(out / "recipe.yaml")
    assert [name_of(stage.method) for stage in recipe.stages if isinstance(stage, Calibrate)] == ["layers"]
    assert (recipe.latency, recipe.bench.rivals) == (None, ())
    plan = checkpoint.load_plan(out)
    assert {site.rpartition(".")[2] for site in plan.keep} <= {"attention", "ffn"}
    assert all(kept == () for kept in plan.keep.values())
    assert result.records[1].plan != result.records[2].plan
    assert "cut inside its layers" in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("dense", "cut", "delivered"),
    [
        ((0.5, 4.0), (0.2, 3.0), True),  # both keep to a point: the faster one
        ((0.5, 3.1), (0.2, 3.0), False),  # as fast, within what timings of one file differ by
        ((1.5, 9.0), (0.2, 3.0), False),
        ((0.9, 2.0), (1.2, 3.0), True),  # it alone keeps to it
        ((1.1, 9.0), (1.2, 3.0), True),  # neither does
        ((1.3, 9.0), (1.2, 3.0), False),
    ],
)
def test_who_is_delivered(dense: tuple[float, float], cut: tuple[float, float], delivered: bool) -> None:
    first, second = (Trial("int8", 0.9, loss, speed, 1.0, 1) for loss, speed in (dense, cut))
    assert search.better(first, second, max_loss=1.0) == delivered


@pytest.mark.parametrize(
    ("dense", "cut", "layers", "tried"),
    [
        ((1.5, 9.0), (0.2, 3.0), 2, True),  # at least 6 times as fast with three layers
        ((1.5, 4.7), (0.2, 3.0), 2, False),  # 3.13 times: not clearly
        ((1.5, 4.8), (0.2, 3.0), 2, True),
        ((0.9, 9.0), (0.2, 3.0), 2, False),  # nothing is lost too much
        ((1.5, 9.0), (1.2, 3.0), 2, True),  # the cut model loses too much as well
    ],
)
def test_when_one_more_dense_layer_is_tried(
    dense: tuple[float, float], cut: tuple[float, float], layers: int, tried: bool
) -> None:
    first, second = (Trial("int8", 0.9, loss, speed, 1.0, 1) for loss, speed in (dense, cut))
    assert search.deeper_may_win(first, second, layers, max_loss=1.0) == tried


def test_depth_is_searched_until_a_dense_model_passes(done: Done, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hurry(monkeypatch)
    count_speeds(monkeypatch)
    monkeypatch.chdir(done.home)
    monkeypatch.setattr(search, "CLEARLY", 1.05)
    races: list[str] = []

    def race(self: Any, chosen: Any, small: Any) -> tuple[Trial, Trial]:
        races.append(small.name)
        cut, dense = chosen.best_int8(100), Trial(small.variant, 0.5, 200.0 if len(races) == 1 else 0.0, 9.0, 9.0, 1)
        return replace(cut, loss=0.0, speed_32=1.0), dense

    monkeypatch.setattr(search._Search, "_race", race)
    write_model(tmp_path / "deep", num_hidden_layers=5)
    out, options = tmp_path / "small", {"speedup": 2.5, "max_loss": 100, "epochs": 1, "tries": 2, "rivals": ("small-dense",)}
    result = compress(tmp_path / "deep", Classification(data="data"), out, **options, threads=1, wait_seconds=0)
    first, second = (int(name.split()[0]) for name in races)
    assert second == first + 1 < 5
    assert [record.name for record in result.records if record.role == Standing.SMALL_DENSE] == races[:1]
    (chosen,) = (record for record in result.records if record.chosen)
    assert sum(layer.heads > 0 for layer in chosen.layers) == second
    assert any(re.match(f"{first} dense layers? lost 200.00 points, more than is allowed", line) for line in said(out))


def test_the_card_tells_what_the_chosen_file_holds(done: Done) -> None:
    facts = read_facts(done.out)
    assert facts is not None
    text = (done.out / "README.md").read_text(encoding="utf-8")
    assert f"## What `{facts.best}` holds" in text
    assert "rows answer as before" in text


def test_a_speed_out_of_reach_names_the_best_possible_and_may_be_lowered(
    done: Done, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hurry(monkeypatch)
    count_speeds(monkeypatch)
    monkeypatch.chdir(done.home)
    out = tmp_path / "small"
    task = Classification(data="data")
    with pytest.raises(TargetError, match=r"100 times as fast is out of reach[\s\S]*help: ask for less, at most about \d"):
        compress("model", task, out, speedup=100, tries=1, epochs=1, rivals=(), threads=1, wait_seconds=0)
    assert {item.name for item in out.iterdir()} == {".lock", ".slimformer", "log.jsonl", "work"}

    def reached(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slimformer.running.start.teach_bundle", reached)
    with pytest.raises(KeyboardInterrupt):  # the folder is still ours for another speed
        compress("model", task, out, speedup=1.5, tries=1, epochs=1, rivals=(), threads=1, wait_seconds=0)


def test_attention_scores_are_learned_where_they_fit_on_disk(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    source = done.home / "model"
    dense = slimformer.load(source)
    task = Classification(data=str(done.home / "data")).bind(dense.config.to_dict())
    bundle = Bundle(subject_of(dense), Plan(), prepare(task, source), subject_of(dense))
    anatomy, lengths = anatomy_of(dense), bundle.material.features[Split.TRAIN].lengths()
    heads = sum(anatomy.sites[f"encoder.{layer}.heads"].size for layer in range(len(anatomy.layers)))
    needed = 2 * int((lengths**2).sum() * heads + lengths.sum() * (len(anatomy.layers) + 1) * anatomy.hidden_size)
    found = []
    for room in (needed, needed - 1):
        monkeypatch.setattr(lessons, "CACHED_BYTES", room)
        found.append(lessons.distillation(bundle, Wanted(), 2.0))
    fits, does_not = found
    assert [[method.scores for method in stage.methods] for stage in found] == [[6.0], [0.0]]
    assert fits.lr >= does_not.lr
    assert (fits.task_weight, does_not.task_weight) == (0.0, 0.1)
    widths = {384: 8e-4, 768: 2e-4, 128: 8e-4}
    for width, rate in widths.items():
        monkeypatch.setattr(lessons, "_hidden_size", lambda _, width=width: width)
        assert lessons.fast_lr(source) == rate
    monkeypatch.setattr(lessons, "CACHED_BYTES", needed)
    chosen = lessons.distillation(bundle, Wanted(lr=1e-5), 12.0)
    assert (chosen.lr, chosen.augment, chosen.methods[0].scores) == (1e-5, 4, 0.0)  # copies take room too


def test_a_gentler_cut_is_as_far_back_as_the_loss_says() -> None:
    assert gentler(8.0, 2.0, lost=4.0, least=0.0, allowed=1.0) == pytest.approx(4.0)  # a quarter of the loss: half of the way
    assert gentler(8.0, 2.0, lost=4.5, least=0.5, allowed=1.5) == pytest.approx(4.0)  # int8 alone loses some of it
    assert gentler(8.0, 2.0, lost=1.01, least=0.0, allowed=1.0) == pytest.approx(2 * 4**0.75)
    assert gentler(8.0, 2.0, lost=400.0, least=0.0, allowed=1.0) == pytest.approx(2 * 4**0.25)
    assert gentler(8.0, 2.0, lost=3.0, least=2.0, allowed=1.0) == pytest.approx(2 * 4**0.25)  # what is allowed is out of reach
    assert gentler(8.0, 2.0, lost=3.0, least=3.5, allowed=1.0) == pytest.approx(4.0)


def test_a_second_budget_takes_the_time_of_the_rival_or_is_not_tried(tmp_path: Path) -> None:
    for room, tried, rival, told in (
        ({Part.RIVAL, Part.DISTILLING}, True, True, "trying a model 3.00 times as fast."),
        (set(), True, False, "trying a model 3.00 times as fast, in the time of the smaller dense rival."),
        (None, False, True, "the time that is left allows no other budget."),
    ):
        lines: list[str] = []
        known: Any = SimpleNamespace(
            wanted=Wanted(max_loss=1.0),
            schedule=SimpleNamespace(announced={Part.DISTILLING: 100.0}),
            state=SimpleNamespace(root=tmp_path / str(room), log=SimpleNamespace(say=lines.append)),
            diet=SimpleNamespace(rival=True),
            rival=True,
            _has_time=lambda *parts, room=room, **_: room is not None and {Part.RIVAL, Part.DISTILLING} & {*parts} <= room,
        )
        for _ in range(2):  # a resumed run decides as before
            assert search._Search._another(known, 3.0) is tried
            known._has_time = lambda *_, **__: pytest.fail("decided anew")
        assert known.rival is rival
        assert [line.endswith(told) for line in lines] == [True, True]


def test_what_to_ask_for_after_no_cut_was_good_enough() -> None:
    def candidate(speed: float, loss: float) -> Any:
        trial = Trial("int8", 0.9, loss, speed, 1.0, 1)
        return SimpleNamespace(trials=(trial,), best_int8=lambda _: trial)

    known: Any = SimpleNamespace(wanted=Wanted(max_loss=1.0, minutes=10.0), whole=candidate(2.0, 0.0))
    assert search._Search._hint(known, candidate(8.0, 4.0)).endswith("ask for about --speedup 4, or give it more --minutes.")
    known.wanted = Wanted(max_loss=1.0)
    assert search._Search._hint(known, candidate(8.0, 4.0)).endswith("ask for about --speedup 4.")
    assert search._Search._hint(known, candidate(2.05, 4.0)) == ""  # nothing worthwhile lies between


def test_the_next_budget_lies_between_the_nearest_on_both_sides() -> None:
    assert nearer([(0.4, 6.8)], 3.7) == pytest.approx(0.4 * (6.8 / 3.7) ** 1.2)  # none is slower yet: on from the last
    assert nearer([(0.9, 8.0)], 2.0) == 1.0
    # 8 times at 0.25 and 2 times at 1: 4 times lies halfway on both logarithmic axes
    assert nearer([(0.25, 8.0), (1.0, 2.0)], 4.0) == pytest.approx(0.5)
    seen = [(0.4058, 6.768), (0.8259, 2.757), (0.5721, 5.224)]
    assert 0.5721 < nearer(seen, 3.744) < 0.8259
