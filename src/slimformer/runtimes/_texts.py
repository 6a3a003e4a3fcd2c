"""Runs an encoder-decoder for its texts: rows of tokens in, a text for each out, by the search of `slimformer.decoding`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slimformer.decoding import Halves, Settings, Speech, decoder_beside, read_settings, search
from slimformer.errors import ModelError

NEEDED = ("config.json", "generation_config.json", "tokenizer.json")  # beside the files: how to write, and in which words


@dataclass(frozen=True)
class Spent:
    """Seconds of one batch: in the encoder, which runs once, in the decoder, which runs `steps` times, and in all; tokens written."""

    encoder: float
    decoder: float
    whole: float
    steps: int
    written: int


class TextRunner:
    """Gives "text" for each row, and "written": the number of its tokens, the first one left out.

    ModelError if the decoder, the tokenizer or the way to write is not there, or is not one that is known.
    """

    def __init__(
        self,
        path: Path,
        threads: int,
        generation: Mapping[str, Any],
        opening: Callable[[Path, int], Any],
        failed: Callable[[Exception, Path, Mapping[str, np.ndarray]], ModelError],
    ) -> None:
        if not decoder_beside(path).is_file():
            raise ModelError(
                f"{path.name} is half of an encoder-decoder, and {decoder_beside(path).name} does not lie beside it.",
                help="copy both files of the model.",
            )
        self.path, self.failed = path, failed
        self.tokenizer, self.settings = read_tokenizer(path.parent), settings_of(path.parent, generation)
        self.halves = Halves(path, threads, opening)

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return texts_of(self.tokenizer, self._rows(inputs, lambda read: read()))

    def timed(self, inputs: Mapping[str, np.ndarray], clock: Callable[[], float] = time.perf_counter) -> Spent:
        """Writes the texts of a batch once, and tells what each half took; the rest of the whole is the search."""
        spent = {"encoder": 0.0, "decoder": 0.0}
        steps = 0

        def measured(half: str, run: Callable[..., Any], *given: Any) -> Any:
            begin = clock()
            result = run(*given)
            spent[half] += clock() - begin
            return result

        class Watched:
            def __init__(self, speech: Speech) -> None:
                self.speech, self.keep = speech, speech.keep

            def first(self, ids: np.ndarray) -> np.ndarray:
                nonlocal steps
                steps += 1
                return np.asarray(measured("decoder", self.speech.first, ids))

            def next(self, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
                nonlocal steps
                steps += 1
                return np.asarray(measured("decoder", self.speech.next, rows, ids))

        begin = clock()
        rows = self._rows(inputs, lambda read: Watched(measured("encoder", read)))
        return Spent(spent["encoder"], spent["decoder"], clock() - begin, steps, sum(len(row) - 1 for row in rows))

    def _rows(self, inputs: Mapping[str, np.ndarray], reading: Callable[[Callable[[], Speech]], Speech]) -> list[np.ndarray]:
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", np.ones_like(ids))
        try:
            return search(reading(lambda: self.halves.read(ids, mask)), len(ids), self.settings)
        except Exception as error:  # those of ONNX Runtime have no common public type
            raise self.failed(error, self.path, inputs) from error


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
