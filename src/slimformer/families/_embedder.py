"""The classes of models that give one vector for a text: an encoder of transformers, and what `VectorHead` says behind it.

Transformers has no such classes, so they are made here from its encoders, one for each model type: `BertForSentenceEmbedding`. The
vector of a text depends neither on padding on its right nor on the other texts of a batch.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from slimformer.core.pooling import SENTENCE_VECTOR, VectorHead, vector_head

ENDING = "ForSentenceEmbedding"
_ACTIVATIONS = {"identity": nn.Identity, "tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "sigmoid": nn.Sigmoid}
_LEAST = 1e-12  # the length by which a vector is divided at least, as in torch


@dataclass
class EmbeddingOutput(ModelOutput):
    """The vectors of a batch, (batch, dimension), and the hidden states that they are made of, (batch, seq, hidden)."""

    sentence_embedding: Tensor | None = None
    last_hidden_state: Tensor | None = None


class Embedder:
    """What the classes share; it comes before transformers' own base class, and `encoder_class` is that of the encoder."""

    encoder_class: Any

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.head = vector_head(config) or VectorHead()
        takes = inspect.signature(self.encoder_class.__init__).parameters
        bare = {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}
        setattr(self, str(self.base_model_prefix), self.encoder_class(config, **bare))  # type: ignore[attr-defined]
        self.dense = nn.ModuleList(
            nn.Linear(layer.in_features, layer.out_features, bias=layer.bias) for layer in self.head.dense
        )
        self.post_init()  # type: ignore[attr-defined]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> EmbeddingOutput:
        """The vectors of texts as token ids (batch, seq); `attention_mask` is 0 on padding."""
        inputs.pop("return_dict", None)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        encoder: Any = getattr(self, str(self.base_model_prefix))  # type: ignore[attr-defined]
        states = encoder(input_ids=input_ids, attention_mask=mask, **inputs).last_hidden_state  # (batch, seq, hidden)
        vector = torch.cat([pooled(states, mask, mode) for mode in self.head.pooling], dim=-1)  # (batch, hidden * modes)
        for layer, facts in zip(self.dense, self.head.dense, strict=True):
            vector = _ACTIVATIONS[facts.activation]()(layer(vector))
        if self.head.normalize:
            vector = vector / vector.square().sum(-1, keepdim=True).sqrt().clamp_min(_LEAST)
        return EmbeddingOutput(sentence_embedding=vector, last_hidden_state=states)


def pooled(states: Tensor, mask: Tensor, mode: str) -> Tensor:
    """One vector of the hidden states (batch, seq, hidden) of each text, as sentence-transformers computes it: (batch, hidden).

    >>> states, mask = torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]])
    >>> [float(pooled(states, mask, mode)) for mode in ("cls", "mean", "max", "lasttoken")]
    [1.0, 2.0, 3.0, 3.0]
    """
    if mode == "cls":
        return states[:, 0]
    real = mask.to(states.dtype)[:, :, None]  # (batch, seq, 1)
    if mode == "max":
        return (states + (real - 1) * 1e9).amax(1)
    if mode == "lasttoken":
        last = mask.sum(1, keepdim=True).clamp_min(1)  # (batch, 1), counted from 1
        places = torch.ones_like(mask).cumsum(1)
        return (states * (places == last).to(states.dtype)[:, :, None]).sum(1)
    if mode == "weightedmean":
        real = real * torch.ones_like(mask).cumsum(1).to(states.dtype)[:, :, None]
    total, count = (states * real).sum(1), real.sum(1).clamp_min(1e-9)  # (batch, hidden), (batch, 1)
    return total / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)


@cache
def embedder_class(kind: str) -> Any:
    """The class for a model type; ValueError if transformers has no encoder for it."""
    config = transformers.CONFIG_MAPPING[kind]
    encoder: Any = transformers.MODEL_MAPPING[config]
    encoder = encoder[0] if isinstance(encoder, tuple) else encoder
    base = next((cls for cls in encoder.__mro__[1:] if cls is not transformers.PreTrainedModel and _is_base(cls)), None)
    if base is None or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"no vectors of texts for the type {kind}")
    name = encoder.__name__.removesuffix("Model") + ENDING
    facts = {"encoder_class": encoder, "config_class": config, "__module__": __name__, "__qualname__": name}
    return type(name, (Embedder, base), facts)


def sized_head(model: Any) -> VectorHead:
    """How a model makes its vectors, with the sizes that its linear layers have by now: cuts change those, and not the config."""
    sizes = [tuple(layer.weight.shape) for layer in model.dense]
    dense = [
        replace(facts, out_features=rows, in_features=columns)
        for facts, (rows, columns) in zip(model.head.dense, sizes, strict=True)
    ]
    return replace(model.head, dense=tuple(dense))


def _is_base(cls: type) -> bool:
    return issubclass(cls, transformers.PreTrainedModel)


class AutoModelForSentenceEmbedding:
    """Stands beside transformers' Auto classes."""

    @staticmethod
    def from_config(config: Any) -> Any:
        """A fresh model of the class for a config."""
        return embedder_class(config.model_type)(config)


def embedder_named(name: str, kinds: tuple[str, ...]) -> Any:
    """The class of that name for one of these model types; None if it is no such name."""
    if not name.endswith(ENDING):
        return None
    return next((cls for cls in map(embedder_class, kinds) if cls.__name__ == name), None)


__all__ = [
    "ENDING",
    "SENTENCE_VECTOR",
    "AutoModelForSentenceEmbedding",
    "Embedder",
    "embedder_class",
    "embedder_named",
    "pooled",
    "sized_head",
]
