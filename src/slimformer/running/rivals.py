"""Makes the rivals of our model: the dense teacher in fp32 and int8, OpenVINO's int8, and a smaller dense model of equal training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slimformer import registry
from slimformer.core import cost
from slimformer.core.anatomy import Anatomy
from slimformer.core.plan import Plan
from slimformer.data.material import Material
from slimformer.exporters.base import Variant
from slimformer.measuring.records import Standing
from slimformer.methods._depth import layers_of, leaving
from slimformer.registry import name_of
from slimformer.running.bundle import Bundle, Made, Run
from slimformer.running.exports import ctranslate2_int8, export_files, has_ctranslate2, has_nncf, openvino_int8, teacher_turn
from slimformer.running.facts import facts_of
from slimformer.running.recipe import RivalName
from slimformer.running.stages import advance
from slimformer.running.trials import Judge
from slimformer.runtimes.ctranslate2 import convertible
from slimformer.tasks.base import Split
from slimformer.training.stage import Calibrate, Stage, Train


@dataclass(frozen=True)
class Contestant:
    """A file in the final comparison, with its name, its role and the facts of its model."""

    name: str
    standing: Standing
    path: Path
    variant: str
    runtime: str = "onnxruntime"
    facts: Mapping[str, Any] = field(default_factory=dict)
    made: Made | None = None  # the smaller dense model, which may be delivered itself
    stages: tuple[Stage, ...] = ()  # they made it from the teacher
    material: Material | None = None  # the data as its tokenizer splits them; None: as that of the candidate does


def rivals_of(made: Made, stages: Sequence[Stage], wanted: Sequence[str], judge: Judge, run: Run) -> list[Contestant]:
    """The baseline first, then the rivals that are wanted and can run here."""
    bundle, teacher, uncut = made.bundle, judge.teacher, made.bundle.uncut
    facts = facts_of(Made(uncut), run, "") | {"minutes": None, "threads": None, "peak_rss_bytes": None}
    whole = "dense"
    if uncut.teacher_plan != Plan():
        whole = "given"
        run.log.say(
            "the model to compare with is cut already: speeds and losses are against it as it was given, not against the dense model. "
            "Name that one as `teacher:` in a recipe to compare with it."
        )
    rivals = [Contestant(f"{whole} fp32", Standing.TEACHER_FP32, teacher[Variant.FUSED], Variant.FUSED, facts=facts)]
    if "teacher-int8" in wanted:
        int8 = Variant.INT8_DYNAMIC
        rivals.append(Contestant(f"{whole} int8", Standing.TEACHER_INT8, teacher[int8], int8, facts=facts))
    if "openvino-int8" in wanted and has_nncf() and bundle.subject.beams is None:
        home = teacher[Variant.FLOAT].parent
        with teacher_turn(home, run):
            path = openvino_int8(teacher[Variant.FLOAT], uncut.teacher, uncut.material, home / "openvino")
        name, variant = f"{whole} OpenVINO int8", Variant.INT8_STATIC
        rivals.append(Contestant(name, Standing.OPENVINO_INT8, path, variant, "openvino", facts))
    if "ctranslate2-int8" in wanted and has_ctranslate2() and whole == "dense" and convertible(uncut.teacher.model):
        home = teacher[Variant.FUSED].parent
        with teacher_turn(home, run):
            path = ctranslate2_int8(uncut.teacher, home)
        name, variant = f"{whole} CTranslate2 int8", Variant.INT8_DYNAMIC
        rivals.append(Contestant(name, Standing.CTRANSLATE2_INT8, path, variant, "ctranslate2", facts))
    # with zeros alone our model is as large as the teacher
    smaller = any(stage.cuts for stage in stages) and bundle.plan != bundle.teacher_plan and not drops_layers(stages)
    if "small-dense" in wanted and smaller:
        rivals.append(small_dense(made, stages, equal_layers(bundle), run))
    return [replace(rival, material=uncut.material) for rival in rivals]


def small_dense(made: Made, stages: Sequence[Stage], count: int, run: Run) -> Contestant:
    """The smaller dense model of `count` layers in int8, trained as `made` was."""
    training = small_dense_stages(made.bundle, stages, count, run)
    small = advance(training, made.bundle.uncut, run.under("rival" if count == equal_layers(made.bundle) else f"rival-{count}"))
    bundle, variant = small.bundle, Variant.INT8_DYNAMIC
    files = export_files(bundle.subject, bundle.material, run.root / f"small-{count}", [variant], run.log, ranges=bundle.ranges)
    name = f"{depth_text(bundle.subject.anatomy, count)} int8"
    return Contestant(
        name, Standing.SMALL_DENSE, files[variant], variant, facts=facts_of(small, run, ""), made=small, stages=training
    )


def depth_text(anatomy: Anatomy, count: int) -> str:
    """What a smaller dense model is called: "3 dense layers", or "6 + 2 dense layers" of an encoder-decoder."""
    numbers = " + ".join(str(len(layers)) for layers in layers_of(anatomy)) if len(anatomy.stacks) > 1 else str(count)
    return f"{numbers} dense layer{'s' if count > 1 else ''}"


def equal_layers(bundle: Bundle) -> int:
    """How many whole layers of the teacher have about as many multiply-accumulates as the bundle's model; not all, if there are more.

    An encoder-decoder loses those of its decoder first.
    """
    share = _macs(bundle, bundle.subject.anatomy).dense / _macs(bundle, bundle.teacher.anatomy).dense
    if bundle.teacher.beams is None:
        total = len(bundle.teacher.anatomy.layers)
        return max(1, min(total - 1, round(share * total)))
    shares = _shares(bundle)
    smaller = {count: own for count, own in shares.items() if count < max(shares)} or shares
    return min(smaller, key=lambda count: abs(smaller[count] - share))


def _macs(bundle: Bundle, anatomy: Anatomy) -> cost.Cost:
    rows = bundle.material.features[Split.TRAIN]
    return cost.macs(anatomy, rows.lengths(), rows.target_lengths(), bundle.teacher.beams)


def _shares(bundle: Bundle) -> dict[int, float]:
    """The shallower models of an encoder-decoder, by the number of their layers, and the share of its cost that each has."""
    anatomy, counted = bundle.teacher.anatomy, _macs(bundle, bundle.teacher.anatomy)
    sets = registry.find("methods", "layers")(first="decoder").sets(layers_of(anatomy))
    return {len(stay): counted.of(leaving(anatomy, stay), anatomy) / counted.dense for stay in sets}


def small_dense_stages(bundle: Bundle, stages: Sequence[Stage], count: int, run: Run) -> tuple[Stage, ...]:
    """What makes the smaller dense model: whole layers are dropped evenly down to `count`, then the same training follows.

    An encoder-decoder loses those of its decoder first: it stays a deep encoder with a shallow decoder.
    """
    total, decodes = len(bundle.teacher.anatomy.layers), bundle.teacher.beams is not None
    run.log.say(f"training the smaller dense model ({count} of {total} layers) with the same budget.")
    share = _shares(bundle)[count] if decodes else count / total
    options = {"first": "decoder"} if decodes else {}
    layers = registry.find("methods", "layers")(keep=min(1.0, round(share + 1e-4, 4)), **options)
    return (Calibrate(layers), *(without_cuts(stage) for stage in stages if isinstance(stage, Train)))


def drops_layers(stages: Sequence[Stage]) -> bool:
    """Whether the stages make a smaller dense model."""
    return any(isinstance(stage, Calibrate) and name_of(stage.method) == "layers" for stage in stages)


def without_small_dense(names: Sequence[RivalName]) -> tuple[RivalName, ...]:
    """The rivals but the smaller dense model."""
    return tuple(name for name in names if name != "small-dense")


def without_cuts(stage: Train) -> Train:
    """The stage without the method that cuts, lets inputs leave early, segments attend apart, or heads attend by patterns.

    If only the method's parameters were trainable, the model's own train instead, so that the rival gets as many passes.
    """
    found = {method: method.effects() for method in stage.methods}
    methods = tuple(item for item, does in found.items() if not (does.chooses or does.adapts or does.divides or does.patterns))
    alone = stage.freeze == "everything" and methods != stage.methods
    return replace(stage, methods=methods, freeze="nothing" if alone else stage.freeze)
