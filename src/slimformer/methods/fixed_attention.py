"""Heads that attend by position instead of by what they learned: they need no queries and keys, and no product of all words with all.

Paper: Raganato, Scherrer, Tiedemann: Fixed Encoder Self-Attention Patterns in Transformer-Based Machine Translation (Findings of
EMNLP 2020), section 3, for the seven patterns.

Idea: Many heads of a trained encoder look at the word itself, at a neighbour, or at one side of the text. Such a head is replaced by the
pattern itself (`core.pattern.Fixed`). Its values and its part of the output matrix stay, and learn on.

Differs: The paper trains translation from scratch, with the same patterns in the same places of all layers and one learned head in
each. Here a tuned model loses queries and keys where it misses them least: for each head and each pattern, how far do the model's
answers move when that head alone gets that pattern? The cheapest ones go, each attention keeps one learned head at least, and the next
stage trains the rest to do with that. [CLS] and [SEP] count as words, as they do for the heads that are replaced: the start of a text is
[CLS], its end [SEP], and a pattern may look from one text of a pair into the other. A word that has no such neighbour attends to itself;
the paper does not say.

Choose when: the attention costs much, as with long texts, and whole heads were cut already as far as they can be: a fixed head costs its
values and its output. Compare it with `fisher` or `gates` on heads at the same cost. The gain in a file is the queries, keys and scores
that are gone; feed-forward blocks, which cost most of short texts, stay.

Cost: heads x patterns looks at `examples` in each of `rounds`, each half a forward pass on average (from the head's layer on): six layers
of twelve heads and seven patterns are 504 looks in the first round, fewer in later ones. A stage that trains belongs behind it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, cast, final

import torch
from torch import Tensor

from slimformer.core.anatomy import Anatomy, Kind, Site
from slimformer.core.cost import Cost
from slimformer.core.pattern import ATTENDS, Attends, Fixed, Patterns, over
from slimformer.core.patterning import attending_by
from slimformer.core.plan import Decision, Plan
from slimformer.errors import TargetError
from slimformer.hooks.feeding import Feed
from slimformer.methods._heads import check_heads
from slimformer.methods.base import Batch, Context, Effects, Method, State
from slimformer.rules import Count, LayerNumbers, Share, some_of
from slimformer.tasks.base import Task

PatternNames = Annotated[tuple[str, ...], some_of(*ATTENDS)]
Head = tuple[str, int]  # a site, and a head's place in it


@final
@dataclass(frozen=True)
class FixedAttention(Method):
    """`learned`: the share of all heads that keep their queries and keys. Or `fixed`: so many heads lose them; set the other to null.

    `patterns`: those to choose from, of: current, previous, next, left, right, start, end. `layers`: those whose heads may be fixed,
    counted from 1; without it all. `examples`: training examples on which damage is seen. `rounds`: the heads are chosen in so many
    steps, and damage is seen anew after each, with those chosen before in place.

    It stays in the model: later stages may train it, but cut no more, and files compute so.

    Example:
        >>> from slimformer import Calibrate, Train
        >>> stages = (Calibrate(FixedAttention(learned=0.5)), Train(epochs=2))
        >>> stages[0].method.effects().patterns
        True
    """

    learned: Share | None = 0.5
    fixed: Count | None = None
    patterns: PatternNames = ATTENDS
    layers: LayerNumbers | None = None
    examples: Count = 128
    rounds: Count = 2

    def __post_init__(self) -> None:
        names = self.patterns if isinstance(self.patterns, tuple) else ()
        unknown = next((why for name in names if (why := Fixed(cast(Attends, name)).problem())), None)
        if unknown:
            raise ValueError(f"patterns: {unknown}")
        super().__post_init__()
        if (self.learned is None) == (self.fixed is None):
            raise ValueError(
                "learned and fixed say the same in two ways: give one of them, and set learned to null if it is fixed"
            )

    def effects(self) -> Effects:
        return Effects(patterns=True, uneven=True, encoders_only=True, one_shot=True)

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        self.count(anatomy)

    def foresee(self, anatomy: Anatomy, cost: Cost | None) -> Plan | None:
        free: dict[tuple[Head, Attends], float] = {
            ((site.id, head), "current"): 0.0 for site in open_sites(anatomy, self.layers) for head in free_heads(anatomy, site)
        }
        chosen = cheapest(anatomy, free, {}, self.count(anatomy))
        return Plan(patterns=patterns_of_heads(anatomy, chosen))

    def decide(self, state: State, context: Context) -> Decision:
        chosen = self.choose(context)
        told = Counter(attends for _, attends in chosen.items())
        names = ", ".join(f"{name} {told[name]}" for name in ATTENDS if told[name])
        heads = sum(site.size for site in context.anatomy.of_kind(Kind.HEADS))
        return Decision(
            Plan(patterns=patterns_of_heads(context.anatomy, chosen)),
            notes=(f"fixed_attention: of {heads} heads {len(chosen)} attend by position from here on: {names}.",),
        )

    def count(self, anatomy: Anatomy) -> int:
        """How many heads are to lose their queries and keys; TargetError if so many cannot, or none is left that could."""
        check_heads(anatomy)
        sites = open_sites(anatomy, self.layers)
        factored = next((item for site in sites for item in anatomy.asking_matrices(site) if not item.dense), None)
        if factored is not None:
            raise TargetError(
                f"fixed_attention cannot take queries and keys away: '{factored.id}' is stored as {factored.form}.",
                help="fix heads first, factor after.",
            )
        most = sum(max(0, min(len(free_heads(anatomy, site)), len(anatomy.asking_heads(site)) - 1)) for site in sites)
        heads = anatomy.of_kind(Kind.HEADS)
        still = sum(len(anatomy.asking_heads(site)) for site in heads)
        if self.fixed is not None:
            wanted = self.fixed
        else:
            assert self.learned is not None
            wanted = still - int(self.learned * sum(site.size for site in heads) + 1e-9)
        if most == 0 or wanted <= 0:
            why = (
                "each attention here keeps one learned head, and has no other"
                if most == 0
                else f"{still} have queries and keys"
            )
            raise TargetError(
                f"fixed_attention finds no head left to fix: {why}.",
                help="leave the stage out, or choose other layers." if most == 0 else "ask for fewer learned heads.",
            )
        if wanted > most:
            raise TargetError(
                f"fixed_attention cannot fix {wanted} heads: {most} can be fixed, since each attention keeps a learned one.",
                help=f"ask for fixed: {most} at most, or learned: {(still - most) / sum(site.size for site in heads):.3f} or more.",
            )
        return wanted

    def choose(self, context: Context) -> dict[Head, Attends]:
        """The heads that lose their queries and keys, each with its pattern."""
        anatomy, total = context.anatomy, self.count(context.anatomy)
        batches = list(context.batches(self.examples))
        answers = context.answers(batches)
        chosen: dict[Head, Attends] = {}
        for step in range(self.rounds):
            due = -(-total * (step + 1) // self.rounds)
            if due == len(chosen):
                continue
            sites = open_sites(anatomy, self.layers)
            names = cast("Sequence[Attends]", self.patterns)
            found = damages(context, sites, names, chosen, batches, answers)
            chosen |= cheapest(anatomy, found, chosen, due - len(chosen))
        return chosen


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def cheapest(
    anatomy: Anatomy, found: Mapping[tuple[Head, Attends], float], chosen: Mapping[Head, Attends], count: int
) -> dict[Head, Attends]:
    """The `count` heads that are missed least, each with its best pattern; one learned head stays in each attention.

    `found`: the damage of each head and pattern; `chosen`: the heads that have lost their queries and keys before.
    """
    best: dict[Head, tuple[float, Attends]] = {}
    for (head, attends), damage in found.items():
        if head not in best or damage < best[head][0]:
            best[head] = damage, attends
    room = {site.id: len(anatomy.asking_heads(site)) - 1 for site in anatomy.of_kind(Kind.HEADS)}
    for site, _ in chosen:
        room[site] -= 1
    taken: dict[Head, Attends] = {}
    for head in sorted(best, key=lambda item: best[item][0]):
        if len(taken) < count and room[head[0]] > 0:
            taken[head] = best[head][1]
            room[head[0]] -= 1
    return taken


@torch.no_grad()
def damages(
    context: Context,
    sites: Sequence[Site],
    names: Sequence[Attends],
    chosen: Mapping[Head, Attends],
    batches: Sequence[Batch],
    answers: Sequence[Mapping[str, Tensor]],
) -> dict[tuple[Head, Attends], float]:
    """For each head without a pattern and each pattern: the mean divergence from `answers` with that head so, and those `chosen`."""
    model, anatomy, task = context.model, context.anatomy, context.task
    before = patterns_of_heads(anatomy, chosen)
    found: dict[tuple[Head, Attends], float] = {}
    trials = {site.id: list(_trials(anatomy, site, names, chosen)) for site in sites}
    with (
        context.subject.evaluating(),
        attending_by(model, anatomy, before),
        context.track("trying patterns", sum(map(len, trials.values()))) as advance,
    ):
        feed = Feed(model, anatomy, [context.subject.feed(batch) for batch in batches])
        for site in sites:
            feed.reach(site.layer)
            for head, attends in trials[site.id]:
                tried = patterns_of_heads(anatomy, {**chosen, head: attends})
                with attending_by(model, anatomy, tried):
                    found[head, attends] = _mean_divergence(feed, batches, answers, task)
                advance(len(found))
    return found


# -- Plumbing ------------------------------------------------------------------------------------------------------------------


def open_sites(anatomy: Anatomy, layers: Sequence[int] | None) -> list[Site]:
    """The attentions of some layers, counted from 1, or of all; TargetError for a layer without one."""
    sites = list(anatomy.of_kind(Kind.HEADS))
    known = {site.layer + 1 for site in sites}
    wrong = next((layer for layer in layers or () if layer not in known), None)
    if wrong is not None:
        raise TargetError(
            f"layer {wrong} has no attention, or is not there.",
            help=f"layers that have one: {', '.join(map(str, sorted(known)))}.",
        )
    return [site for site in sites if layers is None or site.layer + 1 in layers]


def free_heads(anatomy: Anatomy, site: Site) -> list[int]:
    """The heads of a site that have no pattern."""
    return [head for head, rule in enumerate(anatomy.patterns.get(site.id, (None,) * site.size)) if rule is None]


def patterns_of_heads(anatomy: Anatomy, chosen: Mapping[Head, Attends]) -> dict[str, Patterns]:
    """For each site with a chosen head what its heads attend to."""
    given: dict[str, Patterns] = {}
    for (name, head), attends in chosen.items():
        size = anatomy.sites[name].size
        alone = tuple(Fixed(attends) if place == head else None for place in range(size))
        given[name] = over(given.get(name, (None,) * size), alone)
    return given


def _trials(
    anatomy: Anatomy, site: Site, names: Sequence[Attends], chosen: Mapping[Head, Attends]
) -> Iterator[tuple[Head, Attends]]:
    used = [head for name, head in chosen if name == site.id]
    if len(anatomy.asking_heads(site)) - len(used) < 2:
        return
    for head in free_heads(anatomy, site):
        if head not in used:
            yield from (((site.id, head), attends) for attends in names)


def _mean_divergence(feed: Feed, batches: Sequence[Batch], answers: Sequence[Mapping[str, Tensor]], task: Task) -> float:
    total = rows = 0.0
    for index, batch in enumerate(batches):
        count = len(batch["input_ids"])
        total += float(task.divergence(feed.run(index), answers[index], batch, 1.0)) * count
        rows += count
    return total / max(1.0, rows)
