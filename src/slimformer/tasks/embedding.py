"""Vectors of texts, learned from the model itself: no labels are needed, and an index that was built with the big model stays valid.

The student sees plain texts and gives the teacher's vectors, in the teacher's own space. What counts is how near they are (cosine), or,
if such data is there, how well they order pairs of texts (Spearman), or find passages (nDCG), also on the teacher's index. How a model
makes its vectors is told by a folder of sentence-transformers, or by options; it is never guessed.
"""

from __future__ import annotations

import os.path
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from slimformer.core.pooling import EMBEDDER, POOLINGS, SENTENCE_VECTOR, DenseLayer, VectorHead, vector_head
from slimformer.data.columns import find_columns
from slimformer.data.files import Table, read_splits, read_table
from slimformer.data.labels import is_number, spell_labels
from slimformer.data.memory import data_source
from slimformer.data.plain_texts import MOST_TEXTS, PlainTexts, is_plain, read_plain
from slimformer.data.retrieval import read_retrieval
from slimformer.data.sources import Stamp, no_training_data, stamp
from slimformer.data.splits import FOR_DEV, FOR_VALIDATION, dev_count, draw_rows, draw_some, validation_count
from slimformer.data.texts import repair_text
from slimformer.errors import DataError, ModelError, RecipeError, nearest, shown
from slimformer.log import remark, remarks_on
from slimformer.tasks._snippet import batch_snippet
from slimformer.tasks._unlabelled import own_draws
from slimformer.tasks._vectors import coarse, cosines, rank_correlation, retrieved
from slimformer.tasks.base import Example, Features, Outputs, Split, Task, option
from slimformer.tasks.classification import Classification

if TYPE_CHECKING:
    import numpy as np
    import torch
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig

_METRICS = ("cosine", "spearman", "ndcg_at_10", "ndcg_on_teacher_index")
_MODES = {"last": "lasttoken"}  # short names of poolings
_NONE, _BOTH = "none", "both"
_TEXTS_AT_ONCE = 4096  # encoded together: bounds the memory of the tokenizer's own objects
_MOST_DEV = 1000  # texts and pairs that are judged, each; the standard error of a mean cosine is then far below a point
_FEWEST = 20  # texts


@dataclass(frozen=True)
class Target:
    """What is wanted of an example: the teacher's vector of each of its texts, and what else the data says.

    Attributes:
        kind: A "pair" has two texts; a "query" is answered by the examples whose ids are `relevant`, which are "passage"s.
        gold: How alike the texts of a pair are.
        relevant: Ids of examples.
        vectors: The teacher's, (texts, dimension); None until it was asked.
    """

    kind: Literal["text", "pair", "query", "passage"] = "text"
    gold: float | None = None
    relevant: tuple[str, ...] = ()
    vectors: Any = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return "the teacher's vector" if self.gold is None else f"similarity {self.gold:g}"


@dataclass(frozen=True)
class Embedding(Task):
    """Vectors of texts, without labels.

    `data` are plain texts: a .txt file with a text on each line, a table with a column of texts (`text` names it), a folder of such
    files, with train and dev or not, a hub name, or rows in memory. At most `train_rows` of them are read, evenly spaced.

    `pairs` are pairs of texts with a score, as STS-B has them: a folder with train and dev, or one file, of which one half is chosen on
    and the other reported on. `retrieval` are queries with the passages that answer them: SQuAD's JSON, or rows with `query` and
    `passage`; `retrieval_rows` queries are asked, of twice as many passages. Both are only for judging. `metric` "auto" is "spearman" if
    there are pairs, else "ndcg_on_teacher_index" if there is something to find, else the mean "cosine" to the teacher.

    `pooling` (cls, mean, last, max, ...), `normalize` and `dimension` say how the model makes its vectors, if its folder does not, or
    otherwise than it does; `dimension` keeps the first numbers of a vector that was trained for that (Matryoshka).

    `prompt` is what is put before each text: the name of a prompt ("query"), "none", or "both" for query and passage in turn.
    `query_prompt` and `passage_prompt` are their texts if the folder does not tell them. `prefixes` and `lower` (whether texts are put
    into lower case) are filled by `bind`.

    `validation_share` of the texts, but between 200 and 2,000 and at most a fifth, is set aside to choose on.

    `similarity_weight` is how much the cosines between the texts of a batch count beside the vectors. RecipeError names every option
    that is wrong. What is wrong with the data becomes a DataError when it is read.

    >>> from slimformer.tasks.base import Split
    >>> task = Embedding(data=[{"text": f"a text with the number {n}"} for n in range(100)])
    >>> [len(task.split(split)) for split in (Split.TRAIN, Split.VALIDATION, Split.DEV)]
    [72, 18, 10]
    """

    auto_class: ClassVar[str] = EMBEDDER
    outputs: ClassVar[tuple[str, ...]] = (SENTENCE_VECTOR,)
    labelled: ClassVar[bool] = False
    paths: ClassVar[tuple[str, ...]] = ("data", "pairs", "retrieval")

    data: Any = option("", "Texts: a .txt file with one on each line, a table, a folder, or a hub name.", required=True)  # noqa: RUF009
    text: str | None = option(None, "Column of the texts in a table; guessed if it has a usual name.")
    pairs: str | None = option(None, "Pairs of texts with a score (STS-B), to judge by.")
    retrieval: str | None = option(None, "Queries with passages that answer them (SQuAD), to judge by.")
    metric: str = option("auto", "The metric that counts: cosine, spearman, ndcg_at_10, ndcg_on_teacher_index.")
    pooling: str | None = option(
        None, "How hidden states become a vector, if the model's folder does not say: mean, cls, last."
    )
    normalize: Literal["auto", "yes", "no"] = option(
        "auto", "Whether vectors have length 1: yes or no; auto: as the folder says."
    )
    dimension: int | None = option(None, "Numbers of a vector that are kept, the first ones (Matryoshka).")
    prompt: str | None = option(None, "The prompt before each text: its name, none, or both (query and passage in turn).")
    query_prompt: str | None = option(None, "The text of the prompt of queries, such as 'query: '.")
    passage_prompt: str | None = option(None, "The text of the prompt of passages, such as 'passage: '.")
    max_length: int = option(512, "Tokens a text may have, if the model's folder allows as many; longer ones are cut off.")
    train_rows: int = option(MOST_TEXTS, "At most so many texts are read.")
    retrieval_rows: int = 500
    validation_share: float = 0.05
    similarity_weight: float = 1.0
    prefixes: tuple[str, ...] = ()
    lower: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", data_source(self.data))
        object.__setattr__(self, "prefixes", tuple(self.prefixes))
        mistakes = list(self._mistakes())
        if mistakes:
            raise RecipeError("the task embedding cannot be set up like that.", facts=mistakes)
        if self.metric == "auto":
            metric = "spearman" if self.pairs else "ndcg_on_teacher_index" if self.retrieval else "cosine"
            object.__setattr__(self, "metric", metric)

    def _mistakes(self) -> Iterable[str]:
        if self.metric not in ("auto", *_METRICS):
            yield f"metric: there is no '{self.metric}'; {nearest(self.metric, ('auto', *_METRICS))}"
        elif self.metric == "spearman" and not self.pairs:
            yield "metric: spearman needs pairs with a score: name pairs"
        elif self.metric.startswith("ndcg") and not self.retrieval:
            yield f"metric: {self.metric} needs queries and passages: name retrieval"
        known = (*POOLINGS, *_MODES)
        if self.pooling is not None and self.pooling not in known:
            yield f"pooling: there is no '{self.pooling}'; {nearest(self.pooling, known)}"
        if self.normalize not in ("auto", "yes", "no"):
            yield f"normalize: yes, no or auto, not '{self.normalize}'"
        if self.dimension is not None and self.dimension < 1:
            yield f"dimension: at least 1, not {self.dimension}"
        if not 4 <= self.max_length <= 100_000:
            yield f"max_length: at least 4 tokens, not {self.max_length}"
        if not 0 < self.validation_share < 0.5:
            yield f"validation_share: a share above 0 and below 0.5, not {self.validation_share}"
        if self.train_rows < _FEWEST:
            yield f"train_rows: at least {_FEWEST}, not {self.train_rows}"
        if self.retrieval_rows < 2:
            yield f"retrieval_rows: at least 2, not {self.retrieval_rows}"
        if self.similarity_weight < 0:
            yield f"similarity_weight: 0 or more, not {self.similarity_weight}"

    @classmethod
    def reads(cls, data: str) -> bool:
        """Plain texts; a table may be for a classifier that begins with such a model."""
        return not data or is_plain(data)

    def title(self) -> str:
        return f"embedding {Path(self.data).resolve().name}" if self.data else "embedding"

    # ---- data

    def split(self, name: Split) -> Sequence[Example]:
        name = Split(name)
        options = (self.data, self.text, self.train_rows, self.validation_share)
        examples = _texts(*options, name, stamp(self.data))
        if name is not Split.TRAIN and self.pairs:
            examples += _pairs(self.pairs, name, stamp(self.pairs))
        if self.retrieval and (name is Split.DEV or (name is Split.VALIDATION and self.metric.startswith("ndcg"))):
            examples += _searched(self.retrieval, self.retrieval_rows, name, stamp(self.retrieval))
        return examples

    def notes(self) -> tuple[str, ...]:
        """What was found or left out in the data."""
        seen = {item.texts[0].casefold() for name in (Split.TRAIN, Split.VALIDATION) for item in self.split(name)}
        dev = [item for item in self.split(Split.DEV) if item.answer.kind == "text"]
        leaked = sum(item.texts[0].casefold() in seen for item in dev)
        if leaked:
            remark(f"{self.data}: {leaked:,} of {len(dev):,} texts of dev are in the training data too.")
        names = filter(None, (self.data, self.pairs, self.retrieval))
        return tuple(dict.fromkeys(line for name in names for line in remarks_on(name)))

    # ---- model

    def told_vectors(self, head: VectorHead | None, width: int, *, narrows: bool) -> VectorHead:
        modes = None if self.pooling is None else (_MODES.get(self.pooling, self.pooling),)
        if head is None and modes is None:
            raise ModelError(
                "nothing says how the hidden states become one vector: there is no modules.json of sentence-transformers.",
                help="say it as the model's card does: --pooling mean (cls, last), and --normalize no if its vectors keep their length.",
            )
        if head is None:
            head = VectorHead(pooling=modes or (), normalize=self.normalize != "no")
            remark(
                f"vectors are made by {head.pooling[0]} pooling, and {'brought to length 1' if head.normalize else 'keep their length'}; "
                "--pooling and --normalize say otherwise."
            )
        if modes is not None and modes != head.pooling:
            if head.dense:
                raise ModelError(
                    f"the folder pools by {', '.join(head.pooling)} for a linear layer behind, and pooling asks for {modes[0]}.",
                    help="leave pooling out.",
                )
            remark(f"the folder pools by {', '.join(head.pooling)}, and pooling says {modes[0]}: that is taken.")
            head = replace(head, pooling=modes)
        if self.normalize != "auto":
            head = replace(head, normalize=self.normalize == "yes")
        given = {"query": self.query_prompt, "passage": self.passage_prompt}
        head = replace(head, prompts={**head.prompts, **{name: text for name, text in given.items() if text is not None}})
        own = head.dimension(width)
        if self.dimension is not None and self.dimension > own:
            raise ModelError(
                f"dimension {self.dimension} is more than the {own} numbers of the model's vectors.",
                help=f"ask for at most {own}.",
            )
        if self.dimension not in (None, own):
            head = replace(head, dense=_first_places(head, own, self.dimension or own))
        if narrows and not head.dense:
            if len(head.pooling) > 1:
                raise ModelError(
                    f"hidden states that feed {len(head.pooling)} poolings cannot be made narrower.",
                    help="leave hidden_width out.",
                )
            head = replace(head, dense=(DenseLayer(own, own),))
        return head

    def bind(self, config: PretrainedConfig | Mapping[str, Any]) -> Embedding:
        head = vector_head(config)
        if head is None:
            raise DataError(
                "the model's config.json does not say how its vectors are made.",
                help="name a folder of sentence-transformers, or say --pooling.",
            )
        prompts = dict(head.prompts)
        query, passage = (
            own if told is None else told
            for own, told in zip(head.sides, (self.query_prompt, self.passage_prompt), strict=True)
        )
        if self.prompt == _NONE:
            prefixes: tuple[str, ...] = ("",)
        elif self.prompt == _BOTH:
            prefixes = (query or "", passage or "")
        elif self.prompt is not None:
            known = prompts | {name: text for name, text in (("query", query), ("passage", passage)) if text is not None}
            if self.prompt not in known:
                raise DataError(
                    f"the model has no prompt '{self.prompt}'.",
                    help=f"{nearest(self.prompt, (*known, _NONE, _BOTH))} query_prompt and passage_prompt give their texts.",
                )
            prefixes = (known[self.prompt],)
        elif head.default_prompt in prompts:
            prefixes = (prompts[str(head.default_prompt)],)
        elif (query or "") != (passage or ""):
            raise DataError(
                f"the model puts {shown(query or '')} before a query and {shown(passage or '')} before a passage, and nothing says which "
                "these texts are.",
                help="say --prompt query, passage, both (in turn), or none.",
            )
        else:
            prefixes = (query or "",)
        return replace(
            self,
            prefixes=prefixes,
            query_prompt=query or "",
            passage_prompt=passage or "",
            max_length=min(self.max_length, head.max_length or self.max_length),
            lower=head.lower,
        )

    def encode(self, examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> Features:
        from slimformer.data.tokenizer import cutting, pad_id_of

        rows = [(place, text) for place, item in enumerate(examples) for text in self._prompted(item)]
        columns: dict[str, list[Any]] = {"input_ids": [], "token_type_ids": []}
        truncated: set[int] = set()
        with cutting(tokenizer, max_length):
            for start in range(0, len(rows), _TEXTS_AT_ONCE):
                some = rows[start : start + _TEXTS_AT_ONCE]
                for (place, _), row in zip(some, tokenizer.encode_batch_fast([text for _, text in some]), strict=True):
                    columns["input_ids"].append(row.ids)
                    columns["token_type_ids"].append(row.type_ids)
                    if row.overflowing:
                        truncated.add(place)
        return Features(columns, [place for place, _ in rows], len(truncated), pad_id_of(tokenizer))

    def _prompted(self, item: Example) -> list[str]:
        """The texts of an example with the prompt before each."""
        kind, prefixes = getattr(item.answer, "kind", "text"), self.prefixes or ("",)
        if kind in ("query", "passage"):
            prefix = (self.query_prompt if kind == "query" else self.passage_prompt) or ""
        else:
            prefix = prefixes[zlib.crc32(item.id.encode()) % len(prefixes)]
        return [(prefix + text).lower() if self.lower else prefix + text for text in item.texts]

    def configure(self) -> Mapping[str, Any]:
        return {}

    def loss(self, output: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Half the squared distance of each vector from one that is drawn around it, a mean over rows, in units of its own length.

        Without labels nothing can be lost, but its gradient tells what the vectors feel: the square of it is, in the mean over draws,
        the Fisher information of a normal distribution around the vector, which is the Gauss-Newton matrix. A row's draw is its own.
        """
        import torch

        vectors = output[SENTENCE_VECTOR].float()  # (batch, dimension)
        draws = own_draws(batch, vectors.shape[1], torch.randn).to(vectors)
        size = vectors.detach().norm(dim=1, keepdim=True) / vectors.shape[1] ** 0.5
        drawn = vectors.detach() + draws * size
        return ((vectors - drawn).square().sum(1) / vectors.detach().square().sum(1).clamp_min(1e-12)).mean() / 2

    def divergence(
        self,
        student: Mapping[str, torch.Tensor],
        teacher: Mapping[str, torch.Tensor],
        batch: Mapping[str, torch.Tensor],
        temperature: float,
    ) -> torch.Tensor:
        """Squared distance of the vectors over the teacher's squared length, and of the cosines between texts over their spread.

        For vectors of length 1 the first is 2 (1 - cosine). `temperature` takes no part: vectors have none.
        """
        import torch
        from torch.nn import functional

        ours, theirs = (side[SENTENCE_VECTOR].float() for side in (student, teacher))  # (batch, dimension)
        if ours.shape != theirs.shape:
            raise ModelError(
                f"the student's vectors have {ours.shape[1]} numbers, the teacher's {theirs.shape[1]}.",
                help="a student stays in the teacher's space: begin with the teacher, or with a model of its dimension.",
            )
        apart = ((ours - theirs).square().sum(1) / theirs.square().sum(1).clamp_min(1e-12)).mean()
        count = len(ours)
        if self.similarity_weight == 0 or count < 3:
            return apart
        mine, his = (functional.normalize(side, dim=1) @ functional.normalize(side, dim=1).T for side in (ours, theirs))
        others = ~torch.eye(count, dtype=torch.bool, device=mine.device)
        spread = his[others].var(unbiased=False).clamp_min(1e-4)
        return apart + self.similarity_weight * (mine - his)[others].square().mean() / spread

    # ---- judging

    def answered(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> Sequence[Example]:
        rows: list[list[int]] = [[] for _ in examples]
        for row, place in enumerate(features.example):
            rows[place].append(row)
        vectors = outputs[SENTENCE_VECTOR]
        return tuple(
            replace(item, answer=replace(item.answer, vectors=vectors[rows[place]])) for place, item in enumerate(examples)
        )

    def counted(self, scores: Mapping[str, float]) -> float:
        return scores[self.metric if self.metric in scores else "cosine"]

    def score(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> dict[str, float]:
        """Mean cosine to the teacher, and what pairs and queries say; "_int8" and "_binary": with vectors of that many bits."""
        judged = _Judged(outputs[SENTENCE_VECTOR], features, examples)
        scores = {} if judged.cosine is None else {"cosine": float(judged.cosine.mean())}
        kinds: tuple[Literal["", "int8", "binary"], ...] = ("", "int8", "binary")
        for kind in kinds:
            end = f"_{kind}" if kind else ""
            if len(judged.pairs):
                scores[f"spearman{end}"] = rank_correlation(judged.likeness(kind), judged.gold)
            if judged.queries:
                for name, values in judged.found(kind).items():
                    scores[f"{name}{end}"] = float(values.mean())
        return scores

    def credit(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> np.ndarray:
        """The cosine of each example's vectors to the teacher's."""
        import numpy as np

        cosine = _Judged(outputs[SENTENCE_VECTOR], features, examples).cosine
        return np.zeros(len(examples)) if cosine is None else cosine

    def resampled(
        self, outputs: Outputs, features: Features, examples: Sequence[Example], draws: Sequence[np.ndarray]
    ) -> np.ndarray | None:
        import numpy as np

        judged = _Judged(outputs[SENTENCE_VECTOR], features, examples)
        if self.metric == "spearman" and len(judged.pairs):
            place = np.full(len(examples), -1)
            place[judged.pairs] = np.arange(len(judged.pairs))
            alike = judged.likeness("")
            some = [place[draw][place[draw] >= 0] for draw in draws]
            return np.asarray([rank_correlation(alike[rows], judged.gold[rows]) for rows in some])
        if self.metric.startswith("ndcg") and judged.queries:
            values = judged.found("")[self.metric]
            place = np.full(len(examples), -1)
            place[judged.queries] = np.arange(len(judged.queries))
            some = [place[draw][place[draw] >= 0] for draw in draws]
            return np.asarray([values[rows].mean() if len(rows) else np.nan for rows in some])
        return None

    def answers(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> list[str]:
        import numpy as np

        judged = _Judged(outputs[SENTENCE_VECTOR], features, examples)
        alike = dict(zip(judged.pairs.tolist(), judged.likeness(""), strict=True))
        near = np.full(len(examples), np.nan) if judged.cosine is None else judged.cosine
        return [
            f"similarity {alike[place]:.2f}" if place in alike else f"cosine {near[place]:.3f} to the teacher"
            for place in range(len(examples))
        ]

    def snippet(self, folder: Path, file: str, texts: Sequence[tuple[str, ...]], max_length: int) -> str:
        plain = [Example("", (text,), Target()) for item in texts for text in item]
        some = [tuple(self._prompted(item)) for item in plain][:2]
        return batch_snippet(
            folder,
            file,
            some,
            max_length,
            f'vectors = session.run(["{SENTENCE_VECTOR}"], feeds)[0]',
            "print(vectors.shape, vectors @ vectors.T)",
        )


def _first_places(head: VectorHead, own: int, dimension: int) -> tuple[DenseLayer, ...]:
    """Linear layers that end in the first numbers of the vector: the last one cut, or one more that picks them."""
    if head.dense and head.dense[-1].activation == "identity":
        return (*head.dense[:-1], replace(head.dense[-1], out_features=dimension))
    return (*head.dense, DenseLayer(own, dimension))


class _Judged:
    """The vectors of examples beside what is wanted of them."""

    def __init__(self, vectors: np.ndarray, features: Features, examples: Sequence[Example]) -> None:
        import numpy as np

        self.examples = examples
        rows: list[list[int]] = [[] for _ in examples]
        for row, place in enumerate(features.example):
            rows[place].append(row)
        self.rows, self.vectors = rows, np.asarray(vectors, dtype=np.float64)
        targets: list[Target] = [item.answer for item in examples]
        self.targets = targets
        self.cosine: np.ndarray | None = None  # (examples,)
        if examples and all(target.vectors is not None for target in targets):
            order = [row for own in rows for row in own]
            near = cosines(self.vectors[order], np.concatenate([target.vectors for target in targets]).astype(np.float64))
            ends = np.cumsum([len(own) for own in rows])
            self.cosine = np.asarray([part.mean() for part in np.split(near, ends[:-1])])
        self.pairs = np.asarray([place for place, target in enumerate(targets) if target.kind == "pair"], dtype=np.int64)
        self.gold = np.asarray([targets[place].gold for place in self.pairs], dtype=np.float64)
        here = {item.id: place for place, item in enumerate(examples) if item.answer.kind == "passage"}
        self.passages = list(here.values())
        number = {place: index for index, place in enumerate(self.passages)}
        found = {
            place: [number[here[name]] for name in target.relevant if name in here]
            for place, target in enumerate(targets)
            if target.kind == "query"
        }
        self.queries = [place for place, relevant in found.items() if relevant] if len(self.passages) > 1 else []
        self.relevant = [found[place] for place in self.queries]

    def likeness(self, kind: Literal["", "int8", "binary"]) -> np.ndarray:
        """The cosine of the two texts of each pair: (pairs,)."""
        whole = coarse(self.vectors, kind)
        first, second = ([self.rows[place][side] for place in self.pairs] for side in (0, 1))
        return cosines(whole[first], whole[second])

    def found(self, kind: Literal["", "int8", "binary"]) -> dict[str, np.ndarray]:
        """nDCG and recall of each query, (queries,): both sides by this model, and its queries on the teacher's index."""
        import numpy as np

        queries, passages = (self.vectors[[self.rows[place][0] for place in side]] for side in (self.queries, self.passages))
        ndcg, recall = retrieved(coarse(queries, kind, passages), coarse(passages, kind), self.relevant)
        values = {"ndcg_at_10": ndcg, "recall_at_10": recall}
        if self.targets[self.passages[0]].vectors is not None:
            index = np.concatenate([self.targets[place].vectors[:1] for place in self.passages]).astype(np.float64)
            ndcg, recall = retrieved(coarse(queries, kind, index), coarse(index, kind), self.relevant)
            values |= {"ndcg_on_teacher_index": ndcg, "recall_on_teacher_index": recall}
        return values


# ---- reading


@lru_cache(maxsize=12)
def _texts(data: str, text: str | None, most: int, share: float, name: Split, key: Stamp) -> tuple[Example, ...]:
    sources: Mapping[str, PlainTexts] = read_plain(data, text, most, key)
    kind = "dev" if name is Split.DEV and "dev" in sources else "train"
    if kind not in sources:
        raise no_training_data(data, "name the file of texts train.txt, .csv, .jsonl or .parquet.")
    texts = sources[kind].texts
    rows = list(range(len(texts)))
    if len(texts) < _FEWEST and kind == "train":
        raise DataError(
            f"{sources[kind].where} holds {len(texts)} texts, too few to set some aside.", help="give some hundreds of texts."
        )
    if "dev" not in sources:
        dev = draw_rows(rows, None, min(_MOST_DEV, dev_count(len(rows))), FOR_DEV)
        rows = [row for row in rows if (row in dev) == (name is Split.DEV)]
    if name is Split.DEV:
        rows = draw_some(rows, _MOST_DEV, "texts")
    else:
        validation = draw_rows(rows, None, validation_count(share, len(rows)), FOR_VALIDATION)
        rows = [row for row in rows if (row in validation) == (name is Split.VALIDATION)]
    return tuple(Example(f"{kind}/{row}", (texts[row],), Target()) for row in rows)


@lru_cache(maxsize=4)
def _pairs(data: str, name: Split, _key: Stamp) -> tuple[Example, ...]:
    """Pairs to report on, or to choose on: of the training data, if there is some, else every other one."""
    path = Path(os.path.expanduser(data))
    try:
        if path.is_file() and not read_splits(path):
            remark(f"{data}: every other pair is to choose on, the others are to report on.")
            examples = _rated(read_table(path))[name is Split.DEV :: 2]
        else:
            stsb = {"glue": "stsb"} if path.is_dir() and "sts" in path.name.lower() else {}
            task = Classification(data=data, kind="score", **stsb)  # type: ignore[arg-type]
            splits = (Split.DEV,) if name is Split.DEV else (Split.TRAIN, Split.VALIDATION)
            examples = [item for split in splits for item in task.split(split)]
    except DataError as error:
        raise DataError(f"the pairs cannot be read: {error.what}", facts=error.facts, help=error.help) from None
    if not examples or any(len(item.texts) != 2 for item in examples):
        raise DataError(
            f"{data} has one text in a row, not two." if examples else f"{data} has too few pairs.",
            help="pairs are rows with sentence1, sentence2 and score, as in STS-B.",
        )
    if name is Split.VALIDATION:
        examples = draw_some(examples, _MOST_DEV, "pairs")
    return tuple(Example(f"pair/{item.id}", item.texts, Target("pair", gold=float(item.answer))) for item in examples)


def _rated(table: Table) -> list[Example]:
    """The rows of a table of texts with scores."""
    names, label = find_columns(table, None, None, None, None)
    examples = []
    for row, score in enumerate(spell_labels(table.columns[label])):
        texts = tuple(table.columns[name][row] for name in names)
        if score is None or not is_number(score) or not all(isinstance(text, str) for text in texts):
            told = shown((*texts, table.columns[label][row]), 80)
            raise DataError(f"{table.place(row)}: no texts with a number: {told}.", help="mend the row.")
        examples.append(Example(str(row), tuple(map(repair_text, texts)), float(score)))
    return examples


@lru_cache(maxsize=4)
def _searched(data: str, count: int, name: Split, key: Stamp) -> tuple[Example, ...]:
    """Queries and the passages that are searched; of one file, every other query is to choose on."""
    sources = read_retrieval(data, key)
    source = sources.get("dev" if name is Split.DEV else "train", next(iter(sources.values())))
    every = list(range(len(source.queries)))
    every = every if len(sources) > 1 else every[name is Split.DEV :: 2]
    part = source.part(draw_some(every, count, "queries"), 2 * count)
    passages = [Example(f"passage/{place}", (text,), Target("passage")) for place, text in enumerate(part.passages)]
    queries = [
        Example(f"query/{place}", (text,), Target("query", relevant=tuple(f"passage/{item}" for item in part.relevant[place])))
        for place, text in enumerate(part.queries)
    ]
    return (*queries, *passages)
