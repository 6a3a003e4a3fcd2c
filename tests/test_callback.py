"""Our methods in somebody's own Trainer: the loss they add, the cut at the end, and nothing left on the model."""

from __future__ import annotations

import copy
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batch, tiny
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainingArguments

import slimformer
from slimformer import Plan, SlimCallback, load, load_plan, registry
from slimformer.errors import RecipeError, SlimformerError
from slimformer.families.base import anatomy_of
from slimformer.hooks.gating import gated
from slimformer.methods import Distillation, Fisher, Gates, GroupLasso, Movement, Quantization
from slimformer.testing.tiny import VOCABULARY

GATES = Gates(keep=0.6, lr=0.5, multiplier_lr=1.0)


def rows(count: int = 48) -> list[dict[str, Any]]:
    """Random texts of three classes."""
    generator = torch.Generator().manual_seed(3)

    def one(label: int) -> dict[str, Any]:
        length = int(torch.randint(4, 12, (1,), generator=generator))
        ids = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
        return {"input_ids": ids, "attention_mask": [1] * length, "labels": label}

    return [one(number % 3) for number in range(count)]


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    vocabulary = {f"word{number}": number for number in range(2, VOCABULARY)} | {"[UNK]": 0, "[PAD]": 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")), pad_token="[PAD]", unk_token="[UNK]"
    )


def trainer(model: PreTrainedModel, folder: Path, *callbacks: Any, kind: type[Trainer] = Trainer, **changes: Any) -> Trainer:
    """A Trainer as somebody has it."""
    options: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 2,
        "dataloader_pin_memory": False,
    }
    reader = tokenizer()
    return kind(
        model,
        TrainingArguments(str(folder), **(options | changes)),
        train_dataset=rows(),  # type: ignore[arg-type]
        eval_dataset=rows(8),  # type: ignore[arg-type]
        data_collator=DataCollatorWithPadding(reader),
        processing_class=reader,
        callbacks=list(callbacks),
    )


def hooks_of(model: torch.nn.Module) -> list[str]:
    """Names of modules with anything on them that is not their own."""
    marks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [
        name
        for name, module in model.named_modules()
        if any(getattr(module, mark) for mark in marks) or "forward" in vars(module)
    ]


@pytest.mark.slow
def test_gates_and_distillation_give_a_cut_model_equal_to_the_gated_one(tmp_path: Path) -> None:
    model, teacher = tiny("bert"), tiny("bert", seed=1)
    before, attention = sorted(model.state_dict()), model.config._attn_implementation
    slim = SlimCallback([GATES, Distillation()], teacher=teacher)
    job = trainer(model, tmp_path, slim)
    job.train()
    assert sorted(model.state_dict()) == before
    assert hooks_of(model) == hooks_of(teacher) == []
    assert (model.config._attn_implementation, teacher.training) == (attention, False)
    assert slim.model is not None
    assert slim.plan.keep
    assert slim.model.num_parameters() < model.num_parameters()
    assert job.state.log_history[0]["gates.cost"] < 1
    gates = dict(slim.decision.scales)  # type: ignore[union-attr]
    for name, keep in slim.plan.keep.items():
        open_units = torch.zeros(anatomy_of(model).sites[name].size)
        open_units[list(keep)] = 1
        gates[name] = gates.get(name, 1) * open_units
    inputs = batch(model)
    with torch.no_grad(), gated(model.eval(), anatomy_of(model), gates):
        expected = model(**inputs).logits
    with torch.no_grad():
        assert torch.allclose(slim.model(**inputs).logits, expected, atol=1e-5)
    slim.save(tmp_path / "small")
    assert load_plan(tmp_path / "small") == slim.plan
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "small")(**inputs).logits, slim.model(**inputs).logits)


@pytest.mark.slow
def test_the_lines_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / "docs" / "trainer.md").read_text(encoding="utf-8")
    code = text.partition("```python\n")[2].partition("```")[0]
    arguments = trainer(tiny("bert"), tmp_path / "own", num_train_epochs=1).args
    names = {"model": tiny("bert"), "arguments": arguments, "tokenizer": tokenizer(), "rows": rows()}
    exec(code, names)
    assert slimformer.load("small").num_parameters() == names["small"].num_parameters()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_saved_checkpoint_goes_on(tmp_path: Path) -> None:
    def run(folder: Path, **changes: Any) -> SlimCallback:
        slim = SlimCallback([GATES, Distillation()], teacher=tiny("bert", seed=1))
        job = trainer(tiny("bert"), folder, slim, save_strategy="steps", save_steps=3, **changes)
        job.train(resume_from_checkpoint=bool(changes) or None)
        return slim

    whole = run(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "checkpoint-6")
    resumed = run(tmp_path / "whole", seed=42)
    assert whole.plan == resumed.plan
    for (name, one), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    shutil.rmtree(tmp_path / "whole" / "checkpoint-3" / "slimformer")
    shutil.rmtree(tmp_path / "whole" / "checkpoint-6")
    with pytest.raises(RecipeError, match="holds no state of the methods"):
        run(tmp_path / "whole", seed=42)


@pytest.mark.parametrize(
    "method",
    [Movement(keep=0.8), GroupLasso(keep=0.8), Quantization(weights=4, start=0.2)],
    ids=lambda method: type(method).__name__,
)
@pytest.mark.slow
def test_each_method_leaves_a_plain_model(tmp_path: Path, method: Any) -> None:
    model = tiny("distilbert")
    slim = SlimCallback(method)
    trainer(model, tmp_path, slim).train()
    assert hooks_of(model) == []
    assert slim.model is not None
    assert hooks_of(slim.model) == []
    slim.save(tmp_path / "small")
    inputs = batch(model)
    with torch.no_grad():
        assert torch.allclose(load(tmp_path / "small")(**inputs).logits, slim.model(**inputs).logits, atol=1e-6)


@pytest.mark.slow
def test_the_same_rows_train_with_and_without_it(tmp_path: Path) -> None:
    """A method that does nothing changes no number: neither the order of the rows nor dropout."""
    plain, watched = tiny("bert"), tiny("bert")
    trainer(plain, tmp_path).train()
    trainer(watched, tmp_path, SlimCallback(Distillation(logits=0.0, hidden=1e-30), teacher=tiny("bert", seed=1))).train()
    for (name, one), other in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.allclose(one, other, atol=1e-6), name


@pytest.mark.parametrize("accumulated", [1, 2, 7])
@pytest.mark.slow
def test_accumulated_batches_count_once(tmp_path: Path, accumulated: int) -> None:
    """The gradient of what is added is the mean over the batches, however they are accumulated, in the last and shorter step too."""
    model = tiny("bert")
    seen: list[Tensor] = []

    class Added(Distillation.__mro__[1]):  # type: ignore[misc, name-defined]
        def penalty(self, state: Any, step: Any) -> Tensor:
            return 100 * next(iter(step.model.parameters())).sum()

    class Watch(SlimCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(next(iter(model.parameters())).grad.clone())
            super().on_optimizer_step(args, state, control, **kwargs)

    changes = {"gradient_accumulation_steps": accumulated, "per_device_train_batch_size": 8}
    trainer(model, tmp_path, Watch(Added()), max_grad_norm=0, learning_rate=1e-9, **changes).train()
    assert len(seen) > 1
    assert all(torch.allclose(gradient.mean(), torch.tensor(100.0), rtol=0.02) for gradient in seen)


class Own(Trainer):
    """Computes its own loss from the logits."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


@pytest.mark.slow
def test_a_loss_that_the_terms_do_not_reach_is_refused(tmp_path: Path) -> None:
    model = tiny("bert")
    slim = SlimCallback(GATES)
    with pytest.raises(RecipeError, match="never reached the Trainer's loss"):
        trainer(model, tmp_path, slim, kind=Own).train()
    slim.close()
    assert hooks_of(model) == []


@pytest.mark.slow
def test_an_own_loss_may_add_them(tmp_path: Path) -> None:
    slim = SlimCallback([GATES, Distillation()], teacher=tiny("bert", seed=1))
    job = trainer(tiny("bert"), tmp_path, slim, gradient_accumulation_steps=2)

    def own(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        assert torch.equal(outputs.loss, slim.penalty)  # as much of it as is added where the model has the loss
        return torch.nn.functional.cross_entropy(outputs.logits, labels) + slim.penalty

    job.compute_loss_func = own
    job.train()
    assert slim.plan.keep


def training_methods() -> list[str]:
    """All methods of training stages that are installed and need no option."""
    found = []
    for name in registry.names("methods"):
        with suppress(RecipeError):
            found += [name] * (not registry.find("methods", name)().effects().one_shot)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", training_methods())
def test_each_method_that_trains_ends_with_a_model_or_says_what_it_needs(name: str, tmp_path: Path) -> None:
    model, slim = tiny("bert"), SlimCallback(registry.find("methods", name)(), teacher=tiny("bert", seed=1))
    try:
        trainer(model, tmp_path, slim).train()
    except SlimformerError as error:
        assert error.help
        slim.close()
    else:
        assert slim.model is not None
        slim.save(tmp_path / "small", tokenizer())
        assert load(tmp_path / "small").config.model_type == "bert"
    assert hooks_of(model) == []


@pytest.mark.slow
def test_the_best_model_is_cut_by_its_own_gates(tmp_path: Path) -> None:
    model = tiny("bert")
    slim = SlimCallback(GATES)
    job = trainer(
        model, tmp_path, slim, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        metric_for_best_model="loss", greater_is_better=True,  # the first: the loss falls
    )  # fmt: skip
    job.train()
    assert job.state.best_global_step < 6
    assert slim.plan.keep


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")
@pytest.mark.parametrize(
    ("changes", "said"),
    [({"label_smoothing_factor": 0.1}, "label_smoothing_factor"), ({"gradient_checkpointing": True}, "gradient_checkpointing")],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.slow
def test_arguments_that_do_not_go_with_it_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        trainer(tiny("bert"), tmp_path, SlimCallback(GATES), **changes).train()


@pytest.mark.slow
def test_methods_that_cannot_train_here_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="fisher looks once"):
        SlimCallback(Fisher(keep=0.5))
    with pytest.raises(RecipeError, match="distillation needs a teacher"):
        SlimCallback(Distillation())
    with pytest.raises(RecipeError, match="both decide"):
        SlimCallback([GATES, Movement()])
    model = tiny("bert")
    with pytest.raises(RecipeError, match="the teacher is the model that trains"):
        trainer(model, tmp_path, SlimCallback(Distillation(), teacher=model)).train()
    with pytest.raises(RecipeError, match="a budget in latency"):
        trainer(model, tmp_path, SlimCallback(Gates(keep=0.5, cost="latency"))).train()
    with pytest.raises(RecipeError, match="cannot be told what a BertForMultipleChoice is for"):
        trainer(tiny("bert", auto_class="AutoModelForMultipleChoice"), tmp_path, SlimCallback(GATES)).train()
    with pytest.raises(RecipeError, match="call trainer.train"):
        SlimCallback(GATES).save(tmp_path / "small")


@pytest.mark.slow
def test_a_second_training_goes_on_from_the_cut_model(tmp_path: Path) -> None:
    teacher = tiny("bert")
    first = SlimCallback(GATES)
    trainer(copy.deepcopy(teacher), tmp_path, first).train()
    second = SlimCallback(Distillation(scores=1.0), teacher=teacher, plan=first.plan)
    trainer(first.model, tmp_path, second).train()  # type: ignore[arg-type]
    assert second.plan == first.plan
    assert second.plan != Plan()
    second.save(tmp_path / "small")
    load(tmp_path / "small")
