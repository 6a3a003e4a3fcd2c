"""Opens model files in runtimes: what is timed and scored is a `Session`, a file that is ready to be called.

A session carries the runtime's name, version and threads along, so that no time is ever written down without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slimformer import registry
from slimformer.errors import ExtraError, ModelError
from slimformer.runtimes.base import Runner, Runtime


@dataclass(frozen=True)
class Engine:
    """The runtime that runs a model, its version and its threads."""

    runtime: str
    version: str
    threads: int
    device: str = "cpu"


@dataclass(frozen=True)
class Session:
    """A model file that is open in a runtime. Calling it runs one batch: input name -> array in, output name -> array out."""

    runner: Runner
    engine: Engine
    path: Path | None = None

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.runner(batch)


def installed_runtime(name: str, generation: Mapping[str, Any] | None = None) -> Runtime:
    """The runtime of that name; ExtraError if its engine is not installed, RecipeError if there is no such runtime."""
    runtime: Runtime = registry.find("runtimes", name)(**({"generation": generation} if generation else {}))
    if not runtime.available():
        extra = f"slimformer[{runtime.extra}]" if runtime.extra else name
        raise ExtraError(f"the runtime '{name}' is not installed.", help=f"pip install '{extra}'")
    return runtime


def runtime_for(path: Path) -> str:
    """The name of an installed runtime that accepts a file: ONNX Runtime if it does; ModelError if none does."""
    names = sorted(registry.names("runtimes"), key=lambda name: (name != "onnxruntime", name))
    for name in names:
        runtime: Runtime = registry.find("runtimes", name)()
        if runtime.available() and runtime.accepts(path):
            return name
    raise ModelError(f"no runtime that is installed accepts {path}.", help=f"known runtimes: {', '.join(names)}.")


def open_session(path: Path, threads: int, runtime: str | None = None, generation: Mapping[str, Any] | None = None) -> Session:
    """A model file, opened with that many threads in a runtime, by default in `runtime_for` it.

    The encoder's file of an encoder-decoder stands for both of its files, and the session gives the texts that they write: the
    folder must hold config.json, generation_config.json and tokenizer.json. `generation`: options of the search that go before
    those of generation_config.json, such as num_beams.

    ExtraError if the runtime is not installed.
    """
    name = runtime or runtime_for(path)
    engine = installed_runtime(name, generation)
    return Session(engine.load(path, threads), Engine(name, engine.version(), threads), path)
