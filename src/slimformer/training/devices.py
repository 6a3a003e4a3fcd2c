"""Chooses devices and precision for a training, with accelerate's processes and trackers, memory, and a clock for the device."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slimformer.errors import ExtraError
from slimformer.hooks.precision import BF16_SPEEDUP, Precision, PrecisionChoice, bf16_speedup

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator

PATIENCE = timedelta(days=7)  # processes wait so long for one that exports or measures; one that dies is noticed at once
CACHE_BYTES = 16 << 30  # hidden states and scores of a teacher beyond this are computed again, not kept on disk


def accelerator_for(trackers: Sequence[str], folder: Path | None) -> Accelerator:
    """Accelerate without mixed precision: `autocast` wraps only the models, so that losses are computed in float32."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != "no":
        AcceleratorState._reset_state()  # a Trainer with mixed precision in this process may have left it; it starts the same way
    parallel = DistributedDataParallelKwargs(
        find_unused_parameters=True,  # an unused pooler is no mistake
        broadcast_buffers=False,  # all processes compute the same ones, or pool them: see `State.pool`
        gradient_as_bucket_view=True,
    )
    return Accelerator(
        mixed_precision="no",
        log_with=list(trackers) or None,
        project_dir=folder,
        kwargs_handlers=[parallel, InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def check_trackers(trackers: Sequence[str]) -> None:
    """ExtraError if the package of a tracker is not installed."""
    from accelerate.tracking import get_available_trackers

    missing = sorted(set(trackers) - {str(name) for name in get_available_trackers()}) if trackers else []
    if missing:
        names = ", ".join(missing)
        raise ExtraError(f"trackers: these packages are not installed: {names}.", help="pip install them, or leave them out.")


@contextmanager
def tracking(accelerator: Accelerator, options: Mapping[str, Any], trackers: Sequence[str]) -> Iterator[None]:
    if trackers:
        config = {name: str(value) if isinstance(value, tuple) else value for name, value in options.items()}
        accelerator.init_trackers("slimformer", config={name: value for name, value in config.items() if value is not None})
    try:
        yield
    finally:
        for tracker in accelerator.trackers:  # not end_training(): it would end the process group, and stages follow
            tracker.finish()


def chosen_precision(choice: PrecisionChoice, accelerator: Accelerator, *, alone: bool = False) -> Precision:
    """The precision to use, the same on all processes; `alone`: the others do not ask now."""
    from accelerate.utils import broadcast_object_list

    if choice != "auto":
        return choice
    chosen: list[Precision] = ["fp32"]
    device = accelerator.device
    if device.type == "cuda":
        chosen = ["bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"]
    elif device.type == "cpu" and accelerator.is_main_process and bf16_speedup() >= BF16_SPEEDUP:
        chosen = ["bf16"]
    if accelerator.num_processes > 1 and not alone:
        broadcast_object_list(chosen)
    return chosen[0]


class DeviceClock:
    """Adds up the time in the parts that are the work itself; on a GPU by its own events, read once per window."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        if self._device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            first.record()
            yield
            last.record()
            self._events.append((first, last))
        else:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin

    def wait(self) -> None:
        """Waits until the device has finished its work."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def read(self) -> float:
        """Seconds since the last reading; call `wait` first."""
        seconds = self._seconds + float(sum(first.elapsed_time(last) for first, last in self._events)) / 1000
        self._seconds, self._events = 0.0, []
        return seconds


def share_of(rows: Sequence[int], lengths: Sequence[int] | np.ndarray, rank: int, world: int) -> tuple[list[int], float]:
    """One process's rows of a batch, and the weight of their mean loss: the mean over all processes is the mean over all rows.

    Rows are dealt by length, so that each process has about as many tokens. A process that would get none takes the first row, with
    weight 0.
    """
    if world == 1:
        return list(rows), 1.0
    ordered = sorted(rows, key=lambda row: (int(lengths[row]), row))
    turns = [place % world if place // world % 2 == 0 else world - 1 - place % world for place in range(len(rows))]
    mine = [row for row, turn in zip(ordered, turns, strict=True) if turn == rank]
    return mine or ordered[:1], len(mine) * world / len(rows)


def resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def cache_room(folder: Path | None) -> int:
    """Bytes of a teacher's outputs that may go to disk: a quarter of what is free there, and no more than CACHE_BYTES."""
    if folder is None:
        return CACHE_BYTES
    existing = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    return min(CACHE_BYTES, shutil.disk_usage(existing).free // 4)


def step_seed(seed: int, rank: int, step: int) -> int:
    """A seed for the global generators in one step: dropout is then a function of (seed, process, step)."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {rank} {step}".encode(), digest_size=8).digest()) >> 1
