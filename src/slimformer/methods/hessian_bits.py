"""Bits by curvature: each matrix becomes codes of 2 to 8 bits, more where the loss curves more.

Paper: Shen, Dong, Ye, Ma, Yao, Gholami, Mahoney, Keutzer: Q-BERT: Hessian Based Ultra Low Precision Quantization of BERT (AAAI 2020);
Dong et al.: HAWQ-V2 (NeurIPS 2020), for curvature times rounding error.

Idea: The largest eigenvalue of the loss's Hessian in the numbers of a matrix tells how far rounding them can move the loss. It is found
by power iteration on a few batches of training examples, and where it differs much between batches it is trusted less: mean and spread
are added. Rows in groups have values of their own.

Differs: The paper orders whole layers by it and gives bits by hand, and it trains with uniform grids. Here each matrix is weighed by its
curvature times the squared rounding error at each number of bits, one search shares out the bits, and codes name values that were
fitted to the numbers (`outliers`), which later stages can train. Files hold 2, 3.2, 4 or 8 bits a number, as codes. Eigenvalues are
taken by magnitude.

Choose when: the bytes of a file matter and a few minutes are there: it is `outliers` with bits where they count. It is as fast as float.

Cost: for each matrix and each of `batches` batches some `iterations` products with the Hessian, each of about three passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from slimformer.core.anatomy import Anatomy, Matrix
from slimformer.core.budget import best_levels
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.errors import PlanError, TargetError
from slimformer.forms.base import Form
from slimformer.forms.dictionary import PACKING, Dictionary
from slimformer.methods.base import Context, Effects, Method, State
from slimformer.rules import Count, one_of, real_number

_Bits = Annotated[float, real_number("from 2 to 8", lambda value: 2 <= value <= 8, 1.9, 8.1)]
_Entries = Annotated[int, one_of(*PACKING)]


@final
@dataclass(frozen=True)
class HessianBits(Method):
    """`bits`: of a number of the layers' matrices, on average; `embedding`: values of the word table (256 are 8 bits), None leaves it
    plain.

    - `groups` of rows have values of their own: as many as divide the rows, at most.
    - `batches` of `examples` each tell mean and spread of the curvature.

    Example:
        >>> from slimformer import Calibrate
        >>> Calibrate(HessianBits(bits=3)).method.effects().one_shot
        True
    """

    bits: _Bits = 3.2
    embedding: _Entries | None = 256
    groups: Count = 12
    batches: Count = 4
    examples: Count = 16
    iterations: Count = 8  # of the power iteration, for each matrix and batch

    def effects(self) -> Effects:
        return Effects(factors=True, uneven=True, factors_table=self.embedding is not None, one_shot=True, refills=True)

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        if not _plain(anatomy):
            raise PlanError(
                "no matrix of the layers can become codes: each has another form already, or is tied to another.",
                help="leave hessian_bits out, or begin with the model before it was factored.",
            )
        self._room(_plain(anatomy))
        Plan(forms=self._tables(anatomy)).check(anatomy)

    def decide(self, state: State, context: Context) -> Decision:
        matrices = _plain(context.anatomy)
        curvatures = curvature_of(context, matrices, self.batches, self.examples, self.iterations)
        harm, costs, choices = [], [], []
        for matrix in matrices:
            weight = _weight(context, matrix).detach()
            own = self._forms(matrix)
            errors = [float((_rebuilt(form, weight) - weight).double().square().sum()) for form in own]
            harm.append(curvatures[matrix.id] * np.array(errors))
            costs.append(np.array([_bits(form, matrix) for form in own]))
            choices.append(own)
        picks = best_levels(costs, [-item for item in harm], self._room(matrices))
        assert picks is not None, "the fewest bits fit, as was checked"
        forms: dict[str, Form] = {matrix.id: own[pick] for matrix, own, pick in zip(matrices, choices, picks, strict=True)}
        forms |= self._tables(context.anatomy)
        weights: dict[str, Tensor] = {}
        for name, form in forms.items():
            matrix = context.anatomy.matrices[name]
            parts = form.weights(_weight(context, matrix).detach(), table=matrix.table)
            weights |= {f"{matrix.module}.{part}": value for part, value in parts.items()}
        counts = {entries: sum(cast(Dictionary, forms[item.id]).entries == entries for item in matrices) for entries in PACKING}
        said = ", ".join(f"{count} of {Dictionary(entries).bits:g}" for entries, count in counts.items() if count)
        return Decision(Plan(forms=forms), weights=weights, notes=(f"bits of the matrices: {said}.",))

    def _room(self, matrices: Sequence[Matrix]) -> float:
        """The bits that all matrices may take; TargetError if even the fewest are more, because of their values."""
        room = self.bits * sum(math.prod(matrix.shape) for matrix in matrices)
        least = sum(min(_bits(form, matrix) for form in self._forms(matrix)) for matrix in matrices)
        if least > room * (1 - len(matrices) / 4096):  # costs are rounded up in the search
            numbers = sum(math.prod(matrix.shape) for matrix in matrices)
            raise TargetError(
                f"{self.bits:g} bits a number cannot be reached: {least / numbers:.2f} are the fewest, with the values of each group.",
                help=f"ask for {1.05 * least / numbers:.2f} or more, or for fewer groups.",
            )
        return room

    def _forms(self, matrix: Matrix) -> list[Dictionary]:
        """What a matrix can become, fewest bits first; always those of 2 bits."""
        groups = math.gcd(matrix.shape[0], self.groups)
        every = [Dictionary(entries, 0, groups) for entries in PACKING]
        return [form for form in every if form.problem(matrix.shape) is None] or every[:1]

    def _tables(self, anatomy: Anatomy) -> dict[str, Form]:
        if self.embedding is None:
            return {}
        tables = [item for item in anatomy.matrices.values() if item.table and item.dense and item.tied is None]
        forms = {item.id: Dictionary(self.embedding, 0, math.gcd(item.shape[0], self.groups)) for item in tables}
        return {item.id: forms[item.id] for item in tables if forms[item.id].problem(item.shape) is None}


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def curvature_of(
    context: Context, matrices: Sequence[Matrix], batches: int, examples: int, iterations: int
) -> dict[str, float]:
    """Of each matrix |mean| plus standard deviation, over batches, of the largest eigenvalue of its block of the Hessian."""
    found: dict[str, list[float]] = {matrix.id: [] for matrix in matrices}
    weights = [_weight(context, matrix) for matrix in matrices]
    trained = [weight.requires_grad for weight in weights]
    with context.subject.evaluating(), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        try:
            for weight in weights:
                weight.requires_grad_(True)
            rows = [row for batch in context.batches(batches * examples) for row in _split(batch, examples)][:batches]
            for batch in rows:
                loss = context.task.loss(context.model(**context.subject.feed(batch)), batch)
                slopes = torch.autograd.grad(loss, weights, create_graph=True)
                for matrix, weight, slope in zip(matrices, weights, slopes, strict=True):
                    found[matrix.id].append(top_eigenvalue(slope, weight, iterations, context.generator))
        finally:
            for weight, before in zip(weights, trained, strict=True):
                weight.requires_grad_(before)
    return {name: abs(float(np.mean(values))) + float(np.std(values)) for name, values in found.items()}


def top_eigenvalue(slope: Tensor, weight: Tensor, iterations: int, generator: torch.Generator) -> float:
    """The eigenvalue of largest magnitude of d slope / d weight, by power iteration; 0 if the loss does not curve there."""
    vector = torch.randn(weight.shape, generator=generator).to(weight)
    vector /= vector.norm()
    value = 0.0
    for _ in range(iterations):
        (product,) = torch.autograd.grad(slope, weight, vector, retain_graph=True)
        value, size = float((vector * product).sum()), float(product.norm())
        if size < 1e-20:
            return 0.0
        vector = product / size
    return value


# -- Plumbing ------------------------------------------------------------------------------------------------------------------


def _split(batch: Any, examples: int) -> list[dict[str, Tensor]]:
    size = len(batch["input_ids"])
    return [{name: value[start : start + examples] for name, value in batch.items()} for start in range(0, size, examples)]


def _plain(anatomy: Anatomy) -> list[Matrix]:
    return [matrix for matrix in anatomy.encoder_matrices() if matrix.dense and matrix.tied is None]


def _weight(context: Context, matrix: Matrix) -> nn.Parameter:
    return cast(nn.Parameter, cast(Any, context.model.get_submodule(matrix.module)).weight)


@torch.no_grad()
def _rebuilt(form: Dictionary, weight: Tensor) -> Tensor:
    """The matrix that a form makes of another."""
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module: Any = form.module(dense).to_empty(device=weight.device)
    for name, value in form.weights(weight).items():
        module.get_parameter(name).copy_(value)
    return cast(Tensor, module.matrix())


def _bits(form: Dictionary, matrix: Matrix) -> float:
    """Bits of a file: codes, and values in float32."""
    return form.bits * math.prod(matrix.shape) + 32 * form.groups * form.entries
