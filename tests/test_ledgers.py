"""Each ledger under results/ is that of the recipe beside it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results"
# The name that the option `keep` of a method had when its rows were measured. A ledger is only ever added to, so that its rows still
# carry the digest of the recipe with that name.
OLD_NAMES = {"gates": "target", "movement": "target", "knowledge_sparse": "density"}


def as_measured(recipe: str) -> str:
    """The recipe with the names that its options had then."""
    for method, name in OLD_NAMES.items():
        recipe = re.sub(rf"(- use: {method}\n(?: +\w+: .*\n)*? +)keep:", rf"\1{name}:", recipe)
    return recipe


def test_each_row_was_measured_with_the_recipe_beside_it() -> None:
    recipes = sorted(RESULTS.rglob("recipe.yaml"))
    assert recipes
    for file in recipes:
        text = file.read_text(encoding="utf-8")
        digests = {hashlib.sha256(version.encode()).hexdigest()[:12] for version in (text, as_measured(text))}
        ledger = file.with_name("ledger.jsonl").read_text(encoding="utf-8")
        measured = set(re.findall(r'"recipe": "(\w+)"', ledger))
        assert measured, f"{ledger} has no rows of ours"
        assert measured <= digests, f"{file.parent} was measured with another recipe"
