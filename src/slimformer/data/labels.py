"""Labels as data sets spell them and as models name them, and how the two are matched."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from slimformer.errors import DataError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_PLACEHOLDER = re.compile(r"(label_?)?\d+", re.ASCII | re.IGNORECASE)


# ---- as data sets spell them


def spell_label(value: Any) -> str | None:
    """A label as text, whole numbers without a decimal point; None if the value is no label."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        value = repr(value) if math.isfinite(value) else None
    if isinstance(value, int):
        value = str(value) if abs(value) < 2**53 else None
    if not isinstance(value, str) or not value.strip():
        return None
    text = value.strip()
    if _NUMBER.fullmatch(text) and not text.lstrip("+-").isdigit() and float(text).is_integer() and abs(float(text)) < 2**53:
        return str(int(float(text)))
    return text


def is_number(label: str) -> bool:
    """Whether a label is a finite number."""
    return _NUMBER.fullmatch(label) is not None and math.isfinite(float(label))


def guess_kind(labels: Iterable[str]) -> Literal["classes", "score"]:
    """ "score" if all labels are numbers and some have a fraction; whole numbers are classes."""
    distinct = set(labels)
    fractions = all(is_number(label) for label in distinct) and any(not float(label).is_integer() for label in distinct)
    return "score" if fractions else "classes"


def sort_labels(labels: set[str]) -> tuple[str, ...]:
    """Numbers by value, everything else by name."""
    if all(_NUMBER.fullmatch(label) for label in labels):
        return tuple(sorted(labels, key=lambda label: (float(label), label)))
    return tuple(sorted(labels))


def enumerate_labels(labels: Sequence[str]) -> str:
    """The labels in one line for a message; after twelve, their number."""
    return ", ".join(labels[:12]) + (f" and {len(labels) - 12} more" if len(labels) > 12 else "")


# ---- as models name them


def model_labels(config: PretrainedConfig | Mapping[str, Any]) -> tuple[tuple[str, ...], str | None]:
    """A model's class names in the order of their ids, and its problem_type; DataError if its id2label is broken."""

    def get(name: str) -> Any:
        return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)

    mapping = get("id2label")
    try:
        names = {int(key): str(name) for key, name in dict(mapping).items()} if mapping else {}
        count = int(get("num_labels") or len(names) or 2)
    except (TypeError, ValueError):
        raise DataError("the model's id2label is not a mapping of ids to names.", help="mend it in config.json.") from None
    names = names or {index: f"LABEL_{index}" for index in range(count)}
    if sorted(names) != list(range(len(names))):
        raise DataError(
            f"the model's id2label has the ids {', '.join(map(str, sorted(names)))[:80]}.",
            help="ids must run from 0 without a gap; mend it in config.json.",
        )
    return tuple(names[index] for index in range(len(names))), get("problem_type")


def are_placeholders(names: Sequence[str]) -> bool:
    """Whether a model's class names only repeat their ids, as LABEL_0, LABEL_1, ... do."""
    return all(_PLACEHOLDER.fullmatch(name) and int(re.sub(r"\D", "", name)) == index for index, name in enumerate(names))


def is_id(label: str, count: int) -> bool:
    """Whether a label is the id of one of `count` classes."""
    return label.isascii() and label.isdigit() and len(label) < 7 and int(label) < count


# ---- matched


def match_labels(data: Iterable[str], names: Sequence[str], known: Sequence[str] = ()) -> dict[str, int]:
    """The class id of each label of the data; `names` are the model's classes in the order of their ids.

    Labels match by name, and case, spaces and hyphens do not count. If the data has ids and tells their names (`known`), those
    names are matched. Otherwise ids match by value. Labels that match nothing are left out.

    >>> match_labels(["Not entailment", "entailment"], ["entailment", "not_entailment"])
    {'Not entailment': 1, 'entailment': 0}
    """
    labels = list(data)
    if not match_by_name(labels, names, known) and all(is_id(label, len(names)) for label in labels):
        return {label: int(label) for label in labels}
    ids = {_fold(name): index for index, name in enumerate(names)}
    matches = {label: [ids[form] for form in _forms(label, known) if form in ids] for label in labels}
    return {label: places[0] for label, places in matches.items() if places}


def match_by_name(labels: Iterable[str], names: Sequence[str], known: Sequence[str]) -> bool:
    """Whether every label of the data is one of the model's class names, up to case, spaces and hyphens."""
    folded = {_fold(name) for name in names}
    return all(any(form in folded for form in _forms(label, known)) for label in labels)


def _forms(label: str, known: Sequence[str]) -> list[str]:
    """The names a label may have: the one that the data tells for an id, then the label itself."""
    return [*(_fold(name) for index, name in enumerate(known) if label == str(index)), _fold(label)]


def _fold(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().casefold())


def order_as_model(known: Sequence[str], config: PretrainedConfig | Mapping[str, Any]) -> tuple[str, ...]:
    """The `known` class names in the order of a model's ids; DataError if the model does not have them all."""
    names, _ = model_labels(config)
    if are_placeholders(names) and len(names) == len(known):
        return tuple(known)
    ids = match_labels(known, names)
    missing = [name for name in known if name not in ids]
    if missing:
        raise DataError(
            f"the model does not know the label '{missing[0]}'" + (f" and {len(missing) - 1} more." if missing[1:] else "."),
            facts=[f"the model's labels: {enumerate_labels(names)}"],
            help="the model was trained for another task; start from an encoder, or from a model with these labels.",
        )
    ours = {index: name for name, index in ids.items()}
    return tuple(ours.get(index, name) for index, name in enumerate(names))
