"""A form: how one matrix is stored and multiplied, as a module that stands where its Linear or Embedding stood.

One file per form, final frozen dataclasses whose fields are its options, small enough for plan.json. A form counts itself by
arithmetic, says why a matrix cannot take it, and makes the parameters that come nearest to given weights. Putting a form in is
`shrink.py`'s work; `Dense` is the form of a plain matrix.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from torch import Tensor, nn

from slimformer import registry
from slimformer.errors import PlanError, nearest

if TYPE_CHECKING:
    from slimformer.core.anatomy import Matrix

Shape = tuple[int, int]  # of a Linear (out, in), of an Embedding (rows, width)


class Form(ABC):
    """Five questions; none of them touches a model.

    `reads`: the part of its module whose input an integer product reads, "" where that is the module itself; None where there is no
    such product, and the matrix stays in float.
    """

    reads: ClassVar[str | None] = None

    @abstractmethod
    def problem(self, matrix: Matrix) -> str | None:
        """Why `matrix` cannot be stored so, as the end of a sentence; None where it can."""

    @abstractmethod
    def parameters(self, shape: Shape) -> int:
        """Numbers stored for a matrix of this shape, its bias left out."""

    @abstractmethod
    def macs(self, shape: Shape) -> int:
        """Multiply-accumulates of one token's product with a matrix of this shape."""

    @abstractmethod
    def module(self, dense: nn.Module) -> nn.Module:
        """What replaces a Linear or Embedding: its bias is taken over, the parameters of the form still hold nothing."""

    @abstractmethod
    def weights(self, weight: Tensor, *, table: bool = False) -> Mapping[str, Tensor]:
        """The form's parameters, by their names in the module, that come nearest to `weight` in the Frobenius norm.

        `table`: whether it is an Embedding's, whose module may lay them out in another way than a Linear's.
        """

    @classmethod
    @abstractmethod
    def example(cls, matrix: Matrix) -> Form:
        """Some form of this kind that `matrix` can take: what the checks try out."""

    def to_data(self) -> dict[str, Any]:
        """The form as plain data; `read` gives it back."""
        return {"use": registry.name_of(self)} | {entry.name: getattr(self, entry.name) for entry in _options(self)}


@final
@dataclass(frozen=True)
class Dense(Form):
    """A plain matrix."""

    reads: ClassVar[str | None] = ""

    def problem(self, matrix: Matrix) -> str | None:
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
    def example(cls, matrix: Matrix) -> Form:  # noqa: ARG003
        return cls()


DENSE = Dense()


class Formed(nn.Module, ABC):
    """A Linear or Embedding in another form: what each module of a form is."""

    form: Form
    shape: Shape  # of the matrix it stands for

    @abstractmethod
    def matrix(self) -> Tensor:
        """The matrix it stands for, multiplied out: `shape`."""


def form_of(module: nn.Module) -> Form:
    """The form that a Linear, an Embedding or what replaced one has."""
    return module.form if isinstance(module, Formed) else DENSE


def shape_of(module: nn.Module) -> Shape:
    """The shape of the matrix that a Linear, an Embedding or what replaced one stands for."""
    if isinstance(module, Formed):
        return module.shape
    rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
    return int(rows), int(columns)


def read(data: Any, where: str) -> Form:
    """The form that `to_data` wrote; PlanError, with `where` it stood, for anything else, whatever it is."""
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
    except (TypeError, ValueError) as error:
        raise PlanError(f"matrix '{where}': {error}.") from None
    return form


def _options(form: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(form)
