"""Structured pruning by a reweighted group lasso: training drives whole groups of weights to zero, then the largest stay.

Paper: Li, Kong, Zhang, Li, Li, Liu, Ding: Efficient Transformer-based Large Scale Language Representations using
Hardware-friendly Block Structured Pruning (Findings of EMNLP 2020).

Idea: A penalty on the norm of each group of weights, divided by its own norm from time to time, so that small groups shrink to
zero and large ones are left alone. The paper's three phases are stages: this method in a `train` stage is the reweighted
training (1) and, at its end, the hard prune (2); the next `train` stage is the retraining (3), with `keep_zeros` if zeros were
left.

Differs: beta is renewed at shares of the training, so that it changes in short runs too (the authors' code: at epochs 4, 8, 12,
16). The penalty is a mean over weights, so that `strength` means the same for any block or model. Counts are exact, not
percentiles. `units` and `distillation` beside it (their runs have the task's loss alone) are ours: units are groups closed
under the network. Of the tables and the head, which their profiles of 2020 prune too, only the word table can be. The paper may
square the norm in beta, its text was not at hand; the authors' code does not, nor do we. `GroupLasso` tells of epsilon.

Choose when: weights should train while they are chosen among: then `units`, which leave a smaller dense model. The other groups
are for storage: no dense kernel skips their zeros.

Cost: a training run, with one norm over the encoder's weights in each step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Matrix, Site, Slice
from slimformer.core.budget import allocate
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.errors import RecipeError, TargetError, nearest
from slimformer.hooks.weights import expand, grid_of, liveliness
from slimformer.methods._schedules import crosses
from slimformer.methods.base import Context, Effects, Method, Progress, State, Step, Zeros
from slimformer.rules import Count, Positive, Share, Shares

BLOCK = 32  # side of a block in weights, if nothing is said
WORDS = "embeddings.word"  # the id of the word table
NO_TABLE = "leave embeddings out."

Grouping = Literal["units", "rows", "columns", "blocks", "block_rows", "block_columns"]


@final
@dataclass(frozen=True)
class GroupLasso(Method):
    """`groups`: the weights that go together. `keep`: share of the dense `cost` (units) or of the weights (all others).

    - `block`: side of a block in weights; it must divide every matrix.
    - `blocks_per_matrix`: instead of `block`, for "block_rows" and "block_columns": into how many blocks the columns or rows of
      each matrix are split, whatever its width. The authors' runs of 2020 have 8: at width 384 blocks are 48 wide, in the
      second matrix of the FFN 192.
    - `shares`: what stays of some matrices instead of the common share, such as {"encoder.0.*": 0.8, "*.ffn_in": 0.4}. They are
      named as in plans ("encoder.0.query") or by a pattern; a name goes before a pattern. With 1 a matrix is left alone, by the
      penalty too. The authors' profiles count what goes: 0.6 there is 0.4 here.
    - `embeddings`: whether the word table is penalised and pruned too, as in those profiles. A stage that freezes it is
      refused; `keep_zeros` holds its zeros.
    - `strength`: about what the penalty adds to the loss whenever beta is new. The paper's 1e-4 per group of 8 blocks comes to
      17 on six layers of width 384 and to 66 on BERT-base, with the word table to 41 and 91. An Adam step moves a weight by the
      learning rate at most: groups only reach zero if rate times steps is as large as weights are (about 0.05).
    - `reweight_every`: share of the training after which beta is renewed.
    - `epsilon`: added to a group's root mean square when beta is renewed. Theirs is added to its L2 norm, which is the root of
      the group's size times as large: with the same 1e-3, ours stops beta from growing at norms as many times larger, 10 for 96
      weights, and pulls less on groups that are nearly zero. Divide by that root for theirs.
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
    block: Count = BLOCK
    blocks_per_matrix: Count | None = None
    shares: Shares | None = None
    embeddings: bool = False
    strength: Positive = 30.0
    reweight_every: Share = 0.2
    epsilon: Positive = 1e-3
    over: Literal["matrix", "model"] = "matrix"
    neuron_multiple: Count = 16
    sublayers: bool = False  # the size of weights tells little about what a whole sublayer does

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shares is not None:  # in one order, so that stages with the same shares have the same digest
            object.__setattr__(self, "shares", dict(sorted(self.shares.items())))
        if self.blocks_per_matrix is not None and self.groups not in ("block_rows", "block_columns"):
            raise ValueError(f"blocks_per_matrix needs groups: block_rows or block_columns, got {self.groups}")
        if self.blocks_per_matrix is not None and self.block != BLOCK:
            raise ValueError(f"blocks_per_matrix settles the block: leave out block, got {self.block}")
        for name in ("shares", "embeddings"):
            if getattr(self, name) and self.groups == "units":
                raise ValueError(f"{name} needs groups of single matrices: units compete over the whole model")
        if self.shares is not None and self.over == "model":
            raise ValueError("shares needs over: matrix: over the model the largest groups stay wherever they are")

    def effects(self) -> Effects:
        return Effects(cuts=True, uneven=True, zeros=Zeros.NONE if self.groups == "units" else Zeros.RESULT)

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        if self.groups != "units":
            _check_shares(tiled(anatomy, self), self.over)
        elif cost is not None:
            self.choose(anatomy, cost, {name: np.zeros(len(curve) - 1) for name, curve in cost.curves.items()})

    def attach(self, context: Context) -> State:
        self.check(context.anatomy, context.cost)
        groups = groups_of(context.model, context.anatomy, self)
        frozen = any(item.id == WORDS and not item.pieces[0].tensor.requires_grad for item in groups)
        if frozen:
            raise RecipeError(
                "group_lasso is to shrink the word table, which this stage freezes.",
                help="freeze nothing, or set embeddings: false.",
            )
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
        stay = largest_of_each(groups) if self.over == "matrix" else largest_of_all(groups, self.keep)
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
    """The groups of one matrix, or of one site: `count` of them, of `size` weights each; of a matrix the `share` stays."""

    id: str  # of the matrix or site
    pieces: tuple[Piece, ...]
    count: int
    size: int
    share: float = 1.0

    def rms(self) -> Tensor:
        """The root of each group's mean square: its L2 norm, free of its size; (groups,)."""
        squares = torch.stack([piece.norms().square() for piece in self.pieces]).sum(0) / self.size
        return squares.clamp_min(1e-24).sqrt()  # the slope of a root at 0 is no number


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def groups_of(model: nn.Module, anatomy: Anatomy, method: GroupLasso) -> list[Groups]:
    """All groups of a model; RecipeError if a block does not divide a matrix, or a name of `shares` fits none.

    A unit's group is all that goes with it: a W1 row, its bias, a W2 column; a head's rows and biases in Q, K, V, its columns
    in O.
    """
    if method.groups == "units":
        return [_units(model, site) for site in anatomy.units]
    groups = []
    for matrix, (down, across), share in tiled(anatomy, method):
        rows, columns = matrix.shape[0] // down, matrix.shape[1] // across
        piece = Piece(model.get_submodule(matrix.module), "weight", (down, rows, across, columns), (1, 3))
        groups.append(Groups(matrix.id, (piece,), down * across, rows * columns, share))
    return groups


def tiled(anatomy: Anatomy, method: GroupLasso) -> list[tuple[Matrix, tuple[int, int], float]]:
    """The matrices that may lose groups, how many groups each has along its axes, and the share that stays."""
    matrices = {matrix.id: matrix for matrix in anatomy.encoder_matrices()}
    if method.embeddings:
        matrices[WORDS] = _word_table(anatomy)
    elif WORDS in (method.shares or {}):
        raise RecipeError(f"shares: {WORDS} has one, and the word table is left alone.", help="set embeddings: true.")
    own = shares_of(method.shares or {}, matrices)
    if own and all(own.get(name) == 1 for name in matrices):
        raise RecipeError("shares: every matrix would be left alone.", help="give some of them a share below 1.")
    return [
        (matrix, grid_of(matrix.shape, tile(matrix, method), name), own.get(name, method.keep))
        for name, matrix in matrices.items()
        if own.get(name) != 1
    ]


def tile(matrix: Matrix, method: GroupLasso) -> tuple[int, int]:
    """Rows and columns of one group in a matrix (out, in)."""
    rows, columns = matrix.shape
    match method.groups:
        case "rows":
            return 1, columns
        case "columns":
            return rows, 1
        case "block_rows":  # a row's part inside a block: the paper's pattern
            return 1, _side(matrix, 1, method)
        case "block_columns":
            return _side(matrix, 0, method), 1
    return method.block, method.block


def shares_of(shares: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """The share of each of these names that has one: by the name itself, else by the one pattern that fits it.

    Raises RecipeError for a key that fits no name, and for two patterns that fit one.
    """
    fitting = {name: [key for key in shares if fnmatchcase(name, key)] for name in names}
    for key in shares:
        if not any(key in keys for keys in fitting.values()):
            parts = [name.rpartition(".") for name in fitting]
            patterns = {pattern for front, _, last in parts for pattern in (f"{front}.*", f"*.{last}")}
            raise RecipeError(f"shares: no matrix fits '{key}'.", help=nearest(key, patterns if "*" in key else fitting))
    for name, keys in fitting.items():
        if len(keys) > 1 and name not in shares:
            raise RecipeError(
                f"shares: '{keys[0]}' and '{keys[1]}' both fit {name}.",
                help="give it a share under its own name, or narrow one.",
            )
    return {name: shares[name if name in shares else keys[0]] for name, keys in fitting.items() if keys}


def largest_of_each(groups: Sequence[Groups]) -> dict[str, Tensor]:
    """Per matrix, which groups stay: exactly its share, rounded down to whole groups."""
    stay = {}
    for item in groups:
        order = _order(item.rms())[: math.floor(item.share * item.count + 1e-9)]
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


def _check_shares(matrices: Sequence[tuple[Matrix, tuple[int, int], float]], over: str) -> None:
    """TargetError if a matrix, or the model, could not keep even one group."""
    total = sum(math.prod(matrix.shape) for matrix, _, _ in matrices)
    parts = [(1 if over == "matrix" else math.prod(matrix.shape) / total) / math.prod(grid) for matrix, grid, _ in matrices]
    short = [(part, share, matrix.id) for part, (matrix, _, share) in zip(parts, matrices, strict=True) if share < part]
    if short:
        least, share, name = max(short)
        raise TargetError(
            f"keep is {share:.4g}, and one group alone is {least:.4g} of the weights ({name}).",
            help=f"ask for {math.ceil(least * 1000) / 1000:g} or more, or take smaller groups.",
        )


def _side(matrix: Matrix, axis: int, method: GroupLasso) -> int:
    """The length of a block along an axis; RecipeError if the blocks that are to lie along it do not divide it."""
    count, length = method.blocks_per_matrix, matrix.shape[axis]
    if count is not None and length % count:
        lines = "columns" if axis else "rows"
        raise RecipeError(
            f"{count} blocks do not divide the {length} {lines} of {matrix.id}.",
            help="choose a number that divides every matrix.",
        )
    return method.block if count is None else length // count


def _word_table(anatomy: Anatomy) -> Matrix:
    """RecipeError if it is no dense table of its own."""
    table = anatomy.matrices.get(WORDS)
    if table is None or not table.dense or table.tied is not None:
        raise RecipeError("this model's word table cannot be pruned: it is factored, or tied to another matrix.", help=NO_TABLE)
    return table


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
