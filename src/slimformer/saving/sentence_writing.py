"""Writes models that give vectors as folders of sentence-transformers, which load there without slimformer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimformer.core.pooling import VectorHead
from slimformer.errors import PlanError
from slimformer.families.base import anatomy_of
from slimformer.saving.checkpoint import copy_tokenizer, unshared
from slimformer.saving.folders import MODEL_FOLDER
from slimformer.saving.headers import WEIGHTS
from slimformer.saving.heads import encoder_of
from slimformer.saving.resaving import write_base_config
from slimformer.saving.sentence_folder import (
    ENCODER_FOLDER,
    MODULES,
    STEP_FACTS,
    SentenceFolder,
    write_dense_state,
    write_steps,
)
from slimformer.saving.sentence_texts import ENCODER_FACTS
from slimformer.saving.uniform import uniform

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def write_sentence_folder(model: PreTrainedModel, folder: Path, *, tokenizer_from: Path) -> str:
    """Writes a model that gives vectors, cut or not, as a folder of sentence-transformers, its transformer in ENCODER_FOLDER.

    It loads there without slimformer: `uniform` says in which shapes. Gives a sentence about it. PlanError if no plain class of
    transformers computes the model; nothing is written then.
    """
    import torch
    from safetensors.torch import save_file

    from slimformer.families._embedder import sized_head

    plain = uniform(model)
    encoder: Any = plain.base_model
    home = folder / ENCODER_FOLDER
    home.mkdir(parents=True)
    state, width = unshared(encoder), anatomy_of(plain).hidden_size
    if encoder_of(encoder.config.model_type).pooled:  # nothing reads it, and transformers would say that it is missing
        state |= {"pooler.dense.weight": torch.zeros(width, width), "pooler.dense.bias": torch.zeros(width)}
    save_file(state, home / WEIGHTS, metadata={"format": "pt"})
    (home / WEIGHTS).chmod(0o644)
    write_base_config(encoder, home)
    copy_tokenizer(tokenizer_from, home)
    head = sized_head(plain)
    write_steps(folder, head, width, ENCODER_FOLDER)
    write_dense_state(folder, {name: value for name, value in plain.state_dict().items() if name.startswith("dense.")})
    own, whole = (sum(value.numel() for value in unshared(item).values()) for item in (model, plain))
    shapes = "" if own == whole else f", in shapes that transformers has: {whole:,} parameters instead of {own:,}"
    return f"`SentenceTransformer` of sentence-transformers loads the folder without slimformer{shapes}"


def deliver_vectors(model: PreTrainedModel, folder: Path, *, tokenizer_from: Path) -> tuple[str, ...]:
    """Makes a delivered folder one of sentence-transformers, if the model gives vectors; notes about it.

    Its top has the steps and a plain transformer; its folder `model` has the cut one, which loads there after `import slimformer`.
    """
    if not hasattr(type(model), "encoder_class"):
        return ()
    from slimformer.families._embedder import sized_head  # needs torch

    inner, width = folder / MODEL_FOLDER, anatomy_of(model).hidden_size
    write_steps(inner, sized_head(model), width)
    write_dense_state(inner, {name: value for name, value in model.state_dict().items() if name.startswith("dense.")})
    try:
        return (write_sentence_folder(model, folder, tokenizer_from=tokenizer_from),)
    except PlanError as error:
        return (
            f"`SentenceTransformer` loads `{MODEL_FOLDER}`, after `import slimformer`, and not the whole folder: {error.what}",
        )


def copy_as_told(source: SentenceFolder, head: VectorHead, state: Mapping[str, Tensor], folder: Path, width: int) -> None:
    """A copy of a model folder in `folder`, whose vectors are made as `head` says, with these weights of linear layers.

    Weights are linked where the disk allows that.
    """
    for file in sorted(source.encoder.iterdir()):
        if not file.is_file() or file.suffix not in (".json", ".safetensors", ".txt", ".model", ".md"):
            continue
        if file.name in (MODULES, STEP_FACTS, *ENCODER_FACTS):
            continue
        try:
            os.link(file.resolve(), folder / file.name)
        except OSError:
            shutil.copyfile(file, folder / file.name)
    write_steps(folder, head, width)
    write_dense_state(folder, state)
