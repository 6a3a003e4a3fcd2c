"""Measures a service that keeps passages: milliseconds for each question, by the share of questions whose passage is kept already.

The folder is what a recipe with `decomposed_attention` left, and the dense model the one that it learned from. Questions of a SQuAD file
are answered one by one, in turn by: the dense model's fused file in fp32, which is the baseline, and in int8; the divided model's whole
int8 file, which keeps nothing; and its three parts in fp32 and int8, at each share of hits. Which questions hit is drawn once. On a miss
the passage is computed, as it would be before it is kept; a hit costs the question and the upper layers. Only the engine is timed: texts
are split into tokens before, which all need alike.

The whole files read windows that the question leaves room for. A kept passage has windows of its own, with room for the longest question.
F1 is that of all questions asked, the loss with its 95 % interval by paired bootstrap. Times are medians over rounds of the ratio of a
round's whole time to the baseline's, with 80 % of the rounds, and the median and 95th percentile of the milliseconds of a question.

    python benchmarks/passages.py runs/squad1-decomposed --dense ./my-bert-squad --data ./squad
    python benchmarks/passages.py runs/squad1-decomposed --dense ./my-bert-squad --data ./squad --questions 1000 --out passages.json
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from slimformer.data.batching import collate
from slimformer.data.tokenizer import cutting, load_tokenizer
from slimformer.exporters._onnx.parts import HIDDEN, check_same_model
from slimformer.exporters.base import FILES, PARTS, Variant, part_path
from slimformer.exporters.onnx import Onnx
from slimformer.families.base import subject_of
from slimformer.measuring.machine import environment
from slimformer.saving.checkpoint import load
from slimformer.saving.folders import MODEL_FOLDER
from slimformer.tasks.base import Example, Features, Split
from slimformer.tasks.question_answering import QuestionAnswering

QUESTION, SEPARATORS = 64, 2  # tokens of a question, at most; of the pair with an empty first text, those in front of a passage
OUTPUTS = ("start_logits", "end_logits")

Logits = tuple[np.ndarray, np.ndarray]  # (tokens,) each
Answer = Callable[[int], list[Logits]]  # the number of a question -> the logits of its windows


@dataclass(frozen=True)
class Asked:
    """The questions as a service has them: tokens of each question, and of the windows of each passage."""

    questions: Sequence[Sequence[int]]
    passages: Sequence[Sequence[Sequence[int]]]
    features: Features  # a row for each window: question, then passage


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what the recipe left")
    parser.add_argument("--dense", type=Path, required=True, help="the undivided model")
    parser.add_argument("--data", required=True, help="a folder with SQuAD's files")
    parser.add_argument("--ids", help="a JSON file of the ids to train on and to ask")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--hits", type=int, nargs="+", default=[0, 50, 90, 100], help="percent of the questions")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    task = QuestionAnswering(data=options.data, version="v1", max_length=options.max_length, stride=96, train_ids=options.ids)
    every = task.split(Split.DEV)
    examples = [every[int(place)] for place in np.linspace(0, len(every) - 1, min(options.questions, len(every)))]
    tokenizer = load_tokenizer(options.folder / MODEL_FOLDER)
    with tempfile.TemporaryDirectory() as scratch:
        rows = measured(task, examples, tokenizer, options, Path(scratch))
    print(f"{len(examples)} questions, {options.threads} threads, ONNX Runtime {onnxruntime.__version__}\n")
    print(f"{'':28} {'hits':>5} {'x fp32':>7} {'(80 %)':>13} {'p50 ms':>8} {'p95 ms':>8} {'F1':>7}  lost (95 %)")
    for row in rows:
        low, high = row["spread"]
        lost = "{:+.2f} ({:+.2f} to {:+.2f})".format(row["lost"], *row["interval"])
        hits = "" if row["hits"] is None else f"{row['hits']} %"
        print(
            f"{row['name']:28} {hits:>5} {row['times']:7.2f} {f'{low:.2f} - {high:.2f}':>13} {row['p50_ms']:8.2f} "
            f"{row['p95_ms']:8.2f} {100 * row['f1']:7.2f}  {lost}"
        )
    if options.out:
        about = {
            "questions": len(examples),
            "threads": options.threads,
            "rounds": options.rounds,
            "max_length": task.max_length,
        }
        options.out.write_text(json.dumps(about | {"environment": asdict(environment()), "rows": rows}, indent=1) + "\n")


def measured(
    task: QuestionAnswering, examples: Sequence[Example], tokenizer: Tokenizer, options: Any, scratch: Path
) -> list[dict[str, Any]]:
    """A row for each system, the baseline first."""
    whole = task.encode(examples, tokenizer, task.max_length)
    asked = as_kept(examples, tokenizer, task.max_length, task.stride)
    paths = dense_files(options.dense, task, tokenizer, scratch)
    onnx = options.folder / "onnx"
    quick, plain = (onnx / FILES[variant].name for variant in (Variant.INT8_FUSED, Variant.FLOAT))
    systems: dict[tuple[str, int | None], tuple[Answer, Features]] = {
        ("dense fp32, fused", None): (reading_both(paths[Variant.FUSED], whole, options.threads), whole),
        ("dense int8", None): (reading_both(paths[Variant.INT8_FUSED], whole, options.threads), whole),
        ("divided int8, whole", None): (reading_both(quick, whole, options.threads), whole),
    }
    generator = np.random.default_rng(0)
    order = generator.permutation(len(examples))
    for label, path in (("fp32", plain), ("int8", quick)):
        service = Service(path, asked, options.threads)
        for share in options.hits:
            kept = frozenset(order[: round(len(order) * share / 100)].tolist())
            systems[f"parts {label}", share] = (service.answering(kept), asked.features)
    seconds, logits = in_turn({name: answer for name, (answer, _) in systems.items()}, len(examples), options.rounds)
    credits = {name: task.credit(padded(logits[name], features), features, examples) for name, (_, features) in systems.items()}
    draws = generator.integers(0, len(examples), (2000, len(examples)))
    base = next(iter(systems))
    rows = []
    for name in systems:
        times = seconds[base].sum(1) / seconds[name].sum(1)  # (rounds,)
        gaps = 100 * (credits[base] - credits[name])
        each = 1000 * np.median(seconds[name], axis=0)
        rows.append(
            {
                "name": name[0],
                "hits": name[1],
                "times": float(np.median(times)),
                "spread": [float(value) for value in np.quantile(times, (0.1, 0.9))],
                "p50_ms": float(np.median(each)),
                "p95_ms": float(np.quantile(each, 0.95)),
                "f1": float(credits[name].mean()),
                "lost": float(gaps.mean()),
                "interval": [float(value) for value in np.quantile(gaps[draws].mean(1), (0.025, 0.975))],
            }
        )
    return rows


def dense_files(folder: Path, task: QuestionAnswering, tokenizer: Tokenizer, scratch: Path) -> dict[str, Path]:
    """The dense model's files, int8 with the ranges of some training examples."""
    model = load(folder)
    features = task.encode(task.split(Split.TRAIN)[:200], tokenizer, task.max_length)
    order = np.argsort(features.lengths(), kind="stable")
    names = subject_of(model).inputs
    batches = [collate(features, [int(row) for row in order[start::25]], names) for start in range(25)]
    paths: dict[str, Path] = {variant: scratch / f"{variant}.onnx" for variant in (Variant.FUSED, Variant.INT8_FUSED)}
    Onnx(agreement=0.0).export_all(model, batches, paths, OUTPUTS)
    return paths


def as_kept(examples: Sequence[Example], tokenizer: Tokenizer, max_length: int, stride: int) -> Asked:
    """Tokens of questions, and of windows of passages that leave room for any question."""
    rows: dict[str, list[Any]] = {"input_ids": [], "char_start": [], "char_end": []}
    questions, passages, owners = [], [], []
    for number, example in enumerate(examples):
        question, passage = example.texts
        with cutting(tokenizer, QUESTION):
            tokenizer.enable_truncation(QUESTION)
            first = tokenizer.encode(question).ids
        with cutting(tokenizer, max_length):
            tokenizer.enable_truncation(max_length - QUESTION + SEPARATORS, stride=stride, strategy="only_second")
            encoded = tokenizer.encode("", passage)
        windows = []
        for window in (encoded, *encoded.overflowing):
            ids = window.ids[SEPARATORS:]
            begins, ends = np.array(window.offsets[SEPARATORS:]).T
            inside = ends > begins
            rows["input_ids"].append([*first, *ids])
            for name, values in (("char_start", begins), ("char_end", ends)):
                rows[name].append(np.concatenate([np.full(len(first), -1), np.where(inside, values, -1)]))
            windows.append(ids)
            owners.append(number)
        questions.append(first)
        passages.append(windows)
    return Asked(questions, passages, Features(rows, owners, 0, 0))


# -- Systems ---------------------------------------------------------------------------------------------------------------------


def session_of(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def reading_both(path: Path, features: Features, threads: int) -> Answer:
    """A whole file: question and passage in one pass, window after window."""
    session, rows = session_of(path, threads), rows_of(features)
    names = [item.name for item in session.get_inputs()]
    feeds = {number: [collate(features, [row], names) for row in some] for number, some in rows.items()}

    def answer(number: int) -> list[Logits]:
        return [tuple(item[0] for item in session.run(OUTPUTS, given)) for given in feeds[number]]

    return answer


class Service:
    """Three parts, and what is kept of passages."""

    def __init__(self, whole: Path, asked: Asked, threads: int) -> None:
        self.parts = {part: session_of(part_path(whole, part), threads) for part in PARTS}
        check_same_model(self.parts)
        self.questions = [given(ids) for ids in asked.questions]
        self.passages = [[given(ids) for ids in windows] for windows in asked.passages]
        self.known = [[self.half("passage", window) for window in windows] for windows in self.passages]

    def half(self, part: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """The lower layers for one text: (1, tokens, hidden)."""
        result: np.ndarray = self.parts[part].run((HIDDEN,), inputs)[0]
        return result

    def answering(self, kept: frozenset[int]) -> Answer:
        """Answers while the passages of the questions `kept` are kept, and no other."""

        def answer(number: int) -> list[Logits]:
            windows = self.known[number] if number in kept else [self.half("passage", item) for item in self.passages[number]]
            question = self.questions[number]
            first = self.half("question", question)
            found = []
            for window in windows:
                feeds = {"question_hidden": first, "passage_hidden": window, "question_mask": question["attention_mask"]}
                feeds["passage_mask"] = np.ones(window.shape[:2], np.int64)
                found.append(tuple(item[0] for item in self.parts["joint"].run(OUTPUTS, feeds)))
            return found

        return answer


def given(ids: Sequence[int]) -> dict[str, np.ndarray]:
    """The inputs of a lower part."""
    return {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}


def rows_of(features: Features) -> dict[int, list[int]]:
    """The rows of each example."""
    rows: dict[int, list[int]] = {}
    for row, owner in enumerate(features.example):
        rows.setdefault(owner, []).append(row)
    return rows


def in_turn(
    systems: dict[Any, Answer], questions: int, rounds: int
) -> tuple[dict[Any, np.ndarray], dict[Any, list[list[Logits]]]]:
    """Seconds of each system, (rounds, questions), and its logits; each question goes to all systems before the next one."""
    seconds = {name: np.zeros((rounds, questions)) for name in systems}
    logits = {name: [answer(number) for number in range(questions)] for name, answer in systems.items()}  # warms up
    for turn in range(rounds):
        for number in range(questions):
            for name, answer in systems.items():
                begin = time.perf_counter()
                answer(number)
                seconds[name][turn, number] = time.perf_counter() - begin
    return seconds, logits


def padded(logits: Sequence[Sequence[Logits]], features: Features) -> dict[str, np.ndarray]:
    """The logits of all rows as one array for each output: (rows, tokens)."""
    flat: Iterator[Logits] = (window for windows in logits for window in windows)
    rows, longest = list(flat), int(features.lengths().max())
    made = {name: np.full((len(rows), longest), -np.inf, np.float32) for name in OUTPUTS}
    for row, pair in enumerate(rows):
        for name, values in zip(OUTPUTS, pair, strict=True):
            made[name][row, : len(values)] = values
    return made


if __name__ == "__main__":
    main()
