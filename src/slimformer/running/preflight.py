"""Makes every quick check of a request before anything starts: recipe, model, teacher, data, first cut.

Nothing is written, measured or trained here. A request that passes can still meet a full disk or a budget that only a measurement
shows to be out of reach, but the user has made no mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from slimformer.core import cost
from slimformer.core.anatomy import VOCABULARY_SITE, Anatomy
from slimformer.core.apart import Apart
from slimformer.core.junction import Exit, Sieve
from slimformer.core.plan import Plan
from slimformer.core.pooling import vector_head
from slimformer.data.material import check_text, sampled_rows
from slimformer.data.tokenizer import load_tokenizer, max_length_of
from slimformer.errors import ModelError, PlanError, RecipeError, TargetError, nearest, shown
from slimformer.families.base import Subject, family_of, subject_of
from slimformer.hooks.capture import Capture
from slimformer.methods.base import Method
from slimformer.registry import name_of
from slimformer.running.order import conflicts, leading_stages
from slimformer.running.readings import reads_otherwise, refuse_strange_ids
from slimformer.running.recipe import Recipe
from slimformer.running.stages import refuse_cuts
from slimformer.running.students import check_stages
from slimformer.running.vocabulary import check_table, choose_pieces, refuse_strange_texts
from slimformer.runtimes.openvino import require_nncf
from slimformer.saving import checkpoint
from slimformer.saving.hub import local_folder
from slimformer.tasks.base import Features, Split, Task
from slimformer.training.devices import check_trackers
from slimformer.training.stage import TASK_TEXT, Stage, Train, TrimVocabulary


@dataclass(frozen=True)
class Checked:
    """A recipe without a mistake, and where its models lie on this machine."""

    recipe: Recipe
    source: Path
    teacher: Path | None


def preflight(recipe: Recipe) -> Checked:
    """Raises the first mistake it finds; see the functions below for their errors. Models named by a hub id are fetched here."""
    _check_order(recipe.stages)
    _check_learning(recipe, recipe.task)
    if recipe.export.openvino:
        require_nncf()
    assert isinstance(recipe.model, str), "given_models builds a fresh model before this"
    source, teacher = local_folder(recipe.model), local_folder(recipe.teacher) if recipe.teacher else None
    for folder in filter(None, (source, teacher)):
        _check_kind(folder, recipe.task)
        checkpoint.check_weights(folder)
        checkpoint.skeleton(folder, recipe.task.auto_class)  # its weights have the names and shapes that its config says
    check_kept(source, recipe.stages)
    kind = checkpoint.base_type(checkpoint.read_config(source))
    if family_of(kind).classes != "transformers":
        check_stages(kind, recipe.stages)
    every = [method.effects() for stage in recipe.stages for method in stage.methods]
    branches = any(effects.adapts or effects.divides or effects.patterns for effects in every)
    recipe.export.exporter().check(kind, branches=branches)
    task = recipe.task
    task.split(Split.DEV)
    if task.pretraining:
        task = task.bind(checkpoint.model_config(source, task.auto_class))
        _check_pretraining(recipe, teacher or source)
    elif checkpoint.is_tuned(source, task.auto_class):
        task = task.bind(checkpoint.model_config(source, task.auto_class) | trained_marks(recipe))
    elif teacher is None and not leading_stages(recipe.stages):
        raise RecipeError(
            f"{source} is not tuned for this task, and the recipe does not begin by tuning it.",
            help="put a stage '- train: {epochs: 3}' first, or name a tuned `teacher:`.",
        )
    if teacher is not None:
        _check_teacher(teacher, recipe)
        if reads_otherwise(teacher, source):
            refuse_strange_ids(task, recipe.stages)
        _check_dimension(teacher, source, task)
    _check_pair(source, teacher or source, recipe)
    training = [stage for stage in recipe.stages if isinstance(stage, Train)]
    for stage in training:
        check_trackers(stage.trackers)
        if stage.targets == "teacher" and not task.stand_in:
            raise RecipeError(f"the task {name_of(task)} writes no texts.", help="leave out targets: teacher.")
        if stage.augment_model:
            check_masked_model(Path(stage.augment_model), source)
    for split in Split:
        task.split(split)
    _check_branches(recipe, task)
    for stage in training:
        if stage.text not in (None, TASK_TEXT):
            check_text(Path(str(stage.text)))
    load_tokenizer(source)
    max_length_of(source)
    _check_vocabulary(recipe, source, task)
    _check_methods(recipe, source, task)
    _check_points(recipe, source, task)
    return Checked(recipe, source, teacher)


def _check_kind(folder: Path, task: Task) -> None:
    """ModelError for an encoder that is to write texts, and for an encoder-decoder where none are to be written."""
    kind = checkpoint.base_type(checkpoint.read_config(folder))
    if family_of(kind).decodes == bool(task.stand_in):
        return
    if task.stand_in:
        raise ModelError(
            f"{folder} is an encoder ({kind}): it cannot write a text, and the task {name_of(task)} needs a model that does.",
            help="start from an encoder-decoder, such as Helsinki-NLP/opus-mt-en-de, facebook/bart-base or google-t5/t5-small.",
        )
    raise ModelError(
        f"{folder} is an encoder-decoder ({kind}), and the task {name_of(task)} needs an encoder.",
        help="name a model such as a BERT, or choose the task translation or summarization.",
    )


def _check_order(stages: Sequence[Stage]) -> None:
    """RecipeError if a stage destroys what an earlier one made."""
    facts = [fact for number, stage in enumerate(stages) for fact in conflicts(stage, stages[:number])]
    if facts:
        raise RecipeError(
            "the stages of this recipe undo each other.", facts=facts, help="docs/concepts.md says what may follow."
        )


def _check_learning(recipe: Recipe, task: Task) -> None:
    """RecipeError if a stage would train without labels and without a teacher."""
    if task.labelled:
        return
    alone = [
        f"stages[{number}]: it trains on no labels, and no method learns from the teacher"
        for number, stage in enumerate(recipe.stages)
        if isinstance(stage, Train) and not any(method.effects().needs_teacher for method in stage.methods)
    ]
    if alone:
        raise RecipeError(
            f"the task {name_of(task)} has no labels.", facts=alone, help="add distillation to the methods of the stage."
        )


def _check_branches(recipe: Recipe, task: Task) -> None:
    """RecipeError if a method cannot work for the task, or if the export asks for files that cannot do as it decides."""
    methods = [(number, method) for number, stage in enumerate(recipe.stages) for method in stage.methods]
    problems = [(number, method, method.problem(task)) for number, method in methods]
    facts = [f"stages[{number}]: {name_of(method)}: {why}" for number, method, why in problems if why]
    branching = next((name_of(method) for _, method in methods if method.effects().branches), None)
    for option in ("dense", "openvino") if branching else ():
        if getattr(recipe.export, option):
            facts.append(f"export.{option}: such a file cannot stop at the exits of {branching}: leave it out")
    dividing = next((name_of(method) for _, method in methods if method.effects().divides), None)
    if dividing and recipe.export.dense:
        facts.append(f"export.dense: a plain model does not keep apart the segments that {dividing} does: leave it out")
    sifting = next((name_of(method) for _, method in methods if method.effects().sifts), None)
    if sifting and recipe.export.dense:
        facts.append(f"export.dense: a plain model computes all words, and {sifting} takes some out: leave it out")
    fixing = next((name_of(method) for _, method in methods if method.effects().patterns), None)
    if fixing and recipe.export.dense:
        facts.append(f"export.dense: no head of a plain model attends by the patterns of {fixing}: leave it out")
    if facts:
        raise RecipeError(f"the stages do not suit the task {name_of(task)}.", facts=facts, help="correct them.")


def check_kept(source: Path, stages: Sequence[Stage]) -> None:
    """RecipeError if these stages would destroy the model's saved zeros or learned ranges."""
    lost = []
    junctions = checkpoint.load_plan(source).junctions.values() if stages else ()
    methods = [method for stage in stages for method in stage.methods]
    if any(isinstance(junction, Exit) for junction in junctions):
        lost.append("it has exits that were fitted to it: begin with the model before they were")
    joining = (name_of(method) for method in methods if method.effects().adapts or method.effects().divides)
    second = next(joining, None)
    if second and any(isinstance(junction, Apart) for junction in junctions):
        lost.append(f"its lower layers keep segments apart already: leave out {second}")
    if checkpoint.load_plan(source).patterns if stages else ():
        cutting = (name_of(item) for item in methods if item.effects().cuts or item.effects().divides or item.effects().sifts)
        first = next(cutting, None)
        if first:
            lost.append(f"its heads attend by patterns, and {first} would change what they see: begin with the model before")
    changing = (method.effects() for method in methods)
    if any(effects.chooses or effects.adapts or effects.divides for effects in changing) and any(
        isinstance(junction, Sieve) for junction in junctions
    ):
        lost.append(
            "it takes words out by the attention of its layers, which these stages would change: begin with the model before"
        )
    if (
        stages
        and checkpoint.load_ranges(source) is not None
        and not any(method.effects().learns_grids for method in stages[0].methods)
    ):
        lost.append("it has learned grids and ranges, which the first stage would lose: begin with quantization")
    spoiling = next((stage for stage in stages if stage.fills_zeros), None)
    if spoiling is not None and checkpoint.sparse_matrices(source):
        filling = next((name_of(method) for method in spoiling.methods if method.effects().refills), None)
        if filling:
            lost.append(f"it was saved without its zeros, and {filling} gives matrices new values: leave out {filling}")
        else:
            lost.append(
                "it was saved without its zeros, which training would fill: add keep_zeros to the methods of each stage"
            )
    if lost:
        raise RecipeError(
            f"the stages would undo what was made of {source}.",
            facts=lost,
            help="docs/concepts.md says what may follow, and how to give up zeros and ranges.",
        )


def lacks_head(recipe: Recipe, teacher: Path) -> bool:
    """Whether a teacher's head for the task is a fresh one, which no stage trains before it teaches."""
    return not checkpoint.is_tuned(teacher, recipe.task.auto_class) and not leading_stages(recipe.stages)


def _check_pretraining(recipe: Recipe, teacher: Path) -> None:
    """RecipeError if stages bring texts of their own to plain text, or learn the outputs of a teacher without the head for them."""
    task, wrong, headless = recipe.task, [], lacks_head(recipe, teacher)
    for number, stage in enumerate(recipe.stages):
        for name in ("text", "augment") if isinstance(stage, Train) else ():
            if getattr(stage, name):
                wrong.append(f"stages[{number}].train.{name}: the texts are those of the task: leave it out")
        for method in stage.methods:
            effects = method.effects()
            if headless and effects.needs_teacher and Capture.LOGITS in effects.needs:
                wrong.append(
                    f"stages[{number}]: {name_of(method)} compares the outputs, and the teacher {teacher} has no head for them: set "
                    "logits: 0, or begin with '- train: {freeze: encoder}', which trains one"
                )
    if wrong:
        raise RecipeError(f"the stages do not suit the task {name_of(task)}.", facts=wrong, help="correct them.")


def _check_teacher(teacher: Path, recipe: Recipe) -> None:
    """ModelError or DataError if a teacher is no model for this task."""
    task, config = recipe.task, checkpoint.model_config(teacher, recipe.task.auto_class)
    if not checkpoint.is_tuned(teacher, task.auto_class) and not task.pretraining:
        kind = ", ".join(map(str, config.get("architectures") or ["model without a head"]))
        raise ModelError(
            f"the teacher {teacher} is a {kind}, and the task {name_of(task)} needs one that ends in "
            f"{task.auto_class.removeprefix('AutoModel')}.",
            facts=checkpoint.head_problems(teacher),
            help="name a teacher that was tuned for this task.",
        )
    task.bind(config)


def _check_pair(source: Path, teacher: Path, recipe: Recipe) -> None:
    """RecipeError if a method cannot work for this model with this teacher."""
    methods = [(number, method) for number, stage in enumerate(recipe.stages) for method in stage.methods]
    if not any(method.effects().needs_teacher for _, method in methods):
        return
    mine, theirs = (subject_of(checkpoint.skeleton(folder, recipe.task.auto_class)).anatomy for folder in (source, teacher))
    problems = [(number, method, method.mismatch(mine, theirs)) for number, method in methods]
    facts = [f"stages[{number}]: {name_of(method)}: {why}" for number, method, why in problems if why]
    if facts:
        raise RecipeError(
            "the model does not suit its teacher.", facts=facts, help="give it another shape, or another teacher."
        )


def _check_dimension(teacher: Path, source: Path, task: Task) -> None:
    """ModelError if the vectors of a teacher and of the model that learns from it have different lengths."""
    sizes = {}
    for folder in (source, teacher):
        config = checkpoint.model_config(folder, task.auto_class)
        head, width = vector_head(config), family_of(checkpoint.base_type(config)).width(config)
        if head is not None and width is not None:
            sizes[folder] = head.dimension(width)
    if len(set(sizes.values())) > 1:
        raise ModelError(
            f"the vectors of the teacher {teacher} have {sizes[teacher]} numbers, those of the model {source} {sizes[source]}.",
            help="a student stays in the teacher's space: begin with a model of its dimension, or with the teacher.",
        )


def check_masked_model(folder: Path, source: Path) -> None:
    """ModelError unless `folder` holds a masked language model that reads the tokens of the model in `source`."""
    config = checkpoint.read_config(folder)
    family_of(checkpoint.base_type(config))
    checkpoint.check_weights(folder)
    if not checkpoint.is_tuned(folder, "AutoModelForMaskedLM"):
        kind = ", ".join(map(str, config.get("architectures") or ["model without a head"]))
        raise ModelError(
            f"{folder} is a {kind}, and augment_model needs a masked language model.",
            help="name one, such as the folder of bert-base-uncased, or leave augment_model out.",
        )
    if load_tokenizer(folder).get_vocab() != load_tokenizer(source).get_vocab():
        raise ModelError(
            f"the masked language model {folder} has another tokenizer than the model {source}.",
            help="name one that reads the same token ids, or leave augment_model out.",
        )


def _check_methods(recipe: Recipe, source: Path, task: Task) -> None:
    """The first error of a method that cannot do what it is asked with the model as the stages before it leave it.

    The model is followed from stage to stage as far as names and sizes tell. Behind a method that looks at data it is only known that
    nothing is added: what exits, sieves, segments and patterns lack by then, they would lack in any case.
    """
    if not any(stage.methods for stage in recipe.stages):
        return
    subject = subject_of(checkpoint.skeleton(source, task.auto_class))
    anatomy, rows = subject.anatomy, cache(lambda: sampled_rows(task, source))
    known = True
    for number, stage in enumerate(recipe.stages):
        for method in stage.methods:
            effects = method.effects()
            with _told_where(f"stages[{number}]", later=anatomy is not subject.anatomy):
                if known:
                    refuse_cuts((method,), anatomy)
                    method.check(anatomy, _counted(method, anatomy, subject, rows))
                elif effects.adapts or effects.divides or effects.patterns:
                    method.check(anatomy, None)
        for method in stage.methods if known else ():
            plan = method.foresee(anatomy, _counted(method, anatomy, subject, rows))
            known = known and plan is not None
            anatomy = anatomy.after(plan) if plan not in (None, Plan()) else anatomy


def _counted(method: Method, anatomy: Anatomy, subject: Subject, rows: Callable[[], Features]) -> cost.Cost | None:
    """What a method's budget counts in a model of this anatomy; None if it has none, or if that takes the weights and a minute."""
    if not (method.effects().chooses or method.effects().adapts):
        return None
    if method.cost == "parameters" and anatomy is subject.anatomy:
        return cost.parameters(subject.model, anatomy)
    if method.cost == "macs":
        return cost.macs(anatomy, rows().lengths(), rows().target_lengths(), subject.beams)
    return None


@contextmanager
def _told_where(stage: str, *, later: bool) -> Iterator[None]:
    """Adds to an error which stage it is of, if the model is no longer the one that the recipe names by then."""
    try:
        yield
    except (RecipeError, TargetError, PlanError) as error:
        if not later:
            raise
        facts = [*error.facts, f"in {stage}, on the model as the stages before leave it"]
        raise type(error)(error.what, facts=facts, help=error.help) from None


def _check_vocabulary(recipe: Recipe, source: Path, task: Task) -> None:
    """RecipeError, DataError or ModelError if the vocabulary cannot be cut where a recipe says so, or was cut for other texts."""
    if VOCABULARY_SITE in checkpoint.load_plan(source).keep:
        refuse_strange_texts(source, task.split(Split.TRAIN))
    for stage in recipe.stages:
        if isinstance(stage, TrimVocabulary):
            if stage.text is not None:
                check_text(Path(stage.text))
            check_table(subject_of(checkpoint.skeleton(source, task.auto_class)))
            choose_pieces(stage, task, source, quick=stage.at_least == 1)


def _check_points(recipe: Recipe, source: Path, task: Task) -> None:
    """RecipeError if the export names a point that the model does not have."""
    named = () if recipe.export.floats == "auto" else recipe.export.floats
    points = subject_of(checkpoint.skeleton(source, task.auto_class)).anatomy.points if named else {}
    unknown = next((name for name in named if name not in points), None)
    if unknown is not None:
        raise RecipeError(f"export.floats: the model has no point {shown(unknown)}.", help=nearest(unknown, points))


def trained_marks(recipe: Recipe) -> dict[str, Any]:
    """The fields of the model's config that change once leading `train` stages have trained it on the task's data."""
    return dict(recipe.task.trained_on()) if leading_stages(recipe.stages) else {}
