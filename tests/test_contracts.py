"""Everything the registry finds keeps its contract: nothing to edit when a plug-in is added."""

from __future__ import annotations

import pytest

from slimformer import registry
from slimformer.testing.checks import checks_of

SLOW = {"is_exported", "writes_what_the_model_computes", "runs_what_is_written", "works_on_decoders"}  # they take seconds
CASES = [
    pytest.param(kind, name, check, marks=pytest.mark.slow if check.__name__ in SLOW else ())
    for kind in registry.KINDS
    for name in registry.names(kind)
    for check in checks_of(kind)
]


@pytest.mark.parametrize(("kind", "name", "check"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_contract(kind, name, check):
    check(registry.find(kind, name))


def test_every_kind_has_members():
    for kind in registry.KINDS:
        assert registry.names(kind), f"no {kind}"
