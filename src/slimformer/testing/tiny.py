"""Tiny random models of every type that a family knows, built from a config without network: real classes, real passes."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from slimformer.families.base import family_of

VOCABULARY = 99


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The tiny config that the family of `model_type` declares, with `changes`."""
    family_of(model_type).model_class("")  # the Auto classes now know it
    common = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 1}
    return AutoConfig.for_model(model_type, **(common | family_of(model_type).tiny(model_type) | changes))


def tiny(model_type: str, seed: int = 0, auto_class: str | None = None, **changes: Any) -> PreTrainedModel:
    """A model with weights and biases large enough that every unit matters, in eval mode; by default of its family's class."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, auto_class or family_of(model_type).auto_class).from_config(
            tiny_config(model_type, **changes)
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue  # sinusoidal positions are what they are
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name.lower() and name.endswith("weight") else 0.2 * noise)
    return model.eval()


def batch(model: PreTrainedModel, rows: int = 3, seq: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random ids with right padding of different lengths; a decoder's texts are shorter."""
    generator = torch.Generator().manual_seed(seed)
    columns = _padded(rows, seq, generator)
    if model.config.is_encoder_decoder:
        columns |= {f"decoder_{name}": column for name, column in _padded(rows, max(2, seq - 2), generator).items()}
    return columns


def _padded(rows: int, seq: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, VOCABULARY, (rows, seq), generator=generator)
    lengths = torch.randint(2, seq + 1, (rows,), generator=generator)
    lengths[0] = seq
    mask = (torch.arange(seq)[None, :] < lengths[:, None]).long()
    ids = torch.where(mask.bool(), ids, torch.tensor(1))
    return {"input_ids": ids, "attention_mask": mask}
