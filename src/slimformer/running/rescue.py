"""Rescues an int8 model that loses too much by mixed precision: as few matrices as need be stay in float.

The exporter searches them; the loss of each try is measured on validation examples. Nothing is trained.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from slimformer.exporters.base import SEARCH_SECONDS, Draft, Exporter, MixedPrecision, Variant
from slimformer.files import remembered
from slimformer.measuring.sessions import open_session
from slimformer.running.bundle import Bundle, Run
from slimformer.running.candidate import Candidate
from slimformer.running.exports import keep_notes, plain_exporter
from slimformer.running.trials import Judge, Trial
from slimformer.tasks.base import Split


@dataclass(frozen=True)
class _Tried:
    """The result of a search that is kept: the points in float, and the trials of the files written with them."""

    floats: tuple[str, ...]
    trials: tuple[Trial, ...]


def rescue(
    candidate: Candidate, judge: Judge, run: Run, allowed: float, *, exporter: Exporter | None = None
) -> Candidate | None:
    """The candidate again, in mixed precision; kept for a resumed run.

    None unless a rescued file meets `allowed` and beats every file that already does, or if the exporter has no mixed precision.
    The reason for each matrix goes into the log, and into the notes of the files that are kept.
    """
    judge = judge.reading(candidate.made.bundle.material)
    float_trial = next((trial for trial in candidate.trials if trial.variant == Variant.FLOAT), None)
    if float_trial is None or float_trial.loss > allowed:
        return None  # the model itself loses too much: no int8 file can lose less
    folder = candidate.files[Variant.FLOAT].parent.with_name(f"floats-{allowed:g}")
    file = folder.with_name(f"{folder.name}.json")

    def tried() -> _Tried | None:
        draft = draft_of(candidate.made.bundle, exporter)
        if draft is None:
            return None
        run.log.say("the model itself is within the loss that is allowed: looking for matrices that have to stay in float.")
        shutil.rmtree(folder, ignore_errors=True)  # a killed run may have left it
        mix = mix_precision(draft, judge, run.root, allowed)
        for item in mix.assignments:
            run.log.event("verdict", point=item.point, int8=item.int8, reason=item.reason)
        written = _write(candidate, folder, judge, mix, draft) if mix.within and mix.floats else []
        return _Tried(tuple(mix.floats), (float_trial, *written))

    kept = remembered(file, tried, _Tried | None)
    if kept is None:
        run.log.say("this exporter leaves no single matrices in float.")
        return None
    if not kept.floats:
        run.log.say("int8 makes every matrix faster, and loses no more than allowed: none stays in float.")
        return None
    rescued = replace(candidate, folder=folder, trials=kept.trials, floats=kept.floats)
    best = rescued.best_int8(allowed) if len(kept.trials) > 1 else None
    if best is None or best.loss > allowed:
        run.log.say(f"keeping matrices in float does not bring the loss below {allowed:g}.")
        return None
    count, bar = len(kept.floats), max(trial.speed_32 for trial in candidate.trials if trial.loss <= allowed)
    if best.speed_32 <= bar:
        run.log.say(f"with {count} of its inputs in float, int8 is not faster than the best file without: left out.")
        return None
    run.log.say(
        f"with {count} inputs of matrices in float: {best.speed_32:.2f} times as fast, {best.loss:+.2f} points lost "
        f"on validation examples ({best.variant}, {best.size_bytes / 1e6:.1f} MB)."
    )
    return rescued


def draft_of(bundle: Bundle, exporter: Exporter | None = None) -> Draft | None:
    """The bundle's model traced, by default for ONNX files; None if the exporter has no mixed precision."""
    exporter, material, subject = exporter or plain_exporter(), bundle.material, bundle.subject
    return exporter.draft(subject.model, material.batches(subject.inputs), material.task.outputs, bundle.ranges)


def mix_precision(
    draft: Draft, judge: Judge, folder: Path, allowed: float, *, seconds: float = SEARCH_SECONDS
) -> MixedPrecision:
    """The search on validation examples, for batches of 32 of the mean length; scratch files lie in `folder`."""

    def loss(file: Path) -> float:
        return judge.loss_of(open_session(file, judge.threads))[1]

    tokens = 32 * int(judge.material.features[Split.TRAIN].lengths().mean())
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as name:
        return draft.mix(loss, allowed, tokens=tokens, threads=judge.threads, folder=Path(name), seconds=seconds)


def _write(candidate: Candidate, folder: Path, judge: Judge, mix: MixedPrecision, draft: Draft) -> list[Trial]:
    """Writes the int8 files of a copy of the candidate's anew, with the reasons as notes, and tries them."""
    files = candidate.files
    shutil.copytree(files[Variant.FLOAT].parent, folder)
    int8 = {variant: path.name for variant, path in files.items() if candidate.kinds[variant].int8}
    artifacts = [draft.write(folder / name, variant, mix.floats) for variant, name in int8.items()]
    reasons = tuple(map(str, mix.assignments))
    keep_notes(folder, [replace(artifact, notes=(*artifact.notes, *reasons)) for artifact in artifacts], judge.log)
    return judge.try_out({artifact.variant: artifact.path for artifact in artifacts}, candidate.kinds)
