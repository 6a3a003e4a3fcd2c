"""Lets a language model compute its scores of all words at some tokens only; it is as before when the context ends.

The last matrix has a row for each word of the vocabulary, and multiplies as much as a whole small encoder: at each token, though a
masked-language model is asked at one of seven.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def decoding_at(model: PreTrainedModel, chosen: Tensor) -> Iterator[None]:
    """While it lasts the scores are those of the `chosen` tokens (batch, seq) alone, row by row: (chosen tokens, words)."""

    def choose(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][chosen.to(args[0].device)],)  # (batch, seq, hidden)

    handle = _reader(model).register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def _reader(model: PreTrainedModel) -> nn.Module:
    """The first module that states pass on their way to words: BERT's transform, which MobileBERT has before matrices that no module
    multiplies by; else the last matrix."""
    transforms = (module for name, module in model.named_modules() if name.endswith("predictions.transform"))
    return next(transforms, model.get_output_embeddings())
