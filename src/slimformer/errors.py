"""Errors a person can act on: what happened, where, and what to do.

    SlimformerError
    |-- ModelError        a folder that is no model, broken or pickled weights, a family we do not know
    |-- PlanError         a plan that does not fit the model it is applied to
    |-- DataError         a data file or column that cannot be used
    |-- RecipeError       one or more mistakes in a recipe or in the options, all shown together
    |-- TargetError       a target that cannot be reached; says the best possible
    |-- OutputError       an output folder that is taken, locked or full
    |-- ProcessError      one of several processes of a run is gone
    |-- ExportError       an exported file that does not agree with the model it came from
    `-- ExtraError        an optional package that is not installed

The command line turns each of them into one message and exit status 2; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import re
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LINE = 400  # characters of a line that a person still reads
_FACTS = 40
_ALL_FACTS = 3000  # characters of all facts together
_LINE_ENDS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")


def readable(text: str, limit: int = _LINE) -> str:
    r"""`text` as one line that a terminal shows as it is: control characters are escaped, and a long middle is left out.

    >>> readable("a \x1b[31mred\x1b[0m label\nof two lines")
    'a \\x1b[31mred\\x1b[0m label of two lines'
    >>> readable("x" * 1000, limit=20)
    'xxxxxxxxxx ... xxxxx'
    """
    short = text if len(text) <= 4 * limit else f"{text[: 2 * limit]} ... {text[-limit:]}"
    line = _LINE_ENDS.sub(" ", short.strip())
    if not line.isprintable():
        line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in line)
    if len(line) <= limit:
        return line
    head = limit // 2
    return f"{line[:head]} ... {line[head + 5 - limit :]}"


def shown(value: Any, limit: int = 80) -> str:
    """A value of any size as a message quotes it: its `repr`, cut to about `limit` characters.

    >>> shown(["a" * 500, {"b": 1}], limit=30)
    "['aaaa...aaaa', {'b': 1}]"
    """
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxlist, brief.maxtuple, brief.maxdict, brief.maxset = 3, 6, 6, 6, 6
    brief.maxstring = brief.maxother = brief.maxlong = (
        limit if isinstance(value, (str, int, bytes)) else max(10, limit // 2 - 2)
    )
    return readable(brief.repr(value), limit)


class SlimformerError(Exception):
    """`what` happened and where, `facts` that help to see why, and `help`: the next thing to do.

    Each is one line that a terminal shows as it is, whatever a file held: see `readable`. Of many facts the first are told.

    Args:
        what: What happened, and where.
        facts: What helps to see why; they are told one on each line.
        help: The next thing to do.

    Example:
        >>> print(SlimformerError("nothing is left.", facts=["kept: 0 of 12 heads"], help="keep more."))
        nothing is left.
          kept: 0 of 12 heads
          help: keep more.
    """

    def __init__(self, what: str, *, facts: Iterable[str] = (), help: str = "") -> None:
        told = [*facts]
        self.what = readable(what)
        lines = [readable(fact) for fact in told[:_FACTS]]
        while len(lines) > 1 and sum(map(len, lines)) > _ALL_FACTS:
            lines.pop()
        self.facts = tuple(lines)
        if len(told) > len(lines):
            self.facts += (f"and {len(told) - len(lines):,} more",)
        self.help = readable(help)
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


class ProcessError(SlimformerError):
    """One of the processes that `accelerate launch` started is gone."""


class ExportError(SlimformerError):
    """An exported file whose outputs differ from the model's."""


class ExtraError(SlimformerError):
    """An optional dependency is missing; `help` holds the install line."""


TRAIN_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "onnx", "onnx_ir", "onnxscript", "datasets")


def train_is_missing(package: str) -> ExtraError:
    """The error for a package that only the extra `train` brings."""
    return ExtraError(
        f"this needs {package}, which is not installed: the light installation only benches exported folders and reports.",
        help="pip install 'slimformer[train]'",
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that names the nearest known name and all the others: "did you mean 'x'? known: x, y"."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5 if len(name) < 4 else 0.6)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}known: {', '.join(names) or 'none'}"


_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space, or choose another --out; a run continues where it stopped."),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or choose another --out."),
    errno.EFBIG: ("the file is larger than is permitted", "choose another --out, or raise the limit (ulimit -f)."),
    errno.EACCES: ("writing is not permitted", "choose another --out, or change the folder's permissions."),
    errno.EROFS: ("the disk is read-only", "choose another --out."),
    errno.ENOTDIR: ("a part of the path is a file", "choose another --out."),
    errno.EEXIST: ("there is a file of that name", "choose another --out."),
    errno.EISDIR: ("there is a folder of that name", "choose another --out."),
    errno.ELOOP: ("a link stands in its place", "choose another --out."),
    errno.ENAMETOOLONG: ("the name is too long", "choose another --out."),
    errno.ENOENT: ("the folder is gone", "choose another --out, or start again."),
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
