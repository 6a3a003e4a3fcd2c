"""mBART: BART with the norm in front of each sublayer, and one behind each stack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, final

from slimformer.families._bart import around, encoder_decoder, tiny_sizes
from slimformer.families.base import SETTLED_DECODING, Family, Skeleton, Surroundings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@final
class MBart(Family):
    model_types: ClassVar[tuple[str, ...]] = ("mbart",)
    skeleton: ClassVar[Skeleton] = encoder_decoder(pre_norm=True, embedding_norm="layernorm_embedding", norm="layer_norm")
    settled: ClassVar[Mapping[str, tuple[Any, ...]]] = {**SETTLED_DECODING, "normalize_before": (True,)}
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"

    def surroundings(self, model: PreTrainedModel) -> Surroundings:
        return around(model, first_position=2)

    def tiny(self, model_type: str) -> dict[str, Any]:
        return tiny_sizes()
