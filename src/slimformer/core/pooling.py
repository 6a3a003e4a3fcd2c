"""How the hidden states of a text become one vector: pooling, linear layers behind it, and whether the vector has length 1.

The facts stand in config.json under SENTENCE_VECTOR; `saving/sentence_folder.py` reads and writes them as sentence-transformers has them,
`families/_embedder.py` computes them. Plain data: neither torch nor transformers is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from slimformer.errors import ModelError, shown

SENTENCE_VECTOR = "sentence_embedding"  # the field of config.json, and the name of the model's output
TOKEN_VECTORS = "last_hidden_state"  # the output with the hidden states, by which other tools make the vector themselves
EMBEDDER = "AutoModelForSentenceEmbedding"  # what such models would be called among transformers' Auto classes
POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")  # in the order in which they are joined
VECTOR_ACTIVATIONS = {  # of a linear layer -> torch's class
    "identity": "torch.nn.modules.linear.Identity",
    "tanh": "torch.nn.modules.activation.Tanh",
    "relu": "torch.nn.modules.activation.ReLU",
    "gelu": "torch.nn.modules.activation.GELU",
    "sigmoid": "torch.nn.modules.activation.Sigmoid",
}
QUERY, PASSAGE = "query", "passage"
_PASSAGES = (PASSAGE, "document", "corpus", "doc")  # names that the prompt of passages has
_MOST = 1_000_000  # numbers in a vector; more is no model's


@dataclass(frozen=True)
class DenseLayer:
    """A linear layer behind the pooling, with its activation."""

    in_features: int
    out_features: int
    bias: bool = False
    activation: str = "identity"


@dataclass(frozen=True)
class VectorHead:
    """What makes one vector of the hidden states of a text, (batch, seq, hidden) -> (batch, dimension).

    Attributes:
        pooling: One or several of POOLINGS; the vectors of several stand side by side.
        normalize: Whether the vector is brought to length 1.
        dense: Linear layers between pooling and length.
        prompts: What is put before a text, by name: "query" and "passage" mostly.
        default_prompt: The name of the prompt that is taken if none is named.
        max_length: Tokens that a text may have; None if only the model's positions bound it.
        lower: Whether texts are put into lower case before they are split.
        similarity: How vectors are meant to be compared, "cosine" or "dot"; None if nobody said.

    >>> head = VectorHead(("mean",), True, (DenseLayer(384, 128),))
    >>> head.dimension(384), VectorHead.from_config(head.to_config()) == head
    (128, True)
    """

    pooling: tuple[str, ...] = ("mean",)
    normalize: bool = True
    dense: tuple[DenseLayer, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    max_length: int | None = None
    lower: bool = False
    similarity: str | None = None

    @property
    def sides(self) -> tuple[str | None, str | None]:
        """The prompt of queries and that of passages; None if there is none of that name."""
        return self.prompts.get(QUERY), next((self.prompts[name] for name in _PASSAGES if name in self.prompts), None)

    @property
    def reads_all(self) -> bool:
        """Whether the vector depends on the hidden states of all tokens, not of the first one alone."""
        return any(mode != "cls" for mode in self.pooling)

    def dimension(self, hidden: int) -> int:
        """Numbers in a vector, of a model with hidden states of this width."""
        return self.dense[-1].out_features if self.dense else hidden * len(self.pooling)

    def to_config(self) -> dict[str, Any]:
        """The facts as plain data, for config.json."""
        return asdict(replace(self, prompts=dict(self.prompts))) | {"pooling": list(self.pooling)}

    @classmethod
    def from_config(cls, data: Any) -> VectorHead:
        """The facts that `to_config` gave; ModelError for anything else."""
        try:
            layers = tuple(DenseLayer(**layer) for layer in data.get("dense", ()))
            head = cls(**{**data, "pooling": tuple(data["pooling"]), "dense": layers})
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            raise ModelError(
                f"config.json says {SENTENCE_VECTOR}: {shown(data)}, which tells no pooling ({error}).",
                help="copy the whole folder again.",
            ) from None
        head.check()
        return head

    def check(self) -> None:
        """ModelError for facts that no model of ours computes."""
        wrong = ""
        strange = [mode for mode in self.pooling if mode not in POOLINGS]
        sizes = [size for layer in self.dense for size in (layer.in_features, layer.out_features)]
        if strange or not self.pooling:
            wrong = f"the pooling {shown(strange[0] if strange else '')}; known: {', '.join(POOLINGS)}"
        elif any(type(size) is not int or not 0 < size <= _MOST for size in sizes):
            wrong = f"a linear layer of {shown(sizes)} numbers"
        elif any(layer.activation not in VECTOR_ACTIVATIONS for layer in self.dense):
            wrong = f"a linear layer with another activation than {', '.join(VECTOR_ACTIVATIONS)}"
        if wrong:
            raise ModelError(
                f"the vector of a text is made by {wrong}.", help="take a model whose vectors are made in one of these ways."
            )


def vector_head(config: Any) -> VectorHead | None:
    """The head that a config tells, a mapping or one of transformers; None if it tells none."""
    data = config.get(SENTENCE_VECTOR) if isinstance(config, Mapping) else getattr(config, SENTENCE_VECTOR, None)
    return None if data is None else VectorHead.from_config(data)
