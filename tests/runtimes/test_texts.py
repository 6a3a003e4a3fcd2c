"""A session of an encoder-decoder's files writes texts: those of the model, with the search that its folder asks for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from slimformer import decoding
from slimformer.data.pairs import Targets
from slimformer.errors import ModelError
from slimformer.exporters.base import Variant
from slimformer.exporters.onnx import Onnx
from slimformer.measuring import scoring
from slimformer.measuring.sessions import open_session
from slimformer.measuring.timing import time_halves, workloads
from slimformer.tasks.base import Example
from slimformer.tasks.translation import Translation

WORDS = ("<s>", "<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(4, 99)))


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(list(WORDS[:4]))
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with its two files, as a delivered one."""
    folder = tmp_path_factory.mktemp("model")
    model: Any = tiny("marian")
    with torch.no_grad():  # what it reads decides what it writes
        for layer in model.model.decoder.layers:
            layer.encoder_attn.out_proj.weight.mul_(8.0)
    model.generation_config.update(
        num_beams=3, max_length=12, bad_words_ids=[[1]], forced_eos_token_id=2, no_repeat_ngram_size=1
    )
    model.save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    ids = np.random.default_rng(0).integers(4, 99, (4, 6))
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "decoder_input_ids": ids[:, :5]}
    Onnx().export(model, [batch], folder / "encoder_model.onnx", Variant.FUSED)
    shutil.copyfile(decoding.__file__, folder / "decode.py")
    return folder


def examples(count: int = 7) -> list[Example]:
    draw = np.random.default_rng(1)
    texts = [" ".join(f"w{word}" for word in draw.integers(4, 99, length)) for length in draw.integers(2, 8, count)]
    return [Example(f"dev/{number}", (text,), Targets((text,), text)) for number, text in enumerate(texts)]


@pytest.mark.slow
def test_a_session_of_files_writes_what_the_model_does(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    task = Translation(data="x", source="en", target="de").bind(config)
    rows = task.encode(examples(), tokenizer(), 32)
    for generation in (None, {"num_beams": 1}, {"num_beams": 2, "max_new_tokens": 4}):
        texts = []
        for path, runtime in ((folder / "encoder_model.onnx", None), (folder, "torch")):
            session = open_session(path, 1, runtime, generation)
            outputs = scoring.evaluate(session.runner, rows, batch_size=3)
            scoring._check_outputs(scoring.Entry("x", "ours", "float", session, task, rows), outputs, examples())
            texts.append(outputs["text"].tolist())
            assert (outputs["written"] >= 1).all()
        assert texts[0] == texts[1]
        assert len(set(texts[0])) > 1
        assert all(len(text.split()) <= 4 for text in texts[0]) == (generation is not None and "max_new_tokens" in generation)


@pytest.mark.slow
def test_the_encoder_is_timed_once_and_the_decoder_for_each_token(folder: Path) -> None:
    """By a clock that moves by one second whenever it is read: each measured run takes one."""
    ticks = iter(range(10_000))
    rows = (
        Translation(data="x", source="en", target="de")
        .bind({"is_encoder_decoder": True, "decoder_start_token_id": 1})
        .encode(examples(3), tokenizer(), 32)
    )
    session = open_session(folder / "encoder_model.onnx", 1, generation={"num_beams": 2, "min_length": 4, "max_length": 5})
    workload = workloads(rows)[1]
    times = time_halves(session, workload, rounds=2, clock=lambda: float(next(ticks)))
    assert (times.steps, times.tokens) == (4, 4)  # a run for each of four tokens
    assert times.encoder_ms == pytest.approx(1000 / 3)  # one run for three texts
    assert times.decoder_ms == pytest.approx(4 * 1000 / (3 * 4))
    assert times.search_ms == pytest.approx((5 + 1) * 1000 / 3)  # what passes between the readings
    with pytest.raises(ModelError, match="no encoder and decoder whose times"):
        time_halves(replace(session, runner=dict), workload)


@pytest.mark.slow
def test_the_snippet_of_the_card_needs_nothing_of_ours(folder: Path) -> None:
    texts = [item.texts[0] for item in examples(3)]
    ours = decoding.TextWriter(folder)(texts)
    code = Translation(data="x").snippet(folder, "encoder_model.onnx", [(text,) for text in texts], 32)
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'slimformer')))\n"
    for command, given in (([sys.executable, "-c", blocked + code], None), ([sys.executable, "decode.py"], "\n".join(texts))):
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, input=given)
        assert ran.stdout.strip() == (repr(ours) if given is None else "\n".join(ours))


def test_what_is_missing_beside_the_files_is_named(folder: Path, tmp_path: Path) -> None:
    encoder = Path(shutil.copy(folder / "encoder_model.onnx", tmp_path))
    with pytest.raises(ModelError, match=r"decoder_model_merged\.onnx does not lie beside it"):
        open_session(encoder, 1)
    for name in ("decoder_model_merged.onnx", "tokenizer.json", "config.json"):
        shutil.copy(folder / name, tmp_path)
    with pytest.raises(ModelError, match=r"has no generation_config\.json"):
        open_session(encoder, 1)
    (tmp_path / "generation_config.json").write_text('{"num_beams": 4, "do_sample": true}', encoding="utf-8")
    with pytest.raises(ModelError, match="do_sample = True is not honoured"):
        open_session(encoder, 1)
    with pytest.raises(ModelError, match="num_beam_groups = 2 is not honoured"):
        open_session(folder / "encoder_model.onnx", 1, generation={"num_beam_groups": 2})
