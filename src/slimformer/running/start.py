"""The beginning of a compression: the checks, the plan, the tuning of a model without a head, and the vocabulary that is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from slimformer.running.bundle import Bundle, Run
from slimformer.running.lessons import tune_lr, tuning
from slimformer.running.outline import Outline, outline_of
from slimformer.running.preflight import Checked, check_kept, preflight
from slimformer.running.prepare import load_bundle, teach_bundle
from slimformer.running.recipe import Bench, Export, Recipe
from slimformer.running.schedule import Part, Schedule
from slimformer.running.stages import advance
from slimformer.running.students import refuse_student
from slimformer.running.wanted import Wanted
from slimformer.saving import checkpoint
from slimformer.saving.hub import local_folder
from slimformer.tasks.base import Task
from slimformer.training.stage import Stage, Train, TrimVocabulary

LARGE_TABLE = 0.5  # a share of the parameters that is worth a line


def checked_wish(model: str, task: Task, wanted: Wanted, later: Sequence[Stage] = ()) -> Checked:
    """The recipe that the search starts from, with all checks passed that need no training. Its stages tune a model without a head.

    `later`: stages that will come, which are to be refused now if they cannot.
    """
    source = local_folder(model)
    tune = Train(lr=tune_lr(source), batch_size=wanted.batch_size)
    recipe = Recipe(
        model,
        task,
        () if checkpoint.is_tuned(source, task.auto_class) else (tune,),
        seed=wanted.seed,
        export=Export(to=wanted.engine),
        bench=Bench(rivals=wanted.rivals),
    )
    trim = (TrimVocabulary(),) if wanted.vocabulary == "trim" else ()
    checked = replace(preflight(replace(recipe, stages=(*recipe.stages, *trim, *later))), recipe=recipe)
    refuse_student(source)
    check_kept(source, (tune,))  # all searched stages train, whether the model came tuned or not
    return checked


def opened(
    checked: Checked, wanted: Wanted, aims: Sequence[float], schedule: Schedule, run: Run, megabytes: Sequence[float] = ()
) -> tuple[Bundle, Outline, Recipe]:
    """The bundle with a teacher that is ready, the plan for these speeds and sizes, and the recipe with the tuning that was done."""
    tuned = not checked.recipe.stages
    first = load_bundle(checked, run)
    outline = outline_of(first, wanted, aims, schedule, run, tuned=tuned, megabytes=megabytes)
    if not tuned:
        tune = tuning(checked.source, outline.diet, outline.sizes, wanted)
        checked = replace(checked, recipe=replace(checked.recipe, stages=(tune,)))
    with schedule.part(Part.TUNING):
        bundle, _ = teach_bundle(first, checked, run)
    return trimmed(bundle, wanted, run), outline, checked.recipe


def trimmed(bundle: Bundle, wanted: Wanted, run: Run) -> Bundle:
    """The bundle with the vocabulary that is wanted; of a large table that stays whole, a line says so."""
    if wanted.vocabulary == "trim":
        return advance((TrimVocabulary(),), bundle, run.under("vocabulary")).bundle
    tables = sum(matrix.parameters for matrix in bundle.subject.anatomy.matrices.values() if matrix.table)
    share = tables / bundle.subject.model.num_parameters()
    if share > LARGE_TABLE:
        run.log.say(
            f"the word table has {share:.0%} of the parameters: `--vocabulary trim` keeps the pieces that your texts need."
        )
    return bundle
