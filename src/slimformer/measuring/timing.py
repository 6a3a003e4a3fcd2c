"""Times models side by side: the same batches, in turn, raw samples kept.

On a shared machine only the ratio of two times taken in one run means anything. So every batch is run by every runner before
the next batch comes, in rotating order, and a speed is a ratio to the baseline of the same run. Nothing is scored here.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from slimformer.data.batching import collate, in_order, sorted_by_length
from slimformer.errors import DataError
from slimformer.measuring.machine import Load
from slimformer.tasks.base import Features

if TYPE_CHECKING:
    from slimformer.runtimes.base import Runner

T = TypeVar("T")


SINGLE = "batch 1, in order"
SORTED = "batch 32, sorted by length"
LEAST_BATCHES = 8  # however short the budget


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


def model_inputs(features: Features) -> list[str]:
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
    if not len(features) or limit < 1:
        raise DataError("there are no examples to time.", help="give a dev split with at least one example.")
    names = model_inputs(features)

    def build(name: str, size: int, order: str, groups: Sequence[Sequence[int]]) -> Workload:
        return _workload(name, size, order, tuple(collate(features, group, names) for group in _spread(groups, limit)))

    by_length = sorted_by_length(features.lengths() if lengths is None else lengths, batch_size)
    return (
        build(SINGLE, 1, "in order", in_order(len(features), 1)),
        build(SORTED.replace("32", str(batch_size)), batch_size, "sorted by length", by_length),
    )


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
