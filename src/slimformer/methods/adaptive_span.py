"""Heads that learn how far they look: each has a span, a penalty shortens it, and heads that look nowhere go.

Paper: Sukhbaatar, Grave, Bojanowski, Joulin: Adaptive Attention Span in Transformers (ACL 2019), section 2.2, for the mask and the
penalty; Tambe et al.: EdgeBERT (MICRO 2021), section 3.2, for encoders, where heads whose span is 0 are left out.

Idea: The weight of a word at a distance d is multiplied by clamp((R + z - d) / R, 0, 1), and the weights of a head sum to 1 again.
The span z of each head is learned with the model; its mean over heads, times `weight`, is added to the loss.

Differs: The ramp R narrows to one word while training goes on, and for the last steps spans are whole numbers and stay as they are,
so that the model that is delivered is the one that was trained; the papers keep the soft mask, or round it off afterwards. An encoder
looks to both sides. A head that `zero: cut` may take fades out with its span's last word, so that its cut changes nothing either.

Choose when: you want EdgeBERT's heads, or to know how far heads look. In files for common runtimes the gain is the heads that go: scores
beyond a span are computed and masked, since no such runtime has a product of near words only. Compare it with `gates` on heads.

Cost: a training run with one more sum for each score. A stage that trains the rest belongs behind it if heads went.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, final

import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Kind, Site
from slimformer.core.cost import Cost
from slimformer.core.pattern import Fixed, HeadPattern, HeadSpan
from slimformer.core.patterning import attending_by
from slimformer.core.plan import Decision, Plan
from slimformer.errors import TargetError
from slimformer.hooks.gating import gated
from slimformer.methods._heads import check_heads
from slimformer.methods._schedules import linear_ramp
from slimformer.methods.base import Context, Effects, Method, Progress, State, Step
from slimformer.rules import Count, NotNegative, Positive

SEEN = 512  # training examples whose longest one says how far a head can look
SETTLE = 0.8  # share of the training after which spans are whole and stay
FAINT = 1e-9  # what a weight is multiplied by beyond a span: its logarithm is finite


@final
@dataclass(frozen=True)
class AdaptiveSpan(Method):
    """`weight`: the loss that heads cost which all look as far as the longest text; the more, the shorter the spans.

    `ramp`: the words over which attention fades out at the end of a span, at first; it narrows to one. `lr`: of the spans, in shares of
    the longest text. `zero`: what becomes of a head whose span came down to 0. "cut": it goes. "current": it attends to the word itself,
    which is what it then computes, and loses queries and keys alone. "keep": it stays as it is, and attends to the word itself.

    `alike`: heads of one number have one span in all layers, as where layers share their weights; what goes then goes from all layers.

    Example:
        >>> from slimformer import Train
        >>> Train(epochs=2, methods=(AdaptiveSpan(weight=0.5),)).cuts
        True
    """

    weight: NotNegative = 0.3
    ramp: Count = 8
    lr: Positive = 0.01
    zero: Literal["cut", "current", "keep"] = "cut"
    alike: bool = False

    def effects(self) -> Effects:
        return Effects(
            cuts=self.zero == "cut",
            patterns=True,
            alike=self.alike,
            uneven=not self.alike,
            neutral=False,
            encoders_only=True,
        )

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        check_heads(anatomy)
        if anatomy.patterns:
            raise TargetError(
                "heads of this model attend by patterns already, and learn no spans.", help="start from the model before that."
            )
        sizes = {site.size for site in anatomy.of_kind(Kind.HEADS)}
        if self.alike and len(sizes) > 1:
            raise TargetError(
                f"heads cannot have one span in all layers: layers have {' and '.join(map(str, sorted(sizes)))} of them.",
                help="leave alike out, or start from a model whose layers have as many heads.",
            )
        factored = next((item for site in anatomy.of_kind(Kind.HEADS) for item in anatomy.factored(site)), None)
        if self.zero != "keep" and factored is not None:
            raise TargetError(
                f"heads whose span is 0 could not go: '{factored.id}' is stored as {factored.form}.",
                help="learn spans first, factor after, or choose zero: keep.",
            )

    def attach(self, context: Context) -> State:
        self.check(context.anatomy, context.cost)
        return _State(context, self)

    def penalty(self, state: State, step: Step) -> Tensor | None:
        state = cast(_State, state)
        if not self.weight or bool(state.settled):
            return None
        return self.weight * torch.cat([state.of(place) for place in range(len(state.sites))]).mean() / (state.longest - 1)

    def advance(self, state: State, progress: Progress) -> None:
        cast(_State, state).narrow(linear_ramp(progress, SETTLE), self.ramp)

    def report(self, state: State) -> Mapping[str, float]:
        state = cast(_State, state)
        spans = state.spans().detach()
        return {"span": float(spans.mean()), "heads_at_0": float((spans < 0.5).sum())}

    def decide(self, state: State, context: Context) -> Decision:
        state = cast(_State, state)
        reaches = state.reaches()
        if not any(reach for spans in reaches.values() for reach in spans):
            raise TargetError(
                "the span of every head came down to 0: no word would see another.",
                help="take a smaller weight, or train longer.",
            )
        every = [reach for spans in reaches.values() for reach in spans]
        told = f"adaptive_span: spans of {len(every)} heads, in words: {sum(every) / len(every):.1f} on average, {every.count(0)} at 0."
        return Decision(plan_for(context.anatomy, reaches, state.longest, self.zero), notes=(told,))


# -- State ---------------------------------------------------------------------------------------------------------------------


class _State(State):
    """The span of each head, as a share of the longest text, and how soft its end is."""

    def __init__(self, context: Context, method: AdaptiveSpan) -> None:
        super().__init__()
        self.sites = list(context.anatomy.of_kind(Kind.HEADS))
        self.longest = max(2, max(int(batch["attention_mask"].sum(1).max()) for batch in context.batches(SEEN)))
        rows = 1 if method.alike else len(self.sites)
        self.lr, device = method.lr, context.subject.device
        widest = max(site.size for site in self.sites)
        self.shares = nn.Parameter(torch.ones(rows, widest, device=device))  # (layers or 1, heads)
        self.width: Tensor  # of the ramp, in words; buffers, so that a resumed run knows them
        self.settled: Tensor
        self.register_buffer("width", torch.tensor(float(method.ramp), device=device))
        self.register_buffer("settled", torch.tensor(False, device=device))
        self.whole: Tensor  # what spans settled to
        self.register_buffer("whole", torch.zeros(rows, widest, device=device))
        narrowing = {site.id: partial(self.summand, place) for place, site in enumerate(self.sites)}
        hooks = ExitStack()
        hooks.enter_context(attending_by(context.model, context.anatomy, {}, narrowing))
        if method.zero == "cut":
            gates = {site.id: partial(self.gate, place) for place, site in enumerate(self.sites)}
            gates |= {str(site.sublayer): partial(self.whole_gate, place) for place, site in enumerate(self.sites)}
            hooks.enter_context(
                gated(context.model, context.anatomy, cast("Mapping[str, Tensor | Callable[[], Tensor]]", gates))
            )
        self.on_close(hooks.close)

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.shares], "lr": self.lr, "weight_decay": 0.0}]

    def spans(self) -> Tensor:
        """The spans in words: (layers or 1, heads)."""
        return self.whole if bool(self.settled) else self.shares.clamp(0, 1) * (self.longest - 1)

    def of(self, place: int) -> Tensor:
        """The spans of one attention: (heads,)."""
        return self.spans()[place if len(self.shares) > 1 else 0][: self.sites[place].size]

    def summand(self, place: int, distances: Tensor) -> Tensor:
        """What is added to the scores of an attention: (heads, seq, seq)."""
        return span_weights(self.of(place), self.width, distances).clamp(min=FAINT).log()

    def gate(self, place: int) -> Tensor:
        """How much each head of an attention counts: all of it, if it sees a word beside its own."""
        return self.of(place).clamp(max=1.0)

    def whole_gate(self, place: int) -> Tensor:
        """How much an attention counts: all of it, if one of its heads does; without any its norm would still be there."""
        return self.gate(place).amax(0, keepdim=True)

    @torch.no_grad()
    def narrow(self, done: float, ramp: int) -> None:
        """Narrows the ends of spans, and lets them settle when that is done; a span that a step took out of its range comes back."""
        self.shares.clamp_(0, 1)
        self.width.fill_(ramp + (1.0 - ramp) * done)
        if done >= 1.0 and not bool(self.settled):
            self.whole.copy_(self.spans().round())
            self.settled.fill_(True)

    @torch.no_grad()
    def reaches(self) -> dict[str, list[int]]:
        """The whole span of each head, by its site."""
        return {site.id: [int(span) for span in self.of(place).round()] for place, site in enumerate(self.sites)}


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def span_weights(spans: Tensor, width: Tensor | float, distances: Tensor) -> Tensor:
    """What attention at each distance is multiplied by (Sukhbaatar et al., eq. 4): (heads, ...) for spans (heads,), distances (...).

    >>> span_weights(torch.tensor([2.0]), 2.0, torch.tensor([1, 2, 3, 4])).tolist()
    [[1.0, 1.0, 0.5, 0.0]]
    """
    spans = spans.reshape(-1, *([1] * distances.ndim))
    return ((width + spans - distances) / width).clamp(0, 1)


def plan_for(anatomy: Anatomy, reaches: Mapping[str, Sequence[int]], longest: int, zero: str) -> Plan:
    """The plan for whole spans of the heads of each site; one that reaches over the longest text is none."""
    keep: dict[str, tuple[int, ...]] = {}
    patterns: dict[str, tuple[HeadPattern | None, ...]] = {}
    for name, spans in reaches.items():
        site = anatomy.sites[name]
        stay = [head for head, reach in enumerate(spans) if reach or zero != "cut"]
        if not stay:
            keep[str(site.sublayer)] = ()
            continue
        if len(stay) < site.size:
            keep[name] = tuple(stay)
        patterns[name] = tuple(None if spans[head] >= longest - 1 else HeadSpan(spans[head]) for head in stay)
        if zero == "current":
            patterns[name] = _without_queries(site, patterns[name])
    return Plan(keep, patterns=patterns)


def _without_queries(site: Site, rules: Sequence[HeadPattern | None]) -> tuple[HeadPattern | None, ...]:
    """The same with `Fixed("current")` for spans of 0, but for one head if all are."""
    alone = all(rule == HeadSpan(0) for rule in rules)
    return tuple(
        Fixed("current") if rule == HeadSpan(0) and not (alone and head == 0) else rule for head, rule in enumerate(rules)
    )
