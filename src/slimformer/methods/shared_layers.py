"""Shared layers: one set of weights computes several layers, as in ALBERT, and the model trains on with it.

Paper: Lan, Chen, Goodman, Gimpel, Sharma, Soricut: ALBERT (ICLR 2020), section 3.1, cross-layer parameter sharing; Dehghani et al.:
Universal Transformers (ICLR 2019) for layers that repeat.

Idea: Layers are put into groups, and each group has the weights of its first layer. Every use of them adds to their gradient. The
model computes as many layers as before, and has the numbers of a few. The other layers hold copies, which follow after each step, so that
methods beside this one see the same numbers in each of them.

Differs: ALBERT is trained so from scratch, and shares all layers; here a model that came trained shares from one step to the next,
and distillation is to repair it. Norms are shared with the rest. ALBERT's factorised embedding is left out.

Choose when: bytes count, and milliseconds do not: an ONNX file holds equal matrices once, and computes no faster. Fewer layers are
faster too: compare `layers` at the same number of weights.

Cost: nothing beside the training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Kind, is_shared
from slimformer.core.cost import Cost
from slimformer.errors import TargetError
from slimformer.hooks.weights import changed_weights
from slimformer.methods._depth import layers_of
from slimformer.methods.base import Context, Effects, Method, Progress, State
from slimformer.rules import Count


@final
@dataclass(frozen=True)
class SharedLayers(Method):
    """`distinct`: sets of weights in each stack of layers, at most as many as it has layers.

    `order`: "block" gives one set to layers next to one another (1 1 2 2), "cycle" takes turns (1 2 1 2).

    Later stages that train must have it among their methods too, or the layers would part again. Beside it may stand what changes all
    layers alike: `knowledge_sparse` by magnitude, or `adaptive_span` with `alike`; put this one first.

    Example:
        >>> from slimformer import Train
        >>> Train(methods=(SharedLayers(distinct=2),)).methods[0].effects().shares
        True
    """

    distinct: Count = 1
    order: Literal["block", "cycle"] = "block"

    def effects(self) -> Effects:
        return Effects(refills=True, shares=True, neutral=False)

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        groups = self.groups_of(anatomy)
        most = max(map(len, layers_of(anatomy)), default=0)
        if all(len(group) == 1 for group in groups):
            raise TargetError(
                f"shared_layers has nothing to share: {self.distinct} sets of weights are asked for, and the model has "
                f"{most} layer{'s' * (most != 1)}.",
                help=f"ask for distinct: {most - 1} or less." if most > 1 else "leave shared_layers out.",
            )
        alike(anatomy, groups)

    def attach(self, context: Context) -> State:
        self.check(context.anatomy, context.cost)
        return _State(context, copies(context, self.groups_of(context.anatomy)))

    def advance(self, state: State, progress: Progress) -> None:
        cast(_State, state).copy()

    def groups_of(self, anatomy: Anatomy) -> list[list[int]]:
        """The layers that share, by place among the layers of all stacks; a layer of which nothing is left is in none."""
        return [group for layers in layers_of(anatomy) for group in grouped_layers(layers, self.distinct, self.order)]


# -- State ---------------------------------------------------------------------------------------------------------------------


class _State(State):
    """Puts the weights of each group's first layer into the others. It has no parameters: the first layer's train."""

    def __init__(self, context: Context, first_of: Mapping[str, str]) -> None:
        super().__init__()
        own = dict(context.model.named_parameters())
        self._pairs = [(own[name], own[first]) for name, first in first_of.items()]
        self.copy()
        stack = ExitStack()
        for name in first_of:
            stack.callback(own[name].requires_grad_, own[name].requires_grad)
            own[name].requires_grad_(False)
        stack.enter_context(
            changed_weights(context.model, {name: partial(_instead, own[first]) for name, first in first_of.items()})
        )
        self.on_close(stack.close)

    @torch.no_grad()
    def copy(self) -> None:
        """Gives the other layers what the first ones have now."""
        for other, first in self._pairs:
            other.copy_(first)


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def grouped_layers(layers: Sequence[int], distinct: int, order: str) -> list[list[int]]:
    """`layers` in so many groups, or each by itself if there are fewer: neighbours of about one size, or in turns."""
    count = min(distinct, len(layers))
    if order == "cycle":
        return [list(layers[start::count]) for start in range(count)]
    return [[int(layer) for layer in part] for part in np.array_split(layers, count)]


def alike(anatomy: Anatomy, groups: Sequence[Sequence[int]]) -> None:
    """TargetError if layers of one group were cut differently."""
    for first, *others in groups:
        for other in others:
            mine, theirs = (_shapes(anatomy, layer) for layer in (first, other))
            if mine != theirs:
                part = next(iter(sorted(set(mine.items()) ^ set(theirs.items()))))[0]
                sizes = " and ".join(str(shapes.get(part, "gone")) for shapes in (mine, theirs))
                raise TargetError(
                    f"layers {first} and {other} cannot share weights: they were cut differently ({part}: {sizes}).",
                    help="cut all layers alike (`layers`, `hidden_width`), or share fewer: more `distinct`, or another `order`.",
                )


def copies(context: Context, groups: Sequence[Sequence[int]]) -> dict[str, str]:
    """Parameter -> the one of its group's first layer that stands in for it."""
    names = [name for name, _ in context.model.named_parameters() if not is_shared(name)]
    found = {}
    for first, *others in groups:
        inside = f"{context.anatomy.layers[first]}."
        for other in others:
            for name in names:
                if name.startswith(inside):
                    found[f"{context.anatomy.layers[other]}.{name.removeprefix(inside)}"] = name
    return found


# -- Plumbing ------------------------------------------------------------------------------------------------------------------


def _shapes(anatomy: Anatomy, layer: int) -> dict[str, tuple[int, ...] | str]:
    """The shapes and forms of a layer's matrices, by their names within it."""
    sublayers = {site.id for site in anatomy.of_kind(Kind.SUBLAYER) if site.layer == layer}
    inside = [matrix for matrix in anatomy.matrices.values() if matrix.sublayer in sublayers]
    return {matrix.id.split(".", 2)[2]: matrix.shape if matrix.dense else f"{matrix.shape} {matrix.form}" for matrix in inside}


def _instead(first: nn.Parameter, _: Tensor) -> Tensor:
    return first
