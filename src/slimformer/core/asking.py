"""Attentions of transformers that compute by themselves ask its attention functions while a context lasts, as all others do.

Only so can scores be seen, a softmax be replaced, and an exporter leave a marker. No hook stays on the model.

Some also multiply the vectors of positions with the matrices of words. In the contexts here no hook on these hears of that: hooks hear
each matrix once in a pass, with words.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimformer.core.passing import go_before, step_back
from slimformer.core.standing import own_part


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


class _Disentangled:
    """Goes before the class of a DeBERTa's attention, whose scores have terms for distances; `asked` may be None: it then asks none."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        own = cast(Any, self)
        if own.asked is None or query_states is not None:
            return super().forward(  # type: ignore[misc,no-any-return]
                hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
            )
        shape = hidden_states.shape[:-1]
        states = (part(hidden_states) for part in (own.query_proj, own.key_proj, own.value_proj))
        query, key, value = (item.view(*shape, -1, own.attention_head_size).transpose(1, 2) for item in states)
        lost = torch.zeros(attention_mask.shape, dtype=query.dtype, device=query.device)
        mixed, weights = ALL_ATTENTION_FUNCTIONS[own.asked](
            own,
            *(query, key, value),  # (batch, heads, seq, size of a head) each
            lost.masked_fill(~attention_mask.bool(), torch.finfo(query.dtype).min),  # (batch, 1, seq, seq)
            dropout=own.dropout.p if own.training else 0.0,
            scaling=score_scale(own),
            position_bias=_distance_scores(own, query, key, relative_pos, rel_embeddings),
        )
        return mixed.reshape(*shape, -1), weights

    def disentangled_attention_bias(
        self, query_layer: Tensor, key_layer: Tensor, relative_pos: Tensor, rel_embeddings: Tensor, scale_factor: int
    ) -> Tensor:
        heads = cast(Any, self).num_attention_heads
        query, key = (
            item.unflatten(0, (-1, heads)) for item in (query_layer, key_layer)
        )  # (batch, heads, seq, size of a head)
        return _distance_scores(self, query, key, relative_pos, rel_embeddings).flatten(0, 1)


def score_scale(attention: Any) -> float:
    """What the products of queries and keys are multiplied by: they are as many as there are terms, and one."""
    return float((attention.attention_head_size * (1 + len(set(attention.pos_att_type)))) ** -0.5)


def distance_vectors(attention: Any, table: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The keys of distances and the queries of distances, of which an attention may have one kind: (heads, rows, size of a head) each.

    `table`: the vector of each row, (rows, hidden), normed if the model says so.
    """
    asked, asking = ("key_proj", "query_proj") if attention.share_att_key else ("pos_key_proj", "pos_query_proj")

    def heads(kind: str, name: str) -> Tensor | None:
        if kind not in attention.pos_att_type:
            return None
        rows = _unheard(getattr(attention, name), table[None])[0]
        return rows.view(len(table), -1, attention.attention_head_size).transpose(0, 1)

    return heads("c2p", asked), heads("p2c", asking)


def _unheard(linear: nn.Module, values: Tensor) -> Tensor:
    """What a Linear, or a matrix in another form, gives; no hook on it or in it hears of that."""
    inside = [(module, module._forward_pre_hooks, module._forward_hooks) for module in linear.modules()]
    try:
        for module, _, _ in inside:
            module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
        return cast(Tensor, linear(values))
    finally:
        for module, before, after in inside:
            module._forward_pre_hooks, module._forward_hooks = before, after


def _distance_scores(own: Any, query: Tensor, key: Tensor, relative_pos: Tensor | None, table: Tensor | None) -> Tensor:
    """The terms of the scores for distances, as DisentangledSelfAttention computes them: (batch, heads, seq, seq).

    Up to half of `position_buckets` each distance has a row of its own, so that a text needs two rows for each word.
    """
    assert relative_pos is not None, "the stack hands it to its attentions"
    assert table is not None, "the stack hands it to its attentions"
    seq, span = query.shape[2], own.pos_ebd_size
    near = own.position_buckets <= 0 or seq <= own.position_buckets // 2
    reach = min(seq, span) if near else span
    keys, queries = distance_vectors(own, own.pos_dropout(table)[span - reach : span + reach])
    rows = (relative_pos.view(seq, seq) + span).clamp(0, 2 * span - 1) - (span - reach)  # of query i and key j
    found = query.new_zeros(())
    if keys is not None:
        found = found + (query @ keys.transpose(1, 2)).gather(-1, rows.expand(*query.shape[:2], seq, seq))
    if queries is not None:
        asked = (key @ queries.transpose(1, 2)).gather(-1, rows.T.expand(*query.shape[:2], seq, seq))
        found = found + asked.transpose(2, 3)
    return found * score_scale(own)


def distance_rows(attention: Any) -> Tensor:
    """The row of the table for each distance from -n to n; those farther away have the rows at the ends: (2 n + 1,)."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    span, buckets, farthest = attention.pos_ebd_size, attention.position_buckets, attention.max_relative_positions
    reach = farthest + 1
    while True:
        distances = torch.arange(-reach, reach + 1)
        if buckets > 0:
            distances = make_log_bucket_position(distances, buckets, farthest).long()
        rows = (distances + span).clamp(0, 2 * span - 1)
        if rows[0] == 0 and rows[-1] == 2 * span - 1:
            return rows
        reach *= 2


_BEFORE: dict[str, type] = {"MPNetSelfAttention": _Asking, "DisentangledSelfAttention": _Disentangled}  # by their classes


@contextmanager
def asking_functions(model: nn.Module, name: str) -> Iterator[None]:
    """While it lasts all attentions of a model ask the function that transformers knows by this name."""
    with _stepping_before(model, _BEFORE, name):
        yield


@contextmanager
def positions_unheard(model: nn.Module) -> Iterator[None]:
    """While it lasts no hook on a matrix hears of positions that pass through it."""
    with _stepping_before(model, {name: first for name, first in _BEFORE.items() if first is _Disentangled}, None):
        yield


@contextmanager
def _stepping_before(model: nn.Module, classes: Mapping[str, type], asked: str | None) -> Iterator[None]:
    """Lets attentions of these classes ask a function, or, if None, whichever they asked before."""
    touched: list[tuple[Any, type, dict[str, Any]]] = []
    for module in model.modules():
        first = classes.get(type(module).__name__)
        if first is not None:
            before = {key: value for key, value in vars(module).items() if key == "asked"}
            touched.append((module, first, before))
            cast(Any, module).asked = asked or before.get("asked")
            go_before(module, first)
    try:
        yield
    finally:
        for module, first, before in touched:
            if before:
                module.asked = before["asked"]
            else:
                step_back(module, first, "asked")
