"""Plans the time of a compression: announces what each part takes, fits it into a budget, and compares with what it took.

Speeds come from a few real steps of the uncut model on this machine. They become data of the stages (epochs, rows, examples) before
a stage starts: no method and no loop reads a clock for it. A part that took longer shortens what follows.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from slimformer.errors import RecipeError
from slimformer.files import remembered, write_text
from slimformer.log import Log
from slimformer.measuring.latency import SECONDS, SINGLE_SECONDS
from slimformer.running.stages import Clock

FEWEST_STEPS = 60  # a stage that trains less teaches nothing
FEWEST_EXAMPLES = 256
SHORTEST_TRIAL = 5.0  # seconds; in 2.8 s four files ran three rounds, whose median was up to 13 % off that of seven
SHORTEST_BENCH, FULL_BENCH = 8.0, 60.0  # seconds for each of the two workloads of the final measurement
MANY_PASSES = 6.0  # from here on, copies of the rows with other words teach more than the same rows again
MOST_COPIES = 4
RESERVE = 0.03  # share of a budget that no part is given
TUNED_SHARE = 0.33  # of the time that training gets goes at most into tuning a model that came without a head
PASSES = 2.0  # over fewer rows, rather than one over more
TRIED = 2.5  # passes of the uncut model in fp32 take as long as one of each file of a model: that in fp32, and three in int8
CUT_STEP = 0.1  # what a step costs beside the layers, as a share of an uncut one: the teacher's numbers, the losses, the head


class Part(StrEnum):
    """The parts of a compression, in order, as they are shown."""

    TUNING = "tuning the model"
    UNCUT = "the uncut model's files"
    CUTTING = "choosing what to cut"
    DISTILLING = "distillation"
    TRYING = "exporting and trying"
    RIVAL = "the smaller dense rival"
    MEASURING = "measuring side by side"


@dataclass(frozen=True)
class Pace:
    """Seconds a token, without padding, that the uncut model takes on this machine."""

    step: float  # for a training step
    read: float  # for a pass without gradients
    peak_rss_bytes: int = 0


@dataclass(frozen=True)
class Sizes:
    """What the times of a compression depend on beside the pace."""

    layers: int
    train_tokens: int  # of one pass over all training rows
    train_rows: int
    validation_tokens: int  # of the examples that a file is tried on
    dev_tokens: int
    tuned: bool
    searches: int = 1  # ways to write the texts that are scored and timed at the end: the model's own beams, and one

    @property
    def row_tokens(self) -> float:
        """The mean length of a row."""
        return self.train_tokens / max(1, self.train_rows)


@dataclass(frozen=True)
class Diet:
    """How thorough each part is. All of it is decided before the part starts."""

    tune_passes: float = 0.0  # over all rows; 0 for a model that came tuned
    passes: float = 3.0  # of the distillation, over all rows and copies
    examples: int = 2048  # that the importance of heads and neurons is measured on
    probes: int = 4
    tries: int = 3
    rival: bool = True
    trial_seconds: float = 10.0  # of timing, for each of two workloads
    bench_seconds: float = FULL_BENCH  # likewise, at the end

    @property
    def untrained(self) -> Diet:
        """All of it but the distillation, with the shortest final measurement."""
        return replace(self, passes=0.0, bench_seconds=min(self.bench_seconds, SHORTEST_BENCH))


def forecast(sizes: Sizes, pace: Pace, diet: Diet, *aims: float) -> dict[Part, float]:
    """Seconds that each part takes at this pace. What is no training is known to about a third.

    `aims`: the speeds that models are trained for, one after the other; of several, the files of the uncut model ship too.
    """
    count = len(aims)
    trace = 2.0 + 0.6 * sizes.layers  # seconds to trace a model and write one file, checks included
    rows = 300 * sizes.row_tokens  # tokens that each written file is checked on
    write = 0.8 + rows * pace.read
    distil = teaching(sizes, pace, diet.passes, all_steps(pace, aims, rival=False))
    weigh = diet.examples * (sizes.row_tokens * (pace.step + 5 * pace.read) + 12 * pace.step) + sizes.layers
    trial = timing(sizes.dev_tokens, pace, diet.trial_seconds)
    contest = 3 * trace + 6 * write + sizes.validation_tokens * pace.read + trial  # it may be delivered
    short = 9 * (trace / 2 + 0.7) + SECONDS + SINGLE_SECONDS  # models of a few sublayers, traced, written and timed
    return {
        Part.TUNING: diet.tune_passes * sizes.train_tokens * pace.step,
        Part.UNCUT: trace + 3 * write + 3 * sizes.validation_tokens * pace.read + min(10.0, trial),
        Part.CUTTING: short + count * (weigh + (diet.probes + 1) / 2 * (trace + 5.0)),
        Part.DISTILLING: distil,
        Part.TRYING: (count + (count > 1)) * (trace + 5 * write + TRIED * sizes.validation_tokens * pace.read + trial),
        Part.RIVAL: teaching(sizes, pace, diet.passes, all_steps(pace, aims, rival=True)) - distil + contest
        if diet.rival
        else 0.0,
        Part.MEASURING: sizes.searches
        * ((TRIED + count + 1) * sizes.dev_tokens * pace.read + timing(sizes.dev_tokens, pace, diet.bench_seconds))
        + 6.0 * count,
    }


def timing(tokens: int, pace: Pace, seconds: float) -> float:
    """Seconds that timing two workloads of so many tokens takes: `seconds` each, or less if the rounds of all files end before."""
    return 2 * min(seconds, 6 * 31 * tokens * pace.read)


def cut_step(pace: Pace, speedup: float) -> float:
    """Seconds a token that a training step of a model takes that is cut to this speed, of which int8 alone gives 2.3."""
    return pace.step * min(1.0, CUT_STEP + 2.1 / speedup)


def rival_place(aims: Sequence[float]) -> int:
    """Which of the models, in their order, the smaller dense rival is made for: the one in the middle."""
    return (len(aims) - 1) // 2


def all_steps(pace: Pace, aims: Sequence[float], *, rival: bool) -> float:
    """Seconds a token that a training step of all models takes, one after the other, and of the rival beside them."""
    steps = [cut_step(pace, aim) for aim in aims]
    return sum(steps) + (sum(steps[: rival_place(aims) + 1]) if rival else 0.0)


def teaching(sizes: Sizes, pace: Pace, passes: float, step: float) -> float:
    """Seconds of the teacher's outputs, and of as many passes of all that are trained, `step` seconds a token together.

    Fewer than `PASSES` passes go over fewer rows.
    """
    share = min(1.0, passes / PASSES) * (1 + copies_of(passes))
    return sizes.train_tokens * (share * pace.read + passes * step)


def passes_within(sizes: Sizes, pace: Pace, seconds: float, most: float, step: float) -> float:
    """The passes of a distillation that fit into these seconds, at most `most`."""
    low, high = 0.0, most
    if teaching(sizes, pace, most, step) <= seconds:
        return most
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if teaching(sizes, pace, middle, step) <= seconds else (low, middle)
    return low


def rounded_passes(passes: float, digits: int) -> float:
    """Passes as a recipe shows them: to so many digits behind the point, but never to none of a few.

    >>> rounded_passes(3.46, 1), rounded_passes(0.004321, 1)
    (3.5, 0.0043)
    """
    return round(passes, digits) if passes >= 1 else float(f"{passes:.2g}")


def copies_of(passes: float) -> int:
    """Copies of each row with other words, which teach more than many passes over the same rows."""
    return min(MOST_COPIES, int(passes // 3)) if passes >= MANY_PASSES else 0


def diet_for(
    sizes: Sizes, pace: Pace, full: Diet, aims: Sequence[float], seconds: float, batch_size: int, spent: float = 0.0
) -> Diet:
    """The most thorough diet that fits into these seconds; RecipeError if nothing does. `spent`: seconds that are gone already.

    Timing, importance and tries shrink with the budget. Then training gets what is left: first the smaller dense rival is left
    out if it would leave too few steps, then nothing works.
    """
    if sum(forecast(sizes, pace, full, *aims).values()) <= seconds:
        return full
    lean = replace(
        full,
        examples=max(FEWEST_EXAMPLES, min(full.examples, round(full.examples * seconds / 1800 / len(aims)))),
        probes=min(full.probes, 2 if seconds < 900 else 3),
        tries=1,
        trial_seconds=min(full.trial_seconds, max(SHORTEST_TRIAL, 0.01 * seconds)),
        bench_seconds=min(full.bench_seconds, max(SHORTEST_BENCH, 0.03 * seconds)),
    )
    fewest = FEWEST_STEPS * batch_size * sizes.row_tokens / sizes.train_tokens  # passes
    for rival in sorted({full.rival, False}, reverse=True):
        tried = _trained(sizes, pace, replace(lean, rival=rival), aims, seconds)
        enough = tried.passes >= min(full.passes, fewest * (2 if rival else 1))
        if enough and (sizes.tuned or tried.tune_passes >= min(full.tune_passes, fewest)):
            return tried
    least = replace(lean, rival=False, tune_passes=min(full.tune_passes, fewest), passes=min(full.passes, fewest))

    def minutes(count: int) -> int:
        """What so many of the models need at least."""
        needed = sum(forecast(sizes, pace, least, *aims[:count]).values()) + spent
        return math.ceil(1.1 * needed / (1 - RESERVE) / 60)

    given = (seconds + spent) / (1 - RESERVE) / 60
    fewer = next((count for count in range(len(aims) - 1, 0, -1) if minutes(count) <= given), 0)
    speeds, alone = ",".join(dict.fromkeys(f"{aim:g}" for aim in aims[:fewer])), len(set(aims)) < len(aims)
    raise RecipeError(
        f"the minutes are too few on this machine: {spent:.0f} seconds went into measuring it, and {duration(seconds)} are left.",
        help=f"the least that works here is about --minutes {minutes(len(aims))}"
        + (f", or --speedups {speeds}{' without --megabytes' if alone else ''}." if fewer else "."),
    )


def _trained(sizes: Sizes, pace: Pace, diet: Diet, aims: Sequence[float], seconds: float) -> Diet:
    """The diet with as many passes as fit beside the rest of it."""
    rest = sum(forecast(sizes, pace, replace(diet, tune_passes=0.0, passes=0.0), *aims).values())
    free = max(0.0, seconds - rest)
    tune = 0.0 if sizes.tuned else min(diet.tune_passes, TUNED_SHARE * free / (sizes.train_tokens * pace.step))
    free -= tune * sizes.train_tokens * pace.step
    passes = passes_within(sizes, pace, free, diet.passes, all_steps(pace, aims, rival=diet.rival))
    return replace(diet, tune_passes=tune, passes=passes)


def savings(full: Diet, diet: Diet, rows: int | None, sizes: Sizes) -> list[str]:
    """What a diet leaves out or shortens, in words."""
    lines = []
    if diet.tune_passes < full.tune_passes:
        lines.append(f"the model is tuned for {diet.tune_passes:.2g} epochs, not {full.tune_passes:.2g}")
    if diet.passes < full.passes:
        some = f" over {rows:,} of {sizes.train_rows:,} rows" if rows else ""
        lines.append(f"distillation makes {max(diet.passes, PASSES if rows else 0):.2g} passes{some}, not {full.passes:.2g}")
    if diet.rival < full.rival:
        lines.append("no smaller dense rival is trained")
    if diet.tries < full.tries:
        lines.append(
            f"{diet.tries} budget is planned, not up to {full.tries}, and no search for matrices that int8 had better leave in float"
        )
    if diet.examples < full.examples:
        lines.append(f"importance is measured on {diet.examples:,} examples, not {full.examples:,}")
    if diet.bench_seconds < full.bench_seconds:
        lines.append(f"each workload is timed for {diet.bench_seconds:.0f} seconds at the end, not {full.bench_seconds:.0f}")
    return lines


class Schedule:
    """The time of one compression: what was announced, what each part took, and what is left of the budget, kills included."""

    def __init__(self, root: Path, minutes: float | None, log: Log, began: float | None = None) -> None:
        """`began`: the reading of `time.monotonic` when the request came, by default now."""
        self.minutes, self._log = minutes, log
        self._home = root / "schedule"
        self._clock = Clock(self._home, began)
        self._taken: dict[str, float] = remembered(self._home / "taken.json", dict, dict[str, float])
        self.announced: dict[Part, float] = {}

    def __enter__(self) -> Schedule:
        self._clock.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._clock.__exit__(*exception)

    @property
    def spent(self) -> float:
        """Seconds until now."""
        return 60 * self._clock.minutes

    @property
    def left(self) -> float:
        """Seconds that are left of the budget; without one, any number."""
        return math.inf if self.minutes is None else 60 * self.minutes * (1 - RESERVE) - self.spent

    @contextmanager
    def part(self, part: Part) -> Iterator[None]:
        """Counts the time of the block for this part."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._taken[part] = self._taken.get(part, 0.0) + time.monotonic() - begin
            write_text(self._home / "taken.json", json.dumps(self._taken))

    def taken(self, part: Part) -> float:
        """Seconds that this part took until now; a block that is still open does not count."""
        return self._taken.get(part, 0.0)

    def announce(self, parts: Mapping[Part, float]) -> None:
        """Says what is about to be done and how long each part takes."""
        self.announced = dict(parts)
        text = ", ".join(f"{part} {duration(seconds)}" for part, seconds in parts.items() if seconds >= 1)
        self._log.say(f"about {duration(sum(parts.values()))} in all: {text}.")

    def slowness(self, *parts: Part) -> float:
        """How much longer these parts took than was announced: 1 is as announced, 2 is twice as long."""
        known = [part for part in parts if self.announced.get(part) and part in self._taken]
        told = sum(self.announced[part] for part in known)
        return sum(self._taken[part] for part in known) / told if told else 1.0

    def compare(self) -> None:
        """Says what each part took, beside what was announced."""
        told = sum(self.announced.values())
        text = ", ".join(
            f"{part} {duration(seconds)} ({duration(self.announced.get(Part(part), 0.0))})"
            for part, seconds in self._taken.items()
        )
        self._log.say(f"it took {duration(self.spent)}, announced were {duration(told)}; by part (announced): {text}.")
        self._log.event("time", minutes=round(self.spent / 60, 2), announced=round(told / 60, 2), taken=self._taken)


def duration(seconds: float) -> str:
    """Seconds in words: "40 seconds", "4.8 minutes", "2.3 hours"."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
