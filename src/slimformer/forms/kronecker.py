"""A matrix as a sum of Kronecker products A (x) B: block (i, j) of the matrix is A[i, j] times B.

Tahaei et al.: KroneckerBERT (NAACL 2022), section 3; the nearest product is by Van Loan and Pitsianis (1993). Differs: the smaller factor
multiplies from the left, token by token, so that the larger one is a single product over all tokens; a word table may be a sum too.
Fewer multiplications do not mean less time (benchmarks/factors.py): measure a factored model. A table whose terms have one column each,
A (words, 1) and B (1, width), is a table of low rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from slimformer.forms._nearest import energies, nearest_factors
from slimformer.forms.base import Form, Formed, GraphWriter, ProductShape, Shape, numbers_of


@final
@dataclass(frozen=True)
class Kronecker(Form):
    """A sum of Kronecker products.

    Attributes:
        a: Rows and columns (m1, n1) of the first factor; those of the second follow from the matrix.
        terms: The number of products in the sum.
    """

    a: Shape
    terms: int = 1

    reads: ClassVar[tuple[str, ...]] = ("large",)

    def __post_init__(self) -> None:
        whole = isinstance(self.a, (tuple, list)) and len(self.a) == 2 and all(type(n) is int and n >= 1 for n in self.a)
        if not whole:
            raise ValueError(f"a must be two whole numbers from 1, got {self.a!r}")
        if type(self.terms) is not int or self.terms < 1:
            raise ValueError(f"terms must be a whole number from 1, got {self.terms!r}")
        object.__setattr__(self, "a", tuple(self.a))

    def b(self, shape: Shape) -> Shape:
        """Rows and columns (m2, n2) of the second factor."""
        return shape[0] // self.a[0], shape[1] // self.a[1]

    def problem(self, shape: Shape, *, table: bool = False) -> str | None:
        (rows, columns), (m1, n1) = shape, self.a
        if rows % m1 or columns % n1:
            return f"a first factor of {m1} x {n1} does not divide its {rows} x {columns}"
        if table and m1 != rows:
            return f"each of its {rows} words keeps a row of its own, so the first factor has {rows} rows, not {m1}"
        most = min(m1 * n1, math.prod(self.b(shape)))
        if self.terms > most:
            return f"{most} terms of {m1} x {n1} are exact already, so {self.terms} would hold nothing more"
        return None

    def parameters(self, shape: Shape) -> int:
        return self.terms * (math.prod(self.a) + math.prod(self.b(shape)))

    def macs(self, shape: Shape) -> int:
        return self.terms * min(self._a_first(shape), self._b_first(shape))

    def _a_first(self, shape: Shape) -> int:
        (m1, n1), (m2, n2) = self.a, self.b(shape)
        return m1 * n1 * n2 + m1 * n2 * m2

    def _b_first(self, shape: Shape) -> int:
        (m1, n1), (m2, n2) = self.a, self.b(shape)
        return n1 * n2 * m2 + m1 * n1 * m2

    def steps(self, shape: Shape) -> tuple[str, ...]:
        """How a token x, as X (n1, n2), becomes Y (m1, m2) = A X B^T: "a", "b" and "turn", in order.

        The cheaper factor comes first; if both cost the same, the smaller one does. The smaller one multiplies from the left; "turn"
        exchanges the two axes if that is needed.
        """
        large = self.b_is_large(shape)
        saved = self._b_first(shape) - self._a_first(shape)
        order = ("a", "b") if saved > 0 or (saved == 0 and large) else ("b", "a")
        return order if large else ("turn", *order, "turn")

    def b_is_large(self, shape: Shape) -> bool:
        """Whether B multiplies all tokens at once from the right, and A each token from the left; else the other way round."""
        return math.prod(self.b(shape)) >= math.prod(self.a)

    def products(self, shape: Shape) -> tuple[ProductShape, ...]:
        (out, width) = self.b(shape) if self.b_is_large(shape) else self.a
        return (ProductShape(self.rows(shape), width, out),) * self.terms

    def rows(self, shape: Shape) -> int:
        """Rows of each token at the product with the larger factor: those that the smaller one gives, or those that it reads later."""
        large, (m1, n1), (m2, n2) = self.b_is_large(shape), self.a, self.b(shape)
        given, read = (m1, n1) if large else (m2, n2)
        first = next(step for step in self.steps(shape) if step != "turn")
        return read if first == ("b" if large else "a") else given

    def module(self, dense: nn.Module) -> nn.Module:
        if isinstance(dense, nn.Embedding):
            return KroneckerEmbedding(self, dense)
        return KroneckerLinear(self, cast(nn.Linear, dense))

    def weights(self, weight: Tensor, *, table: bool = False) -> Mapping[str, Tensor]:
        shape = (int(weight.shape[0]), int(weight.shape[1]))
        left, right = nearest_factors(
            rearranged(weight.detach().double(), self.a), self.terms
        )  # (m1 n1, terms), (terms, m2 n2)
        a = left.T.reshape(self.terms, *self.a)
        if table:
            a = a.transpose(0, 1).flatten(1)[None]  # (1, words, terms n1)
        return {"a": a.to(weight.dtype), "b": right.reshape(self.terms, *self.b(shape)).to(weight.dtype)}

    @classmethod
    def example(cls, shape: Shape, *, table: bool = False) -> Form:
        rows, columns = shape
        down = rows if table else max(n for n in range(1, rows) if rows % n == 0) if rows > 1 else 1
        across = next(n for n in range(2, columns + 1) if columns % n == 0) if columns > 1 else 1
        return cls((down, columns // across if table else across))


def rearranged(weight: Tensor, a: Shape) -> Tensor:
    """The matrix with each block as a row, in the order of A's entries: (m1 n1, m2 n2). A (x) B becomes vec(A) vec(B)^T."""
    (rows, columns), (m1, n1) = weight.shape, a
    return weight.reshape(m1, rows // m1, n1, columns // n1).transpose(1, 2).reshape(m1 * n1, -1)


def squares(weight: Tensor, a: Shape) -> Tensor:
    """Squared singular values of the rearranged matrix, the largest first: each further term takes the next one off the squared error."""
    return energies(rearranged(weight.detach(), a))


class _Factors(Formed):
    """The parameters `a`, of the shape given, and `b` (terms, m2, n2)."""

    def __init__(self, form: Kronecker, weight: Tensor, a: tuple[int, int, int]) -> None:
        super().__init__()
        self.form: Kronecker = form
        self.shape = (int(weight.shape[0]), int(weight.shape[1]))

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(weight.new_empty(shape), requires_grad=weight.requires_grad)

        self.a, self.b = empty(*a), empty(form.terms, *form.b(self.shape))

    def extra_repr(self) -> str:
        return f"{self.shape}, a={self.form.a}, b={self.form.b(self.shape)}, terms={self.form.terms}"


class LargeProduct(nn.Module):
    """The product with the larger factor, which int8 files compute in integers; a module, so that its input can be watched."""

    def __init__(self, factor: str) -> None:
        super().__init__()
        self.factor = factor  # "a" or "b": the name of the larger one in the module around this

    def forward(self, value: Tensor, factor: Tensor) -> Tensor:
        return functional.linear(value, factor)


class KroneckerLinear(_Factors):
    """y = sum of (A (x) B) x, plus the bias, for inputs of any number of leading axes; `a` is (terms, m1, n1)."""

    def __init__(self, form: Kronecker, dense: nn.Linear) -> None:
        super().__init__(form, dense.weight, (form.terms, *form.a))
        self.bias = dense.bias
        self.large = LargeProduct("b" if form.b_is_large(self.shape) else "a")
        self.integers = (self.large.factor,)

    def matrix(self) -> Tensor:
        return torch.stack([torch.kron(a, b) for a, b in zip(self.a, self.b, strict=True)]).sum(0)

    def forward(self, input: Tensor) -> Tensor:
        product = self._product(input)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def _product(self, input: Tensor) -> Tensor:
        """The sum without the bias."""
        n2 = self.b.shape[2]
        start = input.unflatten(-1, (self.a.shape[2], n2))  # (..., n1, n2)
        steps = self.form.steps(self.shape)
        if steps[0] == "turn":
            start = start.transpose(-1, -2)
        total = None
        for a, b in zip(self.a, self.b, strict=True):
            value = start
            for step in steps:
                if step != "turn":
                    factor = a if step == "a" else b
                    value = self.large(value, factor) if step == self.large.factor else torch.matmul(factor, value)
            total = value if total is None else total + value
        assert total is not None
        if steps[-1] == "turn":
            total = total.transpose(-1, -2)
        return total.flatten(-2)  # (..., m1 m2)

    def lower(self, graph: GraphWriter, source: Any) -> Any:
        return write_product(
            graph, source, numbers_of(self.a), numbers_of(self.b), self.form.steps(self.shape), self.large.factor
        )


def write_product(graph: GraphWriter, source: Any, a: np.ndarray, b: np.ndarray, steps: Sequence[str], large: str) -> Any:
    """Writes the product with a sum of A (x) B into a graph, in these `steps` (`Kronecker.steps`); `large` names the larger factor.

    The smaller factor multiplies from the left, token by token, so that int8 does not take it for a matrix of the model: it stays in
    float. `a` is (terms, m1, n1), `b` (terms, m2, n2).
    """
    factors = {"a": a, "b": b}
    start = graph.apply("Reshape", source, graph.numbers(0, 0, a.shape[2], b.shape[2]))  # (., ., n1, n2)
    if steps[0] == "turn":
        start = graph.apply("Transpose", start, perm=[0, 1, 3, 2])
    total = None
    for term in range(len(a)):
        value = start
        for step in steps:
            if step == "turn":
                continue
            factor, name = factors[step][term], f"{step}.{term}"
            if step == large:
                value = graph.apply("MatMul", value, graph.constant(factor.T, name))
            else:
                value = graph.apply("MatMul", graph.constant(factor, name), value)
        total = value if total is None else graph.apply("Add", total, value)
    if steps[-1] == "turn":
        total = graph.apply("Transpose", total, perm=[0, 1, 3, 2])  # (., ., m1, m2)
    return graph.apply("Reshape", total, graph.numbers(0, 0, a.shape[1] * b.shape[1]))


class KroneckerEmbedding(_Factors):
    """Row i of the table is the sum of A[i] (x) B, with B a single row: a lookup and a product.

    `a` is (1, words, terms n1): the numbers of a word in all terms stand side by side, so that one lookup and one scale serve them.
    """

    table: ClassVar[bool] = True

    def __init__(self, form: Kronecker, dense: nn.Embedding) -> None:
        words, n1 = form.a
        super().__init__(form, dense.weight, (1, words, form.terms * n1))
        self.integers = ("a",)
        self.padding_idx = dense.padding_idx

    def matrix(self) -> Tensor:
        return self._product(self.a[0])

    def forward(self, input: Tensor) -> Tensor:
        return self._product(functional.embedding(input, self.a[0], self.padding_idx))

    def decode(self, states: Tensor) -> Tensor:
        """With B from the right, then with A: no matrix of the table's size is made."""
        short = torch.matmul(states.unflatten(-1, (-1, self.b.shape[2])), self.b[:, 0].T)  # (..., n1, terms)
        return functional.linear(short.transpose(-1, -2).flatten(-2), self.a[0])

    def _product(self, rows: Tensor) -> Tensor:
        """The table's rows (..., n1 n2) from those of A (..., terms n1)."""
        rows = rows.unflatten(-1, (self.form.terms, -1))  # (..., terms, n1)
        if self.form.terms == 1:
            return (rows.transpose(-1, -2) * self.b[0]).flatten(-2)
        return torch.einsum("...tj,tk->...jk", rows, self.b[:, 0]).flatten(-2)

    def lower(self, graph: GraphWriter, source: Any) -> Any:
        """A lookup and a product.

        What sums the terms is a constant of three axes, so that int8 does not take it for a matrix of the model: it stays in float.
        """
        table, sums = numbers_of(self.a)[0], numbers_of(self.b)[:, 0]  # (words, terms n1), (terms, n2)
        terms, n2 = sums.shape
        n1 = table.shape[1] // terms
        value = graph.apply("Gather", graph.constant(table, "a"), source, axis=0)
        if min(terms, n1) > 1:
            value = graph.apply("Reshape", value, graph.numbers(0, 0, terms, n1))
            value = graph.apply("Transpose", value, perm=[0, 1, 3, 2])  # (., ., n1, terms)
        else:
            value = graph.apply("Reshape", value, graph.numbers(0, 0, n1, terms))
        small = graph.constant(sums[None], "b")  # (1, terms, n2)
        value = graph.apply("Mul" if terms == 1 else "MatMul", value, small)  # (., ., n1, n2)
        return graph.apply("Reshape", value, graph.numbers(0, 0, n1 * n2))
