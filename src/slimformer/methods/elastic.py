"""Elastic width and depth: one training of models within a model, any of which can be taken from it afterwards.

Paper: Hou, Huang, Shang, Jiang, Chen, Liu: DynaBERT: Dynamic BERT with Adaptive Width and Depth (NeurIPS 2020), sections 2.1
to 2.3.

Idea: Heads and neurons are ordered by what the loss loses without them, so that the narrower model is the leading part of the wider
one. Then all widths learn together from the whole model's answers; in a second stage all depths do too. Layers that go are
spaced evenly.

Differs: The paper runs every step at four widths (and three depths each) and adds up the gradients: twelve passes a step. Here each
example of a batch is passed through a model of its own, in equal shares, so that a step costs one pass; it takes more steps.
The order is by the mean of |d loss / d gate| over examples for heads and neurons alike; the paper sums over the weights of a
neuron. The paper's teacher of the first stage is the tuned model, that of the second the model of the first; here it is the
recipe's in both. What is compared is for `distillation` to say: with hidden states, a layer that is left out asks the one before it
for what it would have given. The paper's own last fine-tuning of a single model is a stage behind `leading`.

Choose when: you want several sizes and do not know yet which: a stage with it, then `leading` once for each size. For one
known size compare it with `fisher` first and as many steps.

Cost: one pass with gradients over `examples`; every step computes the whole model, so training is as slow as without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Kind, Site
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision
from slimformer.errors import TargetError
from slimformer.hooks.gating import gated
from slimformer.methods._nested import even_layers, leading_count
from slimformer.methods.base import Context, Effects, Method, State
from slimformer.methods.importance import gain
from slimformer.rules import Count, FallingShares


@final
@dataclass(frozen=True)
class Elastic(Method):
    """`widths`, `depths`: shares of the heads and neurons of each layer, and of the layers, of the models that learn together.

    With `depths` of 1 alone only the width is elastic, as in the paper's first stage.

    `sort`: whether units are put in order first, by their gain on `examples` training examples. A second stage goes on in the order of
    the first without it. At the end the weights are stored in that order, which changes no output: the leading units are the
    most important ones, and `leading` takes them.
    `neuron_multiple`: neurons are counted in such steps.

    Example:
        >>> from slimformer import Train
        >>> stages = (Train(methods=(Elastic(depths=(1.0,)),)), Train(methods=(Elastic(sort=False),)))
        >>> stages[0].cuts
        False
    """

    widths: FallingShares = (1.0, 0.75, 0.5, 0.25)
    depths: FallingShares = (1.0, 0.75, 0.5)
    sort: bool = True
    examples: Count = 2048
    neuron_multiple: Count = 16

    def effects(self) -> Effects:
        return Effects(rewrites=True, refills=self.sort, neutral=False, encoders_only=True)  # an order tears blocks of zeros

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        sortable(anatomy)

    def attach(self, context: Context) -> State:
        return _State(context, self)

    def decide(self, state: State, context: Context) -> Decision:
        orders = cast(_State, state).orders()
        if not self.sort:
            return Decision()
        return Decision(weights=sorted_weights(context.model, sortable(context.anatomy), orders))


# -- State ---------------------------------------------------------------------------------------------------------------------


class _State(State):
    """The order of each site's units, and the model that each example of a batch passes through. In evaluation it is the whole one."""

    def __init__(self, context: Context, method: Elastic) -> None:
        super().__init__()
        anatomy, device = context.anatomy, context.subject.device
        sites = sortable(anatomy)
        worth = gain(context, sites, method.examples) if method.sort else {}
        self._names = [site.id for site in sites]
        for place, site in enumerate(sites):
            order = torch.arange(site.size)
            if method.sort:
                order = torch.argsort(torch.from_numpy(worth[site.id]), descending=True, stable=True)
            self.register_buffer(f"order_{place}", order.to(device))
        self._shares = (method.widths, method.depths)
        self._drawn: tuple[Tensor, Tensor] | None = None  # for each example the place of its width and of its depth
        readers = {site.id: self._narrow(place, site, method) for place, site in enumerate(sites)}
        stay = torch.tensor(
            [
                [float(layer in even_layers(anatomy, depth)) for layer in range(len(anatomy.layer_modules))]
                for depth in method.depths
            ]
        ).to(device)  # (depths, layers)
        readers |= {site.id: self._shallow(stay[:, site.layer, None]) for site in anatomy.of_kind(Kind.SUBLAYER)}
        hooks = ExitStack()
        hooks.callback(context.model.register_forward_pre_hook(self._draw, with_kwargs=True).remove)
        hooks.enter_context(gated(context.model, anatomy, readers))
        self.on_close(hooks.close)

    def orders(self) -> dict[str, Tensor]:
        """The units of each site, the most important ones first."""
        return {name: self.get_buffer(f"order_{place}") for place, name in enumerate(self._names)}

    def _narrow(self, place: int, site: Site, method: Elastic) -> Callable[[], Tensor]:
        counts = torch.tensor([leading_count(site, width, method.neuron_multiple) for width in method.widths])

        def read() -> Tensor:
            order = self.get_buffer(f"order_{place}")
            if self._drawn is None:
                return torch.ones(site.size, device=order.device)
            rank = torch.argsort(order)  # of each unit
            return (rank < counts.to(order.device)[self._drawn[0], None]).float()  # (batch, units)

        return read

    def _shallow(self, stay: Tensor) -> Callable[[], Tensor]:
        return lambda: stay.new_ones(1) if self._drawn is None else stay[self._drawn[1]]  # (batch, 1)

    def _draw(self, model: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> None:
        self._drawn = None
        if model.training:
            ids = inputs["input_ids"] if "input_ids" in inputs else args[0]
            models = equal_shares(len(ids), len(self._shares[0]) * len(self._shares[1])).to(ids.device)
            self._drawn = (models // len(self._shares[1]), models % len(self._shares[1]))


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def sortable(anatomy: Anatomy) -> list[Site]:
    """The heads and neurons of a model.

    TargetError if they can be put in no order: it writes texts; its heads share a bias, whose columns stand in their order; heads attend
    by patterns, which stand in it too; or a matrix of theirs is factored.
    """
    if len(anatomy.stacks) > 1:
        raise TargetError(
            "elastic widths are for encoders, and this model writes texts.", help="cut it with `fisher` or `layers`."
        )
    if anatomy.shares_bias:
        raise TargetError(
            "the heads of this model share a bias for positions, so that they can be put in no other order.",
            help="cut it with `fisher` or `gates`.",
        )
    if anatomy.patterns:
        raise TargetError(
            "the heads of this model attend by patterns, so that they can be put in no other order, nor cut.",
            help="train elastic widths first, then give heads their patterns.",
        )
    sites = list(anatomy.units)
    for site in sites:
        factored = anatomy.factored(site)
        if factored:
            raise TargetError(
                f"the units of '{site.id}' cannot be ordered and cut: '{factored[0].id}' is stored as {factored[0].form}.",
                help="train elastic widths first, factor after.",
            )
    return sites


def equal_shares(examples: int, models: int) -> Tensor:
    """The model of each example, drawn so that none has more than one example more than another: (examples,)."""
    rounds = -(-examples // models)
    drawn = torch.cat([torch.randperm(models) for _ in range(rounds)])[:examples]
    return drawn[torch.randperm(examples)]


def sorted_weights(model: nn.Module, sites: list[Site], orders: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with each site's units in its order: the same function."""
    weights: dict[str, Tensor] = {}
    for site in sites:
        for piece in site.slices:
            value = weights.get(piece.param, model.get_parameter(piece.param).detach())
            rows = torch.tensor(piece.rows(site.size, orders[site.id].tolist()), device=value.device)
            weights[piece.param] = value.movedim(piece.dim, 0)[rows].movedim(0, piece.dim)
    return weights
