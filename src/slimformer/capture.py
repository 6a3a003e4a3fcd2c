"""Sees inside a forward pass: outputs, hidden states and attention scores, as methods ask for them.

Hidden states come from forward hooks on the modules an anatomy names, scores from an attention function registered with
transformers; both are gone when the context ends. Never `output_hidden_states=True`: transformers then leaves its own hooks on
the model for good, and a module that was replaced shifts the list. Where no scores are asked for, attention is left as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from slimformer.anatomy import Anatomy
from slimformer.methods.base import Capture, Captured

ATTENTION = "slimformer_scores"  # our name among transformers' attention functions


class Recorder:
    """What was seen in the latest forward pass of one model. `listening = False` lets passes go by unseen."""

    def __init__(self, layers: int, needs: Collection[Capture]) -> None:
        self.needs = frozenset(needs)
        self.listening = True
        self._hidden: list[Tensor | None] = [None] * (layers + 1)
        self._scores: list[Tensor | None] = [None] * layers

    def take(self, output: Mapping[str, Tensor]) -> Captured:
        """Everything seen since the last call, in float32, together with the task's outputs; the recorder is then empty."""
        hidden = tuple(_float(state) for state in self._hidden if state is not None)
        scores = tuple(None if score is None else _float(score) for score in self._scores)
        wanted = len(self._hidden) if Capture.HIDDEN in self.needs else 0
        if len(hidden) != wanted:
            raise RuntimeError(f"{len(hidden)} of {wanted} hidden states were seen: no forward pass came before take()")
        self._hidden = [None] * len(self._hidden)
        self._scores = [None] * len(self._scores)
        return Captured(
            output={name: _float(value) for name, value in output.items()},
            hidden=hidden,
            scores=scores if Capture.SCORES in self.needs else (),
        )

    def see_hidden(self, index: int, state: Tensor) -> None:
        if self.listening:
            self._hidden[index] = state

    def see_scores(self, layer: int, scores: Tensor) -> None:
        if self.listening:
            self._scores[layer] = scores


@contextmanager
def capturing(model: nn.Module, anatomy: Anatomy, needs: Collection[Capture]) -> Iterator[Recorder]:
    """Watches `model` while the context lasts: call it, then `recorder.take(output)`. Leaves no trace on it."""
    recorder = Recorder(len(anatomy.layers), needs)
    handles: list[Any] = []
    changed: list[tuple[Any, Any]] = []
    attentions: list[nn.Module] = []
    try:
        if Capture.HIDDEN in recorder.needs:
            for index, name in enumerate((anatomy.embedding, *anatomy.layers)):
                handles.append(model.get_submodule(name).register_forward_hook(_hidden_hook(recorder, index)))
        if Capture.SCORES in recorder.needs:
            _register()
            for layer, attention in enumerate(anatomy.attentions):
                if attention is not None:
                    module = model.get_submodule(attention)
                    _WATCHED[module] = (recorder, layer)
                    attentions.append(module)
            for config in _configs(model):
                changed.append((config, config._attn_implementation))
                config._attn_implementation = ATTENTION
        yield recorder
    finally:
        for handle in handles:
            handle.remove()
        for config, attention_name in changed:
            config._attn_implementation = attention_name
        for module in attentions:
            _WATCHED.pop(module, None)


_WATCHED: WeakKeyDictionary[nn.Module, tuple[Recorder, int]] = WeakKeyDictionary()  # attention module -> who watches it


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as transformers' eager functions compute it, which shows its scores to the watcher of `module`."""
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, key.transpose(2, 3)) * scale  # (batch, heads, seq, seq)
    watcher = _WATCHED.get(module)
    if watcher is not None:
        watcher[0].see_scores(watcher[1], scores)
    masked = scores if attention_mask is None else scores + attention_mask
    weights = nn.functional.dropout(nn.functional.softmax(masked, dim=-1), p=dropout, training=module.training)
    mixed = torch.matmul(weights, value).transpose(1, 2).contiguous()  # (batch, seq, heads, head_dim)
    return mixed, weights


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, eager_mask)  # a float mask to be added; without one padding would be seen


def _configs(model: nn.Module) -> list[Any]:
    """Each config that some module of `model` reads its attention function from, once."""
    from transformers import PretrainedConfig

    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            found[id(config)] = config
    return list(found.values())


def _hidden_hook(recorder: Recorder, index: int) -> Any:
    def hook(_: nn.Module, __: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        recorder.see_hidden(index, output if isinstance(output, Tensor) else output[0])

    return hook


def _float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
