"""A model that is built from scratch: its vocabulary, its folder, and a recipe that trains it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from slimformer.data.vocabulary import train_vocabulary
from slimformer.errors import DataError, OutputError, RecipeError
from slimformer.running.fresh import Fresh
from slimformer.running.given import given_models
from slimformer.running.reader import parse_recipe
from slimformer.running.recipe import Recipe
from slimformer.running.runner import train_stages
from slimformer.saving import checkpoint
from slimformer.tasks import Classification, Translation
from slimformer.training.stage import Train

NUMBERS = range(60)
DATA = {"en": [f"room {n} is cold ." for n in NUMBERS], "de": [f"Raum {n} ist kühl ." for n in NUMBERS]}
SIZES: dict[str, dict[str, Any]] = {
    "marian": {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    },
    "bart": {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    },
    "t5": {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16},
}


def task() -> Translation:
    return Translation(data=DATA, source="en", target="de")


def test_the_most_frequent_pair_is_merged_first() -> None:
    """Sennrich et al.'s algorithm by hand: of "ab ab ac" in bytes, with a space before each word, " a" stands three times."""
    special = {"pad_token": "<pad>", "eos_token": "</s>"}
    tokenizer = train_vocabulary(["ab ab ac"], 256 + 2 + 2, special)
    assert tokenizer.token_to_id("<pad>") == 0
    assert tokenizer.encode("ab ac").tokens == ["Ġab", "Ġa", "c", "</s>"]
    assert tokenizer.decode(tokenizer.encode("ab  Ä 日").ids) == "ab  Ä 日"  # bytes spell what was never seen
    with pytest.raises(DataError, match="a vocabulary of 261 tokens, not of 900") as error:
        train_vocabulary(["ab ab ac"], 900, special)
    assert "at most 261" in str(error.value)
    with pytest.raises(DataError, match="ask for 258 or more"):
        train_vocabulary(["ab ab ac"], 99, special)


@pytest.mark.parametrize("kind", SIZES)
def test_transformers_reads_what_was_built(kind: str, tmp_path: Path) -> None:
    recipe = Recipe(Fresh(kind, 300, SIZES[kind]), task(), (Train(epochs=1),))
    with given_models(recipe, None, tmp_path) as given:
        folder = Path(str(given.model))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder)
    config, said = model.config, model.generation_config
    assert not checkpoint.is_tuned(folder, "AutoModelForSeq2SeqLM")
    assert (config.vocab_size, len(tokenizer), tokenizer.eos_token, said.num_beams) == (300, 300, "</s>", 5)
    for name in ("pad_token_id", "eos_token_id"):
        assert getattr(config, name) == getattr(said, name) == getattr(tokenizer, name)
    start = tokenizer.eos_token_id if kind == "bart" else tokenizer.pad_token_id
    assert config.decoder_start_token_id == said.decoder_start_token_id == start
    rows = tokenizer(["room 7 is cold .", "kühl"], return_tensors="pt", padding=True)
    assert tokenizer.decode(rows["input_ids"][0], skip_special_tokens=True) == "room 7 is cold ."
    with torch.no_grad():
        written = model.generate(**rows, max_new_tokens=4)
    assert written.shape[0] == 2
    assert (written[:, 0] == start).all()


def test_a_recipe_trains_what_it_built_and_builds_it_once(tmp_path: Path) -> None:
    fresh = Fresh("marian", 300, SIZES["marian"])
    recipe = Recipe(fresh, task(), (Train(epochs=1, batch_size=16, lr=1e-3, precision="fp32"),))
    train_stages(recipe, tmp_path / "out")
    folder = tmp_path / "out" / "given" / "marian"
    written = (folder / "model.safetensors").stat().st_mtime_ns
    (made,) = tmp_path.glob("out/work/teacher/1-train-*/made")
    assert checkpoint.is_tuned(made, "AutoModelForSeq2SeqLM")
    before, after = (checkpoint.load_as(place, "AutoModelForSeq2SeqLM", {}, 17) for place in (folder, made))
    assert any((one != other).any() for one, other in zip(before.parameters(), after.parameters(), strict=True))
    assert after.generation_config.num_beams == 5
    train_stages(recipe, tmp_path / "out")
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    with (
        pytest.raises(OutputError, match="holds another model"),
        given_models(Recipe(fresh, task(), recipe.stages, seed=3), None, tmp_path / "out"),
    ):
        pass


def test_yaml_names_a_fresh_model() -> None:
    data = {"model": {"use": "t5", "vocabulary": 500, "config": {"d_model": 32}}, "task": {"use": "intents"}, "stages": []}
    recipe = parse_recipe(data)
    assert recipe.model == Fresh("t5", 500, {"d_model": 32})
    assert parse_recipe(recipe.to_data()) == recipe


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"use": "bert"}, "a bert is made from a teacher"),
        ({"use": "marain"}, "did you mean 'marian'"),
        ({"use": "marian", "vocabulary": 0}, "model.vocabulary must be from 1"),
        ({"use": "marian", "config": {"d_modle": 32}}, "config.d_modle: unknown field"),
        ({"use": "marian", "config": {"vocab_size": 32}}, "config.vocab_size: it follows from"),
        ({"use": "marian", "config": {"dropout": [1]}}, "config.dropout: must be a number"),
        ({"vocabulary": 500}, "model.use"),
        ({"use": "marian", "size": 5}, "model.size: unknown option"),
        (3, "model: must be a path"),
    ],
)
def test_a_mistake_in_a_fresh_model_is_named(model: Any, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_recipe({"model": model, "task": {"use": "intents"}, "stages": []})
    assert said in str(error.value)


def test_sizes_and_tasks_that_do_not_fit_leave_nothing(tmp_path: Path) -> None:
    uneven = Fresh("marian", 300, SIZES["marian"] | {"d_model": 17})
    with (
        pytest.raises(RecipeError, match="cannot be built from this config"),
        given_models(Recipe(uneven, task(), ()), None, tmp_path / "out"),
    ):
        pass
    rows = [{"sentence": f"film {n}", "label": n % 2} for n in range(40)]
    with (
        pytest.raises(RecipeError, match="one from scratch would learn little"),
        given_models(Recipe(Fresh("marian", 300), Classification(data=rows), ()), None, tmp_path / "out"),
    ):
        pass
    assert not (tmp_path / "out").exists()
