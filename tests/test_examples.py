"""The examples in the docstrings of the public names run, in a folder as a user has it: models, exports and data."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import tiny_export

import slimformer
from slimformer.measuring.machine import environment
from slimformer.measuring.records import Record
from slimformer.reporting.ledger import append_record

ROOMS = ("core", "families", "hooks", "measuring", "reporting")  # each of their public names has an example
INNER = (
    "core.form",
    "families.base",
    "measuring.records",
    "measuring.scoring",
    "reporting.words",
    "reporting.svg",
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
    """Two exported models, `dense` and `small`, and their data, `reviews`; `small` has a ledger with one row."""
    folder = tmp_path_factory.mktemp("examples")
    tiny_export.export(folder / "dense")
    tiny_export.export(folder / "small", weights={"dull": (0.0, 1.0)})
    tiny_export.data(folder / "reviews")
    row = Record("int8", "other", "my-bert", "reviews", "dev", "accuracy", {"accuracy": 0.5}, "2026-01-02", environment())
    append_record(folder / "small" / "ledger.jsonl", row)
    return folder


@pytest.mark.parametrize("name", slimformer.__all__)
def test_the_examples_of_a_public_name_run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    place = slimformer._PLACES[name]
    names = vars(importlib.import_module(f"slimformer.{place}"))
    examples = [test for test in doctest.DocTestFinder(recurse=False).find(names[name]) if test.examples]
    assert examples or place.partition(".")[0] not in ROOMS, f"{name} has no example"
    for example in examples:
        assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize("place", INNER)
def test_the_examples_for_plug_in_authors_run(place: str) -> None:
    module = importlib.import_module(f"slimformer.{place}")
    for example in doctest.DocTestFinder().find(module):
        assert doctest.DocTestRunner().run(example).failed == 0
