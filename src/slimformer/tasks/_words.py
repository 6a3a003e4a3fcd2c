"""Numpy's part of tagging: which token stands for each word, windows over long texts, and the tag of each word out of a model's logits.

A word is answered by its first token (Devlin et al. 2018, https://arxiv.org/abs/1810.04805, section 5.3), in the one window that holds it
with the most text on both sides. No other token has a label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from slimformer.tasks.base import IGNORED, Features, Outputs

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Places = Sequence[tuple[int, int]]  # first and last character (exclusive) of each word


def add_windows(columns: Mapping[str, list[Any]], windows: Sequence[Encoding], places: Places, labels: np.ndarray) -> int:
    """Appends the windows of one text: ids, the word that each token stands for (-1 for none), and its label.

    `labels` (words,) are `IGNORED` where a word's tag is unknown to the model. Returns how many words no token stands for.
    """
    firsts = [_first_tokens(window, places) for window in windows]  # (words,) each
    # tokens on the poorer side, -1 without the word; ends of the text need no care, because windows share at most their halves
    room = np.stack([np.minimum(first, len(window.ids) - 1 - first) for first, window in zip(firsts, windows, strict=True)])
    best = room.argmax(axis=0) if len(places) else np.zeros(0, dtype=np.int64)  # (words,), the first of equal ones
    for number, (first, window) in enumerate(zip(firsts, windows, strict=True)):
        mine = np.flatnonzero((first >= 0) & (best == number))
        words, wanted = (np.full(len(window.ids), fill, dtype=np.int32) for fill in (-1, IGNORED))
        words[first[mine]] = mine
        wanted[first[mine]] = labels[mine]
        columns["input_ids"].append(np.asarray(window.ids, dtype=np.int32))
        columns["token_type_ids"].append(np.asarray(window.type_ids, dtype=np.int32))
        columns["words"].append(words)
        columns["labels"].append(wanted)
    return int((room.max(axis=0, initial=-1) < 0).sum())


def _first_tokens(window: Encoding, places: Places) -> np.ndarray:
    """The first token of each word in a window, -1 if it has none that no earlier word has: (words,).

    A window may begin inside a word; that one has at least as much room in the window before, which holds its first token.
    """
    real = np.flatnonzero(~np.asarray(window.special_tokens_mask, dtype=bool))
    offsets = np.asarray(window.offsets, dtype=np.int64).reshape(-1, 2)[real]  # (tokens, 2)
    real, offsets = (part[offsets[:, 1] > offsets[:, 0]] for part in (real, offsets))
    begins, ends = np.asarray(places, dtype=np.int64).reshape(-1, 2).T  # (words,) each
    if not len(real):
        return np.full(len(begins), -1)
    place = np.searchsorted(offsets[:, 1], begins, side="right")  # the first token that ends behind the word's beginning
    there = place < len(real)
    place = np.minimum(place, len(real) - 1)
    there &= offsets[place, 0] < ends
    held = np.flatnonzero(there)
    there[held[1:][place[held[1:]] == place[held[:-1]]]] = False
    return np.where(there, real[place], -1)


def window_stride(tokenizer: Tokenizer, max_length: int, wanted: int) -> int:
    """The tokens that neighbouring windows share: as wanted, but at most half of what they hold."""
    return max(0, min(wanted, (max_length - int(tokenizer.num_special_tokens_to_add(False))) // 2))


def told_tags(outputs: Outputs, features: Features, counts: Sequence[int], nothing: int) -> list[np.ndarray]:
    """The id of the tag of each word of each example, `nothing` for words that no token stands for: (words,) each."""
    found = [np.full(count, nothing, dtype=np.int64) for count in counts]
    for row, (example, words) in enumerate(zip(features.example, features.columns["words"], strict=True)):
        there = np.flatnonzero(words >= 0)
        found[example][words[there]] = np.asarray(outputs["logits"][row])[there].argmax(-1)
    return found
