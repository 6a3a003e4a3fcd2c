"""Shows profiles: tables for a terminal of 80 columns, and profile.html with a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from slimformer.files import write_text
from slimformer.measuring.components import Component
from slimformer.measuring.profile import Counted, Profile, Profiled, Texts
from slimformer.reporting.words import plain

if TYPE_CHECKING:
    from rich.table import Table

PROFILE_PAGE = "profile.html"
BESIDE = 3  # profiles in a table of 80 columns
_NAME = 15  # letters of a name that a column has room for
_WIDTH, _BAR, _LEFT = 900, 26, 190


def draw_profiles(found: Profiled) -> Iterator[Table]:
    """A table of counts, and for each size of texts tables of times by component and by layer."""
    yield _table("", *by_count(found), found.note)
    for texts in dict.fromkeys(profile.load for profile in found.profiles):
        beside = [profile for profile in found.profiles if profile.load == texts]
        for start in range(0, len(beside), BESIDE):
            some = beside[start : start + BESIDE]
            yield _table(_title(texts), *by_component(some), *notes_of(some))
            yield _table(f"{_title(texts)}: by layer", *by_layer(some))


def by_count(found: Profiled) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of what the model holds and computes, by component."""
    sums = {component: _sum(found, component) for component in Component}
    whole = _sum(found, None)

    def row(name: str, part: Counted) -> tuple[str, ...]:
        shares = (f"{_share(part.parameters, whole.parameters)}", f"{_share(part.macs, whole.macs)}")
        return name, f"{part.parameters:,}", f"{part.bytes / 1e6:.1f}", shares[0], f"{part.macs / 1e6:,.1f}", shares[1]

    macs = "M MACs a text" if found.own else f"M MACs at {found.length}"
    head = ("component", "parameters", "MB", "share", macs, "share")
    rows = [row(str(component), part) for component, part in sums.items() if part.parameters or part.macs]
    return head, [*rows, row("together", whole)]


def by_component(profiles: Sequence[Profile]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of the milliseconds of these profiles by component, with shares, sums, and bytes of the largest operator."""
    head = ("component", *(text for profile in profiles for text in (f"{_shortened(profile)} ms", "share", "MB")))
    rows = [
        (
            str(component),
            *(
                text
                for profile in profiles
                for text in (
                    f"{profile.of(component):.2f}",
                    _share(profile.of(component), profile.total_ms),
                    f"{profile.peak(component) / 1e6:.1f}",
                )
            ),
        )
        for component in Component
        if any(profile.of(component) for profile in profiles)
    ]
    together = [(f"{profile.total_ms:.2f}", _share(profile.total_ms, profile.whole_ms), "") for profile in profiles]
    whole = [(f"{profile.whole_ms:.2f}", "100 %", "") for profile in profiles]
    rows.append(("together", *(text for cells in together for text in cells)))
    rows.append(("not watched", *(text for cells in whole for text in cells)))
    return head, rows


def by_layer(profiles: Sequence[Profile]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of the milliseconds of these profiles by layer."""
    layers = sorted({place.layer for profile in profiles for place in profile.ms if place.layer is not None})
    head = ("layer", *(f"{_shortened(profile)} ms" for profile in profiles))
    rows = [(str(layer), *(f"{profile.of_layer(layer):.2f}" for profile in profiles)) for layer in layers]
    return head, [*rows, ("outside", *(f"{profile.of_layer(None):.2f}" for profile in profiles))]


def notes_of(profiles: Sequence[Profile]) -> list[str]:
    """What texts these profiles are of, and what became of them, where that is not plain."""
    return [f"{profile.name}, {profile.runtime}: {profile.note}" for profile in profiles if profile.note]


def write_profiles(found: Profiled, folder: Path) -> Path:
    """Writes profile.html into a folder: the tables, and bars of how each run divides."""
    parts = [f"<h1>{escape(found.name)}: where time and bytes go</h1>", f"<p>{escape(EXPLAINED)}</p>"]
    parts += [_html(*by_count(found)), *_paragraphs([found.note] if found.note else [])]
    for texts in dict.fromkeys(profile.load for profile in found.profiles):
        some = [profile for profile in found.profiles if profile.load == texts]
        parts += [f"<h2>{escape(_title(texts))}</h2>", draw_stacks(some), *_paragraphs(notes_of(some))]
        parts += [_html(*by_component(some)), _html(*by_layer(some))]
    page = folder / PROFILE_PAGE
    folder.mkdir(parents=True, exist_ok=True)
    write_text(page, _PAGE.format(title=escape(found.name), body="\n".join(parts)))
    return page


EXPLAINED = (
    "Times are those of the fastest watched run. 'together' is the sum of the parts, with its share of the fastest run that nobody "
    "watched. MB is what the largest operator (in PyTorch: module) of a part reads and writes beside its parameters. Where several "
    "batches are read, times are means over them."
)


def draw_stacks(profiles: Sequence[Profile]) -> str:
    """An SVG with a bar for each profile, as long as its time, divided by component. A number names the part: colour is not needed."""
    longest = max((profile.total_ms for profile in profiles), default=0.0) or 1.0
    numbers = {component: number for number, component in enumerate(Component, 1)}
    parts, top = [], 4.0
    for profile in profiles:
        label = f"{profile.name}, {profile.runtime}"
        parts.append(f'<text x="0" y="{top + 17}">{escape(label[:28])}</text>')
        left = float(_LEFT)
        for component in Component:
            width = (_WIDTH - _LEFT - 80) * profile.of(component) / longest
            if width <= 0:
                continue
            title = f"{component}: {profile.of(component):.2f} ms"
            parts.append(
                f'<rect class="part{numbers[component] % 2}" x="{left:.1f}" y="{top}" width="{width:.1f}" height="{_BAR}">'
                f"<title>{escape(title)}</title></rect>"
            )
            if width > 14:
                parts.append(f'<text x="{left + 4:.1f}" y="{top + 17}">{numbers[component]}</text>')
            left += width
        parts.append(f'<text x="{left + 6:.1f}" y="{top + 17}">{profile.total_ms:.2f} ms</text>')
        top += _BAR + 8
    keys = "; ".join(f"{number} {component}" for component, number in numbers.items())
    parts.append(f'<text x="0" y="{top + 16}">{escape(keys)}</text>')
    return (
        f'<svg viewBox="0 0 {_WIDTH} {top + 26}" width="{_WIDTH}" role="img" aria-label="time by component" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _sum(found: Profiled, component: Component | None) -> Counted:
    some = [part for place, part in found.counts.items() if component in (None, place.component)]
    return Counted(sum(part.parameters for part in some), sum(part.bytes for part in some), sum(part.macs for part in some))


def _title(texts: Texts) -> str:
    most = "at most " if texts.own else ""
    return f"{texts.batch} text{'s' * (texts.batch > 1)} of {most}{texts.length} tokens"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


def _shortened(profile: Profile) -> str:
    name = plain(profile.name)
    return name if len(name) <= _NAME else f"{name[: _NAME - 2]}.."


def _paragraphs(texts: Sequence[str]) -> list[str]:
    return [f"<p>{escape(text)}</p>" for text in texts]


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], *notes: str) -> Table:
    from rich.markup import escape as escaped
    from rich.table import Table

    told = escaped("\n".join(filter(None, notes))) or None
    table = Table(title=escaped(title) or None, title_justify="left", box=None, pad_edge=False, padding=(0, 1))
    table.caption, table.caption_justify = told, "left"
    for number, text in enumerate(head):
        table.add_column(escaped(text), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escaped, row))
    return table


def _html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}: profile</title>
<style>
:root {{ --ink: #1d1f21; --paper: #fbfaf7; --one: #cfe3dd; --two: #f2f0ea; --line: #8a8d90; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e8e6e1; --paper: #15171a; --one: #23453d; --two: #1d2024; --line: #7a7e84; }}
}}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .15rem .6rem; border-bottom: 1px solid var(--line); }}
th:first-child, td:first-child {{ text-align: left; }}
svg {{ max-width: 100%; height: auto; font: 12px system-ui, sans-serif; }}
svg text {{ fill: var(--ink); }}
svg rect {{ stroke: var(--line); }}
svg .part1 {{ fill: var(--one); }}
svg .part0 {{ fill: var(--two); }}
</style></head><body>
{body}
</body></html>
"""
