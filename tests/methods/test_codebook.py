"""Codebook tables: words weigh as often as they are read, models become smaller, and what cannot be coded is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import batch, tiny
from toy_task import with_model

from slimformer.core.plan import Decision, Plan
from slimformer.core.shrink import shrink
from slimformer.errors import PlanError, RecipeError
from slimformer.families.base import anatomy_of, subject_of
from slimformer.forms.codebook import Codebook
from slimformer.methods.base import Context, State
from slimformer.methods.codebook import CodebookWords, reads
from slimformer.running.reader import parse_recipe
from slimformer.testing.checks import tiny_context


def around(model: Any) -> Context:
    return with_model(tiny_context(), model, anatomy_of(model))


def decided(context: Context, **options: Any) -> Decision:
    return CodebookWords(**options).decide(State(), context)


def test_the_table_becomes_codes_and_the_rest_stays() -> None:
    context = around(tiny("bert"))
    decision = decided(context, columns=4, entries=16)
    assert decision.plan.forms == {"embeddings.word": Codebook(8, 16)}
    assert decided(context).plan.forms == {"embeddings.word": Codebook(4, 99 // 4)}
    small = shrink(context.model, context.anatomy, decision)
    table = small.bert.embeddings.word_embeddings
    assert torch.equal(table.codes, decision.weights["bert.embeddings.word_embeddings.codes"])
    assert context.model.num_parameters() - small.num_parameters() == 99 * 32 - (99 * 8 + 16 * 32)
    with torch.no_grad():
        assert bool(torch.isfinite(small(**batch(small)).logits).all())


def test_words_count_as_often_as_they_are_read() -> None:
    context = around(tiny("bert"))
    counts = torch.ones(99)
    for rows in context.batches(16):
        counts += torch.bincount(rows["input_ids"][rows["attention_mask"].bool()], minlength=99)
    assert torch.equal(reads(context, context.anatomy.matrices["embeddings.word"], 16), counts)
    table = context.model.bert.embeddings.word_embeddings.weight.detach()
    lost = {}
    for weighted in ("reads", "none"):
        small = shrink(context.model, context.anatomy, decided(context, columns=8, entries=8, weighted=weighted, examples=16))
        error = (small.bert.embeddings.word_embeddings.matrix().detach() - table).square().sum(1)
        lost[weighted] = (float((error * counts).sum()), float(error.sum()))
    assert lost["reads"][0] < lost["none"][0]
    assert lost["reads"][1] > lost["none"][1]


def test_entries_learn_and_codes_stay() -> None:
    context = around(tiny("bert"))
    small = shrink(context.model, context.anatomy, decided(context, entries=16))
    table = small.bert.embeddings.word_embeddings
    codes, book = table.codes.clone(), table.book.detach().clone()
    optimizer = torch.optim.AdamW([item for item in small.parameters() if item.requires_grad], lr=0.1)
    small(**batch(small)).logits.square().sum().backward()
    optimizer.step()
    assert torch.equal(table.codes, codes)
    assert not torch.equal(table.book, book)


@pytest.mark.parametrize("options", [{"columns": 0}, {"entries": 1}, {"entries": 257}, {"weighted": "all"}, {"examples": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        CodebookWords(**options)


def test_what_cannot_be_coded_is_refused_before_anything_is_counted() -> None:
    context = around(tiny("bert"))
    with pytest.raises(
        PlanError, match=r"'embeddings.word' has 32 columns, which pieces of 5 do not divide.*\n.*name a number"
    ):
        CodebookWords(columns=5).check(context.anatomy, None)
    with pytest.raises(PlanError, match=r"codes and 24 entries would hold no fewer numbers than 99 x 32"):
        CodebookWords(columns=1, entries=24).check(context.anatomy, None)
    words = replace(context.anatomy.matrices["embeddings.word"], tied="decoder.words.weight")
    tied = replace(context.anatomy, matrices={**context.anatomy.matrices, words.id: words})
    with pytest.raises(PlanError, match="it is tied to 'decoder.words.weight'"):
        CodebookWords(entries=16).check(tied, None)
    once = around(shrink(context.model, context.anatomy, Plan(forms={"embeddings.word": Codebook(8, 16)})))
    with pytest.raises(PlanError, match="there is no plain word table to store as codes: it has another form already"):
        CodebookWords(entries=16).check(once.anatomy, None)


def test_the_vocabulary_is_trimmed_before() -> None:
    stages = [{"calibrate": {"method": "codebook"}}, {"trim_vocabulary": {}}]
    with pytest.raises(RecipeError, match="which codebook may have factored before: trim first, factor after"):
        parse_recipe({"model": "x", "task": "intents", "stages": stages})


def test_a_language_model_decodes_with_codes() -> None:
    model = tiny("bert", auto_class="AutoModelForMaskedLM")
    small = shrink(model, anatomy_of(model), Plan(forms={"embeddings.word": Codebook(8, 16)}))
    subject = subject_of(small)
    states = torch.randn(2, 5, 32)
    decoder: Any = subject.model.get_output_embeddings()
    torch.testing.assert_close(decoder(states), states @ small.get_input_embeddings().matrix().T + decoder.bias)
