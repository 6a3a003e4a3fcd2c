"""A form: how one matrix is stored and multiplied. `Dense` is the form of a plain matrix; the others are in `forms/`.

A form is a frozen dataclass whose fields are its options, small enough for plan.json. It counts itself by arithmetic,
says why a matrix cannot take it, and makes the module that replaces the Linear or Embedding, with the parameters that
come nearest to given weights. `shrink.py` puts a form into a model.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, final

from slimformer import registry
from slimformer.errors import PlanError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

Shape = tuple[int, int]  # of a Linear (out, in), of an Embedding (rows, width)


class ProductShape(NamedTuple):
    """A product of activations with a constant matrix: `rows` of `width` numbers for each token, `out` numbers from each row."""

    rows: int
    width: int
    out: int


class Form(ABC):
    """Questions about one matrix; none of them touches a model. `table` says that the matrix is an Embedding's, not a Linear's.

    `reads`: the submodules whose inputs are quantized for int8, in the order in which they compute; "" is the module itself, and
    without any the matrix stays in float.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def problem(self, shape: Shape, *, table: bool = False) -> str | None:
        """Why a matrix of this shape cannot be stored so, as the end of a sentence; None if it can."""

    @abstractmethod
    def parameters(self, shape: Shape) -> int:
        """Numbers stored for a matrix of this shape, its bias left out."""

    @abstractmethod
    def macs(self, shape: Shape) -> int:
        """Multiply-accumulates of one token's product with a matrix of this shape."""

    @abstractmethod
    def module(self, dense: nn.Module) -> nn.Module:
        """The module that replaces a Linear or Embedding: it takes the bias over, its other parameters still hold nothing."""

    @abstractmethod
    def weights(self, weight: Tensor, *, table: bool = False) -> Mapping[str, Tensor]:
        """The form's parameters, by their names in the module, that come nearest to `weight` in the Frobenius norm."""

    def products(self, shape: Shape) -> tuple[ProductShape, ...]:
        """The products that an exported Linear of this shape computes with constant matrices, in integers if `reads` says so."""
        return (ProductShape(1, shape[1], shape[0]),)

    def products_at(self, reader: str, shape: Shape) -> tuple[ProductShape, ...]:
        """Those of the `products` that read the input of one of `reads`: all if it is the only one, else one for each in turn."""
        every = self.products(shape)
        return every if len(self.reads) == 1 else (every[self.reads.index(reader)],)

    @classmethod
    @abstractmethod
    def example(cls, shape: Shape, *, table: bool = False) -> Form:
        """Some form of this kind that a matrix of this shape can take, for the contract checks; any, if it can take none."""

    def to_data(self) -> dict[str, Any]:
        """The form as plain data; `form_from_data` gives it back."""
        return {"use": registry.name_of(self)} | {entry.name: getattr(self, entry.name) for entry in _options(self)}


@final
@dataclass(frozen=True)
class Dense(Form):
    """A plain matrix."""

    reads: ClassVar[tuple[str, ...]] = ("",)

    def problem(self, shape: Shape, *, table: bool = False) -> str | None:
        return None

    def parameters(self, shape: Shape) -> int:
        return shape[0] * shape[1]

    def macs(self, shape: Shape) -> int:
        return shape[0] * shape[1]

    def module(self, dense: nn.Module) -> nn.Module:
        return dense

    def weights(self, weight: Tensor, *, table: bool = False) -> Mapping[str, Tensor]:
        return {"weight": weight}

    @classmethod
    def example(cls, shape: Shape, *, table: bool = False) -> Form:  # noqa: ARG003
        return cls()


DENSE = Dense()


def form_from_data(data: Any, where: str) -> Form:
    """The form that `to_data` wrote for the matrix `where`; PlanError for anything else.

    >>> form_from_data({"use": "kronecker", "a": [8, 4], "terms": 2}, "encoder.0.query")
    Kronecker(a=(8, 4), terms=2)
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("use"), str):
        raise PlanError(f"matrix '{where}': a form must be a mapping with `use`, not {data!r}.")
    name = data["use"]
    if name not in registry.names("forms"):
        raise PlanError(
            f"matrix '{where}': this slimformer knows no form '{name}'.",
            help=f"install the slimformer that wrote it; {nearest(name, registry.names('forms'))}.",
        )
    kind = registry.find("forms", name)
    options = {key: value for key, value in data.items() if key != "use"}
    if set(options) != {entry.name for entry in _options(kind)}:
        raise PlanError(f"matrix '{where}': the form '{name}' does not have exactly the options {sorted(options)}.")
    try:
        form: Form = kind(**options)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise PlanError(f"matrix '{where}': {error}.") from None
    return form


def _options(form: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(form)
