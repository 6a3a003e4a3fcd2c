"""Whatever folder a person names: its model is found, or the message says what the folder is and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import tiny

import slimformer
from slimformer.core.plan import Plan
from slimformer.errors import ModelError
from slimformer.saving import checkpoint

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "bert"
    tiny("bert").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "electra"
    tiny("electra").save_pretrained(folder, max_shard_size="12KB")
    return folder


def files(folder: Path, **contents: object) -> Path:
    """Writes files: bytes as they are, anything else as JSON; __ stands for / and . is written as _dot_."""
    for name, content in contents.items():
        file = folder / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


CONFIG = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "some-bert"}
STRANGERS = {
    "adapter": ({"adapter_config_dot_json": ADAPTER, "adapter_model_dot_safetensors": b""}, r"adapter \(LORA\) for 'some-bert'.*merge"),
    "sentence": ({"config_dot_json": {"__version__": "1"}, "modules_dot_json": [], "0_Transformer__config_dot_json": CONFIG},
                 r"sentence-transformers.*0_Transformer"),
    "onnx": ({"config_dot_json": CONFIG, "onnx__model_dot_onnx": b"x"}, r"is an ONNX export \(onnx/model.onnx\)"),
    "openvino": ({"config_dot_json": CONFIG, "openvino_model_dot_xml": b"x", "openvino_model_dot_bin": b"x"}, "OpenVINO export"),
    "keras": ({"config_dot_json": CONFIG, "tf_model_dot_h5": b"x"}, r"only for TensorFlow \(tf_model.h5\).*from_tf"),
    "saved_model": ({"saved_model_dot_pb": b"x", "variables__variables_dot_index": b"x"}, "only for TensorFlow"),
    "flax": ({"config_dot_json": CONFIG, "flax_model_dot_msgpack": b"x"}, r"only for Flax \(flax_model.msgpack\)"),
    "gguf": ({"q4_dot_gguf": b"GGUF"}, "GGUF file .*llama.cpp"),
    "fasttext": ({"cc_dot_bin": b"\xba\x16\x4f\x2f0000"}, "fastText model"),
    "spacy": ({"config_dot_cfg": b"", "meta_dot_json": {"lang": "en"}}, "spaCy pipeline"),
    "checkpoints": ({"checkpoint-500__config_dot_json": CONFIG, "checkpoint-1000__config_dot_json": CONFIG,
                     "checkpoint-1000__trainer_state_dot_json": {"best_model_checkpoint": "x/checkpoint-500"}},
                    "checkpoints of a training.*checkpoint-500 best.*name one of them: .*checkpoint-500"),
    "lfs": ({"config_dot_json": CONFIG, "pytorch_model_dot_bin": POINTER}, "pointers of git-lfs.*git lfs pull"),
    "pickle": ({"config_dot_json": CONFIG, "pytorch_model_dot_bin": b"\x80\x02."}, "only as pickle .*save_pretrained"),
    "pickle_in_parts": ({"config_dot_json": CONFIG, "pytorch_model_dot_bin_dot_index_dot_json": {}, "pytorch_model-1-of-2_dot_bin": b"."},
                        "only as pickle"),
    "variant": ({"config_dot_json": CONFIG, "model_dot_fp16_dot_safetensors": b"x"}, "only model.fp16.safetensors.*give it the name"),
    "shards_alone": ({"config_dot_json": CONFIG, "model-00001-of-00002_dot_safetensors": b"x"}, "no model.safetensors.index.json"),
    "bert_config": ({"bert_config_dot_json": {}, "bert_model_dot_ckpt_dot_index": b"x"}, "bert_config.json.*copy"),
    "data": ({"train_dot_tsv": b"x", "dev_dot_tsv": b"x"}, r"holds no config.json, but data \(dev.tsv\)"),
    "download": ({"model_dot_safetensors_dot_incomplete": b"x"}, "download that was cut off"),
    "deepspeed": ({"config_dot_json": CONFIG, "zero_to_fp32_dot_py": b"#", "global_step500__mp_rank_00_model_states_dot_pt": b"\x80"},
                  r"as DeepSpeed saves it.*zero_to_fp32\.py"),
    "fsdp": ({"config_dot_json": CONFIG, "pytorch_model_fsdp_0__0_0_dot_distcp": b"x"}, "as FSDP of PyTorch saves it.*merge-weights"),
    "ctranslate2": ({"config_dot_json": {"unk_token": "[UNK]"}, "model_dot_bin": b"\6\0\0\0\x0c\0BertEncoderSpec"}, "CTranslate2"),
    "ctranslate2_old": ({"config_dot_json": CONFIG, "model_dot_bin": b"\6\0\0\0\4\0Bert", "vocabulary_dot_txt": b"a"}, "CTranslate2"),
    "flair": ({"best-model_dot_pt": b"PK\3\4", "loss_dot_tsv": b"EPOCH"}, r"model of Flair \(best-model\.pt\)"),
    "flair_of_the_hub": ({"pytorch_model_dot_bin": b"PK\3\4data.pkl flair.models.text_classification"}, "model of Flair"),
    "lightning": ({"epoch=2_dot_ckpt": b"PK\3\4data.pkl pytorch-lightning_version"}, "checkpoint of Lightning.*not read"),
    "spacy_trained": ({"model-best__config_dot_cfg": b"", "model-best__meta_dot_json": {}}, "holds spaCy pipelines"),
    "core_ml": ({"model_dot_mlpackage__Manifest_dot_json": {}}, r"another runtime \(model\.mlpackage/\)"),
    "core_ml_inside": ({"Manifest_dot_json": {}, "Data__com_dot_apple_dot_CoreML__model_dot_mlmodel": b"x"}, "another runtime .*CoreML"),
    "tflite": ({"config_dot_json": CONFIG, "model_dot_tflite": b"x"}, r"another runtime \(model\.tflite\)"),
    "onnx_runtime": ({"config_dot_json": CONFIG, "model_dot_ort": b"x"}, r"another runtime \(model\.ort\)"),
    "rust": ({"config_dot_json": CONFIG, "rust_model_dot_ot": b"x"}, "another runtime"),
    "mlx": ({"config_dot_json": CONFIG, "weights_dot_npz": b"x"}, "another runtime"),
    "keras_hub": ({"config_dot_json": {"module": "keras_hub.src.models.bert"}, "model_dot_weights_dot_h5": b"x"}, "preset of KerasHub"),
    "gptq": ({"config_dot_json": CONFIG, "gptq_model-4bit-128g_dot_safetensors": b"x"}, "another tool quantized"),
    "awq": ({"config_dot_json": CONFIG, "quant_config_dot_json": {}, "model-w4_dot_safetensors": b"x"}, "another tool quantized"),
    "setfit": ({"config_dot_json": CONFIG, "modules_dot_json": [], "model_head_dot_pkl": b"\x80"}, "sentence-transformers model"),
    "mlflow": ({"MLmodel": b"flavors:", "data__model_dot_pth": b"x"}, "model of MLflow"),
    "hub_cache": ({"refs__main": b"abc", "snapshots__abc__config_dot_json": CONFIG}, "hub cache's folder.*one revision: .*snapshots/abc"),
    "pickles_inside": ({"best_model__config_dot_json": CONFIG, "best_model__pytorch_model_dot_bin": b"x"}, "folders of it: best_model"),
    "archive": ({"model_dot_tar_dot_gz": b"\x1f\x8b"}, r"but an archive \(model\.tar\.gz\).*unpack"),
    "anything": ({"README_dot_md": b"x", "notes__a_dot_md": b"x"}, r"holds no config\.json; it holds README\.md, notes/"),
    "gliner": ({"gliner_config_dot_json": {}, "pytorch_model_dot_bin": b"PK\3\4"}, "model of GLiNER"),
    "fairseq": ({"model_dot_pt": b"PK\3\4", "dict_dot_txt": b"the 1"}, r"model of fairseq \(model\.pt, dict\.txt\)"),
    "adapter_hub": ({"adapter_config_dot_json": {"model_type": "bert"}, "pytorch_adapter_dot_bin": b"x"},
                    "library `adapters`.*merge_adapter"),
    "config_only": ({"config_dot_json": CONFIG}, "holds no model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(STRANGERS))
def test_folders_of_other_tools_are_named_for_what_they_are(tmp_path, kind):
    contents, said = STRANGERS[kind]
    with pytest.raises(ModelError, match=f"(?s){said}"):
        slimformer.load(files(tmp_path, **contents))


def test_a_folder_of_models_names_them(tmp_path, plain):
    shutil.copytree(plain, tmp_path / "runs" / "best")
    with pytest.raises(ModelError, match=r"models in folders of it: best\.\s+help: name one: .*best"):
        slimformer.load(tmp_path / "runs")


@pytest.mark.parametrize(
    ("name", "said"),
    [("bert.zip", "unpack it"), ("bert.tar.gz", "unpack it"), ("m.onnx", "PyTorch model that it was exported from"),
     ("pytorch_model.bin", "save_pretrained"), ("model.safetensors", "name the folder that it is in")],
)  # fmt: skip
def test_a_file_is_no_folder(tmp_path, name, said):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(ModelError, match=f"(?s)is a file.*{said}"):
        slimformer.load(tmp_path / name)


def test_an_adapter_beside_a_model_is_not_left_out_in_silence(tmp_path, plain):
    shutil.copytree(plain, tmp_path / "both")
    with pytest.raises(ModelError, match="beside its model"):
        slimformer.load(files(tmp_path / "both", adapter_config_dot_json=ADAPTER))


def test_a_delivered_folder_holds_its_model_inside(tmp_path, plain):
    checkpoint.save(tiny("bert"), Plan(), str(tmp_path / "small" / "model"), tokenizer_from=str(plain))
    files(tmp_path / "small", config_dot_json=CONFIG, onnx__model_dot_onnx=b"x", slimformer_dot_json={})
    assert checkpoint.local_folder(tmp_path / "small") == tmp_path / "small" / "model"
    assert slimformer.load(tmp_path / "small").config.model_type == "bert"
    assert checkpoint.load_plan(tmp_path / "small") == Plan()


def test_a_transformer_with_steps_behind_it_loads_alone(tmp_path, caplog):
    tiny("bert").base_model.save_pretrained(tmp_path)
    files(tmp_path, modules_dot_json=[], config_setfit_dot_json={}, **{"1_Pooling__config_dot_json": {}})
    assert type(slimformer.load(tmp_path)).__name__ == "BertModel"
    assert (
        "sentence-transformers model: its transformer is read, not the steps behind it. Its classifier is SetFit's"
        in caplog.text
    )


def test_a_trainers_checkpoint_loads_and_its_pickles_stay_closed(tmp_path, plain):
    shutil.copytree(plain, tmp_path / "checkpoint-500")
    files(tmp_path / "checkpoint-500", optimizer_dot_pt=b"\x80\x02.", training_args_dot_bin=b"\x80\x02.")
    assert slimformer.load(tmp_path / "checkpoint-500").config.num_labels == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [(POINTER, "pointer of git-lfs"), (None, "truncated"), (b"", "cut off"), (b"PK\x03\x04" + b"0" * 99, "zip file or a pickle"),
     (b"<!DOCTYPE html><html>" + b" " * 99, "web page"), (b"\xff" * 99, "cut off or no safetensors"),
     (b"\x05" + b"\0" * 7 + b"[1,2]", "no readable")],
)  # fmt: skip
def test_whole_shards_load_and_a_broken_one_is_named(tmp_path, shards, content, said):
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    victim = sorted(folder.glob("model-*.safetensors"))[-1]
    victim.write_bytes(victim.read_bytes()[:-10] if content is None else content)
    with pytest.raises(ModelError, match=rf"{victim.name} .*{said}"):
        slimformer.load(folder)
    victim.unlink()
    with pytest.raises(ModelError, match=rf"lacks 1 of its \d+ files of weights: {victim.name}"):
        slimformer.load(folder)


def test_whole_shards_load(shards):
    expected = tiny("electra").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in slimformer.load(shards).state_dict().items())
