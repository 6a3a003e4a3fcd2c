"""Teaches our model types to transformers' Auto classes at the moment those are imported, and not before.

`import slimformer` must stay quick and must not pull transformers in; so if transformers' auto classes are not loaded yet, a
finder waits for them, lets the ordinary import happen, and registers right after.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

WATCHED = "transformers.models.auto.modeling_auto"


def watch() -> None:
    """Registers now if transformers' auto classes are loaded, otherwise as soon as they are."""
    if WATCHED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> bool:
    from slimformer.saving.checkpoint import register_auto_classes

    return register_auto_classes()


class _Later(importlib.abc.MetaPathFinder):
    """Tries again at each import what was not there yet, because the Auto classes were loaded amid the import of a model's own module."""

    busy = False

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if self.busy:
            return
        self.busy = True
        try:
            if _register():
                sys.meta_path.remove(self)
        finally:
            self.busy = False


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The ordinary loader, which registers our classes at the end."""

    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        if not _register():
            sys.meta_path.insert(0, _Later())
