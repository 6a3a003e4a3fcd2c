"""Methods on models that translate, through the stages of a recipe: budgets are met as texts are generated, and they still write."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pairs import END, PAD, speaker, write_joint_tokenizer, write_pairs

from slimformer import registry
from slimformer.core.plan import Plan
from slimformer.data.material import prepare
from slimformer.errors import TargetError
from slimformer.families.base import subject_of
from slimformer.hooks.capture import Captured
from slimformer.log import Log
from slimformer.methods.base import Progress, Step
from slimformer.running.bundle import Bundle, Run
from slimformer.running.stages import cost_of, run_stage, torch_outputs
from slimformer.saving import checkpoint
from slimformer.tasks.base import Split
from slimformer.tasks.translation import Translation
from slimformer.testing.checks import tiny_context
from slimformer.training.stage import Calibrate, Train

FEW = {"examples": 16, "damage_examples": 8, "repair_tokens": 200}
METHODS = {
    "fisher": {"keep": 0.5, "neuron_multiple": 4, **FEW},
    "gates": {"keep": 0.5, "neuron_multiple": 4},
    "movement": {"keep": 0.5, "variant": "struct", "neuron_multiple": 4, "lambda_decoder": 2.0},
    "group_lasso": {"keep": 0.5, "neuron_multiple": 4},
    "layers": {"keep": 0.6, "first": "decoder"},
    "distillation": {"hidden": 1.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("pairs")
    write_pairs(home / "data", train=120, dev=20)
    size = write_joint_tokenizer(home).get_vocab_size()
    for kind in ("marian", "bart", "t5"):
        speaker(kind, size).save_pretrained(home / kind)
        write_joint_tokenizer(home / kind)
    return home


def bundle_of(folder: Path, kind: str) -> Bundle:
    subject, teacher = (subject_of(checkpoint.load(folder / kind)) for _ in range(2))
    task = Translation(data=str(folder / "data"), source="en", target="de").bind(subject.model.config.to_dict())
    return Bundle(subject, Plan(), prepare(task, folder / kind), teacher)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["marian", "bart", "t5"])
@pytest.mark.parametrize("name", METHODS)
def test_a_few_steps_meet_the_budget_and_leave_a_model_that_writes(name: str, kind: str, folder: Path, tmp_path: Path) -> None:
    method = registry.find("methods", name)(**METHODS[name])
    bundle = bundle_of(folder, kind)
    train = Train(methods=(method,), steps=4, batch_size=8, lr=1e-3, precision="fp32")
    stage = Calibrate(method) if method.effects().one_shot else train
    run = Run(tmp_path, tmp_path, Log(None, quiet=True), threads=1)
    whole = cost_of("macs", bundle.subject, bundle.material, run)
    small = run_stage(stage, bundle, run)
    share = whole.of(small.plan, bundle.subject.anatomy) / whole.dense
    if method.effects().cuts:
        assert share <= method.keep
        assert cost_of("macs", small.subject, small.material, run).dense / whole.dense == pytest.approx(share)
        assert any(site.startswith("decoder") for site in small.plan.keep)
        if name == "layers":
            assert not any(site.startswith("encoder") for site in small.plan.keep)
    else:
        assert small.plan == Plan()
    outputs, features, examples = torch_outputs(small.subject, small.material, Split.VALIDATION, 20)
    scores = small.material.task.score(outputs, features, examples)
    assert 0 <= scores["token_accuracy"] <= 1
    assert math.isfinite(scores["token_likelihood"])
    ids = torch.tensor([small.material.features[Split.DEV].columns["input_ids"][0].tolist()])
    written = small.subject.model.generate(input_ids=ids, num_beams=2, max_length=6)
    assert written.shape[1] <= 6
    assert written[0, 0] == PAD
    assert int(ids[0, -1]) == END


def test_the_decoder_is_what_five_beams_make_dear(folder: Path, tmp_path: Path) -> None:
    bundle = bundle_of(folder, "marian")
    run = Run(tmp_path, tmp_path, Log(None, quiet=True), threads=1)
    shares = {}
    for beams in (1, 5):
        bundle.subject.model.generation_config.num_beams = beams
        counted = cost_of("macs", bundle.subject, bundle.material, run)
        sides = {
            side: sum(float(c[-1]) for name, c in counted.curves.items() if name.startswith(side)) for side in ("en", "de")
        }
        shares[beams] = sides["de"] / counted.dense
    assert shares[1] < shares[5]
    assert shares[5] > 0.8
    nothing = {name: np.zeros(len(curve) - 1) for name, curve in counted.curves.items()}
    plan = registry.find("methods", "fisher")(keep=0.3, neuron_multiple=4).choose(
        bundle.subject.anatomy, counted, type("Weighed", (), {"importance": nothing, "worth": None})()
    )
    assert counted.of(plan, bundle.subject.anatomy) <= 0.3 * counted.dense


def test_a_decoder_that_would_be_cut_to_nothing_is_refused(folder: Path, tmp_path: Path) -> None:
    context = tiny_context("marian")
    gates = registry.find("methods", "gates")(keep=0.02, neuron_multiple=1)
    with pytest.raises(TargetError, match="nothing of the (en|de)coder would be left: every sublayer would go"):
        gates.check(context.anatomy, context.cost)
    fisher = registry.find("methods", "fisher")(keep=0.001, neuron_multiple=1, examples=8, damage_examples=0, repair=False)
    with pytest.raises(TargetError, match="nothing of the (en|de)coder would be left: every sublayer would go"):
        run_stage(Calibrate(fisher), bundle_of(folder, "bart"), Run(tmp_path, tmp_path, Log(None, quiet=True), threads=1))


def test_the_penalty_on_a_decoder_has_a_factor_of_its_own() -> None:
    context = tiny_context("bart")
    step = Step(context.model, {}, Captured(output={}), None, Progress(10, 10), context.task)
    found = []
    for factor in (1.0, 2.0):
        method = registry.find("methods", "movement")(
            variant="struct", keep=None, lambda_final=8, lambda_ffn=3, lambda_decoder=factor, neuron_multiple=1
        )
        state = method.attach(context)
        found.append(method.penalty(state, step).item())
        state.close()
    # all scores 0, each sigmoid 0.5; the mean of four kinds: attention and FFN of both sides
    assert found[0] == pytest.approx(8 * 0.5 * (1 + 3 + 1 + 3) / 4)
    assert found[1] == pytest.approx(8 * 0.5 * (1 + 3 + 2 * (1 + 3)) / 4)
