"""Which outputs of a classifier that gives several answers belong to which.

Such a model is a plain classifier: the outputs of its tasks stand side by side in `logits`, and config.json says under ANSWERS how many
belong to each. An exported file gives each task an output of its own beside them. Plain data: neither torch nor transformers is needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slimformer.errors import ModelError, shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ANSWERS = "slimformer_answers"  # of config.json: [[task, outputs], ...]
_NAME = re.compile(r"[A-Za-z]\w*")


def answer_slices(config: PretrainedConfig | Mapping[str, Any]) -> dict[str, slice]:
    """The outputs of each task in `logits`; none if the model gives one answer. ModelError if they do not fit its labels.

    >>> answer_slices({"slimformer_answers": [["mood", 2], ["topic", 3]], "id2label": dict.fromkeys("01234", "")})
    {'mood': slice(0, 2, None), 'topic': slice(2, 5, None)}
    """
    is_mapping = isinstance(config, Mapping)
    told = config.get(ANSWERS) if is_mapping else getattr(config, ANSWERS, None)
    if told is None:
        return {}
    found: dict[str, slice] = {}
    start = 0
    try:
        for name, count in told:
            if not is_task_name(name) or name in found or type(count) is not int or count < 2:
                raise ValueError
            found[name] = slice(start, start := start + count)
        labels = len((config.get("id2label") if is_mapping else getattr(config, "id2label", None)) or ())
        if labels != start:
            raise ValueError
    except (TypeError, ValueError):
        raise ModelError(
            f"config.json says {ANSWERS}: {shown(told)}, which does not fit its labels.", help="copy the whole folder again."
        ) from None
    return found


def answers_field(counts: Mapping[str, int]) -> list[list[Any]]:
    """What config.json says of tasks with so many outputs each."""
    return [[name, count] for name, count in counts.items()]


def is_task_name(name: Any) -> bool:
    """Whether a task may have this name: letters, digits and underscores, as outputs of files have."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def output_of(name: str) -> str:
    """The output of an exported file for a task.

    >>> output_of("topic")
    'logits_topic'
    """
    return f"logits_{name}"


def label_of(task: str, name: str) -> str:
    """How id2label names a class of a task."""
    return f"{task}: {name}"
