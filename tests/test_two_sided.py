"""The two SentencePiece models of a Marian folder: what is read and what is written are cut each by its own, into pieces of one list."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
from tiny_pairs import speaker, write_pairs

from slimformer.data.material import encode_rows
from slimformer.data.tokenizer import load_target_tokenizer, load_tokenizer
from slimformer.data.tokenizer_files import write_tokenizer
from slimformer.errors import ModelError
from slimformer.tasks.base import Split
from slimformer.tasks.translation import Translation

IDS = ["</s>", "<unk>", "▁the", "▁room", "▁ro", "om", "▁", "a", "▁der", "▁raum", "▁ra", "um", "ß", ">>deu<<", "<pad>"]
SOURCE = {"▁the": -1.0, "▁room": -2.0, "▁ro": -3.0, "om": -3.0, "▁": -4.0, "a": -5.0}
TARGET = {"▁der": -1.0, "▁ra": -2.0, "um": -2.0, "▁": -4.0, "a": -5.0, "ß": -5.0, "▁raum": -9.0}


def number(value: int) -> bytes:
    return bytes([value & 127 | 128]) + number(value >> 7) if value > 127 else bytes([value])


def message(field: int, content: bytes) -> bytes:
    return number(field << 3 | 2) + number(len(content)) + content


def spm(pieces: Mapping[str, float], kind: int = 1) -> bytes:
    """A SentencePiece model as a protocol buffer: <unk>, then pieces with scores, then what trained it."""

    def piece(text: str, score: float, type_: int) -> bytes:
        return message(
            1, message(1, text.encode()) + number(2 << 3 | 5) + struct.pack("<f", score) + number(3 << 3) + number(type_)
        )

    made = b"".join(piece(text, score, 1) for text, score in pieces.items())
    return piece("<unk>", 0.0, 2) + made + message(2, number(3 << 3) + number(kind)) + message(3, message(1, b"identity"))


def write(folder: Path, **files: bytes | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    usual = {
        "source.spm": spm(SOURCE),
        "target.spm": spm(TARGET),
        "vocab.json": json.dumps({piece: place for place, piece in enumerate(IDS)}).encode(),
    }
    for name, content in (usual | {key.replace("_", "."): value for key, value in files.items()}).items():
        if content is not None:
            (folder / name).write_bytes(content)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "MarianTokenizer"}', encoding="utf-8")
    return folder


def pieces(tokenizer: object, text: str) -> list[str]:
    return tokenizer.encode(text).tokens  # type: ignore[attr-defined, no-any-return]


def test_each_side_is_cut_by_its_own_model(tmp_path: Path) -> None:
    source, target = load_tokenizer(write(tmp_path)), load_target_tokenizer(tmp_path)
    assert pieces(source, "the room") == ["▁the", "▁room", "</s>"]
    assert pieces(target, "der raum") == ["▁der", "▁ra", "um", "</s>"]  # -4 is likelier than -9
    assert [source.token_to_id(piece) for piece in IDS] == [target.token_to_id(piece) for piece in IDS] == list(range(len(IDS)))
    assert "ß" in pieces(source, "the ß")
    assert source.encode(">>deu<< the room").ids == [13, 2, 3, 0]
    assert source.encode("the 漢").ids == [2, 6, 1, 0]
    assert source.decode([8, 10, 11, 0]) == "der raum"


def test_a_written_folder_keeps_both(tmp_path: Path) -> None:
    source = write(tmp_path / "marian")
    (tmp_path / "out").mkdir()
    write_tokenizer(source, tmp_path / "out")
    assert sorted(item.name for item in (tmp_path / "out").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer_target.json",
    ]
    for load in (load_tokenizer, load_target_tokenizer):
        assert load(tmp_path / "out").to_str() == load(source).to_str()
    assert load_target_tokenizer(write_pairs(tmp_path / "plain")) is None


def test_rows_are_made_by_both(tmp_path: Path) -> None:
    folder = write(tmp_path / "marian")
    for side, line in (("en", "the room\n"), ("de", "der raum\n")):
        (tmp_path / f"train.{side}").write_text("".join(f"{line.strip()} {'a' * n}\n" for n in range(1, 41)), encoding="utf-8")
    task = Translation(data=str(tmp_path), source="en", target="de").bind(
        speaker("marian", len(IDS), pad_token_id=14, eos_token_id=0, decoder_start_token_id=14).config.to_dict()
    )
    rows = encode_rows(task, task.split(Split.DEV)[:1], folder, 64)
    assert rows.pad_id == 14
    assert rows.columns["input_ids"][0][:2].tolist() == [2, 3]
    assert rows.columns["labels"][0][:3].tolist() == [8, 10, 11]
    assert rows.columns["decoder_input_ids"][0][0] == 14


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"target_spm": None}, "holds a part of a Marian's tokenizer, and no target.spm"),
        ({"vocab_json": None}, "holds a part of a Marian's tokenizer, and no vocab.json"),
        ({"source_spm": b"\x0a\xff"}, "source.spm cannot be read as a SentencePiece model"),
        ({"source_spm": b""}, "source.spm holds no pieces"),
        ({"source_spm": spm(SOURCE, kind=2)}, "source.spm is no unigram model"),
        ({"vocab_json": b'{"</s>": 0, "<unk>": 7}'}, "vocab.json does not give each piece a number"),
        ({"vocab_json": b'{"a": 0, "b": 1}'}, "vocab.json has no </s>"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(files: dict[str, bytes | None], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load_tokenizer(write(tmp_path, **files))
