"""Numbers as people read them: times, points, megabytes and counts in a table or a sentence."""

from __future__ import annotations

from slimformer.measuring.records import Interval, Record

MEGABYTE = 1e6  # bytes in the MB that is shown


def times_text(value: float) -> str:
    return f"{value:.1f} times" if value < 10 else f"{value:.0f} times"


def points_text(value: float) -> str:
    text = f"{abs(value):.1f}"
    return f"{text} point" if text == "1.0" else f"{text} points"


def lost_text(value: float) -> str:
    return "lost" if value >= 0 else "gained"


def interval_text(interval: Interval) -> str:
    return f"{signed(interval.low)} to {signed(interval.high)}"


def signed(value: float) -> str:
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}".replace("-", "−")


def mb_text(size: int | None) -> str:
    return "" if size is None else f"{size / MEGABYTE:.1f}"


def count_text(value: int | None) -> str:
    if value is None:
        return ""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return str(value)


def shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def layers_text(record: Record) -> str:
    """What is kept of a record's layers, in a sentence or two; empty where that is not known."""
    if not record.layers:
        return ""
    heads, heads_of = sum(layer.heads for layer in record.layers), sum(layer.heads_of for layer in record.layers)
    neurons, neurons_of = sum(layer.neurons for layer in record.layers), sum(layer.neurons_of for layer in record.layers)
    gone = sum((layer.heads == 0) + (layer.neurons == 0) for layer in record.layers)
    whole_gone = f" {gone} of {2 * len(record.layers)} sublayers are gone altogether." if gone else ""
    return f"{heads} of {heads_of} heads and {neurons:,} of {neurons_of:,} FFN neurons are kept.{whole_gone}"
