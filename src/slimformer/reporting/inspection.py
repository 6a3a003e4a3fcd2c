"""Counts what could be cut in a saved model: heads, neurons, parameters and multiply-accumulates of each layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slimformer.core import cost
from slimformer.core.anatomy import Kind, Site
from slimformer.core.pattern import Patterns
from slimformer.measuring.records import layer_names
from slimformer.saving import checkpoint
from slimformer.saving.hub import local_folder


@dataclass(frozen=True)
class InspectedLayer:
    """Units and cost of one layer; None if it has no such site, which is so if the sublayer is gone."""

    name: str
    heads: int | None
    neurons: int | None
    parameters: float
    macs: float


@dataclass(frozen=True)
class Inspection:
    """What `inspect` counts. `parameters` and `macs` are of the layers, for one example of `length` tokens; one with a decoder then
    writes as many, on `beams` (None: there is no decoder).

    `model_parameters` counts the whole model, `other_parameters` what no cut of heads or neurons can change.
    """

    name: str
    model_class: str
    length: int
    layers: tuple[InspectedLayer, ...]
    parameters: float
    other_parameters: float
    macs: float
    model_parameters: int
    sites_cut: int
    matrices_factored: int
    beams: int | None = None
    exits: tuple[int, ...] = ()  # inputs may leave after so many layers
    apart: int = 0  # in so many layers, the first ones, segments attend apart
    patterns: tuple[tuple[str, str], ...] = ()  # of each layer with such heads: its name, and what they attend to
    words: tuple[float, ...] = ()  # the share of words that each feed-forward computes; none if all do


def inspect(model: str | Path, length: int = 128) -> Inspection:
    """Counts what could be cut in a model.

    Args:
        model: A folder with config.json and model.safetensors, or an id on the hub ("owner/name", "owner/name@revision").
        length: The tokens of an example, for the multiply-accumulates; at least 1.

    Returns:
        Heads, neurons, parameters and multiply-accumulates of each layer, and their sums.

    Raises:
        ModelError: It is no model of a known family, or cannot be read.

    Example:
        >>> from slimformer import inspect
        >>> from slimformer.testing.tiny import tiny
        >>> tiny("bert").save_pretrained("plain")
        >>> [(layer.heads, layer.neurons) for layer in inspect("plain").layers]
        [(4, 24), (4, 24), (4, 24)]
    """
    from slimformer.families.base import subject_of

    folder = local_folder(model)
    loaded = checkpoint.load(folder)
    subject, plan = subject_of(loaded), checkpoint.load_plan(folder)
    anatomy = subject.anatomy
    parameters, macs = cost.parameters(loaded, anatomy), cost.macs(anatomy, np.array([length]), beams=subject.beams)

    def layer(number: int, name: str) -> InspectedLayer:
        sites = [site for site in anatomy.units if site.layer == number]
        return InspectedLayer(
            name=name,
            heads=_units(sites, Kind.HEADS),
            neurons=_units(sites, Kind.NEURONS),
            parameters=sum(float(parameters.curves[site.id][-1]) for site in sites),
            macs=sum(float(macs.curves[site.id][-1]) for site in sites),
        )

    return Inspection(
        name=folder.resolve().name if folder == Path(model) else str(model),
        model_class=type(loaded).__name__,
        length=length,
        layers=tuple(layer(number, name) for number, name in enumerate(layer_names(anatomy))),
        parameters=parameters.dense,
        other_parameters=parameters.fixed,
        macs=macs.dense,
        model_parameters=loaded.num_parameters(),
        sites_cut=len(plan.keep),
        matrices_factored=len(plan.forms),
        exits=tuple(anatomy.passed(anatomy.exits)[:-1]),
        words=tuple(left for _, left in anatomy.words_left) if anatomy.sieves else (),
        apart=next(iter(anatomy.passed(anatomy.meeting)[:-1]), 0),
        beams=subject.beams,
        patterns=tuple(
            (layer_names(anatomy)[anatomy.sites[name].layer], _told(rules)) for name, rules in anatomy.patterns.items()
        ),
    )


def _told(rules: Patterns) -> str:
    """How many heads have which pattern: "2 x previous, 1 x within 3"."""
    counts = Counter(str(rule) for rule in rules if rule is not None)
    return ", ".join(f"{count} x {rule}" for rule, count in sorted(counts.items()))


def _units(sites: Sequence[Site], kind: Kind) -> int | None:
    """The units of a kind in these sites; None if there is no such site."""
    sizes = [site.size for site in sites if site.kind is kind]
    return sum(sizes) if sizes else None
