"""The registry: names are file names, unknown ones get the nearest, plug-ins come by entry points."""

from __future__ import annotations

import pytest

from slimformer import registry
from slimformer.errors import RecipeError


def test_names_are_file_names():
    assert {"bert", "distilbert"} <= set(registry.names("families"))
    assert {"fisher", "gates", "distillation", "layers"} <= set(registry.names("methods"))
    assert registry.name_of(registry.find("methods", "fisher")()) == "fisher"


def test_unknown_names_get_the_nearest():
    with pytest.raises(RecipeError, match=r"no 'fischer' among the methods[\s\S]*did you mean 'fisher'"):
        registry.find("methods", "fischer")


def test_every_summary_is_a_sentence():
    for kind in registry.KINDS:
        for name in registry.names(kind):
            assert len(registry.summary(kind, name)) > 20
