"""What texts compute of a model that decides by text: how many words each layer reads, and which layers a text never comes to.

Asked of the model in PyTorch, which computes all layers for all words and only says what would do: exported files stop, and get shorter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimformer.core.deciding import answers_apart, choose
from slimformer.core.sieving import latest_words
from slimformer.families.base import Subject

Read = Mapping[str, Tensor]  # a batch: "input_ids" (batch, seq), "attention_mask" (batch, seq), ...


@dataclass(frozen=True)
class Reached:
    """What is computed of a text: the words that each layer's attention reads, and its feed-forward; 0 if it left before."""

    words: int
    attention: tuple[int, ...]
    rest: tuple[int, ...]

    def share(self, layer: int | None, *, behind: bool = False) -> float:
        """Of the words those that a layer's attention reads, or what stands `behind` it; 1 outside of layers."""
        return 1.0 if layer is None else (self.rest if behind else self.attention)[layer] / self.words


@torch.no_grad()
def reached_by(subject: Subject, read: Read) -> list[Reached]:
    """What is computed of each text of a batch."""
    anatomy, model = subject.anatomy, subject.model
    mask = read["attention_mask"].bool()  # (batch, seq)
    with subject.evaluating(), answers_apart(model) as said:
        logits = model(**subject.feed(read))[0]
        apart = said()
    last = [len(anatomy.layers) - 1] * len(mask)
    if anatomy.exits:
        _, place = choose(list(anatomy.exits.values()), [apart[layer] for layer in anatomy.exits], logits)
        ends = [*(list(anatomy.layer_modules).index(layer) for layer in anatomy.exits), len(anatomy.layers) - 1]
        last = [ends[exit] for exit in place.tolist()]
    there = latest_words(model, anatomy)
    words: list[list[int]] = [mask.sum(1).tolist()]  # that come to each layer, and to the end; of each text
    for layer in range(len(anatomy.layers)):
        words.append(there[layer].sum(1).tolist() if layer in there else words[-1])
    found = []
    for row, end in enumerate(last):
        reads, rest = ([counts[row] * (layer <= end) for layer, counts in enumerate(some)] for some in (words[:-1], words[1:]))
        found.append(Reached(words[0][row], tuple(reads), tuple(rest)))
    return found


def told_words(subject: Subject, reached: Sequence[Reached]) -> str:
    """In a sentence what PyTorch could have left out for these texts; empty if a model computes the same of each."""
    if subject.anatomy.exits:
        ends = [max(layer for layer, words in enumerate(item.attention) if words) for item in reached]
        passed = subject.anatomy.passed(subject.anatomy.layer_modules)
        return f"{told_layers([passed[end] for end in ends])}; PyTorch computes all {passed[-1]}."
    if subject.anatomy.sieves:
        total = sum(item.words for item in reached)
        places = [place for place, layer in enumerate(subject.anatomy.layer_modules) if layer in subject.anatomy.sieves]
        left = ", ".join(f"{place}: {sum(item.rest[place] for item in reached) / total:.0%}" for place in places)
        return f"words that are left behind the attention of layer {left}; PyTorch computes all."
    return ""


def told_layers(layers: Sequence[int]) -> str:
    """How many layers texts were answered after.

    >>> told_layers([1, 3, 3, 1])
    '2.00 layers on average (1: 50%, 3: 50%)'
    """
    counts = sorted(Counter(layers).items())
    where = ", ".join(f"{number}: {count / len(layers):.0%}" for number, count in counts)
    return f"{sum(layers) / len(layers):.2f} layers on average ({where})"
