"""Module replacing: new layers stand in for groups of old ones at random, ever more often, until the old ones are gone.

Paper: Xu, Zhou, Ge, Wei, Zhou: BERT-of-Theseus: Compressing BERT by Progressive Module Replacing (EMNLP 2020), section 3.

Idea: Each group of layers has one successor layer. In each step a coin says for each group whether its own layers compute or the
successor does; only successors train, with the task's loss alone. The coin's odds rise to certainty, and the successors are the
smaller model. Nothing but that loss ties them to the model that they replace.

Differs: A successor begins as a copy of its group's first layer; the paper's begin as the lowest layers of the model, group by
group. The rate rises in a line from `start` to 1 over the share `ramp` of the steps; the paper's curve has a slope in steps. Its
second phase, fine-tuning all that is left, is the next stage of a recipe.

Choose when: you want a plain dense model of fewer layers, and no teacher's hidden states: for other tasks than classification,
or if distillation's weights are a burden. Compare with `layers`, which is distilled with the same steps.

Cost: a training run; in a step in which a group is replaced its other layers are computed for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Kind, is_shared
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.errors import TargetError
from slimformer.hooks.gating import gated
from slimformer.hooks.weights import changed_weights
from slimformer.methods._depth import depths, layers_of, leaving
from slimformer.methods._schedules import linear_ramp
from slimformer.methods.base import Context, Effects, Method, Progress, State, Step
from slimformer.rules import Fraction, Share


@final
@dataclass(frozen=True)
class Theseus(Method):
    """`keep`: share of the dense `cost` that may remain; as many successor layers as fit, at least one in each stack.

    The model's own weights do not train while it is at work, whatever the stage says: embeddings and head neither, as in the
    paper. After each epoch the metric is that of the successors alone.

    Example:
        >>> from slimformer import Train
        >>> Train(epochs=5, methods=(Theseus(keep=0.5),)).cuts
        True
    """

    keep: Share = 0.5
    cost: Literal["macs", "parameters", "latency"] = "macs"
    start: Fraction = 0.3  # the probability at first that a group is replaced in a step
    ramp: Fraction = 0.5  # share of the training over which it rises to 1; at 0 it stays at `start`, the paper's constant rate

    def effects(self) -> Effects:
        return Effects(cuts=True, neutral=False)

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        if cost is not None:
            grouped(anatomy, cost, self.keep)

    def foresee(self, anatomy: Anatomy, cost: Cost | None) -> Plan | None:
        return None if cost is None else dropping(anatomy, grouped(anatomy, cost, self.keep))

    def attach(self, context: Context) -> State:
        return _State(context, grouped(context.anatomy, context.cost, self.keep), self.start)

    def penalty(self, state: State, step: Step) -> Tensor | None:
        state = cast(_State, state)
        if any(state.replaced):
            return None
        return 0.0 * torch.stack([successor.sum() for successor in state.successors]).sum()  # nothing trains in this step

    def advance(self, state: State, progress: Progress) -> None:
        done = linear_ramp(progress, self.ramp) if self.ramp else 0.0
        cast(_State, state).rate.fill_(self.start + (1 - self.start) * done)

    def report(self, state: State) -> Mapping[str, float]:
        return {"replaced": float(cast(_State, state).rate)}

    def decide(self, state: State, context: Context) -> Decision:
        state = cast(_State, state)
        weights = {name: parameter.detach() for name, parameter in zip(state.names, state.successors, strict=True)}
        return Decision(dropping(context.anatomy, state.together), weights=weights)


# -- State ---------------------------------------------------------------------------------------------------------------------


class _State(State):
    """The successors' weights, the odds that they compute, and the hooks that put them in place of their groups."""

    def __init__(self, context: Context, groups: Sequence[Sequence[int]], start: float) -> None:
        super().__init__()
        model, anatomy = context.model, context.anatomy
        self.together = groups
        self.rate: Tensor  # a buffer, so that a resumed run knows it
        self.register_buffer("rate", torch.tensor(start))
        self.replaced = [True] * len(groups)
        parameters, owners = dict(model.named_parameters()), list[int]()
        self.names: list[str] = []
        for index, group in enumerate(groups):
            inside = f"{anatomy.layers[group[0]]}."
            mine = [name for name in parameters if name.startswith(inside) and not is_shared(name)]
            self.names += mine
            owners += [index] * len(mine)
        copies = (parameters[name].detach().clone() for name in self.names)
        self.successors = nn.ParameterList(nn.Parameter(copy) for copy in copies)
        hooks = ExitStack()
        for parameter in parameters.values():
            hooks.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        hooks.callback(model.register_forward_pre_hook(lambda module, _: self._draw(module.training)).remove)
        changes = {
            name: self._stand_in(place, owner) for place, (name, owner) in enumerate(zip(self.names, owners, strict=True))
        }
        hooks.enter_context(changed_weights(model, changes))
        closed = {site: self._reader(index) for index, group in enumerate(groups) for site in _sublayers(anatomy, group[1:])}
        hooks.enter_context(gated(model, anatomy, closed))
        self.on_close(hooks.close)

    def _draw(self, training: bool) -> None:
        coins = torch.rand(len(self.together)).tolist()
        self.replaced = [not training or coin < float(self.rate) for coin in coins]

    def _stand_in(self, place: int, owner: int) -> Callable[[Tensor], Tensor]:
        return lambda weight: self.successors[place] if self.replaced[owner] else weight

    def _reader(self, index: int) -> Callable[[], Tensor]:
        return lambda: self.rate.new_zeros(1) if self.replaced[index] else self.rate.new_ones(1)


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def grouped(anatomy: Anatomy, cost: Cost, keep: float) -> list[list[int]]:
    """Layers next to one another in groups of about one size, as many groups as layers fit into `keep` of the dense cost.

    Of several stacks each has its share of the groups, and one at least. TargetError if not even that fits.
    """
    stacks = layers_of(anatomy)
    least = 1.0
    for left in depths([len(layers) for layers in stacks], decoder_first=False):
        parts = [part for layers, count in zip(stacks, left, strict=True) for part in np.array_split(layers, count)]
        groups = [[int(layer) for layer in part] for part in parts]
        least = cost.of(dropping(anatomy, groups), anatomy) / cost.dense
        if least <= keep:
            return groups
    raise TargetError(f"even one layer costs {least:.0%} of the dense {cost.unit}.", help=f"ask to keep {least:.0%} or more.")


def dropping(anatomy: Anatomy, groups: Sequence[Sequence[int]]) -> Plan:
    """The plan by which only the first layer of each group stays."""
    return leaving(anatomy, [group[0] for group in groups])


# -- Plumbing ------------------------------------------------------------------------------------------------------------------


def _sublayers(anatomy: Anatomy, layers: Sequence[int]) -> list[str]:
    return [site.id for site in anatomy.of_kind(Kind.SUBLAYER) if site.layer in layers]
