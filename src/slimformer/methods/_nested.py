"""Models within a model: the first units of every site, and layers spaced evenly."""

from __future__ import annotations

from collections.abc import Sequence

from slimformer.core.anatomy import Anatomy, Kind, Site
from slimformer.core.plan import Plan
from slimformer.methods._depth import layers_of, leaving
from slimformer.methods.layers import evenly


def leading_count(site: Site, width: float, neuron_multiple: int) -> int:
    """How many units of a site the share `width` is: at least one head, and neurons in multiples, if there are as many.

    >>> leading_count(Site("encoder.0.heads", Kind.HEADS, 12, 0), 0.25, 16)
    3
    >>> leading_count(Site("encoder.0.neurons", Kind.NEURONS, 1000, 0), 0.5, 16)
    496
    """
    step = 1 if site.kind is Kind.HEADS or width == 1 else neuron_multiple
    return min(site.size, max(1, round(width * site.size / step)) * step)


def even_layers(anatomy: Anatomy, depth: float) -> list[int]:
    """The layers that stay if the share `depth` of those of each stack does: spaced evenly, at least one."""
    stay: list[int] = []
    for layers in layers_of(anatomy):
        stay += [layers[place] for place in evenly(max(1, round(depth * len(layers))), len(layers))]
    return stay


def nested_plan(anatomy: Anatomy, sites: Sequence[Site], width: float, depth: float, neuron_multiple: int) -> Plan:
    """The plan that keeps the leading units of `sites` and evenly spaced layers."""
    stay = even_layers(anatomy, depth)
    narrow = {site.id: leading_count(site, width, neuron_multiple) for site in sites if site.layer in stay}
    kept = {name: tuple(range(count)) for name, count in narrow.items() if count < anatomy.sites[name].size}
    return Plan(kept | dict(leaving(anatomy, stay).keep))
