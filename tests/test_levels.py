"""`bench --levels`: a latency table that is measured on one machine and read by a recipe on another."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import tiny
from tiny_folder import write_data, write_model

from slimformer import cli
from slimformer.core.cost import latency
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.errors import RecipeError
from slimformer.families.base import anatomy_of, subject_of
from slimformer.measuring.latency import Latency, Levels, _short_plans, _table
from slimformer.methods.fisher import Fisher
from slimformer.running.levels import measure_table, write_levels
from slimformer.running.reader import read_recipe
from slimformer.tasks.classification import Classification

PARTS = ("heads", "neurons", "last_heads", "last_neurons")
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
    assert found.last_heads.keys() == found.heads.keys()
    assert found.last_neurons.keys() == found.neurons.keys()
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


def test_the_last_layer_of_an_encoder_is_timed_by_itself() -> None:
    anatomy = anatomy_of(tiny("bert"))  # three layers of four heads and 24 neurons
    plans = {name: anatomy.after(plan) for name, plan in _short_plans(anatomy).items()}
    left = {name: sorted(site.id.removeprefix("encoder.") for site in cut.units if site.size) for name, cut in plans.items()}
    assert left == {
        "none": [],
        "last_heads-1": ["2.heads"],
        "last_heads-4": ["2.heads"],
        "heads-1": ["0.heads", "1.heads", "2.heads"],
        "heads-4": ["0.heads", "1.heads", "2.heads"],
        "last_neurons-2": ["2.heads", "2.neurons"],
        "last_neurons-24": ["2.heads", "2.neurons"],
        "neurons-2": ["0.neurons", "1.neurons", "2.heads"],
        "neurons-24": ["0.neurons", "1.neurons", "2.heads"],
    }
    assert [plans["heads-1"].sites[f"encoder.{layer}.heads"].size for layer in range(3)] == [1, 1, 4]


def test_a_table_gives_back_the_times_that_it_was_made_from() -> None:
    anatomy = anatomy_of(tiny("bert"))
    none, heads, neurons = 0.5, {1: 2.0, 4: 5.0}, {2: 1.0, 24: 12.0}  # of each of two layers
    last, narrow = {1: 0.75, 4: 1.5}, {2: 0.25, 24: 0.5}
    ms = {"fp32": 90.0, "int8": none + 2 * (5.0 + 12.0) + 1.5 + 0.5, "none": none}
    ms |= {f"last_heads-{units}": none + time for units, time in last.items()}
    ms |= {f"heads-{units}": none + 1.5 + 2 * time for units, time in heads.items()}
    ms |= {f"neurons-{units}": none + 1.5 + 2 * time for units, time in neurons.items()}
    ms |= {f"last_neurons-{units}": none + 1.5 + time for units, time in narrow.items()}
    found = _table(anatomy, ms)
    assert found == Levels(none, 90.0, heads, neurons, last, narrow)
    slow = _table(anatomy, ms | {"int8": none + 2 * (ms["int8"] - none)})  # a whole model takes twice what its parts do
    assert slow == replace(found, **{name: {units: 2 * time for units, time in getattr(found, name).items()} for name in PARTS})


def test_what_comes_after_the_last_attention_costs_as_the_last_layer() -> None:
    model = tiny("bert")
    anatomy = anatomy_of(model)
    table = {"heads": {4: 5.0}, "neurons": {24: 12.0}, "last_heads": {4: 1.5}, "last_neurons": {24: 0.5}}
    assert latency(anatomy, 0.0, table).dense == pytest.approx(2 * 17.0 + 2.0)
    assert latency(anatomy, 0.0, {part: table[part] for part in PARTS[:2]}).dense == pytest.approx(
        3 * 17.0
    )  # a table of before
    cut = subject_of(shrink(model, anatomy, Plan({"encoder.2.attention": ()}))).anatomy
    assert latency(cut, 0.0, table).dense == pytest.approx(17.0 + 1.5 + 2 * 0.5)  # layer 1 is the last to attend now
    single = anatomy_of(tiny("bert", num_hidden_layers=1))
    ms = {"fp32": 9.0, "int8": 3.0, "none": 1.0, "last_heads-1": 1.5, "last_heads-4": 2.0, "last_neurons-2": 2.5}
    found = _table(single, ms | {"last_neurons-24": 3.0})
    assert (found.heads, found.neurons) == (found.last_heads, found.last_neurons) == ({1: 0.5, 4: 1.0}, {2: 0.5, 24: 1.0})
    assert Latency.of(single, found).cost.dense == pytest.approx(3.0)
