"""Times and scores models side by side: the same examples, in turn, raw samples kept.

The one idea: on a shared machine only the ratio of two times taken in one run means anything, so every batch is run by every
runner before the next batch comes, in rotating order, and a speed is a ratio to the baseline of the same run. Nothing here
trains, cuts or draws; exported files are benched with neither torch nor transformers installed.
"""

from __future__ import annotations

import gc
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from slimformer.errors import DataError, ExtraError, ModelError, RecipeError
from slimformer.measuring.machine import Load as Load
from slimformer.measuring.machine import cores as cores
from slimformer.measuring.machine import environment as environment
from slimformer.measuring.machine import peak_rss_bytes as peak_rss_bytes
from slimformer.measuring.machine import quiet as quiet
from slimformer.tasks.base import Features, Outputs, Split

if TYPE_CHECKING:
    from slimformer.reporting.ledger import Interval, Record
    from slimformer.runtimes.base import Runner
    from slimformer.tasks.base import Example, Task

log = logging.getLogger(__name__)

T = TypeVar("T")

SINGLE = "batch 1, in order"
SORTED = "batch 32, sorted by length"
# From the fastest file of an export to the plainest: which one stands for a folder that does not name its best.
FILES = {
    "model_int8_ort.onnx": "int8_fused",
    "model_int8_qdq.onnx": "int8_static",
    "model_fused.onnx": "fused",
    "model.onnx": "float",
}
LEAST_BATCHES = 8  # however short the budget
METRIC_ROUNDS = 500  # resamples of a metric that is no mean over examples: each is a call of the task's score, some ms


# -- What is timed -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """Tokens per example, padding left out."""

    mean: float
    p50: float
    p95: float
    max: int


@dataclass(frozen=True)
class Workload:
    """Padded batches of real examples, always the same for every runner."""

    name: str
    batch_size: int
    order: str
    batches: tuple[Mapping[str, np.ndarray], ...]  # model input -> (batch, seq)
    examples: int
    tokens: int  # padding left out
    lengths: Lengths


def _inputs(features: Features) -> list[str]:
    """Columns a model takes, and the mask that collating adds."""
    names = [name for name in features.columns if name in {"input_ids", "token_type_ids", "position_ids"}]
    return [*names, "attention_mask"]


def _workload(name: str, batch_size: int, order: str, batches: tuple[Mapping[str, np.ndarray], ...]) -> Workload:
    taken = np.concatenate([batch["attention_mask"].sum(axis=1) for batch in batches])  # (examples,)
    summary = Lengths(
        mean=round(float(taken.mean()), 2),
        p50=float(np.percentile(taken, 50)),
        p95=float(np.percentile(taken, 95)),
        max=int(taken.max()),
    )
    return Workload(name, batch_size, order, batches, len(taken), int(taken.sum()), summary)


def _spread(batches: Sequence[T], limit: int) -> list[T]:
    """At most `limit` of the batches, evenly spaced, so that a sample has the lengths of the whole."""
    if len(batches) <= limit:
        return list(batches)
    return [batches[round(place)] for place in np.linspace(0, len(batches) - 1, limit)]


def workloads(
    features: Features, limit: int = 100, *, batch_size: int = 32, lengths: np.ndarray | None = None
) -> tuple[Workload, Workload]:
    """Batch 1 in order and batch 32 sorted by length, each at most `limit` batches, evenly spaced over the split.

    `lengths` (rows,) orders by other lengths than the features' own: two models with different tokenizers then get the same
    examples in the same batches. DataError where there is nothing to time.
    """
    from slimformer.data.batching import collate, in_order, sorted_by_length

    if not len(features) or limit < 1:
        raise DataError("there are no examples to time.", help="give a dev split with at least one example.")
    names = _inputs(features)

    def build(name: str, size: int, order: str, groups: Sequence[Sequence[int]]) -> Workload:
        return _workload(name, size, order, tuple(collate(features, group, names) for group in _spread(groups, limit)))

    by_length = sorted_by_length(features.lengths() if lengths is None else lengths, batch_size)
    return (
        build(SINGLE, 1, "in order", in_order(len(features), 1)),
        build(SORTED.replace("32", str(batch_size)), batch_size, "sorted by length", by_length),
    )


# -- Timing ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """What runs a model: the runtime, its version, its threads."""

    runtime: str
    version: str
    threads: int
    device: str = "cpu"


@dataclass(frozen=True)
class Timing:
    """Raw wall times of one runner on one workload, and the circumstances."""

    workload: str
    batch_size: int
    order: str
    examples: int
    tokens: int
    lengths: Lengths
    runtime: str
    version: str
    device: str
    threads: int
    warmup: int  # rounds run before and thrown away
    load: Load
    sizes: tuple[int, ...]  # examples per batch: (batches,)
    samples_ms: tuple[tuple[float, ...], ...]  # (rounds, batches), milliseconds of a whole batch

    @property
    def rounds(self) -> int:
        return len(self.samples_ms)

    def per_example_ms(self) -> np.ndarray:
        """Milliseconds per example of each batch in each round: (rounds, batches)."""
        return np.asarray(self.samples_ms, dtype=np.float64) / np.asarray(self.sizes, dtype=np.float64)  # type: ignore[no-any-return]

    @property
    def p50_ms(self) -> float:
        """Median milliseconds per example over all batches and rounds."""
        return float(np.percentile(self.per_example_ms(), 50))

    @property
    def p95_ms(self) -> float:
        """95th percentile of milliseconds per example over all batches and rounds."""
        return float(np.percentile(self.per_example_ms(), 95))

    @property
    def mean_ms(self) -> float:
        """Milliseconds per example of the median round: what a long queue of such batches costs."""
        return float(np.median(self.round_ms()) / sum(self.sizes))

    def round_ms(self) -> np.ndarray:
        """Milliseconds of each round, all its batches together: (rounds,)."""
        return np.asarray(self.samples_ms, dtype=np.float64).sum(axis=1)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the baseline: the median of the pairwise ratios, and their 10th and 90th percentiles."""

    median: float
    low: float
    high: float


def ratio(baseline: Timing, candidate: Timing) -> Ratio:
    """Speed of `candidate` over `baseline`, above 1 where it is faster. A pair is one round: both ran the same batches in turn.

    ValueError where the two do not come from one `compare`.
    """
    same = (baseline.workload, baseline.sizes, baseline.rounds) == (candidate.workload, candidate.sizes, candidate.rounds)
    if not same:
        raise ValueError(f"'{baseline.workload}' and '{candidate.workload}' were not timed in one run")
    pairs = baseline.round_ms() / candidate.round_ms()  # (rounds,)
    low, median, high = np.percentile(pairs, [10, 50, 90])
    return Ratio(float(median), float(low), float(high))


def compare(
    runners: Mapping[str, Runner],
    workload: Workload | Mapping[str, Workload],
    *,
    engines: Mapping[str, Engine],
    load: Load,
    rounds: int = 10,
    warmup: int = 1,
    min_rounds: int = 3,
    budget_seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Timings of every runner on the same batches, in turn: each batch is run by all, in rotating order, before the next.

    A drift of the machine then hits all of them alike. `warmup` rounds come first and are dropped. With `budget_seconds` it
    stops early, never before `min_rounds` rounds; where so many would take longer, as a few batches show beforehand, it times fewer of
    the batches, evenly spaced. A workload per runner is for models whose tokenizers differ.
    """
    names = list(runners)
    per_name = dict(workload) if isinstance(workload, Mapping) else dict.fromkeys(names, workload)
    shape = _shape(per_name.values())
    samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}

    def one_round(number: int) -> dict[str, tuple[float, ...]]:
        taken: dict[str, list[float]] = {name: [] for name in names}
        for place in range(len(shape)):
            first = (number * len(shape) + place) % len(names)
            for name in names[first:] + names[:first]:
                runner, batch = runners[name], per_name[name].batches[place]
                begin = clock()
                runner(batch)
                taken[name].append(round((clock() - begin) * 1000, 4))
        return {name: tuple(values) for name, values in taken.items()}

    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection in the middle of a batch would be charged to whoever runs just then
    try:
        if warmup and budget_seconds is not None and len(shape) > LEAST_BATCHES:
            whole, every = per_name, len(shape)
            per_name, shape = _sampled(whole, LEAST_BATCHES)
            begin = clock()
            one_round(0)
            spent = (clock() - begin) * every / LEAST_BATCHES
            fitting = int(every * budget_seconds / (min_rounds * spent)) if min_rounds * spent > budget_seconds else every
            per_name, shape = _sampled(whole, max(LEAST_BATCHES, fitting))
        for number in range(warmup):
            one_round(number)
        start = clock()
        for number in range(rounds):
            for name, values in one_round(number).items():
                samples[name].append(values)
            spent = clock() - start
            done = number + 1
            if budget_seconds is not None and done >= min_rounds and spent + spent / done > budget_seconds:
                break
    finally:
        if collecting:
            gc.enable()
    return {
        name: Timing(
            workload=per_name[name].name,
            batch_size=per_name[name].batch_size,
            order=per_name[name].order,
            examples=per_name[name].examples,
            tokens=per_name[name].tokens,
            lengths=per_name[name].lengths,
            runtime=engines[name].runtime,
            version=engines[name].version,
            device=engines[name].device,
            threads=engines[name].threads,
            warmup=warmup,
            load=load,
            sizes=shape,
            samples_ms=tuple(samples[name]),
        )
        for name in names
    }


def _rows(batch: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(batch.values())))


def _shape(works: Iterable[Workload]) -> tuple[int, ...]:
    """Examples in each batch, the same in all of the workloads: (batches,)."""
    shapes = {tuple(_rows(batch) for batch in work.batches) for work in works}
    if len(shapes) != 1:
        raise ValueError("the workloads of one comparison must hold the same examples in the same batches")
    return shapes.pop()


def _sampled(works: Mapping[str, Workload], limit: int) -> tuple[dict[str, Workload], tuple[int, ...]]:
    """The same workloads with at most `limit` batches, evenly spaced, and the examples in each of these."""
    kept = {
        id(work): _workload(work.name, work.batch_size, work.order, tuple(_spread(work.batches, limit)))
        for work in works.values()
    }
    fewer = {name: kept[id(work)] for name, work in works.items()}
    return fewer, _shape(fewer.values())


# -- Quality -----------------------------------------------------------------------------------------------------------------


def evaluate(runner: Runner, features: Features, batch_size: int = 32) -> Outputs:
    """A runner's outputs on all features, in their own order: output name -> (features, ...).

    Batches are sorted by length. An output that has an axis of tokens is filled up to the longest row with the smallest finite
    value, so that a maximum or a softmax never lands on padding.
    """
    from slimformer.data.batching import collate, sorted_by_length

    names = _inputs(features)
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
    from slimformer.reporting.ledger import Interval, bootstrap

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
    import warnings

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
    from slimformer.reporting.ledger import Record, Role, today

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
    rivals = [entry.name for entry in entries if entry.role in (Role.TEACHER_INT8, Role.OPENVINO_INT8, Role.SMALL_DENSE)]
    duels = {entry.name: rivals if entry.role == Role.OURS else [] for entry in entries}
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
            "size_bytes": size_bytes(entry.path) if entry.path else None,
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


def size_bytes(path: Path) -> int:
    """Bytes of the file that ships, with the weight file beside it where the format splits them; of a folder, its weights."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.glob("*.safetensors"))
    beside = [path.with_name(path.name + end) for end in (".data", "_data")]
    if path.suffix == ".xml":
        beside.append(path.with_suffix(".bin"))
    return sum(file.stat().st_size for file in (path, *beside) if file.exists())


# -- slimformer bench --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """A model file on disk, with the folder that holds its tokenizer and config."""

    name: str
    file: Path
    folder: Path
    precision: str
    facts: Mapping[str, Any]


def bench(
    paths: Sequence[Path],
    task: Task | None = None,
    *,
    task_name: str = "",
    runtimes: Sequence[str] = ("onnxruntime",),
    threads: int | None = None,
    max_length: int | None = None,
    rounds: int = 10,
    limit: int = 100,
    seconds: float | None = 60.0,
    wait_seconds: float = 60.0,
    load: Load | None = None,
    seed: int = 0,
) -> Measurement:
    """Models side by side on the task's dev split, ratios over the first path; `report.table(result.records)` shows them.

    A path is a folder with ONNX files (its best one is taken; of a single folder, all), an .onnx file in such a folder, or a
    plain transformers folder, which is exported first and needs torch. Without a task it is the one that the first folder which
    names one was made for. `seconds` is for each of the two workloads; without a `load` it waits up to `wait_seconds` for a
    quiet machine. ModelError, DataError or ExtraError say what is wrong.
    """
    from slimformer.reporting.ledger import Role

    if not paths:
        raise ModelError("there is nothing to bench.", help="name one or more model folders.")
    with tempfile.TemporaryDirectory(prefix="slimformer-bench-") as scratch:
        task = task or _recorded_task([Path(path) for path in paths])
        found = _find_all([Path(path) for path in paths], task, Path(scratch), max_length)
        length = max_length or _max_length(found)
        examples = task.split(Split.DEV)
        threads = threads or cores()
        encoded: dict[tuple[bytes, str], tuple[Task, Features]] = {}
        entries: list[Entry] = []
        for item in found:
            bound, features = _encode(item.folder, task, examples, length, encoded)
            bound = _fitted(bound, item)
            for runtime in runtimes:
                opened = open_model(item.file, runtime, threads)
                if opened is None:
                    continue
                name = item.name if len(runtimes) == 1 else f"{item.name}, {runtime}"
                first = not entries and item.precision in {"fused", "float"}
                role = Role.TEACHER_FP32 if first else Role.OTHER
                entries.append(Entry(name, role, item.precision, *opened, bound, features, item.file, item.facts))
        if not entries:
            raise ModelError(
                f"none of {', '.join(runtimes)} can run {found[0].file.name}.",
                help="choose another runtime with --runtime, or export again.",
            )
        return measure(
            entries,
            examples,
            baseline=entries[0].name,
            task_name=task_name,
            model=entries[0].name,
            rounds=rounds,
            limit=limit,
            budget_seconds=seconds,
            load=load or quiet(wait_seconds),
            seed=seed,
        )


def _fitted(task: Task, item: _Found) -> Task:
    """The task with the options that were fitted when this file was made, where any were."""
    from slimformer import registry
    from slimformer.reporting.ledger import read_facts

    facts = read_facts(item.folder)
    if not task.fits or facts is None or facts.task.get("use") != registry.name_of(task):
        return task
    if not facts.fitted:
        raise DataError(
            f"{item.folder} was made for data of another kind: {registry.name_of(task)} fits an option to each file, and none was "
            "fitted for these (a SQuAD v1.1 model cannot say that there is no answer).",
            help="bench it on data like those it was made for, or make it again with these.",
        )
    return replace(task, **facts.fitted.get(item.file.name, {}))  # type: ignore[type-var]


def _recorded_task(paths: Sequence[Path]) -> Task:
    from slimformer import registry
    from slimformer.reporting.ledger import read_facts

    for path in paths:
        facts = read_facts(path if path.is_dir() else path.parent)
        if facts is not None and "use" in facts.task:
            options = {name: value for name, value in facts.task.items() if name != "use"}
            task: Task = registry.find("tasks", str(facts.task["use"]))(**options)
            return task
    raise RecipeError("there is no data to bench on.", help="name it with --data ./folder, or --task glue/sst2 --data ...")


def open_model(path: Path, runtime: str, threads: int) -> tuple[Runner, Engine] | None:
    """A model file opened in a runtime, or None where that runtime cannot run such a file; ExtraError where it is missing."""
    from slimformer import registry

    engine = registry.find("runtimes", runtime)()
    if not engine.available():
        extra = f"slimformer[{engine.extra}]" if engine.extra else runtime
        raise ExtraError(f"the runtime '{runtime}' is not installed.", help=f"pip install '{extra}'")
    if not engine.accepts(path):
        return None
    return engine.load(path, threads), Engine(runtime, engine.version(), threads)


def _find_all(paths: Sequence[Path], task: Task, scratch: Path, max_length: int | None) -> list[_Found]:
    """The model file of each path, plain folders exported into `scratch`; of a single folder all its files, fp32 first."""
    found: list[_Found] = []
    for place, path in enumerate(paths):
        if path.is_file() and path.suffix in {".onnx", ".xml"}:
            found.append(_of_file(path, f"{path.parent.name}/{path.name}"))
            continue
        if not path.is_dir():
            raise ModelError(
                f"{path} is no model: there is no such folder.", help="name a folder with config.json and a model."
            )
        files = [path / name for name in FILES if (path / name).is_file()]
        if not files:
            found.append(_export(path, task, scratch / str(place), max_length))
        elif len(paths) == 1:
            found.extend(_of_file(file, file.name) for file in sorted(files, key=_plain_first))
        else:
            found.append(_of_file(_best(path, files), path.resolve().name))
    seen: dict[str, int] = {}
    unique = []
    for item in found:
        seen[item.name] = seen.get(item.name, 0) + 1
        name = item.name if seen[item.name] == 1 else f"{item.name} ({seen[item.name]})"
        unique.append(_Found(name, item.file, item.folder, item.precision, item.facts))
    return unique


def _plain_first(file: Path) -> int:
    return ["model_fused.onnx", "model.onnx", "model_int8_ort.onnx", "model_int8_qdq.onnx"].index(file.name)


def _of_file(file: Path, name: str) -> _Found:
    from slimformer.reporting.ledger import read_facts

    facts = read_facts(file.parent)
    known = {} if facts is None else facts.of_record()
    small = facts is not None and file.suffix == ".xml"  # ours are int8 by NNCF
    return _Found(name, file, file.parent, "int8_static" if small else FILES.get(file.name, "float"), known)


def _best(folder: Path, files: Sequence[Path]) -> Path:
    from slimformer.reporting.ledger import read_facts

    facts = read_facts(folder)
    if facts is None:
        return files[0]
    best = folder / facts.best
    if best not in files:
        raise ModelError(
            f"{folder}/slimformer.json names '{facts.best}' as the best file, which is not there.",
            facts=[f"there: {', '.join(file.name for file in files)}"],
            help="copy the whole folder again, or name one .onnx file.",
        )
    return best


def _export(folder: Path, task: Task, scratch: Path, max_length: int | None) -> _Found:
    """A plain transformers folder as fp32 ONNX with fused attention, in `scratch`, beside its tokenizer and config."""
    from slimformer.data.tokenizer import load_tokenizer, max_length_of
    from slimformer.saving.checkpoint import TOKENIZER_FILES, read_config

    config = read_config(folder)
    if not _installed("torch", "transformers"):
        raise ExtraError(
            f"{folder} holds no ONNX file, and exporting it needs torch and transformers, which are not installed.",
            help="pip install torch transformers, or bench a folder that `slimformer compress` wrote.",
        )
    import shutil

    from slimformer import registry
    from slimformer.data.batching import collate, in_order
    from slimformer.exporters.base import Variant
    from slimformer.saving.checkpoint import load

    model = load(folder)
    examples = task.split(Split.DEV)[:40]
    features = task.bind(config).encode(examples, load_tokenizer(folder), max_length or max_length_of(folder))
    names = _inputs(features)
    groups = [in_order(len(features), 1)[0], *in_order(len(features), 8)]
    scratch.mkdir(parents=True)
    log.info("%s holds no ONNX file: exporting it to a temporary folder.", folder)
    exporter = registry.find("exporters", "onnx")()
    batches = [collate(features, group, names) for group in groups]
    file = scratch / "model_fused.onnx"
    exporter.export(model, batches, file, Variant.FUSED, task.outputs)
    for name in ("config.json", *TOKENIZER_FILES):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, scratch / name)
    facts = {"params": sum(parameter.numel() for parameter in model.parameters())}
    return _Found(folder.resolve().name, file, scratch, str(Variant.FUSED), facts)


def _installed(*names: str) -> bool:
    try:
        return all(find_spec(name) is not None for name in names)
    except ModuleNotFoundError:
        return False


def _max_length(found: Sequence[_Found]) -> int:
    """One length limit for all: what the first export was made with, else what every model can take."""
    from slimformer.data.tokenizer import max_length_of
    from slimformer.reporting.ledger import read_facts

    said = [facts.max_length for item in found if (facts := read_facts(item.folder)) is not None]
    return min([*said[:1], *(max_length_of(item.folder) for item in found)])


def _encode(
    folder: Path, task: Task, examples: Sequence[Example], max_length: int, done: dict[tuple[bytes, str], tuple[Task, Features]]
) -> tuple[Task, Features]:
    """The task bound to this model's labels, and the examples as its rows; equal tokenizers and labels share them."""
    from slimformer.data.tokenizer import load_tokenizer
    from slimformer.saving.checkpoint import read_config

    config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    key = (tokenizer.to_str().encode(), json.dumps([config.get("id2label"), config.get("problem_type")], sort_keys=True))
    if key not in done:
        bound = task.bind(config)
        done[key] = (bound, bound.encode(examples, tokenizer, max_length))
    return done[key]
