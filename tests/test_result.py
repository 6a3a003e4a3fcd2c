"""The result of a run: its figures and verdict, its model, its plain copy, and which files go to the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from test_report import BASE, record
from tiny_export import export
from tiny_folder import write_model

from slimformer import Result, load, save_dense, shrink
from slimformer.core.plan import Plan
from slimformer.errors import ModelError, OutputError
from slimformer.exporters.base import FILES, Variant
from slimformer.families.base import anatomy_of
from slimformer.measuring.records import Facts, FileFacts, Goal, Interval, Record
from slimformer.reporting.ledger import append_record, write_facts
from slimformer.saving import checkpoint
from slimformer.testing.tiny import batch

BEST = FILES[Variant.INT8_FUSED].place
PLAN = Plan({"encoder.0.heads": (1, 3), "encoder.1.attention": (), "encoder.2.ffn": ()})
CHOSEN = record(
    "slimformer int8",
    0.895,
    3.4,
    file=BEST,
    chosen=True,
    baseline=BASE.name,
    loss=Interval(0.5, -0.2, 0.9),
    target=Goal(3.0, 1.0),
)


def delivered(home: Path, *records: Record) -> Path:
    """A folder as a run delivers it, with a cut model that is not trained and a file of another one."""
    out, source = home / "small", write_model(home / "dense", trained=False)
    model = checkpoint.load(source)
    small = shrink(model, anatomy_of(model), PLAN)
    (out / "model").mkdir(parents=True)
    checkpoint.write(small, PLAN, out / "model", tokenizer_from=source)
    export(out / "onnx", ("model.onnx", "model_quantized.onnx"))
    (out / "onnx" / "model.onnx_data").write_bytes(b"weights")
    for folder in (out, out / "onnx"):
        checkpoint.write_surroundings(small, folder, tokenizer_from=source)
    files = tuple(FileFacts(FILES[name].place, name, FILES[name].int8) for name in (Variant.FLOAT, Variant.INT8_FUSED))
    write_facts(out, Facts(BEST, {"use": "classification", "data": "../data"}, 64, "accuracy", files=files))
    for item in records:
        append_record(out / "ledger.jsonl", item)
    for name in ("README.md", "report.html", "recipe.yaml", "log.jsonl", "changed.jsonl", ".slimformer", ".lock"):
        (out / name).write_text("x", encoding="utf-8")
    (out / "work").mkdir()
    (out / "work" / "model.safetensors").write_bytes(b"x")
    return out


def test_a_result_says_what_it_is(tmp_path: Path) -> None:
    result = Result.read(delivered(tmp_path, BASE, CHOSEN))
    assert (result.best, result.speedup, result.points_lost, result.met) == (result.out / BEST, 3.4, 0.5, True)
    assert result.best.is_file()
    line = f"{result.out}: 3.40 times as fast at batch 32, 0.5 points lost; goal met; best file {BEST}"
    assert str(result) == line
    assert repr(result) == f"<Result {line}>"
    lines = result.summary().splitlines()
    assert any(line.startswith("slimformer int8") for line in lines)
    assert "Goal met: 3.40 times as fast at batch 32 (asked: 3;" in " ".join(lines)


@pytest.mark.parametrize(
    ("changes", "met", "last"),
    [
        ({"target": None}, None, "3.4 times as fast"),
        ({"target": Goal(5.0, 1.0)}, False, "Goal not met"),
        ({"loss": Interval(0.5, -2.0, 3.0)}, False, "Goal open"),
        ({"scores": {"accuracy": 0.5}, "chance": 0.52, "target": None}, False, "Worse than doing nothing"),
    ],
)
def test_a_result_is_a_success_only_beyond_doubt(
    tmp_path: Path, changes: dict[str, object], met: bool | None, last: str
) -> None:
    result = Result(tmp_path, (BASE, replace(CHOSEN, **changes)))  # type: ignore[arg-type]
    assert result.met is met
    assert result.findings[-1].startswith(last)
    told = {"Goal not met": "; goal not met; ", "Goal open": "; goal open; ", "Worse than doing nothing": "; goal not met; "}
    assert told.get(last, "5 points lost; best file") in str(result)


def test_a_command_that_made_things_worse_does_not_exit_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from slimformer.cli import _show

    _show(Result(tmp_path, (BASE, replace(CHOSEN, target=Goal(5.0, 1.0)))))  # a goal that is not met is no failure
    with pytest.raises(typer.Exit) as end:
        _show(Result(tmp_path, (BASE, replace(CHOSEN, scores={"accuracy": 0.5}, chance=0.52))))
    assert end.value.exit_code == 1
    assert "Worse than doing nothing" in capsys.readouterr().out


def test_no_result_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is no result of a run: it holds no slimformer\.json"):
        Result.read(tmp_path)


def test_the_model_and_its_plain_copy_give_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    result = Result.read(delivered(tmp_path, BASE, CHOSEN))
    assert result.model.num_parameters() < load(tmp_path / "dense").num_parameters()
    assert checkpoint.load_plan(result.out) == PLAN
    result.save_dense(tmp_path / "plain")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert plain.num_parameters() == load(tmp_path / "dense").num_parameters()
    inputs = batch(plain)
    inputs["input_ids"] %= plain.config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, result.model(**inputs).logits, atol=2e-5, rtol=1e-4)
    save_dense(result.out, tmp_path / "again")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "again"))
    assert first == second


def test_only_what_others_need_goes_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = Result.read(delivered(tmp_path, BASE, CHOSEN))
    names = {file.relative_to(result.out).as_posix() for file in result.shipped_files()}
    assert names == {
        *("README.md", "config.json", "tokenizer.json", "tokenizer_config.json", "slimformer.json", "recipe.yaml"),
        *("onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_quantized.onnx"),
        *("onnx/config.json", "onnx/tokenizer.json", "onnx/tokenizer_config.json"),
        *("model/config.json", "model/plan.json", "model/model.safetensors", "model/tokenizer.json"),
        "model/tokenizer_config.json",
    }
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OutputError, match=r"nothing was uploaded to 'me/small'[\s\S]*Offline"):
        result.push_to_hub("me/small")


def test_other_tools_read_the_base_config_and_the_tokenizer(tmp_path: Path) -> None:
    """Plain Auto classes, in the folder's top and in onnx/, know nothing of a cut; without weights they load no model."""
    transformers = pytest.importorskip("transformers")
    out = delivered(tmp_path, BASE, CHOSEN)
    for folder in (out, out / "onnx"):
        config = transformers.AutoConfig.from_pretrained(folder)
        assert (config.model_type, config.architectures, config.hidden_size) == ("bert", ["BertForSequenceClassification"], 32)
        assert config.id2label == {0: "bad", 1: "good"}
        assert not hasattr(config, "slimformer")
        assert transformers.AutoTokenizer.from_pretrained(folder)("a film was great")["input_ids"]
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForSequenceClassification.from_pretrained(out)
