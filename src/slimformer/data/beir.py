"""Reads a folder in BEIR's form: corpus.jsonl, queries.jsonl, and qrels/<split>.tsv that says which passages answer a query.

The corpus is streamed. Of more passages than memory should hold those that answer a query are kept, and of the others every second,
fourth, ... (Thakur et al. 2021, https://arxiv.org/abs/2104.08663).
"""

from __future__ import annotations

import json
import os.path
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slimformer.data.query_groups import QueryGroup, Ranking
from slimformer.data.texts import repair_text, stream_lines
from slimformer.errors import DataError, shown
from slimformer.log import remark

_CORPUS, _QUERIES, _QRELS = "corpus.jsonl", "queries.jsonl", "qrels"
_MOST_PASSAGES = 100_000
_SPLITS = {"train": ("train",), "dev": ("dev", "validation", "valid", "test")}
_SHAPE = "a line of qrels has a query's id, a passage's id and a number: \"q1<tab>d7<tab>1\"."


def is_beir(data: str) -> bool:
    """Whether data is a folder in BEIR's form."""
    folder = Path(os.path.expanduser(data))
    return bool(data) and (folder / _QRELS).is_dir() and all(_packed(folder / name) for name in (_CORPUS, _QUERIES))


def read_beir(folder: Path, most: int = _MOST_PASSAGES) -> dict[str, Ranking]:
    """The groups "train" and "dev", one or both; passages without a line in qrels are wrong ones, as BEIR counts them."""
    files = {
        kind: next((file for name in names if (file := folder / _QRELS / f"{name}.tsv").is_file()), None)
        for kind, names in _SPLITS.items()
    }
    told = {kind: _qrels(file) for kind, file in files.items() if file is not None}
    if not told:
        raise DataError(f"{folder / _QRELS} holds no train.tsv, dev.tsv or test.tsv.", help=_SHAPE)
    if "train" not in told:
        remark(f"{folder}: there is no {_QRELS}/train.tsv: a tenth of the queries of {files['dev']} is reported on.")
        told = {"train": told["dev"]}
    needed = {passage for lines in told.values() for own in lines.values() for passage in own}
    passages = _corpus(folder, needed, most)
    queries = {str(item.get("_id")): _text(item) for item in _items(folder / _QUERIES)}
    found = {}
    for kind, lines in told.items():
        groups, lost = [], 0
        for name, own in lines.items():
            query = queries.get(name)
            known = {passages[item]: label for item, label in own.items() if item in passages}
            lost += query is None or len(known) < len(own)
            if query and known and max(known.values()) > 0:
                groups.append(QueryGroup(query, tuple(known), tuple(known.values())))
        if lost:
            remark(f"{folder}: {lost:,} of {len(lines):,} queries of {kind} lack their text, or a passage.")
        if not groups:
            raise DataError(f"{folder}: no query of {kind} has its text and a passage that answers it.", help=_SHAPE)
        found[kind] = Ranking(f"{folder} [{kind}]", tuple(groups), (tuple(dict.fromkeys(passages.values())),))
    remark(f"{folder}: {len(passages):,} passages; for each query those that share most words with it are ranked.")
    return found


def _packed(file: Path) -> Path | None:
    """The file, or the same packed."""
    return next((found for end in ("", ".gz") if (found := file.with_name(file.name + end)).is_file()), None)


def _items(file: Path) -> Iterator[dict[str, Any]]:
    place = _packed(file) or file
    for number, line in enumerate(stream_lines(place), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{place}, line {number} is not JSON: {error}.", help='a line is {"_id": ..., "text": ...}.'
            ) from None
        if not isinstance(item, dict) or "_id" not in item:
            raise DataError(
                f"{place}, line {number}: {shown(item, 60)} has no _id.", help='a line is {"_id": ..., "text": ...}.'
            )
        yield item


def _text(item: Mapping[str, Any]) -> str:
    parts = [item.get(name) for name in ("title", "text")]
    return repair_text(" ".join(part.strip() for part in parts if isinstance(part, str) and part.strip()))


def _corpus(folder: Path, needed: set[str], most: int) -> dict[str, str]:
    """Id -> text of the passages that are needed, and of others up to `most`, evenly spaced."""
    kept: dict[str, str] = {}
    others: dict[str, str] = {}
    seen, every = 0, 1
    for item in _items(folder / _CORPUS):
        name, text = str(item["_id"]), _text(item)
        if not text:
            continue
        if name in needed:
            kept[name] = text
            continue
        if seen % every == 0:
            others[name] = text
        seen += 1
        if len(others) > most:
            others = dict(list(others.items())[::2])
            every *= 2
    if every > 1:
        remark(f"{folder / _CORPUS}: of {seen:,} passages that answer no query one of every {every} is read, to bound memory.")
    return kept | others


def _qrels(file: Path) -> dict[str, dict[str, float]]:
    """Query id -> passage id -> label, of lines with three columns, or four as in TREC's files."""
    found: dict[str, dict[str, float]] = {}
    for number, line in enumerate(stream_lines(file), 1):
        parts = line.split("\t") if "\t" in line else line.split()
        if not line.strip():
            continue
        parts = [parts[0], *parts[2:]] if len(parts) == 4 else parts
        try:
            query, passage, label = parts[0].strip(), parts[1].strip(), float(parts[2])
        except (IndexError, ValueError):
            if number == 1:
                continue  # the names of the columns
            raise DataError(f"{file}, line {number}: {shown(line, 60)}.", help=_SHAPE) from None
        if not 0 <= label < float("inf"):
            label = 0.0  # TREC marks what was not judged, and spam, below 0
        found.setdefault(query, {})[passage] = label
    if not found:
        raise DataError(f"{file} holds no lines.", help=_SHAPE)
    return found
