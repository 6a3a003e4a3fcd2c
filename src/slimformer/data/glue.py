"""The nine GLUE tasks as data: class names, metric and columns of each, and the forms in which its files are handed around.

Metrics are those of the GLUE paper (https://arxiv.org/abs/1804.07461). MRPC and QQP have two there: accuracy is the one that counts
here, and F1 is reported beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slimformer.data.files import Table, read_table
from slimformer.data.texts import read_text, suffix_of


@dataclass(frozen=True)
class Glue:
    """One GLUE task: class names in the order of ids (none for scores), metric, and the columns of each form of its files."""

    labels: tuple[str, ...]
    metric: str
    texts: tuple[tuple[str, ...], ...]
    label: tuple[str, ...] = ("label",)
    header: tuple[str, ...] | None = None  # column names of files whose first line is data already
    extra: bool = False  # whether rows may have surplus fields


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


def read_glue(file: Path, form: Glue) -> Table:
    """A file of a GLUE task; the quotes of its TSV files stand for themselves."""
    if suffix_of(file) != ".tsv":
        return read_table(file)
    return read_table(file, header=form.header if _lacks_header(file, form) else None, literal=True, extra=form.extra)


def _lacks_header(file: Path, form: Glue) -> bool:
    """Whether the first line is data: CoLA has no header in GLUE, but people add one."""
    if form.header is None:
        return False
    first = read_text(file).partition("\n")[0].rstrip("\r").split("\t")
    return len(first) == len(form.header) and first[form.header.index("label")] in {"0", "1"}
