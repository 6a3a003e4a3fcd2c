"""Movement: gradients and schedule by hand, what each variant scores, the safe rule for heads, masked = cut, targets, resuming."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny import MODEL_TYPES, batch, tiny
from toy_task import context, fit, rows, with_model

from slimformer.core import cost
from slimformer.core.anatomy import Kind
from slimformer.core.plan import Decision
from slimformer.core.shrink import shrink
from slimformer.errors import RecipeError, TargetError
from slimformer.families.base import anatomy_of
from slimformer.hooks.capture import Captured
from slimformer.hooks.weights import masked
from slimformer.log import Log
from slimformer.methods.base import Context, Method, Progress, State, Step
from slimformer.methods.distillation import Distillation
from slimformer.methods.keep_zeros import KeepZeros
from slimformer.methods.movement import Movement, bar_of_weights, cost_above, lowest_bar, straight_through
from slimformer.running.order import conflicts
from slimformer.saving.tensors import model_digest
from slimformer.testing.checks import tiny_context
from slimformer.training import loop as training
from slimformer.training import runstate
from slimformer.training.stage import Train

QUIET = Log(None, quiet=True)
LAYER = "bert.encoder.layer.1"
QUERY, KEY, VALUE = (f"{LAYER}.attention.self.{name}" for name in ("query", "key", "value"))
OUT, FFN_IN, FFN_OUT = f"{LAYER}.attention.output.dense", f"{LAYER}.intermediate.dense", f"{LAYER}.output.dense"
PAPER = {"keep": None, "neuron_multiple": 1}
END = Progress(10, 10)


def scores_of(state: State) -> dict[str, torch.nn.Module]:
    """Each weight's scores."""
    return {name.removesuffix(".weight"): scores for scores in state.each() for name, _ in scores.weights}


def scattered(state: State, seed: int = 0) -> None:
    """Random scores, as after a training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for scores in state.each():
            scores.value.copy_(3 * torch.randn(scores.value.shape, generator=generator))


def same_when_cut(method: Movement, state: State, around: Context) -> Decision:
    """What it decides, after seeing that the masked model's outputs are the cut one's, and not those without masks."""
    decision = method.decide(state, around)
    inputs = batch(around.model)
    with torch.no_grad():
        expected = around.model(**inputs).logits
        state.close()
        assert not torch.allclose(around.model(**inputs).logits, expected, atol=1e-2)
        small = shrink(around.model, around.anatomy, decision)
        torch.testing.assert_close(small(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    return decision


def wide(unit: str = "macs") -> Context:
    """Units of less than 1 % of the cost each: 4 layers of 16 heads and 128 neurons."""
    around = tiny_context()
    model = tiny("bert", hidden_size=64, num_attention_heads=16, num_hidden_layers=4, intermediate_size=128)
    anatomy = anatomy_of(model)
    counted = {
        "macs": cost.macs(anatomy, np.array([5, 9])),
        "parameters": cost.parameters(model, anatomy),
        "latency": cost.latency(anatomy, 0.2, {Kind.HEADS: {4: 0.7, 16: 1.0}, Kind.NEURONS: {32: 0.5, 128: 2.0}}),
    }[unit]
    return dataclasses.replace(with_model(around, model, anatomy), cost=counted)


def test_the_mask_is_exact_and_its_gradient_goes_straight_through():
    scores = torch.tensor([0.3, -7.1, 1e-3], requires_grad=True)
    mask = straight_through(scores, torch.tensor([True, False, True]))
    assert mask.tolist() == [1, 0, 1]
    (mask * torch.tensor([2.0, 3.0, 5.0])).sum().backward()
    assert scores.grad.tolist() == [2, 3, 5]


def test_scores_learn_the_sum_of_gradient_times_weight():
    """Against a model whose weights *are* weight * mask: its gradient is dL/dW', in closed blocks too."""
    around = tiny_context()
    method = Movement(variant="hybrid", block=8, neuron_multiple=1)
    state = method.attach(around)
    scattered(state)
    method.advance(state, END)
    assert 0.1 < method.report(state)["open"] < 0.9
    plain = tiny("bert")
    own = dict(around.model.named_parameters())
    with torch.no_grad():
        for name, mask in state.masks():
            dict(plain.named_parameters())[name].copy_(masked(own[name], mask()))
    inputs, labels = batch(plain), torch.tensor([0, 1, 2])
    for model in (plain, around.model):
        torch.nn.functional.cross_entropy(model(**inputs).logits, labels).backward()
    moved = {name: value.grad * own[name].detach() for name, value in plain.named_parameters() if value.grad is not None}
    scores = scores_of(state)
    for name in (QUERY, KEY, VALUE, OUT):
        expected = moved[f"{name}.weight"].reshape(4, 8, 4, 8).sum((1, 3))  # blocks of 8 x 8
        torch.testing.assert_close(scores[name].value.grad, expected, atol=1e-7, rtol=1e-4)
    expected = moved[f"{FFN_IN}.weight"].sum(1) + moved[f"{FFN_OUT}.weight"].sum(0)
    torch.testing.assert_close(scores[FFN_IN].value.grad, expected, atol=1e-7, rtol=1e-4)
    state.close()


def test_penalty_by_hand():
    around = tiny_context()
    method = Movement(variant="struct", lambda_final=10, lambda_attention=0.5, lambda_ffn=2, warmup=0.1, cooldown=0.5, **PAPER)
    state = method.attach(around)
    nothing = Captured(output={})

    def at(step: int) -> float | None:
        value = method.penalty(state, Step(around.model, {}, nothing, None, Progress(step, 100), around.task))
        return None if value is None else value.item()

    assert at(5) is None
    assert at(30) == pytest.approx(10 * (1 - 0.5**3) * (0.5 * 0.5 + 2 * 0.5) / 2)  # all scores 0: sigmoid 0.5
    with torch.no_grad():
        scores_of(state)[QUERY].value[0] = math.log(3)  # one of 4 heads of one of 12 matrices: sigmoid 0.75
    attention = (11 * 0.5 + (3 * 0.5 + 0.75) / 4) / 12
    assert at(60) == pytest.approx(10 * (0.5 * attention + 2 * 0.5) / 2)
    state.close()


@pytest.mark.parametrize(
    ("options", "attention", "output", "ffn"),
    [
        ({"variant": "block", "block": 8}, (4, 4), (4, 4), ((3, 4), (4, 3))),
        ({"variant": "block", "block": (4, 8)}, (8, 4), (4, 8), ((6, 4), (4, 6))),
        ({"variant": "hybrid", "block": (8, 16)}, (4, 2), (2, 4), ((24,), (24,))),
        ({"variant": "struct"}, (4, 1), (1, 4), ((24,), (24,))),
    ],
)
def test_what_each_variant_scores(options, attention, output, ffn):
    state = Movement(**options).attach(tiny_context())
    scores = scores_of(state)
    assert [tuple(scores[name].value.shape) for name in (QUERY, KEY, VALUE)] == [attention] * 3
    assert tuple(scores[OUT].value.shape) == output
    assert (tuple(scores[FFN_IN].value.shape), tuple(scores[FFN_OUT].value.shape)) == ffn
    assert (scores[FFN_IN] is scores[FFN_OUT]) == (options["variant"] != "block")
    assert {p.dtype for p in state.parameters()} == {torch.float32}
    assert [group["weight_decay"] for group in state.groups()] == [0.0]
    state.close()


def test_a_head_goes_only_where_its_output_is_zero():
    around = tiny_context()
    method = Movement(variant="struct", **PAPER)
    state = method.attach(around)
    scores = scores_of(state)
    with torch.no_grad():
        scores[QUERY].value[0] = -9  # an average of its values: it stays
        scores[KEY].value[0] = -9
        scores[VALUE].value[1] = -9
        scores[OUT].value[0, 2] = -9
        scores[FFN_IN].value[5:] = -9
    decision = method.decide(state, around)
    state.close()
    assert dict(decision.plan.keep) == {"encoder.1.heads": (0, 3), "encoder.1.neurons": (0, 1, 2, 3, 4)}
    assert not decision.weights[f"{VALUE}.weight"][8:16].any()
    assert not decision.weights[f"{VALUE}.bias"][8:16].any()  # or the constant W_O b_V would stay
    assert bool(decision.weights[f"{VALUE}.bias"][:8].all())
    assert not decision.weights[f"{FFN_IN}.bias"][5:].any()


@pytest.mark.parametrize("target", [None, 0.5])
@pytest.mark.parametrize(("variant", "block"), [("block", (8, 16)), ("hybrid", 4), ("hybrid", 8), ("struct", 32)])
def test_the_masked_model_is_the_cut_one(variant, block, target):
    around = tiny_context()
    method = Movement(variant=variant, block=block, keep=target, threshold=0.8, neuron_multiple=4)
    state = method.attach(around)
    scattered(state)
    assert same_when_cut(method, state, around).plan.keep


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_is_masked_as_it_is_cut(model_type):
    around = tiny_context(model_type)
    method = Movement(variant="struct", keep=0.5, neuron_multiple=1)
    state = method.attach(around)
    scattered(state)
    keep = same_when_cut(method, state, around).plan.keep
    assert {around.anatomy.sites[name].kind for name in keep} == {Kind.HEADS, Kind.NEURONS}


def test_a_site_whose_scores_all_fall_keeps_one_masked_unit():
    around = tiny_context()
    method = Movement(variant="struct", **PAPER)
    state = method.attach(around)
    with torch.no_grad():
        for scores in (scores_of(state)[VALUE], scores_of(state)[FFN_IN]):
            scores.value.fill_(-9)
            scores.value[2] = -8
    decision = same_when_cut(method, state, around)
    assert dict(decision.plan.keep) == {"encoder.1.heads": (2,), "encoder.1.neurons": (2,)}


def test_fill_leaves_no_zeros_in_what_is_kept():
    around = tiny_context()
    state = Movement(variant="hybrid", block=4).attach(around)
    scattered(state)
    masked_only = Movement(variant="hybrid", block=4).decide(state, around)
    filled = Movement(variant="hybrid", block=4, fill=True).decide(state, around)
    state.close()
    assert filled.plan == masked_only.plan
    small = dict(shrink(around.model, around.anatomy, filled).named_parameters())
    sparse = dict(shrink(around.model, around.anatomy, masked_only).named_parameters())
    noise = []
    for name in (f"{part}.weight" for part in (QUERY, KEY, VALUE, OUT)):
        zeros = sparse[name] == 0
        assert bool(zeros.any())
        assert bool((small[name] != 0).all())
        assert torch.equal(small[name][~zeros], sparse[name][~zeros])
        trained = around.model.get_parameter(name).detach()
        noise.append(((small[name] - trained.mean()) / (0.01 * trained.std()))[zeros].detach())
    drawn = torch.cat(noise)
    assert abs(float(drawn.mean())) < 4 / math.sqrt(len(drawn))
    assert float(drawn.std()) == pytest.approx(1, abs=4 / math.sqrt(len(drawn)))


@pytest.mark.parametrize("target", [0.7, 0.35])
@pytest.mark.parametrize("unit", ["macs", "parameters", "latency"])
@pytest.mark.parametrize("variant", ["block", "hybrid", "struct"])
def test_the_target_is_met_within_two_percent_and_never_exceeded(variant, unit, target):
    around = wide(unit)
    method = Movement(variant=variant, block=4, keep=target, cost=unit, neuron_multiple=4)
    state = method.attach(around)
    scattered(state)
    decision = method.decide(state, around)
    left = around.cost.of(decision.plan, around.anatomy) / around.cost.dense
    assert left == pytest.approx(method.report(state)["cost"])
    assert target - 0.02 <= left <= target + 1e-9
    state.close()


def test_the_bar_is_the_lowest_that_fits():
    around = wide()
    state = Movement(variant="hybrid", block=4, neuron_multiple=1).attach(around)
    scattered(state)
    lives = state.lives(state.ranks())
    bar = lowest_bar(lives, around.cost, 0.6)
    fits = [place for place in range(-1, 5000) if cost_above(lives, around.cost, place) <= 0.6 * around.cost.dense]
    assert bar == fits[0]
    state.close()


def test_the_closed_share_follows_the_ramp_to_what_meets_the_target():
    around = wide()
    method = Movement(variant="hybrid", block=4, keep=0.5, warmup=0.25, cooldown=0.25, neuron_multiple=1)
    state = method.attach(around)
    scattered(state)
    closed, left = [], []
    for step in (8, 16, 32, 48, 64):
        method.advance(state, Progress(step, 64))
        closed.append(1 - method.report(state)["open"])
        left.append(method.report(state)["cost"])
    assert closed[0] == closed[1] == 0
    assert left[0] == left[1] == 1
    assert closed[2] == pytest.approx(closed[4] * (1 - 0.5**3), abs=1e-3)
    assert closed[3] == closed[4]
    assert 0.48 <= left[4] <= 0.5 < left[2] < 1
    state.close()


# -- A share of the weights ------------------------------------------------------------------------------------------------------


def filled_weights(model) -> int:
    """Weights of the encoder's matrices that are not zero."""
    matrices = anatomy_of(model).encoder_matrices()
    return sum(int((model.get_submodule(matrix.module).weight != 0).sum()) for matrix in matrices)


def all_weights(around: Context) -> int:
    return sum(math.prod(matrix.shape) for matrix in around.anatomy.encoder_matrices())


@pytest.mark.parametrize("share", [0.03, 0.3, 1.0])
def test_single_weights_stay_exactly_as_many_as_were_asked_for(share):
    around = wide()
    method = Movement(variant="block", block=1, keep=None, keep_weights=share)
    state = method.attach(around)
    scattered(state)
    decision = method.decide(state, around)
    asked = math.floor(share * all_weights(around))
    assert filled_weights(shrink(around.model, around.anatomy, decision)) == asked
    assert method.report(state)["weights"] == pytest.approx(asked / all_weights(around))
    state.close()


@pytest.mark.parametrize("share", [0.05, 0.15, 0.5])
@pytest.mark.parametrize(("variant", "block"), [("block", 4), ("block", (8, 2)), ("hybrid", 4), ("struct", 1)])
def test_one_score_fewer_closed_would_leave_too_many_weights(variant, block, share):
    """The published rule with the threshold at each place in the ranking, and the weights of the cut model counted."""
    around = tiny_context()
    method = Movement(variant=variant, block=block, keep=None, keep_weights=share, neuron_multiple=1)
    state = method.attach(around)
    scattered(state)
    ranking = torch.cat([value.flatten() for value in state.probabilities()]).double().unique()
    places = (ranking[1:] + ranking[:-1]) / 2

    def at(place: int) -> tuple[Decision, int]:
        rule = dataclasses.replace(method, keep_weights=None, threshold=float(places[place]))
        decision = rule.decide(state, around)
        return decision, filled_weights(shrink(around.model, around.anatomy, decision))

    low, high = 0, len(places) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle)[1] <= share * all_weights(around) else (middle + 1, high)
    assert at(low - 1)[1] > share * all_weights(around)
    expected, _ = at(low)
    found = same_when_cut(method, state, around)
    assert found.plan == expected.plan
    assert all(torch.equal(weight, found.weights[name]) for name, weight in expected.weights.items())


def test_the_bar_of_weights_by_hand():
    survivals = [torch.tensor([[3.0, 1.0], [2.0, 2.0]]), torch.tensor([[0.0, 5.0]])]
    assert [bar_of_weights(survivals, keep / 6) for keep in (1, 2, 3, 4, 5, 6)] == [3, 2, 2, 1, 0, -1]  # 2 goes as a whole


def test_the_share_of_closed_weights_follows_the_ramp():
    around = wide()
    method = Movement(variant="block", block=2, keep=None, keep_weights=0.1, warmup=0.25, cooldown=0.25)
    state = method.attach(around)
    scattered(state)
    closed = []
    for step in (8, 16, 32, 48, 64):
        method.advance(state, Progress(step, 64))
        closed.append(1 - method.report(state)["open"])
    assert closed[:2] == [0, 0]
    assert closed[2] == pytest.approx(closed[4] * (1 - 0.5**3), abs=1e-3)
    assert closed[3] == closed[4]
    assert 0.099 < method.report(state)["weights"] <= 0.1 + 1e-9
    state.close()


def test_zeros_that_were_asked_for_are_held():
    method = Movement(variant="block", block=1, keep=None, keep_weights=0.2, warmup=0.0, score_lr=0.3)
    assert not list(conflicts(Train(methods=(KeepZeros(),)), [Train(methods=(method,))]))
    assert "keep_zeros" in next(conflicts(Train(), [Train(methods=(method,))]))
    assert not list(conflicts(Train(), [Train(methods=(Movement(),))]))


@pytest.mark.slow
def test_a_share_of_the_weights_trains_and_is_still_there_after_the_next_stage(tmp_path):
    features = rows(96)
    settings = Train(epochs=2, lr=3e-3, batch_size=16, precision="fp32")
    around = context(features=features)
    method = Movement(variant="block", block=1, keep=None, keep_weights=0.2, lambda_final=0)
    decision = fit(around, features, (method,), settings, tmp_path / "prune", QUIET).decision
    small = shrink(around.model, around.anatomy, decision)
    left = filled_weights(small)
    assert left == math.floor(0.2 * all_weights(around))
    after = context(small, features=features)
    before = {name: value.clone() for name, value in small.named_parameters()}
    fit(after, features, (KeepZeros(),), settings, tmp_path / "train", QUIET)
    assert filled_weights(after.model) == left
    moved = [name for name, value in after.model.named_parameters() if not torch.equal(value, before[name])]
    assert "bert.encoder.layer.1.output.dense.weight" in moved


def test_a_share_below_one_block_is_refused():
    with pytest.raises(TargetError, match=r"0\.001, and one block alone is 0\.00379"):
        Movement(variant="block", block=8, keep=None, keep_weights=0.001).attach(tiny_context())


def test_neurons_stay_in_multiples():
    around = wide()
    method = Movement(variant="hybrid", block=4, keep=0.4, neuron_multiple=16)
    state = method.attach(around)
    scattered(state)
    keep = method.decide(state, around).plan.keep
    counts = [len(units) for name, units in keep.items() if name.endswith("neurons")]
    assert counts
    assert all(count % 16 == 0 for count in counts)
    state.close()


def test_without_a_target_the_threshold_rises_and_closes_what_is_below():
    around = tiny_context()
    method = Movement(variant="struct", score_lr=1.0, warmup=0.0, cooldown=0.5, **PAPER)
    state = method.attach(around)
    with torch.no_grad():
        scores_of(state)[QUERY].value.copy_(torch.tensor([0.0, -2.0, -2.4, -9.0])[:, None])  # sigmoid 0.5, 0.12, 0.083, 1e-4
    opened = scores_of(state)[QUERY].open
    seen = []
    for step in (0, 1, 5, 10):  # thresholds 0, 0.0488, 0.1, 0.1
        method.advance(state, Progress(step, 10))
        seen.append(opened.flatten().tolist())
    assert seen == [[True] * 4, [True, True, True, False], [True, True, False, False], [True, True, False, False]]
    state.close()


@dataclass(frozen=True)
class Stop(Method):
    """Ends a run after some steps, as a kill would."""

    after: int

    def __repr__(self) -> str:
        return "Stop()"

    def advance(self, state: State, progress: Progress) -> None:
        if progress.step == self.after:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"keep": 0.6, "fill": True}, {"keep": None, "score_lr": 0.4, "threshold": 0.3}])
def test_a_stopped_run_ends_with_the_same_numbers(tmp_path, monkeypatch, options):
    monkeypatch.setattr(training, "STATE_SECONDS", 0.0)
    monkeypatch.setattr(training, "STATE_SHARE", math.inf)
    features = rows(96)
    settings = Train(epochs=3, lr=3e-3, batch_size=16, precision="fp32")
    method = Movement(variant="hybrid", block=8, cost="parameters", neuron_multiple=4, lambda_final=5, **options)

    def run(folder, after: int):
        around = context(features=features, teacher=tiny("bert", seed=9))
        return around, fit(around, features, (method, Distillation(), Stop(after)), settings, folder, QUIET)

    straight, expected = run(tmp_path / "straight", 99)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", 13)
    assert runstate.latest_state(tmp_path / "stopped").step == 12
    resumed, result = run(tmp_path / "stopped", 99)
    assert result.losses == expected.losses
    assert model_digest(resumed.model) == model_digest(straight.model)
    assert result.decision.plan == expected.decision.plan != type(result.decision.plan)()
    assert all(torch.equal(value, expected.decision.weights[name]) for name, value in result.decision.weights.items())
    assert not any("forward" in vars(module) for module in resumed.model.modules())


def test_a_target_out_of_reach_is_refused_before_training():
    with pytest.raises(TargetError, match=r"0\.05 cannot be reached.*[0-9.]+% of the MACs remain"):
        Movement(keep=0.05).attach(tiny_context())


def test_blocks_that_do_not_divide_are_refused_and_leave_no_trace():
    around = tiny_context()
    with pytest.raises(RecipeError, match="blocks of 16 x 16 do not divide encoder.0.ffn_in, which is 24 x 32"):
        Movement(variant="block", block=16).attach(around)
    assert not any("forward" in vars(module) for module in around.model.modules())


def test_scores_that_cannot_or_did_not_cross_say_what_to_change():
    around = tiny_context()
    method = Movement(variant="hybrid", **PAPER)
    state = method.attach(around)
    with pytest.raises(TargetError, match=r"2\.20 below their start, and 100 steps.*\n.*score_lr to 0\.088"):
        method.advance(state, Progress(1, 100))
    method.advance(state, Progress(1, 1000))
    with pytest.raises(TargetError, match=r"lowest sigmoid\(score\) is 0\.500, threshold 0\.1\.\n.*raise lambda_final"):
        method.decide(state, around)
    state.close()


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "rows"},
        {"block": 0},
        {"block": (8, 0)},
        {"keep": 0},
        {"keep": 1.5},
        {"cost": "bytes"},
        {"lambda_final": -1},
        {"lambda_ffn": math.inf},
        {"threshold": 0},
        {"threshold": 1},
        {"score_lr": 0},
        {"warmup": 0.7},
        {"cooldown": -0.1},
        {"neuron_multiple": 0},
        {"keep_weights": 0, "keep": None},
        {"keep": 0.5, "keep_weights": 0.1},
        {"fill": True, "keep_weights": 0.1, "keep": None},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Movement(**options)
