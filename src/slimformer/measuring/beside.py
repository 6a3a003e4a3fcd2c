"""Writes what lies beside the files of an encoder-decoder, so that they can write texts: configs, the tokenizer, and decode.py."""

from __future__ import annotations

from pathlib import Path

from slimformer import decoding
from slimformer.data.tokenizer_files import write_tokenizer
from slimformer.families.base import Subject
from slimformer.files import write_text
from slimformer.saving.resaving import write_base_config

DECODER = "decode.py"


def make_readable(subject: Subject, source: Path, folder: Path) -> None:
    """Writes what a session needs beside the files of an encoder-decoder, and nothing for an encoder.

    `source`: the model folder whose tokenizer it is.
    """
    if subject.beams is not None:
        write_base_config(subject.model, folder)
        write_tokenizer(source, folder)


def write_decoder(folder: Path) -> None:
    """Writes decode.py beside exported files: the search of `slimformer.decoding`, which runs without slimformer."""
    write_text(folder / DECODER, Path(decoding.__file__).read_text(encoding="utf-8"))
