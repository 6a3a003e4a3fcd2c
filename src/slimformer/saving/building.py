"""Builds transformers models without their weights, from a config.json that may say anything.

A model is built from the fields that its class reads and that its family's anatomy holds for. Fields that would fetch, run or choose code
are left out or refused, sizes are bounded by the weights' headers before any layer is made, and whatever else transformers makes of a
wrong field becomes one ModelError.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimformer.errors import ModelError, SlimformerError, nearest, shown
from slimformer.families.base import family_of
from slimformer.saving.folders import CONFIG
from slimformer.saving.headers import PICKLE_HELP, PICKLES, WEIGHTS, StoredWeights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MOST_LABELS = 1_000_000
MOST_PLACES = 1_000_000
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset")
_OWN_ATTENTION = (None, True, False, "eager", "sdpa")
_KERNELS = (
    "experts_implementation",
    "_experts_implementation",
    "fusion_config",
    "kernel_config",
    "use_kernels",
    "distributed_config",
)
_UNUSED = (  # fields on how a model is called or stored, which are settled here
    "model_type", "slimformer", "dtype", "torch_dtype", "return_dict", "output_attentions", "output_hidden_states", "torchscript",
    "custom_pipelines", "transformers_version", "_name_or_path", "use_return_dict", "chunk_size_feed_forward",
)  # fmt: skip
_SIZES = (
    "vocab_size", "max_position_embeddings", "type_vocab_size", "hidden_size", "dim", "intermediate_size", "hidden_dim", "embedding_size",
    "num_attention_heads", "n_heads", "d_model", "d_kv", "d_ff", "num_heads", "decoder_vocab_size", "encoder_ffn_dim", "decoder_ffn_dim",
    "encoder_attention_heads", "decoder_attention_heads", "relative_attention_num_buckets",
)  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layers", "encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers")
_ACTIVATIONS = ("hidden_act", "activation", "activation_function", "dense_act_fn", "hidden_activation", "classifier_activation")


@dataclass(frozen=True)
class Blueprint:
    """The fields of config.json that a model is built from, and remarks on those that are left out."""

    folder: Path
    fields: Mapping[str, Any]
    remarks: tuple[str, ...]

    def config(self, kind: str, changes: Mapping[str, Any] | None = None) -> PretrainedConfig:
        """The config of transformers for the model type `kind`; fields that it does not know are attributes of it all the same."""
        import transformers

        with reading(self.folder, CONFIG):
            config: PretrainedConfig = transformers.AutoConfig.for_model(kind, **{**self.fields, **(changes or {})})
        return config


def blueprint(folder: Path, raw: Mapping[str, Any], stored: StoredWeights, planned: int = 0) -> Blueprint:
    """The fields of a folder's config.json that a model is built from.

    Args:
        folder: The model folder, for messages.
        raw: The content of its config.json.
        stored: Its weights, whose headers bound the sizes.
        planned: The number of units that a plan cut, of which no tensor tells.

    Raises:
        ModelError: A field asks for quantized or other weights, for a function that the family does not compute, or for too large a size.
    """
    _refuse_weights(folder, raw)
    _refuse_functions(folder, raw)
    _refuse_sizes(folder, raw, stored, planned)
    left_out = {*_UNUSED, *_ATTENTION, *_KERNELS, "auto_map", "quantization_config", "transformers_weights"}
    return Blueprint(folder, {key: value for key, value in raw.items() if key not in left_out}, tuple(_remarks(folder, raw)))


def empty_model(
    cls: type[PreTrainedModel], config: PretrainedConfig, folder: Path, *, buffers: bool = False, **options: Any
) -> PreTrainedModel:
    """A model of that class without weights: no parameter is allocated. With `buffers`, those that no file holds are real.

    `options` are those of the class.
    """
    import torch
    from accelerate import init_empty_weights

    with reading(folder, CONFIG), silence():
        if buffers:
            with init_empty_weights(include_buffers=False):
                return cls(config, **options)
        with torch.device("meta"):
            return cls(config, **options)


@contextmanager
def reading(folder: Path, what: str) -> Iterator[None]:
    """Whatever another library raises in this block becomes a ModelError with its reason; ours pass, and so does Ctrl-C."""
    try:
        yield
    except SlimformerError:
        raise
    except Exception as error:
        reason = str(error).strip() or "no reason is given"
        raise ModelError(
            f"{folder / what} does not make a model: {type(error).__name__}: {reason}",
            help="does config.json belong to these weights? Copy it again from where the model came from.",
        ) from error


@contextmanager
def silence() -> Iterator[None]:
    """Keeps transformers' warnings about fresh heads off the screen: the checks here raise an error if one matters."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR + 5)
    try:
        with without_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keeps transformers' progress bars off the screen, as when it reads and writes weights; afterwards they are as they were."""
    from transformers.utils import logging as bars

    before = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            bars.enable_progress_bar()


def refuse_labels(folder: Path, raw: Mapping[str, Any]) -> None:
    """ModelError for an id2label that is no mapping of ids to names, and for a number of labels that nobody has."""
    names, count = raw.get("id2label"), raw.get("num_labels")
    problem = ""
    if names is not None and (not isinstance(names, Mapping) or any(isinstance(name, (dict, list)) for name in names.values())):
        problem = f"id2label is {shown(names)}, not a mapping of ids to names"
    elif names and sorted(map(str, names)) != sorted(map(str, range(len(names)))):
        problem = f"id2label has the ids {shown(sorted(map(str, names)))}; they must run from 0 without a gap"
    elif count is not None and (type(count) is not int or not 0 <= count <= MOST_LABELS):
        problem = f"num_labels is {shown(count)}"
    if problem:
        raise ModelError(f"{folder / CONFIG}: {problem}.", help="mend it there, or copy the file again.")


def _refuse_weights(folder: Path, raw: Mapping[str, Any]) -> None:
    """ModelError if the weights are quantized by another tool, or are said to be in another file."""
    quantized = raw.get("quantization_config") or raw.get("quantization")  # the second is of MLX
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        raise ModelError(
            f"the weights of {folder} are quantized ({shown(method or 'quantization_config')}), and slimformer cuts float weights.",
            help="name the folder of the model before it was quantized; slimformer makes an int8 file itself.",
        )
    other = raw.get("transformers_weights")
    if other not in (None, WEIGHTS):
        pickled = isinstance(other, str) and other.lower().endswith(PICKLES)
        raise ModelError(
            f"{folder / CONFIG} says that the weights are in {shown(other)} (transformers_weights)"
            f"{', a pickle, which can run code' if pickled else ''}; only {WEIGHTS} and its shards are read.",
            help=PICKLE_HELP if pickled else "leave the field out, or save the model again.",
        )


def _refuse_functions(folder: Path, raw: Mapping[str, Any]) -> None:
    """ModelError for values that change the function a model computes into one that its family's anatomy does not describe."""
    import transformers

    family = family_of(str(raw["model_type"]).removeprefix("slimformer_"))
    for field, values in family.settled.items():
        if field in raw and raw[field] is not None and raw[field] not in values:
            raise ModelError(
                f"{folder / CONFIG} says {field}: {shown(raw[field])}, and slimformer computes models with {shown(values[0])} only.",
                help="take a model without it; to change the field by hand would change what the model computes.",
            )
    for field in _ACTIVATIONS:
        name = raw.get(field)
        if isinstance(name, str) and name not in transformers.activations.ACT2FN:
            raise ModelError(
                f"{folder / CONFIG} names the activation {shown(name)}, which transformers does not have.",
                help=nearest(name, transformers.activations.ACT2FN)[:200],
            )
    epsilon = raw.get("layer_norm_eps", 0)
    if isinstance(epsilon, (int, float)) and not (0 <= epsilon < math.inf):
        raise ModelError(f"{folder / CONFIG} says layer_norm_eps: {epsilon}, which must not be below 0.", help="mend it there.")
    pad, words = raw.get("pad_token_id"), raw.get("vocab_size")
    if type(pad) is int and type(words) is int and pad >= words:
        raise ModelError(
            f"{folder / CONFIG} says pad_token_id: {pad}, and its vocabulary has {words} tokens.",
            help="mend it there, or copy it again.",
        )


def _refuse_sizes(folder: Path, raw: Mapping[str, Any], stored: StoredWeights, planned: int) -> None:
    """ModelError for sizes above anything that the weights hold; in building, each layer costs time before a shape is compared."""
    family = family_of(str(raw["model_type"]).removeprefix("slimformer_"))
    least = 64 if family.positions(raw) is not None else MOST_PLACES  # without a table of positions their number is no size
    for field in (*_SIZES, *_LAYERS):
        size = raw.get(field)
        most = max(stored.largest, least if field == "max_position_embeddings" else 64)
        most = len(stored.tensors) + planned if field in _LAYERS else most
        if type(size) is int and size > most:
            what = f"only {len(stored.tensors):,} tensors" if field in _LAYERS else f"no tensor larger than {stored.largest:,}"
            raise ModelError(
                f"{folder / CONFIG} says {field}: {shown(size)}, and the weights hold {what}.",
                help="config.json does not belong to these weights; copy the whole folder again.",
            )


def _remarks(folder: Path, raw: Mapping[str, Any]) -> Iterator[str]:
    """What a person should know of fields that are left out."""
    attention = next((raw[name] for name in _ATTENTION if raw.get(name) not in _OWN_ATTENTION), None)
    if attention is not None:
        yield f"{folder}: config.json asks for the attention {shown(attention)}; PyTorch's own computes the same here."
    kernels = [name for name in _KERNELS if raw.get(name)]
    if kernels:
        yield f"{folder}: config.json asks for code of others ({', '.join(kernels)}); transformers' own is used."
    if raw.get("auto_map"):
        yield f"{folder}: config.json names code that came with the model (auto_map); it is not run, transformers' own class is used."
