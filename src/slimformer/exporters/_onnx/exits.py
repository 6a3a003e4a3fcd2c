"""Exits in the graph: nested Ifs, so that a runtime computes no layer that no input of a batch needs any more.

A model with exits is traced flat, with an output for each exit; rewrites and int8 treat it like any other graph. `nest` then cuts it
at each exit. What lies behind goes into the branch of an If, which is taken as long as some input goes on, and gets the rows of those
inputs alone: a batch is split by exit. A constant goes into the branch that alone reads it, and a small one into each that does: ONNX
Runtime prepares the matrices of a branch beforehand only if they lie in it, and hands over all that lie outside at each If.

What crosses a cut is the hidden state, of which the rows are gathered. What follows from the inputs alone, such as the summand of the
scores for padding, is computed again from the rows of the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from slimformer.core.deciding import choose, doubt
from slimformer.core.junction import EXIT, Exit, operator_name
from slimformer.errors import ExportError
from slimformer.exporters._onnx.graph import BATCH_FIRST, SEQ_FIRST, Editor, ancestors, constant_of, light_values, turned_values
from slimformer.exporters._onnx.parity import REPORT, GraphOutputs, exit_output, run_graph
from slimformer.exporters.base import LAYERS, Arrays

_SMALL = 64  # numbers of a constant, at most, of which each branch has its own
NEXT_TO = 1e-4  # an input this close to a threshold may leave at either side of it


# -- Cutting a flat graph --------------------------------------------------------------------------------------------------------


def nest(program: ir.Model, exits: Mapping[str, Exit], passed: Sequence[int], answer: str = "logits") -> None:
    """Turns a flat graph, in place, into one that stops: its outputs are then `answer` and LAYERS, both with a row for each input.

    `exits`: in the order of the layers; `passed`: how many layers were computed at each, and at the end.
    """
    graph = program.graph
    values = {str(value.name): value for value in graph.outputs}
    ends = [values[exit_output(layer)] for layer in exits] + [values[answer]]
    flat = _Flat(graph, ends, exits, passed, Editor(graph))
    level = _Level(flat, 0)
    logits, layers = level.answer()
    flat.move_constants()
    before = list(level.nodes)
    for node in list(graph):
        graph.remove(node)
    graph.extend(before)
    for value, name, kind, width in (
        (logits, answer, ir.DataType.FLOAT, ends[-1].shape),
        (layers, LAYERS, ir.DataType.INT64, None),
    ):
        value.name, value.type = name, ir.TensorType(kind)
        value.shape = ir.Shape(["batch"]) if width is None else width
    graph.outputs.clear()
    graph.outputs.extend([logits, layers])


class _Flat:
    """A flat graph cut into pieces: which nodes belong to which, and which values no matrix has a part in."""

    def __init__(
        self, graph: ir.Graph, ends: Sequence[ir.Value], exits: Mapping[str, Exit], layers: Sequence[int], editor: Editor
    ) -> None:
        self.graph, self.ends, self.exits, self.layers, self.editor = graph, ends, list(exits.values()), layers, editor
        self.names = [*exits, None]  # of the layers with an exit, and of the end
        self.turned = turned_values(graph)
        self.piece: dict[ir.Node, int] = {}
        for number, end in enumerate(ends):
            for node in ancestors(end):
                self.piece.setdefault(node, number)
        self.light = light_values(graph)
        self.readers: dict[ir.Value, set[int]] = {}  # of a constant: the levels
        self.branches: dict[int, ir.Graph] = {}
        self._count = 0

    def move_constants(self) -> None:
        """Moves each constant that one branch alone reads into it."""
        for value, levels in self.readers.items():
            number = next(iter(levels))
            if len(levels) == 1 and number in self.branches and value.name in self.graph.initializers:
                self.graph.initializers.pop(str(value.name))
                self.branches[number].register_initializer(value)

    def name(self) -> str:
        """A name that no other value has, in any branch."""
        self._count += 1
        return f"exit.value.{self._count}"

    def label(self, number: int) -> str:
        """A name for an operator that only the exit of this number needs, or the end; a profile counts it there."""
        self._count += 1
        return operator_name(EXIT, self.names[number], self._count)


@dataclass
class _Level:
    """One piece of the graph, in the branch of an If: it computes the inputs that no exit before it let go.

    `rows`: which of the level above these inputs are, (rows,); None at the top, where all are.
    """

    flat: _Flat
    number: int
    above: _Level | None = None
    rows: ir.Value | None = None
    nodes: list[ir.Node] = field(default_factory=list)
    known: dict[ir.Value, ir.Value] = field(default_factory=dict)  # a value of the flat graph -> what it is here
    constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = field(default_factory=dict)
    said: ir.Value | None = None  # the answer of the exit here, for the next one to compare with
    agreed: ir.Value | None = None  # exits in a row that have agreed: (rows,)

    def answer(self) -> tuple[ir.Value, ir.Value]:
        """What each input here is answered in the end, (rows, outputs), and the layers that it has passed: (rows,)."""
        flat = self.flat
        for node in flat.graph:
            if flat.piece.get(node) == self.number:
                self.take(node)
        logits = self.here(flat.ends[self.number])
        height = self.node("Shape", [logits], start=0, end=1)
        passed = self.node("Expand", [self.constant([flat.layers[self.number]], np.int64), height])
        if self.number == len(flat.exits):
            return self.node("Identity", [logits]), passed
        undecided = self.node("Not", [self.sure(flat.exits[self.number], logits)])
        rows = self.node("Reshape", [self.node("NonZero", [undecided]), self.constant([-1], np.int64)])
        some = self.node("Greater", [self.node("Size", [rows]), self.constant(0, np.int64)])
        return self.branch(some, rows, logits, passed)

    def branch(self, some: ir.Value, rows: ir.Value, logits: ir.Value, passed: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Goes on with `rows` if there are some, and puts what becomes of them in the place of what is said here."""
        beyond, stop = _Level(self.flat, self.number + 1, self, rows), _Level(self.flat, self.number + 1, self, rows)
        at = beyond.node("Unsqueeze", [rows, beyond.constant([1], np.int64)], behind=self)
        later = beyond.answer()
        merged = [
            beyond.node("ScatterND", [old, at, new], behind=self) for old, new in zip((logits, passed), later, strict=True)
        ]
        kept = [stop.node("Identity", [value], behind=self) for value in (logits, passed)]
        for values in (merged, kept):
            for value, kind in zip(values, (ir.DataType.FLOAT, ir.DataType.INT64), strict=True):
                value.type = ir.TensorType(kind)
        branches = {
            name: ir.Graph([], values, nodes=level.nodes, initializers=list(level.constants.values()), name=self.flat.name())
            for name, values, level in (("then_branch", merged, beyond), ("else_branch", kept, stop))
        }
        self.flat.branches[beyond.number] = branches["then_branch"]
        node = ir.node("If", [some], branches, num_outputs=2)
        self.add(node, self.flat.label(self.number))
        return node.outputs[0], node.outputs[1]

    # -- Values

    def here(self, value: ir.Value) -> ir.Value:
        """What a value of the flat graph is among the inputs of this level."""
        if value in self.known:
            return self.known[value]
        producer = value.producer()
        if producer is None and value not in self.flat.graph.inputs:
            array = constant_of(value)
            if self.above is not None and array is not None and array.size <= _SMALL:
                self.known[value] = self.constant(array, array.dtype)
                return self.known[value]
            self.flat.readers.setdefault(value, set()).add(self.number)
            return value
        if self.above is None:
            return value
        if producer is not None and value in self.flat.light:
            self.take(producer)
            return self.known[value]
        axis = SEQ_FIRST.batch if value in self.flat.turned else BATCH_FIRST.batch
        self.known[value] = self.node("Gather", [self.above.here(value), self.rows], behind=self.above, axis=axis)
        self.known[value].type = value.type
        return self.known[value]

    def take(self, node: ir.Node) -> None:
        """Computes a node of the flat graph among the inputs of this level."""
        if self.above is None:
            for value in node.inputs:
                if value is not None:
                    self.here(value)
            self.nodes.append(node)
            return
        inputs = [None if value is None else self.here(value) for value in node.inputs]
        copy = ir.Node(node.domain, node.op_type, inputs, attributes=node.attributes.values(), num_outputs=len(node.outputs))
        self.add(copy)
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.type, self.known[old] = old.type, new

    def constant(self, values: Any, dtype: Any) -> ir.Value:
        """A small constant of this branch; equal ones are shared."""
        if self.number == 0:
            return self.flat.editor.constant(values, dtype)
        array = np.asarray(values, dtype=dtype)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self.constants:
            tensor = ir.tensor(array, name=self.flat.name())
            kind, shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
            self.constants[key] = ir.Value(name=tensor.name, shape=shape, type=kind, const_value=tensor)
        return self.constants[key]

    def node(self, op: str, inputs: Sequence[ir.Value | None], *, behind: _Level | None = None, **attributes: Any) -> ir.Value:
        """What an operator gives that only exits need: that of this level, or of the one that it stands `behind`."""
        node = ir.node(op, inputs, attributes or None)
        self.add(node, self.flat.label((behind or self).number))
        return node.outputs[0]

    def add(self, node: ir.Node, name: str | None = None) -> None:
        node.name = name or self.flat.name()
        for value in node.outputs:
            value.name = self.flat.name()
        self.nodes.append(node)

    # -- The rule

    def sure(self, junction: Exit, logits: ir.Value) -> ir.Value:
        """Which inputs leave here: (rows,) of booleans, by the rule of `core.deciding`."""
        constant = self.constant
        if junction.confidence == "patience":
            return self.node("GreaterOrEqual", [self.count(junction, logits), constant(junction.patience, np.int64)])
        threshold = constant(junction.threshold, np.float32)
        shares = self.node("Softmax", [logits], axis=-1)
        if junction.confidence == "maximum":
            best = self.node("ArgMax", [logits], axis=1, keepdims=1)
            top = self.node("Reshape", [self.node("GatherElements", [shares, best], axis=1), constant([-1], np.int64)])
            return self.node("GreaterOrEqual", [top, threshold])
        parts = self.node("Mul", [shares, self.node("LogSoftmax", [logits], axis=-1)])
        entropy = self.node("Neg", [self.node("ReduceSum", [parts, constant([1], np.int64)], keepdims=0)])
        return self.node("LessOrEqual", [entropy, threshold])

    def count(self, junction: Exit, logits: ir.Value) -> ir.Value:
        """How many exits in a row, this one included, have agreed with the one before: (rows,)."""
        constant = self.constant
        if junction.outputs == 1:
            self.said = self.node("Reshape", [logits, constant([-1], np.int64)])
        else:
            self.said = self.node("ArgMax", [logits], axis=1, keepdims=0)
        if self.above is None or self.above.said is None or self.above.agreed is None:
            zeros = constant([0], np.int64)
            self.agreed = self.node("Expand", [zeros, self.node("Shape", [logits], start=0, end=1)])
            return self.agreed
        before, count = (self.node("Gather", [value, self.rows], axis=0) for value in (self.above.said, self.above.agreed))
        if junction.outputs == 1:
            gap = self.node("Abs", [self.node("Sub", [self.said, before])])
            same = self.node("LessOrEqual", [gap, constant(junction.threshold, np.float32)])
        else:
            same = self.node("Equal", [self.said, before])
        more = self.node("Add", [count, constant([1], np.int64)])
        self.agreed = self.node("Where", [same, more, constant([0], np.int64)])
        return self.agreed


# -- Proving it ------------------------------------------------------------------------------------------------------------------


def check_stops(
    session: Any,
    flat: Any,
    batches: Sequence[Arrays],
    names: Sequence[str],
    exits: Mapping[str, Exit],
    passed: Sequence[int],
    *,
    tolerance: float,
    answer: str = "logits",
) -> list[int]:
    """Compares a graph that stops with the flat one on every batch; gives how many rows left at each exit, and at the end.

    ExportError if a row leaves elsewhere than the flat graph's outputs say, unless it is next to a threshold, or gets another answer
    than the one given there.
    """
    junctions, outputs = list(exits.values()), [*map(exit_output, exits), answer]
    left = [0] * len(passed)
    for batch in batches:
        whole = run_graph(flat, names, batch, outputs)
        got = run_graph(session, names, batch, (answer, LAYERS))
        said = [torch.from_numpy(whole[name]) for name in outputs]
        _, place = choose(junctions, said[:-1], said[-1])
        places = place.tolist()
        found = np.array(
            [
                own if passed[own] == layers else passed.index(layers)
                for own, layers in zip(places, got[LAYERS].tolist(), strict=True)
            ]
        )
        there = np.stack([whole[name] for name in outputs])[found, np.arange(len(found))]  # (rows, outputs)
        off = np.abs(got[answer] - there).max(axis=-1) > tolerance * max(1.0, float(np.abs(there).max()))
        if off.any() or ((found != place.numpy()) & ~_near(junctions, whole, outputs, max(NEXT_TO, tolerance))).any():
            raise ExportError("the graph with exits gives another answer than the model where it stops.", help=REPORT)
        for exit in found:
            left[exit] += 1
    return left


def _near(junctions: Sequence[Exit], whole: GraphOutputs, outputs: Sequence[str], gap: float) -> np.ndarray:
    """Which rows are so close to a threshold, or to another class, that the last bits decide: (rows,)."""
    near = np.zeros(len(whole[outputs[-1]]), dtype=bool)
    before: np.ndarray | None = None
    for junction, name in zip(junctions, outputs, strict=False):
        logits = whole[name]
        if junction.confidence != "patience":
            near |= np.abs(doubt(junction, torch.from_numpy(logits)).numpy() - junction.threshold) < gap
        elif junction.outputs > 1:
            best = np.sort(logits, axis=1)
            near |= best[:, -1] - best[:, -2] < gap
        elif before is not None:
            near |= np.abs(np.abs(logits - before)[:, 0] - junction.threshold) < gap
        before = logits
    return near
