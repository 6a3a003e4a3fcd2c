"""A teacher that reads its own word pieces: whether it does, and which stages cannot compare it with a model that reads other ones.

The answers of the two to one text can be compared, because each reads the text with its own tokenizer. What they compute for single
pieces cannot: the rows of the two are not those of the same pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slimformer.data.tokenizer import load_tokenizer
from slimformer.data.tokenizer_files import OTHER_FORMS
from slimformer.errors import RecipeError
from slimformer.hooks.capture import Capture
from slimformer.methods.distillation import Distillation
from slimformer.registry import name_of
from slimformer.tasks.base import Task
from slimformer.training.stage import Stage, Train, TrimVocabulary


def reads_otherwise(teacher: Path, source: Path) -> bool:
    """Whether the teacher gives other ids to some pieces than the model; False for a teacher's folder without a tokenizer."""
    if not any((teacher / name).is_file() for name in ("tokenizer.json", *OTHER_FORMS)):
        return False
    mine, theirs = (load_tokenizer(folder).get_vocab() for folder in (source, teacher))
    return mine != theirs


def refuse_strange_ids(task: Task, stages: Sequence[Stage]) -> None:
    """RecipeError if a task or its stages compare more of a model and its teacher, who read other pieces, than their answers to texts."""
    if task.pretraining or task.stand_in or task.per_token:
        raise RecipeError(
            f"the teacher reads other word pieces than the model, and the task {name_of(task)} has answers for single pieces.",
            help="give the model the teacher's tokenizer: leave out model.vocabulary, or name another teacher.",
        )
    facts = []
    for number, stage in enumerate(stages):
        for method in stage.methods:
            effects, where = method.effects(), f"stages[{number}]: {name_of(method)}"
            seen = sorted(effects.needs - {Capture.LOGITS}) if effects.needs_teacher else []
            if seen:
                remedy = (
                    "set hidden: 0, and leave out its other terms but logits"
                    if isinstance(method, Distillation)
                    else "leave it out"
                )
                facts.append(f"{where} compares {' and '.join(seen)} of single word pieces: {remedy}")
        if isinstance(stage, TrimVocabulary):
            facts.append(f"stages[{number}]: trim_vocabulary cuts the pieces that both read: leave it out")
        if isinstance(stage, Train) and stage.augment:
            facts.append(
                f"stages[{number}].train.augment: words are replaced by pieces that one of the two does not know: leave it out"
            )
    if facts:
        raise RecipeError(
            "the teacher reads other word pieces than the model, so only their answers to whole texts can be compared.",
            facts=facts,
            help="correct these, or name a teacher with the tokenizer of the model.",
        )
