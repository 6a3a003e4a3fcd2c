"""An exporter writes a model as files that a runtime loads without slimformer, and proves that they compute the same.

One file per target format. The proof is part of the export: outputs are compared on real batches of several shapes, and no file
that disagrees is left behind. The names of all delivered files stand here, because benching and reporting read folders
without the packages that write them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from slimformer.decoding import DECODER, ENCODER, decoder_beside

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimformer.core.ranges import Ranges

Arrays = Mapping[str, np.ndarray]  # model input -> (batch, seq) int64
WEIGHTS_BESIDE = (
    "_data",
    ".data",
)  # ends of the names of files with an ONNX file's weights: ours and optimum's, then PyTorch's
LAYERS = "layers"  # an output of files with exits: how many layers were computed for each input
PARTS = ("passage", "question", "joint")  # of a model whose lower layers keep two texts apart: files beside the whole one
MODEL_DIGEST = "slimformer_model"  # the key in the metadata of these that names the whole one
SEARCH_SECONDS = 180.0  # a search for matrices that stay in float takes at most about this long


class Variant(StrEnum):
    """The ONNX files: no one graph suits all runtimes."""

    FLOAT = "float"  # fp32, standard operators only
    FUSED = "fused"  # fp32, fused attention: ONNX Runtime only; the baseline of every ratio
    INT8_DYNAMIC = "int8_dynamic"  # fused attention, dynamic int8: ONNX Runtime only
    INT8_FUSED = "int8_fused"  # the same with ranges from the batches: an answer does not depend on its neighbours in a batch
    INT8_STATIC = "int8_static"  # unfused, static QDQ: ONNX Runtime and OpenVINO
    INT8_KERNELS = "int8_kernels"  # the encoder as one operator: ONNX Runtime with slimformer-kernels

    @property
    def int8(self) -> bool:
        """Whether its matrices are in int8."""
        return self.startswith("int8")


@dataclass(frozen=True)
class FileKind:
    """A kind of file that an exporter writes, as a delivered folder and the tables name it."""

    name: str  # of the file
    label: str  # in tables
    about: str  # on the model card, after the name
    int8: bool = False
    shipped: bool = True  # whether a run delivers it; the others are written to be measured
    folder: str = ""  # it lies in this folder of the delivered one, beside a config and a tokenizer; "" means at the top

    @property
    def place(self) -> str:
        """The file's path in a delivered folder."""
        return f"{self.folder}/{self.name}" if self.folder else self.name


OPENVINO = FileKind(
    "openvino_model.xml",
    "OpenVINO int8",
    "int8 by NNCF, with its weights in openvino_model.bin: OpenVINO only",
    int8=True,
    folder="openvino",
)
KERNELS_DOMAIN = "slimformer"  # of their operators in ONNX files
SLIM = FileKind(  # written beside the files of `onnx`, where the kernels are installed and it is the fastest
    "model_slim.onnx",
    "int8 kernels",
    "int8 for the kernels, which skip zeros and padding: ONNX Runtime with `slimformer-kernels`, opened by "
    "`slimformer.kernels.session`",
    int8=True,
    folder="onnx",
)
# Files are named and placed as other tools look for them (optimum, transformers.js, sentence-transformers): onnx/model_quantized.onnx.
# The int8 file for ONNX Runtime has fixed ranges, not dynamic ones: docs/decisions/0002-onnx-graphs.md
FILES: Mapping[str, FileKind] = {
    Variant.FLOAT: FileKind("model.onnx", "fp32", "fp32, standard operators: any ONNX runtime", folder="onnx"),
    Variant.FUSED: FileKind("model_fused.onnx", "fp32 fused", "fp32 with fused attention: ONNX Runtime only", shipped=False),
    Variant.INT8_DYNAMIC: FileKind(
        "model_int8_dynamic.onnx", "int8 dynamic", "dynamic int8: ONNX Runtime only", int8=True, shipped=False
    ),
    Variant.INT8_FUSED: FileKind(
        "model_quantized.onnx", "int8", "int8 with fused attention: ONNX Runtime only", int8=True, folder="onnx"
    ),
    Variant.INT8_STATIC: FileKind(
        "model_int8.onnx", "int8 static", "static int8 (QDQ): ONNX Runtime and OpenVINO", int8=True, folder="onnx"
    ),
}
# An encoder-decoder is two files, named by its encoder; the decoder lies beside it (`decoder_beside`).
PAIRS: Mapping[str, FileKind] = {
    variant: replace(kind, name=kind.name.replace("model", ENCODER, 1), about=f"{kind.about}; with {DECODER}{kind.name[5:]}")
    for variant, kind in FILES.items()
}
SHIPPED = tuple(variant for variant, kind in FILES.items() if kind.shipped)


def variant_of(file: str) -> Variant | None:
    """The variant of an ONNX file by its name in a delivered folder; None for any other name."""
    every = (FILES, PAIRS, {Variant.INT8_KERNELS: SLIM})
    return next((Variant(variant) for kinds in every for variant, kind in kinds.items() if kind.name == file), None)


def is_pair(path: Path) -> bool:
    """Whether a file is the encoder of an encoder-decoder, which stands for both of its files."""
    return path.name.startswith(ENCODER) and path.suffix == ".onnx"


def files_of(path: Path) -> tuple[Path, ...]:
    """A model file, and the files beside it that belong to it and must be copied with it: its weights, and a decoder.

    Protobuf ends at 2 GB, so that larger ONNX models keep their weights beside the file, and OpenVINO's .xml always does.
    """
    beside = (
        [path.with_suffix(".bin")] if path.suffix == ".xml" else [path.with_name(path.name + end) for end in WEIGHTS_BESIDE]
    )
    own = (path, *(file for file in beside if file.is_file()))
    decoder = decoder_beside(path)
    return (*own, *files_of(decoder)) if is_pair(path) and decoder.is_file() else own


def part_path(whole: Path, part: str) -> Path:
    """Where a part of a model file lies.

    >>> part_path(Path("onnx/model_quantized.onnx"), "passage").name
    'model_quantized_passage.onnx'
    """
    return whole.with_name(f"{whole.stem}_{part}{whole.suffix}")


@dataclass(frozen=True)
class Artifact:
    """One exported file and what is known of it."""

    path: Path
    variant: str
    size_bytes: int  # with the files of its weights
    max_difference: float  # largest |exported - model| over the outputs of the parity batches
    notes: tuple[str, ...] = ()  # "6 of 6 attentions fused", "int8: 34 of 34 matrices"

    @property
    def files(self) -> tuple[Path, ...]:
        """The file, and those beside it that hold its weights."""
        return files_of(self.path)


@dataclass(frozen=True)
class Assignment:
    """The precision of the matrices that read a point, and the reason."""

    point: str
    int8: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.point}: {'int8' if self.int8 else 'float'}; {self.reason}"


@dataclass(frozen=True)
class MixedPrecision:
    """Points whose matrices stay in float, the assignment of each point, and the points that the file loses on validation examples."""

    floats: tuple[str, ...]
    assignments: tuple[Assignment, ...]
    loss: float
    within: bool  # whether the loss is allowed


class Draft(ABC):
    """A model that was traced once, from which an exporter writes any variant, with any of its matrices left in float."""

    @abstractmethod
    def write(self, path: Path, variant: str, floats: Sequence[str] = ()) -> Artifact:
        """Writes one variant, compared with the model; the matrices that read the points `floats` stay in float."""

    @abstractmethod
    def mix(
        self,
        loss: Callable[[Path], float],
        allowed: float,
        *,
        tokens: int,
        threads: int,
        folder: Path,
        seconds: float = SEARCH_SECONDS,
    ) -> MixedPrecision:
        """Searches the fewest matrices that must stay in float.

        Those that int8 does not make faster here, for `tokens` at once on `threads`, stay in float; so do as few others as bring the
        loss of an int8 file to `allowed`. `loss` gives the points that a file loses; files to be tried are written into `folder`.
        """


class Exporter(ABC):
    """Final frozen dataclasses; fields are options of the format.

    `files`: each variant that it writes, in the order in which a run delivers and shows them.
    """

    files: ClassVar[Mapping[str, FileKind]]
    quick_variant: ClassVar[str] = Variant.INT8_FUSED  # whose speed a search goes by

    def available(self) -> bool:
        """Whether what it needs is installed."""
        return True

    def check(self, kind: str, *, branches: bool) -> None:
        """Refuses, before anything is trained, what cannot be exported: models of this type, or with exits, sieves, segments that
        attend apart, or heads that attend by patterns (`branches`).

        ExtraError if what it needs is not installed, ExportError for a model.
        """

    def kinds_for(self, model: PreTrainedModel) -> Mapping[str, FileKind]:
        """`files`, as they are called for this model: an encoder-decoder may be more than one file."""
        return self.files

    @abstractmethod
    def export(
        self,
        model: PreTrainedModel,
        batches: Sequence[Arrays],
        path: Path,
        variant: str,
        outputs: Sequence[str] = ("logits",),
        ranges: Ranges | None = None,
    ) -> Artifact:
        """Writes `path` whole or not at all.

        `batches` are real inputs of several shapes: the file is compared with the model on them, and static int8 takes its ranges
        from them, unless `ranges` were learned with the model. Raises ExportError if the file disagrees with the model.
        """

    def export_all(
        self,
        model: PreTrainedModel,
        batches: Sequence[Arrays],
        paths: Mapping[str, Path],
        outputs: Sequence[str] = ("logits",),
        ranges: Ranges | None = None,
    ) -> dict[str, Artifact]:
        """Writes several variants; the others stay if one of them is refused."""
        return {name: self.export(model, batches, path, name, outputs, ranges) for name, path in paths.items()}

    def export_parts(
        self,
        whole: Path,
        model: PreTrainedModel,
        batches: Sequence[Arrays],
        variant: str,
        outputs: Sequence[str] = ("logits",),
    ) -> tuple[Path, ...]:
        """Writes the PARTS of an exported file beside it, if the lower layers of its model keep two texts apart; else nothing.

        They are compared with the whole file on the pairs in `batches`. ExportError if they disagree.
        """
        return ()

    def draft(
        self,
        model: PreTrainedModel,
        batches: Sequence[Arrays],
        outputs: Sequence[str] = ("logits",),
        ranges: Ranges | None = None,
    ) -> Draft | None:
        """The model traced once, or None if single matrices of this format cannot stay in float."""
        return None
