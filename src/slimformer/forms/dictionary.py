"""A matrix as codes of a few values, packed, with its outliers apart in float.

Zadeh, Edo, Awad, Moshovos: GOBO (MICRO 2020); groups of rows with values of their own: Shen et al.: Q-BERT (AAAI 2020).
Four codes of 4 values, two of 16 or one of 256 fill a byte, five of 8 values two bytes: 2, 4, 8 and 3.2 bits a number.
The exported file holds them so; a runtime makes a plain matrix of them once, when it loads the file, with standard operators.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from slimformer.forms.base import Form, Formed, GraphWriter, ProductShape, Shape, numbers_of

PACKING = {
    4: (4, torch.uint8),
    8: (5, torch.int16),
    16: (2, torch.uint8),
    256: (1, torch.uint8),
}  # entries -> codes in one number, and its type
UNLIKELY = -4.0  # the logarithm of the density below which a number is an outlier, in the paper


@final
@dataclass(frozen=True)
class Dictionary(Form):
    """Codes of a few values.

    Attributes:
        entries: The number of values: 4, 8, 16 or 256.
        outliers: How many numbers are kept apart as they are.
        groups: Groups of rows that follow one another, each with values of its own.
    """

    entries: int
    outliers: int = 0
    groups: int = 1

    def __post_init__(self) -> None:
        if type(self.entries) is not int or self.entries not in PACKING:
            raise ValueError(f"entries must be 4, 8, 16 or 256, got {self.entries!r}")
        if type(self.outliers) is not int or self.outliers < 0:
            raise ValueError(f"outliers must be a whole number from 0, got {self.outliers!r}")
        if type(self.groups) is not int or self.groups < 1:
            raise ValueError(f"groups must be a whole number from 1, got {self.groups!r}")

    @property
    def per_number(self) -> int:
        """Codes that are packed into one number."""
        return PACKING[self.entries][0]

    @property
    def bits(self) -> float:
        """Bits of a code in a file."""
        return 8 * torch.empty(0, dtype=PACKING[self.entries][1]).element_size() / self.per_number

    def problem(self, shape: Shape, *, table: bool = False) -> str | None:
        rows, columns = shape
        if rows % self.groups:
            return f"{self.groups} groups do not divide its {rows} rows"
        if self.parameters(shape) >= rows * columns:
            return f"with {self.outliers} outliers it would hold no fewer numbers than its {rows} x {columns}"
        return None

    def parameters(self, shape: Shape) -> int:
        """Numbers stored, of which most are packed codes: a byte or two each."""
        return math.ceil(shape[0] * shape[1] / self.per_number) + self.groups * self.entries + 2 * self.outliers

    def macs(self, shape: Shape) -> int:
        return shape[0] * shape[1]

    def products(self, shape: Shape) -> tuple[ProductShape, ...]:
        return ()  # what it multiplies by is put together from its codes

    def module(self, dense: nn.Module) -> nn.Module:
        if isinstance(dense, nn.Embedding):
            return DictionaryTable(self, dense)
        return DictionaryLinear(self, cast(nn.Linear, dense))

    def weights(self, weight: Tensor, *, table: bool = False) -> Mapping[str, Tensor]:
        """The outliers are the numbers that are farthest from the mean, as many as the form says."""
        flat = weight.detach().float().flatten()
        far = (flat - flat.mean()).abs()
        places = far.topk(self.outliers).indices.sort().values
        inside = torch.ones_like(flat, dtype=torch.bool)
        inside[places] = False
        numbers, there = flat.chunk(self.groups), inside.chunk(self.groups)  # rows of a group follow one another
        values = [centroids(own[kept], self.entries) for own, kept in zip(numbers, there, strict=True)]
        codes = torch.cat([nearest_values(own, its) for own, its in zip(numbers, values, strict=True)])
        parts = {"values": torch.cat(values).to(weight.dtype), "codes": self.packed(codes)}
        if self.outliers:
            parts |= {"apart": flat[places].to(weight.dtype), "places": places.to(torch.int32)}
        return parts

    def packed(self, codes: Tensor) -> Tensor:
        """Codes (n,), several in each number: the first is its lowest digit."""
        short = -len(codes) % self.per_number
        digits = functional.pad(codes.long(), (0, short)).unflatten(0, (-1, self.per_number))
        steps = self.entries ** torch.arange(self.per_number, device=codes.device)
        return (digits * steps).sum(1).to(PACKING[self.entries][1])

    def unpacked(self, packed: Tensor, count: int) -> Tensor:
        """The first `count` codes."""
        steps = self.entries ** torch.arange(self.per_number, device=packed.device)
        return (packed.long()[:, None] // steps % self.entries).flatten()[:count]

    @classmethod
    def example(cls, shape: Shape, *, table: bool = False) -> Form:  # noqa: ARG003
        return cls(8 if shape[0] % 16 else 16, 2)


@torch.no_grad()
def unlikely(weight: Tensor, threshold: float = UNLIKELY) -> int:
    """How many numbers have a density below exp(`threshold`) under the Gaussian of the mean and spread of all."""
    flat = weight.detach().double().flatten()
    spread = float(flat.std(unbiased=False))
    if spread == 0:
        return 0
    density = -0.5 * ((flat - flat.mean()) / spread).square() - math.log(spread * math.sqrt(2 * math.pi))
    return int((density < threshold).sum())


@torch.no_grad()
def centroids(values: Tensor, entries: int) -> Tensor:
    """The values that stand for all, rising: (entries,).

    They begin as means of bins with as many numbers each. In each round a number goes to the nearest, and each value becomes the mean
    of its own; it ends when the sum of distances does not get smaller: no k-means, which minimises squares.
    """
    flat = values.double().sort().values
    if not len(flat):
        return values.new_zeros(entries)
    bins = flat.tensor_split(entries)
    found = torch.stack([item.mean() if len(item) else flat[-1] for item in bins])
    best, least = found, math.inf
    while True:
        codes = nearest_values(flat, found)
        distance = float((flat - found[codes]).abs().sum())
        if not distance < least:  # nor with a number that is none
            return best.to(values.dtype)
        best, least = found, distance
        count = torch.bincount(codes, minlength=entries)
        sums = torch.zeros_like(found).index_add_(0, codes, flat)
        found = torch.where(count > 0, sums / count.clamp_min(1), found)


def nearest_values(values: Tensor, sorted_entries: Tensor) -> Tensor:
    """The entry that is nearest to each number: (n,)."""
    middles = (sorted_entries[1:] + sorted_entries[:-1]) / 2
    return torch.bucketize(values, middles.to(values))


class _Coded(Formed):
    """The parameters `values` (groups * entries,), `codes`, packed, and if there are outliers `apart` and `places` in the flat matrix."""

    def __init__(self, form: Dictionary, weight: Tensor) -> None:
        super().__init__()
        self.form: Dictionary = form
        self.shape = (int(weight.shape[0]), int(weight.shape[1]))

        def empty(count: int, kind: torch.dtype | None = None) -> nn.Parameter:
            return nn.Parameter(weight.new_empty(count, dtype=kind), requires_grad=weight.requires_grad and kind is None)

        self.values = empty(form.groups * form.entries)
        self.codes = empty(math.ceil(weight.numel() / form.per_number), PACKING[form.entries][1])
        if form.outliers:
            self.apart, self.places = empty(form.outliers), empty(form.outliers, torch.int32)

    def matrix(self) -> Tensor:
        codes = self.form.unpacked(self.codes, math.prod(self.shape)).view(self.form.groups, -1)
        begin = torch.arange(self.form.groups, device=codes.device) * self.form.entries
        flat = self.values[(codes + begin[:, None]).flatten()]
        if self.form.outliers:
            flat = flat.scatter(0, self.places.long(), self.apart)
        return flat.view(self.shape)

    def wrong_codes(self) -> str | None:
        if int(self.codes.min()) < 0:
            return "a packed code is negative"
        if self.form.outliers and not 0 <= int(self.places.min()) <= int(self.places.max()) < math.prod(self.shape):
            return f"an outlier lies outside of its {self.shape[0]} x {self.shape[1]}"
        return None

    def written(self, graph: GraphWriter) -> Any:
        """The plain matrix (rows, columns), as a runtime makes it of the codes."""
        integer, count = 6, math.prod(self.shape)  # ONNX's number of int32
        packed = graph.apply("Cast", graph.constant(self.codes.detach().cpu().numpy(), "codes"), to=integer)
        packed = graph.apply("Reshape", packed, graph.numbers(-1, 1))
        steps = np.array([[self.form.entries**digit for digit in range(self.form.per_number)]], dtype=np.int32)
        digits = graph.apply("Div", packed, graph.constant(steps, "steps"))
        digits = graph.apply("Mod", digits, graph.constant(np.array([self.form.entries], dtype=np.int32), "entries"))
        codes = graph.apply("Reshape", digits, graph.numbers(-1))
        if count % self.form.per_number:
            codes = graph.apply("Slice", codes, graph.numbers(0), graph.numbers(count))
        if self.form.groups > 1:
            begin = np.arange(self.form.groups, dtype=np.int32)[:, None] * np.int32(self.form.entries)
            codes = graph.apply("Reshape", codes, graph.numbers(self.form.groups, -1))
            codes = graph.apply("Reshape", graph.apply("Add", codes, graph.constant(begin, "begin")), graph.numbers(-1))
        flat = graph.apply("Gather", graph.constant(numbers_of(self.values), "values"), codes, axis=0)
        if self.form.outliers:
            places = graph.constant(self.places.detach().cpu().numpy(), "places")
            flat = graph.apply("ScatterElements", flat, places, graph.constant(numbers_of(self.apart), "apart"), axis=0)
        return graph.apply("Reshape", flat, graph.numbers(*self.shape))

    def extra_repr(self) -> str:
        return f"{self.shape}, entries={self.form.entries}, outliers={self.form.outliers}, groups={self.form.groups}"


class DictionaryLinear(_Coded):
    """A Linear whose matrix is put together in each pass."""

    def __init__(self, form: Dictionary, dense: nn.Linear) -> None:
        super().__init__(form, dense.weight)
        self.bias = dense.bias

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.matrix(), self.bias)

    def lower(self, graph: GraphWriter, source: Any) -> Any:
        return graph.apply("MatMul", source, graph.apply("Transpose", self.written(graph), perm=[1, 0]))


class DictionaryTable(_Coded):
    """A table that is put together in each pass."""

    table: ClassVar[bool] = True

    def __init__(self, form: Dictionary, dense: nn.Embedding) -> None:
        super().__init__(form, dense.weight)
        self.padding_idx = dense.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        return functional.embedding(input, self.matrix(), self.padding_idx)

    def lower(self, graph: GraphWriter, source: Any) -> Any:
        return graph.apply("Gather", self.written(graph), source, axis=0)
