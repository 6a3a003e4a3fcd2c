"""Methods read alike: the same five parts in each head, and the same order of parts in each file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from slimformer import registry

LABELS = ("Paper", "Idea", "Differs", "Choose when", "Cost")
FOLDER = Path(registry.__file__).parent / "methods"
FILES = [FOLDER / f"{name}.py" for name in registry.names("methods")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_head_has_five_short_parts(file: Path) -> None:
    head = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert head is not None
    assert len(head.splitlines()) <= 30
    first, *parts = head.split("\n\n")
    assert "\n" not in first, "the first line stands alone: `slimformer list` prints it"
    assert tuple(part.split(":")[0] for part in parts) == LABELS
    assert all(len(part.splitlines()) <= 6 for part in parts)


def rank(node: ast.stmt) -> int | None:
    """The place of a part: the options, then state and other classes, then formulas, then private functions."""
    if isinstance(node, ast.ClassDef):
        return 0 if any(isinstance(base, ast.Name) and base.id == "Method" for base in node.bases) else 1
    if isinstance(node, ast.FunctionDef):
        return 3 if node.name.startswith("_") else 2
    return None  # imports, constants and types stand where they are used first


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_parts_come_in_one_order(file: Path) -> None:
    found = [place for place in map(rank, ast.parse(file.read_text(encoding="utf-8")).body) if place is not None]
    assert found[0] == 0
    assert found == sorted(found)
    assert found.count(0) == 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_methods_verbs_come_in_the_order_of_the_contract(file: Path) -> None:
    verbs = [
        "__post_init__",
        "effects",
        "problem",
        "mismatch",
        "check",
        "foresee",
        "attach",
        "penalty",
        "advance",
        "report",
        "decide",
        "settle",
    ]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    method = next(node for node in tree.body if rank(node) == 0)
    assert isinstance(method, ast.ClassDef)
    names = [node.name for node in method.body if isinstance(node, ast.FunctionDef)]
    own = [name for name in names if name in verbs]
    assert own == sorted(own, key=verbs.index)
    assert "effects" in own
    assert names[: len(own)] == own, "helpers come after the verbs"
