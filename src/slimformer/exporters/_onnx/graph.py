"""The graph as the exporter's parts see it: an editor, its matrix products, and which axis is the batch.

Every rewrite in this folder changes an `onnx_ir` graph through `Editor` and finds the products with the model's matrices by `products`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
OLDEST_OPSET = 17  # of 2022, the first with LayerNormalization
IR_VERSIONS = {17: 8, 18: 8, 19: 9, 20: 9}  # that came with an opset
_MORE_TYPES = {
    "Cast",
    "CastLike",
    "ConstantOfShape",
    "DequantizeLinear",
    "Equal",
    "Identity",
    "QuantizeLinear",
    "Reshape",
    "Shape",
}  # what opsets 19 and 20 gave these
_MATRICES = {"MatMul", "Gemm", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "FusedMatMul"}
CUT = "sieve."  # what the names of values begin with at which a graph is cut later
SHARED = 8  # values of a constant, at most, that equal constants share


@dataclass(frozen=True)
class Axes:
    """Which axis of a hidden state (., ., hidden) is the batch and which is the sequence."""

    batch: int
    seq: int


BATCH_FIRST = Axes(batch=0, seq=1)
SEQ_FIRST = Axes(batch=1, seq=0)


class Unexpected(Exception):
    """The graph is not what the rules expect; the exporter turns it into an ExportError."""


def output_of_graph(graph: ir.Graph, name: str) -> ir.Value:
    """The output of that name; Unexpected if there is none."""
    found = next((value for value in graph.outputs if value.name == name), None)
    if found is None:
        raise Unexpected(f"no output is called {name}")
    return found


class Editor:
    """Adds nodes before a node, and constants, to a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._names = set(graph.initializers)

    def constant(self, array: Any, dtype: Any, name: str = "constant") -> ir.Value:
        """An initializer; small equal ones are shared."""
        values = np.asarray(array, dtype=dtype)
        key = (str(values.dtype), values.shape, values.tobytes())
        if values.size <= SHARED and key in self._constants:
            return self._constants[key]
        unique, count = name, 1
        while unique in self._names:
            unique, count = f"{name}_{count}", count + 1
        self._names.add(unique)
        tensor = ir.tensor(values, name=unique)
        constant = ir.Value(name=unique, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(constant)
        if values.size <= SHARED:
            self._constants[key] = constant
        return constant

    def node(
        self, before: ir.Node, op: str, inputs: Sequence[ir.Value | None], domain: str = "", outputs: int = 1, **attributes: Any
    ) -> list[ir.Value]:
        """Inserts one node and gives its outputs."""
        node = ir.node(op, inputs, attributes or None, domain=domain, num_outputs=outputs)
        self.graph.insert_before(before, node)
        return list(node.outputs)

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


def required(value: ir.Value | None) -> ir.Value:
    """The value; Unexpected if there is none."""
    if value is None:
        raise Unexpected("an operator lacks an input")
    return value


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a constant; None for any other value."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def rank_of(value: ir.Value | None) -> int | None:
    """The number of axes of a value; None if that is unknown."""
    return None if value is None or value.shape is None else len(value.shape)


@dataclass(frozen=True)
class Product:
    """The product with one matrix: a MatMul or Gemm by a constant, and the Add of its bias if that is a node of its own."""

    node: ir.Node
    add: ir.Node | None
    weight: np.ndarray  # (in, out)
    bias: ir.Value | None

    @property
    def source(self) -> ir.Value:
        """What it reads."""
        return required(self.node.inputs[0])

    @property
    def output(self) -> ir.Value:
        """What it gives, the bias added."""
        return (self.add or self.node).outputs[0]

    @property
    def name(self) -> str:
        """The name of the weight, taken from its bias or that of the node: the tracer renames weights that it transposes."""
        if self.bias is not None and str(self.bias.name).endswith(".bias"):
            return f"{str(self.bias.name).removesuffix('.bias')}.weight"
        named = str(self.node.name)
        return named if named.endswith(".weight") else str(required(self.node.inputs[1]).name)


def products(graph: ir.Graph) -> list[Product]:
    """Every product with a matrix, in order."""
    result = []
    for node in graph:
        weight = constant_of(node.inputs[1]) if node.op_type in {"MatMul", "Gemm"} else None
        if weight is None or weight.ndim != 2:
            continue
        if node.op_type == "Gemm":
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            result.append(Product(node, None, weight.T if is_transposed(node) else weight, bias))
            continue
        uses = list(node.outputs[0].uses())
        add = uses[0].node if len(uses) == 1 and uses[0].node.op_type == "Add" else None
        others = [] if add is None else [value for value in add.inputs if value is not node.outputs[0]]
        constant = constant_of(others[0]) if others else None
        if constant is not None and constant.ndim == 1:
            result.append(Product(node, add, weight, others[0]))
        else:
            result.append(Product(node, None, weight, None))
    return result


def is_transposed(node: ir.Node) -> bool:
    """Whether a node is a Gemm that stores its weight as (out, in)."""
    return node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1


def classifiers(graph: ir.Graph) -> set[ir.Node]:
    """The products that only outputs read. They stay in float: they are tiny, and they decide.

    What lies behind a norm is the encoder's, and so is what other products read: a model without a matrix in its head has none.
    """
    every = {product.node for product in products(graph)}
    last: set[ir.Node] = set()
    todo = [value.producer() for value in graph.outputs]
    while todo:
        node = todo.pop()
        if node in every:
            last.add(node)
        elif node is not None and node.op_type != "LayerNormalization":
            todo.extend(value.producer() for value in node.inputs if value is not None)
    inside = {node for product in last for value in product.inputs[:1] for node in ancestors(required(value))}
    return last - inside


def turns(node: ir.Node) -> bool:
    """Whether a node exchanges the batch and the sequence of a hidden state."""
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0, 2]


def picks_token(node: ir.Node, axes: Axes) -> bool:
    """Whether a node takes one token out of a hidden state in this order: what it gives has the batch first."""
    index = constant_of(node.inputs[1]) if node.op_type == "Gather" else None
    return index is not None and index.shape == () and node.attributes["axis"].as_int() == axes.seq


def turned_values(graph: ir.Graph) -> set[ir.Value]:
    """Values in SEQ_FIRST order: those between the transpose after the embedding and the one before the head."""
    turned: set[ir.Value] = set()
    for node in graph:
        inside = any(value in turned for value in node.inputs)
        if inside != turns(node) and not (inside and picks_token(node, SEQ_FIRST)):
            turned.update(node.outputs)
    return turned


def ancestors(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that a value needs."""
    seen: set[ir.Node] = set()
    todo = [value.producer()]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            todo.extend(item.producer() for item in node.inputs if item is not None)


def light_values(graph: ir.Graph) -> set[ir.Value]:
    """The inputs, and what follows from them and constants without a matrix."""
    light: set[ir.Value] = set(graph.inputs)
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type not in _MATRICES and all(value in light or value.producer() is None for value in inputs):
            light.update(node.outputs)
    return light


def lower_versions(model: ir.Model) -> None:
    """Gives the model the lowest opset and IR version that its operators need, so that older runtimes read it.

    The tracer writes what is newest to it. Some operators only learned number types since that no graph of ours has.
    """
    needed = OLDEST_OPSET
    for node in model.graph:
        if node.domain:
            continue
        newest = model.graph.opset_imports[""]
        version = onnx.defs.get_schema(node.op_type, newest).since_version
        if version in (19, 20) and node.op_type in _MORE_TYPES:
            version = onnx.defs.get_schema(node.op_type, 18).since_version
            node.attributes.pop("saturate", None)
        needed = max(needed, version)
    model.graph.opset_imports[""] = needed
    model.ir_version = IR_VERSIONS.get(needed, model.ir_version)


def strip(model: ir.Model) -> None:
    """Drops what no output needs, and what the tracer wrote about this machine beside each node."""
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
