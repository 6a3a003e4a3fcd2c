"""Rules for options: which values each field of a dataclass may have, told by its type.

`Share`, `Count`, `Positive` and the others are types that carry a rule; `bool`, `Literal` and tuples of `Literal` carry their
own. `check_options` asks every field and raises one ValueError that names all mistakes; `mistakes_in` returns them, for a
caller that raises another error. A rule is about one field: if two options must fit each other, check that after these, in
`__post_init__`.

    @dataclass(frozen=True)
    class Options:
        keep: Share = 0.5
        examples: Count = 2048

        def __post_init__(self) -> None:
            check_options(self)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from slimformer.errors import readable, shown


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value must be: `says` completes "must be ...", `holds` decides, `wrong` are values that are refused, for tests."""

    says: str
    holds: Callable[[Any], bool]
    wrong: tuple[Any, ...] = dataclasses.field(default=(), hash=False)  # not all of them can be hashed


def real_number(says: str, holds: Callable[[Any], bool], *wrong: float) -> Rule:
    """A rule for finite numbers; text, None and booleans are no numbers."""
    return Rule(says, lambda value: _is(value, Real) and math.isfinite(value) and holds(value), (*wrong, math.nan, "?", None))


def whole_number(says: str, holds: Callable[[Any], bool], *wrong: float) -> Rule:
    """A rule for whole numbers."""
    return Rule(says, lambda value: _is(value, Integral) and holds(value), (*wrong, 1.5, "?", None))


def one_of(*values: Any, unit: str = "") -> Rule:
    """A rule that lists what is allowed; `unit` follows the list."""
    says = f"{_listed(values, 'or')} {unit}".rstrip()
    return Rule(says, lambda value: any(isinstance(value, type(item)) and value == item for item in values), ("?", None))


def some_of(*values: str, none: bool = False) -> Rule:
    """A rule for a tuple of one or more of these words; `none`: it may be empty too."""

    def holds(chosen: Any) -> bool:
        return isinstance(chosen, tuple) and (none or bool(chosen)) and all(item in values for item in chosen)

    return Rule(f"some of {', '.join(values)}{', or none' if none else ''}", holds, (("?",), "?") if none else ((), ("?",)))


def strictly_sorted(says: str, holds: Callable[[Any], bool], wrong: tuple[Any, ...], *, falling: bool = False) -> Rule:
    """A rule for a tuple of one or more distinct values that rise, or fall, each of which `holds`."""

    def sorted_so(value: Any) -> bool:
        return (
            isinstance(value, tuple)
            and bool(value)
            and all(map(holds, value))
            and list(value) == sorted(set(value), reverse=falling)
        )

    return Rule(says, sorted_so, wrong)


_RULES: dict[type[Any], Mapping[str, Rule]] = {}  # of each class that was asked for

FLAG = Rule("true or false", lambda value: isinstance(value, bool), ("?", None, 2))

# Numbers end at a billion, and shares of a model at a millionth: nothing sensible lies beyond, and float32 overflows there.
MOST = 1e9
Share = Annotated[
    float, real_number("above 0, a millionth or more, and at most 1", lambda value: 1e-6 <= value <= 1, 0.0, 1e-300, 1.1)
]
Fraction = Annotated[float, real_number("from 0 to 1", lambda value: 0 <= value <= 1, -0.1, 1.1)]
ProperFraction = Annotated[float, real_number("0 or above, and below 1", lambda value: 0 <= value < 1, -0.1, 1.0)]
Probability = Annotated[float, real_number("between 0 and 1", lambda value: 0 < value < 1, 0.0, 1.0)]
Positive = Annotated[float, real_number("above 0 and at most a billion", lambda value: 0 < value <= MOST, 0.0, 1e300, math.inf)]
NotNegative = Annotated[float, real_number("from 0 to a billion", lambda value: 0 <= value <= MOST, -1.0, 1e300, math.inf)]
Count = Annotated[int, whole_number("from 1 to a billion", lambda value: 1 <= value <= MOST, 0, 10**30)]
CountOrPair = Annotated[
    int | tuple[int, int],
    Rule(
        "from 1 to a billion, or two such numbers",
        lambda value: all(_is(item, Integral) and 1 <= item <= MOST for item in _pair(value)),
        (0, 10**30, (8, 0), (8,), 1.5, "?", None),
    ),
]
CountOrZero = Annotated[int, whole_number("from 0 to a billion", lambda value: 0 <= value <= MOST, -1, 10**30)]
Shares = Annotated[
    Mapping[str, float],
    Rule(
        "names, each with a share above 0, a millionth or more, and at most 1",
        lambda value: (
            isinstance(value, Mapping)
            and bool(value)
            and all(isinstance(name, str) and name for name in value)
            and all(_is(share, Real) and 1e-6 <= share <= 1 for share in value.values())
        ),
        ({}, {"a": 0.0}, {"a": 1.1}, {"a": math.nan}, {"a": "?"}, {"": 0.5}, {1: 0.5}, ("a",), 0.5, "?", None),
    ),
]
LayerNumbers = Annotated[
    tuple[int, ...],
    strictly_sorted(
        "numbers of layers from 1, rising",
        lambda item: type(item) is int and item >= 1,
        ((), (0,), (2, 1), (1.5,), "?"),
    ),
]
FallingShares = Annotated[
    tuple[float, ...],
    strictly_sorted(
        "shares above 0 and at most 1, falling",
        lambda item: _is(item, Real) and 1e-6 <= item <= 1,
        ((), (0.5, 1.0), (1.0, 1.0), (1.1,), (0.0,), (math.nan,), "?", None),
        falling=True,
    ),
]
# numpy and torch take such seeds.
Seed = Annotated[int, whole_number("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32, -1, 2**32)]
Points = Annotated[float, real_number("from 0 to 100", lambda value: 0 <= value <= 100, -0.1, 100.1)]  # of a metric
Seconds = Annotated[float, real_number("above 0 and at most 86400", lambda value: 0 < value <= 86400, 0.0, 86401.0)]  # a day


def check_options(options: Any) -> None:
    """Raises ValueError with all that is wrong in a dataclass of options, each mistake with the name of its field."""
    wrong = mistakes_in(options)
    if wrong:
        raise ValueError("; ".join(wrong))


def mistakes_in(options: Any) -> list[str]:
    """One sentence for each field whose value its rule refuses: "keep must be above 0 and at most 1, got 0"."""
    rules = rules_of(type(options))
    values = {name: getattr(options, name) for name in rules}
    return [
        f"{name} must be {rule.says}, got {_shown(values[name])}"
        for name, rule in rules.items()
        if not rule.holds(values[name])
    ]


def rules_of(cls: type[Any]) -> Mapping[str, Rule]:
    """The rule of each field of a dataclass; a field whose type tells none is left out."""
    if cls not in _RULES:
        hints = get_type_hints(cls, include_extras=True)
        found = {entry.name: rule_of(hints[entry.name]) for entry in dataclasses.fields(cls)}
        _RULES[cls] = {name: rule for name, rule in found.items() if rule is not None}
    return _RULES[cls]


def rule_of(hint: Any) -> Rule | None:
    """The rule that a type carries: `Annotated`'s, or that of bool, Literal, a tuple of Literal, and any of these or None."""
    if hint is bool:
        return FLAG
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return next((item for item in arguments[1:] if isinstance(item, Rule)), None)
    if origin is Literal:
        return one_of(*arguments)
    if origin in (Union, UnionType) and type(None) in arguments and len(arguments) == 2:
        inner = rule_of(next(item for item in arguments if item is not type(None)))
        return None if inner is None else _or_none(inner)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis and get_origin(arguments[0]) is Literal:
        return some_of(*get_args(arguments[0]))
    return None


def _or_none(rule: Rule) -> Rule:
    wrong = tuple(value for value in rule.wrong if value is not None)
    return Rule(f"{rule.says}, or null", lambda value: value is None or rule.holds(value), wrong)


def _pair(value: Any) -> tuple[Any, ...]:
    """Two numbers, or one for both; anything else makes a pair of None."""
    if isinstance(value, tuple):
        return value if len(value) == 2 else (None, None)
    return value, value


def _is(value: Any, kind: type[Any]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _listed(values: tuple[Any, ...], word: str) -> str:
    names = [str(value) for value in values]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return readable(", ".join(map(str, value[:9])) + (", ..." if len(value) > 9 else "") or "none", 80)
    return shown(value)
