"""What stands in a model where something was cut: a module in place of one that is gone, and attentions that share a bias.

A decoder asks its cache how many tokens were said, and transformers asks the first self-attention's place in it; so a
stand-in for one goes on counting, with one number for each token. Layers may share one bias for positions, a number for
each head of the whole model: an attention that lost heads takes its part of it, and one that is gone hands it on. Nothing
here changes a shape: `shrink.py` does.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from slimformer.core.anatomy import SHARED_BIAS, Skip


class Skipped(nn.Module):
    """Takes the place and the name of a module whose sublayer is gone; it has no parameters."""

    def __init__(self, skip: Skip, layer: int | None = None) -> None:
        super().__init__()
        self.skip, self.layer_idx = skip, layer

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        if self.skip.counts:
            _count(_cache(kwargs), hidden_states, self.layer_idx)
        match self.skip.gives:
            case "input":
                value = hidden_states
            case "residual":
                value = args[0]
            case "zero":
                value = hidden_states.new_zeros(())
        return (value, None) if self.skip.pair else value


def stand_in(model: nn.Module, skip: Skip) -> None:
    """Takes a module out of `model` and puts its stand-in there."""
    module = model.get_submodule(skip.module)
    if not skip.shares_bias:
        model.set_submodule(skip.module, Skipped(skip, getattr(module, "layer_idx", None)))
        return
    for name, _ in list(module.named_children()):
        if name != SHARED_BIAS:
            delattr(module, name)
    _become(module, _BiasAlone)
    cast(Any, module).skip = skip


def take_part(model: nn.Module, attention: str, keep: tuple[int, ...]) -> None:
    """Lets an attention add the part of the shared bias that belongs to the heads `keep` of those that it has."""
    module: Any = model.get_submodule(attention)
    before = own_heads(module)
    if not isinstance(module, (_OwnPart, _OwnColumns)):
        _become(module, _OwnPart if hasattr(module, "has_relative_attention_bias") else _OwnColumns)
    module.own_heads = tuple(before[head] for head in keep)


def own_heads(module: Any) -> tuple[int, ...]:
    """The heads that an attention has of those that the bias of its stack has columns for."""
    if isinstance(module, (_OwnPart, _OwnColumns)):
        return module.own_heads
    return tuple(range(module.n_heads if hasattr(module, "n_heads") else module.num_attention_heads))


def own_part(module: nn.Module, bias: Tensor) -> Tensor:
    """What an attention adds to its scores, of the bias of all heads of the whole model: (1 or batch, its heads, seq, keys)."""
    return bias[:, list(cast(Any, module).own_heads)] if isinstance(module, _OwnColumns) else bias


def is_skipped(module: nn.Module | None) -> bool:
    """Whether a module stands for one that is gone."""
    return isinstance(module, (Skipped, _BiasAlone))


# -- Attentions that share a bias ----------------------------------------------------------------------------------------------


class _Sharing:
    """Goes before the class of an attention of transformers; the bias that it returns is that of the whole stack."""

    def whole_bias(self, hidden_states: Tensor, mask: Tensor | None, given: Tensor | None, cache: Any) -> Tensor:
        """The bias as another layer computed it, or from the table here: (1, heads of the whole model, seq, keys)."""
        own = cast(Any, self)
        if given is not None or not own.has_relative_attention_bias:
            return no_bias(hidden_states) if given is None else given
        length, said = hidden_states.shape[1], 0 if cache is None else cache.get_seq_length(own.layer_idx)
        said = said.clone() if isinstance(said, Tensor) else said  # a static cache counts in place
        keys = length + said if mask is None else mask.shape[-1]
        return cast(Tensor, own.compute_bias(length, keys, device=hidden_states.device, past_seen_tokens=said))


class _OwnPart(_Sharing):
    own_heads: tuple[int, ...]

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if key_value_states is None:
            whole = self.whole_bias(hidden_states, mask, position_bias, _cache(kwargs))
            part = whole[:, list(self.own_heads)] if whole.shape[1] > 1 else whole
        else:  # there is none between two texts, and what transformers hands on has as many zeros as the first layer has heads
            whole = part = no_bias(hidden_states)
        output, _, weights = super().forward(  # type: ignore[misc]
            hidden_states, mask=mask, key_value_states=key_value_states, position_bias=part, **kwargs
        )
        return output, whole, weights


class _OwnColumns(_Sharing):
    """Of an attention that is handed the bias of the whole stack, whose table lies beside the layers."""

    own_heads: tuple[int, ...]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        part = None if position_bias is None else own_part(cast(nn.Module, self), position_bias)
        return super().forward(hidden_states, attention_mask, part, *args, **kwargs)  # type: ignore[misc]


class _BiasAlone(_Sharing):
    skip: Skip

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, None]:
        if key_value_states is not None:
            return hidden_states.new_zeros(()), no_bias(hidden_states), None
        whole = self.whole_bias(hidden_states, mask, position_bias, _cache(kwargs))
        if self.skip.counts:
            _count(_cache(kwargs), hidden_states, cast(Any, self).layer_idx)
        return hidden_states.new_zeros(()), whole, None


def no_bias(hidden_states: Tensor) -> Tensor:
    """A zero that can be added to any scores."""
    return hidden_states.new_zeros(1, 1, 1, 1)


_classes: dict[tuple[type, type], type] = {}


def _become(module: nn.Module, first: type) -> None:
    """Puts `first` before the class of transformers that a module is of."""
    base = next(cls for cls in type(module).__mro__ if not issubclass(cls, _Sharing))
    key = first, base
    if key not in _classes:
        _classes[key] = type(base.__name__, key, {"__module__": base.__module__, "__doc__": base.__doc__})
    module.__class__ = _classes[key]


# -- The cache of keys and values ----------------------------------------------------------------------------------------------


def _cache(kwargs: dict[str, Any]) -> Any:
    """The cache under its name, or the one that it had before transformers 5.20 or so."""
    return kwargs.get("cache", kwargs.get("past_key_values"))


def _count(cache: Any, hidden_states: Tensor, layer: int | None) -> None:
    """Notes in the cache that these tokens have passed a layer: one zero for each, in place of keys and values."""
    if cache is not None:
        zeros = torch.zeros(
            (hidden_states.shape[0], 1, hidden_states.shape[1], 1), dtype=hidden_states.dtype, device=hidden_states.device
        )
        getattr(cache, "self_attention_cache", cache).update(zeros, zeros, layer)
