"""Carries out stages: each takes a bundle and returns one, whose model is again plain, without hooks or masks.

`advance` runs stages in order, keeps what each made, and takes finished ones from disk, so that a killed run resumes.
The loop belongs to `training/`, the cut to `core/shrink.py`.
"""

from __future__ import annotations

import copy
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from slimformer import registry
from slimformer.core import cost
from slimformer.core.anatomy import Anatomy, Kind
from slimformer.core.budget import something_left
from slimformer.core.plan import Decision
from slimformer.core.shrink import shrink
from slimformer.data.augmentation import augment_rows
from slimformer.data.batching import collate, epoch_order, sorted_by_length
from slimformer.data.material import Material, encode_text, spaced_rows, subset, timed_rows, unlabelled
from slimformer.data.tokenizer import load_tokenizer
from slimformer.data.tokenizer_files import tokenizer_text
from slimformer.digests import digest, digest_files
from slimformer.errors import PlanError, RecipeError
from slimformer.families.base import Subject, subject_of
from slimformer.files import remembered, whole_folder, write_text
from slimformer.forms.base import Formed
from slimformer.hooks.precision import quick_autocast
from slimformer.measuring.latency import Latency, Levels, measure_levels
from slimformer.measuring.machine import peak_rss_bytes
from slimformer.measuring.scoring import evaluate
from slimformer.methods.base import Context, Held, Method
from slimformer.registry import name_of
from slimformer.running import vocabulary
from slimformer.running.bundle import Bundle, Effort, Made, Run
from slimformer.saving import checkpoint
from slimformer.saving.tensors import fixed_digest
from slimformer.tasks.base import Example, Features, Split
from slimformer.training.processes import train_together
from slimformer.training.stage import TASK_TEXT, Calibrate, Stage, Train, Training, TrimVocabulary
from slimformer.training.written import written_by

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRACKED = "tracking"  # the folder of what trackers write, beside what is delivered
VALIDATION_ROWS = 2000  # a choice uses so many rows of the validation split: one standard error is then below a point


# -- In order, and resumed -----------------------------------------------------------------------------------------------------


def advance(stages: Sequence[Stage], bundle: Bundle, run: Run) -> Made:
    """Runs stages in order; a stage that a former run finished with the same options, models and data is read back.

    Models and data count by what they hold, not by their paths.
    """
    names = [bundle.digest(), str(run.seed)]
    effort = Effort()
    for number, stage in enumerate(stages, 1):
        names += [stage.digest(), _digest_files(stage.files, run)]
        folder = run.folder / f"{number}-{stage.kind}-{digest(*names)[:10]}"
        done, facts = folder / "made", folder / "made" / "effort.json"
        if facts.is_file():
            bundle, effort = _restored(stage, bundle, done), remembered(facts, Effort, Effort)
            run.log.say(f"stage {number} ({stage.kind}) is done already; going on from it.")
            continue
        if any((other / "made").is_dir() for other in run.folder.glob(f"{number}-{stage.kind}-*")):
            run.log.say(f"stage {number} ({stage.kind}) was made from another model, teacher or data: it is made again.")
        with Clock(folder) as clock:
            bundle = run_stage(stage, bundle, run.under(folder.name))
        peak = max(effort.peak_rss_bytes, peak_rss_bytes())
        effort = Effort(effort.minutes + clock.minutes, torch.get_num_threads(), peak)
        with whole_folder(done) as part:
            source, ranges = bundle.material.source, bundle.ranges
            checkpoint.write(bundle.subject.model, bundle.plan, part, tokenizer_from=source, ranges=ranges)
            if isinstance(stage, TrimVocabulary):
                bundle = vocabulary.settle(bundle, part, done)
            remembered(part / facts.name, lambda effort=effort: effort, Effort)  # type: ignore[misc]
        for item in folder.iterdir():
            if item != done:
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        run.log.event("stage", stage=stage.kind, number=number, minutes=round(clock.minutes, 2))
    return Made(bundle, effort)


def _digest_files(files: Sequence[Path], run: Run) -> str:
    """Names what these files hold; each is read once a run."""
    for file in files:
        key = f"content {file}"
        if key not in run.memo:
            run.memo[key] = digest_files([file])
    return digest(*(run.memo[f"content {file}"] for file in files))


def run_stage(stage: Stage, bundle: Bundle, run: Run) -> Bundle:
    """One stage, from the beginning or from the last state of a training that was killed."""
    if isinstance(stage, Train):
        return _train(stage, bundle, run)
    if isinstance(stage, TrimVocabulary):
        run.log.say("trim_vocabulary: choosing the word pieces that the texts need.")
        return vocabulary.trim(stage, bundle, run)
    return _calibrate(cast(Calibrate, stage), bundle, run)


def _restored(stage: Stage, bundle: Bundle, folder: Path) -> Bundle:
    if isinstance(stage, TrimVocabulary):
        bundle = vocabulary.read_back(bundle, folder)
    subject = subject_of(checkpoint.load(folder))
    return replace(bundle, subject=subject, plan=checkpoint.load_plan(folder), ranges=checkpoint.load_ranges(folder))


class Clock:
    """Counts the minutes of the work in a folder, and notes them there, so that those of a killed run are not forgotten."""

    def __init__(self, folder: Path, began: float | None = None) -> None:
        """`began`: the reading of `time.monotonic` when the work began, by default now."""
        self._file, self._end = folder / "seconds", threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._begin = (time.monotonic() if began is None else began) - remembered(self._file, lambda: 0.0, float)

    def __enter__(self) -> Clock:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._note()

    @property
    def minutes(self) -> float:
        """Minutes until now, those of killed runs included."""
        return (time.monotonic() - self._begin) / 60

    def _tick(self) -> None:
        while not self._end.wait(10):
            self._note()

    def _note(self) -> None:
        write_text(self._file, f"{60 * self.minutes:.1f}")


# -- Train ---------------------------------------------------------------------------------------------------------------------


def _train(stage: Train, bundle: Bundle, run: Run) -> Bundle:
    job = training_of(stage, bundle, run)
    if stage.text is not None:
        run.log.say(f"learning from the teacher on {len(job.features):,} texts without labels.")
    trained = train_together(
        job,
        run.folder,
        run.log,
        evaluate=lambda _: validation_score(job.context.subject, bundle.material),
        cache=run.cache or run.root,
        tracked=run.root.parent / TRACKED / run.folder.name,
    )
    made = _cut(bundle, job.context, trained.decision, run)
    if not stage.dropout:
        _copy_dropout(bundle.subject.model, made.subject.model)
    run.log.event("trained", **{name: value for name, value in vars(trained).items() if name != "decision"})
    return made if stage.freeze in ("encoder", "everything") else _settled(made, job.context, stage, run)


def training_of(stage: Train, bundle: Bundle, run: Run) -> Training:
    """A copy of the bundle's model ready to train, with everything around its methods and the rows it trains on."""
    refuse_cuts(stage.methods, bundle.subject.anatomy)
    model = copy.deepcopy(bundle.subject.model)
    if not stage.dropout:
        for module in model.modules():
            for name in _dropouts(module):
                setattr(module, name, 0.0)
    budgets = [method.cost for method in stage.methods if method.effects().chooses]
    context = context_of(bundle, run, replace(bundle.subject, model=model), budgets[0] if budgets else "macs")
    rows = training_rows(stage, bundle, run)
    return Training(context, rows, stage, run.seed, None if bundle.read is None else rows_as_read(stage, bundle, run))


def rows_as_read(stage: Train, bundle: Bundle, run: Run) -> Features:
    """The rows that a stage trains on, as the teacher reads them."""
    return training_rows(stage, bundle if bundle.read is None else replace(bundle, material=bundle.read, read=None), run)


def training_rows(stage: Train, bundle: Bundle, run: Run) -> Features:
    """The rows that a stage trains on: the task's or a text's, all or some, with copies of them if it asks for those."""
    material = bundle.material
    if stage.text is None:
        features = material.features[Split.TRAIN]
    elif stage.text == TASK_TEXT:
        features = unlabelled(material.features[Split.TRAIN])
    else:
        features = encode_text(Path(stage.text), load_tokenizer(material.source), material.max_length)
    if stage.rows is not None:
        features = spaced_rows(features, stage.rows)
    if stage.targets == "teacher":
        longest = getattr(material.task, "max_target_length", None)
        if longest is None:
            raise RecipeError(f"the task {name_of(material.task)} writes no texts: targets is for those that do.")
        return written_by(bundle.teacher, features, longest, run.cache or run.root, run.log)
    if not stage.augment:
        return features
    masked = checkpoint.load_dense(Path(stage.augment_model)) if stage.augment_model else None
    words = bundle.teacher.model.get_input_embeddings()  # the student's table may have lost the meaning of its neighbours
    table = words.matrix().detach() if isinstance(words, Formed) else cast(Tensor, words.weight)
    run.log.event("augmenting", rows=len(features), copies=stage.augment)
    return augment_rows(features, load_tokenizer(material.source), table, stage.augment, run.seed, masked)


def _copy_dropout(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Gives each dropout of `target` the rate it has in `source`; sublayers that were cut have none any more."""
    before = dict(source.named_modules())
    for path, module in target.named_modules():
        for name in _dropouts(module):
            setattr(module, name, getattr(before[path], name))


def _dropouts(module: nn.Module) -> list[str]:
    """The attributes of a module that are rates of dropout: BART and its relatives drop by functions, without a module."""
    if isinstance(module, nn.Dropout):
        return ["p"]
    names = ("dropout", "attention_dropout", "activation_dropout")
    return [name for name in names if isinstance(getattr(module, name, None), float)]


# -- Calibrate -----------------------------------------------------------------------------------------------------------------


def _calibrate(stage: Calibrate, bundle: Bundle, run: Run) -> Bundle:
    method = stage.method
    refuse_cuts((method,), bundle.subject.anatomy)
    run.log.say(f"{name_of(method)}: choosing {'how to store it' if method.effects().factors else 'what to keep'}.")
    student = replace(bundle.subject, model=copy.deepcopy(bundle.subject.model))
    context = context_of(bundle, run, student, method.cost)
    state = method.attach(context)
    try:
        decision = method.decide(state, context)
    finally:
        state.close()
    made = _cut(bundle, context, decision, run)
    return _settled(made, context, stage, run) if method.effects().rewrites else made


# -- What both need ------------------------------------------------------------------------------------------------------------


def _cut(bundle: Bundle, context: Context, decision: Decision, run: Run) -> Bundle:
    """The bundle that a stage's decision leaves; TargetError if nothing would be left."""
    something_left(context.anatomy, decision.plan)
    for note in decision.notes:
        run.log.say(note)
    small = shrink(context.model.eval(), context.anatomy, decision)
    return replace(bundle, subject=subject_of(small), plan=bundle.plan.then(decision.plan), ranges=decision.ranges)


def _settled(made: Bundle, context: Context, stage: Stage, run: Run) -> Bundle:
    """The bundle in which what methods of earlier stages left in the model is fitted to its new weights."""
    for name in registry.names("methods") if made.subject.anatomy.junctions else ():
        method: type[Method] = registry.find("methods", name)
        if any(isinstance(item, method) for item in stage.methods):
            continue
        samples = _Samples(made.material.features[Split.TRAIN], made.subject, run.seed)
        decision = method.settle(replace(context, subject=made.subject, plan=made.plan, batches=samples))
        if decision is not None:
            for note in decision.notes:
                run.log.say(note)
            subject = subject_of(shrink(made.subject.model, made.subject.anatomy, decision))
            made = replace(made, subject=subject, plan=made.plan.then(decision.plan))
    return made


def refuse_cuts(methods: Sequence[Method], anatomy: Anatomy) -> None:
    """PlanError, before any work is done, if a method would choose among units whose matrices are factored already."""
    cutting = [name_of(method) for method in methods if method.effects().cuts]
    for site in anatomy.units if cutting else ():
        factored = anatomy.factored(site)
        if factored:
            raise PlanError(
                f"{cutting[0]} chooses what to cut, and '{site.id}' can no longer be cut: '{factored[0].id}' is stored as "
                f"{factored[0].form}.",
                help="cut first, factor after.",
            )
    for site in anatomy.of_kind(Kind.HEADS) if cutting else ():
        if len(anatomy.asking_heads(site)) < site.size:
            raise PlanError(
                f"{cutting[0]} chooses what to cut, and heads of '{site.id}' attend by position: they cost less than the others.",
                help="cut first, fix heads after.",
            )


def context_of(bundle: Bundle, run: Run, student: Subject, unit: str) -> Context:
    """The context of a stage's methods, whose budgets count `unit`; `student` is the model that they may change."""
    return Context(
        subject=student,
        plan=bundle.plan,
        task=bundle.material.task,
        cost=cost_of(unit, student, bundle.material, run),
        teacher=bundle.teacher,
        teacher_plan=bundle.teacher_plan,
        batches=_Samples(bundle.material.features[Split.TRAIN], student, run.seed),
        generator=torch.Generator().manual_seed(run.seed),
        held=held_of(student, bundle.material),
        memo=run.memo,
        track=run.log.track,
        tokenizers=None
        if bundle.read is None
        else (tokenizer_text(bundle.material.source), tokenizer_text(bundle.read.source)),
    )


def held_of(subject: Subject, material: Material) -> Held:
    """The validation examples for methods that choose by them; a few thousand at most."""
    features, examples = subset(material, Split.VALIDATION, VALIDATION_ROWS)
    task, sign = material.task, 1 if material.task.higher_is_better else -1
    parts = sorted_by_length(features.lengths(), 64)
    place = np.argsort([row for rows in parts for row in rows])  # of each row among the sorted ones

    def batches() -> Iterator[dict[str, Tensor]]:
        for rows in parts:
            arrays = collate(features, rows, (*subject.inputs, "labels"))
            yield {name: torch.from_numpy(array) for name, array in arrays.items()}

    def score(outputs: Mapping[str, np.ndarray]) -> float:
        outputs = {name: array[place] for name, array in outputs.items()}
        fitted = task.tune(outputs, features, examples)
        return sign * float(task.counted(fitted.score(outputs, features, examples)))

    return Held(batches, score)


@dataclass(frozen=True)
class _Samples:
    """Training examples for methods that look at some, on the device of the model that looks."""

    features: Features
    student: Subject
    seed: int

    def __call__(self, count: int) -> Iterator[dict[str, Tensor]]:
        """At most `count` of them in batches, always the same ones."""
        names, taken = (*self.student.inputs, "labels"), 0
        device = self.student.device  # training moves the model to another device after this context is made
        for rows in epoch_order(self.features.lengths(), 32, self.seed, 0):
            if taken >= count:
                return
            rows = rows[: count - taken]
            taken += len(rows)
            yield {name: torch.from_numpy(array).to(device) for name, array in collate(self.features, rows, names).items()}


def cost_of(unit: str, subject: Subject, material: Material, run: Run) -> cost.Cost:
    """The cost of plans in "parameters", in "macs" of an average training example, or in measured "latency"."""
    if unit == "parameters":
        return cost.parameters(subject.model, subject.anatomy)
    if unit == "macs":
        rows = material.features[Split.TRAIN]
        return cost.macs(subject.anatomy, rows.lengths(), rows.target_lengths(), subject.beams)
    if unit == "latency":
        return latency_of(subject, material, run).cost
    raise RecipeError(f"there is no cost '{unit}'.", help="use macs, parameters or latency.")


def latency_of(subject: Subject, material: Material, run: Run, dense: Mapping[str, Path] | None = None) -> Latency:
    """The time that heads and neurons take on this machine, measured once a run; a recipe may bring the levels of an earlier run.

    `dense`: the model's own files, if there are some already.
    """
    if run.levels is not None:
        return Latency.of(subject.anatomy, run.levels)
    key = digest(fixed_digest(subject.model), timed_rows(material).lengths().tobytes())
    file = run.root / f"latency-{key}-{run.threads}.json"

    def measure() -> Levels:
        run.log.say("timing what heads and neurons cost on this machine.")
        return measure_levels(subject, material, run.root, run.threads, run.log, run.quiet, dense)

    return Latency.of(subject.anatomy, remembered(file, measure, Levels))


def validation_score(subject: Subject, material: Material) -> float:
    """The task's metric of a model in PyTorch on the validation split, with what is fitted there."""
    outputs, features, examples = torch_outputs(subject, material, Split.VALIDATION, VALIDATION_ROWS)
    return material.task.counted(material.task.tune(outputs, features, examples).score(outputs, features, examples))


def dev_scores(subject: Subject, material: Material) -> dict[str, float]:
    """The task's metrics of a model in PyTorch on the dev split."""
    outputs, features, examples = torch_outputs(subject, material, Split.DEV, len(material.examples[Split.DEV]))
    return material.task.score(outputs, features, examples)


def torch_outputs(
    subject: Subject, material: Material, split: Split, limit: int, *, exact: bool = False
) -> tuple[dict[str, np.ndarray], Features, Sequence[Example]]:
    """The outputs of a model in memory on at most `limit` examples of a split, with these examples and their rows.

    `exact`: in float32, also where half precision is faster.
    """
    features, examples = subset(material, split, limit)

    def runner(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad(), nullcontext() if exact else quick_autocast(subject.device), task.decoding(subject.model, batch):
            output = subject.model(**subject.feed(batch))
        return {name: value.float().cpu().numpy() for name, value in task.kept(output, batch).items()}

    task = material.task
    with subject.evaluating():
        more = tuple(features.columns) if task.pretraining or task.stand_in else ()
        return dict(evaluate(runner, features, 64, more)), features, examples
