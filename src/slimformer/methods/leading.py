"""Takes a smaller model out of one that was trained with elastic width and depth.

Paper: Hou, Huang, Shang, Jiang, Chen, Liu: DynaBERT: Dynamic BERT with Adaptive Width and Depth (NeurIPS 2020), section 2.3.

Idea: The leading heads and neurons of every layer stay, and layers spaced evenly. Of the pairs of width and depth within the
budget the one stays whose outputs differ least from the whole model's.

Differs: The paper gives a table of all pairs and leaves the choice to its reader. With one width and one depth ours does too.

Choose when: the model was trained by `elastic`. In any other model the leading units are those that happen to come first.

Cost: half a pass over `examples` for each pair that fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from slimformer.core.anatomy import Anatomy
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.errors import TargetError
from slimformer.hooks.gating import gated, gates_of
from slimformer.methods._nested import nested_plan
from slimformer.methods.base import Context, Effects, Method, State
from slimformer.methods.elastic import sortable
from slimformer.rules import Count, FallingShares, Share


@final
@dataclass(frozen=True)
class Leading(Method):
    """`keep`: share of the dense `cost` that may remain, at one of the `widths` and one of the `depths`.

    Those should be the ones that `elastic` was told. If several pairs fit, that one is taken whose outputs differ least from the
    whole model's on `examples` training examples.

    Example:
        >>> from slimformer import Calibrate
        >>> Calibrate(Leading(keep=1.0, widths=(0.5,), depths=(1.0,))).method.effects().cuts
        True
    """

    keep: Share = 0.5
    cost: Literal["macs", "parameters", "latency"] = "macs"
    widths: FallingShares = (1.0, 0.75, 0.5, 0.25)
    depths: FallingShares = (1.0, 0.75, 0.5)
    examples: Count = 512
    neuron_multiple: Count = 16

    def effects(self) -> Effects:
        return Effects(cuts=True, one_shot=True, encoders_only=True)

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        if cost is not None:
            self.fitting(anatomy, cost)

    def decide(self, state: State, context: Context) -> Decision:
        plans = self.fitting(context.anatomy, context.cost)
        differ = differences(context, plans, self.examples) if len(plans) > 1 else [0.0]
        return Decision(plans[min(range(len(plans)), key=differ.__getitem__)])

    def fitting(self, anatomy: Anatomy, cost: Cost) -> list[Plan]:
        """The plans within the budget, the dearest first, without those that are cheaper in width and in depth than another of them.

        TargetError if there are none.
        """
        sites = sortable(anatomy)
        found: list[tuple[float, float, Plan]] = []
        least = float("inf")
        for depth in self.depths:
            for width in self.widths:  # they fall: the first that fits is the best of its depth
                plan = nested_plan(anatomy, sites, width, depth, self.neuron_multiple)
                needed = cost.of(plan, anatomy)
                least = min(least, needed)
                if needed <= self.keep * cost.dense:
                    if all(width > wider for wider, _, _ in found):
                        found.append((width, needed, plan))
                    break
        if not found:
            raise TargetError(
                f"even the smallest of the models costs {least / cost.dense:.0%} of the dense {cost.unit}.",
                help="ask to keep more, or train and name a smaller width or depth.",
            )
        return [plan for _, _, plan in sorted(found, key=lambda item: -item[1])]


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def differences(context: Context, plans: Sequence[Plan], examples: int) -> list[float]:
    """By how much the outputs of the model that each plan leaves differ from those of the whole one: the task's mean divergence."""
    model, task = context.model, context.task
    batches = [dict(batch) for batch in context.batches(examples)]

    def outputs() -> list[dict[str, Tensor]]:
        answers = (model(**context.subject.feed(batch)) for batch in batches)
        return [{name: answer[name] for name in task.outputs} for answer in answers]

    found = []
    with context.subject.evaluating(), torch.no_grad():
        whole = outputs()
        for plan in plans:
            with gated(model, context.anatomy, gates_of(plan, context.anatomy, context.subject.device)):
                total = terms = 0.0
                for answer, expected, batch in zip(outputs(), whole, batches, strict=True):
                    total += float(task.divergence(answer, expected, batch, 1.0)) * task.terms(batch)
                    terms += task.terms(batch)
            found.append(total / max(1.0, terms))
    return found
