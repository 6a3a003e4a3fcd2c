"""Calibration: runs the float graph on real batches, keeps a sample of each product's input, and finds its range.

Only real tokens count, padding does not. The ways to find a range, but for the least squared error, are in `quantizing.calibration`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import onnx_ir

from slimformer.core.ranges import Range
from slimformer.errors import ExportError
from slimformer.exporters._onnx import int8
from slimformer.exporters._onnx.graph import turned_values
from slimformer.exporters._onnx.int8 import Sample
from slimformer.exporters._onnx.parity import fill_inputs, real_tokens
from slimformer.exporters._onnx.storing import ONE_FILE_BYTES, open_graph
from slimformer.exporters.base import Arrays
from slimformer.quantizing.calibration import Calibration, Histogram, find_range

CALIBRATION_ROWS = 300  # rows that are run; more change little
SAMPLE_ROWS = 2048  # tokens that are kept of each activation
ERROR_BINS = 1024  # of the histogram on which the squared error of a range is measured


def samples(
    program: onnx_ir.Model, batches: Sequence[Arrays], names: Sequence[str], one_file_bytes: int = ONE_FILE_BYTES
) -> dict[str, Sample]:
    """Samples of the input of each quantizable product, by its name, on the first CALIBRATION_ROWS rows of the batches.

    A graph without products, all layers of which are cut, has none. ExportError if no batch holds a real token.
    """
    copy = program.clone()
    watched = int8.quantizable_inputs(copy.graph)
    if not watched:
        return {}  # to run a session for no outputs is to run it for all
    copy.graph.outputs.extend(value for value in watched.values() if not value.is_graph_output())
    session = open_graph(copy, one_file_bytes)
    turned = {str(value.name) for value in turned_values(copy.graph)}

    def run(batch: Arrays) -> Iterator[tuple[str, np.ndarray]]:
        real = real_tokens(batch)  # (batch, seq)
        for name, value in zip(watched, session.run(list(watched), fill_inputs(names, batch)), strict=True):
            yield name, _unpadded(value, real.T if name in turned else real)

    return gather(batches, run)


def gather(batches: Sequence[Arrays], run: Callable[[Arrays], Iterable[tuple[str, np.ndarray]]]) -> dict[str, Sample]:
    """Samples of what `run` gives for each batch: names with rows for real tokens, (tokens, width)."""
    chosen: list[Arrays] = []
    for batch in (item for item in batches if real_tokens(item).any()):
        if sum(len(item["input_ids"]) for item in chosen) < CALIBRATION_ROWS:
            chosen.append(batch)
    if not chosen:
        raise ExportError("the calibration data is empty: no batch holds a real token.", help="give export() some real inputs.")
    share = -(-SAMPLE_ROWS // len(chosen))
    rows: dict[str, list[np.ndarray]] = {}
    ends: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for batch in chosen:
        for name, flat in run(batch):
            rows.setdefault(name, []).append(flat[:: max(1, len(flat) // share)].copy())
            ends.setdefault(name, []).append((flat.min(axis=0), flat.max(axis=0)))
    return {
        name: Sample(
            np.concatenate(rows[name]),
            np.min([low for low, _ in ends[name]], axis=0),
            np.max([high for _, high in ends[name]], axis=0),
        )
        for name in rows
    }


def _unpadded(value: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Rows of an activation that stand for real tokens: (tokens, width); `real` has the order of the activation's first two axes."""
    if value.ndim > 2 and value.shape[:2] == real.shape:
        return np.asarray(value[real]).reshape(-1, value.shape[-1])
    return value.reshape(-1, value.shape[-1])  # first tokens only


def range_of(sample: Sample, calibration: Calibration, percentile: float) -> Range:
    """The range that a way of calibration picks for an activation; a constant activation gets a range of its own."""
    low, high = min(0.0, float(sample.low.min())), max(0.0, float(sample.high.max()))
    if low == high or calibration == "least_squares":
        return Range(*best_range(sample))
    return find_range(Histogram.of(sample.rows, low, high), calibration, percentile=percentile)


def best_range(sample: Sample, steps: int = 255) -> tuple[float, float]:
    """The range around 0, within the extremes of a sample, whose `steps` steps store it with the least squared error.

    Clipping a few outliers costs less than coarse steps for all the rest.
    """
    low, high = min(0.0, float(sample.low.min())), max(0.0, float(sample.high.max()))
    if low == high:
        return low, low + 1.0
    counts, edges = np.histogram(sample.rows, bins=ERROR_BINS, range=(low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    best = (np.inf, low, high)
    for bottom in low * np.linspace(1.0, 0.1, 19):
        for top in high * np.linspace(1.0, 0.1, 19):
            clipped = np.clip(centres, bottom, top)
            rounding = ((top - bottom) / steps) ** 2 / 12
            error = float((counts * ((centres - clipped) ** 2 + np.where(clipped == centres, rounding, 0.0))).sum())
            best = min(best, (error, float(bottom), float(top)))
    return best[1], best[2]
