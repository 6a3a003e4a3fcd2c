"""Computes a share of a teacher's outputs on a node of a cluster, before any training there reads them.

Outputs over much text take longer than anything else that can be cut into independent pieces: each row's depend on no other row. A share
is a run of the rows in the order in which one process computes them all, and its parts lie where that one would write them, so the
training that comes next finds a filling that is done. If a share is missing, the training computes it.
"""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path

from torch import nn

from slimformer.data.material import read_texts
from slimformer.log import Log
from slimformer.running.bundle import Run
from slimformer.running.fresh import Fresh
from slimformer.running.order import leading_stages
from slimformer.running.preflight import preflight
from slimformer.running.prepare import prepare_bundle
from slimformer.running.recipe import Recipe
from slimformer.running.stages import rows_as_read
from slimformer.saving import checkpoint
from slimformer.saving.hub import local_folder
from slimformer.tasks.base import Split
from slimformer.training.devices import accelerator_for, cache_room, chosen_precision
from slimformer.training.stage import TASK_TEXT, Train, TrimVocabulary
from slimformer.training.step import as_teacher, asked_of_teacher
from slimformer.training.teacher import RowShare, fill_share

MANY_ROWS = 20_000  # reading model and data takes a node some seconds: of fewer rows, one process has made the outputs by then


def shared_stage(recipe: Recipe) -> Train | None:
    """The first training, if its teacher's outputs could be made beforehand; None if the teacher or its words are still to be made."""
    if isinstance(recipe.model, Fresh):
        return None
    tuned = checkpoint.is_tuned(local_folder(str(recipe.model)), recipe.task.auto_class)
    if recipe.teacher is None and (not tuned or leading_stages(recipe.stages)):
        return None
    for stage in recipe.stages:
        if isinstance(stage, TrimVocabulary):
            return None
        if isinstance(stage, Train) and asked_of_teacher(stage.methods):
            return stage if stage.targets != "teacher" else None
    return None


def has_many_rows(recipe: Recipe, stage: Train) -> bool:
    """Whether a stage trains on so many rows that nodes compute outputs for them sooner together than one alone."""
    if stage.text is not None and stage.text != TASK_TEXT:
        found = sum(1 for _ in islice(read_texts(Path(stage.text)), MANY_ROWS))  # the rest of a large file does not matter
    else:
        found = len(recipe.task.split(Split.TRAIN))
    return min(found, stage.rows or found) * (1 + stage.augment) >= MANY_ROWS


def teach_share(recipe: Recipe, share: RowShare, cache: Path, log: Log) -> bool:
    """Computes a share of the outputs that the first training of a recipe will read in `cache`; False if there are none to keep."""
    stage = shared_stage(recipe)
    if stage is None:
        return False
    with tempfile.TemporaryDirectory(prefix="slimformer-share-") as place:
        run = Run(Path(place), Path(place), log, recipe.seed, cache=cache)
        bundle, _ = prepare_bundle(preflight(recipe), run)
        accelerator = accelerator_for((), Path(place))
        precision = chosen_precision(stage.precision, accelerator)
        nn.Module.to(bundle.teacher.model, accelerator.device)
        teacher = as_teacher(bundle.teacher, bundle.material.task, accelerator.device, precision)
        rows, needs = rows_as_read(stage, bundle, run), asked_of_teacher(stage.methods)
        return fill_share(teacher, rows, needs, cache, log, share, cap_bytes=cache_room(cache))
