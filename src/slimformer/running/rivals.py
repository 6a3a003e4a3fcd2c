"""What ours has to beat: the dense teacher and a smaller dense model, trained with the same budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimformer import registry
from slimformer.core.plan import Plan
from slimformer.data.batching import collate
from slimformer.data.material import Material
from slimformer.exporters.base import OPENVINO, Variant
from slimformer.running.bundle import Bundle, Run
from slimformer.running.stages import Calibrate, Stage, Train, advance
from slimformer.saving import checkpoint
from slimformer.saving.sparse import Values, size_bytes
from slimformer.tasks.base import Split

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimformer.core.anatomy import Matrix
from slimformer.running.trials import _teacher_turn, export_files


@dataclass(frozen=True)
class Rival:
    """A model to stand beside ours: its file, how it is called, and what is known of it."""

    name: str
    role: str
    path: Path
    variant: str
    runtime: str = "onnxruntime"
    facts: Mapping[str, Any] | None = None


def rivals(
    bundle: Bundle, stages: Sequence[Stage], wanted: Sequence[str], teacher: Mapping[Variant, Path], run: Run
) -> list[Rival]:
    """The baseline first, then the rivals that are wanted and can run here."""
    from slimformer.measuring.records import Standing

    dense = facts_of(replace(bundle, model=bundle.teacher, plan=Plan(), minutes=0.0), bundle.teacher, run, "")
    dense |= {"minutes": None, "threads": None, "peak_rss_bytes": None}
    found = [Rival("dense fp32", Standing.TEACHER_FP32, teacher[Variant.FUSED], Variant.FUSED, facts=dense)]
    if "teacher-int8" in wanted:
        path = teacher[Variant.INT8_DYNAMIC]
        found.append(Rival("dense int8", Standing.TEACHER_INT8, path, Variant.INT8_DYNAMIC, facts=dense))
    if "openvino-int8" in wanted and find_spec("openvino") is not None and find_spec("nncf") is not None:
        home = teacher[Variant.FLOAT].parent
        with _teacher_turn(home, run):
            path = openvino_int8(teacher[Variant.FLOAT], bundle.teacher, bundle.material, home / "openvino")
        found.append(Rival("dense OpenVINO int8", Standing.OPENVINO_INT8, path, Variant.INT8_STATIC, "openvino", dense))
    cutting = any(
        isinstance(stage, Calibrate) or any(m.effects().chooses for m in getattr(stage, "methods", ())) for stage in stages
    )
    if "small-dense" in wanted and cutting and bundle.plan != Plan():  # where only zeros were made, the teacher is as small
        small = small_dense(bundle, stages, run)
        folder, wanted_file = run.root / "small", [Variant.INT8_DYNAMIC]
        made = export_files(small.model, small.material, folder, wanted_file, run.log, ranges=small.ranges)
        facts = facts_of(small, bundle.teacher, run, "")
        count = sum(layer.heads + layer.neurons > 0 for layer in facts["layers"])
        name = f"{count} dense layer{'s' if count > 1 else ''} int8"
        file = made[Variant.INT8_DYNAMIC].path
        found.append(Rival(name, Standing.SMALL_DENSE, file, Variant.INT8_DYNAMIC, facts=facts))
    return found


def small_dense(bundle: Bundle, stages: Sequence[Stage], run: Run) -> Bundle:
    """The smaller dense model of about equal MACs: whole layers dropped evenly, then the same training stages."""
    from slimformer.core import cost
    from slimformer.families.base import anatomy_of

    anatomy = anatomy_of(bundle.teacher)
    lengths = bundle.material.features[Split.TRAIN].lengths()
    share = cost.macs(anatomy_of(bundle.model), lengths).dense / cost.macs(anatomy, lengths).dense
    count = max(1, round(share * len(anatomy.layers)))
    layers = registry.find("methods", "layers")(keep=count / len(anatomy.layers) + 1e-9)
    made: list[Stage] = [Calibrate(layers)]
    for stage in stages:
        if isinstance(stage, Train):
            made.append(undecided(stage))
    run.log.say(f"training the smaller dense rival ({count} of {len(anatomy.layers)} layers) with the same budget.")
    start = replace(bundle, model=bundle.teacher, plan=Plan(), minutes=0.0, peak_rss_bytes=0)
    return advance(made, start, run.under("rival"))


def undecided(stage: Train) -> Train:
    """The stage without what decides; where only that could train, the weights train in its stead, so that the passes are as many."""
    methods = tuple(method for method in stage.methods if not method.effects().chooses)
    alone = stage.freeze == "everything" and methods != stage.methods
    return replace(stage, methods=methods, freeze="nothing" if alone else stage.freeze)


def openvino_int8(path: Path, model: PreTrainedModel, material: Material, folder: Path) -> Path:
    """The fp32 file of a model as OpenVINO's own, int8 by NNCF on 300 training examples; made once in `folder`."""
    from slimformer.families.base import family_of
    from slimformer.runtimes.openvino import nncf_int8

    made = folder / OPENVINO.name
    if not made.is_file():
        names = family_of(model.config.model_type).inputs(model)
        features = material.features[Split.TRAIN]
        rows = [int(row) for row in np.linspace(0, len(features) - 1, min(300, len(features)))]
        nncf_int8(path, [collate(features, [row], names) for row in rows], folder)
    return made


def facts_of(bundle: Bundle, dense: PreTrainedModel, run: Run, recipe: str, values: Values = "float32") -> dict[str, Any]:
    """Fields of a Record that belong to a model, whatever file it is in. `values`: how model.safetensors stores large matrices."""
    from slimformer.core import cost
    from slimformer.families.base import anatomy_of
    from slimformer.measuring.records import kept_layers

    anatomy = anatomy_of(bundle.model)
    inside = anatomy.encoder_matrices()
    lengths = bundle.material.features[Split.DEV].lengths()
    weights = checkpoint.unshared(bundle.model)
    return {
        "params": bundle.model.num_parameters(),
        "encoder_params": sum(matrix.parameters for matrix in inside),
        "encoder_nonzero": sum(_nonzero(weights, matrix) for matrix in inside),
        "weights_bytes": size_bytes(weights, values, checkpoint.heads(bundle.model)),
        "macs": round(cost.macs(anatomy, lengths).dense),
        "layers": kept_layers(anatomy_of(dense), bundle.plan),
        "minutes": round(bundle.minutes, 2),
        "threads": bundle.threads,
        "peak_rss_bytes": bundle.peak_rss_bytes,
        "seed": run.seed,
        "train_examples": len(bundle.material.examples[Split.TRAIN]),
        "plan": bundle.plan.digest(),
        "recipe": recipe,
    }


def _nonzero(weights: Mapping[str, Any], matrix: Matrix) -> int:
    """Numbers of a matrix that are not 0, in whatever form it is stored."""
    if matrix.dense:
        return int((weights[f"{matrix.module}.weight"] != 0).sum())
    return sum(int((weights[f"{matrix.module}.{name}"] != 0).sum()) for name in ("a", "b"))
