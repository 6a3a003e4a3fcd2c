"""One-shot pruning by what each gate is worth: at random, by first-order gain, or by leaving one head out at a time.

The three plain ways of McCarley, Chakravarti, Sil (2019), section 3.3, below `gates` on the paper's ladder; gain is that of Michel,
Levy, Neubig (2019). Nothing is repaired or folded: gates that stay are 1. What we chose: random keeps an exact number, where the paper
draws each gate by itself, Bernoulli(p); gain looks at 2,048 examples, the paper at the training set once, and takes the absolute value
per example, so that the batch size does not matter; leave-one-out measures the mean task loss on training examples, not F1 on the dev
set, which nothing here may choose on, and in float32, since one head changes little; one ranking fills the budget, of gain per cost (a
head costs as much as a hundred neurons), of the plain number for the other two. Choose it as the baseline that a better method has to
beat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import numpy as np
import torch

from slimformer.core.anatomy import Anatomy, Kind, Site
from slimformer.core.budget import strongest
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.families.base import family_of
from slimformer.hooks.gating import gated
from slimformer.methods.base import Batch, Context, Method, State
from slimformer.training.precision import looking

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@final
@dataclass(frozen=True)
class Importance(Method):
    """`how` the units are ranked; `keep`: share of the dense cost that may remain.

    "random" looks at no data. "gain" takes one pass with gradients over the examples. "leave_one_out" takes one pass per head without:
    heads only, and fewer examples will do (a few hundred).
    """

    how: Literal["random", "gain", "leave_one_out"] = "gain"
    keep: float = 0.5
    cost: Literal["macs", "parameters", "latency"] = "macs"
    units: Literal["heads", "neurons", "both"] = "both"
    examples: int = 2048
    neuron_multiple: int = 16
    sublayers: bool = False  # whether all units of a sublayer may go, and the rest of it with them; the paper leaves the rest

    decides: ClassVar[bool] = True
    trains: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.how not in ("random", "gain", "leave_one_out"):
            raise ValueError(f"how must be random, gain or leave_one_out, got {self.how!r}")
        if self.units not in ("heads", "neurons", "both"):
            raise ValueError(f"units must be heads, neurons or both, got {self.units!r}")
        if self.how == "leave_one_out" and self.units != "heads":
            raise ValueError(f"units must be heads where how is leave_one_out (one pass for each unit), got {self.units}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {self.keep}")
        if self.examples < 1:
            raise ValueError(f"examples must be at least 1, got {self.examples}")
        if self.neuron_multiple < 1:
            raise ValueError(f"neuron_multiple must be at least 1, got {self.neuron_multiple}")

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        if cost is not None:
            self._chosen({site.id: np.zeros(site.size) for site in self.sites(anatomy)}, anatomy, cost)

    def decide(self, state: State, context: Context) -> Decision:
        return Decision(self._chosen(self.rank(context, self.sites(context.anatomy)), context.anatomy, context.cost))

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """The sites that are ranked."""
        kinds = (Kind.HEADS, Kind.NEURONS) if self.units == "both" else (Kind(self.units),)
        return [site for site in anatomy.sites.values() if site.kind in kinds]

    def _chosen(self, ranked: Mapping[str, np.ndarray], anatomy: Anatomy, cost: Cost) -> Plan:
        """The plan of a ranking; TargetError where `keep` is out of reach."""
        budget, multiple = self.keep * cost.dense, self.neuron_multiple
        return strongest(anatomy, ranked, cost, budget, neuron_multiple=multiple, sublayers=self.sublayers)

    def rank(self, context: Context, sites: list[Site]) -> dict[str, np.ndarray]:
        """What the ranking goes by: site -> (size,), the largest stay."""
        if self.how == "random":
            return {site.id: torch.rand(site.size, generator=context.generator).numpy() for site in sites}
        if self.how == "leave_one_out":
            return left_out(context, sites, self.examples)
        curves = context.cost.curves
        return {name: value * len(value) / curves[name][-1] for name, value in gain(context, sites, self.examples).items()}


def gain(context: Context, sites: list[Site], examples: int) -> dict[str, np.ndarray]:
    """Mean over examples of |d loss / d gate| with all gates at 1: site -> (size,)."""
    model, task = context.model, context.task
    total = {site.id: np.zeros(site.size) for site in sites}
    seen = 0
    was_training = model.training
    model.eval()
    try:
        for batch in context.batches(examples):
            rows, device = len(batch["input_ids"]), batch["input_ids"].device
            gates = {site.id: torch.ones(rows, site.size, device=device, requires_grad=True) for site in sites}
            with torch.enable_grad(), gated(model, context.anatomy, gates), looking(device):
                loss = task.loss(_output(model, batch), batch) * rows  # a sum, so that each row's gradient is its own
            gradients = torch.autograd.grad(loss, list(gates.values()))
            for name, gradient in zip(gates, gradients, strict=True):
                total[name] += gradient.double().abs().sum(0).cpu().numpy()  # (units,)
            seen += rows
    finally:
        model.train(was_training)
    return {name: value / max(1, seen) for name, value in total.items()}


def left_out(context: Context, sites: list[Site], examples: int) -> dict[str, np.ndarray]:
    """By how much the mean loss rises with one unit gated to 0 and all others whole: site -> (size,); below 0 where it falls."""
    model, task = context.model, context.task
    batches = [dict(batch) for batch in context.batches(examples)]
    was_training = model.training
    model.eval()

    def loss() -> float:
        total = rows = 0.0
        for batch in batches:
            total += float(task.loss(_output(model, batch), batch)) * len(batch["input_ids"])
            rows += len(batch["input_ids"])
        return total / max(1.0, rows)

    try:
        with torch.no_grad():
            whole = loss()
            found = {}
            for site in sites:
                rise = np.zeros(site.size)
                for unit in range(site.size):
                    gate = torch.ones(site.size, device=next(model.parameters()).device)
                    gate[unit] = 0.0
                    with gated(model, context.anatomy, {site.id: gate}):
                        rise[unit] = loss() - whole
                found[site.id] = rise
    finally:
        model.train(was_training)
    return found


def _output(model: PreTrainedModel, batch: Batch) -> Any:
    names = family_of(model.config.model_type).inputs(model)
    return model(**{name: batch[name] for name in names if name in batch})
