"""Encoder-decoders: a cut model generates what the masked one does, with a cache and without, and comes back from its folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import ENCODERS, MODEL_TYPES, batch, tiny
from transformers import AutoModelForSeq2SeqLM

from slimformer import registry
from slimformer.core import cost
from slimformer.core.anatomy import Kind, PointRole, Tokens
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink, unshrink
from slimformer.errors import PlanError, TargetError
from slimformer.families.base import anatomy_of, subject_of
from slimformer.hooks.capture import Capture, capturing
from slimformer.hooks.feeding import unpadded
from slimformer.hooks.gating import gated
from slimformer.methods.base import Progress
from slimformer.saving import checkpoint
from slimformer.testing.checks import tiny_context

SPEAKING = tuple(kind for kind in MODEL_TYPES if kind not in ENCODERS)
UNITS = Plan(
    {
        "encoder.0.heads": (1, 3),
        "encoder.2.heads": (0,),
        "encoder.1.neurons": tuple(range(7)),
        "decoder.0.heads": (0, 2, 3),
        "decoder.2.heads": (3,),
        "decoder.0.cross_heads": (2,),
        "decoder.1.cross_heads": (0, 1, 3),
        "decoder.1.neurons": tuple(range(5, 24)),
    }
)
SUBLAYERS = Plan(
    {
        "encoder.0.attention": (),
        "encoder.2.ffn": (),
        "decoder.0.attention": (),
        "decoder.0.cross_attention": (),
        "decoder.1.heads": (1, 2),
        "decoder.1.ffn": (),
        "decoder.2.attention": (),
        "decoder.2.cross_heads": (0, 3),
    }
)
SILENT = Plan({f"decoder.{layer}.{part}": () for layer in range(3) for part in ("attention", "cross_attention")})
BEAMS = {"num_beams": 3, "max_new_tokens": 7, "min_new_tokens": 4, "output_scores": True, "return_dict_in_generate": True}
GREEDY = BEAMS | {"num_beams": 1}


def spoken(model, **options):
    inputs = {name: value for name, value in batch(model, rows=2).items() if not name.startswith("decoder_")}
    with torch.no_grad():
        found = model.generate(**inputs, **options)
    return found.sequences, torch.stack(found.scores)


def same(one, other):
    assert torch.equal(one[0], other[0])
    torch.testing.assert_close(one[1], other[1], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SPEAKING)
def test_a_cut_model_generates_what_the_masked_one_does(model_type):
    model = tiny(model_type)
    anatomy = anatomy_of(model)
    whole = spoken(model, **BEAMS)
    nothing = spoken(shrink(model, anatomy, Plan()), **BEAMS)
    assert torch.equal(whole[0], nothing[0])
    assert torch.equal(whole[1], nothing[1])
    for plan in (UNITS, SUBLAYERS, SILENT):
        small = shrink(model, anatomy, plan)
        gates = {name: torch.zeros(anatomy.sites[name].size) for name in plan.keep}
        for name, kept in plan.keep.items():
            gates[name][list(kept)] = 1.0
        for options in (BEAMS, GREEDY):
            with gated(model, anatomy, gates):
                masked = spoken(model, **options)
            same(spoken(small, **options), masked)
        same(spoken(small, **BEAMS, use_cache=False), spoken(small, **BEAMS))
        again = shrink(small, anatomy.after(plan), Plan({"decoder.2.ffn": ()}))
        same(spoken(again, **BEAMS), spoken(shrink(model, anatomy, plan.then(Plan({"decoder.2.ffn": ()}))), **BEAMS))


@pytest.mark.parametrize("model_type", SPEAKING)
@pytest.mark.slow
def test_folders_keep_the_cut_model_and_how_it_generates(model_type, tmp_path: Path):
    model = tiny(model_type)
    model.generation_config.num_beams = 3
    model.generation_config.max_length = 6
    if "final_logits_bias" in dict(model.named_buffers()):
        model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "plain")
    dense = checkpoint.load(tmp_path / "plain")
    assert type(dense) is type(model)
    assert torch.equal(dense(**batch(model)).logits, model(**batch(model)).logits)
    small = shrink(dense, anatomy_of(dense), UNITS)
    checkpoint.save(small, UNITS, tmp_path / "cut", tokenizer_from=tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "cut")
    loaded.save_pretrained(tmp_path / "again")
    for other in (loaded, checkpoint.load(tmp_path / "again")):
        assert other.generation_config.num_beams == 3
        options = {"output_scores": True, "return_dict_in_generate": True}
        assert spoken(other, **options)[0].shape[1] <= 6
        same(spoken(other, **options), spoken(small, **options))
    assert checkpoint.is_tuned(tmp_path / "cut", "AutoModelForSeq2SeqLM")
    assert checkpoint.is_tuned(tmp_path / "plain", "AutoModelForSeq2SeqLM")


def test_tables_of_two_vocabularies_and_an_output_matrix_of_its_own_survive(tmp_path: Path):
    apart = tiny("marian", share_encoder_decoder_embeddings=False, decoder_vocab_size=99)
    new = tiny("t5")
    new.lm_head.weight = torch.nn.Parameter(new.lm_head.weight.detach() * 1.5)  # as T5 1.1 has it: it is tied to nothing
    for name, model in (("marian", apart), ("t5", new)):
        model.save_pretrained(tmp_path / name)
        dense = checkpoint.load(tmp_path / name)
        small = shrink(dense, anatomy_of(dense), UNITS)
        checkpoint.save(small, UNITS, tmp_path / f"{name}-cut", tokenizer_from=tmp_path)
        inputs = batch(model)
        with torch.no_grad():
            assert torch.equal(dense(**inputs).logits, model(**inputs).logits)
            assert torch.equal(checkpoint.load(tmp_path / f"{name}-cut")(**inputs).logits, small(**inputs).logits)
            wide = unshrink(small, tiny(model.config.model_type, **changes_of(name)), anatomy_of(dense), UNITS)
            torch.testing.assert_close(wide(**inputs).logits, small(**inputs).logits, atol=1e-4, rtol=1e-4)
    assert {"embeddings.word", "decoder.embeddings.word"} <= set(anatomy_of(apart).matrices)


def changes_of(name):
    return {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 99} if name == "marian" else {}


def test_the_first_t5_has_no_gate():
    model = tiny("t5", feed_forward_proj="relu")
    anatomy = anatomy_of(model)
    assert len(anatomy.sites["encoder.0.neurons"].slices) == 2
    small = shrink(model, anatomy, UNITS)
    assert anatomy_of(small) == anatomy.after(UNITS)
    same(spoken(small, **BEAMS), spoken(shrink(model, anatomy, UNITS), **BEAMS))


@pytest.mark.slow
def test_nothing_undoes_a_marian_without_its_first_attention():
    model = tiny("marian")
    plan = Plan({"decoder.0.attention": ()})
    small = shrink(model, anatomy_of(model), plan)
    with pytest.raises(PlanError, match="without 'decoder.0.attention': no norm lies in front of it"):
        unshrink(small, tiny("marian"), anatomy_of(model), plan)


def test_costs_are_counted_on_the_tokens_of_each_side():
    model = tiny("t5")
    anatomy = anatomy_of(model)
    source, target = np.array([4, 10]), np.array([3, 5])
    curves = cost.macs(anatomy, source, target).curves
    assert curves["encoder.0.heads"][1] == 7 * 4 * 32 * 8 + 2 * 8 * (16 + 100) / 2
    assert curves["decoder.0.heads"][1] == 4 * 4 * 32 * 8 + 2 * 8 * (9 + 25) / 2
    assert curves["decoder.0.cross_heads"][1] == (2 * 4 + 2 * 7) * 32 * 8 + 2 * 8 * (12 + 50) / 2
    assert curves["decoder.0.neurons"][1] == 4 * 3 * 32


@pytest.mark.parametrize("beams", [1, 3])
def test_a_generated_token_costs_each_beam_and_the_source_is_read_once(beams):
    model = tiny("t5")
    model.generation_config.num_beams = beams
    subject = subject_of(model)
    assert subject.beams == beams
    curves = cost.macs(subject.anatomy, np.array([4, 10]), np.array([3, 5]), subject.beams).curves
    one_pass = cost.macs(subject.anatomy, np.array([4, 10]), np.array([3, 5])).curves
    for name in ("encoder.0.heads", "encoder.0.neurons"):
        assert np.array_equal(curves[name], one_pass[name])
    matrix = 32 * 8  # width times the size of a head
    asked = ((1 + 2 + 3) + (1 + 2 + 3 + 4 + 5)) / 2  # each token looks back at those before it, and at itself
    assert curves["decoder.0.heads"][1] == beams * (4 * 4 * matrix + 2 * 8 * asked)
    assert curves["decoder.0.cross_heads"][1] == 2 * 4 * beams * matrix + 2 * 7 * matrix + beams * 2 * 8 * (12 + 50) / 2
    assert curves["decoder.0.neurons"][1] == beams * 4 * 3 * 32
    assert subject_of(tiny("bert")).beams is None


@pytest.mark.parametrize("model_type", SPEAKING)
def test_what_generates_is_said_by_config_json_where_the_folder_is_old(model_type, tmp_path: Path, caplog):
    tiny(model_type).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_beams": 6, "length_penalty": 2.0}), encoding="utf-8")
    with caplog.at_level("INFO"):
        models = (checkpoint.load(tmp_path), checkpoint.skeleton(tmp_path, "AutoModelForSeq2SeqLM"))
    for model in models:
        assert subject_of(model).beams == 6
        assert model.generation_config.length_penalty == 2.0
    assert "belong to no head" not in caplog.text


@pytest.mark.parametrize("model_type", ["marian", "t5"])
def test_both_sides_are_seen_and_scores_hold_the_position_bias(model_type):
    model = tiny(model_type)
    other = tiny(model_type)
    other.set_attn_implementation("eager")
    inputs, anatomy = batch(model), anatomy_of(model)
    with torch.no_grad():
        with capturing(model, anatomy, {Capture.HIDDEN, Capture.SCORES}) as recorder:
            seen = recorder.take({"logits": model(**inputs).logits})
        theirs = other(**inputs, output_hidden_states=True, output_attentions=True)
    real = {tokens: unpadded(inputs, tokens) for tokens in Tokens}
    for first, tokens, states in (
        (0, Tokens.SOURCE, theirs.encoder_hidden_states),
        (4, Tokens.TARGET, theirs.decoder_hidden_states),
    ):
        for mine, his in zip(
            seen.hidden[first : first + 3], states[:3], strict=True
        ):  # a T5 puts its last norm into the last one
            torch.testing.assert_close(mine[real[tokens]], his[real[tokens]], atol=1e-4, rtol=1e-4)
    for name, attentions, tokens in (
        ("encoder.{}.heads", theirs.encoder_attentions, Tokens.SOURCE),
        ("decoder.{}.cross_heads", theirs.cross_attentions, Tokens.SOURCE),
    ):
        for layer in range(3):
            blind = ~real[tokens][:, None, None, :]
            probabilities = seen.scores[name.format(layer)].masked_fill(blind, -torch.inf).softmax(-1)
            torch.testing.assert_close(probabilities, attentions[layer], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["marian", "t5"])
def test_points_of_every_role_are_quantized(model_type):
    method = registry.find("methods", "quantization")(roles="all", start=0.0, activation_buckets="feature")
    context = tiny_context(model_type)
    state = method.attach(context)
    try:
        for number, inputs in enumerate(context.batches(8)):
            context.task.loss(context.model(**context.subject.feed(inputs)), inputs).backward()
            method.advance(state, Progress(number + 1, 2))
        decision = method.decide(state, context)
    finally:
        state.close()
    seen = {context.anatomy.points[point].role for point in (*decision.ranges.activations, *decision.ranges.features)}
    assert seen == set(PointRole)


def test_a_whole_side_cannot_go():
    context = tiny_context("marian")
    gates = registry.find("methods", "gates")(keep=0.02, neuron_multiple=1)
    with pytest.raises(TargetError, match="nothing of the (en|de)coder would be left"):
        gates.check(context.anatomy, context.cost)


def test_a_layer_of_a_decoder_has_two_attentions_in_the_records():
    from slimformer.measuring.records import kept_layers

    anatomy = anatomy_of(tiny("bart"))
    layers = kept_layers(anatomy, SUBLAYERS)
    assert [layer.name for layer in layers] == [f"{stack} {i}" for stack in ("encoder", "decoder") for i in range(3)]
    assert [(layer.heads, layer.heads_of) for layer in layers] == [(0, 4), (4, 4), (4, 4), (0, 8), (6, 8), (2, 8)]
    assert {site.id for site in anatomy.of_kind(Kind.HEADS)} == set(anatomy.attentions)
    assert subject_of(tiny("bart")).inputs[2:] == ("decoder_input_ids", "decoder_attention_mask")
