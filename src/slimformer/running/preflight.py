"""All checks of a request that are quick, before anything is made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimformer import registry
from slimformer.data.augmentation import check_masked_model
from slimformer.data.material import check_text, sampled_lengths
from slimformer.errors import ModelError, RecipeError
from slimformer.running.stages import TASK_TEXT, Stage, Train, refuse_cuts
from slimformer.saving import checkpoint
from slimformer.saving.hub import local_folder
from slimformer.tasks.base import Split, Task

if TYPE_CHECKING:
    pass
from slimformer.running.order import _fills, _lead, _methods, disorder
from slimformer.running.recipe import Recipe


def look(recipe: Recipe) -> None:
    """All checks of what the user gave that are quick, before anything is made; the errors of `begin`, but earlier."""
    from slimformer.data.tokenizer import load_tokenizer, max_length_of
    from slimformer.families.base import family_of
    from slimformer.runtimes.openvino import require_nncf

    orders = [fact for number, stage in enumerate(recipe.stages) for fact in disorder(stage, recipe.stages[:number])]
    if orders:
        raise RecipeError(
            "the stages of this recipe undo each other.", facts=orders, help="docs/concepts.md says what may follow."
        )
    if recipe.export.openvino:
        require_nncf()
    for source in map(local_folder, filter(None, (recipe.model, recipe.teacher))):
        family_of(checkpoint.base_type(checkpoint.read_config(source)))
        checkpoint.weights_file(source)
    look_at_gains(local_folder(recipe.model), recipe.stages)
    source, task = local_folder(recipe.model), recipe.task
    task.split(Split.DEV)
    if checkpoint.is_tuned(source, task.auto_class):
        task = task.bind(checkpoint.read_config(source) | _trained_on(recipe))
    elif recipe.teacher is None and not _lead(recipe.stages):
        raise RecipeError(
            f"{source} is not tuned for this task, and the recipe does not begin by tuning it.",
            help="put a stage '- train: {epochs: 3}' first, or name a tuned `teacher:`.",
        )
    if recipe.teacher:
        _look_at_teacher(local_folder(recipe.teacher), source, recipe.task)
    for stage in recipe.stages:
        if isinstance(stage, Train) and stage.augment_model:
            check_masked_model(Path(stage.augment_model), source)
    for split in Split:
        task.split(split)
    for stage in recipe.stages:
        if isinstance(stage, Train) and stage.text not in (None, TASK_TEXT):
            check_text(Path(str(stage.text)))
    load_tokenizer(source)
    max_length_of(source)
    _look_at_cuts(recipe, task)


def _look_at_cuts(recipe: Recipe, task: Task) -> None:
    """RecipeError, TargetError or PlanError where the first method that decides cannot do so with this model.

    What a later one meets is known only once there is something left to cut.
    """
    from slimformer.core import cost
    from slimformer.families.base import anatomy_of

    first = next((method for stage in recipe.stages for method in _methods(stage) if method.effects().chooses), None)
    if first is None:
        return
    source = local_folder(recipe.model)
    model = checkpoint.skeleton(source, task.auto_class)
    refuse_cuts((first,), model)
    anatomy = anatomy_of(model)
    counted = None  # latency takes weights and a minute to measure
    if first.cost == "parameters":
        counted = cost.parameters(model, anatomy)
    elif first.cost == "macs":
        counted = cost.macs(anatomy, sampled_lengths(task, source))
    first.check(anatomy, counted)


def look_at_gains(source: Path, stages: Sequence[Stage]) -> None:
    """RecipeError where a model comes with zeros or learned ranges, as a run delivers it, that the stages would lose."""
    lost = []
    if (
        stages
        and checkpoint.load_ranges(source) is not None
        and not any(method.effects().learns_grids for method in _methods(stages[0]))
    ):
        lost.append("it has learned grids and ranges, which the first stage would lose: begin with quantization")
    spoiling = next(
        (stage for stage in stages if _fills(stage) or any(method.effects().refills for method in _methods(stage))), None
    )
    if spoiling is not None and checkpoint.sparse_matrices(source):
        filling = next((registry.name_of(method) for method in _methods(spoiling) if method.effects().refills), None)
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


def _look_at_teacher(teacher: Path, source: Path, task: Task) -> None:
    """ModelError or DataError where a teacher is no model for this task, or reads other token ids than the model."""
    from slimformer.data.tokenizer import OTHER_FORMS, load_tokenizer

    config = checkpoint.read_config(teacher)
    if not checkpoint.is_tuned(teacher, task.auto_class):
        kind = ", ".join(map(str, config.get("architectures") or ["model without a head"]))
        raise ModelError(
            f"the teacher {teacher} is a {kind}, and the task {registry.name_of(task)} needs one that ends in "
            f"{task.auto_class.removeprefix('AutoModel')}.",
            help="name a teacher that was tuned for this task.",
        )
    task.bind(config)
    if not any((teacher / name).is_file() for name in ("tokenizer.json", *OTHER_FORMS)):
        return  # sizes are compared when it is loaded
    mine, theirs = (load_tokenizer(folder).get_vocab() for folder in (source, teacher))
    if mine != theirs:
        differing = sum(theirs.get(token) != index for token, index in mine.items())
        raise ModelError(
            f"the teacher {teacher} has another tokenizer than the model {source}: {differing:,} of {len(mine):,} tokens have another "
            "id there, or none.",
            help="teacher and student must read the same token ids.",
        )


def _trained_on(recipe: Recipe) -> dict[str, Any]:
    """What the config of the recipe's model says once leading `train` stages have trained it on the task's data."""
    return dict(recipe.task.trained_on()) if _lead(recipe.stages) else {}
