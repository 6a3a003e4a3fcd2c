"""Makes tokenizers of the two SentencePiece models of a Marian folder: source.spm cuts what is read, target.spm what is written.

Both give pieces of one vocab.json (an OPUS-MT folder has no other file). A unigram model finds the likeliest pieces of a text
(Kudo 2018); here it holds all of vocab.json, and what is not in its own spm has a score so low that it is taken only for characters
that the spm does not know, as transformers' MarianTokenizer takes them. spm files are protocol buffers; the few fields that are
needed are read here, so that neither sentencepiece nor transformers has to be installed.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slimformer.errors import ModelError
from slimformer.files import read_small

SIDES = ("source.spm", "target.spm")
TARGET = "tokenizer_target.json"  # beside tokenizer.json in folders that we write
_VOCABULARY = "vocab.json"
_SPACE = "▁"
_CODE = re.compile(r">>[^<>\s]+<<")  # a language to write, in models of several: it stands in front of a text
_LOW, _LOWEST = -1e4, -1e5  # scores of characters and of longer pieces that a side does not know
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of sentencepiece's ModelProto
_UNIGRAM, _USED = 1, (1, 4)  # its kinds of models, and of pieces: normal ones and those of a user


def is_two_sided(folder: Path) -> bool:
    """Whether a folder has two SentencePiece models and no tokenizer.json."""
    return not (folder / "tokenizer.json").is_file() and all((folder / name).is_file() for name in (*SIDES, _VOCABULARY))


def lone_side(folder: Path) -> str:
    """Which of the three files of such a folder is missing; "" if none of the two models or both are there with vocab.json."""
    there = [name for name in SIDES if (folder / name).is_file()]
    if not there:
        return ""
    return next((name for name in (*SIDES, _VOCABULARY) if not (folder / name).is_file()), "")


def side_text(folder: Path, side: str) -> str:
    """The tokenizer of a side, "source.spm" or "target.spm", as the text of a tokenizer.json; ModelError if its files cannot be read."""
    ids = _ids(folder / _VOCABULARY)
    scores, charsmap = _read(folder / side)
    vocabulary = [
        [piece, scores.get(piece, 0.0 if piece in ("<unk>", "</s>", "<pad>") else _LOW if len(piece) == 1 else _LOWEST)]
        for piece in ids
    ]
    normalizers: list[dict[str, Any]] = [
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    ]
    if charsmap:
        import base64

        normalizers.insert(0, {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode("ascii")})
    place = {piece: number for number, piece in enumerate(ids)}
    metaspace = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "always", "split": True}
    added: list[tuple[str, bool]] = [(piece, True) for piece in ("</s>", "<unk>", "<pad>") if piece in place]
    added += [(piece, False) for piece in ids if _CODE.fullmatch(piece)]
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": place[piece], "content": piece, "single_word": False, "lstrip": False, "rstrip": not special,
                 "normalized": False, "special": special}
                for piece, special in sorted(added, key=lambda item: place[item[0]])
            ],
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": metaspace,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}},
                         {"SpecialToken": {"id": "</s>", "type_id": 0}}],
                "special_tokens": {"</s>": {"id": "</s>", "ids": [place["</s>"]], "tokens": ["</s>"]}},
            },
            "decoder": metaspace,
            "model": {"type": "Unigram", "unk_id": place["<unk>"], "vocab": vocabulary, "byte_fallback": False},
        },
        ensure_ascii=False,
    )  # fmt: skip


def _ids(file: Path) -> list[str]:
    """The pieces of vocab.json in order of their ids; ModelError unless these are 0, 1, ... and the usual special pieces are there."""
    try:
        content = json.loads(read_small(file))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}.", help="copy it again from where the model came from.") from None
    if not isinstance(content, dict) or sorted(content.values(), key=str) != sorted(range(len(content)), key=str):
        raise ModelError(
            f"{file} does not give each piece a number from 0 on.", help="copy it again from where the model came from."
        )
    lacking = next((piece for piece in ("</s>", "<unk>") if piece not in content), None)
    if lacking is not None:
        raise ModelError(
            f"{file} has no {lacking}, which a Marian needs.", help="copy it again from where the model came from."
        )
    return sorted(content, key=content.__getitem__)


def _read(file: Path) -> tuple[dict[str, float], bytes]:
    """The pieces of an spm file with their scores, and its table of characters that stand for others."""
    scores: dict[str, float] = {}
    charsmap = b""
    try:
        for field, value in _fields(read_small(file)):
            if field == _PIECES:
                piece = dict(_fields(value))
                if piece.get(3, 1) in _USED:
                    scores[bytes(piece[1]).decode("utf-8")] = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0]
            elif field == _TRAINER and dict(_fields(value)).get(3, _UNIGRAM) != _UNIGRAM:
                raise ModelError(
                    f"{file} is no unigram model: its pieces are merged, which is not read here.",
                    help="save a tokenizer.json beside the model on a machine that has its tokenizer.",
                )
            elif field == _NORMALIZER:
                charsmap = bytes(dict(_fields(value)).get(2, b""))
    except (OSError, IndexError, KeyError, ValueError, TypeError, struct.error) as error:
        raise ModelError(
            f"{file} cannot be read as a SentencePiece model: {error or type(error).__name__}.",
            help="copy it again from where the model came from.",
        ) from None
    if not scores:
        raise ModelError(f"{file} holds no pieces.", help="copy it again from where the model came from.")
    return scores, charsmap


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: its number with an int, or with bytes (also for fixed numbers)."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value: Any
            value, place = _varint(data, place)
        else:
            size = {1: 8, 5: 4}.get(kind)
            if kind == 2:
                size, place = _varint(data, place)
            if size is None or place + size > len(data):
                raise ValueError("it ends too early")
            value, place = data[place : place + size], place + size
        yield key >> 3, value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise ValueError("a number is too long")
