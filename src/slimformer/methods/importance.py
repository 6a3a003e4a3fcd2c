"""One-shot pruning by what each gate is worth: at random, by first-order gain, or by leaving one head out at a time.

Paper: the three plain ways of McCarley, Chakravarti, Sil: Structured Pruning of a BERT-based Question Answering Model (2019),
section 3.3, which come before `gates` on the paper's ladder; Michel, Levy, Neubig: Are Sixteen Heads Really Better than One?
(2019) for gain.

Idea: Each head and neuron gets one number, the numbers form one ranking, and the best that fit the budget stay. Nothing is
repaired or folded: gates that stay are 1.

Differs: Random is one draw by the run's seed and keeps an exact number (theirs: each gate by itself, Bernoulli(p)): judge it by
several seeds. Gain looks at 2,048 examples, in bf16 where a CPU gains by it (theirs: all training data once), and takes the
absolute value per example, so that the batch size does not matter. Leave-one-out measures the mean task loss on training
examples, not F1 on the dev set, which nothing here may choose on, and in float32, since one head changes little. One ranking
fills the budget: of gain per cost (a head costs as much as a hundred neurons), of the plain number for the others.

Choose when: you need the baseline that a better method has to beat.

Cost: nothing for random; one pass with gradients for gain; one pass for each head for leave-one-out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import torch

from slimformer.core.anatomy import Anatomy, Kind, Site
from slimformer.core.budget import strongest
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.hooks.gating import gated
from slimformer.methods._gradients import gate_gradients
from slimformer.methods.base import Context, Effects, Method, State
from slimformer.rules import Count, Share


@final
@dataclass(frozen=True)
class Importance(Method):
    """`how` the units are ranked; `keep`: share of the dense `cost` that may remain.

    - "random" looks at no data; the run's seed makes the draw.
    - "gain" takes one pass with gradients over the examples.
    - "leave_one_out" takes one pass for each head, without that head: heads only, and a few hundred examples will do.

    Example:
        >>> from slimformer import Calibrate
        >>> Calibrate(Importance(how="leave_one_out", units="heads")).method.effects().cuts
        True
    """

    how: Literal["random", "gain", "leave_one_out"] = "gain"
    keep: Share = 0.5
    cost: Literal["macs", "parameters", "latency"] = "macs"
    units: Literal["heads", "neurons", "both"] = "both"
    examples: Count = 2048  # training examples that are looked at, or all if there are fewer; the paper's gain looks at all
    neuron_multiple: Count = 16
    sublayers: bool = False  # whether all units of a sublayer may go, and the rest of it with them; the paper leaves the rest

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.how == "leave_one_out" and self.units != "heads":
            raise ValueError(f"units must be heads if how is leave_one_out (one pass for each unit), got {self.units}")

    def effects(self) -> Effects:
        return Effects(cuts=True, uneven=True, one_shot=True)

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        if cost is not None:
            self.choose(anatomy, cost, {site.id: np.zeros(site.size) for site in self.sites(anatomy)})

    def decide(self, state: State, context: Context) -> Decision:
        ranking = self.rank(context, self.sites(context.anatomy))
        return Decision(self.choose(context.anatomy, context.cost, ranking))

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """The sites that are ranked."""
        kinds = (Kind.HEADS, Kind.NEURONS) if self.units == "both" else (Kind(self.units),)
        return [site for site in anatomy.sites.values() if site.kind in kinds]

    def choose(self, anatomy: Anatomy, cost: Cost, ranking: Mapping[str, np.ndarray]) -> Plan:
        """The plan of a ranking; TargetError if `keep` is out of reach."""
        budget, multiple = self.keep * cost.dense, self.neuron_multiple
        return strongest(anatomy, ranking, cost, budget, neuron_multiple=multiple, sublayers=self.sublayers)

    def rank(self, context: Context, sites: list[Site]) -> dict[str, np.ndarray]:
        """The number that each unit is ranked by: site -> (size,), the largest stay."""
        if self.how == "random":
            return {site.id: torch.rand(site.size, generator=context.generator).numpy() for site in sites}
        if self.how == "leave_one_out":
            return left_out(context, sites, self.examples)
        curves = context.cost.curves
        return {name: value * len(value) / curves[name][-1] for name, value in gain(context, sites, self.examples).items()}


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def gain(context: Context, sites: list[Site], examples: int) -> dict[str, np.ndarray]:
    """Mean over examples of |d loss / d gate| with all gates at 1: site -> (size,)."""
    total = {site.id: np.zeros(site.size) for site in sites}
    seen = 0
    for gradients in gate_gradients(context, sites, examples):
        for name, gradient in gradients.items():
            total[name] += gradient.abs().sum(0).numpy()  # (units,)
        seen += len(next(iter(gradients.values()), ()))
    return {name: value / max(1, seen) for name, value in total.items()}


def left_out(context: Context, sites: list[Site], examples: int) -> dict[str, np.ndarray]:
    """By how much the mean loss rises with one unit gated to 0 and all others whole: site -> (size,); below 0 if it falls."""
    batches = [dict(batch) for batch in context.batches(examples)]
    device = context.subject.device

    answers: list[dict[str, torch.Tensor]] = []  # of a task without labels, those of the whole model

    def loss() -> float:
        total = terms = 0.0
        for index, batch in enumerate(batches):
            output = context.model(**context.subject.feed(batch))
            if context.task.labelled:
                lost = context.task.loss(output, batch)
            elif len(answers) == index:
                answers.append({name: output[name] for name in context.task.outputs})
                continue
            else:
                lost = context.task.divergence(output, answers[index], batch, 1.0)
            total += float(lost) * context.task.terms(batch)
            terms += context.task.terms(batch)
        return total / max(1.0, terms)

    rises = {}
    with context.subject.evaluating(), torch.no_grad():
        whole = loss()
        for site in sites:
            rise = np.zeros(site.size)
            for unit in range(site.size):
                gate = torch.ones(site.size, device=device)
                gate[unit] = 0.0
                with gated(context.model, context.anatomy, {site.id: gate}):
                    rise[unit] = loss() - whole
            rises[site.id] = rise
    return rises
