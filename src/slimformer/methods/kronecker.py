"""Kronecker factorisation: every matrix of the encoder, and its word table, becomes a sum of products of two small factors.

Paper: Tahaei, Charlaix, Partovi Nia, Ghodsi, Rezagholizadeh: KroneckerBERT (NAACL 2022): Table 1 for the shapes, section 3 for
the start by the nearest product.

Idea: Only the factors are stored. The nearest sum of r products comes from the r largest singular values of the matrix,
rearranged (`forms/kronecker.py`).

Differs: For any budget the shapes are searched, those of least relative error, one shape for like matrices (theirs were chosen
by hand, and W2 has W1's turned over). A word table may be a sum too. At other widths than 768 a named model keeps its small
factors, and the large ones scale. Their two stages of training, by the sums of plain errors, are two recipes (docs/methods.md):
the pre-trained teacher with the task `text`, then the tuned one with logits and labels. In one recipe the tuned teacher speaks
in both.

Choose when: stored size matters; its speed has to be measured.

Cost: no data: decompositions of every matrix, for each shape that the search tries. The start is far from the matrix, so that
accuracy is all but gone: follow it with a stage on text and one on the task, both with `distillation`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from slimformer.core.anatomy import ATTENTION_ROLES, Anatomy, Matrix, Role
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.errors import PlanError
from slimformer.forms.base import DENSE, Form, Shape
from slimformer.forms.kronecker import Kronecker, squares
from slimformer.methods._forming import best_forms, room_for
from slimformer.methods.base import Context, Effects, Method, State
from slimformer.rules import Count, CountOrZero, Share

KEEP_BY_DEFAULT = 0.25  # of the dense cost, if neither shapes nor a share are given
SMALL = 128  # entries that the smaller factor of a searched shape may have; a matrix can then shrink about as many times
NARROW = 64  # columns of a word's row that may share a number in a searched shape


@final
@dataclass(frozen=True)
class KroneckerFactors(Method):
    """`shapes` names a published model; else they are searched so that `keep` of the dense `cost` may remain, 0.25 if not said.

    - `terms`: products in the sum of each matrix; None takes as many as the shapes say, or one.
    - `embedding`: columns of a word's row that share a number; 0 leaves the table dense, None does as the shapes say, or
      searches that too.
    - `embedding_terms`: products in the sum of a table, 1 in the paper.

    If all columns share a number in each product, the table has low rank, and no other with as many numbers a word comes
    nearer: 48 terms of `embedding: 384` are as small as one of `embedding: 8`.

    Example:
        >>> from slimformer import Calibrate
        >>> Calibrate(KroneckerFactors(shapes="7.7x")).method.effects().factors
        True
    """

    shapes: Literal["5.5x", "7.7x", "21x"] | None = None
    keep: Share | None = None
    cost: Literal["parameters", "macs"] = "parameters"
    terms: Count | None = None
    embedding: CountOrZero | None = None
    embedding_terms: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shapes is not None and (self.keep is not None or self.cost != "parameters"):
            raise ValueError(f"shapes {self.shapes} leave nothing to search: leave out keep and cost, or shapes")
        if self.embedding == 0 and self.embedding_terms > 1:
            raise ValueError(f"embedding_terms of {self.embedding_terms} has no table: embedding 0 leaves it dense")

    def effects(self) -> Effects:
        # with a share of 1 the word table alone is factored: the matrices, and zeros in them, stay as they are
        refills = self.shapes is not None or self.share < 1
        return Effects(factors=True, factors_table=self.embedding != 0, one_shot=True, refills=refills)

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        forms = self._given(anatomy)
        Plan(forms=forms).check(anatomy)
        if self.shapes is None and cost is not None:
            choices = self._choices(anatomy, cost, forms)
            room_for([choice.costs for choice in choices], self.share, anatomy, cost, forms)

    def foresee(self, anatomy: Anatomy, cost: Cost | None) -> Plan | None:
        return Plan(forms=self._given(anatomy)) if self.shapes is not None or self.share == 1 else None

    def decide(self, state: State, context: Context) -> Decision:
        forms = self._given(context.anatomy)
        if self.shapes is None:
            forms |= self._searched(context, forms)
        plan = Plan(forms=forms)
        plan.check(context.anatomy)
        weights = {
            f"{context.anatomy.matrices[name].module}.{part}": value
            for name, form in plan.forms.items()
            for part, value in _nearest(context, context.anatomy.matrices[name], form).items()
        }
        return Decision(plan, weights=weights)

    @property
    def share(self) -> float:
        """The share of the dense cost that may remain if shapes are searched."""
        return KEEP_BY_DEFAULT if self.keep is None else self.keep

    def _given(self, anatomy: Anatomy) -> dict[str, Form]:
        """The forms that the options name, by matrix; PlanError if a factor does not divide one, or there is no table."""
        forms: dict[str, Form] = {}
        concerned = self._concerned(anatomy)
        if self.embedding_terms > 1 and not any(matrix.role is Role.EMBEDDING for matrix in concerned):
            raise PlanError(
                f"embedding_terms is {self.embedding_terms}, but there is no word table to factor: it is factored already.",
                help="leave embedding_terms out.",
            )
        for matrix in concerned:
            if matrix.role is Role.EMBEDDING and self.embedding is not None:
                forms[matrix.id] = _table(matrix, self.embedding, self.embedding_terms)
            elif self.shapes is not None:
                forms[matrix.id] = NAMED[self.shapes].form(matrix, self._terms(matrix))
        return forms

    def _terms(self, matrix: Matrix) -> int:
        if matrix.role is Role.EMBEDDING:
            return self.embedding_terms
        return self.terms or (1 if self.shapes is None else NAMED[self.shapes].terms)

    def _concerned(self, anatomy: Anatomy) -> list[Matrix]:
        return [matrix for matrix in anatomy.matrices.values() if matrix.dense and self._concerns(matrix)]

    def _concerns(self, matrix: Matrix) -> bool:
        """Whether a matrix is to be factored: all are, but a word table if it is to stay dense or is tied to another table."""
        if matrix.role is Role.EMBEDDING:
            return matrix.tied is None if self.embedding is None else self.embedding > 0
        return matrix.role is not Role.CLASSIFIER

    def _choices(self, anatomy: Anatomy, cost: Cost, given: Mapping[str, Form]) -> list[_Choice]:
        """What matrices that are alike may become, all of them the same; those with a form `given` are left out."""
        assert cost.matrix is not None, "parameters and MACs know what a form costs"
        groups: dict[tuple[str, Shape], list[Matrix]] = {}
        for matrix in self._concerned(anatomy):
            if matrix.id not in given:
                kind = "attention" if matrix.role in ATTENTION_ROLES else str(matrix.role)
                groups.setdefault((kind, matrix.shape), []).append(matrix)
        choices = []
        for group in groups.values():
            forms: tuple[Form, ...] = (DENSE, *candidates(group[0], self._terms(group[0])))
            costs = np.array([sum(cost.matrix(replace(matrix, form=form)) for matrix in group) for form in forms])
            choices.append(_Choice(group, forms, costs))
        return choices

    def _searched(self, context: Context, given: Mapping[str, Form]) -> dict[str, Form]:
        """The shapes of least relative error within the budget; dense if that is best."""
        choices = self._choices(context.anatomy, context.cost, given)
        lost = [
            np.sum([relative_errors(_weight(context, matrix), choice.forms) for matrix in choice.group], axis=0)
            for choice in choices
        ]
        costs = [choice.costs for choice in choices]
        picks = best_forms(costs, lost, self.share, context.anatomy, context.cost, given)
        return {matrix.id: choice.forms[pick] for choice, pick in zip(choices, picks, strict=True) for matrix in choice.group}


# -- State ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shapes:
    """The small factors of a published model; the large one is what is left of a matrix.

    Table 1 prints "n1, m1" for width 768 and FFN width 3072: 384,384 and 2,8 for the 7.7x model, 48,384 and 2,16 for the 21x
    model. For the 5.5x model it prints 384,384 twice, with four products in each sum; of an attention matrix these are as many
    numbers as it has, and the model would have 45 M, not the 20 M that the paper states. With 48,384, which has 20.2 M without the
    pooler (5.4 times fewer), the figures agree, so that is taken.

    The names are those of the published models, by their size at BERT-base (5.3, 7.5 and 20.9 times as we
    count). An encoder
    of six layers and width 384 becomes 6.4, 7.2 and 15.7 times smaller by the same factors: more of it is the word table, and
    what is never factored.
    """

    attention: Shape  # B, of all four matrices
    ffn: Shape  # the small factor of the first matrix; turned over, that of the second
    embedding: int  # columns of B, a single row
    terms: int = 1  # products in the sum of each matrix, a table apart
    ffn_small: Literal["a", "b"] = "a"  # which of an FFN matrix's factors is the small one

    def form(self, matrix: Matrix, terms: int) -> Kronecker:
        """The form of one matrix; PlanError if the small factor does not divide it."""
        if matrix.role is Role.EMBEDDING:
            return _table(matrix, self.embedding, terms)
        if matrix.role in ATTENTION_ROLES:
            return Kronecker(_divided(matrix, self.attention), terms)
        small = self.ffn if matrix.role is Role.FFN_IN else self.ffn[::-1]
        large = _divided(matrix, small)
        return Kronecker(small if self.ffn_small == "a" else large, terms)


NAMED: Mapping[str, Shapes] = {
    "5.5x": Shapes((2, 16), (8, 2), 12, terms=4, ffn_small="b"),
    "7.7x": Shapes((2, 2), (8, 2), 8),
    "21x": Shapes((2, 16), (16, 2), 16),
}


@dataclass(frozen=True)
class _Choice:
    """Matrices that are alike, the forms that they may take, dense the first, and what all of them cost in each."""

    group: list[Matrix]
    forms: tuple[Form, ...]
    costs: np.ndarray  # (forms,)


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def candidates(matrix: Matrix, terms: int) -> Iterator[Kronecker]:
    """The shapes to consider: one factor is small, and neither numbers nor multiplications become more."""
    rows, columns = matrix.shape
    table = matrix.table
    for m1 in [rows] if table else _divisors(rows):
        for n1 in _divisors(columns):
            form = Kronecker((m1, n1), terms)
            a, b = m1 * n1, rows * columns // (m1 * n1)
            small = 1 < b <= NARROW if table else 1 < min(a, b) <= SMALL
            cheap = form.parameters(matrix.shape) < rows * columns and (table or form.macs(matrix.shape) < rows * columns)
            if small and cheap and form.problem(matrix.shape, table=table) is None:
                yield form


@torch.no_grad()
def relative_errors(weight: Tensor, forms: Sequence[Form]) -> np.ndarray:
    """What each form loses of a matrix, as a share of its squared norm: (forms,)."""
    total = float(weight.double().square().sum())
    lost = []
    for form in forms:
        if not isinstance(form, Kronecker):
            lost.append(0.0)
            continue
        kept = float(squares(weight.float(), form.a)[: form.terms].double().sum())
        lost.append(max(0.0, 1 - kept / total) if total else 0.0)
    return np.array(lost)


# -- Plumbing ------------------------------------------------------------------------------------------------------------------


def _table(matrix: Matrix, shared: int, terms: int) -> Kronecker:
    """The form of a word table of which `shared` columns have one number in each term; PlanError if they do not divide it."""
    return Kronecker((matrix.shape[0], _divided(matrix, (1, shared))[1]), terms)


def _divided(matrix: Matrix, small: Shape) -> Shape:
    """The size of the other factor beside `small`; PlanError if that does not divide the matrix."""
    rows, columns = matrix.shape
    if rows % small[0] or columns % small[1]:
        raise PlanError(
            f"matrix '{matrix.id}' is {rows} x {columns}, which a factor of {small[0]} x {small[1]} does not divide.",
            help="leave `shapes` out and give `keep`: the search takes shapes that divide; or cut to other sizes first.",
        )
    return rows // small[0], columns // small[1]


def _nearest(context: Context, matrix: Matrix, form: Form) -> Mapping[str, Tensor]:
    return form.weights(_weight(context, matrix), table=matrix.role is Role.EMBEDDING)


def _weight(context: Context, matrix: Matrix) -> Tensor:
    return cast(nn.Linear, context.model.get_submodule(matrix.module)).weight.detach()


def _divisors(size: int) -> list[int]:
    return [n for n in range(1, size + 1) if size % n == 0]
