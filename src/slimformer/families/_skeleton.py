"""The table that a family fills in: the names of the modules that make up its layers, its embeddings and its heads.

Only names, no model and no torch; `_builder.py` turns the table and a model into an anatomy. Names in a block are
relative to its layer, names of a `StackTable` and a `Skeleton` to the base model (the model without its head), if nothing else
is said.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from slimformer.core.anatomy import Skip

AnyBlock = TypeVar("AnyBlock", bound="Block")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One sublayer. `start`: the module whose first input is the residual; `end`: the one whose output has the residual added.

    Without an `end` the layer adds the residual itself and nothing follows: `start` is then the norm that the sublayer begins
    with. `skips`: what stands in for the sublayer's modules once it is gone. `residual`: which input of `start`
    it is, if not the first.
    """

    start: str
    residual: int = 0
    end: str | None = None
    norm: str
    skips: tuple[Skip, ...]

    def under(self: AnyBlock, path: str) -> AnyBlock:
        """The same block with the full names of its modules, in the layer at `path`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: f"{path}.{value}" for name, value in values.items() if isinstance(value, str)}
        return replace(self, **changed, skips=tuple(replace(skip, module=f"{path}.{skip.module}") for skip in self.skips))


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """A Linear that changes the width of the hidden states inside of a layer, and the norm behind it."""

    dense: str
    norm: str

    def under(self, path: str) -> Bottleneck:
        """The same with the full names of its modules, in the layer at `path`."""
        return Bottleneck(dense=f"{path}.{self.dense}", norm=f"{path}.{self.norm}")


@dataclass(frozen=True, kw_only=True)
class Attention(Block):
    """An attention: the module that computes it, and its four Linears; `query`, `key` and `value` may all name one, which then gives the
    three side by side.

    `counters`: the attribute of `module` that holds the number of its heads, and one that holds that number times the size of a
    head, if it has one. `shares_bias`: whether it adds a bias for each head to its scores that all of its stack share. `asking`: the
    bottleneck in front of queries and keys alone; the values then read the hidden states of the layer as they are. `terms`: how many
    products of queries or keys with relative positions its scores have beside their own, `places` the Linears that make the keys
    and queries of positions, if it has some for these alone.
    """

    module: str
    query: str
    key: str
    value: str
    out: str
    counters: tuple[str, ...] = ()
    shares_bias: bool = False
    asking: Bottleneck | None = None
    terms: int = 0
    places: tuple[str, ...] = ()

    def under(self, path: str) -> Attention:
        block = replace(super().under(path), places=tuple(f"{path}.{name}" for name in self.places))
        return block if self.asking is None else replace(block, asking=self.asking.under(path))

    @property
    def inputs(self) -> tuple[str, ...]:
        """The Linears that give queries, keys and values: three, or one."""
        return tuple(dict.fromkeys((self.query, self.key, self.value)))

    @property
    def parts(self) -> int:
        """How many of the three each of these gives."""
        return 3 // len(self.inputs)


@dataclass(frozen=True, kw_only=True)
class FeedForward(Block):
    """Two Linears with an activation between them; with a `gate`, a third one beside the first, whose outputs multiply its own.

    `gate` may name the module `into`, which then gives both side by side.
    """

    into: str
    gate: str | None = None
    out: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """The Linears that read the hidden states."""
        return (self.into,) if self.gate in (None, self.into) else (self.into, str(self.gate))

    @property
    def parts(self) -> int:
        """How many outputs each of these has for a neuron."""
        return 2 if self.gate == self.into else 1


BERT_FFN = FeedForward(  # of BERT, and of all in transformers that took its layers over
    into="intermediate.dense",
    out="output.dense",
    norm="output.LayerNorm",
    start="intermediate",
    end="output",
    skips=(Skip("intermediate", gives="input"), Skip("output", gives="residual")),
)


@dataclass(frozen=True, kw_only=True)
class StackTable:
    """A stack of layers: each has an attention, in a decoder one that asks the encoder (`cross`), and a feed-forward block.

    `attention_heads`: the name of their number in the config. `embedding`: the first of these modules that a model has gives
    the hidden state before layer 0; none if no module gives just that. `words`: the first of these that a model has is the word
    table. `embedding_norm`: the norm behind the embeddings, `norm` the one behind the last layer, if there are such. `stacked`:
    feed-forward blocks between the attention and the last one. `narrow` and `widen`: the bottlenecks that a layer begins and ends
    with; what lies between them is as wide as the field `inner_width` of the config says. `beside`: modules beside the layers that all
    attentions read, if a model has them.
    """

    attention_heads: str = "num_attention_heads"
    layers: str
    attention: Attention
    cross: Attention | None = None
    ffn: FeedForward
    embedding: tuple[str, ...] = ("embeddings",)
    words: tuple[str, ...] = ("embeddings.word_embeddings",)
    embedding_norm: str | None = "embeddings.LayerNorm"
    norm: str | None = None
    stacked: tuple[FeedForward, ...] = ()
    narrow: Bottleneck | None = None
    widen: Bottleneck | None = None
    inner_width: str | None = None
    beside: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Skeleton(StackTable):
    """An encoder on top of embeddings, and a decoder beside it if there is one, below a head.

    `head_dim`: the name of the size of a head in the config; without it, heads share the hidden size. `project`: the
    Linear between embeddings and layers of another width, if a model has it. `inner`: Linears outside the layers and heads. `head`:
    Linears of heads, by full name, in front of the `last`, which give the outputs. Models need not have all. `pieces`: other
    tensors, by full name, whose last axis has an entry for each word piece; the word table and the Linear that gives words are
    known without.
    """

    hidden_size: str = "hidden_size"  # its name in the config
    head_dim: str | None = None
    project: str | None = None
    inner: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    last: tuple[str, ...] = ("classifier", "qa_outputs")
    decoder: StackTable | None = None
    pieces: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What an encoder-decoder computes around its layers, as a file for another runtime must know it.

    `activation`: transformers' name of the function between the matrices of a feed-forward block. `positions`: the modules whose
    tables are added to the words of the encoder and of the decoder, from the row `first_position` on; none if positions are
    in a bias of the scores. Words are multiplied by `word_scale` before that, the decoder's last state by `last_scale` before
    the last matrix. `last_bias`: the buffer that is added to the scores of all words, if there is one.
    """

    activation: str
    positions: tuple[str, str] | None = None
    first_position: int = 0
    word_scale: float = 1.0
    last_scale: float = 1.0
    last_bias: str | None = None
