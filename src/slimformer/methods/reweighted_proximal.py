"""Sparse weights by a reweighted L1 penalty that acts after each step, apart from the loss and its optimiser.

Paper: Guo, Liu, Wang, Guo, Wang, Zhang, Ding, Liu: Reweighted Proximal Pruning for Large-Scale Language Representation (2019),
section 4; the reweighting is Candes, Wakin, Boyd (2008).

Idea: After each step of the optimiser every weight moves towards 0 by its own small amount, and stops there: the proximal step of
the penalty sum a |w|. The amounts a are renewed now and then as 1 / (|w| + epsilon), so that small weights are pushed hard and
large ones hardly at all. AdamW's moments see the loss alone, which is why plain L1 fails with it and this does not.

Differs: The amount is a share of the matrix's own root mean square and of the steps of the run, so that one `strength` suits any
model, length and rate; the paper's is a product of a rate and a penalty that are tuned by hand. With `keep` exactly so many
weights are left, the largest; in the paper the penalty alone decides. In the last share of the steps zeros are held.

Choose when: you want single zeros, and no teacher at hand: with one, compare `knowledge_sparse`, whose zeros come from magnitudes
on a schedule. Zeros make files smaller and sparse kernels faster, nothing else.

Cost: a number and a few operations for each weight of the encoder's matrices in each step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast, final

import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy
from slimformer.core.cost import Cost
from slimformer.core.plan import Decision, Plan
from slimformer.hooks.weights import masked_weights
from slimformer.methods._ranking import highest
from slimformer.methods._schedules import updates_due
from slimformer.methods.base import Context, Effects, Method, Progress, State, Zeros
from slimformer.rules import Count, Positive, ProperFraction, Share

EPSILON = 0.1  # of the root mean square: how hard a weight of 0 is held, at most ten times as hard as an average one


@final
@dataclass(frozen=True)
class ReweightedProximal(Method):
    """`strength`: how far a weight of average size would move in a run, in its own size. Without a gradient to hold them, weights
    below the square root of twice that times the average reach 0.

    `keep`: the share of the weights that is left, the largest of each matrix or of the whole model (`scope`); null: those that the
    penalty leaves, as in the paper. Train on with `keep_zeros`.

    Example:
        >>> from slimformer import Train
        >>> Train(methods=(ReweightedProximal(keep=0.1),)).methods[0].effects().zeros
        <Zeros.RESULT: 'result'>
    """

    keep: Share | None = None
    scope: Literal["matrix", "model"] = "model"
    strength: Positive = 1.0
    updates: Count = 20  # how often a run renews the amounts
    cooldown: ProperFraction = 0.25  # share of the steps at the end in which zeros are held and nothing is pushed

    def effects(self) -> Effects:
        return Effects(cuts=True, zeros=Zeros.RESULT)

    def foresee(self, anatomy: Anatomy, cost: Cost | None) -> Plan | None:
        return Plan()  # zeros stay in their matrices

    def attach(self, context: Context) -> State:
        return _State(context)

    def advance(self, state: State, progress: Progress) -> None:
        state = cast(_State, state)
        pushing = max(1, round((1 - self.cooldown) * progress.total))
        if progress.step > pushing:
            return
        now, _ = updates_due(progress, self.updates, self.cooldown)
        before, _ = updates_due(Progress(progress.step - 1, progress.total), self.updates, self.cooldown)
        with torch.no_grad():
            for weight, amount in zip(state.weights, state.amounts(), strict=True):
                if now != before:
                    amount.copy_(amounts(weight) * self.strength / pushing)
                weight.copy_(pushed(weight, amount))
            if progress.step == pushing:
                self._hold(state)

    def report(self, state: State) -> Mapping[str, float]:
        state = cast(_State, state)
        whole = max(1, sum(weight.numel() for weight in state.weights))
        zeros = (int(((weight == 0) | ~held).sum()) for weight, held in zip(state.weights, state.held(), strict=True))
        return {"zeros": sum(zeros) / whole}

    def decide(self, state: State, context: Context) -> Decision:
        state = cast(_State, state)
        values = (torch.where(held, weight.detach(), 0.0) for weight, held in zip(state.weights, state.held(), strict=True))
        return Decision(weights=dict(zip(state.names, values, strict=True)))

    def _hold(self, state: _State) -> None:
        """Closes what is 0, and with `keep` all but the largest."""
        opened = [weight != 0 for weight in state.weights]
        if self.keep is not None:
            opened = largest(state.weights, self.keep, whole=self.scope == "model")
        for held, now in zip(state.held(), opened, strict=True):
            held.copy_(now)


# -- State ---------------------------------------------------------------------------------------------------------------------


class _State(State):
    """How far each weight moves in a step, and which are held at 0; as buffers, so that a resumed run has them."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        parameters = dict(context.model.named_parameters())
        self.names = [f"{matrix.module}.weight" for matrix in context.anatomy.encoder_matrices() if matrix.dense]
        self.weights = [parameters[name] for name in self.names]  # a plain list: they are the model's, not ours
        for index, weight in enumerate(self.weights):
            self.register_buffer(f"amount_{index}", torch.zeros_like(weight))
            self.register_buffer(f"open_{index}", torch.ones_like(weight, dtype=torch.bool))
        stack = ExitStack()
        masks = {name: partial(self._open, index) for index, name in enumerate(self.names)}
        stack.enter_context(masked_weights(context.model, masks))
        self.on_close(stack.close)

    def amounts(self) -> list[Tensor]:
        return [self.get_buffer(f"amount_{index}") for index in range(len(self.weights))]

    def held(self) -> list[Tensor]:
        return [self._open(index) for index in range(len(self.weights))]

    def _open(self, index: int) -> Tensor:
        return self.get_buffer(f"open_{index}")


# -- Formulas ------------------------------------------------------------------------------------------------------------------


def amounts(weight: Tensor) -> Tensor:
    """s^2 / (|w| + epsilon s) with the root mean square s of what is not 0: like `weight`, in its unit."""
    scale = weight[weight != 0].square().mean().sqrt() if bool((weight != 0).any()) else weight.new_tensor(0.0)
    return scale.square() / (weight.abs() + EPSILON * scale).clamp_min(1e-30)


def pushed(weight: Tensor, amount: Tensor) -> Tensor:
    """The proximal step of sum a |w|: each weight nearer to 0 by its amount, and not past it."""
    return nn.functional.relu(weight.abs() - amount) * weight.sign()


def largest(weights: Sequence[Tensor], keep: float, *, whole: bool) -> list[Tensor]:
    """True at the share `keep` of largest absolute value, of each weight or of all together; the first of equal ones."""
    flats = [weight.abs().flatten() for weight in weights]
    parts = [torch.cat(flats)] if whole and flats else flats
    opened = torch.cat([highest(part, max(1, round(keep * len(part)))) for part in parts]) if parts else torch.empty(0)
    masks = opened.split([len(flat) for flat in flats])
    return [mask.view_as(weight) for mask, weight in zip(masks, weights, strict=True)]
