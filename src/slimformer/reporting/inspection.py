"""What could be cut in a model, as a table: heads, neurons, parameters and MACs of each layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slimformer.core import cost
from slimformer.core.anatomy import Kind, Site
from slimformer.families.base import anatomy_of
from slimformer.saving import checkpoint

if TYPE_CHECKING:
    from rich.table import Table


def inspect(folder: Path, length: int) -> Table:
    """A rich table with a row per layer; MACs are those of one example of `length` tokens."""
    from rich.table import Table

    model = checkpoint.load(folder)
    anatomy = anatomy_of(model)
    parameters, macs = cost.parameters(model, anatomy), cost.macs(anatomy, np.array([length]))
    plan = checkpoint.load_plan(folder)
    table = Table(
        title=f"{folder.resolve().name}: {type(model).__name__}, {model.num_parameters():,} parameters",
        caption=f"MACs of one example of {length} tokens. A site is cut by name, e.g. encoder.0.heads, encoder.0.ffn."
        + (f" {len(plan.keep)} sites are cut already." if plan.keep else "")
        + (f" {len(plan.forms)} matrices are factored: no unit can be cut there." if plan.forms else ""),
    )
    for name in ("layer", "heads", "neurons", "parameters", "MACs", "share of MACs"):
        table.add_column(name, justify="right")
    total = macs.dense
    for layer in range(len(anatomy.layers)):
        sites = {site.kind: site for site in anatomy.sites.values() if site.layer == layer and site.kind is not Kind.SUBLAYER}
        own = [site.id for site in sites.values()]
        weight = sum(float(parameters.curves[name][-1]) for name in own)
        work = sum(float(macs.curves[name][-1]) for name in own)
        table.add_row(
            str(layer),
            _units(sites.get(Kind.HEADS)),
            _units(sites.get(Kind.NEURONS)),
            f"{weight:,.0f}",
            f"{work / 1e6:,.1f} M",
            f"{work / total:.1%}" if total else "",
        )
    table.add_section()
    table.add_row("all else", "", "", f"{parameters.fixed:,.0f}", "", "")
    table.add_row("total", "", "", f"{parameters.dense:,.0f}", f"{total / 1e6:,.1f} M", "")
    return table


def _units(site: Site | None) -> str:
    return str(site.size) if site else "none"
