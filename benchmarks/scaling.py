"""What each phase of a compression costs against the size of a model and the number of rows: seconds, memory, disk, and their exponents.

    python benchmarks/scaling.py --out results/reliability/scaling.jsonl    # some twenty minutes on two quiet cores

Models are BERTs of random weights with the demo's tokenizer; texts are drawn from common words, as long as sentences of SST-2. Each model
and each number of rows has a process of its own, so that its peak of memory is its own. A line is written as soon as it is measured,
and lines that are there already are not measured again. Needs the extra `demo`, and Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is imported

MODELS = ("6x384", "12x384", "24x384", "6x768", "12x768", "24x1024")  # layers x width
ROWS = (1_000, 10_000, 100_000, 1_000_000)
KINDS = ("sentences with labels", "texts without labels")
WORDS = 22  # of the longest text
EXAMPLES = 64  # for the importance of heads and neurons
COMMON = (
    "the",
    "a",
    "film",
    "plot",
    "actor",
    "it",
    "was",
    "good",
    "bad",
    "long",
    "funny",
    "sad",
    "story",
    "and",
    "but",
    "never",
    "end",
)
CLASSES = ("negative", "positive")


def texts(count: int) -> Iterator[str]:
    """Texts of 1 to WORDS common words, the same ones each time."""
    draw = random.Random(0)
    for place in range(count):
        yield " ".join([str(place), *draw.choices(COMMON, k=draw.randint(1, WORDS))])


def write_rows(file: Path, count: int, *, labelled: bool) -> None:
    with file.open("w", encoding="utf-8") as stream:
        if labelled:
            stream.write("sentence\tlabel\n")
        for place, text in enumerate(texts(count)):
            stream.write(f"{text}\t{CLASSES[place % 2]}\n" if labelled else f"{text}\n")


def peak_gib() -> float:
    """The most memory that this process ever had."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


# -- A model -------------------------------------------------------------------------------------------------------------------


def write_model(folder: Path, layers: int, width: int) -> None:
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from slimformer.demo import encoder

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(encoder())
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: place for place, name in enumerate(CLASSES)},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure_model(name: str, home: Path) -> dict[str, Any]:
    """Seconds of each phase for a model of random weights."""
    import copy

    import numpy as np

    from slimformer.core.cost import macs
    from slimformer.exporters.base import Variant
    from slimformer.log import Log
    from slimformer.measuring.sessions import open_session
    from slimformer.measuring.timing import Rounds, compare, workloads
    from slimformer.methods.distillation import Distillation
    from slimformer.methods.fisher import Fisher
    from slimformer.running.exports import export_files
    from slimformer.running.preflight import preflight
    from slimformer.running.prepare import load_bundle
    from slimformer.running.recipe import Recipe
    from slimformer.running.runner import Conditions, open_recipe
    from slimformer.running.stages import context_of, training_of
    from slimformer.tasks.base import Split
    from slimformer.tasks.classification import Classification
    from slimformer.training.estimate import estimate
    from slimformer.training.stage import Train

    layers, width = map(int, name.split("x"))
    write_model(home / "model", layers, width)
    write_rows(home / "rows.tsv", 2_000, labelled=True)
    recipe = Recipe(str(home / "model"), Classification(data=str(home / "rows.tsv")), ())
    lesson = Train(methods=(Distillation(),), epochs=1.0, lr=1e-4)
    log = Log(None)
    with open_recipe(recipe, home / "run", Conditions(log, None, 0.0)) as run:
        run.root.mkdir(parents=True, exist_ok=True)
        loading, bundle = timed(lambda: load_bundle(preflight(recipe), run))
        rows = bundle.material.features[Split.TRAIN]
        lengths = rows.lengths()
        cost = estimate(training_of(lesson, bundle, run), seconds=4.0)
        trained = peak_gib()
        fisher = Fisher(cost="macs", examples=EXAMPLES, damage_examples=8, repair_tokens=1_000)
        weighing, _ = timed(lambda: fisher.weigh(context_of(bundle, run, copy.deepcopy(bundle.subject), "macs")))
        variants = (Variant.FUSED, Variant.INT8_FUSED)
        exporting, files = timed(lambda: export_files(bundle.subject, bundle.material, home / "files", variants, log))
        sessions = {variant: open_session(file, run.threads) for variant, file in files.items()}
        work = workloads(rows, limit=8)[1]
        times = compare(sessions, work, Rounds(5, seconds=10.0), run.quiet.load())
    return {
        "model": name,
        "params": sum(parameter.numel() for parameter in bundle.subject.model.parameters()),
        "macs": round(macs(bundle.subject.anatomy, lengths).dense),  # of a row
        "tokens": round(float(np.mean(lengths)), 1),  # of a row
        "seconds": {
            "load": round(loading, 2),
            "teacher, 1,000 rows": round(1_000 * cost.teacher_seconds / len(lengths), 2),
            "training, 1,000 rows": round(1_000 * float(np.mean(lengths)) / cost.tokens_per_second, 2),
            f"importance, {EXAMPLES} rows": round(weighing, 2),
            "export, fp32 and int8": round(exporting, 2),
            "scoring, 1,000 rows in int8": round(1_000 / times[Variant.INT8_FUSED].per_second, 2),
        },
        "training_gib": trained,
        "peak_gib": peak_gib(),
        "precision": cost.precision,
    }


# -- Rows ----------------------------------------------------------------------------------------------------------------------


def measure_rows(kind: str, count: int, home: Path) -> dict[str, Any]:
    """Seconds and memory of reading and encoding so many rows, and the disk that a teacher's outputs for them take."""
    from slimformer.core.anatomy import Anatomy
    from slimformer.data.material import prepare
    from slimformer.demo import encoder
    from slimformer.families.base import anatomy_of
    from slimformer.hooks.capture import Capture
    from slimformer.saving import checkpoint
    from slimformer.tasks.base import Split, Task
    from slimformer.tasks.classification import Classification
    from slimformer.tasks.embedding import Embedding
    from slimformer.training.teacher import cached_bytes

    labelled = kind == KINDS[0]
    file = home / ("rows.tsv" if labelled else "rows.txt")
    write_rows(file, count, labelled=labelled)
    task: Task = Classification(data=str(file)) if labelled else Embedding(data=str(file))
    before = peak_gib()
    reading, material = timed(lambda: prepare(task, Path(encoder())))
    peak, lengths = peak_gib(), material.features[Split.TRAIN].lengths()
    anatomy: Anatomy = anatomy_of(checkpoint.load_dense(Path(encoder()), "AutoModelForSequenceClassification"))
    return {
        "rows": count,
        "kind": kind,
        "read": len(lengths),
        "seconds": round(reading, 2),
        "before_gib": before,
        "peak_gib": peak,
        "file_mb": round(file.stat().st_size / 1e6, 1),
        "outputs_mb": round(cached_bytes(anatomy, lengths, (Capture.HIDDEN,)) / 1e6, 1),
    }


# -- All of it -----------------------------------------------------------------------------------------------------------------


def alone(out: Path | None, *wish: str) -> None:
    """Measures one line in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--one", *wish], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(wish)}: {done.stderr.strip()[-2000:]}")
    line = done.stdout.strip().splitlines()[-1]
    print(line, flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def main() -> None:
    """Measures every model and every number of rows that --out does not hold yet."""
    from slimformer import __version__

    parser = argparse.ArgumentParser(description="What each phase costs against models and rows.")
    parser.add_argument("--models", nargs="*", default=list(MODELS), metavar="LAYERSxWIDTH")
    parser.add_argument("--rows", nargs="*", type=int, default=list(ROWS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        with tempfile.TemporaryDirectory(prefix="scaling-") as place:
            kind, *rest = given.one
            row = measure_model(kind, Path(place)) if not rest else measure_rows(kind, int(rest[0]), Path(place))
        print(json.dumps(row | {"version": __version__, "date": datetime.now(UTC).date().isoformat()}))
        return
    lines = given.out.read_text(encoding="utf-8").splitlines() if given.out is not None and given.out.exists() else []
    there = [json.loads(line) for line in lines]
    for name in given.models:
        if not any(row.get("model") == name for row in there):
            alone(given.out, name)
    for kind in KINDS:
        for count in given.rows:
            if not any((row.get("kind"), row.get("rows")) == (kind, count) for row in there):
                alone(given.out, kind, str(count))


if __name__ == "__main__":
    main()
