"""Holds the exact zeros that an earlier stage left in the matrices, while all other weights train on.

Paper: Li, Kong, Zhang, Li, Li, Liu, Ding: Efficient Transformer-based Large Scale Language Representations using
Hardware-friendly Block Structured Pruning (Findings of EMNLP 2020), section 3: masked retraining.

Idea: A mask over each matrix of the encoder, and over a word table with zeros, is 0 wherever the weight is 0 when the stage
begins. The gradient of a masked weight is exactly 0, and decay shrinks 0 to 0, so that zeros are zeros in every step and when
the mask is gone.

Differs: Any method may have made the zeros: this is the second half of every sparse recipe, after `movement` without `fill` for
instance. It decides nothing. Biases are not held: a new model's are all 0.

Choose when: the zeros are what you want. They make files smaller and a sparse kernel faster, not a dense one: if only speed
counts, fill them and train dense.

Cost: a byte for each weight of a matrix with zeros, and one product with it in each step.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast, final

from torch import Tensor, nn

from slimformer.hooks.weights import masked_weights
from slimformer.methods.base import Context, Effects, Method, State


@final
@dataclass(frozen=True)
class KeepZeros(Method):
    """No options: what is 0 when the stage begins is 0 when it ends.

    Example:
        >>> from slimformer import Train
        >>> Train(methods=(KeepZeros(),)).trains_over_zeros
        False
    """

    def effects(self) -> Effects:
        return Effects(holds_zeros=True)

    def attach(self, context: Context) -> State:
        return _State(context)

    def report(self, state: State) -> Mapping[str, float]:
        return {"zeros": cast(_State, state).zeros}


# -- State ---------------------------------------------------------------------------------------------------------------------


class _State(State):
    """The masks, and the share of the weights that they hold at 0."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        parameters = dict(context.model.named_parameters())
        names = [f"{matrix.module}.weight" for matrix in context.anatomy.encoder_matrices() if matrix.dense]
        opened = {name: parameters[name].detach() != 0 for name in names} | _tables(context)
        total = sum(mask.numel() for mask in opened.values())
        self.zeros = sum(int((~mask).sum()) for mask in opened.values()) / max(1, total)
        stack = ExitStack()
        stack.enter_context(masked_weights(context.model, {name: mask for name, mask in opened.items() if not mask.all()}))
        self.on_close(stack.close)


# -- Plumbing ------------------------------------------------------------------------------------------------------------------


def _tables(context: Context) -> dict[str, Tensor]:
    """Masks of the word tables that have zeros beside the row of the padding, which is 0 in a new model and never trains."""
    masks = {}
    for matrix in context.anatomy.matrices.values():
        if matrix.table and matrix.dense:
            module = cast(nn.Embedding, context.model.get_submodule(matrix.module))
            mask = module.weight.detach() != 0
            if module.padding_idx is not None:
                mask[module.padding_idx] = True
            if not mask.all():
                masks[f"{matrix.module}.weight"] = mask
    return masks
