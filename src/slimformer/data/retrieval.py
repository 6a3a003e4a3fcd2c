"""Reads queries with the passages that answer them: SQuAD's questions and contexts, or rows with a query and a passage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from slimformer.data.files import SHARD, SUFFIXES, Table, join_tables, read_hub, read_table
from slimformer.data.sources import Format, Stamp, read_sources
from slimformer.data.squad import read_questions
from slimformer.data.texts import read_text, repair_text, stem_of, suffix_of
from slimformer.errors import DataError
from slimformer.log import remark

_PAIRS = (("query", "passage"), ("question", "context"), ("question", "passage"), ("query", "positive"), ("anchor", "positive"),
          ("query", "document"), ("question", "answer"), ("question", "sentence"), ("query", "text"))  # fmt: skip
RETRIEVAL_SHAPE = 'give SQuAD\'s JSON, or rows like {"query": "who wrote it?", "passage": "It was written by ..."}.'


@dataclass(frozen=True)
class Retrieval:
    """Queries, the passages that are searched, each once, and for each query the places of the passages that answer it."""

    where: str
    queries: tuple[str, ...]
    passages: tuple[str, ...]
    relevant: tuple[tuple[int, ...], ...]

    def part(self, chosen: Sequence[int], most: int) -> Retrieval:
        """Some of the queries, with all passages that answer them and others, evenly spaced, up to `most` passages in all."""
        needed = sorted({place for query in chosen for place in self.relevant[query]})
        others = sorted(set(range(len(self.passages))) - set(needed))
        room = max(0, most - len(needed))
        step = max(1.0, len(others) / room) if room else 0.0
        more = [others[int(place * step)] for place in range(min(room, len(others)))] if room else []
        kept = sorted({*needed, *more})
        place = {old: new for new, old in enumerate(kept)}
        return Retrieval(
            self.where,
            tuple(self.queries[query] for query in chosen),
            tuple(self.passages[old] for old in kept),
            tuple(tuple(place[old] for old in self.relevant[query]) for query in chosen),
        )


@lru_cache(maxsize=4)
def read_retrieval(data: str, _key: Stamp) -> Mapping[str, Retrieval]:
    """The queries "train" and "dev", one or both of them; DataError for whatever is wrong with them."""
    form = Format(
        task="embedding",
        suffixes=SUFFIXES,
        match=lambda files, name: [file for file in files if SHARD.sub("", stem_of(file)).lower().startswith(name)],
        read=_read,
        read_hub=lambda name: {split: _of_table(table) for split, table in read_hub(name).items()},
        example="./squad/dev-v1.1.json",
        forms="a folder or a file",
        advice="several match: ",
    )
    sources = dict(read_sources(data, form))
    if "test" in sources:
        sources["dev"] = sources.pop("test")
    return sources


def _read(files: Sequence[Path]) -> Retrieval:
    if suffix_of(files[0]) == ".json" and '"paragraphs"' in read_text(files[0], RETRIEVAL_SHAPE)[:1_000_000]:
        questions = read_questions(files)
        rows = [(item.texts[0], item.texts[1]) for item in questions.examples if item.answer.texts]
        return _joined(questions.where, rows)
    return _of_table(join_tables([read_table(file) for file in files]))


def _of_table(table: Table) -> Retrieval:
    folded = {name.lower(): name for name in table.columns}
    pair = next((pair for pair in _PAIRS if all(name in folded for name in pair)), None)
    if pair is None:
        raise DataError(
            f"{table.where}: cannot tell which columns hold queries and passages.",
            facts=[table.named_columns(), f"looked for: {', '.join(' and '.join(pair) for pair in _PAIRS[:5])}"],
            help=RETRIEVAL_SHAPE,
        )
    remark(f"{table.where}: taking queries from '{folded[pair[0]]}', passages from '{folded[pair[1]]}'.")
    queries, passages = (table.columns[folded[name]] for name in pair)
    rows = []
    for row, (query, passage) in enumerate(zip(queries, passages, strict=True)):
        if not (isinstance(query, str) and isinstance(passage, str) and query.strip() and passage.strip()):
            raise DataError(f"{table.place(row)}: no query, or no passage.", help="fill the row or leave it out.")
        rows.append((query, passage))
    return _joined(table.where, rows)


def _joined(where: str, rows: Sequence[tuple[str, str]]) -> Retrieval:
    """Rows with equal queries, and with equal passages, become one."""
    passages: dict[str, int] = {}
    answers: dict[str, list[int]] = {}
    for query, passage in rows:
        place = passages.setdefault(repair_text(passage.strip()), len(passages))
        found = answers.setdefault(repair_text(query.strip()), [])
        if place not in found:
            found.append(place)
    if len(answers) < 2 or len(passages) < 2:
        raise DataError(
            f"{where} holds {len(answers)} queries and {len(passages)} passages, and nothing can be searched in so few.",
            help=RETRIEVAL_SHAPE,
        )
    return Retrieval(where, tuple(answers), tuple(passages), tuple(map(tuple, answers.values())))
