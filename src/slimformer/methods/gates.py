"""Structured pruning with hard-concrete gates on heads and neurons, held to a target cost by a Lagrangian.

McCarley, Chakravarti, Sil: Structured Pruning of a BERT-based Question Answering Model (2019) for the gates; Louizos et al. (2018)
for the hard concrete; Xia et al. (CoFi, ACL 2022) for the Lagrangian on the expected size. Differences: the target may be MACs,
parameters or measured milliseconds; it ramps up from the dense cost; the final choice meets the budget exactly by the same search
as `fisher`; gate values are folded into the weights. Initial log alpha is our choice (the paper gives none): +2.5,
P(open) = 0.98.
Choose it over `fisher` when there is time for an epoch or more of selection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, final

import torch
from torch import Tensor, nn

from slimformer.allocation import allocate
from slimformer.anatomy import Anatomy, Kind
from slimformer.cost import Cost
from slimformer.gating import gated
from slimformer.methods.base import Context, Method, Progress, State, Step
from slimformer.plan import Decision

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1  # Louizos et al., section 2.2
_SHIFT = BETA * math.log(-LOW / HIGH)


def opening(log_alpha: Tensor) -> Tensor:
    """P(gate > 0) = sigmoid(log alpha - beta log(-l / r))."""
    return torch.sigmoid(log_alpha - _SHIFT)


def sampled(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """A gate in [0, 1] drawn with `uniform` noise in (0, 1)."""
    noise = uniform.clamp(1e-4, 1 - 1e-4)
    stretched = torch.sigmoid((noise.log() - (1 - noise).log() + log_alpha) / BETA) * (HIGH - LOW) + LOW
    return stretched.clamp(0, 1)


def settled(log_alpha: Tensor) -> Tensor:
    """The gate at test time: no noise."""
    return (torch.sigmoid(log_alpha) * (HIGH - LOW) + LOW).clamp(0, 1)


class _State(State):
    """log alpha per site, two multipliers, and the hooks that put the gates in place."""

    def __init__(self, anatomy: Anatomy, cost: Cost, method: Gates, model: nn.Module) -> None:
        super().__init__()
        self.sites = [site for site in anatomy.sites.values() if site.kind is not Kind.SUBLAYER]
        self.log_alpha = nn.ParameterList([nn.Parameter(torch.full((site.size,), method.start)) for site in self.sites])
        self.multipliers = nn.Parameter(torch.zeros(2))  # of the gap and of its square
        self.lr = method.lr
        self.multiplier_lr = method.multiplier_lr
        for index, site in enumerate(self.sites):
            self.register_buffer(f"curve_{index}", torch.tensor(cost.curves[site.id] / cost.dense, dtype=torch.float32))
        self.fixed = (cost.dense - sum(float(cost.curves[site.id][-1]) for site in self.sites)) / cost.dense
        self.target: Tensor
        self.register_buffer("target", torch.tensor(1.0))  # a buffer, so that a resumed run knows it
        hooks = ExitStack()
        hooks.enter_context(
            gated(model, anatomy, {site.id: self._reader(index, model) for index, site in enumerate(self.sites)})
        )
        self.on_close(hooks.close)

    def _reader(self, index: int, model: nn.Module) -> Any:
        def read() -> Tensor:
            log_alpha = self.log_alpha[index]
            if model.training:
                return sampled(log_alpha, torch.rand_like(log_alpha))
            return settled(log_alpha)

        return read

    def groups(self) -> list[dict[str, Any]]:
        return [
            {"params": list(self.log_alpha), "lr": self.lr, "weight_decay": 0.0},
            {"params": [self.multipliers], "lr": self.multiplier_lr, "weight_decay": 0.0, "maximize": True},
        ]

    def expected(self) -> Tensor:
        """Expected cost as a share of the dense cost: each curve at the expected number of open units."""
        total = self.multipliers.new_tensor(self.fixed)
        for index in range(len(self.sites)):
            curve = getattr(self, f"curve_{index}")
            open_units = opening(self.log_alpha[index]).sum()
            low = open_units.detach().floor().clamp(0, len(curve) - 2).long()
            total = total + curve[low] + (open_units - low) * (curve[low + 1] - curve[low])
        return total


@final
@dataclass(frozen=True)
class Gates(Method):
    """`target`: share of the dense cost to reach. `ramp`: share of the training over which it comes down."""

    target: float = 0.5
    cost: Literal["macs", "parameters", "latency"] = "macs"
    lr: float = 0.05
    multiplier_lr: float = 0.05
    start: float = 2.5
    ramp: float = 0.5
    neuron_multiple: int = 16
    fold: bool = True

    decides: ClassVar[bool] = True
    neutral: ClassVar[bool] = False  # settled(2.5) is 1 after clamping, but training draws noise

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise ValueError(f"target must be above 0 and at most 1, got {self.target}")
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp must be within 0 and 1, got {self.ramp}")

    def attach(self, context: Context) -> State:
        return _State(context.anatomy, context.cost, self, context.model)

    def penalty(self, state: State, step: Step) -> Tensor | None:
        state = cast(_State, state)
        gap = state.expected() - state.target
        return state.multipliers[0] * gap + state.multipliers[1] * gap.square()

    def advance(self, state: State, progress: Progress) -> None:
        done = min(1.0, progress.fraction / self.ramp) if self.ramp else 1.0
        cast(_State, state).target.fill_(1.0 + (self.target - 1.0) * done)

    def report(self, state: State) -> Mapping[str, float]:
        state = cast(_State, state)
        return {"cost": float(state.expected().detach()), "target": float(state.target)}

    def decide(self, state: State, context: Context) -> Decision:
        state = cast(_State, state)
        values = {site.id: state.log_alpha[index].detach() for index, site in enumerate(state.sites)}
        plan = allocate(
            context.anatomy,
            {name: opening(value).double().cpu().numpy() for name, value in values.items()},
            context.cost,
            self.target * context.cost.dense,
            neuron_multiple=self.neuron_multiple,
            sublayers=True,
        )
        if not self.fold:
            return Decision(plan)
        gone = {site.id for site in state.sites if site.sublayer and plan.keep.get(site.sublayer) == ()}
        return Decision(plan, scales={name: settled(value) for name, value in values.items() if name not in gone})
