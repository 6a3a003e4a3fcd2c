"""Errors a person can act on: what happened, where, and what to do.

    SlimformerError
    |-- ModelError        a folder that is no model, broken or pickled weights, a family we do not know
    |-- PlanError         a plan that does not fit the model it is applied to
    |-- DataError         a data file or column that cannot be used
    |-- RecipeError       one or more mistakes in a recipe or in the options, all shown together
    |-- TargetError       a target that cannot be reached; says the best possible
    |-- OutputError       an output folder that is taken, locked or full
    |-- ExportError       an exported file that does not agree with the model it came from
    `-- ExtraError        an optional package that is not installed

The command line turns each of them into one message and exit status 2; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class SlimformerError(Exception):
    """`what` happened and where, `facts` that help to see why, and `help`: the next thing to do."""

    def __init__(self, what: str, *, facts: Iterable[str] = (), help: str = "") -> None:
        self.what = what
        self.facts = tuple(facts)
        self.help = help
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.what, *(f"  {fact}" for fact in self.facts)]
        if self.help:
            lines.append(f"  help: {self.help}")
        return "\n".join(lines)


class ModelError(SlimformerError):
    """A folder or weights that cannot be read as a model, or an architecture without a family."""


class PlanError(SlimformerError):
    """A plan that does not fit the anatomy it is checked against, or that is not a plan at all."""


class DataError(SlimformerError):
    """Data that is missing, unreadable, or without what the task needs."""


class RecipeError(SlimformerError):
    """Mistakes in a recipe; `facts` holds one line per mistake, each with its place."""


class TargetError(SlimformerError):
    """A budget below what the method can reach."""


class OutputError(SlimformerError):
    """A place that cannot be written: taken by something else, locked by another run, or full."""


class ExportError(SlimformerError):
    """An exported file whose outputs differ from the model's."""


class ExtraError(SlimformerError):
    """An optional dependency is missing; `help` holds the install line."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that names the nearest known name and all the others: "did you mean 'x'? known: x, y"."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}known: {', '.join(names) or 'none'}"


_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space, or choose another --out; a run continues where it stopped."),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or choose another --out."),
    errno.EFBIG: ("the file is larger than is permitted", "choose another --out, or raise the limit (ulimit -f)."),
    errno.EACCES: ("writing is not permitted", "choose another --out, or change the folder's permissions."),
    errno.EROFS: ("the disk is read-only", "choose another --out."),
    errno.ENOTDIR: ("a part of the path is a file", "choose another --out."),
}


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Raises an OutputError if the operating system refuses to write at `path` in this block: a full disk, missing permission, ..."""
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else _code_in(error)
        if code not in _REASONS:
            raise
        reason, help = _REASONS[code]
        raise OutputError(f"cannot write {path}: {reason}.", help=help) from error


def _code_in(error: Exception) -> int | None:
    """The system's error number in the text of an error from Rust (safetensors, tokenizers), which is no OSError."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
