"""A method: takes part in training through four small verbs, or looks once, and ends in a Decision.

One file holds one published idea: a final frozen dataclass whose fields are the hyper-parameters. A method never owns the loop:
`training/loop.py` calls `attach` before the first step, `penalty` in each, `advance` after each and `decide` at the end, and
closes the state; then `core/shrink.py` cuts. `effects` says what the method does to a model, so that stages in a senseless
order are refused.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from slimformer.core.plan import Decision, Plan
from slimformer.families.base import Subject
from slimformer.hooks.capture import Capture, Captured
from slimformer.log import Advance, Log
from slimformer.rules import check_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimformer.core.anatomy import Anatomy
    from slimformer.core.cost import Cost
    from slimformer.tasks.base import Task

Batch = Mapping[str, Tensor]  # "input_ids" (batch, seq), "attention_mask" (batch, seq), ..., "labels" (batch,)


class Zeros(StrEnum):
    """What becomes of exact zeros that a method leaves inside the encoder's matrices."""

    NONE = "none"  # it leaves none
    SPARE = "spare"  # they are left over in units that stay: later training may fill them
    RESULT = "result"  # they are what the method is used for: later training must hold them


@dataclass(frozen=True)
class Effects:
    """Says what a method does to a model and asks of its stage, so that a recipe that would lose something is refused."""

    cuts: bool = False  # `decide` takes units, or single weights, away: no matrix may be factored before
    factors: bool = False  # `decide` stores matrices in other forms: nothing can be cut afterwards
    factors_table: bool = False  # it may do so with the word table: the vocabulary can no longer be cut
    rewrites: bool = False  # `decide` takes nothing away, but gives new weights
    zeros: Zeros = Zeros.NONE  # zeros of the method's own making
    holds_zeros: bool = False  # zeros that the method meets are still there when its stage has trained
    refills: bool = False  # matrices get new values, so that no zero in them survives
    learns_grids: bool = False  # later training or cutting would lose the grids and ranges; only the same method may come again
    uneven: bool = False  # it may leave layers of different sizes, or forms: they could share no weights afterwards
    shares: bool = False  # layers have one set of weights: later training would part them, and a cut would make them differ
    branches: bool = False  # the model decides input by input how much it computes: nothing may train or cut it afterwards
    divides: bool = False  # segments attend apart in the lower layers: of pairs of texts only, and no input leaves early
    narrows: bool = False  # hidden states lose units, so that what reads them last must give the others
    sifts: bool = False  # the model takes words out on its way: it may be trained afterwards, but no more cut
    patterns: bool = False  # heads attend by position or within a span: the model may be trained afterwards, but no more cut
    alike: bool = False  # it changes all layers in the same way, so that they may share their weights
    encoders_only: bool = False  # it refuses a model with a decoder
    one_shot: bool = False  # the method looks once and trains nothing: it belongs in a calibrate stage
    neutral: bool = True  # attaching changes no output (law 7)
    needs: frozenset[Capture] = frozenset()  # what the method asks to see of student and teacher in each step
    needs_teacher: bool = False

    @property
    def chooses(self) -> bool:
        """Whether `decide` chooses, under a budget, what is left or how it is stored."""
        return self.cuts or self.factors

    @property
    def adapts(self) -> bool:
        """Whether the model itself will decide, input by input, how much it computes."""
        return self.branches or self.sifts

    @property
    def decides(self) -> bool:
        """Whether `decide` changes the model at all: two such methods in one stage are refused."""
        return self.chooses or self.rewrites or self.adapts or self.divides or self.patterns


@dataclass(frozen=True)
class Progress:
    """Where training stands: `step` optimiser steps of `total` are done."""

    step: int
    total: int

    @property
    def fraction(self) -> float:
        return self.step / max(1, self.total)


@dataclass(frozen=True)
class Held:
    """Validation examples, which no step trains on: `decide` may choose by them.

    `batches`: all their rows, always in the same order. `score`: of outputs for all rows, in that order, the task's metric that
    counts, as a share; more is better.
    """

    batches: Callable[[], Iterator[Batch]]
    score: Callable[[Mapping[str, np.ndarray]], float]


@dataclass(frozen=True)
class Context:
    """What stands around a method: the same for attach and decide."""

    subject: Subject
    plan: Plan  # cut so far, in original numbering
    task: Task
    cost: Cost
    teacher: Subject | None
    batches: Callable[[int], Iterator[Batch]]  # batches(n): training examples, n at most, on the model's device
    generator: torch.Generator
    teacher_plan: Plan = field(default_factory=Plan)  # cut of the teacher before, in original numbering
    held: Held | None = None  # None if there are no validation examples
    tokenizers: tuple[str, str] | None = None  # the tokenizer.json of model and teacher, if each has its own
    memo: dict[str, Any] = field(default_factory=dict)  # found once in this run, under a key that names all it depends on
    track: Callable[[str, int], AbstractContextManager[Advance]] = Log(None, quiet=True).track  # of long looks at the model

    @property
    def model(self) -> PreTrainedModel:
        """The model that the methods look at or change."""
        return self.subject.model

    @property
    def anatomy(self) -> Anatomy:
        """What can be cut in it."""
        return self.subject.anatomy

    def answers(self, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """The outputs of the model as it stands, on each batch."""
        with self.subject.evaluating(), torch.no_grad():
            outputs = [self.model(**self.subject.feed(batch)) for batch in batches]
        return [{name: output[name] for name in self.task.outputs} for output in outputs]


@dataclass(frozen=True)
class Step:
    """All that a method may look at while training."""

    model: nn.Module
    batch: Batch
    student: Captured
    teacher: Captured | None
    progress: Progress
    task: Task
    read: Batch | None = None  # the same rows as the teacher reads them; None if it reads `batch`


class State(nn.Module):
    """Parameters and hooks that a method adds while training; saved with every checkpoint. Close it when done."""

    def __init__(self) -> None:
        super().__init__()
        self._closers: list[Callable[[], None]] = []

    def on_close(self, closer: Callable[[], None]) -> None:
        self._closers.append(closer)

    def groups(self) -> list[dict[str, Any]]:
        """Optimiser groups of the parameters here; AdamW's own decay is never right for gates, so it is 0 by default."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [{"params": parameters, "weight_decay": 0.0}] if parameters else []

    def pool(self, gather: Callable[[Tensor], Tensor]) -> None:
        """Called before `advance` if several processes train: makes of the numbers that this process has seen those of all.

        `gather` gives this tensor of each process, (processes, ...). Gradients are averaged without it.
        """

    def close(self) -> None:
        """Removes every hook and parametrisation; always called, also after an error."""
        while self._closers:
            self._closers.pop()()


class Method(ABC):
    """The four verbs, each with a default that does nothing, and `effects`.

    Fields are options. Each has a default and a type that carries its rule (`slimformer.rules`): a value that breaks it is
    refused with a ValueError when the method is built. Two names mean the same in all methods: `keep`, the share that may stay,
    and `cost`, what it is a share of.
    """

    keep: float | None = None  # the share of the dense cost (or, if single weights go, of the weights); None: not by a budget
    cost: str = "macs"  # what a budget is a share of: "macs", "parameters" or "latency"

    def __post_init__(self) -> None:
        check_options(self)

    def effects(self) -> Effects:
        """What the method does to a model with these options."""
        return Effects()

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        """Raises if blocks do not divide this model's matrices or the budget is out of reach: all that names and sizes tell.

        `attach` calls it. It is called before anything runs too, with the anatomy as the stages before leave it, as far as that can be
        foreseen; `cost` is None if it is not known then, because it is measured.
        """

    def foresee(self, anatomy: Anatomy, cost: Cost | None) -> Plan | None:
        """A plan that leaves the sizes and forms that `decide` will leave; None if only data, training or a measurement can tell.

        Which units it names does not matter. By it the stages behind are checked before anything runs; `check` was called before.
        """
        return None if self.effects().chooses else Plan()

    def problem(self, task: Task) -> str | None:
        """Why the method cannot work for a task, in a clause; None if it can. Asked before anything runs."""
        return None

    def mismatch(self, mine: Anatomy, theirs: Anatomy) -> str | None:
        """Why the method cannot work for a model and its teacher, in a clause; None if it can. Asked before anything runs."""
        return None

    def attach(self, context: Context) -> State:
        """What the method trains, and its hooks on the model; called before the first step."""
        self.check(context.anatomy, context.cost)
        return State()

    def penalty(self, state: State, step: Step) -> Tensor | None:
        """A scalar that is added to the task loss, or None."""
        return None

    def advance(self, state: State, progress: Progress) -> None:
        """Called after each optimiser step."""

    def report(self, state: State) -> Mapping[str, float]:
        """Numbers worth a place in the log."""
        return {}

    def decide(self, state: State, context: Context) -> Decision:
        """What is to become of the model; nothing is changed yet."""
        return Decision()

    @classmethod
    def settle(cls, context: Context) -> Decision | None:  # noqa: ARG003
        """What fits anew, to weights that a later stage has changed, what this method once left in the model; None if nothing is to fit.

        The model of the context tells what was left, whatever options left it. Called for models with junctions.
        """
        return None
