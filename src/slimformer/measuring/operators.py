"""Operators of ONNX files: which part of a model each belongs to, and the time of each in a profile of ONNX Runtime.

A file with exits has graphs within graphs. An operator is known by its name and those of the Ifs around it, and the time of an If is what
is left of it without the operators inside.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimformer.core.junction import junction_named
from slimformer.measuring.components import REST, Component, Components, Spot

if TYPE_CHECKING:
    import onnx

_QUANTIZE = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
_NORMS = {"LayerNormalization", "SkipLayerNormalization", "InstanceNormalization", "SimplifiedLayerNormalization"}
_WITHIN = ">"  # between the name of an If and that of an operator in one of its branches


# -- Places --------------------------------------------------------------------------------------------------------------------


def graph_of(file: Path) -> onnx.GraphProto:
    """The graph of a file, without weights that stand beside it."""
    import onnx

    return onnx.load(str(file), load_external_data=False).graph


def decides_by_text(graph: onnx.GraphProto) -> bool:
    """Whether an exported graph has exits or sieves."""
    return any(node.op_type == "If" or junction_named(node.name) is not None for node in graph.node)


def place_nodes(graph: onnx.GraphProto, components: Components) -> dict[str, Spot]:
    """The place of each operator of an exported graph, by its name, with those of the Ifs around it.

    Exporters keep the names of parameters, though not of all of them: a product with a nameless matrix belongs where its bias does. What
    reads no parameter goes on with what its inputs come from: after queries, keys and values comes the core, after a matrix that
    ends a sublayer come the residual and the norm. What only an exit or a sieve needs says so by its name.
    """
    places: dict[str, Spot] = {}
    _Placing(components, places, {}, count(1)).place(graph, frozenset(), "")
    return places


@dataclass(frozen=True)
class _Placing:
    components: Components
    places: dict[str, Spot]
    flows: dict[str, tuple[int, Spot]]  # tensor -> the number of the operator that made it, and what goes on with it
    numbers: Iterator[int]

    def place(self, graph: onnx.GraphProto, outer: Set[str], prefix: str) -> None:
        """Places the operators of a graph, and of those within it; `outer`: constants of the graphs around it."""
        constants = outer | {item.name for item in graph.initializer}
        named = _named_by_readers(graph, constants, self.components)
        for node, paths in zip(graph.node, named, strict=True):
            place, after = self._placed(node, paths, constants)
            self.places[prefix + node.name] = place
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    self.place(attribute.g, constants, f"{prefix}{node.name}{_WITHIN}")
            number = next(self.numbers)
            self.flows.update(dict.fromkeys(node.output, (number, after)))

    def _placed(self, node: onnx.NodeProto, paths: Sequence[str], constants: Set[str]) -> tuple[Spot, Spot]:
        """The place of an operator, and that of what reads no parameter and goes on from it."""
        own = [self.components.places[path] for path in paths]
        junction = self.components.of_junction(node.name)
        if junction is not None:  # what it gathers is still what it was
            return junction, self.flows.get(node.input[0], (0, REST))[1]
        before = max((self.flows[item] for item in node.input if item in self.flows), default=(0, REST), key=_latest)[1]
        place = next((item for item in own if item.component is Component.NORMS), own[-1] if own else before)
        if node.op_type in _QUANTIZE and not set(node.input) <= constants:
            return Spot(Component.QUANTIZE, before.layer), before
        if node.op_type in _NORMS:
            place = Spot(Component.NORMS, place.layer)
            return place, place
        return place, _after(place, ended=bool(self.components.ends & set(paths)))


def _named_by_readers(graph: onnx.GraphProto, constants: Set[str], components: Components) -> list[list[str]]:
    """For each operator the modules whose parameters it reads; of a product with a nameless matrix, those of what reads it alone."""
    readers: dict[str, list[int]] = defaultdict(list)
    for number, node in enumerate(graph.node):
        for item in node.input:
            readers[item].append(number)
    named = [[path for item in node.input if item in constants and (path := components.path_of(item))] for node in graph.node]
    for number in reversed(range(len(graph.node))):
        node = graph.node[number]
        after = readers[node.output[0]]
        if not named[number] and len(after) == 1 and constants & set(node.input) and "MatMul" in node.op_type:
            named[number] = [path for path in named[after[0]] if components.places[path].component is not Component.NORMS]
    return named


def _latest(flow: tuple[int, Spot]) -> tuple[bool, int]:
    return flow[1].component is not Component.REST, flow[0]


def _after(place: Spot, *, ended: bool) -> Spot:
    """What an operator belongs to that reads no parameter and goes on from this place; `ended`: a matrix ended a sublayer there."""
    if place.component is Component.LINEAR_BEFORE:
        return Spot(Component.CORE, place.layer)
    if ended and place.component is not Component.NORMS:
        return Spot(Component.NORMS, place.layer)
    return place


# -- Times ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OperatorRun:
    """One operator in one run: the time that passes in it alone, and the bytes that it reads and writes beside its parameters."""

    name: str
    us: float
    bytes: int


def operator_runs(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, list[OperatorRun]]]:
    """The microseconds of each run in a profile of ONNX Runtime, with the operators in it."""
    runs = [event for event in events if event.get("cat") == "Session" and event["name"] == "model_run"]
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    nodes.sort(key=_begin)
    spans = ((bisect_left(nodes, run["ts"], key=_begin), bisect_right(nodes, _end(run), key=_begin)) for run in runs)
    return [(run["dur"], _nested(nodes[first:last])) for run, (first, last) in zip(runs, spans, strict=True)]


def _nested(events: Sequence[Mapping[str, Any]]) -> list[OperatorRun]:
    """Operators under the names of the Ifs around them. One runs after the other: an If holds what begins and ends in its time."""
    around = sorted(filter(_is_if, events), key=lambda event: -event["dur"])
    inner: dict[int, float] = defaultdict(float)  # of an If: the microseconds of what is directly in it
    names = []
    for event in events:
        above = [item for item in around if item is not event and item["ts"] <= event["ts"] and _end(event) <= _end(item)]
        names.append(_WITHIN.join(item["name"].removesuffix("_kernel_time") for item in [*above, event]))
        if above:
            inner[id(above[-1])] += event["dur"]
    return [
        OperatorRun(
            name,
            max(0.0, event["dur"] - inner[id(event)]),
            0 if _is_if(event) else sum(int(event["args"].get(key, 0)) for key in ("activation_size", "output_size")),
        )
        for name, event in zip(names, events, strict=True)
    ]


def _is_if(event: Mapping[str, Any]) -> bool:
    return bool(event["args"].get("op_name") == "If")


def _begin(event: Mapping[str, Any]) -> float:
    return float(event["ts"])


def _end(event: Mapping[str, Any]) -> float:
    return float(event["ts"] + event["dur"])
