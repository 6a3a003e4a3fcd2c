"""Prepares the first bundle of a run: reads and encodes the data, loads the student, and tunes the teacher if it must be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from slimformer.core.plan import Plan
from slimformer.core.ranges import Ranges
from slimformer.data.material import Material, prepare
from slimformer.errors import ModelError
from slimformer.families.base import Subject, subject_of
from slimformer.log import Log
from slimformer.registry import name_of
from slimformer.running.bundle import Bundle, Run
from slimformer.running.order import leading_stages
from slimformer.running.preflight import Checked, trained_marks
from slimformer.running.readings import reads_otherwise
from slimformer.running.stages import advance, torch_outputs
from slimformer.saving import checkpoint
from slimformer.tasks.base import Split, Task
from slimformer.training.stage import Stage

LOOKED_AT = 100  # on so many validation examples the task checks a model that came tuned; of many classes, on more
LOOKED_AT_OF_A_CLASS = 6


def prepare_bundle(checked: Checked, run: Run) -> tuple[Bundle, tuple[Stage, ...]]:
    """The bundle with a teacher that is ready, and the stages still to run: `load_bundle`, then `teach_bundle`."""
    return teach_bundle(load_bundle(checked, run), checked, run)


def load_bundle(checked: Checked, run: Run) -> Bundle:
    """The model as it came, or with a new head, and the data read and encoded; it stands in for its own teacher."""
    tuned = checkpoint.is_tuned(checked.source, checked.recipe.task.auto_class)
    task, student, plan, ranges = _tuned_student(checked) if tuned else _fresh_student(checked, run.seed)
    if task.pretraining and not tuned:
        run.log.say(
            f"{checked.source} has no head for the task {name_of(task)}: it gets a fresh one, tied to its word table if the "
            "architecture ties them. It teaches by its hidden states and attention scores."
        )
    material = prepare(task, checked.source)
    _tell(material, run.log)
    _settle_texts(student, material, run.log)
    return Bundle(student, plan, material, student, teacher_plan=plan, ranges=ranges)


def teach_bundle(first: Bundle, checked: Checked, run: Run) -> tuple[Bundle, tuple[Stage, ...]]:
    """The loaded bundle with a teacher that is ready, and the stages still to run.

    A model that is not tuned, or whose config says that it was tuned on data of another kind, is first tuned by the recipe's
    leading plain `train` stages, and is then its own teacher. If the recipe names a teacher, such a model itself is the student.
    Raises ModelError or DataError for mistakes that only the loaded models show.
    """
    recipe, source, stages = checked.recipe, checked.source, checked.recipe.stages
    student, material = first.subject, first.material
    if checked.teacher is not None:
        read = prepare(material.task, checked.teacher) if reads_otherwise(checked.teacher, source) else None
        teacher = _teacher(checked.teacher, None if read else student, material.task, run.seed)
        _check_model(teacher, read or material, run.log)
        if read is not None:
            tokens = [int(rows.lengths().sum()) for rows in (material.features[Split.TRAIN], read.features[Split.TRAIN])]
            run.log.say(
                f"model and teacher have tokenizers of their own: {tokens[0] / max(1, tokens[1]):.2f} times as many tokens."
            )
        taught = replace(first, teacher=teacher, teacher_plan=checkpoint.load_plan(checked.teacher), read=read)
        return _answered(taught, run), stages
    lead, tuned = leading_stages(stages), checkpoint.is_tuned(source, recipe.task.auto_class)
    config, marks = checkpoint.model_config(source, recipe.task.auto_class), trained_marks(recipe)
    if tuned and all(config.get(name, value) == value for name, value in marks.items()):
        if not lead:  # otherwise the first stage may teach the model what it lacks
            _check_model(student, material, run.log)
        return _answered(first, run), stages
    made = advance(stages[:lead], first, run.under("teacher")).bundle
    start = Bundle(made.subject, made.plan, material, made.subject, tuned_here=not tuned, teacher_plan=made.plan)
    return start, stages[lead:]


def _answered(bundle: Bundle, run: Run) -> Bundle:
    """The bundle with the teacher's answers in its examples, if those have no labels."""
    material, read = bundle.material, bundle.read or bundle.material
    if material.task.labelled:
        return bundle
    run.log.say("asking the teacher for what is judged.")
    examples = dict(material.examples)
    for split in (Split.VALIDATION, Split.DEV):
        outputs, features, some = torch_outputs(bundle.teacher, read, split, len(read.examples[split]), exact=True)
        examples[split] = material.task.answered(outputs, features, some)
    taught = bundle.read and replace(bundle.read, examples=examples)
    return replace(bundle, material=replace(material, examples=examples), read=taught)


def _tuned_student(checked: Checked) -> tuple[Task, Subject, Plan, Ranges | None]:
    """The task bound to a tuned model's labels, and the model as it was saved."""
    source, marks = checked.source, trained_marks(checked.recipe)
    task = checked.recipe.task
    task = task.bind(checkpoint.model_config(source, task.auto_class) | marks)
    model = checkpoint.load_as(source, task.auto_class, {}, checked.recipe.seed)
    for name, value in marks.items():
        setattr(model.config, name, value)  # it is saved only with weights that a stage has trained
    for name, value in task.completed(model.config.to_dict()).items():
        setattr(model.config, name, value)
    return task, subject_of(model), checkpoint.load_plan(source), checkpoint.load_ranges(source)


def _fresh_student(checked: Checked, seed: int) -> tuple[Task, Subject, Plan, None]:
    """The task, and the model with another head for it. A named teacher knows the order of the classes, which the head shares."""
    task = checked.recipe.task
    if checked.teacher is not None:
        task = task.bind(checkpoint.model_config(checked.teacher, task.auto_class))
    model = checkpoint.load_as(checked.source, task.auto_class, task.configure(), seed, checked.teacher)
    return task.bind(model.config.to_dict()), subject_of(model), checkpoint.load_plan(checked.source), None


def _settle_texts(subject: Subject, material: Material, log: Log) -> None:
    """Says how a model writes its texts; one that does not say how long they may be gets the limit of the task."""
    if subject.beams is None:
        return
    said, longest = subject.model.generation_config, getattr(material.task, "max_target_length", None)
    if said.max_length is None and said.max_new_tokens is None and longest is not None:
        said.max_length = longest
        log.say(
            f"{material.source} does not say how long a text may be, in generation_config.json or config.json: at most {longest} tokens, "
            "as the task has them."
        )
    limit = said.max_length if said.max_new_tokens is None else said.max_new_tokens + 1
    count = f"{subject.beams} beam{'s' * (subject.beams > 1)}"
    log.say(f"texts are written on {count}, with at most {limit} tokens, as its generation_config has it.")


def _teacher(folder: Path, student: Subject | None, task: Task, seed: int) -> Subject:
    """The teacher; ModelError if it has another vocabulary than `student`, whose ids it is to read."""
    task.bind(checkpoint.model_config(folder, task.auto_class))
    teacher = checkpoint.load_as(folder, task.auto_class, task.configure(), seed)
    if student is None:
        return subject_of(teacher)
    mine, theirs = student.model.config.vocab_size, teacher.config.vocab_size
    if mine != theirs:
        raise ModelError(
            f"the teacher {folder} has another vocabulary ({theirs} tokens) than the model ({mine}).",
            help="teacher and student must read the same token ids.",
        )
    return subject_of(teacher)


def _check_model(subject: Subject, material: Material, log: Log) -> None:
    """The task's own check of a model that came tuned."""
    count = max(LOOKED_AT, LOOKED_AT_OF_A_CLASS * int(getattr(subject.model.config, "num_labels", 0) or 0))
    warning = material.task.check_model(subject.model.config, lambda: torch_outputs(subject, material, Split.VALIDATION, count))
    if warning:
        log.say(warning)


def _tell(material: Material, log: Log) -> None:
    """Says how many examples there are and how many are cut off, with the task's notes on them."""
    train, validation, dev = (material.examples[split] for split in (Split.TRAIN, Split.VALIDATION, Split.DEV))
    log.say(f"{len(train):,} examples to train on, {len(validation):,} set aside to choose on, {len(dev):,} to report on.")
    for note in material.task.notes():
        log.say(note)
    log.say(f"the metric is {material.task.metric}; inputs have at most {material.max_length} tokens.")
    for split, features in material.features.items():
        if features.truncated:
            share = features.truncated / max(1, len(material.examples[split]))
            log.say(f"{features.truncated:,} inputs of {split} ({share:.1%}) are cut off at {material.max_length} tokens.")
