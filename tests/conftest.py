"""Makes tests/tiny.py importable from every test folder, keeps tests off the network, and calls the command line as a person does."""

from __future__ import annotations

import functools
import gc
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does: other work must not stall the suite
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker for each core: threads of one would only stall the others
sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_finish() -> None:
    """What was imported is never collected again: accelerate calls the collector after each training, which else walks all of torch."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs from end to end comes first, so that small tests are left to fill all workers at the end."""
    here, small = Path(__file__).parent, ("exporters", "families", "forms", "methods", "runtimes")
    items.sort(key=lambda item: item.path.relative_to(here).parts[0] in small)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test draws the same models and data whichever process runs it, and after whichever other test."""
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data in memory is kept in a folder of the tests, not in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True, scope="session")
def few_rounds() -> Iterator[None]:
    """What is measured within seconds by the real clock ends after the fewest rounds: no test asks for exact times."""
    from slimformer.measuring import timing

    run = timing._Race.run

    def fewest(race: timing._Race, rounds: timing.Rounds) -> Any:
        real = race.clock is time.perf_counter and rounds.seconds is not None
        return run(race, replace(rounds, count=min(rounds.count, rounds.least)) if real else rounds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing._Race, "run", fewest)
        patch.setattr(timing, "_no_collection", nullcontext)  # a walk through all of torch before each timing
        yield


@pytest.fixture(autouse=True, scope="session")
def no_looks_at_the_machine() -> Iterator[None]:
    """No test sleeps to see what else runs, and the tracer's table of operators, seconds of a small model's export, is made once."""
    from torch.onnx._internal.exporter import _registration

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psutil.cpu_percent", lambda **_: 0.0)
        made = functools.cache(_registration.ONNXRegistry.from_torchlib)
        patch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(made))
        yield


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in a terminal of 80 columns: exit status, standard output, standard error."""
    from slimformer import cli

    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["slimformer", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr()
        return int(end.value.code or 0), shown.out, shown.err

    return run


@pytest.fixture(autouse=True, scope="session")
def each_structure_is_traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """See traced_once.py."""
    from traced_once import traced_once

    from slimformer.exporters._onnx import trace

    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "traces"
    shared.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "trace_model", traced_once(trace.trace_model, shared))
        yield
