"""The only code that changes shapes: a model and a plan in, a smaller model out, the input left untouched.

It is also how a saved model is rebuilt: an empty skeleton is shrunk by the saved plan, then weights are loaded strictly.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from slimformer.anatomy import Anatomy, Kind, Site
from slimformer.errors import PlanError
from slimformer.families.base import family_of
from slimformer.plan import Decision, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shrink(model: PreTrainedModel, anatomy: Anatomy, decision: Decision | Plan) -> PreTrainedModel:
    """A copy of `model` that keeps only what `decision` keeps, with its scales and weights folded in.

    `anatomy` is that of `model` as it stands, and the decision speaks in its numbering. Works on the meta device too. Raises
    PlanError where the decision does not fit.
    """
    if isinstance(decision, Plan):
        decision = Decision(decision)
    decision.plan.check(anatomy)
    small = copy.deepcopy(model)
    with torch.no_grad():
        _replace(small, decision)
        for name, scale in decision.scales.items():
            _fold(small, _site(anatomy, name), scale)
        for name, keep in decision.plan.keep.items():
            _cut(small, anatomy.sites[name], keep)
    family = family_of(model.config.model_type)
    for site in anatomy.of_kind(Kind.SUBLAYER):
        if decision.plan.keep.get(site.id) == ():
            family.skip(small, site)
    return small


def _site(anatomy: Anatomy, name: str) -> Site:
    if name not in anatomy.sites:
        raise PlanError(f"the decision scales the site '{name}', which this model does not have.")
    return anatomy.sites[name]


def _replace(model: nn.Module, decision: Decision) -> None:
    parameters = dict(model.named_parameters())
    for name, value in decision.weights.items():
        if name not in parameters or parameters[name].shape != value.shape:
            have = tuple(parameters[name].shape) if name in parameters else "no such parameter"
            raise PlanError(f"the decision re-solves '{name}' with shape {tuple(value.shape)}; the model has {have}.")
        parameters[name].copy_(value).add_(0.0)  # a masked -0.0 becomes 0.0, of which all bits are zero


def _fold(model: nn.Module, site: Site, scale: torch.Tensor) -> None:
    """Multiplies `scale` (size,) into the Linear at each tap: its columns for an input, its rows and bias for an output."""
    if tuple(scale.shape) != (site.size,) or any(tap.residual for tap in site.taps):
        raise PlanError(
            f"site '{site.id}' takes {site.size} scales at a matrix, got shape {tuple(scale.shape)}.",
            help="a sublayer is kept or cut, it has no scale.",
        )
    for tap in site.taps:
        linear = cast(nn.Linear, model.get_submodule(tap.module))
        factor = scale.to(linear.weight).repeat_interleave(tap.unit)
        if tap.side == "input":
            linear.weight.mul_(factor)  # (out, in) * (in,)
        else:
            linear.weight.mul_(factor[:, None])
            if linear.bias is not None:
                linear.bias.mul_(factor)


def _cut(model: nn.Module, site: Site, keep: tuple[int, ...]) -> None:
    for piece in site.slices:
        path, _, name = piece.param.rpartition(".")
        module: Any = model.get_submodule(path)
        old = getattr(module, name)
        rows = torch.tensor(piece.rows(site.size, keep), dtype=torch.long, device=old.device)
        setattr(module, name, nn.Parameter(old.index_select(piece.dim, rows), requires_grad=old.requires_grad))
        if isinstance(module, nn.Linear) and name == "weight":
            module.out_features, module.in_features = module.weight.shape
    for counter in site.counters:
        setattr(model.get_submodule(counter.module), counter.attribute, len(keep) * counter.per_unit)
