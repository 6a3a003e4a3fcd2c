"""Computes attention for all contexts here, so that they nest: some look at its scores, some replace its softmax.

One function with slots is registered with transformers. A module without a slot gets PyTorch's fused attention, which
saves memory, but whose backward pass on a CPU takes longer than everything else in a small encoder (measured:
docs/decisions/0003-training-loop.md). Up to `MOST_SCORES` scores a layer, two plain products and a softmax make a
training step 1.3 to 1.7 times as fast; beyond, the scores no longer fit the allocator's reused blocks. The numbers are
the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, matmul, nn

from slimformer.core.asking import asking_functions, positions_unheard

MOST_SCORES = 16 << 20  # of a layer, batch * heads * seq * seq
ATTENTION_NAME = "slimformer"  # our name among transformers' attention functions


@dataclass(frozen=True)
class Slot:
    """What a context asks of one attention module while it lasts.

    `see_scores` gets the scaled scores before the mask, a bias for positions included, (batch, heads, seq, seq). `softmax` is
    computed instead of the usual one; of several nested contexts the innermost counts.
    """

    see_scores: Callable[[Tensor], None] | None = None
    softmax: Callable[[Tensor], Tensor] | None = None


_SLOTS: WeakKeyDictionary[nn.Module, list[Slot]] = (
    WeakKeyDictionary()
)  # attention module -> slots, the outermost context's first


@contextmanager
def attending(model: nn.Module, slots: Mapping[str, Slot]) -> Iterator[None]:
    """Computes the attentions of `model` here while the context lasts; `slots`: name of an attention module -> its slot."""
    _register()
    modules = {model.get_submodule(name): slot for name, slot in slots.items()}
    for module, slot in modules.items():
        _SLOTS.setdefault(module, []).append(slot)
    try:
        with _attention_named(model, ATTENTION_NAME), asking_functions(model, ATTENTION_NAME):
            yield
    finally:
        for module, slot in modules.items():
            _SLOTS[module].remove(slot)
            if not _SLOTS[module]:
                del _SLOTS[module]


def quick_attention(model: nn.Module) -> AbstractContextManager[None]:
    """Trains `model` with the faster of two attentions on a CPU while the context lasts; on other devices its own compute."""
    return attending(model, {}) if next(model.parameters()).device.type == "cpu" else positions_unheard(model)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    slots = _SLOTS.get(module, [])
    size = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    if not slots and not (query.requires_grad and size <= MOST_SCORES):
        added = [item for item in (position_bias, attention_mask) if item is not None]
        mask = sum(added[1:], added[0]).to(query.dtype) if added else None
        mixed = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout if module.training else 0.0, scale=scaling
        )
        return mixed.transpose(1, 2).contiguous(), None
    scores = matmul(query, key.transpose(2, 3)) * (query.size(-1) ** -0.5 if scaling is None else scaling)
    if position_bias is not None:
        scores = scores + position_bias
    for slot in slots:
        if slot.see_scores is not None:
            slot.see_scores(scores)  # (batch, heads, seq, seq)
    masked = scores if attention_mask is None else scores + attention_mask
    softmax = next((slot.softmax for slot in reversed(slots) if slot.softmax is not None), _softmax)
    weights = nn.functional.dropout(softmax(masked), p=dropout, training=module.training)
    return matmul(weights, value).transpose(1, 2).contiguous(), weights  # (batch, seq, heads, head_dim)


def _softmax(scores: Tensor) -> Tensor:
    return nn.functional.softmax(scores, dim=-1)


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(ATTENTION_NAME, _attend)
    AttentionMaskInterface.register(ATTENTION_NAME, eager_mask)  # a float mask to be added; without one padding would be seen


@contextmanager
def _attention_named(model: nn.Module, name: str) -> Iterator[None]:
    """Lets every config in `model` name this attention function while the context lasts."""
    before = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def _configs(model: nn.Module) -> list[Any]:
    """Each config that some module of `model` reads its attention function from, once."""
    from transformers import PretrainedConfig

    configs = [config for module in model.modules() if isinstance(config := getattr(module, "config", None), PretrainedConfig)]
    return list({id(config): config for config in configs}.values())
