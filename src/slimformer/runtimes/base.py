"""A runtime runs an artifact: the same call for every engine, numpy in, numpy out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

Runner = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]  # inputs it does not know are ignored


class Runtime(ABC):
    """Final frozen dataclasses without a heavy import at module level; `available` tells whether the engine is installed."""

    extra: ClassVar[str | None] = None  # the extra that installs it

    @abstractmethod
    def available(self) -> bool: ...

    @abstractmethod
    def version(self) -> str: ...

    @abstractmethod
    def accepts(self, path: Path) -> bool:
        """Whether this engine can run that file or folder."""

    @abstractmethod
    def load(self, path: Path, threads: int) -> Runner:
        """A callable: model inputs (batch, seq) -> outputs by name. ExtraError where the engine is missing."""
