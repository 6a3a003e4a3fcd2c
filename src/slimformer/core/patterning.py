"""Attentions some of whose heads attend by position, or no further than a span: what such heads give, and who computes it.

A head with a fixed pattern is a shift or a weighted running sum of its values, along the words: no scores, no product of all words with
all others. Spans narrow the mask that transformers hands to an attention. Both are done by a class that goes before the attention's own,
so that no hook stays on the model. Nothing here changes a shape.

Positions are those of the words that the model reads, [CLS] and [SEP] among them, as the heads of a trained model count them; padding on
either side does not count.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Role
from slimformer.core.passing import go_before, step_back, unpadded_words
from slimformer.core.pattern import Attends, Fixed, HeadPattern, HeadSpan, Patterns, asking, over
from slimformer.errors import PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Encoders whose attention takes the hidden states and a mask, and has a size of heads, a scaling and a dropout.
PATTERNED_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")
Marking = Callable[[Tensor, Attends, Tensor], Tensor]  # values, pattern, mask as it came -> what the heads give
_ATTRIBUTES = ("pattern_rules", "pattern_asking", "pattern_inputs", "pattern_out", "pattern_narrowing")


# -- What heads give -----------------------------------------------------------------------------------------------------------


def attend_fixed(values: Tensor, attends: Attends, there: Tensor) -> Tensor:
    """What heads with one fixed pattern give: (batch, seq, width), as `values`; `there`: (batch, seq), true for words.

    >>> values, there = torch.tensor([[[1.0], [2.0], [4.0]]]), torch.ones(1, 3, dtype=torch.bool)
    >>> attend_fixed(values, "previous", there).flatten().tolist()  # the first word has none, and attends to itself
    [1.0, 1.0, 2.0]
    """
    if attends == "current":
        return values
    if attends in ("previous", "next"):
        back = attends == "previous"
        return torch.where(_beside(there, back)[..., None], _beside(values, back), values)
    weights = place_weights(there, from_start=attends in ("left", "end"))[..., None]  # (batch, seq, 1)
    weighted = values.float() * weights
    if attends in ("start", "end"):
        sums = weighted.sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=_LEAST)
        return sums.to(values.dtype).expand_as(values)
    back = attends == "left"
    sums, total = _two_away(weighted, back), _two_away(weights, back)
    return torch.where(total > 0, (sums / total.clamp(min=_LEAST)).to(values.dtype), values)


def place_weights(there: Tensor, *, from_start: bool) -> Tensor:
    """The cube of each word's place over their number, counted from the start of its text or from the end; 0 for padding: (batch, seq).

    >>> place_weights(torch.tensor([[True, True, False]]), from_start=False)
    tensor([[1.0000, 0.1250, 0.0000]])
    """
    real = there.float()
    rank, count = real.cumsum(1), real.sum(1, keepdim=True).clamp(min=1)
    place = rank if from_start else count + 1 - rank
    return (place / count) ** 3 * real


FAR = -1_000.0  # what is added to the scores of words beyond a span: exp() of it is 0, and padding still counts less
_LEAST = 1e-30  # a sum of weights that is not 0 is far above


def _beside(values: Tensor, back: bool) -> Tensor:
    """At each place what stands at the one before, or behind it; at the end of the sequence what stands there."""
    return torch.cat([values[:, :1], values[:, :-1]] if back else [values[:, 1:], values[:, -1:]], 1)


def _two_away(values: Tensor, back: bool) -> Tensor:
    """At each place the sum of all that stands two or more places before, or behind it: (batch, seq, width)."""
    if not back:
        return _two_away(values.flip(1), True).flip(1)
    return nn.functional.pad(values.cumsum(1), (0, 0, 2, 0))[:, : values.shape[1]]


def beyond_spans(patterns: Sequence[HeadPattern | None], seq: int, like: Tensor) -> Tensor:
    """What is added to the scores of each head with queries, by its span: (heads, seq, seq); `like` has the type and the device.

    A word of padding may have none within its span that is not padding too; it then attends to those beyond, in files as here.
    """
    limits = [pattern.reach if isinstance(pattern, HeadSpan) else seq for pattern in patterns if not isinstance(pattern, Fixed)]
    far = _distances(seq, like.device) > torch.tensor(limits, device=like.device)[:, None, None]
    return far.to(like.dtype) * FAR


def _distances(seq: int, device: torch.device) -> Tensor:
    places = torch.arange(seq, device=device)
    return (places[:, None] - places[None, :]).abs()


# -- Attentions ----------------------------------------------------------------------------------------------------------------


class _Marked(threading.local):
    """What an exporter that traces a model has in the place of `attend_fixed`, in this thread."""

    mark: Marking | None = None


_marked = _Marked()
BEYOND = "beyond"  # under this name an exporter that traces the model gets `beyond_spans`: (1, heads, seq, seq)


class _Patterned:
    """Goes before the class of an attention: heads with fixed patterns are computed from their values, and spans narrow its mask."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        own = cast(Any, self)
        rules: Patterns = own.pattern_rules
        mask, kwargs = _narrowed(own, attention_mask, hidden_states, kwargs)
        if all(not isinstance(rule, Fixed) for rule in rules):
            return super().forward(hidden_states, mask, *args, **kwargs)  # type: ignore[misc]
        query, key, value = (own.get_submodule(name)(hidden_states) for name in own.pattern_inputs)
        mixed, weights = _attend_learned(own, query, key, value, mask, kwargs)
        parts = []
        place = 0  # among the heads that learned whom to attend to
        size = own.attention_head_size
        for rule, heads in _runs(rules):
            if isinstance(rule, Fixed):
                parts.append(_fixed(value[..., heads.start * size : heads.stop * size], rule.attends, attention_mask))
            else:
                parts.append(mixed[..., place * size : (place + len(heads)) * size])
                place += len(heads)
        joined = torch.cat(parts, -1)
        return (joined if own.pattern_out is None else own.get_submodule(own.pattern_out)(joined)), weights


def _attend_learned(
    own: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
) -> tuple[Tensor, Any]:
    """What the heads without a fixed pattern give, one beside the other, as transformers computes attention; and their weights."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    learned, size, shape = asking(own.pattern_rules), own.attention_head_size, query.shape[:-1]
    places = {head: place for place, head in enumerate(own.pattern_asking)}
    asked = tuple(places[head] for head in learned)
    states = (_of_heads(query, asked, size), _of_heads(key, asked, size), _of_heads(value, learned, size))
    eager = sys.modules[type(own).__module__].eager_attention_forward
    compute = ALL_ATTENTION_FUNCTIONS.get_interface(own.config._attn_implementation, eager)
    rest = {name: item for name, item in kwargs.items() if name not in ("cache", "past_key_values")}
    split = (item.view(*shape, -1, size).transpose(1, 2) for item in states)  # (batch, heads, seq, size)
    mixed, weights = compute(own, *split, mask, dropout=own.dropout.p if own.training else 0.0, scaling=own.scaling, **rest)
    return mixed.reshape(*shape, -1), weights


def _of_heads(states: Tensor, heads: Sequence[int], size: int) -> Tensor:
    """The columns of some heads, rising: (., ., heads * size)."""
    if len(heads) * size == states.shape[-1]:
        return states
    runs = [[head for _, head in run] for _, run in groupby(enumerate(heads), lambda pair: pair[1] - pair[0])]
    parts = [states[..., run[0] * size : (run[-1] + 1) * size] for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _runs(rules: Patterns) -> Iterator[tuple[HeadPattern | None, range]]:
    """Neighbouring heads that are computed together: of one fixed pattern, or of none."""
    begin = 0
    for rule, run in groupby(rules, lambda rule: rule if isinstance(rule, Fixed) else None):
        end = begin + len(list(run))
        yield rule, range(begin, end)
        begin = end


def _fixed(values: Tensor, attends: Attends, mask: Tensor | None) -> Tensor:
    if attends == "current":
        return values
    if _marked.mark is not None:
        assert mask is not None, "a traced model has a mask"
        return _marked.mark(values, attends, mask)
    return attend_fixed(values, attends, unpadded_words(mask, values))


def _narrowed(own: Any, mask: Tensor | None, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
    """The mask with what lies beyond the spans of heads; in a trace the mask as it came, and the rest beside it."""
    rules: Patterns = own.pattern_rules
    if own.pattern_narrowing is None and not any(isinstance(rule, HeadSpan) for rule in rules):
        return mask, kwargs
    if _marked.mark is not None:
        assert mask is not None, "a traced model has a mask"
        return mask, kwargs | {BEYOND: beyond_spans(rules, mask.shape[1], hidden)[None]}
    seq, lowest = hidden.shape[1], torch.finfo(hidden.dtype).min
    if own.pattern_narrowing is not None:
        summand = own.pattern_narrowing(_distances(seq, hidden.device))[None].to(hidden.dtype)  # (1, heads, seq, seq)
    else:
        summand = beyond_spans(rules, seq, hidden)[None]
    if mask is None:
        return summand, kwargs
    if mask.dtype == torch.bool:
        return summand.masked_fill(~mask, lowest), kwargs
    return (summand + mask).clamp(min=lowest), kwargs


# -- Models --------------------------------------------------------------------------------------------------------------------


def put_patterns(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Lets the heads of a model attend as its anatomy says; those that need no queries and keys have none."""
    for module in model.modules():
        step_back(module, _Patterned, *_ATTRIBUTES)
    for site, rules in anatomy.patterns.items():
        _put(model, anatomy, site, rules, asking(rules))


@contextmanager
def attending_by(
    model: PreTrainedModel,
    anatomy: Anatomy,
    patterns: Mapping[str, Patterns],
    narrowing: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> Iterator[None]:
    """Lets heads attend by these patterns too while the context lasts; queries and keys that are then not needed stay.

    `narrowing`: site -> a function from distances, (seq, seq), to what is added to
    the scores of the heads that have some, (heads, seq, seq): spans that are being learned.
    """
    touched: list[tuple[Any, dict[str, Any] | None]] = []  # an attention, and what it had before if it had patterns
    for site in sorted({*patterns, *(narrowing or {})}):
        module: Any = model.get_submodule(anatomy.attentions[site])
        had = {name: getattr(module, name) for name in _ATTRIBUTES} if isinstance(module, _Patterned) else None
        touched.append((module, had))
        own = anatomy.patterns.get(site, (None,) * anatomy.sites[site].size)
        _put(model, anatomy, site, over(own, patterns.get(site, (None,) * len(own))), asking(own))
        module.pattern_narrowing = (narrowing or {}).get(site)
    try:
        yield
    finally:
        for module, had in reversed(touched):
            if had is None:
                step_back(module, _Patterned, *_ATTRIBUTES)
            else:
                vars(module).update(had)


def _put(model: PreTrainedModel, anatomy: Anatomy, site: str, rules: Patterns, asks: tuple[int, ...]) -> None:
    check_kind(model)
    path = anatomy.attentions[site]
    module: Any = model.get_submodule(path)
    inside = {
        matrix.role: matrix.module for matrix in anatomy.matrices.values() if matrix.sublayer == anatomy.sites[site].sublayer
    }
    named = [inside[role].removeprefix(f"{path}.") for role in (Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUT)]
    module.pattern_rules, module.pattern_asking, module.pattern_inputs = rules, asks, tuple(named[:3])
    module.pattern_out = None if named[3] == inside[Role.ATTENTION_OUT] else named[3]
    module.pattern_narrowing = None
    go_before(module, _Patterned)


def check_kind(model: PreTrainedModel) -> None:
    """PlanError if the heads of a model of this type cannot have patterns."""
    if model.config.model_type not in PATTERNED_TYPES:
        raise PlanError(
            f"the heads of a {model.config.model_type} cannot attend by patterns.",
            help=f"take a model of one of these types: {', '.join(PATTERNED_TYPES)}.",
        )


def patterns_of(module: nn.Module) -> Patterns:
    """The patterns of an attention's heads; empty if none has any."""
    rules: Patterns = cast(Any, module).pattern_rules if isinstance(module, _Patterned) else ()
    return rules if any(rules) else ()


@contextmanager
def fixed_marked(mark: Marking) -> Iterator[None]:
    """While it lasts, in this thread, heads with fixed patterns give what `mark` does: (values, pattern, mask as it came)."""
    _marked.mark = mark
    try:
        yield
    finally:
        _marked.mark = None
