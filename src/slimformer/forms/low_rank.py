"""A matrix of low rank, as a product of two thin ones: x is made `rank` numbers first, and those become the output.

The nearest one keeps the largest singular values (Eckart and Young 1936). A word table is the same: each word keeps `rank` numbers of
its own, and one matrix makes a row of them (ALBERT, Lan et al. 2020, section 3.1). A rank suits a matrix only if two thin ones are fewer
numbers, and so fewer operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast, final

from torch import Tensor, nn
from torch.nn import functional

from slimformer.forms._nearest import nearest_factors
from slimformer.forms.base import Form, Formed, GraphWriter, ProductShape, Shape, numbers_of


@final
@dataclass(frozen=True)
class LowRank(Form):
    """A product of two thin matrices.

    Attributes:
        rank: Rows of the first one, and columns of the second.
    """

    rank: int

    reads: ClassVar[tuple[str, ...]] = ("narrow", "widen")

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank must be a whole number from 1, got {self.rank!r}")

    def problem(self, shape: Shape, *, table: bool = False) -> str | None:
        most = most_rank(shape)
        if self.rank <= most:
            return None
        pays = f"only ranks up to {most} pay" if most else "no rank pays"
        return f"rank {self.rank} is no fewer numbers than its {shape[0]} x {shape[1]}, of which {pays}"

    def parameters(self, shape: Shape) -> int:
        return self.rank * sum(shape)

    def macs(self, shape: Shape) -> int:
        return self.rank * sum(shape)

    def products(self, shape: Shape) -> tuple[ProductShape, ...]:
        return ProductShape(1, shape[1], self.rank), ProductShape(1, self.rank, shape[0])

    def module(self, dense: nn.Module) -> nn.Module:
        if isinstance(dense, nn.Embedding):
            return LowRankTable(self, dense)
        return LowRankLinear(self, cast(nn.Linear, dense))

    def weights(self, weight: Tensor, *, table: bool = False) -> Mapping[str, Tensor]:
        second, first = nearest_factors(weight.detach().double(), self.rank)
        return {"first": first.to(weight.dtype), "second": second.to(weight.dtype)}

    @classmethod
    def example(cls, shape: Shape, *, table: bool = False) -> Form:  # noqa: ARG003
        return cls(max(1, most_rank(shape) // 2))


def most_rank(shape: Shape) -> int:
    """The largest rank at which two thin matrices are fewer numbers than a plain one; 0 if there is none.

    >>> most_rank((384, 384)), most_rank((1536, 384)), most_rank((1, 8))
    (191, 307, 0)
    """
    return (shape[0] * shape[1] - 1) // sum(shape)


class _Thin(Formed):
    """The parameters `first` (rank, in) and `second` (out, rank)."""

    def __init__(self, form: LowRank, weight: Tensor) -> None:
        super().__init__()
        self.form: LowRank = form
        self.shape = (int(weight.shape[0]), int(weight.shape[1]))

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(weight.new_empty(shape), requires_grad=weight.requires_grad)

        self.first, self.second = empty(form.rank, self.shape[1]), empty(self.shape[0], form.rank)

    def matrix(self) -> Tensor:
        return self.second @ self.first

    def extra_repr(self) -> str:
        return f"{self.shape}, rank={self.form.rank}"


class ThinProduct(nn.Module):
    """The product with one of the two; a module, so that its input can be watched."""

    def forward(self, value: Tensor, factor: Tensor) -> Tensor:
        return functional.linear(value, factor)


class LowRankLinear(_Thin):
    """y = second (first x), plus the bias, for inputs of any number of leading axes."""

    def __init__(self, form: LowRank, dense: nn.Linear) -> None:
        super().__init__(form, dense.weight)
        self.bias = dense.bias
        self.narrow, self.widen = ThinProduct(), ThinProduct()
        self.integers = ("first", "second")

    def forward(self, input: Tensor) -> Tensor:
        product = self.widen(self.narrow(input, self.first), self.second)
        return cast(Tensor, product if self.bias is None else product + self.bias.to(product.dtype))

    def lower(self, graph: GraphWriter, source: Any) -> Any:
        thin = graph.apply("MatMul", source, graph.constant(numbers_of(self.first).T, "first.turned"))
        return graph.apply("MatMul", thin, graph.constant(numbers_of(self.second).T, "second.turned"))


class LowRankTable(_Thin):
    """Row i of the table is row i of `second`, times `first`: a lookup and a product."""

    table: ClassVar[bool] = True

    def __init__(self, form: LowRank, dense: nn.Embedding) -> None:
        super().__init__(form, dense.weight)
        self.integers = ("second",)
        self.padding_idx = dense.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        return functional.embedding(input, self.second, self.padding_idx) @ self.first

    def decode(self, states: Tensor) -> Tensor:
        return functional.linear(functional.linear(states, self.first), self.second)

    def lower(self, graph: GraphWriter, source: Any) -> Any:
        """A lookup and a product.

        What makes a row is a constant of three axes, so that int8 does not take it for a matrix of the model: it stays in float.
        """
        own = graph.apply("Gather", graph.constant(numbers_of(self.second), "second"), source, axis=0)
        return graph.apply("MatMul", own, graph.constant(numbers_of(self.first)[None], "first"))
