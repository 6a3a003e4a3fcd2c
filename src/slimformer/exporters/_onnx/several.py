"""The last step of the graph of a model that gives several answers: each task has an output of its own beside the logits of all."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir

from slimformer.core.answers import answer_slices, output_of
from slimformer.exporters._onnx.graph import Unexpected, output_of_graph
from slimformer.exporters._onnx.parity import GraphOutputs
from slimformer.families.base import Subject


def answers_of(subject: Subject) -> dict[str, slice]:
    """The outputs of each task; none if the model gives one answer, and if it answers at exits."""
    if not type(subject.model).__name__.endswith("ForSequenceClassification") or subject.anatomy.exits:
        return {}
    return answer_slices(subject.model.config)


def parted(outputs: GraphOutputs, answers: Mapping[str, slice]) -> GraphOutputs:
    """A model's outputs with those of each task, (batch, classes), behind them."""
    return {**outputs, **{output_of(name): outputs["logits"][:, part] for name, part in answers.items()}}


def end_in_answers(graph: onnx_ir.Graph, answers: Mapping[str, slice]) -> None:
    """Adds an output for each task to a graph, in place."""
    logits = output_of_graph(graph, "logits")
    if logits.shape is None:
        raise Unexpected("the shape of logits is not known")
    sizes = onnx_ir.tensor([part.stop - part.start for part in answers.values()], name="sizes of answers")
    sizes_value = onnx_ir.Value(
        name=sizes.name, shape=onnx_ir.Shape((len(answers),)), type=onnx_ir.TensorType(sizes.dtype), const_value=sizes
    )
    graph.register_initializer(sizes_value)
    node = onnx_ir.node("Split", [logits, sizes_value], attributes={"axis": 1}, num_outputs=len(answers))
    for value, (name, part) in zip(node.outputs, answers.items(), strict=True):
        value.name, value.type = output_of(name), logits.type
        value.shape = onnx_ir.Shape([logits.shape[0], part.stop - part.start])
    graph.append(node)
    graph.outputs.extend(node.outputs)
