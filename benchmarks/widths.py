"""Times training steps of a cut model in bfloat16: batches as wide as their longest row, or rounded up in several ways.

    python benchmarks/widths.py [--rows 32] [--shortest 8] [--longest 40] [--steps 120] [--only "cut, longest row"]

Behind it: PyTorch makes a half-precision kernel for each new shape and keeps some. A cut encoder has other shapes in each layer, so
that with every new length it needs dozens. One way after the other, on the demo's encoder with uneven heads and neurons.
Set ONEDNN_PRIMITIVE_CACHE_CAPACITY to see what keeping more of them does (slimformer's command line sets 4096, PyTorch keeps 1024).
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is imported

import numpy as np
import torch
from transformers import PreTrainedModel

from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.data.batching import rounded
from slimformer.demo import encoder
from slimformer.families.base import anatomy_of
from slimformer.hooks.attention import quick_attention
from slimformer.saving import checkpoint

WAYS: dict[str, Callable[[int], int]] = {
    "longest row": lambda length: length,
    "steps of 4": lambda length: -(-length // 4) * 4,
    "steps of 8": lambda length: -(-length // 8) * 8,
    "as it trains": lambda length: rounded(np.array([length, 10**6]), [0]),
}


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--rows", type=int, default=32)
    reader.add_argument("--shortest", type=int, default=8)
    reader.add_argument("--longest", type=int, default=40)
    reader.add_argument("--steps", type=int, default=120)
    reader.add_argument("--only", default="", help="part of a line's name")
    chosen = reader.parse_args()
    draw = random.Random(0)
    lengths = [draw.randint(chosen.shortest, chosen.longest) for _ in range(chosen.steps)]
    dense = checkpoint.load_dense(Path(encoder()), "AutoModelForSequenceClassification")
    keep = {}
    for layer in range(len(anatomy_of(dense).layers)):
        keep[f"encoder.{layer}.heads"] = tuple(range(4 + layer % 3))
        keep[f"encoder.{layer}.neurons"] = tuple(range(320 + 32 * layer))
    cut = shrink(dense, anatomy_of(dense), Plan(keep))
    print(
        f"{chosen.rows} rows of {chosen.shortest} to {chosen.longest} tokens; tokens a second of the second half, padding left out"
    )
    for name, model in (("dense", dense), ("cut", cut)):
        for way, width in WAYS.items():
            if chosen.only in f"{name}, {way}":
                print(f"{f'{name}, {way}':22} {speed(model, lengths, chosen.rows, width):8,.0f}", flush=True)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


def speed(model: PreTrainedModel, lengths: list[int], rows: int, width_of: Callable[[int], int]) -> float:
    """Tokens a second of forward and backward passes, without the padding that rounding adds."""
    model.train()
    model.get_input_embeddings().weight.requires_grad_(False)  # as the recipes do; its gradient would take as long as the rest
    seconds = tokens = 0.0
    with quick_attention(model):
        for number, length in enumerate(lengths):
            width = width_of(length)
            batch = {"input_ids": torch.randint(1000, 20000, (rows, width)), "attention_mask": torch.ones(rows, width).long()}
            begin = time.perf_counter()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = model(**batch)
            output.logits.float().square().mean().backward()
            model.zero_grad()
            if number >= len(lengths) // 2:
                seconds += time.perf_counter() - begin
                tokens += rows * length
    return tokens / seconds


if __name__ == "__main__":
    main()
