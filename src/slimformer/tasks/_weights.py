"""What a row of each class counts in the loss: told by the user, or by how rare the class is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from slimformer.errors import DataError, nearest

BALANCED = "balanced"


def told_weights(told: Any) -> Any:
    """Weights as a task keeps them: None, "balanced", or pairs of a class and a number; what cannot be read stays for `weight_mistakes`.

    >>> told_weights("rare=3, common=1"), told_weights({"rare": 3})
    ((('rare', 3.0), ('common', 1.0)), (('rare', 3.0),))
    """
    if isinstance(told, str) and "=" in told:
        told = [part.rpartition("=")[::2] for part in told.split(",")]
    if isinstance(told, Mapping):
        told = list(told.items())
    if not isinstance(told, (list, tuple)):
        return told
    try:
        return tuple((str(name).strip(), float(weight)) for name, weight in told)
    except (TypeError, ValueError):
        return repr(told)


def weight_mistakes(told: Any) -> Iterable[str]:
    """What is wrong with told weights by themselves."""
    if told is None or told == BALANCED:
        return
    if not isinstance(told, tuple):
        yield f"class_weights: {BALANCED}, or a number for each class (rare=3,common=1), not {told}"
        return
    for name, weight in told:
        if not 0 < weight < float("inf"):
            yield f"class_weights: a number above 0 for '{name}', not {weight:g}"
    for name, count in Counter(name for name, _ in told).items():
        if count > 1:
            yield f"class_weights: '{name}' has {count}"


def class_weights(told: Any, classes: Sequence[str], answers: Sequence[Any]) -> tuple[float, ...]:
    """The weight of each class: (classes,). `answers`: those of the training rows; tuples of names, if a row may have several.

    Balanced, a class counts n / (k c) if c of n rows have it, one of k, as in scikit-learn; one of several labels (n - c) / c, so that
    the rows which have it count as much as those which have not, as in torch. A class of no rows counts as if it had one.
    DataError if a class that is named is none.

    >>> class_weights("balanced", ("a", "b"), ["a"] * 3 + ["b"])
    (0.6666666666666666, 2.0)
    >>> class_weights((("b", 5.0),), ("a", "b"), [])
    (1.0, 5.0)
    >>> class_weights("balanced", ("a", "b"), [("a",), ("a", "b"), (), ("a",)])
    (0.3333333333333333, 3.0)
    """
    if told == BALANCED:
        several = any(isinstance(answer, tuple) for answer in answers)
        counts = Counter(name for answer in answers for name in (answer if several else (answer,)))
        each = [max(1, counts[name]) for name in classes]
        return tuple(max(1, len(answers) - count) / count if several else len(answers) / len(classes) / count for count in each)
    given = dict(told)
    unknown = next((name for name in given if name not in classes), None)
    if unknown is not None:
        raise DataError(f"class_weights: there is no class '{unknown}'; {nearest(unknown, classes)}.")
    return tuple(given.get(name, 1.0) for name in classes)
