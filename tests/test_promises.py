"""No pickle, no code and no file outside the folder, whatever config.json or an index names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file
from tiny import tiny

import slimformer
from slimformer.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


@pytest.fixture
def dense(tmp_path):
    tiny("bert").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def change(file: Path, **entries: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | entries), encoding="utf-8")


def index(folder: Path, name: str) -> None:
    """An index that looks for one tensor in the file `name`, for all others in the file that there is."""
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder / "own.safetensors")
    places = dict.fromkeys(state, "own.safetensors") | {min(state): name}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")


NAMES = (
    "a.bin", "pytorch_model.bin", "a.pt", "a.pkl", "../outside.safetensors", "/tmp/outside.safetensors", "sub/a.safetensors",
    "/dev/zero", "a.safetensors.bin", "..", "", "a\x00.safetensors", "~/a.safetensors", "C:\\a.safetensors",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_an_index_may_only_name_safetensors_files_beside_it(dense, name):
    index(dense, name)
    with pytest.raises(ModelError, match="pickle" if name.endswith((".bin", ".pt", ".pkl")) else "no plain name") as caught:
        slimformer.load(dense)
    assert not name.isprintable() or name in str(caught.value)


@pytest.mark.parametrize("where", [WEIGHTS, "config.json", "shard.safetensors"])
@pytest.mark.parametrize("target", ["../outside", "/dev/zero", "nothing"])
def test_links_that_lead_out_are_not_followed(tmp_path, dense, where, target):
    if where == "shard.safetensors":
        index(dense, where)
    else:
        (dense / where).rename(tmp_path / "outside")
    (tmp_path / "outside").touch()
    (dense / where).symlink_to(target)
    with pytest.raises(ModelError, match="link to nothing" if target == "nothing" else "leads out of its folder"):
        slimformer.load(dense)


def test_links_of_a_cache_and_within_the_folder_are_followed(tmp_path, dense):
    blob = tmp_path / "models--a--b" / "blobs" / "0123"
    blob.parent.mkdir(parents=True)
    (dense / WEIGHTS).rename(blob)
    (dense / WEIGHTS).symlink_to(blob)
    (dense / "config.json").rename(dense / "own.json")
    (dense / "config.json").symlink_to("own.json")
    (tmp_path / "link").symlink_to(dense)
    assert slimformer.load(tmp_path / "link").config.model_type == "bert"


def test_a_pipe_is_no_weights(dense):
    (dense / WEIGHTS).unlink()
    os.mkfifo(dense / WEIGHTS)
    with pytest.raises(ModelError, match="is no file"):
        slimformer.load(dense)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"transformers_weights": "adapter_model.bin"}, r"transformers_weights\), a pickle"),
        ({"transformers_weights": "../x.safetensors"}, "only model.safetensors and its shards are read"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantized .'bitsandbytes'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized .'gptq'"),
        (
            {"auto_map": {"AutoModel": "evil.Model"}, "architectures": ["EvilModel"]},
            "EvilModel, whose code came with the model",
        ),
    ],
)
def test_what_a_config_asks_for_is_refused_by_name(dense, entries, said):
    change(dense / "config.json", **entries)
    with pytest.raises(ModelError, match=said):
        slimformer.load(dense)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"_attn_implementation": "flash_attention_2"}, "flash_attention_2"),
        ({"attn_implementation": "kernels-community/flash-attn"}, "kernels-community/flash-attn"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"fusion_config": {"a": True}}, "fusion_config"),
        ({"_attn_implementation": "eager", "torchscript": True, "return_dict": False, "dtype": "float33"}, None),
        ({"quantization_config": None}, None),
    ],
)  # fmt: skip
def test_what_changes_no_output_is_left_out_with_a_word(dense, entries, said, caplog):
    (dense / "evil.py").write_text("raise SystemExit(9)", encoding="utf-8")
    change(dense / "config.json", **entries)
    model = slimformer.load(dense)
    assert model.config._attn_implementation == "sdpa"
    assert model.config.return_dict
    assert said in caplog.text if said else not caplog.text


WATCH = """
import sys, os, json
import torch, pickle, slimformer
from slimformer.saving import checkpoint
opened = []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        opened.append(os.fsdecode(arguments[0]))
    elif event in ("pickle.find_class", "os.system", "subprocess.Popen", "socket.connect"):
        opened.append(event)
def no(*_, **__):
    opened.append("unpickled")
    raise AssertionError("unpickled")
class Refused(pickle.Unpickler):  # a class, since others derive theirs from it
    load = no
slimformer.load(sys.argv[1])  # everything that is imported late is imported now
pickle.load = pickle.loads = torch.load = no
pickle.Unpickler = pickle._Unpickler = Refused
sys.addaudithook(watch)
for folder, outside in zip(sys.argv[2::2], sys.argv[3::2]):
    opened.clear()
    for call in (slimformer.load, checkpoint.check_weights, lambda name: checkpoint.skeleton(name, "AutoModelForSequenceClassification")):
        try:
            call(folder if call is slimformer.load else checkpoint.Path(folder))
        except slimformer.errors.ModelError:
            pass
    print(json.dumps([name for name in opened
        if name in ("unpickled", "pickle.find_class", "os.system", "subprocess.Popen", "socket.connect")
        or name.endswith((".bin", ".pt", ".pkl", "evil.py")) or os.path.realpath(name).startswith((outside, "/dev/zero"))]))
"""
TRAPS = ("index", "traversal", "device", "link", "config", "code", "none")


def trapped(trap, dense, outside):
    """A folder that would have something opened that lies elsewhere, or run."""
    outside.mkdir(parents=True)
    tiny("bert").save_pretrained(dense)
    for place in (dense / "a.bin", dense / "pytorch_model.bin"):
        place.write_bytes(b"cos\nsystem\n(S'exit 9'\ntR.")
    (dense / "evil.py").write_text("raise SystemExit(9)", encoding="utf-8")
    save_file(load_file(dense / WEIGHTS), outside / "a.safetensors", metadata={"format": "pt"})
    if trap in ("index", "traversal", "device"):
        index(dense, {"index": "a.bin", "traversal": "../outside/a.safetensors", "device": "/dev/zero"}[trap])
    elif trap == "link":
        (dense / WEIGHTS).unlink()
        (dense / WEIGHTS).symlink_to(outside / "a.safetensors")
    elif trap == "config":
        change(dense / "config.json", transformers_weights="a.bin")
    elif trap == "code":
        change(
            dense / "config.json", auto_map={"AutoModelForSequenceClassification": "evil.Model", "AutoConfig": "evil.Config"}
        )


@pytest.mark.slow
def test_nothing_is_unpickled_and_nothing_outside_is_opened(tmp_path):
    """A hook in a child process watches every file that is opened, and the unpickler."""
    tiny("bert").save_pretrained(tmp_path / "whole")
    places = [(tmp_path / trap / "dense", tmp_path / trap / "outside") for trap in TRAPS]
    for trap, (dense, outside) in zip(TRAPS, places, strict=True):
        trapped(trap, dense, outside)
    asked = [item for pair in places for item in pair]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WATCH, tmp_path / "whole", *asked], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert dict(zip(TRAPS, said, strict=True)) == {trap: [] for trap in TRAPS}


def test_packages_beneath_report_to_nobody_unless_the_user_says_so(tmp_path):
    """ONNX Runtime leaves a number for the machine and a store of events, once it reports."""
    node = helper.make_node("Relu", ["x"], ["y"])
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])] for name in ("x", "y")]
    graph = helper.make_graph([node], "relu", *ends)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), tmp_path / "relu.onnx")
    code = """
import os, sys, slimformer, onnxruntime
onnxruntime.InferenceSession("relu.onnx")
print(*(os.environ[name] for name in ("ORT_DISABLE_TELEMETRY", "NNCF_CI", "HF_HUB_DISABLE_TELEMETRY")))
"""
    (tmp_path / "home").mkdir()
    own = {name: value for name, value in os.environ.items() if name not in slimformer._SILENT and not name.startswith("XDG")}
    places = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "home")}
    for more, said in (({}, "1 1 1"), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, "1 1 0")):
        found = subprocess.run(
            [sys.executable, "-c", code], env=own | places | more, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert found.stdout.split() == said.split()
    assert list((tmp_path / "home").iterdir()) == []
