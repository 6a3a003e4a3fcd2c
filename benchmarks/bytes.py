"""Prints a digest of every file that a small `run` and a small `compress` leave, with invented timings.

Two checkouts that print the same behave the same: run it before and after a change that should change nothing.

    python benchmarks/bytes.py

The model is the tiny trained BERT of the tests. Every file's speed is fixed by its name, so that the search takes the same way on any
machine; weights may still differ from processor to processor. `slimformer.json` holds minutes and is left out.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from tiny_folder import write_data, write_model

import slimformer
from slimformer.digests import digest
from slimformer.measuring import timing
from slimformer.measuring.latency import Levels
from slimformer.running import scale, stages, trials
from slimformer.tasks.classification import Classification

LEVELS = Levels(
    fixed_ms=0.05, dense_fp32_ms=0.2, heads={1: 0.004, 2: 0.005, 4: 0.01}, neurons={16: 0.004, 32: 0.006, 64: 0.012}
)
SPEEDS = {
    "ours": 2.6,
    "int8_fused": 2.6,
    "int8_static": 1.3,
    "int8_dynamic": 1.4,
    "float": 1.1,
}  # times as fast as the teacher's fp32 file
RECIPE = """
model: ./model
task: {use: classification, data: ./data}
stages:
  - calibrate: {method: {use: fisher, keep: 0.6, cost: macs}}
  - train: {epochs: 2, lr: 1.0e-3, methods: [{use: distillation}]}
  - train: {epochs: 1, lr: 1.0e-3, methods: [{use: quantization}]}
  - export: {}
  - bench: {rivals: [teacher-int8], seconds: 1}
"""
ENDS = (".safetensors", ".onnx", ".json", ".yaml")


def made_up(sessions: Mapping[str, Any], workload: Any, rounds: Any, load: Any) -> dict[str, timing.Timing]:
    """`compare`, with the times that SPEEDS says."""
    timings = timing.compare(sessions, workload, timing.Rounds(1, seconds=0.01), load)
    return {
        name: replace(item, samples_ms=(tuple(10 / SPEEDS.get(name, 1.0) for _ in item.sizes),) * 3)
        for name, item in timings.items()
    }


def main() -> None:
    """Prints a line for each file."""
    torch.set_num_threads(1)
    scale.compare = trials.compare = made_up  # type: ignore[attr-defined, assignment]
    stages.measure_levels = lambda *_: LEVELS  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as home:
        os.chdir(home)
        write_data(Path("data"))
        write_model(Path("model"))
        Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
        task = Classification(data="data")
        slimformer.compress(
            "model", task, "compressed", speedup=2.5, max_loss=100, epochs=2, tries=1, threads=1, wait_seconds=0
        )
        slimformer.run(slimformer.read_recipe("recipe.yaml"), "ran", threads=1, wait_seconds=0)
        for folder in ("compressed", "ran"):
            for file in sorted(Path(folder).iterdir()):
                if file.suffix in ENDS and file.name != "slimformer.json":
                    print(digest(file.read_bytes()), file)
        os.chdir("/")


if __name__ == "__main__":
    main()
