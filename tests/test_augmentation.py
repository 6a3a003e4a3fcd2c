"""Augmentation: neighbours by brute force, whole words only, everything else of a row untouched, the masked model by hand, the stage."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny import tiny
from tiny_folder import write_data, write_model
from tokenizers import Tokenizer, models

from slimformer.core.plan import Plan
from slimformer.data.augmentation import Words, augment_rows, likely_words, nearest_words
from slimformer.errors import ModelError, RecipeError
from slimformer.log import Log
from slimformer.running.bundle import Run
from slimformer.running.preflight import check_masked_model, preflight
from slimformer.running.prepare import prepare_bundle
from slimformer.running.reader import parse_recipe, read_recipe
from slimformer.running.recipe import Recipe
from slimformer.running.stages import run_stage, training_rows
from slimformer.tasks.base import Features, Split
from slimformer.tasks.classification import Classification
from slimformer.training.stage import Train

TOKENS = ["[PAD]", "[CLS]", "[SEP]", "good", "fine", "bad", "film", "##s", ".", "room", "not", "7", "movie", "##ing"]
GOOD, FINE, BAD, FILM, S, DOT, ROOM, NOT, MOVIE = 3, 4, 5, 6, 7, 8, 9, 10, 12


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({token: index for index, token in enumerate(TOKENS)}, unk_token="[PAD]"))
    tokenizer.add_special_tokens(TOKENS[:3])
    return tokenizer


def table() -> torch.Tensor:
    return torch.randn(len(TOKENS) + 2, 5, generator=torch.Generator().manual_seed(3))  # two rows without a token


def features(*rows: list[int], **columns: Any) -> Features:
    shared = {"input_ids": list(rows), "token_type_ids": [[0] * len(row) for row in rows]}
    return Features(shared | columns, list(range(len(rows))), 0, 0)


ROWS = ([1, GOOD, FILM, S, DOT, 2], [1, NOT, BAD, 2, ROOM, 13, GOOD, 2])


def test_words_of_one_token_are_found():
    words = Words.of(wordpiece())
    assert [TOKENS[index] for index in np.flatnonzero(words.whole)] == ["good", "fine", "bad", "film", "room", "not", "movie"]
    assert [TOKENS[index] for index in np.flatnonzero(words.continues)] == ["##s", "##ing"]
    assert [words.places(row).tolist() for row in ROWS] == [[1], [1, 2, 6]]


@pytest.mark.parametrize("mark", ["Ġ", "▁"])
def test_words_of_vocabularies_that_mark_beginnings(mark):
    tokens = ["<s>", "</s>", f"{mark}good", f"{mark}film", "s", ".", f"{mark}", f"{mark}room", "ing", f"{mark}7"]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    words = Words.of(tokenizer)
    assert words.places([0, 2, 3, 4, 5, 7, 5, 2, 1]).tolist() == [1, 5, 7]
    assert words.places([0, 8, 2]).tolist() == [2]


def test_in_a_vocabulary_of_words_all_are_whole():
    tokenizer = Tokenizer(models.WordLevel({"[CLS]": 0, "good": 1, "##s": 2, "!": 3}, unk_token="!"))
    tokenizer.add_special_tokens(["[CLS]"])
    assert Words.of(tokenizer).places([0, 1, 3, 1]).tolist() == [1, 3]


def test_neighbours_by_brute_force():
    words, given = Words.of(wordpiece()), table()
    found = nearest_words(given, words, iter([GOOD, BAD, GOOD, ROOM]), 3)
    assert set(found) == {GOOD, BAD, ROOM}
    known = [GOOD, FINE, BAD, FILM, ROOM, NOT, MOVIE]
    for token, best in found.items():
        others = [other for other in known if other != token]
        likeness = {o: float(torch.cosine_similarity(given[token], given[o], dim=0)) for o in others}
        assert best.tolist() == sorted(others, key=lambda other: -likeness[other])[:3]
    assert len(nearest_words(given, words, iter([GOOD]), 99)[GOOD]) == 6


def test_copies_differ_in_whole_words_only_and_share_the_rest():
    given = features(*ROWS, labels=[1, 0], spans=[(2, 3), (4, 5)])
    words, near = Words.of(wordpiece()), nearest_words(table(), Words.of(wordpiece()), iter(range(len(TOKENS))), 2)
    made = augment_rows(given, wordpiece(), table(), 50, seed=4, candidates=2)
    assert len(made) == 2 * 51
    assert [list(row) for row in made.columns["input_ids"][:2]] == list(ROWS)
    assert made.columns["labels"] == [1, 0] * 51
    assert made.columns["spans"] == [(2, 3), (4, 5)] * 51
    assert made.example == [0, 1] * 51
    replaced = seen = 0
    for index, row in enumerate(made.columns["input_ids"][2:]):
        before = ROWS[index % 2]
        assert len(row) == len(before) == len(made.columns["token_type_ids"][2 + index])
        for place, (old, new) in enumerate(zip(before, row, strict=True)):
            if place in words.places(before):
                seen += 1
                replaced += new != old
                assert new == old or new in near[old]
            else:
                assert new == old
    assert abs(replaced / seen - 0.4) < 3 * (0.24 / seen) ** 0.5


def test_the_seed_decides():
    def of(seed: int) -> list[list[int]]:
        return augment_rows(features(*ROWS), wordpiece(), table(), 20, seed).columns["input_ids"]

    assert of(1) == of(1) != of(2)


def test_rows_without_words_and_no_rows_are_copied_as_they_are():
    bare = features([1, DOT, 2], [1, FILM, S, 2])
    assert augment_rows(bare, wordpiece(), table(), 1, 0).columns["input_ids"] == [[1, DOT, 2], [1, FILM, S, 2]] * 2
    assert len(augment_rows(features(), wordpiece(), table(), 3, 0)) == 0
    lonely = Tokenizer(models.WordLevel({"[CLS]": 0, "good": 1}, unk_token="[CLS]"))
    lonely.add_special_tokens(["[CLS]"])
    assert augment_rows(features([0, 1]), lonely, table(), 1, 0, share=1.0).columns["input_ids"] == [[0, 1]] * 2


# -- A masked language model ---------------------------------------------------------------------------------------------------


def masked(**changes: Any) -> Any:
    return tiny("bert", auto_class="AutoModelForMaskedLM", **changes)


def test_likely_words_by_hand():
    model = masked(vocab_size=len(TOKENS))
    words = Words.of(wordpiece())
    given = features(*ROWS, [1, ROOM, 2])
    places = [words.places(row) for row in given.columns["input_ids"]]
    found = dict(likely_words(model, given, places, words, 4))
    assert set(found) == {0, 1, 2}
    for row, ids in enumerate(given.columns["input_ids"]):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        assert found[row].shape == (len(places[row]), 4)
        for place, best in zip(places[row], found[row], strict=True):
            known = [token for token in np.flatnonzero(words.whole).tolist() if token != ids[place]]
            assert best.tolist() == sorted(known, key=lambda token: -float(logits[place, token]))[:4]
    made = augment_rows(given, wordpiece(), table(), 30, 0, model, candidates=1)
    first = {row[1] for row in made.columns["input_ids"][::3]}
    assert first == {GOOD, int(found[0][0, 0])}


def test_only_a_masked_model_with_the_same_tokens_will_do(tmp_path):
    source = write_model(tmp_path / "model", trained=False)
    with pytest.raises(ModelError, match=r"is a BertForSequenceClassification, and augment_model needs a masked"):
        check_masked_model(source, source)
    other = tmp_path / "other"
    masked().save_pretrained(other)
    wordpiece().save(str(other / "tokenizer.json"))
    with pytest.raises(ModelError, match="has another tokenizer than the model"):
        check_masked_model(other, source)
    with pytest.raises(ModelError, match="is not a folder"):
        check_masked_model(tmp_path / "nothing", source)


# -- The stage -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stage_trains_on_the_copies_too(tmp_path: Path):
    """Through a recipe, with a masked model that lies beside it."""
    write_model(tmp_path / "encoder", trained=False, bare=True)
    write_model(tmp_path / "teacher", trained=False, seed=5)
    write_data(tmp_path / "data", train=80, dev=20)
    tokenizer = tmp_path / "encoder" / "tokenizer.json"
    size = Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    masked(vocab_size=size).save_pretrained(tmp_path / "masked")
    (tmp_path / "masked" / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    methods = [{"use": "knowledge_sparse", "keep": 0.1}, {"use": "distillation", "embedding": 1.0}]
    stage = {"epochs": 1, "augment": 2, "augment_model": "masked", "task_weight": 0.0, "methods": methods, "precision": "fp32"}
    data = {
        "model": "encoder",
        "teacher": "teacher",
        "task": {"use": "classification", "data": "data"},
        "stages": [{"train": stage}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert recipe.stages[0].augment_model == str(tmp_path / "masked")
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    state = Run(tmp_path / "work", tmp_path / "work", Log(None, quiet=True))
    bundle, (train,) = prepare_bundle(preflight(recipe), state)
    features, rows = bundle.material.features[Split.TRAIN], training_rows(train, bundle, state)
    assert len(rows) == 3 * len(features)
    assert rows.columns["input_ids"] != list(features.columns["input_ids"]) * 3
    assert training_rows(dataclasses.replace(train, augment=0, augment_model=None), bundle, state) is features
    made = run_stage(train, bundle, state)
    assert made.plan == Plan()
    query = made.subject.model.state_dict()["bert.encoder.layer.1.attention.self.query.weight"]
    assert int((query != 0).sum()) == round(0.1 * query.numel())


def test_options_that_make_no_sense_are_refused(tmp_path):
    for options, message in (
        ({"augment": -1}, "augment must be from 0 to a billion, got -1"),
        ({"augment_model": "x"}, "augment_model says how words are replaced: set augment too"),
    ):
        with pytest.raises(RecipeError, match=message):
            Train(**options)
        with pytest.raises(RecipeError, match=message):
            parse_recipe({"model": "x", "task": "intents", "stages": [{"train": options}]})
    source = write_model(tmp_path / "model")
    task = Classification(data=str(write_data(tmp_path / "data", train=80, dev=20)))
    with pytest.raises(ModelError, match="needs a masked language model"):
        preflight(Recipe(str(source), task, (Train(augment=1, augment_model=str(source)),)))
