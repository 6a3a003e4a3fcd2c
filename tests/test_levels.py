"""`bench --levels`: a latency table that is measured on one machine and read by a recipe on another."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_folder import write_data, write_model

from slimformer import cli
from slimformer.errors import RecipeError
from slimformer.measuring.latency import Levels
from slimformer.methods.fisher import Fisher
from slimformer.running.levels import measure_table, write_levels
from slimformer.running.reader import read_recipe
from slimformer.tasks.classification import Classification

RECIPE = (
    "{model: ./model, task: {use: classification, data: ./data}, stages: [calibrate: {method: {use: fisher, cost: latency}}]"
)


@pytest.mark.slow
def test_a_table_is_measured_written_and_read(tmp_path: Path) -> None:
    write_model(tmp_path / "model", trained=False)
    write_data(tmp_path / "data", train=60, dev=20)
    found = measure_table(tmp_path / "model", Classification(data=str(tmp_path / "data")), wait_seconds=0.0)
    assert set(found.heads) <= {1, 2, 3, 4}
    assert max(found.heads) == 4
    assert max(found.neurons) == 24
    assert found.single is not None
    assert found.single.heads.keys() == found.heads.keys()
    assert found.single.dense_fp32_ms > found.dense_fp32_ms  # a text alone takes longer than one of many
    write_levels(found, tmp_path / "table.yaml", "model", 1)
    assert "# model: model; machine: " in (tmp_path / "table.yaml").read_text(encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE + ", latency: table.yaml}", encoding="utf-8")
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert recipe.latency == found
    assert recipe.stages[0].methods == (Fisher(cost="latency"),)


def test_a_table_that_cannot_be_read_is_a_mistake_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE + ", latency: nowhere.yaml}", encoding="utf-8")
    with pytest.raises(RecipeError, match="latency: cannot read the table .*nowhere.yaml"):
        read_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "table.yaml").write_text("{fixed_ms: 0.1, heads: {1: 2.0}}", encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE + ", latency: table.yaml}", encoding="utf-8")
    with pytest.raises(RecipeError, match="latency"):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_table_of_single_texts_holds_no_other(tmp_path: Path) -> None:
    (tmp_path / "table.yaml").write_text(
        "{fixed_ms: 0.1, dense_fp32_ms: 1, heads: {1: 2}, neurons: {1: 2}, single: {fixed_ms: 0.1, dense_fp32_ms: 1, heads: {1: 2}, "
        "neurons: {1: 2}, single: {fixed_ms: 0.1, dense_fp32_ms: 1, heads: {1: 2}, neurons: {1: 2}}}}",
        encoding="utf-8",
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE + ", latency: table.yaml}", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"latency.*single must not hold a table of its own"):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_written_table_is_the_table(tmp_path: Path) -> None:
    levels = Levels(0.1, 2.0, {1: 0.25, 4: 0.75}, {8: 0.5}, single=Levels(0.3, 3.0, {1: 0.5, 4: 1.0}, {8: 0.75}))
    write_levels(levels, tmp_path / "table.yaml", "my-bert", None)
    (tmp_path / "recipe.yaml").write_text(RECIPE + ", latency: table.yaml}", encoding="utf-8")
    assert read_recipe(tmp_path / "recipe.yaml").latency == levels


def test_several_models_or_no_data_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in ((("a", "b", "--data", "x"), "times one model"), (("a",), "needs the task's texts")):
        monkeypatch.setattr(sys, "argv", ["slimformer", "bench", *words, "--levels", "out.yaml"])
        with pytest.raises(SystemExit) as error:
            cli.main()
        assert error.value.code == 2
        assert says in capsys.readouterr().err
