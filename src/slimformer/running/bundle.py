"""The values that pass through a run: `Run` says where and how it works, `Bundle` holds the model, `Made` adds the effort."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimformer.core.plan import Plan
from slimformer.data.material import Material
from slimformer.digests import digest
from slimformer.families.base import Subject
from slimformer.log import Log
from slimformer.measuring.machine import Quiet
from slimformer.measuring.records import VocabularyFacts
from slimformer.saving.tensors import fixed_digest

if TYPE_CHECKING:
    from slimformer.core.ranges import Ranges
    from slimformer.measuring.latency import Levels


@dataclass(frozen=True)
class Bundle:
    """A model with its plan, data and teacher, as one stage hands it to the next.

    Attributes:
        subject: The model, which is always plain (no hooks, no masks), with its anatomy.
        plan: Everything cut so far, in the numbering of the original model.
        material: The data, encoded.
        teacher: The model to learn from.
        tuned_here: If it is true, the teacher has not seen the validation examples.
        teacher_plan: What is cut of the teacher, as `plan` says of the student.
        ranges: The ranges of activations, if the last stage learned them.
        whole: The bundle before its vocabulary was cut, with the teacher as its student; None if it was not. Student and teacher of
            this one have the same vocabulary.
        vocabulary: What was cut of the vocabulary, and what that does to the dev texts.
        read: The data as the teacher's own tokenizer splits them; None if the teacher reads what the model does.

    Example:
        >>> from slimformer import Bundle, Plan
        >>> from slimformer.data.material import prepare
        >>> from slimformer.families.base import subject_of
        >>> from slimformer.tasks.intents import Intents
        >>> from slimformer.testing.tiny import tiny
        >>> subject = subject_of(tiny("bert", num_labels=24))
        >>> bundle = Bundle(subject, Plan(), prepare(Intents(examples=96, dev=48), "my-bert"), subject)
        >>> bundle.uncut == bundle
        True
    """

    subject: Subject
    plan: Plan
    material: Material
    teacher: Subject
    tuned_here: bool = False
    teacher_plan: Plan = field(default_factory=Plan)
    ranges: Ranges | None = None
    whole: Bundle | None = None
    vocabulary: VocabularyFacts | None = None
    read: Material | None = None

    def digest(self) -> str:
        """Names student and teacher, what was cut of them, the task, and what its rows hold, dev left out.

        Returns:
            Twelve hexadecimal digits.

        Example:
            >>> from slimformer import Bundle, Plan
            >>> from slimformer.data.material import prepare
            >>> from slimformer.families.base import subject_of
            >>> from slimformer.tasks.intents import Intents
            >>> from slimformer.testing.tiny import tiny
            >>> subject = subject_of(tiny("bert", num_labels=24))
            >>> len(Bundle(subject, Plan(), prepare(Intents(examples=96, dev=48), "my-bert"), subject).digest())
            12
        """
        models = (fixed_digest(self.subject.model), fixed_digest(self.teacher.model))
        names = (self.plan.digest(), self.teacher_plan.digest(), self.material.task.settings, self.material.digest)
        return digest(*models, *names, *([] if self.read is None else [self.read.digest]))

    @property
    def uncut(self) -> Bundle:
        """The bundle with the teacher in the place of the student, and its own vocabulary; every rival starts from it."""
        return self.whole or replace(
            self, subject=self.teacher, plan=self.teacher_plan, ranges=None, material=self.read or self.material, read=None
        )


@dataclass(frozen=True)
class Effort:
    """The time, threads and memory that making a model from its teacher took."""

    minutes: float = 0.0
    threads: int | None = None  # the last stage computed with so many
    peak_rss_bytes: int = 0

    def then(self, later: Effort) -> Effort:
        """This effort with a later one added."""
        peak = max(self.peak_rss_bytes, later.peak_rss_bytes)
        return Effort(self.minutes + later.minutes, later.threads or self.threads, peak)


@dataclass(frozen=True)
class Made:
    """A bundle and the effort that went into it."""

    bundle: Bundle
    effort: Effort = Effort()


@dataclass(frozen=True)
class Run:
    """Where and how a request is carried out."""

    root: Path  # the scratch folder of the whole run; it keeps measurements that are made once
    folder: Path  # the scratch folder of the stage that runs now
    log: Log
    seed: int = 17
    threads: int = 2
    levels: Levels | None = None  # a latency table that a recipe carries; without it one is measured when a budget needs it
    quiet: Quiet = field(default_factory=Quiet)  # all timings of a run share it, so that the run waits once
    cache: Path | None = None  # a folder that runs with one teacher share; without it they use `root`
    memo: dict[str, Any] = field(default_factory=dict)  # methods keep here what they compute once a run: see Context.memo

    def under(self, name: str) -> Run:
        """The same run in a subfolder of that name."""
        return replace(self, folder=self.folder / name)
