"""Rescues an int8 model that loses too much by mixed precision: as few matrices as need be stay in float.

The exporter searches them; the loss of each try is measured on validation examples. Nothing is trained.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slimformer import registry
from slimformer.exporters.base import FILES, SEARCH_SECONDS, Draft, Exporter, MixedPrecision, Variant
from slimformer.families.base import subject_of
from slimformer.running.bundle import Bundle, Run
from slimformer.running.trials import (
    Reference,
    Trial,
    choose_trial,
    keep_notes,
    load_file,
    loss_of,
    read_trials,
    save_trials,
    teacher_files,
    try_out,
)
from slimformer.saving.files import write_text
from slimformer.tasks.base import Split


@dataclass(frozen=True)
class Rescue:
    """All files that ship, the int8 ones with the matrices that read `floats` in float, and their trials on validation examples."""

    folder: Path
    trials: tuple[Trial, ...]
    floats: tuple[str, ...]

    def best(self, allowed: float) -> Trial:
        """The best of the int8 files."""
        return choose_trial([trial for trial in self.trials if trial.variant != Variant.FLOAT], allowed)


def rescue(
    bundle: Bundle,
    files: Path,
    trials: Sequence[Trial],
    run: Run,
    reference: Reference,
    allowed: float,
    *,
    exporter: Exporter | None = None,
) -> Rescue | None:
    """The files again, in mixed precision; kept for a resumed run.

    `files` and `trials` are of the same model in int8 alone. None unless a rescued file meets `allowed` and beats every file that
    already does, or if the exporter has no mixed precision. The reason for each matrix goes into the log, and into the notes of the
    files that are kept.
    """
    float_trial = next((trial for trial in trials if trial.variant == Variant.FLOAT), None)
    if float_trial is None or float_trial.loss > allowed:
        return None  # the model itself loses too much: no int8 file can lose less
    name = f"floats-{allowed:g}"
    folder, floats_file, trials_file = (files.with_name(f"{name}{end}") for end in ("", ".json", "-trials.json"))
    if not floats_file.is_file():
        run.log.say("the model itself is within the loss that is allowed: looking for matrices that have to stay in float.")
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
        draft = draft_of(bundle, exporter)
        if draft is None:
            run.log.say("this exporter leaves no single matrices in float.")
            return None
        mix = mix_precision(draft, bundle, run, reference, allowed)
        for item in mix.assignments:
            run.log.event("verdict", point=item.point, int8=item.int8, reason=item.reason)
        new = [float_trial]
        if mix.within and mix.floats:
            new += _write(bundle, files, folder, run, reference, mix, draft)
        save_trials(trials_file, new)
        write_text(floats_file, json.dumps(list(mix.floats)))
    floats = tuple(json.loads(floats_file.read_text(encoding="utf-8")))
    rescued = Rescue(folder, tuple(read_trials(trials_file)), floats)
    if not floats:
        run.log.say("int8 makes every matrix faster, and loses no more than allowed: none stays in float.")
        return None
    best = rescued.best(allowed) if len(rescued.trials) > 1 else None
    if best is None or best.loss > allowed:
        run.log.say("no choice of matrices in float was found that stays within it.")
        return None
    bar = max(trial.speed_32 for trial in trials if trial.loss <= allowed)
    if best.speed_32 <= bar:
        run.log.say(f"with {len(floats)} of its inputs in float, int8 is not faster than the best file without: left out.")
        return None
    run.log.say(
        f"with {len(floats)} inputs of matrices in float: {best.speed_32:.2f} times as fast, {best.loss:+.2f} points lost "
        f"on validation examples ({best.variant}, {best.size_bytes / 1e6:.1f} MB)."
    )
    return rescued


def draft_of(bundle: Bundle, exporter: Exporter | None = None) -> Draft | None:
    """The bundle's model traced, by default for ONNX files; None if the exporter has no mixed precision."""
    chosen: Exporter = exporter or registry.find("exporters", "onnx")(agreement=0.0)
    material = bundle.material
    batches = material.batches(subject_of(bundle.model).inputs)
    return chosen.draft(bundle.model, batches, material.task.outputs, bundle.ranges)


def mix_precision(
    draft: Draft, bundle: Bundle, run: Run, reference: Reference, allowed: float, *, seconds: float = SEARCH_SECONDS
) -> MixedPrecision:
    """The search on validation examples, for batches of 32 of the mean length."""
    material = bundle.material

    def loss(file: Path) -> float:
        return loss_of(load_file(file, run.threads), material, reference)[1]

    tokens = 32 * int(material.features[Split.TRAIN].lengths().mean())
    with tempfile.TemporaryDirectory(dir=run.root, prefix=".part-") as name:
        return draft.mix(loss, allowed, tokens=tokens, threads=run.threads, folder=Path(name), seconds=seconds)


def _write(
    bundle: Bundle, files: Path, folder: Path, run: Run, reference: Reference, mix: MixedPrecision, draft: Draft
) -> list[Trial]:
    """Writes the int8 files of a copy of `files` anew, with the reasons as notes, and tries them."""
    shutil.copytree(files, folder)
    variants = [variant for variant, kind in FILES.items() if kind.shipped and kind.int8]
    artifacts = [draft.write(folder / FILES[variant].name, variant, mix.floats) for variant in variants]
    reasons = tuple(map(str, mix.assignments))
    keep_notes(folder, [replace(artifact, notes=(*artifact.notes, *reasons)) for artifact in artifacts], run.log)
    baseline = teacher_files(bundle, run)[Variant.FUSED]
    return try_out({artifact.variant: artifact.path for artifact in artifacts}, baseline, bundle, run, reference)
