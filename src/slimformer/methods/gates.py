"""Structured pruning with hard-concrete gates on the heads and neurons of a tuned model.

Paper: McCarley, Chakravarti, Sil: Structured Pruning of a BERT-based Question Answering Model (2019), section 3, for gates,
removal and the order of the steps; Louizos et al. (2018) for the hard concrete; Xia et al. (CoFi, ACL 2022) for the Lagrangian on
the expected size.

Idea: Each head and neuron gets a gate that is drawn at random and can close exactly. Training moves the probability that it is
open, pulled by the task's loss and by the expected cost; in the end its log alpha decides which units stay.

Differs: The size is met exactly, in MACs, parameters, measured milliseconds or units of each kind; the paper tries penalties
until one fits, then a threshold for each kind. With `keep` alone heads and neurons compete in one ranking. Penalties are a
*mean* open probability per kind, so that one number serves models of any size. The third vector of gates, on the hidden width,
is left out: the authors could not train it. They give neither the initial log alpha nor the penalties: ours start at +2.5,
P(open) = 0.98, so that training begins near the tuned model, and rise to 1 over half the steps.

Choose when: you have some 400 steps for each kind of gate; then prefer it to `fisher` and `importance`. On a model tuned
on MRPC, gates that trained for 109 steps chose hardly better than at random; with 436 steps almost nothing was lost
(docs/methods/structured.md).

Cost: a training run, in which each gate is one more number and one more product. With `apart: true` each kind gets half of the
steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Kind, Site
from slimformer.core.budget import allocate, leading, something_left, strongest
from slimformer.core.cost import Cost, unit_count
from slimformer.core.plan import Decision, Plan
from slimformer.errors import TargetError
from slimformer.hooks.gating import gated
from slimformer.methods._schedules import linear_ramp
from slimformer.methods.base import Context, Effects, Method, Progress, State, Step
from slimformer.rules import Count, Fraction, NotNegative, Positive, Share, real_number

NEAR = 0.04  # share of the dense cost; a note warns if the expected cost ends further above `keep` than this
BETA, LOW, HIGH = 2 / 3, -0.1, 1.1  # Louizos et al., section 2.2
_SHIFT = BETA * math.log(-LOW / HIGH)


LogAlpha = Annotated[float, real_number("from -20 to 20", lambda value: abs(value) <= 20, 20.1)]  # beyond, a gate never moves


@final
@dataclass(frozen=True)
class Gates(Method):
    """`keep`: share of the dense `cost` to come down to. `size` says how that is reached.

    - "lagrangian": multipliers drive the expected cost to the share while training; `allocate` then meets it, keeping the most
      open cost.
    - "top_k": fixed penalties while training; then the units with the largest log alpha stay, as many as fit the share: heads
      and neurons in one ranking, although each kind has its own penalty. The paper has a threshold for each.
    - "threshold": fixed penalties, and units stay whose settled gate is above 0.5; the penalties alone make the size, `keep` is
      not used.

    `keep_heads`: instead of `keep` (set that to null), the share of all heads that stay, those of the largest log alpha;
    `keep_neurons` beside it says the same of the neurons. The paper's row with 44 % of the heads and 48 % of the FFN removed is
    0.56 and 0.52. With "lagrangian" each kind then has multipliers of its own, which drive its expected share of open gates.

    `keep_neurons`: the share of all FFN neurons that stay, beside `keep_heads`; widths are multiples of `neuron_multiple`.

    `apart`: even steps gate and train only heads, odd ones only neurons. With frozen weights these are two separate runs, each
    with half the steps: give twice the epochs. In evaluation and in the end the two are combined.

    As in the paper: a stage with `freeze: everything` and `dropout: false`, so that only gates train, and the options `apart:
    true`, `size: top_k`, `keep: null` with `keep_heads` and `keep_neurons`, `neuron_multiple: 1`, `fold: false`, `sublayers:
    false`; then stages that retrain what is left, with or without `distillation`.

    Example:
        >>> from slimformer import Train
        >>> Train(epochs=5, methods=(Gates(keep=0.4),)).cuts
        True
    """

    keep: Share | None = 0.5
    keep_heads: Share | None = None
    keep_neurons: Share | None = None
    cost: Literal["macs", "parameters", "latency"] = "macs"
    units: Literal["heads", "neurons", "both"] = "both"
    size: Literal["lagrangian", "top_k", "threshold"] = "lagrangian"
    apart: bool = False
    lambda_heads: NotNegative = 1.0  # loss that all open heads cost; not with "lagrangian"
    lambda_neurons: NotNegative = 1.0  # loss that all open neurons cost; not with "lagrangian"
    lr: Positive = 0.1  # learning rate of log alpha: the best of three in the paper
    multiplier_lr: NotNegative = 0.05  # learning rate of the multipliers: the higher, the sooner the goal is met
    start: LogAlpha = 2.5  # log alpha at the beginning; at 2.5 nearly every gate is open
    ramp: Fraction = 0.5  # share of the training over which the goal comes down, or the penalties rise
    neuron_multiple: Count = 16
    sublayers: bool = True  # whether all units of a sublayer may go, and the rest of it with them
    fold: bool = True  # settled gates into the weights; without, gates that stay are 1, as in the paper

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.apart and self.units != "both":
            raise ValueError(f"apart needs units: both, got {self.units}")
        goals = self.goals
        if goals and self.keep is not None:
            raise ValueError(f"keep must be null beside {_listed(goals)}: they are two budgets, got {self.keep:g}")
        if goals and self.size == "threshold":
            raise ValueError(f"{_listed(goals)} cannot be met with size: threshold: there the penalties alone make the size")
        if goals and set(goals) != set(self.kinds):
            raise ValueError(f"{_listed(goals)} must say a share for the gates that there are, units: {self.units}")
        if not goals and self.keep is None and self.size != "threshold":
            raise ValueError(f"keep must be a share, or keep_heads and keep_neurons must, with size: {self.size}, got null")

    def effects(self) -> Effects:
        # a settled log alpha of 2.5 is 1 after clamping, but training draws noise
        return Effects(cuts=True, uneven=True, neutral=False)

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        if cost is not None and self.size != "threshold":
            equal = {site.id: torch.zeros(site.size) for site in self.sites(anatomy)}
            something_left(anatomy, self.choose(anatomy, cost, equal))

    def attach(self, context: Context) -> State:
        self.check(context.anatomy, context.cost)
        return _State(context, self)

    def penalty(self, state: State, step: Step) -> Tensor | None:
        state = cast(_State, state)
        turn = step.progress.step % len(state.turns)
        if self.size == "lagrangian":
            terms = [
                multipliers[0] * (gap := state.gap(kinds)) + multipliers[1] * gap.square()
                for kinds, multipliers in zip(state.driven, state.multipliers, strict=True)
                if kinds[0] in state.turns[turn]
            ]
            return torch.stack(terms).sum()
        prices = {Kind.HEADS: self.lambda_heads, Kind.NEURONS: self.lambda_neurons}
        terms = [prices[kind] * state.open_share(kind) for kind in state.turns[turn]]
        return state.ramped * torch.stack(terms).sum()

    def advance(self, state: State, progress: Progress) -> None:
        state = cast(_State, state)
        state.ramped.fill_(linear_ramp(progress, self.ramp))
        state.turn.fill_(progress.step % len(state.turns))

    def report(self, state: State) -> Mapping[str, float]:
        state = cast(_State, state)
        with torch.no_grad():
            numbers = {"cost": state.fixed + float(state.expected(tuple(state.shares)))}
            for kinds in state.driven:
                if self.goals:
                    numbers[f"goal_{kinds[0]}"] = float(state.goal(kinds))
                else:
                    numbers["goal"] = state.fixed + (1.0 - state.fixed) * float(state.goal(kinds))
            return numbers | {f"open_{kind}": float(state.open_share(kind)) for kind in state.shares}

    def decide(self, state: State, context: Context) -> Decision:
        state = cast(_State, state)
        values = {site.id: state.log_alpha[index].detach() for index, site in enumerate(state.sites)}
        plan = self.choose(context.anatomy, context.cost, values)
        if self.size == "threshold" and plan == Plan():
            lowest = min(float(settled(value).min()) for value in values.values())
            raise TargetError(
                f"no gate closed, nothing is cut: the lowest settled gate is {lowest:.2f}, and those below 0.5 go.",
                help="raise lambda_heads or lambda_neurons, train longer, or meet a share by size: top_k.",
            )
        notes = tuple(
            f"gates: {what} came down to {reached:.0%} of the dense, not to {wanted:.0%}; the rest is cut from gates that are "
            "still open. Train longer, or raise multiplier_lr."
            for what, reached, wanted in self._reached(self.report(state))
            if reached > wanted + NEAR
        )
        if not self.fold:
            return Decision(plan, notes=notes)
        gone = {site.id for site in state.sites if site.sublayer and plan.keep.get(site.sublayer) == ()}
        return Decision(plan, scales={name: settled(value) for name, value in values.items() if name not in gone}, notes=notes)

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """The sites that get gates."""
        return [site for site in anatomy.sites.values() if site.kind in self.kinds]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of units that get gates."""
        return (Kind.HEADS, Kind.NEURONS) if self.units == "both" else (Kind(self.units),)

    @property
    def goals(self) -> dict[Kind, float]:
        """The share of each kind of units that stays; empty if a share of the cost does, or the penalties decide."""
        shares = {Kind.HEADS: self.keep_heads, Kind.NEURONS: self.keep_neurons}
        return {kind: share for kind, share in shares.items() if share is not None}

    def _reached(self, numbers: Mapping[str, float]) -> list[tuple[str, float, float]]:
        """What multipliers were to drive, how far it came down, and how far it was to."""
        if self.size != "lagrangian":
            return []
        if self.keep is not None:
            return [("their expected cost", numbers["cost"], self.keep)]
        return [(f"the expected share of open {kind}", numbers[f"open_{kind}"], share) for kind, share in self.goals.items()]

    def choose(self, anatomy: Anatomy, cost: Cost, log_alpha: Mapping[str, Tensor]) -> Plan:
        """The plan that these gates lead to; TargetError if `keep` is out of reach."""
        score = {name: _numpy(value) for name, value in log_alpha.items()}
        multiple, sublayers = self.neuron_multiple, self.sublayers
        keep: dict[str, tuple[int, ...]] = {}
        for kind, share in self.goals.items():
            own = {name: value for name, value in score.items() if anatomy.sites[name].kind is kind}
            counted = unit_count(anatomy, kind)
            room = math.floor(share * counted.dense + 1e-9)
            keep |= strongest(anatomy, own, counted, room, neuron_multiple=multiple, sublayers=sublayers).keep
        if self.goals:
            return Plan(keep)
        budget = (self.keep or 1.0) * cost.dense
        if self.size == "top_k":
            return strongest(anatomy, score, cost, budget, neuron_multiple=multiple, sublayers=sublayers)
        if self.size == "threshold":  # settled(0) = 0.5
            counts = {name: int((value > 0).sum()) for name, value in score.items()}
            return leading(anatomy, score, counts, neuron_multiple=multiple, sublayers=sublayers)
        unit = {name: cost.curves[name][-1] / len(value) for name, value in score.items()}
        # what a plan keeps of the cost that is open
        worth = {name: unit[name] * _numpy(opening(value.double())) for name, value in log_alpha.items()}
        return allocate(anatomy, worth, cost, budget, neuron_multiple=multiple, sublayers=sublayers)


# -- State ---------------------------------------------------------------------------------------------------------------------


class _State(State):
    """log alpha per site, a pair of multipliers per turn, and the hooks that put the gates in place.

    A turn is the kinds of gates that train in one step: all of them, or one kind at a time if they train `apart`.
    """

    def __init__(self, context: Context, method: Gates) -> None:
        super().__init__()
        cost = context.cost
        self.lr, self.multiplier_lr = method.lr, method.multiplier_lr
        self.sites = method.sites(context.anatomy)
        kinds = tuple(dict.fromkeys(site.kind for site in self.sites))
        self.turns = [(kind,) for kind in kinds] if method.apart else [kinds]
        self.goals = method.goals
        self.log_alpha = nn.ParameterList([nn.Parameter(torch.full((site.size,), method.start)) for site in self.sites])
        # What multipliers drive, each its own: the cost of a turn's kinds (a shared one would get a gradient of 0 in the other's
        # turn, and Adam would still move it), or one kind's share of open gates.
        self.driven = [] if method.size != "lagrangian" else [(kind,) for kind in kinds] if self.goals else self.turns
        self.multipliers = nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in self.driven])  # of the gap and of its square
        for index, site in enumerate(self.sites):
            self.register_buffer(f"curve_{index}", torch.tensor(cost.curves[site.id] / cost.dense, dtype=torch.float32))
        costs = {kind: [cost.curves[site.id][-1] for site in self.sites if site.kind is kind] for kind in kinds}
        self.shares = {kind: float(sum(values)) / cost.dense for kind, values in costs.items()}  # of the dense cost
        self.fixed = 1.0 - sum(self.shares.values())
        self.begin = float(opening(torch.tensor(method.start)))
        self.end = ((method.keep or 1.0) - self.fixed) / (1.0 - self.fixed)
        self.ramped: Tensor  # how far goal and penalties have come, 0 to 1; a buffer, so that a resumed run knows it
        self.register_buffer("ramped", torch.tensor(0.0 if method.ramp else 1.0))
        self.turn: Tensor  # index of the turn; a buffer for the same reason
        self.register_buffer("turn", torch.tensor(0))
        self._now = self.turns[0]
        self._noise: dict[int, Tensor] = {}
        model = context.model
        hooks = ExitStack()
        hooks.callback(model.register_forward_pre_hook(lambda *_: self._begin_pass()).remove)
        readers = {site.id: self._reader(index, model) for index, site in enumerate(self.sites)}
        hooks.enter_context(gated(model, context.anatomy, readers))
        self.on_close(hooks.close)

    def _begin_pass(self) -> None:
        """Reads the turn, because asking for it at each gate would stall a GPU, and draws the noise, which all processes have alike."""
        if len(self.turns) > 1:
            self._now = self.turns[int(self.turn)]
        turn = [index for index, site in enumerate(self.sites) if site.kind in self._now]
        self._noise = {index: torch.rand_like(self.log_alpha[index]) for index in turn}

    def _reader(self, index: int, model: nn.Module) -> Any:
        kind = self.sites[index].kind

        def read() -> Tensor:
            log_alpha = self.log_alpha[index]
            if not model.training:
                return settled(log_alpha)
            if kind not in self._now:
                return torch.ones_like(log_alpha)  # no gradient at all, so the optimiser leaves the gate alone
            return sampled(log_alpha, self._noise[index])

        return read

    def groups(self) -> list[dict[str, Any]]:
        gates = {"params": list(self.log_alpha), "lr": self.lr, "weight_decay": 0.0}
        multipliers = {"params": list(self.multipliers), "lr": self.multiplier_lr, "weight_decay": 0.0, "maximize": True}
        return [gates, multipliers] if self.multipliers else [gates]

    def expected(self, kinds: Sequence[Kind]) -> Tensor:
        """Expected cost of these kinds, as a share of the whole dense cost: each curve at the expected number of open units."""
        total = self.ramped.new_zeros(())
        for index, site in enumerate(self.sites):
            if site.kind in kinds:
                curve = getattr(self, f"curve_{index}")
                open_units = opening(self.log_alpha[index]).sum()
                low = open_units.detach().floor().clamp(0, len(curve) - 2).long()
                total = total + curve[low] + (open_units - low) * (curve[low + 1] - curve[low])
        return total

    def goal(self, kinds: Sequence[Kind]) -> Tensor:
        """Where these kinds should be now, as a share of what their gates can cut, or of their gates; it starts where they do."""
        end = self.goals.get(kinds[0], self.end)
        return self.begin + (end - self.begin) * self.ramped

    def gap(self, kinds: Sequence[Kind]) -> Tensor:
        """How far these kinds are above their goal; without goals of their own, kinds that train apart come down in proportion."""
        if self.goals:
            return self.open_share(kinds[0]) - self.goal(kinds)
        return self.expected(kinds) / sum(self.shares[kind] for kind in kinds) - self.goal(kinds)

    def open_share(self, kind: Kind) -> Tensor:
        """Mean probability that a gate of this kind is open."""
        return torch.cat([opening(a) for a, site in zip(self.log_alpha, self.sites, strict=True) if site.kind is kind]).mean()


# -- Formulas ------------------------------------------------------------------------------------------------------------------


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


# -- Plumbing ------------------------------------------------------------------------------------------------------------------


def _listed(goals: Mapping[Kind, float]) -> str:
    return " and ".join(f"keep_{kind}" for kind in goals)


def _numpy(value: Tensor) -> np.ndarray:
    return value.double().cpu().numpy()
