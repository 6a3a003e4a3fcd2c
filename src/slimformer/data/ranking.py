"""Reads queries with passages to be ranked: rows with a query, a passage and perhaps a label; positives beside negatives; BEIR; SQuAD."""

from __future__ import annotations

import json
import math
import os.path
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from slimformer.data.beir import is_beir, read_beir
from slimformer.data.columns import fold_name, folded_names
from slimformer.data.files import SHARD, SUFFIXES, Table, join_tables, read_hub, read_splits, read_table, spread
from slimformer.data.labels import is_number, spell_label
from slimformer.data.query_groups import Ranking, Row, by_query
from slimformer.data.sources import Format, Stamp, read_sources
from slimformer.data.texts import read_text, repair_text, stem_of, suffix_of
from slimformer.errors import DataError, shown
from slimformer.log import remark

RANKING_SHAPE = (
    'give rows like {"query": "who wrote it?", "passage": "It was written by ...", "label": 1}, or {"query": ..., '
    '"positive": [...], "negative": [...]}, a folder in BEIR\'s form, or SQuAD\'s JSON.'
)
# Names in the order in which they are looked for; case, spaces, hyphens and underscores do not count.
_QUERIES = ("query", "question", "queries", "query_text", "search_query", "anchor", "claim", "text1", "text_1", "sentence1",
            "sentence_1", "text_a", "q", "keyword", "question1")  # fmt: skip
_PASSAGES = ("passage", "document", "passage_text", "doc", "context", "text2", "text_2", "sentence2", "sentence_2", "text_b", "answer",
             "response", "passages", "documents", "docs", "candidates", "corpus", "paragraph", "content", "text", "d",
             "question2")  # fmt: skip
_LABELS = ("label", "labels", "relevance", "relevant", "is_relevant", "score", "scores", "grade", "rel", "rating", "is_selected",
           "target", "gold", "judgment", "similarity", "y")  # fmt: skip
_POSITIVES = ("positive", "positives", "pos", "positive_passages", "positive_passage", "positive_ctxs", "positive_doc", "positive_docs",
              "relevant_passages", "positive_document")  # fmt: skip
_NEGATIVES = ("negative", "negatives", "neg", "negative_passages", "negative_passage", "negative_ctxs", "hard_negative_ctxs",
              "hard_negative", "hard_negatives", "negative_doc", "negative_docs", "irrelevant_passages",
              "negative_document")  # fmt: skip


@dataclass(frozen=True)
class RankingColumns:
    """Which columns hold what. With `positives` the passages stand there, and none in `passage`."""

    query: str
    passage: str = ""
    label: str = ""
    positives: str = ""
    negatives: tuple[str, ...] = ()


@lru_cache(maxsize=4)
def read_ranking(data: str, query: str | None, passage: str | None, label: str | None, _key: Stamp) -> Mapping[str, Ranking]:
    """The groups "train" and "dev", one or both, and "test" if there is no dev; the columns as they are named, or found by usual names.

    DataError for whatever is wrong with the data. `_key` changes with its files.
    """
    if is_beir(data):
        return read_beir(Path(os.path.expanduser(data)))
    named = (query, passage, label)
    form = Format(
        task="reranking",
        suffixes=SUFFIXES,
        match=lambda files, name: [file for file in files if SHARD.sub("", stem_of(file)).lower().startswith(name)],
        read=lambda files: _read(files, named),
        read_hub=lambda name: {split: _of_table(spread(table), named) for split, table in read_hub(name).items()},
        read_splits=lambda file: {split: _of_table(spread(table), named) for split, table in read_splits(file).items()},
        example="./pairs.jsonl",
        forms="a folder or a file",
        advice="several match: ",
    )
    return read_sources(data, form)


_Named = tuple[str | None, str | None, str | None]


def _read(files: Sequence[Path], named: _Named) -> Ranking:
    if suffix_of(files[0]) == ".json" and '"paragraphs"' in read_text(files[0], RANKING_SHAPE)[:1_000_000]:
        return _of_squad(files)
    return _of_table(spread(join_tables([read_table(file) for file in files])), named)


# -- SQuAD ---------------------------------------------------------------------------------------------------------------------


def _of_squad(files: Sequence[Path]) -> Ranking:
    """Each question with its own paragraph, against others of the same article; questions without an answer are left out."""
    rows: list[Row] = []
    pools: dict[str, str] = {}
    skipped = 0
    for file in files:
        try:
            articles = json.loads(read_text(file, RANKING_SHAPE))["data"]
            for number, article in enumerate(articles):
                for paragraph in article["paragraphs"]:
                    passage = repair_text(str(paragraph["context"]).strip())
                    pools.setdefault(passage, f"{file.name} {number}")
                    for item in paragraph["qas"]:
                        if item.get("is_impossible") or not item.get("answers", True):
                            skipped += 1
                        else:
                            rows.append((repair_text(str(item["question"]).strip()), passage, 1.0))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{file} is not SQuAD's JSON: {type(error).__name__} {error}.", help=RANKING_SHAPE) from None
    where = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    if skipped:
        remark(f"{where}: {skipped:,} questions that their paragraph does not answer are left out.")
    if not rows:
        raise DataError(f"{where} holds no question with an answer.", help=RANKING_SHAPE)
    return by_query(where, rows, pools)


# -- Tables --------------------------------------------------------------------------------------------------------------------


def _of_table(table: Table, named: _Named) -> Ranking:
    columns = _columns(table, named)
    parts = [f"queries from '{columns.query}'"]
    if columns.positives:
        others = f", wrong ones from {', '.join(map(repr, columns.negatives))}" if columns.negatives else ""
        parts.append(f"passages that answer them from '{columns.positives}'{others}")
    else:
        labels = f"labels from '{columns.label}'" if columns.label else "no labels"
        parts.append(f"passages from '{columns.passage}', {labels}")
    remark(f"{table.where}: taking {', '.join(parts)}.")
    rows = list(_rows(table, columns))
    if not rows:
        raise DataError(f"{table.where} holds no pair of a query and a passage.", help=RANKING_SHAPE)
    title = next((name for name in table.columns if fold_name(name) == "title"), None)
    pools = None
    if title is not None and columns.positives and len(rows) == len(table):
        pools = {text: str(article) for (_, text, _), article in zip(rows, table.columns[title], strict=True)}
    return by_query(table.where, rows, pools)


def _columns(table: Table, named: _Named) -> RankingColumns:
    query, passage, label = named
    for name in named:
        if name is not None:
            table.column(name)
    folded = folded_names(table)

    def first(names: Sequence[str], *taken: str | None) -> str:
        return next((folded[name] for name in names if name in folded and folded[name] not in taken), "")

    query = query or first(_QUERIES, passage, label)
    if not query:
        raise DataError(
            f"{table.where}: cannot tell which column holds the queries.",
            facts=[table.named_columns(), f"looked for: {', '.join(_QUERIES[:10])}"],
            help=f"name it: --query <column>. Or {RANKING_SHAPE}",
        )
    positives = "" if passage else first(_POSITIVES, query, label)
    if positives:
        many = [name for name in table.columns if fold_name(name).rstrip("0123456789_") in _NEGATIVES and name != query]
        return RankingColumns(query, positives=positives, negatives=tuple(many))
    passage = passage or first(_PASSAGES, query, label)
    if not passage:
        raise DataError(
            f"{table.where}: cannot tell which column holds the passages.",
            facts=[table.named_columns(), f"looked for: {', '.join((*_PASSAGES[:8], *_POSITIVES[:3]))}"],
            help=f"name it: --passage <column>. Or {RANKING_SHAPE}",
        )
    if label is None and {"question", "context", "answers"} <= folded.keys():  # SQuAD's rows: each context answers its question
        return RankingColumns(query, positives=passage)
    return RankingColumns(query, passage, label or first(_LABELS, query, passage))


def _rows(table: Table, columns: RankingColumns) -> Iterator[Row]:
    for row, value in enumerate(table.column(columns.query)):
        query = _text(value)
        if not query:
            raise DataError(f"{table.place(row)}: no query ({shown(value, 40)}).", help="fill the row or leave it out.")
        if columns.positives:
            for name, label in ((columns.positives, 1.0), *((name, 0.0) for name in columns.negatives)):
                for text in _texts(table, row, name, needed=name == columns.positives):
                    yield query, text, label
            continue
        texts = _texts(table, row, columns.passage, needed=True)
        said = table.columns[columns.label][row] if columns.label else None
        several = isinstance(table.columns[columns.passage][row], (list, tuple))
        if isinstance(said, (list, tuple)) != several and said is not None:
            raise DataError(
                f"{table.place(row)}: a list of passages needs a list of labels, and one passage one label.",
                facts=[f"passages: {len(texts)}", f"label: {shown(said, 40)}"],
                help=RANKING_SHAPE,
            )
        labels = list(said) if isinstance(said, (list, tuple)) else [said] * len(texts)
        if len(labels) != len(texts):
            raise DataError(
                f"{table.place(row)}: {len(texts)} passages with {len(labels)} labels.", help="give each passage its label."
            )
        for text, grade in zip(texts, labels, strict=True):
            yield query, text, _label(table, row, columns.label, grade)


def _texts(table: Table, row: int, column: str, *, needed: bool) -> list[str]:
    """The texts of a cell: one, or a list; of passages with a title both."""
    value = table.columns[column][row]
    texts = [_text(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
    if not all(texts) and (needed or isinstance(value, (list, tuple))):
        raise DataError(
            f"{table.place(row)}: no text in column '{column}' ({shown(value, 40)}).", help="fill the row or leave it out."
        )
    return [text for text in texts if text]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        named = {fold_name(str(name)): item for name, item in value.items()}
        parts = [_text(named.get("title")), _text(next((named[name] for name in _PASSAGES if name in named), None))]
        return " ".join(part for part in parts if part)
    return repair_text(value.strip()) if isinstance(value, str) else ""


def _label(table: Table, row: int, column: str, value: Any) -> float | None:
    """How relevant a passage is, None if the cell is empty."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    text = {"true": "1", "false": "0", "yes": "1", "no": "0"}.get(str(value).strip().lower(), spell_label(value) or "")
    if not is_number(text) or float(text) < 0:
        what = "is below 0" if is_number(text) else "is no number"
        raise DataError(
            f"{table.place(row)}: the label {shown(value, 40)} in column '{column}' {what}.",
            help="a label says how relevant a passage is: 0 is not at all, 1 or more is relevant; leave it empty if nobody said.",
        )
    return float(text)
