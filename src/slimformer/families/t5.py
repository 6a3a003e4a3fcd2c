"""T5 and its kin: the norm in front of each sublayer, no biases, and one table of relative position biases for each stack.

The table has a number for each head, and lies in the first layer; all layers of the stack add it to their scores. It
stays whole: an attention whose heads were cut takes those that it has left, and one that is gone hands the table on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, final

from slimformer.families.base import SETTLED_DECODING, Attention, Family, FeedForward, Skeleton, Skip, StackTable, Surroundings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _attention(shell: str, module: str, *, counts: bool = False) -> Attention:
    path, norm = f"{shell}.{module}", f"{shell}.layer_norm"
    return Attention(
        module=path,
        query=f"{path}.q",
        key=f"{path}.k",
        value=f"{path}.v",
        out=f"{path}.o",
        norm=norm,
        counters=("n_heads", "inner_dim"),
        shares_bias=True,
        start=norm,
        skips=(Skip(path, gives="zero", counts=counts, shares_bias=True), Skip(norm, gives="input")),
    )


def _ffn(shell: str, *, gated: bool) -> FeedForward:
    path, norm = f"{shell}.DenseReluDense", f"{shell}.layer_norm"
    return FeedForward(
        into=f"{path}.wi_1" if gated else f"{path}.wi",
        gate=f"{path}.wi_0" if gated else None,
        out=f"{path}.wo",
        norm=norm,
        start=norm,
        skips=(Skip(path, gives="zero"), Skip(norm, gives="input")),
    )


def _skeleton(*, gated: bool) -> Skeleton:
    return Skeleton(
        attention_heads="num_heads",
        embedding=(),
        embedding_norm=None,
        layers="encoder.block",
        attention=_attention("layer.0", "SelfAttention"),
        ffn=_ffn("layer.1", gated=gated),
        words=("shared",),
        norm="encoder.final_layer_norm",
        hidden_size="d_model",
        head_dim="d_kv",
        head=("classification_head.dense",),
        last=("lm_head", "classification_head.out_proj", "classifier", "qa_outputs"),
        decoder=StackTable(
            attention_heads="num_heads",
            embedding=(),
            embedding_norm=None,
            layers="decoder.block",
            attention=_attention("layer.0", "SelfAttention", counts=True),
            cross=_attention("layer.1", "EncDecAttention"),
            ffn=_ffn("layer.2", gated=gated),
            words=("decoder.embed_tokens",),
            norm="decoder.final_layer_norm",
        ),
    )


@final
class T5(Family):
    model_types: ClassVar[tuple[str, ...]] = ("t5",)
    skeleton: ClassVar[Skeleton] = _skeleton(gated=False)
    gated: ClassVar[Skeleton] = _skeleton(gated=True)  # of version 1.1 and later
    settled: ClassVar[Mapping[str, tuple[Any, ...]]] = SETTLED_DECODING
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    special_tokens: ClassVar[Mapping[str, str]] = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}

    def skeleton_of(self, model: PreTrainedModel) -> Skeleton:
        return self.gated if model.config.is_gated_act else self.skeleton

    def surroundings(self, model: PreTrainedModel) -> Surroundings:
        config = model.config
        return Surroundings(
            activation=config.dense_act_fn, last_scale=config.d_model**-0.5 if config.scale_decoder_outputs else 1.0
        )

    def positions(self, config: Mapping[str, Any]) -> int | None:
        return None  # distances have no end

    def tiny(self, model_type: str) -> dict[str, Any]:
        sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 24, "num_layers": 3, "feed_forward_proj": "gated-gelu"}
        bias = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
        return {**sizes, **bias, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
