"""Copies of model folders with what a person says of their vectors, where the folder itself does not say it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from slimformer.core.pooling import VectorHead
from slimformer.errors import ModelError
from slimformer.families.base import family_of
from slimformer.saving.checkpoint import base_type, is_cut_folder, read_config
from slimformer.saving.sentence_folder import SentenceFolder, is_sentence_folder, read_sentence_folder
from slimformer.saving.sentence_writing import copy_as_told

if TYPE_CHECKING:
    from torch import Tensor


class _Told(Protocol):
    def __call__(self, head: VectorHead | None, width: int, *, narrows: bool) -> VectorHead | None: ...


def told_folder(folder: Path, told: _Told, *, narrows: bool) -> Callable[[Path], None] | None:
    """What writes a copy of a model folder with the vectors that `told` asks for; None if the folder gives these already.

    `told` gets what the folder says, if it does, and the width of its hidden states.
    """
    there = read_sentence_folder(folder) if is_sentence_folder(folder) else None
    encoder = folder if there is None else there.encoder
    config = read_config(encoder)
    if is_cut_folder(config):
        return None
    width = family_of(base_type(config)).width(config)
    if width is None:
        raise ModelError(
            f"{encoder}/config.json does not say how wide the hidden states are.", help="copy the whole folder again."
        )
    try:
        head = told(None if there is None else there.head, width, narrows=narrows)
    except ModelError as error:
        raise ModelError(f"{folder}: {error.what}", facts=error.facts, help=error.help) from None
    if head is None or (there is not None and head == there.head and there.encoder == folder):
        return None
    source = there or SentenceFolder(folder, folder, head)

    def write(to: Path) -> None:
        copy_as_told(source, head, _dense(source, head), to, width)

    return write


def _dense(source: SentenceFolder, head: VectorHead) -> dict[str, Tensor]:
    """The weights of the linear layers that `head` asks for: the folder's own, fewer rows of the last one, or rows of ones and zeros."""
    import torch

    state: dict[str, Any] = source.dense_state() if source.layers else {}
    for place, layer in enumerate(head.dense):
        own = state.get(f"dense.{place}.weight")
        if own is None:
            state[f"dense.{place}.weight"] = torch.eye(layer.out_features, layer.in_features)
            continue
        for part in ("weight", "bias"):
            name = f"dense.{place}.{part}"
            if name in state:
                state[name] = state[name][: layer.out_features]
    return state
