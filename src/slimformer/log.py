"""Logs a run: a few lines for a person, its progress, and everything as JSON lines in `log.jsonl`.

Lines go to the standard library's logger `slimformer`, as do those of code that has no `Log`. From Python nothing is printed unless
logging is set up or `show_log` is used; the command line uses it. There progress is a bar on a terminal, elsewhere a line now and then.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from slimformer.errors import output_errors, readable

if TYPE_CHECKING:
    from rich.console import Console

FILE = "log.jsonl"
PLAIN_SECONDS = 30.0  # between progress lines without a terminal, so that a CI log of an hour stays near 100 lines
BAR_SECONDS = 0.1  # between redraws of the bar; drawing it at every step would take longer than a small step

Advance = Callable[..., None]  # advance(done, **numbers): `done` of `total` are done; numbers are shown beside


_logger = logging.getLogger("slimformer")
_shown: list[_Printer] = []  # the innermost one last
_remarked: set[str] = set()  # since `show_log` began
_remarks: dict[str, None] = {}  # since the process began


def remark(text: str) -> None:
    """Logs one line on something that was guessed or left out, once while `show_log` lasts: what reads data has no `Log`.

    The notes of a task repeat the lines on its data: the `Log` of a run then keeps them in its file, and does not log them again.

    >>> with show_log():
    ...     remark("taking text 'review'.")
    ...     Log(None).say("taking text 'review'.")
    taking text 'review'.
    """
    text = readable(text)
    _remarks[text] = None
    if text not in _remarked:
        _remarked.add(text)
        _logger.info("%s", text)


def remarks_on(name: str) -> tuple[str, ...]:
    """The lines that `remark` has logged in this process and that hold this name, such as the path of a file, however it is spelt."""
    names = {readable(name), readable(str(Path(name)))} if name else set()  # "./reviews" is "reviews" in messages
    return tuple(text for text in _remarks if any(part in text for part in names))


@contextmanager
def show_log(console: Console | None = None) -> Iterator[None]:
    """Prints what the library logs while the block runs, by default on standard output; also a decorator.

    >>> with show_log():
    ...     Log(None).say("12 of 72 heads stay.")
    12 of 72 heads stay.
    """
    handler = _Printer(console)
    level = _logger.level
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    _shown.append(handler)
    _remarked.clear()  # nobody may have seen what was logged before
    try:
        yield
    finally:
        _shown.remove(handler)
        _logger.setLevel(level)
        _logger.removeHandler(handler)


class _Printer(logging.Handler):
    """Prints records as they are, without markup; only a terminal gets line breaks, between words. The first record makes the console."""

    def __init__(self, console: Console | None) -> None:
        super().__init__()
        self._console = console

    @property
    def console(self) -> Console:
        if self._console is None:
            from rich.console import Console

            self._console = Console()
        return self._console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(self.format(record), markup=False, highlight=False, soft_wrap=not self.console.is_terminal)


class Log:
    """Logs lines, and writes them and other events to `folder/log.jsonl` (nothing without a folder); `quiet` logs no line."""

    def __init__(self, folder: Path | None, quiet: bool = False) -> None:
        self.folder = folder
        self.quiet = quiet
        self._said: set[str] = set()

    def event(self, kind: str, **fields: Any) -> None:
        """Appends one JSON line: time (UTC), kind and the fields. Numbers that JSON lacks (nan, inf) become text."""
        if self.folder is None:
            return
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind} | fields
        with output_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / FILE, "a+b") as file:
                start = (
                    b"" if _ends_whole(file) else b"\n"
                )  # a killed run may have left half a line; the next one must stay whole
                file.write(start + json.dumps(_plain(line), ensure_ascii=False).encode() + b"\n")

    def say(self, text: str) -> None:
        """Logs one line for a person to read, and keeps it in the log file."""
        self.event("say", text=text)
        if not self.quiet and readable(text) not in _remarked:
            _logger.info("%s", text)

    def say_once(self, text: str) -> None:
        """Says a line that holds for the whole run, the first time only."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keeps in the log file what code without a `Log` logs while the block runs, from INFO on; nobody sees more than before."""
        if self.folder is None:
            yield
            return
        keeper, level, before = _Keeper(self), _logger.level, _logger.getEffectiveLevel()
        others = [*_logger.handlers, *logging.getLogger().handlers]
        as_before = _AsBefore(before)
        for handler in others:
            handler.addFilter(as_before)
        _logger.addHandler(keeper)
        _logger.setLevel(min(before, logging.INFO))
        try:
            yield
        finally:
            _logger.setLevel(level)
            _logger.removeHandler(keeper)
            for handler in others:
                handler.removeFilter(as_before)

    @contextmanager
    def track(self, description: str, total: int) -> Iterator[Advance]:
        """Shows progress while the block runs; yields `advance(done, **numbers)`, cheap enough to call at every step."""
        console = _shown[-1].console if _shown else None
        if self.quiet:
            yield _silent
        elif console is not None and console.is_terminal:
            with self._bar(console, description, total) as advance:
                yield advance
        else:
            yield self._lines(description, total)

    @contextmanager
    def _bar(self, console: Console, description: str, total: int) -> Iterator[Advance]:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        with Progress(*columns, console=console) as progress:
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


class _Keeper(logging.Handler):
    """Writes what other loggers of the library say into the file of a `Log`, which keeps its own lines itself."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != _logger.name:
            self._log.event("say", text=record.getMessage())


class _AsBefore(logging.Filter):
    """Lets through what a handler was given before the library's level was lowered."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= self._level or record.name.partition(".")[0] != _logger.name


def _silent(done: int, **numbers: float) -> None:
    """Progress that nobody sees."""


def _ends_whole(file: IO[bytes]) -> bool:
    if file.seek(0, 2) == 0:
        return True
    file.seek(-1, 2)
    return file.read(1) == b"\n"


def _plain(value: Any) -> Any:
    """`value` in types that JSON has; any other becomes text."""
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
