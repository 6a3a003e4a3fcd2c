"""One-shot pruning of neurons whose output never gets large: the running maximum of each, against the spread in its layer.

Paper: Prato, Charlaix, Rezagholizadeh: Fully Quantized Transformer for Machine Translation (Findings of EMNLP 2020), on pruning.

Idea: A quantizer keeps a running maximum of what ReLU gives. A neuron whose maximum is below `z` standard deviations of the
maxima of its layer does little, and goes; so each layer loses its own share. Nothing is repaired.

Differs: Maxima are read on training examples in a pass of their own, before quantization instead of while it trains, so that the
stage after this one can win back what was lost. The paper's z is one number for all layers, tuned on validation examples; `keep`
finds it by a budget instead. For activations other than ReLU it is the largest magnitude that counts: a neuron that gives a
constant is then kept.

Choose when: the model has ReLU, and you want the paper's cut, or a baseline that needs no gradients.

Cost: one pass over `examples`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Kind, Site
from slimformer.core.budget import leading, strongest
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.hooks.feeding import unpadded
from slimformer.methods.base import Context, Effects, Method, State
from slimformer.quantizing.grids import MOMENTUM, RunningRange
from slimformer.rules import Count, Positive, ProperFraction, Share


@final
@dataclass(frozen=True)
class Peaks(Method):
    """`z`: a neuron goes if its running maximum is below so many standard deviations of those of its layer. Or `keep`: share of the
    dense `cost` that may remain; it then stands for the z that leaves so much.

    Example:
        >>> from slimformer import Calibrate
        >>> Calibrate(Peaks(z=0.5)).method.effects().cuts
        True
    """

    z: Positive | None = 1.0
    keep: Share | None = None
    cost: Literal["macs", "parameters", "latency"] = "macs"
    examples: Count = 2048  # training examples that are looked at, or all if there are fewer
    momentum: ProperFraction = MOMENTUM  # of the running maximum, over batches
    neuron_multiple: Count = 16
    sublayers: bool = False  # whether all neurons of a layer may go, and the rest of the block with them

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.z is None) == (self.keep is None):
            raise ValueError("z and keep say the same in two ways: give one of them, and set z to null if it is keep")

    def effects(self) -> Effects:
        return Effects(cuts=True, uneven=True, one_shot=True)

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        if cost is not None:
            self.choose(anatomy, cost, {site.id: np.zeros(site.size) for site in anatomy.of_kind(Kind.NEURONS)})

    def decide(self, state: State, context: Context) -> Decision:
        return Decision(self.choose(context.anatomy, context.cost, standing_out(maxima(context, self.examples, self.momentum))))

    def choose(self, anatomy: Anatomy, cost: Cost, heights: Mapping[str, np.ndarray]) -> Plan:
        """The plan for maxima in standard deviations of their layer; TargetError if `keep` is out of reach."""
        if self.keep is not None:
            budget = self.keep * cost.dense
            return strongest(anatomy, heights, cost, budget, neuron_multiple=self.neuron_multiple, sublayers=self.sublayers)
        assert self.z is not None
        counts = {name: int((height >= self.z).sum()) for name, height in heights.items()}
        return leading(anatomy, heights, counts, neuron_multiple=self.neuron_multiple, sublayers=self.sublayers)


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def standing_out(highest: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each neuron's maximum in standard deviations of the maxima of its layer: site -> (size,); infinite if all are alike."""
    heights = {}
    for name, values in highest.items():
        spread = float(values.std())
        heights[name] = values / spread if spread > 0 else np.full_like(values, np.inf)
    return heights


def maxima(context: Context, examples: int, momentum: float) -> dict[str, np.ndarray]:
    """The running maximum over batches of the magnitude of what each neuron gives at real tokens: site -> (size,)."""
    sites = context.anatomy.of_kind(Kind.NEURONS)
    running = {site.id: RunningRange(site.size, momentum).to(context.subject.device) for site in sites}
    with context.subject.evaluating(), torch.no_grad():
        for batch in context.batches(examples):
            with ExitStack() as stack:
                for site in sites:
                    mask = unpadded(batch, context.anatomy.stack_of(site.layer).tokens)
                    stack.callback(_watch(context, site, running[site.id], mask).remove)
                context.model(**context.subject.feed(batch))
            for item in running.values():
                item.settle()
    return {name: torch.maximum(-item.low, item.high).double().cpu().numpy() for name, item in running.items()}


def _watch(context: Context, site: Site, running: RunningRange, mask: Tensor) -> torch.utils.hooks.RemovableHandle:
    """Lets `running` observe what enters the last matrix of a feed-forward block."""

    def observe(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        running.observe(args[0], mask)  # (batch, seq, neurons)

    return context.model.get_submodule(site.taps[0].module).register_forward_pre_hook(observe)
