"""Trains a tokenizer on texts: byte-level byte-pair encoding, one vocabulary for all of them.

Paper: Sennrich, Haddow and Birch 2016, "Neural Machine Translation of Rare Words with Subword Units", section 3.2: a joint
vocabulary for both languages. Differs: pairs of bytes are merged instead of pairs of characters (as in GPT-2), so that no text has
an unknown token. The training is that of the tokenizers package.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from slimformer.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTES = 256


def train_vocabulary(texts: Iterable[str], size: int, special: Mapping[str, str]) -> Tokenizer:
    """A tokenizer with at most `size` tokens, trained on the texts.

    Args:
        texts: What it will read, of all languages.
        size: Tokens, special ones and the 256 bytes included.
        special: Role -> token, in the order of their ids from 0: "pad_token", "eos_token", perhaps "bos_token" and "unk_token". Each
            text begins with the token `bos_token`, if there is one, and ends with `eos_token`.

    Raises:
        DataError: The texts are too few or too like each other for so many tokens.

    Example:
        >>> texts = ["a room with a view", "rooms with views"]
        >>> tokenizer = train_vocabulary(texts, 265, {"pad_token": "<pad>", "eos_token": "</s>"})
        >>> tokenizer.get_vocab_size(), tokenizer.decode(tokenizer.encode("a view").ids)
        (265, 'a view')
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # the first word is then written as any other
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found != size:
        raise DataError(
            f"the texts give a vocabulary of {found:,} tokens, not of {size:,}.",
            help=f"ask for at most {found:,}, or give more texts."
            if found < size
            else f"ask for {BYTES + len(special)} or more: each byte has a token.",
        )
    begin, end = special.get("bos_token"), special["eos_token"]
    front = f"{begin} " if begin else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{front}$A {end}",
        pair=f"{front}$A $B {end}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in filter(None, (begin, end))],
    )
    return tokenizer
