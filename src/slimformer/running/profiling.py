"""Opens a model and what is to stand beside it, and profiles them: `slimformer inspect --profile`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from slimformer.data.batching import collate, sorted_by_length
from slimformer.data.material import read_texts, spaced_rows
from slimformer.data.tokenizer import cutting, load_tokenizer, pad_id_of
from slimformer.errors import DataError, ModelError
from slimformer.families.base import Subject, subject_of
from slimformer.measuring.machine import cores
from slimformer.measuring.profile import Profiled, Texts, profile_all
from slimformer.measuring.reach import Read
from slimformer.saving import checkpoint
from slimformer.saving.hub import local_folder
from slimformer.tasks.base import Features

MOST_READ = 64  # texts of a file, evenly spaced: as many are run ten times, one by one
_LINES = 100_000  # of a file


def profile_model(
    model: str | Path,
    others: Sequence[str | Path] = (),
    *,
    lengths: Sequence[int] = (128,),
    batches: Sequence[int] = (1, 32),
    threads: int | None = None,
    rounds: int = 5,
    texts: Path | None = None,
) -> Profiled:
    """Measures where time and bytes of a model go, by component and layer.

    Args:
        model: A folder with a model, or its id on the hub.
        others: .onnx files of the model, and folders of compressed ones, to profile beside it.
        lengths: Tokens of each text, or how many it has at most.
        batches: Texts of a run.
        threads: Threads of each run; all cores by default.
        rounds: Runs that are watched, and as many that are not; the fastest of each count.
        texts: A file with a text on each line, or two with a tab between them. Without it words are random.

    Returns:
        What the model holds and computes by place, and the profiles.

    Raises:
        ModelError: A model is none of a known family, has no positions for so many tokens, or is an encoder-decoder; or a file is no
            .onnx file of the model.
        DataError: There are no texts in the file.
    """
    folder = local_folder(model)
    name = folder.resolve().name
    beside: dict[str, Subject | Path] = {}
    folders = {name: folder}
    for item in map(Path, others):
        called = next(other for other in _names(item) if other != name and other not in beside)
        if item.is_file() and item.suffix != ".onnx":
            raise ModelError(f"{item} is no .onnx file and no folder.", help="name .onnx files, or folders with a model.")
        if not item.is_file():
            folders[called] = local_folder(item)
        beside[called] = item if item.is_file() else subject_of(checkpoint.load(folders[called]))
    loads = [Texts(batch, length) for length in lengths for batch in batches]
    if texts is not None:
        count = len(encode_lines(texts, folder, max(lengths)))
        loads = list(dict.fromkeys(Texts(min(load.batch, count), load.length, own=True) for load in loads))

    def given(called: str, load: Texts) -> list[Read]:
        assert texts is not None
        return _batches(encode_lines(texts, folders[called], load.length), load.batch)

    subject = subject_of(checkpoint.load(folder))
    return profile_all(
        subject, name, beside, loads, threads=threads or cores(), rounds=rounds, given=None if texts is None else given
    )


def encode_lines(file: Path, folder: Path, length: int) -> Features:
    """At most `MOST_READ` rows of a file with a text, or two with a tab between them, on each line, as a model's tokenizer cuts them.

    DataError if there are none.
    """
    tokenizer = load_tokenizer(folder)
    lines = [tuple(line.split("\t", 1)) for line in islice(read_texts(file), _LINES)]
    if not lines:
        raise DataError(f"there are no texts in {file}.", help="name a UTF-8 file with one text on each line.")
    place = spaced_rows(Features({"lines": lines}, range(len(lines)), 0, 0), MOST_READ).columns["lines"]
    with cutting(tokenizer, length):
        rows = [tokenizer.encode(*line) for line in place]
    columns = {"input_ids": [row.ids for row in rows], "token_type_ids": [row.type_ids for row in rows]}
    return Features(columns, range(len(rows)), 0, pad_id_of(tokenizer))


def _batches(features: Features, size: int) -> list[Read]:
    """Whole batches from the shortest texts to the longest; what is left over of them is not read."""
    parts = [rows for rows in sorted_by_length(features.lengths(), size) if len(rows) == size]
    return [{name: torch.from_numpy(array) for name, array in collate(features, rows).items()} for rows in parts]


def _names(item: Path) -> list[str]:
    """Names for a file or folder, the short one first."""
    whole = item.resolve()
    return [whole.stem, f"{whole.parent.name}/{whole.stem}", str(whole)]
