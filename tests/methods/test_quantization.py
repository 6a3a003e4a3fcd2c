"""Training with fake quantization: what is trained is what is decided, on grids; ranges settle, resume, and reach the Decision."""

from __future__ import annotations

import math
from dataclasses import replace

import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny import HEAD_DIM, HEADS, batch, factored_context, tiny
from tiny_folder import write_data, write_model
from toy_task import context, fit, rows

from slimformer.core.anatomy import PointRole
from slimformer.core.plan import Plan
from slimformer.core.ranges import Ranges
from slimformer.core.shrink import shrink
from slimformer.data.material import prepare
from slimformer.errors import RecipeError
from slimformer.exporters.base import Variant
from slimformer.exporters.onnx import Onnx
from slimformer.families.base import anatomy_of, subject_of
from slimformer.forms.kronecker import Kronecker
from slimformer.hooks.points import quantized_inputs, quantized_points, touched
from slimformer.log import Log
from slimformer.methods.base import Progress
from slimformer.methods.distillation import Distillation
from slimformer.methods.gates import Gates
from slimformer.methods.quantization import Quantization
from slimformer.quantizing.grids import fake
from slimformer.running.bundle import Bundle, Run
from slimformer.running.preflight import preflight
from slimformer.running.prepare import prepare_bundle
from slimformer.running.reader import parse_recipe
from slimformer.running.recipe import Recipe
from slimformer.running.stages import advance
from slimformer.saving import checkpoint
from slimformer.tasks.classification import Classification
from slimformer.testing.checks import tiny_context
from slimformer.training import loop as training
from slimformer.training.stage import Train

QUIET = Log(None, quiet=True)
SETTINGS = Train(steps=6, lr=3e-3, batch_size=16, precision="fp32")
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
WORDS = "bert.embeddings.word_embeddings.weight"


def on_grid(weight, steps, largest):
    """Whether each row holds at most 2 * largest + 1 values, whole multiples of its own step."""
    integers = weight / steps
    return bool(((integers - integers.round()).abs() < 1e-3).all()) and bool((integers.abs() < largest + 0.5).all())


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_weights_that_are_decided_lie_on_their_grids(bits):
    around = tiny_context()
    method = Quantization(weights=bits, embeddings=bits)
    state = method.attach(around)
    decision = method.decide(state, around)
    state.close()
    largest = 2 ** (bits - 1) - 1
    for name in (QUERY, WORDS):
        before, weight = dict(around.model.named_parameters())[name].detach(), decision.weights[name]
        steps = before.abs().amax(1, keepdim=True) / largest
        assert on_grid(weight, steps, largest)
        assert bool(((weight - before).abs() <= steps * 0.501).all())
    assert "classifier.weight" not in decision.weights  # the last Linear stays in float in files
    assert "bert.pooler.dense.weight" in decision.weights
    assert "bert.embeddings.token_type_embeddings.weight" not in decision.weights  # two rows are not worth it
    assert decision.plan == Plan()


def test_one_bucket_for_a_whole_weight_and_the_papers_affine_grid():
    around = tiny_context()
    weight = dict(around.model.named_parameters())[QUERY].detach()
    method = Quantization(weights=4, buckets="tensor", grid="affine", exact_zero=False, embeddings=None)
    state = method.attach(around)
    found = method.decide(state, around).weights
    state.close()
    step = (weight.max() - weight.min()) / 15
    expected = ((weight - weight.min()) / step).round() * step + weight.min()
    torch.testing.assert_close(found[QUERY], expected)
    assert WORDS not in found


def test_matrices_that_were_not_trained_on_a_grid_are_stored_in_eight_bits():
    around = tiny_context()
    for roles, bits in ((("matrix",), 4), (("softmax", "norm"), 8)):
        method = Quantization(weights=4, roles=roles)
        state = method.attach(around)
        assert method.decide(state, around).ranges.weight_bits == bits
        state.close()


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "factored bert"])
def test_the_model_that_leaves_computes_what_was_trained(model_type):
    around = factored_context("bert") if "factored" in model_type else tiny_context(model_type)
    model, inputs = around.model, batch(around.model, rows=8, seed=3)
    method = Quantization()
    state = method.attach(around)
    with torch.no_grad():
        plain = model(**inputs).logits
        state.train()
        assert torch.equal(model(**inputs).logits, plain)  # the start is in float
        method.advance(state, Progress(1, 8))
        state.eval()
        trained = model(**inputs).logits
        assert method.report(state) == {"on": 1.0}
        decision = method.decide(state, around)
        state.close()
        assert torch.equal(model(**inputs).logits, plain)
        small = shrink(model, around.anatomy, decision)
        with quantized_inputs(small, anatomy_of(small), decision.ranges):
            left = small(**inputs).logits
        assert not torch.equal(trained, plain)
        torch.testing.assert_close(left, trained, atol=1e-5, rtol=1e-5)
        assert float((small(**inputs).logits - trained).abs().max()) > 1e-4  # without its ranges it is another model


def test_of_a_factored_matrix_the_larger_factor_lies_on_a_grid():
    """What int8 files store as int8: rows of the larger factor of each term, and the table's factor with a row for each word."""
    around = factored_context("bert")
    method = Quantization(weights=6, embeddings=4)
    state = method.attach(around)
    inputs = batch(around.model)
    with torch.no_grad():
        around.model(**inputs)
    decision = method.decide(state, around)
    state.close()
    path = "bert.encoder.layer.0.attention"
    before = dict(around.model.named_parameters())
    for name, bits in ((f"{path}.self.key.b", 6), (f"{path}.output.dense.b", 6), ("bert.embeddings.word_embeddings.a", 4)):
        largest = 2 ** (bits - 1) - 1
        steps = before[name].detach().abs().amax(-1, keepdim=True) / largest
        assert on_grid(decision.weights[name], steps, largest)
    assert f"{path}.self.key.a" not in decision.weights
    assert f"{path}.self.key.weight" not in decision.weights
    assert f"{path}.self.value.weight" in decision.weights  # dense still
    anatomy = anatomy_of(around.model)
    assert anatomy.points["encoder.0.attention.input"].modules == (f"{path}.self.value",)


SUMS = {  # steps and first factors of sums of three products of a (32, 32) matrix
    "the larger factor first": Kronecker((16, 2), 3),
    "the smaller factor first": Kronecker((2, 16), 3),
    "turned": Kronecker((16, 16), 3),
}


@pytest.mark.parametrize("momentum", [0.9, 0.5])
@pytest.mark.parametrize("kind", SUMS)
def test_the_terms_of_a_sum_share_the_extremes_of_a_pass(kind, momentum):
    """Each term of a sum may read a tensor of its own; all extremes of a pass, taken together, move the range once."""
    form, name, passes = SUMS[kind], "encoder.0.query", 4
    around = tiny_context()
    model = shrink(around.model, around.anatomy, Plan(forms={name: form}))
    around = replace(around, subject=subject_of(model))
    point = f"{name}.factor.input"
    inputs = [batch(model, rows=4, seed=seed) | {"attention_mask": torch.ones(4, 7).long()} for seed in range(passes)]
    seen = []
    with torch.no_grad(), touched(model, around.anatomy, {point: lambda values: seen.append(values) or values}):
        for item in inputs:
            model(**item)
    terms = [torch.stack(seen[first : first + form.terms]) for first in range(0, len(seen), form.terms)]
    assert len(terms) == passes
    assert bool((terms[0][0] == terms[0][-1]).all()) == (kind == "the larger factor first")
    low, high = terms[0].min(), terms[0].max()
    for values in terms[1:]:
        low, high = momentum * low + (1 - momentum) * values.min(), momentum * high + (1 - momentum) * values.max()
    method = Quantization(start=0.9, momentum=momentum)
    state = method.attach(around)
    with torch.no_grad():
        for item in inputs:
            model(**item)
            method.advance(state, Progress(1, 100))
    found = method.decide(state, around).ranges.activations[point]
    state.close()
    assert (found.low, found.high) == pytest.approx((float(low), float(high)), rel=1e-5)


@pytest.mark.slow
def test_a_sum_computes_in_integers_almost_what_it_computes_in_float(tmp_path):
    """As its ranges are learned and in the file: a fifth was lost while each term moved the range towards its own extremes."""
    around, path = tiny_context(), "bert.encoder.layer.0.attention.self.query"
    model = shrink(around.model, around.anatomy, Plan(forms={"encoder.0.query": Kronecker((2, 16), 3)}))
    around, inputs, read = replace(around, subject=subject_of(model)), batch(model, rows=8), []
    method = Quantization()
    state = method.attach(around)
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        for _ in range(3):
            model(**inputs)
            method.advance(state, Progress(0, 10))
    handle.remove()
    decision = method.decide(state, around)
    state.close()
    small = shrink(model, around.anatomy, decision)
    with torch.no_grad(), quantized_inputs(small, anatomy_of(small), decision.ranges):
        exact, rounded = (one.get_submodule(path)(read[0])[inputs["attention_mask"] == 1] for one in (model, small))
    assert float((rounded - exact).norm() / exact.norm()) < 0.03
    arrays = {name: value.numpy() for name, value in inputs.items()}
    file = tmp_path / "model.onnx"
    Onnx().export(small, [arrays], file, Variant.INT8_STATIC, ranges=decision.ranges)
    step, _ = decision.ranges.activations["encoder.0.query.factor.input"].grid(8)
    graph = onnx.load(file).graph
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    steps = [constants[node.input[1]] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert steps.count(step) == 3  # one for each term


def test_padding_does_not_reach_the_ranges_of_factors():
    spans = []
    for word in (0, 7):
        around = factored_context("bert")
        inputs = batch(around.model, rows=4, seq=4)  # as many tokens as one axis of a factor's input
        ids = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, word)
        assert (inputs["attention_mask"] == 0).any()
        method = Quantization()
        state = method.attach(around)
        with torch.no_grad():
            around.model(input_ids=ids, attention_mask=inputs["attention_mask"])
            spans.append(method.decide(state, around).ranges.activations["encoder.0.query.factor.input"])
        state.close()
    assert spans[0] == spans[1]


@pytest.mark.parametrize("exact_zero", [True, False])
def test_a_softmax_begins_at_0_and_its_denominator_where_the_smallest_was(exact_zero):
    """By hand, at 4 bits: x_min of a softmax is 0, as in the paper, and 0 lies on no denominator's grid."""
    around = tiny_context()
    method = Quantization(activations=4, roles=("softmax",), exact_zero=exact_zero)
    state = method.attach(around)
    spans = {"numerator": (0.25, 1.0), "denominator": (3.0, 6.0), "quotient": (0.1, 0.6)}  # steps 1/15, 0.2 and 0.04
    grids = {}
    for point, running in zip(state.points, state.each(), strict=True):
        if point.id.startswith("encoder.0."):
            low, high = spans[point.side]
            running.low.fill_(low)
            running.high.fill_(high)
            grids[point.side] = state.grid(point, running)
    state.close()
    values = torch.tensor([0.0, 0.05, 0.11, 0.29, 0.92])
    assert {side for side in grids if fake(torch.zeros(1), grids[side]) == 0} == {"numerator", "quotient"}
    torch.testing.assert_close(fake(values, grids["quotient"]), torch.tensor([0.0, 0.04, 0.12, 0.28, 0.6]))
    torch.testing.assert_close(fake(values, grids["numerator"]), torch.tensor([0, 1, 2, 4, 14]) / 15)
    torch.testing.assert_close(
        fake(torch.tensor([0.0, 3.0, 3.29, 4.11, 9.0]), grids["denominator"]), torch.tensor([3.0, 3.0, 3.2, 4.2, 6.0])
    )


def test_all_processes_share_the_widest_extremes_and_eight_bits_are_the_default():
    """`gather` gives what each process has seen: the lowest of all and the highest of all move the ranges."""
    around = tiny_context()
    method = Quantization(roles=("matrix", "norm"), activation_buckets="feature")
    state = method.attach(around)
    with torch.no_grad():
        around.model(**batch(around.model))
    own = [running.gathered for running in state.each()]
    assert {low.ndim for low, _ in own} == {0, 1}
    state.pool(lambda ends: torch.stack([ends, ends - 0.5, ends + 2.0]))  # lowest, and highest with its sign turned
    for running, (low, high) in zip(state.each(), own, strict=True):
        assert [end.shape for end in running.gathered] == [low.shape, high.shape]
        torch.testing.assert_close(running.gathered, (low - 0.5, high + 0.5))
    decision = method.decide(state, around)
    state.close()
    assert {QUERY, WORDS} <= set(decision.weights)
    found = decision.ranges
    assert (found.weight_bits, found.activation_bits, found.embedding_bits) == (8, 8, 8)


def test_quantization_begins_after_its_start():
    around = tiny_context()
    method = Quantization(start=0.5)
    state = method.attach(around)
    with torch.no_grad():
        around.model(**batch(around.model))
    for step in range(1, 9):
        method.advance(state, Progress(step, 8))
        assert method.report(state) == {"on": float(step >= 4)}
    state.close()


def test_it_may_begin_at_a_step():
    around = tiny_context()
    method = Quantization(start=0.9, start_step=3)
    state = method.attach(around)
    with torch.no_grad():
        around.model(**batch(around.model))
    on = []
    for step in range(1, 9):
        method.advance(state, Progress(step, 8))
        on.append(method.report(state)["on"])
    state.close()
    assert on == [0.0, 0.0, *[1.0] * 6]


def test_in_evaluation_ranges_stand_still_and_padding_never_counts():
    around = tiny_context()
    method = Quantization()
    state = method.attach(around)
    inputs = batch(around.model)
    far = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 7)
    spans = []
    with torch.no_grad():
        for ids, training_now in ((inputs["input_ids"], True), (torch.flip(inputs["input_ids"], (0,)), False)):
            state.train(training_now)
            around.model(input_ids=ids, attention_mask=inputs["attention_mask"])
            spans.append(method.decide(state, around).ranges)
    state.close()
    assert spans[0] == spans[1]
    again = tiny_context()
    state = method.attach(again)
    with torch.no_grad():
        again.model(input_ids=far, attention_mask=inputs["attention_mask"])  # other words, but only at padding
        found = method.decide(state, again).ranges
    state.close()
    first = "encoder.0.attention.input"
    assert found.activations[first] == spans[0].activations[first]


def test_every_role_at_four_bits_trains_and_leaves_no_trace(tmp_path):
    features = rows(48)
    around = context(features=features, teacher=tiny("bert", seed=9))
    method = Quantization(weights=4, activations=4, embeddings=4, roles="all", activation_buckets="feature", start=0.2)
    assert set(method.roles) == set(PointRole)
    found = fit(around, features, (method, Distillation(scores=1.0)), SETTINGS, tmp_path, QUIET)
    assert all(math.isfinite(loss) for loss in found.losses)
    assert set(found.decision.ranges.activations) >= {
        "encoder.0.attention.input",
        "classifier.input",
        "encoder.0.softmax.output",
    }
    assert "encoder.0.attention.norm.numerator" not in found.decision.ranges.activations  # an int8 file wants one range
    assert len(found.decision.ranges.features["encoder.0.attention.norm.numerator"]) == HEADS * HEAD_DIM
    assert "bert.encoder.layer.0.output.LayerNorm.weight" in found.decision.weights
    assert found.decision.ranges.activations["encoder.2.softmax.output"].high <= 1.0
    assert not any("forward" in vars(module) or module._forward_hooks for module in around.model.modules())
    assert around.model.config._attn_implementation == "sdpa"
    small = shrink(around.model, around.anatomy, found.decision)
    with torch.no_grad():
        assert bool(torch.isfinite(small(**batch(small)).logits).all())


@pytest.mark.parametrize(
    "options",
    [{"activation_buckets": "feature"}, {"grid": "affine", "exact_zero": False}, {}],
    ids=["feature", "affine", "even"],
)
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_the_saved_ranges_compute_what_every_role_was_trained_with(bits, options):
    around = tiny_context()
    method = Quantization(weights=bits, activations=bits, embeddings=bits, roles="all", start=0.0, **options)
    state = method.attach(around)
    inputs = batch(around.model)
    with torch.no_grad():
        around.model(**inputs)
        method.advance(state, Progress(1, 1))
        state.train(False)
        trained = around.model(**inputs).logits
        decision = method.decide(state, around)
    state.close()
    small = shrink(around.model, around.anatomy, decision)
    ranges = Ranges.from_json(decision.ranges.to_json())
    assert {*ranges.activations, *ranges.features} == set(around.anatomy.points)
    with torch.no_grad():
        with quantized_points(small, anatomy_of(small), ranges):
            torch.testing.assert_close(small(**inputs).logits, trained)
        with quantized_inputs(small, anatomy_of(small), ranges):
            assert not torch.allclose(small(**inputs).logits, trained, atol=1e-4)


def test_biases_and_the_sums_of_residuals_are_left_alone():
    """Section 3.1 of the paper: the sums cost more than they gain, and biases are added to integers of 32 bits."""
    around = tiny_context()
    method = Quantization(weights=4, activations=4, embeddings=4, roles="all", start=0.0)
    state = method.attach(around)
    with torch.no_grad():
        around.model(**batch(around.model))
        decision = method.decide(state, around)
    state.close()
    assert decision.weights
    assert not [name for name in decision.weights if name.endswith("bias")]
    layer = around.model.bert.encoder.layer[0]
    read = {module for point in around.anatomy.points.values() for module in point.modules}
    sums = [name for name, module in around.model.named_modules() if module in (layer.output, layer.attention.output)]
    assert sums
    assert not read & set(sums)


def test_a_stopped_run_ends_with_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "STATE_SECONDS", 0.0)
    monkeypatch.setattr(training, "STATE_SHARE", math.inf)
    features = rows(64)
    settings = Train(steps=6, lr=3e-3, batch_size=16, precision="fp32")
    advance = Quantization.advance

    def run(folder):
        around = context(features=features)
        return around, fit(around, features, (Quantization(start=0.4),), settings, folder, QUIET)

    def stop(self, state, progress):
        if progress.step == 5:
            raise KeyboardInterrupt
        advance(self, state, progress)

    straight, expected = run(tmp_path / "straight")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Quantization, "advance", stop)
        run(tmp_path / "stopped")
    resumed, found = run(tmp_path / "stopped")
    assert found.losses == expected.losses
    assert found.decision.ranges == expected.decision.ranges
    after = dict(resumed.model.named_parameters())
    assert all(torch.equal(tensor, after[name]) for name, tensor in straight.model.named_parameters())


def test_weights_learn_through_their_grids(tmp_path):
    features = rows(96)
    around = context(features=features)
    settings = Train(steps=30, lr=3e-3, batch_size=16, precision="fp32")
    found = fit(around, features, (Quantization(weights=4, activations=6),), settings, tmp_path, QUIET)
    assert sum(found.losses[-5:]) < 0.7 * sum(found.losses[:5])


def test_ranges_are_saved_beside_the_plan(tmp_path):
    around = tiny_context()
    method = Quantization(activations=6)
    state = method.attach(around)
    with torch.no_grad():
        around.model(**batch(around.model))
    decision = method.decide(state, around)
    state.close()
    small = shrink(around.model, around.anatomy, decision)
    checkpoint.save(small, Plan(), tmp_path / "model", tokenizer_from=tmp_path, ranges=decision.ranges)
    assert checkpoint.load_ranges(tmp_path / "model") == decision.ranges
    assert checkpoint.load_ranges(tmp_path / "model").activation_bits == 6
    checkpoint.save(small, Plan(), tmp_path / "plain", tokenizer_from=tmp_path)
    assert checkpoint.load_ranges(tmp_path / "plain") is None


@pytest.mark.slow
def test_ranges_go_with_the_bundle_and_the_next_stage_drops_them(tmp_path):
    source = write_model(tmp_path / "model")
    task = Classification(data=str(write_data(tmp_path / "data", train=64, dev=8))).bind(checkpoint.read_config(source))
    model = checkpoint.load(source)
    bundle = Bundle(subject_of(model), Plan(), prepare(task, source), subject_of(model))
    run = Run(tmp_path / "work", tmp_path / "work", QUIET, threads=1)
    stage = Train(methods=(Quantization(activations=6),), epochs=1, batch_size=16, precision="fp32")
    made = advance((stage,), bundle, run).bundle
    assert made.ranges.activation_bits == 6
    assert "encoder.1.ffn_out.input" in made.ranges.activations
    assert advance((stage,), bundle, run).bundle.ranges == made.ranges  # read back, not trained again
    assert advance((stage, Train(epochs=1, precision="fp32")), bundle, run).bundle.ranges is None
    saved = tmp_path / "saved"
    checkpoint.save(made.subject.model, made.plan, saved, tokenizer_from=source, ranges=made.ranges)
    begun, _ = prepare_bundle(preflight(Recipe(str(saved), Classification(data=str(tmp_path / "data")), ())), run)
    assert begun.ranges == made.ranges


def test_it_stands_alone_with_one_that_cuts(tmp_path):
    with pytest.raises(RecipeError, match="quantization and gates both decide"):
        fit(context(), rows(), (Quantization(), Gates(keep=0.5)), SETTINGS, tmp_path, QUIET)
    data = {"model": "x", "task": "intents", "stages": [{"train": {"methods": ["quantization", "gates"]}}]}
    with pytest.raises(RecipeError, match="quantization and gates both decide"):
        parse_recipe(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": 1}, "weights must be 8, 6 or 4 bits, got 1"),
        ({"activations": 40}, "activations must be 8, 6 or 4 bits, got 40"),
        ({"embeddings": 5}, "embeddings must be 8, 6 or 4 bits, or null, got 5"),
        ({"activations": None}, "activations must be 8, 6 or 4 bits, got None"),
        ({"roles": ()}, "roles must be some of matrix, .*, got none"),
        ({"roles": ("matrices",)}, "roles must be some of matrix, .*, got matrices"),
        ({"roles": "matrices"}, "roles must be some of matrix, .*, all, got matrices"),
        ({"start_step": 0}, "start_step must be from 1 to a billion, or null, got 0"),
        ({"start": 1.0}, "start must be 0 or above, and below 1, got 1"),
        ({"momentum": -0.1}, "momentum must be 0 or above, and below 1, got -0.1"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Quantization(**options)
