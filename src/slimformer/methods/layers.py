"""Drop whole layers: the smaller dense model that every pruning has to beat.

Paper: Sanh, Debut, Chaumond, Wolf: DistilBERT (2019), which starts from every second layer; Sajjad, Dalvi, Durrani, Nakov: On
the Effect of Dropping Layers of Pre-trained Transformer Models (2020), which compares which layers to drop. Kasai, Pappas, Peng,
Cross, Smith: Deep Encoder, Shallow Decoder (ICLR 2021), for models that write: a decoder of one layer.

Idea: As many whole layers stay as fit the budget: spaced evenly, from one end, or those that the loss needs most.

Differs: Sajjad et al. drop layers of the pre-trained model and tune what is left; here a tuned model loses them. In their
contribution-based way a layer counts for little if its output resembles its input, by their cosine, and all are looked at once.
"chosen" asks the task instead: what is the loss without a layer, asked anew after each that went. Of their two alternating ways
ours drops the last layer, and once half are gone it goes on among the rest. Kasai et al. train a deep encoder and a shallow
decoder from scratch; here a tuned model loses its decoder's layers first.

Choose when: plain dense layers of one width matter more than quality. Its own use is as the smaller dense model of every
comparison, distilled with the same budget.

Cost: none: it looks at no data. With "chosen", from n layers to k, n + (n - 1) + ... + (k + 1) looks at `examples`, each half a
forward pass on average (from the layer on that is left out): 12 layers to 6 cost about 30 passes, 6 to 3 about 8.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from slimformer.core.anatomy import Anatomy, Kind
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.errors import TargetError
from slimformer.hooks.feeding import Feed
from slimformer.hooks.gating import gated
from slimformer.methods._depth import depths, layers_of, leaving
from slimformer.methods.base import Batch, Context, Effects, Method, State
from slimformer.rules import Count, Share


@final
@dataclass(frozen=True)
class Layers(Method):
    """`keep`: share of the dense `cost` that may remain; as many whole layers stay as fit, at least one.

    `which`: the layers that stay.

    - "even": the first, the last, and the rest spaced evenly between them; of one, the last.
    - "bottom": the lowest, which Sajjad et al. find the ones to keep; "top": the highest, for comparison.
    - "alternate": every second one goes, from the last down.
    - "symmetric": the lowest and the highest; the middle goes.
    - "chosen": greedily, one after another the layer goes without which the mean loss of the task on `examples` training examples
      is least, those before it being gone. Without labels it is the divergence from the uncut model's own outputs.

    `first`: the side of an encoder-decoder that loses its layers. With "both" each loses its share; with "decoder" the encoder stays
    whole until one layer of the decoder is left, because a decoder is passed once for each token that is written and each beam.

    Example:
        >>> from slimformer import Calibrate
        >>> Calibrate(Layers(keep=0.5, which="bottom")).method.effects().cuts
        True
    """

    keep: Share = 0.5
    cost: Literal["macs", "parameters", "latency"] = "macs"
    which: Literal["even", "bottom", "top", "alternate", "symmetric", "chosen"] = "even"
    first: Literal["both", "decoder"] = "both"
    examples: Count = 512  # training examples that "chosen" looks at; the other ways look at none

    def effects(self) -> Effects:
        return Effects(cuts=True, one_shot=True)

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        if cost is not None:
            least = itertools.product(*layers_of(anatomy))  # one of each stack
            self.choose(anatomy, cost, least if self.which == "chosen" else self.sets(layers_of(anatomy)))

    def foresee(self, anatomy: Anatomy, cost: Cost | None) -> Plan | None:
        if cost is None or self.which == "chosen":
            return None
        return self.choose(anatomy, cost, self.sets(layers_of(anatomy)))

    def decide(self, state: State, context: Context) -> Decision:
        stacks = layers_of(context.anatomy)
        decoder = self.first == "decoder"
        sets = one_by_one(context, stacks, self.examples, decoder) if self.which == "chosen" else self.sets(stacks)
        return Decision(self.choose(context.anatomy, context.cost, sets))

    def choose(self, anatomy: Anatomy, cost: Cost, sets: Iterable[Sequence[int]]) -> Plan:
        """The plan of the first of these `sets` of layers that fits; TargetError if none does."""
        least = np.inf
        for stay in sets:
            plan = leaving(anatomy, stay)
            needed = cost.of(plan, anatomy)
            if needed <= self.keep * cost.dense or all(len(layers) == 1 for layers in layers_of(anatomy)):
                return plan
            least = min(least, needed)
        share = f"{least / cost.dense:.0%}"
        raise TargetError(f"even one layer costs {share} of the dense {cost.unit}.", help=f"ask to keep {share} or more.")

    def sets(self, stacks: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """The layers that stay, ever fewer, by a way that looks at no data; each stack keeps one."""
        for left in depths([len(layers) for layers in stacks], decoder_first=self.first == "decoder"):
            ways = [WAYS[self.which](many, len(layers)) for many, layers in zip(left, stacks, strict=True)]
            yield [layers[place] for layers, way in zip(stacks, ways, strict=True) for place in way]


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def evenly(count: int, total: int) -> list[int]:
    """`count` of 0..total-1, evenly spaced, the last always in, the first too from two on: evenly(3, 6) = [0, 2, 5]."""
    if count == 1:
        return [total - 1]
    return [int(place) for place in np.floor(np.linspace(0, total - 1, count))]


def lowest_layers(count: int, total: int) -> list[int]:
    """The first `count` of 0..total-1."""
    return list(range(count))


def highest_layers(count: int, total: int) -> list[int]:
    """The last `count` of 0..total-1."""
    return list(range(total - count, total))


def alternating(count: int, total: int) -> list[int]:
    """What is left when every second one goes from the last down, and so on among the rest: alternating(4, 6) = [0, 1, 2, 4]."""
    stay = list(range(total))
    while len(stay) > count:
        going = stay[::-2][: len(stay) - count]
        stay = [place for place in stay if place not in going]
    return stay


def at_both_ends(count: int, total: int) -> list[int]:
    """As many of the first as of the last, one more of the first if `count` is odd: at_both_ends(3, 6) = [0, 1, 5]."""
    low = (count + 1) // 2
    return [*range(low), *range(total - count + low, total)]


WAYS: Mapping[str, Callable[[int, int], list[int]]] = {
    "even": evenly,
    "bottom": lowest_layers,
    "top": highest_layers,
    "alternate": alternating,
    "symmetric": at_both_ends,
}


def one_by_one(
    context: Context, stacks: Sequence[Sequence[int]], examples: int, decoder_first: bool = False
) -> Iterator[list[int]]:
    """All layers, then ever one less: each time the one goes that `losses_without` misses least, of equal ones the highest.

    The last one of a stack stays; with `decoder_first` all others of the last stack go before those of any other.
    """
    layers = [layer for stack in stacks for layer in stack]
    stay = list(layers)
    yield stay
    batches = list(context.batches(examples))
    answers = None if all("labels" in batch for batch in batches) else context.answers(batches)
    while len(stay) > len(stacks):
        mates = [[layer for layer in stack if layer in stay] for stack in stacks]
        if decoder_first and len(mates[-1]) > 1:
            mates = mates[-1:]
        free = [layer for left in mates if len(left) > 1 for layer in left]
        losses = losses_without(context, free, sorted({*layers} - {*stay}), batches, answers)
        least = min(free, key=lambda layer: (losses[layer], -layer))
        stay = [layer for layer in stay if layer != least]
        yield stay


def losses_without(
    context: Context,
    stay: Sequence[int],
    gone: Sequence[int],
    batches: Sequence[Batch],
    answers: Sequence[Mapping[str, Tensor]] | None,
) -> dict[int, float]:
    """For each layer of `stay` the mean loss without it and without those `gone`; with `answers` the divergence from them."""
    model, anatomy, task = context.model, context.anatomy, context.task
    losses = {}
    with context.subject.evaluating(), torch.no_grad(), gated(model, anatomy, _shut(context, gone)):
        feed = Feed(model, anatomy, [context.subject.feed(batch) for batch in batches])
        for layer in stay:
            feed.reach(layer)  # earlier layers are the same for all that follow
            total = rows = 0.0
            with gated(model, anatomy, _shut(context, [layer])):
                for index, batch in enumerate(batches):
                    output, count = feed.run(index), len(batch["input_ids"])
                    loss = task.loss(output, batch) if answers is None else task.divergence(output, answers[index], batch, 1.0)
                    total += float(loss) * count
                    rows += count
            losses[layer] = total / max(1.0, rows)
    return losses


# -- Plumbing ------------------------------------------------------------------------------------------------------------------


def _shut(context: Context, layers: Sequence[int]) -> dict[str, Tensor]:
    """Gates of 0 on all that these layers add."""
    closed = torch.zeros(1, device=context.subject.device)
    return {site.id: closed for site in context.anatomy.of_kind(Kind.SUBLAYER) if site.layer in layers}
