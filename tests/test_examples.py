"""The examples in the docstrings of the public names run, in a folder as a user has it: models, exports and data."""

from __future__ import annotations

import doctest
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_export
from tiny_folder import write_data, write_model

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
# What makes a compression quick and says nothing on what it does: two levels of latency, one look at a budget, no waiting.
HURRY: dict[str, Any] = {
    "slimformer.measuring.latency.SHARES": (1.0, 0.0),
    "slimformer.running.search.PROBES": 1,
    "psutil.cpu_percent": lambda **_: 0.0,
}
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
)  # other names with examples are in these modules


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two exported models, `dense` and `small`, their data `reviews`, and `my-bert`; `small` has a ledger with one row."""
    folder = tmp_path_factory.mktemp("examples")
    tiny_export.export(folder / "dense")
    tiny_export.export(folder / "small", weights={"dull": (0.0, 1.0)})
    tiny_export.data(folder / "reviews")
    write_model(folder / "my-bert", trained=False)
    padded = {"model_max_length": 64, "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
    (folder / "my-bert" / "tokenizer_config.json").write_text(json.dumps(padded), encoding="utf-8")
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
    for place, value in HURRY.items():
        monkeypatch.setattr(place, value)
    assert failures(getattr(slimformer, name), name) == 0


@pytest.mark.parametrize("name", registry.names("methods"))
def test_the_examples_of_a_method_run(name: str) -> None:
    assert failures(registry.find("methods", name), name) == 0


@pytest.mark.parametrize("place", INNER)
def test_the_examples_for_plug_in_authors_run(place: str) -> None:
    assert failures(importlib.import_module(f"slimformer.{place}"), place) == 0
