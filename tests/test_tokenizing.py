"""Tokenizers of model folders in each form they come in, and how long an input each model takes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from slimformer.data import tokenizer_files
from slimformer.data.tokenizer import cutting, load_tokenizer, max_length_of, pad_id_of
from slimformer.data.tokenizer_files import write_tokenizer
from slimformer.errors import ExtraError, ModelError, RecipeError

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


@pytest.mark.parametrize("content", ["", "{}", '{"model": 3}', "not json", '{"vers.0", "model": {}}'])
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
        ({"model_type": "bart", "max_position_embeddings": 1024}, {}, 1024),
        ({"model_type": "slimformer_marian", "max_position_embeddings": 600}, {"model_max_length": 512}, 512),
        ({"model_type": "t5", "n_positions": 512}, {"model_max_length": 512}, 1_000_000),
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


CASED = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "film", "Good", "Film", "##s"]
BERT = {"model_type": "bert", "vocab_size": len(CASED)}


def pieces(
    folder: Path, *, lower: bool = False, template: bool = True, vocabulary: list[str] = CASED, **changes: object
) -> Path:
    """A folder with a WordPiece tokenizer.json, some of its parts changed."""
    ids = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if template:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    data = json.loads(tokenizer.to_str()) | changes
    return write(folder, tokenizer=data, config=BERT)


BOTH = {"do_lower_case": False, "tokenizer_class": "BertTokenizer"}
FILMS = {"content": "films", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": False}


@pytest.mark.parametrize(
    ("parts", "config", "agree"),
    [
        ({}, BOTH, True),
        ({"lower": True}, {"tokenizer_class": "BertTokenizerFast"}, True),
        ({}, {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": True}, True),
        ({"lower": True}, BOTH, False),
        ({}, BOTH | {"do_lower_case": True}, False),
        ({}, {}, False),  # transformers takes the class of the model type, and lower-cases
        ({"template": False}, BOTH, False),
        ({}, BOTH | {"tokenizer_class": "DistilBertTokenizer", "do_lower_case": True}, False),
        ({}, BOTH | {"added_tokens_decoder": {"10": FILMS}}, False),
    ],
)
def test_the_ids_are_those_of_auto_tokenizer_and_a_disagreement_is_told(
    tmp_path: Path, parts: dict, config: dict, agree: bool, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoTokenizer

    write(pieces(tmp_path, **parts), tokenizer_config=config)
    write(tmp_path, config=BERT | {"vocab_size": 11})
    auto = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ours = load_tokenizer(tmp_path)
    for text in ("Good films", "good Film ☃"):
        assert ours.encode(text).ids == auto(text)["input_ids"]
        assert ours.encode(text, "Film").ids == auto(text, "Film")["input_ids"]
    assert ("disagree" in caplog.text) is not agree
    delivered = tmp_path / "delivered"
    write_tokenizer(tmp_path, delivered)
    write(delivered, config=BERT | {"vocab_size": 11})
    again = AutoTokenizer.from_pretrained(delivered, local_files_only=True)
    assert (
        Tokenizer.from_file(str(delivered / "tokenizer.json")).encode("Good films", "Film").ids
        == (again("Good films", "Film")["input_ids"])
    )
    assert again("Good films", "Film")["input_ids"] == auto("Good films", "Film")["input_ids"]
    caplog.clear()
    load_tokenizer(tmp_path)
    load_tokenizer(delivered)
    assert caplog.text == ""


def test_ids_beyond_what_the_file_has_are_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(pieces(tmp_path), tokenizer_config={"tokenizer_class": "RobertaTokenizer"})
    assert load_tokenizer(tmp_path).encode("Good films").ids == [2, 7, 6, 9, 3]
    assert "tokenizer.json is taken" in caplog.text


def test_without_transformers_the_file_is_taken_and_vocab_txt_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda _: None)
    write(pieces(tmp_path), tokenizer_config=BOTH | {"do_lower_case": True})
    assert load_tokenizer(tmp_path).encode("Good films").ids == [2, 7, 6, 9, 3]
    assert "lowercase: False" in caplog.text
    assert "do_lower_case: True" in caplog.text
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").write_text("\n".join(CASED), encoding="utf-8")
    with pytest.raises(ExtraError, match=r"holds vocab\.txt and no tokenizer\.json[\s\S]*pip install transformers"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "slimformer_bert", "electra"])
@pytest.mark.parametrize("config", [{}, {"do_lower_case": True}, {"do_lower_case": False, "tokenizer_class": "BertTokenizer"}])
def test_an_old_folder_with_vocab_txt_gets_a_tokenizer_json(tmp_path: Path, model_type: str, config: dict) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(word for word in CASED if word != "[MASK]") + "\n", encoding="utf-8")
    write(tmp_path, config={"model_type": model_type, "vocab_size": 9}, special_tokens_map={"pad_token": "[PAD]"})
    if config:
        write(tmp_path, tokenizer_config=config)
    write_tokenizer(tmp_path, tmp_path / "delivered")
    written = Tokenizer.from_file(str(tmp_path / "delivered" / "tokenizer.json"))
    assert written.encode("Good films").ids == [2, 6 if config.get("do_lower_case") is False else 4, 5, 8, 3]
    assert written.encode("Good films").ids == load_tokenizer(tmp_path).encode("Good films").ids
    assert max(written.get_vocab().values()) == 8  # transformers would add a [MASK] that the model has no row for


def test_vocab_json_is_delivered_with_the_names_of_its_special_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b", "ab", "Ġ"]
    config = {"model_type": "roberta", "vocab_size": 9}
    write(tmp_path, vocab={word: index for index, word in enumerate(vocabulary)}, config=config)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n", encoding="utf-8")
    delivered = tmp_path / "delivered"
    write_tokenizer(tmp_path, delivered)
    write(delivered, config=config)
    auto = AutoTokenizer.from_pretrained(delivered, local_files_only=True)
    assert auto(["ab a", "ab"], padding=True)["input_ids"] == [[0, 7, 8, 5, 2], [0, 7, 2, 1, 1]]
    assert set(auto("ab")) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(("kind", "file"), [("xlm-roberta", "sentencepiece.bpe.model"), ("deberta-v2", "spm.model")])
def test_a_sentencepiece_file_names_the_package_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, file: str
) -> None:
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda name: None if name == "sentencepiece" else True)
    (tmp_path / file).write_bytes(b"\x0a\x05")
    write(tmp_path, config={"model_type": kind})
    with pytest.raises(ExtraError, match=rf"holds {re.escape(file)} and no tokenizer\.json[\s\S]*pip install sentencepiece"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("rows", "refused"), [(9, True), (10, False), (64, False)])
def test_ids_that_the_model_has_no_rows_for_are_refused_with_both_sizes(tmp_path: Path, rows: int, refused: bool) -> None:
    write(pieces(tmp_path), config=BERT | {"vocab_size": rows}, tokenizer_config=BOTH)
    if not refused:
        assert load_tokenizer(tmp_path).encode("Good").ids == [2, 7, 3]
        return
    with pytest.raises(ModelError, match=r"ids up to 9, and the model has 9 rows[\s\S]*tokens: 10") as caught:
        load_tokenizer(tmp_path)
    assert "another model" in caught.value.help


def test_a_special_token_that_no_text_needs_may_lack_a_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer.from_file(str(pieces(tmp_path) / "tokenizer.json"))
    tokenizer.add_special_tokens(["<extra>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tokenizer_config=BOTH)
    assert max(load_tokenizer(tmp_path).encode("Good <extra>").ids) < len(CASED)
    assert "<extra>" in caplog.text
    tokenizer.add_tokens(["plain"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="ids up to 11"):
        load_tokenizer(tmp_path)


def test_an_id_of_a_billion_is_refused_and_walked_over_by_nobody(tmp_path: Path) -> None:
    pieces(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    data["model"]["vocab"]["film"] = 10**9
    write(tmp_path, tokenizer=data, config={}, tokenizer_config=BOTH)
    with pytest.raises(ModelError, match="a token has the id 1,000,000,000, and the vocabulary holds 10 tokens"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("missing", ["[UNK]", "[SEP]"])
def test_a_vocabulary_without_a_token_that_it_needs_is_told_before_any_work(tmp_path: Path, missing: str) -> None:
    pieces(tmp_path, vocabulary=["x" if word == missing else word for word in CASED])
    write(tmp_path, tokenizer_config=BOTH)
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    if missing == "[SEP]":  # what a damaged template does is a panic of Rust
        data["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[SEP]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]}},
        }
        write(tmp_path, tokenizer=data)
    with pytest.raises(ModelError, match=r"cannot (encode a text|be read as a tokenizer)"):
        load_tokenizer(tmp_path)


VOCABULARY = "\n".join(CASED) + "\n"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("vocabulary", "config", "settings", "message"),
    [
        (VOCABULARY, {"model_type": "roberta"}, {}, r"makes nothing of a text[\s\S]*vocab\.txt is of BertTokenizer"),
        (VOCABULARY, {}, {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "basic"}, "exists in Python alone"),
        (VOCABULARY, {}, {"tokenizer_class": "KoBert", "auto_map": {"AutoTokenizer": ["tok.KoBert", None]}}, "KoBert.*never run"),
        (POINTER, {}, {}, r"vocab\.txt is a pointer of git-lfs"),
        ("<!DOCTYPE html>", {}, {}, r"vocab\.txt is a web page"),
        (VOCABULARY.replace("[CLS]", "[X]"), {}, {}, r"10 rows of word embeddings[\s\S]*without a row: '\[CLS\]'"),
    ],
)  # fmt: skip
def test_a_vocab_txt_that_cannot_serve_is_refused_by_its_cause(
    tmp_path: Path, vocabulary: str, config: dict, settings: dict, message: str
) -> None:
    (tmp_path / "vocab.txt").write_text(vocabulary, encoding="utf-8")
    (tmp_path / "bpe.codes").write_text("g o 1\n", encoding="utf-8")
    write(tmp_path, config=BERT | config, tokenizer_config=settings)
    with pytest.raises(ModelError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("end", ["\n\n", "\r\n"])
def test_a_vocab_txt_of_another_system_keeps_its_ids(tmp_path: Path, end: str) -> None:
    text = VOCABULARY.replace("\n", "\r\n") if end == "\r\n" else VOCABULARY + "\n"
    (tmp_path / "vocab.txt").write_bytes(text.encode())
    write(tmp_path, config=BERT, tokenizer_config=BOTH)
    assert load_tokenizer(tmp_path).encode("Good films").ids == [2, 7, 6, 9, 3]


def test_a_vocab_json_alone_lacks_its_merges(tmp_path: Path) -> None:
    write(tmp_path, vocab={"<s>": 0, "a": 1}, config={"model_type": "roberta", "vocab_size": 2})
    with pytest.raises(ModelError, match=r"without merges\.txt"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("max_length", [-1, 0, 1, 2, True])
def test_a_limit_without_room_for_a_text_is_refused(tmp_path: Path, max_length: int) -> None:
    write(pieces(tmp_path), tokenizer_config=BOTH)
    with (
        pytest.raises(RecipeError, match=r"have no room for a text: 2 tokens") as caught,
        cutting(load_tokenizer(tmp_path), max_length),
    ):
        pass
    assert "3 or more" in caught.value.help
    with pytest.raises(RecipeError, match="no model reads so many"), cutting(load_tokenizer(tmp_path), 10**30):
        pass


def test_settings_that_are_stored_in_the_file_do_not_cut_or_pad(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    padding = {"strategy": {"Fixed": 32}, "direction": "Left", "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    padding |= {"pad_to_multiple_of": None}
    cut = {"direction": "Left", "max_length": 3, "strategy": "OnlySecond", "stride": 0}
    pieces(tmp_path, padding=padding, truncation=cut)
    write(tmp_path, tokenizer_config=BOTH | {"padding_side": "left", "model_max_length": 1e30})
    with cutting(load_tokenizer(tmp_path), 5) as tokenizer:
        assert [tokenizer.encode(text).ids for text in ("Good", "Good film good film")] == [[2, 7, 3], [2, 7, 6, 5, 3]]
    assert "on the left" in caplog.text
    assert max_length_of(tmp_path) == 512
