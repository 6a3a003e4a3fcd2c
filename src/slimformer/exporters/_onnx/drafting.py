"""What the drafts of all ONNX files have in common: which matrices stay in float, how that is searched, and what is said of int8."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import onnx_ir

from slimformer.core.anatomy import PointRole
from slimformer.core.ranges import Ranges
from slimformer.errors import ExportError, nearest
from slimformer.exporters._onnx import mixed
from slimformer.exporters._onnx.graph import Product, products
from slimformer.exporters._onnx.int8 import Sample
from slimformer.exporters._onnx.noting import in_model
from slimformer.exporters.base import FILES, SEARCH_SECONDS, Draft, MixedPrecision, Variant
from slimformer.families.base import Subject
from slimformer.forms.base import Formed
from slimformer.quantizing.calibration import Calibration

if TYPE_CHECKING:
    from slimformer.core.anatomy import Point

FUSED = {Variant.FUSED, Variant.INT8_DYNAMIC, Variant.INT8_FUSED}
INT8 = {variant for variant, kind in FILES.items() if kind.int8}


class Options(Protocol):
    """The fields of the exporter that are read here."""

    @property
    def weight_bits(self) -> int: ...
    @property
    def tolerance(self) -> float: ...
    @property
    def agreement(self) -> float: ...
    @property
    def calibration(self) -> Calibration: ...
    @property
    def percentile(self) -> float: ...
    @property
    def one_file_bytes(self) -> int: ...


class OnnxDrafting(Draft):
    """A model of which graphs are made. Its class says which points int8 products read, and what a file that is tried is called."""

    roles: ClassVar[tuple[PointRole, ...]]
    mixed_name: ClassVar[str]
    options: Options
    subject: Subject
    ranges: Ranges | None
    _forms: Mapping[str, Formed]

    @abstractmethod
    def error(self, variant: str, floats: Sequence[str] = ()) -> float:
        """Squared error of an int8 variant's outputs on the batches, as a share of their square; writes no file."""

    @property
    def points(self) -> tuple[Point, ...]:
        """Points whose matrices become int8 unless they are named in `floats`."""
        return tuple(point for point in self.subject.anatomy.points.values() if point.role in self.roles)

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
        file = folder / self.mixed_name

        def loss_with(floats: Sequence[str]) -> float:
            try:
                self.write(file, Variant.INT8_FUSED, floats)
            except ExportError:
                return math.inf  # its outputs are no numbers
            return loss(file)

        def error_with(floats: Sequence[str]) -> float:
            return self.error(Variant.INT8_FUSED, floats)

        read = {point.id: mixed.products_at(self.subject.model, point.modules) for point in self.points}
        speedups = dict(zip(read, mixed.int8_speedups(read.values(), tokens, threads, folder), strict=True))
        return mixed.search_floats(speedups, error_with, loss_with, allowed, seconds=seconds)

    def _has_learned_ranges(self, variant: str) -> bool:
        return self.ranges is not None and variant in (Variant.INT8_FUSED, Variant.INT8_STATIC)

    def _check_floats(self, floats: Sequence[str]) -> None:
        known = [point.id for point in self.points]
        unknown = sorted(set(floats) - set(known))
        if unknown:
            raise ExportError(f"there is no matrix '{unknown[0]}' to leave in float.", help=nearest(unknown[0], known))

    def _int8_notes(self, variant: str, difference: float) -> Iterator[str]:
        if self.ranges is not None and self.options.weight_bits < self.ranges.weight_bits:
            yield (
                f"weights that were trained on {self.ranges.weight_bits} bits are rounded again, to {self.options.weight_bits}: "
                "the file is not the model that was trained"
            )
        if self._has_learned_ranges(variant):
            yield f"differs from the model with fake quantization by {difference:.2g} at most"

    def _weights_of(self, graph: onnx_ir.Graph, points: Sequence[str]) -> list[str]:
        """Names of the weights that stay in float: of the products that read these points, and of forms without an integer product."""
        float_forms = [name for name, form in self._forms.items() if not form.form.reads]
        return [
            product.name
            for product in products(graph)
            if self._point(product) in points or self._form_of(product) in float_forms
        ]

    def _form_of(self, product: Product) -> str | None:
        """The name of the module in another form that a product belongs to; None for a plain matrix."""
        weight = in_model(product.name)
        return next((name for name in self._forms if weight.startswith(f"{name}.")), None)

    def _point(self, product: Product) -> str | None:
        """The point at which a product reads."""
        form = self._form_of(product)
        if form is None:
            reader = in_model(product.name).removesuffix(".weight")
        else:
            part = in_model(product.name).removeprefix(f"{form}.").partition(".")[0]
            reader = f"{form}.{self._forms[form].reader_of(part)}".removesuffix(".")
        return next((point.id for point in self.points if reader in point.modules), None)


def smoothing_notes(smoothed: Mapping[str, Sample], samples: Mapping[str, Sample]) -> Iterator[str]:
    """How many inputs were smoothed, and how many never changed on the batches."""
    yield f"{len(smoothed)} inputs smoothed"
    still = sum(sample.low.min() == sample.high.max() for sample in samples.values())
    if still:
        yield f"{still} inputs are constant on the calibration data, their ranges a guess"
