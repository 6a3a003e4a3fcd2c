"""CTranslate2 writes what the model does: its float file the same texts, its int8 file in fewer bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runtimes.test_texts import WORDS, tokenizer
from tiny import tiny

from slimformer.errors import ExtraError, ModelError
from slimformer.measuring.sessions import open_session, runtime_for
from slimformer.runtimes import ctranslate2 as ct2
from slimformer.runtimes.ctranslate2 import CTranslate2, convertible, ctranslate2_file

needed = pytest.mark.skipif(not CTranslate2().available(), reason="needs the extra: pip install 'slimformer[ctranslate2]'")
BATCH = {
    "input_ids": np.random.default_rng(0).integers(4, len(WORDS), (4, 6)),
    "attention_mask": np.array([[1] * 6, [1] * 4 + [0] * 2, [1] * 6, [1] * 2 + [0] * 4]),
}


def written_by(kind: str, folder: Path) -> Any:
    """A model folder of a type, whose texts depend on what is read."""
    model: Any = tiny(kind)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "encoder_attn.out_proj.weight" in name or "EncDecAttention.o.weight" in name:
                weight.mul_(8.0)
    model.generation_config.update(num_beams=3, max_length=12, early_stopping=True, decoder_start_token_id=1)
    model.save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")
    return model


@needed
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["marian", "bart", "t5"])
def test_its_float_file_writes_what_the_model_does(kind: str, tmp_path: Path) -> None:
    model = written_by(kind, tmp_path)
    assert convertible(model)
    path = ctranslate2_file(model, tmp_path, tmp_path / "ctranslate2", "float32")
    seen: set[str] = set()
    for generation in (None, {"num_beams": 1}, {"num_beams": 2, "max_new_tokens": 4, "bad_words_ids": [[17], [21]]}):
        ours = open_session(path, 1, generation=generation)(BATCH)
        theirs = open_session(tmp_path, 1, "torch", generation)(BATCH)
        assert ours["text"].tolist() == theirs["text"].tolist()
        assert ours["written"].tolist() == theirs["written"].tolist()
        seen |= set(ours["text"].tolist())
    assert len(seen) > 2
    assert convertible(tiny("bert")) is False


@needed
def test_its_int8_file_is_small_and_is_read_by_its_own_runtime(tmp_path: Path) -> None:
    model = written_by("marian", tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = ctranslate2_file(model, tmp_path, tmp_path / "float", "float32")
    path = ctranslate2_file(model, tmp_path, tmp_path / "ctranslate2")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())  # it scales in place
    assert path.stat().st_size < 0.5 * whole.stat().st_size
    assert runtime_for(path) == "ctranslate2"
    assert CTranslate2().version().count(".") == 2
    assert all(open_session(path, 1)(BATCH)["text"])
    assert json.loads((path.parent / "config.json").read_text(encoding="utf-8"))["decoder_start_token"] == WORDS[1]
    assert not CTranslate2().accepts(tmp_path / "model.safetensors")
    path.write_bytes(b"no model")
    with pytest.raises(ModelError, match=r"cannot load .*model\.bin"):
        CTranslate2().load(path, 1)


def test_a_missing_engine_names_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ct2, "find_spec", lambda *_: None)
    assert not CTranslate2().available()
    for call in (
        lambda: CTranslate2().load(tmp_path / "model.bin", 1),
        lambda: ctranslate2_file(tiny("marian"), tmp_path, tmp_path / "ctranslate2"),
    ):
        with pytest.raises(ExtraError, match=r"pip install 'slimformer\[ctranslate2\]'"):
            call()
    assert not (tmp_path / "ctranslate2").exists()
