"""The files of a folder with an exported model, ours or another tool's: which there are, which is the best, and where its config lies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from slimformer.errors import ModelError
from slimformer.exporters.base import FILES, OPENVINO, PAIRS, SLIM, Variant
from slimformer.kernels.library import installed
from slimformer.measuring.records import Facts, FileFacts
from slimformer.reporting.ledger import read_facts

# These are ordered from the fastest file to the plainest: the first one there is stands for a folder that names no best file.
_FASTEST_FIRST = (Variant.INT8_FUSED, Variant.INT8_STATIC, Variant.FUSED, Variant.FLOAT)
ONNX_FOLDER = FILES[Variant.FLOAT].folder


def file_to_run(path: Path) -> tuple[Path, Path, Facts | None]:
    """The best file of a folder, or the file itself; the folder of its config.json and tokenizer; and what slimformer.json says of it.

    ModelError if there is none.
    """
    file = path
    if not os.path.isfile(path):
        if not os.path.isdir(path):
            raise ModelError(
                f"{path} is no model: there is no such folder.", help="name a folder with config.json and a model."
            )
        files = model_files(path)
        if not files:
            raise ModelError(
                f"{path} holds no ONNX file.",
                help="`slimformer compress` or `slimformer run` with a recipe without stages writes one.",
            )
        file = fastest_file(path, files)
    return file, home_of(file), facts_beside(file)[0]


def model_files(folder: Path) -> list[Path]:
    """The model files of a folder, fastest kind first: those that its slimformer.json names, or ONNX files by their names.

    Other tools put them at the top or into a folder `onnx`. If none has a name that is known, the only ONNX file is taken.
    """
    facts = read_facts(folder)
    known = [kinds[variant].name for variant in _FASTEST_FIRST for kinds in (FILES, PAIRS)]
    elsewhere = {OPENVINO.place} if installed() else {OPENVINO.place, SLIM.place}  # other engines run these
    places = [item.name for item in facts.files if item.name not in elsewhere] if facts else []
    places += [*known, *(f"{ONNX_FOLDER}/{name}" for name in known)]
    files = [folder / place for place in dict.fromkeys(places) if (folder / place).is_file()]
    if files:
        return sorted(files, key=lambda file: known.index(file.name) if file.name in known else len(known))
    others = sorted([*folder.glob("*.onnx"), *folder.glob(f"{ONNX_FOLDER}/*.onnx")])
    if len(others) > 1:
        raise ModelError(
            f"{folder} holds {len(others)} ONNX files, and no name says which one to take.",
            facts=[f"there: {', '.join(str(file.relative_to(folder)) for file in others)}"],
            help="name one of them.",
        )
    return others


def home_of(file: Path) -> Path:
    """The folder with the config and tokenizer of a model file: its own, or the one above, as other tools leave them.

    ModelError if there is none.
    """
    for folder in (file.parent, file.parent.parent):
        if (folder / "config.json").is_file():
            return folder
    raise ModelError(
        f"there is no config.json beside {file}.",
        help="put the model's config.json and tokenizer.json into the folder of the .onnx file, or into the one above it.",
    )


def facts_beside(file: Path) -> tuple[Facts | None, Path]:
    """slimformer.json for a model file, and its folder: beside the file, or above it if it names this file."""
    facts, above = read_facts(file.parent), file.parent.parent
    if facts is None and named_in(upper := read_facts(above), file):
        return upper, above
    return facts, file.parent


def named_in(facts: Facts | None, file: Path) -> FileFacts | None:
    """What slimformer.json says of a file: it names files from the top of the folder."""
    names = (file.name, f"{file.parent.name}/{file.name}")
    return next((item for item in facts.files if item.name in names), None) if facts else None


def fastest_file(folder: Path, files: Sequence[Path]) -> Path:
    """The file that slimformer.json names as the best, or the fastest kind of those there are."""
    facts = read_facts(folder)
    if facts is None:
        return files[0]
    best = folder / facts.best
    if best not in files:
        raise ModelError(
            f"{folder}/slimformer.json names '{facts.best}' as the best file, which is not there.",
            facts=[f"there: {', '.join(str(file.relative_to(folder)) for file in files)}"],
            help="copy the whole folder again, or name one .onnx file.",
        )
    return best
