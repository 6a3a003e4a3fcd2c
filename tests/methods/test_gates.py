"""Gates: the hard concrete by hand, the expected cost by its definition, each way to reach a size, and runs through the real loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny
from torch import nn
from toy_task import context, fit, rows, with_model
from transformers import AutoConfig, AutoModel, PreTrainedModel

from slimformer.core import cost
from slimformer.core.anatomy import Kind
from slimformer.core.budget import leading, strongest
from slimformer.core.plan import Decision, Plan
from slimformer.data.batching import collate, epoch_order
from slimformer.errors import TargetError
from slimformer.families.base import anatomy_of
from slimformer.hooks.capture import Captured
from slimformer.hooks.gating import gated
from slimformer.log import Log
from slimformer.methods import gates
from slimformer.methods.base import Context, Method, Progress, State, Step
from slimformer.methods.gates import Gates
from slimformer.testing.checks import tiny_context
from slimformer.training import loop as training
from slimformer.training import runstate
from slimformer.training.devices import step_seed
from slimformer.training.stage import Train
from slimformer.training.step import rate

QUIET = Log(None, quiet=True)
FROZEN = Train(epochs=2, batch_size=16, precision="fp32", freeze="everything")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose by sharing work, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pressed(method: Gates, around: Context, steps: int = 400) -> tuple[State, Decision]:
    """Gates trained on their penalty alone: no forward pass, so the loss is flat and only the size speaks."""
    state = method.attach(around)
    optimizer = torch.optim.AdamW(state.groups())
    rates = [group["lr"] for group in optimizer.param_groups]
    for number in range(steps):
        for group, base in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = base * rate(number, steps, 0.1)
        step = Step(around.model, {}, Captured(output={}), None, Progress(number, steps), around.task)
        optimizer.zero_grad()
        method.penalty(state, step).backward()
        optimizer.step()
        method.advance(state, Progress(number + 1, steps))
    decision = method.decide(state, around)
    state.close()
    return state, decision


def priced(unit: str) -> Context:
    """A tiny context whose cost is counted in `unit`; the latencies are made up, uneven and with a fixed part."""
    around = tiny_context()
    table = {Kind.HEADS: {1: 0.5, 2: 0.7, 3: 1.1, 4: 1.4}, Kind.NEURONS: {6: 0.4, 12: 0.9, 24: 2.0}}
    costs = {
        "macs": around.cost,
        "parameters": cost.parameters(around.model, around.anatomy),
        "latency": cost.latency(around.anatomy, 0.3, table),
    }
    return replace(around, cost=costs[unit])


# -- The hard concrete -----------------------------------------------------------------------------------------------------------


def test_hard_concrete_by_hand():
    zero = torch.zeros(1)
    assert gates.settled(zero).item() == pytest.approx(0.5)  # sigmoid(0) * 1.2 - 0.1
    assert gates.sampled(zero, torch.tensor([0.5])).item() == pytest.approx(0.5)
    assert gates.opening(zero).item() == pytest.approx(1 / (1 + math.exp(2 / 3 * math.log(0.1 / 1.1))))
    assert gates.settled(torch.tensor([9.0, -9.0])).tolist() == [1.0, 0.0]
    # u = 0.8, log alpha = -1: logit(0.8) = log 4; (log 4 - 1) * 3/2 = 0.5794; sigmoid 0.6409; * 1.2 - 0.1
    assert gates.sampled(torch.tensor([-1.0]), torch.tensor([0.8])).item() == pytest.approx(0.66915, abs=1e-4)


def test_noise_at_its_ends_gives_numbers_and_slopes():
    """A draw counts as 1e-4 or 1 - 1e-4 at most: no gate is moved by an endless logit, one far open never closes."""
    ends, far = torch.tensor([0.0, 1e-4, 1 - 1e-4, 1.0]), math.log((1 - 1e-4) / 1e-4)  # the logit of 1 - 1e-4
    half = gates.sampled(torch.tensor([far, far, -far, -far]), ends)
    assert half.tolist() == pytest.approx([0.5] * 4, abs=1e-3)
    log_alpha = torch.tensor([20.0, far, -far, -20.0], requires_grad=True)
    drawn = gates.sampled(log_alpha, ends[[0, 0, 3, 3]])
    assert drawn.tolist() == pytest.approx([1.0, 0.5, 0.5, 0.0], abs=1e-3)
    drawn.sum().backward()
    assert log_alpha.grad.tolist() == pytest.approx([0.0, 0.45, 0.45, 0.0], abs=1e-3)  # 1.2 / 4 * 3 / 2


def test_opening_is_the_share_of_samples_above_zero():
    log_alpha = torch.full((200_000,), -0.7)
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    share = (gates.sampled(log_alpha, uniform) > 0).float().mean().item()
    assert share == pytest.approx(gates.opening(log_alpha[:1]).item(), abs=0.005)


def test_noise_in_training_none_in_evaluation():
    around = tiny_context()
    state = Gates(start=0.5).attach(around)
    inputs = next(around.batches(4))
    given = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(around.model(**given).logits, around.model(**given).logits)
        around.model.train()
        for module in around.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        assert not torch.equal(around.model(**given).logits, around.model(**given).logits)
    state.close()


# -- Expected size -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["macs", "parameters", "latency"])
def test_expected_cost_with_open_gates_is_nearly_dense(unit):
    around = priced(unit)
    for units in ("heads", "neurons", "both"):
        method = Gates(start=12.0, units=units, keep=0.9)
        state = method.attach(around)
        assert method.report(state)["cost"] == pytest.approx(1.0, abs=1e-3)
        state.close()


@pytest.mark.parametrize(("start", "left"), [(20.0, 3 * (1.4 + 2.0)), (-20.0, 0.0)])
def test_gates_that_are_surely_open_cost_all_and_shut_ones_nothing(start, left):
    """At 20 the chance rounds to 1: the expected number is the last of its curve."""
    around = priced("latency")
    method = Gates(start=start, keep=0.9)
    state = method.attach(around)
    assert method.report(state)["cost"] == pytest.approx((0.3 + left) / around.cost.dense, abs=1e-6)
    state.close()


def test_expected_cost_is_the_curve_at_the_expected_number():
    around = priced("latency")
    state = Gates(units="heads", keep=0.9).attach(around)
    p = 2.6 / 4  # 2.6 open heads a layer: 0.7 + 0.6 * (1.1 - 0.7) ms
    with torch.no_grad():
        for value in state.log_alpha:
            value.fill_(math.log(p / (1 - p)) + gates._SHIFT)
    assert state.expected((Kind.HEADS,)).item() == pytest.approx(3 * 0.94 / around.cost.dense, rel=1e-4)
    assert state.fixed == pytest.approx((0.3 + 3 * 2.0) / around.cost.dense)
    state.close()


def test_the_penalty_is_a_mean_per_kind_and_rises():
    around = tiny_context()
    method = Gates(size="top_k", lambda_heads=0.3, lambda_neurons=5.0, ramp=0.5)
    state = method.attach(around)
    with torch.no_grad():
        for site, value in zip(state.sites, state.log_alpha, strict=True):
            value.fill_(1.0 if site.kind is Kind.HEADS else -1.0)
    step = Step(around.model, {}, Captured(output={}), None, Progress(0, 100), around.task)
    assert method.penalty(state, step).item() == 0
    whole = 0.3 * gates.opening(torch.tensor(1.0)) + 5.0 * gates.opening(torch.tensor(-1.0))
    for done, share in ((25, 0.5), (50, 1.0), (100, 1.0)):
        method.advance(state, Progress(done, 100))
        assert method.penalty(state, step).item() == pytest.approx(share * whole.item(), rel=1e-5)
    state.close()


# -- Reaching a size ---------------------------------------------------------------------------------------------------------------


def test_multipliers_climb_and_the_cost_reaches_its_target():
    around = tiny_context()
    method = Gates(keep=0.5, lr=0.1, multiplier_lr=0.2, ramp=0.3)
    state, decision = pressed(method, around)
    assert method.report(state)["goal"] == pytest.approx(0.5)
    assert method.report(state)["cost"] == pytest.approx(0.5, abs=0.02)  # within 2 % of the dense cost
    assert around.cost.of(decision.plan, around.anatomy) <= 0.5 * around.cost.dense


@pytest.mark.parametrize(("unit", "target"), [("macs", 0.5), ("parameters", 0.75), ("latency", 0.5)])
def test_kinds_apart_come_down_in_proportion(unit, target):
    around = priced(unit)
    method = Gates(keep=target, multiplier_lr=0.2, ramp=0.3, apart=True)
    state, _ = pressed(method, around, steps=800)
    assert method.report(state)["cost"] == pytest.approx(target, abs=0.02)
    left = [state.expected((kind,)).item() / share for kind, share in state.shares.items()]
    assert left[0] == pytest.approx(left[1], abs=0.04)
    assert left[0] == pytest.approx((target - state.fixed) / (1 - state.fixed), abs=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["macs", "parameters", "latency"])
@pytest.mark.parametrize("size", ["lagrangian", "top_k"])
def test_the_plan_of_a_bert_large_is_within_two_percent_of_its_target(large, unit, size):
    anatomy, counted = large
    table = {Kind.HEADS: {1: 0.9, 4: 1.7, 9: 4.1, 16: 6.2}, Kind.NEURONS: {64: 0.4, 1024: 3.1, 2048: 3.2, 4096: 11.0}}
    costs = {"macs": cost.macs(anatomy, np.array([384])), "parameters": counted, "latency": cost.latency(anatomy, 5.0, table)}
    around = tiny_context()
    around = replace(with_model(around, around.model, anatomy), cost=costs[unit])
    draw = torch.Generator().manual_seed(1)
    for target in (0.4, 0.75):
        method = Gates(keep=target, size=size, sublayers=False)
        values = {site.id: 3 * torch.randn(site.size, generator=draw) for site in method.sites(anatomy)}
        left = around.cost.of(method.choose(around.anatomy, around.cost, values), anatomy) / around.cost.dense
        assert 0.98 * target <= left <= target


def test_top_k_is_the_longest_prefix_of_one_ranking_that_fits():
    around = priced("parameters")
    anatomy, counted = around.anatomy, around.cost
    draw = np.random.default_rng(0)
    score = {site.id: draw.normal(size=site.size) for site in Gates().sites(anatomy)}
    ranking = sorted(((value, name, unit) for name, values in score.items() for unit, value in enumerate(values)), reverse=True)
    for target in (0.5, 0.62, 0.9, 1.0):
        best = None
        for k in range(len(ranking) + 1):
            kept = {name: tuple(sorted(unit for _, n, unit in ranking[:k] if n == name)) for name in score}
            plan = Plan({anatomy.sites[name].sublayer if not units else name: units for name, units in kept.items()})
            if counted.of(plan, anatomy) <= target * counted.dense:
                best = plan
        found = strongest(anatomy, score, counted, target * counted.dense)
        assert anatomy.after(found) == anatomy.after(best)
        whole = {name: tuple(range(site.size)) for name, site in anatomy.sites.items()}
        assert {**whole, **found.keep} == {**whole, **best.keep}


def test_widths_stay_at_multiples_and_sublayers_where_they_must():
    around = tiny_context()
    score = {site.id: -np.arange(site.size, dtype=float) for site in Gates().sites(around.anatomy)}
    counts = {"encoder.0.neurons": 13, "encoder.1.neurons": 1, "encoder.2.neurons": 23, "encoder.0.heads": 0}
    plan = leading(around.anatomy, score, counts, neuron_multiple=8, sublayers=False)
    assert {name: len(kept) for name, kept in plan.keep.items()} == {
        "encoder.0.neurons": 16,
        "encoder.1.neurons": 8,
        "encoder.0.heads": 1,
    }
    assert plan.keep["encoder.0.heads"] == (0,)
    gone = leading(around.anatomy, score, counts, neuron_multiple=8)
    assert gone.keep == {"encoder.0.neurons": tuple(range(16)), "encoder.1.ffn": (), "encoder.0.attention": ()}


def test_threshold_keeps_what_is_more_open_than_shut():
    around = tiny_context()
    method = Gates(size="threshold", neuron_multiple=1, keep=0.01)
    values = {site.id: torch.full((site.size,), 3.0) for site in method.sites(around.anatomy)}
    values["encoder.0.heads"] = torch.tensor([-1.0, 0.1, -0.1, 2.0])
    values["encoder.2.neurons"] = torch.full((24,), -0.5)
    assert [name for name, value in values.items() if (gates.settled(value) <= 0.5).any()] == [
        "encoder.0.heads",
        "encoder.2.neurons",
    ]
    assert method.choose(around.anatomy, around.cost, values).keep == {"encoder.0.heads": (1, 3), "encoder.2.ffn": ()}


@pytest.mark.parametrize("size", ["lagrangian", "top_k"])
def test_a_target_out_of_reach_is_told_before_training(size):
    with pytest.raises(TargetError, match="cannot be reached"):
        Gates(keep=0.4, size=size, units="heads").attach(priced("parameters"))


@pytest.mark.parametrize("size", ["lagrangian", "top_k"])
def test_a_target_that_would_leave_nothing_is_told_before_training(size):
    with pytest.raises(TargetError, match="nothing of the encoder would be left"):
        Gates(keep=0.01, size=size).attach(tiny_context())


def test_penalties_that_close_no_gate_are_told():
    method = Gates(size="threshold")
    around = tiny_context()
    state = method.attach(around)
    with pytest.raises(TargetError, match=r"no gate closed, nothing is cut: the lowest settled gate is 1\.00") as caught:
        method.decide(state, around)
    state.close()
    assert "lambda_heads" in caught.value.help


def test_a_lagrangian_that_had_no_time_says_so():
    around = tiny_context()
    _, short = pressed(Gates(keep=0.5), around, steps=20)
    (note,) = short.notes
    assert "not to 50%" in note
    assert "Train longer" in note
    assert pressed(Gates(keep=0.5), around)[1].notes == ()


# -- A share of each kind ----------------------------------------------------------------------------------------------------------

EACH = Gates(keep=None, keep_heads=0.56, keep_neurons=0.4)


@pytest.mark.parametrize("size", ["lagrangian", "top_k"])
@pytest.mark.parametrize("heads", [0.56, 7 / 12])  # 7 / 12 of 12 falls short of 7 by rounding
def test_each_kind_keeps_its_share_of_the_highest_log_alpha(size, heads):
    around = priced("latency")  # what units cost does not matter
    anatomy = around.anatomy
    method = replace(EACH, size=size, keep_heads=heads, neuron_multiple=1)
    draw = torch.Generator().manual_seed(2)
    values = {site.id: torch.randn(site.size, generator=draw) for site in method.sites(anatomy)}
    values["encoder.1.heads"] -= 9
    plan = method.choose(anatomy, around.cost, values)
    for kind, count in ((Kind.HEADS, 6 if heads == 0.56 else 7), (Kind.NEURONS, 28)):  # of 12 and of 72
        sites = anatomy.of_kind(kind)
        ranking = sorted(
            ((float(value), site.id, u) for site in sites for u, value in enumerate(values[site.id])), reverse=True
        )
        expected = {(name, unit) for _, name, unit in ranking[:count]}
        kept = {site.id: () if site.sublayer in plan.keep else plan.keep.get(site.id, range(site.size)) for site in sites}
        assert {(name, unit) for name, units in kept.items() for unit in units} == expected
    assert plan.keep["encoder.1.attention"] == ()


def test_widths_are_multiples_and_no_kind_keeps_more_than_its_share():
    anatomy = tiny_context().anatomy
    draw = torch.Generator().manual_seed(3)
    for share in (0.3, 0.5, 0.75, 1.0):
        method = replace(EACH, keep_neurons=share, neuron_multiple=4, sublayers=False)
        values = {site.id: torch.randn(site.size, generator=draw) for site in method.sites(anatomy)}
        plan = method.choose(anatomy, tiny_context().cost, values)
        widths = [len(plan.keep.get(f"encoder.{layer}.neurons", range(24))) for layer in range(3)]
        assert all(width % 4 == 0 for width in widths)
        assert 72 * share - 4 < sum(widths) <= 72 * share


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_multipliers_of_each_kind_drive_it_to_its_own_share(apart):
    around = tiny_context()
    method = replace(EACH, multiplier_lr=0.2, ramp=0.3, apart=apart)
    state, decision = pressed(method, around, steps=800 if apart else 400)
    found = method.report(state)
    assert len(state.multipliers) == 2
    assert (found["goal_heads"], found["goal_neurons"]) == (pytest.approx(0.56), pytest.approx(0.4))
    assert found["open_heads"] == pytest.approx(0.56, abs=0.03)
    assert found["open_neurons"] == pytest.approx(0.4, abs=0.03)
    assert decision.notes == ()


def test_a_kind_that_had_no_time_is_named():
    _, short = pressed(EACH, tiny_context(), steps=20)
    assert ["expected share of open heads" in note for note in short.notes] == [True, False]
    assert "not to 40%" in short.notes[1]


def test_a_share_of_heads_out_of_reach_is_told_before_training():
    with pytest.raises(TargetError, match="the budget of 1 heads cannot be reached: 3 remain"):
        Gates(units="heads", keep=None, keep_heads=0.1, sublayers=False).attach(tiny_context())


@pytest.mark.parametrize("seed", range(3))
def test_the_plan_keeps_the_gates_that_are_open(seed):
    """Where open gates cost as much as the target, they are the plan: a head counts for what it costs, as each of its neurons does."""
    around = tiny_context()
    method = Gates(neuron_multiple=1, sublayers=False)
    draw = torch.Generator().manual_seed(seed)
    wanted = {site.id: torch.rand(site.size, generator=draw) < 0.5 for site in method.sites(around.anatomy)}
    for open_units in wanted.values():
        open_units[0] = True
    plan = Plan({name: tuple(np.flatnonzero(value.numpy()).tolist()) for name, value in wanted.items() if not value.all()})
    target = around.cost.of(plan, around.anatomy) / around.cost.dense
    found = replace(method, keep=target * 1.001).choose(
        around.anatomy, around.cost, {n: torch.where(v, 4.0, -4.0) for n, v in wanted.items()}
    )
    assert found.keep == plan.keep


def test_gates_that_stay_are_one_or_folded():
    around = tiny_context()
    for fold in (False, True):
        method = Gates(keep=1.0, size="top_k", fold=fold, start=0.4)
        state = method.attach(around)
        decision = method.decide(state, around)
        state.close()
        assert set(decision.scales) == ({site.id for site in state.sites} if fold else set())
    assert decision.scales["encoder.0.heads"].tolist() == pytest.approx([1.2 / (1 + math.exp(-0.4)) - 0.1] * 4)


# -- Runs through the real loop ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stop(Method):
    """Stops the run after some steps."""

    after: int | None = None

    def __repr__(self) -> str:
        return "Stop()"  # where it stops is no part of the work

    def advance(self, state: State, progress: Progress) -> None:
        if progress.step == self.after:
            raise KeyboardInterrupt


def undropped(model_type: str) -> PreTrainedModel:
    return tiny(model_type, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def run(
    folder: Path, method: Gates, settings: Train = FROZEN, stop: int | None = None, model_type: str = "bert"
) -> tuple[Context, training.Trained, dict[str, torch.Tensor]]:
    """A run on the toy task without dropout; what it leaves, and each log alpha as its last state on disk has it."""
    features = rows(96)
    around = context(undropped(model_type), features)
    result = fit(around, features, (method, Stop(stop)), settings, folder, QUIET)
    saved = runstate.latest_state(folder)
    assert saved is not None
    names = [site.id for site in method.sites(around.anatomy)]
    return around, result, {name: saved.tensors[f"states.0.log_alpha.{i}"] for i, name in enumerate(names)}


@pytest.mark.parametrize(("size", "model_type"), [("lagrangian", "bert"), ("top_k", "bert"), ("top_k", "roberta")])
def test_frozen_weights_stay_bit_for_bit_while_gates_move(tmp_path, size, model_type):
    around, result, values = run(tmp_path, Gates(keep=0.9, size=size, fold=False), model_type=model_type)
    before = undropped(model_type).state_dict()
    after = around.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in around.model.parameters())
    assert all(len(value.unique()) > 1 for value in values.values())
    assert result.decision.plan.keep
    assert not result.decision.scales
    assert not result.decision.weights


def alone(method: Gates, first: int, settings: Train = FROZEN) -> dict[str, torch.Tensor]:
    """A run of one kind of gates by hand: every second batch, with the rates and the noise that those steps have in the loop."""
    features = rows(96)
    around = context(undropped("bert"), features)
    model, anatomy = around.model.requires_grad_(False), around.anatomy
    sites = method.sites(anatomy)
    price = method.lambda_heads if method.units == "heads" else method.lambda_neurons
    values = {site.id: nn.Parameter(torch.full((site.size,), method.start)) for site in sites}
    optimizer = torch.optim.AdamW(list(values.values()), weight_decay=0.0)
    total = settings.steps_of(len(features))
    per_epoch = math.ceil(len(features) / settings.batch_size)
    for step in range(first, total, 2):
        order = epoch_order(features.lengths(), settings.batch_size, 17, step // per_epoch)
        batch = {name: torch.from_numpy(array) for name, array in collate(features, order[step % per_epoch]).items()}
        optimizer.param_groups[0]["lr"] = method.lr * rate(step, total, settings.warmup)
        torch.manual_seed(step_seed(17, 0, step))
        drawn = {name: gates.sampled(value, torch.rand_like(value)) for name, value in values.items()}
        with gated(model, anatomy, drawn):
            loss = around.task.loss(model(**{name: value for name, value in batch.items() if name != "labels"}), batch)
        done = min(1.0, step / total / method.ramp)
        loss = loss + done * price * torch.cat([gates.opening(value) for value in values.values()]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.detach() for name, value in values.items()}


def test_apart_is_two_runs_of_their_own(tmp_path):
    method = Gates(size="top_k", apart=True, keep=0.9, lambda_heads=0.7, lambda_neurons=2.0)
    _, _, found = run(tmp_path, method)
    for first, units in enumerate(("heads", "neurons")):
        expected = alone(replace(method, units=units, apart=False), first)
        for name, value in expected.items():
            assert not torch.equal(value, torch.full_like(value, method.start))
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0)


def test_apart_neither_kind_feels_the_other(tmp_path):
    method = Gates(size="top_k", apart=True, keep=0.9)
    _, _, one = run(tmp_path / "one", method)
    _, _, other = run(tmp_path / "other", replace(method, lambda_neurons=30.0))
    for name, value in one.items():
        assert torch.equal(value, other[name]) == name.endswith("heads")


@pytest.mark.parametrize("budget", [{"keep": 0.9}, {"keep": None, "keep_heads": 0.9, "keep_neurons": 0.8}])
def test_adam_leaves_gates_alone_that_are_not_at_work(budget):
    around = context()
    method = Gates(apart=True, size="lagrangian", ramp=0.0, **budget)
    state = method.attach(around)
    optimizer = torch.optim.AdamW(state.groups(), fused=True)
    batch = next(around.batches(16))
    labels = batch.pop("labels")
    around.model.train()
    with torch.no_grad():  # at first 0: a site whose gates were all drawn open would then have no gradient at all
        for multiplier in state.multipliers:
            multiplier.fill_(1.0)
    for number in range(4):
        before = {name: value.clone() for name, value in state.named_parameters()}
        loss = torch.nn.functional.cross_entropy(around.model(**batch).logits, labels)
        step = Step(around.model, {}, Captured(output={}), None, Progress(number, 4), around.task)
        (loss + method.penalty(state, step)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.advance(state, Progress(number + 1, 4))
        moved = {name for name, value in state.named_parameters() if not torch.equal(value, before[name])}
        kind = (Kind.HEADS, Kind.NEURONS)[number % 2]
        mine = {f"log_alpha.{index}" for index, site in enumerate(state.sites) if site.kind is kind}
        assert moved == mine | {f"multipliers.{number % 2}"}
    state.close()


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 8])
@pytest.mark.parametrize("size", ["lagrangian", "top_k"])
def test_a_stopped_run_ends_with_the_same_gates(tmp_path, monkeypatch, stop, size):
    monkeypatch.setattr(training, "STATE_SECONDS", 0.0)
    monkeypatch.setattr(training, "STATE_SHARE", math.inf)  # a state after each step
    settings = replace(FROZEN)
    method = Gates(apart=True, size=size, keep=0.9)
    _, expected, straight = run(tmp_path / "straight", method, settings)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", method, settings, stop=stop)
    state = runstate.latest_state(tmp_path / "stopped")
    assert state is not None
    assert state.step == stop - 1
    _, result, resumed = run(tmp_path / "stopped", method, settings)
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())
    assert result.losses == expected.losses
    assert result.decision.plan == expected.decision.plan


# -- The paper's own sums ------------------------------------------------------------------------------------------------------------

# McCarley et al., BERT-large on SQuAD 2.0: shares of heads and neurons removed, MiB of float32 weights
ROWS = [
    (0.0, 0.0, 1279),
    (0.443, 0.0, 1112),
    (0.0, 0.481, 908),
    (0.440, 0.481, 740),
    (0.531, 0.649, 576),
    (0.576, 0.737, 492),
    (0.601, 0.784, 441),
]


@pytest.fixture(scope="module")
def large():
    config = AutoConfig.for_model(
        "bert", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    with torch.device("meta"):
        model = AutoModel.from_config(config)  # with its pooler, as theirs had
    anatomy = anatomy_of(model)
    return anatomy, cost.parameters(model, anatomy)


@pytest.mark.parametrize(("heads", "neurons", "mebibytes"), ROWS)
def test_sizes_are_those_of_the_paper(large, heads, neurons, mebibytes):
    anatomy, counted = large
    draw = np.random.default_rng(0)
    keep: dict[str, list[int]] = {}
    for kind, removed in ((Kind.HEADS, heads), (Kind.NEURONS, neurons)):
        units = [(site.id, unit) for site in anatomy.of_kind(kind) for unit in range(site.size)]
        for index in np.sort(draw.permutation(len(units))[: round((1 - removed) * len(units))]):
            keep.setdefault(units[index][0], []).append(units[index][1])
    plan = Plan({name: tuple(units) for name, units in keep.items()})
    plan.check(anatomy)
    size = counted.of(plan, anatomy) * 4 / 2**20
    assert size == pytest.approx(mebibytes, rel=0.01)
    assert size == pytest.approx(1278.5 - 384 * heads - 768 * neurons, abs=1.5)


@pytest.mark.parametrize(("heads", "neurons", "mebibytes"), [ROWS[3], ROWS[-1]])
def test_the_papers_rows_can_be_asked_for(large, heads, neurons, mebibytes):
    anatomy, counted = large
    method = Gates(keep=None, keep_heads=1 - heads, keep_neurons=1 - neurons, size="top_k", sublayers=False, neuron_multiple=1)
    draw = torch.Generator().manual_seed(0)
    values = {site.id: torch.randn(site.size, generator=draw) for site in method.sites(anatomy)}
    plan = method.choose(anatomy, counted, values)
    for kind, removed in ((Kind.HEADS, heads), (Kind.NEURONS, neurons)):
        sites = anatomy.of_kind(kind)
        left = sum(len(plan.keep.get(site.id, range(site.size))) for site in sites)
        assert left == math.floor((1 - removed) * sum(site.size for site in sites) + 1e-9)
    assert counted.of(plan, anatomy) * 4 / 2**20 == pytest.approx(mebibytes, rel=0.01)


# -- Options -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0},
        {"keep": 2},
        {"ramp": -0.1},
        {"units": "layers"},
        {"size": "bisection"},
        {"apart": True, "units": "heads"},
        {"lambda_heads": -1.0},
        {"lambda_neurons": math.inf},
        {"multiplier_lr": -0.1},
        {"lr": 0.0},
        {"start": math.nan},
        {"neuron_multiple": 0},
        {"keep_heads": 0, "keep": None},
        {"keep": None},
        {"keep": 0.5, "keep_heads": 0.5, "keep_neurons": 0.5},
        {"keep_heads": 0.5, "keep": None},
        {"keep_neurons": 0.5, "keep": None, "units": "heads"},
        {"keep_heads": 0.5, "keep_neurons": 0.5, "keep": None, "size": "threshold"},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Gates(**options)
