"""An exporter of another package: a recipe names it and gives its options, which its own class checks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slimformer import registry
from slimformer.errors import RecipeError
from slimformer.running.reader import parse_recipe

SOURCE = '''"""ONNX under another name."""

from dataclasses import dataclass

from slimformer.exporters.base import Exporter, FileKind
from slimformer.exporters.onnx import Onnx


@dataclass(frozen=True)
class Plain(Exporter):
    """`level`: from 1 to 3."""

    files = {"plain": FileKind("plain.onnx", "plain", "fp32")}

    level: int = 1

    def __post_init__(self):
        if not 1 <= self.level <= 3:
            raise ValueError(f"level must be from 1 to 3, got {self.level}")

    def export(self, model, batches, path, variant, outputs=("logits",), ranges=None):
        return Onnx().export(model, batches, path, "float", outputs, ranges)
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package with that file, found through its entry point."""
    (tmp_path / "plain.py").write_text(SOURCE, encoding="utf-8")
    info = tmp_path / "plain-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plain\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[slimformer.exporters]\nplain = plain:Plain\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    registry.forget()
    yield
    sys.modules.pop("plain", None)
    registry.forget()


def recipe(**export: object) -> dict[str, object]:
    return {"model": "x", "task": "intents", "stages": [{"export": export}]}


def test_a_recipe_names_any_exporter_with_its_own_options(package: None) -> None:
    options = {"to": "plain", "choose_within": 2.0, "level": 3}
    read = parse_recipe(recipe(**options))
    exporter = read.export.exporter()
    assert (registry.name_of(exporter), exporter.level, read.export.choose_within) == ("plain", 3, 2.0)  # type: ignore[attr-defined]
    assert parse_recipe(read.to_data()) == read
    assert {"export": options} in read.to_data()["stages"]


@pytest.mark.parametrize(
    ("export", "message"),
    [
        ({"to": "plane"}, r"export\.to: there is no 'plane'; did you mean 'plain'"),
        ({"to": "plain", "levle": 2}, r"export\.levle: unknown option; did you mean 'level'"),
        ({"to": "plain", "level": 4}, r"level must be from 1 to 3, got 4"),
        ({"to": "plain", "reduce_range": True}, r"export\.reduce_range: unknown option"),
        ({"to": "plain", "openvino": True}, r"openvino: its file is made from the ONNX file; export to onnx"),
        ({"level": 2}, r"export\.level: unknown option"),
    ],
)
def test_options_of_an_exporter_are_checked_by_its_class(package: None, export: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(recipe(**export))
