"""Shared projections: a narrow student learns its teacher's weights through a few learned matrices that all layers share.

Paper: Zhao, Gupta, Song, Zhou: Extreme Language Model Compression with Optimal Subwords and Shared Projections (2019, arXiv 1909.11687,
version 1): the sections on optimal subword embeddings by dual training, and on shared projections.

Idea: The student has a small vocabulary of its own (`model: {use: bert, vocabulary: 5000}`) and narrow layers, each of which belongs
to one of the teacher's. Two things tie it to a teacher that reads other pieces. Projections: W_t of the teacher should be U W_s V
("up"), or W_s should be U W_t V ("down"), with one U and one V for all layers. Dual training: some words of what the teacher reads
are split as the student splits them; so the teacher learns rows for the student's pieces, with which its word table is compared.

Differs: The teacher is tuned for the task and only its texts are at hand, so nobody predicts masked words: the teacher learns to
answer a mixed text as it answers the plain one, and only its rows for the student's pieces train. The task's loss is in the same
stage; the paper makes a student for any task first. There is a U and a V for each width: hidden states, all heads, neurons. A
distance is divided by the mean square of its goal, so that no small projection meets it; the loss is a mean over tensors. Layers
may be fewer, then spread evenly over the teacher's. Pooler and classifier are left out: their rows have no counterpart.

Choose when: bytes count more than anything: the word table shrinks on both sides. With the teacher's tokenizer it is a student of
another width that learns from weights; beside a cut (`hidden_width`) it has nothing to do that the cut did not.

Cost: two small products for each matrix in each step; with `dual` a pass of the teacher forward and back, most of the step.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Kind
from slimformer.data.retraining import descent, same_words, shared_pieces, word_starts
from slimformer.errors import TargetError
from slimformer.families.base import Subject
from slimformer.hooks.capture import Capture
from slimformer.methods.base import Batch, Context, Effects, Method, State, Step
from slimformer.methods.distillation import partners
from slimformer.rules import Fraction, Positive

_log = logging.getLogger(__name__)

Direction = Literal["up", "down"]
SHARED_WIDTHS = (Kind.HIDDEN, Kind.HEADS, Kind.NEURONS)


@final
@dataclass(frozen=True)
class SharedProjections(Method):
    """`direction`: "up" projects the student's weights to the teacher's width and compares there; "down" the teacher's to the student's.
    Up has a goal that stands still; down has one that moves with the projections.

    Projections begin orthogonal, those of hidden states as the directions in which the teacher's word table varies most.

    `weight` is that of the mean distance over tensors. `dual` is the share of words that the
    teacher reads in the student's pieces, 0.5 is ours; at 0 the teacher learns nothing, and of the student's word table only the rows
    of pieces that both know are compared. The teacher's rows begin as its own of the same piece, or as the mean of those that the piece
    is made of. It counts only if the student has a vocabulary of its own.

    The stage needs a teacher of the same type that is as deep and as wide at least.

    Example:
        >>> from slimformer import Train
        >>> Train(methods=(SharedProjections(dual=0.0),)).methods[0].effects().needs_teacher
        True
    """

    direction: Direction = "up"
    weight: Positive = 1.0
    dual: Fraction = 0.5

    def effects(self) -> Effects:
        needs = frozenset({Capture.LOGITS} if self.dual else ())
        return Effects(needs=needs, needs_teacher=True, encoders_only=True)

    def mismatch(self, mine: Anatomy, theirs: Anatomy) -> str | None:
        if len(mine.stacks) > 1 or len(theirs.stacks) > 1:
            return "it is for encoders, and the model has a decoder too"
        if mine.fused or theirs.fused:
            return "queries, keys and values are one matrix, whose rows no projection of heads fits"
        if mine.has_bottlenecks or theirs.has_bottlenecks:
            return "layers have bottlenecks, and compute in a width that no projection of hidden states fits"
        if not mine.layers or not theirs.layers:
            return f"the {'teacher' if mine.layers else 'model'} has no layers to learn from"
        if mine.vocabulary is None or theirs.vocabulary is None:
            return f"the {'model' if mine.vocabulary is None else 'teacher'} has no plain word table: factor it later"
        deep, whole = len(mine.layers), len(theirs.layers)
        if deep > whole:
            return f"the model has {deep} layers and its teacher {whole}, and each learns from one of them: give it {whole} or fewer"
        for kind in SHARED_WIDTHS:
            wide, most = (_widths(anatomy, kind) for anatomy in (mine, theirs))
            if len(wide) > 1 or len(most) > 1:
                return f"the layers differ in their {kind}, and share one projection: cut them later"
            if wide and most and max(wide) > max(most):
                return f"the model is wider than its teacher ({_named(kind)}: {max(wide)} of {max(most)})"
        if not _places(mine, theirs):
            return "the teacher's tensors have other names: name a teacher of the model's type"
        return None

    def attach(self, context: Context) -> State:
        assert context.teacher is not None
        why = self.mismatch(context.anatomy, context.teacher.anatomy)
        if why is None and self.dual and context.tokenizers is not None and not same_words(*context.tokenizers):
            why = "the two tokenizers do not split texts into the same words: set dual: 0"
        if why is not None:
            raise TargetError(f"shared_projections: {why}.", help="docs/methods.md says what it needs.")
        return _State(context, self.direction, dual=self.dual > 0)

    def penalty(self, state: State, step: Step) -> Tensor | None:
        state = cast(_State, state)
        state.seen["distance"] = distance = state.distance()
        total = self.weight * distance
        if state.dual is not None and step.read is not None:
            assert step.teacher is not None
            mixed = state.dual.mixed(step.batch, step.read, self.dual)
            output = state.dual.answers(mixed, step.task.outputs)
            state.seen["mixed"] = gap = step.task.divergence(output, step.teacher.output, step.read, 1.0)
            total = total + gap
        return total

    def report(self, state: State) -> Mapping[str, float]:
        return {name: float(value.detach()) for name, value in cast(_State, state).seen.items()}


# -- State ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """A tensor of the student's, the teacher's that it is compared with, and the name of the projection of each axis, None if they are
    equally long there."""

    own: Tensor
    goal: Tensor
    axes: tuple[str | None, ...]


class _State(State):
    """The projections, and the teacher's rows for pieces that it does not read by itself."""

    def __init__(self, context: Context, direction: Direction, *, dual: bool) -> None:
        super().__init__()
        guide = context.teacher
        assert guide is not None
        self.direction = direction
        self.seen: dict[str, Tensor] = {}
        theirs, own = (dict(subject.model.named_parameters()) for subject in (guide, context.subject))
        places = {name: item for name, item in _places(context.anatomy, guide.anatomy).items() if name in own}
        table, given = (_table(anatomy) for anatomy in (context.anatomy, guide.anatomy))
        axes = {name: _axes(name, kinds, context.subject, own[name].ndim) for name, (_, kinds) in places.items()}
        sizes = {
            axis: (own[name].shape[dim], theirs[source].shape[dim])
            for name, (source, _) in places.items()
            for dim, axis in enumerate(axes[name])
            if axis is not None
        }
        self.maps = nn.ParameterDict(self._starts(sizes, theirs[given].detach(), context.generator))
        # (pieces, 2): what both read, by the student's id and the teacher's; None if all pieces are compared
        self.shared: Tensor | None
        self.dual: _Dual | None = None
        shared = None
        if context.tokenizers is not None:
            new, old = context.tokenizers
            if dual:
                self.dual = _Dual(context, guide, inherited(theirs[given].detach().cpu(), descent(old, new)))
                self.on_close(self.dual.close)
            else:
                shared = torch.tensor(list(shared_pieces(old, new).items()))
        self.register_buffer("shared", shared, persistent=False)
        self._table = table
        self._compared = {
            name: Compared(own[name], theirs[source], axes[name])
            for name, (source, _) in places.items()
            if name == table
            or all(
                axis is not None or size == other
                for axis, size, other in zip(axes[name], own[name].shape, theirs[source].shape, strict=True)
            )
        }

    def _starts(
        self, sizes: Mapping[str, tuple[int, int]], words: Tensor, generator: torch.Generator
    ) -> dict[str, nn.Parameter]:
        """Projections by axis, (to, from): for hidden states the directions in which the word table varies most, else random ones.

        What gives a width and what reads it begin alike.
        """
        begun: dict[str, Tensor] = {}
        for axis, (narrow, wide) in sizes.items():
            kind = axis.rpartition("_")[0]
            if kind not in begun and kind == Kind.HIDDEN.name and words.shape[1] == wide:
                begun[kind] = directions(words, narrow)
            elif kind not in begun:
                begun[kind] = torch.linalg.qr(torch.randn(wide, narrow, generator=generator))[0].to(words.device)
        columns = {axis: begun[axis.rpartition("_")[0]] for axis in sizes}
        turned = {axis: value if self.direction == "up" else value.T for axis, value in columns.items()}
        return {axis: nn.Parameter(value.float().contiguous().clone()) for axis, value in turned.items()}

    def distance(self) -> Tensor:
        """The mean over tensors of |W_t - U W_s V|^2 / |W_t|^2, or of |W_s - U W_t V|^2 / |U W_t V|^2: a scalar."""
        terms = []
        for name, item in self._compared.items():
            own, goal = item.own, item.goal.detach()
            if name == self._table:
                own, goal = self._words(own, goal)
            maps = [None if axis is None else self.maps[axis] for axis in item.axes]
            with torch.autocast(own.device.type, enabled=False):
                terms.append(projected_distance(own.float(), goal.float(), maps, self.direction))
        return torch.stack(terms).mean()

    def _words(self, own: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the two word tables that belong to the same pieces."""
        if self.dual is not None:
            return own, self.dual.rows.detach()
        if self.shared is not None:
            return own[self.shared[:, 0]], goal[self.shared[:, 1]]
        return own, goal


class _Dual(nn.Module):
    """The teacher reading some words in the student's pieces: `rows` (pieces, width) are what it learns, all else of it stands still."""

    def __init__(self, context: Context, guide: Subject, rows: Tensor) -> None:
        super().__init__()
        assert context.tokenizers is not None
        self.rows = nn.Parameter(rows.clone())
        self._guide = (guide,)  # a tuple, so that the teacher is no part of this module
        self._own, self._theirs = (np.asarray(word_starts(text)) for text in context.tokenizers)
        self._most = guide.family.positions(guide.model.config.to_dict()) or 512
        self._stack = ExitStack()
        self._stack.enter_context(guide.evaluating())
        for parameter in guide.model.parameters():
            self._stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)

    def close(self) -> None:
        """The teacher is as it was before."""
        self._stack.close()

    def mixed(self, batch: Batch, read: Batch, share: float) -> dict[str, Tensor]:
        """The teacher's rows with a share of the words in the student's pieces: "ids", "own" (whether an id is the student's),
        "attention_mask", and "token_type_ids" if it reads them; each (batch, seq)."""
        rows = []
        for row in range(len(read["input_ids"])):
            own, theirs = (_real(item["input_ids"][row], item["attention_mask"][row]) for item in (batch, read))
            segments = (
                read["token_type_ids"][row].cpu().numpy() if "token_type_ids" in read else np.zeros(len(theirs), np.int64)
            )
            words = int(self._theirs[theirs].sum())
            chosen = (torch.rand(words) < share).numpy()
            found = mixed_row(own, theirs, segments[: len(theirs)], self._own[own], self._theirs[theirs], chosen)
            if found is None or len(found) > self._most:
                found = np.stack([theirs, np.zeros_like(theirs), segments[: len(theirs)]], 1)
            rows.append(found)
        longest = max(len(found) for found in rows)
        filled = np.zeros((len(rows), longest, 4), np.int64)
        for row, found in enumerate(rows):
            filled[row, : len(found), :3], filled[row, : len(found), 3] = found, 1
        columns = torch.from_numpy(filled).to(self.rows.device).unbind(2)
        made = {"ids": columns[0], "own": columns[1].bool(), "attention_mask": columns[3]}
        return made | ({"token_type_ids": columns[2]} if "token_type_ids" in self._guide[0].inputs else {})

    def answers(self, mixed: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """The teacher's outputs for mixed rows; gradients reach `rows` alone."""
        model, own = self._guide[0].model, mixed["own"]
        table = cast(nn.Embedding, model.get_input_embeddings()).weight.detach()
        known = nn.functional.embedding(mixed["ids"].masked_fill(own, 0), table)
        new = nn.functional.embedding(mixed["ids"].masked_fill(~own, 0), self.rows)
        given = {name: mixed[name] for name in ("attention_mask", "token_type_ids") if name in mixed}
        found = model(inputs_embeds=torch.where(own[..., None], new, known), **given)
        return {name: found[name] for name in outputs}


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def projected_distance(own: Tensor, goal: Tensor, maps: Sequence[Tensor | None], direction: Direction) -> Tensor:
    """|goal - P(own)|^2 / |goal|^2 ("up"), or |own - P(goal)|^2 / |P(goal)|^2 ("down"); P maps each axis by its matrix (to, from)."""
    found, aim = (projected(own, maps), goal) if direction == "up" else (own, projected(goal, maps))
    return (aim - found).square().mean() / aim.square().mean().clamp_min(1e-12)


def projected(tensor: Tensor, maps: Sequence[Tensor | None]) -> Tensor:
    """U W V of a matrix, U w of a vector: each axis by its matrix (to, from); None leaves it as it is."""
    for dim, matrix in enumerate(maps):
        if matrix is not None:
            tensor = (tensor.transpose(dim, -1) @ matrix.T).transpose(dim, -1)
    return tensor


def mixed_row(
    own: np.ndarray, theirs: np.ndarray, segments: np.ndarray, own_starts: np.ndarray, starts: np.ndarray, chosen: np.ndarray
) -> np.ndarray | None:
    """A row with the `chosen` words in the student's pieces: (seq, 3) of id, whether it is the student's, and segment.

    `own_starts` and `starts` say of each piece of the two rows whether it begins a word; `segments` are those of `theirs`. None if the
    two rows have not the same number of words, because one of them was cut off.
    """
    if own_starts.sum() != starts.sum():
        return None
    parts = []
    for mine, other, taken in zip(_words(own_starts), _words(starts), chosen, strict=True):
        ids = own[mine] if taken else theirs[other]
        parts.append(np.stack([ids, np.full_like(ids, int(taken)), np.full_like(ids, segments[other.start])], 1))
    return np.concatenate(parts)


def directions(table: Tensor, count: int) -> Tensor:
    """The `count` directions in which the rows of a table are largest, as columns: (width, count). Their sign is settled."""
    _, vectors = torch.linalg.eigh((table.double().T @ table.double()) / len(table))  # rising
    chosen = vectors[:, -count:].flip(1)
    largest = chosen.abs().argmax(0)
    return (chosen * chosen[largest, torch.arange(chosen.shape[1], device=chosen.device)].sign()).to(table.dtype)


def inherited(table: Tensor, parts: Sequence[tuple[int, ...]]) -> Tensor:
    """The mean of these rows of a table, for each group of them: (groups, width)."""
    places = torch.tensor([place for group in parts for place in group])
    starts = torch.tensor([0, *accumulate(len(group) for group in parts)][:-1])
    return nn.functional.embedding_bag(places, table, starts, mode="mean")


# -- Plumbing ------------------------------------------------------------------------------------------------------------------


def _places(mine: Anatomy, theirs: Anatomy) -> dict[str, tuple[str, Mapping[int, Kind]]]:
    """The student's tensors that have one of those widths, each with the teacher's at the same place and the kind of its axes."""
    kinds, known = (_kinds(anatomy) for anatomy in (mine, theirs))
    layers = dict(zip(mine.layers, (theirs.layers[max(0, place)] for place in partners(mine, theirs)), strict=True))
    found: dict[str, tuple[str, Mapping[int, Kind]]] = {}
    for name, axes in kinds.items():
        layer = next((path for path in layers if name.startswith(f"{path}.")), None)
        source = name if layer is None else layers[layer] + name.removeprefix(layer)
        if known.get(source) == axes:
            found[name] = (source, axes)
    return found


def _kinds(anatomy: Anatomy) -> dict[str, dict[int, Kind]]:
    """The kind of each axis of the tensors that follow a width."""
    found: dict[str, dict[int, Kind]] = {}
    for kind in SHARED_WIDTHS:
        for site in anatomy.of_kind(kind):
            for piece in site.slices:
                found.setdefault(piece.param, {})[piece.dim] = kind
    return found


def _axes(name: str, kinds: Mapping[int, Kind], subject: Subject, ndim: int) -> tuple[str | None, ...]:
    """The projection of each axis: what gives a width and what reads it have one each. A table gives, though its width is its columns."""
    gives = isinstance(subject.model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
    return tuple(f"{kinds[dim].name}_{'out' if dim == 0 or gives else 'in'}" if dim in kinds else None for dim in range(ndim))


def _widths(anatomy: Anatomy, kind: Kind) -> set[int]:
    """The lengths of the axes that follow this kind of unit."""
    return {site.size * piece.unit * piece.parts for site in anatomy.of_kind(kind) for piece in site.slices}


def _named(kind: Kind) -> str:
    return "width of all heads" if kind is Kind.HEADS else str(kind)


def _table(anatomy: Anatomy) -> str:
    """The parameter of the word table."""
    return f"{anatomy.matrices['embeddings.word'].module}.weight"


def _real(ids: Tensor, mask: Tensor) -> np.ndarray:
    return ids[mask.bool()].cpu().numpy()


def _words(starts: np.ndarray) -> list[slice]:
    """The places of each word, by the pieces that begin one."""
    edges = [*np.flatnonzero(starts).tolist(), len(starts)]
    return [slice(begin, end) for begin, end in pairwise(edges)]
