"""Exports the files of a run: those of its model, and those of the teacher, with which everything is compared.

The teacher's files are made once a run, or once for all runs that share a cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from slimformer import registry
from slimformer.core.ranges import Ranges
from slimformer.data.batching import collate
from slimformer.data.material import Material, features_digest
from slimformer.digests import digest
from slimformer.errors import ExportError
from slimformer.exporters.base import OPENVINO, SLIM, Artifact, Exporter, Variant
from slimformer.families.base import Subject
from slimformer.files import in_turn, remove_parts, write_text
from slimformer.kernels.library import installed
from slimformer.log import Log
from slimformer.measuring import machine
from slimformer.measuring.beside import make_readable
from slimformer.running.bundle import Bundle, Run
from slimformer.runtimes.ctranslate2 import TRANSLATOR_FILE, ctranslate2_file
from slimformer.runtimes.openvino import nncf_int8
from slimformer.saving.tensors import fixed_digest
from slimformer.tasks.base import Split

TEACHER_FILES = "teacher-files"
NOTES = "notes.json"  # it lies beside exported files and maps each file to its notes


def export_files(
    subject: Subject,
    material: Material,
    folder: Path,
    variants: Sequence[str],
    log: Log,
    *,
    exporter: Exporter | None = None,
    ranges: Ranges | None = None,
) -> dict[str, Path]:
    """The model as files in `folder`, the fp32 ones proven against the model on real batches.

    No int8 file is refused here: each is judged by what it loses on validation examples.
    """
    exporter = exporter or plain_exporter()
    folder.mkdir(parents=True, exist_ok=True)
    kinds = exporter.kinds_for(subject.model)
    paths = {variant: folder / kinds[variant].name for variant in variants}
    made = exporter.export_all(subject.model, material.batches(subject.inputs), paths, material.task.outputs, ranges)
    make_readable(subject, material.source, folder)
    keep_notes(folder, made.values(), log)
    return paths


IN_PARTS = (
    Variant.FLOAT,
    Variant.INT8_FUSED,
)  # the variants whose parts are delivered: with standard operators, and the fastest


def export_parts(subject: Subject, material: Material, files: Mapping[str, Path], log: Log) -> list[Path]:
    """The parts of exported files in which two texts meet only in the upper layers, beside these; none for any other model."""
    made: list[Path] = []
    for variant in IN_PARTS:
        if variant in files and subject.anatomy.meeting:
            batches = material.batches(subject.inputs)
            made += plain_exporter().export_parts(files[variant], subject.model, batches, variant, material.task.outputs)
    if made:
        log.say(f"the two texts meet in the upper layers: wrote {', '.join(path.name for path in made)}.")
    return made


def told_parts(parts: Sequence[Path]) -> Iterator[str]:
    """A note on delivered parts."""
    if parts:
        names = ", ".join(path.name for path in parts)
        yield f"the lower layers keep the two texts apart: {names} compute a passage, a question, and the answer of both"


def plain_exporter() -> Exporter:
    """The ONNX exporter, which refuses no int8 file."""
    exporter: Exporter = registry.find("exporters", "onnx")(agreement=0.0)
    return exporter


def keep_notes(folder: Path, artifacts: Iterable[Artifact], log: Log) -> None:
    """Writes the notes on exported files into the log, and beside the files for the card."""
    notes = read_notes(folder)
    for artifact in artifacts:
        log.event("exported", **{key: str(value) for key, value in asdict(artifact).items()})
        notes[artifact.path.name] = list(artifact.notes)
    write_text(folder / NOTES, json.dumps(notes, indent=1))


def read_notes(folder: Path) -> dict[str, list[str]]:
    """The notes that `keep_notes` wrote, by the name of the file."""
    file = folder / NOTES
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def teacher_files(bundle: Bundle, run: Run) -> dict[str, Path]:
    """The teacher's own files: fp32 fused (the baseline), int8, and fp32 standard if OpenVINO can make its own int8 file of it.

    Exported once a run, or once a cache.
    """
    bundle = bundle.uncut  # what is told is told of the teacher with its whole vocabulary
    folder, kinds = _teacher_home(bundle, run), plain_exporter().kinds_for(bundle.teacher.model)
    float_too = has_nncf() and bundle.teacher.beams is None
    variants = [Variant.FUSED, Variant.INT8_DYNAMIC, *([Variant.FLOAT] if float_too else [])]
    with teacher_turn(folder, run):
        missing = [variant for variant in variants if not (folder / kinds[variant].name).is_file()]
        if missing:
            export_files(bundle.teacher, bundle.material, folder, missing, run.log)
    return {variant: folder / kinds[variant].name for variant in variants}


def _teacher_home(bundle: Bundle, run: Run) -> Path:
    """The folder for the teacher's files, in the run's own or in its cache: for the same weights, rows and packages."""
    rows = [features_digest(bundle.material.features[split]) for split in (Split.VALIDATION, Split.TRAIN)]
    packages = [str(package) for package in machine.environment().packages.items()]
    return (run.cache or run.root) / TEACHER_FILES / digest(fixed_digest(bundle.teacher.model), *rows, *packages)


@contextmanager
def teacher_turn(home: Path, run: Run) -> Iterator[None]:
    """Owns the folder of a teacher's files, without what a killed run left there; waits for another run that is at work in it."""
    with in_turn(home, lambda: run.log.say("another run makes files of this teacher: waiting for it.")):
        remove_parts(home)
        yield


def has_nncf() -> bool:
    """Whether OpenVINO can be measured and can make int8 files of its own here."""
    return find_spec("openvino") is not None and find_spec("nncf") is not None


def openvino_int8(path: Path, subject: Subject, material: Material, folder: Path) -> Path:
    """The fp32 file of a model as OpenVINO's own, int8 by NNCF on 300 training examples; made once in `folder`."""
    made = folder / OPENVINO.name
    if not made.is_file():
        features = material.features[Split.TRAIN]
        rows = [int(row) for row in np.linspace(0, len(features) - 1, min(300, len(features)))]
        nncf_int8(path, [collate(features, [row], subject.inputs) for row in rows], folder)
    return made


def has_ctranslate2() -> bool:
    """Whether CTranslate2 can be measured here."""
    return find_spec("ctranslate2") is not None


def ctranslate2_int8(subject: Subject, home: Path) -> Path:
    """CTranslate2's int8 file of a model that writes and is not cut, beside its other files in `home`; made once."""
    made = home / "ctranslate2" / TRANSLATOR_FILE
    return made if made.is_file() else ctranslate2_file(subject.model, home, made.parent)


def kernels_int8(subject: Subject, material: Material, folder: Path, log: Log) -> Path | None:
    """The model in int8 for the kernels, made once in `folder`; None if they are not installed, or do not know all of its parts."""
    if not installed():
        return None
    made = folder / SLIM.name
    if not made.is_file():
        try:
            export_files(
                subject, material, folder, [Variant.INT8_KERNELS], log, exporter=registry.find("exporters", "kernels")()
            )
        except ExportError as error:
            log.say(f"no {SLIM.name}: {error.what}")
            return None
    return made
