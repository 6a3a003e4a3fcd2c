"""The built-in intents: always the same sentences, three splits that share no template, slots filled in good English."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from slimformer.errors import DataError, RecipeError
from slimformer.tasks.base import Features, Split
from slimformer.tasks.intents import GRAMMAR, SLOTS, Intents, templates


def slot_values(dev: bool) -> set[str]:
    return {value.lower() for values in SLOTS.values() for value in values[dev]}


def test_sizes_balance_and_determinism() -> None:
    task = Intents()
    sizes = {name: len(task.split(name)) for name in Split}
    assert sizes == {Split.TRAIN: 5400, Split.VALIDATION: 600, Split.DEV: 1200}
    for name in Split:
        counts = Counter(item.answer for item in task.split(name))
        assert set(counts) == set(GRAMMAR)
        assert max(counts.values()) - min(counts.values()) <= 1
    assert Intents().split(Split.DEV) == task.split(Split.DEV)
    assert Intents(seed=1).split(Split.DEV) != task.split(Split.DEV)
    # these very sentences: figures in the docs rest on them, so that a change here must be a decision
    assert [(item.texts[0], item.answer) for item in task.split(Split.TRAIN)[:2]] == [
        ("Um, I bought a blender yesterday. One order, two debits, how come.", "double_charge"),
        ("I bought one carpet but paid for two, it is urgent.", "double_charge"),
    ]


def test_there_are_24_intents_with_templates_for_each_split() -> None:
    assert len(GRAMMAR) == 24
    for intent in GRAMMAR:
        groups = [set(templates(name, intent)) for name in Split]
        assert all(len(group) >= 2 for group in groups)
        assert not groups[0] & groups[1]
        assert not groups[0] & groups[2]
        assert not groups[1] & groups[2]
        assert len(groups[0]) >= 8


def test_no_template_serves_two_intents() -> None:
    lines = [line for intent in GRAMMAR for name in Split for line in templates(name, intent)]
    assert len(lines) == len(set(lines))
    for line in lines:
        assert line.count("(") == line.count(")")
        assert set(re.findall(r"\{(\w+?)2?\}", line)) <= {*SLOTS, "order"}


def test_dev_has_slot_values_that_training_never_shows() -> None:
    assert not slot_values(dev=False) & slot_values(dev=True)
    text = " | ".join(item.texts[0].lower() for item in Intents(typos=0.0).split(Split.DEV))
    shown = {value for value in slot_values(dev=False) if re.search(rf"\b{re.escape(value)}\b", text)}
    # words that templates hold by themselves, and no more
    assert shown <= {"shirt", "credit card", "last week", "yesterday", "watch", "dress"}


def test_no_sentence_is_in_two_splits() -> None:
    texts = {name: {item.texts[0].lower() for item in Intents().split(name)} for name in Split}
    assert not texts[Split.TRAIN] & texts[Split.DEV]
    assert not texts[Split.TRAIN] & texts[Split.VALIDATION]
    assert len(texts[Split.TRAIN]) > 0.97 * 5400


def test_sentences_are_filled_and_clean() -> None:
    for name in Split:
        for item in Intents(typos=0.0).split(name):
            text = item.texts[0]
            assert not re.search(r"[{}()|]|  | [,.?]|[,.?]{2}|^\s|\s$", text), text
            assert not re.search(r"\b[aA] [aeioAEIO]", text), text


def test_typos_come_as_often_as_asked() -> None:
    clean = [item.texts[0] for item in Intents(typos=0.0).split(Split.TRAIN)]
    words = set(" ".join(clean).lower().split())
    all_wrong = [item.texts[0] for item in Intents(typos=1.0).split(Split.TRAIN)]
    with_unknown = np.mean([any(word not in words for word in text.lower().split()) for text in all_wrong])
    assert with_unknown > 0.95
    some = [item.texts[0] for item in Intents(typos=0.2).split(Split.TRAIN)]
    share = np.mean([any(word not in words for word in text.lower().split()) for text in some])
    assert 0.15 < share < 0.35  # order numbers are new words too


def test_bind_matches_names_and_refuses_other_models() -> None:
    names = sorted(GRAMMAR)
    task = Intents()
    assert task.configure()["num_labels"] == 24
    assert task.bind({"id2label": dict(enumerate(reversed(names)))}).labels == tuple(reversed(names))
    shouted = {index: name.upper().replace("_", " ") for index, name in enumerate(names)}
    assert task.bind({"id2label": shouted}).labels == tuple(names)
    assert task.bind({"id2label": {index: f"LABEL_{index}" for index in range(24)}}).labels == tuple(names)
    assert task.bind(task.configure()).configure() == task.configure()
    with pytest.raises(DataError, match="does not know the label 'account_locked' and 23 more"):
        task.bind({"id2label": {0: "negative", 1: "positive"}})


def test_scoring_by_hand() -> None:
    task = Intents(dev=48)
    examples = task.split(Split.DEV)
    names = task.configure()["label2id"]
    logits = np.zeros((48, 24))
    logits[np.arange(48), [names[item.answer] for item in examples]] = 1.0
    logits[:12] = np.roll(logits[:12], 1, axis=1)  # the first twelve answers are wrong
    features = Features({"input_ids": [[1]] * 48}, range(48), 0, 0)
    assert task.score({"logits": logits}, features, examples)["accuracy"] == pytest.approx(0.75)
    assert task.credit({"logits": logits}, features, examples).tolist() == [0.0] * 12 + [1.0] * 36
    assert task.answers({"logits": logits}, features, examples)[12:] == [item.answer for item in examples[12:]]


def test_options_are_checked_together() -> None:
    with pytest.raises(RecipeError) as caught:
        Intents(examples=5, dev=3, seed=-1, typos=2.0, validation_share=0.0, max_length=1, metric="speed")
    assert len(caught.value.facts) == 7
