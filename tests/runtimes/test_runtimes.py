"""Each runtime runs the files it accepts, gives the model's outputs, and says what is missing or broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_export import export

from slimformer.errors import ExtraError, ModelError
from slimformer.runtimes import onnxruntime as ort
from slimformer.runtimes import openvino as ov
from slimformer.runtimes.onnxruntime import OnnxRuntime
from slimformer.runtimes.openvino import OpenVINO, nncf_int8
from slimformer.runtimes.torch import Torch

needs_openvino = pytest.mark.skipif(not OpenVINO().available(), reason="needs the extra: pip install 'slimformer[openvino]'")
INPUTS = {
    "input_ids": np.array([[4, 5, 0], [2, 5, 3]]),  # great film [PAD]; dull film fine
    "attention_mask": np.array([[1, 1, 0], [1, 1, 1]]),
    "token_type_ids": np.zeros((2, 3), dtype=np.int64),  # the model knows no such input
}
LOGITS = [[0.0, 3.0], [2.0, 1.0]]


@pytest.mark.parametrize("threads", [1, 2])
def test_onnx_runtime_gives_the_outputs_by_name(tmp_path: Path, threads: int) -> None:
    export(tmp_path)
    runtime = OnnxRuntime()
    assert runtime.available()
    assert runtime.version().count(".") == 2
    assert runtime.accepts(tmp_path / "model.onnx")
    assert not runtime.accepts(tmp_path)
    assert not runtime.accepts(tmp_path / "other.onnx")
    outputs = runtime.load(tmp_path / "model.onnx", threads)(INPUTS)
    assert list(outputs) == ["logits"]
    np.testing.assert_allclose(outputs["logits"], LOGITS)
    bare = {"input_ids": INPUTS["input_ids"][1:]}  # no mask: all words are there
    np.testing.assert_allclose(runtime.load(tmp_path / "model.onnx", threads)(bare)["logits"], LOGITS[1:])


def test_onnx_runtime_is_given_the_threads() -> None:
    options = ort._options(3)
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)


def test_a_broken_file_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no protobuf")
    with pytest.raises(ModelError, match=r"cannot load .*model\.onnx"):
        OnnxRuntime().load(tmp_path / "model.onnx", 1)


@needs_openvino
@pytest.mark.slow
def test_openvino_gives_the_outputs_by_name(tmp_path: Path) -> None:
    export(tmp_path)
    outputs = OpenVINO().load(tmp_path / "model.onnx", 1)(INPUTS)
    assert list(outputs) == ["logits"]
    np.testing.assert_allclose(outputs["logits"], LOGITS, atol=1e-5)
    (tmp_path / "broken.xml").write_text("<net/>", encoding="utf-8")
    with pytest.raises(ModelError, match=r"cannot load .*broken\.xml"):
        OpenVINO().load(tmp_path / "broken.xml", 1)


def test_openvino_accepts_standard_operators_only(tmp_path: Path) -> None:
    import onnx

    export(tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    model.graph.node[0].domain = "com.microsoft"
    onnx.save(model, tmp_path / "own.onnx")
    assert OpenVINO().accepts(tmp_path / "model.onnx")
    assert not OpenVINO().accepts(tmp_path / "own.onnx")
    assert not OpenVINO().accepts(tmp_path)
    (tmp_path / "torn.onnx").write_bytes((tmp_path / "model.onnx").read_bytes()[:300])
    assert OpenVINO().accepts(tmp_path / "torn.onnx")  # to be refused with its cause when it is loaded


def test_a_missing_engine_names_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(tmp_path)
    monkeypatch.setattr(ov, "find_spec", lambda *_: None)
    assert not OpenVINO().available()
    for call in (
        lambda: OpenVINO().load(tmp_path / "model.onnx", 1),
        lambda: nncf_int8(tmp_path / "model.onnx", [INPUTS], tmp_path / "int8"),
    ):
        with pytest.raises(ExtraError, match=r"pip install 'slimformer\[openvino\]'"):
            call()
    assert not (tmp_path / "int8").exists()


def save(model: Any, folder: Path) -> Path:
    """A model folder as transformers writes it."""
    model.save_pretrained(folder)
    return folder


def test_torch_runs_a_saved_folder_and_puts_the_threads_back(tmp_path: Path) -> None:
    import torch
    from tiny import batch, tiny

    model = tiny("bert")
    folder = save(model, tmp_path / "model")
    inputs = batch(model)
    runtime = Torch()
    assert runtime.accepts(folder)
    assert not runtime.accepts(tmp_path)
    before = torch.get_num_threads()
    outputs = runtime.load(folder, 1)({name: value.numpy() for name, value in inputs.items()})
    assert torch.get_num_threads() == before
    with torch.no_grad():
        np.testing.assert_allclose(outputs["logits"], model(**inputs).logits.numpy(), atol=1e-6)


@needs_openvino
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nncf_makes_an_int8_model_that_still_answers(tmp_path: Path) -> None:
    from tiny import batch, tiny

    from slimformer.exporters.base import Variant
    from slimformer.exporters.onnx import Onnx

    model = tiny("distilbert")
    batches = [{name: value.numpy() for name, value in batch(model, 6, 9, seed).items()} for seed in range(3)]
    paths = {variant: tmp_path / f"{variant}.onnx" for variant in (Variant.FLOAT, Variant.INT8_STATIC)}
    Onnx().export_all(model, batches, paths)
    rival = nncf_int8(paths[Variant.FLOAT], batches, tmp_path / "rival")
    assert sorted(path.name for path in rival.parent.iterdir()) == ["openvino_model.bin", "openvino_model.xml"]
    exact = OnnxRuntime().load(paths[Variant.FLOAT], 1)(batches[0])["logits"]
    for path in (rival, paths[Variant.FLOAT], paths[Variant.INT8_STATIC]):
        got = OpenVINO().load(path, 1)(batches[0])["logits"]
        assert np.abs(got - exact).max() <= 0.2 * np.abs(exact).max(), path
    assert b'element_type="i8"' in rival.read_bytes()
