"""A package with one small file of each kind: those of docs/extend.md, installed as a third party's, checked, and all used in one run."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slimformer import registry
from slimformer.running.reader import parse_recipe

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "extend.md").read_text(encoding="utf-8")


def shown_files(folder: str) -> dict[str, str]:
    """Name and code of the files under `folder` that docs/extend.md shows whole."""
    return dict(re.findall(rf"`{folder}/(\w+)\.py`.\n\n```python\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture
def plugins(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The package of docs/extend.md, installed as a third party's would be: the name of each plug-in and its kind."""
    home = tmp_path / "site-packages"
    home.mkdir()
    (home / "yourpackage").mkdir()
    (home / "yourpackage" / "__init__.py").touch()
    for name, code in shown_files("yourpackage").items():
        (home / "yourpackage" / f"{name}.py").write_text(code, encoding="utf-8")
    (declared,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    groups = tomllib.loads(declared)["project"]["entry-points"]
    lines = [
        line for group, names in groups.items() for line in (f"[{group}]", *(f"{name} = {at}" for name, at in names.items()))
    ]
    info = home / "yourpackage-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: yourpackage\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(home))
        importlib.invalidate_caches()
        registry.forget()
        yield {name: group.removeprefix("slimformer.") for group, names in groups.items() for name in names}
    for name in [name for name in sys.modules if name.partition(".")[0] == "yourpackage"]:
        del sys.modules[name]
    registry.forget()


@pytest.fixture
def plugin(plugins: dict[str, str]) -> str:
    """The method that is shown."""
    return next(name for name, kind in plugins.items() if kind == "methods")


@pytest.mark.slow
def test_a_plug_in_of_each_kind_is_shown_and_passes_all_checks(plugins: dict[str, str]) -> None:
    from slimformer.testing.checks import check, checks_of

    assert set(plugins.values()) == set(registry.KINDS)
    assert set(plugins) == set(shown_files("yourpackage"))
    for name, kind in plugins.items():
        lines = list(check(name))
        assert len(lines) == len(checks_of(kind))
        assert [line for line, good in lines if not good] == []
        assert registry.summary(kind, name)


def test_the_task_that_is_shown_has_its_options_on_the_command_line(plugins: dict[str, str]) -> None:
    from slimformer.tasks.base import Split

    task = registry.find("tasks", "parity").from_flags({"--numbers": "300"})
    recipe = parse_recipe({"model": "x", "task": {"use": "parity", "numbers": 300}, "stages": []})
    assert recipe.task == task
    assert [len(task.split(split)) for split in Split] == [300, 200, 200]


def test_the_method_that_is_shown_passes_the_test_that_is_shown(plugin: str) -> None:
    ((name, code),) = shown_files("tests").items()
    assert name == f"test_{plugin}"
    scope: dict[str, Any] = {"__name__": name}
    exec(compile(code, f"{name}.py", "exec"), scope)
    tests = [value for key, value in scope.items() if key.startswith("test_")]
    assert tests
    for test in tests:
        test()


def test_a_wrong_option_of_the_method_is_a_mistake_with_a_place(plugin: str) -> None:
    from slimformer.errors import RecipeError

    with pytest.raises(RecipeError, match=r"stages\[0\]\.calibrate\.method: keep must be above 0"):
        parse_recipe({"model": "x", "task": "intents", "stages": [{"calibrate": {"method": {"use": plugin, "keep": 0}}}]})


@pytest.fixture
def model(plugins: dict[str, str], tmp_path: Path) -> Path:
    """A tuned model of the family that is shown, for the task that is shown, with its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    from slimformer.testing.tiny import tiny

    folder, words = tmp_path / "model", ["[CLS]", "[PAD]", "[SEP]", "[UNK]", *map(str, range(10))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 16}), encoding="utf-8")
    labels = registry.find("tasks", "parity")().configure()
    tiny("data2vec-text", vocab_size=len(words), num_hidden_layers=2, **labels).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_run_uses_a_plug_in_of_each_kind(
    plugins: dict[str, str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import slimformer
    from slimformer.log import Log
    from slimformer.reporting.ledger import read_facts, read_records
    from slimformer.saving.checkpoint import load_plan

    stages: list[dict[str, Any]] = [
        {"calibrate": {"method": {"use": "magnitude", "keep": 0.9}}},
        {"calibrate": {"method": {"use": "truncation", "rank": 4}}},
        {"train": {"epochs": 1, "lr": 1e-3, "methods": [{"use": "distillation"}]}},
        {"export": {"to": "pt2", "agreement": 1e-3}},
        {"bench": {"seconds": 0.1, "rivals": ["teacher-int8"]}},
    ]
    recipe = parse_recipe({"model": str(model), "task": {"use": "parity", "numbers": 200}, "stages": stages})
    assert parse_recipe(recipe.to_data()) == recipe
    out = tmp_path / "out"
    slimformer.run(recipe, out, log=Log(out, quiet=True), threads=1, wait_seconds=0.0)

    dense, int8, ours = read_records([out / "ledger.jsonl"])
    assert (dense.name, int8.name, ours.name, ours.chosen) == ("dense fp32", "dense int8", "slimformer pt2", True)
    assert (ours.task, ours.file, ours.precision) == ("parity", "model.pt2", "float")
    assert {timing.runtime for timing in ours.timings} == {"torch_export"}
    assert 0 < ours.encoder_params < dense.encoder_params

    plan = load_plan(out)
    assert plan.digest() == ours.plan
    assert sum(map(len, plan.keep.values())) < 2 * 4  # magnitude took heads
    assert {registry.name_of(form) for form in plan.forms.values()} == {"lowrank"}
    small = slimformer.load(out)
    factored = [name for name, module in small.named_modules() if type(module).__name__ == "LowRankLinear"]
    assert len(factored) == len(plan.forms) > 0
    batch = {"input_ids": torch.tensor([[0, 5, 6, 2]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    run = registry.find("runtimes", "torch_export")().load(out / "model.pt2", 1)
    with torch.no_grad():
        gap = small(**batch).logits.numpy() - run({name: values.numpy() for name, values in batch.items()})["logits"]
    assert abs(gap).max() < 1e-4

    facts = read_facts(out)
    assert facts is not None
    assert (facts.best, [item.name for item in facts.files]) == ("model.pt2", ["model.pt2"])
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| `model.pt2` |" in card
    assert "onnx" not in card.split("## Measured")[0]
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(out)
    capture = io.StringIO()
    with contextlib.redirect_stdout(capture):
        exec(code, {})
    assert capture.getvalue() == "{'logits': (2, 2)}\n"

    again = slimformer.bench([out], runtimes=("torch_export",), threads=1, seconds=0.1, wait_seconds=0.0)
    assert [(row.file, row.score) for row in again.records] == [("model.pt2", ours.score)]
