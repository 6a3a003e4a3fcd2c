"""ModernBERT: the norm in front of each sublayer, one matrix for queries, keys and values, a gated feed-forward block, no biases.

Positions turn queries and keys (RoPE), so there is no table of them. Of every few layers one sees the whole text, and the others a window
around each word. The first attention reads the normed embeddings as they are: its norm is an identity. A norm stands behind the last
layer, and a head has a matrix and a norm of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

from slimformer.families.base import Attention, Family, FeedForward, Skeleton, Skip


@final
class ModernBert(Family):
    model_types: ClassVar[tuple[str, ...]] = ("modernbert",)
    skeleton: ClassVar[Skeleton] = Skeleton(
        layers="layers",
        attention=Attention(
            module="attn",
            query="attn.Wqkv",
            key="attn.Wqkv",
            value="attn.Wqkv",
            out="attn.Wo",
            norm="attn_norm",
            start="attn_norm",
            skips=(Skip("attn", gives="zero", pair=True), Skip("attn_norm", gives="input")),
        ),
        ffn=FeedForward(
            into="mlp.Wi",
            gate="mlp.Wi",
            out="mlp.Wo",
            norm="mlp_norm",
            start="mlp_norm",
            skips=(Skip("mlp", gives="zero"), Skip("mlp_norm", gives="input")),
        ),
        words=("embeddings.tok_embeddings",),
        embedding_norm="embeddings.norm",
        norm="final_norm",
        head=("head.dense",),
        last=("classifier",),
    )
    per_layer: ClassVar[tuple[str, ...]] = ("layer_types",)

    def positions(self, config: Mapping[str, Any]) -> int | None:
        return None  # a turn for any place

    def tiny(self, model_type: str) -> dict[str, Any]:
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 24}
        tokens = {"pad_token_id": 1, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
        return {**sizes, **tokens, "local_attention": 4, "global_attn_every_n_layers": 2}
