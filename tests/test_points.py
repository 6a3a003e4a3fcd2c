"""Points: values that pass are those of the model, changes reach the output, contexts nest and end without a trace."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from tiny import batch, factored_context, tiny

from slimformer.core.anatomy import PointRole
from slimformer.core.ranges import Range, Ranges
from slimformer.errors import PlanError
from slimformer.families.base import anatomy_of
from slimformer.hooks.attention import quick_attention
from slimformer.hooks.capture import Capture, capturing
from slimformer.hooks.points import quantized_inputs, touched

MODEL = tiny("bert")
ANATOMY = anatomy_of(MODEL)
INPUTS = batch(MODEL)
TERMS = {"0.query": 1, "0.key": 2, "0.attention_out": 1, "0.ffn_in": 2, "2.value": 1, "2.ffn_out": 3}  # of `factored_context`


def watch(names, model=MODEL, around=None):
    """What passes the named points, and the logits."""
    seen = {}

    def keep(name):
        def change(values):
            seen[name] = values
            return values

        return change

    with touched(model, anatomy_of(model), {name: keep(name) for name in names}), torch.no_grad():
        if around is None:
            return seen, model(**INPUTS).logits
        with around(model):
            return seen, model(**INPUTS).logits


def test_what_passes_is_what_the_model_computes():
    norm = MODEL.bert.encoder.layer[1].output.LayerNorm
    given = []
    handle = norm.register_forward_hook(lambda _, args, output: given.append((args[0], output)))
    sides = ("numerator", "denominator", "quotient", "output")
    seen, _ = watch([f"encoder.1.ffn.norm.{side}" for side in sides] + ["encoder.2.attention.input", "embeddings.sum"])
    handle.remove()
    source, output = given[0]
    numerator, denominator, quotient, result = (seen[f"encoder.1.ffn.norm.{side}"] for side in sides)
    torch.testing.assert_close(numerator, source - source.mean(-1, keepdim=True))
    torch.testing.assert_close(denominator, (source.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt())
    torch.testing.assert_close(quotient, numerator / denominator)
    torch.testing.assert_close(result, output)
    torch.testing.assert_close(seen["encoder.2.attention.input"], output)
    torch.testing.assert_close(output, torch.nn.functional.layer_norm(source, (32,), norm.weight, norm.bias, norm.eps))


def test_the_parts_of_a_softmax():
    seen, _ = watch([f"encoder.0.softmax.{side}" for side in ("numerator", "denominator", "output")])
    numerator, denominator, shares = (seen[f"encoder.0.softmax.{side}"] for side in ("numerator", "denominator", "output"))
    with capturing(MODEL, ANATOMY, {Capture.SCORES}) as recorder, torch.no_grad():
        output = MODEL(**INPUTS)
        scores = recorder.take({"logits": output.logits}).scores["encoder.0.heads"]
    hidden = INPUTS["attention_mask"][:, None, None, :] == 0
    scores = scores.masked_fill(hidden, -torch.inf)
    torch.testing.assert_close(shares, scores.softmax(-1))
    assert bool((numerator[hidden.expand_as(numerator)] == 0).all())
    assert bool((numerator.amax(-1) == 1).all())
    torch.testing.assert_close(denominator[..., 0], numerator.sum(-1))


@pytest.mark.parametrize("around", [None, quick_attention, lambda model: capturing(model, ANATOMY, {Capture.SCORES})])
def test_a_change_reaches_the_output_whichever_attention_is_at_work(around):
    point = "encoder.2.softmax.output"
    seen, plain = watch([point], around=around)
    assert list(seen) == [point]
    with touched(MODEL, ANATOMY, {point: torch.zeros_like}), torch.no_grad():
        if around is None:
            found = MODEL(**INPUTS).logits
        else:
            with around(MODEL):
                found = MODEL(**INPUTS).logits
    assert not torch.allclose(found, plain)
    with torch.no_grad():
        torch.testing.assert_close(MODEL(**INPUTS).logits, plain)


@pytest.mark.parametrize("point", ["encoder.1.key.output", "encoder.1.ffn_out.output", "encoder.1.attention.norm.output"])
def test_what_a_module_gives_is_changed_before_others_read_it(point):
    module = MODEL.get_submodule(ANATOMY.points[point].modules[0])
    seen, plain = watch([point])
    given = []
    handle = module.register_forward_hook(lambda _, __, output: given.append(output) or 3 * output)
    with torch.no_grad():
        expected = MODEL(**INPUTS).logits
    handle.remove()
    torch.testing.assert_close(seen[point], given[0])
    with touched(MODEL, ANATOMY, {point: lambda values: 3 * values}), torch.no_grad():
        found = MODEL(**INPUTS).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, plain)


def test_points_keep_the_numbers_in_the_precision_of_the_model():
    half = copy.deepcopy(MODEL).bfloat16()
    with torch.no_grad():
        plain = half(**INPUTS).logits
    seen, logits = watch(ANATOMY.points, half)
    assert {name: values.dtype for name, values in seen.items() if name.endswith((".input", "query.output"))} == {
        name: torch.bfloat16 for name in ANATOMY.points if name.endswith((".input", "query.output"))
    }
    torch.testing.assert_close(logits, plain, atol=0.05, rtol=0.05)


def test_a_tensor_that_three_matrices_read_passes_once():
    calls = []

    def double(values):
        calls.append(values)
        return 2 * values

    layer = MODEL.bert.encoder.layer[0].attention.self
    read = []
    handles = [module.register_forward_hook(lambda _, args, __: read.append(args[0])) for module in (layer.query, layer.value)]
    with touched(MODEL, ANATOMY, {"encoder.0.attention.input": double}), torch.no_grad():
        MODEL(**INPUTS)
        MODEL(**INPUTS)
    for handle in handles:
        handle.remove()
    assert len(calls) == 2
    assert read[0] is read[1] is not read[2]
    assert torch.equal(read[0], 2 * calls[0])


def test_a_factored_matrix_is_reached_once_for_each_of_its_products():
    """And what else reads the same tensor is still reached there, once."""
    model, passes = factored_context("bert").model, Counter()

    def note(name):
        def change(values):
            passes[name] += 1
            return values

        return change

    anatomy = anatomy_of(model)
    with touched(model, anatomy, {name: note(name) for name in anatomy.points}), torch.no_grad():
        model(**INPUTS)
    terms = {f"encoder.{name}.factor.input": count for name, count in TERMS.items()}
    assert passes == dict.fromkeys(anatomy.points, 1) | terms
    assert anatomy.points["encoder.0.attention.input"].modules == ("bert.encoder.layer.0.attention.self.value",)


def test_quantized_inputs_lie_on_their_grids_and_floats_do_not():
    names = ("encoder.1.ffn_in.input", "encoder.1.ffn_out.input")
    ranges = Ranges({name: Range(-1.0, 2.0) for name in names}, activation_bits=4)
    seen = {}
    layer = MODEL.bert.encoder.layer[1]
    handles = [
        module.register_forward_hook(lambda _, args, __, name=name: seen.__setitem__(name, args[0]))
        for name, module in zip(names, (layer.intermediate.dense, layer.output.dense), strict=True)
    ]
    with quantized_inputs(MODEL, ANATOMY, ranges, floats=names[1:]), torch.no_grad():
        MODEL(**INPUTS)
    for handle in handles:
        handle.remove()
    steps = seen[names[0]] / 0.2  # 3 / 15
    torch.testing.assert_close(steps, steps.round())
    assert (seen[names[0]].min(), seen[names[0]].max()) == (-1.0, 2.0)
    steps = seen[names[1]] / 0.2
    assert not torch.allclose(steps, steps.round(), atol=1e-2)


def test_an_unknown_point_is_refused_and_nothing_is_left():
    changes = {"encoder.0.ffn_in.input": torch.relu, "encoder.0.softmax.output": torch.relu, "encoder.0.ffn.input": torch.relu}
    before = MODEL.config._attn_implementation
    with pytest.raises(PlanError, match=r"no point 'encoder.0.ffn.input'[\s\S]*did you mean"), touched(MODEL, ANATOMY, changes):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in MODEL.modules())
    assert not any("forward" in vars(module) for module in MODEL.modules())
    assert MODEL.config._attn_implementation == before


def test_electra_and_roberta_name_their_own_linears():
    electra = anatomy_of(tiny("electra")).points
    assert electra["electra.embeddings_project.input"].role is PointRole.MATRIX
    assert electra["classifier.out_proj.input"].role is PointRole.HEAD
    bert = anatomy_of(tiny("bert", auto_class="AutoModelForQuestionAnswering", num_labels=2)).points
    assert bert["qa_outputs.input"].role is PointRole.HEAD
    assert "bert.pooler.dense.input" not in bert
