"""ONNX files of encoders whose layers differ, for ONNX Runtime (fast graphs) and for any runtime (standard operators).

The model is traced once with a marker in the place of each attention; `graphs.py` then rewrites the trace into the graph
that the variant stands for. The exporter is explicit: it counts attentions and matrices, compares with the model, runs the file
on every given batch and compares with PyTorch, and leaves no file behind where anything disagrees.
Which graph was chosen, and by which measurements: docs/decisions/0002-onnx-graphs.md.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from slimformer.core.ranges import Range, Ranges, check_bits
from slimformer.errors import ExportError, nearest
from slimformer.exporters._onnx import rewrite as graphs
from slimformer.exporters._onnx.rewrite import BATCH_FIRST, SEQ_FIRST, fused_attentions, quantized_matrices
from slimformer.exporters.base import FILES, Arrays, Artifact, Draft, Exporter, FileKind, Variant
from slimformer.families.base import anatomy_of, family_of
from slimformer.quantizing.calibration import Calibration, Histogram, check_calibration, check_percentile, find_range
from slimformer.saving.files import whole

if TYPE_CHECKING:
    import onnx_ir
    import torch
    from transformers import PreTrainedModel

    from slimformer.core.anatomy import Anatomy, Point
    from slimformer.forms.kronecker import KroneckerEmbedding, KroneckerLinear

__all__ = ["Onnx", "fused_attentions", "quantized_matrices"]

FILL = {"attention_mask": 1}  # of an input that is not given; 0 for all others
MARKED = "slimformer_export"  # the name under which transformers finds the attention that leaves a marker
FUSED = {Variant.FUSED, Variant.INT8_DYNAMIC, Variant.INT8_FUSED}
INT8 = {variant for variant, kind in FILES.items() if kind.int8}
CALIBRATION_ROWS = 300  # rows that int8 looks at; more change little
MANY_ZEROS = 0.3  # of the matrices' weights: as many as make `sparse.py` store a matrix without them
SAMPLE_ROWS = 2048  # tokens that are kept of each activation
BINS = 1024
CHATTER = (  # known and harmless; anything else that warns is heard
    (FutureWarning, r".*isinstance\(treespec, LeafSpec\).*"),
    (UserWarning, r"# The axis name: .* will not be used.*"),
    (DeprecationWarning, r".*(torch\.jit|ast\.|onnxscript|node_version).*"),
)


@final
@dataclass(frozen=True)
class Onnx(Exporter):
    """`weight_bits` 7 is for CPUs whose int8 sums saturate (x86 without VNNI), where 8 can lose all accuracy. It rounds weights that
    were trained on 8 bits a second time.

    `calibration`: how the range of an activation is found in its sample: by the least squared error, the extremes, a
    `percentile`, or the least divergence. Ranges learned in training go before it. `floats`: points of the anatomy whose
    matrices stay in float in int8 files.
    """

    weight_bits: int = 8
    tolerance: float = 1e-4  # of fp32 files, relative to the largest output
    agreement: float = 0.9  # of int8 files: least share of parity rows with the model's answer
    calibration: Calibration = "least_squares"
    percentile: float = 99.99
    floats: tuple[str, ...] = ()

    files: ClassVar[Mapping[str, FileKind]] = FILES

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.weight_bits)
        check_calibration(self.calibration)
        check_percentile(self.percentile)

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
        """Several variants from one trace, which is what takes the time; otherwise as `export`, file by file."""
        draft = self.draft(model, batches, outputs, ranges)
        return {variant: draft.write(path, variant, self.floats) for variant, path in paths.items()}

    def draft(
        self,
        model: PreTrainedModel,
        batches: Sequence[Arrays],
        outputs: Sequence[str] = ("logits",),
        ranges: Ranges | None = None,
    ) -> OnnxDraft:
        """The model traced, ready to be written in any variant."""
        if not batches:
            raise ExportError("no batches to check the file with.", help="give export() some real inputs.")
        return OnnxDraft(self, model, batches, outputs, ranges)

    def span(self, sample: graphs.Sample) -> Range:
        """The range that the calibration picks for an activation; one that never moves gets a range of its own."""
        low, high = min(0.0, float(sample.low.min())), max(0.0, float(sample.high.max()))
        if low == high or self.calibration == "least_squares":
            return Range(*best_range(sample))
        return find_range(Histogram.of(sample.rows, low, high), self.calibration, percentile=self.percentile)

    def _parity(
        self,
        path: Path,
        variant: str,
        batches: Sequence[Arrays],
        names: Sequence[str],
        outputs: Sequence[str],
        reference: Sequence[dict[str, np.ndarray]],
    ) -> tuple[float, float]:
        """Largest difference over all outputs and share of rows with the same answer; ExportError where they are too bad."""
        session = _session(path.read_bytes())
        worst, worst_shape, agreeing, rows = 0.0, (0, 0), 0, 0
        top = max(float(np.abs(value).max()) for item in reference for value in item.values())
        pairs = list(zip(batches, reference, strict=True))
        per_token = {name for name in outputs if all(item[name].shape == batch["input_ids"].shape for batch, item in pairs)}
        for batch, expected in pairs:
            got = dict(zip(outputs, session.run(list(outputs), _feed(names, batch)), strict=True))
            for name in outputs:
                if got[name].shape != expected[name].shape or not np.isfinite(got[name]).all():
                    raise ExportError(
                        f"the {variant} file gives no finite '{name}' of shape {expected[name].shape}.",
                        facts=[f"shape: {got[name].shape}"],
                        help=_REPORT,
                    )
                difference = float(np.abs(got[name] - expected[name]).max())
                if difference > worst:
                    worst, worst_shape = difference, batch["input_ids"].shape
            if per_token:
                got, expected = ({**item, **_unpad(item, per_token, batch)} for item in (got, expected))
            agreeing += int(np.logical_and.reduce([_agree(got[name], expected[name], top) for name in outputs]).sum())
            rows += len(expected[outputs[0]])
        share = agreeing / rows
        if variant in INT8:
            if share < self.agreement:
                raise ExportError(
                    f"the {variant} file answers as the model does on {share:.1%} of {rows} rows only.",
                    facts=[f"least allowed: {self.agreement:.0%}", f"largest difference: {worst:.3g} of {top:.3g}"],
                    help="this CPU may saturate int8 sums: try weight_bits=7 (export: {reduce_range: true}); or ship the fp32 file.",
                )
        elif worst > self.tolerance * max(1.0, top):
            raise ExportError(
                f"the {variant} file differs from the model by {worst:.2g} on a batch of {worst_shape[0]} x {worst_shape[1]}.",
                facts=[f"allowed: {self.tolerance * max(1.0, top):.2g}", f"largest output: {top:.3g}"],
                help=_REPORT,
            )
        return worst, share


@dataclass(frozen=True)
class _Ready:
    """A graph of one layout, rewritten up to where int8 begins, and what its int8 products read."""

    program: onnx_ir.Model
    samples: Mapping[str, graphs.Sample]  # by the name of a product's input
    notes: tuple[str, ...]


class OnnxDraft(Draft):
    """A model traced once, from which every variant is written, with any of its matrices left in float."""

    def __init__(
        self, options: Onnx, model: PreTrainedModel, batches: Sequence[Arrays], outputs: Sequence[str], ranges: Ranges | None
    ) -> None:
        from torch import nn

        from slimformer.forms.kronecker import KroneckerEmbedding, KroneckerLinear

        self.options, self.model, self.batches, self.outputs, self.ranges = options, model, batches, outputs, ranges
        self.anatomy = anatomy_of(model)
        self.names = family_of(model.config.model_type).inputs(model)
        self._factored = sum(module.form.terms for module in model.modules() if isinstance(module, KroneckerLinear))
        self._tables = sum(isinstance(module, KroneckerEmbedding) for module in model.modules())
        self._linears = sum(isinstance(module, nn.Linear) for module in model.modules()) + self._factored
        with _eval(model):
            self.reference = [_torch_outputs(model, self.names, batch, outputs) for batch in batches]
            self._traced = _trace(model, self.anatomy, self.names, outputs)
        self._ready: dict[tuple[bool, frozenset[str]], _Ready] = {}

    @property
    def points(self) -> tuple[Point, ...]:
        """Points whose matrices become int8 unless they are named in `floats`."""
        from slimformer.core.anatomy import PointRole

        return tuple(point for point in self.anatomy.points.values() if point.role is PointRole.MATRIX)

    def write(self, path: Path, variant: str, floats: Sequence[str] = ()) -> Artifact:
        """One variant as a file, compared with the model."""
        import onnx_ir

        program, notes = self._graph(variant, floats, floats)
        reference = self._expected(variant, floats)
        with whole(path) as part:
            onnx_ir.save(program, part)
            difference, agreeing = self.options._parity(part, variant, self.batches, self.names, self.outputs, reference)
        if variant in INT8:
            notes.append(f"{agreeing:.1%} of {sum(len(item[self.outputs[0]]) for item in reference)} rows answer as before")
            if self.ranges is not None and self.options.weight_bits < self.ranges.weight_bits:
                notes.append(
                    f"weights that were trained on {self.ranges.weight_bits} bits are rounded again, to {self.options.weight_bits}: "
                    "the file is not the model that was trained"
                )
            if self._learned(variant):
                notes.append(f"differs from the model with fake quantization by {difference:.2g} at most")
        notes += _zeros(self.model)
        return Artifact(path, variant, path.stat().st_size, difference, tuple(notes))

    def error(self, variant: str, floats: Sequence[str] = ()) -> float:
        """Squared error of an int8 variant's outputs on the batches, as a share of their square; a look, no file is written."""
        import onnx_ir

        program, _ = self._graph(variant, floats, ())
        session = _session(onnx_ir.to_proto(program).SerializeToString())
        wrong = square = 0.0
        for batch, expected in zip(self.batches, self.reference, strict=True):
            for name, value in zip(self.outputs, session.run(list(self.outputs), _feed(self.names, batch)), strict=True):
                real = np.isfinite(expected[name])
                wrong += float(np.square(value[real] - expected[name][real]).sum())
                square += float(np.square(expected[name][real]).sum())
        return wrong / max(square, 1e-12)

    def _learned(self, variant: str) -> bool:
        return self.ranges is not None and variant in (Variant.INT8_FUSED, Variant.INT8_STATIC)

    def _expected(self, variant: str, floats: Sequence[str]) -> Sequence[dict[str, np.ndarray]]:
        """What the file should give: the model's outputs, with its inputs on the grids where those were learned."""
        if self.ranges is None or not self._learned(variant):
            return self.reference
        from slimformer.hooks.points import quantized_inputs

        with _eval(self.model), quantized_inputs(self.model, self.anatomy, self.ranges, floats):
            return [_torch_outputs(self.model, self.names, batch, self.outputs) for batch in self.batches]

    def _graph(self, variant: str, floats: Sequence[str], rough: Sequence[str]) -> tuple[onnx_ir.Model, list[str]]:
        """The variant's graph, and what was counted. `rough`: points that smoothing leaves alone."""
        unknown = sorted(set(floats) - {point.id for point in self.points})
        if unknown:
            known = [point.id for point in self.points]
            raise ExportError(f"there is no matrix '{unknown[0]}' to leave in float.", help=nearest(unknown[0], known))
        try:
            if variant in INT8:
                ready = self._readied(variant, rough)
                program, notes = ready.program.clone(), list(ready.notes)
                notes.append(self._quantize(program, variant, floats, ready))
                if floats:
                    notes.append(f"in float: {', '.join(floats)}")
            else:
                program = self._traced.clone()
                notes = self._rewrite(program, variant)
            if variant in FUSED:
                graphs.lower_norms(program.graph)
                graphs.separate_gelus(program.graph)
        except graphs.Unexpected as reason:
            raise ExportError(f"the traced graph is not as expected: {reason}.", help=_REPORT) from None
        graphs.tidy(program)
        program.producer_name = "slimformer"
        return program, notes

    def _rewrite(self, program: onnx_ir.Model, variant: str) -> list[str]:
        """Turns the trace into the variant's graph in float, in place, and says what was counted."""
        graph = program.graph
        layout = SEQ_FIRST if variant in FUSED else BATCH_FIRST
        attentions = sum(name is not None for name in self.anatomy.attentions)
        _same("attentions", graphs.flatten_attentions(graph), attentions)
        if layout == BATCH_FIRST:
            graphs.unturn(graph)
        narrowed = graphs.read_only_first(graph, layout)
        _same("attentions", graphs.lower_attentions(graph, layout, fused=variant in FUSED), attentions)
        _same("factored products", graphs.lower_factors(graph), self._factored)
        _same("factored tables", graphs.lower_tables(graph), self._tables)
        _same("matrices", len(graphs.products(graph)), self._linears)
        graphs.plain_gemms(graph)
        notes = [f"{attentions} of {attentions} attentions {'fused' if variant in FUSED else 'in standard operators'}"]
        if self._factored or self._tables:
            notes.append(f"{self._factored} products by Kronecker factors, {self._tables} factored tables")
        if narrowed:
            notes.append("the last layer computes the first token only")
        return notes

    def _readied(self, variant: str, rough: Sequence[str]) -> _Ready:
        """The variant's graph in float, smoothed where that helps and no ranges were learned; kept for the next file."""
        key = (variant in FUSED, frozenset(rough))
        if key not in self._ready:
            program = self._traced.clone()
            notes = self._rewrite(program, variant)
            graphs.tidy(program)
            samples: dict[str, graphs.Sample] = {}
            if self.ranges is None:
                graph, named = program.graph, self._named(program.graph, rough)
                samples = _samples(program, self.batches, self.names)
                smoothed = graphs.smooth(graph, samples, self.options.weight_bits, named)
                samples |= smoothed
                notes.append(f"{len(smoothed)} inputs smoothed")
                still = sum(sample.low.min() == sample.high.max() for sample in samples.values())
                if still:
                    notes.append(f"{still} inputs are constant on the calibration data, their ranges a guess")
            self._ready[key] = _Ready(program, samples, tuple(notes))
        return self._ready[key]

    def _named(self, graph: onnx_ir.Graph, floats: Sequence[str]) -> list[str]:
        """Names of the products that read these points."""
        return [item.name for item in graphs.products(graph) if self._point(item) in floats]

    def _point(self, item: graphs.Product) -> str | None:
        """The point at which a product reads."""
        reader = _reader(item.name.removeprefix("model."))  # the tracer holds the model as `model`
        return next((point.id for point in self.points if reader in point.modules), None)

    def _quantize(self, program: onnx_ir.Model, variant: str, floats: Sequence[str], ready: _Ready) -> str:
        """Int8 for every Linear but the classifier and `floats`, and for the embeddings, in place; says how many."""
        graph = program.graph
        named = self._named(graph, floats)
        expected = self._linears - len(graphs.heads_of(graph)) - len(named)
        learned = self.ranges or Ranges()
        whole = learned.weight_buckets == "tensor"
        coding = graphs.WeightCoding(min(self.options.weight_bits, learned.weight_bits), whole)
        if variant == Variant.INT8_DYNAMIC:
            done = graphs.int8_dynamic(graph, coding, named)
        else:
            done = graphs.int8_static(graph, self._codings(program, named, ready), coding, variant in FUSED, named)
        _same("int8 matrices", done, expected)
        tables = learned.embedding_bits
        count = graphs.int8_embeddings(graph, graphs.WeightCoding(tables, whole)) if tables is not None else 0
        return f"int8: {done} of {self._linears} matrices, {count} embedding tables; the classifier stays in fp32"

    def _codings(self, program: onnx_ir.Model, named: Sequence[str], ready: _Ready) -> dict[str, graphs.Coding]:
        """How the input of each int8 product is stored: by learned ranges where there are any, else by those of its sample."""
        codings, missing = {}, set[str]()
        for item in graphs.smalls(program.graph, named):
            source, point = str(item.source.name), self._point(item)
            if self.ranges is not None and point is not None and point in self.ranges.activations:
                bits = self.ranges.activation_bits
                codings[source] = graphs.Coding(*self.ranges.activations[point].grid(bits), 2**bits - 1)
            else:
                missing.add(source)
        samples = ready.samples or (_samples(program, self.batches, self.names) if missing else {})
        return codings | {name: graphs.Coding(*self.options.span(samples[name]).grid(8)) for name in sorted(missing)}


def _reader(weight: str) -> str:
    """The module that reads for a product by this weight: a Linear, or a factored matrix's product with its larger factor."""
    from slimformer.forms.kronecker import Kronecker

    name = weight.removesuffix(".transposed").removesuffix(".smooth")
    factor = re.fullmatch(r"(.+)\.[ab]\.\d+", name)  # as `graphs.lower_factors` names them
    return f"{factor[1]}.{Kronecker.reads}" if factor else name.removesuffix(".weight")


def _zeros(model: PreTrainedModel) -> Iterator[str]:
    """A word on matrices that are full of zeros, for whoever expects them to be worth something here."""
    from torch import nn

    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    share = sum(int((weight == 0).sum()) for weight in weights) / max(1, sum(weight.numel() for weight in weights))
    if share > MANY_ZEROS:
        yield f"{share:.0%} of the matrices' weights are 0: zeros are stored and give no speed here"


_REPORT = "this is a fault of the exporter or of a package it stands on; please report it with the model's config.json."


def _same(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise ExportError(f"the graph has {found} {what}, the model has {expected}.", help=_REPORT)


def _unpad(outputs: Mapping[str, np.ndarray], names: Iterable[str], batch: Arrays) -> dict[str, np.ndarray]:
    """Outputs that have a value per token, with padding as the last thing that an answer could be."""
    real = _real(batch)
    return {name: np.where(real, outputs[name], -np.inf) for name in names}


def _real(batch: Arrays) -> np.ndarray:
    """Which tokens of a batch are no padding: (batch, seq)."""
    return _feed(("attention_mask",), batch)["attention_mask"] == 1


def _agree(got: np.ndarray, expected: np.ndarray, top: float) -> np.ndarray:
    """Rows with the same answer: (rows,). Near ties, within a tenth of the largest output, count as the same."""
    if expected.shape[-1] == 1:
        return np.asarray(np.abs(got - expected).max(axis=-1) <= 0.1 * top)
    chosen = np.take_along_axis(expected, got.argmax(axis=-1)[..., None], axis=-1)[..., 0]
    return np.asarray(expected.max(axis=-1) - chosen <= 0.1 * top)


def _feed(names: Sequence[str], batch: Arrays) -> dict[str, np.ndarray]:
    """What the model reads of a batch; as in transformers a missing token_type_ids is all zeros, a missing mask all ones."""
    ids = np.asarray(batch["input_ids"])
    return {name: np.asarray(batch.get(name, np.full_like(ids, FILL.get(name, 0))), dtype=np.int64) for name in names}


def _session(model: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


# ------------------------------------------------------------------------------------------------------------------- trace


@contextmanager
def _eval(model: PreTrainedModel) -> Iterator[None]:
    """Puts the model into eval mode, every module of it, and back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _torch_outputs(
    model: PreTrainedModel, names: Sequence[str], batch: Arrays, outputs: Sequence[str]
) -> dict[str, np.ndarray]:
    import torch

    with torch.no_grad():
        tensors = {name: torch.from_numpy(value).to(model.device) for name, value in _feed(names, batch).items()}
        result = model(**tensors, return_dict=True)
    return {name: result[name].float().cpu().numpy() for name in outputs}


def _mark(
    module: torch.nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Any, None]:
    """An attention function for transformers that leaves a marker: (., heads, ., dim) in, (., ., heads, dim) out."""
    import torch

    outer, heads, inner, dim = query.shape
    attributes: dict[str, Any] = {"scale": float(scaling or dim**-0.5), "heads": int(heads), "width": int(heads * dim)}
    inputs = [*(item.transpose(1, 2) for item in (query, key, value)), attention_mask]
    shape = (outer, inner, heads, dim)
    name = "::".join(graphs.MARKER)
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=query.dtype, shape=shape), None


def _plain_mask(*, attention_mask: Any, **_: Any) -> Any:
    """The mask as it came, (batch, seq): the marker reads it."""
    return attention_mask


def _mark_product(module: KroneckerLinear) -> Any:
    """In place of a factored Linear's product: a marker with its factors and the order of its steps."""
    import torch

    attributes: dict[str, Any] = {
        "steps": " ".join(module.form.steps(module.shape)),
        "right": "b" if module.form.b_is_large(module.shape) else "a",
    }

    def product(input: torch.Tensor) -> torch.Tensor:
        shape = (*input.shape[:-1], module.shape[0])
        inputs = [input, module.a, module.b]
        return torch.onnx.ops.symbolic("::".join(graphs.FACTORED), inputs, attributes, dtype=input.dtype, shape=shape)

    return product


def _mark_table(module: KroneckerEmbedding) -> Any:
    """In place of a factored Embedding: a marker with its factors."""
    import torch

    def forward(input: torch.Tensor) -> torch.Tensor:
        shape = (*input.shape, module.shape[1])
        inputs = [input, module.a, module.b]
        return torch.onnx.ops.symbolic("::".join(graphs.TABLE), inputs, dtype=module.a.dtype, shape=shape)

    return forward


@contextmanager
def _marked(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[None]:
    """Lets attentions and factored matrices leave markers, and the layers compute in (seq, batch, hidden)."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from slimformer.forms.kronecker import KroneckerEmbedding, KroneckerLinear

    AttentionInterface.register(MARKED, _mark)
    AttentionMaskInterface.register(MARKED, _plain_mask)
    before = model.config._attn_implementation

    def turn(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0].transpose(0, 1), *output[1:])
        return output.transpose(0, 1)

    with ExitStack() as stack:
        stack.callback(setattr, model.config, "_attn_implementation", before)
        model.config._attn_implementation = MARKED
        for module in model.modules():
            if isinstance(module, KroneckerLinear):
                stack.callback(delattr, module, "product")
                module.product = _mark_product(module)  # type: ignore[method-assign]
            elif isinstance(module, KroneckerEmbedding):
                stack.callback(delattr, module, "forward")
                module.forward = _mark_table(module)  # type: ignore[method-assign]
        for name in (anatomy.embedding, anatomy.layers[-1]):
            stack.callback(model.get_submodule(name).register_forward_hook(turn).remove)
        yield


@contextmanager
def _told_apart(model: PreTrainedModel) -> Iterator[dict[str, np.ndarray]]:
    """Gives each bias values of its own, and back; yields the true ones by name.

    The tracer keeps one of several equal constants, and products are told apart by the names of their biases.
    """
    import torch

    from slimformer.forms.kronecker import KroneckerLinear

    linear = (torch.nn.Linear, KroneckerLinear)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, linear)}
    biases = {f"{name}.bias": module.bias for name, module in modules.items() if module.bias is not None}
    true = {name: bias.detach().clone() for name, bias in biases.items()}
    try:
        with torch.no_grad():
            for index, bias in enumerate(biases.values()):
                bias.copy_(torch.linspace(index + 0.25, index + 0.75, len(bias)))  # no constant of a model looks like that
        yield {name: value.float().cpu().numpy() for name, value in true.items()}
    finally:
        with torch.no_grad():
            for name, bias in biases.items():
                bias.copy_(true[name])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the exporter is known to say for nothing, and restores logging."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        for category, message in CHATTER:
            warnings.filterwarnings("ignore", message=message, category=category)
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _trace(model: PreTrainedModel, anatomy: Anatomy, names: Sequence[str], outputs: Sequence[str]) -> onnx_ir.Model:
    """The model as a SEQ_FIRST graph with markers for attentions; batch and sequence are free."""
    import onnx_ir
    import torch

    class Flat(torch.nn.Module):
        """Tensors in, a tuple of tensors out."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            result = self.model(**dict(zip(names, inputs, strict=True)), return_dict=True)
            return tuple(result[name] for name in outputs)

    # One tensor per input: the tracer would take one object given twice for one input.
    example = tuple(torch.full((2, 8), FILL.get(name, 0), dtype=torch.int64, device=model.device) for name in names)
    batch, seq = torch.export.Dim("batch"), torch.export.Dim("seq", min=2, max=_longest(model))
    with _marked(model, anatomy), _told_apart(model) as biases, _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                Flat().eval(),
                example,
                dynamo=True,
                verbose=False,
                input_names=list(names),
                output_names=list(outputs),
                dynamic_shapes={"inputs": tuple({0: batch, 1: seq} for _ in names)},
            )
        except Exception as error:  # whatever tracing raises means the same to a user: this model cannot be exported
            first = str(error).strip().splitlines()[:1]
            raise ExportError(f"PyTorch could not trace {type(model).__name__}.", facts=first, help=_REPORT) from error
        assert program is not None
        constants = program.model.graph.initializers
        for name, bias in biases.items():
            if f"model.{name}" in constants:
                constants[f"model.{name}"].const_value = onnx_ir.tensor(bias, name=f"model.{name}")
    return program.model


def _longest(model: PreTrainedModel) -> int | None:
    """Tokens that the model's positions allow."""
    return family_of(model.config.model_type).positions(model.config.to_dict())


# -------------------------------------------------------------------------------------------------------------- calibration


def _samples(program: onnx_ir.Model, batches: Sequence[Arrays], names: Sequence[str]) -> dict[str, graphs.Sample]:
    """What the first CALIBRATION_ROWS rows of the batches give as input of every product, padding left out."""
    import onnx_ir

    copy = program.clone()
    watched = graphs.observed(copy.graph)
    copy.graph.outputs.extend(value for value in watched.values() if not value.is_graph_output())
    session = _session(onnx_ir.to_proto(copy).SerializeToString())
    some: list[Arrays] = []
    for batch in (item for item in batches if _real(item).any()):
        if sum(len(item["input_ids"]) for item in some) < CALIBRATION_ROWS:
            some.append(batch)
    if not some:
        raise ExportError("the calibration data is empty: no batch holds a real token.", help="give export() some real inputs.")
    share = -(-SAMPLE_ROWS // len(some))
    rows: dict[str, list[np.ndarray]] = {name: [] for name in watched}
    ends: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in watched}
    turned = {str(value.name) for value in graphs.turned_values(copy.graph)}
    for batch in some:
        real = _real(batch)  # (batch, seq)
        for name, value in zip(watched, session.run(list(watched), _feed(names, batch)), strict=True):
            flat = _unpadded(value, real.T if name in turned else real)  # (tokens, width)
            rows[name].append(flat[:: max(1, len(flat) // share)].copy())
            ends[name].append((flat.min(axis=0), flat.max(axis=0)))
    return {
        name: graphs.Sample(
            np.concatenate(rows[name]),
            np.min([low for low, _ in ends[name]], axis=0),
            np.max([high for _, high in ends[name]], axis=0),
        )
        for name in watched
    }


def _unpadded(value: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Rows of an activation that stand for real tokens: (tokens, width); `real` in the order of the activation's first two axes."""
    if value.ndim > 2 and value.shape[:2] == real.shape:
        return np.asarray(value[real]).reshape(-1, value.shape[-1])
    return value.reshape(-1, value.shape[-1])  # first tokens only


def best_range(sample: graphs.Sample, steps: int = 255) -> tuple[float, float]:
    """The range around 0, within the extremes seen, whose `steps` steps store a sample with the least squared error.

    Clipping a few outliers costs less than coarse steps for all the rest.
    """
    low, high = min(0.0, float(sample.low.min())), max(0.0, float(sample.high.max()))
    if low == high:
        return low, low + 1.0
    counts, edges = np.histogram(sample.rows, bins=BINS, range=(low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    best = (np.inf, low, high)
    for bottom in low * np.linspace(1.0, 0.1, 19):
        for top in high * np.linspace(1.0, 0.1, 19):
            clipped = np.clip(centres, bottom, top)
            rounding = ((top - bottom) / steps) ** 2 / 12
            error = float((counts * ((centres - clipped) ** 2 + np.where(clipped == centres, rounding, 0.0))).sum())
            best = min(best, (error, float(bottom), float(top)))
    return best[1], best[2]
