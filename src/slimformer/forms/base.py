"""The contract of a form: one file per form, a final frozen dataclass `Form` and the modules, each a `Formed`, that it puts in.

`Form` itself and `Dense`, the form of a plain matrix, are in `core/form.py`, because plans and anatomies speak of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from slimformer.core.form import DENSE, Dense, Form, Shape

__all__ = ["DENSE", "Dense", "Form", "Formed", "Shape", "form_of", "shape_of"]


class Formed(nn.Module, ABC):
    """A Linear or Embedding in another form: the base class of every form's modules."""

    form: Form
    shape: Shape  # of the matrix it stands for

    @abstractmethod
    def matrix(self) -> Tensor:
        """The matrix it stands for, multiplied out: `shape`."""


def form_of(module: nn.Module) -> Form:
    """The form of a Linear, an Embedding or a module that replaced one."""
    return module.form if isinstance(module, Formed) else DENSE


def shape_of(module: nn.Module) -> Shape:
    """The shape of the matrix that a Linear, an Embedding or a module that replaced one stands for."""
    if isinstance(module, Formed):
        return module.shape
    rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
    return int(rows), int(columns)
