"""MPNet: BERT's post-norm skeleton with other names, and a bias for relative positions that all attentions share.

The table of that bias lies beside the layers and has a column for each head. It stays whole: an attention whose heads were cut takes the
columns of those that it has left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

from slimformer.families.base import BERT_FFN, Attention, Family, Skeleton, Skip

_PADDING = 1  # the id by which its class counts positions, whatever its config says


@final
class MPNet(Family):
    model_types: ClassVar[tuple[str, ...]] = ("mpnet",)
    skeleton: ClassVar[Skeleton] = Skeleton(
        layers="encoder.layer",
        attention=Attention(
            module="attention.attn",
            query="attention.attn.q",
            key="attention.attn.k",
            value="attention.attn.v",
            out="attention.attn.o",
            norm="attention.LayerNorm",
            counters=("num_attention_heads", "all_head_size"),
            shares_bias=True,
            start="attention",
            end="attention.LayerNorm",
            skips=(Skip("attention", gives="input", pair=True),),
        ),
        ffn=BERT_FFN,
        inner=("pooler.dense",),
        head=("classifier.dense",),
        last=("classifier", "classifier.out_proj", "qa_outputs"),
        pieces=("lm_head.bias",),
    )

    def positions(self, config: Mapping[str, Any]) -> int | None:
        size = super().positions(config)
        return None if size is None else size - 1 - _PADDING

    def settled_pieces(self, config: Mapping[str, Any]) -> int:
        return _PADDING + 1

    def tiny(self, model_type: str) -> dict[str, Any]:
        return {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 24}
