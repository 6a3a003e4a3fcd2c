"""Counts what could be cut in a saved model: heads, neurons, parameters and multiply-accumulates of each layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slimformer.core import cost
from slimformer.core.anatomy import Kind, Site
from slimformer.saving import checkpoint


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
    """What `inspect` counts. `parameters` and `macs` are of the encoder, for one example of `length` tokens.

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


def inspect(folder: Path, length: int = 128) -> Inspection:
    """Counts what could be cut in the model of a folder. ModelError if it is no model of a known family."""
    from slimformer.families.base import anatomy_of

    model = checkpoint.load(folder)
    anatomy, plan = anatomy_of(model), checkpoint.load_plan(folder)
    parameters, macs = cost.parameters(model, anatomy), cost.macs(anatomy, np.array([length]))

    def layer(number: int) -> InspectedLayer:
        sites = {site.kind: site for site in anatomy.sites.values() if site.layer == number and site.kind is not Kind.SUBLAYER}
        return InspectedLayer(
            name=str(number),
            heads=_units(sites.get(Kind.HEADS)),
            neurons=_units(sites.get(Kind.NEURONS)),
            parameters=sum(float(parameters.curves[site.id][-1]) for site in sites.values()),
            macs=sum(float(macs.curves[site.id][-1]) for site in sites.values()),
        )

    return Inspection(
        name=folder.resolve().name,
        model_class=type(model).__name__,
        length=length,
        layers=tuple(map(layer, range(len(anatomy.layers)))),
        parameters=parameters.dense,
        other_parameters=parameters.fixed,
        macs=macs.dense,
        model_parameters=model.num_parameters(),
        sites_cut=len(plan.keep),
        matrices_factored=len(plan.forms),
    )


def _units(site: Site | None) -> int | None:
    return None if site is None else site.size
