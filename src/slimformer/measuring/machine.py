"""Describes the machine that a number was measured on, and waits until nothing else runs on it.

A speed without processor, versions and load is no result, so every row of the ledger holds an `Environment` and
every timing a `Load`. Nothing is timed here.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_log = logging.getLogger(__name__)

# What a vector unit can do for int8 and fp32 decides the figures, so a row names the flags that matter.
FLAGS = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "i8mm"),
)
PACKAGES = (
    "slimformer",
    "slimformer-kernels",
    "numpy",
    "onnxruntime",
    "openvino",
    "nncf",
    "ctranslate2",
    "onnx",
    "tokenizers",
    "torch",
    "transformers",
)


@dataclass(frozen=True)
class Environment:
    """The machine and the software a number was measured with."""

    cpu: str
    cores: int
    flags: tuple[str, ...]
    memory_bytes: int
    os: str
    python: str
    packages: Mapping[str, str]


@dataclass(frozen=True)
class Load:
    """How busy the machine was with other work just before timing began."""

    busy_cores: float  # cores that other work took in the last second, while this process slept
    average: float  # load average over one minute, which counts this process's own work too
    waited_seconds: float
    quiet: bool


def environment() -> Environment:
    """The machine this runs on and the versions of what is installed."""
    import psutil

    model, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip().lower() in {"flags", "features"}:
                flags |= set(value.split())
    except OSError:
        pass  # not Linux: the flags stay unknown and the row says so by being empty
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Environment(
        cpu=model,
        cores=cores(),
        flags=tuple(flag for flag in FLAGS if flag in flags),
        memory_bytes=int(psutil.virtual_memory().total),
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        packages=packages,
    )


def saturates(flags: Collection[str]) -> bool:
    """Whether int8 products may overflow on a processor: x86 without VNNI adds pairs of products in 16 bits."""
    return "avx2" in flags and not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(flags)


def cores() -> int:
    """Logical cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)  # macOS counts bytes, Linux kibibytes


def _busy_cores() -> float:
    import psutil

    return float(psutil.cpu_percent(interval=1.0)) / 100 * (os.cpu_count() or 1)


class Quiet:
    """Waits for a quiet machine, at most `wait_seconds` in all: a run that shares one of these waits once, not before each timing.

    The machine is quiet while others use less than `threshold` cores. This process sleeps while it looks, so that it sees nothing
    but other work; the load average would still count its own training of a minute ago.

    Attributes:
        waited: Seconds that it has waited so far.

    Example:
        >>> quiet = Quiet(wait_seconds=0)
        >>> quiet.load().waited_seconds, quiet.left
        (0.0, 0.0)
    """

    def __init__(
        self,
        wait_seconds: float = 60.0,
        threshold: float = 0.25,
        *,
        busy: Callable[[], float] = _busy_cores,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.waited = 0.0
        self._allowed, self._threshold, self._warned = wait_seconds, threshold, False
        self._busy, self._clock, self._sleep = busy, clock, sleep

    @property
    def left(self) -> float:
        """Seconds that it may still wait; 0 once it has given up."""
        return max(0.0, self._allowed - self.waited)

    def load(self) -> Load:
        """The load just before timing, after a wait for a quiet machine if there is time left; tells the user of both."""
        seen, start = self._busy(), self._clock()
        waited = 0.0
        if seen > self._threshold and self.left:
            _log.info(
                "the machine is busy: other work takes %.1f of %d cores. Waiting at most %.0f s for it to end, once in this run; "
                "--wait 0 (in Python wait_seconds=0) does not wait.",
                seen,
                os.cpu_count() or 1,
                self.left,
            )
            while seen > self._threshold and waited < self.left:
                self._sleep(min(5.0, self.left - waited))
                seen = self._busy()
                waited = self._clock() - start
            self.waited += waited
        if seen > self._threshold and not self._warned:
            self._warned, self._allowed = True, self.waited
            _log.warning(
                "the machine is busy%s: other work takes %.1f of %d cores. Models are still timed in turn, but the times are less "
                "sure; the run goes on and does not wait again.",
                f" still after {waited:.0f} s" if waited else "",
                seen,
                os.cpu_count() or 1,
            )
        average = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
        return Load(round(seen, 2), round(average, 2), round(waited, 1), seen <= self._threshold)
