"""Runs an encoder-decoder for its texts: rows of tokens in, a text for each out, by the search of `slimformer.decoding`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimformer.decoding import Halves, Settings, decoder_beside, read_settings, search
from slimformer.errors import ModelError
from slimformer.runtimes.base import Runner

NEEDED = ("config.json", "generation_config.json", "tokenizer.json")  # beside the files: how to write, and in which words


def writing_by_files(
    path: Path,
    threads: int,
    generation: Mapping[str, Any],
    opening: Callable[[Path, int], Any],
    failed: Callable[[Exception, Path, Mapping[str, np.ndarray]], ModelError],
) -> Runner:
    """A runner that gives "text" for each row, and "written": the number of its tokens, the first one left out.

    ModelError if the decoder, the tokenizer or the way to write is not there, or is not one that is known.
    """
    if not decoder_beside(path).is_file():
        raise ModelError(
            f"{path.name} is half of an encoder-decoder, and {decoder_beside(path).name} does not lie beside it.",
            help="copy both files of the model.",
        )
    tokenizer, settings = read_tokenizer(path.parent), settings_of(path.parent, generation)
    pair = Halves(path, threads, opening)

    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", np.ones_like(ids))
        try:
            rows = search(pair.read(ids, mask), len(ids), settings)
        except Exception as error:  # those of ONNX Runtime have no common public type
            raise failed(error, path, inputs) from error
        return texts_of(tokenizer, rows)

    return run


def texts_of(tokenizer: Any, rows: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """What a runner gives for rows of written tokens."""
    texts = tokenizer.decode_batch([row.tolist() for row in rows], skip_special_tokens=True)
    written = np.asarray([len(row) - 1 for row in rows], np.int64)
    return {"text": np.asarray([str(text) for text in texts], dtype=object), "written": written}


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; ModelError without one."""
    from slimformer.data.tokenizer import load_tokenizer

    return load_tokenizer(folder)


def settings_of(folder: Path, generation: Mapping[str, Any]) -> Settings:
    """How the texts of a folder are searched; ModelError for an option that is not honoured."""
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder} has no {missing[0]}, and texts cannot be written without it.",
            help="copy the whole folder of the model, or the file from the model that it was made of.",
        )
    try:
        return read_settings(folder, **generation)
    except json.JSONDecodeError as error:
        raise ModelError(f"{folder} holds a file that is no JSON: {error}.") from None
    except (ValueError, TypeError) as error:
        raise ModelError(f"{folder}: {error}", help="change generation_config.json, or the options of the search.") from None
