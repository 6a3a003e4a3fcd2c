"""Narrower hidden states: units of the residual stream fade out while the model trains, then all layers and tables lose them.

Paper: Khetan, Karnin: schuBERT (ACL 2020), which removes from each of BERT's dimensions, the hidden one among them; Xia, Zhong,
Chen: CoFi (ACL 2022), section 3.2, a mask of hidden dimensions that all layers share.

Idea: The hidden states have a gate for each unit. The units that the loss needs least are chosen by one pass, their gates fall
from 1 to 0 while all else trains, and then every matrix, norm and table gives up the rows or columns that they used.

Differs: Units are ranked once, by the Fisher information of their gates, and fade on a schedule; schuBERT learns gates with an
L1 penalty, CoFi hard concrete ones. The norms count a unit by its gate, so that the cut model computes what the gated one did;
in the papers they went on counting zeros until the cut. There is no rotation: behind a norm with weights it could not be undone.

Choose when: the word table is much of the file: no other cut makes it narrower. Or every layer is needed, and few units are. For
speed alone compare it with `layers` and `fisher`, at the same latency.

Cost: one pass with gradients over `examples`, then a training run with one more product for each norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, cast, final

import numpy as np
import torch
from torch import Tensor

from slimformer.core.anatomy import Anatomy, Kind, Site
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.errors import TargetError
from slimformer.hooks.gating import gated
from slimformer.methods._gradients import gate_gradients
from slimformer.methods._schedules import linear_ramp
from slimformer.methods.base import Context, Effects, Method, Progress, State
from slimformer.rules import Count, Fraction, Share


@final
@dataclass(frozen=True)
class HiddenWidth(Method):
    """`keep_hidden`: share of the hidden units that stay, rounded to a multiple of `multiple`.

    Heads keep their size: 12 heads of 32 dimensions read 256 units as well as 384. `distillation` in the same stage or in a later
    one compares the units that stay with the teacher's of the same origin.

    Example:
        >>> from slimformer import Train
        >>> Train(epochs=5, methods=(HiddenWidth(keep_hidden=0.67),)).cuts
        True
    """

    keep_hidden: Share = 0.67
    multiple: Count = 16  # kernels like widths of whole vectors
    rank: Literal["fisher", "random"] = "fisher"  # "random": one draw by the run's seed, for comparison
    examples: Count = 2048  # training examples that "fisher" looks at, or all if there are fewer
    ramp: Fraction = 0.5  # share of the training over which gates fall; at 0 they are shut from the first step

    def effects(self) -> Effects:
        return Effects(cuts=True, narrows=True, neutral=False)  # norms with gates of 1 sum in another order

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        site = _hidden(anatomy)
        Plan({site.id: tuple(range(kept_units(site.size, self.keep_hidden, self.multiple)))}).check(anatomy)

    def foresee(self, anatomy: Anatomy, cost: Cost | None) -> Plan | None:
        site = _hidden(anatomy)
        count = kept_units(site.size, self.keep_hidden, self.multiple)
        return Plan({site.id: tuple(range(count))} if count < site.size else {})

    def attach(self, context: Context) -> State:
        self.check(context.anatomy, context.cost)
        site = _hidden(context.anatomy)
        score = torch.rand(site.size, generator=context.generator).numpy()
        if self.rank == "fisher":
            score = hidden_information(context, site, self.examples)
        count = kept_units(site.size, self.keep_hidden, self.multiple)
        return _State(context, site, np.sort(np.argsort(-score, kind="stable")[:count]), self.ramp)

    def advance(self, state: State, progress: Progress) -> None:
        cast(_State, state).fade(linear_ramp(progress, self.ramp))

    def report(self, state: State) -> Mapping[str, float]:
        state = cast(_State, state)
        return {"hidden_units": float(state.gate.sum())}

    def decide(self, state: State, context: Context) -> Decision:
        state = cast(_State, state)
        keep = tuple(int(unit) for unit in state.stays.nonzero().flatten())
        return Decision(Plan({state.site: keep} if len(keep) < len(state.stays) else {}))


# -- State ---------------------------------------------------------------------------------------------------------------------


class _State(State):
    """One gate for each hidden unit, and the hooks that put them in place."""

    def __init__(self, context: Context, site: Site, keep: np.ndarray, ramp: float) -> None:
        super().__init__()
        self.site = site.id
        stays = torch.zeros(site.size, device=context.subject.device)
        stays[torch.from_numpy(keep)] = 1.0
        self.stays: Tensor  # (units,); buffers, so that a resumed run knows them
        self.gate: Tensor
        self.register_buffer("stays", stays)
        self.register_buffer("gate", torch.ones_like(stays))
        self.fade(0.0 if ramp else 1.0)
        hooks = ExitStack()
        hooks.enter_context(gated(context.model, context.anatomy, {site.id: lambda: self.gate}))
        self.on_close(hooks.close)

    def fade(self, done: float) -> None:
        """Sets the gates of the units that go to what is left of them."""
        self.gate.copy_(self.stays + (1 - self.stays) * (1 - done))


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def kept_units(size: int, share: float, multiple: int) -> int:
    """The multiple of `multiple` nearest to `share` of `size` units, at least one multiple, at most all."""
    return min(size, max(1, round(share * size / multiple)) * multiple)


def hidden_information(context: Context, site: Site, examples: int) -> np.ndarray:
    """Diagonal Fisher information of each hidden unit: (units,), the mean over examples of the squared gradient of its gate."""
    total, seen = np.zeros(site.size), 0
    for gradients in gate_gradients(context, [site], examples):
        total += gradients[site.id].square().sum(0).numpy()
        seen += len(gradients[site.id])
    return total / max(1, seen)


# -- Plumbing ------------------------------------------------------------------------------------------------------------------


def _hidden(anatomy: Anatomy) -> Site:
    """The site of the hidden units; TargetError if what reads them is not known."""
    found = anatomy.of_kind(Kind.HIDDEN)
    if anatomy.has_bottlenecks:
        raise TargetError(
            "the hidden states of this model cannot be made narrower: its layers compute in another width, between bottlenecks.",
            help="cut heads, neurons or layers of it.",
        )
    if any(site.terms for site in anatomy.of_kind(Kind.HEADS)):
        raise TargetError(
            "the hidden states of this model cannot be made narrower: the vectors of distances are as wide.",
            help="cut heads, neurons or layers of it.",
        )
    if not found:
        raise TargetError(
            "the hidden states of this model cannot be made narrower: not all that reads them is known.",
            help="classifiers, taggers, models that answer questions and those that write text can; heads of masked words cannot.",
        )
    return found[0]
