"""Loads a delivered folder with other tools, each in an environment without slimformer, and compares their scores with ours.

    python benchmarks/other_tools.py --envs ./envs                   # makes a tiny classifier and delivers it
    python benchmarks/other_tools.py --envs ./envs --folder ./small  # a folder of yours, with classes, a score, or vectors

It makes the environments below --envs once, with pip and npm, and prints a table for docs/concepts.md. A row that is no success holds
the tool's own words. Each tool runs this very file in its environment, which is why only the standard library is imported at the top.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TORCH = os.environ.get("TORCH", "torch==2.13.0")  # as in the Makefile
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "card": ("onnxruntime", "tokenizers", "numpy"),
    "transformers": (TORCH, "transformers>=5,<6", "onnxruntime"),
    "sentence-transformers": (TORCH, "sentence-transformers>=6,<7"),
    "sentence-transformers-onnx": (TORCH, "sentence-transformers[onnx]>=6,<7"),
    "sentence-transformers-5": (TORCH, "sentence-transformers[onnx]>=5,<6"),  # brings optimum and transformers 4
    "sentence-transformers-openvino": (TORCH, "sentence-transformers[openvino]>=6,<7"),
    "fastembed": ("fastembed",),
    "node": ("@huggingface/transformers@4",),
}
NEEDS = {  # what a folder must have, or an environment is not made
    "card": "labels",
    "transformers": "labels",
    "fastembed": "vectors",
    "sentence-transformers-openvino": "openvino",
}
FILES = ("onnx/model.onnx", "onnx/model_quantized.onnx", "onnx/model_int8.onnx", "openvino/openvino_model.xml")
SINGLE = (("where is my parcel",), ("I want my money back, now!",), ("Could you change the address of order 12?",))
PAIRS = (("where is my parcel", "it will arrive on Monday"), ("cancel it", "Your order of two lamps was cancelled."))
MODEL, PROBABILITIES, LOGITS, ANSWERS, VECTORS = "model", "probabilities", "logits", "answers", "sentence_embedding"


@dataclass(frozen=True)
class Seen:
    """What one call of a tool gave: scores of each row in the order of the classes, or why it gave none."""

    tool: str
    call: str
    loads: str = ""  # the part of the folder
    form: str = ""  # of the scores
    scores: Any = ()
    pairs: bool = False  # whether rows were pairs of texts
    why: str = ""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, required=True, help="the environments are made here, unless they are there")
    parser.add_argument("--folder", type=Path, help="a folder that compress or run delivered; by default a tiny one is made")
    parser.add_argument("--only", nargs="+", choices=ENVIRONMENTS, default=list(ENVIRONMENTS), help="these environments alone")
    options = parser.parse_args()
    home = options.envs.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder.resolve() if options.folder else make_small(Path(scratch) / "small")
        request = asked(folder, Path(scratch))
        for name in options.only:
            if name in NEEDS and not request[NEEDS[name]]:
                continue
            trouble = prepare(home / name, ENVIRONMENTS[name])
            failed = Seen(name, f"pip install '{ENVIRONMENTS[name][-1]}'", why=trouble)
            for seen in [failed] if trouble else probe(name, home / name, request):
                print("|", " | ".join(cells(seen, request)), "|", flush=True)


# -- Our own answers -----------------------------------------------------------------------------------------------------------


def make_small(out: Path) -> Path:
    """A tiny BERT with a WordPiece tokenizer, tuned a little for the built-in task, cut and delivered."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertConfig, BertModel, BertTokenizer

    import slimformer
    from slimformer.tasks.base import Split

    task = slimformer.tasks.Intents(examples=600, dev=96)
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    raw.train_from_iterator(
        [row.texts[0] for row in task.split(Split.TRAIN)], trainers.WordPieceTrainer(vocab_size=900, special_tokens=special)
    )
    tokenizer = BertTokenizer(vocab=raw.get_vocab(), model_max_length=64)
    shape: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model: Any = BertModel(BertConfig(vocab_size=raw.get_vocab_size(), max_position_embeddings=64, **shape))
    cut = slimformer.Calibrate(slimformer.methods.Fisher(keep=0.5, examples=64, damage_examples=32))
    bench = slimformer.Bench(rivals=(), seconds=0.2)
    recipe = slimformer.Recipe(model, task, (slimformer.Train(epochs=8, lr=3e-3), cut), bench=bench)
    return slimformer.run(recipe, out, tokenizer=tokenizer, wait_seconds=0).out


def asked(folder: Path, scratch: Path) -> dict[str, Any]:
    """What each tool is told: where everything lies, the texts, and our scores, by part of the folder: logits of each row."""
    import torch

    import slimformer
    from slimformer.data.tokenizer import load_tokenizer
    from slimformer.measuring.sessions import open_session

    tokenizer = load_tokenizer(folder)
    slimformer.save_dense(folder, scratch / "dense")
    model: Any = slimformer.load(folder)
    there = [
        name for name in FILES if (folder / name).is_file() and (name.endswith(".onnx") or find_spec("openvino") is not None)
    ]
    sessions = {name: open_session(folder / name, 1) for name in there}
    scores: dict[str, Any] = {name: {} for name in (MODEL, *sessions)}
    head = getattr(model.config, VECTORS, None)
    wanted = LOGITS if head is None else VECTORS
    for kind, texts in (("single", SINGLE),) if head else (("single", SINGLE), ("pairs", PAIRS)):
        encoded = [tokenizer.encode(*row) for row in texts]
        parts = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        feeds = [{name: torch.tensor([getattr(row, part)]) for name, part in parts.items()} for row in encoded]
        known = {"token_type_ids"} if model.config.model_type in ("distilbert", "roberta") else set()
        with torch.no_grad():
            scores[MODEL][kind] = [
                model(**{name: value for name, value in feed.items() if name not in known})[wanted][0].tolist()
                for feed in feeds
            ]
        for name, session in sessions.items():
            scores[name][kind] = [
                session({part: value.numpy() for part, value in feed.items()})[wanted][0].tolist() for feed in feeds
            ]
    return {
        "folder": str(folder),
        "dense": str(scratch / "dense"),
        "scratch": str(scratch),
        "files": [name for name in sessions if name.endswith(".onnx")],
        "openvino": [name for name in sessions if name.endswith(".xml")],
        "labels": [] if head else [model.config.id2label[number] for number in range(model.config.num_labels)],
        "vectors": head,
        "single": SINGLE,
        "pairs": PAIRS,
        "scores": scores,
    }


def cells(seen: Seen, request: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table: tool, call, what it loads, and the largest difference of a score from ours or the reason."""
    if seen.why:
        return seen.tool, f"`{seen.call}`", seen.loads, seen.why
    ours = request["scores"][seen.loads]["pairs" if seen.pairs else "single"]
    if seen.form == ANSWERS:
        best = [request["labels"][max(range(len(row)), key=row.__getitem__)] for row in ours]
        result = "the same labels" if best == seen.scores else f"OTHER LABELS: {seen.scores}, ours {best}"
    else:
        wanted = [softmax(row) for row in ours] if seen.form == PROBABILITIES else ours
        pairs = [(a, b) for mine, theirs in zip(wanted, seen.scores, strict=True) for a, b in zip(mine, theirs, strict=True)]
        result = f"{max(abs(a - b) for a, b in pairs):.0e}"
    return seen.tool, f"`{seen.call}`", f"`{seen.loads}`", result


def softmax(row: Sequence[float]) -> list[float]:
    """Probabilities of logits."""
    from math import exp

    powers = [exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


# -- Environments --------------------------------------------------------------------------------------------------------------


def prepare(home: Path, packages: Sequence[str]) -> str:
    """Makes an environment unless it is there; returns why that cannot be, or ""."""
    done = home / "installed"
    if done.is_file():
        return ""
    if home.name == "node":
        if shutil.which("npm") is None:
            return "Node is not installed"
        home.mkdir(parents=True, exist_ok=True)
        names = (
            "ONNXRUNTIME_NODE_INSTALL",
            "ONNXRUNTIME_NODE_INSTALL_CUDA",
        )  # its package holds the CPU build; no other is fetched
        made = subprocess.run(
            ["npm", "install", "--prefix", str(home), *packages],
            capture_output=True,
            text=True,
            env={**os.environ, **dict.fromkeys(names, "skip")},
        )
    else:
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        made = subprocess.run(
            [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", *packages], capture_output=True, text=True
        )
    if made.returncode:
        return next(
            (line for line in reversed(made.stderr.splitlines()) if line.startswith("ERROR: Cannot")), made.stderr[-300:]
        ).replace("\n", " ")
    done.touch()
    return ""


def probe(name: str, home: Path, request: dict[str, Any]) -> list[Seen]:
    """What a tool makes of the folder, asked in its own environment."""
    place = Path(request["scratch"]) / f"{name}.json"
    place.write_text(json.dumps(request), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if name == "node":
        script = home / "probe.mjs"
        script.write_text(NODE, encoding="utf-8")
        command = ["node", str(script), str(place)]
    else:
        command = [str(home / "bin" / "python"), str(Path(__file__).resolve()), "--probe", name, str(place)]
    made = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=request["scratch"])
    answer = place.with_suffix(".answer")
    if not answer.is_file():
        return [Seen(name, "", why=(made.stderr.strip().splitlines() or ["nothing"])[-1])]
    return [Seen(**item) for item in json.loads(answer.read_text(encoding="utf-8"))]


def answer(name: str, place: Path) -> None:
    """In the environment of a tool: writes down what it makes of the folder."""
    if find_spec("slimformer") is not None:
        raise SystemExit("slimformer is installed here")
    request = json.loads(place.read_text(encoding="utf-8"))
    rows = [vars(seen) for seen in PROBES[name](request)]
    place.with_suffix(".answer").write_text(json.dumps(rows), encoding="utf-8")


def tried(tool: str, call: str, loads: str, form: str, ask: Callable[[], Any], *, pairs: bool = False) -> Seen:
    """The scores that `ask` gives, or the first line of what it raises."""
    try:
        return Seen(tool, call, loads, form, ask(), pairs)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return Seen(tool, call, loads, why=f"{type(error).__name__}: {lines[0][:160]}")


# -- One function for each tool ------------------------------------------------------------------------------------------------


def see_card(request: dict[str, Any]) -> Iterator[Seen]:
    """The lines of the card, with the texts that it shows replaced by ours."""
    card = (Path(request["folder"]) / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (file,) = re.findall(r'InferenceSession\("([^"]+)"', code)
    texts = ", ".join(json.dumps(text) for (text,) in request["single"])
    code = re.sub(r"encode_batch\(\[.*\]\)", lambda _: f"encode_batch([{texts}])", code)

    def ask() -> list[str]:
        shown = io.StringIO()
        with contextlib.chdir(request["folder"]), contextlib.redirect_stdout(shown):
            exec(code, {})
        return [str(item) for item in eval(shown.getvalue())]

    tool = f"onnxruntime {version('onnxruntime')}, tokenizers {version('tokenizers')}"
    yield tried(tool, "the lines of the card", file, ANSWERS, ask)


def see_transformers(request: dict[str, Any]) -> Iterator[Seen]:
    """Plain Auto classes and a pipeline."""
    import numpy as np
    import onnxruntime
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

    tool = f"transformers {version('transformers')}"

    def scored(folder: Path, file: str) -> list[list[float]]:
        config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert [config.id2label[number] for number in range(config.num_labels)] == request["labels"]
        session = onnxruntime.InferenceSession(str(Path(request["folder"]) / file))
        rows = [tokenizer(*texts, return_tensors="np") for texts in request["single"]]
        names = [item.name for item in session.get_inputs()]
        feeds = [{name: row[name].astype(np.int64) for name in names} for row in rows]
        return [session.run(["logits"], feed)[0][0].tolist() for feed in feeds]

    for name, folder in ((".", Path(request["folder"])), ("onnx", Path(request["folder"]) / "onnx")):
        call = f'AutoConfig, AutoTokenizer.from_pretrained("{name}")'
        yield tried(tool, call, FILES[0], LOGITS, lambda folder=folder: scored(folder, FILES[0]))  # type: ignore[misc]
    yield tried(tool, 'pipeline("text-classification", DENSE)', MODEL, PROBABILITIES, lambda: piped(pipeline, request))
    refused = Path(request["folder"]) / "model"
    yield tried(
        tool,
        "AutoModelForSequenceClassification",
        MODEL,
        LOGITS,
        lambda: AutoModelForSequenceClassification.from_pretrained(refused),
    )


def piped(pipeline: Any, request: dict[str, Any], **parts: Any) -> list[list[float]]:
    """Probabilities from transformers' pipeline, in the order of the classes."""
    asked = pipeline("text-classification", **({"model": request["dense"]} | parts))
    found = asked([text for (text,) in request["single"]], top_k=None)
    return [[next(item["score"] for item in row if item["label"] == label) for label in request["labels"]] for row in found]


def see_sentence_transformers(request: dict[str, Any]) -> Iterator[Seen]:
    """A CrossEncoder from the plain folder, or a SentenceTransformer from the folder itself, with PyTorch."""
    from sentence_transformers import CrossEncoder, SentenceTransformer

    tool = f"sentence-transformers {version('sentence-transformers')}"
    if request["vectors"]:
        yield tried(
            tool,
            'SentenceTransformer(".")',
            MODEL,
            VECTORS,
            lambda: embedded(SentenceTransformer(request["folder"]).encode, request),
        )
        return
    yield tried(
        tool, "CrossEncoder(DENSE)", MODEL, LOGITS, lambda: crossed(CrossEncoder(request["dense"]), request), pairs=True
    )


def see_backend(request: dict[str, Any], backend: str, package: str, files: Sequence[str]) -> Iterator[Seen]:
    """A CrossEncoder or a SentenceTransformer from each of the files."""
    from sentence_transformers import CrossEncoder, SentenceTransformer

    tool = ", ".join(f"{name} {version(name)}" for name in ("sentence-transformers", package, "transformers"))
    kind: Any = SentenceTransformer if request["vectors"] else CrossEncoder
    for file in files:
        place, name = file.split("/")  # the step that computes words has a folder of its own, where files of vectors are not
        options = {"subfolder": place, "file_name": name} if request["vectors"] else {"file_name": file}
        call = f'{kind.__name__}(".", backend="{backend}", model_kwargs={json.dumps(options)})'

        def ask(options: dict[str, str] = options) -> list[list[float]]:
            model = kind(request["folder"], backend=backend, model_kwargs=options)
            return embedded(model.encode, request) if request["vectors"] else crossed(model, request)

        yield tried(tool, call, file, VECTORS if request["vectors"] else LOGITS, ask, pairs=not request["vectors"])


def see_onnx_backend(request: dict[str, Any]) -> Iterator[Seen]:
    """A CrossEncoder from each ONNX file."""
    yield from see_backend(request, "onnx", "optimum-onnx", request["files"])


def see_openvino_backend(request: dict[str, Any]) -> Iterator[Seen]:
    """A CrossEncoder from OpenVINO's file, if there is one."""
    yield from see_backend(request, "openvino", "optimum-intel", request["openvino"])


def embedded(encode: Callable[[list[str]], Any], request: dict[str, Any]) -> list[list[float]]:
    """Vectors of the texts, one after the other: ours are of texts alone."""
    return [[float(value) for value in next(iter(encode([text])))] for (text,) in request["single"]]


def see_fastembed(request: dict[str, Any]) -> Iterator[Seen]:
    """The vector as each file gives it, of a model that fastembed is told of."""
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    for file in request["files"]:
        name, tool = f"small/{Path(file).stem}", f"fastembed {version('fastembed')}"

        def ask(name: str = name, file: str = file) -> list[list[float]]:
            size = len(request["scores"][file]["single"][0])
            TextEmbedding.add_custom_model(
                model=name,
                pooling=PoolingType.DISABLED,
                normalization=False,
                sources=ModelSource(hf=name),
                dim=size,
                model_file=file,
            )
            return embedded(TextEmbedding(model_name=name, specific_model_path=request["folder"]).embed, request)

        yield tried(tool, f'TextEmbedding.add_custom_model(pooling=DISABLED, model_file="{file}")', file, VECTORS, ask)


def crossed(model: Any, request: dict[str, Any]) -> list[list[float]]:
    """Logits of pairs from a CrossEncoder."""
    import torch

    rows = model.predict([tuple(pair) for pair in request["pairs"]], activation_fn=torch.nn.Identity())
    return [[float(value) for value in (row if getattr(row, "ndim", 0) else [row])] for row in rows]


def see_optimum(request: dict[str, Any]) -> Iterator[Seen]:
    """optimum's models, in transformers' pipeline; and sentence-transformers with transformers 4."""
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer, pipeline

    tool = f"optimum-onnx {version('optimum-onnx')}, transformers {version('transformers')}"
    for file in [] if request["vectors"] else request["files"]:
        place, name = file.split("/")
        call = f'ORTModelForSequenceClassification.from_pretrained(".", subfolder="{place}", file_name="{name}")'

        def ask(place: str = place, name: str = name) -> list[list[float]]:
            model = ORTModelForSequenceClassification.from_pretrained(request["folder"], subfolder=place, file_name=name)
            return piped(pipeline, request, model=model, tokenizer=AutoTokenizer.from_pretrained(request["folder"]))

        yield tried(tool, call, file, PROBABILITIES, ask)
    yield from see_onnx_backend(request)


PROBES: dict[str, Callable[[dict[str, Any]], Iterator[Seen]]] = {
    "card": see_card,
    "transformers": see_transformers,
    "sentence-transformers": see_sentence_transformers,
    "sentence-transformers-onnx": see_onnx_backend,
    "sentence-transformers-5": see_optimum,
    "sentence-transformers-openvino": see_openvino_backend,
    "fastembed": see_fastembed,
}
NODE = """
import { readFileSync, writeFileSync } from "node:fs";
import { basename, dirname } from "node:path";
import { AutoConfig, AutoTokenizer, env, pipeline } from "@huggingface/transformers";

const place = process.argv[2];
const request = JSON.parse(readFileSync(place, "utf8"));
env.allowRemoteModels = false;
env.localModelPath = dirname(request.folder);
const name = basename(request.folder);
const tool = `transformers.js ${env.version}, Node ${process.versions.node}`;
const seen = [];
for (const [dtype, file] of [["fp32", "onnx/model.onnx"], ["q8", "onnx/model_quantized.onnx"], ["int8", "onnx/model_int8.onnx"]]) {
  if (!request.files.includes(file)) continue;
  const task = request.vectors ? "feature-extraction" : "text-classification";
  const row = { tool, call: `pipeline("${task}", ".", { dtype: "${dtype}" })`, loads: file };
  try {
    const classify = await pipeline(task, name, { dtype, device: "cpu" });
    if (request.vectors) {
      const scores = [];
      for (const [text] of request.single) {
        const made = await classify(text, { pooling: request.vectors.pooling[0], normalize: request.vectors.normalize });
        scores.push(Array.from(made.data));
      }
      seen.push({ ...row, form: "sentence_embedding", scores });
      continue;
    }
    const scores = [];
    for (const [text] of request.single) {
      const found = await classify(text, { top_k: request.labels.length });
      scores.push(request.labels.map((label) => found.find((item) => item.label === label).score));
    }
    seen.push({ ...row, form: "probabilities", scores });
  } catch (error) {
    seen.push({ ...row, why: String(error).split("\\n")[0].slice(0, 200) });
  }
}
writeFileSync(place.replace(/json$/, "answer"), JSON.stringify(seen));
"""


if __name__ == "__main__":
    if sys.argv[1:2] == ["--probe"]:
        answer(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
