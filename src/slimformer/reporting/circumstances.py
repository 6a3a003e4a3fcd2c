"""How a model was made and measured, as labelled facts for people: what it cost, and the circumstances of its numbers."""

from __future__ import annotations

from collections.abc import Sequence

from slimformer.measuring.machine import Environment, Load
from slimformer.measuring.records import Record
from slimformer.measuring.timing import Timing
from slimformer.reporting.words import exits_text, vocabulary_text

Fact = tuple[str, str]  # label, value


def cost_facts(record: Record) -> tuple[Fact, ...]:
    """What it took to make a model, as far as it is known."""
    facts = []
    if record.vocabulary is not None:
        facts.append(("Vocabulary", vocabulary_text(record.vocabulary)))
    if record.exits:
        facts.append(("Layers computed", exits_text(record)))
    if record.minutes is not None:
        threads = f" on {record.threads} thread{'s' * (record.threads != 1)}" if record.threads else ""
        facts.append(("Compression took", f"{record.minutes:.1f} minutes{threads}"))
    if record.peak_rss_bytes is not None:
        facts.append(("Its peak memory", f"{record.peak_rss_bytes / 2**30:.1f} GiB"))
    if record.train_examples is not None:
        facts.append(("Training examples", f"{record.train_examples:,}"))
    if record.seed is not None:
        facts.append(("Seed", str(record.seed)))
    return tuple(facts)


def circumstances(records: Sequence[Record]) -> tuple[Fact, ...]:
    """Machine, versions, data, engines, workloads and dates of these records. The last one stands for what they share."""
    last = records[-1]
    timings = [timing for record in records for timing in record.timings]
    return (
        *_machine(last.environment),
        ("Scored on", f"{last.examples:,} examples of the {last.split} split"),
        *_joined(
            "Engines", {f"{item.runtime} {item.version}, {item.threads} threads, {item.device}" for item in timings}, "; "
        ),
        *(_workload(timing) for timing in last.timings),
        *(_load(timing.load) for timing in last.timings[:1]),
        *_joined("Recipe", {record.recipe for record in records if record.recipe}),
        *_joined("Plan", {record.plan for record in records if record.plan}),
        *_joined("Measured", {record.date for record in records}),
    )


def _machine(machine: Environment) -> tuple[Fact, ...]:
    return (
        ("Processor", f"{machine.cpu}, {machine.cores} cores; {', '.join(machine.flags) or 'flags unknown'}"),
        ("Memory", f"{machine.memory_bytes / 2**30:.1f} GiB"),
        ("System", f"{machine.os}, Python {machine.python}"),
        ("Packages", ", ".join(f"{name} {version}" for name, version in machine.packages.items())),
    )


def _joined(label: str, values: set[str], separator: str = ", ") -> tuple[Fact, ...]:
    return ((label, separator.join(sorted(values))),) if values else ()


def _workload(timing: Timing) -> Fact:
    lengths = timing.lengths
    lead = ", each behind a text that is not timed" if timing.lead else ""
    return (
        timing.workload[0].upper() + timing.workload[1:],
        f"{timing.examples} examples in {len(timing.sizes)} batches, {timing.rounds} rounds in turn after {timing.warmup} of "
        f"warm-up{lead}; {lengths.mean:.1f} tokens on average, median {lengths.p50:.0f}, 95 % up to {lengths.p95:.0f}, "
        f"longest {lengths.max}",
    )


def _load(load: Load) -> Fact:
    return (
        "Load before timing",
        f"others used {load.busy_cores:g} cores; load average {load.average:g}; waited {load.waited_seconds:.0f} s",
    )
