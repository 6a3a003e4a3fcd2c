"""A vocabulary that is trained anew: its pieces, its special tokens, its words, and what its pieces are made of in the old one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_folder import SPECIAL, write_pieces, write_tokenizer

from slimformer.data.retraining import descent, retrain_tokenizer, same_words, word_starts, words_of
from slimformer.data.tokenizer_files import parsed_tokenizer, tokenizer_text
from slimformer.errors import DataError, ModelError

TEXTS = ["The hotter film: HOTTER, hotter!", "a cold film"] * 3
SIGNS = (
    32 + 26 + 10 + 1 + 36
)  # ASCII's signs, small letters and digits, the letter é, and letters, digits and é inside of words


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("old")
    write_pieces(folder)
    return tokenizer_text(folder)


def test_special_tokens_then_single_characters_then_what_is_merged_most_often(old: str) -> None:
    """Seven pieces of two characters or more: the pairs that occur most often, "hotter" nine times, "film" six."""
    size = len(SPECIAL) + SIGNS + 1 + 7
    made = parsed_tokenizer(retrain_tokenizer(old, [*TEXTS, "né"], size))
    ids = made.get_vocab()
    tokens = sorted(ids, key=ids.__getitem__)
    assert tokens[:4] == list(SPECIAL)
    assert made.get_vocab_size() == size
    assert all(len(token.removeprefix("##")) == 1 for token in tokens[4:-7])
    merged = tokens[-7:]
    assert {"hotter", "film"} & set(merged)
    assert all(any(piece.removeprefix("##") in word for word in ("hotter", "film", "the", "cold")) for piece in merged)
    assert made.encode("Hotter").tokens[1:-1] == made.encode("hotter").tokens[1:-1]  # lower case as before
    assert made.encode("é qx").tokens == ["[CLS]", "é", "q", "##x", "[SEP]"]  # what no text had is split, not unknown
    assert made.encode("ж").tokens == ["[CLS]", "[UNK]", "[SEP]"]


def test_the_rest_of_the_tokenizer_is_the_old_one_with_new_ids(old: str) -> None:
    data = json.loads(old)
    moved = json.loads(old)
    order = ["[SEP]", "[CLS]", "[UNK]", "[PAD]", *(word for word in data["model"]["vocab"] if word not in SPECIAL)]
    moved["model"]["vocab"] = {word: number + 5 for number, word in enumerate(order)} | {
        f"x{number}": number for number in range(5)
    }
    for item in moved["added_tokens"]:
        item["id"] = moved["model"]["vocab"][item["content"]]
    for name in ("[CLS]", "[SEP]"):
        moved["post_processor"]["special_tokens"][name]["ids"] = [moved["model"]["vocab"][name]]
    moved["added_tokens"].sort(key=lambda item: item["id"])
    made = json.loads(retrain_tokenizer(json.dumps(moved), TEXTS, 120))
    assert [made["model"]["vocab"][token] for token in ("[SEP]", "[CLS]", "[UNK]", "[PAD]")] == [0, 1, 2, 3]  # in the old order
    assert made["post_processor"]["special_tokens"]["[CLS]"]["ids"] == [1]
    assert {item["content"]: item["id"] for item in made["added_tokens"]} == {"[SEP]": 0, "[CLS]": 1, "[UNK]": 2, "[PAD]": 3}
    same = ("normalizer", "pre_tokenizer", "decoder", "truncation", "padding")
    assert all(made[part] == data[part] for part in same)
    assert parsed_tokenizer(json.dumps(made)).encode("a", "b").ids[0] == 1


def test_it_is_the_same_each_time(old: str) -> None:
    texts = [f"{word} {word}s {word}ing" for word in ("film", "room", "meal", "story", "phone", "show")] * 2
    assert len({retrain_tokenizer(old, order, 125) for order in (texts, texts[::-1], texts)}) == 1


def test_both_split_texts_into_the_same_words(old: str) -> None:
    new = retrain_tokenizer(old, TEXTS, 120)
    assert same_words(old, new)
    text = "The HOTTEST film: isn't it?"
    words = words_of(parsed_tokenizer(old), text)
    assert words == ["the", "hottest", "film", ":", "isn", "'", "t", "it", "?"]
    for each in (old, new):
        starts, ids = word_starts(each), parsed_tokenizer(each).encode(text).ids
        assert sum(starts[piece] for piece in ids) == len(words) + 2  # [CLS] and [SEP] are words too
    assert not same_words(
        old, old.replace('"type":"Lowercase"', '"type":"NFC"').replace('"type": "Lowercase"', '"type": "NFC"')
    )


def test_pieces_are_made_of_the_longest_old_ones(old: str) -> None:
    """The old tokenizer has "film", letters, and letters inside of words; it knows no "é"."""
    new = retrain_tokenizer(old, ["filmic filmic café hot hot"], 117)
    ids, made = parsed_tokenizer(old).get_vocab(), parsed_tokenizer(new).get_vocab()
    parts = descent(old, new)
    assert len(parts) == len(made)
    assert parts[made["[SEP]"]] == (ids["[SEP]"],)
    assert parts[made["f"]] == (ids["f"],)
    assert parts[made["é"]] == (ids["[UNK]"],)
    spelled = {piece: [token for part in parts[made[piece]] for token in ids if ids[token] == part] for piece in made}
    assert spelled["filmic"] == ["film", "##i", "##c"]  # made whole, as all pairs occur twice
    longer = {piece: split for piece, split in spelled.items() if len(piece.removeprefix("##")) > 1 and piece not in SPECIAL}
    for piece, split in longer.items():
        assert [part.startswith("##") for part in split] == [piece.startswith("##")] + [True] * (len(split) - 1)
        assert "".join(part.removeprefix("##") for part in split) == piece.removeprefix("##")


def test_a_size_that_texts_do_not_give_is_refused(old: str) -> None:
    with pytest.raises(
        DataError, match=r"has no room for 4 special tokens and 104 single characters.*\n *help: ask for 108 or more"
    ):
        retrain_tokenizer(old, TEXTS, 50)
    with pytest.raises(DataError, match="the texts give a vocabulary of [0-9]+ pieces, not of 5,000"):
        retrain_tokenizer(old, TEXTS, 5000)


def test_only_a_wordpiece_is_trained_anew(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(
        ModelError, match="the tokenizer is a WordLevel, and a new vocabulary can be trained for a WordPiece alone"
    ):
        retrain_tokenizer(tokenizer_text(tmp_path), TEXTS, 200)
