"""A runtime runs an artifact: the same call for every engine, numpy in, numpy out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from slimformer.registry import name_of

if TYPE_CHECKING:
    from slimformer.tasks.base import Task

Runner = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]  # inputs it does not know are ignored


class Runtime(ABC):
    """Final frozen dataclasses that import their engine only when they run, so that a lean installation can list them.

    `extra`: the extra of slimformer that installs the engine; `packages`: what `snippet` needs; `foreign`: it runs files that no
    exporter writes, of a rival.
    """

    extra: ClassVar[str | None] = None
    packages: ClassVar[tuple[str, ...]] = ("slimformer",)
    foreign: ClassVar[bool] = False

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

    def snippet(self, task: Task, folder: Path, file: str, texts: Sequence[tuple[str, ...]], max_length: int) -> str:
        """Python for the model card: it runs `file` of an exported folder on the texts. By default it opens the file by this class."""
        return task.plain_snippet(folder, file, texts, max_length, name_of(self))
