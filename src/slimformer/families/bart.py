"""BART: an encoder and a decoder, with the norm behind each sublayer, and learned positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, final

from slimformer.families._bart import around, encoder_decoder, tiny_sizes
from slimformer.families.base import SETTLED_DECODING, Family, Skeleton, Surroundings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@final
class Bart(Family):
    model_types: ClassVar[tuple[str, ...]] = ("bart",)
    skeleton: ClassVar[Skeleton] = encoder_decoder(pre_norm=False, embedding_norm="layernorm_embedding")
    settled: ClassVar[Mapping[str, tuple[Any, ...]]] = {**SETTLED_DECODING, "normalize_before": (False,)}
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    special_tokens: ClassVar[Mapping[str, str]] = {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    decoder_start: ClassVar[str] = "eos_token"

    def surroundings(self, model: PreTrainedModel) -> Surroundings:
        return around(model, first_position=2)

    def tiny(self, model_type: str) -> dict[str, Any]:
        return tiny_sizes()
