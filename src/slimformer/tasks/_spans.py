"""Numpy's part of question answering: windows as rows of ids and labels, and the best spans of their logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from slimformer.data.squad import Answer
from slimformer.tasks.base import Example, Features, Outputs

if TYPE_CHECKING:
    from tokenizers import Encoding

SPAN_OUTPUTS = ("start_logits", "end_logits")


def add_window(columns: Mapping[str, list[Any]], window: Encoding, answer: Answer) -> None:
    """Appends one window: ids, the place of each token in the context (-1 if it is not of the context), and its labels."""
    offsets = np.asarray(window.offsets, dtype=np.int32).reshape(-1, 2)  # (tokens, 2)
    inside = np.asarray([part == 1 for part in window.sequence_ids], dtype=bool) & (offsets[:, 1] > offsets[:, 0])
    columns["input_ids"].append(np.asarray(window.ids, dtype=np.int32))
    columns["token_type_ids"].append(np.asarray(window.type_ids, dtype=np.int32))
    starts, ends = (np.where(inside, offsets[:, side], -1) for side in (0, 1))
    columns["char_start"].append(starts)
    columns["char_end"].append(ends)
    columns["labels"].append(_labels(starts, ends, answer))


def _labels(starts: np.ndarray, ends: np.ndarray, answer: Answer) -> tuple[int, int]:
    """First and last token of the answer; twice the first token of the window if it does not hold the whole answer."""
    tokens = np.flatnonzero(starts >= 0)
    if answer.start is None or not len(tokens):
        return 0, 0
    begin, end = answer.start, answer.start + len(answer.texts[0])
    if begin < starts[tokens[0]] or end > ends[tokens[-1]]:
        return 0, 0
    first = tokens[np.searchsorted(ends[tokens], begin, side="right")]
    last = tokens[np.searchsorted(starts[tokens], end, side="left") - 1]
    return (int(first), int(last)) if first <= last else (0, 0)


def span_texts(
    outputs: Outputs, features: Features, examples: Sequence[Example], max_answer: int
) -> tuple[list[str], np.ndarray]:
    """Text of the best span of each example, and by how much its "no answer" is better: (examples,), inf without a span."""
    starts, ends = (np.asarray(outputs[name]) for name in SPAN_OUTPUTS)  # (rows, seq)
    values, firsts, lasts = best_spans(starts, ends, _inside(features, starts.shape[1]), max_answer)
    with np.errstate(invalid="ignore", over="ignore"):
        empty = np.nan_to_num(starts[:, 0].astype(np.float64) + ends[:, 0], nan=np.inf)  # (rows,)
    owners = np.asarray(features.example, dtype=np.int64)
    none = np.full(len(examples), np.inf)
    np.minimum.at(none, owners, empty)
    texts, margins = [""] * len(examples), np.full(len(examples), np.inf)
    for row in np.lexsort((np.arange(len(owners)), -values, owners))[::-1]:  # the best row of each example comes last
        owner = int(owners[row])
        if values[row] == -np.inf:
            continue
        begin, end = features.columns["char_start"][row][firsts[row]], features.columns["char_end"][row][lasts[row]]
        texts[owner] = examples[owner].texts[1][int(begin) : int(end)].strip()
        margins[owner] = none[owner] - values[row]
    return texts, margins


def _inside(features: Features, width: int) -> np.ndarray:
    """Which positions of each row are tokens of the context: (rows, width)."""
    found = np.zeros((len(features), width), dtype=bool)
    for row, starts in enumerate(features.columns["char_start"]):
        found[row, : len(starts)] = np.asarray(starts) >= 0
    return found


def best_spans(
    starts: np.ndarray, ends: np.ndarray, inside: np.ndarray, max_answer: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, first and last token of the best span of each row, of at most `max_answer` tokens, all inside: (rows,) each.

    Of equal ones the shortest, then the leftmost. A row without any has the value -inf.
    """
    # padding may hold the smallest float, and two of those added would overflow
    starts, ends = (np.where(inside & np.isfinite(logits), logits, -np.inf) for logits in (starts, ends))
    rows = np.arange(len(starts))
    values = np.full(len(starts), -np.inf)
    firsts, lasts = np.zeros(len(starts), dtype=np.int64), np.zeros(len(starts), dtype=np.int64)
    for further in range(min(max_answer, starts.shape[1]) if len(starts) else 0):
        sums = starts[:, : starts.shape[1] - further] + ends[:, further:]
        places = sums.argmax(axis=1)
        found = sums[rows, places]
        better = found > values
        values[better], firsts[better], lasts[better] = found[better], places[better], places[better] + further
    return values, firsts, lasts


def best_threshold(margins: np.ndarray, if_answered: np.ndarray, if_not: np.ndarray) -> float:
    """The margin above which "no answer" is to be given, so that the credits add up to the most: (examples,) each.

    Halfway between the two examples that it has to tell apart; of equally good ones the nearest to 0.
    """
    if not len(margins):
        return 0.0
    order = np.argsort(margins, kind="stable")
    sorted_margins = margins[order]
    gains = np.concatenate([[0.0], np.cumsum((if_answered - if_not)[order])])  # gains[n]: the n lowest margins are answered
    finite = sorted_margins[np.isfinite(sorted_margins)]
    if not len(finite):
        return 0.0
    below = np.concatenate([[finite[0] - 2.0], sorted_margins])
    above = np.concatenate([sorted_margins, [finite[-1] + 2.0]])
    above = np.where(np.isfinite(above), above, finite[-1] + 2.0)
    possible = (below < above) & np.isfinite(below)
    best = gains[possible].max()
    good = possible & (gains >= best - 1e-9)
    middles = np.where((below + above) / 2 < above, (below + above) / 2, below)[good]
    return float(middles[np.abs(middles).argmin()])
