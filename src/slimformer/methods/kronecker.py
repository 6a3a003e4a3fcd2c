"""Kronecker factorisation: every matrix of the encoder, and its word table, becomes a sum of products of two small factors.

Tahaei, Charlaix, Partovi Nia, Ghodsi, Rezagholizadeh: KroneckerBERT (NAACL 2022): Table 1 for the shapes, section 3 for the start by the
nearest product. Differences: for any budget the shapes are searched, those of least relative error, one shape for like matrices
(theirs were chosen by hand, and W2 has W1's turned over); a word table may be a sum too; at other widths than 768 a named model keeps
its small factors, and the large ones scale. The start is far from the matrix, so that accuracy is all but gone before training: follow
it with a stage on text without labels and one on the task, both with `distillation`. (Theirs has the pre-trained model as teacher of
the first, with the losses of pre-training beside it, on a tenth of Wikipedia; here the tuned teacher speaks in both.) Choose it where
stored size matters; its speed has to be measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from slimformer.core.anatomy import ATTENTION_ROLES, Anatomy, Matrix, Role
from slimformer.core.budget import best_levels
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.errors import PlanError, TargetError
from slimformer.forms.base import DENSE, Form, Shape
from slimformer.forms.kronecker import Kronecker as Product
from slimformer.forms.kronecker import squares
from slimformer.methods.base import Context, Method, State

KEEP = 0.25  # of the dense cost, where neither shapes nor a share are given
SMALL = 128  # entries that the smaller factor of a searched shape may have; a matrix can then shrink about as many times
NARROW = 64  # columns of a word's row that may share a number in a searched shape


@dataclass(frozen=True)
class Shapes:
    """The small factors of a published model; the large one is what is left of a matrix.

    Table 1 prints "n1, m1" for width 768 and FFN width 3072: 384,384 and 2,8 for the 7.7x model, 48,384 and 2,16 for the 21x model. The
    names are those of the published models, by their size at BERT-base (7.5 and 20.9 times as we count). An encoder of six layers
    and width 384 becomes 7.2 and 15.7 times smaller by the same factors: more of it is the word table, and what is never factored.
    """

    attention: Shape  # B, of all four matrices
    ffn: Shape  # A of the first matrix; turned over, A of the second
    embedding: int  # columns of B, a single row

    def form(self, matrix: Matrix, terms: int) -> Product:
        """The form of one matrix; PlanError where the small factor does not divide it."""
        if matrix.role is Role.EMBEDDING:
            return _table(matrix, self.embedding, terms)
        if matrix.role in ATTENTION_ROLES:
            return Product(_divided(matrix, self.attention), terms)
        small = self.ffn if matrix.role is Role.FFN_IN else self.ffn[::-1]
        _divided(matrix, small)
        return Product(small, terms)


NAMED: Mapping[str, Shapes] = {"7.7x": Shapes((2, 2), (8, 2), 8), "21x": Shapes((2, 16), (16, 2), 16)}


@final
@dataclass(frozen=True)
class Kronecker(Method):
    """`shapes` names a published model; else they are searched so that `keep` of the dense `cost` may remain, 0.25 if not said.

    `terms`: products in the sum of each matrix. `embedding`: columns of a word's row that share a number; 0 leaves the table dense,
    None does as the shapes say, or searches that too. `embedding_terms`: products in the sum of a table, 1 in the paper. Where all
    columns share a number in each product the table has low rank, and no other with as many numbers a word comes nearer: 48 terms of
    `embedding: 384` are as small as one of `embedding: 8`.
    """

    shapes: Literal["7.7x", "21x"] | None = None
    keep: float | None = None
    cost: Literal["parameters", "macs"] = "parameters"
    terms: int = 1
    embedding: int | None = None
    embedding_terms: int = 1

    decides: ClassVar[bool] = True
    forms: ClassVar[bool] = True
    trains: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.shapes is not None and self.shapes not in NAMED:
            raise ValueError(f"shapes must be one of {', '.join(NAMED)}, got {self.shapes}")
        if self.shapes is not None and (self.keep is not None or self.cost != "parameters"):
            raise ValueError(f"shapes {self.shapes} leave nothing to search: leave out keep and cost, or shapes")
        if not 0 < self.share <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {self.keep}")
        for name in ("terms", "embedding_terms"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.embedding is not None and self.embedding < 0:
            raise ValueError(f"embedding must be 0 or above, got {self.embedding}")
        if self.embedding == 0 and self.embedding_terms > 1:
            raise ValueError(f"embedding_terms of {self.embedding_terms} has no table: embedding 0 leaves it dense")

    @property
    def share(self) -> float:
        """Of the dense cost, what may remain where shapes are searched."""
        return KEEP if self.keep is None else self.keep

    @property
    def fills(self) -> bool:  # type: ignore[override]
        """Unless the word table alone is factored: whatever may stay dense then does."""
        return self.shapes is not None or self.share < 1

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        forms = self._given(anatomy)
        Plan(forms=forms).check(anatomy)
        if self.shapes is None and cost is not None:
            choices = self._choices(anatomy, cost, forms)
            room, least = self._room(choices, anatomy, cost, forms)
            if least > room:
                raise self._too_little(least - room, cost)

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

    def _given(self, anatomy: Anatomy) -> dict[str, Form]:
        """The forms that the options name, matrix by matrix; PlanError where a factor does not divide one, or there is no table."""
        forms: dict[str, Form] = {}
        concerned = self._concerned(anatomy)
        if self.embedding_terms > 1 and not any(matrix.role is Role.EMBEDDING for matrix in concerned):
            raise PlanError(
                f"embedding_terms is {self.embedding_terms}, but there is no word table to factor: it is tied, or factored already.",
                help="leave embedding_terms out.",
            )
        for matrix in concerned:
            if matrix.role is Role.EMBEDDING and self.embedding is not None:
                forms[matrix.id] = _table(matrix, self.embedding, self.embedding_terms)
            elif self.shapes is not None:
                forms[matrix.id] = NAMED[self.shapes].form(matrix, self._terms(matrix))
        return forms

    def _terms(self, matrix: Matrix) -> int:
        return self.embedding_terms if matrix.role is Role.EMBEDDING else self.terms

    def _concerned(self, anatomy: Anatomy) -> list[Matrix]:
        return [matrix for matrix in anatomy.matrices.values() if matrix.dense and self._concerns(matrix)]

    def _concerns(self, matrix: Matrix) -> bool:
        """Whether a matrix is to be factored: all are, but a word table only where that is wanted, or nothing is tied to it."""
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
        found = []
        for group in groups.values():
            forms: tuple[Form, ...] = (DENSE, *candidates(group[0], self._terms(group[0])))
            costs = np.array([sum(cost.matrix(replace(matrix, form=form)) for matrix in group) for form in forms])
            found.append(_Choice(group, forms, costs))
        return found

    def _room(self, choices: Sequence[_Choice], anatomy: Anatomy, cost: Cost, given: Mapping[str, Form]) -> tuple[float, float]:
        """What the choices may cost together, and what the smallest factors of all cost."""
        rest = cost.of(Plan(forms=given), anatomy) - float(sum(choice.costs[0] for choice in choices))
        return self.share * cost.dense - rest, float(sum(choice.costs.min() for choice in choices))

    def _too_little(self, missing: float, cost: Cost) -> TargetError:
        least = self.share + missing / cost.dense
        return TargetError(
            f"{self.share:.1%} of the {cost.unit} cannot be reached: {least:.1%} remain with the smallest factors.",
            help=f"ask to keep {least * 1.02:.1%} or more; the word table counts too, whether it is factored or not.",
        )

    def _searched(self, context: Context, given: Mapping[str, Form]) -> dict[str, Form]:
        """The shapes of least relative error within the budget; dense where that is best."""
        choices = self._choices(context.anatomy, context.cost, given)
        room, least = self._room(choices, context.anatomy, context.cost, given)
        lost = [sum(relative_errors(_weight(context, matrix), choice.forms) for matrix in choice.group) for choice in choices]
        picks = best_levels([choice.costs for choice in choices], [-np.asarray(errors) for errors in lost], room)
        if picks is None:
            raise self._too_little(least - room, context.cost)
        return {matrix.id: choice.forms[pick] for choice, pick in zip(choices, picks, strict=True) for matrix in choice.group}


@dataclass(frozen=True)
class _Choice:
    """Matrices that are alike, the forms that they may take, dense the first, and what all of them cost in each."""

    group: list[Matrix]
    forms: tuple[Form, ...]
    costs: np.ndarray  # (forms,)


def candidates(matrix: Matrix, terms: int) -> Iterator[Product]:
    """Shapes worth a look: one factor is small, and neither numbers nor multiplications become more."""
    rows, columns = matrix.shape
    table = matrix.table
    for m1 in [rows] if table else _divisors(rows):
        for n1 in _divisors(columns):
            form = Product((m1, n1), terms)
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
        if not isinstance(form, Product):
            lost.append(0.0)
            continue
        kept = float(squares(weight.float(), form.a)[: form.terms].double().sum())
        lost.append(max(0.0, 1 - kept / total) if total else 0.0)
    return np.array(lost)


def _table(matrix: Matrix, shared: int, terms: int) -> Product:
    """The form of a word table of which `shared` columns have one number in each term; PlanError where they do not divide it."""
    return Product((matrix.shape[0], _divided(matrix, (1, shared))[1]), terms)


def _divided(matrix: Matrix, small: Shape) -> Shape:
    """The size of the other factor beside `small`; PlanError where that does not divide the matrix."""
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
