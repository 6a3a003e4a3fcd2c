"""Folders of sentence-transformers: reads how their vectors are made, and writes the facts of their steps.

`modules.json` names the steps: a transformer, a pooling, perhaps linear layers and a normalization. Their facts stand in a folder each,
with other names in older versions than in newer ones; all are read, and those that all versions know are written. Steps that are not
computed here are refused, never left out in silence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimformer.core.pooling import POOLINGS, SENTENCE_VECTOR, VECTOR_ACTIVATIONS, DenseLayer, VectorHead
from slimformer.errors import ModelError, shown
from slimformer.files import read_small
from slimformer.saving.cross_encoder import is_cross_encoder
from slimformer.saving.headers import PICKLE_HELP, WEIGHTS, has_weights, inner_file, read_object, stored_weights
from slimformer.saving.sentence_texts import ENCODER_FACTS, text_facts

if TYPE_CHECKING:
    from torch import Tensor

MODULES = "modules.json"
STEP_FACTS = "config_sentence_transformers.json"
ENCODER_FOLDER = "0_Transformer"  # of a folder that is written here
_FLAGS = {  # of older versions, in the order in which vectors are joined
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_WITHOUT_EFFECT = ("Dropout",)  # when vectors are computed
_KINDS = ("Transformer", "Pooling", "Dense", "Normalize", *_WITHOUT_EFFECT)
_HELP = "take a model whose vectors come from a transformer, a pooling, linear layers and a normalization."


@dataclass(frozen=True)
class SentenceFolder:
    """A folder of sentence-transformers: where its transformer lies, how vectors are made, and the weights of its linear layers.

    Without a folder in `layers`, the last linear layer of `head` keeps the first numbers of a vector.
    """

    folder: Path
    encoder: Path
    head: VectorHead
    layers: tuple[Path, ...] = ()
    remarks: tuple[str, ...] = ()

    def dense_state(self) -> dict[str, Tensor]:
        """The weights of the linear layers, by their names in a model: "dense.0.weight"."""
        import torch
        from safetensors.torch import load_file

        state: dict[str, Tensor] = {
            f"dense.{place}.weight": torch.eye(facts.out_features, facts.in_features)
            for place, facts in enumerate(self.head.dense[len(self.layers) :], len(self.layers))
        }
        for place, folder in enumerate(self.layers):
            facts = _dense(folder / "config.json")
            read = {name.removeprefix("linear."): value.float() for name, value in load_file(folder / WEIGHTS).items()}
            wanted = {"weight": (facts.out_features, facts.in_features)} | (
                {"bias": (facts.out_features,)} if facts.bias else {}
            )
            have = {name: tuple(value.shape) for name, value in read.items()}
            if have != wanted:
                raise ModelError(
                    f"{folder}: its weights are {have}, and its config.json asks for {wanted}.",
                    help="copy the whole folder again.",
                )
            kept = self.head.dense[place].out_features
            state |= {f"dense.{place}.{name}": value[:kept] for name, value in read.items()}
        return state


def is_sentence_folder(folder: Path) -> bool:
    """Whether a folder says how vectors are made of its hidden states."""
    return os.path.isfile(folder / MODULES) and not is_cross_encoder(folder)


def read_sentence_folder(folder: Path) -> SentenceFolder:
    """The folder at `folder`; ModelError if a step of it is not known here, or a file of it cannot be read."""
    steps = _steps(folder)
    kinds = [kind for kind, _ in steps]
    if kinds.count("Transformer") != 1 or kinds[0] != "Transformer" or kinds.count("Pooling") != 1:
        raise ModelError(
            f"{folder / MODULES} names the steps {', '.join(kinds) or 'none'}, and a transformer with one pooling behind it is needed.",
            help=_HELP,
        )
    rest = [kind for kind in kinds[2:] if kind not in _WITHOUT_EFFECT]
    ordered = [kind for kind in rest if kind == "Dense"] + [kind for kind in rest if kind == "Normalize"][:1]
    if kinds[1] != "Pooling" or rest[: len(ordered)] != ordered or set(rest[len(ordered) :]) - {"Normalize"}:
        raise ModelError(
            f"{folder / MODULES} names its steps in the order {', '.join(kinds)}.",
            help="linear layers come behind the pooling, and a normalization last.",
        )
    encoder = steps[0][1]
    layers = [place for kind, place in steps if kind == "Dense"]
    texts = text_facts(encoder)
    own = _optional(folder / STEP_FACTS)
    prompts = own.get("prompts") or {}
    if not isinstance(prompts, Mapping) or any(not isinstance(text, (str, type(None))) for text in prompts.values()):
        raise ModelError(
            f"{folder / STEP_FACTS}: prompts is {shown(prompts)}, not a mapping of names to texts.", help="mend it there."
        )
    default = own.get("default_prompt_name")
    head = VectorHead(
        pooling=_pooling(steps[1][1] / "config.json"),
        normalize="Normalize" in kinds,
        dense=tuple(_dense(place / "config.json") for place in layers),
        prompts={str(name): text for name, text in prompts.items() if text},
        default_prompt=default if isinstance(default, str) else None,
        max_length=texts.max_length,
        lower=texts.lower,
        similarity=own.get("similarity_fn_name") if isinstance(own.get("similarity_fn_name"), str) else None,
    )
    for place in layers:
        if not has_weights(place):
            raise ModelError(
                f"{place} holds no {WEIGHTS}; pickles are not read.", help=PICKLE_HELP.replace("model.", "the model's ", 1)
            )
        stored_weights(place)
    head, remarks = _shortened(folder, head, own.get("truncate_dim"), steps[1][1] / "config.json")
    head.check()
    return SentenceFolder(folder, encoder, head, tuple(layers), remarks)


def _shortened(folder: Path, head: VectorHead, kept: Any, pooling: Path) -> tuple[VectorHead, tuple[str, ...]]:
    """The head with vectors of the first `kept` numbers, which truncate_dim asks for, and remarks; `pooling`: the facts of that step."""
    if kept is None:
        return head, ()
    facts = read_object(pooling)
    width = facts.get("embedding_dimension", facts.get("word_embedding_dimension"))
    own = head.dimension(width if type(width) is int else 0)
    if type(kept) is not int or kept < 1 or own < 1:
        raise ModelError(
            f"{folder / STEP_FACTS} says truncate_dim: {shown(kept)}, of vectors of {own or 'an unknown number of'} numbers.",
            help=f"mend it there, or embedding_dimension in {pooling}.",
        )
    if kept >= own:
        return head, ()
    if head.normalize and head.similarity not in (None, "cosine"):
        raise ModelError(
            f"{folder / STEP_FACTS} says truncate_dim: {kept}, which leaves vectors of other lengths than 1, "
            f"and compares them by {head.similarity}: that is not computed here.",
            help="with similarity_fn_name: cosine, lengths do not count.",
        )
    last = replace(head.dense[-1], out_features=kept) if head.dense else DenseLayer(own, kept)
    said = f"{folder}: its vectors have {kept} numbers, as truncate_dim says"
    length = (
        ", and length 1; sentence-transformers leaves these shorter, and their cosine is the same" if head.normalize else ""
    )
    return replace(head, dense=(*head.dense[:-1], last)), (f"{said}{length}.",)


def _steps(folder: Path) -> list[tuple[str, Path]]:
    """The last part of each step's type, and its folder; ModelError for what is no list of steps, or names code of its own."""
    file = inner_file(folder, MODULES)
    try:
        steps = json.loads(read_small(file or folder / MODULES).decode("utf-8"))
        found = [(str(step["type"]), str(step.get("path", ""))) for step in sorted(steps, key=lambda step: step.get("idx", 0))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{folder / MODULES} cannot be read: {error}.", help="copy the whole folder again.") from None
    steps_found = []
    for name, place in found:
        kind = name.rpartition(".")[2]
        if not name.startswith("sentence_transformers.") or kind not in _KINDS:
            own = "" if name.startswith("sentence_transformers.") else ", whose code came with the model and is never run"
            raise ModelError(f"{folder / MODULES} names the step {shown(name)}{own}, which is not computed here.", help=_HELP)
        inner = Path(os.path.normpath(folder / place))
        if inner != folder and not inner.is_relative_to(folder):
            raise ModelError(
                f"{folder / MODULES} leads out of its folder: {shown(place)}.", help="copy the whole folder again."
            )
        steps_found.append((kind, inner))
    return steps_found


def _pooling(file: Path) -> tuple[str, ...]:
    facts = read_object(file)
    told = facts.get("pooling_mode")
    modes = [told] if isinstance(told, str) else told
    if modes is None:
        modes = [mode for flag, mode in _FLAGS.items() if facts.get(flag)] or ["mean"]
    strange = [mode for mode in modes if mode not in POOLINGS] if isinstance(modes, list) else [modes]
    if strange:
        raise ModelError(f"{file} names the pooling {shown(strange[0])}.", help=f"known: {', '.join(POOLINGS)}.")
    if facts.get("include_prompt") is False:
        raise ModelError(
            f"{file} leaves the tokens of a prompt out of the vector (include_prompt: false), which is not computed here.",
            help="take a model whose prompts count like the text.",
        )
    return tuple(modes)


def _dense(file: Path) -> DenseLayer:
    facts = read_object(file)
    names = {path: name for name, path in VECTOR_ACTIVATIONS.items()}
    said = str(facts.get("activation_function", VECTOR_ACTIVATIONS["tanh"]))
    short = said.rpartition(".")[2].lower() if said.startswith("torch.") else ""
    activation = names.get(said) or (short if short in VECTOR_ACTIVATIONS else None)
    strange = next(
        (name for name in ("module_input_name", "module_output_name") if facts.get(name) not in (None, SENTENCE_VECTOR)), ""
    )
    if activation is None or facts.get("use_residual") or strange:
        what = "adds its input (use_residual)" if facts.get("use_residual") else f"has {strange or f'the activation {said}'}"
        raise ModelError(f"{file}: this linear layer {what}, which is not computed here.", help=_HELP)
    try:
        return DenseLayer(int(facts["in_features"]), int(facts["out_features"]), bool(facts.get("bias", True)), activation)
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{file} does not say in_features and out_features.", help="copy the whole folder again.") from None


def _optional(file: Path) -> dict[str, Any]:
    return read_object(file) if file.is_file() else {}


# -- Writing -------------------------------------------------------------------------------------------------------------------


def write_steps(folder: Path, head: VectorHead, width: int, encoder: str = "") -> None:
    """Writes modules.json and the facts of all steps but the weights; `width`: of the hidden states, `encoder`: its folder."""
    steps = [(encoder, "Transformer"), ("1_Pooling", "Pooling")]
    steps += [(f"{2 + place}_Dense", "Dense") for place in range(len(head.dense))]
    steps += [(f"{2 + len(head.dense)}_Normalize", "Normalize")] if head.normalize else []
    _write(
        folder / MODULES,
        [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for place, (path, kind) in enumerate(steps)
        ],
    )
    pooling: dict[str, Any] = {"word_embedding_dimension": width}
    pooling |= {flag: mode in head.pooling for flag, mode in _FLAGS.items()}
    if head.pooling != tuple(mode for mode in _FLAGS.values() if mode in head.pooling):
        pooling["pooling_mode"] = list(head.pooling)  # flags tell no order
    _write(folder / "1_Pooling" / "config.json", pooling)
    for place, layer in enumerate(head.dense):
        facts = {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias,
            "activation_function": VECTOR_ACTIVATIONS[layer.activation],
        }
        _write(folder / f"{2 + place}_Dense" / "config.json", facts)
    own: dict[str, Any] = {"prompts": dict(head.prompts), "default_prompt_name": head.default_prompt}
    _write(folder / STEP_FACTS, own | ({"similarity_fn_name": head.similarity} if head.similarity else {}))
    limit = {} if head.max_length is None else {"max_seq_length": head.max_length}
    _write(folder / encoder / ENCODER_FACTS[0], limit | {"do_lower_case": head.lower})


def write_dense_state(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Writes the weights of linear layers, by their names in a model, into the folders of their steps."""
    from safetensors.torch import save_file

    places = sorted({int(name.split(".")[1]) for name in state})
    for place in places:
        own = {
            name.removeprefix(f"dense.{place}."): value for name, value in state.items() if name.startswith(f"dense.{place}.")
        }
        file = folder / f"{2 + place}_Dense" / WEIGHTS
        file.parent.mkdir(exist_ok=True)
        save_file({f"linear.{name}": value.contiguous() for name, value in own.items()}, file, metadata={"format": "pt"})
        file.chmod(0o644)


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
