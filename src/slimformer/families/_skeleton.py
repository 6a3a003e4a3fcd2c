"""The table that a family fills in: the names of the modules that make up its layers, its embeddings and its heads.

Only names, no model and no torch; `_builder.py` turns the table and a model into an anatomy. Names in a block are
relative to its layer, names in a `Skeleton` to the base model (the model without its head), if nothing else is said.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

from slimformer.core.anatomy import Skip

AnyBlock = TypeVar("AnyBlock", bound="Block")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One sublayer. `start`: the module whose first input is the residual; `end`: the one whose output has the residual added.

    `skips`: what stands in for the sublayer's modules once it is gone.
    """

    start: str
    end: str
    norm: str
    skips: tuple[Skip, ...]

    def under(self: AnyBlock, path: str) -> AnyBlock:
        """The same block with the full names of its modules, in the layer at `path`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        names = {name: f"{path}.{value}" for name, value in values.items() if isinstance(value, str)}
        return replace(self, **names, skips=tuple(replace(skip, module=f"{path}.{skip.module}") for skip in self.skips))


@dataclass(frozen=True, kw_only=True)
class Attention(Block):
    """An attention: the module that computes it, and its four Linears.

    `counters`: the attributes of `module` that hold the number of its heads, and that number times the size of a head.
    """

    module: str
    query: str
    key: str
    value: str
    out: str
    counters: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class FeedForward(Block):
    """Two Linears with an activation between them."""

    into: str
    out: str


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """A stack of layers, each an attention and a feed-forward block, on top of embeddings and below a head.

    `embedding`: the first of these modules that a model has gives the hidden state before layer 0. `inner`: Linears
    outside the layers and heads. `head`: Linears of heads, by full name, in front of the `last`, which give the
    outputs. Models need not have all.
    """

    hidden_size: str = "hidden_size"  # its name in the config
    attention_heads: str = "num_attention_heads"  # its name in the config
    layers: str
    attention: Attention
    ffn: FeedForward
    embedding: tuple[str, ...] = ("embeddings",)
    words: str = "embeddings.word_embeddings"
    embedding_norm: str = "embeddings.LayerNorm"
    inner: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    last: tuple[str, ...] = ("classifier", "qa_outputs")
