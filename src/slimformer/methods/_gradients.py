"""Gradients of gates, which several methods rank units by: one for each example, with all gates at 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from slimformer.core.anatomy import Site
from slimformer.hooks.gating import gated
from slimformer.hooks.precision import quick_autocast
from slimformer.methods.base import Context


def gate_gradients(context: Context, sites: Sequence[Site], examples: int) -> Iterator[dict[str, Tensor]]:
    """d loss / d gate for one batch of training examples after another: site -> (batch, units), in float64 on the CPU."""
    with context.subject.evaluating():
        for batch in context.batches(examples):
            rows, device = len(batch["input_ids"]), batch["input_ids"].device
            gates = {site.id: torch.ones(rows, site.size, device=device, requires_grad=True) for site in sites}
            with torch.enable_grad(), gated(context.model, context.anatomy, gates), quick_autocast(device):
                output = context.model(**context.subject.feed(batch))
                # a sum, so that each row's gradient is its own: that of all its text, if it writes one
                loss = context.task.loss(output, batch) * context.task.terms(batch)
            gradients = torch.autograd.grad(loss, list(gates.values()))
            yield {name: gradient.double().cpu() for name, gradient in zip(gates, gradients, strict=True)}
