"""More training rows: copies in which words are replaced by similar ones, for a student whose teacher gives the answers.

As in TinyBERT (Jiao et al. 2020, https://arxiv.org/abs/1909.10351, Algorithm 1), each word of one token is replaced with probability
0.4 by one of 15 candidates: its nearest words in the teacher's embedding table (cosine), or the words that a masked language model
finds likeliest in its place. Differences: no GloVe; words of several tokens stay, so that a copy keeps the tokens, places and labels of
its row; the masked model reads the whole row once, where TinyBERT masks one word at a time. A copy may mean something else than its
label says, so the teacher's outputs should count for more than the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from slimformer.data.batching import collate, sorted_by_length
from slimformer.tasks.base import Features

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import PreTrainedModel

_SHARE, _CANDIDATES = 0.4, 15  # TinyBERT's p_t and K
_WORD_STARTS = ("Ġ", "▁")  # begin a word in byte-level and sentencepiece vocabularies
_WORDS_AT_ONCE = 1024  # words whose neighbours are computed together
_ROWS_AT_ONCE = 16  # rows a masked model reads together: it gives a number for every token of the vocabulary at each place


@dataclass(frozen=True)
class Words:
    """Which token ids are a whole word unless the next token continues them, and which continue one: each (vocabulary,)."""

    whole: np.ndarray
    continues: np.ndarray

    @staticmethod
    def of(tokenizer: Tokenizer) -> Words:
        """The words of a tokenizer's vocabulary; special tokens are none."""
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        kind = type(tokenizer.model).__name__
        prefix = tokenizer.model.continuing_subword_prefix if kind == "WordPiece" else None
        counts = {start: sum(token.startswith(start) for token in vocabulary) for start in _WORD_STARTS}
        start = max(counts, key=lambda name: counts[name]) if kind in ("BPE", "Unigram") else None
        size = max(vocabulary.values(), default=-1) + 1
        whole, continues = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
        for token, index in vocabulary.items():
            if token in special:
                continue
            begins = not token.startswith(prefix) if prefix else token.startswith(start) if start else True
            whole[index] = begins and token.removeprefix(start or "").isalpha()
            continues[index] = not begins and any(letter.isalnum() for letter in token)
        return Words(whole, continues)

    def places(self, ids: Sequence[int]) -> np.ndarray:
        """The positions of a row that hold a word of one token."""
        row = np.asarray(ids, dtype=np.int64)
        followed = np.append(self.continues[row[1:]], False)
        return np.flatnonzero(self.whole[row] & ~followed)


def augment_rows(
    features: Features,
    tokenizer: Tokenizer,
    table: Tensor,
    copies: int,
    seed: int,
    masked_model: PreTrainedModel | None = None,
    *,
    share: float = _SHARE,
    candidates: int = _CANDIDATES,
) -> Features:
    """The rows, then `copies` of each with words replaced; all other columns are the row's own. The result is a function of `seed`.

    Candidates come from `table`, the word embeddings (vocabulary, hidden), or from `masked_model` if there is one.
    """
    words = Words.of(tokenizer)
    rows = [list(ids) for ids in features.columns["input_ids"]]
    places = [words.places(ids) for ids in rows]
    if masked_model is not None:
        likely = dict(likely_words(masked_model, features, places, words, candidates))
        candidates_of: Callable[[int], np.ndarray] = likely.__getitem__
    else:
        used = (ids[place] for ids, some in zip(rows, places, strict=True) for place in some)
        near = nearest_words(table, words, used, candidates)

        def candidates_of(row: int) -> np.ndarray:
            return np.stack([near[rows[row][place]] for place in places[row]])

    generator = np.random.default_rng([seed, 0x57A9])  # apart from the order of an epoch, which draws from the bare seed
    changed_rows = []
    for _ in range(copies):
        for row, ids in enumerate(rows):
            changed = list(ids)
            hit = np.flatnonzero(generator.random(len(places[row])) < share)
            if len(hit):
                choice = candidates_of(row)[hit]  # (words, candidates)
                drawn = choice[np.arange(len(hit)), generator.integers(0, choice.shape[1], len(hit))] if choice.size else ()
                for place, token in zip(places[row][hit], drawn, strict=False):
                    changed[int(place)] = int(token)
            changed_rows.append(changed)
    columns = {name: list(values) * (copies + 1) for name, values in features.columns.items()}
    columns["input_ids"] = rows + changed_rows
    return replace(features, columns=columns, example=list(features.example) * (copies + 1))


def nearest_words(table: Tensor, words: Words, used: Iterator[int], count: int) -> dict[int, np.ndarray]:
    """The `count` words nearest to each used one, the nearest first, or all other words if there are fewer: id -> (count,)."""
    import torch

    known = np.flatnonzero(words.whole[: len(table)])  # a table may have rows that no token has, hardly ever the reverse
    wanted = np.asarray(sorted({int(token) for token in used} & set(known.tolist())), dtype=np.int64)
    count = min(count, len(known) - 1)
    unit = torch.nn.functional.normalize(table.detach().float().cpu(), dim=1)
    nearest: dict[int, np.ndarray] = {}
    for start in range(0, len(wanted), _WORDS_AT_ONCE):
        some = wanted[start : start + _WORDS_AT_ONCE]
        similarity = unit[some] @ unit[known].T  # (words, known)
        similarity[np.arange(len(some)), np.searchsorted(known, some)] = -torch.inf
        best = known[similarity.topk(count, dim=1).indices.numpy()]
        nearest |= {int(token): row for token, row in zip(some, best, strict=True)}
    return nearest


def likely_words(
    model: PreTrainedModel, features: Features, places: Sequence[np.ndarray], words: Words, count: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Each row with the `count` words that a masked language model finds likeliest at each place: row, (places, count).

    The word that stands there is left out; there are fewer columns if the vocabulary has fewer words.
    """
    import torch

    from slimformer.families.base import subject_of

    subject = subject_of(model)
    known = torch.from_numpy(np.flatnonzero(words.whole[: model.config.vocab_size])).to(subject.device)
    count = min(count, len(known) - 1)
    with subject.evaluating():
        for rows in sorted_by_length(features.lengths(), _ROWS_AT_ONCE):
            arrays = collate(features, rows, subject.inputs)
            with torch.no_grad():
                logits = model(**subject.feed(arrays)).logits
            for index, row in enumerate(rows):
                scores = logits[index, places[row]][:, known].float()  # (places, known)
                present = torch.from_numpy(arrays["input_ids"][index, places[row]]).to(subject.device)
                scores.masked_fill_(known[None, :] == present[:, None], -torch.inf)
                yield row, known[scores.topk(count, dim=1).indices].cpu().numpy()
