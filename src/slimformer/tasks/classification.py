"""Classes or a score for one text or a pair of texts: reviews, intents, entailment, similarity, all of GLUE.

The one idea: columns, classes, kind and metric are found from the data and the model, and everything found can be overruled by
a field. Data is a folder with a train and a dev file, one file (a tenth is then set aside as dev), or the name of a hub data
set. Reading and scoring need neither torch nor transformers. GLUE's metrics follow its paper (https://arxiv.org/abs/1804.07461).
"""

from __future__ import annotations

import json
import logging
import math
import os.path
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from slimformer.data.files import DEV_NAMES, HUB_NAME, SUFFIXES, TRAIN_NAMES, Table, find_files, joined, read_hub, read_table
from slimformer.data.tokenizer import cutting, pad_id_of
from slimformer.errors import DataError, RecipeError, nearest
from slimformer.tasks.base import Example, Features, Outputs, Split, Task

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

CLASS_METRICS = ("accuracy", "f1", "f1_macro", "matthews")
SCORE_METRICS = ("pearson", "spearman")
VALIDATION_FEWEST, VALIDATION_MOST = (
    200,
    2000,
)  # 200: one standard error is 2-3 points, less chooses at random; 2,000: 0.7 points
VALIDATION_LARGEST_SHARE = 0.2  # of a small training set, more is worth more in training
DEV_SHARE = 0.1  # of one file that holds everything
SPLIT_SEED = 20  # which rows are set aside must not depend on a run's seed, or runs could not be compared
VALIDATION_SALT = "held"  # seeds the draw of the validation examples: another word would draw other examples
CHUNK = 4096  # texts encoded at once: bounds the memory of the tokenizer's own objects

PAIRS = (
    ("sentence1", "sentence2"), ("#1 string", "#2 string"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("text1", "text2"), ("text_a", "text_b"), ("query", "passage"), ("text", "text_pair"),
)  # fmt: skip
TEXTS = ("sentence", "text", "review", "sentences", "texts", "content", "utterance", "comment", "message", "tweet", "body",
         "document", "question", "query", "title")  # fmt: skip
LABELS = ("label", "labels", "score", "target", "class", "category", "intent", "sentiment", "rating", "gold_label",
          "quality", "is_duplicate", "stars", "y")  # fmt: skip
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
PLACEHOLDER = re.compile(r"(label_?)?\d+", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Glue:
    """One GLUE task: class names in the order of ids, metric, and the columns in each form it is handed around in."""

    labels: tuple[str, ...]
    metric: str
    texts: tuple[tuple[str, ...], ...]
    label: tuple[str, ...] = ("label",)
    header: tuple[str, ...] | None = None  # of files whose first line is data already
    extra: bool = False  # rows with surplus fields


GLUE: Mapping[str, Glue] = {
    "cola": Glue(
        ("unacceptable", "acceptable"), "matthews", (("sentence",),), header=("source", "label", "star", "sentence")
    ),
    "sst2": Glue(("negative", "positive"), "accuracy", (("sentence",),)),
    "mrpc": Glue(
        ("not_equivalent", "equivalent"), "accuracy", (("#1 String", "#2 String"), ("sentence1", "sentence2")),
        ("Quality", "label"),
    ),
    "stsb": Glue((), "spearman", (("sentence1", "sentence2"),), ("score", "label"), extra=True),
    "qqp": Glue(("not_duplicate", "duplicate"), "accuracy", (("question1", "question2"),), ("is_duplicate", "label")),
    "mnli": Glue(
        ("entailment", "neutral", "contradiction"), "accuracy", (("premise", "hypothesis"), ("sentence1", "sentence2")),
        ("gold_label", "label"),
    ),
    "qnli": Glue(("entailment", "not_entailment"), "accuracy", (("question", "sentence"),)),
    "rte": Glue(("entailment", "not_entailment"), "accuracy", (("sentence1", "sentence2"),)),
    "wnli": Glue(("not_entailment", "entailment"), "accuracy", (("sentence1", "sentence2"),)),
}  # fmt: skip


@dataclass(frozen=True)
class Classification(Task):
    """Text classification or scoring.

    `data`: a folder with train.* and dev.* (or validation.*), one file, `owner/name[:config]` on the hub, or `glue/sst2`.
    `glue`: a GLUE task, which then settles columns, class order and metric. `train_rows`: a JSON file with the row numbers
    (from 0) to train on, or how many to draw. `validation_share`: the share of the training data set aside for choosing, kept between
    200 and 2,000 examples and at most a fifth. `labels`: class names in the order of the model's ids; `bind` fills it.

    `metric` is "auto" until the kind is known: then accuracy or spearman, or GLUE's own. MRPC and QQP have two in GLUE;
    accuracy is the one that counts here, F1 is reported beside it. `f1` takes the last of two classes as positive and is
    the macro mean for more.
    """

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    data: str = ""
    glue: str | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    kind: Literal["auto", "classes", "score"] = "auto"
    metric: str = "auto"
    max_length: int = 128
    validation_share: float = 0.05
    train_rows: str | int | None = None
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", str(self.data))
        object.__setattr__(self, "labels", tuple(map(str, self.labels)))
        if self.glue is None and re.fullmatch(r"glue/\w+", self.data) and not os.path.exists(self.data):
            object.__setattr__(self, "glue", self.data.removeprefix("glue/"))
        mistakes = list(self._mistakes())
        if mistakes:
            raise RecipeError(
                "the task classification cannot be set up like that.",
                facts=mistakes,
                help="mend the option, or leave it out: what is not said is found from the data.",
            )
        if self.glue is not None:
            object.__setattr__(self, "kind", "classes" if GLUE[self.glue].labels else "score")
            if self.metric == "auto":
                object.__setattr__(self, "metric", GLUE[self.glue].metric)
        elif self.metric == "auto" and self.kind != "auto":
            object.__setattr__(self, "metric", "accuracy" if self.kind == "classes" else "spearman")

    def _mistakes(self) -> Iterable[str]:
        known = {"auto": (*CLASS_METRICS, *SCORE_METRICS), "classes": CLASS_METRICS, "score": SCORE_METRICS}
        if self.glue is not None and self.glue not in GLUE:
            yield f"glue: there is no '{self.glue}'; {nearest(self.glue, GLUE)}"
        if self.kind not in known:
            yield f"kind: '{self.kind}'; known: {', '.join(known)}"
        elif self.metric != "auto" and self.metric not in known[self.kind]:
            yield f"metric: there is no '{self.metric}' for {self.kind}; {nearest(self.metric, known[self.kind])}"
        if self.text_pair is not None and self.text is None:
            yield "text_pair: name the first text column too (text)"
        if not 0 < self.validation_share < 0.5:
            yield f"validation_share: a share above 0 and below 0.5, not {self.validation_share}"
        if not 4 <= self.max_length <= 100_000:
            yield f"max_length: at least 4 tokens, not {self.max_length}"
        if isinstance(self.train_rows, int) and self.train_rows < 10:
            yield f"train_rows: at least 10, not {self.train_rows}"

    # ---- data

    def split(self, name: Split) -> Sequence[Example]:
        return _examples(self, Split(name), _stamp(self.data), _stamp(self.train_rows))

    def settled(self) -> Classification:
        """This task with columns, kind, metric and class names filled from its data; what was filled before stays."""
        table = self._table(Split.TRAIN, any_split=True)
        texts, label = self._columns(table)
        raw = self._raw_labels(table, label)
        kind = self.kind if self.kind != "auto" else _kind_of(raw)
        names: tuple[str, ...] = ()
        if kind == "classes":
            names = self.labels or self._known_names(table, label) or _in_order(set(raw))
            if len(set(raw)) < 2 and self._has_train():
                raise DataError(
                    f"{table.where}: every row has the label '{raw[0]}' in column '{label}'.",
                    help="a classifier needs two classes; is it the right column, and the whole file?",
                )
        metric = self.metric if self.metric != "auto" else "accuracy" if kind == "classes" else "spearman"
        if metric in (CLASS_METRICS if kind == "score" else SCORE_METRICS):
            raise DataError(
                f"the metric '{metric}' does not fit: column '{label}' of {table.where} holds {_told(kind)}.",
                help=f"for {kind}: {', '.join(CLASS_METRICS if kind == 'classes' else SCORE_METRICS)}.",
            )
        if metric == "f1" and len(names) > 2:
            metric = "f1_macro"
        pair = texts[1] if len(texts) > 1 else None
        return replace(self, text=texts[0], text_pair=pair, label=label, kind=kind, metric=metric, labels=names)

    def bind(self, config: PretrainedConfig | Mapping[str, Any]) -> Classification:
        names, problem = _config_labels(config)
        task = self
        if self.kind == "auto" and (len(names) == 1 or problem == "regression"):
            task = replace(self, kind="score")
        elif self.kind == "auto":
            task = replace(self, kind="classes")
        task = replace(task, labels=()).settled()
        if task.kind == "score":
            if len(names) != 1:
                raise DataError(
                    f"the data has scores, the model has {len(names)} classes: {_some(names)}.",
                    help="train a model with one output for scores, or say kind: classes.",
                )
            return task
        if len(names) == 1:
            raise DataError(
                f"the model gives one score, the data has {len(task.labels)} classes: {_some(task.labels)}.",
                help="train a model for these classes, or say kind: score.",
            )
        known = task.labels
        table = task._table(Split.TRAIN, any_split=True)
        raw = task._raw_labels(table, task._columns(table)[1])
        by_value = not _spelled_as_names(set(raw), names, task._known_names(table, task._columns(table)[1]))
        if by_value and all(_is_id(label, len(names) - 1) for label in set(raw)):
            # 0 and 1 could be any two of three classes: taking ids by value would be a guess
            raise DataError(
                f"the data has no ids above {max(map(int, raw))}, the model has {len(names)} classes: {_some(names)}.",
                help="write the labels in the data by the model's names.",
            )
        if all(_is_placeholder(name, index) for index, name in enumerate(names)):
            # LABEL_0, LABEL_1, ...: the model only knows an order, so the data's own order is the best there is
            if len(known) > len(names) or (len(known) < len(names) and not all(_is_id(label, len(names)) for label in known)):
                raise DataError(
                    f"the model has {len(names)} classes without names, the data has {len(known)}: {_some(known)}.",
                    help="the model was trained on other labels; name them in its config.json (id2label).",
                )
            told = self.labels if len(self.labels) == len(names) else known  # a person who names them knows their order
            bound = replace(task, labels=told if len(told) == len(names) else names)
        else:
            bound = replace(task, labels=names)
        bound._ids(table, raw)
        return bound

    def _table(self, name: Split, *, any_split: bool = False) -> Table:
        """The raw rows a split is drawn from; with `any_split`, the dev data where there is no training data."""
        sources = _sources(self.data, self.glue, _stamp(self.data))
        wanted = "dev" if name is Split.DEV else "train"
        if wanted in sources:
            return sources[wanted]
        if any_split and sources:
            return next(iter(sources.values()))
        if wanted == "train":
            raise DataError(
                f"{self.data} has no training data.",
                facts=[f"looked for: {', '.join(TRAIN_NAMES)} with {', '.join(SUFFIXES)}"],
                help="name the training file train.tsv, .csv, .jsonl or .parquet.",
            )
        return sources["train"]

    def _has_train(self) -> bool:
        return "train" in _sources(self.data, self.glue, _stamp(self.data))

    def _has_dev(self) -> bool:
        return "dev" in _sources(self.data, self.glue, _stamp(self.data))

    def _columns(self, table: Table) -> tuple[tuple[str, ...], str]:
        """Text columns and the label column: as told, as GLUE has them, or guessed from their names."""
        return _columns(table, self.text, self.text_pair, self.label, self.glue)

    def _raw_labels(self, table: Table, label: str) -> list[str]:
        """The label of each row as the data spells it; DataError with the row where one is missing."""
        raw = []
        for row, value in enumerate(table.column(label)):
            text = _spelled(value)
            if text is None:
                raise DataError(
                    f"{table.place(row)}: no label in column '{label}' ({value!r}).",
                    help="give the row a label or leave it out.",
                )
            raw.append(text)
        return raw

    def _known_names(self, table: Table, label: str) -> tuple[str, ...]:
        return GLUE[self.glue].labels if self.glue is not None else table.class_names.get(label, ())

    def _ids(self, table: Table, raw: Sequence[str]) -> list[int]:
        """The class id of each row's label; DataError with the first row whose label is unknown."""
        label = self._columns(table)[1]
        ids = match_labels(set(raw), self.labels, self._known_names(table, label))
        for row, text in enumerate(raw):
            if text not in ids:
                raise DataError(
                    f"{table.place(row)}: the label '{text}' in column '{label}' is not a known one.",
                    facts=[f"known labels: {_some(self.labels)}", f"rows with '{text}': {raw.count(text)}"],
                    help=f"did you mean another column or another model? {nearest(text, self.labels)[:200]}",
                )
        return [ids[text] for text in raw]

    def _scores(self, table: Table, raw: Sequence[str]) -> list[float]:
        for row, text in enumerate(raw):
            if not NUMBER.fullmatch(text) or not math.isfinite(float(text)):
                raise DataError(f"{table.place(row)}: '{text}' is no number.", help="for classes, say kind: classes.")
        return [float(text) for text in raw]

    # ---- model

    def encode(self, examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> Features:
        columns: dict[str, list[Any]] = {"input_ids": [], "token_type_ids": []}
        truncated = 0
        with cutting(tokenizer, max_length):
            for start in range(0, len(examples), CHUNK):
                texts = [item.texts if len(item.texts) > 1 else item.texts[0] for item in examples[start : start + CHUNK]]
                for row in tokenizer.encode_batch_fast(texts):
                    columns["input_ids"].append(row.ids)
                    columns["token_type_ids"].append(row.type_ids)
                    truncated += bool(row.overflowing)
        if all(item.answer is not None for item in examples):
            if self._settled_kind() == "score":
                columns["labels"] = [float(item.answer) for item in examples]
            else:
                ids = {name: index for index, name in enumerate(self._names())}
                columns["labels"] = [ids[item.answer] for item in examples]
        return Features(columns, range(len(examples)), truncated, pad_id_of(tokenizer))

    def configure(self) -> Mapping[str, Any]:
        if self._settled_kind() == "score":
            return {"num_labels": 1, "id2label": {0: "score"}, "label2id": {"score": 0}, "problem_type": "regression"}
        names = self._names()
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
            "problem_type": "single_label_classification",
        }

    def loss(self, output: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from torch.nn import functional

        logits = output["logits"].float()  # (batch, classes); a half-precision loss would lose small differences
        if self._settled_kind() == "score":
            return functional.mse_loss(logits.squeeze(-1), batch["labels"].float())
        return functional.cross_entropy(logits, batch["labels"])

    def divergence(
        self,
        student: Mapping[str, torch.Tensor],
        teacher: Mapping[str, torch.Tensor],
        batch: Mapping[str, torch.Tensor],
        temperature: float,
    ) -> torch.Tensor:
        from torch.nn import functional

        ours, theirs = student["logits"].float(), teacher["logits"].float()  # (batch, classes)
        if self._settled_kind() == "score":
            return functional.mse_loss(ours, theirs)
        ours, theirs = (functional.log_softmax(logits / temperature, dim=-1) for logits in (ours, theirs))
        return functional.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2

    # ---- judging

    def score(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> dict[str, float]:
        logits = _per_example(outputs["logits"], features)
        if self._settled_kind() == "score":
            return score_metrics(logits[:, 0], np.asarray([item.answer for item in examples], dtype=np.float64))
        names = self._names()
        ids = {name: index for index, name in enumerate(names)}
        return class_metrics(logits.argmax(-1), np.asarray([ids[item.answer] for item in examples]), len(names))

    def answers(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> list[str]:
        logits = _per_example(outputs["logits"], features)
        if self._settled_kind() == "score":
            return [f"{value:.3f}" for value in logits[:, 0]]
        names = self._names()
        return [names[index] for index in logits.argmax(-1)]

    def credit(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> np.ndarray:
        logits = _per_example(outputs["logits"], features).astype(np.float64)
        if self._settled_kind() == "score":
            wanted = np.asarray([item.answer for item in examples], dtype=np.float64)
            return np.asarray(-((logits[:, 0] - wanted) ** 2))  # (examples,)
        names = self._names()
        return np.asarray([float(names[index] == item.answer) for index, item in zip(logits.argmax(-1), examples, strict=True)])

    def _settled_kind(self) -> str:
        return self.kind if self.kind != "auto" else self.settled().kind

    def _names(self) -> tuple[str, ...]:
        return self.labels or self.settled().labels


def from_cli(
    task: str | None,
    data: str | Path | None,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    metric: str | None = None,
    max_length: int | None = None,
    train_rows: str | int | None = None,
) -> Task:
    """The task that options of the command line mean: none or "classification", "glue/sst2", or a registered task's name.

    RecipeError for a task that does not exist, for options that the task does not have, and where no data is named.
    """
    from slimformer.registry import find, names

    given: dict[str, Any] = {
        "text": text, "text_pair": text_pair, "label": label, "metric": metric, "max_length": max_length,
        "train_rows": train_rows,
    }  # fmt: skip
    options = {name: value for name, value in given.items() if value is not None}
    if task is None or task == "classification" or task.startswith("glue/"):
        glue = task.removeprefix("glue/") if task is not None and task.startswith("glue/") else None
        if data is None and glue is None:
            raise RecipeError("no data is named.", help="give --data <folder or file>, or --task glue/sst2.")
        return Classification(data=str(data) if data is not None else f"glue/{glue}", glue=glue, **options)
    if task not in names("tasks"):
        known = [*names("tasks"), "squad", "squad_v2", *(f"glue/{name}" for name in GLUE)]
        raise RecipeError(f"there is no task '{task}'.", help=nearest(task, known))
    if data is not None:
        options["data"] = str(data)
    cls = find("tasks", task)
    surplus = sorted(set(options) - set(cls.__dataclass_fields__))
    if surplus:
        raise RecipeError(
            f"the task {task} has no option {' or '.join(surplus)}.", help=f"it has: {', '.join(cls.__dataclass_fields__)}."
        )
    made: Task = cls(**options)
    return made


def match_labels(data: Iterable[str], names: Sequence[str], known: Sequence[str] = ()) -> dict[str, int]:
    """Class id of each label of the data that can be matched with `names`, the model's classes in the order of ids.

    By name without regard to case, spaces and hyphens; where the data has ids and tells their names (`known`), by that name;
    else ids by value. Labels that match nothing are left out.
    """
    labels = list(data)
    if not _spelled_as_names(labels, names, known) and all(_is_id(label, len(names)) for label in labels):
        return {label: int(label) for label in labels}
    folded = {_fold(name): index for index, name in enumerate(names)}
    found = {label: [folded[form] for form in _forms(label, known) if form in folded] for label in labels}
    return {label: ids[0] for label, ids in found.items() if ids}


def _forms(label: str, known: Sequence[str]) -> list[str]:
    """What a label may be called: the name that the data tells for an id, then the label itself."""
    return [*(_fold(name) for index, name in enumerate(known) if label == str(index)), _fold(label)]


def _spelled_as_names(labels: Iterable[str], names: Sequence[str], known: Sequence[str]) -> bool:
    folded = {_fold(name) for name in names}
    return all(any(form in folded for form in _forms(label, known)) for label in labels)


def bound_names(known: Sequence[str], config: PretrainedConfig | Mapping[str, Any]) -> tuple[str, ...]:
    """`known` class names in the order of a model's ids; DataError where the model does not have them all."""
    names, _ = _config_labels(config)
    if all(_is_placeholder(name, index) for index, name in enumerate(names)) and len(names) == len(known):
        return tuple(known)
    ids = match_labels(known, names)
    missing = [name for name in known if name not in ids]
    if missing:
        raise DataError(
            f"the model does not know the label '{missing[0]}'" + (f" and {len(missing) - 1} more." if missing[1:] else "."),
            facts=[f"the model's labels: {_some(names)}"],
            help="the model was trained for another task; start from an encoder, or from a model with these labels.",
        )
    own = {index: name for name, index in ids.items()}
    return tuple(own.get(index, name) for index, name in enumerate(names))


def class_metrics(predicted: np.ndarray, wanted: np.ndarray, classes: int) -> dict[str, float]:
    """Accuracy, Matthews, macro F1, and for two classes F1 of the last one: ids of shape (examples,)."""
    from sklearn.metrics import f1_score, matthews_corrcoef

    every = list(range(classes))
    scores = {
        "accuracy": float((predicted == wanted).mean()) if len(wanted) else 0.0,
        # 0 by definition where all is one class, and scikit-learn warns there
        "matthews": float(matthews_corrcoef(wanted, predicted)) if len(np.union1d(wanted, predicted)) > 1 else 0.0,
        "f1_macro": float(f1_score(wanted, predicted, labels=every, average="macro", zero_division=0.0)),
    }
    if classes == 2:
        scores["f1"] = float(f1_score(wanted, predicted, labels=[1], average="micro", zero_division=0.0))
    return scores


def score_metrics(predicted: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Pearson and Spearman correlation: (examples,) each; 0 where one side is constant or not finite, as nothing is told."""
    from scipy.stats import pearsonr, spearmanr

    predicted = np.asarray(predicted, dtype=np.float64)
    varied = len(wanted) > 1 and np.isfinite(predicted).all() and np.ptp(predicted) > 1e-9 * max(1.0, abs(predicted).max())
    if not varied or np.ptp(wanted) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(pearsonr(predicted, wanted).statistic),
        "spearman": float(spearmanr(predicted, wanted).statistic),
    }


# ---- reading


Stamp = tuple[tuple[str, int, int], ...]


def _stamp(source: str | int | None) -> Stamp:
    """What changes when a file does: the key of the caches below."""
    if not isinstance(source, str) or not source or not os.path.exists(Path(source).expanduser()):
        return ()  # os.path: it takes any text for an answer, pathlib raises on a name that is too long
    path = Path(source).expanduser()
    files = sorted(item for item in path.iterdir() if item.is_file()) if path.is_dir() else [path]
    return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)


@lru_cache(maxsize=4)
def _sources(data: str, glue: str | None, _key: Stamp) -> Mapping[str, Table]:
    """The tables "train" and "dev", one or both of them."""
    if not data:
        raise DataError("the task classification has no data.", help="name a folder or a file: data: ./reviews.")
    path = Path(data).expanduser()
    if os.path.isdir(path):
        train, dev = find_files(path)
        if not train and not dev:
            raise DataError(
                f"{data} holds no train file.",
                facts=[f"looked for: {', '.join(TRAIN_NAMES)} and {', '.join(DEV_NAMES)} with {', '.join(SUFFIXES)}"],
                help="name the files train.tsv and dev.tsv, or give the file itself.",
            )
        if dev and dev[0].stem.lower().startswith("test"):
            log.info("%s has no dev file: %s stands in", data, dev[0].name)
        files = {"train": train, "dev": dev}
        return {name: joined([_read(file, glue) for file in found]) for name, found in files.items() if found}
    if os.path.isfile(path):
        return {"train": _read(path, glue)}
    hub = f"nyu-mll/glue:{glue}" if data == f"glue/{glue}" else data
    if path.suffix.lower() in SUFFIXES or not HUB_NAME.fullmatch(hub):
        raise DataError(
            f"{data} does not exist.",
            help=f"{_neighbours(path)} Or name a hub data set: owner/name.",
        )
    log.info("%s is no file here: loading it from the hub", data)
    splits = read_hub(hub)
    found = {}
    for name, wanted in (("train", TRAIN_NAMES), ("dev", DEV_NAMES)):
        first = next((splits[split] for split in wanted if split in splits), None)
        if first is not None:
            found[name] = first
    if not found:
        raise DataError(f"{hub} has no train split.", facts=[f"splits: {', '.join(splits)}"], help="name another data set.")
    return found


def _neighbours(path: Path) -> str:
    try:
        names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError:
        names = []
    close = nearest(path.name, names).partition("known:")[0].strip() if names else ""
    return close or "check the path."


def _read(file: Path, glue: str | None) -> Table:
    if glue is None or file.suffix.lower() != ".tsv":
        return read_table(file)
    form = GLUE[glue]
    return read_table(file, header=form.header if _headless(file, form) else None, literal=True, extra=form.extra)


def _headless(file: Path, form: Glue) -> bool:
    """Whether the first line is data: CoLA has no header in GLUE, but people add one."""
    if form.header is None:
        return False
    with file.open("rb") as stream:
        first = stream.readline().decode("utf-8-sig", errors="replace").rstrip("\r\n").split("\t")
    return len(first) == len(form.header) and first[form.header.index("label")] in {"0", "1"}


def _columns(
    table: Table, text: str | None, text_pair: str | None, label: str | None, glue: str | None
) -> tuple[tuple[str, ...], str]:
    by_fold = {name.strip().lower(): name for name in reversed(list(table.columns))}
    guessed = []
    if label is None:
        wanted = [*(GLUE[glue].label if glue is not None else ()), *LABELS]
        label = next((name for name in wanted if name in table.columns), None) or next(
            (by_fold[name] for name in LABELS if name in by_fold), None
        )
        if label is None:
            raise _no_column(table, "a label column", "label", LABELS)
        guessed.append(f"label '{label}'")
    table.column(label)
    texts: tuple[str, ...]
    if text is not None:
        texts = (text,) if text_pair is None else (text, text_pair)
    else:
        forms = GLUE[glue].texts if glue is not None else ()
        pairs = next((form for form in forms if all(name in table.columns for name in form)), None) or next(
            (tuple(by_fold[name] for name in pair) for pair in PAIRS if all(name in by_fold for name in pair)), None
        )
        others = [name for name in table.columns if name != label]
        single = next((by_fold[name] for name in TEXTS if name in by_fold and by_fold[name] != label), None)
        if pairs is not None and label not in pairs:
            texts = pairs
        elif single is not None:
            texts = (single,)
        elif len(others) == 1:
            texts = (others[0],)
        else:
            raise _no_column(table, "a text column", "text", TEXTS)
        guessed.append(f"text {' and '.join(map(repr, texts))}")
    for name in texts:
        table.column(name)
    if guessed and glue is None:
        _tell(table.where, ", ".join(reversed(guessed)))
    return texts, label


@lru_cache(maxsize=64)
def _tell(where: str, columns: str) -> None:
    """Says once what was guessed."""
    log.info("%s: taking %s", where, columns)


def _no_column(table: Table, what: str, option: str, tried: Sequence[str]) -> DataError:
    return DataError(
        f"{table.where}: cannot tell which is {what}.",
        facts=[f"columns: {', '.join(map(repr, table.columns))}", f"looked for: {', '.join(tried)}"],
        help=f"name it: --{option} <column>.",
    )


# ---- examples


@lru_cache(maxsize=8)
def _examples(task: Classification, name: Split, _key: Stamp, _rows_key: Stamp) -> tuple[Example, ...]:
    own = task if task.kind != "auto" and (task.labels or task.kind == "score") else task.settled()
    table = own._table(name)
    texts, label = own._columns(table)
    raw = own._raw_labels(table, label)
    answers: Sequence[Any]
    if own.kind == "score":
        answers = own._scores(table, raw)
        strata: Sequence[int] | None = None
    else:
        ids = own._ids(table, raw)
        answers = [own.labels[index] for index in ids]
        strata = ids
    rows = list(range(len(table)))
    if not own._has_dev():
        dev = _drawn(rows, strata, max(1, round(DEV_SHARE * len(rows))), "dev")
        rows = sorted(dev) if name is Split.DEV else [row for row in rows if row not in dev]
    if name is not Split.DEV:
        rows = _chosen(own.train_rows, rows, len(table))
        if strata is not None and len({strata[row] for row in rows}) < 2:
            raise DataError(
                f"{table.where}: all {len(rows)} training rows have the label '{answers[rows[0]]}'.",
                help="a classifier needs two classes; is it the right column, and the whole file?",
            )
        count = validation_count(own.validation_share, len(rows))
        validation = _drawn(rows, strata, count, VALIDATION_SALT)
        rows = [row for row in rows if (row in validation) == (name is Split.VALIDATION)]
    if not rows:
        raise DataError(f"{table.where}: {len(table)} rows are too few to set some aside.", help="give at least 20 examples.")
    parts = [(column, table.column(column)) for column in texts]
    split = "dev" if name is Split.DEV else "train"
    return tuple(
        Example(f"{split}/{row}", tuple(_text(table, row, values[row], column) for column, values in parts), answers[row])
        for row in rows
    )


def _text(table: Table, row: int, value: Any, column: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value != value:
        raise DataError(
            f"{table.place(row)}: no text in column '{column}' ({str(value)[:40]}).", help="fill the row or leave it out."
        )
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as cut-off JSON escapes leave it; tokenizers refuse it
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def validation_count(share: float, total: int) -> int:
    """How many of `total` training examples are set aside as validation examples; `share` is what is asked for."""
    return max(1, min(max(round(share * total), VALIDATION_FEWEST), VALIDATION_MOST, round(VALIDATION_LARGEST_SHARE * total)))


def _drawn(rows: Sequence[int], strata: Sequence[int] | None, count: int, purpose: str) -> frozenset[int]:
    """`count` of the rows, the same ones each time; by class in proportion, and never the last row of a class."""
    generator = np.random.default_rng([SPLIT_SEED, *purpose.encode()])
    if strata is None:
        count = min(count, len(rows) - 1)
        return frozenset(generator.permutation(np.asarray(rows))[:count].tolist())
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(strata[row], []).append(row)
    # largest remainder: whole numbers that add up to `count` and are nearest to each class's share
    quota = {key: count * len(group) / len(rows) for key, group in groups.items()}
    take = {key: int(share) for key, share in quota.items()}
    for key in sorted(quota, key=lambda key: (take[key] - quota[key], key))[: count - sum(take.values())]:
        take[key] += 1
    drawn: list[int] = []
    for key in sorted(groups):
        drawn += generator.permutation(np.asarray(groups[key]))[: min(take[key], len(groups[key]) - 1)].tolist()
    return frozenset(drawn)


def _chosen(wanted: str | int | None, rows: Sequence[int], total: int) -> list[int]:
    """The rows to train on, in order: all, those listed in a file, or so many at random."""
    if wanted is None:
        return list(rows)
    if isinstance(wanted, int):
        order = np.random.default_rng([SPLIT_SEED, *b"rows"]).permutation(np.asarray(rows))
        return sorted(order[:wanted].tolist())
    path = Path(wanted).expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.", help="train_rows is a JSON file, or how many rows to draw.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}.", help='it should hold {"train_rows": [0, 5, ...]}.') from None
    numbers = content.get("train_rows") if isinstance(content, dict) else content
    if not isinstance(numbers, list) or not numbers or any(type(number) is not int for number in numbers):
        raise DataError(f"{path} holds no list of row numbers.", help='it should hold {"train_rows": [0, 5, ...]}.')
    wrong = [number for number in numbers if not 0 <= number < total]
    if wrong:
        raise DataError(f"{path} names row {wrong[0]}, the training data has {total}.", help="rows are counted from 0.")
    inside = set(rows)
    return sorted({number for number in numbers if number in inside})


# ---- labels


def _spelled(value: Any) -> str | None:
    """A label as text, whole numbers without a point; None where there is none."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        value = repr(value) if math.isfinite(value) else None
    if isinstance(value, int):
        value = str(value) if abs(value) < 2**53 else None
    if not isinstance(value, str) or not value.strip():
        return None
    text = value.strip()
    if NUMBER.fullmatch(text) and not text.lstrip("+-").isdigit() and float(text).is_integer() and abs(float(text)) < 2**53:
        return str(int(float(text)))
    return text


def _kind_of(raw: Sequence[str]) -> Literal["classes", "score"]:
    """A score where all labels are numbers and some have a fraction; whole numbers are classes."""
    numbers = all(NUMBER.fullmatch(text) and math.isfinite(float(text)) for text in set(raw))
    return "score" if numbers and any(not float(text).is_integer() for text in set(raw)) else "classes"


def _in_order(labels: set[str]) -> tuple[str, ...]:
    """Numbers by value, everything else by name."""
    if all(NUMBER.fullmatch(label) for label in labels):
        return tuple(sorted(labels, key=lambda label: (float(label), label)))
    return tuple(sorted(labels))


def _config_labels(config: PretrainedConfig | Mapping[str, Any]) -> tuple[tuple[str, ...], str | None]:
    """A model's class names in the order of ids, and its problem_type."""

    def get(name: str) -> Any:
        return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)

    mapping = get("id2label")
    try:
        names = {int(key): str(name) for key, name in dict(mapping).items()} if mapping else {}
        count = int(get("num_labels") or len(names) or 2)
    except (TypeError, ValueError):
        raise DataError("the model's id2label is not a mapping of ids to names.", help="mend it in config.json.") from None
    names = names or {index: f"LABEL_{index}" for index in range(count)}
    if sorted(names) != list(range(len(names))):
        raise DataError(
            f"the model's id2label has the ids {', '.join(map(str, sorted(names)))[:80]}.",
            help="ids must run from 0 without a gap; mend it in config.json.",
        )
    return tuple(names[index] for index in range(len(names))), get("problem_type")


def _is_placeholder(name: str, index: int) -> bool:
    return bool(PLACEHOLDER.fullmatch(name)) and int(re.sub(r"\D", "", name)) == index


def _is_id(label: str, count: int) -> bool:
    return label.isascii() and label.isdigit() and len(label) < 7 and int(label) < count


def _fold(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().casefold())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _told(kind: str) -> str:
    return "classes" if kind == "classes" else "scores (numbers with a fraction)"


def _per_example(logits: np.ndarray, features: Features) -> np.ndarray:
    """Logits in the order of the examples: (examples, classes); here each example has exactly one row."""
    out = np.empty_like(logits)
    out[np.asarray(features.example)] = logits
    return out
