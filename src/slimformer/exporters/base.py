"""An exporter writes a model as files that a runtime loads without us, and proves that they compute the same.

One file per target format. The proof is part of the export: outputs are compared on real batches of several shapes, and a file
that disagrees is not left behind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimformer.quantizing.ranges import Ranges

Arrays = Mapping[str, np.ndarray]  # model input -> (batch, seq) int64


class Variant(StrEnum):
    """Which file: no one graph suits all runtimes."""

    FLOAT = "float"  # fp32, standard operators only
    FUSED = "fused"  # fp32, fused attention: ONNX Runtime only; the baseline of every ratio
    INT8_DYNAMIC = "int8_dynamic"  # fused attention, dynamic int8: ONNX Runtime only
    INT8_FUSED = "int8_fused"  # the same with ranges from the batches: an answer does not depend on its neighbours in a batch
    INT8_STATIC = "int8_static"  # unfused, static QDQ: ONNX Runtime and OpenVINO


@dataclass(frozen=True)
class Artifact:
    """One exported file and what is known of it."""

    path: Path
    variant: Variant
    size_bytes: int
    max_difference: float  # largest |exported - model| over the outputs of the parity batches
    notes: tuple[str, ...] = ()  # "6 of 6 attentions fused", "int8: 34 of 34 matrices"


class Exporter(ABC):
    """Final frozen dataclasses; fields are options of the format."""

    variants: ClassVar[tuple[Variant, ...]]

    @abstractmethod
    def export(
        self,
        model: PreTrainedModel,
        batches: Sequence[Arrays],
        path: Path,
        variant: Variant,
        outputs: Sequence[str] = ("logits",),
        ranges: Ranges | None = None,
    ) -> Artifact:
        """Writes `path` whole or not at all. `batches` are real inputs of several shapes: the parity check runs on them and
        static int8 takes its ranges from them, unless `ranges` were learned with the model. ExportError where the file disagrees
        with the model."""
