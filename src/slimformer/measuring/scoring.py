"""Scores models side by side on the same examples, with paired intervals, and makes the records of a comparison.

Two models are compared example by example, by a paired bootstrap, because that interval is far narrower than two separate ones.
Exported files are scored with neither torch nor transformers installed. Nothing here trains, cuts or draws.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from slimformer.data.batching import collate, sorted_by_length
from slimformer.errors import DataError, ModelError, RecipeError, shown
from slimformer.exporters.base import LAYERS, files_of
from slimformer.measuring.machine import Load, Quiet, environment
from slimformer.measuring.records import ExitShare, Heading, Interval, Record, Standing, today
from slimformer.measuring.sessions import Session
from slimformer.measuring.timing import Rounds, Timing, compare, model_inputs, ratio, workloads
from slimformer.runtimes.base import Runner
from slimformer.tasks.base import Example, Features, Outputs, Task

_log = logging.getLogger(__name__)

RESAMPLES = 10_000  # of a mean over examples
METRIC_RESAMPLES = 500  # of any other metric: each calls the task's score, which takes some ms
DRAWS = 0  # the seed of these: always the same, so that runs on the same examples can be compared in pairs
MOST_CLASSES = 200  # with more, chance is not worked out: each class is a call of the task's score
A_MINUTE = Rounds(seconds=60.0)


# -- One model ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One model in a comparison: an open file, the task bound to its labels, and its rows of the examples.

    `precision` is a Variant of the exporter, or "torch". `facts` are fields of `Record` that are known already (params, macs,
    minutes, plan, ...); they win over what is measured here. `beams`: of a model that writes texts, how many it follows at once;
    `greedy` is then the same file that follows one, and is scored and timed too.
    """

    name: str
    role: str
    precision: str
    session: Session
    task: Task
    features: Features
    facts: Mapping[str, Any] = field(default_factory=dict)
    beams: int | None = None
    greedy: Session | None = None


@dataclass(frozen=True)
class Scored:
    """What one model said of the examples, and what that is worth.

    `credit` (examples,) is 1 for right and 0 for wrong, or what else the task gives for an example.
    """

    entry: Entry
    outputs: Outputs
    scores: Mapping[str, float]
    credit: np.ndarray
    answers: tuple[str, ...]

    @classmethod
    def of(cls, entry: Entry, outputs: Outputs, examples: Sequence[Example]) -> Scored:
        """These outputs of an entry, judged by its task."""
        task, features = entry.task, entry.features
        return cls(
            entry,
            outputs,
            {name: float(value) for name, value in task.score(outputs, features, examples).items()},
            task.credit(outputs, features, examples),
            tuple(task.answers(outputs, features, examples)),
        )

    @property
    def score(self) -> float:
        """The task's own metric."""
        return self.entry.task.counted(self.scores)

    @property
    def is_mean(self) -> bool:
        """Whether the metric is the mean of the credit, as accuracy is."""
        return bool(abs(self.score - self.credit.mean()) < 1e-9)


def _say_doubts(entry: Entry, outputs: Outputs, examples: Sequence[Example]) -> None:
    """Logs what the task finds wrong with a model: classes in another order, answers no better than chance."""
    try:
        doubt = entry.task.check_model({}, lambda: (outputs, entry.features, examples))
    except DataError as error:
        doubt = f"{error.what} {'. '.join(error.facts)}."
    if doubt:
        _log.warning("%s: %s", entry.name, doubt.removeprefix("warning: "))


def _check_outputs(entry: Entry, outputs: Outputs, examples: Sequence[Example]) -> None:
    """ModelError unless there is a finite value for all that the task reads: a file of NaN would score like chance, and look like it."""
    task, features = entry.task, entry.features
    file = entry.session.path or entry.name
    there = ", ".join(f"{name} {list(array.shape)}" for name, array in outputs.items()) or "none"
    if task.stand_in:
        if len(outputs.get("text", ())) != len(features):
            raise ModelError(
                f"{file} gives no text for each input, and {task.metric} judges texts.",
                facts=[f"its outputs: {there}"],
                help="name a model that writes texts, in a runtime that decodes.",
            )
        return
    missing = [name for name in task.outputs if name not in outputs]
    if missing:
        raise ModelError(
            f"{file} has no output '{missing[0]}' with a row for each input.",
            facts=[f"its outputs: {there}"],
            help=f"export the model with the output{'s' if len(task.outputs) > 1 else ''} {' and '.join(task.outputs)}.",
        )
    lengths, classes = features.lengths(), task.configure().get("num_labels")
    for name in task.outputs:
        array = outputs[name]
        per_token = name in task.per_token
        shape: list[Any] = [len(features), *([int(lengths.max(initial=0))] if per_token else [])]
        if name == "logits":
            shape.append(classes)
        if list(array.shape[: len(shape)]) != shape or (name == "logits" and array.ndim != len(shape)):
            expected = shape if name == "logits" or per_token else f"{len(features)} rows"
            raise ModelError(
                f"{file} gives '{name}' of another shape than the task needs.",
                facts=[f"its outputs: {there}", f"needed: {name} {expected}"],
                help="name a model that was made for this task.",
            )
        finite = np.isfinite(array).reshape(*array.shape[: 1 + per_token], -1).all(axis=-1)  # (rows,), or (rows, tokens)
        if per_token:
            finite |= np.arange(array.shape[1]) >= lengths[:, None]
        wrong = np.flatnonzero(~finite.reshape(len(array), -1).all(axis=1))
        if len(wrong):
            text = " | ".join(examples[features.example[wrong[0]]].texts)
            raise ModelError(
                f"{file} gives no finite outputs: {len(wrong):,} of {len(array):,} rows of '{name}' hold NaN or infinity.",
                facts=[f"the first: {shown(text)}", f"{name}: {array[wrong[0]].ravel()[:8].tolist()}"],
                help="the file is damaged, or its numbers overflow (float16 often does): export the model again.",
            )


def evaluate(runner: Runner, features: Features, batch_size: int = 32, more: Sequence[str] = ()) -> Outputs:
    """A runner's outputs on all features, in their own order: output name -> (features, ...).

    Batches are sorted by length. An output with an axis of tokens is filled up to the longest row with the smallest finite
    value, so that a maximum or a softmax never lands on padding. Outputs without a row for each input are left out. `more`: columns
    that the runner gets beside the inputs.
    """
    names = (*model_inputs(features), *more)
    parts: list[tuple[Sequence[int], dict[str, np.ndarray]]] = [
        (rows, runner(collate(features, rows, names))) for rows in sorted_by_length(features.lengths(), batch_size)
    ]
    outputs: dict[str, np.ndarray] = {}
    for name in parts[0][1] if parts else ():
        arrays = [part[name] for _, part in parts]
        if any(array.shape[:1] != (len(rows),) for (rows, _), array in zip(parts, arrays, strict=True)):
            continue
        shape = tuple(max(sizes) for sizes in zip(*(array.shape[1:] for array in arrays), strict=True))
        full = np.full((len(features), *shape), _lowest(arrays[0].dtype), dtype=arrays[0].dtype)
        for (rows, _), array in zip(parts, arrays, strict=True):
            inner: tuple[int | slice, ...] = tuple(slice(size) for size in array.shape[1:])
            for row, values in zip(rows, array, strict=True):
                full[(row, *inner)] = values
        outputs[name] = full
    return outputs


def _lowest(dtype: np.dtype[Any]) -> Any:
    """What fills an array of outputs: the smallest number, or no text."""
    if dtype.kind == "O":
        return ""
    return np.finfo(dtype).min if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).min


def chance_score(scored: Scored, examples: Sequence[Example]) -> float | None:
    """The best score of an answer that is the same for every example; None if the model does not choose among classes."""
    logits, task = scored.outputs.get("logits"), scored.entry.task
    if (
        logits is None
        or set(scored.outputs) - {"logits", LAYERS}
        or logits.ndim != 2
        or not 2 <= logits.shape[1] <= MOST_CLASSES
    ):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a correlation with a constant is undefined
        same = 20 * np.eye(logits.shape[1], dtype=np.float32) - 10  # (classes, classes)
        scores = [
            task.score({"logits": np.tile(row, (len(logits), 1))}, scored.entry.features, examples)[task.metric] for row in same
        ]
    finite = [float(score) for score in scores if np.isfinite(score)]
    return (max(finite) if task.higher_is_better else min(finite)) if finite else None


# -- Two models: the paired interval -----------------------------------------------------------------------------------------


def paired_interval(value: float, resamples: np.ndarray) -> Interval:
    """A difference with the 2.5 and 97.5 percentiles of its resamples (Efron 1979); those that are undefined are left out."""
    finite = resamples[np.isfinite(resamples)]
    low, high = np.percentile(finite, [2.5, 97.5]) if len(finite) else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high))


def bootstrap(credit_a: np.ndarray, credit_b: np.ndarray, seed: int, resamples: int = RESAMPLES) -> Interval:
    """Mean of `credit_a - credit_b` with its 95 % interval by the paired bootstrap.

    Credits are per example, of the same examples in the same order: (examples,). ValueError if they are not.

    >>> import numpy as np
    >>> bootstrap(np.ones(50), np.zeros(50), seed=0)
    Interval(value=1.0, low=1.0, high=1.0)
    """
    a, b = np.asarray(credit_a, dtype=np.float64), np.asarray(credit_b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"credits of the same examples are needed, got {a.shape} and {b.shape}")
    difference = a - b  # (examples,)
    draw = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // len(difference))  # bounds memory at 16 MB of indices
    means = np.concatenate(
        [
            difference[draw.integers(0, len(difference), (min(chunk, resamples - start), len(difference)))].mean(axis=1)
            for start in range(0, resamples, chunk)
        ]
    )  # (resamples,)
    return paired_interval(difference.mean(), means)


def metric_losses(
    scored: Mapping[str, Scored],
    pairs: Iterable[tuple[str, str]],
    resamples: Mapping[str, np.ndarray],
    seed: int = 0,
) -> dict[tuple[str, str], Interval]:
    """For each pair of names, the points of the metric that the second lies below the first, with the paired 95 % interval.

    If the metric is the mean of the credit (accuracy), many resamples are drawn at once. For any other metric (F1, Matthews,
    correlations) they are those of `resampled`, by name.
    """
    pairs = list(pairs)
    names = {name for pair in pairs for name in pair}
    points = {name: 100.0 if scored[name].entry.task.higher_is_better else -100.0 for name in names}
    if all(scored[name].is_mean for name in names):
        return {
            (first, second): bootstrap(scored[first].credit, scored[second].credit, seed).scaled(points[first])
            for first, second in pairs
        }
    return {(first, second): points_below(scored[first], scored[second], resamples) for first, second in pairs}


def points_below(first: Scored, second: Scored, resamples: Mapping[str, np.ndarray]) -> Interval:
    """The points of the metric that the second lies below the first, with the paired 95 % interval of these resamples, by name."""
    difference = resamples[first.entry.name] - resamples[second.entry.name]
    return paired_interval(first.score - second.score, difference).scaled(
        100.0 if first.entry.task.higher_is_better else -100.0
    )


def resampled(scored: Scored, examples: Sequence[Example]) -> np.ndarray:
    """The metric on resamples of the examples: (METRIC_RESAMPLES,).

    The draws depend on the number of examples alone, so that two models are compared in pairs, also if they were scored in two runs.
    """
    draw = np.random.default_rng(DRAWS)
    draws = [draw.integers(0, len(examples), len(examples)) for _ in range(METRIC_RESAMPLES)]
    if scored.is_mean:
        return np.array([scored.credit[drawn].mean() for drawn in draws])
    quick = scored.entry.task.resampled(scored.outputs, scored.entry.features, examples, draws)
    if quick is not None:
        return quick
    rows_of: list[list[int]] = [[] for _ in examples]
    for row, example in enumerate(scored.entry.features.example):
        rows_of[example].append(row)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a resample may hold one class only, so that a correlation is undefined
        return np.array([_score_again(scored, rows_of, examples, drawn) for drawn in draws])


def _kept(resamples: np.ndarray) -> tuple[float, ...]:
    """Resamples as a ledger keeps them: none at all if some are undefined, since two rows are paired place by place."""
    return tuple(round(float(value), 5) for value in resamples) if np.isfinite(resamples).all() else ()


def _score_again(scored: Scored, rows_of: list[list[int]], examples: Sequence[Example], drawn: np.ndarray) -> float:
    """The metric on a resample of examples, each with all its rows."""
    task, features = scored.entry.task, scored.entry.features
    rows = [row for example in drawn for row in rows_of[example]]
    resample = Features(
        columns={name: [column[row] for row in rows] for name, column in features.columns.items()},
        example=[place for place, example in enumerate(drawn) for _ in rows_of[example]],
        truncated=features.truncated,
        pad_id=features.pad_id,
    )
    outputs = {name: array[rows] for name, array in scored.outputs.items()}
    return task.counted(task.score(outputs, resample, [examples[example] for example in drawn]))


# -- A comparison ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """A comparison: a record for each entry, in their order, and what each model said, by name."""

    records: tuple[Record, ...]
    scored: Mapping[str, Scored]


def measure(
    entries: Sequence[Entry],
    examples: Sequence[Example],
    heading: Heading,
    *,
    rounds: Rounds = A_MINUTE,
    load: Load | None = None,
    seed: int = 0,
    strangers: bool = False,
    each_other: bool = False,
) -> Measurement:
    """Scores and times the entries side by side; loss and speed are against the first one, the baseline.

    The budget of `rounds` is for each of the two workloads. `load` is that of the machine just before; without it, a new
    `Quiet` waits here. Of `strangers`, models that nobody has tried, it is logged if their answers cannot be right. With `each_other`
    every row is compared with every other one, not only ours with the rivals.
    RecipeError if the models cut the examples into different numbers of rows. ModelError if the task cannot judge the outputs of one: an
    output is missing or has another size, or a number in it is not finite.
    """
    scored: dict[str, Scored] = {}
    for entry in entries:
        outputs = evaluate(entry.session.runner, entry.features)
        _check_outputs(entry, outputs, examples)
        if strangers and not scored:  # without a teacher at hand, the first model says what is wanted
            examples = entry.task.answered(outputs, entry.features, examples)
        if strangers:
            _say_doubts(entry, outputs, examples)
        scored[entry.name] = Scored.of(entry, outputs, examples)
        if entry.greedy is not None:
            scored[entry.name] = _beside_greedy(scored[entry.name], examples)
    timings = _time(entries, rounds, load or Quiet().load())
    rivals = [entry.name for entry in entries if Standing(entry.role).is_rival]
    against = {entry.name: rivals if entry.role == Standing.OURS and not each_other else [] for entry in entries}
    baseline = entries[0].name
    pairs = [(first, entry.name) for entry in entries for first in (baseline, *against[entry.name]) if first != entry.name]
    resamples = {name: resampled(item, examples) for name, item in scored.items()}
    losses = metric_losses(scored, pairs, resamples, seed)
    if each_other:
        against = {entry.name: [other.name for other in entries if other is not entry] for entry in entries}
        losses |= {
            (first, entry.name): points_below(scored[first], scored[entry.name], resamples)
            for entry in entries
            for first in against[entry.name]
            if (first, entry.name) not in losses
        }
    machine, chance = environment(), chance_score(scored[baseline], examples)

    def record(entry: Entry) -> Record:
        path, task = entry.session.path, entry.task
        measured = {
            "name": entry.name,
            "role": str(entry.role),
            **vars(heading),
            "metric": task.metric,
            "higher_is_better": task.higher_is_better,
            "examples": len(examples),
            "scores": scored[entry.name].scores,
            "chance": chance,
            "loss": losses.get((baseline, entry.name)),
            "resampled": _kept(resamples[entry.name]),
            "exits": exit_shares(scored[entry.name].outputs),
            "versus": {rival: losses[rival, entry.name] for rival in against[entry.name]},
            "precision": str(entry.precision),
            "file": path.name if path else "",
            "size_bytes": shipped_bytes(path) if path else None,
            "timings": timings[entry.name],
            "baseline": baseline,
            "speed": {
                base.workload: ratio(base, timing) for base, timing in zip(timings[baseline], timings[entry.name], strict=True)
            },
            "environment": machine,
            "date": today(),
        }
        return Record(**{**measured, **entry.facts})

    return Measurement(tuple(map(record, entries)), scored)


def exit_shares(outputs: Outputs) -> tuple[ExitShare, ...]:
    """After how many layers the examples were answered; none if the file does not say, because it computes all.

    >>> import numpy as np
    >>> exit_shares({"layers": np.array([2, 6, 2, 2])})
    (ExitShare(layers=2, share=0.75), ExitShare(layers=6, share=0.25))
    """
    counts = np.unique(outputs.get(LAYERS, np.zeros(0, np.int64)), return_counts=True)
    return tuple(ExitShare(int(layers), float(count) / len(outputs[LAYERS])) for layers, count in zip(*counts, strict=True))


def _beside_greedy(scored: Scored, examples: Sequence[Example]) -> Scored:
    """The same with the metric of the texts that one beam writes."""
    entry = scored.entry
    assert entry.greedy is not None
    outputs = evaluate(entry.greedy.runner, entry.features)
    score = float(entry.task.score(outputs, entry.features, examples)[entry.task.metric])
    return replace(scored, scores={**scored.scores, f"{entry.task.metric}_at_1_beam": score})


def _time(entries: Sequence[Entry], rounds: Rounds, load: Load) -> dict[str, tuple[Timing, ...]]:
    """The two workloads, timed side by side; batches are sorted by the lengths that the first entry's tokenizer gives.

    Models that write texts are timed on their own beams, then on one.
    """
    lengths = entries[0].features.lengths()
    if any(len(entry.features) != len(lengths) for entry in entries):
        raise RecipeError(
            "the models cut the examples into different numbers of rows, so they cannot be timed together.",
            help="give a larger length limit, or bench them one by one.",
        )
    features = {id(entry.features): entry.features for entry in entries}
    works = {key: workloads(item, lengths=lengths) for key, item in features.items()}
    places = [{entry.name: works[id(entry.features)][place] for entry in entries} for place in (0, 1)]
    sessions = {entry.name: entry.session for entry in entries}
    found = [compare(sessions, place, rounds, load) for place in places]
    beams = {entry.name: entry.beams for entry in entries}
    timings = [{name: replace(timing, beams=beams[name]) for name, timing in one.items()} for one in found]
    if all(entry.greedy is not None for entry in entries):
        greedy = {entry.name: entry.greedy for entry in entries if entry.greedy is not None}
        for place in places:
            one = compare(greedy, place, rounds, load)
            timings.append(
                {name: replace(timing, beams=1, workload=f"{timing.workload}, 1 beam") for name, timing in one.items()}
            )
    return {entry.name: tuple(one[entry.name] for one in timings) for entry in entries}


def shipped_bytes(path: Path) -> int:
    """Bytes of the file that ships, with the weight file beside it if the format splits them; of a folder, its weights."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files_of(path))
