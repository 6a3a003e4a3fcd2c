"""Ranges: hand-worked grids and finders, JSON there and back, and one clear line for data that says nothing."""

from __future__ import annotations

import numpy as np
import pytest

from slimformer.core.ranges import Range, Ranges
from slimformer.errors import DataError, ModelError
from slimformer.quantizing.calibration import Histogram, _divergence, by_entropy, by_percentile, find_range


def test_a_grid_worked_by_hand():
    assert Range(-1.0, 2.0).grid(2) == (1.0, 1)  # -1 0 1 2
    step, zero = Range(-1.0, 3.0).grid(2)  # 4 / 3 a step; 0 lies 0.75 steps up, so the grid moves to begin a whole step below
    assert (step, zero) == (np.float32(4) / np.float32(3), 1)
    assert Range(1.0, 3.0).grid(2) == (1.0, 0)  # 0 is always spanned
    assert Range(-6.0, -3.0).grid(2) == (2.0, 3)
    assert Range(0.0, 1e-30).grid(8) == (np.float32(1e-8), 0)


@pytest.mark.parametrize(
    ("low", "high"), [(0.5, 0.5), (1.0, -1.0), (0.0, float("inf")), (float("nan"), 1.0), (-1e300, 1e300), (0.0, 3e38)]
)
def test_a_range_without_width_is_refused(low, high):
    with pytest.raises(ValueError, match="a range must have a width and finite ends, got"):
        Range(low, high)


def test_ranges_come_back_from_json_exactly():
    ranges = Ranges({"b": Range(-0.1, 1 / 3), "a": Range(0.0, 7.0)}, 4, 6, None, "tensor")
    again = Ranges.from_json(ranges.to_json())
    assert again == ranges
    assert list(again.activations) == ["a", "b"]


@pytest.mark.parametrize("bits", [1, 40, True])
def test_bits_that_no_grid_has_are_refused(bits):
    for name in ("weight_bits", "activation_bits", "embedding_bits"):
        with pytest.raises(ValueError, match=f"{name} must be from 2 to 8, got {bits}"):
            Ranges(**{name: bits})


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        "[]",
        '{"version": 1, "weight_buckets": "column", "activations": {}}',
        pytest.param('{"version": 1, "activations": {"a": [0, 1' + "0" * 400 + "]}}", id="an integer beyond any float"),
        '{"version": 2, "activations": {}}',
        '{"version": 1, "activations": {"a": [1, 1]}}',
        '{"version": 1, "activations": {"a": [1]}}',
        '{"version": 1, "activations": {}, "more": 1}',
        '{"version": 1, "activations": {}, "weight_bits": 40}',
    ],
)
def test_a_broken_file_is_told(text):
    with pytest.raises(ModelError, match=r"ranges\.json cannot be read"):
        Ranges.from_json(text)


def test_data_that_says_nothing_is_told_in_a_line():
    with pytest.raises(DataError, match="there is no calibration data"):
        Histogram.of(np.zeros((0, 4)))
    with pytest.raises(DataError, match=r"calibration data is constant: every value is 0\.5"):
        Histogram.of(np.full((3, 4), 0.5))
    with pytest.raises(DataError, match="no finite numbers"):
        Histogram.of(np.array([0.0, np.nan]))


def test_a_percentile_drops_whole_bins_on_either_side():
    values = np.repeat([0.5, 1.5, 2.5, 3.5], [1, 48, 50, 1])
    histogram = Histogram.of(values, 0.0, 4.0, bins=4)
    assert by_percentile(histogram, 99) == Range(1.0, 3.0)  # one of a hundred may go below, and one above
    assert by_percentile(histogram, 99.5) == Range(0.0, 4.0)
    assert find_range(histogram, "percentile", percentile=100) == find_range(histogram, "min_max") == Range(0.0, 4.0)
    assert by_percentile(histogram, 51) == Range(2.0, 3.0)  # 49 may go on either side, and below just as many can
    assert by_percentile(Histogram.of(np.array([0.0] * 999 + [1.0]), bins=10), 99) == Range(0.0, 0.1)
    with pytest.raises(ValueError, match="percentile must be above 50 and at most 100, got 0"):
        by_percentile(histogram, 0)


def test_the_divergence_worked_by_hand():
    counts = np.array([2.0, 4.0, 3.0, 3.0, 4.0])
    wanted = np.array([2, 4, 3, 7]) / 16  # the last takes the outlier
    coarse = np.array([3, 3, 3, 3]) / 12  # two levels of two bins each, each level's mean
    assert _divergence(counts, 4, 2) == pytest.approx(float((wanted * np.log(wanted / coarse)).sum()))
    uneven = 3 / 8 * np.log(3 / 2) + 1 / 8 * np.log(1 / 2)  # levels of one bin and of two: 4 | 2, 2
    assert _divergence(np.array([4.0, 3.0, 1.0]), 3, 2) == pytest.approx(uneven)
    assert _divergence(np.array([4.0, 3.0, 0.0]), 3, 2) == 0.0  # a bin without values takes none of its level's
    assert _divergence(np.array([5.0, 0.0, 3.0]), 3, 3) == 0.0  # as many levels as bins
    assert _divergence(np.array([5.0, 0.0, 3.0]), 2, 2) == np.inf  # outliers where the coarse one has nothing


@pytest.mark.parametrize("bits", [3, 4])
def test_the_threshold_is_that_of_the_least_divergence_on_half_the_levels(bits):
    counts = np.floor(1000 * np.exp(-np.arange(64) / 9)) + (np.arange(64) == 63)
    histogram, half = Histogram(counts, np.linspace(0.0, 6.4, 65)), 2 ** (bits - 1)
    best = min(range(half, 65), key=lambda size: _divergence(counts, size, half))
    assert half < best < 64
    assert find_range(histogram, "entropy", bits=bits) == Range(0.0, float(histogram.edges[best]))


def test_entropy_drops_a_few_far_values_and_keeps_a_short_side():
    rng = np.random.default_rng(0)
    found = by_entropy(Histogram.of(np.append(np.abs(rng.normal(size=50_000)) - 0.17, [60.0, -0.2])))
    assert 2 < found.high < 10
    assert found.low == -0.2
    for draw, low, high in ((rng.standard_t(4, 50_000), -33.0, 42.0), (rng.laplace(size=50_000), -9.0, 9.0)):
        values = np.clip(draw, low, high)
        sizes, edges = np.histogram(np.abs(values), bins=1024, range=(0, high))
        best = min(range(128, 1025), key=lambda size: _divergence(sizes, size, 128))
        clipped = by_entropy(Histogram.of(np.append(values, [low, high])))
        assert clipped.high == pytest.approx(edges[best], rel=0.25)
    flat = by_entropy(Histogram.of(rng.uniform(-1, 1, 50_000)))
    assert flat.high > 0.95
    assert flat.low < -0.95
