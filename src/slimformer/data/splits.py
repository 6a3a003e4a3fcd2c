"""The names of splits, and drawn parts of a data set: the dev part of a single file, the validation examples, and a subset to train on.

Every draw is a function of the data alone. It does not depend on a run's seed, because runs on different examples could not be
compared.
"""

from __future__ import annotations

import json
import os.path
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from slimformer.errors import DataError
from slimformer.files import read_small

if TYPE_CHECKING:
    import numpy as np

Item = TypeVar("Item")

# What people call the splits of their data.
TRAIN_NAMES = ("train", "training")
DEV_NAMES = ("dev", "validation", "valid", "val", "eval", "dev_matched", "validation_matched")
TEST_NAMES = ("test",)  # stands in if there is no dev data, and only if it has labels
SPLIT_NAMES = (*TRAIN_NAMES, *DEV_NAMES, *TEST_NAMES)

# The least: with 200 examples one standard error is 2 to 3 points, and fewer would choose at random. The most: with 2,000 it is 0.7.
_FEWEST, _MOST = 200, 2000
_LARGEST_SHARE = 0.2  # a small training set needs its examples for training
_DEV_SHARE = 0.1  # of one file that holds everything
_SEED = 20

# What a draw is for seeds it too: other words would draw other examples.
FOR_DEV, FOR_VALIDATION = "dev", "held"


def dev_count(total: int) -> int:
    """How many of `total` examples become the dev split if the data has no dev file."""
    return max(1, round(_DEV_SHARE * total))


def validation_count(share: float, total: int) -> int:
    """How many of `total` training examples are set aside for validation: `share` of them, within the bounds above."""
    return max(1, min(max(round(share * total), _FEWEST), _MOST, round(_LARGEST_SHARE * total)))


def draw_rows(rows: Sequence[int], classes: Sequence[int] | None, count: int, purpose: str) -> frozenset[int]:
    """`count` of the rows, always the same ones. With `classes` (the class of every row of the table), each class gives its
    share, and never its last row.
    """
    generator = _generator(purpose)
    if classes is None:
        count = min(count, len(rows) - 1)
        return frozenset(generator.permutation(rows)[:count].tolist())
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(classes[row], []).append(row)
    # largest remainder: whole numbers that add up to `count` and are nearest to each class's share
    quota = {key: count * len(group) / len(rows) for key, group in groups.items()}
    take = {key: int(share) for key, share in quota.items()}
    for key in sorted(quota, key=lambda key: (take[key] - quota[key], key))[: count - sum(take.values())]:
        take[key] += 1
    drawn: list[int] = []
    for key in sorted(groups):
        drawn += generator.permutation(groups[key])[: min(take[key], len(groups[key]) - 1)].tolist()
    return frozenset(drawn)


def draw_groups(items: Sequence[tuple[str, Hashable]], count: int, purpose: str) -> frozenset[str]:
    """Ids of at least `count` items (id, group), always the same ones: whole groups, and never all of them."""
    groups: dict[Hashable, list[str]] = {}
    for name, group in items:
        groups.setdefault(group, []).append(name)
    if len(groups) < 2:
        groups = {name: [name] for name, _ in items}
    keys = list(groups)
    drawn: list[str] = []
    for index in _generator(purpose).permutation(len(keys))[:-1]:
        if len(drawn) >= count:
            break
        drawn += groups[keys[index]]
    return frozenset(drawn)


def draw_some(items: Sequence[Item], count: int, purpose: str) -> list[Item]:
    """`count` of the items in their own order, always the same ones; all of them if there are no more."""
    order = _generator(purpose).permutation(len(items))
    return [items[index] for index in sorted(order[:count].tolist())]


def _generator(purpose: str) -> np.random.Generator:
    import numpy as np

    return np.random.default_rng([_SEED, *purpose.encode()])


def read_json_option(name: str, option: str, count_of: str, shape: str) -> Any:
    """The JSON file that an option names; DataError that says what the option may be, or what `shape` the file should have."""
    file = Path(os.path.expanduser(name))
    try:
        return json.loads(read_small(file))
    except FileNotFoundError:
        raise DataError(f"{file} does not exist.", help=f"{option} is a JSON file, or how many {count_of} to draw.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {error}.", help=shape) from None
