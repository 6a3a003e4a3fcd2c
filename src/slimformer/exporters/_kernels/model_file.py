"""Writes a model as an ONNX file whose encoder is one operator of the kernels; the head is made of standard operators.

Only ONNX Runtime with the kernels' library reads such a file (`sessions.session`); it is no exporter's target, and never the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from slimformer.core.answers import answer_slices, output_of
from slimformer.core.pooling import SENTENCE_VECTOR
from slimformer.errors import ExportError
from slimformer.exporters._kernels.packing import pack_encoder
from slimformer.exporters.base import KERNELS_DOMAIN
from slimformer.families.base import subject_of
from slimformer.files import whole_group
from slimformer.forms.base import numbers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPSET, IR_VERSION = 17, 8
WORTH_HALVING = 1024  # numbers of a matrix that is worth a node of its own
# The Linears of heads that read the first token, in order, and the operator between them.
FIRST_TOKEN_HEADS: dict[str, tuple[tuple[str, ...], str]] = {
    "bert": (("bert.pooler.dense", "classifier"), "Tanh"),
    "roberta": (("classifier.dense", "classifier.out_proj"), "Tanh"),
    "electra": (("classifier.dense", "classifier.out_proj"), "Gelu"),
    "distilbert": (("pre_classifier", "classifier"), "Relu"),
}


def save_model_file(model: PreTrainedModel, path: str | Path, *, block_rows: int | Literal["auto"] = "auto") -> None:
    """Writes the file.

    Its inputs are those of the model; its outputs are the logits of a classifier (and those of each of its tasks), start_logits and
    end_logits of question answering, logits of each token, the vector of a text (by mean or cls pooling), or last_hidden_state of a
    plain encoder. block_rows: as in
    `pack_encoder`. ExportError if the encoder or its head is of another kind.
    """
    from onnx import TensorProto, helper, numpy_helper, save

    kind = type(model).__name__
    modules = dict(model.named_modules())
    inputs = subject_of(model).inputs
    constants: dict[str, np.ndarray] = {}
    nodes: list[Any] = []

    def linear(name: str, source: str, target: str) -> None:
        module = modules[name]
        constants[f"{name}.weight"], constants[f"{name}.bias"] = (numbers_of(part).T for part in (module.weight, module.bias))
        nodes.append(helper.make_node("MatMul", [source, f"{name}.weight"], [f"{name}.product"]))
        nodes.append(helper.make_node("Add", [f"{name}.product", f"{name}.bias"], [target]))

    classifies, vectors = kind.endswith("ForSequenceClassification"), kind.endswith("ForSentenceEmbedding")
    first_only = classifies or (vectors and cast(Any, model).head.pooling == ("cls",))
    sizes: Sequence[Any] = ["batch", "sequence"]
    if classifies:
        names, between = _first_token_head(model)
        outputs = {"logits": ["batch", model.config.num_labels]}
        linear(names[0], "hidden", "pooled")
        nodes += _activation(helper, constants, between, "pooled", "active")
        linear(names[1], "active", "logits")
        answers = answer_slices(model.config)
        if answers:
            parts = {output_of(name): part.stop - part.start for name, part in answers.items()}
            constants["answers"] = np.array([*parts.values()])
            nodes.append(helper.make_node("Split", ["logits", "answers"], [*parts], axis=1))
            outputs |= {name: ["batch", count] for name, count in parts.items()}
    elif kind.endswith("ForTokenClassification"):
        outputs = {"logits": [*sizes, model.config.num_labels]}
        linear("classifier", "hidden", "logits")
    elif kind.endswith("ForQuestionAnswering"):
        outputs = {"start_logits": list(sizes), "end_logits": list(sizes)}
        linear("qa_outputs", "hidden", "both")
        constants["parts"], constants["last"] = np.array([1, 1]), np.array([-1])
        nodes.append(helper.make_node("Split", ["both", "parts"], ["start", "end"], axis=-1))
        nodes += [helper.make_node("Squeeze", [part, "last"], [f"{part}_logits"]) for part in ("start", "end")]
    elif vectors:
        outputs = {SENTENCE_VECTOR: ["batch", "dimension"]}
        nodes += _vector(helper, constants, model)
    elif model.base_model is model:
        outputs = {"last_hidden_state": [*sizes, subject_of(model).anatomy.hidden_size]}
        nodes.append(helper.make_node("Identity", ["hidden"], ["last_hidden_state"]))
    else:
        raise ExportError(f"the kernels know no head of {kind}.", help="export standard files, or the base model.")
    nodes = [*_halved(helper, constants), *nodes]
    constants["packed"] = pack_encoder(model, first_only=first_only, block_rows=block_rows)
    sources = ["input_ids", "packed", "attention_mask", *(["token_type_ids"] if "token_type_ids" in inputs else [])]
    encoder = helper.make_node("Encoder", sources, ["hidden"], domain=KERNELS_DOMAIN)
    graph = helper.make_graph(
        [encoder, *nodes],
        "slimformer",
        [helper.make_tensor_value_info(name, TensorProto.INT64, sizes) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in constants.items()],
    )
    versions = [helper.make_opsetid("", OPSET), helper.make_opsetid(KERNELS_DOMAIN, 1)]
    proto = helper.make_model(graph, opset_imports=versions, ir_version=IR_VERSION, producer_name="slimformer")
    with whole_group(Path(path), []) as part:
        save(proto, str(part))


def _halved(helper: Any, constants: dict[str, np.ndarray]) -> list[Any]:
    """Stores the matrices of a head as float16, which int8 hidden states do not notice, and gives the nodes that widen them, once, when
    the file is loaded."""
    casts = []
    for name, array in [*constants.items()]:
        if (
            array.dtype == np.float32
            and array.ndim == 2
            and array.size >= WORTH_HALVING
            and np.abs(array).max() < np.finfo(np.float16).max
        ):
            constants[f"{name}.half"] = constants.pop(name).astype(np.float16)
            casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=1))
    return casts


def _vector(helper: Any, constants: dict[str, np.ndarray], model: Any) -> list[Any]:
    """The nodes from the hidden states, of cls pooling the first token's, to the vector of each text; ExportError for other poolings."""
    head = model.head
    if head.pooling not in (("mean",), ("cls",)):
        raise ExportError(f"the kernels' file has no {', '.join(head.pooling)} pooling.", help="export standard files.")
    activations = {"identity": "Identity", "tanh": "Tanh", "relu": "Relu", "sigmoid": "Sigmoid"}
    strange = next((layer.activation for layer in head.dense if layer.activation not in activations), None)
    if strange is not None:
        raise ExportError(f"the kernels' file has no {strange} behind a linear layer.", help="export standard files.")
    nodes: list[Any] = []
    last = "hidden"
    if head.pooling == ("mean",):
        constants |= {"tokens": np.array([1]), "units": np.array([2]), "least": np.array([1e-9], np.float32)}
        nodes = [
            helper.make_node("Cast", ["attention_mask"], ["real"], to=1),
            helper.make_node("Unsqueeze", ["real", "units"], ["column"]),  # (batch, seq, 1)
            helper.make_node("Mul", ["hidden", "column"], ["kept"]),
            helper.make_node("ReduceSum", ["kept", "tokens"], ["total"], keepdims=0),
            helper.make_node("ReduceSum", ["column", "tokens"], ["count"], keepdims=0),
            helper.make_node("Max", ["count", "least"], ["some"]),
            helper.make_node("Div", ["total", "some"], ["pooled"]),
        ]
        last = "pooled"
    for place, (layer, facts) in enumerate(zip(model.dense, head.dense, strict=True)):
        name = f"dense.{place}"
        constants[f"{name}.weight"] = numbers_of(layer.weight).T
        nodes.append(helper.make_node("MatMul", [last, f"{name}.weight"], [f"{name}.product"]))
        last = f"{name}.product"
        if layer.bias is not None:
            constants[f"{name}.bias"] = numbers_of(layer.bias)
            nodes.append(helper.make_node("Add", [last, f"{name}.bias"], [f"{name}.sum"]))
            last = f"{name}.sum"
        nodes.append(helper.make_node(activations[facts.activation], [last], [f"{name}.active"]))
        last = f"{name}.active"
    if not head.normalize:
        return [*nodes, helper.make_node("Identity", [last], [SENTENCE_VECTOR])]
    length = helper.make_node("ReduceL2", [last], ["length"], axes=[1], keepdims=1)
    constants["shortest"] = np.array([1e-12], np.float32)
    some = helper.make_node("Max", ["length", "shortest"], ["divisor"])
    return [*nodes, length, some, helper.make_node("Div", [last, "divisor"], [SENTENCE_VECTOR])]


def _first_token_head(model: PreTrainedModel) -> tuple[tuple[str, ...], str]:
    kind = model.config.model_type
    kind = "roberta" if kind in ("xlm-roberta", "camembert") else kind
    if kind not in FIRST_TOKEN_HEADS:
        raise ExportError(f"the kernels know no head of {type(model).__name__}.", help="export standard files.")
    return FIRST_TOKEN_HEADS[kind]


def _activation(helper: Any, constants: dict[str, np.ndarray], name: str, source: str, target: str) -> list[Any]:
    """A standard operator; GELU, which this opset lacks, from erf."""
    if name != "Gelu":
        return [helper.make_node(name, [source], [target])]
    constants |= {key: np.array(value, np.float32) for key, value in (("root", 0.5**0.5), ("one", 1), ("half", 0.5))}
    steps = [("Mul", [source, "root"]), ("Erf", ["gelu0"]), ("Add", ["gelu1", "one"]), ("Mul", ["gelu2", source])]
    nodes = [helper.make_node(kind, inputs, [f"gelu{index}"]) for index, (kind, inputs) in enumerate(steps)]
    return [*nodes, helper.make_node("Mul", ["gelu3", "half"], [target])]
