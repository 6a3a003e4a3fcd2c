"""LayerDrop: whole layers are left out at random while the model trains, so that any depth can be taken from it afterwards.

Paper: Fan, Grave, Joulin: Reducing Transformer Depth on Demand with Structured Dropout (ICLR 2020), sections 3.1 to 3.3.

Idea: In each step every layer is left out with a fixed probability, and its input passes on. A model that is used to that loses
little when layers go for good: one training, many depths.

Differs: The paper drops from the first step of pre-training on; here it is a stage of fine-tuning, or of distillation, which the
authors also try. Sublayers may drop apart (`units`), as their ablation does. A layer that is left out is computed all the same,
so training is not faster.

Choose when: you want several depths of one model, or do not know the depth yet: a stage with it, then `layers` once for each
depth. For one known depth compare it with `layers` first and training after it, for as many steps.

Cost: nothing to speak of.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from slimformer.core.anatomy import Anatomy, Kind
from slimformer.hooks.gating import gated
from slimformer.methods.base import Context, Effects, Method, State
from slimformer.rules import Fraction


@final
@dataclass(frozen=True)
class LayerDrop(Method):
    """`rate`: the probability that a layer is left out of a step. To keep r of n layers later the paper advises 1 - r / n.

    Example:
        >>> from slimformer import Train
        >>> Train(methods=(LayerDrop(rate=0.5),)).cuts
        False
    """

    rate: Fraction = 0.2
    units: Literal["layers", "sublayers"] = (
        "layers"  # what is left out together: all of a layer, or an attention or FFN by itself
    )

    def effects(self) -> Effects:
        return Effects(neutral=False)

    def attach(self, context: Context) -> State:
        return _State(context, self)


# -- State ---------------------------------------------------------------------------------------------------------------------


class _State(State):
    """The draw of each step, and the gates that follow it. In evaluation all layers are there."""

    def __init__(self, context: Context, method: LayerDrop) -> None:
        super().__init__()
        model, device = context.model, context.subject.device
        groups = dropped_together(context.anatomy, method.units)
        self._gates = [torch.ones(1, device=device) for _ in groups]
        readers = {site: self._reader(index) for index, sites in enumerate(groups) for site in sites}
        hooks = ExitStack()
        hooks.callback(
            model.register_forward_pre_hook(lambda module, _: self._draw(method.rate if module.training else 0.0)).remove
        )
        hooks.enter_context(gated(model, context.anatomy, readers))
        self.on_close(hooks.close)

    def _reader(self, index: int) -> Callable[[], Tensor]:
        return lambda: self._gates[index]

    def _draw(self, rate: float) -> None:
        stays = (torch.rand(len(self._gates)) >= rate).float()
        self._gates = [gate.to(old.device) for gate, old in zip(stays.split(1), self._gates, strict=True)]


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def dropped_together(anatomy: Anatomy, units: str) -> list[tuple[str, ...]]:
    """The sites of each unit: all sublayers of a layer, or each by itself."""
    sublayers = anatomy.of_kind(Kind.SUBLAYER)
    if units == "sublayers":
        return [(site.id,) for site in sublayers]
    layers = sorted({site.layer for site in sublayers})
    return [tuple(site.id for site in sublayers if site.layer == layer) for layer in layers]
