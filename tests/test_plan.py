"""Plans: composition by hand, checks with messages a person can act on, and a parser that survives anything."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny

from slimformer.errors import PlanError
from slimformer.families.base import anatomy_of
from slimformer.plan import Plan

ANATOMY = anatomy_of(tiny("bert"))


def test_then_speaks_in_the_numbering_that_is_left():
    first = Plan({"a": (1, 3, 4), "b": (0,)})
    assert first.then(Plan({"a": (0, 2), "c": (5,)})) == Plan({"a": (1, 4), "b": (0,), "c": (5,)})


def test_then_refuses_units_that_are_gone():
    with pytest.raises(PlanError, match="'a' has 2 units left, the later plan keeps unit 2"):
        Plan({"a": (1, 3)}).then(Plan({"a": (0, 2)}))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"encoder.3.heads": (0,)}, "names the site 'encoder.3.heads'.*\n.*did you mean 'encoder"),
        ({"encoder.0.heads": (0, 4)}, "has 4 heads, the plan keeps heads 4"),
        ({"encoder.0.heads": (2, 1)}, "must rise and be distinct, got 2 1"),
        ({"encoder.0.heads": (1, 1)}, "must rise and be distinct, got 1 1"),
        ({"encoder.0.heads": ()}, r"keeps nothing, yet its sublayer 'encoder.0.attention' stays"),
    ],
)
def test_check_says_what_is_wrong(keep, message):
    with pytest.raises(PlanError, match=message):
        Plan(keep).check(ANATOMY)


def test_a_site_may_be_empty_with_its_sublayer():
    Plan({"encoder.0.heads": (), "encoder.0.attention": ()}).check(ANATOMY)


@given(st.dictionaries(st.text(), st.lists(st.integers(0, 10**6)).map(tuple)))
def test_json_round_trip(keep):
    plan = Plan(keep)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).digest() == plan.digest()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.text() | JSON.map(json.dumps) | JSON.map(lambda keep: json.dumps({"version": 1, "keep": keep})))
def test_the_parser_gives_a_plan_or_a_plan_error(text):
    try:
        plan = Plan.from_json(text)
    except PlanError as error:
        assert error.what
    else:
        assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_cannot_be_changed_afterwards():
    source = {"a": [1]}
    plan = Plan(source)
    source["a"].append(2)
    assert plan.keep["a"] == (1,)
    with pytest.raises(TypeError):
        plan.keep["b"] = (1,)
    assert hash(plan) == hash(Plan({"a": (1,)}))
