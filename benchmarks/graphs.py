"""Measures how much each rewrite of the exported graph gains: the shipped files, each without one rewrite, and usual tools' files.

All run in turn in one process on a task's dev examples: batch 1 in order (every third example) and batch 32 sorted by length. The
figure is the median over rounds of the ratio to the first row. `--clock cpu` counts processor time instead of the wall's: with one
thread it stays meaningful on a machine that other work shares.

    python benchmarks/graphs.py ./my-bert-sst2 ./SST-2 --glue sst2
    python benchmarks/graphs.py ./my-bert-sst2 ./SST-2 --glue sst2 --threads 1 --clock cpu
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir

from slimformer.data.batching import collate, in_order, sorted_by_length
from slimformer.data.tokenizer import load_tokenizer
from slimformer.exporters._onnx import int8, rewrite, trace
from slimformer.exporters._onnx.graph import MICROSOFT, Axes, Editor
from slimformer.exporters.base import Variant
from slimformer.exporters.onnx import Onnx
from slimformer.families.base import family_of, subject_of
from slimformer.runtimes.onnxruntime import OnnxRuntime
from slimformer.runtimes.openvino import OpenVINO, nncf_int8
from slimformer.saving.checkpoint import load, read_config
from slimformer.tasks.base import Split
from slimformer.tasks.classification import Classification

Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--glue")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    task = Classification(data=str(options.data), glue=options.glue).bind(read_config(options.model))
    model, tokenizer = load(options.model), load_tokenizer(options.model)
    names = family_of(model.config.model_type).inputs(model)
    examples = task.split(Split.DEV)
    features = task.encode(examples, tokenizer, 128)
    orders = {32: sorted_by_length(features.lengths(), 32), 1: in_order(len(features), 1)[::3]}
    work = {size: [collate(features, rows, names) for rows in order] for size, order in orders.items()}
    held = task.encode(task.split(Split.TRAIN)[:300], tokenizer, 128)
    calibration = [collate(held, rows, names) for rows in in_order(len(held), 20)]
    with tempfile.TemporaryDirectory() as folder:
        runs = dict(_files(model, calibration, Path(folder), options.threads))
        answers = {name: _answers(run, work[32], orders[32], len(features)) for name, run in runs.items()}
        clock = time.perf_counter if options.clock == "wall" else time.process_time
        times = _times(runs, work, options.rounds, clock)
    first = next(iter(runs))
    print(f"{options.threads} threads, {options.clock} clock, {options.rounds} rounds, {len(examples)} dev examples")
    print("| graph | score | other answers | batch 32: ms per example | x | batch 1: ms | x |\n|---|---|---|---|---|---|---|")
    for name, found in answers.items():
        score = task.score({"logits": found}, features, examples)[task.settled().metric]
        other = int((found.argmax(-1) != answers[first].argmax(-1)).sum())
        cells = []
        for size, rows in ((32, len(features)), (1, len(work[1]))):
            ms = statistics.median(times[name][size]) / rows * 1e3
            ratio = statistics.median(a / b for a, b in zip(times[first][size], times[name][size], strict=True))
            cells.append(f"{ms:.2f} | {ratio:.2f}")
        print(f"| {name} | {score:.4f} | {other} | {' | '.join(cells)} |")


def _files(model: Any, batches: list[dict[str, np.ndarray]], folder: Path, threads: int) -> Iterator[tuple[str, Run]]:
    """Each graph's name and what runs it."""
    ort = OnnxRuntime()
    program = trace.trace_model(subject_of(model), ("logits",))
    exporting = mock.patch.object(
        trace, "trace_model", return_value=program
    )  # one trace serves all, because tracing takes most of the time
    exporting.start()
    made = Onnx().export_all(model, batches, {variant: folder / f"{variant}.onnx" for variant in Variant})
    for variant, artifact in made.items():
        yield f"{variant}", ort.load(artifact.path, threads)
    ablations: list[tuple[str, Variant, dict[str, Any]]] = [
        ("fused, ORT's MultiHeadAttention", Variant.FUSED, {"lower_attentions": _multi_head_attention}),
        ("fused, ORT's LayerNorm", Variant.FUSED, {"lower_norms": _nothing}),
        ("fused, whole last layer", Variant.FUSED, {"read_only_first": _nothing}),
        ("fused, ORT's BiasGelu", Variant.FUSED, {"separate_gelus": _nothing}),
        ("int8_fused, ORT's MultiHeadAttention", Variant.INT8_FUSED, {"lower_attentions": _multi_head_attention}),
        ("int8_fused, ORT's LayerNorm", Variant.INT8_FUSED, {"lower_norms": _nothing}),
        ("int8_fused, whole last layer", Variant.INT8_FUSED, {"read_only_first": _nothing}),
        ("int8_fused, not smoothed", Variant.INT8_FUSED, {"smooth": _not_smoothed}),
        ("int8_dynamic, not smoothed", Variant.INT8_DYNAMIC, {"smooth": _not_smoothed}),
        ("float, whole last layer: what the usual tools start from", Variant.FLOAT, {"read_only_first": _nothing}),
    ]
    for number, (name, variant, changes) in enumerate(ablations):
        path = folder / f"ablation-{number}.onnx"
        with mock.patch.multiple(int8 if "smooth" in changes else rewrite, **changes):
            Onnx().export(model, batches, path, variant)
        yield name, ort.load(path, threads)
    exporting.stop()
    usual = folder / "usual.onnx"
    _quantize_dynamic(path, usual)
    yield "ORT quantize_dynamic, per channel", ort.load(usual, threads)
    if OpenVINO().available():
        yield "OpenVINO, float", OpenVINO().load(path, threads)
        yield "OpenVINO, int8_static", OpenVINO().load(made[Variant.INT8_STATIC].path, threads)
        yield "OpenVINO, int8 by NNCF", OpenVINO().load(nncf_int8(path, batches, folder / "nncf"), threads)


def _nothing(*_: Any) -> int:
    return 0


def _not_smoothed(*_: Any) -> dict[str, int8.Sample]:
    return {}


def _multi_head_attention(graph: onnx_ir.Graph, axes: Axes, fused: bool) -> int:
    """The markers as ONNX Runtime's own operator, which needs (batch, seq, hidden)."""
    found = rewrite.markers(graph)
    editor = Editor(graph)
    for node in found:
        query, key, value, mask = node.inputs
        parts = [editor.one(node, "Transpose", [item], perm=[1, 0, 2]) if fused else item for item in (query, key, value)]
        kept = editor.one(node, "Cast", [mask], to=int(onnx_ir.DataType.INT32))
        attributes = {"num_heads": node.attributes["heads"].as_int(), "scale": node.attributes["scale"].as_float()}
        result = editor.one(node, "MultiHeadAttention", [*parts, None, kept], MICROSOFT, **attributes)
        editor.replace(node.outputs[0], editor.one(node, "Transpose", [result], perm=[1, 0, 2]) if fused else result)
        editor.remove(node)
    return len(found)


def _quantize_dynamic(source: Path, target: Path) -> None:
    """The usual way: ONNX Runtime's own tool on the plain file."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)


@contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(action="ignore"):
        yield
    logging.disable(logging.NOTSET)


def _answers(run: Run, batches: list[dict[str, np.ndarray]], order: list[list[int]], rows: int) -> np.ndarray:
    found: np.ndarray | None = None
    for batch, places in zip(batches, order, strict=True):
        logits = run(batch)["logits"]
        found = np.zeros((rows, logits.shape[-1]), dtype=np.float32) if found is None else found
        found[places] = logits
    assert found is not None
    return found


def _times(
    runs: dict[str, Run], work: dict[int, list[dict[str, np.ndarray]]], rounds: int, clock: Callable[[], float]
) -> dict[str, dict[int, list[float]]]:
    """Seconds of each round, in turn: name -> batch size -> (rounds,)."""
    times: dict[str, dict[int, list[float]]] = {name: {size: [] for size in work} for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            for size, batches in work.items():
                run(batches[0])
                start = clock()
                for batch in batches:
                    run(batch)
                times[name][size].append(clock() - start)
    return times


if __name__ == "__main__":
    main()
