"""The public names: complete, importable, and light to reach."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types

import pytest

import slimformer
from slimformer import registry

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "datasets", "matplotlib", "sklearn", "pydantic", "jinja2", "rich")


def test_every_name_resolves_to_what_it_says():
    for name in slimformer.__all__:
        found = getattr(slimformer, name)
        assert found.__name__ == name
        assert not isinstance(found, types.ModuleType)
    assert sorted(slimformer._PLACES) == slimformer.__all__ == sorted(slimformer.__all__)
    assert set(dir(slimformer)) == {*slimformer.__all__, "errors", "methods", "tasks", "__version__"}


@pytest.mark.parametrize("kind", ["methods", "tasks"])
def test_each_plug_in_is_a_name_of_its_folder(kind):
    module = getattr(slimformer, kind)
    assert len(dir(module)) == len(registry.names(kind)) + 1
    for name in dir(module):
        assert getattr(module, name).__name__ == name
    for name in registry.names(kind):
        cls = registry.find(kind, name)
        assert getattr(module, cls.__name__) is cls
    with pytest.raises(AttributeError, match=f"slimformer.{kind}' has no attribute 'Fishr'"):
        module.Fishr  # noqa: B018


def test_each_error_is_a_name_of_errors():
    raised = [name for name in dir(slimformer.errors) if name.endswith("Error")]
    assert {"SlimformerError", "ModelError", "DataError", "RecipeError", "TargetError", "OutputError", "ExtraError"} <= set(
        raised
    )


ROLES = ("Args:", "Returns:", "Raises:", "Example:")


@pytest.mark.parametrize("name", slimformer.__all__)
def test_a_public_function_says_what_it_takes_gives_and_raises(name):
    item = getattr(slimformer, name)
    if isinstance(item, type):
        return
    text = inspect.getdoc(item) or ""
    takes = list(inspect.signature(item).parameters)
    gives = inspect.signature(item).return_annotation not in ("None", None, inspect.Signature.empty)
    wanted = [role for role in ROLES if (role != "Returns:" or gives) and (role != "Args:" or takes)]
    assert [role for role in wanted if f"\n{role}" not in text] == []
    args = text[text.index("Args:") :].split("\n\n")[0]
    assert [n for n in takes if f"    {n}:" not in args and f"`{n}`" not in args] == []


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
