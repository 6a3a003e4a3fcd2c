"""Tiny random models of every supported type; the builder lives in the package, because `slimformer check` uses it too."""

from dataclasses import replace

from slimformer import registry
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.families._student import StudentFamily
from slimformer.families.base import family_of, subject_of
from slimformer.forms.kronecker import Kronecker
from slimformer.forms.low_rank import LowRank
from slimformer.measuring import machine
from slimformer.methods.base import Context
from slimformer.testing.checks import tiny_context
from slimformer.testing.tiny import VOCABULARY, batch, tiny, tiny_config

__all__ = [
    "ENCODERS",
    "HEADS",
    "HEAD_DIM",
    "LAYERS",
    "MODEL_TYPES",
    "SEPARATE",
    "STUDENTS",
    "VOCABULARY",
    "WEIGHT_BITS",
    "batch",
    "factored_context",
    "tiny",
    "tiny_config",
]

_EVERY = tuple(kind for name in registry.names("families") for kind in registry.find("families", name).model_types)
STUDENTS = tuple(kind for kind in _EVERY if isinstance(family_of(kind), StudentFamily))  # they have no layers
MODEL_TYPES = tuple(kind for kind in _EVERY if kind not in STUDENTS)
ENCODERS = tuple(kind for kind in MODEL_TYPES if not family_of(kind).decodes)
SEPARATE = tuple(
    kind for kind in ENCODERS if family_of(kind).skeleton.attention.parts == 1
)  # with three matrices for Q, K and V
HEADS, HEAD_DIM, LAYERS = 4, 8, 3  # of all of them
# Of int8 files whose numbers a test compares: on a processor whose int8 sums saturate, 8 bits give other numbers than the graph says.
WEIGHT_BITS = 7 if machine.saturates(machine.environment().flags) else 8


def factored_context(model_type: str) -> Context:
    """A context around a tiny model with a factored word table, matrices in every order of their steps, in sums too, and of low
    rank."""
    around = tiny_context(model_type)
    forms = {
        "embeddings.word": Kronecker((VOCABULARY, 8)),
        "encoder.0.query": Kronecker((16, 16)),
        "encoder.0.key": Kronecker((16, 2), 2),
        "encoder.0.attention_out": Kronecker((2, 2)),
        "encoder.0.ffn_in": Kronecker((8, 2), 2),
        "encoder.1.key": LowRank(5),
        "encoder.1.ffn_out": LowRank(7),
        "encoder.2.value": Kronecker((2, 16)),
        "encoder.2.ffn_out": Kronecker((2, 6), 3),
    }
    model = shrink(around.model, around.anatomy, Plan(forms=forms))
    return replace(around, subject=subject_of(model))
