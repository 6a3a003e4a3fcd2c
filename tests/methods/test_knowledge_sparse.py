"""Knowledge-aware sparse pruning: schedule and masks by hand, second-order scores by brute force, every pattern, resuming."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from tiny import ENCODERS, batch, tiny
from toy_task import context, fit, rows, with_model

from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.errors import RecipeError
from slimformer.families.base import anatomy_of, subject_of
from slimformer.log import Log
from slimformer.methods._ranking import highest
from slimformer.methods.base import Method, Progress, State
from slimformer.methods.distillation import Distillation
from slimformer.methods.keep_zeros import KeepZeros
from slimformer.methods.knowledge_sparse import KnowledgeSparse, Pattern, curvature, measure_curvature, woodbury
from slimformer.saving.tensors import model_digest
from slimformer.testing.checks import tiny_context
from slimformer.training import loop as training
from slimformer.training import runstate
from slimformer.training.stage import Train

QUIET = Log(None, quiet=True)
QUERY = "bert.encoder.layer.1.attention.self.query.weight"
FFN_IN = "bert.encoder.layer.1.intermediate.dense.weight"


def run_through(method: KnowledgeSparse, state: State, total: int = 40) -> None:
    """All steps of a training in which no weight moves."""
    for step in range(total):
        method.advance(state, Progress(step + 1, total))


def masks_of(state: State) -> dict[str, torch.Tensor]:
    return {mask.parameter: mask.open for mask in state.each()}


def test_the_highest_are_exactly_as_many_as_asked_the_first_of_equal_ones():
    scores = torch.tensor([2.0, 5.0, 2.0, -1.0, 2.0, math.inf])
    assert highest(scores, 3).tolist() == [True, True, False, False, False, True]
    assert highest(scores, 5).tolist() == [True, True, True, False, True, True]
    assert not highest(scores, 0).any()


def test_the_published_schedule_and_masks_by_hand():
    """Cubic in the number of updates; each matrix to the same density; the lowest magnitudes go and stay away."""
    around = tiny_context()
    method = KnowledgeSparse(keep=0.1, updates=4)
    state = method.attach(around)
    query = dict(around.model.named_parameters())[QUERY]
    expected, gone = [], torch.zeros(query.numel(), dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 9):
        with torch.no_grad():
            query.copy_(torch.randn(query.shape, generator=generator))
        method.advance(state, Progress(step, 8))
        if step % 2 == 0:
            left = round((0.1 + 0.9 * (1 - step / 8) ** 3) * query.numel())
            magnitudes = torch.where(gone, -1.0, query.detach().abs().flatten())
            gone = torch.ones_like(gone).index_fill(0, magnitudes.topk(left).indices, False)
            expected.append(left)
        assert torch.equal(masks_of(state)[QUERY].flatten(), ~gone)
    assert expected == [491, 218, 117, 102]
    decision = method.decide(state, around)
    state.close()
    assert decision.plan == Plan()
    assert {int((weight != 0).sum()) / weight.numel() for weight in decision.weights.values()} <= {102 / 1024, 77 / 768}
    assert len(decision.weights) == 3 * 6
    assert torch.equal(decision.weights[QUERY].flatten(), torch.where(gone, 0.0, query.detach().flatten()))


def test_one_threshold_for_the_whole_model():
    around = tiny_context()
    parameters = dict(around.model.named_parameters())
    with torch.no_grad():
        parameters[QUERY].mul_(1e-6)
    method = KnowledgeSparse(keep=0.2, scope="model")
    state = method.attach(around)
    run_through(method, state)
    decision = method.decide(state, around)
    state.close()
    assert not decision.weights[QUERY].any()
    left = torch.cat([weight.flatten() for weight in decision.weights.values()])
    before = torch.cat([parameters[name].detach().flatten() for name in decision.weights])
    assert int((left != 0).sum()) == round(0.2 * len(left)) == round(method.report(state)["open"] * len(left))
    assert float(left[left != 0].abs().min()) >= float(before[left == 0].abs().max())


@pytest.mark.parametrize("scope", ["matrix", "model"])
@pytest.mark.parametrize(("pattern", "keep", "of"), [("2:4", 2, 4), ("1:4", 1, 4), ("3:8", 3, 8)])
def test_n_of_m_inputs_are_the_largest_of_their_group(pattern, keep, of, scope):
    around = tiny_context()
    method = KnowledgeSparse(pattern=pattern, scope=scope)
    state = method.attach(around)
    run_through(method, state, 10)
    decision = method.decide(state, around)
    state.close()
    for name, weight in decision.weights.items():
        before = dict(around.model.named_parameters())[name].detach().reshape(-1, of)
        best = torch.zeros_like(before, dtype=torch.bool).scatter(1, before.abs().topk(keep).indices, True)
        assert torch.equal(weight.reshape(-1, of) != 0, best)


def test_on_the_way_no_group_has_fewer_than_it_ends_with():
    around = tiny_context()
    method = KnowledgeSparse(pattern="2:4")
    state = method.attach(around)
    for step in range(1, 6):
        method.advance(state, Progress(step, 10))
        counts = masks_of(state)[QUERY].reshape(-1, 4).sum(1)
        assert int(counts.min()) >= 2
        assert set(counts.tolist()) == {2, 3, 4} or step > 3
    state.close()


@pytest.mark.parametrize(("pattern", "block"), [("1x4", (1, 4)), ("8x4", (8, 4)), ("4x1", (4, 1))])
def test_blocks_go_whole_the_smallest_norms_first(pattern, block):
    around = tiny_context()
    method = KnowledgeSparse(keep=0.25, pattern=pattern)
    state = method.attach(around)
    run_through(method, state)
    decision = method.decide(state, around)
    state.close()
    for name, weight in decision.weights.items():
        before = dict(around.model.named_parameters())[name].detach()
        tiles = [m.unfold(0, block[0], block[0]).unfold(1, block[1], block[1]).flatten(2) for m in (before, weight)]
        norms, left = tiles[0].square().sum(2), (tiles[1] != 0).all(2)
        assert torch.equal(left, (tiles[1] != 0).any(2))
        assert int(left.sum()) == round(0.25 * left.numel())
        assert float(norms[left].min()) >= float(norms[~left].max())


@pytest.mark.parametrize("model_type", ENCODERS)
def test_the_masked_model_is_the_one_with_zeros(model_type):
    around = tiny_context(model_type)
    method = KnowledgeSparse(keep=0.3)
    state = method.attach(around)
    run_through(method, state)
    inputs = batch(around.model)
    with torch.no_grad():
        expected = around.model(**inputs).logits
        decision = method.decide(state, around)
        state.close()
        assert not torch.allclose(around.model(**inputs).logits, expected, atol=1e-2)
        small = shrink(around.model, around.anatomy, decision)
        assert torch.equal(small(**inputs).logits, expected)
    for name in decision.weights:
        weight = dict(small.named_parameters())[name]
        assert bool((weight[weight == 0].view(torch.int32) == 0).all())  # no -0.0
    outside = set(dict(small.named_parameters())) - set(decision.weights)
    assert any("embeddings" in name for name in outside)
    assert any("classifier" in name or "out_proj" in name for name in outside)


def test_a_closed_weight_gets_no_gradient():
    around = tiny_context()
    method = KnowledgeSparse(keep=0.5)
    state = method.attach(around)
    run_through(method, state)
    query = dict(around.model.named_parameters())[QUERY]
    around.model(**batch(around.model)).logits.square().sum().backward()
    assert torch.equal(query.grad != 0, masks_of(state)[QUERY])
    state.close()


# -- Second order --------------------------------------------------------------------------------------------------------------


def test_woodbury_is_the_dense_inverse():
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(11, 3, 8, generator=generator, dtype=torch.float64)  # 11 of them, 3 blocks of 8 weights
    inverse = torch.eye(8, dtype=torch.float64).repeat(3, 1, 1) / 0.3
    for part in gradients.split(4):
        woodbury(inverse, part, 11)
    for block in range(3):
        dense = 0.3 * torch.eye(8, dtype=torch.float64) + sum(torch.outer(g, g) for g in gradients[:, block]) / 11
        torch.testing.assert_close(inverse[block], torch.linalg.inv(dense))
    expected = [torch.linalg.inv(inverse[b, c : c + 4, c : c + 4]) for b in range(3) for c in (0, 4)]
    torch.testing.assert_close(curvature(inverse, 4), torch.stack(expected))
    torch.testing.assert_close(curvature(inverse, 1).flatten(), 1 / inverse.diagonal(dim1=1, dim2=2).flatten())


def test_of_fewer_examples_than_asked_all_count_and_closed_weights_dampen_nothing():
    around = tiny_context()
    rows = sum(len(inputs["labels"]) for inputs in around.batches(10**6))
    found = []
    for examples in (rows, 10**6):
        state = KnowledgeSparse(score="fisher", fisher_block=16).attach(around)
        measure_curvature(state, examples, 16, 0.5)
        found.append(next(mask for mask in state.each() if mask.parameter == QUERY).curvature.clone())
        state.close()
    assert torch.equal(*found)
    state = KnowledgeSparse(score="fisher", fisher_block=16).attach(around)
    (mask,) = [mask for mask in state.each() if mask.parameter == QUERY]
    mask.open[:, 16:] = False  # whole blocks: in what is open nothing but the dampening could change
    gradients = []
    for inputs in around.batches(12):
        for row in range(len(inputs["labels"])):
            output = around.model(input_ids=inputs["input_ids"][[row]], attention_mask=inputs["attention_mask"][[row]])
            weight = state.weights[QUERY]
            gradients.append(torch.autograd.grad(around.task.loss(output, {"labels": inputs["labels"][[row]]}), weight)[0])
    measure_curvature(state, 12, 16, 0.5)
    state.close()
    opened = torch.stack(gradients)[:, :, :16].double()
    lam = 0.5 * opened[:8].square().mean()
    for row in range(32):
        inverse = torch.linalg.inv(lam * torch.eye(16, dtype=torch.float64) + opened[:, row].T @ opened[:, row] / 12)
        torch.testing.assert_close(mask.curvature[row, :16].flatten(), (1 / inverse.diagonal()).float(), rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize(("pattern", "size"), [("unstructured", 16), ("1x4", 8), ("2x4", 20), ("1:4", 16)])
def test_damage_is_the_quadratic_form_of_a_dense_fisher_inverse(pattern, size):
    """The whole way, gradients of single examples included, against dense inverses; 20 does not divide 32 columns."""
    around = tiny_context()
    method = KnowledgeSparse(pattern=pattern, score="fisher", fisher_block=size, fisher_examples=12, dampening=0.5)
    state = method.attach(around)
    measure_curvature(state, 12, size, 0.5)
    mask = next(mask for mask in state.each() if mask.parameter == QUERY)
    weight = dict(around.model.named_parameters())[QUERY]
    found = mask.damages(weight.detach())
    gradients = []
    for inputs in around.batches(12):
        for row in range(len(inputs["labels"])):
            output = around.model(input_ids=inputs["input_ids"][[row]], attention_mask=inputs["attention_mask"][[row]])
            loss = around.task.loss(output, {"labels": inputs["labels"][[row]]})
            gradients.append(torch.autograd.grad(loss, weight)[0].double())
    state.close()
    gradients = torch.stack(gradients)
    assert len(gradients) == 12
    height, width = Pattern.parse(pattern).rows, Pattern.parse(pattern).columns
    ends = -(-32 // size) * size
    lam = 0.5 * gradients[:8].square().sum() / (8 * 32 * ends)  # of the first 8, padding counted
    expected = torch.zeros(32 // height, 32 // width, dtype=torch.float64)
    for row in range(32):
        for start in range(0, 32, size):
            part = slice(start, min(32, start + size))
            g = gradients[:, row, part]
            inverse = torch.linalg.inv(lam * torch.eye(g.shape[1], dtype=torch.float64) + g.T @ g / 12)
            for column in range(0, g.shape[1], width):
                q = slice(column, column + width)
                w = weight.detach().double()[row, part][q]
                expected[row // height, (start + column) // width] += w @ torch.linalg.inv(inverse[q, q]) @ w / 2
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=1e-9)


def test_second_order_keeps_what_the_loss_feels():
    """Weights on an input that is always 0 go first, though they are large."""
    around = tiny_context()
    value = "bert.encoder.layer.1.attention.self.value.weight"
    with torch.no_grad():
        dict(around.model.named_parameters())["bert.encoder.layer.0.output.LayerNorm.weight"][5] = 0
        dict(around.model.named_parameters())["bert.encoder.layer.0.output.LayerNorm.bias"][5] = 0
        dict(around.model.named_parameters())[value][:, 5] = 0.5  # times an input of 0
    kept = {}
    for score in ("magnitude", "fisher"):
        method = KnowledgeSparse(keep=0.5, score=score, fisher_examples=16, fisher_block=8, dampening=1e-4)
        state = method.attach(around)
        run_through(method, state, 3)
        kept[score] = masks_of(state)[value][:, 5].float().mean().item()
        state.close()
    assert kept == {"magnitude": 1.0, "fisher": 0.0}


def test_labels_of_each_word_are_read_beside_padding():
    from slimformer.methods.knowledge_sparse import _gradients

    class Tags:
        def loss(self, output, batch):
            return torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten())

    model = tiny("bert", auto_class="AutoModelForTokenClassification")
    inputs = batch(model, rows=3, seq=6)
    lengths = inputs["attention_mask"].sum(1)
    assert len(lengths.unique()) > 1
    inputs["labels"] = torch.randint(0, 3, (3, 6)).masked_fill(inputs["attention_mask"] == 0, -100)
    around = dataclasses.replace(tiny_context(), subject=subject_of(model), task=Tags())
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    for row, (found,) in enumerate(_gradients(around, [weight], [inputs])):
        alone = {name: value[row : row + 1, : lengths[row]] for name, value in inputs.items()}
        loss = Tags().loss(model(input_ids=alone["input_ids"]), alone)
        torch.testing.assert_close(found, torch.autograd.grad(loss, weight)[0], atol=1e-6, rtol=1e-4)


def test_fisher_is_measured_as_often_as_asked(monkeypatch):
    from slimformer.methods import knowledge_sparse

    seen = []
    monkeypatch.setattr(knowledge_sparse, "measure_curvature", lambda *_: seen.append(True))
    for refreshes, expected in ((1, 1), (3, 3), (99, 6)):
        seen.clear()
        method = KnowledgeSparse(score="fisher", updates=6, refreshes=refreshes, fisher_block=8)
        state = method.attach(tiny_context())
        run_through(method, state, 18)
        state.close()
        assert len(seen) == expected


# -- In training ---------------------------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("options", [{}, {"score": "fisher", "fisher_block": 8, "fisher_examples": 12, "refreshes": 2}])
def test_a_stopped_run_ends_with_the_same_numbers(tmp_path, monkeypatch, options):
    monkeypatch.setattr(training, "STATE_SECONDS", 0.0)
    monkeypatch.setattr(training, "STATE_SHARE", math.inf)
    features = rows(96)
    settings = Train(epochs=3, lr=3e-3, batch_size=16, task_weight=0.0, precision="fp32")
    method = KnowledgeSparse(keep=0.2, pattern="1x4", **options)
    distillation = Distillation(temperature=1, hidden=3, scores=3, embedding=1, relative=False)

    def run(folder, after: int):
        around = context(features=features, teacher=tiny("bert", seed=9))
        return around, fit(around, features, (method, distillation, Stop(after)), settings, folder, QUIET)

    straight, expected = run(tmp_path / "straight", 99)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", 11)
    assert runstate.latest_state(tmp_path / "stopped").step == 10
    resumed, result = run(tmp_path / "stopped", 99)
    assert result.losses == expected.losses
    assert expected.losses[-1] < expected.losses[0]
    assert model_digest(resumed.model) == model_digest(straight.model)
    assert all(torch.equal(weight, expected.decision.weights[name]) for name, weight in result.decision.weights.items())
    assert not any("forward" in vars(module) for module in resumed.model.modules())


def test_what_it_leaves_keeps_its_zeros_in_the_next_stage(tmp_path):
    features = rows(48)
    settings = Train(steps=6, lr=3e-3, batch_size=16, precision="fp32")
    around = context(features=features)
    first = fit(around, features, (KnowledgeSparse(keep=0.1),), settings, tmp_path / "1", QUIET)
    sparse = shrink(around.model, around.anatomy, first.decision)
    before = {name: (weight != 0) for name, weight in sparse.named_parameters() if name in first.decision.weights}
    following = context(model=sparse, features=features)
    fit(following, features, (KeepZeros(),), settings, tmp_path / "2", QUIET)
    after = dict(following.model.named_parameters())
    assert all(torch.equal(after[name] != 0, mask) for name, mask in before.items())


# -- Options -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep must be above 0, a millionth or more, and at most 1, or null, got 0"),
        ({"keep": 1.5}, "keep must be above 0"),
        ({"keep": float("nan")}, "keep must be above 0"),
        ({"keep": 0.05, "pattern": "2:4"}, r"keep must be 0\.5 with the pattern 2:4"),
        ({"pattern": "4:4"}, "pattern must be unstructured, RxC"),
        ({"pattern": "0x4"}, "pattern must be"),
        ({"pattern": "1 x 4"}, "pattern must be"),
        ({"scope": "layer"}, "scope must be"),
        ({"score": "movement"}, "score must be"),
        ({"updates": 0}, "updates must be from 1 to a billion"),
        ({"cooldown": 1}, "cooldown must be"),
        ({"dampening": 0}, "dampening must be above 0"),
        ({"score": "fisher", "pattern": "1x6"}, "fisher_block must be a multiple of the 6 columns"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KnowledgeSparse(**options)


def test_defaults_and_patterns():
    assert (KnowledgeSparse().share, KnowledgeSparse(pattern="1:4").share, KnowledgeSparse(keep=1).share) == (0.05, 0.25, 1)
    assert Pattern.parse("32x16") == Pattern(32, 16)


@pytest.mark.parametrize("pattern", ["5x4", "1x5", "1:5"])
def test_a_pattern_that_does_not_divide_is_refused(pattern):
    with pytest.raises(RecipeError, match="do not divide"):
        KnowledgeSparse(pattern=pattern).attach(tiny_context())


def test_a_model_without_encoder_matrices_is_left_alone():
    around = tiny_context()
    anatomy = anatomy_of(around.model)
    bare = dataclasses.replace(anatomy, matrices={})
    around = with_model(around, around.model, bare)
    for scope in ("matrix", "model"):
        method = KnowledgeSparse(scope=scope)
        state = method.attach(around)
        run_through(method, state, 2)
        assert method.decide(state, around).weights == {}
        state.close()
