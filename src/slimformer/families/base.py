"""A family: a table that tells where a skeleton keeps its heads, neurons and sublayers.

One file per skeleton. A family declares names; it never searches for them in a graph. Its one piece of surgery is `skip`: taking
a whole sublayer out so that only the residual is left, under unchanged names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from slimformer import registry
from slimformer.core.anatomy import Anatomy, Counter, Kind, Matrix, Point, PointRole, Role, Site, Slice, Tap
from slimformer.errors import ModelError
from slimformer.forms.base import form_of, shape_of

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel


class SkippedAttention(nn.Module):
    """Stands where an attention block was: what came in goes out."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states, None


class SkippedZero(nn.Module):
    """Stands where a feed-forward branch beside a residual was: adds nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.new_zeros(())


class SkippedBranch(nn.Module):
    """Stands where an attention branch beside a residual was: adds nothing."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states.new_zeros(()), None


class SkippedInput(nn.Module):
    """Stands at the start of a feed-forward block that is gone; `SkippedOutput` ends it."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class SkippedOutput(nn.Module):
    """Stands at the end of a feed-forward block that is gone: gives the residual back."""

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return residual


ATTENTION = (Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUT)
SKIPPED = (SkippedAttention, SkippedBranch, SkippedZero, SkippedInput, SkippedOutput)


class Family(ABC):
    """Final classes without state; `model_types` are transformers' `config.model_type` values."""

    model_types: ClassVar[tuple[str, ...]]

    @abstractmethod
    def anatomy(self, model: PreTrainedModel) -> Anatomy:
        """The anatomy of a model of this family, dense or already cut."""

    @abstractmethod
    def skip(self, model: PreTrainedModel, site: Site) -> None:
        """Takes a SUBLAYER site out of `model`, in place: only the residual flows on."""

    def inputs(self, model: PreTrainedModel) -> tuple[str, ...]:
        """Names of the model's inputs."""
        return ("input_ids", "attention_mask")


def family_of(model_type: str) -> Family:
    """The family of a `config.model_type`; ModelError that lists the known ones."""
    known: dict[str, str] = {}
    for name in registry.names("families"):
        cls = registry.find("families", name)
        known |= dict.fromkeys(cls.model_types, name)
    if model_type not in known:
        raise ModelError(
            f"no family knows the architecture '{model_type}'.",
            help=f"supported: {', '.join(sorted(known))}. docs/extend.md shows how to add one.",
        )
    family: Family = registry.find("families", known[model_type])()
    return family


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """The anatomy of any supported model."""
    return family_of(model.config.model_type).anatomy(model)


@dataclass(frozen=True)
class Subject:
    """A model and what is known of it, so that it is found once and carried along."""

    model: PreTrainedModel
    family: Family
    anatomy: Anatomy
    inputs: tuple[str, ...]  # names of the model's inputs

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next(self.model.parameters()).device

    def feed(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, Tensor]:
        """What the model reads of a batch, as tensors on its device: labels and other columns are left out."""
        device = self.device
        return {name: torch.as_tensor(batch[name], device=device) for name in self.inputs if name in batch}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Puts the model into eval mode while the context lasts; each module is then as it was before."""
        training = {module: module.training for module in self.model.modules()}
        self.model.train(False)
        try:
            yield
        finally:
            for module, before in training.items():
                module.training = before


def subject_of(model: PreTrainedModel) -> Subject:
    """The subject of any supported model; ModelError that lists the supported ones for another."""
    family = family_of(model.config.model_type)
    return Subject(model, family, family.anatomy(model), family.inputs(model))


def matrix_of(model: PreTrainedModel, name: str, module: str, role: Role, sublayer: str | None = None) -> Matrix:
    """The matrix of the Linear or Embedding at `module`, in whatever form it is stored."""
    found = model.get_submodule(module)
    own = f"{module}.weight"
    ties = dict(model.all_tied_weights_keys or {})  # name -> the name whose tensor it shares
    tied = ties.get(own) or next((name for name, source in ties.items() if source == own), None)
    return Matrix(name, module, shape_of(found), role, sublayer, form_of(found), tied)


def linear_slices(module: str, dim: int, unit: int, *, parts: int = 1, bias: bool = True) -> tuple[Slice, ...]:
    """Slices of a Linear: rows with their bias entries (dim 0), or columns (dim 1)."""
    weight = Slice(f"{module}.weight", dim, unit, parts)
    return (weight, Slice(f"{module}.bias", 0, unit, parts)) if dim == 0 and bias else (weight,)


def attention_site(
    layer: int, inputs: tuple[str, ...], output: str, *, heads: int, head_dim: int, counters: tuple[Counter, ...]
) -> Site:
    """The heads of one attention: rows of each input projection, columns of the output projection."""
    slices = tuple(piece for name in inputs for piece in linear_slices(name, 0, head_dim))
    return Site(
        id=f"encoder.{layer}.heads",
        kind=Kind.HEADS,
        size=heads,
        layer=layer,
        slices=slices + linear_slices(output, 1, head_dim),
        taps=(Tap(output, "input", head_dim),),
        counters=counters,
        sublayer=f"encoder.{layer}.attention",
    )


def ffn_site(layer: int, into: str, out: str, *, width: int) -> Site:
    """The neurons of one feed-forward block: rows of the first matrix, columns of the second."""
    return Site(
        id=f"encoder.{layer}.neurons",
        kind=Kind.NEURONS,
        size=width,
        layer=layer,
        slices=linear_slices(into, 0, 1) + linear_slices(out, 1, 1),
        taps=(Tap(out, "input"),),
        sublayer=f"encoder.{layer}.ffn",
    )


def sublayer_site(layer: int, name: str, *, end: str, start: str, modules: tuple[str, ...]) -> Site:
    """A whole attention or feed-forward block: one unit; gate 0 leaves what enters `start`."""
    return Site(
        id=f"encoder.{layer}.{name}",
        kind=Kind.SUBLAYER,
        size=1,
        layer=layer,
        taps=(Tap(end, "output", residual=start),),
        modules=modules,
    )


def attention_points(layer: int, own: str, inputs: tuple[str, str, str], output: str, norm: str) -> list[Point]:
    """Points of one attention: what its projections read and give, its softmax, what the output projection reads, its norm."""
    where = f"encoder.{layer}.attention"
    given = [
        Point(f"encoder.{layer}.{name}.output", (module,), "output", PointRole.ATTENTION, where)
        for name, module in zip(("query", "key", "value"), inputs, strict=True)
    ]
    softmax = [
        Point(f"encoder.{layer}.softmax.numerator", (own,), "numerator", PointRole.SOFTMAX, where),
        Point(f"encoder.{layer}.softmax.denominator", (own,), "denominator", PointRole.SOFTMAX, where),
        Point(f"encoder.{layer}.softmax.output", (own,), "quotient", PointRole.SOFTMAX, where),
    ]
    return [
        Point(f"{where}.input", inputs, "input", PointRole.MATRIX, where),
        *given,
        *softmax,
        Point(f"encoder.{layer}.attention_out.input", (output,), "input", PointRole.MATRIX, where),
        *norm_points(f"{where}.norm", norm, where),
    ]


def ffn_points(layer: int, into: str, out: str, norm: str) -> list[Point]:
    """Points of one feed-forward block: what its two matrices read, what it gives, its norm."""
    where = f"encoder.{layer}.ffn"
    return [
        Point(f"encoder.{layer}.ffn_in.input", (into,), "input", PointRole.MATRIX, where),
        Point(f"encoder.{layer}.ffn_out.input", (out,), "input", PointRole.MATRIX, where),
        Point(f"encoder.{layer}.ffn_out.output", (out,), "output", PointRole.BRANCH, where),
        *norm_points(f"{where}.norm", norm, where),
    ]


def norm_points(name: str, module: str, sublayer: str | None = None) -> list[Point]:
    """The parts of one LayerNorm, in the order in which they are computed."""
    sides: tuple[Literal["numerator", "denominator", "quotient", "output"], ...]
    sides = ("numerator", "denominator", "quotient", "output")
    return [Point(f"{name}.{side}", (module,), side, PointRole.NORM, sublayer) for side in sides]


def outer_points(model: nn.Module, norm: str, inner: tuple[str, ...], last: tuple[str, ...]) -> list[Point]:
    """Points outside the layers: the embeddings' sum and norm, and what the named Linears read, where the model has them.

    `last` names the Linears that give outputs; which of these names there are differs from head to head.
    """
    modules = dict(model.named_modules())
    return [
        Point("embeddings.sum", (norm,), "input", PointRole.EMBEDDING),
        *norm_points("embeddings.norm", norm),
        *(
            Point(f"{name}.input", (name,), "input", role)
            for names, role in ((inner, PointRole.MATRIX), (last, PointRole.HEAD))
            for name in names
            if isinstance(modules.get(name), nn.Linear)
        ),
    ]
