"""Calibration: finds the range that a sample of activations asks for.

Finders: the extremes; a percentile; the least Kullback-Leibler divergence, as TensorRT describes (Migacz, 8-bit
Inference with TensorRT, GTC 2017). numpy alone; the ranges themselves are in `core/ranges.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from slimformer.core.ranges import Range
from slimformer.errors import DataError, nearest

Finder = Literal["min_max", "percentile", "entropy"]
Calibration = Literal["least_squares", "min_max", "percentile", "entropy"]  # of a file; `exporters/onnx.py` has the first
HISTOGRAM_BINS = 2048  # as TensorRT
TABLE_ROWS = 64  # a shorter embedding table stays in float: there is nothing to win


def check_percentile(percentile: float) -> None:
    """ValueError unless a percentile leaves something between its two ends."""
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile must be above 50 and at most 100, got {percentile:g}")


def check_calibration(calibration: str) -> None:
    """ValueError, with the nearest name, unless there is such a way to find a range."""
    if calibration not in get_args(Calibration):
        raise ValueError(f"calibration: there is no '{calibration}'; {nearest(str(calibration), get_args(Calibration))}")


# -- Finding a range -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Histogram:
    """Counts of values between edges of one width; the first and last edge are the extremes."""

    counts: np.ndarray  # (bins,)
    edges: np.ndarray  # (bins + 1,)

    @staticmethod
    def of(values: np.ndarray, low: float | None = None, high: float | None = None, bins: int = HISTOGRAM_BINS) -> Histogram:
        """Of values between `low` and `high`, by default their extremes; DataError if they say nothing about a range."""
        if values.size == 0:
            raise DataError("there is no calibration data: no value was seen.", help="give some real inputs.")
        if not np.isfinite(values).all():
            raise DataError("the calibration data holds values that are no finite numbers.", help="check the model's outputs.")
        low = float(values.min()) if low is None else low
        high = float(values.max()) if high is None else high
        if not low < high:
            raise DataError(
                f"the calibration data is constant: every value is {low:g}, and a range needs a width.",
                help="give inputs that differ.",
            )
        counts, edges = np.histogram(values, bins=bins, range=(low, high))
        return Histogram(counts, edges)


def find_range(histogram: Histogram, how: Finder, *, percentile: float = 99.99, bits: int = 8) -> Range:
    """The range that a finder picks; always with a width, never beyond the extremes."""
    if how == "min_max":
        return Range(float(histogram.edges[0]), float(histogram.edges[-1]))
    return by_percentile(histogram, percentile) if how == "percentile" else by_entropy(histogram, bits)


def by_percentile(histogram: Histogram, percentile: float) -> Range:
    """The shortest run of bins that leaves at most 100 - percentile per cent of the values out on either side."""
    check_percentile(percentile)
    out = (1 - percentile / 100) * histogram.counts.sum() + 1e-9
    below, above = histogram.counts.cumsum(), histogram.counts[::-1].cumsum()
    first = int((below <= out).sum())  # bins that go whole
    last = len(below) - int((above <= out).sum())
    return Range(float(histogram.edges[first]), float(histogram.edges[max(last, first + 1)]))


def by_entropy(histogram: Histogram, bits: int = 8) -> Range:
    """TensorRT's threshold on magnitudes; the range is the part of [-threshold, threshold] that values reach.

    Of all thresholds the one whose clipped distribution is closest to the same on 2^(bits-1) levels. Ours differs in that
    a range that values do not fill stays narrow: a GELU's output keeps its -0.17.
    """
    low, high = float(histogram.edges[0]), float(histogram.edges[-1])
    counts, edges = _magnitudes(histogram)
    levels = 2 ** (bits - 1)
    best, width = math.inf, len(counts)
    for size in range(min(levels, len(counts)), len(counts) + 1):
        divergence = _divergence(counts, size, levels)
        if divergence < best:
            best, width = divergence, size
    threshold = float(edges[width])
    low, high = max(low, -threshold), min(high, threshold)
    return Range(low, high) if low < high else Range(float(histogram.edges[0]), float(histogram.edges[-1]))


def _magnitudes(histogram: Histogram) -> tuple[np.ndarray, np.ndarray]:
    """Counts of |values| in bins about as wide, and their edges; each old bin is spread evenly over the bins that it overlaps.

    (Its centre alone would fall into one bin and leave its neighbour empty wherever the two sets of edges do not agree.)
    """
    top = max(-float(histogram.edges[0]), float(histogram.edges[-1]))
    width = float(histogram.edges[-1] - histogram.edges[0]) / len(histogram.counts)
    edges = np.linspace(0.0, top, max(1, round(top / width)) + 1)
    below = np.concatenate([[0.0], histogram.counts.cumsum()])  # at each edge of the histogram
    within = np.interp(edges, histogram.edges, below) - np.interp(-edges, histogram.edges, below)
    counts = np.diff(within)
    return np.where(counts > 1e-6, counts, 0.0), edges


def _divergence(counts: np.ndarray, size: int, levels: int) -> float:
    """KL divergence of the first `size` bins, outliers in the last of them, from the same on `levels` levels."""
    inside = counts[:size].astype(np.float64)
    wanted = inside.copy()
    wanted[-1] += counts[size:].sum()
    starts = np.arange(levels) * size // levels
    level = np.repeat(np.arange(levels), np.diff(np.append(starts, size)))  # of each bin
    filled = inside > 0
    sums = np.bincount(level, weights=inside, minlength=levels)
    bins = np.bincount(level, weights=filled, minlength=levels)
    coarse = np.where(filled, sums[level] / np.maximum(bins[level], 1), 0.0)
    seen = wanted > 0
    if coarse.sum() == 0 or (coarse[seen] == 0).any():
        return math.inf
    p, q = wanted / wanted.sum(), coarse / coarse.sum()
    return float((p[seen] * np.log(p[seen] / q[seen])).sum())
