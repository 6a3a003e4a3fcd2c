"""A matrix as codes: each row is cut into pieces, and each piece is one of a few that a codebook holds (product quantization).

Jégou, Douze, Schmid: Product Quantization for Nearest Neighbor Search (PAMI 2011), section 2; of word tables Prakash et al. (Findings of
EMNLP 2020) and Shu, Nakayama (ICLR 2018). A code is a byte. The codebook goes on learning, the codes stay. An exported table looks codes
up first and then pieces, so that it never becomes a plain table; a Linear is put together once, when a runtime loads the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimformer.forms.base import Form, Formed, GraphWriter, ProductShape, Shape, numbers_of

MOST_ENTRIES = 256  # entries that a byte can name
ROUNDS = 25  # of Lloyd's algorithm; it ends before if no code changes


@final
@dataclass(frozen=True)
class Codebook(Form):
    """Codes of pieces.

    Attributes:
        parts: Pieces of a row, each with a code, and entries of its own.
        entries: How many entries there are for each piece, up to 256.
    """

    parts: int
    entries: int = MOST_ENTRIES

    def __post_init__(self) -> None:
        if type(self.parts) is not int or self.parts < 1:
            raise ValueError(f"parts must be a whole number from 1, got {self.parts!r}")
        if type(self.entries) is not int or not 2 <= self.entries <= MOST_ENTRIES:
            raise ValueError(f"entries must be a whole number from 2 to {MOST_ENTRIES}, got {self.entries!r}")

    def problem(self, shape: Shape, *, table: bool = False) -> str | None:
        rows, columns = shape
        if columns % self.parts:
            return f"{self.parts} parts do not divide its {columns} columns"
        if self.parameters(shape) >= rows * columns:
            return f"its {rows} rows are too few: codes and {self.entries} entries would hold no fewer numbers than {rows} x {columns}"
        return None

    def parameters(self, shape: Shape) -> int:
        """Of which one for each row and part is a byte."""
        return shape[0] * self.parts + self.entries * shape[1]

    def macs(self, shape: Shape) -> int:
        return shape[0] * shape[1]

    def products(self, shape: Shape) -> tuple[ProductShape, ...]:
        return ()  # what it multiplies by is put together from its codes

    def module(self, dense: nn.Module) -> nn.Module:
        if isinstance(dense, nn.Embedding):
            return CodebookTable(self, dense)
        return CodebookLinear(self, cast(nn.Linear, dense))

    def weights(self, weight: Tensor, *, table: bool = False, counts: Tensor | None = None) -> Mapping[str, Tensor]:
        """`counts` (rows,): how much each row counts; by default all alike."""
        books, codes = [], []
        for piece in weight.detach().float().chunk(self.parts, dim=1):
            book, code = clustered(piece, self.entries, counts)
            books.append(book)
            codes.append(code)
        return {"book": torch.cat(books).to(weight.dtype), "codes": torch.stack(codes, 1).to(torch.uint8)}

    @classmethod
    def example(cls, shape: Shape, *, table: bool = False) -> Form:  # noqa: ARG003
        rows, columns = shape
        parts = next(n for n in range(max(1, columns // 8), 0, -1) if columns % n == 0)
        return cls(parts, min(MOST_ENTRIES, max(2, rows // 4)))


@torch.no_grad()
def clustered(values: Tensor, entries: int, counts: Tensor | None = None, rounds: int = ROUNDS) -> tuple[Tensor, Tensor]:
    """Centres (entries, width) of the rows of `values` (n, width), and the one that is nearest to each (n,).

    k-means: the start of Arthur and Vassilvitskii (2007), which takes far rows first, then Lloyd's rounds. Always the same for the
    same values. If there are fewer different rows than entries, the rest of them repeat the first.
    """
    draw = torch.Generator(device="cpu").manual_seed(0)
    weight = values.new_ones(len(values)) if counts is None else counts.to(values)
    first = int(torch.multinomial(weight.double().cpu(), 1, generator=draw))
    centres = values[first].repeat(entries, 1)
    far = (values - centres[0]).square().sum(1)  # (n,): to the nearest centre so far
    for entry in range(1, entries):
        chance = (far * weight).double().cpu()
        if not float(chance.sum()) > 0:
            break
        centres[entry] = values[int(torch.multinomial(chance, 1, generator=draw))]
        far = torch.minimum(far, (values - centres[entry]).square().sum(1))
    codes = nearest_entries(values, centres)
    for _ in range(rounds):
        sums = torch.zeros_like(centres).index_add_(0, codes, values * weight[:, None])
        total = torch.zeros(entries).to(values).index_add_(0, codes, weight)
        centres = torch.where(total[:, None] > 0, sums / total.clamp_min(1e-30)[:, None], centres)
        before, codes = codes, nearest_entries(values, centres)
        if torch.equal(before, codes):
            break
    return centres, codes


def nearest_entries(values: Tensor, centres: Tensor) -> Tensor:
    """The centre that is nearest to each row: (n,)."""
    return (centres.square().sum(1) - 2 * values @ centres.T).argmin(1)


class _Coded(Formed):
    """The parameters `book` (parts * entries, width), and `codes` (rows, parts), which are bytes and do not learn."""

    def __init__(self, form: Codebook, weight: Tensor) -> None:
        super().__init__()
        self.form: Codebook = form
        rows, columns = int(weight.shape[0]), int(weight.shape[1])
        self.shape = (rows, columns)
        width = columns // form.parts
        self.book = nn.Parameter(weight.new_empty(form.parts * form.entries, width), requires_grad=weight.requires_grad)
        self.codes = nn.Parameter(weight.new_empty((rows, form.parts), dtype=torch.uint8), requires_grad=False)

    def rows(self, codes: Tensor) -> Tensor:
        """(..., columns) from codes (..., parts)."""
        begin = torch.arange(self.form.parts, device=codes.device) * self.form.entries
        return functional.embedding(codes.long() + begin, self.book).flatten(-2)

    def matrix(self) -> Tensor:
        return self.rows(self.codes)

    def wrong_codes(self) -> str | None:
        most = int(self.codes.max()) if self.codes.numel() else 0
        return None if most < self.form.entries else f"code {most} names none of {self.form.entries} entries"

    def looked_up(self, graph: GraphWriter, codes: Any, book: Any) -> Any:
        """The pieces of codes (., parts): (., parts, width)."""
        places = graph.apply("Cast", codes, to=7)  # to int64
        begin = graph.numbers(*(part * self.form.entries for part in range(self.form.parts)))
        return graph.apply("Gather", book, graph.apply("Add", places, begin), axis=0)

    def extra_repr(self) -> str:
        return f"{self.shape}, parts={self.form.parts}, entries={self.form.entries}"


class CodebookLinear(_Coded):
    """A Linear whose matrix is put together in each pass."""

    def __init__(self, form: Codebook, dense: nn.Linear) -> None:
        super().__init__(form, dense.weight)
        self.bias = dense.bias

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.matrix(), self.bias)

    def lower(self, graph: GraphWriter, source: Any) -> Any:
        """Codes and a codebook, of which a runtime makes a plain matrix when it loads the file.

        The book has a third axis, so that int8 does not take it for a table.
        """
        codes = graph.constant(self.codes.detach().cpu().numpy(), "codes")
        whole = self.looked_up(graph, codes, graph.constant(numbers_of(self.book)[..., None], "book"))
        turned = graph.apply("Transpose", graph.apply("Reshape", whole, graph.numbers(*self.shape)), perm=[1, 0])
        return graph.apply("MatMul", source, turned)


class CodebookTable(_Coded):
    """Row i of the table is what its codes name."""

    table: ClassVar[bool] = True

    def __init__(self, form: Codebook, dense: nn.Embedding) -> None:
        super().__init__(form, dense.weight)
        self.integers = ("book",)
        self.padding_idx = dense.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        rows = self.rows(self.codes[input])
        if self.padding_idx is None:
            return rows
        return torch.where((input == self.padding_idx)[..., None], rows.detach(), rows)

    def lower(self, graph: GraphWriter, source: Any) -> Any:
        own = graph.apply("Gather", graph.constant(self.codes.detach().cpu().numpy(), "codes"), source, axis=0)
        whole = self.looked_up(graph, own, graph.constant(numbers_of(self.book), "book"))  # (., ., parts, width)
        return graph.apply("Reshape", whole, graph.numbers(0, 0, self.shape[1]))
