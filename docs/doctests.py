"""A griffe extension: the `>>>` lines of a docstring, with what they print, become a block of code in the reference."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

DOCTEST = re.compile(r"(?:^[ ]*>>> .*\n(?:[ ]*\S.*\n?)*)", re.MULTILINE)


class Doctests(Extension):
    """Fences each run of lines that begins with `>>>`, up to an empty line."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None and ">>>" in obj.docstring.value:
            obj.docstring.value = DOCTEST.sub(_fenced, obj.docstring.value + "\n").rstrip()


def _fenced(found: re.Match[str]) -> str:
    indent = re.match(" *", found[0])
    space = indent[0] if indent else ""
    return f"{space}```pycon\n{found[0].rstrip()}\n{space}```\n"
