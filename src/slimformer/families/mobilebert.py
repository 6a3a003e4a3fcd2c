"""MobileBERT: a BERT whose layers compute in a narrow width, between two bottlenecks, with several feed-forward blocks each.

Sun et al., ACL 2020, sections 3.1 to 3.3: a Linear leads from the hidden states into the layer, another one out of it, and the wide
states go past both. Queries and keys have a bottleneck of their own, and the values read the wide states; or all read the one that
leads in, if the config says so. In the place of norms a weight and a bias for each unit stand, or norms, as the config says. The
words of a narrow table are seen together with both neighbours (trigrams).

Heads, the neurons of each feed-forward block, and whole sublayers can be cut. A layer without sublayers is still its two bottlenecks.
The width of the hidden states, and that inside, stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, final

from slimformer.errors import ModelError
from slimformer.families.base import SETTLED, Attention, Bottleneck, Family, FeedForward, Skeleton, Skip

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHARED = Bottleneck(dense="bottleneck.attention.dense", norm="bottleneck.attention.LayerNorm")
_ALONE = (Skip("attention.self", gives="zero", pair=True), Skip("attention.output", gives="residual"))


@final
class MobileBert(Family):
    model_types: ClassVar[tuple[str, ...]] = ("mobilebert",)
    settled: ClassVar[Mapping[str, tuple[Any, ...]]] = {**SETTLED, "use_bottleneck": (True,)}
    any_teacher: ClassVar[bool] = True
    per_layer: ClassVar[tuple[str, ...]] = ("true_hidden_size",)
    skeleton: ClassVar[Skeleton] = Skeleton(
        layers="encoder.layer",
        inner_width="intra_bottleneck_size",
        narrow=Bottleneck(dense="bottleneck.input.dense", norm="bottleneck.input.LayerNorm"),
        widen=Bottleneck(dense="output.bottleneck.dense", norm="output.bottleneck.LayerNorm"),
        attention=Attention(
            module="attention.self",
            query="attention.self.query",
            key="attention.self.key",
            value="attention.self.value",
            out="attention.output.dense",
            norm="attention.output.LayerNorm",
            counters=("num_attention_heads", "all_head_size"),
            asking=_SHARED,
            start="attention.output",
            residual=1,
            end="attention.output.LayerNorm",
            skips=(Skip("bottleneck.attention", gives="input"), *_ALONE),
        ),
        ffn=FeedForward(
            into="intermediate.dense",
            out="output.dense",
            norm="output.LayerNorm",
            start="intermediate",
            end="output.LayerNorm",
            skips=(
                Skip("intermediate", gives="input"),
                Skip("output.dense", gives="zero"),
                Skip("output.LayerNorm", gives="input"),
            ),
        ),
        project="embeddings.embedding_transformation",
        inner=("embeddings.embedding_transformation", "pooler.dense"),
        head=("classifier.dense",),
        last=("classifier", "qa_outputs"),
        pieces=("cls.predictions.bias", "cls.predictions.dense.weight"),
    )

    def skeleton_of(self, model: PreTrainedModel) -> Skeleton:
        config: Any = model.config
        problem = _problem(config)
        if problem is not None:
            raise ModelError(f"this MobileBERT cannot be read: {problem[0]}.", help=problem[1])
        stacked = tuple(_stacked(place) for place in range(config.num_feedforward_networks - 1))
        inner = self.skeleton.inner if _projects(config) else self.skeleton.inner[1:]
        attention = replace(self.skeleton.attention, asking=None, skips=_ALONE)
        attention = attention if config.use_bottleneck_attention else self.skeleton.attention
        return replace(self.skeleton, attention=attention, stacked=stacked, inner=inner)

    def inputs(self, model: PreTrainedModel) -> tuple[str, ...]:
        return ("input_ids", "attention_mask", "token_type_ids")

    def tiny(self, model_type: str) -> dict[str, Any]:
        sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 24}
        inside = {"intra_bottleneck_size": 32, "embedding_size": 16, "num_feedforward_networks": 2}
        return {**sizes, **inside, "normalization_type": "layer_norm"}


def _stacked(place: int) -> FeedForward:
    """A feed-forward block between the attention and the last one."""
    path = f"ffn.{place}"
    return FeedForward(
        into=f"{path}.intermediate.dense",
        out=f"{path}.output.dense",
        norm=f"{path}.output.LayerNorm",
        start=path,
        end=f"{path}.output.LayerNorm",
        skips=(Skip(path, gives="input"),),
    )


def _projects(config: Any) -> bool:
    """Whether the Linear behind the word table is used."""
    return bool(config.trigram_input or config.embedding_size != config.hidden_size)


def _problem(config: Any) -> tuple[str, str] | None:
    """What a config says that no model of this family computes, and what to say instead."""
    if not config.use_bottleneck:
        return "it has no bottlenecks", "say use_bottleneck: true; a narrow word table alone is an ELECTRA's shape."
    if config.use_bottleneck_attention == config.key_query_shared_bottleneck:
        return (
            "one of use_bottleneck_attention and key_query_shared_bottleneck is true, and the other false",
            "say key_query_shared_bottleneck: true for a bottleneck of queries and keys, as in google/mobilebert-uncased.",
        )
    if config.num_feedforward_networks < 1:
        return "a layer has one feed-forward block or more", "correct num_feedforward_networks."
    if config.intra_bottleneck_size % config.num_attention_heads:
        return (
            f"{config.num_attention_heads} heads do not share {config.intra_bottleneck_size} units evenly",
            "choose an intra_bottleneck_size that num_attention_heads divides.",
        )
    return None
