"""Makes a fine-tuned transformer several times smaller and faster, as a plain file, with the proof.

    import slimformer
    from slimformer.tasks.classification import Classification

    slimformer.compress("./my-bert", Classification(data="./reviews"), "./small")
    model = slimformer.load("./small")     # a plain transformers model with smaller layers

Names are imported when they are used, so that `import slimformer` is quick.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from slimformer import _auto

if TYPE_CHECKING:
    from slimformer.allocation import allocate
    from slimformer.anatomy import Anatomy
    from slimformer.bench import bench
    from slimformer.checkpoint import load, save
    from slimformer.compression import Wishes, compress
    from slimformer.families.base import anatomy_of
    from slimformer.gating import gated
    from slimformer.plan import Decision, Plan
    from slimformer.recipe import Bench, Export, Recipe, run
    from slimformer.report import Record, report
    from slimformer.shrink import shrink
    from slimformer.stages import Bundle, Calibrate, Train
    from slimformer.transplant import transplant

__version__ = "0.1.0"

_PLACES = {
    "Anatomy": "anatomy",
    "Bench": "recipe",
    "Bundle": "stages",
    "Calibrate": "stages",
    "Decision": "plan",
    "Export": "recipe",
    "Plan": "plan",
    "Recipe": "recipe",
    "Record": "report",
    "Train": "stages",
    "Wishes": "compression",
    "allocate": "allocation",
    "anatomy_of": "families.base",
    "bench": "bench",
    "compress": "compression",
    "gated": "gating",
    "load": "checkpoint",
    "report": "report",
    "run": "recipe",
    "save": "checkpoint",
    "shrink": "shrink",
    "transplant": "transplant",
}

__all__ = [
    "Anatomy",
    "Bench",
    "Bundle",
    "Calibrate",
    "Decision",
    "Export",
    "Plan",
    "Recipe",
    "Record",
    "Train",
    "Wishes",
    "allocate",
    "anatomy_of",
    "bench",
    "compress",
    "gated",
    "load",
    "report",
    "run",
    "save",
    "shrink",
    "transplant",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'slimformer' has no attribute '{name}'")
    return getattr(importlib.import_module(f"slimformer.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


class _Package(ModuleType):
    """Keeps `slimformer.shrink` the function when the module of that name is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PLACES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
_auto.watch()
