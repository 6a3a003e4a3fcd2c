"""The loop: it learns, its times and rates are what they say, it can be killed anywhere, and it leaves no trace."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny
from torch import nn
from toy_task import accuracy, context, fit, rows

from slimformer.core.plan import Decision, Plan
from slimformer.core.shrink import shrink
from slimformer.data.batching import collate, sorted_by_length
from slimformer.errors import RecipeError
from slimformer.families.base import anatomy_of
from slimformer.hooks.capture import Capture
from slimformer.log import Log
from slimformer.methods.base import Context, Effects, Method, Progress, State, Step
from slimformer.methods.distillation import Distillation
from slimformer.methods.gates import Gates
from slimformer.tasks.base import Features
from slimformer.training import devices, runstate
from slimformer.training import loop as training
from slimformer.training import teacher as teacher_cache
from slimformer.training.estimate import estimate
from slimformer.training.stage import Train, Training
from slimformer.training.step import rate

QUIET = Log(None, quiet=True)
FAST = Train(epochs=2, lr=3e-3, batch_size=16, precision="fp32")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose by sharing work, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Offset(State):
    """Adds a trained vector to the embedding and counts its steps in a buffer; draws from the context's generator."""

    def __init__(self, around: Context) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(around.anatomy.hidden_size))
        self.seen: torch.Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.generator = around.generator
        module = around.model.get_submodule(around.anatomy.stacks[0].embedding)
        handle = module.register_forward_hook(lambda _, __, output: output + self.vector)
        self.on_close(handle.remove)


@dataclass(frozen=True)
class Nudge(Method):
    """A method with a parameter, a hook, a buffer and randomness of its own; may stop the run after some steps."""

    stop_after: int | None = None

    def effects(self) -> Effects:
        return Effects(cuts=True)

    def __repr__(self) -> str:
        return "Nudge()"  # where it stops is no part of the work

    def attach(self, context: Context) -> State:
        return Offset(context)

    def penalty(self, state: State, step: Step) -> torch.Tensor:
        noise = torch.randn((), generator=state.generator)
        return state.vector.square().sum() * 0.1 + state.vector.sum() * noise * 0.01

    def advance(self, state: State, progress: Progress) -> None:
        state.seen += 1
        if progress.step == self.stop_after:
            raise KeyboardInterrupt

    def decide(self, state: State, context: Context) -> Decision:
        assert int(state.seen) > 0
        return Decision(Plan({"encoder.1.heads": (0, 2)}), scales={"encoder.0.heads": state.vector[:4]})


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.mark.slow
def test_learns_a_separable_set(tmp_path: Path) -> None:
    features, others = rows(200), rows(80, seed=1)
    around = context(features=features)
    settings = Train(epochs=6, lr=3e-3, batch_size=16, precision="fp32")
    result = fit(around, features, (), settings, tmp_path, Log(tmp_path, quiet=True), accuracy(others))
    assert result.metrics[-1] > 0.9
    assert accuracy(others)(around.model) == result.metrics[-1]
    assert result.losses[-1] < 0.3 < result.losses[0]
    assert result.steps == 6 * math.ceil(200 / 16) == len(result.losses)
    assert result.tokens == 6 * int(features.lengths().sum())
    assert 0 < result.overhead_share < 1
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [event["metric"] for event in events if event["kind"] == "evaluation"] == list(result.metrics)
    assert len(result.metrics) == 6


@pytest.mark.slow
def test_learns_in_bfloat16_with_float32_weights(tmp_path: Path) -> None:
    features = rows(200)
    around = context(features=features)
    settings = Train(epochs=5, lr=3e-3, batch_size=16, precision="bf16")
    result = fit(around, features, (), settings, tmp_path, QUIET, accuracy(features))
    assert result.precision == "bf16"
    assert result.metrics[-1] > 0.9
    assert {parameter.dtype for parameter in around.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("gain", "taken"), [(1.2, "fp32"), (1.9, "bf16")])
def test_auto_takes_bfloat16_on_a_cpu_that_gains_clearly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gain: float, taken: str
) -> None:
    monkeypatch.setattr(devices, "bf16_speedup", lambda: gain)
    result = fit(context(), rows(32), (), Train(steps=1, batch_size=16), tmp_path, QUIET)
    assert result.precision == taken


@pytest.mark.parametrize(("precision", "all_of"), [("bf16", {4, 8, 12, 16, 19}), ("fp32", set(range(3, 20)))])
def test_widths_of_batches_are_rounded_in_half_precision(tmp_path: Path, precision: str, all_of: set[int]) -> None:
    """Cached lessons of the teacher too: padding them to another width would not fit."""
    features, widths = rows(60, longest=19), set()
    around = context(features=features, teacher=tiny("bert", seed=5))
    around.model.register_forward_pre_hook(lambda _, __, inputs: widths.add(inputs["input_ids"].shape[1]), with_kwargs=True)
    settings = replace(FAST, precision=precision, batch_size=4)
    fit(around, features, (Distillation(scores=1.0),), settings, tmp_path, QUIET)
    assert widths <= all_of
    assert len(widths) > len(all_of) / 4
    assert int(features.lengths().max()) in widths
    assert precision == "bf16" or any(width % 4 for width in widths - {19})


def test_the_rate_rises_then_falls_in_lines() -> None:
    assert [rate(step, 10, 0.2) for step in range(10)] == [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert [rate(step, 4, 0.0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [rate(step, 2, 1.0) for step in range(2)] == [0.5, 1.0]


def test_one_step_is_adamw_by_hand(tmp_path: Path) -> None:
    """One step on one batch without dropout, against the formulas of AdamW: decay, then the sign-like first step."""
    features = rows(16)
    around = context(tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), features)
    model = around.model
    before = weights(model)
    batch = next(around.batches(16))
    model.train()
    labels = batch.pop("labels")
    torch.nn.functional.cross_entropy(model(**batch).logits, labels).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert norm > 0.01
    settings = Train(steps=1, lr=0.01, batch_size=16, precision="fp32", warmup=0.0, clip=0.01, weight_decay=0.1)
    fit(around, features, (), settings, tmp_path, QUIET)
    for name, parameter in model.named_parameters():
        if name not in gradients:
            assert torch.equal(parameter, before[name])
            continue
        clipped = gradients[name] * (0.01 / norm)
        decayed = before[name] * (1 - 0.01 * (0.1 if parameter.ndim > 1 else 0.0))
        # bias-corrected moments of the first step are g and g*g
        torch.testing.assert_close(parameter.detach(), decayed - 0.01 * clipped / (clipped.abs() + 1e-8), atol=2e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 5, 6, 11, 12])
def test_a_stopped_run_ends_with_the_same_numbers(tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "STATE_SECONDS", 0.0)
    monkeypatch.setattr(training, "STATE_SHARE", math.inf)  # a state after each step, however long the writing takes
    features = rows(96)
    teacher = tiny("bert", seed=9)
    settings = Train(epochs=2, lr=3e-3, batch_size=16, precision="fp32")

    def run(folder: Path, method: Nudge) -> tuple[Context, training.Trained]:
        around = context(features=features, teacher=teacher)
        return around, fit(around, features, (method, Distillation()), settings, folder, QUIET, accuracy(features))

    straight, expected = run(tmp_path / "straight", Nudge())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", Nudge(stop_after=stop))
    state = runstate.latest_state(tmp_path / "stopped")
    assert (state.step if state else 0) == stop - 1
    resumed, result = run(tmp_path / "stopped", Nudge())
    assert same(weights(straight.model), weights(resumed.model))
    assert result.losses == expected.losses
    assert result.metrics == expected.metrics
    assert torch.equal(result.decision.scales["encoder.0.heads"], expected.decision.scales["encoder.0.heads"])
    assert result.tokens == expected.tokens


def test_a_finished_run_only_decides_again(tmp_path: Path) -> None:
    features = rows(48)
    first = context(features=features)
    expected = fit(first, features, (Nudge(),), FAST, tmp_path, QUIET)
    again = context(features=features)
    result = fit(again, features, (Nudge(stop_after=1),), FAST, tmp_path, QUIET)  # would stop at any step it made
    assert same(weights(first.model), weights(again.model))
    assert result.losses == expected.losses
    runstate.forget_states(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_state_of_other_work_is_not_continued(tmp_path: Path) -> None:
    features = rows(48)
    fit(context(features=features), features, (), FAST, tmp_path, QUIET)
    log = Log(tmp_path, quiet=True)
    other = Train(epochs=2, lr=1e-3, batch_size=16, precision="fp32")
    fresh, continued = context(features=features), context(features=features)
    fit(fresh, features, (), other, tmp_path / "fresh", QUIET)
    fit(continued, features, (), other, tmp_path, log)
    assert same(weights(fresh.model), weights(continued.model))
    assert "starts from the beginning" in (tmp_path / "log.jsonl").read_text()


@pytest.mark.slow
def test_a_state_is_continued_if_all_that_made_it_is_the_same(tmp_path: Path) -> None:
    """Each other teacher, plan, row, weight or option begins anew, and is told."""
    features, seen = rows(16), Plan({"encoder.0.heads": (0, 1)})
    around, stage = context(features=features, teacher=tiny("bert", seed=9)), replace(FAST, steps=1)
    learns = (Distillation(),)
    other = replace(features, columns=dict(features.columns) | {"labels": [0, *features.columns["labels"][1:]]})
    changes: list[tuple[str, Context, Features, Train, tuple[Method, ...]]] = [
        ("nothing", around, features, stage, learns),
        ("teacher", replace(around, teacher=context(tiny("bert", seed=8)).subject), features, stage, learns),
        ("teacher's plan", replace(around, teacher_plan=seen), features, stage, learns),
        ("plan", replace(around, plan=seen), features, stage, learns),
        ("weights", replace(around, subject=context(tiny("bert", seed=1)).subject), features, stage, learns),
        ("rows", around, other, stage, learns),
        ("rate", around, features, replace(stage, lr=1e-4), learns),
        ("weight of the task", around, features, replace(stage, task_weight=0.5), learns),
        ("method", around, features, stage, (Distillation(temperature=3.0),)),
    ]
    assert other.columns["labels"] != features.columns["labels"]
    fit(replace(around, subject=context().subject), features, learns, stage, tmp_path / "first", QUIET)
    begun = []
    for what, again, data, settings, methods in changes:
        folder = shutil.copytree(tmp_path / "first", tmp_path / what)
        own = again if what == "weights" else replace(again, subject=context().subject)
        fit(own, data, methods, settings, folder, Log(folder, quiet=True))
        if "training starts from the beginning" in (folder / "log.jsonl").read_text(encoding="utf-8"):
            begun.append(what)
    assert begun == [what for what, *_ in changes[1:]]


def test_a_damaged_state_is_passed_over(tmp_path: Path) -> None:
    state = runstate.RunState(3, {"a": torch.arange(4.0)}, {"key": "x"})
    runstate.save_state(tmp_path, state)
    broken = tmp_path / "state" / "step-000000009"
    broken.mkdir()
    (broken / "state.json").write_text('{"step": 9}')
    (broken / "state.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    found = runstate.latest_state(tmp_path)
    assert found is not None
    assert found.step == 3
    assert found.facts == {"key": "x"}
    assert torch.equal(found.tensors["a"], torch.arange(4.0))


SCRIPT = """
import math, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from toy_task import context, fit, rows
from slimformer.training import loop
from slimformer.training.stage import Train
from slimformer.methods.gates import Gates
torch.set_num_threads(1)
loop.STATE_SECONDS, loop.STATE_SHARE = 0.0, math.inf
features = rows(96)
around = context(features=features)
settings = Train(steps=int(sys.argv[2]), lr=3e-3, batch_size=16, precision="bf16")
fit(around, features, (Gates(keep=0.5),), settings, Path(sys.argv[1]))
save_file(around.model.state_dict(), sys.argv[1] + "/end.safetensors")
"""


@pytest.mark.slow
def test_kill_dash_nine(tmp_path: Path) -> None:
    """Killed twice by the operating system, wherever that was, the run ends bit for bit as the one that was left alone."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}

    def start(folder: Path) -> subprocess.Popen[bytes]:
        folder.mkdir(exist_ok=True)
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), "120"], env=environment)

    straight = start(tmp_path / "straight")
    assert straight.wait() == 0
    for passed in (5, 40):
        run = start(tmp_path / "killed")
        deadline = time.monotonic() + 60
        while max([int(p.name[5:]) for p in (tmp_path / "killed" / "state").glob("step-*")], default=0) < passed:
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        assert not (tmp_path / "killed" / "end.safetensors").exists()
    last = start(tmp_path / "killed")
    assert last.wait() == 0
    assert (tmp_path / "killed" / "end.safetensors").read_bytes() == (tmp_path / "straight" / "end.safetensors").read_bytes()
    assert not list(tmp_path.rglob(".part-*"))


def test_everything_is_off_the_model_afterwards(tmp_path: Path) -> None:
    features = rows(32)
    around = context(features=features, teacher=tiny("bert", seed=4))
    model = around.model
    model.bert.embeddings.requires_grad_(False)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    keys, attention, random = set(model.state_dict()), model.config._attn_implementation, torch.get_rng_state()
    methods = (Gates(keep=0.5), Distillation(scores=1.0))
    decision = fit(around, features, methods, FAST, tmp_path, QUIET).decision
    assert decision.plan.keep
    decision.plan.check(around.anatomy)
    assert hooks(model) == 0
    assert hooks(around.teacher.model) == 0
    assert model.config._attn_implementation == around.teacher.model.config._attn_implementation == attention
    assert set(model.state_dict()) == keys
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training
    assert torch.equal(torch.get_rng_state(), random)


@dataclass(frozen=True)
class Breaks(Method):
    def effects(self) -> Effects:
        return Effects(needs=frozenset({Capture.HIDDEN, Capture.SCORES}))

    def penalty(self, state: State, step: Step) -> torch.Tensor:
        raise ZeroDivisionError


def test_everything_is_off_the_model_after_an_error(tmp_path: Path) -> None:
    around = context()
    with pytest.raises(ZeroDivisionError):
        fit(around, rows(), (Nudge(), Breaks()), FAST, tmp_path, QUIET)
    assert hooks(around.model) == 0
    assert around.model.config._attn_implementation == "sdpa"
    assert not around.model.training


def test_two_that_decide_are_refused_before_anything_starts(tmp_path: Path) -> None:
    around = context()
    before = weights(around.model)
    with pytest.raises(RecipeError, match=r"test_training and gates both decide") as caught:
        fit(around, rows(), (Nudge(), Gates(keep=0.5), Distillation()), FAST, tmp_path, QUIET)
    assert "distillation needs a teacher" in str(caught.value)  # all mistakes at once
    assert same(weights(around.model), before)
    assert list(tmp_path.iterdir()) == []


def test_settings_name_every_mistake() -> None:
    with pytest.raises(RecipeError) as caught:
        Train(epochs=0, lr=-1, batch_size=0, warmup=2, precision="int4")  # type: ignore[arg-type]
    for name, value in {"epochs": 0, "lr": -1, "batch_size": 0, "warmup": 2, "precision": "int4"}.items():
        assert re.search(rf"{name} must be .*got {value!r}", str(caught.value))


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    around = context()
    with torch.no_grad():
        around.model.classifier.bias[0] = math.nan
    with pytest.raises(RecipeError, match="the loss is nan by step 1"):
        fit(around, rows(), (), FAST, tmp_path, QUIET)


@pytest.mark.parametrize(
    ("freeze", "still"),
    [
        ("nothing", set()),
        ("embeddings", {"bert.embeddings.word_embeddings.weight"}),
        ("encoder", {name for name, _ in tiny("bert").named_parameters() if name.startswith("bert.")}),
        ("everything", {name for name, _ in tiny("bert").named_parameters()}),
    ],
)
def test_freeze(tmp_path: Path, freeze: Any, still: set[str]) -> None:
    around = context()
    before = weights(around.model)
    settings = Train(epochs=1, lr=3e-3, batch_size=16, precision="fp32", freeze=freeze)
    fit(around, rows(), (Nudge(),), settings, tmp_path, QUIET)
    after = weights(around.model)
    assert {name for name in before if torch.equal(before[name], after[name])} == still


def test_nothing_to_train_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing can train"):
        fit(context(), rows(), (), Train(freeze="everything"), tmp_path, QUIET)
    with pytest.raises(RecipeError, match="nothing to train on"):
        fit(context(), rows(), (), Train(task_weight=0.0), tmp_path, QUIET)


@dataclass(frozen=True)
class Watch(Method):
    """Compares what the teacher is said to see with what it sees; `needs` as asked."""

    wants: frozenset[Capture]

    def effects(self) -> Effects:
        return Effects(needs=self.wants, needs_teacher=True)

    def attach(self, context: Context) -> State:
        state = State()
        state.around = context  # not the teacher itself: a submodule of the state would train with it
        return state

    def penalty(self, state: State, step: Step) -> torch.Tensor | None:
        assert step.teacher is not None
        inputs = {name: step.batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        with torch.no_grad():
            seen = state.around.teacher.model(**inputs, output_hidden_states=True)
        torch.testing.assert_close(step.teacher.output["logits"], seen.logits, atol=1e-4, rtol=1e-4)
        real = step.batch["attention_mask"].bool()
        assert len(step.teacher.hidden) == (len(seen.hidden_states) if Capture.HIDDEN in self.wants else 0)
        for mine, theirs in zip(step.teacher.hidden, seen.hidden_states, strict=False):
            torch.testing.assert_close(mine[real], theirs[real], atol=2e-3, rtol=2e-3)  # kept in half precision
        return None


def count_calls(model: nn.Module) -> list[int]:
    calls: list[int] = []
    model.register_forward_hook(lambda _, __, ___: calls.append(1))
    return calls


@pytest.mark.parametrize("wants", [{Capture.LOGITS}, {Capture.LOGITS, Capture.HIDDEN}])
def test_cached_teacher_is_the_teacher(tmp_path: Path, wants: set[Capture]) -> None:
    features = rows(150)
    around = context(features=features, teacher=tiny("bert", seed=5))
    settings = Train(epochs=1, batch_size=16, precision="fp32")
    fit(around, features, (Watch(frozenset(wants)),), settings, tmp_path, QUIET)


@pytest.mark.slow
def test_a_cache_hit_does_not_run_the_teacher(tmp_path: Path) -> None:
    features, cache = rows(150), tmp_path / "cache"
    teacher = tiny("bert", seed=5)
    calls = count_calls(teacher)

    def run(name: str, method: Distillation) -> int:
        before = len(calls)
        fit(context(features=features, teacher=teacher), features, (method,), FAST, tmp_path / name, QUIET, cache=cache)
        return len(calls) - before

    filled = math.ceil(150 / teacher_cache.BATCH) + 2  # and two looks at what has a token axis
    assert run("a", Distillation(hidden=0.0)) == filled
    assert run("b", Distillation(hidden=0.0)) == 0
    assert run("c", Distillation()) == filled
    assert run("d", Distillation()) == 0
    assert run("e", Distillation(scores=1.0)) == math.ceil(150 / (teacher_cache.BATCH // 4)) + 2
    assert run("f", Distillation(scores=1.0)) == 0
    with torch.no_grad():
        teacher.classifier.bias += 1
    assert run("g", Distillation(hidden=0.0)) == filled  # another teacher now


@pytest.mark.parametrize("method", [Distillation(), Distillation(hidden=0.0, scores=1.0)])
def test_what_is_above_the_cap_is_computed_live(tmp_path: Path, method: Distillation, monkeypatch: pytest.MonkeyPatch) -> None:
    features = rows(48)
    around = context(features=features, teacher=tiny("bert", seed=5))
    calls = count_calls(around.teacher.model)
    monkeypatch.setattr(devices, "CACHE_BYTES", 1000)
    fit(around, features, (method,), FAST, tmp_path, QUIET)
    assert len(calls) == 2 * 3
    assert not (tmp_path / "teacher").exists()


def test_what_is_kept_is_read_also_where_there_is_no_room_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache itself takes room: a run that goes on must not find its disk too full to read what it has."""
    features = rows(48)
    around = context(features=features, teacher=tiny("bert", seed=5))
    fit(around, features, (Distillation(),), FAST, tmp_path / "once", QUIET, cache=tmp_path)
    calls = count_calls(around.teacher.model)
    monkeypatch.setattr(devices, "CACHE_BYTES", 1000)
    fit(around, features, (Distillation(),), FAST, tmp_path / "again", QUIET, cache=tmp_path)
    assert not calls


@pytest.mark.parametrize(
    "cut",
    [
        {},
        {"encoder.1.attention": (), "encoder.0.heads": (0, 2, 3)},  # layers of different width, and one without attention
        {f"encoder.{layer}.attention": () for layer in range(3)},
    ],
)
def test_what_is_kept_is_what_a_live_teacher_shows(tmp_path: Path, cut: dict[str, tuple[int, ...]]) -> None:
    features, some, needs = rows(40, longest=9), [3, 17, 29], {Capture.HIDDEN, Capture.SCORES, Capture.RELATIONS}
    dense = tiny("bert", seed=5)
    model = shrink(dense, anatomy_of(dense), Plan(cut))
    around = context(model, features)
    teacher = teacher_cache.Teacher(around.subject, around.task, nullcontext, "fp32")
    batch = {name: torch.from_numpy(array) for name, array in collate(features, some).items()}
    seen = []
    for cap in (0, 1 << 30):
        with teacher_cache.teacher_outputs(teacher, features, needs, tmp_path, QUIET, cap_bytes=cap) as lessons:
            assert isinstance(lessons, teacher_cache.CachedTeacher if cap else teacher_cache.LiveTeacher)
            seen.append(lessons.see(some, batch))
    live, kept = seen
    real = batch["attention_mask"].bool()
    pairs = real[:, None, :, None] & real[:, None, None, :]
    assert not real.all()
    assert list(live.scores) == list(kept.scores)
    for site, theirs in live.scores.items():
        assert kept.scores[site].shape == theirs.shape
        torch.testing.assert_close(kept.scores[site] * pairs, theirs * pairs, atol=1e-3, rtol=1e-3)
    assert len(live.relations) == (0 if len(cut) == 3 else 3)
    for theirs, ours in zip((*live.hidden, *live.relations), (*kept.hidden, *kept.relations), strict=True):
        torch.testing.assert_close(ours[real], theirs[real], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("damage", [None, "rows", "gap"])
def test_a_filling_that_was_killed_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str | None
) -> None:
    features, needs = rows(200, longest=9), {Capture.LOGITS, Capture.HIDDEN, Capture.SCORES, Capture.RELATIONS}
    around = context(tiny("bert", seed=5), features)
    teacher = teacher_cache.Teacher(around.subject, around.task, nullcontext, "fp32")
    some = [3, 17, 29, 150, 199]
    batch = {name: torch.from_numpy(array) for name, array in collate(features, some).items()}

    def outputs(folder: Path) -> teacher_cache.Captured:
        with teacher_cache.teacher_outputs(teacher, features, needs, folder, QUIET, cap_bytes=1 << 30) as lessons:
            return lessons.see(some, batch)

    whole, calls = outputs(tmp_path / "whole"), []
    monkeypatch.setattr(teacher_cache, "PART_SECONDS", 0.0)  # a part for each batch
    told = around.subject.model.forward

    def killed(*args: Any, **columns: Any) -> Any:
        calls.append(0)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return told(*args, **columns)

    monkeypatch.setattr(around.subject.model, "forward", killed)
    with pytest.raises(KeyboardInterrupt):
        outputs(tmp_path / "parts")
    parts = sorted((tmp_path / "parts").glob("teacher/*/parts/0*"))
    assert len(parts) == 4  # two calls told the outputs that have a value per token
    if damage == "rows":
        (parts[1] / "facts.json").write_text('{"rows": 3', encoding="utf-8")
    elif damage == "gap":
        shutil.rmtree(parts[1])
    monkeypatch.setattr(around.subject.model, "forward", told)
    again = count_calls(around.subject.model)
    now = outputs(tmp_path / "parts")
    batches = len(sorted_by_length(features.lengths(), teacher_cache.BATCH // 4))
    assert len(again) == 2 + batches - (4 if damage is None else 1)
    assert torch.equal(now.output["logits"], whole.output["logits"])
    for ours, theirs in zip((*now.hidden, *now.relations), (*whole.hidden, *whole.relations), strict=True):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(now.scores[site], scores) for site, scores in whole.scores.items())


def test_shares_in_any_order_leave_what_one_filling_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of three is killed half-way and made again, and one is missing."""
    features, needs = rows(400, longest=9), {Capture.LOGITS, Capture.HIDDEN, Capture.SCORES}
    around = context(tiny("bert", seed=5), features)
    teacher = teacher_cache.Teacher(around.subject, around.task, nullcontext, "fp32")

    def share(number: int, folder: Path) -> bool:
        part = teacher_cache.RowShare(number, 3)
        return teacher_cache.fill_share(teacher, features, needs, folder, QUIET, part, cap_bytes=1 << 30)

    def outputs(folder: Path) -> tuple[teacher_cache.Captured, int]:
        some = [3, 17, 29, 150, 399]
        batch = {name: torch.from_numpy(array) for name, array in collate(features, some).items()}
        calls = count_calls(around.subject.model)
        with teacher_cache.teacher_outputs(teacher, features, needs, folder, QUIET, cap_bytes=1 << 30) as lessons:
            return lessons.see(some, batch), len(calls)

    (whole, every), told, left = outputs(tmp_path / "whole"), around.subject.model.forward, [5]
    monkeypatch.setattr(teacher_cache, "PART_SECONDS", 0.0)  # a part for each batch

    def killed(*args: Any, **columns: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return told(*args, **columns)

    monkeypatch.setattr(around.subject.model, "forward", killed)
    with pytest.raises(KeyboardInterrupt):
        share(2, tmp_path / "shared")
    assert len(list(tmp_path.glob("shared/teacher/*/parts/0*"))) == 3  # two calls told the outputs that have a value per token
    monkeypatch.setattr(around.subject.model, "forward", told)
    assert share(0, tmp_path / "shared")
    again = count_calls(around.subject.model)
    assert share(2, tmp_path / "shared")
    last = len(again)
    shutil.copytree(tmp_path / "shared", tmp_path / "gap")
    assert share(1, tmp_path / "shared")
    begins = [int(place.name) for place in tmp_path.glob("shared/teacher/*/parts/0*")]
    bounds = teacher_cache._visits(features, needs).bounds(3)
    assert every == 2 + len(begins)
    assert set(bounds[:3]) <= set(begins)
    assert last == 2 + sum(begin >= bounds[2] for begin in begins) - 3  # what the killed share had made was not made again
    now, calls = outputs(tmp_path / "shared")
    assert calls == 2  # nothing was left to compute
    mended, more = outputs(tmp_path / "gap")  # what lies behind the gap is computed with it
    assert more > 2
    for found in (now, mended):
        assert torch.equal(found.output["logits"], whole.output["logits"])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found.hidden, whole.hidden, strict=True))
        assert all(torch.equal(found.scores[site], scores) for site, scores in whole.scores.items())
    assert not teacher_cache.fill_share(
        teacher, features, needs, tmp_path / "full", QUIET, teacher_cache.RowShare(0, 3), cap_bytes=0
    )
    assert not (tmp_path / "full").exists()


def test_outputs_per_token_are_kept_per_token(tmp_path: Path) -> None:
    """Span scores, one per token, come back padded to the width of any batch, also where a class count equals a width."""
    from tiny import tiny_config
    from transformers import BertForQuestionAnswering, BertForSequenceClassification

    features = rows(40, longest=6)
    for cls, names, per_token in (
        (BertForQuestionAnswering, ("start_logits", "end_logits"), True),
        (BertForSequenceClassification, ("logits",), False),
    ):
        model = cls(tiny_config("bert", num_labels=2 if per_token else 6)).eval()
        around = context(model, features)
        task = replace(around.task)
        object.__setattr__(task, "outputs", names)
        teacher = teacher_cache.Teacher(around.subject, task, lambda: torch.autocast("cpu", enabled=False), "fp32")
        with teacher_cache.teacher_outputs(
            teacher, features, {Capture.LOGITS}, tmp_path / cls.__name__, QUIET, cap_bytes=0
        ) as lessons:
            some = [3, 17, 29]
            batch = {name: torch.from_numpy(array) for name, array in collate(features, some).items()}
            seen = lessons.see(some, batch).output
            with torch.no_grad():
                live = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            real = batch["attention_mask"].bool()
            for name in names:
                keep = real if per_token else torch.ones_like(live[name], dtype=torch.bool)
                torch.testing.assert_close(seen[name][keep], live[name][keep], atol=1e-5, rtol=1e-5)
                assert seen[name].shape == live[name].shape


def test_estimate_changes_nothing() -> None:
    features = rows(120)
    around = context(features=features, teacher=tiny("bert", seed=5))
    before, generator, random = weights(around.model), around.generator.get_state(), torch.get_rng_state()
    told = estimate(Training(around, features, replace(FAST, methods=(Gates(keep=0.5), Distillation()))), seconds=0.2)
    assert same(weights(around.model), before)
    assert torch.equal(around.generator.get_state(), generator)
    assert torch.equal(torch.get_rng_state(), random)
    assert hooks(around.model) == hooks(around.teacher.model) == 0
    assert told.steps == 16
    assert told.precision == "fp32"
    assert told.seconds > 0
    assert told.tokens_per_second > 0
    assert told.peak_rss_bytes > 50 * 2**20  # torch alone is more


PROCESSES = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from test_training import Nudge
from tiny import tiny
from toy_task import accuracy, context, fit, rows
from slimformer.training import devices
from slimformer.training.stage import Train
from slimformer.log import Log
from slimformer.methods.distillation import Distillation
torch.set_num_threads(1)
features = rows(90)
still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
around = context(tiny("bert", **still), features, tiny("bert", seed=5))
settings = Train(epochs=2, lr=3e-3, batch_size=10, precision="fp32")
out = Path(sys.argv[1])
methods = (Nudge(), Distillation(hidden=0.0))
result = fit(around, features, methods, settings, out, Log(out, quiet=True), accuracy(features))
tensors = around.model.state_dict() | {"offset": result.decision.scales["encoder.0.heads"]}
save_file(tensors, out / f"end-{sys.argv[2]}-{devices.accelerator_for((), None).process_index}.safetensors")
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Without dropout, two processes that share each batch and average gradients end where one process does."""
    from safetensors.torch import load_file

    script = tmp_path / "run.py"
    script.write_text(PROCESSES)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    alone = [sys.executable, str(script), str(tmp_path / "one"), "one"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(alone, env=environment, check=True, timeout=120)
    subprocess.run([*launch, str(script), str(tmp_path / "two"), "two"], env=environment, check=True, timeout=240)
    one = load_file(tmp_path / "one" / "end-one-0.safetensors")
    ranks = [load_file(tmp_path / "two" / f"end-two-{rank}.safetensors") for rank in range(2)]
    assert same(*ranks)
    before = weights(tiny("bert"))
    for name, tensor in one.items():
        if name.endswith("key.bias"):
            continue  # the softmax is blind to it: its gradient is rounding, which Adam blows up to whole steps
        torch.testing.assert_close(ranks[0][name], tensor, atol=5e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    # what moved far more than that, or the comparison would say nothing
    assert max(float((one[name] - before[name]).abs().max()) for name in before) > 0.01
    assert float(one["offset"].abs().max()) > 0.005


def test_trains_after_somebody_elses_mixed_precision(tmp_path: Path) -> None:
    """accelerate keeps one state per process; a Trainer that ran with bf16 before us leaves it behind."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    try:
        AcceleratorState._reset_state()
        assert Accelerator(mixed_precision="bf16", cpu=True).mixed_precision == "bf16"
        result = fit(context(), rows(32), (), FAST, tmp_path, QUIET)
        assert result.precision == "fp32"
    finally:
        AcceleratorState._reset_state()
