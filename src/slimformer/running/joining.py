"""Joins classifiers of one encoder to one model that gives the answers of all: the encoder once, and the heads side by side.

Such classifiers come from training heads on an encoder that was kept fixed. What comes before the last linear layer must be the same
in all of them, up to the rounding of half precision; their last layers become the rows of one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from slimformer.core.answers import ANSWERS, answers_field, is_task_name, label_of
from slimformer.core.plan import Plan
from slimformer.data.labels import model_labels
from slimformer.errors import ModelError, RecipeError, shown
from slimformer.files import own_folder, refuse_foreign, refuse_other_purpose
from slimformer.log import Log
from slimformer.running.places import seen_from
from slimformer.running.readings import reads_otherwise
from slimformer.saving import checkpoint
from slimformer.saving.hub import local_folder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CLASSIFIER = "AutoModelForSequenceClassification"
HALF_PRECISION = 2.0**-10  # of the largest number of a tensor: what half precision may change


def join_classifiers(models: Mapping[str, str | Path], out: str | Path, *, log: Log | None = None) -> Path:
    """Writes a plain transformers folder with one encoder and the heads of several classifiers.

    The folder is a model like any other: `compress` cuts it for all its tasks at once, with data for each (`multitask`).

    Args:
        models: The folder, or the name on the hub, of each task's classifier. A task's name has letters, digits and underscores.
        out: The folder to write; one that joined the same models before is replaced.
        log: By default the lines go to Python's logger `slimformer`.

    Returns:
        The folder.

    Raises:
        RecipeError: There are fewer than two models, or a task's name cannot be the name of an output.
        ModelError: One is no classifier of classes, was cut, reads other word pieces, or has another encoder than the first.
        OutputError: `out` cannot be written, or holds something else.

    Example:
        >>> join_classifiers({"mood": "./mood", "topic": "./topic"}, "both")  # doctest: +SKIP
    """
    place, log = Path(out), log or Log(None)
    wrong = [f"{shown(name, 40)}: letters, digits and underscores, please" for name in models if not is_task_name(name)]
    if len(models) < 2:
        wrong.append(f"{len(models)} model: two or more are joined")
    if wrong:
        raise RecipeError("these models cannot be joined.", facts=wrong, help="name each task: mood=./mood topic=./topic.")
    purpose = "join " + json.dumps({task: seen_from(place, str(model)) for task, model in models.items()})
    refuse_foreign(place)
    refuse_other_purpose(place, purpose)
    folders = {task: local_folder(str(model)) for task, model in models.items()}
    loaded = {task: _classifier(folder) for task, folder in folders.items()}
    (first, base), *others = loaded.items()
    last = _last_layer(base, folders[first])
    for task, model in others:
        if reads_otherwise(folders[task], folders[first]):
            raise ModelError(
                f"{folders[task]} reads other word pieces than {folders[first]}.",
                help="heads of one encoder have one tokenizer; compress each model by itself.",
            )
        _check_same(base, model, last, folders[first], folders[task])
    labels = {task: model_labels(model.config)[0] for task, model in loaded.items()}
    joined = _joined(loaded, labels, last)
    with own_folder(place, purpose) as part:
        checkpoint.write_dense(joined, Plan(), part, tokenizer_from=folders[first])
    counts = ", ".join(f"{task} {len(names)}" for task, names in labels.items())
    log.say(f"{place}: one {base.config.model_type} for {len(labels)} tasks ({counts} classes).")
    return place


def _classifier(folder: Path) -> PreTrainedModel:
    """A plain classifier of several classes."""
    raw = checkpoint.read_config(folder)
    if checkpoint.is_cut_folder(raw):
        raise ModelError(
            f"{folder} was cut already.", help="join the models before they are cut, then compress what comes out."
        )
    if not checkpoint.is_tuned(folder, CLASSIFIER) or raw.get(ANSWERS) is not None:
        raise ModelError(f"{folder} is no classifier with one answer.", help="join models for text classification.")
    model = checkpoint.load_as(folder, CLASSIFIER, {}, 0)
    names, problem = model_labels(model.config)
    if len(names) < 2 or problem == "multi_label_classification":
        raise ModelError(
            f"{folder} gives {'a score' if len(names) < 2 else 'a row several labels'}, not one class.",
            help="only classifiers of classes are joined.",
        )
    return model


def _last_layer(model: PreTrainedModel, folder: Path) -> str:
    """The name of the linear layer that gives the logits: the last one behind the encoder."""
    from torch import nn

    inner = f"{model.base_model_prefix}."
    behind = [name for name, item in model.named_modules() if isinstance(item, nn.Linear) and not name.startswith(inner)]
    if not behind or model.get_submodule(behind[-1]).out_features != model.config.num_labels:
        raise ModelError(f"the last layer of {folder} is not known.", help="compress the model by itself.")
    return behind[-1]


def _check_same(base: PreTrainedModel, model: PreTrainedModel, last: str, first: Path, other: Path) -> None:
    """ModelError if two models differ in more than their last layer and its rounding."""
    ours, theirs = (_without(item.state_dict(), last) for item in (base, model))
    help = (
        "only models whose encoder was kept fixed share it. Start from the encoder instead, with the data of all tasks: "
        "slimformer compress ./encoder --task multitask --data mood=...,topic=..."
    )
    shapes = [name for name in ours if name not in theirs or theirs[name].shape != ours[name].shape] + [*(theirs.keys() - ours)]
    if type(base) is not type(model) or shapes:
        what = f"{shapes[0]} is not the same" if shapes else f"one is a {type(base).__name__}, one a {type(model).__name__}"
        raise ModelError(f"{first} and {other} are no heads of one encoder: {what}.", help=help)
    far = {
        name: float((tensor.float() - theirs[name].float()).abs().max()) / max(float(tensor.float().abs().max()), 1e-12)
        for name, tensor in ours.items()
        if tensor.numel()
    }
    worst = max(far, key=lambda name: far[name])
    if far[worst] > HALF_PRECISION:
        count = sum(value > HALF_PRECISION for value in far.values())
        raise ModelError(
            f"{first} and {other} have other encoders.",
            facts=[f"{count} of {len(far)} tensors differ, most of all {worst}: by {far[worst]:.1%} of its largest number"],
            help=help,
        )


def _without(state: Mapping[str, Tensor], last: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(f"{last}.")}


def _joined(loaded: Mapping[str, PreTrainedModel], labels: Mapping[str, tuple[str, ...]], last: str) -> PreTrainedModel:
    """The first model with a last layer that has the rows of all."""
    import copy

    import torch

    base = next(iter(loaded.values()))
    names = [label_of(task, name) for task, known in labels.items() for name in known]
    config = copy.deepcopy(base.config)
    config.id2label, config.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    config.problem_type = None
    setattr(config, ANSWERS, answers_field({task: len(known) for task, known in labels.items()}))
    state = dict(base.state_dict())
    for part in ("weight", "bias"):
        if f"{last}.{part}" in state:
            state[f"{last}.{part}"] = torch.cat([model.state_dict()[f"{last}.{part}"] for model in loaded.values()])
    joined: PreTrainedModel = type(base)(config)
    joined.load_state_dict(state)
    return joined.eval()
