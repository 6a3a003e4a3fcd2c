"""Tokenizers of model folders in each form they come in, and how long an input each model takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from slimformer.data.tokenizer import cutting, load_tokenizer, max_length_of, pad_id_of
from slimformer.errors import ModelError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s"]


def words(vocabulary: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token=vocabulary[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def write(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_tokenizer_json_is_read_as_it_is(tmp_path: Path) -> None:
    words(WORDS).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("the cat").ids == [5, 6]


def test_vocab_txt_is_converted(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    write(tmp_path, config={"model_type": "bert"}, tokenizer_config={"tokenizer_class": "BertTokenizer"})
    assert load_tokenizer(tmp_path).encode("The cats").tokens == ["[CLS]", "the", "cat", "##s", "[SEP]"]


def test_vocab_json_and_merges_are_converted(tmp_path: Path) -> None:
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b", "ab"]
    write(tmp_path, vocab={word: index for index, word in enumerate(vocabulary)}, config={"model_type": "roberta"})
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n", encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("ab").tokens == ["<s>", "ab", "</s>"]
    assert pad_id_of(tokenizer) == 1


def test_a_folder_without_a_tokenizer_says_how_to_get_one(tmp_path: Path) -> None:
    write(tmp_path, config={"model_type": "bert"})
    with pytest.raises(ModelError, match="holds no tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "save_pretrained" in caught.value.help


@pytest.mark.parametrize("content", ["", "{}", '{"model": 3}', "not json"])
def test_a_broken_tokenizer_json_is_a_model_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_be_converted_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{", encoding="utf-8")
    (tmp_path / "merges.txt").write_text("", encoding="utf-8")
    write(tmp_path, config={"model_type": "roberta"})
    with pytest.raises(ModelError, match="cannot be converted"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("config", "tokenizer", "expected"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512}, {"model_max_length": 512}, 512),
        ({"model_type": "bert", "max_position_embeddings": 512}, {"model_max_length": 256}, 256),
        ({"model_type": "bert", "max_position_embeddings": 40}, {"model_max_length": 1e30}, 40),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, {}, 512),
        ({"model_type": "xlm-roberta", "max_position_embeddings": 102, "pad_token_id": 1}, {}, 100),
        ({"model_type": "slimformer_camembert", "max_position_embeddings": 102, "pad_token_id": 0}, {}, 101),
        ({"model_type": "slimformer_bert", "max_position_embeddings": 102, "pad_token_id": 1}, {}, 102),
        ({"model_type": "bert", "max_position_embeddings": 4096}, {"model_max_length": 4096}, 512),
        ({}, {}, 512),
    ],
)
def test_max_length_is_the_least_of_all_limits(tmp_path: Path, config: dict, tokenizer: dict, expected: int) -> None:
    assert max_length_of(write(tmp_path, config=config, tokenizer_config=tokenizer)) == expected


def test_a_config_without_room_or_sense_is_a_model_error(tmp_path: Path) -> None:
    write(tmp_path, config={"model_type": "roberta", "max_position_embeddings": 2, "pad_token_id": 1})
    with pytest.raises(ModelError, match="leaves room for 0 tokens"):
        max_length_of(tmp_path)
    (tmp_path / "config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ModelError, match="holds no JSON object"):
        max_length_of(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ModelError, match="cannot be read"):
        max_length_of(tmp_path)


def test_pad_id_comes_from_the_tokenizer_then_from_the_config(tmp_path: Path) -> None:
    assert pad_id_of(words(["<s>", "<unk>", "<pad>"])) == 2
    padding = words(["[PAD]", "[UNK]", "x"])
    padding.enable_padding(pad_id=2, pad_token="x")
    assert pad_id_of(padding) == 2
    bare = words(["a", "b"])
    assert pad_id_of(bare) == 0
    assert pad_id_of(bare, write(tmp_path, config={"pad_token_id": 1})) == 1


def test_cutting_gives_the_tokenizers_own_settings_back() -> None:
    tokenizer = words(WORDS)
    tokenizer.enable_truncation(7, stride=2)
    tokenizer.enable_padding(length=8)
    before = (tokenizer.truncation, tokenizer.padding)
    with cutting(tokenizer, 2):
        assert tokenizer.encode("the cat sat").ids == [5, 6]
        assert tokenizer.encode("the").ids == [5]
    assert (tokenizer.truncation, tokenizer.padding) == before
    plain = words(WORDS)
    with cutting(plain, 2):
        pass
    assert (plain.truncation, plain.padding) == (None, None)
