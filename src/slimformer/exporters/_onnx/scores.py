"""The last step of a reranker's graph: beside its logit, the score that sentence-transformers' CrossEncoder would give."""

from __future__ import annotations

import numpy as np
import onnx_ir

from slimformer.core.relevance import RELEVANCE, ScoreActivation, relevance_of, score_activation
from slimformer.exporters._onnx.graph import output_of_graph
from slimformer.exporters._onnx.parity import GraphOutputs
from slimformer.families.base import Subject

_OPERATORS: dict[ScoreActivation, str] = {"sigmoid": "Sigmoid", "identity": "Identity"}


def activation_of(subject: Subject) -> ScoreActivation | None:
    """What becomes of a model's one logit; None if its config does not say, if it has several, and if it answers at exits."""
    config = subject.model.config
    if not type(subject.model).__name__.endswith("ForSequenceClassification") or subject.anatomy.exits:
        return None
    return score_activation(config) if config.num_labels == 1 else None


def scored(outputs: GraphOutputs, activation: ScoreActivation) -> GraphOutputs:
    """A model's outputs with the score, (batch, 1), behind them."""
    return {**outputs, RELEVANCE: relevance_of(outputs["logits"], activation).astype(np.float32)}


def end_in_score(graph: onnx_ir.Graph, activation: ScoreActivation) -> None:
    """Adds the output RELEVANCE, (batch, 1), to a graph, in place."""
    logits = output_of_graph(graph, "logits")
    node = onnx_ir.node(_OPERATORS[activation], [logits])
    score = node.outputs[0]
    score.name, score.type, score.shape = RELEVANCE, logits.type, logits.shape
    graph.append(node)
    graph.outputs.append(score)
