"""ONNX files of encoders whose layers differ, for ONNX Runtime (fast graphs) and for any runtime (standard operators).

The model is traced once (`_onnx/trace`); each variant is that trace, rewritten (`rewrite`), perhaps in int8 (`int8`, `calibrate`),
and compared with PyTorch on every given batch (`parity`). The exporter counts attentions and matrices on the way, and leaves no file
behind if anything disagrees. docs/decisions/0002-onnx-graphs.md says which graphs were chosen, by which measurements.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np
import onnx_ir
import torch
from torch import nn

from slimformer.core.anatomy import PointRole, heads_of
from slimformer.core.pattern import Fixed
from slimformer.core.pooling import SENTENCE_VECTOR, TOKEN_VECTORS, vector_head
from slimformer.core.ranges import Ranges, check_bits
from slimformer.errors import ExportError
from slimformer.exporters._onnx import calibrate, exits, int8, parity, parts, rewrite, scores, several, sieves, trace
from slimformer.exporters._onnx.drafting import FUSED, INT8, OnnxDrafting, smoothing_notes
from slimformer.exporters._onnx.graph import (
    BATCH_FIRST,
    SEQ_FIRST,
    Unexpected,
    classifiers,
    lower_versions,
    products,
    strip,
)
from slimformer.exporters._onnx.int8 import Coding, Sample, WeightCoding, quantized_matrices
from slimformer.exporters._onnx.noting import check_count, needed_runtime, zeros
from slimformer.exporters._onnx.rewrite import fused_attentions
from slimformer.exporters._onnx.speaking import SpeakingDraft
from slimformer.exporters._onnx.storing import ONE_FILE_BYTES, open_graph, open_model, save_graph, weights_name
from slimformer.exporters.base import (
    FILES,
    PAIRS,
    Arrays,
    Artifact,
    Draft,
    Exporter,
    FileKind,
    Variant,
    files_of,
)
from slimformer.families.base import subject_of
from slimformer.files import whole_group
from slimformer.forms.base import forms_in
from slimformer.hooks.points import quantized_inputs
from slimformer.quantizing.calibration import Calibration, check_calibration, check_percentile

ONE_CODE = 0.05  # share of the largest output by which a code that is rounded the other way may change another

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PLAIN = {  # of a model without attentions
    variant: replace(kind, about=kind.about.replace("fused attention", "operators of its own"))
    for variant, kind in FILES.items()
}

__all__ = ["Onnx", "fused_attentions", "needed_runtime", "quantized_matrices"]


@final
@dataclass(frozen=True)
class Onnx(Exporter):
    """Files of the variants in `Variant`.

    Attributes:
        weight_bits: Bits of int8 weights, from 2 to 8. 7 is for CPUs whose int8 sums saturate (x86 without VNNI), where 8 can lose all
            accuracy; it rounds weights a second time that were trained on 8 bits.
        tolerance: The largest difference of an fp32 file from the model, as a share of the largest output.
        agreement: The least share of the rows of the batches on which an int8 file gives the model's answer.
        calibration: How the range of an activation is found in its sample: by the least squared error, the extremes, a
            `percentile`, or the least divergence. Ranges that were learned in training go before it.
        percentile: Of the values that a range holds, for `calibration="percentile"`.
        floats: Points of the anatomy whose matrices stay in float in int8 files (mixed precision).
        one_file_bytes: Bytes of weights up to which a model is one file. The weights of a larger one lie beside it, in
            `<name>.onnx_data`; protobuf ends at 2 GB.
    """

    weight_bits: int = 8
    tolerance: float = 1e-4
    agreement: float = 0.9
    calibration: Calibration = "least_squares"
    percentile: float = 99.99
    floats: tuple[str, ...] = ()
    one_file_bytes: int = ONE_FILE_BYTES

    files: ClassVar[Mapping[str, FileKind]] = FILES

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.weight_bits)
        check_calibration(self.calibration)
        check_percentile(self.percentile)

    def kinds_for(self, model: PreTrainedModel) -> Mapping[str, FileKind]:
        if model.config.is_encoder_decoder:
            return PAIRS
        return FILES if subject_of(model).anatomy.attentions else PLAIN

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
        """Several variants from one trace, because tracing takes most of the time."""
        draft = self.draft(model, batches, outputs, ranges)
        return {variant: draft.write(path, variant, self.floats) for variant, path in paths.items()}

    def export_parts(
        self,
        whole: Path,
        model: PreTrainedModel,
        batches: Sequence[Arrays],
        variant: str,
        outputs: Sequence[str] = ("logits",),
    ) -> tuple[Path, ...]:
        subject = subject_of(model)
        if not subject.anatomy.meeting:
            return ()
        tolerance = ONE_CODE if variant in INT8 else self.tolerance
        written = parts.write_parts(whole, subject, batches, outputs, tolerance, self.one_file_bytes)
        return tuple(written.paths.values())

    def draft(
        self,
        model: PreTrainedModel,
        batches: Sequence[Arrays],
        outputs: Sequence[str] = ("logits",),
        ranges: Ranges | None = None,
    ) -> Draft:
        if not batches:
            raise ExportError("no batches to check the file with.", help="give export() some real inputs.")
        if any(parameter.is_floating_point() and parameter.dtype != torch.float32 for parameter in model.parameters()):
            model = copy.deepcopy(model).float()  # files compute in float32, and round from there
        if model.config.is_encoder_decoder:
            return SpeakingDraft(self, model, batches, ranges)
        return OnnxDraft(self, model, batches, outputs, ranges)


@dataclass(frozen=True)
class _FloatGraph:
    """A graph rewritten up to the point at which int8 begins, with samples of what its int8 products read."""

    program: onnx_ir.Model
    samples: Mapping[str, Sample]  # by the name of a product's input
    notes: tuple[str, ...]


class OnnxDraft(OnnxDrafting):
    """A traced model. Graphs in float are kept, because int8 files of one order of the axes begin with the same one."""

    roles: ClassVar = (PointRole.MATRIX,)
    mixed_name: ClassVar = "mixed.onnx"

    def __init__(
        self, options: Onnx, model: PreTrainedModel, batches: Sequence[Arrays], outputs: Sequence[str], ranges: Ranges | None
    ) -> None:
        self.options, self.batches, self.ranges = options, batches, ranges
        self.subject = subject_of(model)
        self._outputs = (*outputs, *_beside(model, outputs))
        self._scores = scores.activation_of(self.subject)
        self._answers = several.answers_of(self.subject)
        self._forms = forms_in(model)
        linears = sum(isinstance(module, nn.Linear) for module in model.modules()) - len(self.subject.anatomy.distance_matrices)
        self._factored = sum(len(form.form.products(form.shape)) for form in self._forms.values() if not form.table)
        self._matrices = linears + self._factored
        with self.subject.evaluating():
            self.reference: list[parity.GraphOutputs] = []
            self._sure: list[np.ndarray] = []  # if words leave: of each batch the rows in which last bits do not decide which
            for batch in batches:
                self.reference.append(self._run_model(batch))
                if self.subject.anatomy.sieves:
                    self._sure.append(sieves.sure_rows(model))
            self._traced = trace.trace_model(self.subject, self._outputs)
        self._float_graphs: dict[tuple[bool, frozenset[str]], _FloatGraph] = {}

    def write(self, path: Path, variant: str, floats: Sequence[str] = ()) -> Artifact:
        program, notes = self._graph(variant, floats, floats)
        reference = self._expected(variant, floats)
        with whole_group(path, [weights_name(path.name)]) as part:
            save_graph(program, part, self.options.one_file_bytes)
            flat = open_model(part)
            batches, expected = self.batches, reference
            if self._sure and variant not in INT8:
                batches, expected = sieves.without_close_calls(batches, reference, self._sure)
            difference, agreeing = parity.check_parity(
                flat,
                variant,
                batches,
                self.subject.inputs,
                expected,
                tolerance=None if variant in INT8 else self.options.tolerance,
                agreement=self.options.agreement,
            )
            if self.subject.anatomy.exits:
                notes.append(self._stop(program, part, flat, variant))
        if variant in INT8:
            rows = sum(len(next(iter(outputs.values()))) for outputs in reference)
            notes.append(f"{agreeing:.1%} of {rows} rows answer as before")
            notes += self._int8_notes(variant, difference)
        notes += zeros(self.subject.model)
        notes.append(needed_runtime(program))
        if len(files_of(path)) > 1:
            notes.append(
                f"a protobuf file ends at 2 GB: the weights lie in {weights_name(path.name)}, which belongs beside the file"
            )
        return Artifact(path, variant, sum(file.stat().st_size for file in files_of(path)), difference, tuple(notes))

    def _stop(self, program: onnx_ir.Model, path: Path, flat: Any, variant: str) -> str:
        """Makes a flat graph one that stops at its exits, in its file, and says where the batches' rows leave."""
        anatomy, options = self.subject.anatomy, self.options
        passed = anatomy.passed(anatomy.exits)
        exits.nest(program, anatomy.exits, passed)
        save_graph(program, path, options.one_file_bytes)
        # Dynamic int8 has the ranges of the rows that are left, so that a split batch gives other numbers. In static int8 a number
        # whose last bits differ with the size of a batch may be rounded to the next code.
        tolerances = {Variant.INT8_DYNAMIC: math.inf, Variant.INT8_STATIC: ONE_CODE}
        tolerance = tolerances.get(Variant(variant), options.tolerance)
        left = exits.check_stops(
            open_model(path), flat, self.batches, self.subject.inputs, anatomy.exits, passed, tolerance=tolerance
        )
        where = ", ".join(f"{count} after {layers}" for layers, count in zip(passed, left, strict=True))
        return f"stops at exits, each input for itself; of {sum(left)} inputs, by layers that were computed: {where}"

    def error(self, variant: str, floats: Sequence[str] = ()) -> float:
        """Squared error of an int8 variant's outputs on the batches, as a share of their square; writes no file."""
        program, _ = self._graph(variant, floats, ())
        session = open_graph(program, self.options.one_file_bytes)
        return parity.squared_error(session, self.batches, self.subject.inputs, self.reference)

    def _expected(self, variant: str, floats: Sequence[str]) -> Sequence[parity.GraphOutputs]:
        """What the file should give: the model's outputs, with activations on their grids if those were learned."""
        if self.ranges is None or not self._has_learned_ranges(variant):
            return self.reference
        with self.subject.evaluating(), quantized_inputs(self.subject.model, self.subject.anatomy, self.ranges, floats):
            return [self._run_model(batch) for batch in self.batches]

    def _run_model(self, batch: Arrays) -> parity.GraphOutputs:
        """What the file is to give on a batch."""
        found = several.parted(parity.run_model(self.subject, batch, self._outputs), self._answers)
        return found if self._scores is None else scores.scored(found, self._scores)

    def _graph(self, variant: str, floats: Sequence[str], rough: Sequence[str]) -> tuple[onnx_ir.Model, list[str]]:
        """The variant's graph, and what was counted. `rough`: points that smoothing leaves alone."""
        self._check_floats(floats)
        try:
            if variant in INT8:
                start = self._float_graph(variant, rough)
                program, notes = start.program.clone(), list(start.notes)
                notes.append(self._quantize(program, variant, floats, start))
                if floats:
                    notes.append(f"in float: {', '.join(floats)}")
            else:
                program = self._traced.clone()
                notes = self._rewrite(program, variant)
            if variant in FUSED:
                rewrite.lower_norms(program.graph)
                rewrite.separate_gelus(program.graph)
            rewrite.lower_gelus(program.graph, fused=variant in FUSED)
            anatomy = self.subject.anatomy
            if anatomy.sieves:
                sieves.sift(program, anatomy.sieves, {layer: anatomy.sites[heads_of(layer)].size for layer in anatomy.sieves})
                notes.append(f"words leave at {len(anatomy.sieves)} layers")
        except Unexpected as reason:
            raise ExportError(f"the traced graph is not as expected: {reason}.", help=parity.REPORT) from None
        if self._scores is not None:
            scores.end_in_score(program.graph, self._scores)
        if self._answers:
            several.end_in_answers(program.graph, self._answers)
        strip(program)
        lower_versions(program)
        program.producer_name = "slimformer"
        return program, notes

    def _rewrite(self, program: onnx_ir.Model, variant: str) -> list[str]:
        """Turns the trace into the variant's graph in float, in place, and says what was counted."""
        graph = program.graph
        axes = SEQ_FIRST if variant in FUSED else BATCH_FIRST
        attentions = len(self.subject.anatomy.attentions)
        check_count("attentions", rewrite.flatten_attentions(graph), attentions)
        if axes == BATCH_FIRST:
            rewrite.unturn(graph)
        recurrences = rewrite.lower_recurrences(graph)
        check_count("LSTMs", recurrences, len(trace.recurrent_in(self.subject.model)))
        narrowed = rewrite.read_only_first(graph, axes)
        order = list(self.subject.anatomy.attentions)
        watched = {order.index(heads_of(layer)): sieves.shares_name(layer) for layer in self.subject.anatomy.sieves}
        check_count("attentions", rewrite.lower_attentions(graph, axes, variant in FUSED, watched), attentions)
        patterned = rewrite.lower_patterns(graph, axes)
        check_count("matrices in other forms", rewrite.lower_forms(graph, self._forms), len(self._forms))
        check_count("matrices", len(products(graph)), self._matrices)
        rewrite.plain_gemms(graph)
        notes = []
        if attentions:
            how = "fused" if variant in FUSED else "in standard operators"
            notes.append(f"{attentions} of {attentions} attentions {how}")
        if patterned:
            heads = sum(isinstance(rule, Fixed) for rules in self.subject.anatomy.patterns.values() for rule in rules)
            notes.append(f"{heads} heads attend by position, as shifts and running sums")
        if self._forms:
            tables = sum(form.table for form in self._forms.values())
            notes.append(f"{self._factored} products of factored matrices, {tables} factored tables")
        if narrowed:
            notes.append("the last layer computes the first token only")
        return notes

    def _float_graph(self, variant: str, rough: Sequence[str]) -> _FloatGraph:
        """The variant's graph in float; smoothed if no ranges were learned."""
        key = (variant in FUSED, frozenset(rough))
        if key not in self._float_graphs:
            program = self._traced.clone()
            notes = self._rewrite(program, variant)
            strip(program)
            samples: dict[str, Sample] = {}
            if self.ranges is None:
                samples = self._samples(program)
                left = self._weights_of(program.graph, rough)
                smoothed = int8.smooth(program.graph, samples, self.options.weight_bits, left)
                samples |= smoothed
                notes += smoothing_notes(smoothed, samples)
            self._float_graphs[key] = _FloatGraph(program, samples, tuple(notes))
        return self._float_graphs[key]

    def _samples(self, program: onnx_ir.Model) -> dict[str, Sample]:
        return calibrate.samples(program, self.batches, self.subject.inputs, self.options.one_file_bytes)

    def _quantize(self, program: onnx_ir.Model, variant: str, floats: Sequence[str], start: _FloatGraph) -> str:
        """Int8 for every product but the classifier and `floats`, and for the embeddings, in place; says how many."""
        graph = program.graph
        left = self._weights_of(graph, floats)
        last = classifiers(graph)
        expected = self._matrices - sum(product.node in last or product.name in left for product in products(graph))
        learned = self.ranges or Ranges()
        one_scale = learned.weight_buckets == "tensor"
        coding = WeightCoding(min(self.options.weight_bits, learned.weight_bits), one_scale)
        if variant == Variant.INT8_DYNAMIC:
            count = int8.int8_dynamic(graph, coding, left)
        else:
            count = int8.int8_static(graph, self._codings(program, left, start), coding, variant in FUSED, left)
        check_count("int8 matrices", count, expected)
        bits = learned.embedding_bits
        tables = int8.int8_embeddings(graph, WeightCoding(bits, one_scale)) if bits is not None else 0
        stored = int8.int8_recurrences(graph, coding)
        told = f", {stored} matrices of LSTMs that are computed in float" if stored else ""
        return f"int8: {count} of {self._matrices} matrices, {tables} embedding tables{told}; the classifier stays in fp32"

    def _codings(self, program: onnx_ir.Model, left: Sequence[str], start: _FloatGraph) -> dict[str, Coding]:
        """How the input of each int8 product is stored: by its learned range if there is one, else by that of its sample."""
        codings, missing = {}, set[str]()
        for product in int8.quantizable(program.graph, left):
            source, point = str(product.source.name), self._point(product)
            if self.ranges is not None and point is not None and point in self.ranges.activations:
                bits = self.ranges.activation_bits
                codings[source] = Coding(*self.ranges.activations[point].grid(bits), 2**bits - 1)
            else:
                missing.add(source)
        samples = start.samples or (self._samples(program) if missing else {})
        how, percentile = self.options.calibration, self.options.percentile
        ranges = {name: calibrate.range_of(samples[name], how, percentile) for name in sorted(missing)}
        return codings | {name: Coding(*span.grid(8)) for name, span in ranges.items()}


def _beside(model: PreTrainedModel, outputs: Sequence[str]) -> tuple[str, ...]:
    """The outputs that a file has beside those of its task.

    Other tools make the vector of a text from the hidden states of its tokens (transformers.js, optimum, fastembed), and take both by
    these names. A file whose last layer computes the first token alone has none.
    """
    head = vector_head(model.config) if SENTENCE_VECTOR in outputs else None
    return (TOKEN_VECTORS,) if head is not None and head.reads_all else ()
