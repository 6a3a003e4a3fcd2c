"""Tiny random models of every supported type; the builder lives in the package, because `slimformer check` uses it too."""

from slimformer.tiny import HEAD_DIM, HEADS, LAYERS, MODEL_TYPES, VOCABULARY, WIDTH, batch, tiny, tiny_config

__all__ = ["HEADS", "HEAD_DIM", "LAYERS", "MODEL_TYPES", "VOCABULARY", "WIDTH", "batch", "tiny", "tiny_config"]
