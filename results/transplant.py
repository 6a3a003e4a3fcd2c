"""Carries a BERT's weights, function for function, into the class of another family: the same encoder under other
names.

One trained BERT then stands for several families, so that methods, exporters and runtimes meet trained weights in each.
Outputs are the same to 1e-5 for single segments: RoBERTa and DistilBERT know no second one. Token ids stay, so the
tokenizer does too. RoBERTa counts positions from pad_token_id + 1, so its table gets that many rows in front;
DistilBERT has no segments, so BERT's first one is added to its positions. Heads are carried over if the classes agree:
question answering and tagging always, classification to RoBERTa; DistilBERT (ReLU) and ELECTRA (GELU) classify through
another function than BERT's tanh, so there it starts fresh and must be trained.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from slimformer.errors import ModelError, nearest
from slimformer.files import whole_folder
from slimformer.saving.checkpoint import TOKENIZER_FILES

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Target = Literal["roberta", "distilbert", "electra"]
CLASSES = {"roberta": "Roberta", "distilbert": "DistilBert", "electra": "Electra"}  # how names of transformers' classes begin
SHAPES = ("Model", "ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification")  # how they end
DISTILBERT_EPS = 1e-12  # of its layer norms, fixed in its class

DISTILBERT_NAMES = (
    (r"^encoder\.layer\.", "transformer.layer."),
    (r"attention\.self\.query", "attention.q_lin"),
    (r"attention\.self\.key", "attention.k_lin"),
    (r"attention\.self\.value", "attention.v_lin"),
    (r"attention\.output\.dense", "attention.out_lin"),
    (r"attention\.output\.LayerNorm", "sa_layer_norm"),
    (r"intermediate\.dense", "ffn.lin1"),
    (r"(?<!attention\.)output\.dense", "ffn.lin2"),
    (r"(?<!attention\.)output\.LayerNorm", "output_layer_norm"),
)


@dataclass(frozen=True)
class Transplanted:
    """The model in its new class, in eval mode; `fresh`: its parameters that have no source and must be trained."""

    model: PreTrainedModel
    fresh: tuple[str, ...]


def transplant(model: PreTrainedModel, to: Target, seed: int = 17) -> Transplanted:
    """A model of the family `to` that computes what the BERT `model` computes; `model` stays as it is.

    Raises ModelError for a model that is no uncut BERT, for a head without a counterpart, and for layer norms that DistilBERT
    cannot have.
    """
    import transformers

    if to not in CLASSES:
        raise ModelError(f"there is no way from BERT to '{to}'.", help=nearest(to, CLASSES))
    shape = type(model).__name__.removeprefix("Bert")
    if model.config.model_type != "bert" or shape not in SHAPES:
        raise ModelError(
            f"a {type(model).__name__} cannot be carried into another family.",
            help=f"known: {', '.join(f'Bert{end}' for end in SHAPES)}.",
        )
    if to == "distilbert" and model.config.layer_norm_eps != DISTILBERT_EPS:
        raise ModelError(
            f"DistilBERT's layer norms have epsilon {DISTILBERT_EPS}, this model's have {model.config.layer_norm_eps}.",
            help="carry it into roberta or electra.",
        )
    config = transformers.AutoConfig.for_model(to, **_config(model.config, to))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new: PreTrainedModel = getattr(transformers, CLASSES[to] + shape)(config)
    prefix = "" if new.base_model is new else f"{new.base_model_prefix}."
    carried = {prefix + name: tensor for name, tensor in _encoder(model, to).items()} | _head(model, to, shape)
    empty = new.state_dict()
    carried = {name: tensor for name, tensor in carried.items() if ".pooler." not in f".{name}" or name in empty}
    wrong = [name for name, tensor in carried.items() if name not in empty or empty[name].shape != tensor.shape]
    fresh = tuple(name for name in empty if name not in carried)
    inside = [name for name in fresh if name.startswith(prefix) and re.search(r"embeddings\.|\.layer\.", name)]
    if wrong or inside:
        raise ModelError(
            f"the layers of this BERT are not those of its config: {(wrong or inside)[0]}.", help="transplant first, cut after."
        )
    new.load_state_dict(empty | carried, strict=True)
    return Transplanted(new.eval(), fresh)


def save(model: PreTrainedModel, folder: Path, *, tokenizer_from: Path) -> None:
    """Writes a plain transformers folder with the tokenizer of `tokenizer_from`; `checkpoint.load` reads it."""
    with whole_folder(folder) as part:
        model.save_pretrained(part)
        for name in TOKENIZER_FILES:
            if (tokenizer_from / name).is_file():
                shutil.copyfile(tokenizer_from / name, part / name)


def _config(config: Any, to: Target) -> dict[str, Any]:
    """The fields of the new config."""
    same = (
        "vocab_size",
        "pad_token_id",
        "max_position_embeddings",
        "initializer_range",
        "id2label",
        "label2id",
        "problem_type",
    )
    fields = {name: getattr(config, name) for name in same}
    if to == "distilbert":
        return fields | {
            "dim": config.hidden_size,
            "n_layers": config.num_hidden_layers,
            "n_heads": config.num_attention_heads,
            "hidden_dim": config.intermediate_size,
            "activation": config.hidden_act,
            "dropout": config.hidden_dropout_prob,
            "attention_dropout": config.attention_probs_dropout_prob,
        }
    skeleton = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "layer_norm_eps",
        "type_vocab_size",
        "classifier_dropout",
        "bos_token_id",
        "eos_token_id",
    )
    fields |= {name: getattr(config, name) for name in skeleton}
    if to == "electra":
        return fields | {"embedding_size": config.hidden_size}
    return fields | {"type_vocab_size": 1, "max_position_embeddings": config.max_position_embeddings + _offset(config)}


def _offset(config: Any) -> int:
    """Rows of RoBERTa's position table before the first that is used; the last of them is the padding's."""
    return 1 + int(config.pad_token_id)


def _encoder(model: PreTrainedModel, to: Target) -> dict[str, Tensor]:
    """Embeddings, layers and pooler under their new names, without the prefix of the base model."""
    state = {name: tensor.detach().clone() for name, tensor in model.base_model.state_dict().items()}
    positions, segments = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"
    if to == "roberta":
        unused = state[positions].new_zeros(_offset(model.config), state[positions].shape[1])
        state[positions] = torch.cat([unused, state[positions]])
        state[segments] = state[segments][:1]
    if to == "distilbert":
        state[positions] = state[positions] + state.pop(segments)[0]
        return {_renamed(name): tensor for name, tensor in state.items()}
    return state


def _renamed(name: str) -> str:
    for pattern, replacement in DISTILBERT_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _head(model: PreTrainedModel, to: Target, shape: str) -> dict[str, Tensor]:
    """The head's weights under their new names, if the new class computes the same function."""
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("bert.")}
    if shape == "Model":
        return {}
    if shape != "ForSequenceClassification":
        return own
    if to != "roberta":
        return {}
    head = {"classifier.dense": "bert.pooler.dense", "classifier.out_proj": "classifier"}  # BERT's head is in two parts
    state = model.state_dict()
    return {f"{new}.{name}": state[f"{old}.{name}"] for new, old in head.items() for name in ("weight", "bias")}
