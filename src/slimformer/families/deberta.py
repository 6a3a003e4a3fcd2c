"""DeBERTa v2 and v3: BERT's post-norm skeleton, whose scores have terms for relative positions (disentangled attention).

He et al., ICLR 2021, section 3.1, and ICLR 2023 for v3: beside query times key stand query times a key of the distance ("c2p"), and key
times a query of the distance ("p2c"). Keys and queries of distances come from one table beside the layers, by the attention's own
matrices (`share_att_key`, as in v3) or by two of their own. They follow from the weights alone, so files hold them as constants,
and a head takes its part of them along when it is cut. The width of the hidden states stays. The convolution of v2-xlarge and
v2-xxlarge is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, final

from slimformer.errors import ModelError
from slimformer.families.base import BERT_FFN, SETTLED, Attention, Family, Skeleton, Skip

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OWN = {"c2p": "attention.self.pos_key_proj", "p2c": "attention.self.pos_query_proj"}


@final
class Deberta(Family):
    model_types: ClassVar[tuple[str, ...]] = ("deberta-v2",)
    settled: ClassVar[Mapping[str, tuple[Any, ...]]] = {**SETTLED, "relative_attention": (True,), "conv_kernel_size": (0,)}
    skeleton: ClassVar[Skeleton] = Skeleton(
        layers="encoder.layer",
        attention=Attention(
            module="attention.self",
            query="attention.self.query_proj",
            key="attention.self.key_proj",
            value="attention.self.value_proj",
            out="attention.output.dense",
            norm="attention.output.LayerNorm",
            counters=("num_attention_heads", "all_head_size"),
            terms=2,
            start="attention",
            end="attention.output",
            skips=(Skip("attention", gives="input", pair=True),),
        ),
        ffn=BERT_FFN,
        beside=("encoder.rel_embeddings", "encoder.LayerNorm"),
        project="embeddings.embed_proj",
        inner=("embeddings.embed_proj",),
        head=("pooler.dense",),
        last=("classifier", "qa_outputs"),
        pieces=("cls.predictions.bias", "lm_predictions.lm_head.bias"),
    )

    def skeleton_of(self, model: PreTrainedModel) -> Skeleton:
        config: Any = model.config
        problem = _problem(config)
        if problem is not None:
            raise ModelError(f"this DeBERTa cannot be read: {problem[0]}.", help=problem[1])
        kinds = [kind for kind in _OWN if kind in config.pos_att_type]
        own = () if getattr(config, "share_att_key", False) else tuple(_OWN[kind] for kind in kinds)
        return replace(self.skeleton, attention=replace(self.skeleton.attention, terms=len(kinds), places=own))

    def inputs(self, model: PreTrainedModel) -> tuple[str, ...]:
        names = ("input_ids", "attention_mask")
        return (*names, "token_type_ids") if model.config.type_vocab_size > 1 else names

    def positions(self, config: Mapping[str, Any]) -> int | None:
        return super().positions(config) if config.get("position_biased_input", True) else None  # distances have no end

    def unread(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        biased = config.get("position_biased_input", True)
        return () if biased else ("embeddings.position_embeddings.weight",)  # Microsoft's own code always has such a table

    def tiny(self, model_type: str) -> dict[str, Any]:
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 24}
        distances = {"relative_attention": True, "pos_att_type": "p2c|c2p", "position_buckets": 8, "norm_rel_ebd": "layer_norm"}
        return {**sizes, **distances, "share_att_key": True, "position_biased_input": False}


def _problem(config: Any) -> tuple[str, str] | None:
    """What a config says that no model of this family computes, and what to say instead."""
    if not config.relative_attention:
        return "it knows no relative positions", "say relative_attention: true if its weights have a table rel_embeddings."
    if getattr(config, "conv_kernel_size", 0) > 0:
        return "it has a convolution behind its first layer", "take one without it, such as any of v3."
    kinds = config.pos_att_type or []
    if not set(kinds) or not set(kinds) <= set(_OWN):
        return "its scores have terms c2p, p2c or both", "correct pos_att_type: p2c|c2p is usual."
    most = getattr(config, "max_relative_positions", -1)
    most = config.max_position_embeddings if most < 1 else most
    if getattr(config, "position_buckets", -1) // 2 >= most - 1:
        return f"{config.position_buckets} position_buckets are too many for distances of {most}", "correct one of the two."
    return None
