"""Times models side by side: the same batches, in turn, with every raw sample kept.

On a shared machine only the ratio of two times taken in one run means anything. So every batch is run by every model before the
next batch comes, in rotating order, and a speed is a ratio to the baseline of the same run. Nothing is scored here.

A model that runs behind a large one finds its weights gone from the processor's caches, and takes up to twice as long for one text. Where
it serves it runs behind itself. So each turn begins with the first text of the batch, which is not timed (docs/decisions/0046-turns.md).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from slimformer.data.batching import collate, in_order, sorted_by_length
from slimformer.errors import DataError, ModelError
from slimformer.measuring.machine import Load
from slimformer.measuring.sessions import Session
from slimformer.runtimes._texts import TextRunner
from slimformer.tasks.base import Features

_T = TypeVar("_T")

SINGLE = "batch 1, in order"
SORTED = "batch 32, sorted by length"
LEAST_BATCHES = 4  # are timed however short the budget is
LEAD = 1  # texts of its batch that a model runs before it is timed


# -- What is timed -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """Tokens per example, without padding."""

    mean: float
    p50: float
    p95: float
    max: int


@dataclass(frozen=True)
class Workload:
    """Padded batches of real examples, the same ones for every model.

    `batches` maps each model input to an array (batch, seq); `tokens` and `lengths` count without padding.
    """

    name: str
    batch_size: int
    order: str
    batches: tuple[Mapping[str, np.ndarray], ...]
    examples: int
    tokens: int
    lengths: Lengths

    @classmethod
    def of(cls, name: str, batch_size: int, order: str, batches: Sequence[Mapping[str, np.ndarray]]) -> Workload:
        """A workload of these batches, with its tokens counted by their attention masks."""
        tokens = np.concatenate([batch["attention_mask"].sum(axis=1) for batch in batches])  # (examples,)
        lengths = Lengths(
            mean=round(float(tokens.mean()), 2),
            p50=float(np.percentile(tokens, 50)),
            p95=float(np.percentile(tokens, 95)),
            max=int(tokens.max()),
        )
        return cls(name, batch_size, order, tuple(batches), len(tokens), int(tokens.sum()), lengths)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Examples in each batch: (batches,)."""
        return tuple(len(next(iter(batch.values()))) for batch in self.batches)

    def sample(self, limit: int) -> Workload:
        """The same workload with at most `limit` of its batches, evenly spaced."""
        return Workload.of(self.name, self.batch_size, self.order, _spread(self.batches, limit))


def model_inputs(features: Features) -> list[str]:
    """The columns of the features that a model takes, and the mask that collating adds."""
    names = [name for name in features.columns if name in {"input_ids", "token_type_ids", "position_ids", "decoder_input_ids"}]
    return [*names, "attention_mask"]


def workloads(
    features: Features, limit: int = 100, *, batch_size: int = 32, lengths: np.ndarray | None = None
) -> tuple[Workload, Workload]:
    """Batch 1 in order and batch 32 sorted by length, each of at most `limit` batches that are evenly spaced over the split.

    `lengths` (rows,) sorts by other lengths than the features' own: models with different tokenizers then get the same examples
    in the same batches. DataError if there is nothing to time.
    """
    if not len(features) or limit < 1:
        raise DataError("there are no examples to time.", help="give a dev split with at least one example.")
    names = model_inputs(features)
    by_length = sorted_by_length(features.lengths() if lengths is None else lengths, batch_size)

    def build(name: str, size: int, order: str, groups: Sequence[Sequence[int]]) -> Workload:
        return Workload.of(name, size, order, [collate(features, group, names) for group in _spread(groups, limit)])

    return (
        build(SINGLE, 1, "in order", in_order(len(features), 1)),
        build(SORTED.replace("32", str(batch_size)), batch_size, "sorted by length", by_length),
    )


def _spread(batches: Sequence[_T], limit: int) -> list[_T]:
    """At most `limit` of the batches, evenly spaced, so that a sample has the lengths of the whole."""
    if len(batches) <= limit:
        return list(batches)
    return [batches[round(place)] for place in np.linspace(0, len(batches) - 1, limit)]


# -- Times and their ratios --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Raw wall times of one model on one workload, and the circumstances.

    `samples_ms` (rounds, batches) holds the milliseconds of each whole batch, `sizes` (batches,) the examples in it. `warmup`
    counts the rounds that were run before and thrown away. `beams`: of a model that writes texts, how many it followed at once.
    `lead`: texts that were run just before each batch and not timed; none in rows from before 2026-12.
    """

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
    warmup: int
    load: Load
    sizes: tuple[int, ...]
    samples_ms: tuple[tuple[float, ...], ...]
    beams: int | None = None
    lead: int = 0

    @property
    def per_second(self) -> float:
        """Examples a second: the median over rounds."""
        return 1000 * sum(self.sizes) / float(np.median(self.round_ms()))

    @property
    def rounds(self) -> int:
        """How many rounds were timed."""
        return len(self.samples_ms)

    def per_example_ms(self) -> np.ndarray:
        """Milliseconds per example of each batch in each round: (rounds, batches)."""
        samples, sizes = np.asarray(self.samples_ms, dtype=np.float64), np.asarray(self.sizes, dtype=np.float64)
        return samples / sizes  # type: ignore[no-any-return]

    @property
    def p50_ms(self) -> float:
        """Median milliseconds per example over all batches and rounds."""
        return float(np.percentile(self.per_example_ms(), 50))

    @property
    def p95_ms(self) -> float:
        """95th percentile of milliseconds per example over all batches and rounds."""
        return float(np.percentile(self.per_example_ms(), 95))

    def round_ms(self) -> np.ndarray:
        """Milliseconds of each round, all its batches together: (rounds,)."""
        return np.asarray(self.samples_ms, dtype=np.float64).sum(axis=1)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Ratio:
    """Speed over the baseline: the median of the ratios of single rounds, and their 10th and 90th percentiles."""

    median: float
    low: float
    high: float


def ratio(baseline: Timing, candidate: Timing) -> Ratio:
    """Speed of `candidate` over `baseline`, above 1 if it is faster; paired by round, as both ran the same batches in turn.

    ValueError if the two do not come from one `compare`.
    """
    same = (baseline.workload, baseline.sizes, baseline.rounds) == (candidate.workload, candidate.sizes, candidate.rounds)
    if not same:
        raise ValueError(f"'{baseline.workload}' and '{candidate.workload}' were not timed in one run")
    pairs = baseline.round_ms() / candidate.round_ms()  # (rounds,)
    low, median, high = np.percentile(pairs, [10, 50, 90])
    return Ratio(float(median), float(low), float(high))


# -- The race ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounds:
    """How often each batch is timed: `count` rounds after `warmup` rounds that are thrown away.

    With a budget of `seconds` the rounds end early, but never before `least` of them. If `enough` rounds would take longer, as a
    few batches show beforehand, fewer batches are timed, at least LEAST_BATCHES: many short rounds tell more of the spread than
    few long ones.
    """

    count: int = 10
    warmup: int = 1
    least: int = 3
    enough: int = 10
    seconds: float | None = None


def compare(
    sessions: Mapping[str, Session],
    workload: Workload | Mapping[str, Workload],
    rounds: Rounds,
    load: Load,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Timings of all sessions on the same batches: each batch is run by all, in rotating order, before the next one; each runs the first
    text of it once more beforehand.

    A drift of the machine then hits all of them alike. A workload per session is for models with different tokenizers;
    ValueError if these do not hold the same examples in the same batches.
    """
    works = dict(workload) if isinstance(workload, Mapping) else dict.fromkeys(sessions, workload)
    if len({work.sizes for work in works.values()}) != 1:
        raise ValueError("the workloads of one comparison must hold the same examples in the same batches")
    race = _Race(sessions, works, clock)
    with _no_collection():
        race = race.within(rounds)
        for number in range(rounds.warmup):
            race.round(number)
        samples = race.run(rounds)
    return {name: race.timing(name, rounds, load, tuple(item[name] for item in samples)) for name in sessions}


@dataclass(frozen=True)
class _Race:
    sessions: Mapping[str, Session]
    works: Mapping[str, Workload]
    clock: Callable[[], float]

    @property
    def batches(self) -> int:
        return len(next(iter(self.works.values())).batches)

    def sample(self, limit: int) -> _Race:
        return replace(self, works={name: work.sample(limit) for name, work in self.works.items()})

    def within(self, rounds: Rounds) -> _Race:
        """The race with so few batches that enough rounds take about the budget. A round of some batches shows how long."""
        if rounds.seconds is None or not rounds.warmup or self.batches <= LEAST_BATCHES:
            return self
        start = self.clock()
        self.sample(LEAST_BATCHES).round(0)
        needed = min(rounds.count, rounds.enough) * (self.clock() - start) * self.batches / LEAST_BATCHES
        if needed <= rounds.seconds:
            return self
        return self.sample(max(LEAST_BATCHES, int(self.batches * rounds.seconds / needed)))

    def round(self, number: int) -> dict[str, tuple[float, ...]]:
        """Milliseconds of each batch, by session: (batches,). Who runs first changes from batch to batch."""
        names, clock = list(self.sessions), self.clock
        times: dict[str, list[float]] = {name: [] for name in names}
        for place in range(self.batches):
            first = (number * self.batches + place) % len(names)
            for name in names[first:] + names[:first]:
                runner, batch = self.sessions[name].runner, self.works[name].batches[place]
                runner({key: values[:LEAD] for key, values in batch.items()})
                start = clock()
                runner(batch)
                times[name].append(round((clock() - start) * 1000, 4))
        return {name: tuple(values) for name, values in times.items()}

    def run(self, rounds: Rounds) -> list[dict[str, tuple[float, ...]]]:
        """The rounds that count, as many as the budget allows."""
        start = self.clock()
        samples: list[dict[str, tuple[float, ...]]] = []
        while len(samples) < rounds.count:
            samples.append(self.round(len(samples)))
            spent = self.clock() - start
            full = rounds.seconds is not None and spent + spent / len(samples) > rounds.seconds
            if full and len(samples) >= rounds.least:
                break
        return samples

    def timing(self, name: str, rounds: Rounds, load: Load, samples: tuple[tuple[float, ...], ...]) -> Timing:
        work, engine = self.works[name], self.sessions[name].engine
        return Timing(
            workload=work.name,
            batch_size=work.batch_size,
            order=work.order,
            examples=work.examples,
            tokens=work.tokens,
            lengths=work.lengths,
            runtime=engine.runtime,
            version=engine.version,
            device=engine.device,
            threads=engine.threads,
            warmup=rounds.warmup,
            load=load,
            sizes=work.sizes,
            samples_ms=samples,
            lead=LEAD,
        )


# -- The two halves of a model that writes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HalfTimes:
    """What a model that writes takes on a workload, each the median over rounds: the encoder and the search per text, the decoder per
    token of the texts that it wrote, all beams together. `steps`: runs of the decoder for a batch, on average.
    """

    encoder_ms: float
    decoder_ms: float
    search_ms: float
    tokens: float  # written, per text
    steps: float


def time_halves(
    session: Session, workload: Workload, rounds: int = 3, clock: Callable[[], float] = time.perf_counter
) -> HalfTimes:
    """Times the encoder, which runs once, and the decoder, which runs for each token, of a session's files that write.

    ModelError for a session that writes no texts. A time alone says little on a shared machine: `compare` gives ratios.
    """
    runner = session.runner
    if not isinstance(runner, TextRunner):
        raise ModelError(f"{session.path or 'the session'} has no encoder and decoder whose times could be told apart.")
    with _no_collection():
        every = [[runner.timed(batch, clock) for batch in workload.batches] for _ in range(rounds)]
    texts, written = workload.examples, sum(item.written for item in every[0])
    sums = [
        (sum(item.encoder for item in spent), sum(item.decoder for item in spent), sum(item.whole for item in spent))
        for spent in every
    ]
    encoder, decoder, search = (
        float(np.median(values)) * 1000
        for values in zip(*((read, said, whole - read - said) for read, said, whole in sums), strict=True)
    )
    steps = sum(item.steps for item in every[0]) / len(every[0])
    return HalfTimes(encoder / texts, decoder / max(1, written), search / texts, written / texts, steps)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Holds back Python's garbage collector: a collection would be charged to the model that runs just then."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
