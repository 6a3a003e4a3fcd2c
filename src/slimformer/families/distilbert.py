"""DistilBERT: BERT's post-norm skeleton with other names (q_lin, k_lin, v_lin, out_lin, lin1, lin2) and no segments.

The residual is added in the layer itself, so a sublayer is taken out by an addend of zero and a norm that does nothing.
"""

from __future__ import annotations

from typing import Any, ClassVar, final

from slimformer.families.base import Attention, Family, FeedForward, Skeleton, Skip


@final
class DistilBert(Family):
    model_types: ClassVar[tuple[str, ...]] = ("distilbert",)
    skeleton: ClassVar[Skeleton] = Skeleton(
        hidden_size="dim",
        attention_heads="n_heads",
        layers="transformer.layer",
        attention=Attention(
            module="attention",
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            out="attention.out_lin",
            norm="sa_layer_norm",
            counters=("n_heads", "dim"),
            start="attention",
            end="sa_layer_norm",
            skips=(Skip("attention", gives="zero", pair=True), Skip("sa_layer_norm", gives="input")),
        ),
        ffn=FeedForward(
            into="ffn.lin1",
            out="ffn.lin2",
            norm="output_layer_norm",
            start="ffn",
            end="output_layer_norm",
            skips=(Skip("ffn", gives="zero"), Skip("output_layer_norm", gives="input")),
        ),
        head=("pre_classifier",),
    )

    def tiny(self, model_type: str) -> dict[str, Any]:
        return {"dim": 32, "n_heads": 4, "n_layers": 3, "hidden_dim": 24}
