"""Heads that attend by position: what patterns give, what plans, costs and files make of them, which are chosen, what is not."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny import batch, tiny
from tiny_folder import write_data, write_model

from slimformer.core import cost
from slimformer.core.apart import Apart
from slimformer.core.junction import Exit, Sieve
from slimformer.core.pattern import ATTENDS, Fixed, HeadSpan, pattern_from_data
from slimformer.core.patterning import attend_fixed, attending_by
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink, unshrink
from slimformer.errors import ExportError, PlanError, RecipeError, TargetError
from slimformer.exporters.base import Variant
from slimformer.exporters.kernels import Kernels
from slimformer.exporters.onnx import Onnx
from slimformer.families.base import anatomy_of, subject_of
from slimformer.hooks.attention import Slot, attending
from slimformer.hooks.capture import Capture
from slimformer.hooks.gating import gated
from slimformer.log import Log
from slimformer.measuring.profile import Texts, profile_torch
from slimformer.methods.base import Progress, State, Step
from slimformer.methods.decomposed_attention import DecomposedAttention
from slimformer.methods.distillation import Distillation, score_distance
from slimformer.methods.early_exit import EarlyExit
from slimformer.methods.fisher import Fisher
from slimformer.methods.fixed_attention import FixedAttention, cheapest, damages, open_sites
from slimformer.methods.low_rank import LowRankFactors
from slimformer.methods.shared_layers import SharedLayers
from slimformer.methods.word_elimination import WordElimination
from slimformer.reporting.inspection import inspect
from slimformer.reporting.terminal import draw_inspection
from slimformer.running.bundle import Run
from slimformer.running.order import conflicts
from slimformer.running.preflight import check_kept, preflight
from slimformer.running.prepare import prepare_bundle
from slimformer.running.recipe import Export, Recipe
from slimformer.running.rivals import without_cuts
from slimformer.running.stages import advance
from slimformer.saving import checkpoint
from slimformer.tasks.classification import Classification
from slimformer.testing.checks import _seen, tiny_context
from slimformer.training.stage import Calibrate, Train

TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")
GIVEN = {
    "encoder.0.heads": (Fixed("left"), None, Fixed("previous"), Fixed("current")),
    "encoder.1.heads": (None, HeadSpan(1), Fixed("end"), Fixed("start")),
    "encoder.2.heads": (Fixed("next"), HeadSpan(2), None, Fixed("right")),
}


def patterned(model_type="bert", given=GIVEN, **changes):
    model = tiny(model_type, **changes)
    return shrink(model, anatomy_of(model), Plan(patterns=given))


# -- What a head gives -----------------------------------------------------------------------------------------------------------


def by_hand(pattern, there, reach=None):
    """Whom each word attends to, and how much: (seq, seq); rows of padding are all zero."""
    real = [place for place, word in enumerate(there) if word]
    weights = np.zeros((len(there), len(there)))
    for rank, place in enumerate(real):
        count = len(real)
        match pattern:
            case "previous":
                share = {place - 1: 1.0}
            case "next":
                share = {place + 1: 1.0}
            case "left":
                share = {real[other]: (other + 1.0) ** 3 for other in range(rank - 1)}
            case "right":
                share = {real[other]: float(count - other) ** 3 for other in range(rank + 2, count)}
            case "start":
                share = {real[other]: float(count - other) ** 3 for other in range(count)}
            case "end":
                share = {real[other]: (other + 1.0) ** 3 for other in range(count)}
            case _:
                share = {}
        share = {other: value for other, value in share.items() if other in real} or {place: 1.0}
        for other, value in share.items():
            weights[place, other] = value / sum(share.values())
    return weights


@pytest.mark.parametrize("attends", ATTENDS)
def test_each_pattern_is_the_product_with_its_matrix(attends):
    there = torch.tensor(
        [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]]
    ).bool()
    values = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(0))
    values[~there] = 1e6  # nothing of padding may be seen
    found = attend_fixed(values, attends, there)
    for row, words in enumerate(there.tolist()):
        expected = by_hand(attends, words) @ values[row].numpy()
        np.testing.assert_allclose(found[row][words].numpy(), expected[words], rtol=1e-5, atol=1e-5)
    long = torch.randn(1, 200, 3, generator=torch.Generator().manual_seed(1))
    far = attend_fixed(long, attends, torch.ones(1, 200, dtype=torch.bool))
    np.testing.assert_allclose(far[0], by_hand(attends, [True] * 200) @ long[0].numpy(), atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", TYPES)
def test_every_family_computes_as_if_the_weights_of_heads_were_replaced(model_type, implementation):
    dense = tiny(model_type)
    inputs, anatomy = batch(dense), anatomy_of(dense)
    there = inputs["attention_mask"].bool()
    far = (torch.arange(7)[:, None] - torch.arange(7)).abs()

    def softmax(rules):
        def replaced(scores):  # (batch, heads, seq, seq), masked
            heads = []
            for head, rule in enumerate(rules):
                own = scores[:, head]
                if isinstance(rule, Fixed):
                    heads.append(torch.tensor(np.stack([by_hand(rule.attends, row) for row in there.tolist()])).to(own))
                else:
                    own = own.masked_fill(far > rule.reach, torch.finfo(own.dtype).min) if rule else own
                    heads.append(own.softmax(-1))
            return torch.stack(heads, 1)

        return replaced

    slots = {anatomy.attentions[site]: Slot(softmax=softmax(rules)) for site, rules in GIVEN.items()}
    with torch.no_grad(), attending(dense, slots):
        expected = dense(**inputs).logits
    small = patterned(model_type)
    small.set_attn_implementation(implementation)
    with torch.no_grad():
        torch.testing.assert_close(small(**inputs).logits, expected, atol=2e-5, rtol=1e-4)
        tried = tiny(model_type)
        with attending_by(tried, anatomy_of(tried), GIVEN):  # with all queries and keys still there
            torch.testing.assert_close(tried(**inputs).logits, expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(tried(**inputs).logits, tiny(model_type)(**inputs).logits)


def test_answers_depend_on_no_neighbour_and_no_padding():
    small, inputs = patterned("roberta"), batch(tiny("roberta"), rows=4, seq=9)
    with torch.no_grad():
        together = small(**inputs).logits
        for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
            alone = {name: values[row : row + 1, :length] for name, values in inputs.items()}
            torch.testing.assert_close(small(**alone).logits[0], together[row], atol=1e-5, rtol=1e-5)
            padded = {
                name: torch.nn.functional.pad(values, (0, 5), value=int(name == "input_ids")) for name, values in alone.items()
            }
            torch.testing.assert_close(small(**padded).logits[0], together[row], atol=1e-5, rtol=1e-5)


def test_a_trained_model_learns_through_its_patterns():
    small = patterned().train()
    small(**batch(small)).logits.square().sum().backward()
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None
        assert (float(parameter.grad.abs().sum()) > 1e-5) == (not name.endswith("key.bias")), name


# -- Plans, anatomies and costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_laws_hold_for_models_with_patterns(model_type):
    model = tiny(model_type)
    anatomy, inputs = anatomy_of(model), batch(model)
    first = Plan(
        {"encoder.0.heads": (0, 1, 3), "encoder.1.neurons": (1, 2, 5)},
        patterns={"encoder.0.heads": (Fixed("left"), None, None)},
    )
    second = Plan(
        {"encoder.2.attention": (), "encoder.0.heads": (0, 2)}, patterns={"encoder.1.heads": GIVEN["encoder.1.heads"]}
    )
    small, after = shrink(model, anatomy, first), anatomy.after(first)
    assert anatomy_of(small) == after
    smaller, whole = shrink(small, after, second), shrink(model, anatomy, first.then(second))
    assert anatomy_of(smaller) == after.after(second) == anatomy.after(first.then(second)) == anatomy_of(whole)
    assert anatomy_of(smaller).patterns["encoder.0.heads"] == (Fixed("left"), None)
    with torch.no_grad():
        assert torch.equal(smaller(**inputs).logits, whole(**inputs).logits)
    for plan, before, made in ((first, anatomy, small), (first.then(second), anatomy, whole)):
        assert cost.parameters(model, before).of(plan, before) == made.num_parameters()
        work = cost.macs(before, np.array([7])).of(plan, before)
        assert work == pytest.approx(cost.macs(anatomy_of(made), np.array([7])).dense)
    assert cost.parameters(small, after).of(second, after) == smaller.num_parameters()
    assert after.matrices["encoder.0.query"].shape == (16, 32)
    assert after.matrices["encoder.0.value"].shape == (24, 32)


def test_a_head_costs_its_queries_its_keys_and_its_scores():
    model = tiny("bert")
    anatomy = anatomy_of(model)
    work, plan = cost.macs(anatomy, np.array([10])), Plan(patterns={"encoder.1.heads": (None, None, None, Fixed("next"))})
    assert work.dense - work.of(plan, anatomy) == 2 * 10 * 8 * 32 + 2 * 10 * 10 * 8
    numbers = cost.parameters(model, anatomy)
    assert numbers.dense - numbers.of(plan, anatomy) == 2 * (8 * 32 + 8)


def test_gates_and_later_cuts_take_the_same_head():
    small, inputs = patterned(), batch(tiny("bert"))
    anatomy = anatomy_of(small)
    with torch.no_grad(), gated(small, anatomy, {"encoder.0.heads": torch.tensor([0.0, 1.0, 1.0, 1.0])}):
        masked = small(**inputs).logits
    cut = shrink(small, anatomy, Plan({"encoder.0.heads": (1, 2, 3)}))
    with torch.no_grad():
        torch.testing.assert_close(cut(**inputs).logits, masked)
    assert cut.bert.encoder.layer[0].attention.self.query.out_features == 8
    with pytest.raises(PlanError, match="keep only heads without queries"):
        Plan({"encoder.0.heads": (0, 2)}).check(anatomy)


@pytest.mark.slow
def test_a_saved_model_attends_the_same_way(tmp_path):
    plan, inputs = Plan({"encoder.1.ffn": ()}, patterns=GIVEN), batch(tiny("bert"))
    assert Plan.from_json(plan.to_json()) == plan
    assert '"version": 4' in plan.to_json()
    assert hash(plan) == hash(Plan.from_json(plan.to_json())) != hash(Plan(plan.keep))
    small = shrink(tiny("bert"), anatomy_of(tiny("bert")), plan)
    checkpoint.save(small, plan, tmp_path / "small", tokenizer_from=write_model(tmp_path / "dense"))
    loaded = checkpoint.load(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, small(**inputs).logits)
    assert anatomy_of(loaded) == anatomy_of(small)
    found = inspect(tmp_path / "small")
    assert found.patterns[0] == ("0", "1 x current, 1 x left, 1 x previous")
    assert "1 x end, 1 x start, 1 x within 1" in str(draw_inspection(found).caption)
    with pytest.raises(RecipeError) as caught:
        check_kept(tmp_path / "small", [Calibrate(Fisher())])
    assert "fisher would change what they see" in caught.value.facts[0]
    check_kept(tmp_path / "small", [Train((Distillation(),))])


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Plan(patterns={"encoder.9.heads": (None, HeadSpan(1))}), "has no such heads"),
        (Plan(patterns={"encoder.0.neurons": (None, HeadSpan(1))}), "has no such heads"),
        (Plan(patterns={"encoder.0.heads": (None, HeadSpan(1))}), "has 4 heads left"),
        (Plan(patterns={"encoder.0.heads": (None, HeadSpan(-1), None, None)}), "a whole number from 0"),
        (Plan(patterns={"encoder.0.heads": (None, Fixed("before"), None, None)}), "no pattern 'before'"),
        (Plan(patterns={"encoder.0.heads": (Fixed("next"),) * 4}), "no head with queries"),
        (Plan(patterns=GIVEN, junctions={"encoder.0": Sieve(0.5)}), "has a sieve"),
        (Plan(patterns=GIVEN, junctions={"encoder.0": Apart()}), "where segments meet"),
    ],
)
def test_plans_that_make_no_sense_are_refused(plan, says):
    with pytest.raises(PlanError, match=says):
        plan.check(anatomy_of(tiny("bert")))


def test_a_head_gets_a_pattern_once_and_the_rest_of_a_plan_knows_it():
    anatomy = anatomy_of(patterned())
    later = Plan(patterns={"encoder.0.heads": (Fixed("next"), None, None, None)})
    with pytest.raises(PlanError, match="attends by a pattern already"):
        later.check(anatomy)
    with pytest.raises(PlanError, match="attends by a pattern already"):
        Plan(patterns=GIVEN).then(later)
    with pytest.raises(PlanError, match="later plan keeps unit 7"):
        Plan(patterns=GIVEN).then(Plan({"encoder.0.heads": (7,)}))
    with pytest.raises(PlanError, match="has a sieve"):
        Plan(junctions={"encoder.0": Sieve(0.5)}).check(anatomy)
    Plan(junctions={"encoder.0": Exit(3, "maximum", 0.7)}).check(anatomy)
    with pytest.raises(PlanError, match="attends by position, or within a span"):
        unshrink(patterned(), tiny("bert"), anatomy_of(tiny("bert")), Plan(patterns=GIVEN))
    with pytest.raises(PlanError, match="writes texts"):
        Plan(patterns={"encoder.0.heads": (None, HeadSpan(1), None, None)}).check(anatomy_of(tiny("bart")))
    for data in ({"use": "fixed"}, {"use": "fixed", "attends": "before"}, {"use": "span", "reach": -1}, "next", 3):
        with pytest.raises(PlanError):
            pattern_from_data(data, "encoder.0.heads")
    with pytest.raises(PlanError, match="a list with an entry for each head"):
        Plan.from_json('{"forms": {}, "junctions": {}, "keep": {}, "patterns": {"encoder.0.heads": 1}, "version": 4}')
    other = tiny("bert")
    other.config.model_type = "unknown"
    with pytest.raises(PlanError, match="take a model of one of these types"):
        shrink(other, anatomy_of(tiny("bert")), Plan(patterns=GIVEN))


# -- Files -------------------------------------------------------------------------------------------------------------------------


def arrays(model, shapes=((3, 9), (1, 5), (5, 20), (2, 2))):
    return [
        {name: values.numpy() for name, values in batch(model, rows=rows, seq=seq, seed=seed).items()}
        for seed, (rows, seq) in enumerate(shapes)
    ]


@pytest.fixture(scope="module", params=["bert", "distilbert, each word"])
def exported(request, tmp_path_factory):
    home, words = tmp_path_factory.mktemp("files"), request.param != "bert"
    small = patterned("distilbert", auto_class="AutoModelForTokenClassification") if words else patterned()
    variants = (Variant.FUSED,) if words else (Variant.FLOAT, Variant.FUSED, Variant.INT8_DYNAMIC)
    return small, Onnx(agreement=0.0).export_all(small, arrays(small), {name: home / f"{name}.onnx" for name in variants})


@pytest.mark.slow
def test_files_give_the_numbers_of_the_model(exported):
    small, made = exported
    for variant, artifact in made.items():
        assert "7 heads attend by position, as shifts and running sums" in artifact.notes
        assert artifact.max_difference < (0.3 if "int8" in variant else 1e-4)
    rows = arrays(small, ((4, 13),))[0]
    with torch.no_grad():
        expected = small(**{name: torch.from_numpy(values) for name, values in rows.items()}).logits.numpy()
    for variant in set(made) - {Variant.INT8_DYNAMIC}:
        session = onnxruntime.InferenceSession(made[variant].path)
        names = [item.name for item in session.get_inputs()]
        rows |= {name: np.zeros_like(rows["input_ids"]) for name in names if name not in rows}
        together = session.run(None, {name: rows[name] for name in names})[0]
        for row, length in enumerate(rows["attention_mask"].sum(1)):
            alone = session.run(None, {name: rows[name][row : row + 1, :length] for name in names})[0]
            cut = (slice(0, length),) if expected.ndim == 3 else ()
            np.testing.assert_allclose(together[row][cut], expected[row][cut], atol=1e-4)
            np.testing.assert_allclose(alone[0], together[row][cut], atol=1e-4)


def test_a_file_computes_scores_for_learned_heads_alone(exported):
    small, made = exported
    graph = onnx.load(made[Variant.FUSED].path)
    softmaxes = [node.output[0] for node in graph.graph.node if node.op_type == "Softmax"]
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in softmaxes)
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    feed = {item.name: np.ones((2, 6), dtype=np.int64) for item in session.get_inputs()}
    feed |= {name: np.zeros((2, 6), dtype=np.int64) for name in feed if name == "token_type_ids"}
    last = 6 if small.config.model_type == "distilbert" else 1  # a classifier reads the first word only
    assert [value.shape for value in session.run(softmaxes, feed)] == [(2, 1, 6, 6), (2, 2, 6, 6), (2, 2, last, 6)]


@pytest.mark.slow
def test_a_file_with_exits_stops_as_it_should(tmp_path):
    small = patterned(hidden_size=16, num_hidden_layers=2, given={name: GIVEN[name] for name in list(GIVEN)[:2]})
    branched = shrink(small, anatomy_of(small), Plan(junctions={"encoder.0": Exit(3, "maximum", 0.36)}))
    made = Onnx(agreement=0.0).export(branched, arrays(branched, ((3, 9), (1, 5))), tmp_path / "model.onnx", Variant.FUSED)
    assert made.max_difference < 1e-4
    assert any("stops at exits" in note for note in made.notes)


def test_the_kernels_refuse_it(tmp_path):
    with pytest.raises(ExportError, match="attend by patterns"):
        Kernels().check("bert", branches=True)
    with pytest.raises(ExportError, match="attend by position or within a span"):
        Kernels().export(patterned(), arrays(tiny("bert")), tmp_path / "model.slim", Variant.INT8_KERNELS)


def test_it_is_profiled():
    profile = profile_torch(subject_of(patterned()), Texts(1, 8), "tiny", rounds=1)
    assert profile.ms


# -- The choice --------------------------------------------------------------------------------------------------------------------


def test_damage_is_that_of_models_that_were_really_changed_and_progress_is_told():
    told = []

    @contextmanager
    def track(_, total):
        yield lambda done: told.append((done, total))

    context = replace(tiny_context(), track=track)
    batches = list(context.batches(8))
    answers, chosen = context.answers(batches), {("encoder.0.heads", 2): "end"}
    before = context.model(**batch(context.model)).logits
    found = damages(context, open_sites(context.anatomy, (1, 2)), ("previous", "left"), chosen, batches, answers)
    assert torch.equal(context.model(**batch(context.model)).logits, before)
    assert len(found) == (4 + 3) * 2
    assert told == [(done, len(found)) for done in range(1, len(found) + 1)]
    for ((site, head), attends), damage in found.items():
        given = {"encoder.0.heads": [None, None, Fixed("end"), None], "encoder.1.heads": [None] * 4}
        given[site][head] = Fixed(attends)
        small = subject_of(
            shrink(context.model, context.anatomy, Plan(patterns={name: tuple(rules) for name, rules in given.items()}))
        )
        total = rows = 0.0
        with torch.no_grad(), small.evaluating():
            for inputs, answer in zip(batches, answers, strict=True):
                count = len(inputs["input_ids"])
                total += count * float(context.task.divergence(small.model(**small.feed(inputs)), answer, inputs, 1.0))
                rows += count
        assert damage == pytest.approx(total / rows, rel=1e-3, abs=1e-7)


def test_the_cheapest_heads_go_and_each_attention_keeps_one():
    anatomy = anatomy_of(tiny("bert"))
    found = {
        ((f"encoder.{layer}.heads", head), name): layer + head / 10 + (name == "next") / 100
        for layer in range(3)
        for head in range(4)
        for name in ("next", "end")
    }
    taken = cheapest(anatomy, found, {("encoder.0.heads", 3): "left"}, 4)
    assert taken == dict.fromkeys(
        [("encoder.0.heads", 0), ("encoder.0.heads", 1), ("encoder.1.heads", 0), ("encoder.1.heads", 1)], "end"
    )


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_decision_fixes_as_many_heads_as_asked_in_the_layers_named(rounds):
    context = tiny_context()
    method = FixedAttention(learned=0.6, patterns=("previous", "start"), layers=(1, 3), examples=8, rounds=rounds)
    decision = method.decide(State(), context)
    rules = [rule for site in decision.plan.patterns.values() for rule in site if rule]
    assert len(rules) == 5
    assert {rule.attends for rule in rules} <= {"previous", "start"}
    assert set(decision.plan.patterns) <= {"encoder.0.heads", "encoder.2.heads"}
    assert "of 12 heads 5 attend by position" in decision.notes[0]
    small = subject_of(shrink(context.model, context.anatomy, decision))
    more = replace(context, subject=small, cost=cost.macs(small.anatomy, np.array([7])))
    again = FixedAttention(learned=None, fixed=1, examples=8).decide(State(), more).plan
    assert sum(rule is not None for site in decision.plan.then(again).patterns.values() for rule in site) == 6


def test_heads_that_were_cut_and_layers_that_are_gone_are_no_hindrance():
    context = tiny_context()
    plan = Plan({"encoder.0.heads": (1, 3), "encoder.1.heads": (2,), "encoder.2.attention": ()})
    small = subject_of(shrink(context.model, context.anatomy, plan))
    around = replace(context, subject=small, cost=cost.macs(small.anatomy, np.array([7])))
    decision = FixedAttention(learned=None, fixed=1, examples=8).decide(State(), around)
    assert list(decision.plan.patterns) == ["encoder.0.heads"]
    whole = shrink(context.model, context.anatomy, plan.then(decision.plan))
    with torch.no_grad():
        expected = shrink(small.model, small.anatomy, decision)(**batch(whole)).logits
        assert torch.equal(whole(**batch(whole)).logits, expected)
    with pytest.raises(TargetError, match="cannot fix 2 heads: 1 can be fixed"):
        FixedAttention(learned=None, fixed=2).check(small.anatomy, None)
    single = shrink(small.model, small.anatomy, Plan({"encoder.0.heads": (0,)}))
    with pytest.raises(TargetError, match="no head left to fix: each attention here keeps one"):
        FixedAttention().check(anatomy_of(single), None)


def test_only_heads_with_scores_are_compared():
    context = tiny_context()
    given = {"encoder.0.heads": (Fixed("next"), None, Fixed("end"), None)}
    student = subject_of(shrink(context.model, context.anatomy, Plan(patterns=given)))
    around = replace(context, subject=student, teacher=context.subject)
    method = Distillation(scores=1.0, hidden=0.0, logits=0.0, relations=1.0, relation_heads=4)
    state = method.attach(around)
    assert state.heads["encoder.0.heads"].students == (0, 1)
    assert state.heads["encoder.0.heads"].teachers == (1, 3)
    inputs = batch(context.model)
    needs = {Capture.SCORES, Capture.RELATIONS, Capture.LOGITS}
    with torch.no_grad():
        mine, theirs = _seen(student, inputs, needs), _seen(context.subject, inputs, needs)
    assert mine.scores["encoder.0.heads"].shape[1] == 2
    only = {"encoder.0.heads": state.heads["encoder.0.heads"]}
    assert float(score_distance(mine, theirs, inputs["attention_mask"], only)) < 1e-9  # the first layer reads the same
    loss = method.penalty(state, Step(student.model, inputs, mine, theirs, Progress(0, 1), context.task))
    assert bool(torch.isfinite(loss))
    last = subject_of(shrink(context.model, context.anatomy, Plan(patterns={"encoder.2.heads": given["encoder.0.heads"]})))
    with pytest.raises(TargetError, match="relation_heads 12"):
        Distillation(relations=1.0).attach(replace(around, subject=last))
    with pytest.raises(TargetError, match="heads without queries"):
        method.attach(replace(around, teacher=last))


# -- What is refused ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (FixedAttention(layers=(1, 7)), "layer 7 has no attention"),
        (FixedAttention(learned=0.1), "cannot fix 11 heads: 9 can be fixed"),
        (FixedAttention(learned=1.0), "12 have queries and keys"),
    ],
)
def test_layers_and_numbers_that_cannot_be_are_refused(method, says):
    with pytest.raises(TargetError, match=says):
        method.check(anatomy_of(tiny("bert")), None)


def test_other_models_and_options_are_refused():
    dense = anatomy_of(tiny("bert"))
    for anatomy, says in (
        (anatomy_of(tiny("bart")), "writes texts"),
        (anatomy_of(tiny("cnn")), "no attention"),
        (dense.after(Plan(junctions={"encoder.0": Sieve(0.5)})), "words leave"),
        (dense.after(Plan(junctions={"encoder.0": Apart()})), "attend apart"),
        (dense.after(Plan(junctions={"encoder.0": Exit(3, "maximum", 0.7)})), "has exits"),
        (dense.after(Plan(forms=LowRankFactors(keep=0.4).decide(State(), tiny_context()).plan.forms)), "stored as"),
    ):
        with pytest.raises(TargetError, match=says):
            FixedAttention().check(anatomy, None)
    with pytest.raises(ValueError, match="patterns: there is no pattern 'nxt': did you mean 'next'"):
        FixedAttention(patterns=("previous", "nxt"))
    with pytest.raises(ValueError, match="give one of them"):
        FixedAttention(fixed=3)


FIXED = Calibrate(FixedAttention(examples=8, rounds=1, patterns=("previous", "end")))


@pytest.mark.parametrize(
    ("stages", "fact"),
    [
        ((FIXED, Calibrate(Fisher())), "first fisher, then fixed_attention"),
        ((FIXED, Train((WordElimination(),))), "leave out one of the two"),
        ((FIXED, Train((DecomposedAttention(),))), "leave out one of the two"),
        ((Train((WordElimination(),)), FIXED), "leave out one of the two"),
        ((Train((DecomposedAttention(),)), FIXED), "leave out one of the two"),
        ((Calibrate(LowRankFactors()), FIXED), "first fixed_attention, then factor"),
        ((Train((SharedLayers(),)), FIXED), "has made one"),
        ((Train((EarlyExit(),)), FIXED), "make early_exit the last stage"),
    ],
)
def test_stages_that_undo_it_are_refused(stages, fact):
    assert any(fact in found for found in conflicts(stages[-1], stages[:-1]))


def test_stages_that_go_with_it_are_not_refused():
    for before, stage in (
        ([Calibrate(Fisher())], FIXED),
        ([FIXED], Train((Distillation(),))),
        ([FIXED], Train((EarlyExit(),))),
    ):
        assert list(conflicts(stage, before)) == []
    assert without_cuts(Train((FixedAttention(), Distillation()))).methods == (Distillation(),)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    home = tmp_path_factory.mktemp("recipe")
    source, data = write_model(home / "model"), write_data(home / "data", train=200, dev=40)
    stages = (FIXED, Train((Distillation(),), epochs=0.3, precision="fp32"))
    return Recipe(str(source), Classification(data=str(data), text="sentence"), stages)


@pytest.mark.slow
def test_a_run_fixes_heads_and_trains_on(recipe, tmp_path):
    run = Run(tmp_path / "work", tmp_path / "work", Log(None, quiet=True), threads=1)
    bundle, _ = prepare_bundle(preflight(recipe), run)
    made = advance(recipe.stages, bundle, run).bundle
    given = made.subject.anatomy.patterns
    assert given == dict(made.plan.patterns)
    assert any(given.values())
    with pytest.raises(PlanError, match="attend by position"):
        advance([*recipe.stages, Calibrate(Fisher(cost="macs"))], bundle, run)


def test_bad_input_is_refused_before_anything_runs(recipe):
    with pytest.raises(TargetError, match="can be fixed"):
        preflight(replace(recipe, stages=(Calibrate(FixedAttention(learned=0.01)),)))
    with pytest.raises(RecipeError) as caught:
        preflight(replace(recipe, export=Export(dense=True)))
    assert "export.dense: no head of a plain model" in caught.value.facts[0]
    with pytest.raises(ExportError, match="attend by patterns"):
        preflight(replace(recipe, export=Export(to="kernels")))
