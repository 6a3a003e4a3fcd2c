"""The facts of a model that a record holds whatever its file: sizes, zeros, operations, and the effort of making it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimformer.core import cost
from slimformer.core.anatomy import Kind, Matrix
from slimformer.measuring.records import kept_layers
from slimformer.running.bundle import Bundle, Made, Run
from slimformer.saving import checkpoint
from slimformer.saving.sparse import Values, size_bytes
from slimformer.tasks.base import Split


def facts_of(made: Made, run: Run, recipe: str, values: Values = "float32") -> dict[str, Any]:
    """Fields of a Record by name. `recipe`: its digest; `values`: how model.safetensors stores large matrices."""
    bundle, effort = made.bundle, made.effort
    model, anatomy = bundle.subject.model, bundle.subject.anatomy
    inside = anatomy.encoder_matrices()
    rows = bundle.material.features[Split.DEV]
    weights = checkpoint.unshared(model)
    narrow = any(site.id in bundle.plan.keep for site in bundle.teacher.anatomy.of_kind(Kind.HIDDEN))
    return {
        "params": model.num_parameters(),
        "encoder_params": anatomy.recurrent + sum(matrix.parameters for matrix in inside),
        "encoder_nonzero": anatomy.recurrent + sum(_nonzero(weights, matrix) for matrix in inside),
        "weights_bytes": size_bytes(weights, values, checkpoint.heads(model)),
        "macs": round(cost.macs(anatomy, rows.lengths(), rows.target_lengths(), bundle.subject.beams).dense),
        "layers": kept_layers(bundle.teacher.anatomy, bundle.plan) if _is_cut(bundle) else (),
        "hidden_units": anatomy.hidden_size if narrow else None,
        "hidden_units_of": bundle.teacher.anatomy.hidden_size if narrow else None,
        "vocabulary": bundle.vocabulary,
        "minutes": round(effort.minutes, 2),
        "threads": effort.threads,
        "peak_rss_bytes": effort.peak_rss_bytes,
        "seed": run.seed,
        "train_examples": len(bundle.material.examples[Split.TRAIN]),
        "plan": bundle.plan.digest(),
        "recipe": recipe,
    }


def _is_cut(bundle: Bundle) -> bool:
    """Whether the model is what the plan leaves of its teacher; a student of another shape is not."""
    gone = {name for name, kept in bundle.plan.keep.items() if not kept}
    left = {
        site.id: len(bundle.plan.keep.get(site.id, range(site.size)))
        for site in bundle.teacher.anatomy.units
        if site.sublayer not in gone
    }
    return left == {site.id: site.size for site in bundle.subject.anatomy.units}


def _nonzero(weights: Mapping[str, Any], matrix: Matrix) -> int:
    """How many numbers of a matrix are not 0, in any form."""
    start, bias = f"{matrix.module}.", f"{matrix.module}.bias"
    return sum(int((weight != 0).sum()) for name, weight in weights.items() if name.startswith(start) and name != bias)
