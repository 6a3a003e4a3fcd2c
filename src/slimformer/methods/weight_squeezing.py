"""Weight squeezing: each matrix of a cut model is a learned combination of the rows and columns of its teacher's whole matrix.

Paper: Chumachenko, Gavrilov, Balagansky, Kalaidin: Weight Squeezing: Reparameterization for Knowledge Transfer and Model
Compression (2020), sections 3.1 and 3.2 for the gated kind.

Idea: A cut throws rows and columns away. Here a matrix of the small model is L W R, with the teacher's W whole and frozen, and L and
R learned: units that were cut can live on as parts of those that stay. Only L, R, biases, norms and tables train.

Differs: L and R begin as the selection that the cut made, so that training starts with the cut model itself; the paper's begin at
random, and its student has no cut behind it. What a method repaired after its cut (`fisher`) is added, frozen. Word tables, biases
and norms are not mapped: they train as they are.

Choose when: hidden units or many heads and neurons were cut at once and little text is there to recover: the teacher's numbers are
still in reach. Compare it with plain `distillation` for the same steps; both may stand in one stage.

Cost: for a matrix (o, i) of a teacher's (O, I) o O I + o I i more operations in each step, and as many numbers as L and R have.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Matrix
from slimformer.core.plan import Decision, Plan
from slimformer.errors import TargetError
from slimformer.hooks.weights import changed_weights
from slimformer.methods.base import Context, Effects, Method, State

_log = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class WeightSqueezing(Method):
    """`gated`: the matrix is a mean of L W R and of the small model's own, with one learned weight for each matrix; its own trains
    too (the paper's gated weight squeezing).

    The stage needs a teacher of which the model was cut: matrices of the same name, with the units that are left among its own.

    Example:
        >>> from slimformer import Train
        >>> Train(methods=(WeightSqueezing(gated=True),)).methods[0].effects().needs_teacher
        True
    """

    gated: bool = False

    def effects(self) -> Effects:
        return Effects(rewrites=True, refills=True, needs_teacher=True)

    def attach(self, context: Context) -> State:
        return _State(context, mapped(context), self.gated)

    def report(self, state: State) -> Mapping[str, float]:
        state = cast(_State, state)
        shares = [torch.sigmoid(each.gate).item() for each in state.each() if each.gate is not None]
        return {"mapped": sum(shares) / len(shares)} if shares else {}

    def decide(self, state: State, context: Context) -> Decision:
        state = cast(_State, state)
        with torch.no_grad():
            own = dict(context.model.named_parameters())
            return Decision(weights={name: each(own[name]) for name, each in zip(state.names, state.each(), strict=True)})


# -- State ---------------------------------------------------------------------------------------------------------------------


class _State(State):
    """The maps, on the model while this lasts."""

    def __init__(self, context: Context, places: Mapping[str, tuple[Tensor, Tensor]], gated: bool) -> None:
        super().__init__()
        assert context.teacher is not None
        theirs, own = (dict(model.named_parameters()) for model in (context.teacher.model, context.model))
        self.names = list(places)
        self.maps = nn.ModuleList(
            _Map(theirs[name].detach().float(), own[name].detach().float(), *places[name], gated=gated) for name in places
        )
        stack = ExitStack()
        for name in () if gated else self.names:
            stack.callback(own[name].requires_grad_, own[name].requires_grad)
            own[name].requires_grad_(False)
        stack.enter_context(changed_weights(context.model, dict(zip(self.names, self.each(), strict=True))))
        self.on_close(stack.close)

    def each(self) -> list[_Map]:
        return [cast(_Map, item) for item in self.maps]


class _Map(nn.Module):
    """L and R of one matrix, the teacher's matrix between them, and what the model's own had beside the selection at first."""

    def __init__(self, weight: Tensor, own: Tensor, rows: Tensor, columns: Tensor, *, gated: bool) -> None:
        super().__init__()
        self.weight = (weight,)  # a tuple, so that it is not saved with every checkpoint: it is the teacher's
        out, into = weight.shape
        self.left = nn.Parameter(selection(rows, out).to(weight.device))  # (o, O)
        self.right = nn.Parameter(selection(columns, into).T.contiguous().to(weight.device))  # (I, i)
        self.repair: Tensor  # (o, i), frozen: 0 after a plain cut
        self.register_buffer("repair", own - weight[rows.to(weight.device)][:, columns.to(weight.device)])
        self.gate = nn.Parameter(torch.zeros((), device=weight.device)) if gated else None

    def forward(self, own: Tensor) -> Tensor:
        with torch.autocast(own.device.type, enabled=False):
            value = self.left @ self.weight[0].to(self.left.device) @ self.right + self.repair
            if self.gate is None:
                return value
            share = torch.sigmoid(self.gate)
            return share * value + (1 - share) * own


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def selection(places: Tensor, size: int) -> Tensor:
    """The matrix that takes these of `size` rows: (places, size), a 1 in each row."""
    return torch.nn.functional.one_hot(places, size).float()


def mapped(context: Context) -> dict[str, tuple[Tensor, Tensor]]:
    """The encoder's matrices that were cut, by parameter, with the teacher's rows and columns that they are made of.

    TargetError if the teacher is not what the model was cut from.
    """
    assert context.teacher is not None
    mine, theirs = context.anatomy, context.teacher.anatomy
    found = {}
    for matrix in mine.encoder_matrices():
        source = theirs.matrices.get(matrix.id)
        if source is None or not (source.dense and matrix.dense) or source.shape == matrix.shape:
            continue
        rows, columns = (_places(theirs, source, dim, context.plan, context.teacher_plan) for dim in (0, 1))
        if (len(rows), len(columns)) != matrix.shape:
            raise TargetError(
                f"matrix '{matrix.id}' is {matrix.shape[0]} by {matrix.shape[1]}, and the plan takes {len(rows)} by {len(columns)} of "
                "the teacher's.",
                help="weight_squeezing needs the teacher that the model was cut from.",
            )
        found[f"{matrix.module}.weight"] = (rows, columns)
    if not found:
        _log.info(
            "weight_squeezing: no matrix is smaller than the teacher's, so none is mapped. Cut units in an earlier stage."
        )
    return found


# -- Plumbing ------------------------------------------------------------------------------------------------------------------


def _places(theirs: Anatomy, matrix: Matrix, dim: int, plan: Plan, teacher_plan: Plan) -> Tensor:
    """The rows (`dim` 0) or columns of the teacher's matrix that the cut left."""
    for site in theirs.sites.values():
        for piece in site.slices:
            if piece.param == f"{matrix.module}.weight" and piece.dim == dim:
                known = teacher_plan.keep.get(site.id, range(site.size))
                place = {origin: unit for unit, origin in enumerate(known)}
                origins = plan.keep.get(site.id, tuple(known))
                lacking = [origin for origin in origins if origin not in place]
                if lacking:
                    raise TargetError(
                        f"the teacher lacks unit {lacking[0]} of '{site.id}', which the model has.",
                        help="weight_squeezing needs the teacher that the model was cut from.",
                    )
                return torch.tensor(piece.rows(site.size, [place[origin] for origin in origins]), dtype=torch.long)
    return torch.arange(matrix.shape[dim])
