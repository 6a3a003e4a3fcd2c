"""The tables that BART, mBART and Marian share: one layer of an encoder or a decoder, with the norm behind each sublayer or
in front of it.

The layer adds the residual itself, so that a sublayer is taken out by an addend of zero and a norm that does nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from slimformer.core.anatomy import Skip
from slimformer.families._skeleton import Attention, FeedForward, Skeleton, StackTable, Surroundings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def encoder_decoder(*, pre_norm: bool, embedding_norm: str | None, norm: str | None = None) -> Skeleton:
    """Two stacks of such layers; `embedding_norm` and `norm` are the names of the norms around each, if there are such."""
    encoder, decoder = (_stack(name, pre_norm, embedding_norm, norm) for name in ("encoder", "decoder"))
    return Skeleton(
        **(encoder | {"words": ("shared", "encoder.embed_tokens")}),
        hidden_size="d_model",
        head=("classification_head.dense",),
        last=("lm_head", "classification_head.out_proj", "qa_outputs"),
        decoder=StackTable(**decoder),
        pieces=("final_logits_bias",),
    )


def tiny_sizes() -> dict[str, Any]:
    """Config options for a tiny model of any of them."""
    sizes = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    return {**sizes, "encoder_attention_heads": 4, "decoder_attention_heads": 4, **ids}


def around(model: PreTrainedModel, first_position: int) -> Surroundings:
    """What each of them computes around its layers; `first_position`: the row of a table of positions that the first token gets."""
    config = model.config
    return Surroundings(
        activation=config.activation_function,
        positions=("model.encoder.embed_positions", "model.decoder.embed_positions"),
        first_position=first_position,
        word_scale=math.sqrt(config.d_model) if config.scale_embedding else 1.0,
        last_bias="final_logits_bias",
    )


def _stack(name: str, pre_norm: bool, embedding_norm: str | None, norm: str | None) -> dict[str, Any]:
    decodes = name == "decoder"
    return {
        "attention_heads": f"{name}_attention_heads",
        "layers": f"{name}.layers",
        "attention": _attention("self_attn", pre_norm, counts=decodes),
        "cross": _attention("encoder_attn", pre_norm) if decodes else None,
        "ffn": FeedForward(
            into="fc1",
            out="fc2",
            norm="final_layer_norm",
            start="final_layer_norm" if pre_norm else "fc1",
            end=None if pre_norm else "final_layer_norm",
            skips=(Skip("fc1", gives="zero"), Skip("fc2", gives="zero"), Skip("final_layer_norm", gives="input")),
        ),
        "embedding": () if embedding_norm is None else (f"{name}.{embedding_norm}",),
        "words": (f"{name}.embed_tokens",),
        "embedding_norm": None if embedding_norm is None else f"{name}.{embedding_norm}",
        "norm": None if norm is None else f"{name}.{norm}",
    }


def _attention(module: str, pre_norm: bool, *, counts: bool = False) -> Attention:
    norm = f"{module}_layer_norm"
    return Attention(
        module=module,
        query=f"{module}.q_proj",
        key=f"{module}.k_proj",
        value=f"{module}.v_proj",
        out=f"{module}.out_proj",
        norm=norm,
        counters=("num_heads",),
        start=norm if pre_norm else module,
        end=None if pre_norm else norm,
        skips=(Skip(module, gives="zero", pair=True, counts=counts), Skip(norm, gives="input")),
    )
