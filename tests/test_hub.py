"""Models named by their hub id: a path wins, what is in the cache is read without a network, and offline says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_folder import write_data, write_model
from tiny_hub import COMMIT, cached

from slimformer.errors import ModelError
from slimformer.running.reader import read_recipe
from slimformer.saving import hub
from slimformer.saving.checkpoint import load


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub._downloaded.cache_clear()
    return tmp_path / "cache"


@pytest.mark.slow
def test_a_name_that_is_a_path_is_that_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "own" / "bert")
    cached(cache, "own/bert", tmp_path / "own" / "bert")
    assert hub.local_folder("own/bert") == Path("own/bert")
    for name in ("./missing", "../missing/bert", "/missing/bert", "missing", "a/b/c"):
        with pytest.raises(ModelError, match=f"{name} is not a folder with a model" if name[0] != "." else "is not a folder"):
            hub.local_folder(name)


@pytest.mark.slow
def test_a_model_of_the_hub_is_read_from_its_cache(tmp_path: Path, cache: Path) -> None:
    folder = write_model(tmp_path / "bert")
    snapshot = cached(cache, "someone/tiny-bert", folder)
    for name in ("someone/tiny-bert", "someone/tiny-bert@main", f"someone/tiny-bert@{COMMIT}"):
        assert hub.local_folder(name) == snapshot
    assert hub.local_folder("someone/tiny-bert", revision=COMMIT) == snapshot
    for name, options in ((snapshot, {}), ("someone/tiny-bert@main", {}), ("someone/tiny-bert", {"revision": COMMIT})):
        assert load(name, **options).config.model_type == "bert"


def test_a_model_that_the_hub_does_not_give_is_told(cache: Path) -> None:
    with pytest.raises(ModelError, match="'someone/tiny-bert' is no folder here, and the hub does not give it"):
        hub.local_folder("someone/tiny-bert")
    with pytest.raises(ModelError, match="does not give it"):
        hub.local_folder("someone/tiny-bert@v2")


def test_only_files_of_a_model_folder_are_asked_for() -> None:
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json", "plan.json"]
    files += ["model/config.json", "model/model.safetensors", "model/tokenizer.json"]
    files += ["modules.json", "sentence_bert_config.json", "1_Pooling/config.json", "2_Dense/model.safetensors"]
    others = ["pytorch_model.bin", "modeling_own.py", "onnx/model.onnx", "2_Dense/pytorch_model.bin", "README.md"]
    assert list(filter_repo_objects([*files, *others], allow_patterns=list(hub.DOWNLOADED))) == files


@pytest.mark.slow
def test_a_run_names_its_hub_model_in_what_it_delivers(
    tmp_path: Path, cache: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    cached(cache, "someone/tiny-bert", write_model(tmp_path / "bert"))
    data = write_data(tmp_path / "data")
    (tmp_path / "recipe.yaml").write_text(
        f"model: someone/tiny-bert\n"
        f"task: {{use: classification, data: {data}}}\n"
        "stages:\n"
        "  - calibrate: {method: {use: layers, keep: 0.7}}\n"
        "  - bench: {rivals: [], seconds: 0.2}\n",
        encoding="utf-8",
    )
    status, _, error = call("run", tmp_path / "recipe.yaml", "--out", tmp_path / "out", "--wait", 0)
    assert status == 0, error
    assert read_recipe(tmp_path / "out" / "recipe.yaml").model == "someone/tiny-bert"
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert "base_model: someone/tiny-bert\n" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
