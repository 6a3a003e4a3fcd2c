"""Loads a model folder's tokenizer and says how long its inputs may be.

All other code works on a `tokenizers.Tokenizer`, so that an exported folder, which always holds tokenizer.json, is used without
transformers. Older folders that only hold vocab.txt, vocab.json and merges.txt, or a sentencepiece file, are converted in memory by
transformers. Nothing is downloaded, and no code of a model is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimformer.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LONGEST = 512  # what the encoders of all our families were trained on; longer is never what a user wants by default
PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>", "<PAD>")
OTHER_FORMS = ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder; ModelError if there is none or it cannot be read."""
    from tokenizers import Tokenizer

    folder = Path(folder)
    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception for whatever is wrong with the file
            raise ModelError(
                f"{file} cannot be read as a tokenizer: {error}.",
                help="copy tokenizer.json again from where the model came from.",
            ) from None
    found = [name for name in OTHER_FORMS if (folder / name).is_file()]
    if not found:
        raise ModelError(
            f"{folder} holds no tokenizer.",
            facts=[f"looked for: tokenizer.json, {', '.join(OTHER_FORMS)}"],
            help="save it beside the model: AutoTokenizer.from_pretrained(<base model>).save_pretrained(<this folder>).",
        )
    return _convert(folder, found)


def _convert(folder: Path, found: list[str]) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        slow = AutoTokenizer.from_pretrained(folder, use_fast=True, local_files_only=True, trust_remote_code=False)
        backend: Tokenizer = slow.backend_tokenizer
    except Exception as error:  # conversion meets every kind of broken file
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"the tokenizer in {folder} cannot be converted: {reason[0] if reason else type(error).__name__}",
            facts=[f"found: {', '.join(found)}"],
            help="save a tokenizer.json there: AutoTokenizer.from_pretrained(...).save_pretrained(<this folder>).",
        ) from None
    return backend


def max_length_of(folder: Path) -> int:
    """Tokens a model in this folder can take, special ones included: at most 512."""
    from slimformer.families.base import find_family

    folder = Path(folder)
    limits = [LONGEST]
    said = _read(folder / "tokenizer_config.json").get("model_max_length")
    if (limit := _count(said)) is not None:
        limits.append(limit)
    config = _read(folder / "config.json")
    base = str(config.get("model_type", "")).removeprefix("slimformer_")
    family = find_family(base)
    positions = (
        _count(config.get("max_position_embeddings")) if family is None else family.positions(config | {"model_type": base})
    )
    if positions is not None:
        limits.append(positions)
    if min(limits) < 1:
        raise ModelError(
            f"{folder} leaves room for {min(limits)} tokens.",
            help="look at max_position_embeddings in config.json and model_max_length in tokenizer_config.json.",
        )
    return min(limits)


def pad_id_of(tokenizer: Tokenizer, folder: Path | None = None) -> int:
    """The id that fills short rows: the tokenizer's own, else config.json's, else 0 (the mask hides it anyway)."""
    if tokenizer.padding is not None:
        return int(tokenizer.padding["pad_id"])
    for token in PAD_TOKENS:
        found = tokenizer.token_to_id(token)
        if found is not None:
            return int(found)
    said = _read(Path(folder) / "config.json").get("pad_token_id") if folder is not None else None
    return said if isinstance(said, int) else 0


@contextmanager
def cutting(tokenizer: Tokenizer, max_length: int) -> Iterator[Tokenizer]:
    """The tokenizer cutting at `max_length` and padding nothing; its own settings are back afterwards."""
    truncation, padding = tokenizer.truncation, tokenizer.padding
    try:
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length)
        yield tokenizer
    finally:
        tokenizer.no_truncation()
        if truncation is not None:
            tokenizer.enable_truncation(**truncation)
        if padding is not None:
            tokenizer.enable_padding(**padding)


def _count(value: object) -> int | None:
    """A believable number of tokens; None for the 1e30 that transformers writes if it knows no limit."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1_000_000:
        return None
    return int(value)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}.", help="copy it again from where the model came from.") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no JSON object.", help="copy it again from where the model came from.")
    return content
