"""The ranges that activations span: learned in training, saved as ranges.json, read by all that put values on a grid.

A `Range` is two numbers; `Ranges` holds those of a whole model by the ids of its points, with the bits they were
learned for. `quantizing/calibration.py` finds a range from a sample, `quantizing/grids.py` puts tensors on grids. This
file needs numpy alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import numpy as np

from slimformer.errors import ModelError

RANGES_FILE = "ranges.json"
RANGES_VERSION = 1
WIDEST = float(np.finfo(np.float32).max) / 4  # of either end: the width and its steps stay float32
NARROWEST = 1e-8  # of a step: a unit that is always 0 must not divide by 0


def check_bits(name: str, bits: int, least: int = 2, most: int = 8) -> None:
    """ValueError unless `bits` is a width that a grid can have."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not least <= bits <= most:
        raise ValueError(f"{name} must be from {least} to {most}, got {bits}")


@dataclass(frozen=True)
class Range:
    """From `low` to `high`; ValueError for a range of no width, or of one that float32 cannot hold."""

    low: float
    high: float

    def __post_init__(self) -> None:
        ends = (self.low, self.high)
        if not (all(map(math.isfinite, ends)) and self.low < self.high and max(map(abs, ends)) <= WIDEST):
            raise ValueError(f"a range must have a width and finite ends, got {self.low:g} to {self.high:g}")

    def grid(self, bits: int) -> tuple[np.float32, int]:
        """Step and zero point of the 2^bits integers from 0 that span this range and 0, with 0 on the grid exactly."""
        low, high = np.float32(min(self.low, 0.0)), np.float32(max(self.high, 0.0))
        top = 2**bits - 1
        step = np.maximum(np.float32((high - low) / np.float32(top)), np.float32(NARROWEST))
        return step, int(np.clip(np.rint(-low / step), 0, top))


@dataclass(frozen=True)
class Ranges:
    """Learned ranges by the id of a point, and the bits of weights, activations and embedding tables (None: float).

    `weight_buckets`: whether each row of a matrix, and each word of a table, has a grid of its own, or the whole of it one.
    `features`: of points with a range per feature, which files compute in float. `exact_zero`: whether 0 lay on each grid in
    training, as it does in files.
    """

    activations: Mapping[str, Range] = field(default_factory=dict)
    weight_bits: int = 8
    activation_bits: int = 8
    embedding_bits: int | None = 8
    weight_buckets: Literal["row", "tensor"] = "row"
    features: Mapping[str, tuple[Range, ...]] = field(default_factory=dict)
    exact_zero: bool = True

    def __post_init__(self) -> None:
        if self.weight_buckets not in ("row", "tensor"):
            raise ValueError(f"weight_buckets must be row or tensor, got {self.weight_buckets!r}")
        if not isinstance(self.exact_zero, bool):
            raise ValueError(f"exact_zero must be true or false, got {self.exact_zero!r}")
        check_bits("weight_bits", self.weight_bits)
        check_bits("activation_bits", self.activation_bits)
        if self.embedding_bits is not None:
            check_bits("embedding_bits", self.embedding_bits)
        object.__setattr__(self, "activations", MappingProxyType(dict(sorted(self.activations.items()))))
        object.__setattr__(self, "features", MappingProxyType(dict(sorted(self.features.items()))))

    def to_json(self) -> str:
        """The ranges as JSON; `Ranges.from_json` gives them back exactly."""
        bits = {name: getattr(self, name) for name in ("weight_bits", "activation_bits", "embedding_bits", "weight_buckets")}
        activations = {name: [item.low, item.high] for name, item in self.activations.items()}
        features = {name: [[item.low, item.high] for item in spans] for name, spans in self.features.items()}
        more = ({"features": features} if features else {}) | ({} if self.exact_zero else {"exact_zero": False})
        return json.dumps({"version": RANGES_VERSION, **bits, "activations": activations, **more}, indent=1)

    @staticmethod
    def from_json(text: str) -> Ranges:
        """The ranges that `to_json` wrote; ModelError for anything else."""
        try:
            data = json.loads(text)
            if data.pop("version") != RANGES_VERSION:
                raise ValueError(f"it is not of version {RANGES_VERSION}")
            pairs, lists = data.pop("activations").items(), data.pop("features", {}).items()
            activations = {str(name): Range(float(low), float(high)) for name, (low, high) in pairs}
            features = {str(name): tuple(Range(float(low), float(high)) for low, high in spans) for name, spans in lists}
            return Ranges(activations, **data, features=features)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ModelError(
                f"{RANGES_FILE} cannot be read: {error}.", help="make the model again, or calibrate without it."
            ) from None
