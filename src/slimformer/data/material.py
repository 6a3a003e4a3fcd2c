"""The data of a run: every split read and encoded once, and parts of them."""

from __future__ import annotations

import os.path
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from slimformer.data.batching import collate
from slimformer.data.tokenizer import cutting, load_target_tokenizer, load_tokenizer, max_length_of, pad_id_of
from slimformer.digests import Content, digest, digest_all
from slimformer.errors import DataError
from slimformer.tasks.base import Example, Features, Split, Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer


INPUTS = ("input_ids", "attention_mask", "token_type_ids")
LINES = 1000  # this many lines of a text file are encoded at a time
TIMED = 640  # rows that a file is timed on before its delivery
SAMPLE = 500  # training examples; their mean length is within a few per cent of the mean over all


@dataclass(frozen=True)
class Material:
    """The data of a run: read and encoded once, with the tokenizer of `source`."""

    task: Task
    source: Path
    max_length: int
    examples: Mapping[Split, Sequence[Example]]
    features: Mapping[Split, Features]

    @cached_property
    def digest(self) -> str:
        """Names all that training and choosing look at: rows and examples of the training and the validation split, not of dev."""
        splits = (Split.TRAIN, Split.VALIDATION)
        examples = repr([list(self.examples[split]) for split in splits])
        return digest(examples, *(features_digest(self.features[split]) for split in splits))

    def batches(self, model_inputs: Sequence[str], split: Split = Split.TRAIN) -> list[dict[str, np.ndarray]]:
        """Real inputs of several shapes for export: one example alone, then batches of eight of different lengths."""
        features = self.features[split]
        order = np.argsort(features.lengths(), kind="stable")
        picks = order[np.linspace(0, len(order) - 1, min(len(order), 300)).astype(int)]
        groups = [[int(picks[len(picks) // 2])], *([int(row) for row in picks[start::38]] for start in range(38))]
        return [collate(features, group, model_inputs) for group in groups if group]


def features_digest(features: Features, names: Iterable[str] | None = None) -> str:
    """Twelve hexadecimal digits that name these rows, or the columns `names` of them."""

    def parts() -> Iterator[Content]:
        for name in sorted(features.columns if names is None else set(names) & set(features.columns)):
            values = features.columns[name]
            yield name
            if len(values) and isinstance(values[0], (list, tuple, np.ndarray)):
                lengths = np.fromiter((len(value) for value in values), dtype=np.int64, count=len(values))
                yield lengths.data
                yield np.fromiter(chain.from_iterable(values), dtype=np.int64, count=int(lengths.sum())).data
            else:
                yield np.asarray(values).tobytes()

    return digest_all(parts())


def unlabelled(features: Features) -> Features:
    """The same rows with nothing but what a model reads."""
    return replace(features, columns={name: column for name, column in features.columns.items() if name in INPUTS})


def check_text(file: Path) -> None:
    """DataError where a file of texts cannot be read or holds none."""
    if next(read_texts(file), None) is None:
        raise DataError(f"{file} holds no text.", help="put one text on each line.")


def encode_text(file: Path, tokenizer: Tokenizer, max_length: int) -> Features:
    """A row of token ids for each line of a file that is not blank, without labels; what exceeds `max_length` is left out."""
    rows: list[np.ndarray] = []
    truncated = 0
    lines = read_texts(file)
    with cutting(tokenizer, max_length):
        while some := list(islice(lines, LINES)):
            for row in tokenizer.encode_batch_fast(some):
                rows.append(np.asarray(row.ids, dtype=np.int32))  # a list of numbers would be ten times the size
                truncated += bool(row.overflowing)
    return Features({"input_ids": rows}, range(len(rows)), truncated, pad_id_of(tokenizer))


def read_texts(file: Path) -> Iterator[str]:
    """The lines of a file that are not blank; DataError if it cannot be read."""
    try:
        if os.path.exists(file) and not os.path.isfile(file):
            raise ValueError("it is no ordinary file")
        with open(file, encoding="utf-8") as stream:
            for line in stream:
                if line.strip():
                    yield line.strip()
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read the text {file}: {error}.", help="name a UTF-8 file with one text on each line."
        ) from None


def encode_rows(task: Task, examples: Sequence[Example], source: Path, max_length: int) -> Features:
    """Examples as rows of tokens of the model in `source`, whose written texts may have a tokenizer of their own."""
    tokenizer, writer = load_tokenizer(source), load_target_tokenizer(source) if task.stand_in else None
    if writer is None:
        return task.encode(examples, tokenizer, max_length)
    rows: Features = cast(Any, task).encode(examples, tokenizer, max_length, writer)
    return rows


def prepare(task: Task, source: Path) -> Material:
    """Reads and encodes all splits of a task that is bound to its model's labels."""
    max_length = min(task.max_length, max_length_of(source))
    examples = {split: task.split(split) for split in Split}
    features = {split: encode_rows(task, examples[split], source, max_length) for split in Split}
    return Material(task, source, max_length, examples, features)


def sampled_rows(task: Task, source: Path) -> Features:
    """The rows that some of the training examples give, evenly spaced; encoding them all would take long."""
    examples = task.split(Split.TRAIN)
    some = examples[:: max(1, len(examples) // SAMPLE)]
    return encode_rows(task, some, source, min(task.max_length, max_length_of(source)))


def spaced_rows(features: Features, limit: int) -> Features:
    """At most `limit` rows, always the same ones, evenly spaced over all."""
    if len(features) <= limit:
        return features
    rows = np.linspace(0, len(features) - 1, limit).round().astype(int)
    return replace(
        features,
        columns={name: [column[row] for row in rows] for name, column in features.columns.items()},
        example=[features.example[row] for row in rows],
    )


def subset(material: Material, split: Split, limit: int) -> tuple[Features, Sequence[Example]]:
    """At most `limit` examples of a split with all their rows, always the same ones, evenly spaced."""
    examples, features = material.examples[split], material.features[split]
    if len(examples) <= limit:
        return features, examples
    chosen = np.linspace(0, len(examples) - 1, limit).round().astype(int)
    place = {int(example): new for new, example in enumerate(chosen)}
    rows = [row for row, example in enumerate(features.example) if example in place]
    smaller = Features(
        columns={name: [column[row] for row in rows] for name, column in features.columns.items()},
        example=[place[features.example[row]] for row in rows],
        truncated=features.truncated,
        pad_id=features.pad_id,
    )
    return smaller, [examples[int(index)] for index in chosen]


def timed_rows(material: Material) -> Features:
    """The rows that a file is timed on before it is delivered: of the dev split, because that is what speeds are told of.

    Texts of the training file may be of other lengths, as the phrases of SST-2 are, and a speed depends on these: there a model that is
    4.0 times as fast on held phrases is so 3.6 times on sentences. Nothing but the lengths of dev is looked at here.
    """
    return subset(material, Split.DEV, TIMED)[0]
