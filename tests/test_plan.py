"""Plans: composition by hand, checks with messages a person can act on, and a parser that survives anything."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny

from slimformer.core.plan import Plan
from slimformer.errors import PlanError
from slimformer.families.base import anatomy_of
from slimformer.forms.kronecker import Kronecker

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


KEEP = st.dictionaries(st.text(), st.lists(st.integers(0, 10**6)).map(tuple))
FORMS = st.dictionaries(
    st.text(), st.builds(Kronecker, st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)), st.integers(1, 10**6))
)


@given(KEEP, FORMS)
def test_json_round_trip(keep, forms):
    plan = Plan(keep, forms)
    assert Plan.from_json(plan.to_json()) == plan
    assert hash(Plan.from_json(plan.to_json())) == hash(plan)
    assert Plan.from_json(plan.to_json()).digest() == plan.digest()


def test_a_plan_without_forms_is_what_it_always_was():
    text = '{"keep": {"encoder.0.heads": [0, 2]}, "version": 1}'
    plan = Plan({"encoder.0.heads": (0, 2)})
    assert plan.to_json() == text
    assert plan.digest() == "13d97e521b67"
    assert Plan.from_json(text) == plan == Plan.from_json('{"version": 2, "keep": {"encoder.0.heads": [0, 2]}, "forms": {}}')


def test_forms_are_merged_and_each_matrix_changes_once():
    first, second = Plan({"a": (1,)}, {"x": Kronecker((2, 2))}), Plan({"a": (0,)}, {"y": Kronecker((3, 1), 2)})
    both = first.then(second)
    assert both == Plan({"a": (1,)}, {"x": Kronecker((2, 2)), "y": Kronecker((3, 1), 2)})
    assert both.digest() != Plan({"a": (1,)}).digest()
    assert hash(both) != hash(first)
    with pytest.raises(
        PlanError, match=r"matrix 'x' has the form Kronecker\(a=\(2, 2\), terms=1\), the later plan gives it another"
    ):
        both.then(Plan(forms={"x": Kronecker((1, 4))}))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("kronecker", "matrix 'x': a form must be a mapping with `use`"),
        ({"use": "kroneker", "a": [1, 1], "terms": 1}, "knows no form 'kroneker'.\n.*did you mean 'kronecker'"),
        ({"use": "base"}, "knows no form 'base'"),
        ({"use": "kronecker", "a": [1, 1]}, "does not have exactly the options \\['a'\\]"),
        ({"use": "kronecker", "a": [1, 1], "terms": 1, "b": 2}, "does not have exactly the options"),
        ({"use": "kronecker", "a": [1, 0], "terms": 1}, "a must be two whole numbers from 1, got \\[1, 0\\]"),
        ({"use": "kronecker", "a": [1, 1], "terms": True}, "terms must be a whole number from 1"),
    ],
)
def test_a_form_that_is_none_is_said_with_its_matrix(form, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps({"version": 2, "keep": {}, "forms": {"x": form}}))


@pytest.mark.parametrize("data", [{"version": 1, "forms": {}}, {"version": 2}, {"version": 2, "forms": []}, {"version": 3}])
def test_each_version_holds_what_it_holds(data):
    with pytest.raises(PlanError, match="version"):
        Plan.from_json(json.dumps({"keep": {}} | data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def told(pair):
    keep, forms = pair
    return json.dumps({"version": 2, "keep": keep, "forms": {"x": forms, "y": {"use": "kronecker", "a": forms, "terms": keep}}})


@given(
    st.text()
    | JSON.map(json.dumps)
    | JSON.map(lambda keep: json.dumps({"version": 1, "keep": keep}))
    | JSON.map(lambda forms: json.dumps({"version": 2, "keep": {}, "forms": forms}))
    | st.tuples(JSON, JSON).map(told)
)
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
