"""Scores models side by side on the same examples, with paired intervals, and makes the records of a comparison.

Two models are compared example by example, by a paired bootstrap, because that interval is far narrower than two separate ones.
Exported files are scored with neither torch nor transformers installed. Nothing here trains, cuts or draws.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slimformer.data.batching import collate, sorted_by_length
from slimformer.errors import RecipeError
from slimformer.measuring.machine import Load, environment, quiet
from slimformer.measuring.records import Interval, Record, Standing, today
from slimformer.measuring.timing import Engine, Timing, compare, model_inputs, ratio, workloads
from slimformer.runtimes.base import Runner
from slimformer.tasks.base import Example, Features, Outputs, Split, Task

METRIC_ROUNDS = 500  # resamples of a metric that is no mean over examples: each is a call of the task's score, some ms


def evaluate(runner: Runner, features: Features, batch_size: int = 32) -> Outputs:
    """A runner's outputs on all features, in their own order: output name -> (features, ...).

    Batches are sorted by length. An output that has an axis of tokens is filled up to the longest row with the smallest finite
    value, so that a maximum or a softmax never lands on padding.
    """
    names = model_inputs(features)
    parts: list[tuple[Sequence[int], dict[str, np.ndarray]]] = [
        (rows, runner(collate(features, rows, names))) for rows in sorted_by_length(features.lengths(), batch_size)
    ]
    whole: dict[str, np.ndarray] = {}
    for name in parts[0][1] if parts else ():
        arrays = [outputs[name] for _, outputs in parts]
        shape = tuple(max(sizes) for sizes in zip(*(array.shape[1:] for array in arrays), strict=True))
        kind = arrays[0].dtype
        lowest = np.finfo(kind).min if np.issubdtype(kind, np.floating) else np.iinfo(kind).min
        full = np.full((len(features), *shape), lowest, dtype=kind)
        for (rows, _), array in zip(parts, arrays, strict=True):
            for row, values in zip(rows, array, strict=True):
                full[row][tuple(slice(size) for size in values.shape)] = values
        whole[name] = full
    return whole


@dataclass(frozen=True)
class Entry:
    """One model in a comparison: how it is run, on which rows, and what is known of it already.

    `facts` are fields of `report.Record` by name: params, encoder_params, macs, minutes, peak_rss_bytes, plan, recipe, ...
    """

    name: str
    role: str  # report.Role
    precision: str  # exporters.base.Variant, or "torch"
    runner: Runner
    engine: Engine
    task: Task  # bound to this model's labels
    features: Features
    path: Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """What a side-by-side run gives: a record each, and what the models said, by the names of the entries."""

    records: tuple[Record, ...]
    outputs: Mapping[str, Outputs]
    credits: Mapping[str, np.ndarray]  # right or wrong per example: (examples,)
    answers: Mapping[str, tuple[str, ...]]


def bootstrap(credit_a: np.ndarray, credit_b: np.ndarray, seed: int, rounds: int = 10_000) -> tuple[float, float, float]:
    """Mean of `credit_a - credit_b` and the 2.5 and 97.5 percentiles of its paired bootstrap (Efron 1979).

    Credits are per example, on the same examples in the same order: (examples,).
    """
    a, b = np.asarray(credit_a, dtype=np.float64), np.asarray(credit_b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"credits of the same examples are needed, got {a.shape} and {b.shape}")
    difference = a - b  # (examples,)
    draw = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // len(difference))  # bounds memory at 16 MB of indices
    means = np.concatenate(
        [
            difference[draw.integers(0, len(difference), (min(chunk, rounds - start), len(difference)))].mean(axis=1)
            for start in range(0, rounds, chunk)
        ]
    )  # (rounds,)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def metric_losses(
    entries: Sequence[Entry],
    pairs: Sequence[tuple[str, str]],
    outputs: Mapping[str, Outputs],
    examples: Sequence[Example],
    seed: int = 0,
) -> dict[tuple[str, str], Interval]:
    """For each pair of entry names, the points of the metric that the second lies below the first, with its 95 % interval.

    Paired bootstrap over examples. Where the metric is the mean of the per-example credit (accuracy), 10,000 resamples are
    drawn at once; any other (F1, Matthews, correlations) is computed anew by the task on 500 resamples, the same for all.
    """
    task = entries[0].task
    sign = 100.0 if task.higher_is_better else -100.0
    scores = {item.name: item.task.score(outputs[item.name], item.features, examples)[task.metric] for item in entries}
    credits = {item.name: item.task.credit(outputs[item.name], item.features, examples) for item in entries}
    if all(abs(scores[name] - credits[name].mean()) < 1e-9 for name in scores):
        found = {}
        for first, second in pairs:
            value, low, high = (sign * part for part in bootstrap(credits[first], credits[second], seed))
            found[first, second] = Interval(value, min(low, high), max(low, high))
        return found
    needed = {name for pair in pairs for name in pair}
    again = {item.name: _resampled(item, outputs[item.name], examples, seed) for item in entries if item.name in needed}
    found = {}
    for first, second in pairs:
        differences = sign * (again[first] - again[second])
        # A resample may hold one class only, where a correlation is undefined.
        differences = differences[np.isfinite(differences)]
        low, high = np.percentile(differences, [2.5, 97.5]) if len(differences) else (np.nan, np.nan)
        found[first, second] = Interval(sign * (scores[first] - scores[second]), float(low), float(high))
    return found


def _resampled(entry: Entry, outputs: Outputs, examples: Sequence[Example], seed: int) -> np.ndarray:
    """The metric on resamples of the examples, the same ones for the same seed: (METRIC_ROUNDS,)."""
    draw = np.random.default_rng(seed)
    rows = _rows_of(entry.features, len(examples))
    with np.errstate(all="ignore"):
        return np.array(
            [
                _score_again(entry, outputs, rows, examples, draw.integers(0, len(examples), len(examples)))
                for _ in range(METRIC_ROUNDS)
            ]
        )


def _rows_of(features: Features, examples: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(examples)]
    for row, example in enumerate(features.example):
        rows[example].append(row)
    return rows


def _score_again(
    entry: Entry, outputs: Outputs, rows_of: list[list[int]], examples: Sequence[Example], chosen: np.ndarray
) -> float:
    """The metric on a resample of examples, each with all its rows."""
    rows = [row for example in chosen for row in rows_of[example]]
    features = Features(
        columns={name: [column[row] for row in rows] for name, column in entry.features.columns.items()},
        example=[place for place, example in enumerate(chosen) for _ in rows_of[example]],
        truncated=entry.features.truncated,
        pad_id=entry.features.pad_id,
    )
    subset = {name: array[rows] for name, array in outputs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a constant resample: the value is dropped by the caller
        return entry.task.score(subset, features, [examples[example] for example in chosen])[entry.task.metric]


def measure(
    entries: Sequence[Entry],
    examples: Sequence[Example],
    *,
    baseline: str,
    task_name: str,
    model: str,
    rounds: int = 10,
    warmup: int = 1,
    limit: int = 100,
    batch_size: int = 32,
    budget_seconds: float | None = 60.0,
    load: Load | None = None,
    split: Split = Split.DEV,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Measurement:
    """Scores and times the entries side by side and gives a record each, with loss and speed against `baseline`.

    `budget_seconds` is for each of the two workloads. `load` is what `quiet()` returned; without it, it is called here.
    Facts of an entry win over what is found here.
    """
    outputs, credits, answers, scores = {}, {}, {}, {}
    for entry in entries:
        found = evaluate(entry.runner, entry.features, batch_size)
        outputs[entry.name] = found
        credits[entry.name] = entry.task.credit(found, entry.features, examples)
        answers[entry.name] = tuple(entry.task.answers(found, entry.features, examples))
        scores[entry.name] = entry.task.score(found, entry.features, examples)
    by_name = {entry.name: entry for entry in entries}
    base = by_name[baseline]
    load = load if load is not None else quiet()
    runners = {entry.name: entry.runner for entry in entries}
    engines = {entry.name: entry.engine for entry in entries}
    timings: dict[str, list[Timing]] = {entry.name: [] for entry in entries}
    built = {id(entry.features): entry.features for entry in entries}
    made = {
        key: workloads(features, limit, batch_size=batch_size, lengths=base.features.lengths())
        for key, features in built.items()
        if len(features) == len(base.features)
    }
    if len(made) != len(built):
        raise RecipeError(
            "the models cut the examples into different numbers of rows, so they cannot be timed together.",
            help="give a larger length limit, or bench them one by one.",
        )
    for place in range(2):
        per_name = {entry.name: made[id(entry.features)][place] for entry in entries}
        for name, timing in compare(
            runners,
            per_name,
            engines=engines,
            load=load,
            rounds=rounds,
            warmup=warmup,
            budget_seconds=budget_seconds,
            clock=clock,
        ).items():
            timings[name].append(timing)
    machine = environment()
    rivals = [
        entry.name for entry in entries if entry.role in (Standing.TEACHER_INT8, Standing.OPENVINO_INT8, Standing.SMALL_DENSE)
    ]
    duels = {entry.name: rivals if entry.role == Standing.OURS else [] for entry in entries}
    pairs = [(first, entry.name) for entry in entries for first in (baseline, *duels[entry.name]) if first != entry.name]
    losses = metric_losses(entries, pairs, outputs, examples, seed)
    records = []
    for entry in entries:
        facts = {
            "name": entry.name,
            "role": str(entry.role),
            "model": model,
            "task": task_name,
            "split": str(split),
            "metric": entry.task.metric,
            "higher_is_better": entry.task.higher_is_better,
            "examples": len(examples),
            "scores": {name: float(value) for name, value in scores[entry.name].items()},
            "loss": losses.get((baseline, entry.name)),
            "versus": {other: losses[other, entry.name] for other in duels[entry.name]},
            "precision": str(entry.precision),
            "file": entry.path.name if entry.path else "",
            "size_bytes": shipped_bytes(entry.path) if entry.path else None,
            "timings": tuple(timings[entry.name]),
            "baseline": baseline,
            "speed": {
                timing.workload: ratio(first, timing)
                for first, timing in zip(timings[baseline], timings[entry.name], strict=True)
            },
            "environment": machine,
            "date": today(),
        }
        records.append(Record(**{**facts, **entry.facts}))
    return Measurement(tuple(records), outputs, credits, answers)


def shipped_bytes(path: Path) -> int:
    """Bytes of the file that ships, with the weight file beside it where the format splits them; of a folder, its weights."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.glob("*.safetensors"))
    beside = [path.with_name(path.name + end) for end in (".data", "_data")]
    if path.suffix == ".xml":
        beside.append(path.with_suffix(".bin"))
    return sum(file.stat().st_size for file in (path, *beside) if file.exists())
