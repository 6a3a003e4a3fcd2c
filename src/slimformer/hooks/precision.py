"""Which arithmetic to compute in: bfloat16 where a device has it and gains by it, float32 elsewhere.

On a CPU that is measured, once a process, since the same instruction set runs several times faster or slower from one machine to the
next (docs/decisions/0003-training-loop.md).
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Literal

import torch
from torch import nn

Precision = Literal["fp32", "bf16", "fp16"]
PrecisionChoice = Literal["auto", "fp32", "bf16", "fp16"]
BF16_SPEEDUP = 1.5  # in matrix products, for "auto" to take it on a CPU: a step gains a little less (docs/decisions/0003)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """A context in which matrix products run in `precision`; results that need float32 stay in it."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


def quick_autocast(device: torch.device) -> AbstractContextManager[object]:
    """The fastest context for passes that only look: evaluation on validation examples, gradients that are squared and summed."""
    quick = device.type == "cpu" and bf16_speedup() >= BF16_SPEEDUP
    return autocast(device, "bf16" if quick else "fp32")


@cache
def bf16_speedup() -> float:
    """How many times faster this CPU trains a small feed-forward matrix in bfloat16 than in float32; a fifth of a second."""
    rows, into, out = 768, 384, 1536  # a batch of 32 sentences through the matrix of a small encoder
    value = torch.linspace(-1, 1, rows * into).reshape(rows, into)
    weight = torch.linspace(-1, 1, out * into).reshape(out, into).requires_grad_()

    @torch.enable_grad()  # whoever asks may be in no_grad
    def once(precision: Precision) -> float:
        begin = time.perf_counter()
        with autocast(torch.device("cpu"), precision):
            result = nn.functional.linear(value, weight)
        torch.autograd.backward(result.sum())
        weight.grad = None
        return time.perf_counter() - begin

    times: dict[Precision, list[float]] = {"fp32": [], "bf16": []}
    for _ in range(12):  # in turn, and the best of each: other work on the machine must not decide
        for precision, taken in times.items():
            taken.append(once(precision))
    return min(times["fp32"]) / min(times["bf16"])
