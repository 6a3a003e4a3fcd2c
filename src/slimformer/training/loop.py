"""The one training loop, and the only owner of time: steps, checkpoints, evaluations.

Methods take part through their four verbs and never see the loop. Everything random is a function of (seed, step), and the order of
the rows is one of (seed, epoch): a run that was killed resumes from its last state and ends, on a CPU, with exactly the numbers
of one that was not. Nothing is cut here: the loop returns the methods' decision.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from slimformer.core.plan import Decision
from slimformer.data.batching import epoch_order
from slimformer.data.material import features_digest
from slimformer.digests import digest
from slimformer.errors import RecipeError
from slimformer.hooks.precision import Precision
from slimformer.log import Log
from slimformer.registry import name_of
from slimformer.saving.tensors import fixed_digest, model_digest
from slimformer.training import runstate
from slimformer.training.devices import accelerator_for, chosen_precision, step_seed, tracking
from slimformer.training.stage import Training
from slimformer.training.step import Stepper, attached, rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOWS = 100  # a run reads its loss this many times: reading it at each step would stall a GPU
STATE_SHARE = 0.02  # at most this share of the time goes into writing states, even on a slow disk
STATE_SECONDS = 60.0  # at least so much time lies between two states

Evaluate = Callable[["PreTrainedModel"], float]


@dataclass(frozen=True)
class Trained:
    """The result of a training: the methods' decision, and time and losses, resumed parts included."""

    decision: Decision
    steps: int
    seconds: float  # in the loop, without evaluations, the last state, and teacher outputs made beforehand
    teacher_seconds: float  # for the teacher's outputs, which are made before the loop
    tokens: int  # the tokens it trained on, without padding
    tokens_per_second: float
    overhead_share: (
        float  # share of the seconds outside forward, backward and optimiser step; writing states counts as overhead
    )
    losses: tuple[float, ...]  # the mean of each window; a run has at most 100
    metrics: tuple[float, ...]  # one for each evaluation
    precision: Precision


def train(
    training: Training,
    folder: Path,
    log: Log,
    *,
    evaluate: Evaluate | None = None,
    cache: Path | None = None,
    tracked: Path | None = None,
) -> Trained:
    """Trains the context's model in place and returns the methods' decision; nothing is cut yet.

    Run states lie under `folder`: after a kill, the same call resumes. When the result is saved elsewhere, call
    `runstate.forget_states(folder)`. `evaluate` is called after each epoch. `cache` holds the teacher's outputs (default: `folder`);
    stages with one teacher may share it. `tracked` is where trackers write their files (default: `folder`). Raises RecipeError if the
    methods cannot train together, or if the loss is no longer a number.
    """
    training.check()
    stage = training.stage
    accelerator = accelerator_for(stage.trackers, tracked or folder)
    log = log if accelerator.is_main_process else Log(None, quiet=True)
    accelerator.wait_for_everyone()
    saved = runstate.latest_state(folder)
    key = _key(training)
    if saved is not None and saved.facts["key"] != key:
        log.say("the saved state belongs to other settings, data or weights: training starts from the beginning.")
        saved = None
    precision = saved.facts["precision"] if saved else chosen_precision(stage.precision, accelerator)
    with attached(training, precision, accelerator, log, cache or folder) as stepper:
        counters = Counters(**saved.facts["counters"]) if saved else Counters(teacher_seconds=stepper.teacher_seconds)
        if saved is not None:
            stepper.restore(saved)
            log.say(f"continuing after step {saved.step} of {stepper.total}.")
        options = _options(training)
        log.event("train", precision=precision, steps=stepper.total, settings=options, resumed=saved is not None)
        with tracking(accelerator, options, stage.trackers):
            _Loop(stepper, counters, folder, key, log, evaluate).run(saved.step if saved else 0)
        torch.manual_seed(step_seed(training.seed, 0, stepper.total))
        decision = stepper.decide()
    return Trained(
        decision=decision,
        steps=stepper.total,
        seconds=counters.seconds,
        teacher_seconds=counters.teacher_seconds,
        tokens=counters.tokens,
        tokens_per_second=counters.tokens / counters.seconds if counters.seconds else 0.0,
        overhead_share=max(0.0, 1 - counters.busy / counters.seconds) if counters.seconds else 0.0,
        losses=tuple(counters.losses),
        metrics=tuple(counters.metrics),
        precision=precision,
    )


@dataclass
class Counters:
    """The sums of a run so far; they are saved with its state."""

    seconds: float = 0.0
    busy: float = 0.0
    teacher_seconds: float = 0.0
    tokens: int = 0
    window_loss: float = 0.0
    window_steps: int = 0
    losses: list[float] = field(default_factory=list)
    metrics: list[float] = field(default_factory=list)


class _Loop:
    """The steps of one run, with the clock that is read between them."""

    def __init__(
        self, stepper: Stepper, counters: Counters, folder: Path, key: str, log: Log, evaluate: Evaluate | None
    ) -> None:
        self.stepper, self.counters, self.folder, self.key = stepper, counters, folder, key
        self.log, self.evaluate = log, evaluate
        device = "cpu" if stepper.device.type == "mps" else stepper.device
        self.window_loss = torch.zeros((), dtype=torch.float64, device=device) + counters.window_loss
        self.begin = self.written = (
            time.perf_counter()
        )  # the time since `begin` is not counted yet; the last state was written at `written`
        self.state_seconds = 0.0  # writing the last state took so long
        self.shown: dict[str, float] = {}

    def run(self, start: int) -> None:
        """Runs the steps from `start` to the end, and writes a state now and then."""
        stepper, stage = self.stepper, self.stepper.stage
        total, rows = stepper.total, len(stepper.lengths)
        window, per_epoch = math.ceil(total / WINDOWS), math.ceil(rows / stage.batch_size)
        order: list[list[int]] = []
        with self.log.track("training", total) as advance:
            for step in range(start, total):
                epoch, index = divmod(step, per_epoch)
                if not order or index == 0:
                    groups = stepper.training.features.groups()
                    order = epoch_order(stepper.lengths, stage.batch_size, stepper.training.seed, epoch, groups)
                self.window_loss += stepper.step(order[index], step).to(self.window_loss.device)
                self.counters.tokens += int(stepper.lengths[order[index]].sum())
                self.counters.window_steps += 1
                last = step + 1 == total
                if (step + 1) % window == 0 or last:
                    self._close_window(step)
                if self.evaluate is not None and (index + 1 == per_epoch or last):
                    self._evaluate(self.evaluate, step)
                if self._is_due() and not last:
                    self._save(step + 1)
                advance(step + 1, **self.shown)
        self._count_time()
        if stepper.accelerator.is_main_process and start < total:
            self._save(total)  # a kill while methods decide then costs no training

    def _count_time(self) -> None:
        """Moves the time since `begin` into the counters."""
        self.stepper.clock.wait()
        now = time.perf_counter()
        self.counters.seconds += now - self.begin
        self.counters.busy += self.stepper.clock.read()
        self.begin = now

    def _close_window(self, step: int) -> None:
        stepper, stage, counters = self.stepper, self.stepper.stage, self.counters
        mean = float(self.window_loss) / counters.window_steps
        _check_finite(mean, step, stepper.precision)
        self.window_loss.zero_()
        counters.window_steps = 0
        counters.losses.append(mean)
        self.shown["loss"] = mean
        self._count_time()
        reports = stepper.reports() | {"loss": mean, "lr": stage.lr * rate(step, stepper.total, stage.warmup)}
        self.log.event("step", step=step + 1, tokens_per_second=counters.tokens / counters.seconds, **reports)
        stepper.accelerator.log(reports, step=step + 1)

    def _evaluate(self, evaluate: Evaluate, step: int) -> None:
        self._count_time()
        metric = self.stepper.evaluate(evaluate)
        self.counters.metrics.append(metric)
        self.shown["metric"] = metric
        self.log.event("evaluation", step=step + 1, metric=metric)
        self.stepper.accelerator.log({"metric": metric}, step=step + 1)
        self.begin = time.perf_counter()

    def _is_due(self) -> bool:
        """Whether enough time has passed since the last state to write another."""
        if not self.stepper.accelerator.is_main_process:
            return False
        return time.perf_counter() - self.written >= max(STATE_SECONDS, self.state_seconds / STATE_SHARE)

    def _save(self, step: int) -> None:
        before = time.perf_counter()
        self._count_time()
        self.counters.window_loss = float(self.window_loss)
        facts = {"key": self.key, "precision": self.stepper.precision, "counters": asdict(self.counters)}
        runstate.save_state(self.folder, self.stepper.state(step, facts))
        self.written = time.perf_counter()
        self.state_seconds = self.written - before


def _check_finite(loss: float, step: int, precision: Precision) -> None:
    if not math.isfinite(loss):
        raise RecipeError(
            f"training broke down: the loss is {loss} by step {step + 1}.",
            facts=[f"precision: {precision}"],
            help="lower the learning rate" + (", or set precision to fp32." if precision != "fp32" else "."),
        )


def _options(training: Training) -> dict[str, object]:
    """The options that the numbers depend on, for the log and for the key of a run's states."""
    other = (
        "methods",
        "trackers",
        "text",
        "augment",
        "augment_model",
    )  # the key has them in other forms: their own text, or the rows
    return {name: value for name, value in vars(training.stage).items() if name not in other} | {"seed": training.seed}


def _key(training: Training) -> str:
    """Names the work: a state of other weights, rows, methods or options must not be continued."""
    context = training.context
    parts = [
        _options(training) | {"loss_weight": training.stage.loss_weight},
        [f"{name_of(method)} {method!r}" for method in training.methods],
        name_of(context.task),
        [module.p for module in context.model.modules() if isinstance(module, nn.Dropout)],
        model_digest(context.model),
        fixed_digest(context.teacher.model) if training.taught and context.teacher is not None else "",
        context.teacher_plan.digest() if training.taught else "",
        features_digest(training.features),
        "" if training.read is None else features_digest(training.read),
        context.plan.digest(),
    ]
    return digest(json.dumps(parts, sort_keys=True))
