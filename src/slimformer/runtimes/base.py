"""A runtime runs an artifact: the same call for every engine, numpy in, numpy out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

Runner = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]  # inputs it does not know are ignored


class Runtime(ABC):
    """Final frozen dataclasses that import their engine only when they run, so that a lean installation can list them.

    `extra`: the extra of slimformer that installs the engine.
    """

    extra: ClassVar[str | None] = None

    @abstractmethod
    def available(self) -> bool:
        """Whether the engine is installed."""

    @abstractmethod
    def version(self) -> str:
        """The version of the engine."""

    @abstractmethod
    def accepts(self, path: Path) -> bool:
        """Whether this engine can run that file or folder."""

    @abstractmethod
    def load(self, path: Path, threads: int) -> Runner:
        """A callable: model inputs (batch, seq) -> outputs by name. ExtraError if the engine is missing."""
