"""A family of another package: one file with its own tiny config passes every check, and nothing of ours has to know it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slimformer import registry
from slimformer.families.base import family_of
from slimformer.testing.checks import checks_of

SOURCE = '''"""Data2Vec for text: RoBERTa's skeleton."""

from slimformer.families.base import Attention, Family, FeedForward, Skeleton, Skip


class Data2Vec(Family):
    model_types = ("data2vec-text",)
    skeleton = Skeleton(
        layers="encoder.layer",
        attention=Attention(
            module="attention.self",
            query="attention.self.query",
            key="attention.self.key",
            value="attention.self.value",
            out="attention.output.dense",
            norm="attention.output.LayerNorm",
            counters=("num_attention_heads", "all_head_size"),
            start="attention",
            end="attention.output",
            skips=(Skip("attention", gives="input", pair=True),),
        ),
        ffn=FeedForward(
            into="intermediate.dense",
            out="output.dense",
            norm="output.LayerNorm",
            start="intermediate",
            end="output",
            skips=(Skip("intermediate", gives="input"), Skip("output", gives="residual")),
        ),
        head=("classifier.dense",),
        last=("classifier.out_proj",),
    )

    def positions(self, config):
        return config["max_position_embeddings"] - config["pad_token_id"] - 1

    def tiny(self, model_type):
        return {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 24, "type_vocab_size": 1}
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package with that file, found through its entry point."""
    (tmp_path / "theirs.py").write_text(SOURCE, encoding="utf-8")
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[slimformer.families]\ndata2vec = theirs:Data2Vec\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    registry.names.cache_clear()
    registry.find.cache_clear()
    yield
    registry.names.cache_clear()
    registry.find.cache_clear()
    sys.modules.pop("theirs", None)


@pytest.mark.parametrize("number", range(len(checks_of("families"))))
def test_it_passes_every_check(package: None, number: int) -> None:
    check = checks_of("families")[number]
    check(type(family_of("data2vec-text")))
