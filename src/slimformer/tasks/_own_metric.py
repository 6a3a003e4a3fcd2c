"""A metric of the user's own, by dotted name: any function of right answers and a model's that somebody can import.

`sklearn.metrics.balanced_accuracy_score` is one, and so is `costs` in a file money.py of the working directory (`money.costs`).
It is found and called once before anything is trained.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from slimformer.errors import DataError, RecipeError, nearest

if TYPE_CHECKING:
    import numpy as np

_SCORES = ("y_score", "y_prob", "y_proba", "scores", "probabilities")  # what scikit-learn and people call it
_LESS = ("_loss", "_error")  # how scikit-learn ends the names of what is better if it is less


@dataclass(frozen=True)
class OwnMetric:
    """A function of (right answers, answers), higher is better.

    Answers are class ids (examples,), scores (examples,), or 1 for each label that a row has (examples, labels). A function
    whose second parameter is called y_score, y_prob, y_proba, scores or probabilities gets probabilities instead: of the last of two
    classes (examples,), of each class, or of each label (examples, outputs). One with a parameter `names` gets the names of the
    outputs too.
    """

    name: str
    function: Callable[..., Any]
    by_score: bool = False
    by_name: bool = False

    def judge(self, wanted: np.ndarray, given: np.ndarray, scores: np.ndarray, names: Sequence[str]) -> float:
        """The metric; DataError if the function fails, or gives no finite number."""
        more = {"names": list(names)} if self.by_name else {}
        try:
            value = float(self.function(wanted, scores if self.by_score else given, **more))
        except Exception as error:  # it is the user's code: whatever it raises is told
            raise DataError(
                f"the metric {self.name} fails on {len(wanted):,} examples: {type(error).__name__}: {error}",
                help="it is called with the right answers and the model's, as arrays of ids or scores.",
            ) from error
        if not abs(value) < float("inf"):
            raise DataError(f"the metric {self.name} gives {value} on {len(wanted):,} examples.", help="let it give a number.")
        return value


def is_own(metric: str) -> bool:
    """Whether a metric is named by where it stands, and is not one of those that are known here."""
    return "." in metric


def known_or_own(metric: str, known: Collection[str]) -> bool:
    """Whether a metric is one of these, or a function of the user's; RecipeError if it names no function that can be one."""
    if is_own(metric):
        own_metric(metric)
        return True
    return metric in known


@lru_cache(maxsize=8)
def own_metric(name: str) -> OwnMetric:
    """The function of a dotted name; RecipeError if there is none, or it cannot be one.

    >>> own_metric("sklearn.metrics.balanced_accuracy_score").by_score, own_metric("sklearn.metrics.roc_auc_score").by_score
    (False, True)
    """
    module, _, last = name.rpartition(".")
    if not all(part.isidentifier() for part in name.split(".")):
        raise RecipeError(f"metric: '{name}' is no dotted name.", help="write package.module.function.")
    if last.endswith(_LESS):
        raise RecipeError(
            f"metric: of {name} less is better, to go by its name.",
            help="name a function that gives more where a model is better.",
        )
    try:
        found = _imported(module)
    except Exception as error:
        raise RecipeError(
            f"metric: {module} of {name} cannot be imported: {type(error).__name__}: {error}",
            help=f"install it, or put {module.split('.')[0]}.py into the folder where you call slimformer.",
        ) from error
    function = getattr(found, last, None)
    if not callable(function):
        there = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
        raise RecipeError(f"metric: {module} has no function {last}; {nearest(last, there)[:200]}.")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError as error:  # written in C
        raise RecipeError(
            f"metric: nobody can tell what {name} takes.", help="wrap it in a function of two parameters."
        ) from error
    needed = [
        item.name
        for item in parameters
        if item.default is item.empty and item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD) and item.name != "names"
    ]
    if len(needed) != 2:
        raise RecipeError(
            f"metric: {name} needs {len(needed)} arguments ({', '.join(needed)}), and gets two: the right answers and the model's.",
            help="wrap it in a function of two parameters.",
        )
    return OwnMetric(name, function, needed[1] in _SCORES, any(item.name == "names" for item in parameters))


def _imported(module: str) -> Any:
    """A module, also one of the working directory."""
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)  # behind what is installed
    try:
        return importlib.import_module(module)
    finally:
        if added:
            sys.path.remove(here)
