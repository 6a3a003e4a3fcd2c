"""Attention for training on a CPU: two matrix products and a softmax where the scores are small, fused attention where they are large.

PyTorch's fused attention saves memory, but its backward pass on a CPU takes longer than everything else in a small encoder
(measured: docs/decisions/0003-training-loop.md). Up to `LARGEST` scores a layer the plain products are 1.3 to 1.7 times as fast a
training step; beyond, the scores no longer fit the allocator's reused blocks and fused attention wins. The numbers are the same up
to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, matmul, nn

LARGEST = 16 << 20  # scores of a layer, batch * heads * seq * seq
NAME = "slimformer_quick"  # our name among transformers' attention functions
# Attention module -> the softmax it computes with instead; whichever of our attention functions is at work asks here.
SOFTMAX: WeakKeyDictionary[nn.Module, Callable[[Tensor], Tensor]] = WeakKeyDictionary()


def attend(
    module: nn.Module, scores: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """What follows the scores (batch, heads, seq, seq): mask, softmax, dropout and the mixing of `value`."""
    masked = scores if attention_mask is None else scores + attention_mask
    own = SOFTMAX.get(module)
    shares = nn.functional.softmax(masked, dim=-1) if own is None else own(masked)
    weights = nn.functional.dropout(shares, p=dropout, training=module.training)
    mixed = matmul(weights, value).transpose(1, 2).contiguous()  # (batch, seq, heads, head_dim)
    return mixed, weights


def score(query: Tensor, key: Tensor, scaling: float | None) -> Tensor:
    """Scaled scores before the mask: (batch, heads, seq, seq)."""
    return matmul(query, key.transpose(2, 3)) * (query.size(-1) ** -0.5 if scaling is None else scaling)


def _quick(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    small = query.requires_grad and query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] <= LARGEST
    if small or module in SOFTMAX:
        return attend(module, score(query, key, scaling), value, attention_mask, dropout)
    mask = None if attention_mask is None else attention_mask.to(query.dtype)
    mixed = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout if module.training else 0.0, scale=scaling
    )
    return mixed.transpose(1, 2).contiguous(), None


@contextmanager
def quick_attention(model: nn.Module) -> Iterator[None]:
    """Trains `model` with the faster of the two on a CPU while the context lasts; on other devices nothing changes."""
    if next(model.parameters()).device.type != "cpu":
        yield
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(NAME, _quick)
    AttentionMaskInterface.register(NAME, eager_mask)  # a float mask to be added, good for both
    with attention_named(model, NAME):
        yield


@contextmanager
def attention_named(model: nn.Module, name: str) -> Iterator[None]:
    """Lets every config in `model` name this attention function while the context lasts."""
    changed = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        for config, _ in changed:
            config._attn_implementation = name
        yield
    finally:
        for config, before in changed:
            config._attn_implementation = before


def _configs(model: nn.Module) -> list[Any]:
    """Each config that some module of `model` reads its attention function from, once."""
    from transformers import PretrainedConfig

    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            found[id(config)] = config
    return list(found.values())
