"""Rules: each tells what a value must be, all mistakes are told together, and types carry them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from slimformer.rules import Count, CountOrPair, Positive, Rule, Share, check_options, mistakes_in, one_of, rules_of


@dataclass(frozen=True)
class Options:
    keep: Share | None = 0.5
    examples: Count = 8
    rate: Positive = 0.1
    block: CountOrPair = 4
    bits: Annotated[int, one_of(8, 6, 4, unit="bits")] = 8
    kind: Literal["rows", "columns"] = "rows"
    parts: tuple[Literal["a", "b"], ...] = ("a",)
    flag: bool = True
    free: str = ""


def test_all_mistakes_are_told_together_each_with_its_field():
    wrong = Options(keep=0, examples=1.5, rate=math.inf, block=(8, 0), bits=5, kind="row", parts=(), flag=1)  # type: ignore[arg-type]
    assert mistakes_in(wrong) == [
        "keep must be above 0, a millionth or more, and at most 1, or null, got 0",
        "examples must be from 1 to a billion, got 1.5",
        "rate must be above 0 and at most a billion, got inf",
        "block must be from 1 to a billion, or two such numbers, got 8, 0",
        "bits must be 8, 6 or 4 bits, got 5",
        "kind must be rows or columns, got 'row'",
        "parts must be some of a, b, got none",
        "flag must be true or false, got 1",
    ]
    with pytest.raises(ValueError, match=r"^keep must be .*; examples must be .*; flag must be true or false, got 1$"):
        check_options(wrong)


@pytest.mark.parametrize("right", [{}, {"keep": None}, {"keep": 1}, {"block": (2, 8)}, {"parts": ("a", "b")}, {"rate": 5}])
def test_right_values_pass(right):
    check_options(Options(**right))


def test_every_value_that_a_rule_calls_wrong_is_refused():
    for name, rule in rules_of(Options).items():
        assert rule.wrong, name
        assert not any(rule.holds(value) for value in rule.wrong), name


def test_a_type_without_a_rule_has_none_and_any_type_can_carry_one():
    assert "free" not in rules_of(Options)

    @dataclass(frozen=True)
    class Own:
        even: Annotated[int, Rule("even", lambda value: value % 2 == 0)] = 2

    assert mistakes_in(Own(3)) == ["even must be even, got 3"]
