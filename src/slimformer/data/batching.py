"""Cuts encoded rows into batches: which rows go together, and the padded arrays of one batch.

Rows of like length share a batch, so that little is computed on padding. The order of an epoch is a pure function of (seed, epoch),
so that a killed run goes on with the batches it would have had. Numpy only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from slimformer.tasks.base import IGNORED, Features

CHUNK_BATCHES = 50  # in a sorted chunk: padding is near its minimum from about 20, and batches still mix well at 50


def least_width(lengths: np.ndarray, rows: Sequence[int], precision: str) -> int:
    """The least width of a batch of these rows: rounded up in half precision, 0 in "fp32", whose kernels take any width."""
    return 0 if precision == "fp32" else rounded(lengths, rows)


def rounded(lengths: np.ndarray, rows: Sequence[int]) -> int:
    """The width of a batch of these rows in half precision, rounded up, but no wider than the longest row of all.

    It is a multiple of 4 up to 64 tokens, of 8 up to 128, else of 16. Half-precision kernels are built anew for each shape, and a cut
    model has many shapes: docs/decisions/0003-training-loop.md.
    """
    longest = int(lengths[list(rows)].max())
    step = 4 if longest <= 64 else 8 if longest <= 128 else 16
    return min(-(-longest // step) * step, int(lengths.max()))


def collate(
    features: Features, rows: Sequence[int], names: Collection[str] | None = None, *, width: int = 0
) -> dict[str, np.ndarray]:
    """The rows as one batch: token columns (batch, longest of the batch, at least `width`) int64, others (batch,) int64 or float32.

    Tuples have one length, however many tokens their rows have: (batch, that length) int64. `names` keeps only those columns; None
    keeps all. The attention mask is made here: 1 on tokens and 0 on padding. A label for each token is `IGNORED` on padding.

    Where a text is to be written (`decoder_input_ids`), its columns and labels have a length of their own: that of the longest.
    """
    lengths = [len(features.columns["input_ids"][row]) for row in rows]
    width = max([width, *lengths])
    fills = {"input_ids": features.pad_id, "decoder_input_ids": features.pad_id, "labels": IGNORED}
    written = ("decoder_input_ids", "labels") if "decoder_input_ids" in features.columns else ()
    columns = [*features.columns, "attention_mask"] if "attention_mask" not in features.columns else list(features.columns)
    batch = {}
    for name in columns:
        if names is not None and name not in names:
            continue
        if name not in features.columns:  # the mask
            batch[name] = (np.arange(width) < np.asarray(lengths, dtype=np.int64)[:, None]).astype(np.int64)  # (batch, seq)
            continue
        values = [features.columns[name][row] for row in rows]
        if values and isinstance(values[0], tuple):
            batch[name] = np.asarray(values, dtype=np.int64)
        elif values and isinstance(values[0], (list, np.ndarray)):
            wide = max(map(len, values)) if name in written else width
            batch[name] = _padded(values, wide, fills.get(name, 0))
        else:
            integers = all(isinstance(value, (int, np.integer)) for value in values)
            batch[name] = np.asarray(values, dtype=np.int64 if integers else np.float32)  # (batch,)
    return batch


def _padded(rows: Sequence[Sequence[Any]], width: int, fill: int) -> np.ndarray:
    out = np.full((len(rows), width), fill, dtype=np.int64)  # (batch, seq)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out


def epoch_order(
    lengths: np.ndarray | Sequence[int], batch_size: int, seed: int, epoch: int, groups: Sequence[int] | None = None
) -> list[list[int]]:
    """Batches of one epoch: each row exactly once, like lengths together, in an order fixed by (seed, epoch) alone.

    Rows are shuffled, sorted by length within chunks of 50 batches, cut, and the batches shuffled. The order is not a
    function of any global generator. Rows of one of `groups` stay side by side: only where a batch ends they part. Groups are then
    what is shuffled, and sorted by their mean length.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    if groups is not None:
        return _grouped_order(sizes, batch_size, generator, groups)
    shuffled = generator.permutation(len(sizes))
    batches: list[list[int]] = []
    for start in range(0, len(shuffled), batch_size * CHUNK_BATCHES):
        chunk = shuffled[start : start + batch_size * CHUNK_BATCHES]
        chunk = chunk[np.argsort(sizes[chunk], kind="stable")]
        batches.extend(_cut(chunk.tolist(), batch_size))
    return [batches[index] for index in generator.permutation(len(batches))]


def _grouped_order(
    sizes: np.ndarray, batch_size: int, generator: np.random.Generator, groups: Sequence[int]
) -> list[list[int]]:
    rows_of: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        rows_of.setdefault(int(group), []).append(row)
    units = list(rows_of.values())
    shuffled = [units[index] for index in generator.permutation(len(units))]
    starts = np.cumsum([0, *map(len, shuffled)])[:-1] // (batch_size * CHUNK_BATCHES)  # the chunk of each unit
    means = np.asarray([sizes[rows].mean() for rows in shuffled])
    order = [row for index in np.lexsort((means, starts)) for row in shuffled[index]]
    batches = _cut(order, batch_size)
    return [batches[index] for index in generator.permutation(len(batches))]


def in_order(n: int, batch_size: int) -> list[list[int]]:
    """Batches of rows 0..n-1 as they come: what a serving machine sees."""
    return _cut(list(range(n)), batch_size)


def sorted_by_length(lengths: np.ndarray | Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of rows from the shortest to the longest: the least padding there can be."""
    return _cut(np.argsort(np.asarray(lengths, dtype=np.int64), kind="stable").tolist(), batch_size)


def _cut(rows: list[int], batch_size: int) -> list[list[int]]:
    if batch_size < 1:
        raise ValueError(f"a batch holds at least one row, not {batch_size}")
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
