"""The public names: complete, importable, and light to reach."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest

import slimformer
from slimformer import registry
from slimformer.describing import options_of

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "datasets", "matplotlib", "sklearn", "pydantic", "jinja2", "rich", "sacrebleu",
         "rouge_score", "seqeval")  # fmt: skip


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


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Functions of `slimformer`, and the methods that its classes have for users; a Trainer alone calls those of a callback."""
    for name in slimformer.__all__:
        item = getattr(slimformer, name)
        if not isinstance(item, type):
            yield name, item
            continue
        for part, value in vars(item).items():
            function = getattr(value, "__func__", value)
            if inspect.isfunction(function) and not part.startswith(("_", "on_")):
                yield f"{name}.{part}", function


def raised(function: Callable[..., Any]) -> set[str]:
    """Names of the errors that stand in a function's own lines."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    found = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    names = {ast.unparse(error.func if isinstance(error, ast.Call) else error) for error in found}
    return {name for name in names if name.endswith("Error")}


@pytest.mark.parametrize(
    ("name", "function"), list(public_functions()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_public_function_says_what_it_takes_gives_and_raises(name: str, function: Callable[..., Any]) -> None:
    text = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    takes = [item for item in signature.parameters if item not in ("self", "cls")]
    gives = signature.return_annotation not in ("None", None, inspect.Signature.empty)
    errors = raised(function)
    wanted = {"Args:": takes, "Returns:": gives, "Raises:": errors or "." not in name, "Example:": True}
    assert [part for part, there in wanted.items() if there and f"\n{part}" not in text] == []
    args = text.partition("Args:")[2].split("\n\n")[0]
    assert [item for item in takes if f"    {item}:" not in args and f"`{item}`" not in args] == []
    assert [error for error in errors if f"{error}:" not in text] == []


def public_classes() -> Iterator[type]:
    yield from (item for name in slimformer.__all__ if isinstance(item := getattr(slimformer, name), type))
    for kind in ("methods", "tasks"):
        yield from (registry.find(kind, name) for name in registry.names(kind))


@pytest.mark.parametrize("cls", list(public_classes()), ids=lambda cls: cls.__name__)
def test_a_public_class_says_what_its_options_mean_and_shows_one(cls: type) -> None:
    text = inspect.getdoc(cls) or ""
    assert ">>> " in text
    if cls in (slimformer.Bundle, slimformer.Decision):  # their types are known to type checkers alone
        said = {item.name for item in fields(cls) if f"    {item.name}:" in text or f"`{item.name}`:" in text}  # type: ignore[arg-type]
        assert said == {item.name for item in fields(cls)}  # type: ignore[arg-type]
    else:
        assert [item.name for item in options_of(cls) if not item.meaning] == []


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
        "slimformer.tasks.tagging",
        "slimformer.tasks.embedding",
        "slimformer.tasks.reranking",
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
