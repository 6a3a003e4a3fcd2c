"""The examples in the docstrings of the public names run, in a folder as a user has it: models, exports and data."""

from __future__ import annotations

import doctest
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_export
import torch
from tiny_folder import write_data, write_model
from tiny_hurry import count_speeds, hurry

import slimformer
from slimformer import registry
from slimformer.measuring.machine import environment
from slimformer.measuring.records import Record
from slimformer.reporting.ledger import append_record

RUNS = ("Result", "compress", "run")  # their examples need a finished run
RECIPE = """
model: my-bert
task: {use: classification, data: reviews}
stages:
  - calibrate: {method: {use: fisher, keep: 0.6, examples: 64}}
  - bench: {rivals: [], seconds: 0.1}
"""
INNER = (
    "core.form",
    "families.base",
    "measuring.records",
    "measuring.scoring",
    "reporting.words",
    "reporting.svg",
    "errors",
    "log",
    "digests",
    "data.labels",
    "data.memory",
    "tasks.classification",
    "tasks.intents",
    "tasks.question_answering",
    "tasks.embedding",
    "tasks.reranking",
    "tasks.tagging",
    "tasks._tags",
)  # other names with examples are in these modules


def write_padded_model(folder: Path, **changes: Any) -> None:
    """The tiny model, with the padding token that a Trainer asks for."""
    write_model(folder, **changes)
    config = {"model_max_length": 64, "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two exported models, `dense` and `small`, their data `reviews`, and `my-bert`; `small` has a ledger with one row."""
    folder = tmp_path_factory.mktemp("examples")
    tiny_export.export(folder / "dense")
    tiny_export.export(folder / "small", weights={"dull": (0.0, 1.0)})
    tiny_export.data(folder / "reviews")
    write_padded_model(folder / "my-bert", trained=False)
    row = Record("int8", "other", "my-bert", "reviews", "dev", "accuracy", {"accuracy": 0.5}, "2026-01-02", environment())
    append_record(folder / "small" / "ledger.jsonl", row)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuned model `my-bert`, its data `reviews`, a recipe `one-shot.yaml`, and its run, `finished`."""
    home = tmp_path_factory.mktemp("home")
    write_model(home / "my-bert")
    write_data(home / "reviews")
    (home / "one-shot.yaml").write_text(RECIPE, encoding="utf-8")
    slimformer.run(home / "one-shot.yaml", home / "finished", threads=1, wait_seconds=0)
    return home


def failures(item: Any, name: str) -> int:
    """How many examples of an object and its methods go wrong; what they print is shown."""
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    return sum(runner.run(example).failed for example in finder.find(item, name) if example.examples)


@pytest.mark.parametrize("name", [item for item in slimformer.__all__ if item not in RUNS])
def test_the_examples_of_a_public_name_run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert failures(getattr(slimformer, name), name) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_examples_of_a_run_run(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hurry(monkeypatch)
    count_speeds(monkeypatch)
    assert failures(getattr(slimformer, name), name) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # torch's, of a Trainer without a GPU
def test_the_python_of_the_quick_start_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks in their order; the tiny model is asked for little."""
    write_padded_model(tmp_path / "my-bert")
    write_data(tmp_path / "reviews", train=100, dev=20)
    monkeypatch.chdir(tmp_path)
    hurry(monkeypatch)
    count_speeds(monkeypatch)
    text = (Path(__file__).parent.parent / "docs" / "quickstart.md").read_text(encoding="utf-8")
    part = text.split("## From Python")[1].split("\n## ")[0]
    cheap = "speedup=1.5, max_loss=100.0, tries=1, rivals=(), epochs=1, threads=1"
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", part, re.DOTALL):
        exec(block.replace("speedup=3, max_loss=1.0", cheap), names)
    before, after = names["small"], names["again"]
    inputs = names["tokenizer"]("the film was great", return_tensors="pt")
    assert torch.equal(before.eval()(**inputs).logits, after(**inputs).logits)
    assert slimformer.load("cut-by-gates").num_parameters() < names["model"].num_parameters()


@pytest.mark.parametrize("name", registry.names("methods"))
def test_the_examples_of_a_method_run(name: str) -> None:
    assert failures(registry.find("methods", name), name) == 0


@pytest.mark.parametrize("place", INNER)
def test_the_examples_for_plug_in_authors_run(place: str) -> None:
    assert failures(importlib.import_module(f"slimformer.{place}"), place) == 0
