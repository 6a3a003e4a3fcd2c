"""Marian, as the OPUS-MT models: BART's skeleton with sinusoidal positions, which are not trained, and no norm behind the
embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, final

from slimformer.families._bart import around, encoder_decoder, tiny_sizes
from slimformer.families.base import SETTLED_DECODING, Family, Skeleton, Surroundings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@final
class Marian(Family):
    model_types: ClassVar[tuple[str, ...]] = ("marian",)
    skeleton: ClassVar[Skeleton] = encoder_decoder(pre_norm=False, embedding_norm=None)
    settled: ClassVar[Mapping[str, tuple[Any, ...]]] = {**SETTLED_DECODING, "normalize_before": (False,)}
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    special_tokens: ClassVar[Mapping[str, str]] = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

    def surroundings(self, model: PreTrainedModel) -> Surroundings:
        return around(model, first_position=0)

    def tiny(self, model_type: str) -> dict[str, Any]:
        return tiny_sizes() | {"decoder_start_token_id": 1}
