"""Writes models with one score so that sentence-transformers' CrossEncoder loads a delivered folder without slimformer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slimformer.core.relevance import activation_facts, score_activation
from slimformer.errors import PlanError
from slimformer.saving.checkpoint import unshared
from slimformer.saving.folders import MODEL_FOLDER
from slimformer.saving.headers import WEIGHTS
from slimformer.saving.resaving import write_base_config
from slimformer.saving.uniform import uniform

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def deliver_scores(model: PreTrainedModel, folder: Path) -> tuple[str, ...]:
    """Writes a plain model beside the files of a delivered folder, if its config says what becomes of its score; gives notes on it.

    `uniform` says in which shapes. Both fields by which CrossEncoder is told of the score are written.
    """
    from safetensors.torch import save_file

    if not type(model).__name__.endswith("ForSequenceClassification") or model.config.num_labels != 1:
        return ()
    activation = score_activation(model.config)
    if activation is None:
        return ()
    try:
        plain = uniform(model)
    except PlanError as error:
        return (f"`CrossEncoder` loads `{MODEL_FOLDER}`, after `import slimformer`, and not the whole folder: {error.what}",)
    for name, value in activation_facts(activation).items():
        setattr(plain.config, name, value)
    save_file(unshared(plain), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)
    write_base_config(plain, folder)
    own, whole = (sum(value.numel() for value in unshared(item).values()) for item in (model, plain))
    shapes = "" if own == whole else f", in shapes that transformers has: {whole:,} parameters instead of {own:,}"
    return (f"`CrossEncoder` of sentence-transformers loads the folder without slimformer{shapes}",)
