"""Numbers as people read them: times, points, megabytes and counts, for a table or a sentence. A missing number is ""."""

from __future__ import annotations

from collections.abc import Sequence

from slimformer.measuring.records import Interval, Record, VocabularyFacts

MEGABYTE = 1e6  # bytes in the MB that is shown


def times_text(value: float) -> str:
    """A speed-up in words.

    >>> times_text(3.27), times_text(12.8)
    ('3.3 times', '13 times')
    >>> times_text(0.58)
    '0.58 times'
    """
    return f"{value:.2f} times" if value < 1 else f"{value:.1f} times" if value < 10 else f"{value:.0f} times"


def points_text(value: float) -> str:
    """Points of a metric without their sign.

    >>> points_text(-1.04), points_text(0.4)
    ('1.0 point', '0.4 points')
    """
    text = f"{abs(value):.1f}"
    return f"{text} point" if text == "1.0" else f"{text} points"


def lost_text(value: float) -> str:
    """The verb that goes with `points_text`: a loss below zero is a gain."""
    return "lost" if value >= 0 else "gained"


def signed(value: float) -> str:
    """One decimal with its sign.

    >>> signed(0.44), signed(-0.5), signed(0.01)
    ('+0.4', '−0.5', '0.0')
    """
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}".replace("-", "−")


def interval_text(interval: Interval) -> str:
    """The two ends of an interval.

    >>> interval_text(Interval(0.5, -0.4, 1.4))
    '−0.4 to +1.4'
    """
    return f"{signed(interval.low)} to {signed(interval.high)}"


def mb_text(size: int | None) -> str:
    """Bytes as MB, without the unit: one decimal, or two figures of a small file.

    >>> mb_text(22_713_216), mb_text(96_400), mb_text(None)
    ('22.7', '0.096', '')
    """
    if size is None:
        return ""
    value = size / MEGABYTE
    return f"{value:.1f}" if value >= 0.95 else f"{value:.2g}"


def size_text(size: int) -> str:
    """Bytes with the unit that suits them.

    >>> size_text(6_600_000_000), size_text(22_713_216), size_text(96_400), size_text(812)
    ('6.6 GB', '22.7 MB', '96 kB', '812 bytes')
    """
    if size >= 950 * MEGABYTE:
        return f"{size / 1e9:.1f} GB"
    if size >= 0.95 * MEGABYTE:
        return f"{size / MEGABYTE:.1f} MB"
    return f"{size / 1e3:.0f} kB" if size >= 1e3 else f"{size} bytes"


def ratio_text(size: int, other: int) -> str:
    """How much smaller or larger a file is than another one.

    >>> ratio_text(15_000_000, 90_000_000), ratio_text(12, 10), ratio_text(10, 10)
    ('6.0 times smaller', '1.2 times larger', 'the same size')
    """
    if f"{size / other:.2f}" == "1.00":
        return "the same size"
    return f"{other / size:.1f} times smaller" if size < other else f"{size / other:.1f} times larger"


def count_text(value: int | None) -> str:
    """A count with its unit.

    >>> count_text(22_700_000), count_text(384)
    ('22.7 M', '384')
    """
    if value is None:
        return ""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return str(value)


def listed(names: Sequence[str]) -> str:
    """Several names as a sentence has them.

    >>> listed(["2", "3", "4"]), listed(["2"])
    ('2, 3 and 4', '2')
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def plain(text: str) -> str:
    """A text on one line, with "?" for characters that are not to be printed: what a file names must not steer a terminal.

    >>> plain("int8 \\x1b[31m,\\nred")
    'int8 ?[31m, red'
    """
    return "".join(sign if sign.isprintable() else "?" for sign in " ".join(text.split()))


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters of a text."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def layers_text(record: Record) -> str:
    """What is kept of a record's layers, in a sentence or two; empty if that is not known."""
    if not record.layers:
        return ""
    heads, heads_of = sum(layer.heads for layer in record.layers), sum(layer.heads_of for layer in record.layers)
    neurons, neurons_of = sum(layer.neurons for layer in record.layers), sum(layer.neurons_of for layer in record.layers)
    gone = sum((layer.heads == 0) + (layer.neurons == 0) for layer in record.layers)
    removed = f" {gone} of {2 * len(record.layers)} sublayers are gone altogether." if gone else ""
    kept = [f"{heads} of {heads_of} heads", f"{neurons:,} of {neurons_of:,} FFN neurons"]
    if record.hidden_units is not None:
        kept.append(f"{record.hidden_units:,} of {record.hidden_units_of or record.hidden_units:,} hidden units")
    return f"{', '.join(kept[:-1])} and {kept[-1]} are kept.{removed}"


def exits_text(record: Record) -> str:
    """After how many layers a file answered the examples; empty if it computes all."""
    if not record.exits:
        return ""
    depth = sum(layer.heads > 0 or layer.neurons > 0 for layer in record.layers)
    mean = sum(item.layers * item.share for item in record.exits)
    where = ", ".join(f"{item.layers}: {100 * item.share:.0f} %" for item in record.exits)
    return f"{mean:.2f}{f' of {depth}' if depth else ''} on average; by layers: {where}"


def vocabulary_text(facts: VocabularyFacts) -> str:
    """What was cut of a vocabulary, and what that does to texts that it was not cut for.

    >>> from slimformer.measuring.records import VocabularyFacts
    >>> vocabulary_text(VocabularyFacts(900, 3000, 200, 10, 0, 1.004))
    '900 of 3,000 word pieces stay; of 200 dev texts 10 (5.0 %) are split otherwise, 0 have unknown words, 0.4 % more pieces'
    """
    share = f" ({100 * facts.otherwise / facts.held:.1f} %)" if facts.held else ""
    return (
        f"{facts.pieces:,} of {facts.pieces_of:,} word pieces stay; of {facts.held:,} dev texts {facts.otherwise:,}{share} are split "
        f"otherwise, {facts.unreadable:,} have unknown words, {100 * (facts.longer - 1):.1f} % more pieces"
    )
