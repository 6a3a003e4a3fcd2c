"""Structured pruning by a reweighted group lasso: training drives whole groups of weights to zero, then the largest stay.

Paper: Li, Kong, Zhang, Li, Li, Liu, Ding: Efficient Transformer-based Large Scale Language Representations using
Hardware-friendly Block Structured Pruning (Findings of EMNLP 2020).

Idea: A penalty on the norm of each group of weights, divided by its own norm from time to time, so that small groups shrink to
zero and large ones are left alone. The paper's three phases are stages: this method in a `train` stage is the reweighted
training (1) and, at its end, the hard prune (2); the next `train` stage is the retraining (3), with `keep_zeros` if zeros were
left.

Differs: beta is renewed at shares of the training, so that it changes in short runs too (the authors' code: at epochs 4, 8, 12,
16). The penalty is a mean over weights, so that `strength` means the same for any block or model; epsilon is added to the root
mean square of a group (theirs: the same 1e-3, to its L2 norm). Counts are exact, not percentiles. `block` is a side in weights
(theirs: a number of blocks, 8). `units` and `distillation` beside it (their runs have the task's loss alone) are ours: units
are groups closed under the network. The paper may square the norm in beta, its text was not at hand; the authors' code does
not, nor do we.

Choose when: weights should train while they are chosen among: then `units`, which leave a smaller dense model. The other groups
are for storage: no dense kernel skips their zeros.

Cost: a training run, with one norm over the encoder's weights in each step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Kind, Matrix, Site, Slice
from slimformer.core.budget import allocate
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.errors import RecipeError, TargetError
from slimformer.hooks.weights import expand, grid_of, liveliness
from slimformer.methods._schedules import crosses
from slimformer.methods.base import Context, Effects, Method, Progress, State, Step, Zeros
from slimformer.rules import Count, Positive, Share

Grouping = Literal["units", "rows", "columns", "blocks", "block_rows", "block_columns"]


@final
@dataclass(frozen=True)
class GroupLasso(Method):
    """`groups`: the weights that go together. `keep`: share of the dense `cost` (units) or of the weights (all others).

    - `block`: side of a block in weights; it must divide every matrix.
    - `strength`: about what the penalty adds to the loss whenever beta is new. The paper's 1e-4 per group comes to 17 on six
      layers of width 384 and to 66 on BERT-base. An Adam step moves a weight by the learning rate at most: groups only reach
      zero if rate times steps is as large as weights are (about 0.05).
    - `reweight_every`: share of the training after which beta is renewed.
    - `over`: whether each matrix keeps the same share, as in the paper, or the largest groups of the whole model stay. Units
      always compete over the model.

    Example:
        >>> from slimformer import Train
        >>> Train(epochs=5, methods=(GroupLasso(keep=0.4),)).cuts
        True
    """

    groups: Grouping = "units"
    keep: Share = 0.5
    cost: Literal["macs", "parameters", "latency"] = "macs"
    block: Count = 32
    strength: Positive = 30.0
    reweight_every: Share = 0.2
    epsilon: Positive = 1e-3  # added to a group's root mean square when beta is renewed
    over: Literal["matrix", "model"] = "matrix"
    neuron_multiple: Count = 16
    sublayers: bool = False  # the size of weights tells little about what a whole sublayer does

    def effects(self) -> Effects:
        return Effects(cuts=True, zeros=Zeros.NONE if self.groups == "units" else Zeros.RESULT)

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        if self.groups != "units":
            grids = tiled(anatomy, self.groups, self.block)
            _check_share([(down * across, math.prod(matrix.shape)) for matrix, (down, across) in grids], self.keep, self.over)
        elif cost is not None:
            self.choose(anatomy, cost, {name: np.zeros(len(curve) - 1) for name, curve in cost.curves.items()})

    def attach(self, context: Context) -> State:
        self.check(context.anatomy, context.cost)
        groups = groups_of(context.model, context.anatomy, self.groups, self.block)
        if not any(piece.tensor.requires_grad for item in groups for piece in item.pieces):
            raise RecipeError("group_lasso shrinks the encoder's weights, which this stage freezes.", help="freeze less.")
        return _State(groups, self.epsilon)

    def penalty(self, state: State, step: Step) -> Tensor | None:
        """strength * the mean over weights of beta * rms, which is near 1 when beta is new."""
        state = cast(_State, state)
        parts = [
            (state.beta(index) * item.rms()).sum() * (item.size / state.weights)
            for index, item in enumerate(state.groups_of_weights)
        ]
        return self.strength * torch.stack(parts).sum()

    def advance(self, state: State, progress: Progress) -> None:
        if crosses(progress, self.reweight_every):
            cast(_State, state).reweight()

    @torch.no_grad()
    def report(self, state: State) -> Mapping[str, float]:
        """`quiet`: share of the groups below a tenth of their matrix's or site's mean."""
        sizes = [item.rms() for item in cast(_State, state).groups_of_weights]
        quiet = torch.stack([(size < 0.1 * size.mean()).sum() for size in sizes]).sum()
        return {"quiet": float(quiet) / sum(len(size) for size in sizes)}

    @torch.no_grad()
    def decide(self, state: State, context: Context) -> Decision:
        groups = cast(_State, state).groups_of_weights
        if self.groups == "units":
            squares = {item.id: (item.rms().double().square() * item.size).cpu().numpy() for item in groups}
            return Decision(self.choose(context.anatomy, context.cost, squares))
        stay = largest_of_each(groups, self.keep) if self.over == "matrix" else largest_of_all(groups, self.keep)
        weights = {}
        for item in groups:
            (piece,) = item.pieces
            mask = stay[item.id].reshape(piece.view[0], piece.view[2]).to(piece.tensor)
            weights[f"{context.anatomy.matrices[item.id].module}.weight"] = piece.tensor * expand(mask, piece.tensor.shape)
        return Decision(_idle(context, weights), weights=weights)

    def choose(self, anatomy: Anatomy, cost: Cost, squares: Mapping[str, np.ndarray]) -> Plan:
        """Within the budget, the units with the largest sum of squares, so that as little as can be is taken away.

        Raises TargetError if `keep` is out of reach.
        """
        budget, multiple = self.keep * cost.dense, self.neuron_multiple
        return allocate(anatomy, squares, cost, budget, neuron_multiple=multiple, sublayers=self.sublayers)


# -- State ---------------------------------------------------------------------------------------------------------------------


class _State(State):
    """beta of each group, as buffers, so that a resumed run knows them."""

    def __init__(self, groups: Sequence[Groups], epsilon: float) -> None:
        super().__init__()
        self.groups_of_weights = list(groups)
        self.weights = sum(item.count * item.size for item in groups)
        self.epsilon = epsilon
        for index, item in enumerate(groups):
            self.register_buffer(f"beta_{index}", torch.zeros(item.count, device=item.pieces[0].tensor.device))
        self.reweight()

    def beta(self, index: int) -> Tensor:
        return cast(Tensor, getattr(self, f"beta_{index}"))

    @torch.no_grad()
    def reweight(self) -> None:
        """beta = 1 / (rms + epsilon), from the weights as they are."""
        for index, item in enumerate(self.groups_of_weights):
            self.beta(index).copy_(1 / (item.rms() + self.epsilon))


@dataclass(frozen=True)
class Piece:
    """A tensor that groups have weights in: seen as `view`, each group owns all that lies along the axes `within`."""

    module: nn.Module
    name: str
    view: tuple[int, ...]
    within: tuple[int, ...]

    @property
    def tensor(self) -> Tensor:
        return cast(Tensor, getattr(self.module, self.name))

    def norms(self) -> Tensor:
        """L2 norm of each group's part: (groups,)."""
        return torch.linalg.vector_norm(self.tensor.view(self.view), dim=self.within).flatten()


@dataclass(frozen=True)
class Groups:
    """The groups of one matrix, or of one site: `count` of them, of `size` weights each."""

    id: str  # of the matrix or site
    pieces: tuple[Piece, ...]
    count: int
    size: int

    def rms(self) -> Tensor:
        """The root of each group's mean square: its L2 norm, free of its size; (groups,)."""
        squares = torch.stack([piece.norms().square() for piece in self.pieces]).sum(0) / self.size
        return squares.clamp_min(1e-24).sqrt()  # the slope of a root at 0 is no number


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def groups_of(model: nn.Module, anatomy: Anatomy, grouping: Grouping, block: int) -> list[Groups]:
    """All groups of a model's encoder; RecipeError if a block does not divide a matrix.

    A unit's group is all that goes with it: a W1 row, its bias, a W2 column; a head's rows and biases in Q, K, V, its columns
    in O. Embeddings are never cut (the authors' code penalised RoBERTa's by accident).
    """
    if grouping == "units":
        return [_units(model, site) for site in anatomy.sites.values() if site.kind is not Kind.SUBLAYER]
    groups = []
    for matrix, (down, across) in tiled(anatomy, grouping, block):
        rows, columns = tile(matrix.shape, grouping, block)
        piece = Piece(model.get_submodule(matrix.module), "weight", (down, rows, across, columns), (1, 3))
        groups.append(Groups(matrix.id, (piece,), down * across, rows * columns))
    return groups


def tiled(anatomy: Anatomy, grouping: Grouping, block: int) -> list[tuple[Matrix, tuple[int, int]]]:
    """The encoder's matrices, and how many groups each has along its axes."""
    matrices = anatomy.encoder_matrices()
    return [(matrix, grid_of(matrix.shape, tile(matrix.shape, grouping, block), matrix.id)) for matrix in matrices]


def tile(shape: tuple[int, int], grouping: Grouping, block: int) -> tuple[int, int]:
    """Rows and columns of one group in a matrix (out, in)."""
    rows, columns = shape
    return {
        "rows": (1, columns),
        "columns": (rows, 1),
        "blocks": (block, block),
        "block_rows": (1, block),  # a row's part inside a block: the paper's pattern
        "block_columns": (block, 1),
    }[grouping]


def largest_of_each(groups: Sequence[Groups], keep: float) -> dict[str, Tensor]:
    """Per matrix, which groups stay: exactly the share `keep`, rounded down to whole groups."""
    stay = {}
    for item in groups:
        order = _order(item.rms())[: math.floor(keep * item.count + 1e-9)]
        stay[item.id] = torch.zeros(item.count, dtype=torch.bool, device=order.device).index_fill(0, order, True)
    return stay


def largest_of_all(groups: Sequence[Groups], keep: float) -> dict[str, Tensor]:
    """Which groups stay when all are ranked together: as many of the largest as fit in the share `keep` of the weights."""
    rms = torch.cat([item.rms() for item in groups])
    sizes = torch.cat([torch.full((item.count,), item.size, device=rms.device) for item in groups])
    order = _order(rms)
    fits = sizes[order].cumsum(0) <= math.floor(keep * int(sizes.sum()) + 1e-9)
    chosen = torch.zeros(len(rms), dtype=torch.bool, device=rms.device).index_fill(0, order[fits], True)
    return dict(zip([item.id for item in groups], chosen.split([item.count for item in groups]), strict=True))


# -- Plumbing ------------------------------------------------------------------------------------------------------------------


def _units(model: nn.Module, site: Site) -> Groups:
    pieces = tuple(_piece(model, site, item) for item in site.slices)
    return Groups(site.id, pieces, site.size, sum(piece.tensor.numel() for piece in pieces) // site.size)


def _piece(model: nn.Module, site: Site, item: Slice) -> Piece:
    path, _, name = item.param.rpartition(".")
    module = model.get_submodule(path)
    shape = tuple(getattr(module, name).shape)
    view = (*shape[: item.dim], item.parts, site.size, item.unit, *shape[item.dim + 1 :])
    return Piece(module, name, view, tuple(axis for axis in range(len(view)) if axis != item.dim + 1))


def _check_share(matrices: Sequence[tuple[int, int]], keep: float, over: str) -> None:
    """TargetError if a matrix, or the model, could not keep even one group. `matrices`: groups and weights of each."""
    total = sum(weights for _, weights in matrices)
    least = max(1 / count if over == "matrix" else weights / count / total for count, weights in matrices)
    if keep < least:
        raise TargetError(
            f"keep is {keep:.4g}, and one group alone is {least:.4g} of the weights.",
            help=f"ask for {math.ceil(least * 1000) / 1000:g} or more, or take smaller groups.",
        )


def _order(rms: Tensor) -> Tensor:
    """Places of the groups, the largest first, equal ones by index."""
    return torch.argsort(rms, descending=True, stable=True)


def _idle(context: Context, weights: Mapping[str, Tensor]) -> Plan:
    """The units that zeros have made free to cut go; one per site stays, since a skipped sublayer is not a zero one."""
    values = {name: parameter.abs() for name, parameter in context.model.named_parameters()}
    values |= {name: value.abs() for name, value in weights.items()}
    keep = {}
    for name, bar in liveliness(context.anatomy, values).items():
        alive = tuple(unit for unit, value in enumerate(bar.tolist()) if value > 0)
        if len(alive) < len(bar):
            keep[name] = alive or (0,)
    return Plan(keep)
