"""One optimiser step: the student and the methods' states as one module, with everything attached that a step needs."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Role
from slimformer.core.plan import Decision
from slimformer.core.sieving import keeping_shares
from slimformer.data.batching import collate, least_width
from slimformer.errors import RecipeError
from slimformer.hooks.attention import quick_attention
from slimformer.hooks.capture import Capture, Captured, Recorder, capturing
from slimformer.hooks.precision import Precision, autocast
from slimformer.log import Log
from slimformer.methods.base import Batch, Context, Method, Progress, State, Step
from slimformer.registry import name_of
from slimformer.saving.tensors import tensors_of
from slimformer.training import runstate
from slimformer.training.devices import DeviceClock, cache_room, resident_bytes, share_of, step_seed
from slimformer.training.embedding_gradient import Lookup, kept_gradient
from slimformer.training.runstate import RunState
from slimformer.training.stage import Train, Training
from slimformer.training.teacher import MemoizedTeacher, Teacher, TeacherOutputs, is_live, memoized_teacher, teacher_outputs

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from slimformer.families.base import Subject
    from slimformer.tasks.base import Features, Task


class WholeLoss(nn.Module):
    """Student and method states as one module, so that several processes average the gradients of both."""

    def __init__(
        self,
        training: Training,
        states: Sequence[State],
        recorder: Recorder,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        super().__init__()
        context = training.context
        self.model = context.model
        self.states = nn.ModuleList(states)
        self._task = context.task
        self._methods = training.methods
        self._recorder = recorder
        self._task_weight = training.stage.loss_weight if context.task.labelled else 0.0
        self._autocast = autocast
        self._subject = context.subject

    def forward(self, batch: Batch, teacher: Captured | None, progress: Progress, read: Batch | None = None) -> Tensor:
        """The whole loss of a batch: a scalar. `read`: its rows as the teacher reads them, if it does so otherwise."""
        with self._autocast(), self._task.decoding(self.model, batch):
            output = self.model(**self._subject.feed(batch))
        seen = self._recorder.take({name: output[name] for name in self._task.outputs})
        step = Step(self.model, batch, seen, teacher, progress, self._task, read)
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


def rate(step: int, total: int, warmup: float) -> float:
    """Factor on the learning rate in step 0..total-1: a line up over the warm-up share, then a line down towards 0."""
    rise = round(warmup * total)
    return (step + 1) / rise if step < rise else (total - step) / max(1, total - rise)


@dataclass(frozen=True)
class Attachments:
    """Everything that `attached` has put on the model, and the device that the model was on."""

    accelerator: Accelerator
    precision: Precision
    states: tuple[State, ...]  # one for each method
    recorder: Recorder
    teacher: TeacherOutputs | None
    lookup: Lookup | None  # the kept gradient of the word embedding
    home: torch.device  # the model's device before the training
    alone: bool  # whether no other process takes these steps


class Stepper:
    """Everything that one step needs, ready to run."""

    def __init__(self, training: Training, attachments: Attachments) -> None:
        self.training, self.stage, self.context = training, training.stage, training.context
        self.accelerator, self.precision, self.states = attachments.accelerator, attachments.precision, attachments.states
        self.device = self.accelerator.device
        self.lengths = training.features.lengths()
        self._read_lengths = self.lengths if training.read is None else training.read.lengths()
        self.total = training.steps
        self.clock = DeviceClock(self.device)
        self.sampling = False  # whether it watches resident memory, which takes a system call a step
        self.peak = 0
        self._number = 0
        self._recorder, self._teacher = attachments.recorder, attachments.teacher
        self._lookup, self._home = attachments.lookup, attachments.home
        whole = WholeLoss(training, self.states, self._recorder, partial(autocast, self.device, self.precision))
        self.optimizer = _optimizer(self.context.model, self.states, self.stage)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._clipped = [parameter for parameter in self.context.model.parameters() if parameter.requires_grad]
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self._alone = attachments.alone or self.accelerator.num_processes == 1
        with warnings.catch_warnings():  # torch is about to rename an option that accelerate still passes by its old name
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self._whole: nn.Module = whole.to(self.device) if attachments.alone else self.accelerator.prepare_model(whole)
        self._whole.train()

    @property
    def teacher_seconds(self) -> float:
        return self._teacher.seconds if self._teacher else 0.0

    def step(self, rows: Sequence[int], number: int) -> Tensor:
        """One optimiser step on these rows, of which each process takes its share; the loss over all of them, detached."""
        mine, weight = share_of(rows, self.lengths, self.accelerator.process_index, self.accelerator.num_processes)
        self._number = number
        torch.manual_seed(step_seed(self.training.seed, 0, number))
        factor = rate(number, self.total, self.stage.warmup)
        for group, base in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = base * factor
        batch, read = self.batch(mine), self.read(mine)
        progress = Progress(number, self.total)
        with self.clock.running():
            seen = self._teacher.see(mine, batch if read is None else read) if self._teacher else None
            loss: Tensor = self._whole(batch, seen, progress, read)
            loss = loss if weight == 1 else loss * weight
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
        for method, state in zip(self.training.methods, self.states, strict=True):
            if not self._alone:
                state.pool(self._gather)
            method.advance(state, after)
        return loss.detach() if self._alone else self._gather(loss.detach()).mean()

    def reseed(self, *_: object) -> None:
        """Gives this process a dropout of its own; what methods draw before a pass is the same in all processes."""
        torch.manual_seed(step_seed(self.training.seed, self.accelerator.process_index, self._number))

    def _gather(self, tensor: Tensor) -> Tensor:
        """This tensor of each process: (processes, ...)."""
        from accelerate.utils import gather

        every: Tensor = gather(tensor[None])
        return every

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The rows as tensors on the device."""
        return self._collated(self.training.features, self.lengths, rows)

    def read(self, rows: Sequence[int]) -> dict[str, Tensor] | None:
        """The rows as the teacher reads them; None if it reads what the model does."""
        if self.training.read is None:
            return None
        return self._collated(self.training.read, self._read_lengths, rows)

    def _collated(self, features: Features, lengths: np.ndarray, rows: Sequence[int]) -> dict[str, Tensor]:
        arrays = collate(features, rows, width=least_width(lengths, rows, self.precision))
        return {name: torch.from_numpy(array).to(self.device, non_blocking=True) for name, array in arrays.items()}

    def _sample(self) -> None:
        if self.sampling:
            self.peak = max(self.peak, resident_bytes())

    def _clip(self) -> None:
        """Scales the model's gradients down to the largest norm; those of states, such as multipliers, may be large and stay."""
        gradients = [parameter.grad for parameter in self._clipped if parameter.grad is not None]
        if not self.stage.clip or not gradients:
            return
        rows = self._lookup.rows() if self._lookup else None
        if self._lookup and rows is not None:  # the rest of this gradient is 0
            kept = self._lookup.weight.grad
            assert kept is not None
            gradients = [gradient for gradient in gradients if gradient is not kept]
            norm = nn.utils.get_total_norm([*gradients, kept[rows]])
        else:
            norm = nn.utils.get_total_norm(gradients)
        # on a CPU, reading the norm is free and saves a pass over all gradients; a GPU would have to wait for it
        if self.device.type == "cpu" and float(norm) <= self.stage.clip:
            return
        factor = torch.clamp(self.stage.clip / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(gradients, factor)
        if self._lookup and rows is not None:
            kept = self._lookup.weight.grad
            assert kept is not None
            kept[rows] *= factor

    def teach(self, rows: Sequence[int]) -> float:
        """Seconds that the teacher takes for these rows if its outputs are made beforehand; otherwise 0."""
        if not isinstance(self._teacher, MemoizedTeacher):
            return 0.0
        batch = self.read(rows) or self.batch(rows)
        begin = time.perf_counter()
        self._teacher.compute(batch)
        self.clock.wait()
        return time.perf_counter() - begin

    def evaluate(self, how: Callable[[PreTrainedModel], float]) -> float:
        """The metric, computed by the main process and not recorded."""
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
        """The figures that methods report to the log, under their names."""
        return {
            f"{name_of(method)}.{name}": float(value)
            for method, state in zip(self.training.methods, self.states, strict=True)
            for name, value in method.report(state).items()
        }

    def decide(self) -> Decision:
        """The one decision among the methods, on the device the model came from."""
        self._whole.train(False)
        self._recorder.listening = False
        decision = Decision()
        for method, state in zip(self.training.methods, self.states, strict=True):
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
        """Restores a saved state."""
        own = self._own()
        for prefix in ("model.", *(f"states.{index}." for index in range(len(self.states)))):
            runstate.restore({name: tensor for name, tensor in own.items() if name.startswith(prefix)}, saved, prefix)
        runstate.restore_optimizer(self.optimizer, saved)
        self.context.generator.set_state(saved.tensors["generator"])
        self._scaler.load_state_dict(saved.facts["scaler"])

    def _own(self) -> dict[str, Tensor]:
        tensors = tensors_of(self.context.model, "model.")
        for index, state in enumerate(self.states):
            tensors |= tensors_of(state, f"states.{index}.")
        return tensors


@contextmanager
def attached(
    training: Training,
    precision: Precision,
    accelerator: Accelerator,
    log: Log,
    cache_folder: Path | None,
    *,
    alone: bool = False,
) -> Iterator[Stepper]:
    """Everything attached to the model and ready; afterwards, errors included, all of it is off again.

    Without a `cache_folder` the teacher's outputs are not made beforehand: the teacher is then run and timed beside the student.
    `alone`: this process takes its share of each step, and no other does now.
    """
    context, methods = training.context, training.methods
    model, device = context.model, accelerator.device
    home = model.device
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with ExitStack() as stack:
        stack.callback(_settle, model, home, trainable)
        model.to(device)
        devices = [device] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        torch.manual_seed(step_seed(training.seed, 0, -1))
        _freeze(context, training.stage.freeze)
        reader = stack.enter_context(_teacher_reader(training, precision, accelerator, log, cache_folder))
        states = []
        for method in methods:
            state = method.attach(context)
            stack.callback(state.close)
            states.append(state.to(device))
        needs = frozenset[Capture]().union(*(method.effects().needs for method in methods))
        stack.enter_context(quick_attention(model))
        stack.enter_context(keeping_shares(model))
        recorder = stack.enter_context(capturing(model, context.anatomy, needs))
        single = accelerator.num_processes == 1  # several processes average their gradients through autograd
        lookup = stack.enter_context(kept_gradient(model.get_input_embeddings() if single else None))
        stepper = Stepper(training, Attachments(accelerator, precision, tuple(states), recorder, reader, lookup, home, alone))
        if accelerator.process_index > 0:
            stack.callback(model.register_forward_pre_hook(stepper.reseed).remove)
        yield stepper


def as_teacher(subject: Subject, task: Task, device: torch.device, precision: Precision) -> Teacher:
    """A model that gives its outputs as a training of this precision asks for them."""
    return Teacher(subject, task, partial(autocast, device, precision), precision)


def asked_of_teacher(methods: Sequence[Method]) -> frozenset[Capture]:
    """What methods read of a teacher."""
    return frozenset[Capture]().union(*(method.effects().needs for method in methods if method.effects().needs_teacher))


@contextmanager
def _teacher_reader(
    training: Training, precision: Precision, accelerator: Accelerator, log: Log, cache_folder: Path | None
) -> Iterator[TeacherOutputs | None]:
    """The reader of the teacher's outputs: it reads the cache, or memory for an estimate, or runs the teacher itself."""
    from accelerate.utils import broadcast_object_list

    if not training.taught:
        yield None
        return
    subject = training.context.teacher
    if subject is None or subject.model is training.context.model:
        raise ValueError("the teacher must be another object than the student")
    device, model, home = accelerator.device, subject.model, subject.device
    teacher = as_teacher(subject, training.context.task, device, precision)
    needs = asked_of_teacher(training.methods)
    rows = training.features if training.read is None else training.read
    rooms = [cache_room(cache_folder)]
    if cache_folder is not None and accelerator.num_processes > 1:
        broadcast_object_list(rooms)  # the disk may have filled between two looks, and all processes must decide alike
    cap = rooms[0]
    try:
        model.to(device)
        if cache_folder is None and not is_live(teacher, rows, needs, cap):
            with memoized_teacher(teacher, needs) as reader:
                yield reader
        else:
            with teacher_outputs(
                teacher,
                rows,
                needs,
                cache_folder or Path(),
                log,
                cap_bytes=cap,
                writes=accelerator.is_main_process,
                wait=accelerator.wait_for_everyone,
            ) as reader:
                yield reader
    finally:
        nn.Module.to(model, home)


def _settle(model: PreTrainedModel, home: torch.device, trainable: Mapping[str, bool]) -> None:
    """Puts the model back as it was except for its weights: no gradients, the same parameters trainable, its device, eval mode."""
    model.to(home)  # type: ignore[arg-type]
    model.train(False)
    for name, parameter in model.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(trainable.get(name, True))


def _freeze(context: Context, freeze: str) -> None:
    model = context.model
    words = tuple(f"{matrix.module}." for matrix in context.anatomy.matrices.values() if matrix.role is Role.EMBEDDING)
    inside = f"{model.base_model_prefix}."
    for name, parameter in model.named_parameters():
        frozen = (
            freeze == "everything"
            or (freeze == "encoder" and name.startswith(inside))
            or (freeze == "embeddings" and name.startswith(words))
        )
        if frozen:
            parameter.requires_grad_(False)


def _optimizer(model: PreTrainedModel, states: Sequence[State], stage: Train) -> torch.optim.AdamW:
    """Fused AdamW: matrices decay, biases and norms do not; then each state's own groups, with its own rates."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = {id(parameter) for state in states for group in state.groups() for parameter in group["params"]}
    trainable = [parameter for parameter in trainable if id(parameter) not in own]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": stage.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        *(dict(group) for state in states for group in state.groups()),
    ]
    groups = [group for group in groups if len(group["params"])]
    if not groups:
        raise RecipeError(f"nothing can train: freeze is '{stage.freeze}' and no method adds parameters.", help="freeze less.")
    return torch.optim.AdamW(groups, lr=stage.lr, fused=True)


class StateOptimizer:
    """Trains the methods' own parameters beside an optimiser that trains the model: AdamW, with the rates that the states name."""

    def __init__(self, states: Sequence[State], lr: float) -> None:
        groups = [dict(group) for state in states for group in state.groups()]
        self._optimizer = torch.optim.AdamW(groups, lr=lr) if groups else None
        self._rates = [group["lr"] for group in self._optimizer.param_groups] if self._optimizer else []

    def step(self, factor: float) -> None:
        """One step on the gradients that are there, with `factor` on each rate; they are then cleared."""
        if self._optimizer is None:
            return
        for group, base in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = base * factor
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """What changes while training."""
        return runstate.optimizer_tensors(self._optimizer) if self._optimizer else {}

    def restore(self, saved: RunState) -> None:
        """Restores what `tensors` gave."""
        if self._optimizer is not None:
            runstate.restore_optimizer(self._optimizer, saved)
