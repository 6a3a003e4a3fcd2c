"""BERT and the models that share its skeleton under another prefix: RoBERTa, XLM-R, CamemBERT, ELECTRA.

Post-norm: each sublayer ends in LayerNorm(branch + residual). Taking a sublayer out takes its norm too, so that only
the residual is left and an empty layer costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, final

from slimformer.families.base import BERT_FFN, Attention, Family, Skeleton, Skip

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OFFSET = ("roberta", "xlm-roberta", "camembert")  # they count positions from pad_token_id + 1


@final
class Bert(Family):
    model_types: ClassVar[tuple[str, ...]] = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
    skeleton: ClassVar[Skeleton] = Skeleton(
        layers="encoder.layer",
        attention=Attention(
            module="attention.self",
            query="attention.self.query",
            key="attention.self.key",
            value="attention.self.value",
            out="attention.output.dense",
            norm="attention.output.LayerNorm",
            counters=("num_attention_heads", "all_head_size"),
            start="attention",
            end="attention.output",
            skips=(Skip("attention", gives="input", pair=True),),
        ),
        ffn=BERT_FFN,
        embedding=("embeddings_project", "embeddings"),
        project="embeddings_project",
        inner=("embeddings_project", "pooler.dense"),
        head=("classifier.dense",),
        last=("classifier", "classifier.out_proj", "qa_outputs"),
        pieces=("cls.predictions.bias", "lm_head.bias"),
    )

    def inputs(self, model: PreTrainedModel) -> tuple[str, ...]:
        names = ("input_ids", "attention_mask")
        return (*names, "token_type_ids") if model.config.type_vocab_size > 1 else names

    def positions(self, config: Mapping[str, Any]) -> int | None:
        size = super().positions(config)
        if size is None or config["model_type"] not in OFFSET:
            return size
        pad = config.get("pad_token_id")
        return size - 1 - (pad if isinstance(pad, int) else 1)

    def settled_pieces(self, config: Mapping[str, Any]) -> int:
        pad = config.get("pad_token_id")
        return pad + 1 if config["model_type"] in OFFSET and isinstance(pad, int) else 0

    def tiny(self, model_type: str) -> dict[str, Any]:
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 24}
        segments = {"type_vocab_size": 2 if model_type in ("bert", "electra") else 1}
        return sizes | segments | ({"embedding_size": 16} if model_type == "electra" else {})
