"""The one training loop, and the only owner of time: steps, schedule, optimiser, checkpoints.

Methods take part through their four verbs and never see the loop. Everything random is a function of (seed, step) and the data
order one of (seed, epoch): a run killed at any moment goes on from its last state and ends, on a CPU, with the very numbers of
one that was not. Built on accelerate for devices, processes and trackers. Nothing is cut here: what methods decide is returned.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Role
from slimformer.core.plan import Decision
from slimformer.data.batching import collate, epoch_order, least_width
from slimformer.errors import RecipeError
from slimformer.families.base import family_of
from slimformer.hooks.attention import quick_attention
from slimformer.hooks.capture import Capture, Captured, Recorder, capturing
from slimformer.log import Log
from slimformer.methods.base import Batch, Context, Method, Progress, State, Step
from slimformer.registry import name_of
from slimformer.tasks.base import Features
from slimformer.training import runstate
from slimformer.training.embedding_gradient import Lookup, kept_gradient
from slimformer.training.precision import BF16_GAIN, Precision, autocast, bf16_gain
from slimformer.training.runstate import RunState
from slimformer.training.teacher import Lessons, Remembered, Teacher, is_live, remembering, teaching

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

WINDOWS = 100  # the loss is averaged and read in this many windows a run: reading it at each step would stall a GPU
STATE_SHARE = 0.02  # of the time that may go into writing states, however slow the disk


class Freeze(StrEnum):
    """Which of the model's own weights do not train."""

    NOTHING = "nothing"
    EMBEDDINGS = "embeddings"  # the word embeddings: half of a small encoder's weights, and of the optimiser's time
    ENCODER = "encoder"  # all but the task's head
    EVERYTHING = "everything"  # only what methods add trains


@dataclass(frozen=True)
class Settings:
    """How to train. `batch_size` is that of all processes together; `steps` overrides `epochs`; `clip` 0 clips nothing.

    `precision` "auto" takes bf16 (else fp16) on a GPU, and on a CPU bf16 where that is measured to be clearly faster.
    """

    epochs: float = 3.0
    lr: float = 3e-5
    batch_size: int = 32
    task_weight: float = 1.0
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of the steps in which the rate rises
    clip: float = 1.0  # largest gradient norm of the model's weights
    freeze: Freeze = Freeze.NOTHING
    seed: int = 17
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    checkpoint_seconds: float = 60.0
    steps: int | None = None
    cache_bytes: int = 16 << 30  # a teacher's hidden states and scores beyond this are not kept on disk but computed again
    evaluate: bool = True  # after each epoch, where `train` is given how
    trackers: tuple[str, ...] = ()  # accelerate's names: "tensorboard", "wandb", ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "freeze", Freeze(self.freeze))
        object.__setattr__(self, "trackers", tuple(self.trackers))
        wrong = [
            f"{name}: {getattr(self, name)!r}, must be {rule}"
            for name, rule, good in (
                ("epochs", "above 0", self.epochs > 0),
                ("steps", "at least 1", self.steps is None or self.steps >= 1),
                ("lr", "0 or above, and finite", 0 <= self.lr < math.inf),
                ("batch_size", "at least 1", self.batch_size >= 1),
                ("task_weight", "0 or above", self.task_weight >= 0),
                ("weight_decay", "0 or above", self.weight_decay >= 0),
                ("warmup", "from 0 to 1", 0 <= self.warmup <= 1),
                ("clip", "0 or above", self.clip >= 0),
                ("seed", "0 or above", self.seed >= 0),
                ("precision", "auto, fp32, bf16 or fp16", self.precision in ("auto", "fp32", "bf16", "fp16")),
            )
            if not good
        ]
        if wrong:
            raise RecipeError("the training settings cannot be used.", facts=wrong, help="correct these values.")

    def steps_of(self, rows: int) -> int:
        """Optimiser steps of a run over this many rows."""
        return self.steps if self.steps is not None else max(1, round(self.epochs * math.ceil(rows / self.batch_size)))


@dataclass(frozen=True)
class Trained:
    """What came of a training: the methods' decision, and what it took, resumed parts included."""

    decision: Decision
    steps: int
    seconds: float  # in the loop; without teacher outputs made beforehand, evaluations and the last state written
    teacher_seconds: float  # making the teacher's outputs before the loop
    tokens: int  # trained on, padding not counted
    tokens_per_second: float
    overhead_share: float  # of the seconds: all but forward, backward and optimiser step; states written count as overhead
    losses: tuple[float, ...]  # mean of each window, 100 a run at most
    metrics: tuple[float, ...]  # of each evaluation
    precision: Precision

    @property
    def last_metric(self) -> float | None:
        return self.metrics[-1] if self.metrics else None


@dataclass(frozen=True)
class Estimate:
    """What a training will take, measured on a few of its steps."""

    seconds: float
    steps: int
    tokens_per_second: float  # padding not counted
    peak_rss_bytes: int  # resident memory of this process
    device_bytes: int  # of a GPU's memory; 0 on a CPU
    precision: Precision


def check(methods: Sequence[Method], *, teacher: bool) -> None:
    """RecipeError where these methods cannot train together: two that decide, one-shot ones, no teacher where one is needed."""
    wrong = []
    deciding = [name_of(method) for method in methods if method.effects().decides]
    if len(deciding) > 1:
        wrong.append(f"{' and '.join(deciding)} both decide what is cut: put them into stages of their own")
    wrong += [
        f"{name_of(m)} looks once and does not train: use it in a calibrate stage" for m in methods if m.effects().one_shot
    ]
    wrong += [f"{name_of(m)} needs a teacher and there is none" for m in methods if m.effects().needs_teacher and not teacher]
    if wrong:
        raise RecipeError("these methods cannot train together.", facts=wrong, help="change the stage's methods.")


def rate(step: int, total: int, warmup: float) -> float:
    """Factor on the learning rate in step 0..total-1: a line up over the warm-up share, then a line down towards 0."""
    rise = round(warmup * total)
    return (step + 1) / rise if step < rise else (total - step) / max(1, total - rise)


def train(
    context: Context,
    features: Features,
    methods: Sequence[Method],
    settings: Settings,
    folder: Path,
    log: Log,
    evaluate: Callable[[PreTrainedModel], float] | None = None,
    cache: Path | None = None,
) -> Trained:
    """Trains `context.model` in place with `methods`, and returns what they decide; nothing is cut yet.

    Run states lie under `folder`: call it again after a kill and it goes on. When the result is saved elsewhere, call
    `runstate.forget(folder)`. `cache` holds the teacher's outputs (default: `folder`); stages with one teacher may share it.
    Raises RecipeError for methods that cannot train together or a loss that is no longer a number.
    """
    check(methods, teacher=context.teacher is not None)
    if not len(features):
        raise ValueError("no rows to train on")
    accelerator = _accelerator(settings.trackers, folder)
    log = log if accelerator.is_main_process else Log(None, quiet=True)
    accelerator.wait_for_everyone()
    saved = runstate.latest(folder)
    key = _key(context, features, methods, settings)
    if saved is not None and saved.facts["key"] != key:
        log.say("the saved state belongs to other settings, data or weights: training starts from the beginning.")
        saved = None
    precision = saved.facts["precision"] if saved else _precision(settings, accelerator)
    with _rigged(context, features, methods, settings, precision, accelerator, log, cache or folder) as rig:
        tally = _Tally.from_facts(saved.facts["tally"]) if saved else _Tally(teacher_seconds=rig.lessons_seconds)
        if saved is not None:
            rig.restore(saved)
            log.say(f"continuing after step {saved.step} of {rig.total}.")
        log.event("train", precision=precision, steps=rig.total, settings=asdict(settings), resumed=saved is not None)
        with _trackers(accelerator, settings):
            _loop(rig, saved.step if saved else 0, tally, folder, key, log, evaluate)
        torch.manual_seed(_mix(settings.seed, 0, rig.total))
        decision = rig.decide()
    return Trained(
        decision=decision,
        steps=rig.total,
        seconds=tally.seconds,
        teacher_seconds=tally.teacher_seconds,
        tokens=tally.tokens,
        tokens_per_second=tally.tokens / tally.seconds if tally.seconds else 0.0,
        overhead_share=max(0.0, 1 - tally.busy / tally.seconds) if tally.seconds else 0.0,
        losses=tuple(tally.losses),
        metrics=tuple(tally.metrics),
        precision=precision,
    )


def estimate(
    context: Context, features: Features, methods: Sequence[Method], settings: Settings, seconds: float = 8.0
) -> Estimate:
    """What `train` would take, measured for about `seconds` on its largest, a middling and its smallest batch.

    The model is afterwards what it was, bit for bit. The teacher's outputs are counted in, evaluations are not.
    """
    check(methods, teacher=context.teacher is not None)
    accelerator = _accelerator((), None)
    precision = _precision(settings, accelerator)
    lengths = features.lengths()
    order = epoch_order(lengths, settings.batch_size, settings.seed, 0)
    sizes = np.asarray([len(rows) * int(lengths[rows].max()) for rows in order])  # padded tokens of each batch
    ranks = np.argsort(sizes, kind="stable")
    probes = [order[int(ranks[-1])], order[int(ranks[len(ranks) // 2])], order[int(ranks[0])]]
    before = {name: tensor.detach().clone() for name, tensor in runstate.tensors_of(context.model, "").items()}
    drawn = context.generator.get_state()
    took: list[list[float]] = [[], [], []]
    taught: list[list[float]] = [[], [], []]
    peak = _resident()
    try:
        with _rigged(context, features, methods, settings, precision, accelerator, Log(None, quiet=True), None) as rig:
            rig.sampling = True
            for rows in probes:  # the first steps build kernels and the optimiser's moments
                rig.step(rows, 0)
            begin = time.perf_counter()
            while not took[2] or time.perf_counter() - begin < seconds:
                for index, rows in enumerate(probes):
                    start = time.perf_counter()
                    rig.step(rows, 0)
                    rig.clock.wait()
                    took[index].append(time.perf_counter() - start)
                    peak = max(peak, rig.peak)
                    taught[index].append(rig.teach(rows))
            device_bytes = torch.cuda.max_memory_allocated(rig.device) if rig.device.type == "cuda" else 0
    finally:
        context.generator.set_state(drawn)
        with torch.no_grad():
            for name, tensor in runstate.tensors_of(context.model, "").items():
                tensor.copy_(before[name])
    known = np.asarray([sizes[ranks[-1]], sizes[ranks[len(ranks) // 2]], sizes[ranks[0]]], dtype=np.float64)[::-1]
    per_batch = np.interp(sizes, known, [float(np.median(times)) for times in took[::-1]])
    steps = settings.steps_of(len(features))
    training = float(per_batch.mean()) * steps
    teacher = float(np.interp(sizes, known, [float(np.median(times)) for times in taught[::-1]]).sum())
    return Estimate(
        seconds=training + teacher,
        steps=steps,
        tokens_per_second=float(lengths.sum()) / float(per_batch.sum()),
        peak_rss_bytes=peak,
        device_bytes=device_bytes,
        precision=precision,
    )


@dataclass
class _Tally:
    """What a run has counted so far; saved with its state."""

    seconds: float = 0.0
    busy: float = 0.0
    teacher_seconds: float = 0.0
    tokens: int = 0
    window_loss: float = 0.0
    window_steps: int = 0
    losses: list[float] | tuple[float, ...] = ()
    metrics: list[float] | tuple[float, ...] = ()

    def __post_init__(self) -> None:
        self.losses, self.metrics = list(self.losses), list(self.metrics)

    @staticmethod
    def from_facts(facts: Mapping[str, Any]) -> _Tally:
        return _Tally(**facts)


def _loop(
    rig: _Rig,
    start: int,
    tally: _Tally,
    folder: Path,
    key: str,
    log: Log,
    evaluate: Callable[[PreTrainedModel], float] | None,
) -> None:
    settings, total = rig.settings, rig.total
    span = math.ceil(total / WINDOWS)
    running = torch.zeros((), dtype=torch.float64, device="cpu" if rig.device.type == "mps" else rig.device)
    running += tally.window_loss
    per_epoch = math.ceil(len(rig.features) / settings.batch_size)
    order: list[list[int]] = []
    begin = time.perf_counter()
    written, state_seconds = begin, 0.0  # when the last state was written, and what it took

    def settle() -> None:
        """Moves the time since `begin` into the tally."""
        nonlocal begin
        rig.clock.wait()
        now = time.perf_counter()
        tally.seconds += now - begin
        tally.busy += rig.clock.read()
        begin = now

    def keep(step: int) -> None:
        nonlocal state_seconds, written
        before = time.perf_counter()
        settle()
        tally.window_loss = float(running)
        facts = {"key": key, "precision": rig.precision, "tally": asdict(tally)}
        runstate.save(folder, rig.state(step, facts))
        written = time.perf_counter()
        state_seconds = written - before

    with log.track("training", total) as advance:
        numbers: dict[str, float] = {}
        for step in range(start, total):
            epoch, index = divmod(step, per_epoch)
            if not order or index == 0:
                order = epoch_order(rig.lengths, settings.batch_size, settings.seed, epoch)
            rows = order[index]
            loss = rig.step(rows, step)
            running += loss.to(running.device)
            tally.tokens += int(rig.lengths[rows].sum())
            tally.window_steps += 1
            if (step + 1) % span == 0 or step + 1 == total:
                mean = float(running) / tally.window_steps
                _finite(mean, step, rig.precision)
                running.zero_()
                tally.window_steps = 0
                tally.losses = [*tally.losses, mean]
                numbers["loss"] = mean
                settle()
                reports = rig.reports()
                shown = reports | {"loss": mean, "lr": settings.lr * rate(step, total, settings.warmup)}
                log.event("step", step=step + 1, tokens_per_second=tally.tokens / tally.seconds, **shown)
                rig.accelerator.log(shown, step=step + 1)
            if evaluate is not None and settings.evaluate and (index + 1 == per_epoch or step + 1 == total):
                settle()
                metric = rig.evaluate(evaluate)
                tally.metrics = [*tally.metrics, metric]
                numbers["metric"] = metric
                log.event("evaluation", step=step + 1, metric=metric)
                rig.accelerator.log({"metric": metric}, step=step + 1)
                begin = time.perf_counter()
            due = time.perf_counter() - written >= max(settings.checkpoint_seconds, state_seconds / STATE_SHARE)
            if rig.accelerator.is_main_process and due and step + 1 < total:
                keep(step + 1)
            advance(step + 1, **numbers)
    settle()
    if rig.accelerator.is_main_process and start < total:
        keep(total)  # so that a kill while methods decide costs no training


class _Whole(nn.Module):
    """Student and method states as one module, so that several processes average the gradients of both."""

    def __init__(
        self,
        context: Context,
        methods: Sequence[Method],
        states: Sequence[State],
        recorder: Recorder,
        task_weight: float,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        super().__init__()
        self.model = context.model
        self.states = nn.ModuleList(states)
        self._task = context.task
        self._methods = tuple(methods)
        self._recorder = recorder
        self._task_weight = task_weight
        self._autocast = autocast
        self._inputs = family_of(context.model.config.model_type).inputs(context.model)

    def forward(self, batch: Batch, teacher: Captured | None, progress: Progress) -> Tensor:
        """The whole loss of a batch: a scalar."""
        with self._autocast():
            output = self.model(**{name: batch[name] for name in self._inputs if name in batch})
        seen = self._recorder.take({name: output[name] for name in self._task.outputs})
        step = Step(self.model, batch, seen, teacher, progress, self._task)
        terms = []
        if self._task_weight > 0:
            terms.append(self._task_weight * self._task.loss(seen.output, batch))
        for method, state in zip(self._methods, self.states, strict=True):
            penalty = method.penalty(state, step)  # type: ignore[arg-type]
            if penalty is not None:
                terms.append(penalty)
        if not terms:
            raise RecipeError(
                "there is nothing to train on: the task's weight is 0 and no method adds a loss.",
                help="raise task_weight, or add a method such as distillation.",
            )
        return torch.stack([term.float() for term in terms]).sum()


class _Rig:
    """All that one step needs, ready to run."""

    def __init__(
        self,
        context: Context,
        features: Features,
        methods: Sequence[Method],
        settings: Settings,
        precision: Precision,
        accelerator: Accelerator,
        states: Sequence[State],
        recorder: Recorder,
        lessons: Lessons | None,
        lookup: Lookup | None,
        home: torch.device,
    ) -> None:
        self.context, self.features, self.methods, self.settings = context, features, tuple(methods), settings
        self.precision, self.accelerator, self.states = precision, accelerator, tuple(states)
        self.device = accelerator.device
        self.lengths = features.lengths()
        self.total = settings.steps_of(len(features))
        self.clock = _Clock(self.device)
        self.sampling = False  # whether to watch resident memory: a system call a step
        self.peak = 0
        self._recorder, self._lessons, self._lookup, self._home = recorder, lessons, lookup, home
        whole = _Whole(context, methods, states, recorder, settings.task_weight, partial(autocast, self.device, precision))
        self.optimizer = _optimizer(context.model, states, settings)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._clipped = [parameter for parameter in context.model.parameters() if parameter.requires_grad]
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self._whole: nn.Module = accelerator.prepare_model(whole)
        self._whole.train()

    @property
    def lessons_seconds(self) -> float:
        return self._lessons.seconds if self._lessons else 0.0

    def step(self, rows: Sequence[int], number: int) -> Tensor:
        """One optimiser step on these rows, of which each process takes its share; the loss, detached."""
        mine = _share(rows, self.accelerator.process_index, self.accelerator.num_processes)
        torch.manual_seed(_mix(self.settings.seed, self.accelerator.process_index, number))
        factor = rate(number, self.total, self.settings.warmup)
        for group, base in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = base * factor
        batch = self.batch(mine)
        progress = Progress(number, self.total)
        with self.clock.running():
            seen = self._lessons.see(mine, batch) if self._lessons else None
            loss: Tensor = self._whole(batch, seen, progress)
        self._sample()
        with self.clock.running():
            torch.autograd.backward(self._scaler.scale(loss))
            if self._lookup:
                self._lookup.gather()
        self._sample()
        self._scaler.unscale_(self.optimizer)
        self._clip()
        with self.clock.running():
            self._scaler.step(self.optimizer)
        self._sample()
        self._scaler.update()
        if self._lookup:
            self._lookup.clear()
        self.optimizer.zero_grad(set_to_none=True)
        after = Progress(number + 1, self.total)
        for method, state in zip(self.methods, self.states, strict=True):
            method.advance(state, after)
        return loss.detach()

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The rows as tensors on the device."""
        arrays = collate(self.features, rows, width=least_width(self.lengths, rows, self.precision))
        return {name: torch.from_numpy(array).to(self.device, non_blocking=True) for name, array in arrays.items()}

    def _sample(self) -> None:
        if self.sampling:
            self.peak = max(self.peak, _resident())

    def _clip(self) -> None:
        """Scales the model's gradients down to the largest norm; states' own are left alone: a multiplier's may be large."""
        gradients = [parameter.grad for parameter in self._clipped if parameter.grad is not None]
        if not self.settings.clip or not gradients:
            return
        rows = self._lookup.rows() if self._lookup else None
        if self._lookup and rows is not None:  # the rest of this gradient is 0
            kept = self._lookup.weight.grad
            assert kept is not None
            gradients = [gradient for gradient in gradients if gradient is not kept]
            norm = nn.utils.get_total_norm([*gradients, kept[rows]])
        else:
            norm = nn.utils.get_total_norm(gradients)
        # on a CPU reading the norm is free and spares a pass over all gradients; a GPU would have to wait for it
        if self.device.type == "cpu" and float(norm) <= self.settings.clip:
            return
        factor = torch.clamp(self.settings.clip / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(gradients, factor)
        if self._lookup and rows is not None:
            kept = self._lookup.weight.grad
            assert kept is not None
            kept[rows] *= factor

    def teach(self, rows: Sequence[int]) -> float:
        """Seconds the teacher takes for these rows where its outputs are made beforehand; else 0."""
        if not isinstance(self._lessons, Remembered):
            return 0.0
        batch = self.batch(rows)
        begin = time.perf_counter()
        self._lessons.look(batch)
        self.clock.wait()
        return time.perf_counter() - begin

    def evaluate(self, how: Callable[[PreTrainedModel], float]) -> float:
        """The metric as the main process computes it, unseen by the recorder."""
        from accelerate.utils import broadcast_object_list

        metric = [math.nan]
        self._whole.train(False)
        self._recorder.listening = False
        try:
            if self.accelerator.is_main_process:
                with torch.no_grad():
                    metric = [float(how(self.context.model))]
        finally:
            self._recorder.listening = True
            self._whole.train()
        if self.accelerator.num_processes > 1:
            broadcast_object_list(metric)
        return metric[0]

    def reports(self) -> dict[str, float]:
        """What the methods want in the log, under their names."""
        return {
            f"{name_of(method)}.{name}": float(value)
            for method, state in zip(self.methods, self.states, strict=True)
            for name, value in method.report(state).items()
        }

    def decide(self) -> Decision:
        """The one decision among the methods, on the device the model came from."""
        self._whole.train(False)
        self._recorder.listening = False
        decision = Decision()
        for method, state in zip(self.methods, self.states, strict=True):
            if method.effects().decides:
                decision = method.decide(state, self.context)
        return replace(
            decision,
            scales={name: value.detach().to(self._home) for name, value in decision.scales.items()},
            weights={name: value.detach().to(self._home) for name, value in decision.weights.items()},
        )

    def state(self, step: int, facts: Mapping[str, Any]) -> RunState:
        """Everything that changes while training."""
        tensors = self._own() | runstate.optimizer_tensors(self.optimizer)
        tensors["generator"] = self.context.generator.get_state()
        return RunState(step, tensors, dict(facts) | {"scaler": self._scaler.state_dict()})

    def restore(self, saved: RunState) -> None:
        """Puts a saved state back."""
        own = self._own()
        for prefix in ("model.", *(f"states.{index}." for index in range(len(self.states)))):
            runstate.restore({name: tensor for name, tensor in own.items() if name.startswith(prefix)}, saved, prefix)
        runstate.restore_optimizer(self.optimizer, saved)
        self.context.generator.set_state(saved.tensors["generator"])
        self._scaler.load_state_dict(saved.facts["scaler"])

    def _own(self) -> dict[str, Tensor]:
        tensors = runstate.tensors_of(self.context.model, "model.")
        for index, state in enumerate(self.states):
            tensors |= runstate.tensors_of(state, f"states.{index}.")
        return tensors


@contextmanager
def _rigged(
    context: Context,
    features: Features,
    methods: Sequence[Method],
    settings: Settings,
    precision: Precision,
    accelerator: Accelerator,
    log: Log,
    cache_folder: Path | None,
) -> Iterator[_Rig]:
    """Everything attached to the model and ready; afterwards, errors included, all of it is off again.

    Without a `cache_folder` the teacher's outputs are not made beforehand: the teacher then stands by to be timed.
    """
    model, device = context.model, accelerator.device
    home = model.device
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with ExitStack() as stack:
        stack.callback(_settle, model, home, trainable)
        model.to(device)
        devices = [device] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        torch.manual_seed(_mix(settings.seed, 0, -1))
        _freeze(context, settings.freeze)
        teacher = _teacher(context, methods, accelerator, precision)
        lessons: Lessons | None = None
        if teacher is not None:
            stack.callback(nn.Module.to, teacher.model, teacher.model.device)
            teacher.model.to(device)
            needs = frozenset[Capture]().union(
                *(method.effects().needs for method in methods if method.effects().needs_teacher)
            )
            cap = _room(settings.cache_bytes, cache_folder)
            if cache_folder is None and not is_live(teacher, features, needs, cap):
                lessons = stack.enter_context(remembering(teacher, needs))
            else:
                lessons = stack.enter_context(
                    teaching(
                        teacher,
                        features,
                        needs,
                        cache_folder or Path(),
                        log,
                        cap_bytes=cap,
                        writes=accelerator.is_main_process,
                        wait=accelerator.wait_for_everyone,
                    )
                )
        states = []
        for method in methods:
            state = method.attach(context)
            stack.callback(state.close)
            states.append(state.to(device))
        needs = frozenset[Capture]().union(*(method.effects().needs for method in methods))
        stack.enter_context(quick_attention(model))
        recorder = stack.enter_context(capturing(model, context.anatomy, needs))
        alone = accelerator.num_processes == 1  # several average their gradients by way of autograd
        words = model.get_input_embeddings() if alone else None
        lookup = stack.enter_context(kept_gradient(words))
        yield _Rig(context, features, methods, settings, precision, accelerator, states, recorder, lessons, lookup, home)


def _settle(model: PreTrainedModel, home: torch.device, trainable: Mapping[str, bool]) -> None:
    """The model as it was around its weights: no gradients, the same parameters trainable, on its device, in eval mode."""
    model.to(home)  # type: ignore[arg-type]
    model.train(False)
    for name, parameter in model.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(trainable.get(name, True))


def _freeze(context: Context, freeze: Freeze) -> None:
    model = context.model
    words = tuple(f"{matrix.module}." for matrix in context.anatomy.matrices.values() if matrix.role is Role.EMBEDDING)
    inside = f"{model.base_model_prefix}."
    for name, parameter in model.named_parameters():
        frozen = (
            freeze is Freeze.EVERYTHING
            or (freeze is Freeze.ENCODER and name.startswith(inside))
            or (freeze is Freeze.EMBEDDINGS and name.startswith(words))
        )
        if frozen:
            parameter.requires_grad_(False)


def _optimizer(model: PreTrainedModel, states: Sequence[State], settings: Settings) -> torch.optim.AdamW:
    """Fused AdamW: matrices decay, biases and norms do not; then each state's own groups, with its own rates."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = {id(parameter) for state in states for group in state.groups() for parameter in group["params"]}
    trainable = [parameter for parameter in trainable if id(parameter) not in own]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        *(dict(group) for state in states for group in state.groups()),
    ]
    groups = [group for group in groups if len(group["params"])]
    if not groups:
        raise RecipeError(
            f"nothing can train: freeze is '{settings.freeze}' and no method adds parameters.", help="freeze less."
        )
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)


def _room(most: int, folder: Path | None) -> int:
    """Bytes that may go to disk: a quarter of what is free there, and no more than `most`."""
    if folder is None:
        return most
    existing = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    return min(most, shutil.disk_usage(existing).free // 4)


def _teacher(context: Context, methods: Sequence[Method], accelerator: Accelerator, precision: Precision) -> Teacher | None:
    if not any(method.effects().needs_teacher for method in methods):
        return None
    model, anatomy = context.teacher, context.teacher_anatomy
    if model is None or anatomy is None or model is context.model:
        raise ValueError("a teacher needs its anatomy and must be another object than the student")
    return Teacher(
        model,
        anatomy,
        family_of(model.config.model_type).inputs(model),
        context.task,
        partial(autocast, accelerator.device, precision),
        precision,
        accelerator.device,
    )


def _accelerator(trackers: Sequence[str], folder: Path | None) -> Accelerator:
    """Accelerate without mixed precision: `autocast` wraps only the models, so that losses are computed in float32."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != "no":
        AcceleratorState._reset_state()  # left by a Trainer with mixed precision in this process; it starts the same way
    return Accelerator(
        mixed_precision="no",
        log_with=list(trackers) or None,
        project_dir=folder,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],  # an unused pooler is no mistake
    )


@contextmanager
def _trackers(accelerator: Accelerator, settings: Settings) -> Iterator[None]:
    if settings.trackers:
        config = {name: str(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}
        accelerator.init_trackers("slimformer", config={name: value for name, value in config.items() if value is not None})
    try:
        yield
    finally:
        for tracker in accelerator.trackers:  # not end_training(): it would end the process group, and stages follow
            tracker.finish()


def _precision(settings: Settings, accelerator: Accelerator) -> Precision:
    """The precision to use, the same on all processes."""
    from accelerate.utils import broadcast_object_list

    if settings.precision != "auto":
        return settings.precision
    chosen: list[Precision] = ["fp32"]
    device = accelerator.device
    if device.type == "cuda":
        chosen = ["bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"]
    elif device.type == "cpu" and accelerator.is_main_process and bf16_gain() >= BF16_GAIN:
        chosen = ["bf16"]
    if accelerator.num_processes > 1:
        broadcast_object_list(chosen)
    return chosen[0]


class _Clock:
    """Adds up the time in the parts that are the work itself; on a GPU by its own events, read once per window."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        if self._device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            first.record()
            yield
            last.record()
            self._events.append((first, last))
        else:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin

    def wait(self) -> None:
        """Waits until the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def read(self) -> float:
        """Seconds since the last reading; call `wait` first."""
        seconds = self._seconds + float(sum(first.elapsed_time(last) for first, last in self._events)) / 1000
        self._seconds, self._events = 0.0, []
        return seconds


def _finite(loss: float, step: int, precision: Precision) -> None:
    if not math.isfinite(loss):
        raise RecipeError(
            f"training broke down: the loss is {loss} by step {step + 1}.",
            facts=[f"precision: {precision}"],
            help="lower the learning rate" + (", or set precision to fp32." if precision != "fp32" else "."),
        )


def _share(rows: Sequence[int], rank: int, world: int) -> list[int]:
    """One process's rows of a batch, as many as any other's: where they do not divide, the first rows are used twice."""
    if world == 1:
        return list(rows)
    padded = [*rows, *(rows[index % len(rows)] for index in range(-len(rows) % world))]
    return padded[rank::world]


def _mix(seed: int, rank: int, step: int) -> int:
    """A seed for the global generators in one step: dropout is then a function of (seed, process, step)."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {rank} {step}".encode(), digest_size=8).digest()) >> 1


def _key(context: Context, features: Features, methods: Sequence[Method], settings: Settings) -> str:
    """Names the work: a state of other weights, rows, methods or settings must not be continued."""
    ours = asdict(settings)
    for harmless in ("checkpoint_seconds", "evaluate", "trackers"):
        del ours[harmless]
    taught = any(method.effects().needs_teacher for method in methods) and context.teacher is not None
    parts = [
        ours,
        [f"{name_of(method)} {method!r}" for method in methods],
        name_of(context.task),
        [module.p for module in context.model.modules() if isinstance(module, nn.Dropout)],
        runstate.model_digest(context.model),
        runstate.model_digest(context.teacher) if taught and context.teacher is not None else "",
        runstate.features_digest(features),
        context.plan.digest(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
