"""Bad input through the real command line: one clear message with what, where and what to do; exit 2; nothing written half."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from tiny_folder import write_data, write_model

from slimformer import Recipe, Train, bench, cli, load, read_recipe, report
from slimformer.errors import DataError, OutputError, SlimformerError, shown
from slimformer.files import claim
from slimformer.running.preflight import preflight
from slimformer.saving.hub import local_folder
from slimformer.tasks.base import Split
from slimformer.tasks.classification import Classification
from slimformer.tasks.question_answering import QuestionAnswering

MARKS = {".lock", ".slimformer"}
Fail = Callable[..., str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_data(folder / "data", train=60, dev=20)
    write_model(folder / "model", trained=False)
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a good model and good data, and the place where the command runs."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fail(home: Path, call: Callable[..., tuple[int, str, str]]) -> Fail:
    """Runs a command that must fail as errors for people do, and returns its message on one line."""

    def run(*arguments: object, kind: str, left: set[str] | None = None) -> str:
        code, _, err = call(*arguments)
        assert code == 2, err
        assert "Traceback" not in err
        lines = err.rstrip("\n").split("\n")
        assert lines[0].startswith(f"{kind}: "), err
        assert all(line.startswith("  ") for line in lines[1:]), err  # one message
        assert sum(line.startswith("  help: ") for line in lines) == 1, err
        out = home / "out"
        assert (
            {item.name for item in out.rglob("*")} <= MARKS if left is None else {item.name for item in out.iterdir()} == left
        )
        return " ".join(" ".join(lines).split())

    return run


@pytest.fixture
def compress(fail: Fail) -> Fail:
    """`fail` for `compress model --data data --out out`, with changes."""

    def run(*options: object, kind: str, model: object = "model", data: object = "data", left: set[str] | None = None) -> str:
        return fail("compress", model, "--data", data, "--out", "out", *options, kind=kind, left=left)

    return run


def rewrite(file: Path, **entries: object) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | entries), encoding="utf-8")


# -- Models --------------------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_or_no_model(compress: Fail, home: Path) -> None:
    assert "nowhere is not a folder with a model" in compress(kind="ModelError", model="nowhere")
    (home / "empty").mkdir()
    assert "empty holds no config.json" in compress(kind="ModelError", model="empty")
    assert not (home / "out").exists()


def test_an_architecture_without_a_family_names_those_there_are(compress: Fail, home: Path) -> None:
    rewrite(home / "model" / "config.json", model_type="gpt2")
    said = compress(kind="ModelError")
    assert "gpt2" in said
    assert all(name in said for name in ("bert", "distilbert", "electra", "roberta", "camembert", "xlm-roberta"))


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_weights(compress: Fail, home: Path, keep: int) -> None:
    file = home / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    said = compress(kind="ModelError")
    assert "model/model.safetensors" in said
    assert "cut off" in said or "truncated" in said
    assert not (home / "out").exists()


def test_weights_that_do_not_match_their_config(compress: Fail, home: Path) -> None:
    file = home / "model" / "model.safetensors"
    weights = load_file(file)
    name = "bert.encoder.layer.1.attention.self.query.weight"
    save_file({key: value for key, value in weights.items() if key != name}, file, metadata={"format": "pt"})
    assert name in compress(kind="ModelError")
    save_file(weights | {name: weights[name][:8].copy()}, file, metadata={"format": "pt"})
    assert name in compress(kind="ModelError")


def test_a_model_that_exists_only_as_pickle(compress: Fail, home: Path) -> None:
    (home / "model" / "model.safetensors").rename(home / "model" / "pytorch_model.bin")
    said = compress(kind="ModelError")
    assert "only as pickle (pytorch_model.bin)" in said
    assert "save_pretrained" in said


def test_a_model_without_a_tokenizer(compress: Fail, home: Path) -> None:
    (home / "model" / "tokenizer.json").unlink()
    assert "model holds no tokenizer" in compress(kind="ModelError")
    assert not (home / "out").exists()


def test_inspect_and_bench_say_it_too(fail: Fail, home: Path) -> None:
    assert "nowhere" in fail("inspect", "nowhere", kind="ModelError")
    assert "nowhere" in fail("bench", "nowhere", "--data", "data", "--wait", 0, kind="ModelError")
    (home / "model" / "model.safetensors").write_bytes(b"")
    assert "model.safetensors" in fail("inspect", "model", kind="ModelError")


# -- Data ----------------------------------------------------------------------------------------------------------------------


def test_data_that_is_missing(compress: Fail, home: Path) -> None:
    assert "reviews.tsv does not exist" in compress(kind="DataError", data="reviews.tsv")
    said = compress(kind="DataError", data="./dat")
    assert "./dat does not exist" in said
    assert "did you mean 'data'?" in said
    (home / "nothing").mkdir()
    assert "nothing holds no train file" in compress(kind="DataError", data="nothing")
    assert not (home / "out").exists()


def test_no_data_and_no_such_task(fail: Fail) -> None:
    assert "no data is named" in fail("compress", "model", "--out", "out", kind="RecipeError")
    said = fail("compress", "model", "--task", "intent", "--out", "out", kind="RecipeError")
    assert "there is no task 'intent'" in said
    assert "did you mean 'intents'?" in said
    assert "did you mean 'glue/sst2'?" in fail(
        "compress", "model", "--task", "glue/sst3", "--data", "data", "--out", "out", kind="RecipeError"
    )


@pytest.mark.parametrize("content", [b"", b"\n\n", b"sentence\tlabel\n"])
def test_empty_data(compress: Fail, home: Path, content: bytes) -> None:
    (home / "data" / "train.tsv").write_bytes(content)
    said = compress(kind="DataError")
    assert "data/train.tsv" in said
    assert "is empty" in said or "no rows" in said
    assert not (home / "out").exists()


def test_data_that_is_not_utf8(compress: Fail, home: Path) -> None:
    with (home / "data" / "train.tsv").open("ab") as file:
        file.write("très bon\tgood\n".encode("latin1"))
    said = compress(kind="DataError")
    assert "train.tsv is not UTF-8" in said
    assert "line 62" in said


@pytest.mark.parametrize("option", ["--text", "--label"])
def test_a_column_that_is_not_there_names_the_nearest(compress: Fail, option: str) -> None:
    near = {"--text": "sentense", "--label": "lable"}[option]
    said = compress(option, near, kind="DataError")
    assert f"has no column '{near}'" in said
    assert f"did you mean '{ {'--text': 'sentence', '--label': 'label'}[option] }'?" in said


def test_labels_the_model_does_not_know(compress: Fail, home: Path) -> None:
    with (home / "data" / "train.tsv").open("a", encoding="utf-8") as file:
        file.write("the film was odd\tgoood\n")
    said = compress(kind="DataError")
    assert "train.tsv, line 62: the label 'goood' in column 'label' is not a known one" in said
    assert "known labels: bad, good" in said
    assert "did you mean 'good'?" in said


def test_labels_of_dev_that_the_model_does_not_know(compress: Fail, home: Path) -> None:
    with (home / "data" / "dev.tsv").open("a", encoding="utf-8") as file:
        file.write("the film was odd\tgoood\n")
    assert "dev.tsv, line 22: the label 'goood'" in compress(kind="DataError")
    assert not (home / "out").exists()


def test_one_class_only(compress: Fail, home: Path) -> None:
    file = home / "data" / "train.tsv"
    file.write_text(file.read_text(encoding="utf-8").replace("\tbad", "\tgood"), encoding="utf-8")
    said = compress(kind="DataError")
    assert "every row has the label 'good'" in said
    assert "a classifier needs two classes" in said


def test_a_row_without_text_or_label(compress: Fail, home: Path) -> None:
    file = home / "data" / "train.tsv"
    whole = file.read_text(encoding="utf-8")
    file.write_text(whole + "the film was fine\t\n", encoding="utf-8")
    assert "train.tsv, line 62: no label in column 'label'" in compress(kind="DataError")
    file.write_text(whole + "the film was fine\n", encoding="utf-8")
    assert "train.tsv, line 62: 1 fields, the first line has 2" in compress(kind="DataError")


def test_rows_to_train_on_that_are_not_there(compress: Fail, home: Path) -> None:
    assert "rows.json does not exist" in compress("--train-rows", "rows.json", kind="DataError")
    (home / "rows.json").write_text("[0, 1, 99999]", encoding="utf-8")
    assert "names row 99999" in compress("--train-rows", "rows.json", kind="DataError")
    assert "at least 10" in compress("--train-rows", 3, kind="RecipeError")
    assert not (home / "out").exists()


@pytest.mark.parametrize(
    "name", ["a" * 300, "a/" * 3000, "~" + "b" * 300, "n\0", "s\ud800"], ids=["long", "deep", "home", "null", "surrogate"]
)
def test_a_name_that_no_system_takes_is_one_that_is_not_there(home: Path, name: str) -> None:
    task = Classification(data=str(home / "data"))
    recipe = Recipe(str(home / "model"), task, ())
    calls: tuple[Callable[[], object], ...] = (
        lambda: local_folder(name),
        lambda: preflight(replace(recipe, model=name)),
        lambda: preflight(replace(recipe, teacher=name)),
        lambda: preflight(replace(recipe, stages=(Train(text=name, task_weight=0.0),))),
        lambda: preflight(replace(recipe, task=replace(task, data=name))),
        lambda: preflight(replace(recipe, task=replace(task, train_rows=name))),
        lambda: QuestionAnswering(data=name).notes(),
        lambda: read_recipe(name),
        lambda: bench([name], task, wait_seconds=0),
        lambda: bench([name], wait_seconds=0),
        lambda: report([name], home / "out"),
    )
    for attempt in calls:
        with pytest.raises(SlimformerError) as caught:
            attempt()
        assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_what_is_no_ordinary_file_is_never_read(home: Path, kind: str) -> None:
    """Each of them would be read without end, or waited for."""

    def put(place: Path) -> Path:
        place.parent.mkdir(exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to("/dev/zero") if kind == "device" else os.mkfifo(place)
        return place

    task, recipe = Classification(data=str(home / "data")), Recipe(str(home / "model"), Classification(data="data"), ())
    (home / "other").mkdir()
    put(home / "other" / "model.bin")
    calls: tuple[Callable[[], object], ...] = (
        lambda: replace(task, train_rows=str(put(home / "rows"))).split(Split.TRAIN),
        lambda: preflight(replace(recipe, stages=(Train(text=str(put(home / "text")), task_weight=0.0),))),
        lambda: read_recipe(put(home / "recipe.yaml")),
        lambda: report([put(home / "run" / "ledger.jsonl").parent], home / "out"),
        lambda: load(home / "other"),
        lambda: preflight(replace(recipe, model=str(put(home / "model" / "tokenizer.json").parent))),
        lambda: Classification(data=str(put(home / "all" / "train.tsv").parent)).settled(),
        lambda: Classification(data=str(put(home / "all.parquet"))).settled(),
    )
    for attempt in calls:
        with pytest.raises(SlimformerError):
            attempt()


def test_a_report_on_nothing(fail: Fail, home: Path) -> None:
    (home / "empty").mkdir()
    assert "no records in empty" in fail("report", "empty", "--out", "out", kind="DataError")
    assert "nowhere" in fail("report", "nowhere", "--out", "out", kind="DataError")


# -- Options and recipes ---------------------------------------------------------------------------------------------------------


def test_options_out_of_range_are_all_told(compress: Fail, home: Path) -> None:
    said = compress("--speedup", 0.5, "--max-loss", -1, "--epochs", "nan", "--tries", 0, kind="RecipeError")
    for fact in (
        "speedup must be above 1 and at most 100, got 0.5",
        "max_loss must be from 0 to 100, got -1.0",
        "epochs must be above 0 and at most a billion, or null, got nan",
        "tries must be from 1 to a billion, got 0",
    ):
        assert fact in said
    assert "metric: there is no 'acuracy'" in compress("--metric", "acuracy", kind="RecipeError")
    assert "the metric 'spearman' does not fit" in compress("--metric", "spearman", kind="DataError")
    assert "max_length: at least 4" in compress("--max-length", 2, kind="RecipeError")
    assert not (home / "out").exists()


def test_a_recipe_with_several_mistakes_shows_them_all(fail: Fail, home: Path) -> None:
    text = """
model: model
task: {use: clasification, data: data}
stages:
  - train: {epoch: 2}
  - calibrate: {method: {use: gates}}
  - bnech: {}
latency: {fixed_ms: much}
"""
    (home / "recipe.yaml").write_text(text, encoding="utf-8")
    said = fail("run", "recipe.yaml", "--out", "out", kind="RecipeError")
    for fact in (
        "recipe.yaml has",
        "task.use: there is no 'clasification'; did you mean 'classification'?",
        "stages[0].train.epoch: unknown option; did you mean 'epochs'?",
        "stages[1].calibrate.method: 'gates' has to train",
        "stages[2].bnech: unknown stage; did you mean 'bench'?",
        "latency.fixed_ms: Input should be a valid number",
    ):
        assert fact in said
    assert not (home / "out").exists()


@pytest.mark.parametrize("content", [b"", b"\xff", b"model: [", b"- 1", b"model: model\ntask: classification\nstages: []"])
def test_a_recipe_that_is_none(fail: Fail, home: Path, content: bytes) -> None:
    (home / "recipe.yaml").write_bytes(content)
    said = fail("run", "recipe.yaml", "--out", "out", kind="DataError" if b"stages" in content else "RecipeError")
    assert b"stages" in content or "recipe.yaml" in said
    assert not (home / "out").exists()


def test_a_recipe_that_is_not_there(fail: Fail) -> None:
    assert "cannot read the recipe nowhere.yaml" in fail("run", "nowhere.yaml", "--out", "out", kind="RecipeError")


def test_a_recipe_may_be_mended_and_run_in_the_same_folder(fail: Fail, home: Path) -> None:
    file = home / "recipe.yaml"
    for model, said in (("modle", "modle is not a folder"), ("model", "data.tsv does not exist")):
        file.write_text(f"model: {model}\ntask: {{use: classification, data: data.tsv}}\nstages: []\n", encoding="utf-8")
        kind = "ModelError" if model == "modle" else "DataError"
        assert said in fail("run", "recipe.yaml", "--out", "out", kind=kind)
    assert not (home / "out").exists()


def test_an_untuned_model_needs_a_stage_that_tunes_it(fail: Fail, home: Path) -> None:
    write_model(home / "model", trained=False, bare=True)
    text = "model: model\ntask: {use: classification, data: data}\nstages: [{calibrate: {method: fisher}}]\n"
    (home / "recipe.yaml").write_text(text, encoding="utf-8")
    said = fail("run", "recipe.yaml", "--out", "out", kind="RecipeError")
    assert "model is not tuned for this task" in said
    assert not (home / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("compress", "model", "--data", "data", "--out", "out", "--spedup", "3"),
        ("compress", "model", "--data", "data"),
        ("compress", "model", "--data", "data", "--out", "out", "--speedup", "fast"),
        ("compress", "model", "--data", "data", "--out", "out", "--threads", "0"),
        ("inspect", "model", "--length", "0"),
        ("inspect", "model", "--length", "1" + "0" * 30),
        ("bench", "model", "--seconds", "-1"),
        ("bench", "model", "--seconds", "inf"),
        ("bench", "model", "--wait", "inf"),
        ("squash", "model"),
        ("run",),
    ],
)
def test_options_that_typer_refuses(home: Path, call: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...]) -> None:
    code, _, err = call(*arguments)
    assert code == 2
    assert "Usage: slimformer" in err
    assert "Error: " in err
    assert "Traceback" not in err
    assert not (home / "out").exists()


def test_check_of_something_that_is_not_there(fail: Fail) -> None:
    assert "there is nothing called 'nobody' to check" in fail("check", "nobody", kind="SlimformerError")


# -- Where the result goes -------------------------------------------------------------------------------------------------------


def test_an_out_folder_that_holds_something_else(compress: Fail, home: Path) -> None:
    (home / "out").mkdir()
    (home / "out" / "thesis.txt").write_text("years of work", encoding="utf-8")
    said = compress(kind="OutputError", left={"thesis.txt"})
    assert "out holds something else already" in said
    assert (home / "out" / "thesis.txt").read_text(encoding="utf-8") == "years of work"


def test_an_out_that_is_a_file_or_below_one(compress: Fail, fail: Fail, home: Path) -> None:
    said = fail("compress", "model", "--data", "data", "--out", "data/dev.tsv", kind="OutputError")
    assert "data/dev.tsv is a file" in said
    said = fail("compress", "model", "--data", "data", "--out", "data/dev.tsv/out", kind="OutputError")
    assert "data/dev.tsv" in said


def test_the_model_itself_is_no_out_folder(fail: Fail, home: Path) -> None:
    before = {file.name: file.read_bytes() for file in (home / "model").iterdir()}
    said = fail("compress", "model", "--data", "data", "--out", "model", kind="OutputError")
    assert "model holds something else already" in said
    assert {file.name: file.read_bytes() for file in (home / "model").iterdir()} == before


def test_two_runs_in_one_folder(compress: Fail, home: Path) -> None:
    (home / "out").mkdir()
    (home / "out" / ".slimformer").write_text("{}", encoding="utf-8")
    with (home / "out" / ".lock").open("a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert "another run is at work in out" in compress(kind="OutputError")


def test_a_link_in_the_place_of_the_lock(compress: Fail, home: Path) -> None:
    (home / "out").mkdir()
    (home / "out" / ".lock").symlink_to("/dev/zero")
    assert "a link stands in its place" in compress(kind="OutputError")


def test_a_folder_of_another_run(compress: Fail, home: Path) -> None:
    with claim(home / "out", "something else"):
        pass
    said = compress(kind="OutputError")
    assert "out belongs to another run" in said
    assert "there: something else" in said


def test_a_full_disk(compress: Fail, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_text", _full)
    said = compress(kind="OutputError")
    assert "cannot write out" in said
    assert "the disk is full" in said


def test_a_disk_that_fills_up_while_weights_are_written(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """safetensors and onnx write by themselves, with errors of their own."""
    import resource
    import signal

    import torch
    from safetensors.torch import save_file as save

    from slimformer.files import whole_folder

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OutputError), whole_folder(tmp_path / "saved") as part:
            save({"weight": torch.zeros(10_000)}, part / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not (tmp_path / "saved").exists()


def _full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# -- What is no bad input --------------------------------------------------------------------------------------------------------


def test_a_bug_keeps_its_traceback(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("slimformer.running.search.compress", broken)
    monkeypatch.setattr(sys, "argv", ["slimformer", "compress", "model", "--data", "data", "--out", "out"])
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main()


def test_an_interrupt_says_how_to_go_on(
    home: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slimformer.running.search.compress", stopped)
    code, _, err = call("compress", "model", "--data", "data", "--out", "out")
    assert code == 130
    assert "goes on from here" in err
    assert "Traceback" not in err


def test_what_a_file_holds_reaches_the_terminal_readable_and_short():
    error = DataError(
        f"no class '{'x' * 200_000}'\nin\x1b[31m line 3", facts=[f"fact {number}" for number in range(100)], help="a\ud800b"
    )
    assert len(error.what) <= 400
    assert error.what.startswith("no class 'xxx")
    assert error.what.endswith("in\\x1b[31m line 3")
    assert error.facts[-1] == "and 60 more"
    assert error.help == "a\\ud800b"
    assert len(str(error).splitlines()) == 43
    assert len(str(DataError("long", facts=["y" * 1000] * 30))) < 3500
    assert DataError("long", facts=["y" * 1000] * 30).facts[-1] == "and 23 more"


@pytest.mark.parametrize(
    ("value", "text"),
    [("y" * 10_000_000, "'yyyy"), ({"a": [1, 2]}, "{'a': [1, 2]}"), ("a\tb", r"'a\tb'"), (None, "None"), (1.5, "1.5")],
)
def test_a_value_of_any_size_is_quoted_briefly(value, text):
    assert shown(value).startswith(text)
    assert len(shown(value)) <= 80
    nested = [value] * 9
    for _ in range(40):
        nested = [nested] * 9  # 9^40 values, of which the message shows a few
    assert len(shown(nested)) <= 80
