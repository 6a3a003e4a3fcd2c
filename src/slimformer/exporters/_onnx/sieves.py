"""Sieves in the graph: behind the attention of a layer the words that stay are gathered, and what follows computes them alone.

A model with sieves is traced with all its words; rewrites and int8 treat it like any other graph. `sift` then cuts it between the
attention and the feed-forward of each layer with a sieve. Words are ordered by the attention that they get, the first one before all, and
as many columns go on as the text of a batch that keeps most; those that a shorter text does not need are padding. What follows from the
inputs alone, such as the summand of the scores for padding, is computed again from what is left of them. At the end of a model that
answers for each word, those that left come back with the vector that they had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from slimformer.core.junction import SHARE_PARTS, SIEVE, Sieve, operator_name
from slimformer.core.sieving import FIRST, latest_margins
from slimformer.errors import ExportError
from slimformer.exporters._onnx.graph import CUT, Editor, Unexpected, ancestors, light_values, rank_of, required, turned_values
from slimformer.exporters._onnx.parity import GraphOutputs
from slimformer.exporters.base import Arrays

END = f"{CUT}end"  # the hidden states that the head reads
MASK = "attention_mask"
TOO_CLOSE = 1e-4  # times the average attention: words so close to one another may change places


def state_name(layer: str) -> str:
    """What the value between the attention and the feed-forward of a layer is called."""
    return f"{CUT}state.{layer}"


def before_name(layer: str) -> str:
    """What the value that a layer reads is called."""
    return f"{CUT}before.{layer}"


def shares_name(layer: str) -> str:
    """What the softmax of a layer's attention is called."""
    return f"{CUT}shares.{layer}"


# -- Cutting a graph of all words --------------------------------------------------------------------------------------------------


def sift(program: ir.Model, sieves: Mapping[str, Sieve], heads: Mapping[str, int]) -> None:
    """Lets a graph of all words, in place, compute those that the sieves leave.

    `sieves`: in the order of the layers; `heads`: how many each of these layers has.
    """
    graph = program.graph
    named = {str(value.name): value for node in graph for value in node.outputs}
    cuts = [
        _Cut(
            sieve,
            heads[layer],
            _named(named, state_name(layer)),
            _named(named, shares_name(layer)),
            named.get(before_name(layer)),
        )
        for layer, sieve in sieves.items()
    ]
    end = named.get(END)
    ends = [*((cut.state, cut.shares) for cut in cuts), *([(end,)] if end is not None else [])]
    piece: dict[ir.Node, int] = {}
    for number, values in enumerate(ends):
        for value in values:
            for node in ancestors(value):
                piece.setdefault(node, number)
    flat = _Flat(graph, Editor(graph), light_values(graph), turned_values(graph), piece, tuple(sieves))
    levels = [_Level(flat, 0, {str(value.name): value for value in graph.inputs})]
    nodes = list(graph)
    for number in range(1, len(ends) + 1):
        cut = cuts[number - 1] if number <= len(cuts) else None
        levels.append(levels[-1].sifted(cut) if cut else _all_again(levels, cuts, required(end)))
        for node in nodes:
            if piece.get(node, len(ends)) == number:
                levels[-1].take(node)
    graph.sort()


def _named(values: Mapping[str, ir.Value], name: str) -> ir.Value:
    if name not in values:
        raise Unexpected(f"it has no '{name}'")
    return values[name]


@dataclass(frozen=True)
class _Cut:
    sieve: Sieve
    heads: int
    state: ir.Value  # (batch, seq, hidden), or (seq, batch, hidden): what the feed-forward reads
    shares: ir.Value  # (batch, heads, seq, seq)
    before: ir.Value | None  # what the layer read; None if nothing comes back


@dataclass(frozen=True)
class _Flat:
    """The graph of all words, and which nodes belong to which piece."""

    graph: ir.Graph
    editor: Editor
    light: set[ir.Value]
    turned: set[ir.Value]
    piece: Mapping[ir.Node, int]
    layers: tuple[str, ...]  # with a sieve
    numbers: Iterator[int] = field(default_factory=count)

    def label(self, number: int) -> str:
        """A name for an operator that only the sieve of this number needs, or the end; a profile counts it there."""
        layer = self.layers[number] if number < len(self.layers) else None
        return operator_name(SIEVE, layer, next(self.numbers))


@dataclass
class _Level:
    """One piece of the graph, which computes the words that are left there."""

    flat: _Flat
    number: int
    inputs: dict[str, ir.Value]  # the graph's inputs for these words: (batch, words)
    above: _Level | None = None
    columns: ir.Value | None = None  # which words of the level above these are: (batch, words)
    known: dict[ir.Value, ir.Value] = field(default_factory=dict)  # a value of the graph of all words -> what it is here

    def take(self, node: ir.Node) -> None:
        """Lets a node of this piece read what its inputs are here."""
        if all(value in self.flat.light for value in node.outputs):
            return  # it is computed again where it is read
        for index, value in enumerate(node.inputs):
            if value is not None:
                node.replace_input_with(index, self.here(value))
        for value in node.outputs:  # the tracer noted as many words as the inputs have
            if value.shape is not None and not value.is_graph_output():
                value.shape = ir.Shape([size if isinstance(size, int) else None for size in value.shape])

    def here(self, value: ir.Value) -> ir.Value:
        """What a value of the graph of all words is among the words of this level."""
        producer = value.producer()
        if self.number == 0 or value in self.known:
            return self.known.get(value, value)
        if producer is None:
            return self.inputs.get(str(value.name), value) if value.is_graph_input() else value
        if value in self.flat.light:
            self._copy(producer)
        elif self.flat.piece.get(producer, self.number) == self.number:
            return value
        else:
            self.known[value] = self._gathered(value)
        return self.known[value]

    def _copy(self, node: ir.Node) -> None:
        inputs = [None if value is None else self.here(value) for value in node.inputs]
        copy = ir.Node(node.domain, node.op_type, inputs, attributes=node.attributes.values(), num_outputs=len(node.outputs))
        self.flat.graph.append(copy)
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.type, self.known[old] = old.type, new

    def _gathered(self, value: ir.Value) -> ir.Value:
        """The words of this level of a hidden state."""
        if self.above is None or self.columns is None or rank_of(value) != 3:
            raise Unexpected(f"'{value.name}' is no hidden state, and it is read on both sides of a sieve")
        rows, flat = self.above.places(self.columns, value), self.above.rows_of(value)
        found = self.above.node("Gather", [flat, rows], axis=0)
        found.type, found.shape = value.type, ir.Shape([None, None, required_shape(value)[2]])
        return found

    def places(self, columns: ir.Value, like: ir.Value) -> ir.Value:
        """Where some words of this level, (batch, words), stand among the rows of a hidden state: in the order of its axes."""
        height, length = (self.node("Shape", [self.inputs[MASK]], start=axis, end=axis + 1) for axis in (0, 1))
        zero, one = self.constant(0), self.constant(1)
        row = self.node("Range", [zero, self.node("Squeeze", [height]), one])  # (batch,)
        if like in self.flat.turned:  # row = column * batch + text
            turned = self.node("Transpose", [columns], perm=[1, 0])
            return self.node("Add", [self.node("Mul", [turned, height]), row])
        first = self.node("Unsqueeze", [self.node("Mul", [row, length]), self.constant([1])])
        return self.node("Add", [first, columns])

    def rows_of(self, value: ir.Value) -> ir.Value:
        """A hidden state of this level as (rows, hidden)."""
        return self.node("Reshape", [self.here(value), self.constant([-1, required_shape(value)[2]])])

    def sifted(self, cut: _Cut) -> _Level:
        """The level of the words that a sieve leaves."""
        mask, shares = self.inputs[MASK], self.here(cut.shares)
        there = self.node("Greater", [mask, self.constant(0)])  # (batch, words)
        asking = self.node("Unsqueeze", [self.node("Cast", [there], to=int(ir.DataType.FLOAT)), self.constant([1])])
        every = self.node("ReduceSum", [shares, self.constant([1])], keepdims=0)  # (batch, words, words): over the heads
        received = self.node("Squeeze", [self.node("MatMul", [asking, every]), self.constant([1])])
        received = self.node("Mul", [received, self.constant(1 / cut.heads, np.float32)])  # (batch, words)
        length = self.node("Squeeze", [self.node("Shape", [mask], start=1, end=2)])
        column = self.node("Range", [self.constant(0), length, self.constant(1)])
        first = self.node("Equal", [column, self.constant(0)])  # (words,)
        if cut.sieve.threshold is None:
            words = self.node("ReduceSum", [mask, self.constant([1])], keepdims=1)
            parts = self.node(
                "Add", [self.node("Mul", [words, self.constant(cut.sieve.parts)]), self.constant(SHARE_PARTS - 1)]
            )
            kept = self.node("Max", [self.node("Div", [parts, self.constant(SHARE_PARTS)]), self.constant(1)])  # (batch, 1)
            movable = there
        else:
            enough = self.node("GreaterOrEqual", [received, self.constant(cut.sieve.threshold, np.float32)])
            movable = self.node("And", [there, self.node("Or", [enough, first])])
            placed = self.node("Cast", [self.node("Or", [movable, first])], to=int(ir.DataType.INT64))
            kept = self.node("ReduceSum", [placed, self.constant([1])], keepdims=1)
        worth = self.node("Where", [movable, received, self.constant(-1.0, np.float32)])
        worth = self.node("Where", [first, self.constant(FIRST, np.float32), worth])
        most = self.node("Reshape", [self.node("ReduceMax", [kept], keepdims=0), self.constant([1])])
        top = ir.node("TopK", [worth, most], {"axis": 1, "largest": 1, "sorted": 1}, num_outputs=2)
        top.name = self.flat.label(self.number)
        self.flat.graph.append(top)
        columns = top.outputs[1]
        place = self.node("Range", [self.constant(0), self.node("Squeeze", [most]), self.constant(1)])
        # the first column has the first place even if it is padding, and stays padding there
        left = self.node("And", [self.node("Less", [place, kept]), self.node("GatherElements", [there, columns], axis=1)])
        left = self.node("Cast", [left], to=int(ir.DataType.INT64))
        inputs = {
            name: left if name == MASK else self.node("GatherElements", [value, columns], axis=1)
            for name, value in self.inputs.items()
        }
        return _Level(self.flat, self.number + 1, inputs, self, columns)

    def constant(self, values: Any, dtype: Any = np.int64) -> ir.Value:
        return self.flat.editor.constant(values, dtype)

    def node(self, op: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        node = ir.node(op, inputs, attributes or None)
        node.name = self.flat.label(self.number)
        self.flat.graph.append(node)
        return node.outputs[0]


def required_shape(value: ir.Value) -> ir.Shape:
    """The shape of a hidden state, whose last axis is known; Unexpected if it is not."""
    if value.shape is None or len(value.shape) != 3 or not isinstance(value.shape[2], int):
        raise Unexpected(f"the width of '{value.name}' is not known")
    return value.shape


def _all_again(levels: Sequence[_Level], cuts: Sequence[_Cut], end: ir.Value) -> _Level:
    """The level of the head, which reads all words: each that left has the vector that it had before its last layer."""
    state, flat = levels[-1].here(end), levels[0].flat
    before_them = set(flat.graph)
    for level, cut in zip(reversed(levels), reversed(cuts), strict=False):
        above, columns = level.above, level.columns
        assert above is not None
        assert columns is not None
        before, turned = required(cut.before), end in level.flat.turned
        if (before in level.flat.turned) != turned:
            raise Unexpected("the axes of the hidden states differ")
        rows, whole = above.places(columns, before), above.rows_of(before)
        there = level.node("Greater", [level.inputs[MASK], level.constant(0)])
        there = level.node("Transpose", [there], perm=[1, 0]) if turned else there
        there = level.node("Unsqueeze", [there, level.constant([2])])
        kept = level.node("Where", [there, state, level.node("Gather", [whole, rows], axis=0)])  # padding changes nothing
        at = level.node("Unsqueeze", [rows, level.constant([2])])
        mixed = level.node("ScatterND", [whole, at, kept])
        state = level.node("Reshape", [mixed, level.node("Shape", [above.here(before)])])
    for node in set(flat.graph) - before_them:
        node.name = flat.label(len(cuts))
    head = _Level(flat, len(levels), levels[0].inputs)
    head.known = {value: value for value in flat.light} | {end: state}
    return head


# -- Proving it ------------------------------------------------------------------------------------------------------------------


def sure_rows(model: Any) -> np.ndarray:
    """In which rows of the latest pass of a model with sieves the last bits do not decide which words stay: (batch,) of booleans."""
    return torch.stack(list(latest_margins(model))).amin(0).cpu().numpy() > TOO_CLOSE


def without_close_calls(
    batches: Sequence[Arrays], reference: Sequence[GraphOutputs], sure: Sequence[np.ndarray]
) -> tuple[list[Arrays], list[GraphOutputs]]:
    """Batches and the model's outputs for them with the rows that `sure_rows` told of each; ExportError if there are none."""
    some: list[Arrays] = []
    expected: list[GraphOutputs] = []
    for batch, outputs, rows in zip(batches, reference, sure, strict=True):
        if rows.any():
            some.append({name: np.asarray(values)[rows] for name, values in batch.items()})
            expected.append({name: values[rows] for name, values in outputs.items()})
    if not some:
        raise ExportError(
            "in every input some words get so nearly the same attention that nothing can prove the file.",
            help="give export() more inputs.",
        )
    return some, expected
