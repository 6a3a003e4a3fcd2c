"""Rewrites of a traced encoder graph: the same function in the form that a runtime runs fastest.

The trace leaves one marker node in the place of each attention and of each matrix in another form; every other node is a standard ONNX
operator. Each function here does one rewrite in place, by declared rules, and returns how many places it changed, so that the
exporter can compare that number with the model. docs/decisions/0002-onnx-graphs.md says what each rewrite is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from slimformer.exporters._onnx.graph import (
    BATCH_FIRST,
    CUT,
    MICROSOFT,
    Axes,
    Editor,
    Unexpected,
    constant_of,
    is_transposed,
    picks_token,
    products,
    rank_of,
    required,
    turned_values,
    turns,
)
from slimformer.forms.base import Formed

ATTENTION = (
    "slimformer",
    "Attention",
)  # (query, key, value, mask, perhaps a summand of the scores): each (a, b, heads, dim); which of a, b is the batch: `Axes`
TURNED = (
    "slimformer",
    "Turned",
)  # (query, key, value, mask, cosines and sines of each place): (., ., width); with a window around each
DISTANT = (
    "slimformer",
    "Distant",
)  # (query, key, value, mask, keys of distances and queries of them, or one of the two): (., ., width); with the row of each distance
PATTERN = ("slimformer", "Pattern")  # (values, mask) with what all of these heads attend to: (., ., width) -> the same
FORMED = ("slimformer", "Formed")  # (x, its parameters) with the name of its `module`: (., ., in) -> (., ., out)
TABLE = ("slimformer", "Table")  # (ids, its parameters) with the name of its `module`: (., .) -> (., ., width)
RECURRENT = (
    "slimformer",
    "Recurrent",
)  # (words, mask, weights and biases of torch's LSTM, one direction after the other): (batch, seq, in) -> its states, and the last ones
_FLAT = (TURNED, DISTANT)  # attentions that read and write (., ., width)
_LEAST = 1e-30  # a sum of weights that is not 0 is far above
MASKED = -10_000.0  # exp() of it is 0 in fp32, and it survives fp16; the smallest float does not

_ELEMENTWISE = {"Gelu", "Tanh", "Relu", "Erf", "Sigmoid", "Softplus", "Cast", "Identity"}
_BROADCAST = {"Add", "Mul", "Sub", "Div"}


def markers(graph: ir.Graph) -> list[ir.Node]:
    """The attention markers that the trace left, in order."""
    return [node for node in graph if (node.domain, node.op_type) in (ATTENTION, *_FLAT)]


# --------------------------------------------------------------------------------------------------------------- attention


def flatten_attentions(graph: ir.Graph) -> int:
    """Takes the reshapes around each marker away: it then reads and writes (., ., heads * dim). Gives the number of markers."""
    attentions = markers(graph)
    for node in attentions:
        if (node.domain, node.op_type) in _FLAT:
            continue
        uses = list(node.outputs[0].uses())
        if len(uses) != 1 or uses[0].node.op_type != "Reshape":
            raise Unexpected(f"the heads of attention {node.name} are not joined again")
        for index in range(3):
            source = required(node.inputs[index]).producer()
            if source is None or source.op_type != "Reshape":
                raise Unexpected(f"the projections of attention {node.name} are not reshaped into heads")
            node.replace_input_with(index, source.inputs[0])
            if not source.outputs[0].uses():
                graph.remove(source, safe=True)
        joined = uses[0].node.outputs[0]
        node.outputs[0].shape, node.outputs[0].type = joined.shape, joined.type
        joined.replace_all_uses_with(node.outputs[0])
        graph.remove(uses[0].node, safe=True)
    return len(attentions)


def lower_attentions(graph: ir.Graph, axes: Axes, fused: bool, shares_names: Mapping[int, str] = MappingProxyType({})) -> int:
    """Puts real operators in the place of each (flattened) marker; gives their number.

    `shares_names`: what the softmax of an attention is to be called, by its place among them.

    `fused` needs SEQ_FIRST: FusedMatMul reads heads out of (seq, batch, heads, dim) by strides, so that three of the four
    transposes of an attention, and the scaling, cost nothing. Without it, only standard operators are used.
    """
    editor = Editor(graph)
    biases: dict[ir.Value, ir.Value] = {}
    attentions = markers(graph)
    places, distances = _Around(editor, axes), _Distances(editor, axes)
    for place, node in enumerate(attentions):
        query, key, value, mask, *beyond = (required(item) for item in node.inputs)
        heads, scale = node.attributes["heads"].as_int(), node.attributes["scale"].as_float()
        width = node.attributes["width"].as_int()
        if mask not in biases:
            biases[mask] = _mask_bias(editor, node, mask)
        split = editor.constant([0, 0, heads, width // heads], np.int64)
        join = editor.constant([0, 0, width], np.int64)
        q, k, v = (editor.one(node, "Reshape", [item, split]) for item in (query, key, value))
        turned, distant = ((node.domain, node.op_type) == kind for kind in (TURNED, DISTANT))
        if turned:
            turns, first = beyond, "first" in node.attributes
            beyond = places.beyond(node, mask, first)
            k = places.turned(node, k, turns)
            q = q if first else places.turned(node, q, turns)  # the first place is turned by nothing
        if distant:
            beyond = distances.terms(node, q, k, mask, beyond)
        if fused:
            strides = {"transBatchA": 1, "transBatchB": 1, "transB": 1, "alpha": scale}
            scores = editor.one(node, "FusedMatMul", [q, k], MICROSOFT, **strides)  # (batch, heads, seq, seq)
        else:
            q = editor.one(node, "Transpose", [q], perm=[axes.batch, 2, axes.seq, 3])
            k = editor.one(node, "Transpose", [k], perm=[axes.batch, 2, 3, axes.seq])
            v = editor.one(node, "Transpose", [v], perm=[axes.batch, 2, axes.seq, 3])
            q = editor.one(node, "Mul", [q, editor.constant(scale, np.float32)])
            scores = editor.one(node, "MatMul", [q, k])
        if turned and beyond:
            scores = editor.one(node, "Add", [scores, places.with_mask(node, beyond[0], biases[mask])])
        else:
            scores = editor.one(node, "Add", [scores, biases[mask]])
            for summand in beyond:
                scores = editor.one(node, "Add", [scores, summand])
        shares = editor.one(node, "Softmax", [scores], axis=-1)
        shares.name = shares_names.get(place, shares.name)
        if fused:
            mixed = editor.one(node, "FusedMatMul", [shares, v], MICROSOFT, transBatchB=1)
        else:
            mixed = editor.one(node, "MatMul", [shares, v])  # (batch, heads, seq, dim)
        back = [0, 2, 1, 3] if axes == BATCH_FIRST else [2, 0, 1, 3]
        mixed = editor.one(node, "Transpose", [mixed], perm=back)
        editor.replace(node.outputs[0], editor.one(node, "Reshape", [mixed, join]))
        editor.remove(node)
    return len(attentions)


def _mask_bias(editor: Editor, before: ir.Node, mask: ir.Value) -> ir.Value:
    """The summand of the scores: 0 where `mask` is 1, MASKED elsewhere: (batch, 1, 1, seq) for a mask (batch, seq), and (batch, 1, seq,
    seq) for one of pairs of tokens."""
    kept = editor.one(before, "Cast", [mask], to=int(ir.DataType.FLOAT))
    lost = editor.one(before, "Sub", [editor.constant(1.0, np.float32), kept])
    bias = editor.one(before, "Mul", [lost, editor.constant(MASKED, np.float32)])
    return editor.one(before, "Unsqueeze", [bias, editor.constant([1] if rank_of(mask) == 3 else [1, 2], np.int64)])


class _Around:
    """What follows from places alone for attentions whose positions turn queries and keys, or whose words see a window around them; each
    computed once."""

    def __init__(self, editor: Editor, axes: Axes) -> None:
        self.editor, self.axes = editor, axes
        self.known: dict[tuple[Any, ...], ir.Value] = {}

    def beyond(self, node: ir.Node, mask: ir.Value, first: bool) -> list[ir.Value]:
        """MASKED for words out of the window of a marker, else 0: (1, 1, seq, seq), or (1, 1, 1, seq) for the first word alone."""
        window = node.attributes["window"].as_int()
        key = (mask, window, first)
        if window and key not in self.known:
            one, zero, step = (self.editor.constant(number, np.int64) for number in (1, 0, 1))
            size = self.editor.one(node, "Gather", [self.editor.one(node, "Shape", [mask]), one])
            places = self.editor.one(node, "Range", [zero, size, step])  # (seq,)
            if not first:
                column = self.editor.one(node, "Unsqueeze", [places, self.editor.constant([1], np.int64)])
                places = self.editor.one(node, "Abs", [self.editor.one(node, "Sub", [column, places])])  # (seq, seq)
            far = self.editor.one(node, "GreaterOrEqual", [places, self.editor.constant(window, np.int64)])
            far = self.editor.one(node, "Cast", [far], to=int(ir.DataType.FLOAT))
            far = self.editor.one(node, "Mul", [far, self.editor.constant(MASKED, np.float32)])
            axes = self.editor.constant([0, 1, 2] if first else [0, 1], np.int64)
            self.known[key] = self.editor.one(node, "Unsqueeze", [far, axes])
        return [self.known[key]] if window else []

    def with_mask(self, node: ir.Node, beyond: ir.Value, bias: ir.Value) -> ir.Value:
        """Both summands: (batch, 1, seq, seq)."""
        if (beyond, bias) not in self.known:
            self.known[beyond, bias] = self.editor.one(node, "Add", [beyond, bias])
        return self.known[beyond, bias]

    def turned(self, node: ir.Node, heads: ir.Value, turns: list[ir.Value]) -> ir.Value:
        """Queries or keys (., ., heads, dim), turned by their places: place i of a head and dim / 2 + i are coordinates in a plane.

        `turns`: cosines and sines, (1, seq, dim) each, whose halves are equal.
        """
        editor, dim = self.editor, node.attributes["width"].as_int() // node.attributes["heads"].as_int()
        cosines, sines = self.spread(node, turns, dim)
        halves = [editor.constant([number], np.int64) for number in (0, dim // 2, dim, 3)]
        low, high = (editor.one(node, "Slice", [heads, halves[begin], halves[begin + 1], halves[3]]) for begin in (0, 1))
        across = editor.one(node, "Mul", [editor.one(node, "Concat", [high, low], axis=3), sines])
        return editor.one(node, "Add", [editor.one(node, "Mul", [heads, cosines]), across])

    def spread(self, node: ir.Node, turns: list[ir.Value], dim: int) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines for heads (., ., heads, dim), the first half of the sines negative."""
        cosines, sines = turns
        if (cosines,) not in self.known:
            editor = self.editor
            shape = editor.constant([1, -1, 1, dim] if self.axes == BATCH_FIRST else [-1, 1, 1, dim], np.int64)
            signs = editor.constant(np.repeat([-1.0, 1.0], dim // 2), np.float32)
            self.known[cosines,] = editor.one(node, "Reshape", [cosines, shape])
            self.known[sines,] = editor.one(node, "Mul", [editor.one(node, "Reshape", [sines, shape]), signs])
        return self.known[cosines,], self.known[sines,]


class _Distances:
    """The summands of scores for the distance of query i and key j, which alone decides the row of a vector.

    A product with the vectors of all distances in order holds what belongs to key j at place j - i + seq - 1 of row i (seq, 2 seq). Read
    as one long row, that is a place in a table one narrower, from seq - 1 on: so nothing is gathered.
    """

    def __init__(self, editor: Editor, axes: Axes) -> None:
        self.editor, self.axes = editor, axes
        self.known: dict[tuple[Any, ...], Any] = {}

    def numbers(self, *values: int) -> ir.Value:
        return self.editor.constant(values, np.int64)

    def terms(self, node: ir.Node, q: ir.Value, k: ir.Value, mask: ir.Value, vectors: list[ir.Value]) -> list[ir.Value]:
        """(batch, heads, seq, seq) each, or (batch, heads, 1, seq) for the first word alone."""
        editor, first = self.editor, "first" in node.attributes
        q, k = (editor.one(node, "Transpose", [item], perm=[self.axes.batch, 2, self.axes.seq, 3]) for item in (q, k))
        keys, queries = (vectors[0], None) if node.attributes["keys"].as_int() else (None, vectors[0])
        queries = vectors[1] if len(vectors) > 1 else queries
        found = []
        if keys is not None:
            product = editor.one(node, "MatMul", [q, self.chosen(node, mask, keys, falling=True)])
            found.append(product if first else self.skewed(node, mask, product))
        if queries is not None:
            chosen = self.chosen(node, mask, queries, falling=first)
            if first:
                k = editor.one(node, "Mul", [editor.one(node, "Transpose", [k], perm=[0, 1, 3, 2]), chosen])
                found.append(editor.one(node, "ReduceSum", [k, self.numbers(2)]))
            else:
                product = self.skewed(node, mask, editor.one(node, "MatMul", [k, chosen]))
                found.append(editor.one(node, "Transpose", [product], perm=[0, 1, 3, 2]))
        return found

    def chosen(self, node: ir.Node, mask: ir.Value, vectors: ir.Value, falling: bool) -> ir.Value:
        """The vectors of the distances that a text has, from the largest or the smallest on: (heads, size of a head, distances)."""
        editor, rows, first = self.editor, node.attributes["rows"].as_ints(), "first" in node.attributes
        key = (mask, tuple(rows), falling, first)
        if key not in self.known:
            size, one, farthest = self.sizes(node, mask)["seq"], editor.constant(1, np.int64), len(rows) // 2
            low = editor.constant(0, np.int64) if first else editor.one(node, "Sub", [one, size])
            high = size if first else editor.one(node, "Add", [one, size])
            places = editor.one(node, "Range", [low, high, one])
            places = editor.one(node, "Neg", [places]) if falling else places
            ends = (editor.constant(end, np.int64) for end in (-farthest, farthest))
            places = editor.one(node, "Clip", [places, *ends])
            places = editor.one(node, "Add", [places, editor.constant(farthest, np.int64)])
            self.known[key] = editor.one(node, "Gather", [self.table(rows), places])
        return editor.one(node, "Gather", [vectors, self.known[key]], axis=2)

    def table(self, rows: Sequence[int]) -> ir.Value:
        key = (tuple(rows),)
        if key not in self.known:
            self.known[key] = self.editor.constant(rows, np.int64, "rows_of_distances")
        return cast(ir.Value, self.known[key])

    def sizes(self, node: ir.Node, mask: ir.Value) -> dict[str, ir.Value]:
        """What follows from the length of a text."""
        if (mask,) not in self.known:
            editor = self.editor
            seq = editor.one(node, "Shape", [mask], start=1, end=2)
            begin = editor.one(node, "Sub", [seq, self.numbers(1)])
            row = editor.one(node, "Add", [seq, begin])  # 2 seq - 1
            end = editor.one(node, "Add", [begin, editor.one(node, "Mul", [seq, row])])
            shape = editor.one(node, "Concat", [self.numbers(0, 0, -1), row], axis=0)
            number = editor.one(node, "Squeeze", [seq, self.numbers(0)])
            self.known[mask,] = {"seq": number, "seqs": seq, "begin": begin, "end": end, "shape": shape}
        return cast("dict[str, ir.Value]", self.known[mask,])

    def skewed(self, node: ir.Node, mask: ir.Value, product: ir.Value) -> ir.Value:
        """What belongs to key j at place j of row i: (batch, heads, seq, seq) from (batch, heads, seq, 2 seq)."""
        editor, sizes = self.editor, self.sizes(node, mask)
        flat = editor.one(node, "Reshape", [product, self.numbers(0, 0, -1)])
        flat = editor.one(node, "Slice", [flat, sizes["begin"], sizes["end"], self.numbers(2)])
        table = editor.one(node, "Reshape", [flat, sizes["shape"]])  # (batch, heads, seq, 2 seq - 1)
        return editor.one(node, "Slice", [table, self.numbers(0), sizes["seqs"], self.numbers(3)])


def lower_patterns(graph: ir.Graph, axes: Axes) -> int:
    """Puts shifts and running sums along the words in the place of each marker of heads with fixed patterns; gives their number.

    `core.patterning.attend_fixed` says what they compute. All that follows from the mask alone is computed once.
    """
    nodes = [node for node in graph if (node.domain, node.op_type) == PATTERN]
    if not nodes:
        return 0
    places = _Places(Editor(graph), nodes[0], required(nodes[0].inputs[1]), axes)
    for node in nodes:
        places.editor.replace(node.outputs[0], places.lowered(node))
    for node in nodes:  # what all of them need stands before the first one
        places.editor.remove(node)
    return len(nodes)


class _Places:
    """What follows from the mask for heads that attend by position, written before the first of them that needs it."""

    def __init__(self, editor: Editor, first: ir.Node, mask: ir.Value, axes: Axes) -> None:
        self.editor, self.first, self.axis = editor, first, axes.seq
        real = self.light("Cast", mask, to=int(ir.DataType.FLOAT))  # (batch, seq)
        real = real if axes == BATCH_FIRST else self.light("Transpose", real, perm=[1, 0])
        self.real = self.light("Unsqueeze", real, self.numbers(2))  # (., ., 1)
        self.known: dict[str, Any] = {}

    def light(self, operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self.editor.one(self.first, operator, list(inputs), **attributes)

    def numbers(self, *values: int) -> ir.Value:
        return self.editor.constant(values, np.int64)

    def number(self, value: float) -> ir.Value:
        return self.editor.constant(value, np.float32)

    def beside(self, before: ir.Node, values: ir.Value, back: bool) -> ir.Value:
        """At each place what stands at the one before, or behind it; at the end of the sequence what stands there."""
        axis, last = self.numbers(self.axis), np.iinfo(np.int64).max
        spans = ((0, 1), (0, -1)) if back else ((1, last), (-1, last))
        ends = [
            self.editor.one(before, "Slice", [values, self.numbers(begin), self.numbers(end), axis]) for begin, end in spans
        ]
        return self.editor.one(before, "Concat", ends, axis=self.axis)

    def sums(self, before: ir.Node, values: ir.Value, back: bool) -> ir.Value:
        """At each place the sum of all that stands two or more places before, or behind it."""
        axis = self.editor.constant(self.axis, np.int64)
        running = self.editor.one(before, "CumSum", [values, axis], exclusive=1, reverse=int(not back))
        return self.beside(before, running, back)

    def neighbours(self, back: bool) -> ir.Value:
        """Whether a word stands before, or behind it, at each place: (., ., 1) of booleans."""
        key = f"neighbours {back}"
        if key not in self.known:
            self.known[key] = self.light("Greater", self.beside(self.first, self.real, back), self.number(0.0))
        return cast(ir.Value, self.known[key])

    def weights(self, from_start: bool) -> ir.Value:
        """The cube of each word's place, 0 for padding: (., ., 1)."""
        key = f"weights {from_start}"
        if key not in self.known:
            rank = self.light("CumSum", self.real, self.editor.constant(self.axis, np.int64))
            count = self.light("Max", self.light("ReduceSum", self.real, self.numbers(self.axis), keepdims=1), self.number(1.0))
            if not from_start:
                rank = self.light("Sub", self.light("Add", count, self.number(1.0)), rank)
            place = self.light("Div", rank, count)
            square = self.light("Mul", place, place)
            self.known[key] = self.light("Mul", self.light("Mul", square, place), self.real)
        return cast(ir.Value, self.known[key])

    def shares(self, from_start: bool) -> ir.Value:
        """The weights of words over the sum of a text's: (., ., 1)."""
        key = f"shares {from_start}"
        if key not in self.known:
            weights = self.weights(from_start)
            total = self.light("ReduceSum", weights, self.numbers(self.axis), keepdims=1)
            self.known[key] = self.light("Div", weights, self.light("Max", total, self.number(_LEAST)))
        return cast(ir.Value, self.known[key])

    def totals(self, back: bool) -> tuple[ir.Value, ir.Value]:
        """Whether a word stands two or more places before, or behind it, and the sum of the weights there: (., ., 1) each."""
        key = f"totals {back}"
        if key not in self.known:
            total = self.sums(self.first, self.weights(back), back)
            some = self.light("Greater", total, self.number(0.0))
            self.known[key] = some, self.light("Max", total, self.number(_LEAST))
        return cast("tuple[ir.Value, ir.Value]", self.known[key])

    def lowered(self, node: ir.Node) -> ir.Value:
        """What operators before a marker give in its place."""
        editor, values, attends = self.editor, required(node.inputs[0]), node.attributes["attends"].as_string()
        back, from_start = attends in ("previous", "left"), attends in ("left", "end")
        if attends in ("previous", "next"):
            return editor.one(node, "Where", [self.neighbours(back), self.beside(node, values, back), values])
        if attends in ("start", "end"):
            weighted = editor.one(node, "Mul", [values, self.shares(from_start)])
            mean = editor.one(node, "ReduceSum", [weighted, self.numbers(self.axis)], keepdims=1)
            return editor.one(node, "Expand", [mean, editor.one(node, "Shape", [values])])
        some, total = self.totals(back)
        weighted = editor.one(node, "Mul", [values, self.weights(from_start)])
        mean = editor.one(node, "Div", [self.sums(node, weighted, back), total])
        return editor.one(node, "Where", [some, mean, values])


def unturn(graph: ir.Graph) -> int:
    """Makes a (flattened) SEQ_FIRST trace BATCH_FIRST by taking its transposes out: everything between them works row by row."""
    editor = Editor(graph)
    transposes = [node for node in graph if turns(node)]
    for node in transposes:
        source, turned = required(node.inputs[0]), node.outputs[0]
        name, shape = str(turned.name), turned.shape
        turned.replace_all_uses_with(source, replace_graph_outputs=True)
        editor.remove(node)
        if name.startswith(CUT) or source.is_graph_output():
            source.name = name
        if source.is_graph_output():
            source.shape = shape
    for node in graph:  # the tracer noted shapes in the other order
        for value in node.outputs:
            if value.shape is not None and value.shape.rank() == 3 and not value.is_graph_output():
                value.shape = ir.Shape([None, None, value.shape[2]])
    return len(transposes)


# ------------------------------------------------------------------------------------------------------ the first token


def read_only_first(graph: ir.Graph, axes: Axes) -> int:
    """Lets the last layer compute the first token alone if the head reads no other; gives the number of nodes it narrowed.

    This is exact: after the last attention a token depends on no other. Queries, attention output and feed-forward of the last layer
    then cost one token instead of a sentence. A head that reads every token (question answering) changes nothing.
    """
    picks = _first_token_picks(graph, axes)
    narrow: dict[ir.Node, tuple[int, ...]] = dict.fromkeys(picks, (0,))
    for node in reversed(list(graph)):
        operands = _rowwise_operands(node)
        if node in narrow or not operands or node.outputs[0].is_graph_output():
            continue
        uses = [use for output in node.outputs for use in output.uses()]
        if uses and all(use.node in narrow and use.idx in narrow[use.node] for use in uses):
            narrow[node] = operands
    editor = Editor(graph)
    cuts: dict[ir.Value, ir.Value] = {}
    start, stop, axis = (editor.constant([number], np.int64) for number in (0, 1, axes.seq))
    for node in list(graph):
        for index in narrow.get(node, ()):
            value = node.inputs[index]
            if value is None or value.producer() in narrow or node in picks:
                continue
            if value not in cuts:
                cuts[value] = editor.one(node, "Slice", [value, start, stop, axis])
                cuts[value].type, cuts[value].shape = value.type, _narrowed(value, axes)
            node.replace_input_with(index, cuts[value])
        if node in narrow and (node.domain, node.op_type) == ATTENTION and len(node.inputs) > 4:
            beyond = required(node.inputs[4])  # (1, heads, seq, seq)
            node.replace_input_with(4, editor.one(node, "Slice", [beyond, start, stop, editor.constant([2], np.int64)]))
        if node in narrow and (node.domain, node.op_type) in _FLAT:
            node.attributes["first"] = ir.AttrInt64("first", 1)
        for output in node.outputs if node in narrow and node not in picks else ():
            output.shape = _narrowed(output, axes)
    return len(narrow) - len(picks)


def _narrowed(value: ir.Value, axes: Axes) -> ir.Shape | None:
    if value.shape is None:
        return None
    return ir.Shape([1 if axis == axes.seq else size for axis, size in enumerate(value.shape)])


def _first_token_picks(graph: ir.Graph, axes: Axes) -> list[ir.Node]:
    """The nodes that take token 0 of a hidden state, changed to read the sequence axis of `axes`: one of the head, one of each exit."""
    picks = [node for node in graph if picks_token(node, BATCH_FIRST) and rank_of(node.inputs[0]) == 3]
    picks = [node for node in picks if not np.any(constant_of(node.inputs[1]))]
    if axes == BATCH_FIRST:
        return picks
    sources = [required(pick.inputs[0]).producer() for pick in picks]
    if any(source is None or not turns(source) for source in sources):
        return []
    for pick, source in zip(picks, sources, strict=True):
        assert source is not None
        pick.replace_input_with(0, source.inputs[0])
        pick.attributes["axis"] = ir.AttrInt64("axis", axes.seq)
        if not source.outputs[0].uses():
            graph.remove(source, safe=True)
    return picks


def _takes_columns(node: ir.Node) -> bool:
    """Whether a node takes some columns of a hidden state."""
    axes = constant_of(node.inputs[3]) if node.op_type == "Slice" and len(node.inputs) > 3 else None
    return axes is not None and rank_of(node.inputs[0]) == 3 and [int(axis) % 3 for axis in axes] == [2]


def _splits_columns(node: ir.Node) -> bool:
    """Whether a node divides a hidden state into groups of columns."""
    return node.op_type == "Split" and rank_of(node.inputs[0]) == 3 and node.attributes["axis"].as_int() in (-1, 2)


def _rowwise_operands(node: ir.Node) -> tuple[int, ...]:
    """Inputs whose row i alone decides row i of the node's output; empty if the node mixes rows."""
    if (node.domain, node.op_type) in {ATTENTION, *_FLAT, FORMED}:
        return (0,)  # keys and values are read whole
    if node.op_type in _ELEMENTWISE or _takes_columns(node) or _splits_columns(node):
        return (0,)
    if node.op_type == "Concat" and rank_of(node.outputs[0]) == 3 and node.attributes["axis"].as_int() in (-1, 2):
        return tuple(range(len(node.inputs)))
    if node.op_type == "LayerNormalization" and node.attributes["axis"].as_int() == -1:
        return (0,)
    if node.op_type == "MatMul":
        weight = constant_of(node.inputs[1])
        return (0,) if weight is not None and weight.ndim == 2 else ()
    if node.op_type in _BROADCAST:
        operands = []
        for index, value in enumerate(node.inputs):
            constant = constant_of(value)
            if constant is not None and constant.ndim <= 1:
                continue
            if value is None or rank_of(value) != 3:
                return ()
            operands.append(index)
        return tuple(operands)
    return ()


# ------------------------------------------------------------------------------------------------- matrices in other forms


@dataclass(frozen=True)
class Writer:
    """What a form writes with: nodes before its marker, and constants named after its module."""

    editor: Editor
    marker: ir.Node
    name: str
    steps: list[ir.Value] = field(default_factory=list)  # what was written so far

    def constant(self, values: np.ndarray, name: str) -> ir.Value:
        kind = values.dtype if values.dtype.kind in "iu" else np.float32
        return self.editor.constant(values, kind, f"{self.name}.{name}")

    def numbers(self, *values: int) -> ir.Value:
        return self.editor.constant(values, np.int64)

    def apply(self, operator: str, *inputs: Any, **attributes: Any) -> ir.Value:
        source = required(self.marker.inputs[0])
        if operator == "MatMul" and (self.marker.domain, self.marker.op_type) == FORMED:
            for value in inputs:  # calibration makes an output of what a product reads, and an output has a type
                value.type = value.type or source.type
        result = self.editor.one(self.marker, operator, inputs, **attributes)
        result.name = f"{self.name}.step.{len(self.steps)}"  # the same in each graph that the module is in
        self.steps.append(result)
        return result


def lower_forms(graph: ir.Graph, forms: Mapping[str, Formed]) -> int:
    """Puts what its form writes in the place of the marker of each matrix; gives the number of markers.

    `forms`: the modules that left the markers, by their names in the model.
    """
    count = 0
    for kind in (FORMED, TABLE):
        editor = Editor(graph)
        for node in [node for node in graph if (node.domain, node.op_type) == kind]:
            name = node.attributes["module"].as_string()
            result = forms[name].lower(Writer(editor, node, f"model.{name}"), required(node.inputs[0]))
            editor.replace(node.outputs[0], result)
            editor.remove(node)
            count += 1
    return count


# -------------------------------------------------------------------------------------------------------------------- LSTMs


def lower_recurrences(graph: ir.Graph) -> int:
    """Puts ONNX's LSTM in the place of the marker of each layer; gives their number.

    It reads each text to its own end. ONNX has the gates in another order (input, output, forget, cell) than torch (input, forget, cell,
    output), and time as the first axis.
    """
    editor = Editor(graph)
    nodes = [node for node in graph if (node.domain, node.op_type) == RECURRENT]
    lengths: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        words, mask, *weights = (required(value) for value in node.inputs)
        units = node.attributes["units"].as_int()
        name = str(weights[0].name).removesuffix(".weight_ih_l0")
        into, back, bias, other = (
            np.stack([_in_order(weights[direction + part], units) for direction in (0, 4)]) for part in range(4)
        )
        if mask not in lengths:
            count = editor.one(node, "ReduceSum", [mask, editor.constant([1], np.int64)], keepdims=0)
            count = editor.one(node, "Max", [count, editor.constant(1, np.int64)])
            lengths[mask] = editor.one(node, "Cast", [count], to=int(ir.DataType.INT32))
        constants = {"into": into, "back": back, "bias": np.concatenate([bias, other], 1)}
        inputs = [editor.constant(values, np.float32, f"{name}.{part}") for part, values in constants.items()]
        turned = editor.one(node, "Transpose", [words], perm=[1, 0, 2])  # (seq, batch, in)
        states, last = editor.node(
            node, "LSTM", [turned, *inputs, lengths[mask]], outputs=2, direction="bidirectional", hidden_size=units
        )  # (seq, 2, batch, units), (2, batch, units)
        join = [editor.constant([0, 0, 2 * units], np.int64), editor.constant([0, 2 * units], np.int64)]
        states = editor.one(node, "Reshape", [editor.one(node, "Transpose", [states], perm=[2, 0, 1, 3]), join[0]])
        last = editor.one(node, "Reshape", [editor.one(node, "Transpose", [last], perm=[1, 0, 2]), join[1]])
        for old, new in zip(node.outputs, (states, last), strict=True):
            editor.replace(old, new)
        editor.remove(node)
    return len(nodes)


def _in_order(weight: ir.Value, units: int) -> np.ndarray:
    """A weight or bias of torch's LSTM, (4 units, ...), with its gates in ONNX's order."""
    values = constant_of(weight)
    if values is None:
        raise Unexpected("a weight of an LSTM is no constant")
    return np.concatenate([values[gate * units : (gate + 1) * units] for gate in (0, 3, 1, 2)])


# ------------------------------------------------------------------------------------------------------------------- norms


def lower_norms(graph: ir.Graph) -> int:
    """Turns LayerNorm of hidden states (., n, hidden) into InstanceNormalization over n channels, times gain, plus shift.

    These are standard operators and give the same numbers, but ONNX Runtime vectorises this kernel, and not that of
    (Skip)LayerNormalization. Gives the number of norms changed.
    """
    editor = Editor(graph)
    turned = turned_values(graph)
    channels: dict[int, tuple[ir.Value, ir.Value]] = {}
    norms = [node for node in graph if node.op_type == "LayerNormalization" and rank_of(node.inputs[0]) == 3]
    for node in norms:
        value, gain, shift = [*node.inputs, None][:3]
        value = required(value)
        axis = BATCH_FIRST.batch if value in turned else BATCH_FIRST.seq  # the axis of input_ids that is axis 1 of `value`
        if axis not in channels:
            size = editor.one(node, "Shape", [graph.inputs[0]], start=axis, end=axis + 1)
            one, zero = (editor.constant([number], np.float32) for number in (1.0, 0.0))
            channels[axis] = (editor.one(node, "Expand", [one, size]), editor.one(node, "Expand", [zero, size]))
        epsilon = node.attributes["epsilon"].as_float()
        result = editor.one(node, "InstanceNormalization", [value, *channels[axis]], epsilon=epsilon)
        result = editor.one(node, "Mul", [result, gain])
        if shift is not None:
            result = editor.one(node, "Add", [result, shift])
        editor.replace(node.outputs[0], result)
        editor.remove(node)
    return len(norms)


def separate_gelus(graph: ir.Graph) -> int:
    """Gives the bias before each Gelu a second axis, so that ONNX Runtime does not fuse the two; gives the number of Gelus.

    Its BiasGelu is slower than Add and Gelu one after the other.
    """
    editor = Editor(graph)
    count = 0
    for node in [node for node in graph if node.op_type == "Gelu"]:
        add = required(node.inputs[0]).producer()
        if add is None or add.op_type != "Add" or len(add.outputs[0].uses()) != 1:
            continue
        for index, value in enumerate(add.inputs):
            bias = constant_of(value)
            if bias is not None and bias.ndim == 1:
                add.replace_input_with(index, editor.constant(bias[None, :], np.float32, f"{required(value).name}.row"))
                count += 1
    return count


def lower_gelus(graph: ir.Graph, fused: bool) -> int:
    """Writes each exact Gelu as older runtimes know it, and gives the number.

    Gelu became a standard operator in opset 20. Before that, ONNX Runtime had its own, and files of standard operators spell it out
    with Erf; runtimes fuse the five nodes again when they load the file.
    """
    editor = Editor(graph)
    gelus = [node for node in graph if (node.domain, node.op_type) == ("", "Gelu") and _is_exact(node)]
    for node in gelus:
        value = required(node.inputs[0])
        if fused:
            result = editor.one(node, "Gelu", [value], domain=MICROSOFT)
        else:
            root, one, half = (editor.constant(number, np.float32) for number in (np.sqrt(2.0), 1.0, 0.5))
            share = editor.one(node, "Add", [editor.one(node, "Erf", [editor.one(node, "Div", [value, root])]), one])
            result = editor.one(node, "Mul", [editor.one(node, "Mul", [value, share]), half])
        editor.replace(node.outputs[0], result)
        editor.remove(node)
    return len(gelus)


def _is_exact(node: ir.Node) -> bool:
    return "approximate" not in node.attributes or node.attributes["approximate"].as_string() == "none"


def plain_gemms(graph: ir.Graph) -> int:
    """Stores the weights of Gemms as (in, out), like all others, and gives their number.

    ONNX Runtime's quantize_dynamic stumbles over the other order.
    """
    editor = Editor(graph)
    transposed = [product for product in products(graph) if is_transposed(product.node)]
    for product in transposed:
        product.node.replace_input_with(1, editor.constant(product.weight, np.float32, f"{product.name}.transposed"))
        product.node.attributes["transB"] = ir.AttrInt64("transB", 0)
    return len(transposed)


def fused_attentions(path: Path) -> int:
    """Number of attentions in a file whose heads are read in place by fused products."""
    return sum(
        node.op_type == "FusedMatMul" and "transBatchA" in node.attributes and node.attributes["transBatchA"].as_int() == 1
        for node in ir.load(path).graph
    )
