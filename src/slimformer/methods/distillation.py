"""Distillation: the student learns the teacher's outputs, hidden states and attention scores.

Paper: Hinton, Vinyals, Dean (2015) for outputs with temperature; Kurtic et al. (ZipLM, NeurIPS 2023), token loss, and Sun et
al. (PKD, 2019) for hidden states after every layer; Jiao et al. (TinyBERT, 2020) for attention scores before the softmax and
the embedding's output.

Idea: Student and teacher see the same batch; the loss grows by how far the student's numbers are from the teacher's.

Differs: The hidden terms are divided by the teacher's mean square, so that one weight fits all layers and models. Padding never
counts. A student head learns from the teacher head of the same origin: the plans of both tell it, because a teacher may be cut
too. A head whose origin the teacher lacks learns no scores, and the log says so; nor do a decoder's attentions. If layers are
gone, the one before them learns what the last of them gave.

Choose when: anything was cut: train on with it after any cut. With no cut it is plain task-specific distillation.

Cost: a forward pass of the teacher for each row, once if its outputs are kept; terms on hidden states and scores keep those of
each layer.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast, final

import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Kind, Site, Tokens
from slimformer.families.base import Subject, family_of
from slimformer.hooks.capture import Capture, Captured
from slimformer.hooks.feeding import unpadded
from slimformer.methods.base import Context, Effects, Method, State, Step
from slimformer.rules import NotNegative, Positive

_log = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class Distillation(Method):
    """Weights of the terms; a weight of 0 leaves its term out, and nothing is captured for it.

    `hidden` and `scores` are means over layers. TinyBERT, SparseBERT and KroneckerBERT have sums of plain mean squared errors:
    for these set the weight to the number of layers, with `relative: false`.

    Example:
        >>> from slimformer import Train
        >>> Train(methods=(Distillation(temperature=1.0, scores=6.0),)).methods[0].effects().needs_teacher
        True
    """

    temperature: Positive = 2.0  # of both models' outputs: the higher, the more the small ones count
    logits: NotNegative = 1.0  # weight of the task's outputs
    hidden: NotNegative = 1.0  # weight of the hidden states, a mean over layers
    scores: NotNegative = 0.0  # weight of the attention scores before the softmax, a mean over layers
    embedding: NotNegative = 0.0  # weight of the hidden state before the first layer
    relative: bool = True  # hidden and embedding terms over the teacher's mean square

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.logits + self.hidden + self.scores + self.embedding:
            raise ValueError("one of logits, hidden, scores and embedding must be above 0")

    def effects(self) -> Effects:
        seen = {Capture.LOGITS: self.logits, Capture.HIDDEN: self.hidden + self.embedding, Capture.SCORES: self.scores}
        return Effects(needs=frozenset(capture for capture, weight in seen.items() if weight > 0), needs_teacher=True)

    def attach(self, context: Context) -> State:
        assert context.teacher is not None, "training gives a teacher to a method that needs one"
        mine, theirs = context.anatomy, context.teacher.anatomy
        partner = partners(mine, theirs)
        heads, alone = {}, 0
        for site in mine.of_kind(Kind.HEADS):
            if mine.stack_of(site.layer).tokens is not Tokens.SOURCE:
                continue
            source = _same_attention(theirs, site, partner[site.layer])
            origins = context.plan.keep.get(site.id, range(site.size))
            known = () if source is None else context.teacher_plan.keep.get(source.id, range(source.size))
            place = {origin: head for head, origin in enumerate(known)}
            pairs = [(head, place[origin]) for head, origin in enumerate(origins) if origin in place]
            alone += site.size - len(pairs)
            if source is not None and pairs:
                heads[site.id] = Heads(source.id, *map(tuple, zip(*pairs, strict=True)))
        if alone and self.scores:
            _log.info("distillation: %d heads have no counterpart in the teacher; they learn no attention scores.", alone)
        hidden, embedding = hidden_pairs(mine, theirs, partner)
        return _State(hidden, embedding, heads, (mine.hidden_size, theirs.hidden_size), same_units(context))

    def penalty(self, state: State, step: Step) -> Tensor | None:
        state = cast(_State, state)
        assert step.teacher is not None
        student, teacher, mask = step.student, step.teacher, step.batch["attention_mask"]
        total = mask.new_zeros((), dtype=torch.float32)
        masks = {tokens: unpadded(step.batch, tokens) for tokens in state.tokens}
        if self.logits:
            total = total + self.logits * step.task.divergence(student.output, teacher.output, step.batch, self.temperature)
        distance = partial(
            hidden_distance, student, teacher, masks, units=state.units, project=state.project, relative=self.relative
        )
        if self.hidden:
            total = total + self.hidden * distance(state.hidden)
        if self.embedding:
            total = total + self.embedding * distance(state.embedding)
        if self.scores and state.heads:
            total = total + self.scores * score_distance(student, teacher, mask, state.heads)
        return total


# -- State ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """The heads of an attention that learn, each with the head of the teacher's `site` that has the same origin."""

    site: str
    students: tuple[int, ...]
    teachers: tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """A hidden state of the student's and the one of the teacher's that it learns, and the tokens that they have a row for."""

    student: int
    teacher: int
    tokens: Tokens = Tokens.SOURCE


class _State(State):
    """Which of the teacher's hidden states, units and heads the student's learn from; a projection if units have no common origin."""

    def __init__(
        self,
        hidden: list[Pair],
        embedding: list[Pair],
        heads: dict[str, Heads],
        widths: tuple[int, int],
        units: Sequence[int] | None,
    ) -> None:
        super().__init__()
        self.units: Tensor | None  # the teacher's hidden units that the student's learn, if it was cut
        self.register_buffer("units", None if units is None else torch.tensor(units), persistent=False)
        self.hidden, self.embedding = hidden, embedding
        self.tokens = {pair.tokens for pair in embedding}
        self.heads = heads
        apart = units is None and widths[0] != widths[1]
        self.project = nn.Linear(widths[0], widths[1], bias=False) if apart else None


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def hidden_distance(
    student: Captured,
    teacher: Captured,
    masks: Mapping[Tokens, Tensor],
    pairs: Sequence[Pair],
    *,
    units: Tensor | None,
    project: nn.Module | None,
    relative: bool,
) -> Tensor:
    """Mean over pairs of layers of |h_s - h_t|^2 / mean |h_t|^2 at real tokens; `units`: those of the teacher's that count."""
    terms = []
    for pair in pairs:
        real = masks[pair.tokens]
        states, goal = (
            student.hidden[pair.student][real].float(),
            teacher.hidden[pair.teacher][real].float(),
        )  # (tokens, hidden)
        if units is not None:
            goal = goal[:, units.to(goal.device)]
        if project is not None:
            states = project(states)
        scale = goal.square().mean().clamp_min(1e-6) if relative else 1.0
        terms.append((states - goal).square().mean() / scale)
    return torch.stack(terms).mean()


def score_distance(student: Captured, teacher: Captured, mask: Tensor, pairing: Mapping[str, Heads]) -> Tensor:
    """Mean over attentions of the squared difference of scores between real tokens, each row centred: softmax ignores a shift.

    `pairing`: the heads that learn, by the student's site.
    """
    pairs = (mask[:, None, :, None] * mask[:, None, None, :]).float()  # (batch, 1, seq, seq)
    keys = mask[:, None, None, :].float()
    terms = []
    for name, heads in pairing.items():
        mine, theirs = student.scores[name], teacher.scores[heads.site]
        gap = (
            _chosen(mine, heads.students).float() - _chosen(theirs, heads.teachers).float()
        ) * pairs  # (batch, heads, seq, seq)
        gap = (gap - gap.sum(-1, keepdim=True) / keys.sum(-1, keepdim=True)) * pairs
        terms.append(gap.square().sum() / (pairs.sum() * gap.shape[1]).clamp_min(1.0))
    return torch.stack(terms).mean()


def same_units(context: Context) -> tuple[int, ...] | None:
    """The teacher's hidden units that have the origin of the student's, if those were cut and the teacher has them all."""
    assert context.teacher is not None
    narrow = next((site for site in context.anatomy.of_kind(Kind.HIDDEN) if site.id in context.plan.keep), None)
    widths = {_dense_width(subject) for subject in (context.subject, context.teacher)}
    if narrow is None or len(widths) > 1:
        return None
    known = context.teacher_plan.keep.get(narrow.id, range(context.teacher.anatomy.hidden_size))
    place = {origin: unit for unit, origin in enumerate(known)}
    origins = context.plan.keep[narrow.id]
    return tuple(place[origin] for origin in origins) if set(origins) <= set(place) else None


def partners(mine: Anatomy, theirs: Anatomy) -> list[int]:
    """The teacher's layer of each of the student's: evenly in a stack, the last to the last."""
    found, above = [], 0
    for own, other in zip(mine.stacks, theirs.stacks, strict=True):
        count, deep = len(own.layers), len(other.layers)
        found += [above + round((index + 1) * deep / count) - 1 for index in range(count)]
        above += deep
    return found


def hidden_pairs(mine: Anatomy, theirs: Anatomy, partner: Sequence[int]) -> tuple[list[Pair], list[Pair]]:
    """Which hidden states learn from which: those after each layer but where the next is gone, and those before the first one.

    In each stack there is one before its first layer, and one after each.
    """
    alive = {site.layer for site in mine.units}
    hidden, embedding, first, above = [], [], 0, 0
    for place, (own, other) in enumerate(zip(mine.stacks, theirs.stacks, strict=True)):
        embedding.append(Pair(first + place, above + place, own.tokens))
        end = first + len(own.layers)
        start = min((layer for layer in alive if first <= layer < end), default=first)
        for layer in range(start, end):
            if layer + 1 == end or layer + 1 in alive:
                hidden.append(Pair(layer + place + 1, partner[layer] + place + 1, own.tokens))
        first, above = end, above + len(other.layers)
    return hidden, embedding


def _same_attention(anatomy: Anatomy, site: Site, layer: int) -> Site | None:
    """The heads at the same place in another layer; None if they were cut."""
    name = site.id.rpartition(".")[2]
    return next((item for item in anatomy.of_kind(Kind.HEADS) if item.layer == layer and item.id.endswith(f".{name}")), None)


def _chosen(scores: Tensor, heads: Sequence[int]) -> Tensor:
    """These heads of (batch, heads, seq, seq); without a copy if they are all."""
    return scores if tuple(heads) == tuple(range(scores.shape[1])) else scores[:, list(heads)]


def _dense_width(subject: Subject) -> int | None:
    """The width of the hidden states before any cut: the config knows nothing of cuts."""
    config = subject.model.config
    return family_of(config.model_type).width(config.to_dict())
