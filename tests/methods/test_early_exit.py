"""Early exit: who leaves where, how the threshold is chosen, what is saved, what is exported, and what is refused."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny import WEIGHT_BITS, batch, tiny
from tiny_folder import write_data, write_model
from toy_task import Toy

from slimformer.core import cost
from slimformer.core.deciding import answers_apart, choose, doubt
from slimformer.core.junction import Exit, junction_from_data, unreachable
from slimformer.core.plan import Decision, Plan
from slimformer.core.shrink import shrink, unshrink
from slimformer.errors import ExportError, PlanError, RecipeError, TargetError
from slimformer.exporters._onnx import exits as stopping
from slimformer.exporters._onnx.parity import fill_inputs
from slimformer.exporters.base import Variant
from slimformer.exporters.onnx import Onnx
from slimformer.families.base import anatomy_of, subject_of
from slimformer.hooks.capture import Capture, capturing
from slimformer.log import Log
from slimformer.measuring.components import Component, Spot, components_of
from slimformer.measuring.machine import environment
from slimformer.measuring.operators import decides_by_text, place_nodes
from slimformer.measuring.profile import Texts, count_parts, profile_onnx, profile_torch, random_texts
from slimformer.measuring.reach import told_layers
from slimformer.measuring.records import ExitShare, Layer, Record
from slimformer.measuring.scoring import exit_shares
from slimformer.methods.base import Context, Held, Progress, Step
from slimformer.methods.distillation import Distillation
from slimformer.methods.early_exit import EarlyExit, Outcome, exit_places
from slimformer.methods.fisher import Fisher
from slimformer.methods.shared_layers import SharedLayers
from slimformer.reporting.circumstances import cost_facts
from slimformer.reporting.inspection import inspect
from slimformer.reporting.ledger import append_record, read_records
from slimformer.running.bundle import Run
from slimformer.running.order import conflicts
from slimformer.running.preflight import preflight
from slimformer.running.prepare import prepare_bundle
from slimformer.running.recipe import Export, Recipe
from slimformer.running.rivals import without_cuts
from slimformer.running.stages import advance, context_of
from slimformer.runtimes.openvino import OpenVINO
from slimformer.saving import checkpoint
from slimformer.tasks.base import Split
from slimformer.tasks.classification import Classification
from slimformer.testing.checks import tiny_context
from slimformer.training.stage import Calibrate, Train, TrimVocabulary

TYPES = ("bert", "roberta", "electra", "distilbert")
RULES = {
    "entropy": Exit(3, "entropy", 0.98, pooler=True),
    "maximum": Exit(3, "maximum", 0.7),
    "patience": Exit(3, "patience", patience=1),
}


def with_exits(model_type="bert", exit=RULES["entropy"], seed=0, keep=None, **changes):
    """A tiny model with random exits behind all layers but the last, and its plan."""
    model = tiny(model_type, **changes)
    anatomy = anatomy_of(model)
    layers = list(anatomy.layer_modules)[:-1]
    plan = Plan(keep or {}, junctions=dict.fromkeys(layers, exit))
    generator = torch.Generator().manual_seed(seed)
    width, weights = anatomy.after(Plan(keep or {})).hidden_size, {}
    for layer in layers:
        where = f"{anatomy.layer_modules[layer]}.exit"
        weights[f"{where}.out.weight"] = 0.2 * torch.randn(exit.outputs, width, generator=generator)
        if exit.pooler:
            weights[f"{where}.dense.weight"] = 0.2 * torch.randn(width, width, generator=generator)
    return shrink(model, anatomy, Decision(plan, weights=weights)), plan


def by_hand(exits, said, last):
    """The rule, row by row, as the papers' algorithms say it."""
    answers, places = [], []
    for row in range(len(last)):
        count, chosen = 0, len(exits)
        for number, exit in enumerate(exits):
            logits = said[number][row].double()
            shares = logits.softmax(0)
            if exit.confidence == "entropy":
                leaves = float(-(shares * shares.log()).sum()) <= exit.threshold
            elif exit.confidence == "maximum":
                leaves = float(shares.max()) >= exit.threshold
            else:
                before = said[number - 1][row].double() if number else None
                if exit.outputs == 1:
                    same = before is not None and abs(float(logits - before)) <= exit.threshold
                else:
                    same = before is not None and int(logits.argmax()) == int(before.argmax())
                count = count + 1 if same else 0
                leaves = count >= exit.patience
            if leaves:
                chosen = number
                break
        places.append(chosen)
        answers.append(said[chosen][row] if chosen < len(exits) else last[row])
    return torch.stack(answers), torch.tensor(places)


@pytest.mark.parametrize(
    "exit",
    [
        *RULES.values(),
        Exit(3, "patience", patience=2),
        Exit(1, "patience", 0.4, patience=2),
        Exit(1, "patience", 0.4, patience=1),
    ],
)
def test_rows_leave_at_the_first_exit_that_is_sure(exit):
    generator = torch.Generator().manual_seed(1)
    said = [torch.randn(200, exit.outputs, generator=generator) for _ in range(4)]
    last = torch.randn(200, exit.outputs, generator=generator)
    answer, place = choose([exit] * 4, said, last)
    expected, places = by_hand([exit] * 4, said, last)
    assert torch.equal(place, places)
    assert torch.equal(answer, expected)
    assert len(places.unique()) > 2, "the case tells nothing"


def test_patience_starts_again_when_an_exit_disagrees():
    yes, no = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    exits = [Exit(2, "patience", patience=2)] * 6
    _, place = choose(exits, [yes, yes, no, no, no, yes], yes)
    assert place.tolist() == [4]  # no, and two that agree with it


@pytest.mark.parametrize("model_type", TYPES)
def test_a_model_gives_the_answer_of_the_exit_and_padding_changes_nothing(model_type):
    model, _ = with_exits(model_type, RULES["maximum"])
    inputs = batch(model, rows=12, seq=9)
    with torch.no_grad():
        answer = model(**inputs).logits
        with answers_apart(model) as said:
            last = model(**inputs).logits
            parts = said()
        again = model(**inputs).logits
        alone = torch.cat(
            [model(**{name: value[row : row + 1, : int(inputs["attention_mask"][row].sum())] for name, value in inputs.items()}).logits
             for row in range(12)]
        )  # fmt: skip
    exits = list(anatomy_of(model).junctions.values())
    expected, place = choose(exits, list(parts.values()), last)
    assert list(parts) == ["encoder.0", "encoder.1"]
    assert len(place.unique()) > 1
    assert torch.equal(answer, expected)
    assert torch.equal(again, answer)
    torch.testing.assert_close(alone, answer)
    assert not torch.allclose(answer, last, atol=1e-3)


@pytest.mark.parametrize("model_type", TYPES)
def test_exits_are_in_the_plan_the_anatomy_the_count_and_the_folder(model_type, tmp_path):
    dense = tiny(model_type)
    anatomy, keep = anatomy_of(dense), {"encoder.0.heads": (1, 2), "hidden": tuple(range(0, 32, 2))}
    model, plan = with_exits(model_type, keep=keep)
    assert Plan.from_json(plan.to_json()) == plan
    assert '"version": 3' in plan.to_json()
    assert Plan(keep).then(Plan(junctions=plan.junctions)) == plan
    assert anatomy_of(model) == anatomy.after(plan)
    assert cost.parameters(dense, anatomy).of(plan, anatomy) == model.num_parameters()
    inputs = batch(model)
    with torch.no_grad():
        expected = model(**inputs).logits
    checkpoint.save(model, plan, tmp_path / "model", tokenizer_from=tmp_path)
    loaded = checkpoint.load(tmp_path / "model")
    loaded.save_pretrained(tmp_path / "again")
    for found in (loaded, checkpoint.load(tmp_path / "again"), copy.deepcopy(loaded)):
        with torch.no_grad():
            assert torch.equal(found(**inputs).logits, expected)
    assert checkpoint.load_plan(tmp_path / "again") == plan


def test_while_training_the_end_answers():
    model, _ = with_exits(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    inputs = batch(model)
    with torch.no_grad(), answers_apart(model):
        last = model(**inputs).logits
    with torch.no_grad():
        assert torch.equal(model.train()(**inputs).logits, last)


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (Plan(junctions={"encoder.9": RULES["maximum"]}), "encoder.9"),
        (Plan(junctions={"encoder.2": RULES["maximum"]}), "end of the model"),
        (Plan(junctions={"encoder.0": Exit(2, "maximum", 0.7)}), "2 outputs, and the model has 3"),
        (Plan(junctions={"encoder.0": Exit(3, "maximum", 1.0)}), "no input reaches"),
    ],
)
def test_a_plan_with_impossible_exits_is_refused(plan, problem):
    model = tiny("bert")
    with pytest.raises(PlanError, match=problem):
        shrink(model, anatomy_of(model), plan)


def test_exits_are_put_in_once_and_hold_the_width():
    model, plan = with_exits()
    with pytest.raises(PlanError, match="has an exit"):
        shrink(model, anatomy_of(model), Plan(junctions={"encoder.0": RULES["maximum"]}))
    with pytest.raises(PlanError, match="another there"):
        plan.then(plan)
    with pytest.raises(PlanError, match="exits read the hidden states"):
        shrink(model, anatomy_of(model), Plan({"hidden": tuple(range(16))}))
    with pytest.raises(PlanError, match="a plain model has none"):
        unshrink(model, tiny("bert"), anatomy_of(tiny("bert")), plan)
    with pytest.raises(PlanError, match="no one answer"):
        other = tiny("bert", auto_class="AutoModelForTokenClassification")
        shrink(other, anatomy_of(other), Plan(junctions={"encoder.0": RULES["maximum"]}))


@pytest.mark.parametrize("data", [{}, {"use": "exit"}, {**RULES["maximum"].to_data(), "use": "door"}, 3])
def test_a_junction_that_is_none_is_refused(data):
    with pytest.raises(PlanError, match="no such junction"):
        junction_from_data(data, "encoder.0")


@pytest.mark.parametrize(
    "change", [{"threshold": -1.0}, {"threshold": "?"}, {"confidence": "?"}, {"outputs": 0}, {"pooler": 3}]
)
def test_a_junction_of_wrong_values_is_refused(change):
    with pytest.raises(PlanError, match=r"encoder\.0"):
        junction_from_data(RULES["maximum"].to_data() | change, "encoder.0")


# -- Exported files --------------------------------------------------------------------------------------------------------------

SHAPES = ((3, 7), (1, 5), (6, 12), (2, 2), (40, 16))


def arrays(model, shapes=SHAPES):
    names = subject_of(model).inputs
    made = [{name: value.numpy() for name, value in batch(model, *shape, seed).items()} for seed, shape in enumerate(shapes)]
    return [fill_inputs(names, item) for item in made]


def session_of(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("model_type", "exit"),
    [
        ("bert", RULES["entropy"]),
        ("roberta", RULES["maximum"]),
        ("electra", RULES["patience"]),
        ("distilbert", RULES["entropy"]),
        ("bert", Exit(1, "patience", 0.5, patience=1)),
    ],
)
@pytest.mark.slow
def test_files_stop_where_the_model_says(model_type, exit, tmp_path):
    changes = {"num_labels": exit.outputs, "num_hidden_layers": 4} if model_type != "distilbert" else {"n_layers": 4}
    model, _ = with_exits(model_type, exit, keep={"encoder.0.heads": (1,)}, **changes)
    variants = (Variant.FLOAT, Variant.FUSED)
    made = Onnx().export_all(model, arrays(model), {variant: tmp_path / f"{variant}.onnx" for variant in variants})
    exits = anatomy_of(model).junctions
    for artifact in made.values():
        session, depths = session_of(artifact.path), set()
        for inputs in arrays(model, ((5, 9), (1, 3), (17, 20))):
            logits, layers = session.run(["logits", "layers"], inputs)
            with torch.no_grad(), answers_apart(model) as said:
                last = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits
                expected, place = choose(list(exits.values()), list(said().values()), last)
            np.testing.assert_allclose(logits, expected, atol=1e-4)
            assert layers.tolist() == [[1, 2, 3, 4][item] for item in place]
            depths |= set(layers.tolist())
        assert len(depths) > 1, "the case tells nothing"
        assert any("stops at exits" in note for note in artifact.notes)
        assert not OpenVINO().accepts(artifact.path)


@pytest.mark.parametrize("variant", [Variant.INT8_FUSED, Variant.INT8_STATIC])
@pytest.mark.slow
def test_an_answer_of_an_int8_file_does_not_depend_on_its_neighbours(variant, tmp_path):
    model, _ = with_exits(exit=RULES["maximum"], num_hidden_layers=4)
    artifact = Onnx(weight_bits=WEIGHT_BITS, agreement=0.0).export(model, arrays(model), tmp_path / "model.onnx", variant)
    session, inputs = session_of(artifact.path), arrays(model, ((24, 11),))[0]
    logits, layers = session.run(["logits", "layers"], inputs)
    assert len(set(layers.tolist())) > 2, "the case tells nothing"
    for row in range(24):
        one = session.run(["logits", "layers"], {name: value[row : row + 1] for name, value in inputs.items()})
        np.testing.assert_allclose(one[0][0], logits[row], atol=1e-5)
        assert one[1][0] == layers[row]
    assert any("int8: " in note for note in artifact.notes)


@pytest.mark.slow
def test_a_file_computes_no_layer_that_nobody_needs(tmp_path):
    model, _ = with_exits(exit=Exit(3, "maximum", 0.34), num_hidden_layers=4)
    with torch.no_grad():
        model.bert.encoder.layer[0].exit.out.bias.copy_(torch.tensor([3.0, 0.0, 0.0]))
    path = tmp_path / "model.onnx"
    Onnx().export(model, arrays(model), path, Variant.FLOAT)
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    layers = session.run(["layers"], arrays(model, ((4, 6),))[0])[0]
    text = Path(session.end_profiling()).read_text(encoding="utf-8")
    assert layers.tolist() == [1, 1, 1, 1]
    assert text.count('"op_name" : "Softmax"') == 2, "more than one attention and one exit were computed"


@pytest.mark.slow
def test_layers_that_are_gone_do_not_count(tmp_path):
    gone = {"encoder.1.attention": (), "encoder.1.ffn": ()}
    model, _ = with_exits(exit=RULES["maximum"], keep=gone, num_hidden_layers=4)
    assert anatomy_of(model).passed(anatomy_of(model).junctions) == [1, 1, 2, 3]
    path = tmp_path / "model.onnx"
    Onnx().export(model, arrays(model), path, Variant.FUSED)
    found = {int(layers) for inputs in arrays(model) for layers in session_of(path).run(["layers"], inputs)[0]}
    assert found <= {1, 2, 3}
    assert len(found) > 1


@pytest.mark.slow
def test_a_graph_that_stops_elsewhere_is_not_delivered(tmp_path, monkeypatch):
    model, _ = with_exits(exit=RULES["maximum"])

    def lax(program, exits, passed):
        nest(program, {layer: replace(exit, threshold=0.34) for layer, exit in exits.items()}, passed)

    nest = stopping.nest
    monkeypatch.setattr(stopping, "nest", lax)
    with pytest.raises(ExportError, match="another answer than the model where it stops"):
        Onnx().export(model, arrays(model), tmp_path / "model.onnx", Variant.FLOAT)
    assert not list(tmp_path.iterdir())


# -- The method ------------------------------------------------------------------------------------------------------------------


def attached(method, around):
    state = method.attach(around)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in state.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return state


def seen(around, inputs):
    with capturing(around.model, around.anatomy, {Capture.HIDDEN, Capture.LOGITS}) as recorder:
        return recorder.take({"logits": around.model(**around.subject.feed(inputs)).logits})


@pytest.mark.parametrize("learn", ["labels", "model"])
def test_the_loss_is_the_mean_over_exits_weighted_by_depth(learn):
    around = tiny_context()
    method, inputs = EarlyExit(learn=learn, weight=2.0), next(around.batches(4))
    state = attached(method, around)
    step = Step(around.model, inputs, seen(around, inputs), None, Progress(0, 1), around.task)
    first, second = (
        torch.nn.functional.linear(torch.tanh(torch.nn.functional.linear(step.student.hidden[1 + n][:, 0], *dense)), *out)
        for n, dense, out in (
            (n, *((part.weight, part.bias) for part in (exit.dense, exit.out))) for n, exit in enumerate(state.exits)
        )
    )
    if learn == "labels":
        losses = [torch.nn.functional.cross_entropy(logits, inputs["labels"]) for logits in (first, second)]
    else:
        losses = [(logits - step.student.output["logits"]).square().mean() for logits in (first, second)]
    loss = method.penalty(state, step)
    torch.testing.assert_close(loss, 2.0 * (losses[0] + 2 * losses[1]) / 3)
    state.close()


@pytest.mark.parametrize("confidence", ["entropy", "maximum", "patience"])
def test_decides_the_threshold_by_which_the_fewest_layers_are_computed(confidence):
    around = tiny_context()
    inputs = dict(batch(around.model, rows=300, seq=6).items())
    allowed = 60.0 if confidence == "patience" else 4.0
    method = EarlyExit(confidence=confidence, max_loss=allowed)
    state = attached(method, around)
    with torch.no_grad():
        captured = seen(around, inputs)
        said = [exit(captured.hidden[1 + place]) for place, exit in enumerate(state.exits)]
    last = captured.output["logits"]
    labels = torch.where(torch.arange(300) % 10 > 0, last.argmax(-1), said[1].argmax(-1))  # the last layer is right on most

    def score(outputs):
        return float((outputs["logits"].argmax(-1) == labels.numpy()).mean())

    around = replace(around, held=Held(lambda: iter([inputs]), score))
    decision = method.decide(state, around)
    state.close()
    exits = list(decision.plan.junctions.values())
    whole = score({"logits": last.numpy()})
    answer, place = choose(exits, said, last)
    assert whole - score({"logits": answer.numpy()}) <= allowed / 100 + 1e-9
    mine = float((place + 1).float().mean())
    if confidence == "patience":
        assert exits[0].patience == 1
        assert mine < 3
        return
    for threshold in np.linspace(0.01, 1.09, 150) if confidence == "entropy" else np.linspace(0.34, 0.999, 150):
        others, where = choose([replace(exits[0], threshold=float(threshold))] * 2, said, last)
        if whole - score({"logits": others.numpy()}) <= 0.04 and float((where + 1).float().mean()) < mine - 0.03:
            raise AssertionError(f"{threshold} computes fewer layers")
    small = shrink(around.model, around.anatomy, decision)
    with torch.no_grad():
        torch.testing.assert_close(small(**inputs).logits, answer)
    assert f"{mine:.2f} of 3 layers" in decision.notes[0]


def test_each_exit_may_have_a_threshold_of_its_own():
    """The first exit is right where it is nearly sure, the second always: one threshold for both lets wrong rows leave, or none."""
    around = tiny_context()
    labels = torch.arange(100) % 2
    right, wrong = 2.0 * labels - 1, 1 - 2.0 * labels
    early = torch.where(torch.arange(100) < 50, 6 * right, 1.5 * wrong)  # sure and right, or rather sure and wrong
    said = [torch.stack([torch.zeros(100), margin], 1) for margin in (early, 1.0 * right)]
    last = torch.stack([torch.zeros(100), 8 * right], 1)
    held = Held(lambda: iter(()), lambda outputs: float((outputs["logits"].argmax(-1) == labels.numpy()).mean()))
    found = {}
    for thresholds in ("one", "each"):
        method = EarlyExit(confidence="maximum", thresholds=thresholds, max_loss=0.0)
        state = method.attach(around)
        state.exit = replace(state.exit, outputs=2)
        found[thresholds] = method._found(state, said, last, held)
        state.close()
    assert (found["one"].counts, found["one"].loss) == ((50, 0, 50), 0.0)
    assert (found["each"].counts, found["each"].loss) == ((50, 50, 0), 0.0)
    first, second = found["each"].exits
    assert 0.82 < first.threshold <= 0.998
    assert second.threshold <= 0.7311
    assert f"probability from {first.threshold:g}, {second.threshold:g};" in found["each"].told(3, 100)


def test_no_exits_if_nothing_may_leave_or_reaches_the_threshold():
    around = tiny_context()

    def never(outputs):
        return float(np.allclose(outputs["logits"], whole, atol=1e-6))  # one other answer is 100 points

    state = attached(EarlyExit(), around)
    whole = torch.cat([seen(around, inputs).output["logits"] for inputs in around.held.batches()]).detach().numpy()
    decision = EarlyExit().decide(state, replace(around, held=replace(around.held, score=never)))
    assert decision.plan == Plan()
    assert "at a loss of at most 0.5 points" in decision.notes[0]
    decision = EarlyExit(threshold=1e-9).decide(state, around)
    assert decision.plan == Plan()
    assert "reaches the threshold of 1e-09" in decision.notes[0]
    decision = EarlyExit(threshold=0.9).decide(state, replace(around, held=replace(around.held, score=never)))
    assert {exit.threshold for exit in decision.plan.junctions.values()} == {0.9}, "what is given needs no allowance"
    state.close()


def test_exits_learn_at_their_own_rate():
    around = tiny_context()
    (group,) = EarlyExit(lr=1e-3).attach(around).groups()
    assert group["lr"] == 1e-3
    assert group["weight_decay"] == 0.0
    assert "lr" not in EarlyExit().attach(around).groups()[0]


def test_outcome_counts_layers():
    outcome = Outcome((Exit(2, "entropy", 0.25),) * 2, (1, 2, 1), (1, 3, 4), 0.5)
    assert outcome.mean == (1 + 6 + 4) / 4
    told = "early_exit: entropy up to 0.25; 2.75 of 4 layers on average over 4 validation examples, and 0.50 points lost"
    assert outcome.told(4, 4) == f"{told}; by layers: 1: 25%, 3: 50%, 4: 25%."
    assert [(item.layers, item.share) for item in exit_shares({"layers": np.array([4, 1, 1, 1])})] == [(1, 0.75), (4, 0.25)]
    assert exit_shares({"logits": np.zeros((2, 2))}) == ()


# -- What is refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("confidence", "threshold", "outputs", "problem"),
    [
        ("entropy", 0.0, 2, "no input reaches"),
        ("entropy", math.log(2), 2, "every input leaves at once"),
        ("maximum", 1.0, 4, "no input reaches"),
        ("maximum", 0.25, 4, "every input leaves at once"),
        ("entropy", 0.5, 1, "take confidence: patience"),
        ("maximum", None, 1, "take confidence: patience"),
    ],
)
def test_thresholds_that_say_nothing_are_told(confidence, threshold, outputs, problem):
    assert problem in unreachable(confidence, threshold, None, outputs)


def test_thresholds_that_say_something_are_left_alone():
    assert unreachable("entropy", 0.5, None, 2) is None
    assert unreachable("maximum", 0.9, None, 2) is None
    assert unreachable("patience", 0.1, 2, 1) is None


def test_models_that_can_have_no_exits_are_refused():
    one = anatomy_of(tiny("bert", num_hidden_layers=1))
    with pytest.raises(TargetError, match="1 layer left"):
        EarlyExit().check(one, None)
    dense = anatomy_of(tiny("bert"))
    cut = dense.after(Plan({f"encoder.{layer}.{part}": () for layer in (1, 2) for part in ("attention", "ffn")}))
    with pytest.raises(TargetError, match="1 layer left"):
        EarlyExit().check(cut, None)
    with pytest.raises(TargetError, match="writes texts"):
        EarlyExit().check(anatomy_of(tiny("bart")), None)
    with pytest.raises(TargetError, match="it has exits or sieves already"):
        EarlyExit().check(anatomy_of(with_exits()[0]), None)
    with pytest.raises(TargetError, match="behind layer 3"):
        EarlyExit(layers=(1, 3)).check(dense, None)
    with pytest.raises(TargetError, match="at most 1 agree"):
        EarlyExit(confidence="patience", patience=2).check(dense, None)
    with pytest.raises(TargetError, match="only one"):
        EarlyExit(confidence="patience", layers=(1,)).check(dense, None)
    assert exit_places(dense, None) == [0, 1]
    assert exit_places(dense, (2,)) == [1]


def test_options_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="patience counts exits"):
        EarlyExit(patience=2)
    with pytest.raises(ValueError, match="leave out threshold"):
        EarlyExit(thresholds="each", threshold=0.5)
    around = replace(tiny_context(), held=None)
    with pytest.raises(TargetError, match="give a threshold"):
        EarlyExit().attach(around)
    state = EarlyExit(threshold=0.5).attach(around)
    assert {exit.threshold for exit in EarlyExit(threshold=0.5).decide(state, around).plan.junctions.values()} == {0.5}
    with pytest.raises(TargetError, match="no input reaches"):
        EarlyExit(confidence="maximum", threshold=1.0).attach(around)


def test_it_asks_for_one_answer_for_a_text():
    assert "one answer for each text" in EarlyExit().problem(replace_task("AutoModelForQuestionAnswering"))
    assert EarlyExit().problem(replace_task("AutoModelForSequenceClassification")) is None
    assert "leave out threshold" in EarlyExit(confidence="patience", threshold=0.5).problem(
        replace_task("AutoModelForSequenceClassification")
    )


def replace_task(auto_class):
    return type("Other", (Toy,), {"auto_class": auto_class, "configure": lambda _: {"num_labels": 3}})()


# -- What is shown ---------------------------------------------------------------------------------------------------------------


def test_reports_say_after_how_many_layers_examples_were_answered(tmp_path):
    layers = (*tuple(Layer(str(number), 4, 4, 24, 24) for number in range(2)), Layer("2", 0, 4, 0, 24))
    about = ("my-bert", "reviews", "dev", "accuracy", {"accuracy": 0.9}, "2026-01-02", environment())
    record = Record("int8", "ours", *about, layers=layers, exits=(ExitShare(1, 0.25), ExitShare(2, 0.75)))
    assert ("Layers computed", "1.75 of 2 on average; by layers: 1: 25 %, 2: 75 %") in cost_facts(record)
    assert "Layers computed" not in dict(cost_facts(replace(record, exits=())))
    append_record(tmp_path / "ledger.jsonl", record)
    assert read_records([tmp_path / "ledger.jsonl"]) == [record]


def test_a_model_with_exits_says_so(tmp_path):
    model, plan = with_exits(keep={"encoder.0.attention": (), "encoder.0.ffn": ()})
    checkpoint.save(model, plan, tmp_path / "model", tokenizer_from=tmp_path)
    assert inspect(tmp_path / "model").exits == (0, 1)


def test_a_profile_counts_layers_as_often_as_texts_come_to_them():
    """By hand: a text that leaves behind a layer has no part in those after it, nor in their exits."""
    subject = subject_of(with_exits(exit=RULES["maximum"])[0])
    reads = [random_texts(subject, Texts(1, 7), seed) for seed in range(20)]
    places = []
    with torch.no_grad(), answers_apart(subject.model) as said:
        for read in reads:
            logits = subject.model(**subject.feed(read)).logits
            places.append(int(choose([RULES["maximum"]] * 2, list(said().values()), logits)[1]))
    reach = [sum(place >= layer for place in places) / 20 for layer in range(3)]
    assert 0 < reach[2] < reach[1] < 1
    counts = count_parts(subject, 7, reads)
    for layer, share in enumerate(reach):
        assert counts[Spot(Component.FFN, layer)].macs == pytest.approx(share * 7 * 2 * 32 * 24)
        assert counts[Spot(Component.LINEAR_BEFORE, layer)].macs == pytest.approx(share * 7 * 3 * 32 * 32)
        assert counts[Spot(Component.CORE, layer)].macs == pytest.approx(share * 2 * 32 * 49)
    for layer, share in enumerate(reach[:2]):
        assert counts[Spot(Component.HEAD, layer)].macs == pytest.approx(share * 3 * 32)
    assert sum(part.parameters for part in counts.values()) == subject.model.num_parameters()
    found = profile_torch(subject, Texts(1, 7), "tiny", rounds=1, reads=reads)
    assert found.ms[Spot(Component.HEAD, 0)] > 0
    layers = [place + 1 for place in places]
    assert found.note == f"20 texts of random words: {told_layers(layers)}; PyTorch computes all 3."


@pytest.mark.slow
def test_a_profile_of_a_file_tells_what_lies_within_its_branches(tmp_path):
    wide = {"hidden_size": 68, "intermediate_size": 72}  # constants of 64 numbers and less lose their names in a branch
    subject, path = subject_of(with_exits(exit=RULES["maximum"], **wide)[0]), tmp_path / "model.onnx"
    reads = [random_texts(subject, Texts(1, 7), seed) for seed in range(8)]
    with torch.no_grad(), answers_apart(subject.model) as said:
        sure = []
        for read in reads:
            subject.model(**subject.feed(read))
            sure.append(float(doubt(RULES["maximum"], said()["encoder.0"])))
    exit = replace(RULES["maximum"], threshold=sum(sorted(sure)[3:5]) / 2)
    subject = subject_of(with_exits(exit=exit, **wide)[0])
    Onnx(agreement=0.0).export(subject.model, arrays(subject.model), path, Variant.INT8_FUSED)
    graph, kinds = onnx.load(path).graph, Counter()
    places = place_nodes(graph, components_of(subject))

    def walk(graph, prefix):
        for node in graph.node:
            kinds["MatMul" if "MatMul" in node.op_type else node.op_type, places[prefix + node.name]] += 1
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    walk(attribute.g, f"{prefix}{node.name}>")

    walk(graph, "")
    assert decides_by_text(graph)
    for layer in range(3):
        assert kinds["MatMul", Spot(Component.LINEAR_BEFORE, layer)] == 3
        assert kinds["MatMul", Spot(Component.LINEAR_AFTER, layer)] == 1
        assert kinds["MatMul", Spot(Component.FFN, layer)] == 2
        assert kinds["MatMul", Spot(Component.CORE, layer)] == 2
        assert kinds["Softmax", Spot(Component.CORE, layer)] == 1
    for layer in range(2):
        assert kinds["Gemm", Spot(Component.HEAD, layer)] == 1
        assert kinds["If", Spot(Component.HEAD, layer)] == 1
        assert kinds["Softmax", Spot(Component.HEAD, layer)] == 1
    found = profile_onnx(path, subject, Texts(1, 7), "tiny", threads=1, rounds=2, reads=reads)
    assert re.fullmatch(r"8 texts of random words: [12]\.\d\d layers on average \(1: 50%, .*\)\.", found.note)
    assert all(found.ms[Spot(component, 1)] > 0 for component in (Component.FFN, Component.CORE, Component.HEAD))
    easy = [read for read, value in zip(reads, sure, strict=True) if value >= exit.threshold]
    found = profile_onnx(path, subject, Texts(1, 7), "tiny", threads=1, rounds=1, reads=easy)
    assert found.note == "4 texts of random words: 1.00 layers on average (1: 100%)."
    assert found.of_layer(1) == found.of_layer(2) == 0


def test_a_rival_gets_no_exits():
    stage = without_cuts(Train(methods=(EarlyExit(), Distillation()), freeze="everything"))
    assert stage.methods == (Distillation(),)


# -- In a recipe -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    source = write_model(tmp_path / "model")
    data = write_data(tmp_path / "data", train=400, dev=40)
    return Recipe(
        str(source), Classification(data=str(data)), (Train((EarlyExit(max_loss=5.0),), epochs=0.3, precision="fp32"),)
    )


@pytest.mark.slow
def test_a_run_saves_its_exits_and_goes_on_from_them(recipe, tmp_path):
    run = Run(tmp_path / "work", tmp_path / "work", Log(None, quiet=True), threads=1)
    bundle, _ = prepare_bundle(preflight(recipe), run)
    frozen = replace(recipe.stages[0], freeze="everything")
    made = advance([frozen], bundle, run).bundle
    again = advance([frozen], bundle, run).bundle
    assert made.plan.junctions
    assert made.plan == again.plan
    assert made.subject.anatomy == bundle.subject.anatomy.after(made.plan) == again.subject.anatomy
    mine, theirs = made.subject.model.state_dict(), again.subject.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    before = bundle.subject.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in mine.items() if ".exit." not in name)
    together = advance(recipe.stages, bundle, run).bundle.subject.model.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in together.items() if ".exit." not in name)
    assert "held" in {field.name for field in fields(Context)}
    assert context_of(bundle, run, bundle.subject, "macs").held is not None


def test_held_examples_are_those_for_validation(recipe, tmp_path):
    run = Run(tmp_path / "work", tmp_path / "work", Log(None, quiet=True), threads=1)
    bundle, _ = prepare_bundle(preflight(recipe), run)
    held = context_of(bundle, run, bundle.subject, "macs").held
    labels = np.concatenate([inputs["labels"].numpy() for inputs in held.batches()])
    assert sorted(labels) == sorted(bundle.material.features[Split.VALIDATION].columns["labels"])
    widths = [inputs["input_ids"].shape[1] for inputs in held.batches()]
    assert widths == sorted(widths) or widths == sorted(widths, reverse=True), "short texts share batches, and take less time"
    logits = np.eye(2, dtype=np.float32)[labels]
    assert held.score({"logits": logits}) == 1.0
    logits[0] = logits[0, ::-1]
    assert held.score({"logits": logits}) == pytest.approx(1 - 1 / len(labels))


@pytest.mark.parametrize(
    ("method", "fact"),
    [
        (EarlyExit(threshold=0.0), "no input reaches a threshold of 0"),
        (EarlyExit(confidence="maximum", threshold=1.0), "no input reaches a threshold of 1"),
        (EarlyExit(confidence="maximum", threshold=0.5), "every input leaves at once"),
    ],
)
def test_a_threshold_that_nothing_reaches_is_refused_before_anything_runs(recipe, method, fact):
    wrong = replace(recipe, stages=(Train((method,)),))
    with pytest.raises(RecipeError, match="do not suit the task") as caught:
        preflight(wrong)
    assert fact in caught.value.facts[0]
    assert caught.value.facts[0].startswith("stages[0]: early_exit: ")


def test_files_that_cannot_stop_and_models_that_have_no_layers_are_refused_before_anything_runs(recipe):
    with pytest.raises(RecipeError) as caught:
        preflight(replace(recipe, export=Export(dense=True)))
    assert "export.dense: such a file cannot stop" in caught.value.facts[0]
    with pytest.raises(TargetError, match="behind layer 9"):
        preflight(replace(recipe, stages=(Train((EarlyExit(layers=(9,)),)),)))


def test_a_model_that_has_exits_is_not_trained_on(recipe, tmp_path):
    model = checkpoint.load(recipe.model)
    plan = Plan(junctions={"encoder.0": Exit(2, "entropy", 0.3)})
    checkpoint.save(shrink(model, anatomy_of(model), plan), plan, tmp_path / "exits", tokenizer_from=recipe.model)
    with pytest.raises(RecipeError) as caught:
        preflight(replace(recipe, model=str(tmp_path / "exits")))
    assert "exits that were fitted" in caught.value.facts[0]


def test_exits_come_last():
    exits = Train(methods=(EarlyExit(),))
    assert "make early_exit the last stage" in next(conflicts(Train(), [exits]))
    assert "make early_exit the last stage" in next(conflicts(Calibrate(Fisher()), [exits]))
    assert "leave out text" in next(conflicts(replace(exits, text="task"), []))
    assert not list(conflicts(exits, [Calibrate(Fisher()), Train()]))
    assert not list(conflicts(TrimVocabulary(), [exits]))
    shared = Train(methods=(SharedLayers(),))
    assert "part the layers" in next(conflicts(exits, [shared]))
    assert not list(conflicts(replace(exits, freeze="everything"), [shared]))
