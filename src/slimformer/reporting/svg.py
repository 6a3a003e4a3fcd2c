"""Draws the report's two pictures as inline SVG: a scatter with a frontier, and bars of what is kept.

Shapes carry the meaning and colours come from the page's own CSS variables, so that a picture reads in light, in dark, in print
and without colour, and needs no script and no plotting library. Text is escaped here, once.
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
FURTHEST = (
    1.5  # a bar is cut off beyond so many times the largest x of a point: else one noisy round presses all points together
)

_Box = tuple[float, float, float, float]  # left, top, right, bottom
_Point = tuple[float, float]


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


# -- The scatter -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """One point of a scatter; `style` is "chosen", "ours", "beaten", "base", "rival" or "small" and decides its shape.

    `spread` is the low and the high x of a bar through the point, `rise` the low and the high y of one. `link` is where a click leads.
    """

    x: float
    y: float
    label: str
    style: str
    title: str
    spread: tuple[float, float] | None = None
    rise: tuple[float, float] | None = None
    link: str = ""


@dataclass(frozen=True)
class Scatter:
    """A scatter before it is drawn: marks, and the frontier as steps through `front`.

    `asked` shades the corner that is at least that far right and up. `more_is_right` says whether a larger x is better, which
    decides how the steps of the frontier go. `joined`: `front` is a straight line from point to point, and x begins at 0.
    """

    marks: Sequence[Mark]
    front: Sequence[_Point]
    x_label: str
    y_label: str
    more_is_right: bool
    asked: _Point | None = None
    joined: bool = False


def draw_scatter(scatter: Scatter, width: int, height: int) -> str:
    """The scatter as SVG, `width` and `height` in pixels."""
    frame = _Frame.around(scatter, width, height)
    taken: list[_Box] = [(x - 9, y - 9, x + 9, y + 9) for x, y in (frame.place(mark.x, mark.y) for mark in scatter.marks)]
    taken.append((frame.left, frame.top - 6 - LINE, frame.left + len(scatter.y_label) * CHAR, frame.top - 2))
    parts = [
        *_corner(frame, scatter),
        *_axes(frame, scatter.x_label),
        *_asked_label(frame, scatter, taken),
        *_steps(frame, scatter, taken),
        *_spreads(frame, scatter.marks, taken),
        *_points(frame, scatter.marks, taken),
        f'<text class="label" x="{frame.left}" y="{frame.top - 6}">{escape(scatter.y_label)}</text>',
    ]
    return _svg(width, height, f"{scatter.y_label} against {scatter.x_label}", parts)


@dataclass(frozen=True)
class _Frame:
    """From numbers to pixels: the values at the edges, and the margins in pixels."""

    width: int
    height: int
    x0: float
    x1: float
    y0: float
    y1: float
    left: int = 58
    right: int = 18
    top: int = 18

    @classmethod
    def around(cls, scatter: Scatter, width: int, height: int) -> _Frame:
        """A frame with room on the right for labels, and above and below so that no point sits on the edge."""
        asked = [scatter.asked] if scatter.asked else []
        points = [mark.x for mark in scatter.marks] + [x for x, _ in asked]
        most = FURTHEST * max(points)
        xs = points + [min(x, most) for mark in scatter.marks for x in mark.spread or ()]
        ys = [mark.y for mark in scatter.marks] + [y for _, y in asked]
        ys += [y for mark in scatter.marks for y in mark.rise or ()]
        span_x, span_y = max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 0.01
        room = 0.16 if width > 500 else 0.1
        low, high = max(0.0, min(xs) - 0.08 * span_x), max(xs) + room * span_x
        return cls(width, height, low, high, min(ys) - 0.16 * span_y, max(ys) + 0.16 * span_y)

    @property
    def wide(self) -> bool:
        return self.width > 500

    @property
    def bottom(self) -> int:
        return 46 if self.wide else 58

    @property
    def floor(self) -> int:
        """Where the x axis lies."""
        return self.height - self.bottom

    @property
    def end(self) -> int:
        """Where the x axis ends."""
        return self.width - self.right

    def px(self, value: float) -> float:
        return self.left + (value - self.x0) / (self.x1 - self.x0) * (self.width - self.left - self.right)

    def py(self, value: float) -> float:
        return self.floor - (value - self.y0) / (self.y1 - self.y0) * (self.height - self.top - self.bottom)

    def place(self, x: float, y: float) -> _Point:
        return self.px(x), self.py(y)


def _corner(frame: _Frame, scatter: Scatter) -> list[str]:
    if not scatter.asked:
        return []
    x, y = frame.place(*scatter.asked)
    return [f'<rect class="asked" x="{x:.1f}" y="{frame.top}" width="{frame.end - x:.1f}" height="{y - frame.top:.1f}"/>']


def _axes(frame: _Frame, x_label: str) -> list[str]:
    parts = []
    for value, text in _texts(ticks(frame.y0, frame.y1, 5 if frame.wide else 4)):
        y = frame.py(value)
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{frame.end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{frame.left - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for value, text in _texts(ticks(frame.x0, frame.x1, 7 if frame.wide else 4)):
        x = frame.px(value)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{frame.floor + 18}" text-anchor="middle">{text}</text>')
    parts.append(f'<line class="axis" x1="{frame.left}" x2="{frame.end}" y1="{frame.floor}" y2="{frame.floor}"/>')
    for number, line in enumerate(_wrapped(x_label, int((frame.width - 30) / CHAR))):
        y = frame.floor + 36 + number * 14
        parts.append(f'<text class="label" x="{frame.end}" y="{y}" text-anchor="end">{escape(line)}</text>')
    return parts


def _asked_label(frame: _Frame, scatter: Scatter, taken: list[_Box]) -> list[str]:
    if not scatter.asked:
        return []
    x, y = frame.px(scatter.asked[0]) + 8, frame.top + 14
    taken.append((x, y - LINE, x + 9 * CHAR, y + 2))
    return [f'<text class="asked-label" x="{x:.1f}" y="{y:.1f}">asked for</text>']


def _steps(frame: _Frame, scatter: Scatter, taken: list[_Box]) -> list[str]:
    """The frontier. Between two of its points the worse quality is what one gets for the cost in between."""
    points = sorted(scatter.front)
    if len(points) < 2:
        return []
    right = scatter.more_is_right
    if scatter.joined:
        places = " ".join("{:.1f},{:.1f}".format(*frame.place(*point)) for point in points)
        return [f'<polyline class="front" points="{places}"/>']
    path = ["M{:.1f},{:.1f}".format(*frame.place(*points[0]))]
    for (x_before, y_before), (x, y) in pairwise(points):
        to_x, to_y = frame.place(x, y)
        path.append(f"V{to_y:.1f}H{to_x:.1f}" if right else f"H{to_x:.1f}V{to_y:.1f}")
        level, bend = frame.py(y if right else y_before), frame.px(x_before if right else x)
        taken.append((to_x - 20, level - 1, to_x, level + 1))
        taken.append((bend - 2, frame.py(max(y, y_before)), bend + 2, frame.py(min(y, y_before))))
    return [f'<path class="front" d="{"".join(path)}"/>']


def _spreads(frame: _Frame, marks: Sequence[Mark], taken: list[_Box]) -> list[str]:
    parts = []
    for mark in marks:
        if mark.spread:
            low, high = (min(max(frame.px(x), frame.left), frame.end) for x in mark.spread)
            y = frame.py(mark.y)
            taken.append((low, y - 2, high, y + 2))
            parts.append(f'<line class="spread" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if mark.rise:
            bottom, top = (frame.py(y) for y in mark.rise)
            x = frame.px(mark.x)
            taken.append((x - 2, top, x + 2, bottom))
            parts.append(f'<line class="spread" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
    return parts


def _points(frame: _Frame, marks: Sequence[Mark], taken: list[_Box]) -> list[str]:
    """The points with their labels. The chosen ones get theirs first, then the others from top to bottom.

    A label that would be printed over another one is left out.
    """
    parts, labels = [], list[_Box]()
    bounds = (float(frame.left), 4.0, float(frame.width - 2), float(frame.floor))
    for mark in sorted(marks, key=lambda mark: (mark.style != "chosen", -mark.y)):
        x, y = frame.place(mark.x, mark.y)
        parts.append(f'<a href="{escape(mark.link)}">' if mark.link else "")
        parts.append(f"<g><title>{escape(mark.title)}</title>{_shape(mark.style, x, y)}")
        if mark.label:
            limit = 34 if frame.wide else 20
            label = mark.label if len(mark.label) <= limit else mark.label[: limit - 1] + "…"
            bold = mark.style == "chosen"
            label_x, label_y, anchor, box = _beside(x, y, len(label) * (BOLD if bold else CHAR), taken, labels, bounds)
            if not any(_overlap(box, other) for other in labels):  # else it can be read in the tooltip and in the table
                taken.append(box)
                labels.append(box)
                style = "point strong" if bold else "point"
                parts += _leader(x, y, label_x, label_y)
                parts.append(
                    f'<text class="{style}" x="{label_x:.1f}" y="{label_y:.1f}" text-anchor="{anchor}">{escape(label)}</text>'
                )
        parts.append("</g></a>" if mark.link else "</g>")
    return parts


def _leader(x: float, y: float, label_x: float, label_y: float) -> list[str]:
    """A thin line from a point to its label, if the label stands so far away that it could be another point's."""
    start, end = (y - 8, label_y + 4) if label_y < y else (y + 8, label_y - LINE + 4)
    away = start - end if label_y < y else end - start
    if away < 8:
        return []
    return [f'<line class="leader" x1="{x:.1f}" x2="{label_x:.1f}" y1="{start:.1f}" y2="{end:.1f}"/>']


def _shape(style: str, x: float, y: float) -> str:
    """A filled disc for ours, larger if chosen and hollow if beaten; rivals are hollow, each kind with a shape of its own."""
    if style in {"chosen", "ours"}:
        return f'<circle class="m-{style}" cx="{x:.1f}" cy="{y:.1f}" r="{7 if style == "chosen" else 4.5}"/>'
    if style == "beaten":
        return f'<circle class="m-beaten" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    if style == "base":
        return f'<rect class="m-rival" x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10"/>'
    if style == "small":
        points = f"{x:.1f},{y - 6.5:.1f} {x + 6.5:.1f},{y:.1f} {x:.1f},{y + 6.5:.1f} {x - 6.5:.1f},{y:.1f}"
    else:
        points = f"{x:.1f},{y - 6.5:.1f} {x + 6:.1f},{y + 4.5:.1f} {x - 6:.1f},{y + 4.5:.1f}"
    return f'<polygon class="m-rival" points="{points}"/>'


def _beside(
    x: float, y: float, width: float, taken: Sequence[_Box], labels: Sequence[_Box], bounds: _Box
) -> tuple[float, float, str, _Box]:
    """Where a label of `width` goes beside its point: the place that covers least, other labels least of all, the nearer ones first."""
    best: tuple[float, float, float, str, _Box] | None = None
    for turn, (dx, dy, anchor) in enumerate(
        (sign * dx, dy, anchor)
        for dy in (4, -12, 20, -26, 34, -40, 48, 62, -54)
        for sign, dx, anchor in ((1, 11, "start"), (-1, 11, "end"), (1, 0, "middle"))
        if not (anchor == "middle" and abs(dy - 4) < 10)
    ):
        left = x + dx - {"start": 0.0, "end": width, "middle": width / 2}[anchor]
        box = (left - 3, y + dy - LINE + 4, left + width + 3, y + dy + 4)
        outside = max(0.0, bounds[0] - box[0]) + max(0.0, box[2] - bounds[2])
        outside += max(0.0, bounds[1] - box[1]) + max(0.0, box[3] - bounds[3])
        cost = 2 * sum(_overlap(box, other) for other in taken) + 30 * sum(_overlap(box, other) for other in labels)
        cost += 40 * outside + 4 * turn
        if best is None or cost < best[0]:
            best = (cost, x + dx, y + dy, anchor, box)
    assert best is not None
    return best[1:]


def _overlap(a: _Box, b: _Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`.

    >>> ticks(0.83, 0.92)
    [0.84, 0.86, 0.88, 0.9, 0.92]
    """
    if not high > low:
        return [low]
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def _texts(values: Sequence[float]) -> list[tuple[float, str]]:
    """Each value with its text, all with the decimals that the longest needs."""
    decimals = max((len(f"{value:.10g}".partition(".")[2]) for value in values if abs(value) >= 1e-4), default=0)
    return [(value, f"{value:.{min(decimals, 6)}f}") for value in values]


def _wrapped(text: str, limit: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > limit:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


# -- The bars ----------------------------------------------------------------------------------------------------------------

Bar = tuple[str, int, int]  # layer, kept, of


def draw_bars(panels: Sequence[tuple[str, Sequence[Bar]]], width: int, columns: int) -> str:
    """Horizontal bars as SVG, a panel for each kind of unit, a bar for each layer: the filled part is kept."""
    head, gap = 30, 36
    panel_height = head + max(len(rows) for _, rows in panels) * _BAR + 14
    panel_width = (width - gap * (columns - 1)) / columns
    parts: list[str] = []
    for number, (title, rows) in enumerate(panels):
        x, y = (number % columns) * (panel_width + gap), (number // columns) * panel_height
        parts.append(f'<text class="panel" x="{x:.1f}" y="{y + 14}">{escape(title)}</text>')
        widest = max((len(f"{kept} of {of}") for _, kept, of in rows), default=0) * CHAR
        label = max(16.0, max((len(name) for name, *_ in rows), default=0) * 1.15 * CHAR)
        length = panel_width - label - 10 - widest - 14
        for place, row in enumerate(rows):
            parts += _bar(row, title, (x + label, y + head + place * _BAR), length)
    return _svg(width, math.ceil(len(panels) / columns) * panel_height, "What is kept in each layer", parts)


_BAR = 24  # height of a bar with the space below it


def _bar(row: Bar, unit: str, corner: tuple[float, float], length: float) -> list[str]:
    """A bar with its name to the left of `corner`."""
    name, kept, of = row
    end, top = corner
    start, filled = end + 10, max(2.0, length * (kept / of if of else 0.0))
    parts = [
        f"<g><title>layer {escape(name)}: {kept} of {of} {escape(unit)}</title>",
        f'<text class="tick" x="{end:.1f}" y="{top + 13}" text-anchor="end">{escape(name)}</text>',
        f'<rect class="of" x="{start:.1f}" y="{top}" width="{length:.1f}" height="16" rx="2"/>',
    ]
    if kept:
        parts.append(f'<rect class="kept" x="{start:.1f}" y="{top}" width="{filled:.1f}" height="16" rx="2"/>')
    text = f"{kept} of {of}" if kept else "gone"
    return [*parts, f'<text class="tick" x="{start + length + 8:.1f}" y="{top + 13}">{text}</text></g>']
