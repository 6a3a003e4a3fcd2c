"""The gradient of a word embedding, kept between steps, so that a step touches only the rows of its own tokens.

A batch reads a few hundred of 30,000 rows, yet PyTorch makes a new, zeroed gradient of the whole matrix in each step: 47 MB for a
small BERT, a tenth of a CPU step (measured: docs/decisions/0003-training-loop.md). Here one buffer lives as long as the training
and only its touched rows are cleared. The numbers are the same. It is used on a CPU with one process; elsewhere nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimformer.hooks.weights import computing


class Lookup:
    """The kept gradient of one embedding: `gather` after each backward pass, `clear` before the next."""

    def __init__(self, embedding: nn.Embedding) -> None:
        self.weight = cast(nn.Parameter, embedding.weight)
        self._padding = embedding.padding_idx
        self._buffer = torch.zeros_like(self.weight)
        self._touched: list[Tensor] = []

    def gather(self) -> None:
        """Adds the gradient to `weight.grad`, which the optimiser reads."""
        if self._touched:
            self.weight.grad = self._buffer if self.weight.grad is None else self.weight.grad + self._buffer

    def rows(self) -> Tensor | None:
        """Rows of `weight.grad` that may differ from 0, each once; None if that may be all of them."""
        if self.weight.grad is not self._buffer:
            return None
        rows: Tensor = torch.unique(torch.cat(self._touched))
        return rows

    def clear(self) -> None:
        """Forgets the gradient."""
        for rows in self._touched:
            self._buffer[rows] = 0
        self._touched = []
        self.weight.grad = None

    def add(self, ids: Tensor, gradient: Tensor) -> None:
        rows = ids.reshape(-1)
        self._buffer.index_add_(0, rows, gradient.reshape(rows.shape[0], -1).to(self._buffer.dtype))
        if self._padding is not None:
            self._buffer[self._padding] = 0  # padding never learns, as in nn.Embedding
        self._touched.append(rows)


class _Read(torch.autograd.Function):
    """Rows of a weight; the backward pass hands their gradient to a Lookup instead of making a matrix of it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, lookup: Lookup) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.lookup = lookup
        return nn.functional.embedding(ids, weight)  # (batch, seq, hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        ctx.lookup.add(ids, gradients[0])
        return None, None, None


@contextmanager
def kept_gradient(embedding: nn.Module | None) -> Iterator[Lookup | None]:
    """Keeps the embedding's gradient while the context lasts. It yields None and does nothing if the numbers would not be the same."""
    plain = (
        type(embedding) is nn.Embedding
        and "weight" in embedding._parameters  # not under a parametrisation
        and embedding.weight.requires_grad
        and embedding.weight.device.type == "cpu"
        and embedding.max_norm is None
        and not embedding.scale_grad_by_freq
        and not embedding.sparse
        and "forward" not in vars(embedding)
    )
    if not plain or embedding is None:
        yield None
        return
    lookup = Lookup(cast(nn.Embedding, embedding))
    read: Any = _Read.apply
    with computing(embedding, {"": lambda module, ids: read(module.weight, ids, lookup)}):
        yield lookup
