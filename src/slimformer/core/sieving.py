"""Models that take words out on their way: what a sieve keeps, and layers that compute with the words that are left.

A sieve looks at the attention of its layer: how much of it each word gets from the words that are there, on average over the heads. In
PyTorch nothing gets shorter. A word that left keeps the vector that it had before the layer, and no later word attends to it, which gives
the same numbers for those that stay as if it were gone; exported files gather the words that stay (`exporters/_onnx/sieves.py`). Layers
compute so by a class that goes before their own, and no hook stays on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from slimformer.core.anatomy import Anatomy, Role, heads_of
from slimformer.core.junction import SHARE_PARTS, Sieve
from slimformer.core.passing import Line, go_before, step_back, unpadded_words

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Passing = Callable[
    [Tensor, Tensor], Tensor
]  # attention received and words that are there, both (batch, seq) -> those that stay
LEAST = 1e-12  # what a word counts that counts for nothing: its logarithm is finite
ROUNDING = 1e-6  # of a mean share of words
FIRST = 1e9  # more attention than a word can get: that of the first one, which always stays


# -- The decision ----------------------------------------------------------------------------------------------------------------


def surviving(sieve: Sieve, received: Tensor, there: Tensor) -> Tensor:
    """The words that stay: (batch, seq) of booleans.

    `received`: times the average attention that each word gets; `there`: the words that came so far: both (batch, seq). Of words that get
    as much, the first ones stay.

    >>> received = torch.tensor([[0.1, 0.9, 2.0, 1.0]])
    >>> surviving(Sieve(0.5), received, torch.ones(1, 4, dtype=torch.bool))
    tensor([[ True, False,  True, False]])
    >>> surviving(Sieve(0.5, threshold=0.95), received, torch.ones(1, 4, dtype=torch.bool))
    tensor([[ True, False,  True,  True]])
    """
    first = torch.arange(received.shape[1], device=received.device) == 0
    if sieve.threshold is not None:
        return there & (first | (received >= sieve.threshold))
    rank = ranked(received, there)
    words = there.sum(1, keepdim=True)
    kept = ((words * sieve.parts + SHARE_PARTS - 1) // SHARE_PARTS).clamp(min=1)
    return there & (rank < kept)


def share_threshold(share: float, received: Tensor, there: Tensor) -> Tensor:
    """The lowest threshold with which texts keep at most this share of their words, on average: a scalar, from 0.

    It lies halfway between the attention of the last word that stays and the first one that leaves. `received` and `there`: as in
    `surviving`.

    >>> received, there = torch.tensor([[1.0, 0.4, 2.0, 0.8], [1.0, 1.2, 0.9, 0.0]]), torch.tensor([[True] * 4, [True] * 3 + [False]])
    >>> round(float(share_threshold(0.6, received, there)), 3)  # of four words 1/2 stay, of three 2/3
    1.05
    """
    counts = there.sum(1, keepdim=True)
    values = torch.cat([torch.full_like(received[:, :1], FIRST), received[:, 1:]], 1).masked_fill(~there, -1.0).flatten()
    weights = (there.double() / counts / len(there)).flatten()
    values, order = values.sort(descending=True, stable=True)
    kept = (weights[order].cumsum(0) <= share + ROUNDING).sum().clamp(min=len(there))
    kept = torch.minimum(kept, there.sum())
    last, first = torch.cat([values, values.new_full((1,), -1.0)])[torch.stack([kept - 1, kept])]
    last = torch.minimum(last, 2 * first.clamp(min=0) + 1)  # if nothing but the first word of each text stays
    between = (last + first) / 2
    return torch.where(last > first, between, torch.nextafter(last, last + 1)).clamp(min=0)


def ranked(received: Tensor, there: Tensor) -> Tensor:
    """Each word's place by the attention that it gets, from 0; the first word is at 0, those that are gone come last: (batch, seq)."""
    worth = received.masked_fill(~there, -1.0)
    worth = torch.cat([torch.full_like(worth[:, :1], FIRST), worth[:, 1:]], 1)
    return worth.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def closeness(sieve: Sieve, received: Tensor, there: Tensor) -> Tensor:
    """How much attention would have to change before another word stays: (batch,). Infinite if all words stay."""
    stays = surviving(sieve, received, there)
    movable = there.clone()
    movable[:, 0] = False
    if sieve.threshold is not None:
        return (received - sieve.threshold).abs().masked_fill(~movable, torch.inf).amin(1)
    lowest = received.masked_fill(~(movable & stays), torch.inf).amin(1)
    highest = received.masked_fill(~(movable & ~stays), -torch.inf).amax(1)
    return lowest - highest


def attention_received(query: Tensor, key: Tensor, size: int, mask: Tensor | None, weights: Tensor) -> Tensor:
    """How many times the average attention each word gets from the others, on average over the heads: (batch, seq).

    `query` and `key`: (batch, seq, heads * size); `mask`: the summand of the scores, or None; `weights`: (batch, seq), how much each word
    counts that asks.
    """
    batch, seq, width = query.shape
    query, key = (states.view(batch, seq, width // size, size).transpose(1, 2).float() for states in (query, key))
    scores = query @ key.transpose(2, 3) * size**-0.5  # (batch, heads, seq, seq)
    shares = (scores if mask is None else scores + mask.float()).softmax(-1).mean(1)  # (batch, seq, seq)
    return (weights[:, None].float() @ shares)[:, 0]


# -- Layers ----------------------------------------------------------------------------------------------------------------------


class _Line(Line):
    """Carries from layer to layer which words are there."""

    off: bool = False  # all words stay, while `all_words` lasts
    follows: bool = False  # thresholds follow attention, while `keeping_shares` lasts
    there: Tensor | None = None  # (batch, seq)
    looks: tuple[tuple[Sieve, Tensor, Tensor], ...] = ()  # of each sieve: the attention received, and the words that came
    shares: tuple[Tensor, ...] = ()
    words: tuple[Tensor, ...] = ()  # of each layer from the first sieve on: the words that are there behind it


@dataclass(frozen=True)
class _Asking:
    """Where a layer's queries and keys come from: modules within it, and the size of a head."""

    query: str
    key: str
    size: int


class _Sifted:
    """Goes before the class of a layer: it attends to the words that are left, and takes words out if it has a rule."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        own = cast(Any, self)
        line: _Line = own.sieve_line
        if line.off:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        if own.sieve_first:
            line.there, line.looks, line.shares, line.words = unpadded_words(attention_mask, hidden_states), (), (), ()
        there = line.there
        assert there is not None, "the first of these layers has noted the words"
        mask = _narrowed(attention_mask, there, hidden_states.dtype)
        output = super().forward(hidden_states, mask, *args, **kwargs)  # type: ignore[misc]
        if own.sieve_rule is not None:
            asking: _Asking = own.sieve_asking
            query, key = (own.get_submodule(name)(hidden_states) for name in (asking.query, asking.key))
            weights = there if there.is_floating_point() else there.float()
            received = attention_received(query, key, asking.size, mask, weights)
            rule: Passing = own.sieve_rule
            stays = rule.following(received, there) if line.follows and isinstance(rule, _Keeping) else rule(received, there)
            if isinstance(rule, _Keeping):
                line.looks += ((rule.sieve, received.detach(), there),)
            line.shares += (stays.detach().float().sum(1) / weights.detach().sum(1),)
            line.there = there = stays
        line.words += (there,)
        if there.is_floating_point():
            return output
        hidden = output if isinstance(output, Tensor) else output[0]
        hidden = torch.where(there[..., None], hidden, hidden_states)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


@dataclass(frozen=True)
class _Keeping:
    """The rule of a sieve: words stay or leave."""

    sieve: Sieve

    def __call__(self, received: Tensor, there: Tensor) -> Tensor:
        return surviving(self.sieve, received.detach(), there)

    def following(self, received: Tensor, there: Tensor) -> Tensor:
        """The words that stay if the threshold is the one that keeps the sieve's share of this batch."""
        if self.sieve.threshold is None:
            return self(received, there)
        first = torch.arange(received.shape[1], device=received.device) == 0
        return there & (first | (received >= share_threshold(self.sieve.share, received.detach(), there)))


def _narrowed(mask: Tensor | None, there: Tensor, dtype: torch.dtype) -> Tensor:
    """The summand of the scores for words that are left, or that count as much as `there` says: (batch, 1, 1 or seq, seq)."""
    lowest = torch.finfo(dtype).min
    if mask is None:
        summand = there.new_zeros((len(there), 1, 1, there.shape[1]), dtype=dtype)
    elif mask.dtype == torch.bool:
        summand = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, lowest)
    else:
        summand = mask
    if there.dtype == torch.bool:
        return summand.masked_fill(~there[:, None, None], lowest)
    return (summand + there.clamp(min=LEAST).log().to(dtype)[:, None, None]).clamp(min=lowest)


def put_sieves(model: PreTrainedModel, anatomy: Anatomy, sieves: Mapping[str, Sieve]) -> None:
    """Puts sieves into layers; `sieves`: all that the model is to have, by the ids of layers."""
    _put(model, anatomy, {layer: _Keeping(sieve) for layer, sieve in sieves.items()})


def _put(model: nn.Module, anatomy: Anatomy, rules: Mapping[str, Passing]) -> list[nn.Module]:
    line, begun, touched = _Line(), False, []
    for layer, name in anatomy.layer_modules.items():
        if not begun and layer not in rules:
            continue
        module: Any = model.get_submodule(name)
        module.sieve_line, module.sieve_first, module.sieve_rule = line, not begun, rules.get(layer)
        module.sieve_asking = _asking(anatomy, layer) if layer in rules else None
        go_before(module, _Sifted)
        begun = True
        touched.append(module)
    return touched


def _asking(anatomy: Anatomy, layer: str) -> _Asking:
    """Where the queries and keys of a layer's attention come from."""
    heads = anatomy.sites[heads_of(layer)]
    inside = f"{anatomy.layer_modules[layer]}."
    found = {matrix.role: matrix.module for matrix in anatomy.matrices.values() if matrix.sublayer == heads.sublayer}
    query, key = (found[role].removeprefix(inside) for role in (Role.QUERY, Role.KEY))
    return _Asking(query, key, heads.taps[0].unit)


def sieve_of(module: nn.Module) -> Sieve | None:
    """The sieve of a layer."""
    rule = getattr(module, "sieve_rule", None) if isinstance(module, _Sifted) else None
    return rule.sieve if isinstance(rule, _Keeping) else None


@contextmanager
def sifting(model: nn.Module, anatomy: Anatomy, rules: Mapping[str, Passing]) -> Iterator[None]:
    """Lets the words of a model without sieves pass these rules while the context lasts.

    A rule may give numbers from 0 to 1 instead of booleans: a word then counts that much in each later softmax, and keeps its vector. It
    gets such numbers too, for the words that came so far.
    """
    touched = _put(model, anatomy, rules)
    try:
        yield
    finally:
        for module in touched:
            step_back(module, _Sifted, "sieve_line", "sieve_first", "sieve_rule", "sieve_asking")


def all_words(model: nn.Module) -> AbstractContextManager[None]:
    """While it lasts no word leaves the model."""
    return _line_set(model, "off")


def keeping_shares(model: nn.Module) -> AbstractContextManager[None]:
    """While it lasts each sieve with a threshold lets its share of each batch's words pass, whatever their attention has become."""
    return _line_set(model, "follows")


@contextmanager
def _line_set(model: nn.Module, switch: str) -> Iterator[None]:
    """Switches something on for all sieves of a model, if it has any."""
    line = _line_of(model)
    if line is None:
        yield
        return
    before = getattr(line, switch)
    setattr(line, switch, True)
    try:
        yield
    finally:
        setattr(line, switch, before)


def latest_looks(model: nn.Module) -> Sequence[tuple[Tensor, Tensor]]:
    """For each sieve the attention that words received in the latest pass, and those that were there: (batch, seq) both."""
    line = _line_of(model)
    return () if line is None else tuple((received, there) for _, received, there in line.looks)


def latest_margins(model: nn.Module) -> Sequence[Tensor]:
    """For each sieve how close it was to another choice in the latest pass: (batch,) each."""
    line = _line_of(model)
    return () if line is None else tuple(closeness(*look) for look in line.looks)


def latest_shares(model: nn.Module) -> Sequence[Tensor]:
    """For each sieve the share of words that it let pass in the latest pass: (batch,) each."""
    line = _line_of(model)
    return () if line is None else line.shares


def latest_words(model: nn.Module, anatomy: Anatomy) -> dict[int, Tensor]:
    """Behind which layers, by their places, words were gone in the latest pass, and those that were there: (batch, seq) of booleans.

    Empty if words only counted less, or if there are no sieves.
    """
    line = _line_of(model)
    layers = [place for place, name in enumerate(anatomy.layers) if isinstance(model.get_submodule(name), _Sifted)]
    if line is None or len(line.words) != len(layers):
        return {}
    return {place: words for place, words in zip(layers, line.words, strict=True) if words.dtype == torch.bool}


def _line_of(model: nn.Module) -> _Line | None:
    return next((cast(Any, module).sieve_line for module in model.modules() if isinstance(module, _Sifted)), None)
