"""Brings our training methods into somebody's own transformers `Trainer`, which keeps its loop, its optimiser and its data.

A callback cannot change the Trainer's loss. Therefore a hook on the model adds what the methods ask for to the loss that the model
returns; a loss that is computed elsewhere has to add `penalty` itself, and it is an error if no gradient ever reaches it.
Everything else goes through the verbs of `methods/base.py`, and nothing is left on the model afterwards.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from slimformer import registry
from slimformer.core import cost
from slimformer.core.budget import something_left
from slimformer.core.plan import Decision, Plan
from slimformer.core.shrink import shrink
from slimformer.data.labels import model_labels
from slimformer.errors import RecipeError
from slimformer.families.base import Subject, subject_of
from slimformer.hooks.capture import Capture, Captured, Recorder, capturing
from slimformer.log import Log
from slimformer.methods.base import Context, Method, Progress, State, Step
from slimformer.registry import name_of
from slimformer.saving import checkpoint
from slimformer.saving.tensors import tensors_of
from slimformer.tasks.base import IGNORED, Task
from slimformer.training import runstate
from slimformer.training.devices import step_seed
from slimformer.training.runstate import RunState
from slimformer.training.stage import together
from slimformer.training.step import StateOptimizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

STATE_FOLDER = "slimformer"  # in each checkpoint of the Trainer
LENGTH_ROWS = 1024  # so many rows tell how long the texts are, for a budget in MACs


class SlimCallback(TrainerCallback):
    """A callback that trains with our methods inside your own `Trainer`, and cuts the model as they decide.

    While the Trainer trains, the methods see each batch, add their terms to the loss, and keep their own parameters, which an
    optimiser of the callback trains. Each checkpoint of the Trainer holds them, so that `train(resume_from_checkpoint=True)` goes on.
    When training ends, the Trainer's model is as plain as it was, with the weights that it learned, and `model` is the cut copy.

    Args:
        methods: The methods of one stage, such as `[Gates(keep=0.5), Distillation()]`. At most one of them may decide what is cut.
            Methods that look once, such as `Fisher`, belong into a recipe.
        teacher: The model to learn from, for methods that need one; never the object that trains.
        task: Says which outputs count and how far two models are apart. A classifier, a regression and a model that answers
            questions need none.
        plan: Everything that was cut from the model before; `Plan()` if nothing was.
        seed: The seed of what methods draw beforehand.

    Attributes:
        model: The cut model, once training has ended; None before.
        plan: Everything that was cut, in the numbering of the original model.
        decision: The decision of the methods, in the numbering of the model that was trained.
        penalty: The term that was added to the loss of the last batch. A `compute_loss_func` that does not use the model's own
            loss adds it.

    Raises:
        RecipeError: The methods cannot train together, lack a teacher, or cannot work with the Trainer's arguments.
        PlanError: The model is no longer one that the methods can cut.
        TargetError: The budget is out of reach.

    Example:
        >>> from slimformer import SlimCallback
        >>> from slimformer.methods import Distillation, Gates
        >>> from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
        >>> model, teacher = (AutoModelForSequenceClassification.from_pretrained("my-bert") for _ in range(2))
        >>> tokenizer = AutoTokenizer.from_pretrained("my-bert")
        >>> rows = [dict(tokenizer("the film was great"), labels=1), dict(tokenizer("a meal seemed cold"), labels=0)]
        >>> slim = SlimCallback([Gates(keep=0.7), Distillation()], teacher=teacher)
        >>> arguments = TrainingArguments("checkpoints", num_train_epochs=2, save_strategy="no", report_to="none", use_cpu=True)
        >>> trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[slim])
        >>> output = trainer.train()  # doctest: +ELLIPSIS
        {...}
        >>> slim.save("cut-bert")
        >>> slim.model.num_parameters() < model.num_parameters()
        True
    """

    def __init__(
        self,
        methods: Method | Sequence[Method],
        *,
        teacher: PreTrainedModel | None = None,
        task: Task | None = None,
        plan: Plan | None = None,
        seed: int = 17,
    ) -> None:
        self.methods = (methods,) if isinstance(methods, Method) else tuple(methods)
        together(self.methods, teacher is not None)
        self.seed = seed
        self.model: PreTrainedModel | None = None
        self.plan = plan or Plan()
        self.decision: Decision | None = None
        self.penalty: Tensor | None = None
        self._teacher, self._task, self._before = teacher, task, self.plan
        self._log = Log(None)
        self._stack = ExitStack()
        self._attached: _Attached | None = None
        self._processing: Any = None

    def close(self) -> None:
        """Takes everything off the model again; only needed if training ended with an error. It may be called twice.

        Example:
            >>> from slimformer import SlimCallback
            >>> from slimformer.methods import Gates
            >>> SlimCallback(Gates(keep=0.7)).close()
        """
        self._attached = None
        self._stack.close()

    def save(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Writes the cut model as a folder that `slimformer.load`, `compress` and recipes read.

        Args:
            folder: The folder to write; one that exists is replaced.
            tokenizer: The tokenizer of the model; by default the Trainer's `processing_class`.

        Raises:
            RecipeError: Training has not ended, or there is no tokenizer.
            OutputError: The disk is full or read-only.

        Example:
            >>> import slimformer
            >>> from slimformer.methods import Gates
            >>> try:
            ...     slimformer.SlimCallback(Gates(keep=0.7)).save("cut-bert")
            ... except slimformer.errors.RecipeError as error:
            ...     print(error)
            there is no cut model yet.
              help: call trainer.train() first.
        """
        tokenizer = tokenizer or self._processing
        if self.model is None or self.decision is None:
            raise RecipeError("there is no cut model yet.", help="call trainer.train() first.")
        if tokenizer is None:
            raise RecipeError("no tokenizer is known.", help="give it here, or to the Trainer as processing_class.")
        with tempfile.TemporaryDirectory() as name:
            tokenizer.save_pretrained(name)
            ranges = self.decision.ranges
            checkpoint.save(self.model, self.plan, Path(folder), tokenizer_from=Path(name), ranges=ranges)

    # ---- what the Trainer calls

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any = None, **kwargs: Any
    ) -> None:
        """Attaches the methods, and restores them if training resumes."""
        self.close()
        _refuse_arguments(args)
        self.model, self.decision, self.penalty, self.plan = None, None, None, self._before
        self._processing = kwargs.get("processing_class")
        subject = subject_of(model)
        context = self._context(subject, kwargs["train_dataloader"])
        with ExitStack() as stack:
            self._attached = _Attached(self, context, args, Progress(state.global_step, state.max_steps), stack)
            with suppress(TypeError):  # of data whose length is not known the Trainer makes no shorter window
                self._attached.batches = len(kwargs["train_dataloader"])
            if state.global_step:
                self._attached.restore(_checkpoint(args, state))
            self._stack = stack.pop_all()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Counts the batches that the coming step accumulates."""
        if self._attached is not None:
            self._attached.begin(state.global_step)

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Steps the optimiser of the methods' own parameters, at the Trainer's rhythm and schedule."""
        if self._attached is not None:
            self._attached.step(kwargs["optimizer"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advances the methods."""
        if self._attached is not None:
            self._attached.advance(Progress(state.global_step, state.max_steps))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Puts the methods' figures beside the Trainer's loss."""
        if self._attached is not None and logs is not None and "loss" in logs:
            reports = self._attached.reports()
            logs.update(reports)
            state.log_history[-1].update(reports)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves the methods' parameters beside the Trainer's checkpoint."""
        if self._attached is not None and args.should_save:
            self._attached.save(_checkpoint(args, state), state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks for the decision, takes everything off the model, and cuts a copy of it."""
        attached = self._attached
        if attached is None:
            return
        try:
            if args.load_best_model_at_end and state.best_model_checkpoint:
                attached.restore(Path(state.best_model_checkpoint))
            self.decision = attached.decide()
        finally:
            self.close()
        context = attached.context
        something_left(context.anatomy, self.decision.plan)
        for note in self.decision.notes:
            self._log.say(note)
        training = {module: module.training for module in context.model.modules()}
        small = shrink(context.model, context.anatomy, self.decision)
        for name in ("forward", "_original_forward"):
            vars(small).pop(name, None)  # accelerate's mixed precision belongs to the Trainer's own model
        for module, before in training.items():
            module.training = before
        self.model, self.plan = small.eval(), self._before.then(self.decision.plan)

    # ---- what stands around the methods

    def _context(self, subject: Subject, loader: Any) -> Context:
        rows = _Rows(loader, subject, self.seed)
        unit = next((method.cost for method in self.methods if method.effects().chooses), "macs")
        if unit == "macs":
            counted = cost.macs(subject.anatomy, rows.lengths(), rows.target_lengths(), subject.beams)
        elif unit == "parameters":
            counted = cost.parameters(subject.model, subject.anatomy)
        else:
            raise RecipeError(
                f"a budget in {unit} has to be measured on exported files, which a Trainer does not have.",
                help="count macs or parameters, or use a recipe.",
            )
        teacher = None
        if self._teacher is not None:
            if self._teacher is subject.model:
                raise RecipeError("the teacher is the model that trains.", help="give a copy of it: copy.deepcopy(model).")
            mine, theirs = subject.model.config.vocab_size, self._teacher.config.vocab_size
            if mine != theirs:
                raise RecipeError(
                    f"the teacher has another vocabulary ({theirs} tokens) than the model ({mine}).",
                    help="teacher and student must read the same token ids.",
                )
            teacher = subject_of(self._teacher)
        return Context(
            subject=subject,
            plan=self._before,
            task=self._task or _task_of(subject.model),
            cost=counted,
            teacher=teacher,
            batches=rows.batches,
            generator=torch.Generator().manual_seed(self.seed),
        )


class _Attached:
    """The methods on a model: their states, their optimiser, and the hook that adds their terms to the loss."""

    def __init__(
        self, callback: SlimCallback, context: Context, args: TrainingArguments, progress: Progress, stack: ExitStack
    ) -> None:
        self.callback, self.context, self.progress = callback, context, progress
        self.accumulated = self.window = args.gradient_accumulation_steps
        self.batches: int | None = None  # of an epoch
        self.methods, model = callback.methods, context.model
        self.states: list[State] = []
        self.used = True  # whether the last penalty was part of what was differentiated
        device = context.subject.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(step_seed(callback.seed, 0, -1))
            for method in self.methods:
                state = method.attach(context)
                stack.callback(state.close)
                self.states.append(state.to(device).train(model.training))
        needs = frozenset[Capture]().union(*(method.effects().needs for method in self.methods))
        self.recorder = stack.enter_context(capturing(model, context.anatomy, needs))
        self.recorder.listening = False
        self.teacher: Recorder | None = None
        if context.teacher is not None and any(method.effects().needs_teacher for method in self.methods):
            self.teacher = stack.enter_context(_watched(context.teacher, context.subject.device, needs))
        self.parameters = StateOptimizer(self.states, args.learning_rate)
        stack.callback(model.register_forward_pre_hook(self._before).remove)
        stack.callback(model.register_forward_hook(self._after, with_kwargs=True).remove)

    # ---- in each forward pass

    def _before(self, model: nn.Module, _: Any) -> None:
        for state in self.states:
            state.train(model.training)
        self.recorder.listening = model.training and torch.is_grad_enabled()

    def _after(self, model: nn.Module, _: Any, given: dict[str, Any], output: Any) -> Any:
        if not self.recorder.listening:
            return None
        self.recorder.listening = False
        if not isinstance(output, dict):
            raise RecipeError("the model returns a tuple, without names.", help="leave return_dict=False out.")
        task = self.context.task
        batch = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        seen = self.recorder.take({name: output[name] for name in task.outputs})
        step = Step(model, batch, seen, self._see_teacher(batch), self.progress, task)
        terms = [method.penalty(state, step) for method, state in zip(self.methods, self.states, strict=True)]
        total = sum((term.float() for term in terms if term is not None), torch.zeros((), device=self.context.subject.device))
        if total.requires_grad:
            self.used = False
            total.register_hook(self._reached)
        # the Trainer divides a loss by the accumulated batches, unless the model was told to do so itself
        self.callback.penalty = share = total / self.window if "num_items_in_batch" in given else total
        loss = output.get("loss")
        output["loss"] = share if loss is None else loss + share
        return output

    def _reached(self, _: Tensor) -> None:
        self.used = True

    def _see_teacher(self, batch: dict[str, Tensor]) -> Captured | None:
        teacher = self.context.teacher
        if self.teacher is None or teacher is None:
            return None
        with torch.no_grad():
            output = teacher.model(**teacher.feed(batch))
        return self.teacher.take({name: output[name] for name in self.context.task.outputs})

    # ---- between the passes

    def begin(self, step: int) -> None:
        """The last step of an epoch accumulates what is left of it."""
        if self.batches:
            done = step % math.ceil(self.batches / self.accumulated) * self.accumulated
            self.window = min(self.accumulated, self.batches - done)

    def step(self, trainers: Any) -> None:
        if not self.used:
            raise RecipeError(
                "the terms that the methods add never reached the Trainer's loss, because it is not the loss that the model returns.",
                help="leave compute_loss_func out, or let it add the callback's `penalty` to what it returns.",
            )
        first = trainers.param_groups[0]
        self.parameters.step(first["lr"] / first["initial_lr"] if first.get("initial_lr") else 1.0)

    def advance(self, progress: Progress) -> None:
        self.progress = progress
        for method, state in zip(self.methods, self.states, strict=True):
            method.advance(state, progress)

    def reports(self) -> dict[str, float]:
        return {
            f"{name_of(method)}.{name}": float(value)
            for method, state in zip(self.methods, self.states, strict=True)
            for name, value in method.report(state).items()
        }

    @torch.no_grad()
    def decide(self) -> Decision:
        self.recorder.listening = False
        self.context.model.train(False)
        decision = Decision()
        with torch.enable_grad():  # a method may ask for gradients
            for method, state in zip(self.methods, self.states, strict=True):
                state.train(False)
                if method.effects().decides:
                    decision = method.decide(state, self.context)
        return decision

    # ---- on disk

    def _own(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for index, state in enumerate(self.states):
            tensors |= tensors_of(state, f"states.{index}.")
        return tensors

    def _key(self) -> list[str]:
        return [f"{name_of(method)} {method!r}" for method in self.methods]

    def save(self, folder: Path, step: int) -> None:
        tensors = self._own() | self.parameters.tensors() | {"generator": self.context.generator.get_state()}
        runstate.save_state(folder / STATE_FOLDER, RunState(step, tensors, {"methods": self._key()}))

    def restore(self, folder: Path) -> None:
        saved = runstate.latest_state(folder / STATE_FOLDER)
        if saved is None:
            raise RecipeError(
                f"{folder} holds no state of the methods, so they cannot go on from there.",
                help="resume from a checkpoint that this callback saw, in the Trainer's own output_dir.",
            )
        if saved.facts["methods"] != self._key():
            raise RecipeError(
                f"{folder} was trained with other methods or options.",
                facts=[f"there: {', '.join(saved.facts['methods'])}", f"now: {', '.join(self._key())}"],
                help="resume with the same ones.",
            )
        runstate.restore(self._own(), saved, "states.")
        self.parameters.restore(saved)
        self.context.generator.set_state(saved.tensors["generator"])


@contextmanager
def _watched(teacher: Subject, device: torch.device, needs: frozenset[Capture]) -> Iterator[Recorder]:
    """The teacher on the model's device and in eval mode; afterwards it is as it was."""
    home = teacher.device
    nn.Module.to(teacher.model, device)
    try:
        with teacher.evaluating(), capturing(teacher.model, teacher.anatomy, needs) as recorder:
            yield recorder
    finally:
        nn.Module.to(teacher.model, home)


class _Rows:
    """Rows of a DataLoader, read beside it: its sampler and its random numbers see nothing."""

    def __init__(self, loader: Any, subject: Subject, seed: int) -> None:
        self._loader, self._subject, self._seed = loader, subject, seed

    def batches(self, count: int) -> Iterator[dict[str, Tensor]]:
        """At most `count` rows as batches on the model's device; other rows each time if the data set is a stream."""
        data, size = self._loader.dataset, 32
        if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
            order = np.random.default_rng(self._seed).permutation(len(data))[:count]
            rows: Iterator[Any] = (data[int(index)] for index in order)
        else:
            rows = (row for row, _ in zip(data, range(count), strict=False))
        group: list[Any] = []
        for row in rows:
            group.append(row)
            if len(group) == size:
                yield self._batch(group)
                group = []
        if group:
            yield self._batch(group)

    def _batch(self, rows: list[Any]) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            columns = self._loader.collate_fn(rows)
        device = self._subject.device
        batch = {name: value.to(device) for name, value in columns.items() if isinstance(value, Tensor)}
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        return batch

    def lengths(self) -> np.ndarray:
        """Tokens of some rows: (rows,)."""
        parts = [batch["attention_mask"].sum(1).cpu().numpy() for batch in self.batches(LENGTH_ROWS)]
        if not parts:
            raise RecipeError("the Trainer has no rows to train on.", help="give it a train_dataset.")
        return np.concatenate(parts)

    def target_lengths(self) -> np.ndarray | None:
        """Tokens of the texts that some rows are to give: (rows,); None if the model has no decoder."""
        if self._subject.beams is None:
            return None
        return np.concatenate([(batch["labels"] != IGNORED).sum(1).cpu().numpy() for batch in self.batches(LENGTH_ROWS)])


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the Trainer's checkpoint at this step."""
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _refuse_arguments(args: TrainingArguments) -> None:
    """RecipeError with everything in the Trainer's arguments that the hooks cannot work with."""
    wrong = []
    if args.world_size > 1 or args.n_gpu > 1:
        wrong.append("several processes or GPUs: train on one, or use a recipe with `accelerate launch`")
    if args.fp16:
        wrong.append("fp16 scales the loss: use bf16=True, or neither")
    if args.gradient_checkpointing:
        wrong.append("gradient_checkpointing runs each layer twice: leave it out")
    if args.torch_compile:
        wrong.append("torch_compile fixes the graph before the methods are attached: leave it out")
    if args.label_smoothing_factor:
        wrong.append("label_smoothing_factor replaces the model's loss: leave it out")
    if wrong:
        raise RecipeError("these training arguments do not go with SlimCallback.", facts=wrong, help="change them.")


def _task_of(model: PreTrainedModel) -> Task:
    """The task that a model's head is for, without data; RecipeError if it cannot be told."""
    name, config = type(model).__name__, model.config
    task: Task | None = None
    if name.endswith("ForSequenceClassification"):
        names, problem = model_labels(config)
        several = problem == "multi_label_classification"
        score = not several and (len(names) == 1 or problem == "regression")
        classification = registry.find("tasks", "classification")
        kind = "score" if score else "multi_label" if several else "classes"
        task = classification(kind=kind, labels=() if score else tuple(names))
    elif name.endswith("ForQuestionAnswering"):
        task = registry.find("tasks", "question_answering")()
    elif name.endswith("ForTokenClassification"):
        task = registry.find("tasks", "tagging")(labels=tuple(model_labels(config)[0]))
    if task is None:
        raise RecipeError(f"it cannot be told what a {name} is for.", help="give SlimCallback a `task`.")
    return task
