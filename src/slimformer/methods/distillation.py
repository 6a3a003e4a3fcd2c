"""Distillation: the student learns the teacher's outputs, hidden states, attention scores, and relations between tokens.

Paper: Hinton, Vinyals, Dean (2015) for outputs with temperature; Kurtic et al. (ZipLM, NeurIPS 2023), token loss, for hidden
states after every layer; Jiao et al. (TinyBERT, 2020) for attention scores before the softmax and the embedding's output; Sun et
al. (PKD, EMNLP 2019), eq. 6, for the first token's; Wang et al. (MiniLMv2, Findings of ACL 2021), section 3, for relations; Li et
al. (BERT-EMD, EMNLP 2020), sections 3.2 and 3.3, for a map of many layers to many.

Idea: Student and teacher see the same batch; the loss grows by how far the student's numbers are from the teacher's.

Differs: The hidden terms are divided by the teacher's mean square, so that one weight fits all layers and models. Padding never
counts. A student head learns from the teacher head of the same origin: the plans of both tell it, because a teacher may be cut
too. A head whose origin the teacher lacks learns no scores, and the log says so; nor do a decoder's attentions. Relations are
those of the last attention of each. The flow of BERT-EMD is exact, and its layers' weights have a temperature of their number.

Choose when: anything was cut: train on with it after any cut. With no cut it is plain task-specific distillation.

Cost: a forward pass of the teacher for each row, once if its outputs are kept; terms on hidden states and scores keep those of
each layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Kind, Site, Tokens
from slimformer.core.cost import Cost
from slimformer.errors import TargetError
from slimformer.families.base import Subject, family_of
from slimformer.hooks.capture import Capture, Captured, related_widths
from slimformer.hooks.feeding import unpadded
from slimformer.methods.base import Context, Effects, Method, Progress, State, Step
from slimformer.rules import Count, NotNegative, Positive

_log = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class Distillation(Method):
    """Weights of the terms; a weight of 0 leaves its term out, and nothing is captured for it.

    `hidden` and `scores` are means over layers. TinyBERT, SparseBERT and KroneckerBERT have sums of plain mean squared errors:
    for these set the weight to the number of layers, with `relative: false`.

    `patient` is PKD's loss: only the first token's states, brought to length 1, all layers but the last. `relations` is MiniLMv2's:
    the student's last attention learns with what weight each token's query meets every other token's query, and so for keys and
    values (scaled dot products after a softmax, in `relation_heads` parts); widths may differ, so heads may be cut. MiniLM itself
    is `scores` and values alone.

    `layers`: "one" pairs each layer's hidden state with one of the teacher's, evenly. "many" is BERT-EMD's: each learns from all of
    them, by the cheapest flow between the two models' layers; after each step layers that are cheap to match count more.

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
    patient: NotNegative = (
        0.0  # weight of the first token's hidden states, each of length 1: squared distance, a mean over layers
    )
    relations: NotNegative = 0.0  # weight of the last attention's relations: query to query, key to key, value to value
    relation_heads: Count = (
        12  # parts that queries, keys and values are split into for them; must divide the width of both models'
    )
    layers: Literal["one", "many"] = "one"  # the teacher's layers that a layer's hidden state learns from
    relative: bool = True  # hidden and embedding terms over the teacher's mean square

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.logits + self.hidden + self.scores + self.embedding + self.patient + self.relations:
            raise ValueError("one of logits, hidden, scores, embedding, patient and relations must be above 0")
        if self.layers == "many" and not self.hidden:
            raise ValueError("layers: many says how hidden states are paired, and hidden is 0")

    def effects(self) -> Effects:
        states = self.hidden + self.embedding + self.patient
        seen = {Capture.LOGITS: self.logits, Capture.HIDDEN: states, Capture.SCORES: self.scores}
        seen[Capture.RELATIONS] = self.relations
        return Effects(needs=frozenset(capture for capture, weight in seen.items() if weight > 0), needs_teacher=True)

    def mismatch(self, mine: Anatomy, theirs: Anatomy) -> str | None:
        if self.relations and len(related_widths(theirs)) > 1:
            return "the teacher's last attention has heads without queries and keys, and so no relations of theirs to learn"
        return self._unrelated("teacher", theirs)

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        self._check_relations(self._unrelated("student", anatomy))

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
            own = {head: score for score, head in enumerate(mine.asking_heads(site))}
            asked = {} if source is None else {head: score for score, head in enumerate(theirs.asking_heads(source))}
            pairs = [
                (own[head], asked[place[origin]])
                for head, origin in enumerate(origins)
                if head in own and place.get(origin) in asked
            ]
            alone += site.size - len(pairs)
            if source is not None and pairs:
                heads[site.id] = Heads(source.id, *map(tuple, zip(*pairs, strict=True)))
        if alone and self.scores:
            _log.info("distillation: %d heads have no counterpart in the teacher; they learn no attention scores.", alone)
        self.check(mine, context.cost)
        self._check_relations(self.mismatch(mine, theirs))
        hidden, embedding = hidden_pairs(mine, theirs, partner)
        many = every_layer(hidden, theirs) if self.layers == "many" else []
        return _State(hidden, embedding, heads, (mine.hidden_size, theirs.hidden_size), same_units(context), many)

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
        if self.hidden and self.layers == "many":
            total = total + self.hidden * state.transported(distance)
        elif self.hidden:
            total = total + self.hidden * distance(state.hidden)
        if self.embedding:
            total = total + self.embedding * distance(state.embedding)
        if self.scores and state.heads:
            total = total + self.scores * score_distance(student, teacher, mask, state.heads)
        if self.patient:
            total = total + self.patient * patient_distance(student, teacher, state.hidden, state.units, state.project)
        if self.relations:
            total = total + self.relations * relation_distance(student, teacher, mask, self.relation_heads)
        return total

    def advance(self, state: State, progress: Progress) -> None:
        if self.layers == "many":
            cast(_State, state).weigh()

    def _unrelated(self, whose: str, anatomy: Anatomy) -> str | None:
        """Why the last attention of a model has no relations that could be compared; None if it has, or none are asked for."""
        widths = (related_widths(anatomy) or (0,)) if self.relations else ()
        wrong = next((width for width in widths if width == 0 or width % self.relation_heads), None)
        if wrong is None:
            return None
        if wrong == 0:
            return f"the {whose} has no attention left whose relations could be learned"
        return f"relation_heads {self.relation_heads} does not divide the {whose}'s last attention, which is {wrong} wide"

    def _check_relations(self, why: str | None) -> None:
        if why is not None:
            raise TargetError(
                f"{why}.",
                help="choose a number of relation_heads that divides the width of both models' last attention, or leave relations out.",
            )


# -- State ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """The heads of an attention that learn, each with the head of the teacher's `site` that has the same origin; counted among those
    that have scores."""

    site: str
    students: tuple[int, ...]
    teachers: tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """A hidden state of the student's and the one of the teacher's that it learns, and the tokens that they have a row for."""

    student: int
    teacher: int
    tokens: Tokens = Tokens.SOURCE


@dataclass(frozen=True)
class StackLayers:
    """The hidden states of one stack that learn, and all of the teacher's that they learn from."""

    students: tuple[int, ...]
    teachers: tuple[int, ...]
    tokens: Tokens


class _State(State):
    """Which of the teacher's hidden states, units and heads the student's learn from; a projection if units have no common origin."""

    def __init__(
        self,
        hidden: list[Pair],
        embedding: list[Pair],
        heads: dict[str, Heads],
        widths: tuple[int, int],
        units: Sequence[int] | None,
        many: Sequence[StackLayers] = (),
    ) -> None:
        super().__init__()
        self.units: Tensor | None  # the teacher's hidden units that the student's learn, if it was cut
        self.register_buffer("units", None if units is None else torch.tensor(units), persistent=False)
        self.hidden, self.embedding = hidden, embedding
        self.tokens = {pair.tokens for pair in embedding}
        self.heads = heads
        self.many = many
        for index, layers in enumerate(
            many
        ):  # how much each layer counts: they sum to 1; buffers, so that a resumed run knows them
            self.register_buffer(f"own_{index}", torch.full((len(layers.students),), 1 / len(layers.students)))
            self.register_buffer(f"other_{index}", torch.full((len(layers.teachers),), 1 / len(layers.teachers)))
        self._unit_costs: dict[str, Tensor] = {}
        apart = units is None and widths[0] != widths[1]
        self.project = nn.Linear(widths[0], widths[1], bias=False) if apart else None

    def transported(self, distance: Callable[[Sequence[Pair]], Tensor]) -> Tensor:
        """The mean over stacks of what the cheapest flow from the student's layers to the teacher's costs (BERT-EMD, eq. 4 to 6)."""
        terms = []
        for index, layers in enumerate(self.many):
            pairs = [[Pair(own, other, layers.tokens) for other in layers.teachers] for own in layers.students]
            gaps = torch.stack([torch.stack([distance([pair]) for pair in row]) for row in pairs])  # (students, teachers)
            own, other = self.get_buffer(f"own_{index}"), self.get_buffer(f"other_{index}")
            flow = transport(*(value.detach().double().cpu().numpy() for value in (gaps, own, other)))
            moved = gaps * torch.from_numpy(flow).to(gaps)
            self._unit_costs[f"own_{index}"] = moved.detach().sum(1) / own
            self._unit_costs[f"other_{index}"] = moved.detach().sum(0) / other
            terms.append(moved.sum())
        return torch.stack(terms).mean()

    def pool(self, gather: Callable[[Tensor], Tensor]) -> None:
        self._unit_costs = {name: gather(cost).mean(0) for name, cost in self._unit_costs.items()}

    def weigh(self) -> None:
        """Layers that cost little to match count more from now on."""
        for name, cost in self._unit_costs.items():
            self.get_buffer(name).copy_(cheap_first(cost))
        self._unit_costs = {}


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
    """Mean over pairs of layers of |h_s - h_t|^2 / mean |h_t|^2 at real tokens that have not left; `units`: the teacher's that count."""
    terms = []
    for pair in pairs:
        real = masks[pair.tokens]
        if pair.student in student.words:
            real = real & student.words[pair.student]
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


def patient_distance(
    student: Captured, teacher: Captured, pairs: Sequence[Pair], units: Tensor | None, project: nn.Module | None
) -> Tensor:
    """Mean over layers but the last, and over rows, of |h_s / |h_s| - h_t / |h_t||^2 at the first token (PKD, eq. 6)."""
    terms = []
    for pair in pairs[:-1] or pairs:
        states, goal = student.hidden[pair.student][:, 0].float(), teacher.hidden[pair.teacher][:, 0].float()  # (batch, hidden)
        goal = goal if units is None else goal[:, units.to(goal.device)]
        states = states if project is None else project(states)
        gap = torch.nn.functional.normalize(states, dim=-1) - torch.nn.functional.normalize(goal, dim=-1)
        terms.append(gap.square().sum(-1).mean())
    return torch.stack(terms).mean()


def relation_distance(student: Captured, teacher: Captured, mask: Tensor, heads: int) -> Tensor:
    """Mean over queries, keys and values, heads and real tokens of KL(teacher || student) of their relations (MiniLMv2, eq. 4-6).

    A relation of vectors A is softmax(A A^T / sqrt(d)) within each of `heads` parts of width d, over real tokens.
    """
    real = mask.bool()
    terms = []
    for mine, theirs in zip(student.relations, teacher.relations, strict=True):
        own, goal = (_relation(vectors.float(), real, heads) for vectors in (mine, theirs))  # (batch, heads, seq, seq) in logs
        gap = (goal.exp() * (goal - own)).sum(-1)  # (batch, heads, seq)
        rows = real[:, None, :].expand_as(gap)
        terms.append(gap[rows].mean())
    return torch.stack(terms).mean()


def transport(costs: np.ndarray, supply: np.ndarray, demand: np.ndarray) -> np.ndarray:
    """The flow (n, m), not negative, that takes `supply` (n,) to `demand` (m,), both of sum 1, at the least `costs` (n, m) in all."""
    from scipy.optimize import linprog

    rows, columns = costs.shape
    leaves = np.kron(np.eye(rows), np.ones(columns))  # (n, n m): the flow out of each
    enters = np.kron(np.ones(rows), np.eye(columns))
    solved = linprog(
        costs.ravel(), A_eq=np.vstack([leaves, enters[:-1]]), b_eq=np.concatenate([supply, demand[:-1]]) / supply.sum()
    )
    return np.asarray(solved.x).reshape(rows, columns)


def cheap_first(costs: Tensor) -> Tensor:
    """Weights of sum 1 for layers whose mass costs so much to move: softmax of (sum of costs / cost) over their number.

    BERT-EMD, eq. 8 and 9, with their number as its temperature: at equal costs and at few layers it hardly moves.
    """
    share = costs.sum() / costs.clamp_min(1e-6 * float(costs.sum()) + 1e-12)  # (layers,)
    return torch.softmax(share.clamp_max(10.0 * len(costs)) / len(costs), dim=0)


def every_layer(pairs: Sequence[Pair], theirs: Anatomy) -> list[StackLayers]:
    """For each stack the student's states of `pairs`, and the teacher's states after each of its layers."""
    found, above = [], 0
    for place, stack in enumerate(theirs.stacks):
        states = tuple(above + place + 1 + layer for layer in range(len(stack.layers)))
        own = tuple(pair.student for pair in pairs if pair.teacher in states)
        found.append(StackLayers(own, states, stack.tokens))
        above += len(stack.layers)
    return found


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


def _relation(vectors: Tensor, real: Tensor, heads: int) -> Tensor:
    """Logs of the relations of `vectors` (batch, seq, width): (batch, heads, seq, seq)."""
    parts = vectors.unflatten(-1, (heads, -1)).transpose(1, 2)  # (batch, heads, seq, d)
    products = parts @ parts.transpose(-1, -2) / parts.shape[-1] ** 0.5
    return torch.log_softmax(products.masked_fill(~real[:, None, None, :], -1e4), dim=-1)


def _dense_width(subject: Subject) -> int | None:
    """The width of the hidden states before any cut: the config knows nothing of cuts."""
    config = subject.model.config
    return family_of(config.model_type).width(config.to_dict())
