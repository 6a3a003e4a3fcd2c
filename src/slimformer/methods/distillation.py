"""Distillation: the student learns the teacher's outputs, hidden states and attention scores.

Paper: Hinton, Vinyals, Dean (2015) for outputs with temperature; Kurtic et al. (ZipLM, NeurIPS 2023), token loss, and Sun et
al. (PKD, 2019) for hidden states after every layer; Jiao et al. (TinyBERT, 2020) for attention scores before the softmax and
the embedding's output.

Idea: Student and teacher see the same batch; the loss grows by how far the student's numbers are from the teacher's.

Differs: The hidden terms are divided by the teacher's mean square, so that one weight fits all layers and models. Padding never
counts. A student head learns from the teacher head of the same origin: the plans of both tell it, because a teacher may be cut
too. A head whose origin the teacher lacks learns no scores, and the log says so. If layers are gone, the one before them learns
what the last of them gave.

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

from slimformer.hooks.capture import Capture, Captured
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
        count, deep = len(mine.layers), len(theirs.layers)
        partner = [round((index + 1) * deep / count) - 1 for index in range(count)]  # evenly, the last to the last
        alive = {site.layer for site in mine.sites.values()}
        ends = [index for index in range(min(alive, default=0), count) if index + 1 == count or index + 1 in alive]
        hidden = [(0, 0)] + [(index + 1, partner[index] + 1) for index in ends]
        heads, alone = {}, 0
        for index in range(count):
            site, source = mine.heads_of(index), theirs.heads_of(partner[index])
            if site is None:
                continue
            origins = context.plan.keep.get(site.id, range(site.size))
            known = () if source is None else context.teacher_plan.keep.get(source.id, range(source.size))
            place = {origin: head for head, origin in enumerate(known)}
            pairs = [(head, place[origin]) for head, origin in enumerate(origins) if origin in place]
            alone += site.size - len(pairs)
            if pairs:
                heads[index] = Heads(partner[index], *map(tuple, zip(*pairs, strict=True)))
        if alone and self.scores:
            _log.info("distillation: %d heads have no counterpart in the teacher; they learn no attention scores.", alone)
        return _State(hidden, heads, (mine.hidden_size, theirs.hidden_size))

    def penalty(self, state: State, step: Step) -> Tensor | None:
        state = cast(_State, state)
        assert step.teacher is not None
        student, teacher, mask = step.student, step.teacher, step.batch["attention_mask"]
        total = mask.new_zeros((), dtype=torch.float32)
        if self.logits:
            total = total + self.logits * step.task.divergence(student.output, teacher.output, step.batch, self.temperature)
        distance = partial(hidden_distance, student, teacher, mask, project=state.project, relative=self.relative)
        if self.hidden:
            total = total + self.hidden * distance(state.hidden[1:])
        if self.embedding:
            total = total + self.embedding * distance(state.hidden[:1])
        if self.scores and state.heads:
            total = total + self.scores * score_distance(student, teacher, mask, state.heads)
        return total


# -- State ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """The heads of a student's layer that learn, each with the head of the teacher's `layer` that has the same origin."""

    layer: int
    students: tuple[int, ...]
    teachers: tuple[int, ...]


class _State(State):
    """Which teacher layer and heads each student layer learns from, and a projection if widths differ."""

    def __init__(self, hidden: list[tuple[int, int]], heads: dict[int, Heads], widths: tuple[int, int]) -> None:
        super().__init__()
        self.hidden = hidden
        self.heads = heads
        self.project = nn.Linear(widths[0], widths[1], bias=False) if widths[0] != widths[1] else None


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def hidden_distance(
    student: Captured,
    teacher: Captured,
    mask: Tensor,
    pairs: Sequence[tuple[int, int]],
    *,
    project: nn.Module | None,
    relative: bool,
) -> Tensor:
    """Mean over pairs of layers of |h_s - h_t|^2 / mean |h_t|^2 at real tokens."""
    real = mask.bool()
    terms = []
    for mine, theirs in pairs:
        states, goal = student.hidden[mine][real].float(), teacher.hidden[theirs][real].float()  # (tokens, hidden)
        if project is not None:
            states = project(states)
        scale = goal.square().mean().clamp_min(1e-6) if relative else 1.0
        terms.append((states - goal).square().mean() / scale)
    return torch.stack(terms).mean()


def score_distance(student: Captured, teacher: Captured, mask: Tensor, pairing: Mapping[int, Heads]) -> Tensor:
    """Mean over layers of the squared difference of scores between real tokens, each row centred: softmax ignores a shift.

    `pairing`: the heads that learn, by the student's layer.
    """
    pairs = (mask[:, None, :, None] * mask[:, None, None, :]).float()  # (batch, 1, seq, seq)
    keys = mask[:, None, None, :].float()
    terms = []
    for index, heads in pairing.items():
        mine, theirs = student.scores[index], teacher.scores[heads.layer]
        assert mine is not None
        assert theirs is not None
        gap = (
            _chosen(mine, heads.students).float() - _chosen(theirs, heads.teachers).float()
        ) * pairs  # (batch, heads, seq, seq)
        gap = (gap - gap.sum(-1, keepdim=True) / keys.sum(-1, keepdim=True)) * pairs
        terms.append(gap.square().sum() / (pairs.sum() * gap.shape[1]).clamp_min(1.0))
    return torch.stack(terms).mean()


def _chosen(scores: Tensor, heads: Sequence[int]) -> Tensor:
    """These heads of (batch, heads, seq, seq); without a copy if they are all."""
    return scores if tuple(heads) == tuple(range(scores.shape[1])) else scores[:, list(heads)]
