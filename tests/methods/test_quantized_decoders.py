"""The fully quantized transformer where it comes from: every operation of an encoder-decoder, one table for words, real tokens alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_pairs import END, PAD, speaker, write_joint_tokenizer, write_pairs

from slimformer.core.anatomy import Tokens
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.data.material import prepare
from slimformer.families.base import anatomy_of, subject_of
from slimformer.hooks.points import quantized_points
from slimformer.log import Log
from slimformer.methods.base import Progress
from slimformer.methods.fisher import information
from slimformer.methods.importance import gain
from slimformer.methods.quantization import ROLES, Quantization
from slimformer.running.bundle import Bundle, Run
from slimformer.running.stages import run_stage, training_of
from slimformer.saving import checkpoint
from slimformer.tasks.translation import Translation
from slimformer.testing.checks import tiny_context
from slimformer.training.stage import Train

KINDS = ("marian", "bart", "t5")


def trained(around, method, batch):
    """The state after one training pass in float, quantizing from now on, in eval mode."""
    state = method.attach(around)
    state.train()
    with torch.no_grad():
        around.model(**around.subject.feed(batch))
    method.advance(state, Progress(1, 8))
    state.eval()
    with torch.no_grad():
        around.model(**around.subject.feed(batch))  # a pass begins by asking whether it is quantized
    return state


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_on_a_grid_and_the_model_that_leaves_computes_what_was_trained(kind: str, bits: int) -> None:
    around = tiny_context(kind)
    (batch,) = around.batches(4)
    method = Quantization(weights=bits, activations=bits, embeddings=bits, roles="all")
    state = trained(around, method, batch)
    assert {point.role.value for point in state.points} == set(ROLES)
    assert len(state.points) == len(around.anatomy.points)
    assert all(bool(running.seen) for running in state.each())
    with torch.no_grad():
        plain = around.model(**around.subject.feed(batch)).logits
        decision = method.decide(state, around)
        state.close()
        assert not torch.allclose(plain, around.model(**around.subject.feed(batch)).logits, atol=1e-4)
        small = shrink(around.model, around.anatomy, decision)
        with quantized_points(small, anatomy_of(small), decision.ranges):
            left = small(**around.subject.feed(batch)).logits
            written = small.generate(batch["input_ids"], num_beams=2, max_new_tokens=4)
    torch.testing.assert_close(left, plain, atol=1e-5, rtol=1e-5)
    assert written.shape[0] == len(batch["input_ids"])
    weights = {name for name, _ in around.model.named_parameters() if not name.endswith("bias") and "relative" not in name}
    assert weights <= set(decision.weights)  # gains of norms and fixed positions too


@pytest.mark.parametrize(
    "options", [{}, {"roles": "all"}, {"roles": "all", "embeddings": 4}, {"roles": "all", "embeddings": None}]
)
def test_a_table_that_gives_words_too_has_one_grid(options: dict[str, object]) -> None:
    """A row for each word: looked up, and multiplied for its score. Both see what is saved, whatever the bits of each."""
    around = tiny_context("marian")
    (batch,) = around.batches(4)
    method = Quantization(weights=8, **options)  # type: ignore[arg-type]
    state = trained(around, method, batch)
    table = around.model.model.encoder.embed_tokens
    with torch.no_grad():
        rows = table(torch.arange(99))
        scores = around.model.lm_head(torch.eye(32)).T  # the weight that it computed with, if its input is in float
        decided = method.decide(state, around).weights["model.shared.weight"]
    state.close()
    torch.testing.assert_close(rows, decided, atol=1e-7, rtol=0)
    bits = options.get("embeddings", 8) or 8
    steps = around.model.model.shared.weight.detach().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)  # type: ignore[operator]
    torch.testing.assert_close(decided / steps, (decided / steps).round(), atol=1e-3, rtol=0)
    if "head" not in method.roles:
        torch.testing.assert_close(scores, decided, atol=1e-6, rtol=0)


def test_padding_of_what_was_said_is_not_counted() -> None:
    """The batch of a translation has no mask for the decoder. Its first token may be the one of padding, and counts."""
    around = tiny_context("marian")
    around.model.config.pad_token_id = 1
    said = torch.tensor([[1, 7, 8, 9], [1, 7, 1, 1]])  # starts with padding, as Marian does
    batch = {"input_ids": torch.tensor([[5, 6, 2], [6, 5, 2]]), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    batch["decoder_input_ids"] = said
    method = Quantization(roles="all")
    ranges = []
    for given in (batch, {**batch, "decoder_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}):
        state = trained(around, method, given)
        ranges.append({point.id: running.ranges()[0] for point, running in zip(state.points, state.each(), strict=True)})
        state.close()
    assert ranges[0] == ranges[1]
    alone = {name: value[1:] for name, value in batch.items()} | {"decoder_input_ids": said[1:, :2]}
    whole = {name: value[:1] for name, value in batch.items()}
    state = method.attach(around)
    state.train()
    with torch.no_grad():
        for rows in (alone, whole):
            around.model(**rows)
    state.settle()
    for point, running in zip(state.points, state.each(), strict=True):
        if point.tokens is Tokens.TARGET and point.role.value in ("matrix", "norm"):
            low, high = running.ranges()[0].low, running.ranges()[0].high
            assert (low, high) == pytest.approx((ranges[0][point.id].low, ranges[0][point.id].high), abs=1e-4)
    state.close()


def test_a_denominator_whose_grid_begins_at_zero_becomes_zero() -> None:
    """The naive quantizer: between 1 and 30 on 4 bits the step is 2, 1 becomes 0, and what is divided by it is no number."""
    around = tiny_context("marian")
    for way, zero in (("own", False), ("from_zero", True)):
        method = Quantization(activations=4, roles="all", denominators=way)  # type: ignore[arg-type]
        state = method.attach(around)
        place = next(i for i, point in enumerate(state.points) if point.id == "encoder.0.softmax.denominator")
        running = state.each()[place]
        running.observe(torch.tensor([[[1.0], [30.0]]]))
        state.settle()
        grid = state.grid(state.points[place], running)
        assert bool(grid.integers(torch.tensor(0.9)) * grid.step + grid.offset == 0) is zero
        decided = method.decide(state, around).ranges.activations["encoder.0.softmax.denominator"]
        assert (decided.low, decided.high) == pytest.approx((0.0 if zero else 1.0, 30.0))
        state.close()


def test_one_bucket_for_a_table_that_multiplies_what_it_gives() -> None:
    around = tiny_context("bart")
    table = around.model.model.encoder.embed_tokens
    table.embed_scale = 5.0
    (batch,) = around.batches(4)
    state = trained(around, Quantization(buckets="tensor"), batch)
    with torch.no_grad():
        rows = table(torch.arange(99))
    state.close()
    steps = 5.0 * table.weight.detach().abs().max() / 127
    torch.testing.assert_close(rows / steps, (rows / steps).round(), atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spoken")
    write_pairs(folder / "data", train=40, dev=12)
    size = write_joint_tokenizer(folder / "bart").get_vocab_size()
    speaker("bart", size, dropout=0.5, attention_dropout=0.5, activation_dropout=0.5).save_pretrained(folder / "bart")
    return folder


def test_a_stage_without_dropout_turns_off_what_functions_drop(home: Path, tmp_path: Path) -> None:
    """BART has no modules for them. The rates are back in the model that leaves."""
    subject = subject_of(checkpoint.load(home / "bart"))
    task = Translation(data=str(home / "data"), source="en", target="de").bind(subject.model.config.to_dict())
    material = prepare(task, home / "bart")
    bundle = Bundle(subject, Plan(), material, subject)
    run = Run(tmp_path, tmp_path, Log(None, quiet=True))
    stage = Train(steps=2, lr=0.0, batch_size=40, dropout=False, precision="fp32")
    job = training_of(stage, bundle, run)
    rates = {getattr(module, "dropout", 0.0) for module in job.context.model.modules() if hasattr(module, "dropout")}
    assert rates == {0.0}
    left = run_stage(stage, bundle, run).subject.model
    assert {module.dropout for module in left.modules() if isinstance(getattr(module, "dropout", None), float)} == {0.5}


@pytest.mark.parametrize("ranked", [information, gain])
@pytest.mark.slow
def test_a_row_is_worth_what_its_whole_text_says(ranked, home: Path) -> None:
    """Gradients of each row's summed loss, brute force: a row of a batch counts as it does alone, however long the others are."""
    around = tiny_context("marian")
    sites = list(around.anatomy.sites.values())
    task = Translation(data=str(home / "data"), source="en", target="de", label_smoothing=0.0)
    rows = torch.tensor([[5, 6, 2], [6, 5, 2]])
    labels = torch.tensor([[7, 8, 9, END], [7, END, -100, -100]])
    said = torch.tensor([[PAD, 7, 8, 9], [PAD, 7, 1, 1]])
    batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "decoder_input_ids": said, "labels": labels}
    singles = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(2)]
    units = [site for site in sites if site.kind.value in ("heads", "neurons")]
    arguments = (2,) if ranked is information else (units, 2)  # how many examples
    together = ranked(replace(around, task=task, batches=lambda _: iter([batch])), *arguments)
    apart = ranked(replace(around, task=task, batches=lambda _: iter(singles)), *arguments)
    for name in together:
        torch.testing.assert_close(torch.tensor(together[name]), torch.tensor(apart[name]), rtol=1e-3, atol=1e-6)
