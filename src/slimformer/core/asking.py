"""Attentions of transformers that compute by themselves ask its attention functions while a context lasts, as all others do.

Only so can scores be seen, a softmax be replaced, and an exporter leave a marker. No hook stays on the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from slimformer.core.passing import go_before, step_back
from slimformer.core.standing import own_part

BY_THEMSELVES = ("MPNetSelfAttention",)  # their classes


class _Asking:
    """Goes before the class of an attention with queries, keys, values and a bias for positions, which all its stack shares."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor | None]:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        own = cast(Any, self)
        shape = hidden_states.shape[:-1]
        states = (part(hidden_states) for part in (own.q, own.k, own.v))
        heads = (item.view(*shape, -1, own.attention_head_size).transpose(1, 2) for item in states)
        mixed, weights = ALL_ATTENTION_FUNCTIONS[own.asked](
            own,
            *heads,  # (batch, heads, seq, size of a head) each
            attention_mask,
            dropout=own.dropout.p if own.training else 0.0,
            scaling=own.attention_head_size**-0.5,
            position_bias=None if position_bias is None else own_part(own, position_bias),
        )
        return own.o(mixed.reshape(*shape, -1)), weights


@contextmanager
def asking_functions(model: nn.Module, name: str) -> Iterator[None]:
    """While it lasts all attentions of a model ask the function that transformers knows by this name."""
    touched: list[tuple[Any, str | None]] = []
    for module in model.modules():
        if type(module).__name__ in BY_THEMSELVES:
            touched.append((module, getattr(module, "asked", None)))
            cast(Any, module).asked = name
            go_before(module, _Asking)
    try:
        yield
    finally:
        for module, before in touched:
            if before is None:
                step_back(module, _Asking, "asked")
            else:
                module.asked = before
