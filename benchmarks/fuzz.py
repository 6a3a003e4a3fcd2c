"""Gives thousands of mutated files to everything in slimformer that reads files, and counts what comes of it.

    python benchmarks/fuzz.py                       # 20,000 inputs, about 20 minutes on two cores with nothing else to do
    python benchmarks/fuzz.py --inputs 500 --kind table.csv --kind onnx
    python benchmarks/fuzz.py --replay onnx:117     # one input again, with its traceback

Each input is a valid folder with one or two files changed: bits flipped, pieces cut, doubled or replaced, values of JSON, YAML, Parquet,
safetensors headers and ONNX graphs replaced by hostile ones. Children with limits (20 s of CPU time, 3 GiB over what they take empty)
read them. An input must end in a result or in a SlimformerError that a terminal shows as it is. A traceback, a hang, an abort, an opened
pickle, a file read outside the folder and a call of the network are faults. The inputs depend on --seed alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import random
import resource
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

SECONDS = 20.0  # of CPU time for one input, so that a busy machine or a pause makes no hang
IDLE_SECONDS = 120.0  # that a child may wait for something, as far as this process was awake to see it
BYTES = 3 << 30
MARK = "opened-a-pickle"  # a pickle that is loaded makes a folder of this name
BAITS = ("elsewhere.safetensors", "elsewhere.txt")  # beside the folder of an input: nobody may read them

# -- Hostile values ------------------------------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 64, 10**6, 10**10, 10**18, -(10**18), 10**30, 0.5, -0.0, 1e300, 1e-300),
    *(
        math.nan,
        math.inf,
        -math.inf,
        "",
        " ",
        "0",
        "1",
        "nan",
        "x" * 2000,
        "\x1b[31mred",
        "a\x00b",
        "\ud800",
        "ß" * 100,
        "-1",
        "1e9",
    ),
    *(
        "../elsewhere.safetensors",
        "/dev/zero",
        "a.bin",
        "pytorch_model.bin",
        "kernels-community/flash-attn",
        "float33",
        "int8",
        "bert",
    ),
    *("roberta", "BertForMaskedLM", "BertForTokenClassification", "NoSuchModel", "gelu_new", "[PAD]", "[UNK]", "9" * 5000),
    *([], {}, [[]], [None], [1, 2, 3], ["x"], {"x": 1}, {"0": "a", "1": "a"}, [[1.0] * 3] * 2),
)
TOKENS = (
    *(
        b"",
        b"\x00",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b'"',
        b"'",
        b"\n",
        b"\r",
        b"\t",
        b",",
        b";",
        b"|",
        b"[",
        b"{",
        b":",
        b"&a [*a]",
        b"\\",
    ),
    *(
        b"\x1b[31m",
        b"9" * 5000,
        b"[" * 3000,
        b"-1",
        b"nan",
        b"1e999",
        b"null",
        b"2024-13-01",
        b"!!int x",
        b"<script>",
        b"\xc3\xa9",
    ),
)


def change_bytes(data: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, cut, doubled, moved or replaced."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        size = len(data)
        start = draw.randrange(size + 1)
        stop = min(size, start + draw.choice((1, 1, 2, 8, 64, max(1, size // 4))))
        piece = data[start:stop]
        kind = draw.randrange(8)
        if kind == 0 and piece:
            place = draw.randrange(len(piece))
            piece = piece[:place] + bytes([piece[place] ^ (1 << draw.randrange(8))]) + piece[place + 1 :]
        elif kind == 1:
            piece = b""
        elif kind == 2:
            piece = piece * draw.choice((2, 3, 50))
        elif kind == 3:
            piece = draw.choice(TOKENS)
        elif kind == 4:
            piece += draw.choice(TOKENS)
        elif kind == 5:
            piece = draw.randbytes(len(piece))
        elif kind == 6:
            piece = draw.choice((b"\x00", b"\xff")) * len(piece)
        else:
            return data[:start]
        data = data[:start] + piece + data[stop:]
    return data


def change_value(value: Any, draw: random.Random) -> Any:
    """A tree of plain data with one place changed: replaced, removed, renamed, doubled, nested or swapped with another."""
    places = list(_places(value))
    if not places or draw.random() < 0.03:
        return draw.choice(VALUES)
    holder, key = draw.choice(places)
    kind = draw.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice((f"{key}x", key[:-1], key.upper(), "", "x" * 300))] = holder.pop(key)
    elif kind == 2:
        holder[key] = [holder[key]] * draw.choice((1, 2, 200))
    elif kind == 3:
        other, name = draw.choice(places)
        if name in other if isinstance(other, dict) else name < len(other):
            holder[key] = json.loads(json.dumps(other[name]))
    elif kind == 4 and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
        number = holder[key]
        holder[key] = draw.choice(
            (
                -number,
                number + 1,
                number - 1,
                number * 1000,
                number / 3,
                str(number),
                int(number) if number == number and abs(number) < 1e300 else 0,
            )
        )
    elif kind == 5 and isinstance(holder[key], str):
        text = holder[key]
        holder[key] = draw.choice((text + "x", text[1:], text.upper(), text * 500, f"../{text}", f"{text}\n{text}", text[::-1]))
    else:
        holder[key] = json.loads(json.dumps(draw.choice(VALUES)))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield value, key
            yield from _places(item)
    elif isinstance(value, list):
        for number, item in enumerate(value[:50]):
            yield value, number
            yield from _places(item)


def change_json(data: bytes, draw: random.Random) -> bytes:
    """One to three places of a JSON file, or its bytes."""
    if draw.random() < 0.3:
        return change_bytes(data, draw)
    value = json.loads(data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        value = change_value(value, draw)
    if draw.random() < 0.02:
        return b"[" * 100_000 + b"]" * 100_000
    return json.dumps(value).encode()


def change_lines(data: bytes, draw: random.Random) -> bytes:
    """One line of JSON lines, or the bytes of the file."""
    lines = data.splitlines(keepends=True)
    if draw.random() < 0.3 or not lines:
        return change_bytes(data, draw)
    for _ in range(draw.choice((1, 1, 3))):
        place = draw.randrange(len(lines))
        try:
            lines[place] = change_json(lines[place], draw) + b"\n"
        except (ValueError, RecursionError):  # a line that was changed before
            lines[place] = change_bytes(lines[place], draw)
    return b"".join(lines)


def change_yaml(data: bytes, draw: random.Random) -> bytes:
    """One to three places of a recipe, or its bytes."""
    import yaml

    if draw.random() < 0.4:
        return change_bytes(data, draw)
    value = yaml.safe_load(data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        value = change_value(value, draw)
    try:
        return yaml.safe_dump(value, sort_keys=False).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:
        return change_bytes(data, draw)


def change_header(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file: its header as JSON, with or without the right length, or its bytes, mostly those of the header."""
    size = int.from_bytes(data[:8], "little")
    if draw.random() < 0.25:
        head = change_bytes(data[: 8 + size], draw)
        return head + data[8 + size :]
    if draw.random() < 0.2:
        return data[: 8 + size] + change_bytes(data[8 + size :], draw)
    header = json.loads(data[8 : 8 + size])
    for _ in range(draw.choice((1, 1, 2))):
        entry = header.get(draw.choice(sorted(header)))
        kind = draw.randrange(5)
        if kind == 0 and isinstance(entry, dict) and "dtype" in entry:
            entry["dtype"] = draw.choice(("F16", "BF16", "F64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "I64", "X"))
        elif kind == 1 and isinstance(entry, dict) and "shape" in entry:
            entry["shape"] = draw.choice(
                (entry["shape"][::-1], [*entry["shape"], 1], [0], [10**9, 10**9], [math.prod(entry["shape"])])
            )
        else:
            header = change_value(header, draw)
            if not isinstance(header, dict):
                break
    text = json.dumps(header).encode()
    length = len(text) if draw.random() < 0.9 else draw.choice((0, 1, 2**62, len(text) + 9))
    return length.to_bytes(8, "little") + text + data[8 + size :]


def change_parquet(data: bytes, draw: random.Random) -> bytes:
    """A Parquet file: its columns in other types, with nulls, nested or renamed, or its bytes."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    if draw.random() < 0.6:
        return change_bytes(data, draw)
    table = pq.read_table(io.BytesIO(data))
    names, columns = table.column_names, [column.to_pylist() for column in table.columns]
    place = draw.randrange(len(names))
    values = columns[place]
    columns[place] = draw.choice(
        (
            [[value] for value in values],
            [{"x": value} for value in values],
            [None] * len(values),
            [None if number % 7 == 0 else value for number, value in enumerate(values)],
            list(range(len(values))),
            [number + 0.5 for number in range(len(values))],
            [b"\xff\xfe"] * len(values),
            [number % 2 == 0 for number in range(len(values))],
            ["\x1b[31m" + "x" * 5000] * len(values),
            [math.nan] * len(values),
        )
    )
    if draw.random() < 0.3:
        names[draw.randrange(len(names))] = draw.choice(("", "x" * 3000, "label", "text", "\x1b[1m"))
    out = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(column) for column in columns], names=names), out)
    return out.getvalue()


def change_graph(data: bytes, draw: random.Random) -> bytes:
    """An ONNX file: names, types, shapes, nodes, tables and versions of its graph, or its bytes."""
    import onnx

    if draw.random() < 0.4:
        return change_bytes(data, draw)
    model = onnx.load_from_string(data)
    graph = model.graph
    for _ in range(draw.choice((1, 1, 2))):
        kind = draw.randrange(10)
        values = [*graph.input, *graph.output]
        value, node = draw.choice(values), draw.choice(graph.node)
        if kind == 0:
            value.name = draw.choice(("", "x", "logits", "input_ids", "position_ids", "a\x1b[1m"))
        elif kind == 1:
            value.type.tensor_type.elem_type = draw.randrange(18)
        elif kind == 2:
            for dimension in value.type.tensor_type.shape.dim:
                dimension.Clear()
                dimension.dim_value = draw.choice((0, 1, 2, 16, 10**9, -1))
        elif kind == 3:
            graph.node.remove(node)
        elif kind == 4:
            node.op_type = draw.choice(("Add", "Mul", "Softmax", "NoSuchOperator", "Reshape", "Loop"))
        elif kind == 5:
            node.domain = draw.choice(("", "com.microsoft", "own.domain"))
        elif kind == 6 and graph.initializer:
            table = draw.choice(graph.initializer)
            table.raw_data = draw.choice(
                (b"", table.raw_data[:-4], b"\xff" * len(table.raw_data), draw.randbytes(len(table.raw_data)))
            )
        elif kind == 7 and graph.initializer:
            table = draw.choice(graph.initializer)
            table.data_location = 1
            for name, text in (("location", draw.choice(("../elsewhere.txt", "/dev/zero", "gone.bin"))), ("offset", "0")):
                entry = table.external_data.add()
                entry.key, entry.value = name, text
        elif kind == 8:
            model.ir_version = draw.choice((0, 3, 99, 2**31))
        else:
            model.opset_import[0].version = draw.choice((0, 1, 7, 99, 2**31))
    out: bytes = model.SerializeToString()
    return out


CHANGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": change_json,
    ".jsonl": change_lines,
    ".yaml": change_yaml,
    ".safetensors": change_header,
    ".parquet": change_parquet,
    ".onnx": change_graph,
}

# -- Valid inputs, and the functions that read them ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One kind of input: its share of all, how a valid folder is made, what reads a changed one, and which files are changed."""

    share: int
    make: Callable[[Path], None]
    read: Callable[[Path], None]
    files: tuple[str, ...] = ("*",)


def _task() -> Any:
    from slimformer.tasks.classification import Classification

    return Classification(data=str(HOME / "seeds" / "data"), max_length=16)


def _rows(folder: Path, name: str) -> None:
    from tiny_folder import sentences

    rows = [{"sentence": text, "label": label, "n": number} for number, (text, label) in enumerate(sentences(60, seed=1))]
    folder.mkdir(parents=True)
    file = folder / name
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    else:
        mark = "\t" if file.suffix == ".tsv" else ","
        lines = [mark.join(map(str, row.values())) for row in rows]
        file.write_text("\n".join([mark.join(rows[0]), *lines]) + "\n", encoding="utf-8")


def _squad(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, count in (("train", 40), ("dev", 10)):
        paragraphs = []
        for number in range(count // 2):
            context = f"the film was great and the room {number} seemed warm"
            questions = [
                {
                    "id": f"{name}{number}-{place}",
                    "question": f"my {word} was",
                    "answers": [{"text": word, "answer_start": context.index(word)}],
                }
                for place, word in enumerate(("film", "room"))
            ]
            paragraphs.append({"context": context, "qas": questions})
        (folder / f"{name}-v1.1.json").write_text(
            json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}), encoding="utf-8"
        )


def _pickle(file: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(HOME / MARK),)

    file.write_bytes(pickle.dumps(Trap()))


def _copied(name: str) -> Callable[[Path], None]:
    """A copy of a folder that `_models` made."""

    def make(folder: Path) -> None:
        shutil.copytree(HOME / "seeds" / name, folder)
        if (folder / "config.json").exists():
            _pickle(folder / "a.bin")

    return make


def _models() -> None:
    """Makes model folders of all kinds, an ONNX export and a delivered folder in `seeds`."""
    import torch
    from tiny_export import export
    from tiny_folder import write_data, write_model

    import slimformer
    from slimformer.core.ranges import Range, Ranges
    from slimformer.families.base import anatomy_of
    from slimformer.forms.kronecker import Kronecker

    torch.set_num_threads(1)
    seeds = HOME / "seeds"
    write_data(seeds / "data", train=60, dev=20)
    dense = write_model(seeds / "dense")
    model = slimformer.load(dense)
    model.save_pretrained(seeds / "shards", max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(dense / name, seeds / "shards" / name)
    anatomy = anatomy_of(model)
    plan = slimformer.Plan({"encoder.0.heads": (1, 3), "encoder.1.neurons": (0, 5, 9)})
    cut = slimformer.shrink(model, anatomy, plan)
    slimformer.save(cut, plan, seeds / "cut", tokenizer_from=dense)
    factored = plan.then(
        slimformer.Plan(forms={"embeddings.word": Kronecker((45, 8)), "encoder.1.query": Kronecker((4, 4), 2)})
    )
    slimformer.save(slimformer.shrink(model, anatomy, factored), factored, seeds / "kronecker", tokenizer_from=dense)
    point = next(iter(anatomy.points))
    slimformer.save(cut, plan, seeds / "ranges", tokenizer_from=dense, ranges=Ranges({point: Range(-1.0, 1.0)}))
    with torch.no_grad():
        for matrix in anatomy_of(cut).encoder_matrices():
            cut.get_parameter(f"{matrix.module}.weight")[:, ::2] = 0
    for values in ("float32", "float16", "int8"):
        slimformer.save(cut, plan, seeds / f"sparse-{values}", tokenizer_from=dense, values=values)
    export(seeds / "export")
    shutil.copytree(seeds / "export", seeds / "delivered")
    text = f"""
model: {dense}
task: {{use: classification, data: {seeds / "data"}}}
stages:
  - calibrate: {{method: {{use: fisher, keep: 0.6, cost: macs, examples: 32}}}}
  - train: {{steps: 2, methods: [{{use: distillation, temperature: 2.0}}]}}
  - train: {{steps: 2, lr: 0.001, methods: [{{use: quantization, start: 0.1}}]}}
  - export: {{values: float16}}
  - bench: {{rivals: [teacher-int8], seconds: 0.1}}
seed: 3
"""
    (seeds / "recipe").mkdir()
    (seeds / "recipe" / "recipe.yaml").write_text(text, encoding="utf-8")
    short = text.replace("  - train: {steps: 2, lr: 0.001, methods: [{use: quantization, start: 0.1}]}\n", "")
    (HOME / "short.yaml").write_text(short, encoding="utf-8")
    slimformer.run(slimformer.read_recipe(HOME / "short.yaml"), HOME / "run", threads=1, wait_seconds=0)
    shutil.rmtree(seeds / "delivered")
    shutil.copytree(HOME / "run", seeds / "delivered", ignore=shutil.ignore_patterns(".*", "log.jsonl", "*.html"))
    (seeds / "ledger").mkdir()
    shutil.copyfile(next((HOME / "run").glob("*ledger*")), seeds / "ledger" / "ledger.jsonl")


def read_table(folder: Path) -> None:
    """All that happens to a table: columns and labels guessed, three splits, bound to a model's labels, encoded."""
    from tokenizers import Tokenizer

    from slimformer.tasks.base import Split
    from slimformer.tasks.classification import Classification

    task = Classification(data=str(next(folder.iterdir()))).settled()
    for split in Split:
        task.split(split)
    tokenizer = Tokenizer.from_file(str(HOME / "seeds" / "dense" / "tokenizer.json"))
    bound = task.bind({"id2label": {"0": "bad", "1": "good"}, "num_labels": 2})
    bound.encode(bound.split(Split.DEV), tokenizer, 16)


def read_squad(folder: Path) -> None:
    """All that happens to questions."""
    from tokenizers import Tokenizer

    from slimformer.tasks.base import Split
    from slimformer.tasks.question_answering import QuestionAnswering

    task = QuestionAnswering(data=str(folder), max_length=32, stride=4)
    for split in Split:
        task.split(split)
    task.notes()
    tokenizer = Tokenizer.from_file(str(HOME / "seeds" / "dense" / "tokenizer.json"))
    task.encode(task.split(Split.DEV), tokenizer, 32)


def read_recipe_file(folder: Path) -> None:
    """A recipe, with every check before a run."""
    from slimformer import read_recipe
    from slimformer.running.preflight import preflight

    recipe = read_recipe(folder / "recipe.yaml")
    recipe.to_yaml()
    preflight(recipe)


def read_ledger(folder: Path) -> None:
    """A page on the rows of a ledger."""
    from slimformer import report

    out = Path(tempfile.mkdtemp(dir=HOME))
    try:
        report([folder], out / "page")
    finally:
        shutil.rmtree(out)


def read_model(folder: Path) -> None:
    """A model folder: what it holds, its weights, and every check before a run; then its outputs, if all of that went well."""
    import torch

    from slimformer import load
    from slimformer.reporting.inspection import inspect
    from slimformer.running.preflight import preflight
    from slimformer.running.recipe import Recipe
    from slimformer.saving import checkpoint

    failed = None
    for step in (
        lambda: checkpoint.load_plan(folder),
        lambda: checkpoint.load_ranges(folder),
        lambda: checkpoint.sparse_matrices(folder),
        lambda: inspect(folder, 16),
        lambda: preflight(Recipe(str(folder), _task(), ())),
    ):
        failed = _attempt(step) or failed
    model = load(folder)
    if failed is not None:
        raise failed
    with torch.no_grad():
        model(input_ids=torch.tensor([[2, 4, 5, 3]]), attention_mask=torch.ones(1, 4, dtype=torch.long))


def read_export(folder: Path) -> None:
    """A folder with a model file: quality, size and speed."""
    from slimformer import bench
    from slimformer.measuring.machine import Load

    bench([folder], _task(), rounds=1, seconds=0.01, load=Load(0.0, 0.0, 0.0, True), threads=1)


def _attempt(step: Callable[[], Any]) -> Exception | None:
    """The refusal of a step, if it refuses; anything else goes through."""
    from slimformer.errors import SlimformerError

    try:
        step()
    except SlimformerError as error:
        return error
    return None


HOME = Path()  # the campaign's folder; set by `main`
KINDS = {
    "table.tsv": Kind(10, lambda folder: _rows(folder, "all.tsv"), read_table),
    "table.csv": Kind(10, lambda folder: _rows(folder, "all.csv"), read_table),
    "table.jsonl": Kind(10, lambda folder: _rows(folder, "all.jsonl"), read_table),
    "table.json": Kind(8, lambda folder: _rows(folder, "all.json"), read_table),
    "table.parquet": Kind(12, lambda folder: _rows(folder, "all.parquet"), read_table),
    "squad": Kind(20, _squad, read_squad),
    "recipe": Kind(26, _copied("recipe"), read_recipe_file),
    "ledger": Kind(25, _copied("ledger"), read_ledger),
    "dense": Kind(8, _copied("dense"), read_model, ("config.json", "*.safetensors", "tokenizer*")),
    "shards": Kind(8, _copied("shards"), read_model, ("config.json", "*.safetensors", "*.index.json")),
    "cut": Kind(10, _copied("cut"), read_model, ("config.json", "plan.json", "*.safetensors", "tokenizer*")),
    "ranges": Kind(5, _copied("ranges"), read_model, ("config.json", "ranges.json", "plan.json")),
    "kronecker": Kind(4, _copied("kronecker"), read_model, ("plan.json", "*.safetensors")),
    "sparse-float32": Kind(6, _copied("sparse-float32"), read_model, ("config.json", "*.safetensors")),
    "sparse-float16": Kind(4, _copied("sparse-float16"), read_model, ("*.safetensors",)),
    "sparse-int8": Kind(8, _copied("sparse-int8"), read_model, ("*.safetensors",)),
    "onnx": Kind(12, _copied("export"), read_export, ("*.onnx", "*.json")),
    "delivered": Kind(14, _copied("delivered"), read_export, ("slimformer.json", "onnx/*.json", "onnx/*.onnx", "*.json")),
}

# -- One input -----------------------------------------------------------------------------------------------------------------


def change_folder(folder: Path, files: Iterable[str], draw: random.Random) -> None:
    """Changes one file of a folder, seldom two."""
    names = sorted({file for pattern in files for file in folder.glob(pattern) if file.is_file() and file.suffix != ".bin"})
    for file in draw.sample(names, k=min(len(names), draw.choice((1, 1, 1, 2)))):
        file.write_bytes(CHANGES.get(file.suffix, change_bytes)(file.read_bytes(), draw))


@dataclass
class Watch:
    """What the process opens: the audit hook of Python sees every `open`, every class of a pickle and every connection."""

    folder: Path = Path("/nowhere")
    faults: list[str] = field(default_factory=list)

    def start(self) -> None:
        """Begins to watch; there is no end to it."""
        import slimformer

        allowed: tuple[str, ...] = (
            str(HOME),
            sys.prefix,
            sys.base_prefix,
            "/usr",
            "/lib",
            "/proc",
            "/sys",
            "/dev/null",
            "/dev/urandom",
            "/etc",
            "<",
        )
        allowed += (str(Path(slimformer.__file__).parent), str(Path(__file__).parent.parent), "/root/.cache/torch_extensions")
        baits = {str(HOME / name) for name in BAITS}

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
                path = os.path.realpath(os.fsdecode(arguments[0]))
                if path in baits or not path.startswith(allowed):
                    self.faults.append(f"outside: {path}")
            elif event == "pickle.find_class":
                self.faults.append(f"pickle: {arguments[1]}.{arguments[2]}")
            elif event == "socket.connect":
                self.faults.append(f"network: {arguments[1]}")

        sys.addaudithook(hook)


def outcome_of(kind: str, number: int, seed: int, watch: Watch, show: bool = False) -> str:
    """What comes of one input: accepted, refused, refused badly, traceback, memory, pickle, outside or network, with details."""
    from slimformer.errors import SlimformerError

    folder = HOME / "inputs" / f"{kind}-{number}" / "model"
    if folder.parent.exists():
        shutil.rmtree(folder.parent)
    shutil.copytree(HOME / "kinds" / kind, folder)
    change_folder(folder, KINDS[kind].files, random.Random(f"{seed}/{kind}/{number}"))
    baits = [HOME / name for name in BAITS]
    for bait in baits:
        os.utime(bait, (1e9, time.time()))  # a file that is read gets a new time of access, by whatever library
    watch.faults.clear()
    try:
        KINDS[kind].read(folder)
        outcome = "accepted"
    except SlimformerError as error:
        text = str(error)
        plain = text.replace("\n", "")
        bad = "long" if len(text) > 4000 else "" if plain.isprintable() else "unprintable"
        outcome = f"refused{f' badly: {bad}' if bad else ''}: {error.what}"
    except MemoryError:
        outcome = "memory"
    except BaseException as error:  # a panic of Rust is no Exception
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "slimformer" in frame.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        outcome = f"traceback: {type(error).__name__} at {place}: {str(error)[:200]!r}"
        if show:
            traceback.print_exc()
    if (HOME / MARK).exists():
        (HOME / MARK).rmdir()
        watch.faults.append("pickle: its code ran")
    watch.faults += [f"outside: {bait}" for bait in baits if bait.stat().st_atime > 1e9 + 1]
    if watch.faults:
        outcome = f"{watch.faults[0]} ({outcome})"
    if outcome.startswith(("accepted", "refused:")):
        shutil.rmtree(folder.parent)
    return outcome


def child(kind: str, numbers: Iterable[int], seed: int) -> None:
    """Reads inputs one by one; says on standard output which one begins, and what came of it."""
    warnings.simplefilter("ignore")
    watch = Watch()
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (to the end of the process)
    import onnxruntime
    import torch
    import transformers

    torch.set_num_threads(1)
    onnxruntime.set_default_logger_severity(4)
    transformers.logging.set_verbosity(60)
    try:
        _read_valid(kind)
    except Exception:
        traceback.print_exc(file=sys.__stderr__)
        raise
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + BYTES, resource.RLIM_INFINITY))
    watch.start()
    for number in numbers:
        print(f"begin {number}", file=pipe, flush=True)
        print(json.dumps([number, outcome_of(kind, number, seed, watch)]), file=pipe, flush=True)


def _read_valid(kind: str) -> None:
    """Reads the valid input once: it must be accepted, and every module that reading needs is imported."""
    folder = HOME / "inputs" / f"{kind}-valid-{os.getpid()}" / "model"
    shutil.copytree(HOME / "kinds" / kind, folder)
    KINDS[kind].read(folder)
    shutil.rmtree(folder.parent)


def _data_bytes() -> int:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmData"))) * 1024


# -- The campaign --------------------------------------------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """The CPU time of a process until now."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:  # it just ended
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Runner:
    """One child at a time works through the inputs of one kind; if it hangs or dies, another goes on after that input."""

    def __init__(self, kind: str, count: int, seed: int) -> None:
        self.kind, self.seed, self.left = kind, seed, list(range(count))
        self.outcomes: dict[int, str] = {}
        self.current: int | None = None
        self.begin()

    def begin(self) -> None:
        """Starts a child on the inputs that are left."""
        arguments = [sys.executable, __file__, "--home", str(HOME), "--seed", str(self.seed), "--child", self.kind]
        environment = dict(
            os.environ,
            HF_HUB_OFFLINE="1",
            HF_DATASETS_OFFLINE="1",
            TMPDIR=str(HOME),
            HF_HOME=str(HOME / "hub"),
            XDG_CACHE_HOME=str(HOME / "cache"),
            OMP_NUM_THREADS="1",
        )
        numbers = subprocess.PIPE
        self.process = subprocess.Popen(
            arguments, stdin=numbers, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(self.left).encode())
        self.process.stdin.close()
        self.current, self.rest, self.idle, self.seen = None, b"", 0.0, time.monotonic()
        self.spent = 100.0  # of CPU time until now, and that of the imports, which take a while

    def take_bytes(self, data: bytes) -> None:
        """Takes what the child wrote, whole lines at a time."""
        self.spent, self.idle = cpu_seconds(self.process.pid), 0.0
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self.line(line.decode())

    def line(self, text: str) -> None:
        """Takes a line that the child wrote."""
        if text.startswith("begin"):
            self.current = int(text.split()[1])
        else:
            number, outcome = json.loads(text)
            self.take(number, outcome)

    def take(self, number: int, outcome: str) -> None:
        """Keeps the outcome of an input; a fault is shown at once."""
        if not outcome.startswith(("accepted", "refused:")):
            print(f"{self.kind}:{number} {outcome}", file=sys.stderr, flush=True)
        self.outcomes[number] = outcome
        self.left.remove(number)
        self.current = None

    def hangs(self) -> bool:
        """Whether the child took too much CPU time for one input, or waits for what does not come."""
        now = time.monotonic()
        self.idle, self.seen = self.idle + min(2.0, now - self.seen), now  # at most 2 s: this process may have been stopped too
        return cpu_seconds(self.process.pid) - self.spent > SECONDS or self.idle > IDLE_SECONDS

    def look(self) -> bool:
        """Whether there is more to come; a child that hangs or died is replaced."""
        if self.process.poll() is None and self.hangs():
            self.process.kill()
            self.process.wait()
            if self.current is not None:
                self.take(self.current, "hang")
        elif self.process.poll() is None:
            return True
        elif self.current is not None:
            self.take(self.current, f"abort: exit status {self.process.returncode}")
        elif self.left:
            assert self.process.stderr is not None
            raise SystemExit(f"the child for {self.kind} ended: {self.process.stderr.read().decode()[-2000:]}")
        if self.left:
            self.begin()
        return bool(self.left)


def campaign(counts: dict[str, int], seed: int, workers: int) -> dict[str, dict[int, str]]:
    """Runs all inputs, `workers` kinds at a time; prints a line for each kind that is done."""
    waiting, running, results = list(counts), list[Runner](), dict[str, dict[int, str]]()
    with selectors.DefaultSelector() as selector:

        def begin(runner: Runner) -> None:
            assert runner.process.stdout is not None
            selector.register(runner.process.stdout, selectors.EVENT_READ, runner)

        while waiting or running:
            while waiting and len(running) < workers:
                runner = Runner(waiting[0], counts[waiting.pop(0)], seed)
                running.append(runner)
                begin(runner)
            for key, _ in selector.select(timeout=1.0):
                data = os.read(key.fd, 1 << 16)
                key.data.take_bytes(data)
                if not data:
                    selector.unregister(key.fileobj)
                    key.data.process.wait()
            for runner in list(running):
                process = runner.process
                if not runner.look():
                    running.remove(runner)
                    results[runner.kind] = runner.outcomes
                    print(line_of(runner.kind, runner.outcomes), flush=True)
                elif runner.process is not process:
                    if process.stdout in selector.get_map():
                        selector.unregister(process.stdout)  # type: ignore[arg-type]
                    begin(runner)
    return results


COLUMNS = ("accepted", "refused", "refused badly", "traceback", "hang", "abort", "memory", "pickle", "outside", "network")


def tally(outcomes: Iterable[str]) -> Counter[str]:
    """How many outcomes there are of each kind."""
    return Counter(outcome.partition(":")[0].partition(" (")[0] for outcome in outcomes)


def line_of(kind: str, outcomes: dict[int, str]) -> str:
    """A row of the table."""
    counts = tally(outcomes.values())
    return f"| {kind} | {len(outcomes):,} | " + " | ".join(f"{counts[column]:,}" for column in COLUMNS) + " |"


def prepare(kinds: Iterable[str]) -> None:
    """Makes the valid inputs, and baits that nobody may read."""
    from safetensors.numpy import save_file

    save_file({}, HOME / BAITS[0])
    (HOME / BAITS[1]).write_text("nobody reads this\n", encoding="utf-8")
    _models()
    for kind in kinds:
        KINDS[kind].make(HOME / "kinds" / kind)
    (HOME / "inputs").mkdir()


def main() -> None:
    """Runs the campaign, or one input again."""
    global HOME
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, help="how many inputs in all")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only these kinds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--replay", help="KIND:NUMBER")
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        HOME = given.home
        child(given.child, json.load(sys.stdin), given.seed)
        return
    HOME = Path(tempfile.mkdtemp(prefix="slimformer-fuzz-")).resolve()
    kinds = given.kind or list(KINDS)
    if given.replay:
        kind, _, number = given.replay.partition(":")
        prepare([kind])
        tempfile.tempdir = os.environ["XDG_CACHE_HOME"] = str(HOME)  # as the children have it
        watch = Watch()
        watch.start()
        print(outcome_of(kind, int(number), given.seed, watch, show=True))
        print("the input:", HOME / "inputs" / f"{kind}-{number}")
        return
    prepare(kinds)
    shares = sum(KINDS[kind].share for kind in kinds)
    counts = {kind: math.ceil(given.inputs * KINDS[kind].share / shares) for kind in kinds}
    print(f"| kind | inputs | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 2)}", flush=True)
    results = campaign(counts, given.seed, given.workers)
    everything = dict(enumerate(text for outcomes in results.values() for text in outcomes.values()))
    print(line_of("total", everything))
    faults = [
        (kind, number, text)
        for kind, outcomes in results.items()
        for number, text in sorted(outcomes.items())
        if not text.startswith(("accepted", "refused:"))
    ]
    for kind, number, text in faults:
        print(f"{kind}:{number} {text}")
    shutil.rmtree(HOME)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
