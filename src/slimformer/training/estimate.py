"""Estimates the time and memory of a training from a few of its steps."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from slimformer.data.batching import epoch_order
from slimformer.hooks.precision import Precision
from slimformer.log import Log
from slimformer.saving.tensors import tensors_of
from slimformer.training.devices import accelerator_for, chosen_precision, resident_bytes
from slimformer.training.stage import Training
from slimformer.training.step import attached


@dataclass(frozen=True)
class Estimate:
    """The time and memory that a training will take, measured on a few of its steps."""

    seconds: float  # of the steps and of the teacher's outputs
    teacher_seconds: float  # of these, what the teacher's outputs take if they are made beforehand
    steps: int
    tokens_per_second: float  # padding is not counted
    peak_rss_bytes: int  # the peak resident memory of this process
    device_bytes: int  # the peak memory on a GPU; 0 on a CPU
    precision: Precision


def estimate(training: Training, seconds: float = 8.0) -> Estimate:
    """The time and memory that `train` would take, measured for about `seconds` on its largest, a middling and its smallest batch.

    The model is the same afterwards, bit for bit. The time includes the teacher's outputs, but no evaluations.
    """
    training.check()
    context, stage = training.context, training.stage
    accelerator = accelerator_for((), None)
    precision = chosen_precision(stage.precision, accelerator, alone=True)
    lengths = training.features.lengths()
    order = epoch_order(lengths, stage.batch_size, training.seed, 0, training.features.groups())
    sizes = np.asarray([len(rows) * int(lengths[rows].max()) for rows in order])  # padded tokens of each batch
    ranks = np.argsort(sizes, kind="stable")
    probes = [order[int(ranks[-1])], order[int(ranks[len(ranks) // 2])], order[int(ranks[0])]]
    before = {name: tensor.detach().clone() for name, tensor in tensors_of(context.model, "").items()}
    drawn = context.generator.get_state()
    took: list[list[float]] = [[], [], []]
    taught: list[list[float]] = [[], [], []]
    peak = resident_bytes()
    try:
        with attached(training, precision, accelerator, Log(None, quiet=True), None, alone=True) as stepper:
            stepper.sampling = True
            for rows in probes:  # these first steps build kernels and the optimiser's moments
                stepper.step(rows, 0)
            begin = time.perf_counter()
            while not took[2] or time.perf_counter() - begin < seconds:
                for index, rows in enumerate(probes):
                    start = time.perf_counter()
                    stepper.step(rows, 0)
                    stepper.clock.wait()
                    took[index].append(time.perf_counter() - start)
                    peak = max(peak, stepper.peak)
                    taught[index].append(stepper.teach(rows))
            device_bytes = torch.cuda.max_memory_allocated(stepper.device) if stepper.device.type == "cuda" else 0
    finally:
        context.generator.set_state(drawn)
        with torch.no_grad():
            for name, tensor in tensors_of(context.model, "").items():
                tensor.copy_(before[name])
    known = np.asarray([sizes[ranks[-1]], sizes[ranks[len(ranks) // 2]], sizes[ranks[0]]], dtype=np.float64)[::-1]
    per_batch = np.interp(sizes, known, [float(np.median(times)) for times in took[::-1]])
    student_seconds = float(per_batch.mean()) * training.steps
    teacher_seconds = float(np.interp(sizes, known, [float(np.median(times)) for times in taught[::-1]]).sum())
    return Estimate(
        seconds=student_seconds + teacher_seconds,
        teacher_seconds=teacher_seconds,
        steps=training.steps,
        tokens_per_second=float(lengths.sum()) / float(per_batch.sum()),
        peak_rss_bytes=peak,
        device_bytes=device_bytes,
        precision=precision,
    )
