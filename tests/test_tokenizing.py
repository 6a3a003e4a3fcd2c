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


FIVE = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", "Ġ", "!"]
COURSE = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()])
NAMED = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
ROBERTA = {
    "tokenizer_class": "RobertaTokenizer",
    "bos_token": "[CLS]",
    "eos_token": "[SEP]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
}
ROBERTA |= {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}


def other_kind(model: str, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """A tokenizer of that model, the special tokens of BERT at the first ids, and its template."""
    if model == "Unigram":
        pieces = ["▁good", "▁film", "▁G", "▁", *LETTERS]
        tokenizer = Tokenizer(
            models.Unigram([*((token, 0.0) for token in FIVE), *((piece, -2.0) for piece in pieces)], unk_id=1)
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    elif model == "BPE":
        ids = {token: index for index, token in enumerate([*FIVE, *LETTERS, "go"])}
        tokenizer = Tokenizer(models.BPE(ids, [("g", "o")], unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        small = LETTERS[:26]
        words = [*FIVE, "good", "film", "東京", "東", "京", *small, *(f"##{letter}" for letter in small)]
        ids = {token: index for index, token in enumerate(words)}
        tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(FIVE)
    return tokenizer


def auto_ids(folder: Path, *texts: str) -> dict:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)(*texts)


@pytest.mark.parametrize(
    ("tokenizer", "kind", "settings", "version", "because"),
    [
        (other_kind("Unigram"), "bert", {}, None, "holds a Unigram, of whose vocabulary BertTokenizer makes a WordPiece"),
        (other_kind("Unigram"), "bert", NAMED, "5.1.0", "holds a Unigram"),
        (other_kind("BPE"), "bert", {}, None, "holds a BPE"),
        (other_kind("Unigram"), "roberta", {"tokenizer_class": "RobertaTokenizer"}, None, "holds a Unigram"),
        (other_kind("BPE", normalizers.Lowercase()), "roberta", ROBERTA, "4.40.0", r"4\.40\.0"),
        (other_kind("WordPiece", COURSE), "bert", NAMED | {"do_lower_case": True}, "4.40.0", r"4\.40\.0"),
        (other_kind("WordPiece", COURSE), "bert", NAMED, None, r"unknown to BertTokenizer, and \d+% to the file"),
    ],
)
def test_the_file_is_taken_where_the_model_cannot_have_been_tuned_with_what_transformers_makes(
    tmp_path: Path,
    tokenizer: Tokenizer,
    kind: str,
    settings: dict,
    version: str | None,
    because: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"model_type": kind, "vocab_size": tokenizer.get_vocab_size(), "transformers_version": version}
    write(tmp_path, tokenizer_config=settings, config=config)
    ours = load_tokenizer(tmp_path)
    for text in ("Good films", "good 東京!"):
        assert ours.encode(text, "film").ids == tokenizer.encode(text, "film").ids
    assert re.search(rf"tokenizer\.json is taken, because .*{because}", caplog.text)
    delivered = tmp_path / "delivered"
    write_tokenizer(tmp_path, delivered)
    write(delivered, config=config)
    assert auto_ids(delivered, "Good films", "film")["input_ids"] == tokenizer.encode("Good films", "film").ids


def test_transformers_4_took_letter_case_from_the_settings_and_the_rest_from_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(pieces(tmp_path, template=False), tokenizer_config=BOTH | {"do_lower_case": True})
    write(tmp_path, config=BERT | {"transformers_version": "4.40.0"})
    assert load_tokenizer(tmp_path).encode("Good Films").ids == [
        5,
        6,
        9,
    ]  # of the file: [7, 8, 9]; of transformers 5: [2, 5, 6, 9, 3]
    assert "4.40.0" in caplog.text


MARKS = ["[E1]", "[/E1]"]


@pytest.mark.parametrize("version", [None, "4.40.0"])
@pytest.mark.parametrize("vocabulary", [CASED, [*CASED, *(f"w{index}" for index in range(900)), *MARKS, *CASED[5:]]])
@pytest.mark.parametrize(
    "beside",
    [
        {"added_tokens": {"[E1]": 10, "[/E1]": 11}},
        {"tokenizer_config": {"added_tokens_decoder": {"10": FILMS | {"content": "[E1]"}, "11": FILMS | {"content": "[/E1]"}}}},
        {"tokenizer_config": {"additional_special_tokens": MARKS}},
        {"special_tokens_map": {"additional_special_tokens": MARKS}},
    ],
)
def test_tokens_that_the_files_beside_it_add_get_the_ids_of_auto_tokenizer(
    tmp_path: Path, beside: dict, vocabulary: list[str], version: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    vocabulary = list(dict.fromkeys(vocabulary))
    pieces(tmp_path, vocabulary=vocabulary)
    config = BERT | {"vocab_size": len(vocabulary) + 2, "transformers_version": version}
    write(tmp_path, config=config, **({"tokenizer_config": BOTH} | beside))
    if "tokenizer_config" in beside:
        write(tmp_path, tokenizer_config=BOTH | beside["tokenizer_config"])
    text = "[E1] Good [/E1] films"
    ids = load_tokenizer(tmp_path).encode(text).ids
    assert ids == auto_ids(tmp_path, text)["input_ids"]
    assert len(ids) == 7
    assert "[E1]" in caplog.text
    write_tokenizer(tmp_path, tmp_path / "delivered")
    write(tmp_path / "delivered", config=config)
    assert auto_ids(tmp_path / "delivered", text)["input_ids"] == ids


def test_tokens_that_are_lost_since_transformers_cannot_read_the_folder_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pieces(tmp_path)
    write(tmp_path, tokenizer_config={"tokenizer_class": "AlbertTokenizer"}, added_tokens={"[E1]": 10})
    assert load_tokenizer(tmp_path).encode("Good").ids == [2, 7, 3]
    assert "without it [E1] are no tokens" in caplog.text


def sequence(name: str, type_id: int) -> dict:
    return {"Sequence": {"id": name, "type_id": type_id}}


def mark(name: str, type_id: int = 0) -> dict:
    return {"SpecialToken": {"id": name, "type_id": type_id}}


def template(single: list[dict], second: int = 1) -> dict:
    one = [mark("[CLS]"), sequence("A", 0), mark("[SEP]")]
    ids = {token: {"id": token, "ids": [index], "tokens": [token]} for index, token in ((2, "[CLS]"), (3, "[SEP]"))}
    pair = [*one, sequence("B", second), mark("[SEP]", second)]
    return {"post_processor": {"type": "TemplateProcessing", "single": single or one, "pair": pair, "special_tokens": ids}}


SHORT = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 4}
SHORT |= {"vocab": {word: index for index, word in enumerate(CASED)}}
ROBERTA_MARKS = {
    "type": "RobertaProcessing",
    "sep": ["[SEP]", 3],
    "cls": ["[CLS]", 2],
    "trim_offsets": True,
    "add_prefix_space": False,
}


@pytest.mark.parametrize("version", ["4.40.0", "5.0.0"])
@pytest.mark.parametrize(
    ("parts", "settings"),
    [
        ({"post_processor": ROBERTA_MARKS}, {}),
        (template([], second=0), {}),
        (template([mark("[CLS]"), sequence("A", 0), mark("[SEP]"), mark("[SEP]")]), {}),
        ({"model": SHORT}, {}),
        ({}, {"cls_token": "good", "sep_token": "film"}),
        ({}, {"unk_token": "good"}),
    ],
)
def test_other_marks_types_and_special_tokens_than_those_of_a_bert_are_told(
    tmp_path: Path, parts: dict, settings: dict, version: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(pieces(tmp_path, **parts), tokenizer_config=BOTH | settings)
    write(tmp_path, config=BERT | {"type_vocab_size": 2, "transformers_version": version})
    file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    got, auto = load_tokenizer(tmp_path), auto_ids(tmp_path, "Good films ☃", "Films")
    told = re.search(r"makes the [a-z ]+ (\[.*?\]), and .* makes (\[.*?\])\. (\S+) is taken", caplog.text)
    assert told is not None
    assert told[1] != told[2]
    assert told[3] == ("tokenizer.json" if version == "4.40.0" else "BertTokenizer")
    pair = got.encode("Good films ☃", "Films")
    if version == "4.40.0":
        expected = file.encode("Good films ☃", "Films")
        assert settings or (pair.ids, pair.type_ids) == (expected.ids, expected.type_ids)
        assert pair.ids[0] == 2
    else:
        assert (pair.ids, pair.type_ids) == (auto["input_ids"], auto["token_type_ids"])


def test_special_tokens_that_the_file_does_not_mark_are_special_nevertheless(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write(pieces(tmp_path), tokenizer_config=BOTH)
    assert load_tokenizer(tmp_path).encode("Good [MASK]").ids == auto_ids(tmp_path, "Good [MASK]")["input_ids"] == [2, 7, 4, 3]
    assert "[MASK]" in caplog.text


def test_token_types_count_only_for_a_model_that_has_rows_for_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(pieces(tmp_path, **template([], second=0)), tokenizer_config=BOTH)
    for rows in (2, 1):
        caplog.clear()
        write(tmp_path, config=BERT | {"type_vocab_size": rows, "note": "x" * rows})
        load_tokenizer(tmp_path)
        assert ("makes the token types" in caplog.text) is (rows == 2)
