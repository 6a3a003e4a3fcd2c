"""What becomes of the one output of a reranker: the score that its users see, as sentence-transformers' CrossEncoder makes it.

The facts stand in config.json as that package has them; `saving/cross_encoder.py` reads and writes the files around.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from slimformer.errors import ModelError, shown

if TYPE_CHECKING:
    import numpy as np
    from transformers import PretrainedConfig

ScoreActivation = Literal["sigmoid", "identity"]

RELEVANCE = "score"  # the output of an exported reranker, beside "logits"
CROSS_ENCODER = "CrossEncoder"  # the class of sentence-transformers that loads a reranker
_FIELD, _INNER = "sentence_transformers", "activation_fn"  # of config.json, since version 4
_OLD_FIELD = "sbert_ce_default_activation_function"  # of versions before 4
_PATHS: dict[ScoreActivation, str] = {
    "sigmoid": "torch.nn.modules.activation.Sigmoid",
    "identity": "torch.nn.modules.linear.Identity",
}


def score_activation(config: PretrainedConfig | Mapping[str, Any]) -> ScoreActivation | None:
    """What is applied to the output by a model's config; None if it does not say. ModelError if that is not computed here.

    >>> score_activation({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}})
    'sigmoid'
    >>> score_activation({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"})
    'identity'
    """

    def get(name: str) -> Any:
        return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)

    inside = get(_FIELD)
    said = inside.get(_INNER) if isinstance(inside, Mapping) else None
    said = get(_OLD_FIELD) if said is None else said
    if said is None:
        return None
    for name, path in _PATHS.items():
        if isinstance(said, str) and said.rpartition(".")[2] == path.rpartition(".")[2]:
            return name
    raise ModelError(
        f"the model's scores go through {shown(said)}, which is not computed here.",
        facts=[f"known: {', '.join(_PATHS.values())}"],
        help="a monotonous function changes no order: name one of these as activation_fn in config.json.",
    )


def relevance_of(logits: np.ndarray, activation: ScoreActivation) -> np.ndarray:
    """What users see of a reranker's outputs, of the same shape."""
    if activation == "identity":
        return logits
    from scipy.special import expit

    scores: np.ndarray = expit(logits)
    return scores


def activation_facts(activation: ScoreActivation) -> dict[str, Any]:
    """The fields of config.json that say it to all versions of sentence-transformers."""
    return {_FIELD: {_INNER: _PATHS[activation]}, _OLD_FIELD: _PATHS[activation]}
