"""Sees inside a forward pass: outputs, hidden states and attention scores, as methods ask for them.

Hidden states come from forward hooks on the modules an anatomy names, scores from an attention function registered with
transformers; both are gone when the context ends. Never `output_hidden_states=True`: transformers then leaves its own hooks on
the model for good, and a module that was replaced shifts the list. Where no scores are asked for, attention is left as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy
from slimformer.hooks.attention import attend, attention_named, score
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
    attentions: list[nn.Module] = []
    with ExitStack() as stack:
        stack.callback(lambda: [handle.remove() for handle in handles])
        stack.callback(lambda: [_WATCHED.pop(module, None) for module in attentions])
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
            stack.enter_context(attention_named(model, ATTENTION))
        yield recorder


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
    scores = score(query, key, scaling)
    watcher = _WATCHED.get(module)
    if watcher is not None:
        watcher[0].see_scores(watcher[1], scores)
    return attend(module, scores, value, attention_mask, dropout)


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, eager_mask)  # a float mask to be added; without one padding would be seen


def _hidden_hook(recorder: Recorder, index: int) -> Any:
    def hook(_: nn.Module, __: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        recorder.see_hidden(index, output if isinstance(output, Tensor) else output[0])

    return hook


def _float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
