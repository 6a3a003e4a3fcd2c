"""Writes a model as an ONNX file whose encoder is one operator of the kernels; the head is made of standard operators.

Only ONNX Runtime with the kernels' library reads such a file (`sessions.session`); it is no exporter's target, and never the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from slimformer.errors import ExportError
from slimformer.exporters._kernels.packing import pack_encoder
from slimformer.exporters.base import KERNELS_DOMAIN
from slimformer.families.base import subject_of
from slimformer.files import whole_group

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

OPSET, IR_VERSION = 17, 8
# The Linears of heads that read the first token, in order, and the operator between them.
FIRST_TOKEN_HEADS: dict[str, tuple[tuple[str, ...], str]] = {
    "bert": (("bert.pooler.dense", "classifier"), "Tanh"),
    "roberta": (("classifier.dense", "classifier.out_proj"), "Tanh"),
    "electra": (("classifier.dense", "classifier.out_proj"), "Gelu"),
    "distilbert": (("pre_classifier", "classifier"), "Relu"),
}


def save_model_file(model: PreTrainedModel, path: str | Path, *, block_rows: int | Literal["auto"] = "auto") -> None:
    """Writes the file.

    Its inputs are those of the model; its outputs are the logits of a classifier, start_logits and end_logits of question answering,
    logits of each token, or last_hidden_state of a plain encoder. block_rows: as in `pack_encoder`. ExportError if the encoder or its
    head is of another kind.
    """
    from onnx import TensorProto, helper, numpy_helper, save

    kind = type(model).__name__
    modules = dict(model.named_modules())
    inputs = subject_of(model).inputs
    constants: dict[str, np.ndarray] = {}
    nodes: list[Any] = []

    def linear(name: str, source: str, target: str) -> None:
        module = modules[name]
        constants[f"{name}.weight"], constants[f"{name}.bias"] = (_array(part).T for part in (module.weight, module.bias))
        nodes.append(helper.make_node("MatMul", [source, f"{name}.weight"], [f"{name}.product"]))
        nodes.append(helper.make_node("Add", [f"{name}.product", f"{name}.bias"], [target]))

    first_only = kind.endswith("ForSequenceClassification")
    sizes: Sequence[Any] = ["batch", "sequence"]
    if first_only:
        names, between = _first_token_head(model)
        outputs = {"logits": ["batch", model.config.num_labels]}
        linear(names[0], "hidden", "pooled")
        nodes += _activation(helper, constants, between, "pooled", "active")
        linear(names[1], "active", "logits")
    elif kind.endswith("ForTokenClassification"):
        outputs = {"logits": [*sizes, model.config.num_labels]}
        linear("classifier", "hidden", "logits")
    elif kind.endswith("ForQuestionAnswering"):
        outputs = {"start_logits": list(sizes), "end_logits": list(sizes)}
        linear("qa_outputs", "hidden", "both")
        constants["parts"], constants["last"] = np.array([1, 1]), np.array([-1])
        nodes.append(helper.make_node("Split", ["both", "parts"], ["start", "end"], axis=-1))
        nodes += [helper.make_node("Squeeze", [part, "last"], [f"{part}_logits"]) for part in ("start", "end")]
    elif model.base_model is model:
        outputs = {"last_hidden_state": [*sizes, model.config.hidden_size]}
        nodes.append(helper.make_node("Identity", ["hidden"], ["last_hidden_state"]))
    else:
        raise ExportError(f"the kernels know no head of {kind}.", help="export standard files, or the base model.")
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


def _array(parameter: nn.Parameter) -> np.ndarray:
    return parameter.detach().float().cpu().numpy()
