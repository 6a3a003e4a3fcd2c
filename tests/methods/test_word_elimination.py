"""Word elimination: which words stay, that the others are as good as gone, what is learned, saved and exported, what is refused."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny import batch, tiny
from tiny_folder import write_data, write_model

from slimformer.core import cost
from slimformer.core.anatomy import Tokens
from slimformer.core.junction import Exit, Sieve, junction_from_data
from slimformer.core.plan import Decision, Plan
from slimformer.core.shrink import shrink, unshrink
from slimformer.core.sieving import (
    all_words,
    keeping_shares,
    latest_shares,
    latest_words,
    share_threshold,
    sifting,
    surviving,
)
from slimformer.errors import ExportError, PlanError, TargetError
from slimformer.exporters._onnx import sieves as cutting
from slimformer.exporters.base import Variant
from slimformer.exporters.kernels import Kernels
from slimformer.exporters.onnx import Onnx
from slimformer.families.base import anatomy_of, subject_of
from slimformer.hooks.capture import Capture
from slimformer.log import Log
from slimformer.measuring.components import Component, Spot, components_of
from slimformer.measuring.operators import decides_by_text, place_nodes
from slimformer.measuring.profile import Texts, count_parts, profile_onnx, profile_torch, random_texts
from slimformer.methods.base import Method, Progress, Step
from slimformer.methods.distillation import Pair, hidden_distance
from slimformer.methods.early_exit import EarlyExit
from slimformer.methods.fisher import Fisher
from slimformer.methods.quantization import Quantization
from slimformer.methods.word_elimination import WordElimination, rising_cuts, seen_shares, sieve_layers, steps_of
from slimformer.reporting.inspection import inspect
from slimformer.running.bundle import Run
from slimformer.running.order import conflicts
from slimformer.running.preflight import preflight
from slimformer.running.prepare import prepare_bundle
from slimformer.running.recipe import Recipe
from slimformer.running.stages import advance, context_of
from slimformer.saving import checkpoint
from slimformer.tasks.classification import Classification
from slimformer.testing.checks import _seen, tiny_context
from slimformer.training.stage import Calibrate, Train

TYPES = ("bert", "roberta", "electra", "distilbert")
SIEVES = {"encoder.0": Sieve(0.7), "encoder.1": Sieve(0.5)}
BY_THRESHOLD = {"encoder.0": Sieve(0.7, threshold=0.9), "encoder.1": Sieve(0.5, threshold=1.0)}


def sieved(model_type="bert", sieves=SIEVES, **changes):
    model = tiny(model_type, **changes)
    return shrink(model, anatomy_of(model), Plan(junctions=sieves))


def kept_of(share, words):
    """How many of so many words a sieve by share keeps."""
    return max(1, math.ceil(round(share * 10_000) * words / 10_000))


def by_hand(sieve, received, there):
    """The words that stay, one text at a time."""
    rows = []
    for numbers, words in zip(received.tolist(), there.tolist(), strict=True):
        present = [place for place, word in enumerate(words) if word]
        if sieve.threshold is None:
            order = sorted(present[1:], key=lambda place: -numbers[place])
            kept = {0, *order[: math.ceil(round(sieve.share * 10_000) * len(present) / 10_000) - 1]}
        else:
            kept = {0, *(place for place in present if numbers[place] >= sieve.threshold)}
        rows.append([place in kept for place in range(len(words))])
    return torch.tensor(rows)


@pytest.mark.parametrize(
    "sieve", [Sieve(0.5), Sieve(0.3334), Sieve(1.0), Sieve(0.0001), Sieve(0.5, threshold=0.8), Sieve(0.5, threshold=0.0)]
)
def test_the_words_with_most_attention_stay(sieve):
    generator = torch.Generator().manual_seed(0)
    received = torch.rand(50, 9, generator=generator) * 2
    there = torch.arange(9) < torch.randint(1, 10, (50, 1), generator=generator)
    stays = surviving(sieve, received, there)
    assert torch.equal(stays, by_hand(sieve, received, there))
    assert not (stays & ~there).any()
    if sieve.threshold is None:
        assert stays.sum(1).tolist() == [kept_of(sieve.share, count) for count in there.sum(1).tolist()]


@torch.no_grad()
def without_the_words(model, ids, sieves):
    """The logits of one text of a BERT whose words are really taken out between attention and feed-forward."""
    bert, (row,) = model.bert, ids
    hidden = bert.embeddings(input_ids=row[None])
    for place, layer in enumerate(bert.encoder.layer):
        before = hidden
        inner = layer.attention.self
        query, key = (part(before)[0].view(len(before[0]), -1, inner.attention_head_size) for part in (inner.query, inner.key))
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(inner.attention_head_size)
        received = scores.softmax(-1).mean(0).sum(0)  # (words,)
        hidden = layer.attention(before)[0]
        sieve = sieves.get(f"encoder.{place}")
        if sieve is not None:
            kept = by_hand(sieve, received[None], torch.ones(1, len(received), dtype=torch.bool))[0]
            hidden = hidden[:, kept]
        hidden = layer.feed_forward_chunk(hidden)
    return model.classifier(bert.pooler(hidden))[0]


@pytest.mark.parametrize("sieves", [SIEVES, BY_THRESHOLD], ids=["rank", "threshold"])
def test_words_that_left_are_as_good_as_gone(sieves):
    dense, small = tiny("bert"), sieved(sieves=sieves)
    inputs = batch(dense, rows=8, seq=11)
    with torch.no_grad():
        together = small(**inputs).logits
    assert len(latest_shares(small)) == 2
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = without_the_words(dense, inputs["input_ids"][row : row + 1, :length], sieves)
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(together, dense(**inputs).logits, atol=1e-2), "no word left"
        with all_words(small):
            torch.testing.assert_close(small(**inputs).logits, dense(**inputs).logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", TYPES)
def test_every_family_with_either_attention(model_type, implementation):
    small = sieved(model_type)
    small.set_attn_implementation(implementation)
    inputs = batch(small, rows=4, seq=9)
    with torch.no_grad():
        logits = small(**inputs).logits
        for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
            alone = {name: values[row : row + 1, :length] for name, values in inputs.items()}
            torch.testing.assert_close(small(**alone).logits[0], logits[row], atol=1e-5, rtol=1e-5)


def test_words_that_left_keep_their_vector_and_take_a_gradient():
    small = sieved(auto_class="AutoModelForTokenClassification")
    layers, inputs, states = small.bert.encoder.layer, batch(small, rows=2, seq=8), []
    hooks = [layer.register_forward_hook(lambda _, args, output: states.append((args[0], output))) for layer in layers]
    small.train()(**inputs).logits.sum().backward()
    for hook in hooks:
        hook.remove()
    kept = [int((into != out).any(-1).sum()) for into, out in states]
    words = inputs["attention_mask"].sum(1).tolist()
    first = [kept_of(0.7, count) for count in words]
    second = [kept_of(0.5, count) for count in first]
    assert kept == [sum(first), sum(second), sum(second)]
    assert all(parameter.grad is not None for parameter in layers.parameters())


def test_distillation_compares_the_words_that_are_still_there():
    dense, small = tiny("bert"), sieved()
    inputs = batch(dense, rows=4, seq=9)
    with torch.no_grad():
        mine, theirs = (_seen(subject_of(model), inputs, {Capture.HIDDEN, Capture.LOGITS}) for model in (small, dense))
    assert set(mine.words) == {1, 2, 3}
    assert not theirs.words
    counts = [int(mine.words[state].sum()) for state in (1, 2, 3)]
    kept = [[kept_of(0.7, count) for count in inputs["attention_mask"].sum(1).tolist()]]
    kept.append([kept_of(0.5, count) for count in kept[0]])
    assert counts == [sum(kept[0]), sum(kept[1]), sum(kept[1])]
    masks = {Tokens.SOURCE: inputs["attention_mask"].bool()}
    pair = Pair(3, 3, Tokens.SOURCE)
    found = hidden_distance(mine, theirs, masks, [pair], units=None, project=None, relative=False)
    there = mine.words[3]
    assert float(found) == pytest.approx(float((mine.hidden[3][there] - theirs.hidden[3][there]).square().mean()), rel=1e-5)


def test_weights_of_0_and_1_do_what_a_sieve_does():
    model = tiny("bert")
    inputs = batch(model, rows=6, seq=10)

    def rule(sieve):
        return lambda received, there: surviving(sieve, received, there > 0).float()

    with torch.no_grad():
        with sifting(model, anatomy_of(model), {layer: rule(sieve) for layer, sieve in SIEVES.items()}):
            soft = model(**inputs).logits
        torch.testing.assert_close(soft, sieved()(**inputs).logits, atol=1e-5, rtol=1e-5)
        assert type(model.bert.encoder.layer[0]) is type(tiny("bert").bert.encoder.layer[0])


# -- Learning --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["rank", "threshold"])
def test_what_stays_is_learned_and_meets_the_budget(by):
    context = tiny_context("bert", "macs", 8)
    method = WordElimination(keep=0.6, by=by, lr=0.3, multiplier_lr=0.5, ramp=0.2)
    state = method.attach(context)
    optimizer = torch.optim.AdamW([dict(group) for group in state.groups()], lr=0.1)
    inputs = next(iter(context.batches(8)))
    for number in range(60):
        student = _seen(context.subject, inputs, {Capture.LOGITS})
        step = Step(context.model, inputs, student, None, Progress(number, 60), context.task)
        method.penalty(state, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.advance(state, Progress(number + 1, 60))
    report = method.report(state)
    assert (inputs["attention_mask"] == 0).any(), "no padding: the case tells less"
    assert report["goal"] == pytest.approx(0.6)
    assert report["cost"] < 0.85, "nothing was learned"
    decision = method.decide(state, context)
    left = context.cost.of(decision.plan, context.anatomy) / context.cost.dense
    assert 0.45 < left <= 0.6
    shares = [share for _, share in context.anatomy.after(decision.plan).words_left]
    assert shares == sorted(shares, reverse=True)
    assert "word_elimination: words that go on" in decision.notes[0]
    assert all((sieve.threshold is None) == (by == "rank") for sieve in decision.plan.junctions.values())


def test_costs_count_the_words_that_are_left():
    anatomy, lengths = anatomy_of(tiny("bert")), np.array([10])
    whole, plan = cost.macs(anatomy, lengths), Plan(junctions={"encoder.0": Sieve(0.5)})
    per_word = {site.id: whole.curves[site.id][-1] for site in anatomy.units}
    scores = 2 * 4 * 8 * 100  # of 4 heads of size 8, for 10 words
    by_hand = per_word["encoder.0.heads"] + 0.5 * per_word["encoder.0.neurons"]
    for layer in (1, 2):
        attention = per_word[f"encoder.{layer}.heads"]
        by_hand += 0.5 * (attention - scores) + 0.25 * scores + 0.5 * per_word[f"encoder.{layer}.neurons"]
    assert whole.of(plan, anatomy) == pytest.approx(whole.fixed + by_hand)
    small = anatomy_of(sieved(sieves=plan.junctions))
    assert cost.macs(small, lengths).dense == pytest.approx(whole.fixed + by_hand)
    counted = cost.parameters(tiny("bert"), anatomy)
    assert counted.of(plan, anatomy) == counted.dense


def test_shares_fall_from_layer_to_layer():
    assert rising_cuts([0.5, 0.7, 0.2]) == [0.5, 0.5, 0.2]
    assert steps_of([0.5, 0.5, 0.2]) == [0.5, 1.0, 0.4]
    assert math.prod(steps_of([0.9, 0.31, 0.077])) <= 0.077


# -- Saving ----------------------------------------------------------------------------------------------------------------------


def test_a_saved_model_takes_the_same_words_out(tmp_path):
    small, inputs = sieved(), batch(tiny("bert"))
    plan = Plan(junctions=SIEVES)
    assert Plan.from_json(plan.to_json()) == plan
    assert junction_from_data(Sieve(0.5, 1.25).to_data(), "encoder.0") == Sieve(0.5, 1.25)
    checkpoint.save(small, plan, tmp_path / "small", tokenizer_from=write_model(tmp_path / "dense"))
    loaded = checkpoint.load(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, small(**inputs).logits)
    assert anatomy_of(loaded).sieves == SIEVES
    found = inspect(tmp_path / "small")
    assert found.words == pytest.approx((0.7, 0.35, 0.35))


def test_a_model_with_sieves_can_still_lose_heads():
    small, inputs = sieved(), batch(tiny("bert"))
    plan = Plan({"encoder.0.heads": (0, 2), "encoder.2.ffn": ()})
    smaller = shrink(small, anatomy_of(small), plan)
    other = shrink(tiny("bert"), anatomy_of(tiny("bert")), replace(plan, junctions=SIEVES))
    with torch.no_grad():
        torch.testing.assert_close(smaller(**inputs).logits, other(**inputs).logits)
    assert anatomy_of(smaller).sieves == SIEVES


# -- Files -----------------------------------------------------------------------------------------------------------------------


def arrays(model, shapes=((3, 9), (1, 5), (5, 20))):
    return [
        {name: values.numpy() for name, values in batch(model, rows=rows, seq=seq, seed=seed).items()}
        for seed, (rows, seq) in enumerate(shapes)
    ]


CASES = {
    "bert": ("bert", SIEVES, None, ("logits",)),
    "distilbert, threshold": ("distilbert", BY_THRESHOLD, None, ("logits",)),
    "roberta, questions": ("roberta", SIEVES, "AutoModelForQuestionAnswering", ("start_logits", "end_logits")),
    "bert, each word": ("bert", BY_THRESHOLD, "AutoModelForTokenClassification", ("logits",)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_files_give_the_numbers_of_the_model(case, tmp_path):
    model_type, sieves, auto_class, outputs = CASES[case]
    changes = {"num_labels": 2} if len(outputs) == 2 else {}
    small = sieved(model_type, sieves, auto_class=auto_class, **changes)
    made = Onnx(agreement=0.0).export_all(
        small,
        arrays(small),
        {variant: tmp_path / f"{variant}.onnx" for variant in (Variant.FLOAT, Variant.FUSED, Variant.INT8_FUSED)},
        outputs,
    )
    assert made[Variant.FLOAT].max_difference < 1e-4
    assert made[Variant.FUSED].max_difference < 1e-4
    assert all("words leave at 2 layers" in artifact.notes for artifact in made.values())
    others = arrays(small, ((16, 13),))[0]
    if auto_class is not None:  # where the head reads the first word alone, padding cannot stand before it
        others["attention_mask"][-4:, :2] = 0
    with torch.no_grad():
        expected = small(**{name: torch.from_numpy(values) for name, values in others.items()})
    for variant in (Variant.FLOAT, Variant.FUSED):
        session = onnxruntime.InferenceSession(made[variant].path)
        feed = {item.name: others.get(item.name, np.zeros_like(others["input_ids"])) for item in session.get_inputs()}
        for name, got in zip(outputs, session.run(list(outputs), feed), strict=True):
            there = others["attention_mask"] > 0 if got.shape[:2] == (16, 13) else np.full(16, fill_value=True)
            np.testing.assert_allclose(got[there], expected[name].numpy()[there], atol=2e-4)


@pytest.mark.slow
def test_a_model_that_trains_is_exported_as_it_answers(tmp_path):
    small = sieved(hidden_dropout_prob=0.5).train()
    artifact = Onnx().export(small, arrays(small), tmp_path / "model.onnx", Variant.FLOAT)
    assert artifact.max_difference < 1e-4
    assert small.training


def test_a_file_that_no_input_can_prove_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cutting, "TOO_CLOSE", math.inf)
    with pytest.raises(ExportError, match="nothing can prove the file"):
        Onnx().export(sieved(), arrays(sieved()), tmp_path / "model.onnx", Variant.FLOAT)
    assert not list(tmp_path.iterdir())


def test_the_file_computes_only_the_words_that_are_left(tmp_path):
    small = sieved()
    artifact = Onnx().export(small, arrays(small), tmp_path / "model.onnx", Variant.FLOAT)
    graph = onnx.load(artifact.path)
    neurons = small.config.intermediate_size
    wide = [
        node.output[0]
        for node in graph.graph.node
        if node.op_type == "MatMul"
        and any(item.name == node.input[1] and list(item.dims) == [32, neurons] for item in graph.graph.initializer)
    ]
    assert len(wide) == 3
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in wide)
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    ids = np.full((2, 20), 7)
    mask = np.ones_like(ids)
    mask[1, 10:] = 0
    feed = {
        item.name: {"input_ids": ids, "attention_mask": mask}.get(item.name, np.zeros_like(ids))
        for item in session.get_inputs()
    }
    shapes = [value.shape[:2] for value in session.run(wide, feed)]
    assert shapes == [(2, 14), (2, 7), (2, 1)]  # the head reads the first word only


@pytest.mark.slow
def test_answers_do_not_depend_on_neighbours_or_padding(tmp_path):
    small = sieved(sieves=BY_THRESHOLD)
    artifact = Onnx(agreement=0.0).export(small, arrays(small), tmp_path / "model.onnx", Variant.INT8_FUSED)
    session = onnxruntime.InferenceSession(artifact.path)
    rows = arrays(small, ((8, 12),))[0]
    names = [item.name for item in session.get_inputs()]
    rows |= {name: np.zeros_like(rows["input_ids"]) for name in names if name not in rows}
    together = session.run(None, {name: rows[name] for name in names})[0]
    for row, length in enumerate(rows["attention_mask"].sum(1)):
        alone = session.run(None, {name: rows[name][row : row + 1, :length] for name in names})[0]
        np.testing.assert_allclose(alone[0], together[row], atol=2e-2)


# -- What is refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        Plan(junctions={"encoder.9": Sieve(0.5)}),
        Plan(junctions={"encoder.2": Sieve(0.5)}),
        Plan(junctions={"encoder.0": Sieve(0.0)}),
        Plan(junctions={"encoder.0": Sieve(0.5, -1.0)}),
        Plan(junctions={"encoder.0": Sieve(0.5), "encoder.1": Exit(3, "maximum", 0.7)}),
        Plan({"encoder.0.attention": ()}, junctions={"encoder.0": Sieve(0.5)}),
    ],
)
def test_plans_that_make_no_sense_are_refused(plan):
    with pytest.raises(PlanError):
        plan.check(anatomy_of(tiny("bert")))


def test_later_plans_cannot_take_the_attention_of_a_sieve_away():
    anatomy = anatomy_of(sieved())
    with pytest.raises(PlanError, match="without its attention"):
        Plan({"encoder.1.attention": ()}).check(anatomy)
    with pytest.raises(PlanError, match="already"):
        Plan(junctions={"encoder.0": Sieve(0.5)}).check(anatomy)
    with pytest.raises(PlanError, match="exits or sieves"):
        unshrink(sieved(), tiny("bert"), anatomy_of(tiny("bert")), Plan(junctions=SIEVES))
    with pytest.raises(TargetError, match="already"):
        EarlyExit(threshold=0.5).check(anatomy, None)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (WordElimination(layers=(3,)), "is the last"),
        (WordElimination(layers=(1, 7)), "layer 7"),
        (WordElimination(keep=0.01), "cannot be reached"),
    ],
)
def test_layers_and_budgets_that_cannot_be_are_refused(method, says):
    anatomy = anatomy_of(tiny("bert"))
    with pytest.raises(TargetError, match=says):
        method.check(anatomy, cost.macs(anatomy, np.array([10])))


def test_other_models_are_refused():
    with pytest.raises(TargetError, match="writes texts"):
        sieve_layers(anatomy_of(tiny("bart")), None)
    with pytest.raises(TargetError, match="already"):
        sieve_layers(anatomy_of(sieved()), None)
    with pytest.raises(ExportError, match="sieves"):
        Kernels().check("bert", branches=True)


@pytest.mark.parametrize("sieves", [SIEVES, BY_THRESHOLD], ids=["rank", "threshold"])
def test_a_profile_counts_the_words_that_are_left(sieves):
    subject, places = subject_of(sieved(sieves=sieves)), {"encoder.0": 0, "encoder.1": 1}
    reads = [random_texts(subject, Texts(1, 10), seed) for seed in range(6)]
    left = []  # of each text: the words that come to each layer's attention, and to the end
    for read in reads:
        with torch.no_grad():
            subject.model(**subject.feed(read))
        behind = {place: int(words.sum()) for place, words in latest_words(subject.model, subject.anatomy).items()}
        left.append([10, behind[0], behind[1], behind[2]])
    if sieves is SIEVES:
        assert left == [[10, 7, 4, 4]] * 6
    counts = count_parts(subject, 10, reads)
    for layer in range(3):
        attention, rest = (np.array([words[layer + behind] for words in left]) for behind in (0, 1))
        assert counts[Spot(Component.LINEAR_BEFORE, layer)].macs == pytest.approx(attention.mean() * 3 * 32 * 32)
        assert counts[Spot(Component.CORE, layer)].macs == pytest.approx(2 * 32 * (attention**2).mean())
        assert counts[Spot(Component.LINEAR_AFTER, layer)].macs == pytest.approx(attention.mean() * 32 * 32)
        assert counts[Spot(Component.FFN, layer)].macs == pytest.approx(rest.mean() * 2 * 32 * 24)
    found = profile_torch(subject, Texts(1, 10), "tiny", rounds=1, reads=reads)
    assert set(places.values()) == {place.layer for place in found.ms if place.component is Component.SIEVES}
    shares = ", ".join(f"{layer}: {sum(words[layer + 1] for words in left) / 60:.0%}" for layer in (0, 1))
    assert found.note == (
        f"6 texts of random words: words that are left behind the attention of layer {shares}; PyTorch computes all."
    )


def test_a_profile_of_a_file_tells_what_sieves_take(tmp_path):
    """Every operator that only a sieve needs counts to it, and what is gathered is still what it was."""
    model, path = sieved(), tmp_path / "model.onnx"
    subject = subject_of(model)
    Onnx(agreement=0.0).export(model, arrays(model), path, Variant.FLOAT)
    graph = onnx.load(path).graph
    places = place_nodes(graph, components_of(subject))
    assert decides_by_text(graph)
    kinds = Counter((node.op_type, places[node.name]) for node in graph.node)
    for layer in range(3):
        assert kinds["MatMul", Spot(Component.LINEAR_BEFORE, layer)] == 3
        assert kinds["MatMul", Spot(Component.LINEAR_AFTER, layer)] == 1
        assert kinds["MatMul", Spot(Component.FFN, layer)] == 2
        assert kinds["MatMul", Spot(Component.CORE, layer)] == 2
        assert kinds["Softmax", Spot(Component.CORE, layer)] == 1
        assert kinds["TopK", Spot(Component.SIEVES, layer)] == (layer < 2)
    found = profile_onnx(path, subject, Texts(2, 10), "tiny", threads=1, rounds=1)
    assert {place.layer for place in found.ms if place.component is Component.SIEVES} == {0, 1}
    assert all(found.ms[Spot(Component.CORE, layer)] > 0 for layer in range(3))


# -- Thresholds that are settled anew --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.77, 1.0])
def test_a_threshold_keeps_at_most_a_share_and_the_next_lower_one_more(share):
    """Brute force over all thresholds, on texts of different lengths; of words that tie, all leave or all stay."""
    generator = torch.Generator().manual_seed(3)
    received = (torch.rand(9, 8, generator=generator) * 2 * 20).round() / 20
    there = torch.arange(8) < torch.randint(1, 9, (9, 1), generator=generator)

    def mean(threshold):
        return float((by_hand(Sieve(1.0, threshold), received, there).sum(1) / there.sum(1)).mean())

    found = float(share_threshold(share, received, there))
    tried = [*sorted({float(value) for value in received[:, 1:][there[:, 1:]]}), 100.0]
    assert mean(found) == max([mean(100.0), *(mean(value) for value in tried if mean(value) <= share + 1e-6)])
    assert Sieve(share, found).problem() is None


def test_a_settled_sieve_takes_the_place_of_the_one_before():
    """Plans compose, and any other junction stays where it is."""
    model, anatomy = tiny("bert"), anatomy_of(tiny("bert"))
    first, later = Plan(junctions=BY_THRESHOLD), Plan(junctions={"encoder.1": Sieve(0.5, threshold=1.1)})
    once, twice = shrink(model, anatomy, first.then(later)), shrink(shrink(model, anatomy, first), anatomy.after(first), later)
    assert anatomy_of(once) == anatomy_of(twice)
    assert anatomy_of(twice).sieves == BY_THRESHOLD | later.junctions
    for before, after in ((SIEVES, BY_THRESHOLD), (BY_THRESHOLD, SIEVES)):
        with pytest.raises(PlanError, match="puts another there"):
            Plan(junctions=before).then(Plan(junctions=after))
        with pytest.raises(PlanError, match="already"):
            shrink(shrink(model, anatomy, Plan(junctions=before)), anatomy.after(Plan(junctions=before)), Plan(junctions=after))


def test_thresholds_follow_attention_while_a_stage_trains():
    model = sieved(sieves={"encoder.0": Sieve(0.7, threshold=9.0), "encoder.1": Sieve(0.5, threshold=0.0)})
    inputs = batch(model, rows=8, seq=20)
    with torch.no_grad(), keeping_shares(model):
        model(**inputs)
        kept = [float(shares.mean()) for shares in latest_shares(model)]
        assert 0.65 < kept[0] <= 0.7
        assert 0.45 < kept[1] <= 0.5
        assert latest_shares(model)[0].std() > 0, "one threshold for all texts"
        again = copy.deepcopy(model)
    with torch.no_grad():
        model(**inputs)
        again(**inputs)
    for one in (model, again):
        assert float(latest_shares(one)[0].mean()) < 0.2
        assert float(latest_shares(one)[1].min()) == 1


@dataclass(frozen=True)
class Looks(Method):
    """Notes the shares of words that pass in each step."""

    seen: ClassVar[list[list[float]]] = []

    def penalty(self, state, step):
        self.seen.append([float(shares.mean()) for shares in latest_shares(step.model)])


@pytest.mark.slow
def test_a_stage_behind_thresholds_delivers_the_shares_that_were_asked_for(tmp_path):
    source = write_model(tmp_path / "model")
    data = write_data(tmp_path / "data", train=64, dev=20)
    recipe = Recipe(str(source), Classification(data=str(data)), (Train(epochs=4.0, lr=0.01, precision="fp32"),))
    run = Run(tmp_path / "work", tmp_path / "work", Log(None, quiet=True), threads=1)
    bundle, _ = prepare_bundle(preflight(recipe), run)
    plan = Plan(junctions={"encoder.0": Sieve(0.8, threshold=0.5), "encoder.1": Sieve(0.6, threshold=0.9)})
    subject = subject_of(shrink(bundle.subject.model, bundle.subject.anatomy, plan))
    start = replace(bundle, subject=subject, plan=plan)
    stages = [replace(recipe.stages[0], methods=(Looks(),))]
    made, again = (advance(stages, start, run).bundle for _ in range(2))
    assert made.plan.junctions == made.subject.anatomy.sieves == again.subject.anatomy.sieves
    assert np.array(Looks.seen) == pytest.approx(np.tile([0.8, 0.6], (len(Looks.seen), 1)), abs=0.03)
    assert {layer: sieve.share for layer, sieve in made.plan.junctions.items()} == {"encoder.0": 0.8, "encoder.1": 0.6}

    def shares(subject):
        context = context_of(made, run, subject, "macs")
        found = seen_shares(replace(context, subject=subject_of(bare(subject))), subject.anatomy.sieves)
        return [sieve.share for sieve in found]

    def bare(subject):
        plain = copy.deepcopy(bundle.subject.model)
        plain.load_state_dict(subject.model.state_dict())
        return plain

    assert shares(made.subject) == pytest.approx([0.8, 0.6], abs=0.01)
    stale = subject_of(shrink(made.subject.model, made.subject.anatomy, plan))
    assert max(abs(share - asked) for share, asked in zip(shares(stale), (0.8, 0.6), strict=True)) > 0.05
    frozen = advance([replace(recipe.stages[0], freeze="encoder")], start, run).bundle
    assert frozen.plan == plan
    learning = Train((WordElimination(keep=0.8, by="threshold"),), epochs=1.0, precision="fp32")
    learned = advance([learning], bundle, run).bundle.plan.junctions
    assert all(sieve.threshold is not None for sieve in learned.values())


def test_stages_that_undo_it_are_refused():
    first = Train(methods=(WordElimination(),))
    assert any("first fisher" in why for why in conflicts(Calibrate(Fisher()), [first]))
    assert any("early_exit" in why for why in conflicts(Train(methods=(EarlyExit(),)), [first]))
    assert not list(conflicts(Train(methods=(Quantization(),)), [first]))
    assert not list(conflicts(first, [Calibrate(Fisher())]))


def test_a_decision_needs_no_weights():
    model = tiny("distilbert")
    small = shrink(model, anatomy_of(model), Decision(Plan(junctions=SIEVES)))
    assert list(small.state_dict()) == list(model.state_dict())
    assert subject_of(small).anatomy == anatomy_of(model).after(Plan(junctions=SIEVES))
