"""Finds the model in a folder that a person names, or says what that folder is instead and what to do with it.

A delivered folder keeps its PyTorch model in `model/`. Folders of other tools (adapters, exports, other frameworks' weights) are known by
the files that those tools write.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from slimformer.errors import ModelError, readable, shown
from slimformer.saving.headers import INDEX, PICKLE_HELP, PICKLES, WEIGHTS, has_weights, read_object

CONFIG = "config.json"
MODEL_FOLDER = "model"  # a delivered folder holds the PyTorch model in this one
OLD_CONFIG = "bert_config.json"  # of Google's TensorFlow checkpoints
_LISTED = 2000  # files of a folder that are looked at: more say nothing new
_FASTTEXT = b"\xba\x16\x4f\x2f"


def model_folder(path: Path) -> Path:
    """The folder that holds the model which a person means by `path`: `path` itself, or `model/` in a delivered folder.

    Weights at the top of a delivered folder are for tools that know none but plain shapes.

    Raises:
        ModelError: `path` is a file, or not there.
    """
    if os.path.isfile(path):  # os.path takes any text, pathlib raises if a name is too long
        raise ModelError(f"{path} is a file.", help=_file_help(path))
    if not os.path.isdir(path):
        raise ModelError(
            f"{path} is not a folder with a model.",
            help="name a folder with config.json, tokenizer and model.safetensors, or a model on the hub: owner/name.",
        )
    inner = path / MODEL_FOLDER
    if (inner / CONFIG).is_file() and (not has_weights(path) or (inner / "plan.json").is_file()):
        return inner
    return path


def stranger(folder: Path) -> ModelError | None:
    """What a folder without a model of its own is instead, as an error that says what to do; None if its files do not tell."""
    names = _names(folder)
    for look in _LOOKS:
        found = look(folder, names)
        if found:
            what, help = found
            return ModelError(f"{folder} {what}", help=help)
    return None


def refuse_adapter(folder: Path) -> None:
    """ModelError if an adapter lies beside a whole model: transformers would add it, so the weights alone are not that model."""
    if (folder / "adapter_config.json").is_file():
        what, help = _adapter(folder, _names(folder)) or ("holds an adapter beside its model.", "")
        raise ModelError(f"{folder} {what}", help=help)


def _file_help(path: Path) -> str:
    kind = "".join(path.suffixes[-2:]).lower()
    if kind.endswith((".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")):
        return "it is an archive: unpack it, and name the folder with config.json in it."
    if kind.endswith(".gguf"):
        return "a GGUF file holds quantized weights: name the folder of the model that it was made from."
    if kind.endswith(".onnx"):
        return "an ONNX file is finished: name the folder of the PyTorch model that it was exported from (`bench` reads ONNX files)."
    if kind.endswith(PICKLES):
        return PICKLE_HELP
    return f"name the folder that it is in: {path.parent}"


def _names(folder: Path) -> frozenset[str]:
    """Paths of the files of a folder and of the folders in it, with / between the parts."""
    found: list[str] = []
    for place in (folder, *sorted(item for item in folder.iterdir() if item.is_dir() and not item.name.startswith(".git"))):
        prefix = "" if place == folder else f"{place.name}/"
        with os.scandir(place) as items:
            found += [
                f"{prefix}{item.name}{'/' if item.is_dir() else ''}" for item, _ in zip(items, range(_LISTED), strict=False)
            ]
    return frozenset(found)


# -- What other tools write ----------------------------------------------------------------------------------------------------

_Found = tuple[str, str] | None
_Look = Callable[[Path, frozenset[str]], _Found]


def _ending(names: Iterable[str], *ends: str) -> str | None:
    """The first file, those of the folder itself before those of folders in it, whose name ends so."""
    return min((name for name in names if name.lower().endswith(ends)), key=lambda name: (name.count("/"), name), default=None)


def _head(file: Path, count: int) -> bytes:
    """How a file begins; nothing for a device, a pipe and a link to nothing."""
    if not file.is_file():
        return b""
    with open(file, "rb") as stream:
        return stream.read(count)


def _content(folder: Path, name: str) -> dict[str, Any]:
    try:
        return read_object(folder / name)
    except ModelError:
        return {}


def _empty(folder: Path, names: frozenset[str]) -> _Found:
    if names:
        return None
    return "holds no config.json: it is empty.", "name a folder with config.json, tokenizer and model.safetensors."


def _adapter(folder: Path, names: frozenset[str]) -> _Found:
    """A few low-rank matrices that belong to another model, as PEFT or the library `adapters` saves them."""
    if not {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"} & names:
        return None
    content = _content(folder, "adapter_config.json")
    if {"pytorch_adapter.bin", "adapter.safetensors"} & names:
        return (
            "holds an adapter of the library `adapters` for another model.",
            "merge it there into its model, and name the folder that this writes: "
            "model.merge_adapter(model.load_adapter(<this folder>)), then model.save_pretrained(<another folder>). "
            "Only LoRA and (IA)3 can be merged.",
        )
    kind = readable(str(content.get("peft_type") or "")) or "PEFT"
    base = shown(content["base_model_name_or_path"]) if content.get("base_model_name_or_path") else "another model"
    beside = " beside its model" if has_weights(folder) else ", not a model"
    return (
        f"holds an adapter ({kind}) for {base}{beside}: its weights only add to those.",
        "merge the two where peft is installed, and name the folder that this writes: AutoPeftModelForSequenceClassification"
        '.from_pretrained(<this folder>).merge_and_unload().save_pretrained("merged").',
    )


def _distributed(folder: Path, names: frozenset[str]) -> _Found:
    """Parts of a model that several processes hold."""
    name = _ending(names, "_model_states.pt", "_optim_states.pt", "zero_to_fp32.py", ".distcp")
    if name is None:
        return None
    if name.endswith(".distcp"):
        return (
            f"holds a model in the parts of its processes ({name}), as FSDP of PyTorch saves it.",
            "join them with `accelerate merge-weights <the folder of the .distcp files> <another folder>`, and name that one.",
        )
    return (
        f"holds a model in the parts of its processes ({name}), as DeepSpeed saves it.",
        "gather them: python zero_to_fp32.py . <another folder> --safe_serialization, with config.json and tokenizer beside them.",
    )


def _ctranslate2(folder: Path, names: frozenset[str]) -> _Found:
    """CTranslate2: model.bin begins with a version and the name of a specification."""
    if "model.bin" not in names:
        return None
    head = _head(folder / "model.bin", 64)
    if not (
        head[1:4] == b"\0\0\0" and (b"Spec" in head or any(name.startswith(("vocabulary.", "shared_vocab")) for name in names))
    ):
        return None
    return (
        "is a model of CTranslate2 (model.bin), which is finished.",
        "name the transformers folder that it was converted from: config.json, tokenizer and model.safetensors.",
    )


def _flair(folder: Path, names: frozenset[str]) -> _Found:
    name = _with_word(folder, names, b"flair.", ("pytorch_model.bin", "final-model.pt", "best-model.pt"))
    name = name or next((name for name in ("best-model.pt", "final-model.pt") if name in names), None)
    return (
        None
        if name is None
        else (
            f"is a model of Flair ({name}).",
            "save its transformer with Flair: classifier.embeddings.model.save_pretrained(<a folder>), its tokenizer too, "
            "and tune that; the head of Flair is its own.",
        )
    )


def _lightning(folder: Path, names: frozenset[str]) -> _Found:
    name = _with_word(folder, names, b"pytorch-lightning_version", (_ending(names, ".ckpt") or "",))
    return (
        None
        if name is None
        else (
            f"is a checkpoint of Lightning ({name}), a pickle, which can run code and is not read.",
            "load it where you trust it, and save the transformers model inside: module.model.save_pretrained(<a folder>).",
        )
    )


def _with_word(folder: Path, names: frozenset[str], word: bytes, files: Iterable[str]) -> str | None:
    """The first of these files that holds a word near its beginning; nothing is unpickled."""
    for name in files:
        if name in names and word in _head(folder / name, 1 << 20):
            return name
    return None


def _quantized(folder: Path, names: frozenset[str]) -> _Found:
    """Other tools' quantized weights, under names of their own."""
    name = next(
        (name for name in sorted(names) if name in ("quantize_config.json", "quant_config.json", "quant_log.csv")), None
    )
    name = name or _ending((name for name in names if re.search(r"gptq|awq|[48]bit", name.lower())), ".safetensors")
    return (
        None
        if name is None
        else (
            f"holds weights that another tool quantized ({name}).",
            "name the folder of the model before it was quantized; slimformer makes an int8 file itself.",
        )
    )


def _hub_cache(folder: Path, names: frozenset[str]) -> _Found:
    """The cache's folder of a hub model, with a folder for each revision."""
    found = sorted(name for name in names if name.startswith("snapshots/") and name.endswith("/") and name.count("/") == 2)
    if not found or not names & {"refs/", "blobs/"}:
        return None
    return (
        f"is the hub cache's folder of a model, with {len(found)} of its revisions.",
        f"name the model by its hub id, or one revision: {folder / found[-1].rstrip('/')}",
    )


def _gliner(folder: Path, names: frozenset[str]) -> _Found:
    if "gliner_config.json" not in names:
        return None
    return (
        "is a model of GLiNER, whose layers around the encoder are its own.",
        "take a tagger of transformers (ForTokenClassification).",
    )


def _fairseq(folder: Path, names: frozenset[str]) -> _Found:
    """A checkpoint beside the dictionary of its pieces: dict.txt, or one for each language."""
    pieces = next((name for name in sorted(names) if re.fullmatch(r"dict\.(\w+\.)?txt", name)), None)
    name = _ending((name for name in names if "/" not in name), ".pt")
    if pieces is None or name is None:
        return None
    return (
        f"is a model of fairseq ({name}, {pieces}).",
        "convert it with the script that transformers has for its type (convert_..._checkpoint_to_pytorch.py), and name the folder that "
        "this writes.",
    )


def _mlflow(folder: Path, names: frozenset[str]) -> _Found:
    if "MLmodel" not in names:
        return None
    return (
        "is a model of MLflow.",
        "if it holds a transformers model, name the folder in it with config.json and model.safetensors.",
    )


def _sentence_transformers(folder: Path, names: frozenset[str]) -> _Found:
    """A tree with the transformer in a folder of its own, and pooling and projections beside it."""
    inner = min((name for name in names if name.endswith(("_Transformer/config.json", "0_BERT/config.json"))), default=None)
    if "modules.json" not in names and inner is None:
        return None
    place = folder / inner.partition("/")[0] if inner else None
    return (
        "is a sentence-transformers model: a transformer, and steps that make one vector of its outputs.",
        f"slimformer reads the transformer alone: name {place}" if place else "name the folder that holds its transformer.",
    )


def _checkpoints(folder: Path, names: frozenset[str]) -> _Found:
    """A Trainer's output folder that holds checkpoints and no model of its own."""
    found = [name[:-1] for name in names if name.startswith("checkpoint-") and name.count("/") == 1 and name.endswith("/")]
    found = [name for name in found if name.removeprefix("checkpoint-").isdigit() and f"{name}/{CONFIG}" in names]
    if not found:
        return None
    found.sort(key=lambda name: int(name.removeprefix("checkpoint-")))
    best = next(
        (
            Path(str(said)).name
            for name in reversed(found)
            if (said := _trainer_state(folder / name).get("best_model_checkpoint"))
        ),
        None,
    )
    told = f"; its Trainer found {best} best" if best in found else ""
    return (
        f"holds the checkpoints of a training, and no model of its own: {', '.join(found[-5:])}{told}.",
        f"name one of them: {folder / (best if best in found else found[-1])}",
    )


def _trainer_state(folder: Path) -> dict[str, Any]:
    return _content(folder, "trainer_state.json")


def _models_inside(folder: Path, names: frozenset[str]) -> _Found:
    inner = sorted(name.partition("/")[0] for name in names if name.endswith(f"/{CONFIG}"))
    found = [name for name in inner if has_weights(folder / name)] or inner
    if not found or CONFIG in names:
        return None
    return f"holds no {CONFIG}; there are models in folders of it: {', '.join(found[:5])}.", f"name one: {folder / found[0]}"


def _pointers(folder: Path, names: frozenset[str]) -> _Found:
    """A clone of a repository without the files that git-lfs keeps."""
    for name in sorted(names & {WEIGHTS, INDEX, CONFIG, "pytorch_model.bin", "tf_model.h5"}):
        if _head(folder / name, 20).startswith(b"version https://git"):
            return f"holds pointers of git-lfs, not the files ({name}).", "fetch them: git lfs install, then git lfs pull."
    return None


def _gguf(folder: Path, names: frozenset[str]) -> _Found:
    name = _ending(names, ".gguf")
    return (
        None
        if name is None
        else (
            f"holds a GGUF file ({name}), which is for llama.cpp.",
            "name the folder of the model that it was made from.",
        )
    )


def _fasttext(folder: Path, names: frozenset[str]) -> _Found:
    for name in sorted(name for name in names if name.lower().endswith((".bin", ".ftz")) and "/" not in name):
        if _head(folder / name, 4) == _FASTTEXT:
            return f"holds a fastText model ({name}), which is no transformer.", "there is nothing to cut in it."
    return None


def _spacy(folder: Path, names: frozenset[str]) -> _Found:
    found = next((name for name in ("config.cfg", "model-best/config.cfg", "model-last/config.cfg") if name in names), None)
    if found is None or found.replace("config.cfg", "meta.json") not in names:
        return None
    return (
        "is a spaCy pipeline." if found == "config.cfg" else f"holds spaCy pipelines ({found}).",
        "name a transformers folder: if the pipeline has a transformer, config.cfg says which ([components.transformer.model]).",
    )


def _openvino(folder: Path, names: frozenset[str]) -> _Found:
    name = _ending(names, "openvino_model.xml", "_model.xml")
    return None if name is None else (f"is an OpenVINO export ({name}), which is finished.", _EXPORTED)


def _onnx(folder: Path, names: frozenset[str]) -> _Found:
    name = _ending(names, ".onnx")
    return None if name is None else (f"is an ONNX export ({name}), which is finished (`bench` measures it).", _EXPORTED)


_EXPORTED = "name the folder of the PyTorch model that it was exported from: config.json, tokenizer and model.safetensors."


def _frameworks(folder: Path, names: frozenset[str]) -> _Found:
    """Weights of TensorFlow, Flax and others."""
    if str(_content(folder, CONFIG).get("module", "")).startswith(("keras_hub", "keras_nlp")):
        return "is a preset of KerasHub.", "name a transformers folder with PyTorch weights."
    tensorflow = _ending(names, ".h5", "saved_model.pb", ".ckpt.index", ".keras", ".ckpt.meta") or (
        "variables/" in names and "variables/"
    )
    kinds = (
        (tensorflow, "TensorFlow", "from_tf=True"),
        (_ending(names, ".msgpack"), "Flax", "from_flax=True"),
    )
    for name, kind, option in kinds:
        if name:
            return (
                f"has its weights only for {kind} ({name}).",
                f"make PyTorch weights of them with transformers 4: AutoModel....from_pretrained(<this folder>, {option})"
                ".save_pretrained(<another folder>).",
            )
    name = _ending(
        names,
        *(
            ".tflite",
            ".mlmodel",
            ".mlpackage/",
            ".mlmodelc/",
            ".engine",
            ".plan",
            ".trt",
            ".nemo",
            ".pte",
            ".ort",
            ".ot",
            ".pt2",
            ".npz",
        ),
        "com.apple.coreml/",
    )
    return None if name is None else (f"is an export for another runtime ({name}).", _EXPORTED)


def _other_safetensors(folder: Path, names: frozenset[str]) -> _Found:
    found = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if not found:
        return None
    if any("-of-" in name for name in found):
        return f"holds {found[0]}, and no {INDEX}, which says what is where.", "copy the whole folder again."
    return f"holds no {WEIGHTS}, only {', '.join(found[:3])}.", f"if that is the model, give it the name {WEIGHTS}."


def _pickles(folder: Path, names: frozenset[str]) -> _Found:
    beside = {name.removesuffix(".xml") for name in names}  # an OpenVINO export keeps its numbers in a .bin
    own = (
        name
        for name in names
        if "/" not in name and name not in _NO_WEIGHTS and name.removesuffix(".bin") not in beside - {name}
    )
    name = _ending(own, *PICKLES[:6])
    return (
        None if name is None else (f"has its weights only as pickle ({name}), which can run code and is not read.", PICKLE_HELP)
    )


_NO_WEIGHTS = {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"}


def _data(folder: Path, names: frozenset[str]) -> _Found:
    name = _ending(names, ".tsv", ".csv", ".jsonl", ".parquet", ".arrow", "dataset_info.json")
    if name is None or CONFIG in names:
        return None
    return f"holds no config.json, but data ({name}).", "name a model folder here, and this one as the data."


def _archive(folder: Path, names: frozenset[str]) -> _Found:
    name = _ending(names, ".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".7z", ".rar", ".mar")
    return None if name is None else (f"holds no {WEIGHTS}, but an archive ({name}).", "unpack it, and name the folder in it.")


def _half_downloaded(folder: Path, names: frozenset[str]) -> _Found:
    name = _ending(names, ".incomplete", ".part", ".crdownload", ".tmp", ".aria2")
    return (
        None if name is None else (f"holds no {WEIGHTS}; {name} looks like a download that was cut off.", "download it again.")
    )


def _old_config(folder: Path, names: frozenset[str]) -> _Found:
    if OLD_CONFIG not in names or CONFIG in names:
        return None
    return f"holds {OLD_CONFIG}, and no {CONFIG}.", f'copy {OLD_CONFIG} to {CONFIG} and add "model_type": "bert" to it.'


def _anything(folder: Path, names: frozenset[str]) -> _Found:
    """What a folder without a config holds, for want of anything better."""
    if CONFIG in names:
        return None
    there = sorted(names, key=lambda name: (name.count("/"), name))
    return (
        f"holds no {CONFIG}; it holds {', '.join(there[:5])}{', ...' if there[5:] else ''}.",
        "name a folder that save_pretrained() wrote.",
    )


_LOOKS: tuple[_Look, ...] = (
    _empty,
    _pointers,
    _adapter,
    _sentence_transformers,
    _checkpoints,
    _distributed,
    _spacy,
    _old_config,
    _quantized,
    _other_safetensors,
    _fasttext,
    _gguf,
    _ctranslate2,
    _flair,
    _lightning,
    _hub_cache,
    _mlflow,
    _gliner,
    _fairseq,
    _pickles,
    _openvino,
    _onnx,
    _frameworks,
    _models_inside,
    _data,
    _half_downloaded,
    _archive,
    _anything,
)
