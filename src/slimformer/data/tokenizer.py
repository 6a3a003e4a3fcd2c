"""Loads a model folder's tokenizer and says how long its inputs may be.

All other code works on a `tokenizers.Tokenizer`, so that an exported folder, which always holds tokenizer.json, is used without
transformers. `tokenizer_files` says which tokenizer the files of a folder stand for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from slimformer.data.tokenizer_files import encoding_errors, read_json, target_text, tokenizer_text
from slimformer.errors import ModelError, RecipeError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LONGEST = 512  # what the encoders of all our families were trained on; longer is never what a user wants by default
_MOST_TOKENS = 1_000_000  # of a text: what is said to be more was made up
PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>", "<PAD>")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder.

    ModelError if there is none, if it cannot be read or used, or if it has ids that the model has no rows for; ExtraError if it must be
    converted and transformers is not installed.
    """
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer_text(folder))


def load_target_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of what a model writes; None if it is that of what it reads. ModelError if it cannot be read."""
    from tokenizers import Tokenizer

    text = target_text(folder)
    if text is None:
        return None
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception for whatever is wrong
        raise ModelError(
            f"the tokenizer of what the model in {folder} writes cannot be read: {error}.", help="copy its files again."
        ) from None


def max_length_of(folder: Path) -> int:
    """Tokens a model in this folder can take, special ones included: an encoder at most 512.

    An encoder-decoder takes as many as it has positions. A T5 has no end of them, and what its tokenizer says is how long the texts
    of its pre-training were.
    """
    from slimformer.families.base import find_family

    folder = Path(folder)
    config = read_json(folder / "config.json")
    base = str(config.get("model_type", "")).removeprefix("slimformer_")
    family = find_family(base)
    positions = (
        _count(config.get("max_position_embeddings")) if family is None else family.positions(config | {"model_type": base})
    )
    decodes = family is not None and family.decodes
    if decodes and positions is None:
        return _MOST_TOKENS
    said = _count(read_json(folder / "tokenizer_config.json").get("model_max_length"))
    limits = [limit for limit in (None if decodes else LONGEST, said, positions) if limit is not None]
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
    said = read_json(Path(folder) / "config.json").get("pad_token_id") if folder is not None else None
    return said if isinstance(said, int) and 0 <= said < 1 << 31 else 0


@contextmanager
def cutting(tokenizer: Tokenizer, max_length: int) -> Iterator[Tokenizer]:
    """The tokenizer cutting at `max_length` and padding nothing; its own settings are back afterwards.

    RecipeError if so few tokens leave no room for a text, or no model reads so many; ModelError if a text cannot be encoded in the block.
    """
    special = int(tokenizer.num_special_tokens_to_add(False))
    if isinstance(max_length, bool) or max_length <= special:  # with so few, the tokenizers package cuts nothing at all
        raise RecipeError(
            f"inputs of at most {max_length} tokens have no room for a text"
            + (f": {special} tokens of each are special." if special else "."),
            help=f"give a max_length of {special + 1} or more.",
        )
    if max_length > _MOST_TOKENS:
        raise RecipeError(f"inputs of at most {max_length} tokens: no model reads so many.", help="leave max_length out.")
    truncation, padding = tokenizer.truncation, tokenizer.padding
    try:
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length)
        with encoding_errors():
            yield tokenizer
    finally:
        tokenizer.no_truncation()
        if truncation is not None:
            tokenizer.enable_truncation(**truncation)
        if padding is not None:
            tokenizer.enable_padding(**padding)


def _count(value: object) -> int | None:
    """A believable number of tokens; None for the 1e30 that transformers writes if it knows no limit."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _MOST_TOKENS:
        return None
    return int(value)
