"""The files of `onnx`, and one more for the compiled kernels, which skip zeros and padding: `export: {to: kernels}`.

Needs the extra `slimformer[kernels]`. All files are tried alike, so the kernels' own is called the best where it is the fastest within
the loss. With `to: onnx` it is written too where the kernels are installed, but never called the best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, final

from slimformer.core.ranges import Ranges
from slimformer.errors import ExportError
from slimformer.exporters._kernels.model_file import save_model_file
from slimformer.exporters._kernels.packing import KERNEL_TYPES
from slimformer.exporters._onnx.parity import check_parity, run_model
from slimformer.exporters.base import FILES, SLIM, Arrays, Artifact, Exporter, FileKind, Variant
from slimformer.exporters.onnx import Onnx
from slimformer.families.base import subject_of
from slimformer.kernels.library import installed, library_path
from slimformer.kernels.sessions import session

__all__ = ["Kernels", "save_model_file"]

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@final
@dataclass(frozen=True)
class Kernels(Exporter):
    """`block_rows`: the outputs of a block whose zeros are skipped: 1, 2, 4 or 16 (by 4 inputs), 0 for none, or the fastest for each
    matrix ("auto"). `agreement`: the least share of the rows of the batches on which an int8 file gives the model's answer.
    """

    block_rows: Literal[0, 1, 2, 4, 16, "auto"] = "auto"
    agreement: float = 0.0

    files: ClassVar[Mapping[str, FileKind]] = {**FILES, Variant.INT8_KERNELS: replace(SLIM, shipped=True)}

    quick_variant: ClassVar[str] = Variant.INT8_KERNELS

    @property
    def standard(self) -> Exporter:
        """The exporter of the other files."""
        return Onnx(agreement=self.agreement)

    def available(self) -> bool:
        return installed()

    def check(self, kind: str, *, branches: bool) -> None:
        library_path()
        if kind not in KERNEL_TYPES:
            raise ExportError(
                f"the kernels do not compute models of the type {kind}.",
                help=f"export to onnx; they know {', '.join(KERNEL_TYPES)}.",
            )
        if branches:
            raise ExportError(
                "the kernels compute all words in all layers alike: no exits, no sieves, no segments that attend apart, "
                "no heads that attend by patterns.",
                help="export to onnx.",
            )

    def export(
        self,
        model: PreTrainedModel,
        batches: Sequence[Arrays],
        path: Path,
        variant: str,
        outputs: Sequence[str] = ("logits",),
        ranges: Ranges | None = None,
    ) -> Artifact:
        return self.export_all(model, batches, {variant: path}, outputs, ranges)[variant]

    def export_all(
        self,
        model: PreTrainedModel,
        batches: Sequence[Arrays],
        paths: Mapping[str, Path],
        outputs: Sequence[str] = ("logits",),
        ranges: Ranges | None = None,
    ) -> dict[str, Artifact]:
        others = {variant: path for variant, path in paths.items() if variant != Variant.INT8_KERNELS}
        made = self.standard.export_all(model, batches, others, outputs, ranges) if others else {}
        slim = paths.get(Variant.INT8_KERNELS)
        return made if slim is None else made | {Variant.INT8_KERNELS: self._slim(model, batches, slim, outputs)}

    def _slim(self, model: PreTrainedModel, batches: Sequence[Arrays], path: Path, outputs: Sequence[str]) -> Artifact:
        if not batches:
            raise ExportError("no batches to check the file with.", help="give export() some real inputs.")
        subject = subject_of(model)
        save_model_file(model, path, block_rows=self.block_rows)
        try:
            with subject.evaluating():
                reference = [run_model(subject, batch, outputs) for batch in batches]
            difference, agreeing = check_parity(
                session(path, 1),
                Variant.INT8_KERNELS,
                batches,
                subject.inputs,
                reference,
                tolerance=None,
                agreement=self.agreement,
            )
        except BaseException:
            path.unlink()
            raise
        rows = sum(len(next(iter(item.values()))) for item in reference)
        note = f"{agreeing:.1%} of {rows} rows answer as before"
        return Artifact(path, Variant.INT8_KERNELS, path.stat().st_size, difference, (note,))
