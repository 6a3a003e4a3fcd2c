"""The files of an encoder-decoder: its encoder, and beside it one decoder with two branches, for the first tokens and for the rest.

Both branches are written (`pair`), made int8 alike, compared with PyTorch, and merged; weights are stored once. An artifact is named
by its encoder. docs/decisions/0023-files-that-write.md says why it is one file and not two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir
import torch

from slimformer.core.anatomy import PointRole, Tokens
from slimformer.core.ranges import Ranges
from slimformer.decoding import decoder_beside
from slimformer.errors import ExportError
from slimformer.exporters._onnx import calibrate, int8, parity
from slimformer.exporters._onnx.drafting import FUSED, INT8, OnnxDrafting, Options, smoothing_notes
from slimformer.exporters._onnx.graph import Editor, Product, Unexpected, constant_of, products, strip, turns
from slimformer.exporters._onnx.int8 import Coding, Sample, WeightCoding
from slimformer.exporters._onnx.noting import check_count, needed_runtime, zeros
from slimformer.exporters._onnx.pair import (
    CACHE_FLAG,
    ENCODED,
    GRAPH_PARTS,
    HIDDEN,
    LAST,
    MASK,
    GraphPart,
    Writing,
    merge,
)
from slimformer.exporters._onnx.storing import open_graph, open_model, save_graph, weights_name
from slimformer.exporters.base import Arrays, Artifact, Variant, files_of
from slimformer.families.base import subject_of
from slimformer.files import whole_group
from slimformer.forms.base import forms_in
from slimformer.hooks.points import quantized_inputs
from slimformer.quantizing.calibration import TABLE_ROWS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


READ_ONCE: tuple[GraphPart, ...] = ("encoder", "first")  # graphs that hold every matrix once
_ROLES = (PointRole.MATRIX, PointRole.HEAD)  # of points that int8 products read
_STEPS = 12  # tokens that the second branch is compared on, one by one,
_STEPPED = 3  # in so many batches: its cost is a run for each

Said = Mapping[
    str, np.ndarray
]  # the model's outputs on a batch: HIDDEN (batch, source, hidden), "logits" (batch, target, words)


@dataclass(frozen=True)
class _Graphs:
    """The three graphs of a variant, up to the point at which int8 begins, and samples of what their int8 products read."""

    parts: Mapping[GraphPart, ir.Model]
    samples: Mapping[str, Sample]
    notes: tuple[str, ...] = ()


class SpeakingDraft(OnnxDrafting):
    """An encoder-decoder and its outputs on real batches, from which any variant is written."""

    roles: ClassVar = _ROLES
    mixed_name: ClassVar = "encoder_model_mixed.onnx"

    def __init__(self, options: Options, model: PreTrainedModel, batches: Sequence[Arrays], ranges: Ranges | None) -> None:
        self.options, self.ranges = options, ranges
        self.subject = subject_of(model)
        self.batches = [_inputs(batch) for batch in batches]
        self.subject.family.surroundings(model)
        self._forms = forms_in(model)
        with self.subject.evaluating():
            self.reference = [self._said(batch) for batch in self.batches]
        self._written: dict[tuple[bool, frozenset[str]], _Graphs] = {}

    def write(self, path: Path, variant: str, floats: Sequence[str] = ()) -> Artifact:
        encoder, decoder, notes = self._files(variant, floats, floats)
        reference = self._expected(variant, floats)
        beside = decoder_beside(path)
        if beside == path:
            raise ExportError(
                f"{path.name} is no name for an encoder.", help="call it encoder_model.onnx, or encoder_model_x.onnx."
            )
        with whole_group(path, [weights_name(path.name), beside.name, weights_name(beside.name)]) as part:
            save_graph(encoder, part, self.options.one_file_bytes)
            save_graph(decoder, decoder_beside(part), self.options.one_file_bytes)
            sessions = open_model(part), open_model(decoder_beside(part))
            tolerance = None if variant in INT8 else self.options.tolerance
            difference, agreeing, tokens = self._check(sessions, variant, reference, tolerance)
        if variant in INT8:
            notes.append(f"{agreeing:.1%} of {tokens} tokens are as before")
            notes += self._int8_notes(variant, difference)
        notes += [*zeros(self.subject.model), needed_runtime(decoder)]
        if weights_name(beside.name) in {file.name for file in files_of(path)}:
            notes.append("a protobuf file ends at 2 GB: weights lie in files beside these, which belong to them")
        return Artifact(path, variant, sum(file.stat().st_size for file in files_of(path)), difference, tuple(notes))

    def error(self, variant: str, floats: Sequence[str] = ()) -> float:
        """Squared error of an int8 variant's scores on the batches, as a share of their square; writes no file."""
        encoder, decoder, _ = self._files(variant, floats, ())
        sessions = (open_graph(encoder, self.options.one_file_bytes), open_graph(decoder, self.options.one_file_bytes))
        wrong = square = 0.0
        for batch, expected in zip(self.batches, self.reference, strict=True):
            real = _written_tokens(batch, self._pad)
            got = _first(sessions[1], batch, _encode(sessions[0], batch))["logits"][real]
            wrong += float(np.square(got - expected["logits"][real]).sum())
            square += float(np.square(expected["logits"][real]).sum())
        return wrong / max(square, 1e-12)

    # -- what the model says

    @property
    def _pad(self) -> int | None:
        pad = self.subject.model.config.pad_token_id
        return pad if isinstance(pad, int) else None

    def _said(self, batch: Arrays) -> Said:
        feeds = {name: torch.as_tensor(array, device=self.subject.device) for name, array in batch.items()}
        feeds.pop("decoder_attention_mask", None)  # padding is on the right: no token sees it
        with torch.no_grad():
            output = self.subject.model(**feeds, use_cache=False, return_dict=True)
        named = {HIDDEN: output.encoder_last_hidden_state, "logits": output.logits}
        return {name: value.float().cpu().numpy() for name, value in named.items()}

    def _expected(self, variant: str, floats: Sequence[str]) -> Sequence[Said]:
        """What the files should give: the model's outputs, with activations on their grids if those were learned."""
        if self.ranges is None or not self._has_learned_ranges(variant):
            return self.reference
        with self.subject.evaluating(), quantized_inputs(self.subject.model, self.subject.anatomy, self.ranges, floats, _ROLES):
            return [self._said(batch) for batch in self.batches]

    # -- graphs

    def _files(self, variant: str, floats: Sequence[str], rough: Sequence[str]) -> tuple[ir.Model, ir.Model, list[str]]:
        """The encoder's graph, the decoder's, and what was counted. `rough`: points that smoothing leaves alone."""
        self._check_floats(floats)
        try:
            if variant in INT8:
                start = self._float_graphs(variant in FUSED, rough)
                parts = {part: program.clone() for part, program in start.parts.items()}
                notes = [*start.notes, self._quantize(parts, variant, floats, start.samples)]
                if floats:
                    notes.append(f"in float: {', '.join(floats)}")
            else:
                parts, notes = self._parts(variant in FUSED), []
        except Unexpected as reason:
            raise ExportError(f"the graph is not as expected: {reason}.", help=parity.REPORT) from None
        for program in parts.values():
            strip(program)
        given = {str(value.name): value.shape for value in parts["first"].graph.outputs}
        again = {str(value.name) for value in parts["next"].graph.outputs}
        sizes = {name: tuple(shape or ()) for name, shape in given.items() if name not in again}
        empty = {name: (_whole(shape[1]), _whole(shape[3])) for name, shape in sizes.items()}
        decoder = merge(parts["first"], parts["next"], empty)
        attentions = len(self.subject.anatomy.attentions)
        how = "fused" if variant in FUSED else "in standard operators"
        return parts["encoder"], decoder, [f"{attentions} of {attentions} attentions {how}", *notes]

    def _parts(self, fused: bool) -> dict[GraphPart, ir.Model]:
        writing = Writing(self.subject, fused, apart=self.ranges is not None)
        parts = {part: writing.graph(part) for part in GRAPH_PARTS}
        for program in parts.values():
            strip(program)
        return parts

    def _float_graphs(self, fused: bool, rough: Sequence[str]) -> _Graphs:
        """The graphs in float; smoothed if no ranges were learned."""
        key = (fused, frozenset(rough))
        if key not in self._written:
            parts = self._parts(fused)
            samples: dict[str, Sample] = {}
            notes: list[str] = []
            if self.ranges is None:
                samples = self._samples(parts)
                smoothed: dict[str, Sample] = {}
                for program in parts.values():
                    left = [*self._weights_of(program.graph, rough), LAST]  # a word table smoothed would be stored twice
                    with _inside(program.graph):
                        smoothed |= int8.smooth(program.graph, samples, self.options.weight_bits, left)
                samples |= smoothed
                notes += smoothing_notes(smoothed, samples)
            self._written[key] = _Graphs(parts, samples, tuple(notes))
        return self._written[key]

    def _samples(self, parts: Mapping[GraphPart, ir.Model]) -> dict[str, Sample]:
        """What the products read while the model's own texts pass, by name: the same in both branches of the decoder."""
        turned = any(turns(node) for node in parts["encoder"].graph)
        sessions, names, asking = {}, {}, set[str]()
        for part in READ_ONCE:
            copy = parts[part].clone()
            with _inside(copy.graph):
                watched = int8.quantizable_inputs(copy.graph)
            names[part] = [name for name in watched if name != ENCODED]
            if part == "first":
                asking = {str(item.source.name) for item in products(copy.graph) if self._reads_sentence(item)}
            copy.graph.outputs.extend(watched[name] for name in names[part] if not watched[name].is_graph_output())
            sessions[part] = open_graph(copy, self.options.one_file_bytes)

        def run(batch: Arrays) -> Iterator[tuple[str, np.ndarray]]:
            read, written = batch["attention_mask"] == 1, _written_tokens(batch, self._pad)
            feeds = {name: batch[name] for name in ("input_ids", "attention_mask")}
            hidden, *values = sessions["encoder"].run([HIDDEN, *names["encoder"]], feeds)
            for name, value in zip(names["encoder"], values, strict=True):
                yield name, _rows(value, read.T if turned else read)
            yield ENCODED, hidden[read]
            feeds = {"input_ids": batch["decoder_input_ids"], MASK: batch["attention_mask"], ENCODED: hidden}
            feeds = {
                name: value for name, value in feeds.items() if name in {item.name for item in sessions["first"].get_inputs()}
            }
            for name, value in zip(names["first"], sessions["first"].run(names["first"], feeds), strict=True):
                yield name, _rows(value, read if name in asking else written)

        return calibrate.gather(self.batches, run)

    def _quantize(
        self, parts: Mapping[GraphPart, ir.Model], variant: str, floats: Sequence[str], samples: Mapping[str, Sample]
    ) -> str:
        """Int8 for every product but those at `floats`, and for the word tables, in place; says how many."""
        learned = self.ranges or Ranges()
        one_scale = learned.weight_buckets == "tensor"
        bits, table_bits = learned.weight_bits, learned.embedding_bits
        tied = self._ties_words
        if table_bits is None and tied and any(self._is_last(point) for point in learned.activations):
            table_bits = bits  # the table was trained on the grid of the matrix that it is
        coding = WeightCoding(min(self.options.weight_bits, bits), one_scale)
        last = WeightCoding(min(self.options.weight_bits, table_bits), one_scale) if tied and table_bits is not None else coding
        counts: dict[GraphPart, tuple[int, int]] = {}
        tables = 0
        codings = {} if variant == Variant.INT8_DYNAMIC else self._codings(parts, floats, samples)
        for part, program in parts.items():
            graph = program.graph
            left = self._weights_of(graph, floats)
            every = len(products(graph))
            expected = sum(product.name not in left for product in products(graph))
            with _inside(graph):
                count = 0
                for some, others in ((coding, {LAST}), (last, set[str]())):
                    if variant == Variant.INT8_DYNAMIC:
                        count += int8.int8_dynamic(graph, some, others.union(left))
                    else:
                        count += int8.int8_static(graph, codings, some, variant in FUSED, others.union(left))
                check_count("int8 matrices", count, expected)
                counts[part] = (count, every)
                if table_bits is not None:
                    coded = WeightCoding(last.bits if tied else table_bits, one_scale)
                    found = int8.int8_embeddings(graph, coded)
                    if learned.embedding_bits is not None:
                        found += _int8_positions(graph, WeightCoding(table_bits, one_scale))
                    tables += found if part != "next" else 0
        count, every = (sum(counts[part][place] for part in READ_ONCE) for place in (0, 1))
        return f"int8: {count} of {every} matrices, {tables} embedding tables"

    def _reads_sentence(self, product: Product) -> bool:
        """Whether a product in the decoder has a row for each token that the encoder read."""
        point = self._point(product)
        return point is not None and self.subject.anatomy.points[point].tokens is Tokens.SOURCE

    @property
    def _ties_words(self) -> bool:
        """Whether the last matrix is the decoder's table of words."""
        last = self.subject.model.get_output_embeddings()
        return any(
            last.weight is getattr(module, "weight", None) for module in self.subject.model.modules() if module is not last
        )

    def _is_last(self, point: str) -> bool:
        here = self.subject.anatomy.points.get(point)
        return here is not None and here.role is PointRole.HEAD

    def _codings(
        self, parts: Mapping[GraphPart, ir.Model], floats: Sequence[str], samples: Mapping[str, Sample]
    ) -> dict[str, Coding]:
        """How the input of each int8 product is stored: by its learned range if there is one, else by that of its sample."""
        codings: dict[str, Coding] = {}
        missing = set[str]()
        for program in parts.values():
            for product in products(program.graph):
                if product.name in self._weights_of(program.graph, floats):
                    continue
                source, point = str(product.source.name), self._point(product)
                if self.ranges is not None and point is not None and point in self.ranges.activations:
                    bits = self.ranges.activation_bits
                    codings[source] = Coding(*self.ranges.activations[point].grid(bits), 2**bits - 1)
                else:
                    missing.add(source)
        missing -= set(codings)
        known = samples or (self._samples(parts) if missing else {})
        how, percentile = self.options.calibration, self.options.percentile
        return codings | {name: Coding(*calibrate.range_of(known[name], how, percentile).grid(8)) for name in sorted(missing)}

    # -- parity

    def _check(
        self, sessions: tuple[Any, Any], variant: str, reference: Sequence[Said], tolerance: float | None
    ) -> tuple[float, float, int]:
        """The largest difference of the scores in either branch, the share of tokens that are as before, and their number.

        ModelError if the model's own outputs are not finite, ExportError if the files do not give them, as for encoders.
        """
        parity.check_finite(reference)
        top = max(float(np.abs(item["logits"]).max()) for item in reference)
        worst, where, agreeing, tokens = 0.0, "", 0, 0
        for number, (batch, expected) in enumerate(zip(self.batches, reference, strict=True)):
            hidden = _encode(sessions[0], batch)
            steps = _STEPS if number < _STEPPED else 0
            for branch, start, logits in _branches(sessions[1], batch, hidden, steps):
                real = _written_tokens(batch, self._pad)[:, start : start + logits.shape[1]]
                wanted = expected["logits"][:, start : start + logits.shape[1]][real]
                if logits.shape[:2] != real.shape or not np.isfinite(logits[real]).all():
                    raise ExportError(
                        f"the {variant} decoder gives no finite scores in its {branch} branch.",
                        facts=[f"shape: {logits.shape}, expected: {(*real.shape, wanted.shape[-1])}"],
                        help=parity.REPORT,
                    )
                difference = float(np.abs(logits[real] - wanted).max(initial=0.0))
                if difference > worst:
                    worst, where = (
                        difference,
                        f"in its {branch} branch, on a batch of {len(real)} x {batch['input_ids'].shape[1]}",
                    )
                agreeing += int(parity.agree(logits[real], wanted, top).sum()) if len(wanted) else 0
                tokens += len(wanted)
        share = agreeing / max(1, tokens)
        if tolerance is None and share < self.options.agreement:
            raise ExportError(
                f"the {variant} files write as the model does on {share:.1%} of {tokens} tokens only.",
                facts=[f"least allowed: {self.options.agreement:.0%}", f"largest difference: {worst:.3g} of {top:.3g}"],
                help="this CPU may saturate int8 sums: try weight_bits=7 (export: {reduce_range: true}); or ship the fp32 files.",
            )
        if tolerance is not None and worst > tolerance * max(1.0, top):
            raise ExportError(
                f"the {variant} decoder differs from the model by {worst:.2g} {where}.",
                facts=[f"allowed: {tolerance * max(1.0, top):.2g}", f"largest score: {top:.3g}"],
                help=parity.REPORT,
            )
        return worst, share, tokens


# -- Runs of the files -------------------------------------------------------------------------------------------------------


def _inputs(batch: Arrays) -> dict[str, np.ndarray]:
    """The inputs of both halves; ExportError if the tokens to be written are missing. A missing mask is ones."""
    if "decoder_input_ids" not in batch:
        raise ExportError(
            "a batch holds no decoder_input_ids, and files that write texts are compared on what the decoder reads.",
            help="give export() batches with input_ids, attention_mask and decoder_input_ids.",
        )
    ids = np.asarray(batch["input_ids"], np.int64)
    mask = np.asarray(batch.get("attention_mask", np.ones_like(ids)), np.int64)
    result = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": np.asarray(batch["decoder_input_ids"], np.int64)}
    if "decoder_attention_mask" in batch:
        result["decoder_attention_mask"] = np.asarray(batch["decoder_attention_mask"], np.int64)
    return result


def _written_tokens(batch: Arrays, pad: int | None) -> np.ndarray:
    """Which tokens that the decoder reads are no padding: (batch, target). The first never is: many decoders start with that token."""
    if "decoder_attention_mask" in batch:
        return np.asarray(batch["decoder_attention_mask"]) == 1
    real = np.asarray(batch["decoder_input_ids"] != pad) if pad is not None else np.ones(batch["decoder_input_ids"].shape, bool)
    real[:, 0] = True
    return real


def _encode(session: Any, batch: Arrays) -> np.ndarray:
    return np.asarray(session.run([HIDDEN], {name: batch[name] for name in ("input_ids", "attention_mask")})[0])


def _first(session: Any, batch: Arrays, hidden: np.ndarray, tokens: int | None = None) -> dict[str, np.ndarray]:
    """All outputs for the first tokens, by default for all that there are."""
    feeds = {
        "input_ids": batch["decoder_input_ids"][:, :tokens],
        MASK: batch["attention_mask"],
        ENCODED: hidden,
        CACHE_FLAG: np.asarray([False]),
    }
    for item in session.get_inputs():
        if item.name not in feeds:  # keys and values that this branch does not read
            feeds[item.name] = np.zeros([size if isinstance(size, int) else 1 for size in item.shape], np.float32)
    outputs = [item.name for item in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, feeds), strict=True))


def _branches(session: Any, batch: Arrays, hidden: np.ndarray, steps: int) -> Iterator[tuple[str, int, np.ndarray]]:
    """The name of a branch, the place of a token and the scores from there on, for all tokens at once and then one by one."""
    yield "first", 0, _first(session, batch, hidden)["logits"]
    if not steps:
        return
    got = _first(session, batch, hidden, 1)
    outputs = [item.name for item in session.get_outputs()]
    past = {name.replace("present.", "past_key_values."): value for name, value in got.items() if name != "logits"}
    for place in range(1, min(1 + steps, batch["decoder_input_ids"].shape[1])):
        feeds = {
            "input_ids": batch["decoder_input_ids"][:, place : place + 1],
            MASK: batch["attention_mask"],
            ENCODED: hidden,
            CACHE_FLAG: np.asarray([True]),
        }
        got = dict(zip(outputs, session.run(outputs, {**feeds, **past}), strict=True))
        past |= {name.replace("present.", "past_key_values."): value for name, value in got.items() if ".decoder." in name}
        yield "second", place, got["logits"]


# -- Edits -------------------------------------------------------------------------------------------------------------------


@contextmanager
def _inside(graph: ir.Graph) -> Iterator[None]:
    """Hides a graph's outputs: no product is then the last one, which other exports leave in float."""
    outputs = {str(value.name): value for value in graph.outputs}
    graph.outputs.clear()
    try:
        yield
    finally:
        there = {str(value.name): value for node in graph for value in node.outputs}
        graph.outputs.extend(there.get(name, value) for name, value in outputs.items())


def _int8_positions(graph: ir.Graph, coding: WeightCoding) -> int:
    """Stores tables of positions in int8 with a scale per row, like `int8_embeddings`; gives their number."""
    editor = Editor(graph)
    count = 0
    for node in [node for node in graph if node.op_type == "Slice"]:
        table, *where = node.inputs
        rows = constant_of(table)
        if table is None or rows is None or rows.ndim != 2 or rows.dtype != np.float32 or len(rows) < TABLE_ROWS:
            continue
        values, scales = int8.quantize_weight(rows, 0, coding)
        small = editor.constant(values, np.int8, f"{table.name}.int8")
        scale = editor.constant(scales[:, None], np.float32, f"{table.name}.scale")
        got = editor.one(node, "Cast", [editor.one(node, "Slice", [small, *where])], to=int(ir.DataType.FLOAT))
        editor.replace(node.outputs[0], editor.one(node, "Mul", [got, editor.one(node, "Slice", [scale, *where])]))
        editor.remove(node)
        count += 1
    return count


def _rows(value: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Rows of an activation that stand for real tokens: (rows, width)."""
    return np.asarray(value[real]).reshape(-1, value.shape[-1])


def _whole(size: Any) -> int:
    return size if isinstance(size, int) else 1
