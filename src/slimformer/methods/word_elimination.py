"""Word elimination: from layer to layer fewer words are computed; those that get little attention leave.

Paper: Goyal, Choudhury, Raje, Chakaravarthy, Sabharwal, Verma: PoWER-BERT (ICML 2020), sections 3.2 to 3.4, for `by: rank`; Kim, Shen,
Thorsley, Gholami, Kwon, Hassoun, Keutzer: Learned Token Pruning (KDD 2022), section 3, for `by: threshold`.

Idea: The more layers a text has passed, the more alike its words are. After the attention of a layer each word is scored by the attention
that it gets from the others. By rank, a learned share of each text's words goes on (PoWER-BERT); by threshold, those whose score is high
enough, so that texts that say little lose more (LTP). What stays is learned softly first, then fixed, and the stages behind train the
model that is left.

Differs: The size is met exactly, in MACs: a Lagrangian pulls the expected cost to it while the retention is learned, and what is left
to do is done by one factor for all layers. The papers try penalties. PoWER-BERT keeps so many words of a text padded to a fixed length;
here it is a share of the words that are there, so that padding that goes is no gain. It scales the vectors of words while it learns what
stays; here such a word counts less in each later softmax, which at 0 is what the cut does. LTP's scores fall with the length of a text;
here they are multiples of its average. A word that leaves keeps the vector that it had before the layer, and comes back with it at the
end, where a task asks of each word.

Choose when: texts are long, 40 tokens and more, and one answer is asked for each. Short texts and large cuts of heads and neurons leave
it little to do, because sorting and gathering cost as much as a small product. It stands beside int8 and cuts: cut first.

Cost: a stage of training that computes queries and keys twice, and a stage of training behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, heads_of
from slimformer.core.cost import Cost
from slimformer.core.junction import SHARE_PARTS, Sieve
from slimformer.core.plan import Decision, Plan
from slimformer.core.shrink import shrink
from slimformer.core.sieving import latest_looks, latest_shares, ranked, share_threshold, sifting
from slimformer.errors import TargetError
from slimformer.families.base import subject_of
from slimformer.methods._schedules import linear_ramp
from slimformer.methods.base import Context, Effects, Method, Progress, State, Step
from slimformer.rules import Fraction, LayerNumbers, NotNegative, Positive, Share
from slimformer.tasks.base import Task

BINS = 32  # the ranks of a text's words are seen in so many groups
OPEN = 4.0  # the logit of each group's weight at the start: nearly all of it stays
SOFT = 0.1  # how far from a threshold a word's weight is neither 0 nor 1, in multiples of the average attention
SETTLED_ON = 512  # of the training split, by which the outcome is settled


@final
@dataclass(frozen=True)
class WordElimination(Method):
    """`keep`: the share of the model's MACs that may stay.

    `by`: "rank" keeps a share of each text's words at each layer, the same for all texts; "threshold" keeps words with enough attention,
    more of one text and less of another, and meets `keep` on average over training examples.
    `layers`: those behind whose attention words leave, counted from 1; without it all but the last.
    `lr`: of what stays at each layer. `multiplier_lr`: of the multipliers: the higher, the sooner the goal is met.
    `ramp`: share of the training over which the goal comes down.

    A stage that trains the model with what is left belongs behind it.

    Example:
        >>> from slimformer import Train
        >>> stages = (Train(epochs=1, methods=(WordElimination(keep=0.5),)), Train(epochs=2))
        >>> stages[0].cuts
        False
    """

    keep: Share = 0.5
    by: Literal["rank", "threshold"] = "rank"
    layers: LayerNumbers | None = None
    lr: Positive = 0.05
    multiplier_lr: NotNegative = 0.05
    ramp: Fraction = 0.5

    def effects(self) -> Effects:
        return Effects(sifts=True, neutral=False, encoders_only=True)

    def problem(self, task: Task) -> str | None:
        return "plain text is no task with an answer to keep words for" if task.pretraining else None

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        places = sieve_layers(anatomy, self.layers)
        if cost is not None:
            least = cost.of(_plan(places, [1 / SHARE_PARTS] + [1.0] * (len(places) - 1)), anatomy)
            if least > self.keep * cost.dense:
                raise TargetError(
                    f"{self.keep:.0%} of the operations cannot be reached: {least / cost.dense:.0%} remain if all words but the first "
                    f"leave at {places[0]}.",
                    help=f"ask for {math.ceil(100 * least / cost.dense)}% or more.",
                )

    def attach(self, context: Context) -> State:
        self.check(context.anatomy, context.cost)
        return _State(context, self)

    def penalty(self, state: State, step: Step) -> Tensor | None:
        state = cast(_State, state)
        gap = state.expected() - state.goal()
        return state.multipliers[0] * gap + state.multipliers[1] * gap.square()

    def advance(self, state: State, progress: Progress) -> None:
        cast(_State, state).ramped.fill_(linear_ramp(progress, self.ramp))

    def report(self, state: State) -> Mapping[str, float]:
        state = cast(_State, state)
        if not state.left:
            return {}
        with torch.no_grad():
            return {"cost": float(state.expected()), "goal": float(state.goal())}

    def decide(self, state: State, context: Context) -> Decision:
        state = cast(_State, state)
        plan = self._by_rank(state, context) if self.by == "rank" else self._by_threshold(state, context)
        shares = [1.0]
        for sieve in plan.junctions.values():
            shares.append(shares[-1] * cast(Sieve, sieve).share)
        told = ", ".join(f"{layer}: {share:.0%}" for layer, share in zip(plan.junctions, shares[1:], strict=True))
        return Decision(plan, notes=(f"word_elimination: words that go on behind the attention of each layer: {told}.",))

    @classmethod
    def settle(cls, context: Context) -> Decision | None:
        """Thresholds by which as many words stay as the sieves say: training moves attention, to words that would leave above all."""
        sieves, settled = context.anatomy.sieves, dict[str, Sieve]()
        passed: list[float] = []
        for place, (layer, sieve) in enumerate(sieves.items()):
            if sieve.threshold is None:
                continue
            received, there, shares = _looks(context, Plan(junctions=settled), place)
            passed = passed or shares
            settled[layer] = Sieve(sieve.share, float(share_threshold(sieve.share, received, there)))
        if not settled:
            return None
        asked = np.cumprod([sieve.share for sieve in sieves.values()])
        told = ", ".join(
            f"{layer}: {share:.0%} ({old:.0%})" for layer, share, old in zip(sieves, asked, np.cumprod(passed), strict=True)
        )
        note = f"word_elimination: thresholds are settled anew, so that words go on as before (without that): {told}."
        return Decision(Plan(junctions=settled), notes=(note,))

    def _by_rank(self, state: _State, context: Context) -> Plan:
        """The learned shares of words, to a power by which the budget is met."""
        learned = rising_cuts(state.settled(context))
        state.close()

        def plan(power: float) -> Plan:
            return _plan(state.layers, steps_of([share**power for share in learned]))

        return self._fitting(context, plan)

    def _by_threshold(self, state: _State, context: Context) -> Plan:
        """The learned thresholds, times a factor by which the budget is met on examples."""
        learned = [float(value) for value in state.thresholds()]
        state.close()  # plans are tried on the model as it is

        def plan(factor: float) -> Plan:
            sieves = {layer: Sieve(1.0, factor * value) for layer, value in zip(state.layers, learned, strict=True)}
            return Plan(junctions=dict(zip(sieves, seen_shares(context, sieves), strict=True)))

        return self._fitting(context, plan, rounds=10)

    def _fitting(self, context: Context, plan: Callable[[float], Plan], rounds: int = 40) -> Plan:
        """The plan with the smallest number within the budget; the larger the number, the fewer words stay."""
        budget = self.keep * context.cost.dense

        def fitting(number: float) -> Plan | None:
            made = plan(number)
            return made if context.cost.of(made, context.anatomy) <= budget else None

        low, high = 0.0, 1.0
        while (best := fitting(high)) is None:
            low, high = high, 2 * high
            if high > 2**20:
                raise TargetError("the layers' thresholds never reach the budget.", help="train longer, or use by: rank.")
        for _ in range(rounds):
            middle = (low + high) / 2
            made = fitting(middle)
            low, high, best = (middle, high, best) if made is None else (low, middle, made)
        return best


# -- State ---------------------------------------------------------------------------------------------------------------------


class _State(State):
    """What stays at each layer, softly: a weight for each group of ranks, or a threshold; and the multipliers."""

    def __init__(self, context: Context, method: WordElimination) -> None:
        super().__init__()
        self.layers = sieve_layers(context.anatomy, method.layers)
        self.by, self.lr, self.multiplier_lr = method.by, method.lr, method.multiplier_lr
        size = BINS if method.by == "rank" else 1
        start = OPEN if method.by == "rank" else 0.0
        self.learned = nn.ParameterList(nn.Parameter(torch.full((size,), start)) for _ in self.layers)
        self.multipliers = nn.Parameter(torch.zeros(2))  # of the gap and of its square
        self.ramped: Tensor  # how far the goal has come, 0 to 1; a buffer, so that a resumed run knows it
        self.register_buffer("ramped", torch.tensor(0.0 if method.ramp else 1.0))
        self.left: dict[str, Tensor] = {}  # in the latest pass: the share of all words that goes on behind each layer
        self._end, dense = method.keep, context.cost.dense
        self._fixed = context.cost.fixed / dense
        self._parts: list[
            tuple[str, float, float]
        ] = []  # a layer's id, and the shares of the cost of its attention and of its rest
        for place, layer in enumerate(context.anatomy.layer_modules):
            attention, rest = _costs_of(context, place, layer)
            self._parts.append((layer, attention / dense, rest / dense))
        rules = {layer: self._rule(index) for index, layer in enumerate(self.layers)}
        hooks = ExitStack()
        hooks.enter_context(sifting(context.model, context.anatomy, rules))
        self.on_close(hooks.close)

    def _rule(self, index: int) -> Callable[[Tensor, Tensor], Tensor]:
        layer = self.layers[index]

        def rule(received: Tensor, there: Tensor) -> Tensor:
            weight = self.weight(index, received, there > 0)
            stays = there * torch.cat([torch.ones_like(weight[:, :1]), weight[:, 1:]], 1)
            words = (there > 0).sum(1)
            self.left[layer] = (stays.sum(1) / words).mean()
            return stays

        return rule

    def weight(self, index: int, received: Tensor, words: Tensor) -> Tensor:
        """How much each word counts from here on: (batch, seq), from 0 to 1."""
        learned = self.learned[index]
        if self.by == "threshold":
            return torch.sigmoid((received - nn.functional.softplus(learned)) / SOFT)
        rank = ranked(received.detach(), words)
        place = (rank * BINS // words.sum(1, keepdim=True)).clamp(max=BINS - 1)
        return torch.sigmoid(learned)[place]

    def thresholds(self) -> list[Tensor]:
        """The threshold of each layer, in multiples of the average attention."""
        return [nn.functional.softplus(value.detach())[0] for value in self.learned]

    def groups(self) -> list[dict[str, Any]]:
        own = {"params": list(self.learned), "lr": self.lr, "weight_decay": 0.0}
        return [own, {"params": [self.multipliers], "lr": self.multiplier_lr, "weight_decay": 0.0, "maximize": True}]

    def expected(self) -> Tensor:
        """The cost of the latest pass, as a share of that of all words; the scores' part is counted as if it fell no faster."""
        total, left = self.ramped.new_tensor(self._fixed), self.ramped.new_ones(())
        for layer, attention, rest in self._parts:
            total = total + attention * left
            left = self.left.get(layer, left)
            total = total + rest * left
        return total

    def goal(self) -> Tensor:
        """Where the cost should be now."""
        return 1.0 + (self._end - 1.0) * self.ramped

    @torch.no_grad()
    def settled(self, context: Context) -> list[float]:
        """The mean share of all words that goes on behind each layer, over training examples."""
        totals, count = torch.zeros(len(self.layers), dtype=torch.float64), 0
        subject = context.subject
        with subject.evaluating():
            for batch in context.batches(SETTLED_ON):
                subject.model(**subject.feed(batch))
                rows = len(batch["input_ids"])
                totals += rows * torch.stack([self.left[layer] for layer in self.layers]).double().cpu()
                count += rows
        return [float(value) for value in totals / count]


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def sieve_layers(anatomy: Anatomy, layers: Sequence[int] | None) -> tuple[str, ...]:
    """The layers behind whose attention words leave: all that have one but the last, or those that are named.

    TargetError if there are none, or if a layer is named that can have no sieve.
    """
    names = list(anatomy.layer_modules)
    able = [place for place, name in enumerate(names[:-1]) if heads_of(name) in anatomy.attentions]
    if anatomy.junctions or len(anatomy.stacks) > 1 or not able or anatomy.attends_otherwise:
        why = anatomy.attends_otherwise or "no layer but the last has an attention"
        why = "it has exits or sieves already" if anatomy.junctions else "it writes texts" if len(anatomy.stacks) > 1 else why
        raise TargetError(
            f"word_elimination cannot take words out of this model: {why}.", help="start from an encoder of two layers or more."
        )
    wrong = next((layer for layer in layers or () if layer - 1 not in able), None)
    if wrong is not None:
        raise TargetError(
            f"no words can leave at layer {wrong}: it has no attention, is the last, or not there.",
            help=f"layers at which they can: {', '.join(str(place + 1) for place in able)}.",
        )
    return tuple(names[place] for place in (able if layers is None else [layer - 1 for layer in layers]))


def rising_cuts(shares: Sequence[float]) -> list[float]:
    """The shares of all words that go on, none larger than the one before.

    >>> rising_cuts([0.8, 0.9, 0.3])
    [0.8, 0.8, 0.3]
    """
    found: list[float] = []
    for share in shares:
        found.append(min([*found[-1:], share, 1.0]))
    return found


def steps_of(shares: Sequence[float]) -> list[float]:
    """For shares of all words the shares of those that came to each layer, in whole parts of `SHARE_PARTS`.

    >>> steps_of([0.8, 0.8, 0.4])
    [0.8, 1.0, 0.5]
    """
    before, found = 1.0, []
    for share in shares:
        step = max(1, math.floor(SHARE_PARTS * share / before + 1e-9)) / SHARE_PARTS if before > 0 else 1.0
        found.append(step)
        before *= step
    return found


@torch.no_grad()
def seen_shares(context: Context, sieves: Mapping[str, Sieve]) -> list[Sieve]:
    """The sieves, each with the mean share of words that it lets pass on training examples."""
    small = subject_of(shrink(context.model, context.anatomy, Plan(junctions=sieves)))
    totals, count = torch.zeros(len(sieves), dtype=torch.float64), 0
    with small.evaluating():
        for batch in context.batches(SETTLED_ON):
            small.model(**small.feed(batch))
            totals += torch.stack([shares.sum() for shares in latest_shares(small.model)]).double().cpu()
            count += len(batch["input_ids"])
    means = (totals / count).clamp(1 / SHARE_PARTS, 1.0).tolist()
    return [Sieve(round(mean, 6), sieve.threshold) for mean, sieve in zip(means, sieves.values(), strict=True)]


@torch.no_grad()
def _looks(context: Context, plan: Plan, place: int) -> tuple[Tensor, Tensor, list[float]]:
    """What the sieve at this place sees in training examples with a plan: attention received and words, both (examples, seq).

    The mean shares that all sieves let pass go with it.
    """
    small = subject_of(shrink(context.model, context.anatomy, plan))
    looks, shares = [], []
    with small.evaluating():
        for batch in context.batches(SETTLED_ON):
            small.model(**small.feed(batch))
            looks.append(latest_looks(small.model)[place])
            shares.append(torch.stack(list(latest_shares(small.model))))  # (sieves, batch)
    longest = max(there.shape[1] for _, there in looks)
    received, there = (
        torch.cat([nn.functional.pad(part, (0, longest - part.shape[1])) for part in parts])
        for parts in zip(*looks, strict=True)
    )
    return received, there, torch.cat(shares, 1).mean(1).tolist()


# -- Plumbing ------------------------------------------------------------------------------------------------------------------


def _plan(layers: Sequence[str], steps: Sequence[float]) -> Plan:
    return Plan(junctions={layer: Sieve(step) for layer, step in zip(layers, steps, strict=True)})


def _costs_of(context: Context, place: int, layer: str) -> tuple[float, float]:
    """What the attention of a layer costs, and all the rest of it."""
    curves = {site.id: float(context.cost.curves[site.id][-1]) for site in context.anatomy.units if site.layer == place}
    attention = curves.pop(heads_of(layer), 0.0)
    return attention, sum(curves.values())
