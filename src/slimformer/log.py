"""What a run tells: a few lines for a person, a progress bar, and everything as JSON lines in `log.jsonl`.

The one idea: code says what happened once, to a `Log`; the log decides who sees it. On a terminal progress is a bar, elsewhere
a plain line now and then. Nothing here decides what is worth saying.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from slimformer.saving.files import speaking

if TYPE_CHECKING:
    from rich.console import Console

FILE = "log.jsonl"
PLAIN_SECONDS = 30.0  # between progress lines where there is no terminal: a CI log of an hour stays near 100 lines
BAR_SECONDS = 0.1  # between redraws of the bar; drawing it at every step would cost more than small steps do

Advance = Callable[..., None]  # advance(done, **numbers): `done` of `total` are done; numbers are shown beside


class Log:
    """Writes events to `folder/log.jsonl` (none without a folder) and lines to the terminal (none when `quiet`)."""

    def __init__(self, folder: Path | None, quiet: bool = False) -> None:
        self.folder = folder
        self.quiet = quiet
        self._console: Console | None = None

    def event(self, kind: str, **fields: Any) -> None:
        """Appends one JSON line: time (UTC), kind and the fields. Numbers that JSON lacks (nan, inf) become text."""
        if self.folder is None:
            return
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind} | fields
        with speaking(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / FILE, "a+b") as file:
                start = b"" if _ends_whole(file) else b"\n"  # a killed run may have left half a line: keep the next one whole
                file.write(start + json.dumps(_plain(line), ensure_ascii=False).encode() + b"\n")

    def say(self, text: str) -> None:
        """One line that a person reads, also kept in the log file."""
        self.event("say", text=text)
        if not self.quiet:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @property
    def console(self) -> Console:
        """The rich console that `say` and `track` print to: standard output."""
        if self._console is None:
            from rich.console import Console

            self._console = Console()
        return self._console

    @contextmanager
    def track(self, description: str, total: int) -> Iterator[Advance]:
        """Shows progress while the block runs; yields `advance(done, **numbers)`, cheap enough to call at every step."""
        if self.quiet:
            yield _silent
        elif self.console.is_terminal:
            with self._bar(description, total) as advance:
                yield advance
        else:
            yield self._lines(description, total)

    @contextmanager
    def _bar(self, description: str, total: int) -> Iterator[Advance]:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(description, total=total, rate="", numbers="")
            begin = drawn = time.monotonic()
            first: int | None = None

            def advance(done: int, **numbers: float) -> None:
                nonlocal drawn, first
                now = time.monotonic()
                first = done if first is None else first
                if now - drawn < BAR_SECONDS and done < total:
                    return
                drawn = now
                progress.update(task, completed=done, rate=_rate(done - first, now - begin), numbers=_show(numbers))

            yield advance

    def _lines(self, description: str, total: int) -> Advance:
        begin = shown = time.monotonic()
        first: int | None = None

        def advance(done: int, **numbers: float) -> None:
            nonlocal shown, first
            now = time.monotonic()
            first = done if first is None else first
            if now - shown < PLAIN_SECONDS:
                return
            shown = now
            speed = (done - first) / (now - begin)
            left = f", {_duration((total - done) / speed)} left" if speed > 0 else ""
            parts = (f"{description}: {done}/{total}", _rate(done - first, now - begin) + left, _show(numbers))
            self.say("  ".join(part for part in parts if part))

        return advance


def _silent(done: int, **numbers: float) -> None:
    """Progress that nobody sees."""


def _ends_whole(file: IO[bytes]) -> bool:
    if file.seek(0, 2) == 0:
        return True
    file.seek(-1, 2)
    return file.read(1) == b"\n"


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it; what it cannot hold becomes text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def _rate(done: int, seconds: float) -> str:
    if done <= 0 or seconds <= 0:
        return ""
    rate = done / seconds
    return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _show(numbers: dict[str, float]) -> str:
    return "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items())
