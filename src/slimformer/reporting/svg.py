"""Draws the report's two pictures as inline SVG: a scatter with a frontier, and bars of what was kept.

The one idea: shapes carry the meaning and colours come from the page's own CSS variables, so that a picture reads in light, in
dark, in print and without colour, and needs no script and no plotting library. Text is escaped here, once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

CHAR = 6.3  # width of one character of a 12 px label, generous: the reader's font is not known
BOLD = 7.4  # the same in bold
LINE = 15.0  # height of a label


@dataclass(frozen=True)
class Mark:
    """One point of a scatter; `style` is "chosen", "ours", "base", "rival" or "small" and decides its shape."""

    x: float
    y: float
    label: str
    style: str
    title: str
    spread: tuple[float, float] | None = None  # low and high of x


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def _numbers(values: Sequence[float]) -> list[tuple[float, str]]:
    """Each value with its text, all with the decimals that the longest needs."""
    decimals = max((len(f"{value:.10g}".partition(".")[2]) for value in values if abs(value) >= 1e-4), default=0)
    return [(value, f"{value:.{min(decimals, 6)}f}") for value in values]


def _shape(style: str, x: float, y: float) -> str:
    """A filled disc for ours, larger if chosen; rivals hollow, each kind with a shape of its own."""
    if style in {"chosen", "ours"}:
        return f'<circle class="m-{style}" cx="{x:.1f}" cy="{y:.1f}" r="{7 if style == "chosen" else 4.5}"/>'
    if style == "base":
        return f'<rect class="m-rival" x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10"/>'
    if style == "small":
        points = f"{x:.1f},{y - 6.5:.1f} {x + 6.5:.1f},{y:.1f} {x:.1f},{y + 6.5:.1f} {x - 6.5:.1f},{y:.1f}"
    else:
        points = f"{x:.1f},{y - 6.5:.1f} {x + 6:.1f},{y + 4.5:.1f} {x - 6:.1f},{y + 4.5:.1f}"
    return f'<polygon class="m-rival" points="{points}"/>'


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _place(x: float, y: float, width: float, taken: Sequence[Box], bounds: Box) -> tuple[float, float, str, Box]:
    """Where a label of `width` goes beside its point: the place that covers least, the nearer ones first."""
    best: tuple[float, float, float, str, Box] | None = None
    for turn, (dx, dy, anchor) in enumerate(
        (sign * dx, dy, anchor)
        for dy in (4, -12, 20, -26, 34, -40, 48, 62, -54)
        for sign, dx, anchor in ((1, 11, "start"), (-1, 11, "end"), (1, 0, "middle"))
        if not (anchor == "middle" and abs(dy - 4) < 10)
    ):
        left = x + dx - {"start": 0.0, "end": width, "middle": width / 2}[anchor]
        box = (left, y + dy - LINE + 4, left + width, y + dy + 4)
        outside = max(0.0, bounds[0] - box[0]) + max(0.0, box[2] - bounds[2])
        outside += max(0.0, bounds[1] - box[1]) + max(0.0, box[3] - bounds[3])
        cost = 2 * sum(_overlap(box, other) for other in taken) + 40 * outside + 4 * turn
        if best is None or cost < best[0]:
            best = (cost, x + dx, y + dy, anchor, box)
    assert best is not None
    return best[1:]


def scatter(
    marks: Sequence[Mark],
    front: Sequence[tuple[float, float]],
    x_label: str,
    y_label: str,
    *,
    width: int,
    height: int,
    asked: tuple[float, float] | None = None,
    more_is_right: bool,
) -> str:
    """An SVG of points with the frontier as steps. `asked` (x, y) shades the corner at least that far right and up.

    `more_is_right`: whether a larger x is better, which decides how the steps of the frontier go.
    """
    left, right, top, bottom = 58, 18, 18, 46 if width > 500 else 58
    xs = [mark.x for mark in marks] + [bound for mark in marks for bound in mark.spread or ()]
    ys = [mark.y for mark in marks]
    if asked:
        xs.append(asked[0])
        ys.append(asked[1])
    span_x, span_y = max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 0.01
    # Room on the right for labels, and above and below so that no point sits on the frame.
    x0, x1 = max(0.0, min(xs) - 0.08 * span_x), max(xs) + (0.16 if width > 500 else 0.1) * span_x
    y0, y1 = min(ys) - 0.16 * span_y, max(ys) + 0.16 * span_y

    def px(value: float) -> float:
        return left + (value - x0) / (x1 - x0) * (width - left - right)

    def py(value: float) -> float:
        return height - bottom - (value - y0) / (y1 - y0) * (height - top - bottom)

    out = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(y_label)} against {escape(x_label)}" xmlns="http://www.w3.org/2000/svg">'
    ]
    if asked:
        out.append(
            f'<rect class="asked" x="{px(asked[0]):.1f}" y="{top}" width="{width - right - px(asked[0]):.1f}" '
            f'height="{py(asked[1]) - top:.1f}"/>'
        )
    for value, told in _numbers(ticks(y0, y1, 5 if width > 500 else 4)):
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py(value):.1f}" y2="{py(value):.1f}"/>')
        out.append(f'<text class="tick" x="{left - 8}" y="{py(value) + 4:.1f}" text-anchor="end">{told}</text>')
    for value, told in _numbers(ticks(x0, x1, 7 if width > 500 else 4)):
        out.append(f'<text class="tick" x="{px(value):.1f}" y="{height - bottom + 18}" text-anchor="middle">{told}</text>')
    out.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{height - bottom}" y2="{height - bottom}"/>')
    words = _wrapped(x_label, int((width - 30) / CHAR))
    for number, line in enumerate(words):
        down = height - bottom + 36 + number * 14
        out.append(f'<text class="label" x="{width - right}" y="{down}" text-anchor="end">{escape(line)}</text>')
    taken: list[Box] = [
        (mark_x - 9, mark_y - 9, mark_x + 9, mark_y + 9) for mark_x, mark_y in ((px(m.x), py(m.y)) for m in marks)
    ]
    if asked:
        place = (px(asked[0]) + 8, top + 14)
        out.append(f'<text class="asked-label" x="{place[0]:.1f}" y="{place[1]:.1f}">asked for</text>')
        taken.append((place[0], place[1] - LINE, place[0] + 9 * CHAR, place[1] + 2))
    steps = sorted(front)
    if len(steps) > 1:
        path = [f"M{px(steps[0][0]):.1f},{py(steps[0][1]):.1f}"]
        for (x_before, y_before), (x, y) in pairwise(steps):
            # Between two of them the worse quality is what one gets for the cost in between.
            path.append(f"V{py(y):.1f}H{px(x):.1f}" if more_is_right else f"H{px(x):.1f}V{py(y):.1f}")
            corner = (px(x) - 20, py(y if more_is_right else y_before) - 1, px(x), py(y if more_is_right else y_before) + 1)
            taken.append(corner)
            bend = px(x_before if more_is_right else x)
            taken.append((bend - 2, py(max(y, y_before)), bend + 2, py(min(y, y_before))))
        out.append(f'<path class="front" d="{"".join(path)}"/>')
    for mark in marks:
        if mark.spread:
            low, high = px(mark.spread[0]), px(mark.spread[1])
            taken.append((low, py(mark.y) - 2, high, py(mark.y) + 2))
            out.append(f'<line class="spread" x1="{low:.1f}" x2="{high:.1f}" y1="{py(mark.y):.1f}" y2="{py(mark.y):.1f}"/>')
    bounds = (float(left), 4.0, float(width - 2), float(height - bottom))
    # The chosen point gets its label first, then from top to bottom.
    for mark in sorted(marks, key=lambda mark: (mark.style != "chosen", -mark.y)):
        x, y = px(mark.x), py(mark.y)
        out.append(f"<g><title>{escape(mark.title)}</title>{_shape(mark.style, x, y)}")
        if mark.label:
            limit = 34 if width > 500 else 20
            label = mark.label if len(mark.label) <= limit else mark.label[: limit - 1] + "…"
            bold = " strong" if mark.style == "chosen" else ""
            tx, ty, anchor, box = _place(x, y, len(label) * (BOLD if bold else CHAR), taken, bounds)
            taken.append(box)
            out.append(f'<text class="point{bold}" x="{tx:.1f}" y="{ty:.1f}" text-anchor="{anchor}">{escape(label)}</text>')
        out.append("</g>")
    out.append(f'<text class="label" x="{left}" y="{top - 6}">{escape(y_label)}</text>')
    out.append("</svg>")
    return "".join(out)


def _wrapped(text: str, limit: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > limit:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


Row = tuple[str, int, int]  # layer, kept, of


def bars(panels: Sequence[tuple[str, Sequence[Row]]], *, width: int, columns: int) -> str:
    """An SVG of horizontal bars, a panel per kind of unit, a bar per layer: the filled part is kept."""
    row_height, head, gap = 24, 30, 36
    most = max(len(rows) for _, rows in panels)
    panel_height = head + most * row_height + 14
    lines = math.ceil(len(panels) / columns)
    panel_width = (width - gap * (columns - 1)) / columns
    height = lines * panel_height
    out = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        'aria-label="What is kept in each layer" xmlns="http://www.w3.org/2000/svg">'
    ]
    for number, (title, rows) in enumerate(panels):
        x, y = (number % columns) * (panel_width + gap), (number // columns) * panel_height
        out.append(f'<text class="panel" x="{x:.1f}" y="{y + 14}">{escape(title)}</text>')
        widest = max((len(f"{kept} of {of}") for _, kept, of in rows), default=0) * CHAR
        start, length = x + 26, panel_width - 26 - widest - 14
        for place, (name, kept, of) in enumerate(rows):
            top = y + head + place * row_height
            share = kept / of if of else 0.0
            told = f"{kept} of {of}" if kept else "gone"
            out.append(f"<g><title>layer {escape(name)}: {kept} of {of} {escape(title)}</title>")
            out.append(f'<text class="tick" x="{x + 16:.1f}" y="{top + 13}" text-anchor="end">{escape(name)}</text>')
            out.append(f'<rect class="of" x="{start:.1f}" y="{top}" width="{length:.1f}" height="16" rx="2"/>')
            if kept:
                out.append(
                    f'<rect class="kept" x="{start:.1f}" y="{top}" width="{max(2.0, length * share):.1f}" height="16" rx="2"/>'
                )
            out.append(f'<text class="tick" x="{start + length + 8:.1f}" y="{top + 13}">{told}</text></g>')
    out.append("</svg>")
    return "".join(out)
