"""Batches: every row once, padding to the longest of the batch and no further, an order that only (seed, epoch) decide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimformer.data.batching import CHUNK_BATCHES, collate, epoch_order, in_order, rounded, sorted_by_length
from slimformer.tasks.base import Features

LENGTHS = st.lists(st.integers(1, 60), max_size=300)
SIZES = st.integers(1, 40)


@pytest.fixture
def features() -> Features:
    return Features(
        {
            "input_ids": [[5, 6, 7], [8], [9, 10]],
            "token_type_ids": [[0, 0, 1], [1], [0, 1]],
            "labels": [2, 0, 1],
        },
        [0, 1, 2],
        0,
        pad_id=99,
    )


def test_collate_pads_to_the_longest_row_of_the_batch(features: Features) -> None:
    batch = collate(features, [2, 1])
    assert batch["input_ids"].tolist() == [[9, 10], [8, 99]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 1], [1, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}


def test_collate_pads_further_where_that_is_asked_for(features: Features) -> None:
    batch = collate(features, [2, 1], width=4)
    assert batch["input_ids"].tolist() == [[9, 10, 99, 99], [8, 99, 99, 99]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert collate(features, [0], width=2)["input_ids"].tolist() == [[5, 6, 7]]


@pytest.mark.parametrize(
    ("length", "width"), [(1, 4), (4, 4), (5, 8), (64, 64), (65, 72), (128, 128), (129, 144), (490, 496), (499, 499)]
)
def test_widths_are_rounded_up_but_never_beyond_the_longest_row(length: int, width: int) -> None:
    assert rounded(np.array([length, 1, 499]), [1, 0]) == width


def test_collate_keeps_only_the_named_columns(features: Features) -> None:
    assert set(collate(features, [0], {"input_ids", "attention_mask"})) == {"input_ids", "attention_mask"}
    assert set(collate(features, [0], {"labels", "pixel_values"})) == {"labels"}


def test_scores_become_float32_and_missing_labels_stay_missing() -> None:
    scores = Features({"input_ids": [[1], [2]], "labels": [0.5, 3]}, [0, 1], 0, 0)
    batch = collate(scores, [0, 1])
    assert batch["labels"].dtype == np.float32
    assert batch["labels"].tolist() == [0.5, 3.0]
    assert "labels" not in collate(Features({"input_ids": [[1]]}, [0], 0, 0), [0])


def test_a_mask_that_the_task_gives_is_kept() -> None:
    given_mask = Features({"input_ids": [[1, 2]], "attention_mask": [[1, 0]]}, [0], 0, 0)
    assert collate(given_mask, [0])["attention_mask"].tolist() == [[1, 0]]


@given(LENGTHS, SIZES, st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_holds_every_row_once_in_full_batches(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    batches = epoch_order(lengths, size, seed, epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert sum(len(batch) < size for batch in batches) <= 1
    assert batches == epoch_order(np.asarray(lengths, dtype=np.int64), size, seed, epoch)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = list(range(1, 200))
    first = epoch_order(lengths, 4, seed=1, epoch=0)
    np.random.default_rng(3).random()
    np.random.seed(4)
    assert epoch_order(lengths, 4, seed=1, epoch=0) == first
    assert epoch_order(lengths, 4, seed=1, epoch=1) != first
    assert epoch_order(lengths, 4, seed=2, epoch=0) != first
    # (1, 0) and (0, 1) must differ too: a sum of the two would not
    assert epoch_order(lengths, 4, seed=0, epoch=1) != first


def test_length_buckets_leave_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(5, 100, 4000)
    padded = sum(len(batch) * lengths[batch].max() for batch in epoch_order(lengths, 16, 0, 0))
    unsorted = sum(len(batch) * lengths[batch].max() for batch in in_order(4000, 16))
    assert padded < 1.1 * lengths.sum()
    assert unsorted > 1.5 * lengths.sum()


def test_like_lengths_share_a_batch_within_a_chunk() -> None:
    lengths = np.random.default_rng(1).permutation(np.arange(2 * CHUNK_BATCHES))
    spans = sorted((int(lengths[batch].min()), int(lengths[batch].max())) for batch in epoch_order(lengths, 2, 0, 0))
    assert all(high - low == 1 for low, high in spans)  # one chunk of 50 batches of 2: neighbours always meet


@given(LENGTHS, SIZES)
def test_sorted_and_in_order_hold_every_row_once(lengths: list[int], size: int) -> None:
    rows = [row for batch in sorted_by_length(lengths, size) for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths)
    assert [row for batch in in_order(len(lengths), size) for row in batch] == list(range(len(lengths)))


def test_a_batch_of_nothing_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        in_order(3, 0)
