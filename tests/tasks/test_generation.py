"""Translation and summarization: parallel texts are read or refused by their cause, rows are what a decoder needs, scores add up."""

from __future__ import annotations

import gzip
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from slimformer import log
from slimformer.data.batching import collate
from slimformer.data.pairs import Targets
from slimformer.errors import DataError, ExtraError, ModelError, RecipeError
from slimformer.measuring import scoring
from slimformer.tasks.base import Example, Features, Split
from slimformer.tasks.summarization import Summarization
from slimformer.tasks.translation import Translation

SHARED = Path(__file__).parents[3] / "shared" / "data"
EN = [f"room {number} is red" for number in range(50)]
DE = [f"Raum {number} ist rot" for number in range(50)]
FR = [f"la chambre {number} est rouge" for number in range(50)]
SIDES = {"en": EN, "de": DE, "fr": FR}


def write(folder: Path, files: Mapping[str, Sequence[str]]) -> Path:
    for name, lines in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = "".join(f"{line}\n" for line in lines).encode()
        path.write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    return folder


def said(caplog: pytest.LogCaptureFixture, task: Any) -> str:
    caplog.set_level("INFO")
    log._remarked.clear()
    for split in Split:
        task.split(split)
    return caplog.text


# ---- parallel texts


@pytest.mark.parametrize(
    ("files", "options", "sides"),
    [
        (("train.en", "train.de", "val.en", "val.de"), {}, ("en", "de")),
        (("train.en.gz", "train.de.gz", "val.en.gz", "val.de.gz", "test_2016_flickr.en.gz"), {}, ("en", "de")),
        (("train.de-en.en", "train.de-en.de", "valid.de-en.en", "valid.de-en.de"), {}, ("de", "en")),
        (("train.en", "train.de", "train.fr", "dev.en", "dev.de", "dev.fr"), {"target": "fr"}, ("en", "fr")),
        (("train.en", "train.de", "dev.en", "dev.de"), {"source": "de"}, ("de", "en")),
        (("train_en.txt", "train_de.txt", "dev_en.txt", "dev_de.txt"), {}, ("en", "de")),
        (("train.normalized.en", "train.normalized.de", "dev.normalized.en", "dev.normalized.de"), {}, ("en", "de")),
        (("train/en.txt", "train/de.txt", "dev/en.txt", "dev/de.txt"), {}, ("en", "de")),
        (("dev.eng_Latn", "dev.deu_Latn", "train.eng_Latn", "train.deu_Latn"), {}, ("eng_Latn", "deu_Latn")),
        (("vocab.en", "vocab.de", "train.bpe.en", "train.bpe.de", "valid.bpe.en", "valid.bpe.de"), {}, None),
    ],
)  # fmt: skip
def test_parallel_texts_are_found_by_their_names(
    tmp_path: Path, files: Sequence[str], options: Mapping[str, str], sides: tuple[str, str] | None
) -> None:
    language = {"eng": "en", "deu": "de"}
    ends = ("eng_Latn", "deu_Latn", "en", "de", "fr")
    texts = {}
    for name in files:
        found = next(side[:3] if "_" in side else side for side in ends if re.fullmatch(rf".*[._/]{side}(\.txt)?(\.gz)?", name))
        texts[name] = SIDES[language.get(found, found)][: 50 if "train" in name else 10]
    if sides is None:  # a vocabulary of sub-words is no text, and "bpe" in a title is none either
        with pytest.raises(DataError, match="holds"):
            Translation(data=write(tmp_path, texts)).split(Split.TRAIN)
        return
    task = Translation(data=write(tmp_path, texts), **options).settled()
    assert (task.source, task.target) == sides
    assert [len(task.split(split)) for split in Split] == [40, 10, 10]
    first, second = (SIDES[language.get(side[:3], side[:2])] for side in sides)
    assert {(item.texts[0], item.answer.train) for split in Split for item in task.split(split)} == set(
        zip(first, second, strict=True)
    )


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("train.source", "train.target"),
        ("src-train.txt", "tgt-train.txt"),
        ("newstest.src", "newstest.ref"),
        ("source.txt", "target.txt"),
        ("train.article.txt", "train.title.txt"),
        ("train.src.gz", "train.trg.gz"),
        ("train_source", "train_target"),
    ],
)
def test_sides_that_are_called_after_their_use_are_known_in_any_task(tmp_path: Path, source: str, target: str) -> None:
    data = write(tmp_path, {source: EN, target: DE})
    if "news" in source:  # no training data: only a test set
        with pytest.raises(DataError, match="no training data"):
            Translation(data=data).split(Split.TRAIN)
        assert len(Translation(data=data).split(Split.DEV)) == 50
        return
    for task in (Translation(data=data), Summarization(data=data), Translation(data=data / source)):
        assert [len(task.split(split)) for split in Split] == [36, 9, 5]
        assert all((item.texts[0], item.answer.train) in set(zip(EN, DE, strict=True)) for item in task.split(Split.TRAIN))


def test_the_only_folder_in_a_folder_is_looked_into(tmp_path: Path) -> None:
    write(tmp_path, {"data/train.en": EN, "data/train.de": DE, "README.md": ["x"]})
    assert [len(Translation(data=tmp_path).split(split)) for split in Split] == [36, 9, 5]


def test_two_files_and_one_of_a_pair_can_be_named(tmp_path: Path) -> None:
    folder = write(tmp_path, {"corpus-a": EN, "corpus-b": DE, "train.en": EN, "train.de": DE})
    for task in (
        Translation(data=(folder / "corpus-a", folder / "corpus-b")),
        Translation(data=str(folder / "corpus-a"), target_data=str(folder / "corpus-b")),
        Translation(data=str(folder / "train.en")),
    ):
        assert {item.answer.train for item in task.split(Split.TRAIN)} <= set(DE)
    assert {item.answer.train for item in Translation(data=str(folder / "train.de")).split(Split.TRAIN)} <= set(EN)


def test_a_test_set_can_be_named_instead_of_dev(tmp_path: Path) -> None:
    tests = {f"test_201{year}_flickr.{side}": lines[:year] for year in (6, 7) for side, lines in (("en", EN), ("de", DE))}
    folder = write(tmp_path, {"train.en": EN, "train.de": DE, "val.en": EN[:9], "val.de": DE[:9], **tests})
    assert len(Translation(data=folder).split(Split.DEV)) == 9
    assert len(Translation(data=folder, dev="test_2016_flickr").split(Split.DEV)) == 6
    assert len(Translation(data=folder, dev=str(folder / "test_2017_flickr.en")).split(Split.DEV)) == 7
    with pytest.raises(DataError, match="holds no 'test_2018_flickr'"):
        Translation(data=folder, dev="test_2018_flickr").split(Split.DEV)


def test_several_references_stand_in_files_with_a_number(tmp_path: Path) -> None:
    files = {"train.src": EN, "train.ref": DE, "test.src": EN[:4], "test.ref0": DE[:4], "test.ref1": FR[:4]}
    task = Translation(data=write(tmp_path, files))
    assert [item.answer.references for item in task.split(Split.DEV)] == list(zip(DE[:4], FR[:4], strict=True))


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    odd = ["room\u2028one", "room\x0btwo", "room\x85three", *EN]
    (tmp_path / "train.en").write_bytes("\r\n".join(odd).encode())
    write(tmp_path, {"train.de": [*DE[:3], *DE]})
    task = Translation(data=tmp_path)
    assert {item.texts[0] for split in Split for item in task.split(split)} == set(odd)


def test_pairs_with_an_empty_side_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    holes = [" " if number in (3, 7) else text for number, text in enumerate(DE)]
    task = Translation(data=write(tmp_path, {"train.en": EN, "train.de": holes, "dev.en": EN[:5], "dev.de": DE[:5]}))
    told = said(caplog, task)
    assert "2 of 50 lines have an empty side and are left out; the first is line 4" in told
    assert "5 of 5 texts of dev are in the training data too" not in told  # one of them was left out
    assert "4 of 5 texts of dev are in the training data too" in told
    assert {item.id for split in (Split.TRAIN, Split.VALIDATION) for item in task.split(split)} == {
        f"train/{number}" for number in range(50) if number not in (3, 7)
    }


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"train.en": EN, "train.de": DE[:-1]}, {}, r"train\.en has 50 lines, and .*train\.de has 49: they are not parallel"),
        ({"train.en": EN, "train.de": [""] * 50}, {}, "train.de is empty"),
        ({"train.en": EN, "train.de": EN}, {}, "hold the same texts in every line"),
        ({"train.en": EN, "train.de": DE, "train.fr": FR}, {}, "has the sides de, en, fr"),
        ({"train.en": EN, "train.de": DE}, {"target": "fr"}, "there is no file for the target 'fr'"),
        ({"train.fr": FR, "train.de": DE}, {}, "which is to be read, and which is to be written"),
        ({"train.en": EN}, {}, r"texts of one side alone: train\.en"),
        ({"train.en": EN, "train.de": DE, "train.clean.en": EN, "train.clean.de": DE, "a.train.en": EN, "a.train.de": DE}, {}, None),
        ({"a.train.en": EN, "a.train.de": DE, "b.train.en": EN, "b.train.de": DE}, {}, "several texts for train: a.train, b.train"),
        ({"train.en": EN, "train.de": DE, "a.en": EN, "b.de": DE}, {"data": "a.en"}, "no file of the other side beside it"),
        ({"a.txt": EN}, {"data": "a.txt", "target_data": "a.txt"}, "is given for both sides"),
        ({"a.txt": EN}, {"data": "a.txt", "target_data": "b.txt"}, "does not exist"),
        ({"a.txt": EN}, {"target_data": "b.txt"}, "is no file"),
        ({"train.tsv": ["en\tde", *(f"{a}\t{b}" for a, b in zip(EN, DE, strict=True))]}, {"source": "sv"}, "has no column 'sv'"),
        ({"train.tsv": ["a\tb", *(f"{a}\t{b}" for a, b in zip(EN, DE, strict=True))]}, {}, "cannot tell which column is the source and"),
        ({"train.jsonl": [json.dumps({"en": "a", "de": {"b": 1, "c": [1]}})] * 3}, {"target": "de.c"}, "no text in column 'de.c'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_two_texts_is_one_clear_line(
    tmp_path: Path, files: Mapping[str, Sequence[str]], options: dict[str, str], message: str | None
) -> None:
    write(tmp_path, files)
    places = {key: str(tmp_path / options[key]) for key in ("data", "target_data") if key in options}
    task = Translation(**({"data": str(tmp_path)} | options | places))
    if message is None:
        assert len(task.split(Split.TRAIN)) == 36  # the name that is "train" alone is meant
        return
    with pytest.raises(DataError, match=message) as caught:
        task.split(Split.TRAIN)
    assert caught.value.help


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "en", "target": "en"}, "both are 'en'"),
        ({"metric": "blue"}, "did you mean 'bleu'"),
        ({"tokenize": "13b"}, "did you mean '13a'"),
        ({"label_smoothing": 1}, "label_smoothing"),
        ({"max_target_length": 1}, "max_target_length: at least 4"),
        ({"train_rows": 3}, "train_rows: at least 10"),
    ],
)
def test_a_wrong_option_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Translation(data="x", **options)


# ---- tables


ROWS = [{"translation": {"en": a, "de": b}, "id": n} for n, (a, b) in enumerate(zip(EN, DE, strict=True))]


def test_tables_files_and_memory_are_read_alike(tmp_path: Path) -> None:
    write(tmp_path / "lines", {"train.jsonl": [json.dumps(row) for row in ROWS]})
    write(tmp_path / "table", {"train.tsv": ["src\ttgt", *(f"{a}\t{b}" for a, b in zip(EN, DE, strict=True))]})
    for data, names in (
        (tmp_path / "lines", ("translation.en", "translation.de")),
        (ROWS, ("translation.en", "translation.de")),
        (tmp_path / "table", ("src", "tgt")),
        ({"source": EN, "target": DE}, ("source", "target")),
        ({"English": EN, "German": DE}, ("English", "German")),
    ):
        task = Translation(data=data).settled()
        assert (task.source, task.target) == names
        assert {(item.texts[0], item.answer.train) for split in Split for item in task.split(split)} == set(
            zip(EN, DE, strict=True)
        )
    turned = Translation(data=ROWS, source="de", target="en")
    assert {item.texts[0] for item in turned.split(Split.TRAIN)} <= set(DE)


@pytest.mark.slow
def test_data_sets_of_the_hub_keep_their_translations() -> None:
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"translation": datasets.Translation(languages=["de", "en"])})
    data = datasets.Dataset.from_list([{"translation": row["translation"]} for row in ROWS], features=kinds)
    assert {item.answer.train for item in Translation(data=data).split(Split.TRAIN)} <= set(DE)


def test_a_summary_may_be_one_of_several_of_a_list_of_sentences(caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"source": ["It rained.", f"Day {n}."], "target": [f"Rain {n}.", "Rain."][: 1 + n % 2], "score": [0.1]}
        for n in range(50)
    ]
    task = Summarization(data=rows)
    told = said(caplog, task)
    assert "taking source 'source', target 'target'" in told
    assert "25 of 50 texts have several references" in told
    (example,) = [item for split in Split for item in task.split(split) if item.id == "train/1"]
    assert example.texts == ("It rained. Day 1.",)
    assert example.answer == Targets(("Rain 1.", "Rain."), "Rain 1.")
    for names in (("article", "highlights"), ("dialogue", "summary"), ("document", "summary"), ("text", "summary")):
        named = Summarization(data=[dict(zip(names, (f"a long text {n}", f"short {n}"), strict=True)) for n in range(50)])
        assert named.split(Split.TRAIN)[0].answer.train.startswith("short")


def test_a_test_table_without_references_cannot_stand_in_for_dev(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = [json.dumps({"source": a, "target": b}) for a, b in zip(EN, DE, strict=True)]
    task = Translation(data=write(tmp_path, {"train.jsonl": pairs, "test.jsonl": [json.dumps({"source": "a"})]}))
    assert "has no references (column 'target')" in said(caplog, task)
    assert [len(task.split(split)) for split in Split] == [36, 9, 5]
    with pytest.raises(DataError, match=r"no column 'target'"):
        Translation(data=tmp_path, source="source", target="target", dev="test").split(Split.DEV)


def test_a_source_is_never_in_two_splits() -> None:
    task = Translation(data={"en": [EN[n // 5] for n in range(200)], "de": [f"Raum {n}" for n in range(200)]})
    seen = [{item.texts[0] for item in task.split(split)} for split in Split]
    assert not seen[0] & seen[1]
    assert not (seen[0] | seen[1]) & seen[2]


def test_other_texts_can_be_learned(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", {"train.en": EN, "train.de": DE, "dev.en": ["a room"], "dev.de": ["ein Raum"]})
    lines = write(tmp_path, {"teacher.de": [f"Zimmer {n}" for n in range(50)]}) / "teacher.de"
    rows = write(tmp_path, {"teacher.jsonl": [json.dumps({"id": f"train/{n}", "text": f"Zimmer {n}"}) for n in range(50)]})
    for targets in (str(lines), str(rows / "teacher.jsonl"), {f"train/{n}": f"Zimmer {n}" for n in range(50)}):
        task = Translation(data=folder, targets=targets)
        train = task.split(Split.TRAIN)
        assert [item.answer.train for item in train] == [f"Zimmer {item.id.partition('/')[2]}" for item in train]
        assert all(item.answer.train == item.answer.references[0] for item in task.split(Split.VALIDATION))
        assert train[0].answer.references[0] in DE
    assert any("40 of 40 training examples learn its texts" in told for told in log.remarks_on(str(lines)))
    write(tmp_path, {"short.de": DE[:4]})
    with pytest.raises(DataError, match=r"short\.de has 4 lines, and .* has 50"):
        Translation(data=folder, targets=str(tmp_path / "short.de")).split(Split.TRAIN)
    with pytest.raises(DataError, match="no text for any of the 50 training examples"):
        Translation(data=folder, targets={"9": "x"}).split(Split.TRAIN)


# ---- rows of tokens


WORDS = ["<pad>", "</s>", "<unk>", "<s>", "translate:", "room", "is", "red", "Raum", "ist", "rot", *map(str, range(50))]
CONFIG = {"model_type": "marian", "is_encoder_decoder": True, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
          "max_position_embeddings": 16}  # fmt: skip


def words(template: str = "$A </s>", extra: Sequence[str] = ()) -> Tokenizer:
    names = [*WORDS, *extra]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(["<pad>", "</s>", "<unk>", "<s>", *extra])
    made.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, names.index(name)) for name in ("<s>", "</s>", *extra)]
    )
    return made


def example(source: str, target: str, *more: str) -> Example:
    return Example("train/0", (source,), Targets((target, *more), target))


def task(**options: Any) -> Translation:
    return Translation(data="x", source="en", target="de", **options).bind(CONFIG)


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def test_rows_are_the_source_the_target_and_the_target_a_place_later() -> None:
    features = task().encode([example("room 1 is red", "Raum 1 ist"), example("room 2", "Raum 2")], words(), 16)
    assert [row.tolist() for row in features.columns["input_ids"]] == [ids("room 1 is red </s>"), ids("room 2 </s>")]
    assert [row.tolist() for row in features.columns["labels"]] == [ids("Raum 1 ist </s>"), ids("Raum 2 </s>")]
    assert [row.tolist() for row in features.columns["decoder_input_ids"]] == [ids("<pad> Raum 1 ist"), ids("<pad> Raum 2")]
    batch = collate(features, [0, 1])
    assert batch["input_ids"].tolist() == [ids("room 1 is red </s>"), ids("room 2 </s> <pad> <pad>")]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [ids("Raum 1 ist </s>"), [*ids("Raum 2 </s>"), -100]]
    assert batch["decoder_input_ids"].tolist() == [ids("<pad> Raum 1 ist"), ids("<pad> Raum 2 <pad>")]
    assert collate(features, [1], width=9)["input_ids"].shape == (1, 9)
    assert collate(features, [1], width=9)["labels"].shape == (1, 3)


def test_long_texts_are_cut_and_counted_on_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    log._remarked.clear()
    some = task(max_target_length=4)
    features = some.encode([example("room 1 is red", "Raum 1 ist rot"), example("room 1", "Raum 1")], words(), 4)
    assert features.truncated == 1
    assert features.columns["input_ids"][0].tolist() == ids("room 1 is </s>")
    assert features.columns["labels"][0].tolist() == ids("Raum 1 ist </s>")
    assert "1 of 2 texts to be written are cut off at 4 tokens" in caplog.text
    assert task(max_target_length=64).max_target_length == 16
    assert "texts of at most 16 tokens are written" in caplog.text


def test_a_prefix_stands_before_each_source_alone() -> None:
    features = task(prefix="translate: ").encode([example("room 1", "Raum 1")], words(), 16)
    assert features.columns["input_ids"][0].tolist() == ids("translate: room 1 </s>")
    assert features.columns["labels"][0].tolist() == ids("Raum 1 </s>")


def test_special_tokens_in_a_text_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    log._remarked.clear()
    features = task().encode([example("room </s>1 <pad>", "<s>Raum 1"), example("room 1", "Raum 1")], words(), 16)
    assert features.columns["input_ids"][0].tolist() == ids("room 1 </s>")
    assert features.columns["labels"][0].tolist() == ids("Raum 1 </s>")
    assert "1 of 2 texts hold special tokens of the tokenizer, such as </s>: they are left out there" in caplog.text


def test_a_tokenizer_that_does_not_fit_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    log._remarked.clear()
    with pytest.raises(DataError, match="to be written are unknown to the model's tokenizer"):
        task().encode([example("room 1", "la chambre 1 est rouge")], words(), 16)
    task().encode([example("room number 1 is red", "Raum 1")], words(), 16)
    assert "16.7% of the tokens of the texts to be read are unknown" in caplog.text
    with pytest.raises(DataError, match=r"does not end a text with the model's end token, id 1 \(</s>\)"):
        task().encode([example("room 1", "Raum 1")], words("$A"), 16)
    with pytest.raises(DataError, match="puts the code of a language around each text"):
        task().encode([example("room 1", "Raum 1")], words("eng_Latn $A </s>", ["eng_Latn"]), 16)


def test_a_model_that_cannot_write_is_refused() -> None:
    with pytest.raises(DataError, match=r"the model is no encoder-decoder \(bert\): it cannot write a text"):
        Translation(data="x").bind({"model_type": "bert"})
    with pytest.raises(DataError, match="with which token its decoder starts"):
        Translation(data="x").bind({"is_encoder_decoder": True, "model_type": "bart"})
    assert Translation(data="x").bind({"is_encoder_decoder": True, "model_type": "t5", "pad_token_id": 7}).start_id == 7


# ---- losses


def tiny_models() -> dict[str, Any]:
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        MarianConfig,
        MarianMTModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    size = {"vocab_size": len(WORDS), "d_model": 16, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    both = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
            (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    bart = size | both | {"max_position_embeddings": 32, "dropout": 0.0}
    return {
        "marian": MarianMTModel(MarianConfig(**bart, decoder_vocab_size=len(WORDS))),
        "bart": BartForConditionalGeneration(BartConfig(**bart | {"forced_eos_token_id": 1, "bos_token_id": 3})),
        "t5": T5ForConditionalGeneration(T5Config(**size, num_layers=1, num_heads=2, d_kv=8, d_ff=16, dropout_rate=0.0)),
    }


@pytest.fixture
def features() -> Features:
    pairs = [example("room 1 is red", "Raum 1 ist rot"), example("room 2", "Raum 2"), example("room 3 is", "Raum 3 ist")]
    return task().encode(pairs, words(), 16)


@pytest.mark.slow
def test_the_loss_of_a_batch_is_what_transformers_computes_from_labels(features: Features) -> None:
    batch = {name: torch.from_numpy(array) for name, array in collate(features, range(3)).items()}
    labels = batch.pop("labels")
    for name, model in tiny_models().items():
        model.eval()
        with torch.no_grad():
            theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
            output = {"logits": model(**batch).logits}
        bound = Translation(data="x", label_smoothing=0).bind(model.config)
        ours = bound.loss(output, batch | {"labels": labels})
        assert torch.allclose(ours, theirs, atol=1e-6), name
        smoothed = (
            Translation(data="x", label_smoothing=0.2).bind(model.config.to_dict()).loss(output, batch | {"labels": labels})
        )
        likely = torch.log_softmax(output["logits"], -1)[labels != -100]  # (tokens, words)
        by_hand = 0.8 * ours - 0.2 * likely.mean()
        assert torch.allclose(smoothed, by_hand, atol=1e-5), name


def test_the_divergence_is_a_mean_over_real_tokens() -> None:
    labels = torch.tensor([[4, 1, -100], [5, 6, 1]])
    student, teacher = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    found = task().divergence({"logits": student}, {"logits": teacher}, {"labels": labels}, 2.0)
    total = 0.0
    for row, place in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):
        ours, theirs = (torch.softmax(side[row, place] / 2, -1) for side in (student, teacher))
        total += float((theirs * (theirs / ours).log()).sum()) * 4 / 5
    assert math.isclose(float(found), total, rel_tol=1e-4)
    student[0, 2] = 1e4  # padding
    assert torch.equal(task().divergence({"logits": student}, {"logits": teacher}, {"labels": labels}, 2.0), found)


# ---- scores without texts


def test_without_texts_the_share_of_right_tokens_stands_in(features: Features) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 5, len(WORDS))).astype(np.float32)
    logits[0, :2] = 0
    logits[0, 0, ids("Raum")[0]] = logits[0, 1, ids("1")[0]] = 20
    pairs = [example("", "")] * 3

    def runner(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        places = [
            next(row for row in range(3) if features.columns["input_ids"][row][1] == ids_[1]) for ids_ in batch["input_ids"]
        ]
        written = torch.from_numpy(logits[places, : batch["decoder_input_ids"].shape[1]])
        return {name: value.numpy() for name, value in task().kept({"logits": written}, batch).items()}

    right = likelihood = tokens = 0.0
    for row, labels in enumerate(features.columns["labels"]):
        for place, label in enumerate(labels):
            shares = np.exp(logits[row, place].astype(np.float64))
            right += logits[row, place].argmax() == label
            likelihood += math.log(shares[label] / shares.sum())
            tokens += 1
    outputs = scoring.evaluate(runner, features, 2, tuple(features.columns))
    scores = task().score(outputs, features, pairs)
    assert scores == pytest.approx({"token_accuracy": right / tokens, "token_likelihood": math.exp(likelihood / tokens)})
    assert task().counted(scores) == scores["token_accuracy"]
    assert task().credit(outputs, features, pairs)[0] == pytest.approx(2 / 5)
    assert task().answers(outputs, features, pairs) == ["", "", ""]


# ---- scores of texts


GOLD = [example("", "a man in a red hat is here now", "the man in the red hat is here"), example("", "two dogs run over the green grass"),
        example("", "it rains on the small house", "rain on a house", "it is raining"), example("", "no")]  # fmt: skip
SAID = ["a man in a red hat is there", "two dogs run over green grass now", "it rains on a house", "yes"]
WRITTEN = {"text": np.array(SAID, dtype=object)}


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_bleu_and_chrf_are_those_of_sacrebleu(metric: str) -> None:
    metrics = pytest.importorskip("sacrebleu.metrics", reason="sacrebleu is not installed")
    judge = metrics.BLEU() if metric == "bleu" else metrics.CHRF()
    streams = [[item.answer.references[n] if n < len(item.answer.references) else None for item in GOLD] for n in range(3)]
    found = task(metric=metric).score(WRITTEN, features=Features({}, (), 0, 0), examples=GOLD)
    assert found[metric] == pytest.approx(judge.corpus_score(SAID, streams).score / 100, abs=1e-12)
    assert task(metric=metric).counted(found) == found[metric]
    credit = task(metric=metric).credit(WRITTEN, Features({}, (), 0, 0), GOLD)
    alone = metrics.BLEU(effective_order=True) if metric == "bleu" else judge
    assert credit == pytest.approx([alone.sentence_score(text, item.answer.references).score / 100
                                    for text, item in zip(SAID, GOLD, strict=True)])  # fmt: skip


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_the_score_of_a_resample_is_that_of_its_texts(metric: str) -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    some, draws = task(metric=metric), [np.random.default_rng(seed).integers(0, 4, 4) for seed in range(5)]
    quick = some.resampled(WRITTEN, Features({}, (), 0, 0), GOLD, draws)
    slow = [
        some.score({"text": WRITTEN["text"][draw]}, Features({}, (), 0, 0), [GOLD[place] for place in draw])[metric]
        for draw in draws
    ]
    assert quick == pytest.approx(slow, abs=1e-12)
    assert some.resampled({}, Features({}, (), 0, 0), GOLD, draws) is None


@pytest.mark.slow
def test_rouge_is_that_of_rouge_score_and_a_mean_over_texts() -> None:
    rouge = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is not installed")
    some = Summarization(data="x", metric="rouge2").bind(CONFIG)
    scorer = rouge.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    best = [
        max(scorer.score(reference, text)["rouge2"].fmeasure for reference in item.answer.references)
        for text, item in zip(SAID, GOLD, strict=True)
    ]
    credit = some.credit(WRITTEN, Features({}, (), 0, 0), GOLD)
    assert credit == pytest.approx(best)
    scores = some.score(WRITTEN, Features({}, (), 0, 0), GOLD)
    assert set(scores) == {"rouge1", "rouge2", "rougeL"}
    assert scores["rouge2"] == pytest.approx(float(np.mean(best)))


def test_the_notes_hold_the_signatures(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    folder = write(tmp_path, {"train.en": EN, "train.zh": DE})
    notes = Translation(data=folder).notes()
    assert any(note.startswith("bleu is sacrebleu|nrefs:1|case:mixed|eff:no|tok:zh|smooth:exp|version:") for note in notes)
    assert any(note.startswith("chrf is sacrebleu|nrefs:1|") for note in notes)
    assert any("reading en, writing zh" in note for note in notes)


@pytest.mark.parametrize(("kind", "package"), [(Translation, "sacrebleu"), (Summarization, "rouge_score")])
def test_a_missing_package_is_said_before_a_run(monkeypatch: pytest.MonkeyPatch, kind: Any, package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    some = kind(data={"source": EN, "target": DE})
    assert len(some.split(Split.TRAIN)) == 36  # nothing of this needs it
    with pytest.raises(ExtraError, match="need") as caught:
        some.notes()
    assert "slimformer[generation]" in caught.value.help


def test_texts_are_gathered_and_compared_in_pairs() -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    lengths = [3, 1, 4, 2]
    rows = Features({"input_ids": [[5] * length for length in lengths]}, range(4), 0, 0)

    def runner(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        places = [lengths.index(int(count)) for count in batch["attention_mask"].sum(1)]
        return {"text": np.array([SAID[place] for place in places], dtype=object)}

    outputs = scoring.evaluate(runner, rows, 3)
    assert list(outputs["text"]) == SAID
    entry = scoring.Entry("a", "ours", "torch", type("Session", (), {"path": None})(), task(), rows)  # type: ignore[arg-type]
    scored = scoring.Scored.of(entry, outputs, GOLD)
    assert scored.answers == tuple(SAID)
    resamples = scoring.resampled(scored, GOLD)
    assert resamples.shape == (scoring.METRIC_RESAMPLES,)
    losses = scoring.metric_losses({"a": scored, "b": scored}, [("a", "b")], {"a": resamples, "b": resamples})
    assert losses["a", "b"].value == losses["a", "b"].high == 0
    scoring._check_outputs(entry, outputs, GOLD)
    with pytest.raises(ModelError, match="gives no text for each input, and bleu judges texts"):
        scoring._check_outputs(entry, {"logits": np.zeros((4, 2, 8))}, GOLD)


# ---- the real files


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "multi30k").is_dir(), reason="Multi30k is not beside the repository")
def test_multi30k_and_scitldr_are_read_as_they_lie() -> None:
    some = Translation(data=SHARED / "multi30k", target="fr", dev="test_2016_flickr")
    assert [len(some.split(split)) for split in Split] == [27_550, 1_450, 1_000]
    assert some.split(Split.DEV)[0].answer.train == "Un homme avec un chapeau orange regardant quelque chose."
    assert [len(Summarization(data=SHARED / "scitldr").split(split)) for split in Split] == [1_792, 200, 619]
