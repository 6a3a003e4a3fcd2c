"""What passes from stage to stage, and where a run keeps its things."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimformer.core.plan import Plan
from slimformer.data.material import Material
from slimformer.log import Log

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimformer.core.ranges import Ranges
    from slimformer.measuring.latency import Levels


@dataclass(frozen=True)
class Bundle:
    """What passes from stage to stage."""

    model: PreTrainedModel  # always plain: no hooks, no masks
    plan: Plan  # everything cut so far, in original numbering
    material: Material
    teacher: PreTrainedModel
    tuned_here: bool = False  # the teacher has not seen the validation examples
    minutes: float = 0.0  # spent on making `model` from the teacher
    threads: int | None = None  # that the last stage computed with
    peak_rss_bytes: int = 0
    ranges: Ranges | None = None  # what activations span, where the stage just done learned it


@dataclass(frozen=True)
class Run:
    """Where and how a recipe runs."""

    root: Path  # scratch of the whole run: what is measured once lies here
    folder: Path  # scratch of the stage at work
    log: Log
    seed: int = 17
    threads: int = 2
    levels: Levels | None = None  # measured before, elsewhere; None: measured here when a budget counts latency
    wait_seconds: float = 60.0  # at most, before each timing, until nothing else runs on the machine
    cache: Path | None = None  # where runs share what is made of their teachers; None: in `root`
    memo: dict[str, Any] = field(default_factory=dict)  # see Context; the runs of its stages share it

    def under(self, name: str) -> Run:
        """The same run in a folder below."""
        return replace(self, folder=self.folder / name)
