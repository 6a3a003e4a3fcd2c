"""Writes README.md, the model card of an exported folder: hub metadata, measured figures, and some lines that run the file.

The task writes these lines for the folder as it lies there, so that a test can take them out of the card and run them. The text
stands in `templates/card.md`; what users named is escaped.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimformer.core.relevance import score_activation
from slimformer.exporters.base import FILES, OPENVINO, SLIM, FileKind
from slimformer.files import write_text
from slimformer.measuring.records import Facts, Record
from slimformer.measuring.scoring import shipped_bytes
from slimformer.reporting.circumstances import circumstances, cost_facts
from slimformer.reporting.sections import written_rows
from slimformer.reporting.verdicts import against, doubts, judge, worthless
from slimformer.reporting.words import interval_text, layers_text, mb_text, signed
from slimformer.saving.checkpoint import read_config
from slimformer.saving.cross_encoder import loads_as_cross_encoder
from slimformer.saving.sentence_folder import is_sentence_folder
from slimformer.tasks._ranks import RANK_METRICS
from slimformer.tasks._text_metrics import ROUGE
from slimformer.tasks._unlabelled import AGREEMENTS

_HUB_METRICS = {
    "exact": "exact_match",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "f1_macro": "f1",
    **dict.fromkeys(ROUGE, "rouge"),
}
_PIPELINES = {
    "ForSequenceClassification": "text-classification",
    "ForQuestionAnswering": "question-answering",
    "ForTokenClassification": "token-classification",
    "ForConditionalGeneration": "text2text-generation",
}
_WRITERS = {"bleu": "translation", "chrf": "translation", **dict.fromkeys(ROUGE, "summarization")}  # by metric
_NEEDED = re.compile(r"needs ONNX Runtime ([\d.]+\d)")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_WEIGHTS = FileKind("model.safetensors", "weights", "the weights for PyTorch, with `slimformer.load`", folder="model")


@dataclass(frozen=True)
class Card:
    """What a model card tells: `record` is of the file that ships, `records` are all rows of its comparison.

    `code` are the lines that run the file, from the `snippet` of `runtime`, and `packages` are what they need. `base_model` goes
    into the hub's metadata if it is a hub name ("owner/name"), `data` if it is the name of a data set there; `license` and `language`
    are those of the base model. `notes` is what the exporter says of the file, `stored` how
    model.safetensors holds its values. `kinds` says what each file of the folder is.
    """

    record: Record
    records: tuple[Record, ...]
    code: str
    base_model: str = ""
    data: str = ""
    license: str = ""
    language: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    stored: str = ""
    kinds: tuple[FileKind, ...] = (*FILES.values(), SLIM, OPENVINO)
    runtime: str = "onnxruntime"
    packages: tuple[str, ...] = ("onnxruntime", "tokenizers", "numpy")


def write_card(folder: Path, card: Card) -> str:
    """Writes README.md into an exported folder, and returns its text."""
    from huggingface_hub import ModelCard

    text = str(ModelCard(f"---\n{_metadata(folder, card).to_yaml()}\n---\n\n{_body(folder, card)}"))
    write_text(folder / "README.md", text if text.endswith("\n") else text + "\n")
    return text


def base_card(facts: Facts, task: str, scores: Mapping[str, Mapping[str, float]]) -> str:
    """The text of README.md for a model that others start from. `scores`: of each model on dev, by the name of a metric."""
    metrics = list(next(iter(scores.values())))
    rows = [f"| {name} | {' | '.join(f'{found[metric]:.4g}' for metric in metrics)} |" for name, found in scores.items()]
    return "\n".join(
        [
            f"# {facts.name}",
            "",
            f"A model for others to start from, made by slimformer from {facts.model} with the task `{task}`: "
            f"{facts.params or 0:,} parameters, {facts.encoder_params or 0:,} of them in the matrices of the encoder. "
            "It is for PyTorch, in `model/`.",
            "",
            f"| on dev | {' | '.join(metrics)} |",
            f"|---|{'---|' * len(metrics)}",
            *rows,
            "",
            "A recipe starts from it by `model:` with this folder, and by `teacher:` with a model that was tuned for the task of that",
            "recipe: the head comes from the teacher. `slimformer.load` opens it.",
            "",
        ]
    )


def _metadata(folder: Path, card: Card) -> Any:
    """What the hub shows beside a model and searches by, a ModelCardData."""
    from huggingface_hub import EvalResult, ModelCardData

    record = card.record
    config = read_config(folder)
    model_class = str((config.get("architectures") or [""])[0])
    useless = worthless(record, card.records)
    pipeline = _WRITERS.get(record.metric) or next((tag for end, tag in _PIPELINES.items() if model_class.endswith(end)), None)
    sentences = is_sentence_folder(folder)
    ranks = record.metric in RANK_METRICS or (record.metric in AGREEMENTS and score_activation(config) is not None)
    pipeline = "sentence-similarity" if sentences else "text-ranking" if ranks else pipeline
    pruned = any(layer.heads < layer.heads_of or layer.neurons < layer.neurons_of for layer in record.layers)
    pruned = pruned or record.hidden_units is not None
    int8 = "int8" in record.precision
    on_hub = _HUB_NAME.fullmatch(card.base_model) is not None and not os.path.exists(card.base_model)
    metric = _HUB_METRICS.get(record.metric, record.metric)
    made_for = Path(record.file).suffix.removeprefix(".") or "onnx"
    return ModelCardData(
        license=card.license or None,
        language=list(card.language) or None,
        datasets=[card.data] if _HUB_NAME.fullmatch(card.data) and not os.path.exists(card.data) else None,
        base_model=card.base_model if on_hub else None,
        base_model_relation=("quantized" if int8 else "finetune") if on_hub else None,
        library_name=made_for,
        pipeline_tag=None if useless else pipeline,  # nobody should find it by what it is no use for
        tags=[
            made_for,
            card.runtime,
            "slimformer",
            *(["sentence-transformers"] if sentences or loads_as_cross_encoder(folder) else []),
            *(["pruned"] if pruned else []),
            *(["int8"] if int8 else []),
        ],
        metrics=[metric],
        model_name=record.name.replace("\n", " "),
        eval_results=[
            EvalResult(
                task_type=pipeline or "other",
                dataset_type=card.data if _HUB_NAME.fullmatch(card.data) else "custom",
                dataset_name=record.task or "custom",
                dataset_split=record.split,
                metric_type=metric,
                metric_name=record.metric,
                metric_value=round(record.score, 6),
            )
        ],
    )


def _body(folder: Path, card: Card) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    jinja = Environment(
        loader=PackageLoader("slimformer.reporting"),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters["md"] = _markdown
    kinds = [kind for kind in (*card.kinds, _WEIGHTS) if (folder / kind.place).is_file()]
    ends = {card.record.file: " (**the best here**)", _WEIGHTS.place: f"; {card.stored}" if card.stored else ""}
    return jinja.get_template("card.md").render(
        card=card,
        verdict=judge(card.record, card.records),
        doubts=doubts(card.records),
        rivals=against(card.record, card.records),
        metric=card.record.metric.replace("_", " "),
        files=[
            (kind.place, mb_text(shipped_bytes(folder / kind.place)), kind.about + ends.get(kind.place, "")) for kind in kinds
        ],
        several=sum(kind.int8 for kind in kinds) > 1,
        packages=" ".join(_needed(card)),
        sentences=is_sentence_folder(folder),
        scores=loads_as_cross_encoder(folder),
        rows=[_cells(record) for record in card.records],
        written=[(_markdown(name), *cells) for name, *cells in written_rows(card.records)],
        layers=layers_text(card.record),
        about=(*cost_facts(card.record), *circumstances([card.record])),
    )


def _cells(record: Record) -> tuple[str, ...]:
    loss = f"{signed(record.loss.value)} ({interval_text(record.loss)})" if record.loss else ""
    speeds = (f"{speed.median:.2f}" if (speed := record.times_faster(batch)) else "" for batch in (32, 1))
    return (_markdown(record.name), f"{record.score:.4f}", loss, mb_text(record.size_bytes), *speeds)


def _needed(card: Card) -> list[str]:
    """The packages that the lines need; of ONNX Runtime the version that reads the file, which the exporter notes."""
    version = next((match[1] for note in card.notes if (match := _NEEDED.search(note))), None)
    return [f"'{name}>={version}'" if name == "onnxruntime" and version else name for name in card.packages]


def told_of(folder: Path) -> dict[str, Any]:
    """The license and the languages that the card of a model in `folder` names, as fields of `Card`."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    if not (folder / "README.md").is_file():
        return {}
    try:
        data = ModelCard.load(folder / "README.md").data.to_dict()
    except (OSError, ValueError, TypeError, YAMLError):
        return {}
    told = data.get("language")
    languages = [told] if isinstance(told, str) else told if isinstance(told, list) else []
    license_ = data.get("license")
    return {
        "license": license_ if isinstance(license_, str) else "",
        "language": tuple(item for item in languages if isinstance(item, str)),
    }


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line: signs that would mean something are escaped, and only those."""
    line = re.sub(r"[\\`*\[\]<>|~$]|&(?=[#\w])|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", " ".join(text.split()))
    starts = r"^(?:(?=[-+#]+(?:\s|$))|(\d+)(?=[.)](?:\s|$)))"  # what begins a list or a heading
    return re.sub(starts, lambda match: (match[1] or "") + "\\", line)
