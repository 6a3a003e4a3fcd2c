"""The nouns that pass through a run: `Run` says where and how it works, `Bundle` is the model on its way, `Made` what it took."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimformer.core.plan import Plan
from slimformer.data.material import Material
from slimformer.digests import digest
from slimformer.families.base import Subject
from slimformer.log import Log
from slimformer.saving.tensors import model_digest
from slimformer.tasks.base import Split
from slimformer.training.runstate import features_digest

if TYPE_CHECKING:
    from slimformer.core.ranges import Ranges
    from slimformer.measuring.latency import Levels


@dataclass(frozen=True)
class Bundle:
    """What passes from stage to stage."""

    subject: Subject  # its model is always plain: no hooks, no masks
    plan: Plan  # everything cut so far, in original numbering
    material: Material
    teacher: Subject
    tuned_here: bool = False  # then the teacher has not seen the validation examples
    ranges: Ranges | None = None  # of the activations, if the last stage learned them

    def digest(self) -> str:
        """Names the student, what was cut of it, the task, and the rows that it is trained and tried on."""
        rows = [features_digest(self.material.features[split]) for split in (Split.TRAIN, Split.VALIDATION)]
        return digest(model_digest(self.subject.model), self.plan.digest(), repr(self.material.task), *rows)

    @property
    def uncut(self) -> Bundle:
        """The teacher in the place of the student: where every search and every rival starts."""
        return replace(self, subject=self.teacher, plan=Plan(), ranges=None)


@dataclass(frozen=True)
class Effort:
    """What making a model from its teacher took."""

    minutes: float = 0.0
    threads: int | None = None  # that the last stage computed with
    peak_rss_bytes: int = 0


@dataclass(frozen=True)
class Made:
    """A bundle and what it took."""

    bundle: Bundle
    effort: Effort = Effort()


@dataclass(frozen=True)
class Run:
    """Where and how a request is carried out."""

    root: Path  # scratch folder of the whole run: measurements that are made once lie here
    folder: Path  # scratch folder of the stage at work
    log: Log
    seed: int = 17
    threads: int = 2
    levels: Levels | None = None  # a latency table that a recipe carries; without it one is measured when a budget needs it
    wait_seconds: float = 60.0  # at most, before each timing, until nothing else runs on the machine
    cache: Path | None = None  # a folder that runs with one teacher share; without it they use `root`
    memo: dict[str, Any] = field(default_factory=dict)  # see Context.memo: what methods found once in this run

    def under(self, name: str) -> Run:
        """The same run in a folder below."""
        return replace(self, folder=self.folder / name)
