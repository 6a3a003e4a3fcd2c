"""Whole layers, which several methods count and drop: those that are left, the plan without some, and how many each stack keeps."""

from __future__ import annotations

from collections.abc import Sequence

from slimformer.core.anatomy import Anatomy, Kind
from slimformer.core.plan import Plan


def layers_of(anatomy: Anatomy) -> list[list[int]]:
    """Of each stack the layers of which anything is left; a stack without any is left out."""
    alive = sorted({site.layer for site in anatomy.of_kind(Kind.SUBLAYER)})
    stacks = [[layer for layer in alive if anatomy.stack_of(layer) is stack] for stack in anatomy.stacks]
    return [layers for layers in stacks if layers]


def leaving(anatomy: Anatomy, stay: Sequence[int]) -> Plan:
    """The plan that takes all layers but these, whole."""
    return Plan({site.id: () for site in anatomy.of_kind(Kind.SUBLAYER) if site.layer not in stay})


def depths(whole: Sequence[int], *, decoder_first: bool) -> list[list[int]]:
    """The layers of each stack from all of them down to one each: in step with one another, or the last stack first.

    >>> depths([6, 3], decoder_first=False)
    [[6, 3], [5, 2], [4, 2], [3, 2], [2, 1], [1, 1]]
    >>> depths([2, 3], decoder_first=True)
    [[2, 3], [2, 2], [2, 1], [1, 1]]
    """
    most = max(whole, default=0)
    if not decoder_first or len(whole) < 2:
        return [[max(1, round(count * layers / most)) for layers in whole] for count in range(most, 0, -1)]
    *before, last = whole
    return [[*before, count] for count in range(last, 0, -1)] + [[*left, 1] for left in depths(before, decoder_first=False)[1:]]
