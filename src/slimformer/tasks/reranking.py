"""Pairs of a query and a passage with one score, by which the passages of a query are put in order: rerankers, cross-encoders.

An example is a query with its passages, so that what is judged, compared and resampled is a query. Each pair is one row. A model learns
from labels, from a teacher's scores, or from both; what a user sees as its score is told by the model's folder and never guessed.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from slimformer.core.relevance import RELEVANCE, ScoreActivation, activation_facts, score_activation
from slimformer.data.beir import is_beir
from slimformer.data.labels import model_labels
from slimformer.data.memory import data_source
from slimformer.data.query_groups import QueryGroup, Ranking
from slimformer.data.ranking import read_ranking
from slimformer.data.sources import Stamp, no_training_data, settle_dev, stamp
from slimformer.data.splits import FOR_DEV, FOR_VALIDATION, dev_count, draw_rows, draw_some, validation_count
from slimformer.errors import DataError, RecipeError, nearest
from slimformer.log import remark, remarks_on
from slimformer.tasks._ranks import (
    RANK_METRICS,
    chance_gain,
    gain_of_order,
    grades_of_order,
    reciprocal_rank,
)
from slimformer.tasks._snippet import batch_snippet
from slimformer.tasks._unlabelled import AGREEMENTS, drawn_shares
from slimformer.tasks.base import IGNORED, TOGETHER, Example, Features, Outputs, Split, Task, option

if TYPE_CHECKING:
    import numpy as np
    import torch
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig

_TEXTS_AT_ONCE = 4096  # pairs that are encoded together: bounds the memory of the tokenizer's own objects
_FEWEST = 20  # queries from which a model's order is doubted
_OBJECTIVES = ("bce", "mse")
_CHOICES = {"labels": ("auto", "dev", "none"), "activation": ("auto", "sigmoid", "identity"), "objective": _OBJECTIVES}
_PAIRS_HELP = (
    "give several passages for a query, right and wrong ones, or right ones alone; pairs that stand for themselves, such as sentences "
    "with a similarity, are for --task classification."
)


@dataclass(frozen=True)
class Relevance:
    """How relevant each passage of a query is: 0 is not at all, None is not told."""

    grades: tuple[float | None, ...]

    def __str__(self) -> str:
        right = sorted(
            (place for place, grade in enumerate(self.grades, 1) if grade), key=lambda place: -(self.grades[place - 1] or 0)
        )
        return f"passage {', '.join(map(str, right))}" if right else "none"


@dataclass(frozen=True)
class Reranking(Task):
    """Queries with passages that are put in order by a score.

    `data` is a folder with train and dev files, one file, a hub name, or rows in memory: rows with a query, a passage and a label (one
    of 0 and 1, or a grade), rows with a query and what is `positive` and `negative` for it, a folder in BEIR's form, or SQuAD's JSON,
    where a question's paragraph stands against others of its article. `query`, `passage` and `label` name columns; without them
    the usual names are looked for. Rows with one query belong together. A label that is left out tells nothing: such pairs are learned
    from a teacher alone, and take no part in what is judged.

    `candidates`: passages of a query that are put in order at most, where many are given, and where others must stand in for wrong
    ones; `train_candidates` are those of a query that is trained on. At most `train_queries` and `dev_queries` are read.

    `labels` is "auto" if the data has them; "dev" if only the dev data has, half of which is then chosen on; "none" if nobody
    judged anything. The teacher's scores are what is learned in the last two cases, and with "none" the order that it gives is what
    is judged: `metric` is then the "agreement" with it, nDCG at 10 with grades by the teacher's order, or "same_first".

    `objective` is "bce", the cross-entropy of the label over the highest one with the sigmoid of the output, or "mse", the squared
    difference of the score from the label. `margin_weight` is how much the differences between the passages of a query count beside the
    outputs themselves where a teacher is followed (Hofstaetter et al. 2020, https://arxiv.org/abs/2010.02666, eq. 2).

    `activation` is what becomes of the output: "sigmoid" or "identity"; "auto" is as the folder says, else the sigmoid, as CrossEncoder
    takes it. `metric` "auto" is "ndcg_at_10"; "mrr_at_10" is the reciprocal rank. `validation_share` of the queries, but between 200 and
    2,000 and at most a fifth, is set aside to choose on.

    RecipeError names every option that is wrong. What is wrong with the data becomes a DataError when it is read.

    >>> from slimformer.tasks.base import Split
    >>> rows = [{"query": f"what is {n}?", "positive": f"{n} is a number", "negative": "a fish"} for n in range(100)]
    >>> task = Reranking(data=rows)
    >>> [len(task.split(split)) for split in (Split.TRAIN, Split.VALIDATION, Split.DEV)]
    [72, 18, 10]
    >>> task.split(Split.DEV)[0].answer.grades
    (1.0, 0.0)
    """

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    paths: ClassVar[tuple[str, ...]] = ("data",)

    data: Any = option("", "Queries and passages: a folder with train and dev files, one file, or a hub name.", required=True)  # noqa: RUF009
    query: str | None = option(None, "Column of the query; guessed if it has a usual name.")
    passage: str | None = option(None, "Column of the passage; guessed if it has a usual name.")
    label: str | None = option(None, "Column of the label; guessed if it has a usual name.")
    labels: str = option("auto", "Whether the data has labels: auto, dev (only to judge by), or none (the teacher answers).")
    metric: str = option("auto", "The metric that counts: ndcg_at_10, mrr_at_10; without labels agreement, same_first.")
    activation: str = option("auto", "What becomes of the output: sigmoid or identity; auto: as the model's folder says.")
    objective: str = "bce"
    max_length: int = option(512, "Tokens a pair may have, if the model's folder allows as many; longer ones are cut off.")
    candidates: int = option(10, "Passages of a query that are put in order, at most.")
    train_candidates: int = 8
    train_queries: int = option(20_000, "At most so many queries are trained on.")
    dev_queries: int = 300
    validation_share: float = 0.05
    margin_weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", data_source(self.data))
        mistakes = list(self._mistakes())
        if mistakes:
            raise RecipeError("the task reranking cannot be set up like that.", facts=mistakes)
        object.__setattr__(self, "labelled", self.labels == "auto")
        if self.metric == "auto":
            object.__setattr__(self, "metric", self._metrics[0])

    @property
    def _metrics(self) -> tuple[str, ...]:
        return AGREEMENTS if self.labels == "none" else RANK_METRICS

    def _mistakes(self) -> Iterable[str]:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                yield f"{name}: there is no '{getattr(self, name)}'; {nearest(str(getattr(self, name)), known)}"
        if self.metric not in ("auto", *self._metrics):
            yield f"metric: there is no '{self.metric}' with labels: {self.labels}; {nearest(self.metric, self._metrics)}"
        if not 8 <= self.max_length <= 100_000:
            yield f"max_length: at least 8 tokens, not {self.max_length}"
        if not 0 < self.validation_share < 0.5:
            yield f"validation_share: a share above 0 and below 0.5, not {self.validation_share}"
        for name, least in (("candidates", 2), ("train_candidates", 2), ("train_queries", 10), ("dev_queries", 10)):
            if getattr(self, name) < least:
                yield f"{name}: at least {least}, not {getattr(self, name)}"
        if self.margin_weight < 0:
            yield f"margin_weight: 0 or more, not {self.margin_weight}"

    @classmethod
    def claims(cls, data: str) -> bool:
        """A folder in BEIR's form is for nothing else."""
        return is_beir(data)

    def title(self) -> str:
        return f"reranking {Path(self.data).resolve().name}" if self.data else "reranking"

    # ---- data

    def _source(self) -> _Source:
        return _Source(
            self.data, self.query, self.passage, self.label, self.labels, self.candidates, self.train_candidates,
            self.train_queries, self.dev_queries, self.validation_share,
        )  # fmt: skip

    def split(self, name: Split) -> Sequence[Example]:
        return _examples(self._source(), Split(name), _key(self.data))

    def notes(self) -> tuple[str, ...]:
        """What was found or left out in the data."""
        train, validation, dev = (self.split(name) for name in Split)
        pairs = [grade for item in train for grade in item.answer.grades]
        told = [grade for grade in pairs if grade is not None]
        right = (
            f"{sum(grade > 0 for grade in told) / len(told):.0%} of those with a label are relevant"
            if told
            else "none has a label"
        )
        remark(f"{self.data}: {len(pairs):,} pairs of {len(train):,} queries to train on; {right}.")
        highest = max((grade for grade in told), default=1.0)
        if highest > 1 and self.labelled:
            remark(f"{self.data}: labels go up to {highest:g}; the loss takes them over the highest one.")
        seen = {item.texts[0].casefold() for item in (*train, *validation)}
        leaked = sum(item.texts[0].casefold() in seen for item in dev)
        if leaked:
            remark(
                f"{self.data}: {leaked:,} of {len(dev):,} queries of dev are in the training data too, so scores on dev are too good."
            )
        if self.labels == "none":
            remark(
                f"{self.data}: no labels are read; what is measured is how far the order agrees with the teacher's, not how good it is."
            )
        return remarks_on(self.data)

    def row_texts(self) -> int:
        return 2

    def encode(self, examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> Features:
        from slimformer.data.tokenizer import cutting, pad_id_of

        pairs = [(place, item.texts[0], passage) for place, item in enumerate(examples) for passage in item.texts[1:]]
        columns: dict[str, list[Any]] = {"input_ids": [], "token_type_ids": []}
        truncated: set[int] = set()
        with cutting(tokenizer, max_length):
            for start in range(0, len(pairs), _TEXTS_AT_ONCE):
                some = pairs[start : start + _TEXTS_AT_ONCE]
                rows = tokenizer.encode_batch_fast([(query, passage) for _, query, passage in some])
                for (place, _, _), row in zip(some, rows, strict=True):
                    columns["input_ids"].append(row.ids)
                    columns["token_type_ids"].append(row.type_ids)
                    if row.overflowing:
                        truncated.add(place)
        places = [place for place, _, _ in pairs]
        columns[TOGETHER] = places
        if self.labelled:
            columns["labels"] = [self._target(grade) for item in examples for grade in item.answer.grades]
        return Features(columns, places, len(truncated), pad_id_of(tokenizer))

    def _target(self, grade: float | None) -> float:
        """What the output, or the score, should be for a grade; IGNORED if nobody said it."""
        if grade is None:
            return float(IGNORED)
        if self.objective == "mse" and self.activation == "identity":
            return float(grade)
        return grade / _highest(self._source(), _key(self.data))

    # ---- model

    def configure(self) -> Mapping[str, Any]:
        facts = {"num_labels": 1, "id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": None}
        return facts | activation_facts(self._activation)

    @property
    def _activation(self) -> ScoreActivation:
        return "sigmoid" if self.activation == "auto" else cast(ScoreActivation, self.activation)

    def bind(self, config: PretrainedConfig | Mapping[str, Any]) -> Reranking:
        names, _ = model_labels(config)
        if len(names) != 1:
            raise DataError(
                f"the model has {len(names)} outputs ({', '.join(names[:4])}), and a reranker has one score.",
                help="make it small as the classifier that it is (--task classification, with the label in a column), or start from its "
                "encoder, or from a model that was trained with num_labels=1.",
            )
        told = score_activation(config) if self.activation == "auto" else self._activation
        return replace(self, activation=told or self._activation)

    def completed(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        return {} if score_activation(config) == self._activation else activation_facts(self._activation)

    def loss(self, output: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The mean over rows; those without a label add nothing to it.

        Without any labels nothing can be lost, but its gradient tells what the outputs feel: labels are drawn by the model's own
        probabilities, so that the square of the gradient is, in the mean over draws, the Fisher information. A row's draw is its own.
        """
        import torch
        from torch.nn import functional

        logits = output["logits"].float().squeeze(-1)  # (batch,)
        if not self.labelled or "labels" not in batch:
            labels = (drawn_shares(batch, 1)[:, 0] < logits.detach().sigmoid()).float()
            return functional.binary_cross_entropy_with_logits(logits, labels)
        labels = batch["labels"].float()
        told = labels != IGNORED
        if self.objective == "mse":
            scores = logits.sigmoid() if self._activation == "sigmoid" else logits
            lost = (scores - labels).square()
        else:
            lost = functional.binary_cross_entropy_with_logits(logits, labels.clamp(0, 1), reduction="none")
        return torch.where(told, lost, torch.zeros_like(lost)).mean()

    def divergence(
        self,
        student: Mapping[str, torch.Tensor],
        teacher: Mapping[str, torch.Tensor],
        batch: Mapping[str, torch.Tensor],
        temperature: float,
    ) -> torch.Tensor:
        """Squared difference of the outputs, and of the margins between the passages of a query that share the batch.

        `temperature` takes no part: an order has none.
        """
        apart = (student["logits"].float() - teacher["logits"].float()).squeeze(-1)  # (batch,)
        points = apart.square().mean()
        group = batch.get(TOGETHER)
        if group is None or self.margin_weight == 0:
            return points
        together = group[:, None] == group[None, :]  # (batch, batch)
        count = together.sum() - len(group)  # a margin to itself is none
        margins = ((apart[:, None] - apart[None, :]).square() * together).sum() / count.clamp_min(1)
        return points + self.margin_weight * margins

    # ---- judging

    def answered(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> Sequence[Example]:
        """Without labels the grades that tell the teacher's order."""
        if self.labels != "none":
            return examples
        scores = _by_query(outputs, features, len(examples))
        return tuple(
            replace(item, answer=Relevance(grades_of_order(own.tolist()))) for item, own in zip(examples, scores, strict=True)
        )

    def score(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> dict[str, float]:
        """The mean over queries of each metric."""
        return {name: float(values.mean()) for name, values in self._judged(outputs, features, examples).items()}

    def credit(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> np.ndarray:
        """The metric of each query."""
        return self._judged(outputs, features, examples)[self.metric]

    def _judged(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """By metric what each query is worth, (examples,)."""
        import numpy as np

        scores = _by_query(outputs, features, len(examples))
        grades = [np.asarray([grade or 0.0 for grade in item.answer.grades]) for item in examples]
        gains = np.asarray([gain_of_order(own, wanted) for own, wanted in zip(scores, grades, strict=True)])
        if self.labels == "none":
            first = [wanted[own == own.max()].min() == wanted.max() for own, wanted in zip(scores, grades, strict=True)]
            return dict(zip(AGREEMENTS, (gains, np.asarray(first, dtype=np.float64)), strict=True))
        ranks = [reciprocal_rank(own, wanted) for own, wanted in zip(scores, grades, strict=True)]
        return dict(zip(RANK_METRICS, (gains, np.asarray(ranks)), strict=True))

    def check_model(
        self,
        config: PretrainedConfig | Mapping[str, Any],
        predict: Callable[[], tuple[Outputs, Features, Sequence[Example]]],
    ) -> str:
        """A warning if the model orders passages no better than chance; DataError if it puts the wrong ones first."""
        import numpy as np

        if self.labels == "none":
            return ""
        outputs, features, examples = predict()
        if len(examples) < _FEWEST:
            return ""
        turned = {"logits": -np.asarray(outputs["logits"])}
        ours, others = (self._judged(one, features, examples)["ndcg_at_10"] for one in (outputs, turned))
        chance = np.asarray([chance_gain([grade or 0.0 for grade in item.answer.grades]) for item in examples])
        error = float(np.std(ours - chance)) / len(examples) ** 0.5
        mine, other, random = (float(values.mean()) for values in (ours, others, chance))
        if other > random + max(0.1, 4 * error) and other > mine:
            raise DataError(
                f"the model's scores run the other way: nDCG is {mine:.2f} on {len(examples)} validation queries, and {other:.2f} with "
                "the order turned round.",
                help="turn the labels of the data round, or start from another model.",
            )
        if mine < random + 2 * error:
            return (
                f"warning: the model reaches an nDCG of {mine:.2f} on {len(examples)} validation queries, a random order {random:.2f}. "
                "What is lost against such a model proves nothing. Was it trained to rank such passages?"
            )
        return ""

    def answers(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> list[str]:
        """The places of the three passages that come first."""
        import numpy as np

        best = [np.argsort(-own, kind="stable")[:3] + 1 for own in _by_query(outputs, features, len(examples))]
        return [f"passage {', '.join(map(str, places))} first" for places in best]

    def snippet(self, folder: Path, file: str, texts: Sequence[tuple[str, ...]], max_length: int) -> str:
        pairs = [(item[0], passage) for item in texts[:1] for passage in item[1:4]]
        return batch_snippet(folder, file, pairs, max_length, f'print(session.run(["{RELEVANCE}"], feeds)[0][:, 0])')


def _by_query(outputs: Outputs, features: Features, count: int) -> list[np.ndarray]:
    """The scores of each query's passages, in their order."""
    import numpy as np

    logits = np.asarray(outputs["logits"], dtype=np.float64).reshape(len(features))
    rows: list[list[int]] = [[] for _ in range(count)]
    for row, place in enumerate(features.example):
        rows[place].append(row)
    return [logits[own] for own in rows]


# ---- reading


@dataclass(frozen=True)
class _Source:
    """The options that decide what the examples are."""

    data: str
    query: str | None
    passage: str | None
    label: str | None
    labels: str
    candidates: int
    train_candidates: int
    train_queries: int
    dev_queries: int
    share: float


def _key(data: str) -> Stamp:
    """What changes with the files: also those of a folder in BEIR's form."""
    return (*stamp(data), *stamp(os.path.join(data, "qrels")))


@lru_cache(maxsize=4)
def _rankings(source: _Source, key: Stamp) -> Mapping[str, Ranking]:
    """The groups "train" and "dev", one or both."""
    sources = read_ranking(source.data, source.query, source.passage, source.label, key)

    def lacks(test: Ranking) -> str:
        return "" if _judged_places(test, source.labels) else "no query has passages with different labels"

    return settle_dev(sources, lambda ranking: ranking.where, lacks)


def _highest(source: _Source, key: Stamp) -> float:
    """The highest label to train on, at least 1; of data to report on alone, the highest there."""
    rankings = _rankings(source, key)
    train = rankings.get("train") or rankings["dev"]
    return max(1.0, *(label for group in train.groups for label in group.labels if label is not None), 1.0)


def _judged_places(ranking: Ranking, labels: str) -> list[int]:
    """Which groups can be judged."""

    def fits(group: QueryGroup) -> bool:
        if ranking.pools:
            return len(ranking.pools[group.pool]) > len(group.passages)
        return len(group.passages) > 1 if labels == "none" else group.is_judged

    return [place for place, group in enumerate(ranking.groups) if fits(group)]


@lru_cache(maxsize=12)
def _examples(source: _Source, name: Split, key: Stamp) -> tuple[Example, ...]:
    rankings = _rankings(source, key)
    dev = rankings.get("dev")
    if name is Split.DEV and dev is not None and source.labels != "dev":
        found = draw_some(_some_judged(dev, source.labels), source.dev_queries, "queries")
        return _as_examples(dev, "dev", found, source.candidates, judged=source.labels != "none")
    if "train" not in rankings:
        raise no_training_data(source.data, "name the training file train.jsonl, .csv, .tsv or .parquet.")
    train = rankings["train"]
    every, judged = list(range(len(train.groups))), _judged_places(train, source.labels)
    if source.labels == "dev":
        if dev is None:
            raise DataError(
                f"{source.data} has no dev data, and labels: dev says that only that has labels.",
                help="add a dev file with labels.",
            )
        found = _some_judged(dev, "dev")
        if name is Split.TRAIN:
            return _as_examples(
                train, "train", draw_some(every, source.train_queries, "queries"), source.train_candidates, judged=False
            )
        some = draw_some(found, 2 * source.dev_queries, "queries")[name is Split.DEV :: 2]
        return _as_examples(dev, "dev", some, source.candidates, judged=True)
    judged = _some_judged(train, source.labels)
    told = source.labels != "none"
    if dev is None:
        drawn = draw_rows(judged, None, min(source.dev_queries, dev_count(len(judged))), FOR_DEV)
        if name is Split.DEV:
            return _as_examples(train, "train", sorted(drawn), source.candidates, judged=told)
        every, judged = ([place for place in places if place not in drawn] for places in (every, judged))
    count = min(source.dev_queries, validation_count(source.share, len(judged)))
    held = draw_rows(judged, None, count, FOR_VALIDATION)
    if name is Split.VALIDATION:
        return _as_examples(train, "train", sorted(held), source.candidates, judged=told)
    rest = draw_some([place for place in every if place not in held], source.train_queries, "queries")
    return _as_examples(train, "train", rest, source.train_candidates, judged=False)


def _some_judged(ranking: Ranking, labels: str) -> list[int]:
    """The groups that can be judged; DataError if they are too few."""
    places, groups = _judged_places(ranking, labels), ranking.groups
    single = sum(len(group.passages) < 2 for group in groups) if not ranking.pools else len(groups) - len(places)
    unequal = len(groups) - len(places) - single
    facts = [f"queries: {len(groups):,}"]
    if single:
        facts.append(f"with one passage only: {single:,}")
    if unequal:
        facts.append(f"without a passage that is labelled as more relevant than another: {unequal:,}")
    if len(places) < 3:
        untold = not ranking.pools and all(label is None for group in groups for label in group.labels)
        help = (
            "if only the dev data has labels say labels: dev, if there are none at all labels: none; the teacher is then followed."
            if untold and single < len(groups)
            else _PAIRS_HELP
        )
        raise DataError(
            f"{ranking.where}: in too few queries can passages be put in a right or a wrong order.", facts=facts, help=help
        )
    if len(places) < len(groups):
        remark(f"{ranking.where}: {'; '.join(facts)}. Those are left out where the order is judged.")
    return places


def _as_examples(ranking: Ranking, kind: str, places: Sequence[int], count: int, *, judged: bool) -> tuple[Example, ...]:
    groups = ranking.chosen(places, count)
    longer = 0 if ranking.pools else sum(len(ranking.groups[place].passages) > count for place in places)
    if longer and judged:
        remark(
            f"{ranking.where}: {longer:,} queries have more than {count} passages; so many of each are put in order (candidates)."
        )
    if judged:  # passages that nobody judged would count as wrong
        groups = [ranking.groups[place].judged_part().at_most(count) for place in places] if not ranking.pools else groups
    return tuple(
        Example(f"{kind}/{place}", (group.query, *group.passages), Relevance(group.labels))
        for place, group in zip(places, groups, strict=True)
    )
