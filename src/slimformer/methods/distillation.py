"""Distillation: the student learns the teacher's outputs, hidden states and attention scores.

Hinton et al. (2015) for outputs with temperature; hidden states after every layer as the token loss of Kurtic et al. (ZipLM, NeurIPS
2023) and PKD; attention scores before the softmax and the embedding's output as in TinyBERT (Jiao et al., 2020). Differences: the hidden
terms are divided by the teacher's mean square, so that one weight fits all layers and models; padding never counts; a student head
learns from the teacher head it descends from, told by the plan; where layers are gone, the one before them learns what the last of them
gave. Choose it after any cut; with no cut it is plain task-specific
distillation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast, final

import torch
from torch import Tensor, nn

from slimformer.methods.base import Capture, Captured, Context, Method, State, Step


class _State(State):
    """Which teacher layer and heads each student layer learns from, and projections where widths differ."""

    def __init__(self, hidden: list[tuple[int, int]], heads: dict[int, tuple[int, list[int]]], widths: tuple[int, int]) -> None:
        super().__init__()
        self.hidden = hidden
        self.heads = heads
        self.project = nn.Linear(widths[0], widths[1], bias=False) if widths[0] != widths[1] else None


@final
@dataclass(frozen=True)
class Distillation(Method):
    """Weights of the terms; a weight of 0 leaves the term out and its captures undone.

    `hidden` and `scores` are means over layers: the sum that TinyBERT, SparseBERT and KroneckerBERT have is the number of layers as
    weight, with `relative: false`, plain mean squared errors.
    """

    temperature: float = 2.0
    logits: float = 1.0
    hidden: float = 1.0
    scores: float = 0.0
    embedding: float = 0.0  # the hidden state before the first layer
    relative: bool = True  # hidden and embedding terms over the teacher's mean square

    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        weights = (self.logits, self.hidden, self.scores, self.embedding)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError("logits, hidden, scores and embedding must not be negative, and one of them must be above 0")

    @property
    def needs(self) -> frozenset[Capture]:  # type: ignore[override]
        wanted = {Capture.LOGITS: self.logits, Capture.HIDDEN: self.hidden + self.embedding, Capture.SCORES: self.scores}
        return frozenset(capture for capture, weight in wanted.items() if weight > 0)

    def attach(self, context: Context) -> State:
        assert context.teacher_anatomy is not None, "training gives a teacher to a method that needs one"
        mine, theirs = context.anatomy, context.teacher_anatomy
        count, deep = len(mine.layers), len(theirs.layers)
        partner = [round((index + 1) * deep / count) - 1 for index in range(count)]  # evenly, the last to the last
        alive = {site.layer for site in mine.sites.values()}
        ends = [index for index in range(min(alive, default=0), count) if index + 1 == count or index + 1 in alive]
        hidden = [(0, 0)] + [(index + 1, partner[index] + 1) for index in ends]
        heads: dict[int, tuple[int, list[int]]] = {}
        for index in range(count):
            site, source = mine.heads_of(index), theirs.heads_of(partner[index])
            if site is None or source is None:
                continue
            origin = list(context.plan.keep.get(site.id, range(site.size)))
            if max(origin) < source.size:
                heads[index] = (partner[index], origin)
        return _State(hidden, heads, (mine.hidden_size, theirs.hidden_size))

    def penalty(self, state: State, step: Step) -> Tensor | None:
        state = cast(_State, state)
        assert step.teacher is not None
        mask = step.batch["attention_mask"]
        total = mask.new_zeros((), dtype=torch.float32)
        if self.logits:
            apart = step.task.divergence(step.student.output, step.teacher.output, step.batch, self.temperature)
            total = total + self.logits * apart
        if self.hidden:
            total = total + self.hidden * self._hidden(state, step.student, step.teacher, mask, state.hidden[1:])
        if self.embedding:
            total = total + self.embedding * self._hidden(state, step.student, step.teacher, mask, state.hidden[:1])
        if self.scores and state.heads:
            total = total + self.scores * self._scores(state, step.student, step.teacher, mask)
        return total

    def _hidden(
        self, state: _State, student: Captured, teacher: Captured, mask: Tensor, pairs: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Mean over pairs of layers of |h_s - h_t|^2 / mean |h_t|^2 at real tokens."""
        real = mask.bool()
        terms = []
        for mine, theirs in pairs:
            own, goal = student.hidden[mine][real].float(), teacher.hidden[theirs][real].float()  # (tokens, hidden)
            if state.project is not None:
                own = state.project(own)
            scale = goal.square().mean().clamp_min(1e-6) if self.relative else 1.0
            terms.append((own - goal).square().mean() / scale)
        return torch.stack(terms).mean()

    @staticmethod
    def _scores(state: _State, student: Captured, teacher: Captured, mask: Tensor) -> Tensor:
        """Mean over layers of the squared difference of scores between real tokens, each row centred: softmax ignores a shift."""
        pairs = (mask[:, None, :, None] * mask[:, None, None, :]).float()  # (batch, 1, seq, seq)
        keys = mask[:, None, None, :].float()
        terms = []
        for index, (layer, heads) in state.heads.items():
            mine, theirs = student.scores[index], teacher.scores[layer]
            assert mine is not None
            assert theirs is not None
            gap = (mine.float() - theirs[:, heads].float()) * pairs  # (batch, heads, seq, seq)
            gap = (gap - gap.sum(-1, keepdim=True) / keys.sum(-1, keepdim=True)) * pairs
            terms.append(gap.square().sum() / (pairs.sum() * gap.shape[1]).clamp_min(1.0))
        return torch.stack(terms).mean()
