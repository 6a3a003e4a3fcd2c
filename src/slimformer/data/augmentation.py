"""More rows from few: copies of training rows in which words are replaced by like ones, for a student whose teacher gives the answers.

As in TinyBERT (Jiao et al., 2020, Algorithm 1): each word that is one token is replaced with probability 0.4 by one of 15 candidates.
Those are its nearest words in the teacher's embedding table (cosine), or what a masked language model holds likely at its place.
Differences: no GloVe; words of several tokens stay as they are, so that a copy has the tokens, places and labels of its row, whatever
the task; the masked model reads whole rows, in one pass, where TinyBERT shows it the row beside the row with a mask, once a word. A
copy may mean something else than its label says: let the teacher's outputs weigh more than the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slimformer.data.batching import collate, sorted_by_length
from slimformer.errors import ModelError
from slimformer.tasks.base import Features

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import PreTrainedModel

SHARE, CANDIDATES = 0.4, 15  # TinyBERT's p_t and K
MARKS = ("Ġ", "▁")  # begin a word in byte-level and sentencepiece vocabularies
CHUNK = 1024  # words whose neighbours are looked for at once
BATCH = 16  # rows a masked model reads at once: it gives a number for every token of the vocabulary at each place


@dataclass(frozen=True)
class Words:
    """Which token ids are a whole word where nothing continues them, and which continue one: each (vocabulary,)."""

    whole: np.ndarray
    continues: np.ndarray

    @staticmethod
    def of(tokenizer: Tokenizer) -> Words:
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        kind = type(tokenizer.model).__name__
        prefix = tokenizer.model.continuing_subword_prefix if kind == "WordPiece" else None
        marks = {mark: sum(token.startswith(mark) for token in vocabulary) for mark in MARKS}
        mark = max(marks, key=lambda name: marks[name]) if kind in ("BPE", "Unigram") else None
        size = max(vocabulary.values(), default=-1) + 1
        whole, continues = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
        for token, index in vocabulary.items():
            if token in special:
                continue
            begins = not token.startswith(prefix) if prefix else token.startswith(mark) if mark else True
            whole[index] = begins and token.removeprefix(mark or "").isalpha()
            continues[index] = not begins and any(letter.isalnum() for letter in token)
        return Words(whole, continues)

    def places(self, ids: Sequence[int]) -> np.ndarray:
        """Where a row has words of one token."""
        row = np.asarray(ids, dtype=np.int64)
        followed = np.append(self.continues[row[1:]], False)
        return np.flatnonzero(self.whole[row] & ~followed)


def augmented(
    features: Features,
    tokenizer: Tokenizer,
    table: Tensor,
    copies: int,
    seed: int,
    masked_model: PreTrainedModel | None = None,
    *,
    share: float = SHARE,
    candidates: int = CANDIDATES,
) -> Features:
    """The rows, then `copies` of each with words replaced; all other columns are the row's own. A function of `seed`.

    Candidates come from `table`, the word embeddings (vocabulary, hidden), or from `masked_model` where there is one.
    """
    words = Words.of(tokenizer)
    rows = [list(ids) for ids in features.columns["input_ids"]]
    places = [words.places(ids) for ids in rows]
    if masked_model is not None:
        likely = dict(likely_words(masked_model, features, places, words, candidates))
        offered: Callable[[int], np.ndarray] = likely.__getitem__
    else:
        near = nearest_words(
            table, words, (ids[place] for ids, found in zip(rows, places, strict=True) for place in found), candidates
        )

        def offered(row: int) -> np.ndarray:
            return np.stack([near[rows[row][place]] for place in places[row]])

    generator = np.random.default_rng([seed, 0x57A9])  # its own: the order of an epoch draws from the bare seed
    made = []
    for _ in range(copies):
        for row, ids in enumerate(rows):
            changed = list(ids)
            hit = np.flatnonzero(generator.random(len(places[row])) < share)
            if len(hit):
                choice = offered(row)[hit]  # (words, candidates)
                drawn = choice[np.arange(len(hit)), generator.integers(0, choice.shape[1], len(hit))] if choice.size else ()
                for place, token in zip(places[row][hit], drawn, strict=False):
                    changed[int(place)] = int(token)
            made.append(changed)
    columns = {name: list(values) * (copies + 1) for name, values in features.columns.items()}
    columns["input_ids"] = rows + made
    return replace(features, columns=columns, example=list(features.example) * (copies + 1))


def nearest_words(table: Tensor, words: Words, used: Iterator[int], count: int) -> dict[int, np.ndarray]:
    """The words nearest to each one that is used, itself left out, the nearest first: id -> (count,), or fewer where there are fewer."""
    import torch

    known = np.flatnonzero(words.whole[: len(table)])  # a table may have rows that no token has, hardly ever the reverse
    wanted = np.asarray(sorted({int(token) for token in used} & set(known.tolist())), dtype=np.int64)
    count = min(count, len(known) - 1)
    unit = torch.nn.functional.normalize(table.detach().float().cpu(), dim=1)
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(wanted), CHUNK):
        some = wanted[start : start + CHUNK]
        likeness = unit[some] @ unit[known].T  # (words, known)
        likeness[np.arange(len(some)), np.searchsorted(known, some)] = -torch.inf
        best = known[likeness.topk(count, dim=1).indices.numpy()]
        found |= {int(token): row for token, row in zip(some, best, strict=True)}
    return found


def likely_words(
    model: PreTrainedModel, features: Features, places: Sequence[np.ndarray], words: Words, count: int
) -> Iterator[tuple[int, np.ndarray]]:
    """For each row the words that a masked language model holds most likely at each place, the one that stands there left out.

    Gives the row and (places, count), or fewer where there are fewer words.
    """
    import torch

    from slimformer.families.base import family_of

    names = family_of(model.config.model_type).inputs(model)
    device = next(model.parameters()).device
    known = torch.from_numpy(np.flatnonzero(words.whole[: model.config.vocab_size])).to(device)
    count = min(count, len(known) - 1)
    model.eval()
    for rows in sorted_by_length(features.lengths(), BATCH):
        arrays = collate(features, rows, names)
        with torch.no_grad():
            logits = model(**{name: torch.from_numpy(array).to(device) for name, array in arrays.items()}).logits
        for index, row in enumerate(rows):
            where = torch.from_numpy(places[row]).to(device)
            found = logits[index, where][:, known].float()  # (places, known)
            here = torch.from_numpy(arrays["input_ids"][index, places[row]]).to(device)
            found.masked_fill_(known[None, :] == here[:, None], -torch.inf)
            yield row, known[found.topk(count, dim=1).indices].cpu().numpy()


def check_masked_model(folder: Path, source: Path) -> None:
    """ModelError unless `folder` holds a masked language model that reads the tokens of the model in `source`."""
    from slimformer.data.tokenizer import load_tokenizer
    from slimformer.families.base import family_of
    from slimformer.saving import checkpoint

    config = checkpoint.read_config(folder)
    family_of(checkpoint.base_type(config))
    checkpoint.weights_file(folder)
    if not checkpoint.is_tuned(folder, "AutoModelForMaskedLM"):
        kind = ", ".join(map(str, config.get("architectures") or ["model without a head"]))
        raise ModelError(
            f"{folder} is a {kind}, and augment_model needs a masked language model.",
            help="name one, such as the folder of bert-base-uncased, or leave augment_model out.",
        )
    if load_tokenizer(folder).get_vocab() != load_tokenizer(source).get_vocab():
        raise ModelError(
            f"the masked language model {folder} has another tokenizer than the model {source}.",
            help="name one that reads the same token ids, or leave augment_model out.",
        )
