"""Cutting the vocabulary: rows of tables and their heads, the ids in configs, and tokenizers of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimformer.core.anatomy import VOCABULARY_SITE
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.errors import PlanError
from slimformer.families.base import anatomy_of
from slimformer.forms.kronecker import Kronecker
from slimformer.saving import checkpoint
from tests.tiny import tiny

# -- Tables --------------------------------------------------------------------------------------------------------------------

KEEP = (0, 1, 2, 7, 40, 98)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_gives_words_is_cut_with_the_table(model_type: str, tied: bool, tmp_path: Path) -> None:
    model = tiny(model_type, auto_class="AutoModelForMaskedLM", tie_word_embeddings=tied)
    small = shrink(model, anatomy_of(model), Plan({VOCABULARY_SITE: KEEP}))
    ids, mask = torch.tensor([[2, 7, 98, 40]]), torch.ones(1, 4, dtype=torch.long)
    moved = torch.tensor([[KEEP.index(int(index)) for index in ids[0]]])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits[..., list(KEEP)]
        assert torch.allclose(small(input_ids=moved, attention_mask=mask).logits, expected, rtol=0, atol=1e-5)
        small(input_ids=moved, attention_mask=mask, labels=moved)  # transformers' own loss asks the config for the size
    assert (small.get_input_embeddings().weight is small.get_output_embeddings().weight) == tied
    checkpoint.save(small, Plan({VOCABULARY_SITE: KEEP}), tmp_path / "cut", tokenizer_from=tmp_path)
    loaded = checkpoint.load(tmp_path / "cut")
    assert loaded.get_output_embeddings().weight.shape[0] == loaded.config.vocab_size == len(KEEP)


def test_a_later_plan_counts_the_pieces_that_are_left() -> None:
    model = tiny("bert")
    small = shrink(model, anatomy_of(model), Plan({VOCABULARY_SITE: KEEP}))
    twice = shrink(small, anatomy_of(small), Plan({VOCABULARY_SITE: (0, 1, 3)}))
    assert torch.equal(twice.get_input_embeddings().weight, model.get_input_embeddings().weight[[0, 1, 7]])
    assert twice.config.pad_token_id == 1


def test_a_piece_that_the_config_names_cannot_go() -> None:
    model = tiny("roberta")
    with pytest.raises(PlanError, match="drops the piece 1, which config.json names as pad_token_id"):
        shrink(model, anatomy_of(model), Plan({VOCABULARY_SITE: (0, 2, 5)}))


def test_lists_of_ids_follow_and_forbidden_words_may_go() -> None:
    model = tiny("marian", eos_token_id=2)
    model.generation_config.eos_token_id = [2, 40]
    model.generation_config.bad_words_ids = [[98], [50]]
    small = shrink(model, anatomy_of(model), Plan({VOCABULARY_SITE: KEEP}))
    assert small.generation_config.eos_token_id == [2, 4]
    assert small.generation_config.bad_words_ids == [[5]]
    assert model.generation_config.bad_words_ids == [[98], [50]]


def test_a_factored_table_has_no_pieces_to_cut() -> None:
    model = tiny("bert")
    anatomy = anatomy_of(model)
    factored = shrink(model, anatomy, Plan({VOCABULARY_SITE: KEEP}, {"embeddings.word": Kronecker((6, 8))}))
    assert factored.config.vocab_size == len(KEEP)
    assert anatomy_of(factored).vocabulary is None
    with pytest.raises(PlanError, match="names the site 'vocabulary'"):
        shrink(factored, anatomy_of(factored), Plan({VOCABULARY_SITE: (0, 1)}))


def test_a_vocabulary_keeps_something() -> None:
    with pytest.raises(PlanError, match="keeps no piece"):
        Plan({VOCABULARY_SITE: ()}).check(anatomy_of(tiny("bert")))
