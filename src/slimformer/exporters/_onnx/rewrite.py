"""Rewrites of a traced encoder graph: the same function in the form that a runtime runs fastest.

The trace (`exporters/onnx.py`) leaves one marker node per attention and per factored matrix; every other node is a standard ONNX
operator. Each function here does one rewrite, in place, by declared rules; nothing is searched for with patterns that could
quietly stop matching, and each returns how many places it changed so that the exporter can compare with the model.
docs/decisions/0002-onnx-graphs.md says what each rewrite is worth.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from slimformer.quantizing.calibration import TABLE_ROWS

MARKER = ("slimformer", "Attention")  # (query, key, value, mask): each (a, b, heads, dim); which of a, b is the batch: a Layout
FACTORED = ("slimformer", "Kronecker")  # (x, a, b): (., ., n1 n2) -> (., ., m1 m2); factors (terms, rows, columns)
TABLE = ("slimformer", "KroneckerTable")  # (ids, a, b): (., .) -> (., ., n1 n2); a (1, words, terms n1), b (terms, 1, n2)
MICROSOFT = "com.microsoft"
MASKED = -10_000.0  # exp() of it is 0 in fp32, and it survives fp16; the smallest float does not

_ELEMENTWISE = {"Gelu", "Tanh", "Relu", "Erf", "Sigmoid", "Softplus", "Cast", "Identity"}
_BROADCAST = {"Add", "Mul", "Sub", "Div"}


@dataclass(frozen=True)
class Layout:
    """Which axis of a hidden state (., ., hidden) is the batch and which the sequence."""

    batch: int
    seq: int


BATCH_FIRST = Layout(batch=0, seq=1)
SEQ_FIRST = Layout(batch=1, seq=0)


class Unexpected(Exception):
    """The graph is not what the rules expect; the exporter turns it into an ExportError."""


class _Editor:
    """Adds nodes before a node, and constants, to a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._names = set(graph.initializers)

    def constant(self, array: Any, dtype: Any, name: str = "constant") -> ir.Value:
        """An initializer; small equal ones are shared."""
        value = np.asarray(array, dtype=dtype)
        key = (str(value.dtype), value.shape, value.tobytes())
        if value.size <= 8 and key in self._constants:
            return self._constants[key]
        unique, count = name, 1
        while unique in self._names:
            unique, count = f"{name}_{count}", count + 1
        self._names.add(unique)
        tensor = ir.tensor(value, name=unique)
        made = ir.Value(name=unique, shape=ir.Shape(value.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(made)
        if value.size <= 8:
            self._constants[key] = made
        return made

    def node(
        self, before: ir.Node, op: str, inputs: Sequence[ir.Value | None], domain: str = "", outputs: int = 1, **attributes: Any
    ) -> list[ir.Value]:
        """Inserts one node and gives its outputs."""
        made = ir.node(op, inputs, attributes or None, domain=domain, num_outputs=outputs)
        self.graph.insert_before(before, made)
        return list(made.outputs)

    def one(self, before: ir.Node, op: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any) -> ir.Value:
        """Inserts one node with one output and gives that."""
        return self.node(before, op, inputs, domain, **attributes)[0]

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """All uses of `old`, graph outputs included, become uses of `new`, which takes over its name, type and shape."""
        new.shape, new.type = old.shape, old.type
        name, old.name = old.name, None
        new.name = name
        old.replace_all_uses_with(new, replace_graph_outputs=True)

    def remove(self, node: ir.Node) -> None:
        self.graph.remove(node, safe=True)


def markers(graph: ir.Graph) -> list[ir.Node]:
    """The attention markers that the trace left, in order."""
    return [node for node in graph if (node.domain, node.op_type) == MARKER]


def _given(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise Unexpected("an operator lacks an input")
    return value


def _constant_of(value: ir.Value | None) -> np.ndarray | None:
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


# --------------------------------------------------------------------------------------------------------------- attention


def flatten_attentions(graph: ir.Graph) -> int:
    """Takes the reshapes around each marker away: it then reads and writes (., ., heads * dim). Gives the number of markers."""
    found = markers(graph)
    for node in found:
        uses = list(node.outputs[0].uses())
        if len(uses) != 1 or uses[0].node.op_type != "Reshape":
            raise Unexpected(f"the heads of attention {node.name} are not joined again")
        for index in range(3):
            source = _given(node.inputs[index]).producer()
            if source is None or source.op_type != "Reshape":
                raise Unexpected(f"the projections of attention {node.name} are not reshaped into heads")
            node.replace_input_with(index, source.inputs[0])
            if not source.outputs[0].uses():
                graph.remove(source, safe=True)
        joined = uses[0].node.outputs[0]
        node.outputs[0].shape, node.outputs[0].type = joined.shape, joined.type
        joined.replace_all_uses_with(node.outputs[0])
        graph.remove(uses[0].node, safe=True)
    return len(found)


def lower_attentions(graph: ir.Graph, layout: Layout, fused: bool) -> int:
    """Puts real operators in the place of each (flattened) marker; gives their number.

    `fused` needs SEQ_FIRST: FusedMatMul reads heads out of (seq, batch, heads, dim) by strides, so that three of the four
    transposes of an attention, and the scaling, cost nothing. Otherwise standard operators only.
    """
    editor = _Editor(graph)
    biases: dict[ir.Value, ir.Value] = {}
    found = markers(graph)
    for node in found:
        query, key, value, mask = (_given(item) for item in node.inputs)
        heads, scale = node.attributes["heads"].as_int(), node.attributes["scale"].as_float()
        width = node.attributes["width"].as_int()
        if mask not in biases:
            biases[mask] = _mask_bias(editor, node, mask)
        split = editor.constant([0, 0, heads, width // heads], np.int64)
        join = editor.constant([0, 0, width], np.int64)
        q, k, v = (editor.one(node, "Reshape", [item, split]) for item in (query, key, value))
        if fused:
            strides = {"transBatchA": 1, "transBatchB": 1, "transB": 1, "alpha": scale}
            scores = editor.one(node, "FusedMatMul", [q, k], MICROSOFT, **strides)  # (batch, heads, seq, seq)
        else:
            q = editor.one(node, "Transpose", [q], perm=[layout.batch, 2, layout.seq, 3])
            k = editor.one(node, "Transpose", [k], perm=[layout.batch, 2, 3, layout.seq])
            v = editor.one(node, "Transpose", [v], perm=[layout.batch, 2, layout.seq, 3])
            q = editor.one(node, "Mul", [q, editor.constant(scale, np.float32)])
            scores = editor.one(node, "MatMul", [q, k])
        scores = editor.one(node, "Add", [scores, biases[mask]])
        shares = editor.one(node, "Softmax", [scores], axis=-1)
        if fused:
            mixed = editor.one(node, "FusedMatMul", [shares, v], MICROSOFT, transBatchB=1)
        else:
            mixed = editor.one(node, "MatMul", [shares, v])  # (batch, heads, seq, dim)
        back = [0, 2, 1, 3] if layout == BATCH_FIRST else [2, 0, 1, 3]
        mixed = editor.one(node, "Transpose", [mixed], perm=back)
        editor.replace(node.outputs[0], editor.one(node, "Reshape", [mixed, join]))
        editor.remove(node)
    return len(found)


def _mask_bias(editor: _Editor, before: ir.Node, mask: ir.Value) -> ir.Value:
    """What is added to the scores: 0 where `mask` (batch, seq) holds, MASKED elsewhere: (batch, 1, 1, seq)."""
    kept = editor.one(before, "Cast", [mask], to=int(ir.DataType.FLOAT))
    lost = editor.one(before, "Sub", [editor.constant(1.0, np.float32), kept])
    bias = editor.one(before, "Mul", [lost, editor.constant(MASKED, np.float32)])
    return editor.one(before, "Unsqueeze", [bias, editor.constant([1, 2], np.int64)])


def unturn(graph: ir.Graph) -> int:
    """Makes a (flattened) SEQ_FIRST trace BATCH_FIRST by taking its transposes out: all between them works row by row."""
    editor = _Editor(graph)
    found = [node for node in graph if _turns(node)]
    for node in found:
        node.outputs[0].replace_all_uses_with(_given(node.inputs[0]), replace_graph_outputs=True)
        editor.remove(node)
    for node in graph:  # shapes told for the other layout
        for value in node.outputs:
            if value.shape is not None and value.shape.rank() == 3 and not value.is_graph_output():
                value.shape = ir.Shape([None, None, value.shape[2]])
    return len(found)


def _turns(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0, 2]


# ---------------------------------------------------------------------------------------------------- what nobody reads


def read_only_first(graph: ir.Graph, layout: Layout) -> int:
    """Where the head reads the first token alone, lets the last layer compute that token alone; gives the nodes it narrowed.

    Exact: after its last attention a token depends on no other. Queries, attention output and feed-forward of the last layer then
    cost a token instead of a sentence. A head that reads every token (question answering) changes nothing.
    """
    pick = _first_token_pick(graph, layout)
    if pick is None:
        return 0
    narrow: dict[ir.Node, tuple[int, ...]] = {pick: (0,)}
    for node in reversed(list(graph)):
        operands = _rowwise_operands(node)
        if node in narrow or not operands or node.outputs[0].is_graph_output():
            continue
        uses = list(node.outputs[0].uses())
        if uses and all(use.node in narrow and use.idx in narrow[use.node] for use in uses):
            narrow[node] = operands
    editor = _Editor(graph)
    cuts: dict[ir.Value, ir.Value] = {}
    start, stop, axis = (editor.constant([number], np.int64) for number in (0, 1, layout.seq))
    for node in list(graph):
        for index in narrow.get(node, ()):
            value = node.inputs[index]
            if value is None or value.producer() in narrow:
                continue
            if value not in cuts:
                cuts[value] = editor.one(node, "Slice", [value, start, stop, axis])
                cuts[value].type, cuts[value].shape = value.type, _narrowed(value, layout)
            node.replace_input_with(index, cuts[value])
        if node in narrow and node is not pick:
            node.outputs[0].shape = _narrowed(node.outputs[0], layout)
    return len(narrow) - 1


def _narrowed(value: ir.Value, layout: Layout) -> ir.Shape | None:
    if value.shape is None:
        return None
    return ir.Shape([1 if axis == layout.seq else size for axis, size in enumerate(value.shape)])


def _first_token_pick(graph: ir.Graph, layout: Layout) -> ir.Node | None:
    """The one node that takes token 0 of a hidden state, made to read the layout's own axis, or None."""
    found = [node for node in graph if node.op_type == "Gather" and _picks_zero(node) and _rank_of_input(node) == 3]
    if len(found) != 1:
        return None
    pick = found[0]
    source = pick.inputs[0].producer() if pick.inputs[0] is not None else None
    if layout == SEQ_FIRST:
        if source is None or not _turns(source):
            return None
        pick.replace_input_with(0, source.inputs[0])
        pick.attributes["axis"] = ir.AttrInt64("axis", layout.seq)
        if not source.outputs[0].uses():
            graph.remove(source, safe=True)
    return pick


def _picks_zero(node: ir.Node) -> bool:
    index = _constant_of(node.inputs[1])
    return index is not None and index.shape == () and int(index) == 0 and node.attributes["axis"].as_int() == 1


def _rank_of_input(node: ir.Node) -> int | None:
    return None if node.inputs[0] is None else _rank(node.inputs[0])


def _rowwise_operands(node: ir.Node) -> tuple[int, ...]:
    """Inputs whose row i alone decides row i of the node's output; empty where the node mixes rows."""
    if (node.domain, node.op_type) in {MARKER, FACTORED}:
        return (0,)  # keys and values are read whole
    if node.op_type in _ELEMENTWISE:
        return (0,)
    if node.op_type == "LayerNormalization" and node.attributes["axis"].as_int() == -1:
        return (0,)
    if node.op_type == "MatMul":
        weight = _constant_of(node.inputs[1])
        return (0,) if weight is not None and weight.ndim == 2 else ()
    if node.op_type in _BROADCAST:
        operands = []
        for index, value in enumerate(node.inputs):
            constant = _constant_of(value)
            if constant is not None and constant.ndim <= 1:
                continue
            if value is None or _rank(value) != 3:
                return ()
            operands.append(index)
        return tuple(operands)
    return ()


# ----------------------------------------------------------------------------------------------------------------- factors


def lower_factors(graph: ir.Graph) -> int:
    """Puts reshapes and matrix products in the place of each marker of a factored matrix; gives the products by constants.

    Which factor comes first, which multiplies from the right, and where axes are turned, the marker says. A factor that multiplies
    from the left, token by token, is the smaller one and is no Linear to any later rewrite: it stays in fp32.
    """
    editor = _Editor(graph)
    count = 0
    for node in [node for node in graph if (node.domain, node.op_type) == FACTORED]:
        source, name, factors = _factors(node)
        steps, right = node.attributes["steps"].as_string().split(), node.attributes["right"].as_string()
        terms, inner = len(factors["a"]), [factors["a"].shape[2], factors["b"].shape[2]]
        start = editor.one(node, "Reshape", [source, editor.constant([0, 0, *inner], np.int64)])  # (., ., n1, n2)
        if steps[0] == "turn":
            start = editor.one(node, "Transpose", [start], perm=[0, 1, 3, 2])
        total: ir.Value | None = None
        for term in range(terms):
            value = start
            for step in steps:
                if step == "turn":
                    continue
                value.type = source.type
                factor = factors[step][term]
                if step == right:
                    weight = editor.constant(factor.T, np.float32, f"{name}.{step}.{term}")
                    value = editor.one(node, "MatMul", [value, weight])
                else:
                    weight = editor.constant(factor, np.float32, f"{name}.{step}.{term}")
                    value = editor.one(node, "MatMul", [weight, value])
            total = value if total is None else editor.one(node, "Add", [total, value])
        if steps[-1] == "turn":
            total = editor.one(node, "Transpose", [total], perm=[0, 1, 3, 2])  # (., ., m1, m2)
        width = factors["a"].shape[1] * factors["b"].shape[1]
        editor.replace(node.outputs[0], editor.one(node, "Reshape", [total, editor.constant([0, 0, width], np.int64)]))
        editor.remove(node)
        count += terms
    return count


def lower_tables(graph: ir.Graph) -> int:
    """Puts a lookup and a product in the place of each marker of a factored word table; gives their number.

    What sums the terms is a constant of three axes, so that it is no Linear to any later rewrite: it stays in fp32.
    """
    editor = _Editor(graph)
    found = [node for node in graph if (node.domain, node.op_type) == TABLE]
    for node in found:
        ids, name, factors = _factors(node)
        table, sums = factors["a"][0], factors["b"][:, 0]  # (words, terms n1), (terms, n2)
        terms, n2 = sums.shape
        n1 = table.shape[1] // terms
        value = editor.one(node, "Gather", [editor.constant(table, np.float32, f"{name}.a"), ids], axis=0)
        if min(terms, n1) > 1:
            value = editor.one(node, "Reshape", [value, editor.constant([0, 0, terms, n1], np.int64)])
            value = editor.one(node, "Transpose", [value], perm=[0, 1, 3, 2])  # (., ., n1, terms)
        else:
            value = editor.one(node, "Reshape", [value, editor.constant([0, 0, n1, terms], np.int64)])
        small = editor.constant(sums[None], np.float32, f"{name}.b")  # (1, terms, n2)
        value = editor.one(node, "Mul" if terms == 1 else "MatMul", [value, small])  # (., ., n1, n2)
        value = editor.one(node, "Reshape", [value, editor.constant([0, 0, n1 * n2], np.int64)])
        editor.replace(node.outputs[0], value)
        editor.remove(node)
    return len(found)


def _factors(node: ir.Node) -> tuple[ir.Value, str, dict[str, np.ndarray]]:
    """What a marker of a factored matrix reads, the matrix's name, and its factors, as their modules hold them."""
    source, *given = (_given(value) for value in node.inputs)
    values = [_constant_of(value) for value in given]
    if len(values) != 2 or any(value is None for value in values):
        raise Unexpected(f"the factors of {node.name} are no constants")
    name = str(given[0].name).removesuffix(".a")
    return source, name, {letter: value for letter, value in zip("ab", values, strict=True) if value is not None}


# ------------------------------------------------------------------------------------------------------------------- norms


def lower_norms(graph: ir.Graph) -> int:
    """LayerNorm of hidden states (., n, hidden) as InstanceNormalization over n channels, times gain, plus shift.

    Standard operators and the same numbers, but ONNX Runtime's kernel for it is vectorised, and that of (Skip)LayerNormalization
    is not. Gives the number of norms changed.
    """
    editor = _Editor(graph)
    turned = turned_values(graph)
    channels: dict[int, tuple[ir.Value, ir.Value]] = {}
    found = [node for node in graph if node.op_type == "LayerNormalization" and _rank_of_input(node) == 3]
    for node in found:
        value, gain, shift = [*node.inputs, None][:3]
        value = _given(value)
        axis = BATCH_FIRST.batch if value in turned else BATCH_FIRST.seq  # of input_ids: what axis 1 of `value` counts
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
    return len(found)


def separate_gelus(graph: ir.Graph) -> int:
    """Gives the bias before each Gelu a second axis, so that ONNX Runtime does not fuse the two; gives the number of Gelus.

    Its BiasGelu is slower than Add and Gelu one after the other.
    """
    editor = _Editor(graph)
    count = 0
    for node in [node for node in graph if node.op_type == "Gelu"]:
        add = _given(node.inputs[0]).producer()
        if add is None or add.op_type != "Add" or len(add.outputs[0].uses()) != 1:
            continue
        for index, value in enumerate(add.inputs):
            bias = _constant_of(value)
            if bias is not None and bias.ndim == 1:
                add.replace_input_with(index, editor.constant(bias[None, :], np.float32, f"{_given(value).name}.row"))
                count += 1
    return count


def turned_values(graph: ir.Graph) -> set[ir.Value]:
    """Values in SEQ_FIRST layout: between the transpose after the embedding and the one before the head."""
    found: set[ir.Value] = set()
    for node in graph:
        inside = any(value in found for value in node.inputs)
        if inside != _turns(node):
            found.update(node.outputs)
    return found


# -------------------------------------------------------------------------------------------------------------------- int8


@dataclass(frozen=True)
class Product:
    """One Linear in the graph: a MatMul or Gemm by a constant, and the Add of its bias where that is a node of its own."""

    node: ir.Node
    add: ir.Node | None
    weight: np.ndarray  # (in, out)
    bias: ir.Value | None

    @property
    def source(self) -> ir.Value:
        return _given(self.node.inputs[0])

    @property
    def output(self) -> ir.Value:
        return (self.add or self.node).outputs[0]

    @property
    def name(self) -> str:
        """The name of the Linear's weight, told from its bias: the exporter renames weights that it transposes."""
        if self.bias is not None and str(self.bias.name).endswith(".bias"):
            return f"{str(self.bias.name).removesuffix('.bias')}.weight"
        return str(_given(self.node.inputs[1]).name)


def products(graph: ir.Graph) -> list[Product]:
    """Every Linear of the graph, in order."""
    found = []
    for node in graph:
        weight = _constant_of(node.inputs[1]) if node.op_type in {"MatMul", "Gemm"} else None
        if weight is None or weight.ndim != 2:
            continue
        if node.op_type == "Gemm":
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            found.append(Product(node, None, weight.T if _is_transposed(node) else weight, bias))
            continue
        uses = list(node.outputs[0].uses())
        add = uses[0].node if len(uses) == 1 and uses[0].node.op_type == "Add" else None
        others = [] if add is None else [value for value in add.inputs if value is not node.outputs[0]]
        constant = _constant_of(others[0]) if others else None
        if constant is not None and constant.ndim == 1:
            found.append(Product(node, add, weight, others[0]))
        else:
            found.append(Product(node, None, weight, None))
    return found


def heads_of(graph: ir.Graph) -> set[ir.Node]:
    """The products that nothing but outputs read: the classifier. They stay in float; they are tiny and decide."""
    every = {item.node for item in products(graph)}
    found: set[ir.Node] = set()
    todo = [value.producer() for value in graph.outputs]
    while todo:
        node = todo.pop()
        if node in every:
            found.add(node)
        elif node is not None:
            todo.extend(value.producer() for value in node.inputs if value is not None)
    return found


def smalls(graph: ir.Graph, floats: Collection[str] = ()) -> list[Product]:
    """The products that int8 concerns: all but the classifier and those that `floats` names."""
    keep = heads_of(graph)
    return [item for item in products(graph) if item.node not in keep and item.name not in floats]


@dataclass(frozen=True)
class WeightCoding:
    """How weights are stored: bits, 7 of which leave room where int8 sums saturate, and whether all of a matrix has one scale."""

    bits: int = 8
    whole: bool = False


def quantized(weight: np.ndarray, axis: int, coding: WeightCoding) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 values and fp32 scales, one scale per index of `axis`, all of them equal where `coding` is of the whole."""
    top = float(2 ** (coding.bits - 1) - 1)
    scale = np.abs(weight).max(axis=1 - axis) / top
    if coding.whole:
        scale = np.full_like(scale, scale.max())
    scale = np.where(scale == 0, 1.0, scale).astype(np.float32)
    spread = scale[None, :] if axis == 1 else scale[:, None]
    return np.clip(np.rint(weight / spread), -top, top).astype(np.int8), scale


STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # the published default is 0.5; which is best differs from product to product
# A multiplication more must take 60 % of the squared error away: on MiniLM with SST-2 this smooths 18 of 26 inputs and leaves the
# error of the logits where smoothing all of them does (0.069 and 0.066, without 0.146); 0.2 smooths 7 and leaves 0.128.
WORTH = 0.4
ERROR_ROWS = 512  # rows of a sample that the error is measured on


@dataclass(frozen=True)
class Sample:
    """What was seen of one activation: some rows of it, and per column the extremes of all rows."""

    rows: np.ndarray  # (rows, in)
    low: np.ndarray  # (in,)
    high: np.ndarray  # (in,)


@dataclass(frozen=True)
class Coding:
    """How an activation is stored: (integer - zero) * step, with integers from 0 to `top`."""

    step: np.float32
    zero: int
    top: int = 255


def smooth(graph: ir.Graph, samples: Mapping[str, Sample], bits: int, floats: Collection[str] = ()) -> dict[str, Sample]:
    """Moves outliers of activations into weights, before int8, where that brings the int8 products closer to the fp32 ones.

    SmoothQuant (Xiao et al. 2023, https://arxiv.org/abs/2211.10438, eq. 3 and 4): input channel j is divided by
    s_j = max|X_j|^a / max|W_j|^(1-a), row j of the weight multiplied by it. Differences: the strength a is chosen per input by the
    squared error on `samples` (by the name of a product's input), and inputs that gain little are left alone. Exact in fp32. Gives
    the samples of the new inputs.
    """
    editor = _Editor(graph)
    groups: dict[ir.Value, list[Product]] = {}
    for item in smalls(graph, floats):
        groups.setdefault(item.source, []).append(item)
    eased_samples = {}
    for source, items in groups.items():
        sample = samples[str(source.name)]
        factor = _best_factor(sample, [item.weight for item in items], bits)
        if factor is None:
            continue
        small = editor.constant(1 / factor, np.float32, f"{source.name}.smooth")
        eased = editor.one(items[0].node, "Mul", [source, small])
        eased.type, eased.shape = source.type, source.shape
        eased_samples[str(eased.name)] = Sample(sample.rows / factor, sample.low / factor, sample.high / factor)
        for item in items:
            weight = item.weight * factor[:, None]
            item.node.replace_input_with(0, eased)
            item.node.replace_input_with(1, editor.constant(weight, np.float32, f"{item.name}.smooth"))
    return eased_samples


def _best_factor(sample: Sample, weights: Sequence[np.ndarray], bits: int) -> np.ndarray | None:
    """What to divide the columns of an activation by, (in,), or None where it is not worth it."""
    rows = sample.rows[:: max(1, len(sample.rows) // ERROR_ROWS)]
    tops = np.maximum(np.maximum(-sample.low, sample.high), 1e-5)
    heavy = np.maximum(np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0), 1e-5)
    exact = [rows @ weight for weight in weights]

    def error(factor: np.ndarray) -> float:
        low, high = min(0.0, float((sample.low / factor).min())), max(0.0, float((sample.high / factor).max()))
        step = np.float32((high - low) / 255 or 1.0)
        coarse = np.rint(rows / (factor * step)) * step
        total = 0.0
        for weight, product in zip(weights, exact, strict=True):
            values, scales = quantized(weight * factor[:, None], 1, WeightCoding(bits))
            total += float(((coarse @ (values * scales) - product) ** 2).sum() / max(float((product**2).sum()), 1e-12))
        return total

    best, factor = WORTH * error(np.ones(rows.shape[1], dtype=np.float32)), None
    for strength in STRENGTHS:
        tried = (tops**strength / heavy ** (1 - strength)).astype(np.float32)
        now = error(tried)
        if now < best:
            best, factor = now, tried
    return factor


def _is_transposed(node: ir.Node) -> bool:
    return node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1


def int8_dynamic(graph: ir.Graph, weights: WeightCoding, floats: Collection[str] = ()) -> int:
    """Puts int8 products in the place of all Linears but the classifier and `floats`; gives their number.

    Weights per output channel; activations are measured and quantized as they come, once for all products that read them.
    """
    editor = _Editor(graph)
    chosen = smalls(graph, floats)
    readers: dict[ir.Value, int] = {}
    for item in chosen:
        readers[item.source] = readers.get(item.source, 0) + 1
    shared: dict[ir.Value, list[ir.Value]] = {}
    for item in chosen:
        node, source, name = item.node, item.source, item.name
        values, scales = quantized(item.weight, 1, weights)
        weight = editor.constant(values, np.int8, f"{name}.int8")
        scale = editor.constant(scales, np.float32, f"{name}.scale")
        if readers[source] == 1:
            inputs = [source, weight, scale, None, item.bias]
            result = editor.one(node, "DynamicQuantizeMatMul", inputs, MICROSOFT)
        else:
            if source not in shared:
                shared[source] = editor.node(node, "DynamicQuantizeLinear", [source], outputs=3)
            value, step, zero = shared[source]
            inputs = [value, weight, step, scale, zero, None, item.bias]
            result = editor.one(node, "MatMulIntegerToFloat", inputs, MICROSOFT)
        _swap(editor, item, result)
    return len(chosen)


def int8_static(
    graph: ir.Graph, codings: Mapping[str, Coding], weights: WeightCoding, fused: bool, floats: Collection[str] = ()
) -> int:
    """Int8 products with known ranges for all Linears but the classifier and `floats`; `codings`: by name of a product's input.

    Standard operators: quantize and dequantize around a MatMul, which runtimes fuse by themselves. `fused`: ONNX Runtime's own
    product, ready made. Gives the number of products.
    """
    editor = _Editor(graph)
    chosen = smalls(graph, floats)
    shared: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
    for item in chosen:
        node, source, name = item.node, item.source, item.name
        if source not in shared:
            coding = codings[str(source.name)]
            scale = editor.constant(coding.step, np.float32, f"{source.name}.scale")
            zero = editor.constant(coding.zero, np.uint8, f"{source.name}.zero")
            inside = source
            if coding.top < 255:  # fewer bits than the byte that holds them: the byte would not clamp
                ends = ((whole - coding.zero) * coding.step for whole in (0, coding.top))
                inside = editor.one(node, "Clip", [source, *(editor.constant(end, np.float32) for end in ends)])
            small = editor.one(node, "QuantizeLinear", [inside, scale, zero])
            wide = small if fused else editor.one(node, "DequantizeLinear", [small, scale, zero])
            shared[source] = (wide, scale, zero)
        values, scales = quantized(item.weight, 1, weights)
        weight = editor.constant(values, np.int8, f"{name}.int8")
        factors = editor.constant(scales, np.float32, f"{name}.scale")
        value, scale, zero = shared[source]
        if fused:
            result = editor.one(node, "MatMulIntegerToFloat", [value, weight, scale, factors, zero, None, item.bias], MICROSOFT)
        else:
            zeros = editor.constant(np.zeros(len(scales)), np.int8, f"{name}.zero")
            result = editor.one(node, "MatMul", [value, editor.one(node, "DequantizeLinear", [weight, factors, zeros], axis=1)])
            if item.bias is not None:
                result = editor.one(node, "Add", [result, item.bias])
        _swap(editor, item, result)
    return len(chosen)


def observed(graph: ir.Graph, floats: Collection[str] = ()) -> dict[str, ir.Value]:
    """Inputs of the products that int8 concerns, by name."""
    return {str(item.source.name): item.source for item in smalls(graph, floats)}


def int8_embeddings(graph: ir.Graph, coding: WeightCoding = WeightCoding(), rows: int = TABLE_ROWS) -> int:
    """Stores embedding tables of at least `rows` rows in int8 with a scale per row; gives their number."""
    editor = _Editor(graph)
    count = 0
    for node in list(graph):
        table = _constant_of(node.inputs[0]) if node.op_type == "Gather" else None
        if table is None or table.ndim != 2 or table.dtype != np.float32 or len(table) < rows:
            continue
        name = _given(node.inputs[0]).name
        values, scales = quantized(table, 0, coding)
        small = editor.constant(values, np.int8, f"{name}.int8")
        scale = editor.constant(scales[:, None], np.float32, f"{name}.scale")
        got = editor.one(node, "Cast", [editor.one(node, "Gather", [small, node.inputs[1]])], to=int(ir.DataType.FLOAT))
        factor = editor.one(node, "Gather", [scale, node.inputs[1]])  # (batch, seq, 1)
        editor.replace(node.outputs[0], editor.one(node, "Mul", [got, factor]))
        editor.remove(node)
        count += 1
    return count


def _swap(editor: _Editor, item: Product, result: ir.Value) -> None:
    editor.replace(item.output, result)
    if item.add is not None:
        editor.remove(item.add)
    editor.remove(item.node)


# ------------------------------------------------------------------------------------------------------------- whole files


def plain_gemms(graph: ir.Graph) -> int:
    """Stores the weights of Gemms as (in, out), like all others; ONNX Runtime's quantize_dynamic stumbles over the other form.

    Gives their number.
    """
    editor = _Editor(graph)
    found = [item for item in products(graph) if _is_transposed(item.node)]
    for item in found:
        item.node.replace_input_with(1, editor.constant(item.weight, np.float32, f"{item.name}.transposed"))
        item.node.attributes["transB"] = ir.AttrInt64("transB", 0)
    return len(found)


def tidy(model: ir.Model) -> None:
    """Drops what no output needs, and the traces of this machine that the exporter wrote beside each node."""
    from onnx_ir.passes import common

    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    domains = {node.domain for node in model.graph}
    if MICROSOFT in domains:
        model.graph.opset_imports[MICROSOFT] = 1
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.sort()


def fused_attentions(path: Path) -> int:
    """Number of attentions in a file whose heads are read in place by fused products."""
    return sum(
        node.op_type == "FusedMatMul" and "transBatchA" in node.attributes and node.attributes["transBatchA"].as_int() == 1
        for node in _nodes(path)
    )


def quantized_matrices(path: Path) -> int:
    """Number of Linears in a file whose weights are int8; embeddings are not counted."""
    count = 0
    for node in _nodes(path):
        if node.op_type in {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger"}:
            count += 1
        elif node.op_type == "MatMul" and node.inputs[1] is not None:
            source = node.inputs[1].producer()
            count += source is not None and source.op_type == "DequantizeLinear"
    return count


def _nodes(path: Path) -> Iterable[ir.Node]:
    return list(ir.load(path).graph)
