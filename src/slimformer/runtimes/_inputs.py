"""Fits batches to the inputs and outputs of a file that another tool wrote: its names, number types and fixed shapes.

Files of ours need none of it and are called as they are. What is guessed is logged once a file; what cannot be right is a ModelError.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slimformer.core.pooling import SENTENCE_VECTOR
from slimformer.errors import ModelError
from slimformer.families.bert import OFFSET
from slimformer.files import read_small

_log = logging.getLogger(__name__)

_Arrays = dict[str, np.ndarray]
_Call = Callable[[Mapping[str, np.ndarray]], _Arrays]

# Names of other exporters for the inputs of an encoder; ":0", "serving_default_" and the like are left out before they are compared.
_NAMES = {
    "input_ids": ("input_ids", "ids", "input_word_ids", "tokens", "token_ids"),
    "attention_mask": ("attention_mask", "mask", "input_mask", "attn_mask"),
    "token_type_ids": ("token_type_ids", "segment_ids", "type_ids", "input_type_ids", "segments"),
    "position_ids": ("position_ids", "positions"),
}
_TYPES = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(bool)": np.bool_,
}
_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)", "tensor(bfloat16)")
_MOST_PLACES = 1 << 22  # of one call of a file with a fixed shape: more would fill the memory with padding
_ANSWERS = (
    "logits",
    "start_logits",
    SENTENCE_VECTOR,
)  # a file with an output of one of these names says itself what its answer is


@dataclass(frozen=True)
class Port:
    """An input or output of a file, with its type in ONNX Runtime's words; a size of its shape is a number if it is fixed."""

    name: str
    type: str
    shape: Sequence[Any]


def fit(path: Path, inputs: Sequence[Port], outputs: Sequence[Port], call: _Call) -> _Call:
    """`call` for batches of (batch, seq) int64 arrays named as transformers names them; it is given back as it is if it fits already."""
    if not any(_source(port) for port in inputs):
        return call  # no encoder, but a piece of one
    names = _outputs(path, outputs)
    plain = all(
        port.name in ("input_ids", "attention_mask", "token_type_ids")
        and port.type == "tensor(int64)"
        and not any(isinstance(size, int) for size in port.shape)
        for port in inputs
    )
    masked = {"input_ids", "attention_mask"} <= {port.name for port in inputs}
    if plain and masked and not names and not any(port.type in _FLOATS[1:] for port in outputs):
        return lambda batch: call(_given(inputs, batch))
    return _Fitted(path, inputs, names, call)


class _Fitted:
    """A file that is called with what it wants."""

    def __init__(self, path: Path, inputs: Sequence[Port], names: Mapping[str, str], call: _Call) -> None:
        self.path, self.inputs, self.names, self.call = path, inputs, names, call
        self.config = _config(path)
        self.sources: dict[str, str] | None = (
            None  # name of an input of the file -> name in a batch; known from the first batch on
        )
        self.rows: int | None = None
        self.width: int | None = None

    def __call__(self, batch: Mapping[str, np.ndarray]) -> _Arrays:
        if self.sources is None:
            self.sources = self._match(batch)
            self.rows, self.width = (self._fixed_size(axis) for axis in (0, 1))
            self._say_what_is_fixed()
        count, seq = batch["input_ids"].shape
        batch = self._complete(batch)
        parts = []
        for start in range(0, count, self.rows or count):
            part = {name: array[start : start + (self.rows or count)] for name, array in batch.items()}
            parts.append(self.call({port.name: self._value(part[self.sources[port.name]], port) for port in self.inputs}))
        result = (
            {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]} if len(parts) > 1 else parts[0]
        )
        return {self.names.get(name, name): self._cut(name, value[:count], seq) for name, value in result.items()}

    def _match(self, batch: Mapping[str, np.ndarray]) -> dict[str, str]:
        sources = {}
        for port in self.inputs:
            source = _source(port)
            if source is None or port.type not in _TYPES or len(port.shape) not in (0, 2):
                raise ModelError(
                    f"{self.path} has an input that nothing is known to give: '{port.name}', {port.type} of shape {_shape(port)}.",
                    facts=[f"known inputs, each of shape [batch, tokens]: {', '.join(_NAMES)}"],
                    help="export the model with these inputs, for example with optimum-cli export onnx, or bench its model folder.",
                )
            sources[port.name] = source
        renamed = [f"{name} for {source}" for name, source in sources.items() if name != source]
        if renamed:
            _log.warning("%s: its inputs are taken by their names: %s.", self.path, ", ".join(renamed))
        if "input_ids" not in sources.values():
            raise ModelError(f"{self.path} has no input for token ids.", facts=[f"its inputs: {', '.join(sources) or 'none'}"])
        if "attention_mask" not in sources.values():
            _log.warning("%s takes no attention mask: it must find padding by itself, or its answers depend on it.", self.path)
        if "position_ids" in sources.values() and "position_ids" not in batch:
            _log.warning("%s wants position_ids: they are counted from the first token.", self.path)
        return sources

    def _fixed_size(self, axis: int) -> int | None:
        """The size that the file fixes for an axis of all its inputs."""
        sizes = {port.shape[axis] for port in self.inputs if len(port.shape) == 2 and isinstance(port.shape[axis], int)}
        if len(sizes) > 1:
            raise ModelError(
                f"{self.path} fixes inputs of different shapes.",
                facts=[f"{port.name}: {_shape(port)}" for port in self.inputs],
                help="export it again with dynamic axes.",
            )
        return next(iter(sizes), None)

    def _say_what_is_fixed(self) -> None:
        if self.rows is not None:
            _log.warning(
                "%s has the fixed batch size %d: larger batches are run in parts, smaller ones filled.", self.path, self.rows
            )
        places = (self.rows or 1) * (self.width or 1)
        if not 0 < places <= _MOST_PLACES:
            raise ModelError(
                f"{self.path} has the fixed shape {_shape(self.inputs[0])}, which no batch can be filled up to.",
                help="export it again with dynamic axes, for batch and tokens.",
            )
        if self.width is None:
            return
        assert self.sources is not None
        if "attention_mask" not in self.sources.values():
            raise ModelError(
                f"{self.path} has a fixed shape, {_shape(self.inputs[0])}, and no attention mask that would hide the padding up to it.",
                help="export it again with dynamic axes, for batch and tokens.",
            )
        _log.warning(
            "%s has the fixed length of %d tokens: shorter inputs are padded up to it, which takes time.", self.path, self.width
        )

    def _complete(self, batch: Mapping[str, np.ndarray]) -> _Arrays:
        """The batch with all inputs that are known, filled up to the size that the file fixes."""
        ids = batch["input_ids"]
        whole = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)} | dict(batch)
        count, seq = ids.shape
        if self.width is not None and seq > self.width:
            raise ModelError(
                f"{self.path} has the fixed shape {_shape(self.inputs[0])}, and an input has {seq} tokens.",
                help=f"bench with --max-length {self.width} (all models then read no more), or export it again with dynamic axes.",
            )
        right, below = max(0, (self.width or 0) - seq), -count % self.rows if self.rows else 0
        pad = self._pad()
        if right:
            fills = {"input_ids": pad}
            whole = {
                name: np.pad(array, ((0, 0), (0, right)), constant_values=fills.get(name, 0)) for name, array in whole.items()
            }
        if below:
            whole = {name: np.concatenate([array, array[-1:].repeat(below, axis=0)]) for name, array in whole.items()}
        if "position_ids" not in whole:
            whole["position_ids"] = self._positions(whole["attention_mask"], pad)
        return whole

    def _pad(self) -> int:
        pad = self.config.get("pad_token_id")
        return pad if isinstance(pad, int) and 0 <= pad < 1 << 31 else 0

    def _positions(self, mask: np.ndarray, pad: int) -> np.ndarray:
        if self.config.get("model_type") in OFFSET:  # these count from pad + 1, and padding stays at pad
            return np.asarray(np.cumsum(mask, axis=1) * mask + pad)
        return np.broadcast_to(np.arange(mask.shape[1], dtype=np.int64), mask.shape)

    def _value(self, array: np.ndarray, port: Port) -> np.ndarray:
        return np.ascontiguousarray(array, dtype=_TYPES[port.type])

    def _cut(self, name: str, value: np.ndarray, seq: int) -> np.ndarray:
        """Without the columns of tokens that were filled up; numbers as float32."""
        if (
            self.width is not None
            and value.ndim > 1
            and value.shape[1] == self.width
            and not (value.ndim == 2 and self.names.get(name, name) in ("logits", SENTENCE_VECTOR))
        ):
            value = value[:, :seq]
        return value.astype(np.float32) if np.issubdtype(value.dtype, np.floating) else value


def _source(port: Port) -> str | None:
    """The input of an encoder that a file's input is by its name; None for any other."""
    bare = port.name.split(":")[0].removeprefix("serving_default_").lower()
    return next((name for name, others in _NAMES.items() if bare in others), None)


def _given(inputs: Sequence[Port], batch: Mapping[str, np.ndarray]) -> _Arrays:
    """The inputs of a file out of a batch: all words are there if it does not say which, and token types that it lacks are 0."""
    ids = batch["input_ids"]
    return {port.name: batch.get(port.name, np.full_like(ids, port.name == "attention_mask")) for port in inputs}


def asked_outputs(outputs: Sequence[str]) -> list[str]:
    """The outputs of a file that are asked for: of one that gives the vector of a text, that alone.

    >>> asked_outputs(["last_hidden_state", "sentence_embedding"]), asked_outputs(["start_logits", "end_logits"])
    (['sentence_embedding'], ['start_logits', 'end_logits'])
    """
    return [SENTENCE_VECTOR] if SENTENCE_VECTOR in outputs else list(outputs)


def _outputs(path: Path, outputs: Sequence[Port]) -> dict[str, str]:
    """What outputs are taken for if none is called as transformers calls it: the only one with two axes, or of the labels' size."""
    if any(port.name in _ANSWERS for port in outputs):
        return {}
    rows = [port for port in outputs if port.type in _FLOATS and len(port.shape) == 2]
    ends = {f"{end}_logits": [port for port in rows if end in port.name.lower()] for end in ("start", "end")}
    if all(len(ports) == 1 for ports in ends.values()):
        taken = {ports[0].name: name for name, ports in ends.items()}
    else:
        if len(rows) > 1:
            labels = _config(path).get("id2label")
            rows = [port for port in rows if isinstance(labels, dict) and port.shape[1] == len(labels)]
        taken = {rows[0].name: "logits"} if len(rows) == 1 else {}
    for port in rows:
        if port.name in taken:
            _log.warning("%s: its output '%s' of shape %s is taken for %s.", path, port.name, _shape(port), taken[port.name])
    return taken


def _shape(port: Port) -> str:
    return f"[{', '.join(str(size if size is not None else '?') for size in port.shape)}]"


def _config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_small(path.parent / "config.json"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
