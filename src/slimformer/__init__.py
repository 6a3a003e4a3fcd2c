"""Makes a fine-tuned transformer several times smaller and faster, writes ONNX files, and measures what that costs.

    import slimformer
    from slimformer.tasks import Classification

    slimformer.compress("./my-bert", Classification(data="./reviews"), "./small")
    model = slimformer.load("./small")     # a plain transformers model with smaller layers

Tasks are in `slimformer.tasks`, methods in `slimformer.methods`, errors in `slimformer.errors`. Names are imported when they are
used, so that `import slimformer` is quick.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from slimformer.saving import auto_classes as _auto

_SILENT = {  # reports that these packages send to their makers unless told not to; read when they are first imported
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime, from 1.29 on
    "NNCF_CI": "1",  # nothing else depends on it
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
for _name, _value in _SILENT.items():
    os.environ.setdefault(_name, _value)

if TYPE_CHECKING:
    from slimformer.core.anatomy import Anatomy
    from slimformer.core.budget import allocate
    from slimformer.core.plan import Decision, Plan
    from slimformer.core.shrink import shrink
    from slimformer.families.base import anatomy_of
    from slimformer.hooks.gating import gated
    from slimformer.measuring.records import Record
    from slimformer.reporting.inspection import inspect
    from slimformer.reporting.page import report
    from slimformer.running.bench import bench
    from slimformer.running.bundle import Bundle
    from slimformer.running.reader import read_recipe
    from slimformer.running.recipe import Bench, Export, Recipe
    from slimformer.running.result import Result
    from slimformer.running.runner import run
    from slimformer.running.search import compress
    from slimformer.saving.checkpoint import load, load_plan, save, save_dense
    from slimformer.testing.checks import check
    from slimformer.training.callback import SlimCallback
    from slimformer.training.stage import Calibrate, Train, TrimVocabulary

__version__ = "0.1.0"

_PLACES = {
    "Anatomy": "core.anatomy",
    "Bench": "running.recipe",
    "Bundle": "running.bundle",
    "Calibrate": "training.stage",
    "Decision": "core.plan",
    "Export": "running.recipe",
    "Plan": "core.plan",
    "Recipe": "running.recipe",
    "Record": "measuring.records",
    "Result": "running.result",
    "SlimCallback": "training.callback",
    "Train": "training.stage",
    "TrimVocabulary": "training.stage",
    "allocate": "core.budget",
    "anatomy_of": "families.base",
    "bench": "running.bench",
    "check": "testing.checks",
    "compress": "running.search",
    "gated": "hooks.gating",
    "inspect": "reporting.inspection",
    "load": "saving.checkpoint",
    "load_plan": "saving.checkpoint",
    "read_recipe": "running.reader",
    "report": "reporting.page",
    "run": "running.runner",
    "save": "saving.checkpoint",
    "save_dense": "saving.checkpoint",
    "shrink": "core.shrink",
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
    "Result",
    "SlimCallback",
    "Train",
    "TrimVocabulary",
    "allocate",
    "anatomy_of",
    "bench",
    "check",
    "compress",
    "gated",
    "inspect",
    "load",
    "load_plan",
    "read_recipe",
    "report",
    "run",
    "save",
    "save_dense",
    "shrink",
]


_ROOMS = ("errors", "methods", "tasks")  # modules that hold public names too


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"slimformer.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module 'slimformer' has no attribute '{name}'")
    try:
        return getattr(importlib.import_module(f"slimformer.{_PLACES[name]}"), name)
    except ModuleNotFoundError as error:
        from slimformer.errors import TRAIN_PACKAGES, train_is_missing

        if error.name not in TRAIN_PACKAGES:
            raise
        raise train_is_missing(str(error.name)) from None


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS, "__version__"])


_auto.watch()
