"""The public names: complete, importable, and light to reach."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

import slimformer

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "datasets", "matplotlib", "sklearn", "pydantic", "jinja2", "rich")


def test_every_name_resolves_to_what_it_says():
    for name in slimformer.__all__:
        found = getattr(slimformer, name)
        assert found.__name__ == name
        assert not isinstance(found, types.ModuleType)
    assert sorted(slimformer._PLACES) == slimformer.__all__ == sorted(slimformer.__all__)
    assert set(dir(slimformer)) == {*slimformer.__all__, "__version__"}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'comprss'"):
        slimformer.comprss  # noqa: B018


@pytest.mark.parametrize(
    "module",
    [
        "slimformer",
        "slimformer.cli",
        "slimformer.running.bench",
        "slimformer.tasks.classification",
        "slimformer.families.bert",
        "slimformer.core.budget",
        "slimformer.reporting.card, slimformer.reporting.page, slimformer.reporting.terminal",
    ],
)
def test_imports_stay_lean(module):
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    allowed = {"slimformer.cli": {"rich"}}.get(module, set())
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(eval(found.stdout)) <= allowed


@pytest.mark.parametrize("arguments", [["--help"], ["compress", "--help"], ["bench", "--help"]], ids=" ".join)
def test_help_stays_lean(arguments):
    """The options of all tasks are collected without what tasks compute with; pydantic is typer's own."""
    code = (
        "import contextlib, io, sys\n"
        "from slimformer.cli import main\n"
        f"sys.argv = ['slimformer', *{arguments!r}]\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n    main()\n"
        f"print([name for name in {(*HEAVY, 'numpy', 'tokenizers', 'slimformer.families.base')!r} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(eval(found.stdout)) <= {"rich", "pydantic"}
