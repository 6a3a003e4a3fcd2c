"""Writes README.md, the model card of an exported folder: hub metadata, measured figures, and some lines that run the file.

The one idea: the snippet needs onnxruntime, tokenizers and numpy alone and is built from the folder as it lies there, so that
a test can take it out of the card and run it. User text is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimformer.exporters.base import FILES, OPENVINO
from slimformer.measuring.records import Record
from slimformer.measuring.scoring import shipped_bytes
from slimformer.reporting.page import circumstances, cost_facts
from slimformer.reporting.verdicts import against, judge
from slimformer.reporting.words import MEGABYTE, interval_text, layers_text, mb_text, signed
from slimformer.saving.files import write_text
from slimformer.tasks.base import Task

_HUB_METRICS = {
    "exact": "exact_match",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "f1_macro": "f1",
}
_PIPELINES = {
    "ForSequenceClassification": "text-classification",
    "ForQuestionAnswering": "question-answering",
    "ForTokenClassification": "token-classification",
    "ForConditionalGeneration": "text2text-generation",
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_ABOUT = {kind.name: kind.about for kind in (*FILES.values(), OPENVINO)} | {
    "model.safetensors": "the weights for PyTorch, with `slimformer.load`"
}


def _kind(config: Mapping[str, Any]) -> str:
    """The class of the model in PyTorch, as its config names it."""
    return str((config.get("architectures") or [""])[0])


def _on_hub(name: str | None) -> bool:
    """Whether a name can be one of the hub's rather than a local path."""
    return name is not None and _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>()#+\-!|~$&])", r"\\\1", " ".join(text.split()))


def card(
    folder: Path,
    record: Record,
    records: Sequence[Record],
    *,
    texts: Sequence[tuple[str, ...]],
    max_length: int,
    task: Task,
    base_model: str | None = None,
    dataset: str | None = None,
    language: str | None = None,
    license: str | None = None,
    notes: Sequence[str] = (),
    stored: str = "",
) -> str:
    """Writes README.md, the model card of an exported folder, and returns its text.

    `record` is the file that ships, `records` all rows of its comparison; `texts` are inputs for the lines that run it, which
    `task` writes. `base_model` and `dataset` go into the hub's metadata if they are hub names ("owner/name"). `notes`: what the
    exporter says of the file; `stored`: how model.safetensors holds values, where that is to be known.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    from slimformer.saving.checkpoint import read_config

    config = read_config(folder)
    kind = _kind(config)
    pipeline = next((tag for end, tag in _PIPELINES.items() if kind.endswith(end)), None)
    pruned = any(layer.heads < layer.heads_of or layer.neurons < layer.neurons_of for layer in record.layers)
    small = "int8" in record.precision
    known = base_model if _on_hub(base_model) else None
    metric = _HUB_METRICS.get(record.metric, record.metric)
    name = record.name.replace("\n", " ")
    data = ModelCardData(
        base_model=known,
        base_model_relation=("quantized" if small else "finetune") if known else None,
        datasets=[dataset] if dataset and _on_hub(dataset) else None,
        language=language,
        license=license,
        library_name="onnx",
        pipeline_tag=pipeline,
        tags=["onnx", "onnxruntime", "slimformer", *(["pruned"] if pruned else []), *(["int8"] if small else [])],
        metrics=[metric],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=pipeline or "other",
                dataset_type=dataset or record.task or "custom",
                dataset_name=record.task or "custom",
                dataset_split=record.split,
                metric_type=metric,
                metric_name=record.metric,
                metric_value=round(record.score, 6),
            )
        ],
    )
    body = _card_body(folder, record, records, task.snippet(folder, record.file, texts, max_length), notes, stored)
    text = str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))
    write_text(folder / "README.md", text if text.endswith("\n") else text + "\n")
    return text


def _card_body(folder: Path, record: Record, records: Sequence[Record], code: str, notes: Sequence[str], stored: str) -> str:
    verdicts = [judge(record), *against(record, records)]
    there = [name for name in _ABOUT if (folder / name).is_file()]
    ends = {record.file: " (**the best here**)", "model.safetensors": f"; {stored}" if stored else ""}
    files = [
        f"| `{name}` | {shipped_bytes(folder / name) / MEGABYTE:.1f} | {_ABOUT[name]}{ends.get(name, '')} |" for name in there
    ]
    head = ("model", record.metric.replace("_", " "), "points lost (95 %)", "MB", "× batch 32", "× batch 1")
    rows = []
    for item in records:
        loss = f"{signed(item.loss.value)} ({interval_text(item.loss)})" if item.loss else ""
        speeds = [f"{found.median:.2f}" if (found := item.times_faster(batch)) else "" for batch in (32, 1)]
        rows.append(" | ".join((_markdown(item.name), f"{item.score:.4f}", loss, mb_text(item.size_bytes), *speeds)))
    about = [f"- {label}: {_markdown(value)}" for label, value in (*cost_facts(record), *circumstances([record]))]
    lines = [
        f"# {_markdown(record.name)}",
        "",
        f"{_markdown(record.model)}, made smaller and faster with slimformer for {_markdown(record.task)}.",
        _markdown(verdicts[0].text),
        "",
        "## Use",
        "",
        "In this folder, with `pip install onnxruntime tokenizers numpy`:",
        "",
        "```python",
        code,
        "```",
        "",
        "| file | MB | what it is |",
        "|---|---|---|",
        *files,
        "",
        "Which int8 file is fastest and most accurate depends on the processor: `slimformer bench .` compares them on yours.",
        "",
        f"## Measured on {record.examples:,} examples of the {_markdown(record.split)} split",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
        *(f"| {row} |" for row in rows),
        "",
        f"×: times faster than {_markdown(record.baseline)}, the median over rounds taken in turn.",
        "",
        *(f"- {_markdown(verdict.text)}" for verdict in verdicts[1:]),
        "",
    ]
    if record.layers:
        lines += ["## What is kept", "", layers_text(record), "", "| layer | heads | FFN neurons |", "|---|---|---|"]
        lines += [
            f"| {layer.name} | {layer.heads} of {layer.heads_of} | {layer.neurons} of {layer.neurons_of} |"
            for layer in record.layers
        ]
        lines.append("")
    if notes:
        lines += [f"## What `{record.file}` holds", "", *(f"- {_markdown(note)}" for note in notes), ""]
    lines += ["## How it was made and measured", "", *about, ""]
    return "\n".join(lines)
