"""`compress` on encoder-decoders, from the command line: no option but those that encoders have, beside the task and its texts.

One tiny Marian is compressed for most tests. Times are real but short; no test asserts a speed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_compression import events, said
from tiny import tiny
from tiny_folder import kept_from_others, refusing
from tiny_hurry import hurry
from tiny_pairs import speaker, write_joint_tokenizer, write_pairs, write_speaker

from slimformer.core.anatomy import Kind
from slimformer.errors import ModelError, TargetError
from slimformer.families.base import anatomy_of
from slimformer.measuring.latency import GROUPS, Latency, Levels, _short_plans, usual_length
from slimformer.measuring.records import Standing
from slimformer.reporting.ledger import read_facts, read_records
from slimformer.reporting.sections import section_of
from slimformer.running.candidate import teacher_candidate
from slimformer.running.preflight import preflight
from slimformer.running.reader import parse_recipe, read_recipe
from slimformer.runtimes.ctranslate2 import CTranslate2
from slimformer.saving import checkpoint
from slimformer.tasks.translation import Translation

pytestmark = pytest.mark.slow

OPTIONS = ("--data", "data", "--speedup", "1.5", "--max-loss", "100", "--epochs", "1", "--tries", "1", "--threads", "1")
DELIVERED = {
    f"{folder}{name}"
    for folder in ("", "onnx/")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "decode.py")
} | {
    f"onnx/{half}{kind}.onnx" for half in ("encoder_model", "decoder_model_merged") for kind in ("", "_quantized", "_int8")
}  # fmt: skip


def never_fast(*args: Any, **options: Any) -> Any:
    """The uncut model in int8 as slow as can be: on a busy machine a cut one of this size may be slower than anything."""
    whole = teacher_candidate(*args, **options)
    return replace(whole, trials=tuple(replace(trial, speed_32=1e-3) for trial in whole.trials))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writing")
    write_pairs(folder / "data", train=160, dev=24)
    write_speaker(folder / "marian", "marian", steps=60)
    return folder


@pytest.fixture(scope="module")
def done(home: Path) -> SimpleNamespace:
    """What `slimformer compress marian --data data` leaves, in a hurry: a Marian is for translation."""
    from slimformer import cli

    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        patch.setattr("slimformer.running.recipe.RIVALS", ("teacher-int8", "small-dense", "ctranslate2-int8"))
        patch.setattr("slimformer.running.search.teacher_candidate", never_fast)
        patch.setattr("slimformer.measuring.latency.SECONDS", 0.5)
        patch.setattr("slimformer.running.scale.PROBE_SECONDS", 0.5)
        patch.setattr("slimformer.running.trials.TRIAL_SECONDS", 0.5)
        patch.setattr("slimformer.running.schedule.FULL_BENCH", 0.5)
        patch.chdir(home)
        patch.setattr(sys, "argv", ["slimformer", "compress", "marian", "--out", "out", *OPTIONS])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code in (0, 1)
    return SimpleNamespace(home=home, out=home / "out", records=read_records([home / "out" / "ledger.jsonl"]))


def test_both_files_of_each_kind_are_delivered_with_what_writes_by_them(done: SimpleNamespace) -> None:
    there = {str(item.relative_to(done.out)) for item in done.out.rglob("*") if item.is_file()}
    assert there >= DELIVERED
    facts = read_facts(done.out)
    assert [file.name for file in facts.files] == [
        "onnx/encoder_model.onnx",
        "onnx/encoder_model_quantized.onnx",
        "onnx/encoder_model_int8.onnx",
    ]
    record = next(row for row in done.records if row.chosen)
    pair = [done.out / record.file, done.out / record.file.replace("encoder_model", "decoder_model_merged")]
    assert record.size_bytes == sum(file.stat().st_size for file in pair)
    said_of = json.loads((done.out / "generation_config.json").read_text(encoding="utf-8"))
    assert (said_of["num_beams"], said_of["max_length"]) == (2, 16)
    assert not kept_from_others(done.out)


def test_the_rows_hold_bleu_on_two_beams_and_one_with_times_of_both(done: SimpleNamespace) -> None:
    for row in done.records:
        assert row.metric == "bleu"
        assert set(row.scores) == {"bleu", "chrf", "bleu_at_1_beam"}
        assert [(timing.batch_size, timing.beams) for timing in row.timings] == [(1, 2), (32, 2), (1, 1), (32, 1)]
        assert row.times_faster(32) == row.speed["batch 32, sorted by length"]
        assert all(timing.per_second > 0 for timing in row.timings)
        assert len(row.resampled) == 500
    there = {"ctranslate2-int8"} if CTranslate2().available() else set()
    assert {row.role for row in done.records} == {"teacher-fp32", "teacher-int8", "small-dense", "ours", *there}
    small = next(row for row in done.records if row.role == Standing.SMALL_DENSE)
    assert re.fullmatch(r"\d \+ \d dense layers? int8", small.name)
    assert all(row.loss is not None for row in done.records[1:])
    section = section_of(done.records)
    assert [row[1] for row in section.written] == ["2", "1"] * len(done.records)
    assert all(re.fullmatch(r"[\d.]+ / [\d.]+", row[-1]) for row in section.written)
    page = (done.out / "report.html").read_text(encoding="utf-8")
    assert "Texts a second" in page
    assert "Not measured" not in page

    assert "Targets(" not in page


def test_the_lines_of_the_card_write_texts_without_slimformer_and_torch(done: SimpleNamespace) -> None:
    card = (done.out / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    code = refusing("slimformer", "torch", "transformers", "scipy") + code
    found = subprocess.run([sys.executable, "-c", code], cwd=done.out, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    texts = eval(found.stdout)  # the lines print a list
    assert len(texts) == 2
    assert all(isinstance(text, str) for text in texts)
    assert "pipeline_tag: translation" in card or "Worse than doing nothing" in card
    assert "| model | beams | bleu |" in card


def test_what_was_said_names_beams_lengths_and_the_shallow_rival(done: SimpleNamespace) -> None:
    lines = said(done.out)
    assert any("texts are written on 2 beams, with at most 16 tokens" in line for line in lines)
    assert any("the teacher runs beside the student" in line for line in lines)
    assert not any("of disk for" in line for line in lines)
    assert len(events(done.out, "trial")) >= 4


def test_the_recipe_repeats_it_and_bench_reads_the_folder(
    done: SimpleNamespace, call: Callable[..., Any], monkeypatch: Any
) -> None:
    recipe = read_recipe(done.out / "recipe.yaml")
    assert {name for name in GROUPS if not getattr(recipe.latency, name)} == {
        "last_heads",
        "last_neurons",
    }  # of an encoder alone
    assert recipe.stages[1].task_weight == 0.1
    assert recipe.stages[1].augment == 0
    monkeypatch.chdir(done.home)
    status, shown, _ = call("bench", "marian", "out", "--data", "data", "--task", "translation", "--seconds", "0.2",
                            "--threads", "1", "--wait", "0")  # fmt: skip
    assert status == 0
    assert "marian" in shown
    assert "out" in shown


def test_a_table_of_the_encoder_alone_is_none_for_both_halves() -> None:
    anatomy = anatomy_of(tiny("marian"))
    levels = Levels(0.1, 2.0, {4: 1.0}, {24: 1.0})
    with pytest.raises(TargetError, match="tells nothing of cross heads"):
        Latency.of(anatomy, levels)
    both = replace(levels, decoder_heads={4: 5.0}, cross_heads={4: 3.0}, decoder_neurons={24: 2.0})
    curves = Latency.of(anatomy, both).cost.curves
    assert [float(curves[f"decoder.1.{name}"][-1]) for name in ("heads", "cross_heads", "neurons")] == [5.0, 3.0, 2.0]
    assert float(curves["encoder.1.heads"][-1]) == 1.0


def test_both_halves_are_timed_each_with_the_other_gone() -> None:
    anatomy = anatomy_of(tiny("t5"))
    plans = _short_plans(anatomy)
    assert "last" not in plans
    sublayers = {site.id for site in anatomy.of_kind(Kind.SUBLAYER)}
    left = {name: sorted(sublayers - {key for key, kept in plan.keep.items() if kept == ()}) for name, plan in plans.items()}
    assert left["none"] == []
    assert left["cross_heads-4"] == ["decoder.0.cross_attention", "decoder.1.cross_attention"]
    assert left["decoder_neurons-24"] == ["decoder.0.ffn", "decoder.1.ffn"]
    assert left["heads-4"] == ["encoder.0.attention", "encoder.1.attention"]


# -- Bad input -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        ("bert", "translation", "is an encoder \\(bert\\): it cannot write a text"),
        ("marian", "classification", "is an encoder-decoder \\(marian\\), and the task classification needs an encoder"),
    ],
)
def test_a_model_of_the_other_kind_is_refused(model: str, task: str, message: str, home: Path, tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "bert")
    folder = tmp_path / "bert" if model == "bert" else home / "marian"
    write_joint_tokenizer(tmp_path / "bert")
    (tmp_path / "data.tsv").write_text("text\tlabel\n" + "a room\tx\nthe meal\ty\n" * 20, encoding="utf-8")
    data = home / "data" if task == "translation" else tmp_path / "data.tsv"
    recipe = parse_recipe({"model": str(folder), "task": {"use": task, "data": str(data)}, "stages": [{"train": {}}]})
    with pytest.raises(ModelError, match=message):
        preflight(recipe)


BAD = {
    "lines": ({"train.de": "ein\n" * 159}, "train.en has 160 lines, and .*train.de has 159"),
    "one side": ({"train.de": None}, "train.en has no other side: there is nothing to learn to write"),
    "no references": (
        {"dev.de": None},
        "dev.en has no other side: without references nothing can be scored. looked for: dev.de",
    ),
    "empty": ({"train.de": "\n" * 160}, "empty|no text|too few"),
    "other letters": ({"train.en": "漢字 仮名 東京\n" * 160}, "unknown to the model's tokenizer"),
}


@pytest.mark.parametrize("name", BAD)
def test_texts_that_cannot_be_used_are_refused_in_one_line(
    name: str, home: Path, tmp_path: Path, call: Callable[..., Any], monkeypatch: Any
) -> None:
    write_pairs(tmp_path / "data", train=160, dev=24)
    files, message = BAD[name]
    for file, content in files.items():
        if content is None:
            (tmp_path / "data" / file).unlink()
        else:
            (tmp_path / "data" / file).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    status, shown, errors = call("compress", home / "marian", "--task", "translation", "--data", "data", "--out", "out",
                                 "--wait", "0")  # fmt: skip
    told = " ".join((shown + errors).split())
    assert status == 2, told
    assert re.search(message, told), told
    assert "Traceback" not in told
    assert not (tmp_path / "out" / "onnx").exists()


def test_a_model_that_does_not_say_how_long_its_texts_are_gets_the_tasks_limit(home: Path, tmp_path: Path) -> None:
    from slimformer.log import Log
    from slimformer.running.bundle import Run
    from slimformer.running.prepare import load_bundle

    tokenizer = write_joint_tokenizer(tmp_path / "plain")
    model = speaker("bart", tokenizer.get_vocab_size())
    model.generation_config.max_length = model.generation_config.num_beams = None
    model.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "generation_config.json").unlink()
    recipe = parse_recipe(
        {"model": str(tmp_path / "plain"), "task": {"use": "translation", "data": str(home / "data"), "max_target_length": 30},
         "stages": []}
    )  # fmt: skip
    log = Log(tmp_path / "log.jsonl", quiet=True)
    bundle = load_bundle(preflight(recipe), Run(tmp_path, tmp_path, log, threads=1))
    assert bundle.subject.model.generation_config.max_length == 30
    assert bundle.subject.beams == 1
    assert (
        usual_length(bundle.subject, bundle.material)["max_new_tokens"]
        == usual_length(bundle.subject, bundle.material)["min_new_tokens"]
    )


def test_a_model_of_language_codes_is_refused_by_its_name(tmp_path: Path, call: Callable[..., Any], monkeypatch: Any) -> None:
    write_pairs(tmp_path / "data", train=40, dev=10)
    (tmp_path / "nllb").mkdir()
    (tmp_path / "nllb" / "config.json").write_text('{"model_type": "m2m_100", "is_encoder_decoder": true}', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    status, _, errors = call("compress", "nllb", "--task", "translation", "--data", "data", "--out", "out")
    assert status == 2
    assert "no family knows the architecture 'm2m_100'" in errors
    assert not (tmp_path / "out").exists()


def test_what_a_config_holds_for_a_task_alone_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = str(write_pairs(tmp_path / "data", train=40, dev=10))
    config = speaker("t5", 40).config.to_dict()
    config["task_specific_params"] = {
        "translation_en_to_de": {"num_beams": 4, "prefix": "translate English to German: "},
        "translation_en_to_fr": {"num_beams": 3, "prefix": "translate English to French: "},
        "summarization": {"num_beams": 2},
    }
    with caplog.at_level("INFO"):
        Translation(data=data, source="en", target="de").bind(config)
    assert "task_specific_params for translation_en_to_de, which are not applied" in caplog.text
    assert "put num_beams: 4 into generation_config.json and give --prefix 'translate English to German: '" in caplog.text


def test_an_old_t5_names_a_class_that_is_gone(tmp_path: Path) -> None:
    """The config.json of t5-small did so for years; its last matrix is its word table, and no tensor of a head is there."""
    model = speaker("t5", 40)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["T5WithLMHeadModel"]}), encoding="utf-8")
    assert checkpoint.is_tuned(tmp_path, "AutoModelForSeq2SeqLM")
    loaded = checkpoint.load(tmp_path)
    assert type(loaded) is type(model)
    inputs = {"input_ids": torch.tensor([[5, 6, 1]]), "decoder_input_ids": torch.tensor([[0, 7]])}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)
