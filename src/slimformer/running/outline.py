"""The plan of a compression before it starts: a few real steps are timed, all is fitted into the minutes, and the plan is said.

`schedule.py` knows what each part takes; a resumed run goes by the plan that it began with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from slimformer.data.material import subset
from slimformer.families.base import Subject
from slimformer.files import remembered
from slimformer.reporting.words import listed, size_text
from slimformer.running.bundle import Bundle, Run
from slimformer.running.lessons import DISTIL_TOKENS, TUNE_TOKENS, distillation, tuning
from slimformer.running.schedule import (
    FULL_BENCH,
    SHORTEST_BENCH,
    Diet,
    Pace,
    Part,
    Schedule,
    Sizes,
    diet_for,
    duration,
    forecast,
    rounded_passes,
    savings,
)
from slimformer.running.stages import training_of
from slimformer.running.trials import tried_rows
from slimformer.running.wanted import Wanted
from slimformer.tasks.base import Features, Split
from slimformer.training.estimate import estimate
from slimformer.training.teacher import cached_bytes

PROBES = 4  # so many untrained exports find the budget for a speed; each takes seconds
SAID = 3  # reads of a token among others take about as long as saying one on a beam


@dataclass(frozen=True)
class Outline:
    """What was measured and decided before anything started; a resumed run goes by the same."""

    sizes: Sizes
    pace: Pace
    diet: Diet
    disk_bytes: int


def outline_of(
    first: Bundle,
    wanted: Wanted,
    aims: Sequence[float],
    schedule: Schedule,
    run: Run,
    *,
    tuned: bool,
    megabytes: Sequence[float] = (),
) -> Outline:
    """Measures a few real steps, fits everything into the budget if there is one, and says what will be done and how long it takes.

    `aims`: the speeds that models are trained for, each from the one before. `megabytes`: the sizes that the last are trained for,
    whose steps take as long as at those speeds.
    """
    asked = f"{listed([f'{aim:g}' for aim in aims[: len(aims) - len(megabytes)]])} times the speed"
    asked += f", and to {listed([f'{size:g}' for size in megabytes])} megabytes" if megabytes else ""
    file = run.root / "outline.json"
    new = not file.is_file()
    outline = remembered(file, lambda: _planned(first, wanted, aims, schedule, run, tuned=tuned), Outline)
    schedule.announced = forecast(outline.sizes, outline.pace, outline.diet, *aims)
    if new:
        _announce(outline, full_diet(first, wanted, outline.sizes), first, wanted, asked, len(aims), schedule, run)
    return outline


def final_seconds(outline: Outline, schedule: Schedule, run: Run, *aims: float) -> float:
    """Seconds for each of the two workloads of the final measurement: as planned, but no more than is left."""
    if schedule.minutes is None:
        return outline.diet.bench_seconds
    idle = forecast(outline.sizes, outline.pace, replace(outline.diet, bench_seconds=0.0), *aims)
    free = (schedule.left - idle[Part.MEASURING]) / (2 * outline.sizes.searches)
    planned = remembered(run.root / "bench.json", lambda: min(FULL_BENCH, max(SHORTEST_BENCH, free)), float)
    return round(planned, 1)


def _planned(first: Bundle, wanted: Wanted, aims: Sequence[float], schedule: Schedule, run: Run, *, tuned: bool) -> Outline:
    material = first.material
    features = {split: material.features[split] for split in Split}
    chosen, _ = subset(material, Split.VALIDATION, tried_rows(material.task))
    tokens = int(features[Split.TRAIN].lengths().sum())
    sizes = Sizes(
        layers=len(first.subject.anatomy.layers),
        train_tokens=tokens,
        train_rows=len(features[Split.TRAIN]),
        validation_tokens=_read_tokens(chosen, first.subject) * (2 if tuned else 1),
        dev_tokens=_read_tokens(features[Split.DEV], first.subject),
        tuned=tuned,
        searches=1 if first.subject.beams in (None, 1) else 2,
    )
    full = full_diet(first, wanted, sizes)
    distil = distillation(first, wanted, full.passes)
    cost = estimate(training_of(replace(distil, rows=None, augment=0), first, run), seconds=1.5)
    pace = Pace(1 / cost.tokens_per_second, cost.teacher_seconds / tokens, cost.peak_rss_bytes)
    diet = (
        full if wanted.minutes is None else diet_for(sizes, pace, full, aims, schedule.left, wanted.batch_size, schedule.spent)
    )
    learnt = distillation(first, wanted, diet.passes)
    lengths = features[Split.TRAIN].lengths()[: learnt.rows]
    needs = learnt.methods[-1].effects().needs if first.subject.beams is None else ()
    return Outline(sizes, pace, diet, (1 + learnt.augment) * cached_bytes(first.teacher.anatomy, lengths, needs))


def _read_tokens(features: Features, subject: Subject) -> int:
    """The tokens of these rows; of texts that are to be written, what saying them on each beam takes as long as to read."""
    targets = features.target_lengths()
    said = 0 if targets is None else SAID * (subject.beams or 1) * int(targets.sum())
    return int(features.lengths().sum()) + said


def full_diet(first: Bundle, wanted: Wanted, sizes: Sizes) -> Diet:
    """Everything as thorough as the sizes ask for."""
    tune = min(5.0, max(2.0, TUNE_TOKENS / sizes.train_tokens))
    passes = wanted.epochs or min(12.0, max(3.0, DISTIL_TOKENS / sizes.train_tokens))
    return Diet(
        tune_passes=0.0 if sizes.tuned else rounded_passes(tune, 1),
        passes=rounded_passes(passes, 1),
        probes=PROBES,
        tries=wanted.tries,
        rival="small-dense" in wanted.rivals,
    )


def _announce(
    outline: Outline, full: Diet, first: Bundle, wanted: Wanted, asked: str, count: int, schedule: Schedule, run: Run
) -> None:
    """Says what is about to happen, how long it takes, what it needs, and what was left out for the budget."""
    diet, sizes, pace, say = outline.diet, outline.sizes, outline.pace, run.log.say
    distil = distillation(first, wanted, diet.passes)
    steps = distil.steps_of((distil.rows or sizes.train_rows) * (1 + distil.augment))
    if not sizes.tuned:
        say(
            f"this model has no head for the task yet: it is tuned first, for {diet.tune_passes:.2g} epochs at lr "
            f"{tuning(first.material.source, diet, sizes, wanted).lr:g}, {duration(schedule.announced[Part.TUNING])}."
        )
    several = count > 1
    budgets = "each from the one before" if several else f"up to {diet.tries} budget{'s' if diet.tries > 1 else ''}"
    say(
        f"plan: cut to {asked}, distil {'each ' if several else ''}for "
        f"{diet.passes:.2g} epochs ({steps:,} steps; uncut {1 / pace.step:,.0f} tokens a second), int8, verify; {budgets}."
    )
    schedule.announce(schedule.announced)
    if diet.tries > 1:
        again = sum(schedule.announced[part] for part in (Part.CUTTING, Part.DISTILLING, Part.TRYING))
        say(f"if too much is lost, each further budget takes {duration(again)}.")
    busy = f"up to {run.quiet.left:.0f} seconds more if the machine is busy; " if run.quiet.left else ""
    say(
        f"{busy}about {pace.peak_rss_bytes / 2**30:.1f} GiB of memory, "
        + (
            f"{size_text(outline.disk_bytes)} of disk for the teacher's outputs."
            if first.subject.beams is None
            else "and the teacher runs beside the student."
        )
    )
    if wanted.minutes is not None and diet != full:
        say(f"to fit {wanted.minutes:g} minutes: {'; '.join(savings(full, diet, distil.rows, sizes))}.")
