"""Low rank: each matrix becomes two thin ones, where the loss feels it least, with a rank for each by one budget.

Paper: Wang, Zheng, Wan, Zhang: SVD-LLM (ICLR 2025), section 3.1, for whitening by the inputs; Hsu, Hua, Chang, Lou, Shen, Jin:
Language Model Compression with Weighted Low-Rank Factorization (ICLR 2022), for weighing by the loss; Lan et al.: ALBERT (ICLR 2020),
section 3.1, for the table.

Idea: The nearest matrix of rank r in the plain norm is close in directions that no input has. With S S' the second moment of the inputs,
the best one for the outputs is that of W S, times the inverse of S. With T T' the second moment of the loss's gradients at the outputs,
T' W S is cut instead, and its singular values tell what the loss feels of each direction: they can be compared from matrix to matrix, and
one search chooses all ranks.

Differs: SVD-LLM weighs inputs alone and gives all matrices one ratio; Hsu et al. weigh rows of the matrix by one number each,
where both sides have a whole moment here (the two factors of the Fisher information that K-FAC keeps). Inputs count less where the
loss does not read the token. Moments are about the mean, which the bias takes over, so that a constant part costs no rank. A matrix
may stay plain. The inputs of a word table are its words: each row counts as often as its word was read, and once more.

Choose when: minutes matter and single heads and neurons are not to go, or after a cut, for the rest. Two thin products may be no faster
than a plain one: with `cost: latency` a matrix becomes two only where the latency table says that this pays. Distil afterwards.

Cost: one pass with gradients over `examples`; a decomposition of each matrix, twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Matrix, Role
from slimformer.core.asking import positions_unheard
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.errors import PlanError, TargetError
from slimformer.forms._nearest import energies, nearest_factors
from slimformer.forms.base import DENSE, Form
from slimformer.forms.low_rank import LowRank, most_rank
from slimformer.hooks.feeding import unpadded
from slimformer.methods._forming import best_forms, room_for
from slimformer.methods.base import Context, Effects, Method, State
from slimformer.rules import Count, Positive, Share

KEEP_IF_UNSAID = 0.5  # of the dense cost, if neither a rank nor a share is given
LEAST_WEIGHT = 0.02  # the least weight of a token, as in `fisher`: later layers may still read it


@final
@dataclass(frozen=True)
class LowRankFactors(Method):
    """`keep`: share of the dense `cost` that may remain, 0.5 if not said; or `rank`: the same for every matrix that it makes smaller.

    - `cost`: with "latency", of encoders, the milliseconds of a product are a line through the times of feed-forwards that were measured:
      so much for the call, so much for each number. A thin pair that is no faster than its matrix is never taken.
    - `embedding`: numbers that each word keeps of its own; None leaves the word table plain.
    - `weighted`: by what a matrix is compared with its approximation: what the `loss` feels of it, its outputs on real
      `inputs`, or `none`, its numbers.
    - `biases`: whether a bias takes over what is lost of the mean input.
    - `multiple`: ranks are multiples of it, as matrix kernels like.
    - `ridge`: added to the diagonals of the moments, as a share of their mean.

    Example:
        >>> from slimformer import Calibrate
        >>> Calibrate(LowRankFactors(keep=0.6, embedding=128)).method.effects().factors_table
        True
    """

    keep: Share | None = None
    cost: Literal["macs", "parameters", "latency"] = "macs"
    rank: Count | None = None
    embedding: Count | None = None
    weighted: Literal["loss", "inputs", "none"] = "loss"
    biases: bool = True
    examples: Count = 2048
    multiple: Count = 8
    ridge: Positive = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and (self.keep is not None or self.cost != "macs"):
            raise ValueError(f"rank {self.rank} leaves nothing to search: leave out keep and cost, or rank")

    def effects(self) -> Effects:
        # with a share of 1 the word table alone is factored: the matrices, and zeros in them, stay as they are
        refills = self.rank is not None or self.share < 1
        searched = self.rank is None and self.share < 1
        return Effects(factors=True, factors_table=self.embedding is not None, uneven=searched, one_shot=True, refills=refills)

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        forms = self._given(anatomy)
        Plan(forms=forms).check(anatomy)
        if self.cost == "latency" and len(anatomy.stacks) > 1:
            raise TargetError(
                "low_rank cannot count the latency of a model with a decoder: its products are computed at other times.",
                help="count macs or parameters.",
            )
        if self.rank is None and cost is not None:
            costs = [_costs(matrix, self._choices(matrix), cost) for matrix in _plain(anatomy)]
            room_for(costs, self.share, anatomy, cost, forms)

    def foresee(self, anatomy: Anatomy, cost: Cost | None) -> Plan | None:
        return Plan(forms=self._given(anatomy)) if self.rank is not None or self.share == 1 else None

    def decide(self, state: State, context: Context) -> Decision:
        forms = self._given(context.anatomy)
        moments = seen(context, self) if self.weighted != "none" else {}
        if self.rank is None:
            forms |= self._searched(context, forms, moments)
        plan = Plan(forms=forms)
        plan.check(context.anatomy)
        weights: dict[str, Tensor] = {}
        for name, form in plan.forms.items():
            matrix = context.anatomy.matrices[name]
            rank, moment = cast(LowRank, form).rank, moments.get(name, Moments())
            parts = _parts(context, matrix, moment.mean, *weighed_factors(_weight(context, matrix), rank, moment, self.ridge))
            weights |= {f"{matrix.module}.{part}": value for part, value in parts.items()}
        faster = "faster by the latency table" if self.cost == "latency" else "fewer operations"
        return Decision(plan, weights=weights, notes=tuple(_notes(context.anatomy, plan, faster)))

    @property
    def share(self) -> float:
        """The share of the dense cost that may remain, if there is no rank for all."""
        return KEEP_IF_UNSAID if self.keep is None else self.keep

    def _given(self, anatomy: Anatomy) -> dict[str, Form]:
        """The forms that the options name, by matrix; PlanError if there is nothing that they could make smaller."""
        forms: dict[str, Form] = {}
        if self.embedding is not None:
            tables = [matrix for matrix in anatomy.matrices.values() if matrix.role is Role.EMBEDDING and matrix.dense]
            if not tables:
                raise PlanError(
                    f"embedding is {self.embedding}, but there is no word table to factor: it is factored already.",
                    help="leave embedding out.",
                )
            forms = {matrix.id: LowRank(self.embedding) for matrix in tables}
        plain = _plain(anatomy)
        if not plain and (self.rank is not None or self.share < 1):
            raise PlanError(
                "no matrix can be made of low rank: none is plain any more, or each is tied to another.",
                help="factor once, and before that leave the layers their own weights.",
            )
        if self.rank is not None:
            forms |= {matrix.id: LowRank(self.rank) for matrix in plain if self.rank <= most_rank(matrix.shape)}
            if not any(matrix.id in forms for matrix in plain):
                most = max(most_rank(matrix.shape) for matrix in plain)
                raise PlanError(
                    f"rank {self.rank} pays for no matrix: two thin ones would be no fewer operations than a plain one.",
                    help=f"the largest rank that pays for any is {most}; or leave rank out and give `keep`.",
                )
        return forms

    def _choices(self, matrix: Matrix) -> tuple[Form, ...]:
        """What a matrix may become: itself first, then rank 1, then every multiple that pays."""
        most = most_rank(matrix.shape)
        ranks = {1, *range(self.multiple, most + 1, self.multiple)} if most else set()
        return (DENSE, *map(LowRank, sorted(ranks)))

    def _searched(self, context: Context, given: Mapping[str, Form], moments: Mapping[str, Moments]) -> dict[str, Form]:
        """The ranks that lose least within the budget."""
        if self.share == 1:
            return {}
        matrices = _plain(context.anatomy)
        choices = [self._choices(matrix) for matrix in matrices]
        costs = [_costs(matrix, forms, context.cost) for matrix, forms in zip(matrices, choices, strict=True)]
        harm = []
        for matrix, forms in zip(matrices, choices, strict=True):
            worth = spectrum(_weight(context, matrix), moments.get(matrix.id, Moments()), self.ridge)
            if self.weighted != "loss":
                worth = worth / max(worth.sum(), 1e-30)  # of different matrices only shares can be compared
            harm.append(losses(worth, forms))
        picks = best_forms(costs, harm, self.share, context.anatomy, context.cost, given)
        return {matrix.id: forms[pick] for matrix, forms, pick in zip(matrices, choices, picks, strict=True)}


# -- State ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """What enters and leaves one matrix, by the weight of each token; None counts every direction alike.

    `inputs` (in, in), about `mean` (in,) if that is given; of a table (words,), because two words never come at once. `outputs`
    (out, out): of the loss's gradients.
    """

    inputs: Tensor | None = None
    mean: Tensor | None = None
    outputs: Tensor | None = None


class _Sums:
    """The moments of one matrix so far."""

    def __init__(self, context: Context, matrix: Matrix, centred: bool) -> None:
        rows, columns = matrix.shape
        weight = _weight(context, matrix)
        self.table, self.weight = matrix.table, 0.0
        self.centred = centred and not matrix.table and _bias(context, matrix) is not None
        self.inputs = weight.new_zeros((rows,) if matrix.table else (columns, columns), dtype=torch.float32)
        self.mean = weight.new_zeros(columns, dtype=torch.float32)
        self.shift: Tensor | None = None  # near the mean: float32 loses little then
        self.outputs: Tensor | None = None

    @torch.no_grad()
    def add(self, inputs: Tensor, gradient: Tensor | None, mask: Tensor) -> None:
        """`inputs` (batch, seq, in), or ids (batch, seq); `gradient` (batch, seq, out); `mask` (batch, seq)."""
        weight = mask.float()
        if gradient is not None:
            gradient = gradient.float()
            felt = gradient.square().sum(-1) * mask  # (batch, seq)
            felt = felt / felt.sum(1, keepdim=True).clamp_min(1e-30) * mask.sum(1, keepdim=True)
            weight = mask * (felt * (1 - LEAST_WEIGHT) + LEAST_WEIGHT)
            slopes = gradient[mask]  # (tokens, out)
            moment = slopes.T @ slopes
            self.outputs = moment if self.outputs is None else self.outputs + moment
        own = weight[mask]  # (tokens,)
        self.weight += float(own.sum())
        values = inputs[mask]
        if self.table:
            self.inputs += torch.bincount(values, own, minlength=len(self.inputs)).to(self.inputs)
            return
        values = values.float()
        if self.centred:
            self.shift = values.mean(0) if self.shift is None else self.shift
            values = values - self.shift
        self.inputs += (values * own[:, None]).T @ values
        self.mean += own @ values

    def moments(self, examples: int) -> Moments:
        total = max(self.weight, 1e-30)
        outputs = None if self.outputs is None else self.outputs / max(1, examples)
        if self.table:
            inputs = (self.inputs + 1) / (total + len(self.inputs))
            return Moments(inputs, None, outputs)
        inputs, mean = self.inputs.double() / total, self.mean.double() / total
        if self.shift is None:
            return Moments(inputs, None, outputs)
        return Moments(inputs - torch.outer(mean, mean), mean + self.shift, outputs)


# -- Formulas ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def spectrum(weight: Tensor, moments: Moments, ridge: float) -> np.ndarray:
    """What each further rank is worth, the most first: squared singular values of T' W S, (min(out, in),)."""
    right, left = _root(moments.inputs, ridge), _root(moments.outputs, ridge)
    return energies(_between(left, weight.double(), right)).cpu().numpy()


def losses(worth: np.ndarray, forms: Sequence[Form]) -> np.ndarray:
    """What each form loses: (forms,); a plain matrix nothing."""
    left = np.append(np.cumsum(worth[::-1])[::-1], 0.0)  # left[r]: of all beyond rank r
    return np.array([left[form.rank] if isinstance(form, LowRank) else 0.0 for form in forms])


@torch.no_grad()
def weighed_factors(weight: Tensor, rank: int, moments: Moments, ridge: float) -> tuple[Tensor, Tensor]:
    """(out, rank) and (rank, in), of equal size, whose product comes nearest to the matrix as `moments` weigh."""
    right, left = _root(moments.inputs, ridge), _root(moments.outputs, ridge)
    wide, thin = nearest_factors(_between(left, weight.double(), right), rank)
    if left is not None:
        wide = torch.linalg.solve_triangular(left.T, wide, upper=True)
    if right is not None:
        thin = thin / right if right.ndim == 1 else torch.linalg.solve_triangular(right, thin, upper=False, left=False)
    return wide, thin


def seen(context: Context, method: LowRankFactors) -> dict[str, Moments]:
    """What passes through each matrix that may be factored, on training examples."""
    matrices = [*_plain(context.anatomy), *(matrix for matrix in context.anatomy.matrices.values() if matrix.table)]
    if method.embedding is None:
        matrices = [matrix for matrix in matrices if not matrix.table]
    if method.rank is None and method.share == 1:
        matrices = [matrix for matrix in matrices if matrix.table]
    if not matrices:
        return {}
    gradients = method.weighted == "loss"
    sums = {matrix.id: _Sums(context, matrix, method.biases) for matrix in matrices}
    examples = 0
    with context.subject.evaluating(), positions_unheard(context.model), torch.set_grad_enabled(gradients):
        for batch in context.batches(method.examples):
            examples += len(batch["input_ids"])
            passed: dict[str, tuple[Tensor, Tensor]] = {}
            with ExitStack() as stack:
                for matrix in matrices:
                    module = context.model.get_submodule(matrix.module)
                    stack.callback(module.register_forward_hook(partial(_keep, passed, matrix.id)).remove)
                output = context.model(**context.subject.feed(batch))
                slopes: Sequence[Tensor | None] = [None] * len(matrices)
                if gradients:
                    # a sum, so that each row's gradient is its own
                    loss = context.task.loss(output, batch) * context.task.terms(batch)
                    slopes = torch.autograd.grad(loss, [passed[matrix.id][1] for matrix in matrices])
            for matrix, slope in zip(matrices, slopes, strict=True):
                sums[matrix.id].add(passed[matrix.id][0].detach(), slope, unpadded(batch, matrix.tokens))
    return {name: item.moments(examples) for name, item in sums.items()}


def _between(left: Tensor | None, weight: Tensor, right: Tensor | None) -> Tensor:
    """T' W S."""
    if right is not None:
        weight = weight * right if right.ndim == 1 else weight @ right
    return weight if left is None else left.T @ weight


def _root(moment: Tensor | None, ridge: float) -> Tensor | None:
    """The lower triangle S with S S' = the moment and its ridge; of a diagonal its root. None if nothing was seen."""
    if moment is None:
        return None
    moment = moment.double()
    if moment.ndim == 1:
        return moment.sqrt()
    size = float(moment.diagonal().mean())
    if size <= 0 or not math.isfinite(size):
        return None
    even = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    while True:
        root, failed = torch.linalg.cholesky_ex(moment + ridge * size * even)
        if not failed:
            return root
        ridge *= 10  # sums in float32 are not exact


# -- Plumbing ------------------------------------------------------------------------------------------------------------------


def _keep(passed: dict[str, tuple[Tensor, Tensor]], name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    passed[name] = args[0], output


def _plain(anatomy: Anatomy) -> list[Matrix]:
    """The matrices of the layers that may take another form."""
    return [matrix for matrix in anatomy.encoder_matrices() if matrix.dense and matrix.tied is None]


def _costs(matrix: Matrix, forms: Sequence[Form], cost: Cost) -> np.ndarray:
    if cost.matrix is None:
        raise TargetError(
            "the latency table does not tell what a product takes: it needs two levels of plain feed-forwards.",
            help="leave `latency` out of the recipe, so that it is measured anew, or count macs or parameters.",
        )
    return np.array([cost.matrix(replace(matrix, form=form)) for form in forms])


def _weight(context: Context, matrix: Matrix) -> Tensor:
    """The matrix as (out, in), where a table's input is a word."""
    weight = cast(Tensor, cast(Any, context.model.get_submodule(matrix.module)).weight).detach()
    return weight.T if matrix.table else weight


def _bias(context: Context, matrix: Matrix) -> Tensor | None:
    return cast("Tensor | None", getattr(context.model.get_submodule(matrix.module), "bias", None))


@torch.no_grad()
def _parts(context: Context, matrix: Matrix, mean: Tensor | None, wide: Tensor, thin: Tensor) -> dict[str, Tensor]:
    """The parameters of the form, and the bias with what is lost of the mean input."""
    weight = _weight(context, matrix)
    if matrix.table:
        return {"first": wide.T.to(weight), "second": thin.T.to(weight)}
    parts = {"first": thin.to(weight), "second": wide.to(weight)}
    bias = _bias(context, matrix)
    if mean is not None and bias is not None:
        parts["bias"] = bias.detach() + ((weight.double() - wide @ thin) @ mean).to(bias)
    return parts


def _notes(anatomy: Anatomy, plan: Plan, faster: str) -> Iterator[str]:
    """The ranks, and how many matrices stay plain."""
    plain = _plain(anatomy)
    ranks = [cast(LowRank, plan.forms[matrix.id]).rank for matrix in plain if matrix.id in plan.forms]
    if ranks:
        yield f"{len(ranks)} of {len(plain)} matrices are two thin ones now, of ranks from {min(ranks)} to {max(ranks)}."
    if 0 < len(ranks) < len(plain):
        yield f"{len(plain) - len(ranks)} stay plain: a rank that would be {faster} loses more than the budget asks for."
