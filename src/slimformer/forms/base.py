"""The contract of a form: one file per form, a final frozen dataclass `Form` and the modules, each a `Formed`, that it puts in.

`Form` itself and `Dense`, the form of a plain matrix, are in `core/form.py`, because plans and anatomies speak of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor, nn
from torch.nn import functional

from slimformer.core.form import DENSE, Dense, Form, ProductShape, Shape

__all__ = [
    "DENSE",
    "Decoder",
    "Dense",
    "Form",
    "Formed",
    "GraphWriter",
    "ProductShape",
    "Shape",
    "form_of",
    "formed_around",
    "numbers_of",
    "shape_of",
    "weight_of",
]


class GraphWriter(Protocol):
    """Writes ONNX's standard operators into an exported graph; values are opaque to a form."""

    def constant(self, values: np.ndarray, name: str) -> Any:
        """A constant, whole numbers as they are and all others in float32; `name` says which part of the matrix it is."""

    def numbers(self, *values: int) -> Any:
        """A constant of whole numbers, such as a shape."""

    def apply(self, operator: str, *inputs: Any, **attributes: Any) -> Any:
        """The one output of a standard operator."""


class Formed(nn.Module, ABC):
    """A Linear or Embedding in another form: the base class of every form's modules.

    A module that stands for a Linear calls the Linear's bias `bias`, and adds it last.
    """

    form: Form
    shape: Shape  # of the matrix it stands for
    table: ClassVar[bool] = False  # whether it stands for an Embedding
    # the parameters that int8 files store as integers: one for each of the form's `reads`, or a table's rows
    integers: tuple[str, ...] = ()

    def lower(self, graph: GraphWriter, source: Any) -> Any:
        """Writes what an exported graph computes in its place, the bias left out: by default the product with `matrix()`.

        `source`: the input (., ., in), or the ids (., .) of a table.
        """
        matrix = numbers_of(self.matrix())
        if self.table:
            return graph.apply("Gather", graph.constant(matrix, "weight"), source, axis=0)
        return graph.apply("MatMul", source, graph.constant(matrix.T, "weight"))

    def reader_of(self, part: str) -> str:
        """The one of the form's `reads` whose product multiplies by a part of the matrix: a parameter, or what was written with it.

        The last product has the name of the bias behind it, and so no part's.
        """
        readers = self.form.reads or ("",)
        return dict(zip(self.integers, readers, strict=False)).get(part, readers[-1])

    def __getattr__(self, name: str) -> Any:
        """None for the weight of the matrix it stands for: a T5 asks one of its Linears for its type."""
        if name == "weight" and name not in self._parameters:
            return None
        return super().__getattr__(name)

    @abstractmethod
    def matrix(self) -> Tensor:
        """The matrix it stands for, multiplied out: `shape`."""

    def wrong_codes(self) -> str | None:
        """What is wrong with whole numbers that it stores, as a sentence; None if all are in their bounds."""
        return None

    def decode(self, states: Tensor) -> Tensor:
        """Of a table: the product of states (..., width) with the row of each word: (..., words)."""
        return functional.linear(states, self.matrix())

    def decoder(self, linear: nn.Linear) -> Decoder:
        """What stands in the place of a Linear whose weight was the table that this one stands for."""
        return Decoder(self, linear)


class Decoder(nn.Module):
    """The last matrix of a language model if it is the word table, and that has another form: it has a bias and no weight of its own."""

    def __init__(self, table: Formed, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        self._table = (table,)  # a tuple, so that its parameters stand once among the model's

    @property
    def weight(self) -> Tensor:
        """The matrix, multiplied out, for heads that read it and do not call the module: (words, hidden)."""
        return self._table[0].matrix()

    def forward(self, states: Tensor) -> Tensor:
        scores = self._table[0].decode(states)
        return scores if self.bias is None else scores + self.bias.to(scores.dtype)


def form_of(module: nn.Module) -> Form:
    """The form of a Linear, an Embedding or a module that replaced one."""
    return module.form if isinstance(module, Formed) else DENSE


def shape_of(module: nn.Module) -> Shape:
    """The shape of the matrix that a Linear, an Embedding or a module that replaced one stands for."""
    if isinstance(module, Formed):
        return module.shape
    rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
    return int(rows), int(columns)


def formed_around(model: nn.Module, reader: str) -> Formed | None:
    """The module in another form that a point's module is, or is a part of; None if the point's module is a plain Linear."""
    for name in (reader, reader.rpartition(".")[0]):
        module = model.get_submodule(name)
        if isinstance(module, Formed):
            return module
    return None


def weight_of(model: nn.Module, reader: str) -> str:
    """The name of the parameter that a point's module multiplies by: a Linear's weight, or one of the `integers` of a form's
    module."""
    formed = formed_around(model, reader)
    if formed is None:
        return f"{reader}.weight"
    path, _, part = (reader, "", "") if formed is model.get_submodule(reader) else reader.rpartition(".")
    return f"{path}.{formed.integers[formed.form.reads.index(part)]}"


def forms_in(model: nn.Module) -> dict[str, Formed]:
    """The matrices in another form than a plain one, by the names of their modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Formed)}


def numbers_of(values: Tensor) -> np.ndarray:
    """A tensor as float32 numbers, wherever it lies."""
    return np.asarray(values.detach().float().cpu().numpy())
