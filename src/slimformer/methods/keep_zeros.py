"""Holds the exact zeros that an earlier stage left in the encoder's matrices, while all other weights train on.

The second half of every sparse recipe, after `movement` without `fill` for instance; as the masked retraining of Li et al. (Findings of
EMNLP 2020), section 3. It decides nothing. The gradient of a masked weight is exactly 0, and decay shrinks 0 to 0, so that zeros
are zeros in every step and when the mask is gone. Biases are not held: a new model's are all 0. Zeros make files smaller and a
sparse kernel faster, not a dense one: where only speed counts, fill them and train dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar, cast, final

from slimformer.core.anatomy import Role
from slimformer.hooks.weights import masked_weights
from slimformer.methods.base import Context, Method, State


class _State(State):
    """The masks, and how many of the weights they hold at 0."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        parameters = dict(context.model.named_parameters())
        inside = [m for m in context.anatomy.matrices.values() if m.dense and m.role not in (Role.EMBEDDING, Role.CLASSIFIER)]
        opened = {f"{matrix.module}.weight": parameters[f"{matrix.module}.weight"].detach() != 0 for matrix in inside}
        total = sum(mask.numel() for mask in opened.values())
        self.zeros = sum(int((~mask).sum()) for mask in opened.values()) / max(1, total)
        stack = ExitStack()
        stack.enter_context(masked_weights(context.model, {name: mask for name, mask in opened.items() if not mask.all()}))
        self.on_close(stack.close)


@final
@dataclass(frozen=True)
class KeepZeros(Method):
    """No options: what is 0 when the stage begins is 0 when it ends."""

    keeps_zeros: ClassVar[bool] = True

    def attach(self, context: Context) -> State:
        return _State(context)

    def report(self, state: State) -> Mapping[str, float]:
        return {"zeros": cast(_State, state).zeros}
