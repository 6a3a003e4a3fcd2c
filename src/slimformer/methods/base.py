"""A method: takes part in training through four small verbs, or looks once, and ends in a Decision.

One file per published idea, final frozen dataclasses whose fields are the hyper-parameters. A method never owns the loop:
`training.py` calls `attach` before the first step, `penalty` in each, `advance` after each, `decide` at the end; then closes
the state, and `shrink.py` cuts.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from slimformer.core.plan import Decision, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimformer.core.anatomy import Anatomy
    from slimformer.core.cost import Cost
    from slimformer.tasks.base import Task

Batch = Mapping[str, Tensor]  # "input_ids" (batch, seq), "attention_mask" (batch, seq), ..., "labels" (batch,)


class Capture(StrEnum):
    """What a method asks to see of student and teacher in each step."""

    LOGITS = "logits"  # the task's outputs
    HIDDEN = "hidden"  # after the embedding and after each layer
    SCORES = "scores"  # attention logits before the softmax, per layer


class Zeros(StrEnum):
    """What becomes of exact zeros that a method leaves inside the encoder's matrices."""

    NONE = "none"  # it leaves none
    SPARE = "spare"  # they are left over in units that stay: later training may fill them
    RESULT = "result"  # they are what it was used for: later training must hold them


@dataclass(frozen=True)
class Captured:
    """What was seen of one model in one forward pass."""

    output: Mapping[str, Tensor]  # task.outputs -> tensor
    hidden: tuple[Tensor, ...] = ()  # layers + 1 of (batch, seq, hidden)
    scores: tuple[Tensor | None, ...] = ()  # per layer (batch, heads, seq, seq), scaled, unmasked; None: no attention there


@dataclass(frozen=True)
class Progress:
    """Where training stands: `step` optimiser steps of `total` are done."""

    step: int
    total: int

    @property
    def fraction(self) -> float:
        return self.step / max(1, self.total)


@dataclass(frozen=True)
class Context:
    """What stands around a method: the same for attach and decide.

    `heads_of` maps a heads site to the original head numbers that are left, so that student heads find their teachers.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    plan: Plan  # cut so far, in original numbering
    task: Task
    cost: Cost
    teacher: PreTrainedModel | None
    teacher_anatomy: Anatomy | None
    batches: Callable[[int], Iterator[Batch]]  # batches(n): training examples, n at most, on the model's device
    generator: torch.Generator
    memo: dict[str, Any] = field(
        default_factory=dict
    )  # what was found once in this run, under a key that names all it depends on


@dataclass(frozen=True)
class Step:
    """All that a method may look at while training."""

    model: nn.Module
    batch: Batch
    student: Captured
    teacher: Captured | None
    progress: Progress
    task: Task


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

    def close(self) -> None:
        """Removes every hook and parametrisation; always called, also after an error."""
        while self._closers:
            self._closers.pop()()


class Method(ABC):
    """The four verbs, each with a default that does nothing.

    What a method declares tells which orders of stages make sense: a recipe in another order is refused before anything starts.
    """

    needs: ClassVar[frozenset[Capture]] = frozenset()
    needs_teacher: ClassVar[bool] = False
    decides: ClassVar[bool] = False  # whether `decide` may cut; two such methods in one stage are refused
    rewrites: ClassVar[bool] = False  # whether `decide` cuts nothing but gives new weights; as much alone as one that decides
    forms: ClassVar[bool] = False  # whether it decides forms of matrices instead of cuts: none can be cut afterwards
    leaves: ClassVar[Zeros] = Zeros.NONE  # zeros of its own making
    keeps_zeros: ClassVar[bool] = False  # whether zeros that it finds are still there when its stage has trained
    fills: ClassVar[bool] = False  # whether it gives matrices new values, so that no zero in them survives
    closes: ClassVar[bool] = False  # whether later training or cutting would lose what it learned; only the same may come again
    trains: ClassVar[bool] = True  # False: one-shot, for a Calibrate stage
    neutral: ClassVar[bool] = True  # attaching changes no output (law 7)
    cost: str = "macs"  # what `context.cost` counts for this method: "macs", "parameters" or "latency"

    def check(self, anatomy: Anatomy, cost: Cost | None) -> None:
        """Raises where blocks do not divide this model's matrices, or the budget is out of reach: all that names and sizes tell.

        `attach` calls it. For the first method of a recipe that decides it is called before anything runs, with the model's own
        anatomy; `cost` is None where it is not known then, because it is measured.
        """

    def attach(self, context: Context) -> State:
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
        return Decision()
