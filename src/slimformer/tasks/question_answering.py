"""Questions that are answered by a span of a context: SQuAD v1.1 and v2.0, Natural Questions with its gold passage, files like them.

A long context is read in windows that overlap by `stride` tokens. The best span over all windows of a question is its answer; in
v2.0 the first token competes with it, and the margin at which "no answer" wins (`threshold`) is fitted on validation examples. Training
and prediction follow Devlin et al. 2018 (https://arxiv.org/abs/1810.04805, sections 4.2 and 4.3), F1 and exact match SQuAD's own
scripts (`squad.py`). Different: all spans within `max_answer` tokens are compared, not only those between the 20 best starts and ends.
"""

from __future__ import annotations

import json
import os.path
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from slimformer.data.files import DEV_NAMES, TRAIN_NAMES
from slimformer.data.squad import (
    NOTHING,
    SHAPE,
    Answer,
    Questions,
    Version,
    exact,
    f1,
    find_squad,
    is_hub_name,
    read_hub_questions,
    read_questions,
)
from slimformer.data.tokenizer import cutting, pad_id_of
from slimformer.errors import DataError, RecipeError, nearest
from slimformer.tasks.base import Example, Features, Outputs, Split, Task
from slimformer.tasks.classification import DEV_SHARE, SPLIT_SEED, VALIDATION_SALT, validation_count

if TYPE_CHECKING:
    import torch
    from tokenizers import Encoding, Tokenizer
    from transformers import PretrainedConfig

METRICS = ("f1", "exact")
QUESTION = 64  # tokens of a question, as in BERT; longer ones are cut so that the context has room
SPECIAL = 4  # tokens around question and context, at most: <s> </s></s> </s>
CHUNK = 512  # questions encoded at once: bounds the memory of the tokenizer's own objects
MARK = "squad_version"  # key of a model's config: on which kind of questions it was tuned
FEWEST = 20  # unanswerable questions that say something on a model
MASKED = -1e4  # logit of padding: no probability after a softmax
SHORT: Mapping[str, tuple[str, Version]] = {"squad": ("rajpurkar/squad", "v1"), "squad_v2": ("rajpurkar/squad_v2", "v2")}


@dataclass(frozen=True)
class QuestionAnswering(Task):
    """Extractive question answering.

    `data`: a folder with train*.json and dev*.json, one SQuAD file (a tenth of its contexts is then set aside as dev), or a hub name
    such as rajpurkar/squad_v2, for short squad_v2; .jsonl and .parquet with the hub's columns will do. `dev`: the dev file, where it
    lies elsewhere. `version`: v1 where each question has an answer, v2 where some have none; auto looks at the data. `train_ids`: a
    JSON file of ids to train on, {"train": [...], "dev": [...]} or one list, or how many questions to draw. `stride`: tokens that
    neighbouring windows share. `max_answer`: tokens an answer may have. `validation_share`: as for classification,
    drawn by whole contexts. `threshold`: how much better "no answer" must be than the best span (difference of logit sums) to be
    given; None fits it on validation examples.

    A window without the answer is trained to point at its first token, in v1 too: the best spans of several windows are compared by
    their logits, and a window that was never taught to hold back says as much as the right one.
    """

    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    outputs: ClassVar[tuple[str, ...]] = ("start_logits", "end_logits")

    data: str = ""
    dev: str | None = None
    version: Literal["auto", "v1", "v2"] = "auto"
    metric: str = "f1"
    max_length: int = 384
    stride: int = 128
    max_answer: int = 30
    validation_share: float = 0.05
    train_ids: str | int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", str(self.data))
        if self.data in SHORT and not os.path.exists(self.data):
            hub, version = SHORT[self.data]
            object.__setattr__(self, "data", hub)
            object.__setattr__(self, "version", version if self.version == "auto" else self.version)
        mistakes = list(self._mistakes())
        if mistakes:
            raise RecipeError("the task question_answering cannot be set up like that.", facts=mistakes)

    def _mistakes(self) -> Iterable[str]:
        if self.version not in {"auto", "v1", "v2"}:
            yield f"version: there is no '{self.version}'; {nearest(self.version, ('auto', 'v1', 'v2'))}"
        if self.metric not in METRICS:
            yield f"metric: there is no '{self.metric}'; {nearest(self.metric, METRICS)}"
        if not 8 <= self.max_length <= 100_000:
            yield f"max_length: at least 8 tokens, not {self.max_length}"
        elif not 0 <= self.stride < room(self.max_length, SPECIAL):
            most = room(self.max_length, SPECIAL) - 1
            yield f"stride: from 0 to {most} tokens in windows of {self.max_length}, not {self.stride}"
        if self.max_answer < 1:
            yield f"max_answer: at least 1 token, not {self.max_answer}"
        if not 0 < self.validation_share < 0.5:
            yield f"validation_share: a share above 0 and below 0.5, not {self.validation_share}"
        if isinstance(self.train_ids, int) and self.train_ids < 10:
            yield f"train_ids: at least 10, not {self.train_ids}"
        if self.threshold is not None and not np.isfinite(self.threshold):
            yield f"threshold: a finite number, not {self.threshold}"

    # ---- data

    def split(self, name: Split) -> Sequence[Example]:
        sources = self._sources()
        ids = _read_ids(self.train_ids) if isinstance(self.train_ids, str) else {}
        found = _split(sources, Split(name), self._version(sources), self.validation_share, self.train_ids, ids)
        if not found:
            raise DataError(
                f"{self.data}: there are too few questions to set some aside for {name}.", help="give at least 20 questions."
            )
        return found

    def remarks(self) -> tuple[str, ...]:
        sources = self._sources()
        source = sources.get("train")
        if source is None:
            return ()
        ids = _read_ids(self.train_ids)["train"] if isinstance(self.train_ids, str) else {item.id for item in source.examples}
        parts = (
            (source.absent, "have an answer that does not occur in their context"),
            (source.guessed, "have an answer that occurs in several places, and which is meant is not known"),
        )
        return tuple(
            f"{source.where}: {len(found & ids):,} of {len(ids):,} questions {what}: not trained on."
            for found, what in parts
            if found & ids
        )

    def settled(self) -> QuestionAnswering:
        """This task with its version found from the data."""
        return replace(self, version=self._version(self._sources()))

    def bind(self, config: PretrainedConfig | Mapping[str, Any]) -> QuestionAnswering:
        task = self.settled()
        if _mark(config) == "v1" and task.version == "v2":
            raise DataError(
                f"{self.data} has questions without an answer (SQuAD v2.0), and the model was tuned on questions that all have "
                "one (v1.1): it cannot say that there is none.",
                help="tune it on such questions first: begin the recipe with '- train: {epochs: 3}', or start from an encoder; or name "
                "data in which each has an answer.",
            )
        return task

    def _sources(self) -> Mapping[str, Questions]:
        """The questions "train" and "dev", one or both of them."""
        return _sources(self.data, self.dev, None if self.version == "auto" else self.version)

    def _version(self, sources: Mapping[str, Questions]) -> Version:
        """v2 where a question has no answer, or where the task says so; DataError where it says v1 and one has none."""
        lacking = next((source for source in sources.values() if source.unanswerable), None)
        if self.version == "v1" and lacking is not None:
            first = next(example for example in lacking.examples if not example.answer.texts)
            raise DataError(
                f"{lacking.where}: {lacking.unanswerable:,} of {len(lacking.examples):,} questions have no answer, as in SQuAD v2.0, "
                "and the task is set to v1 (every question has one).",
                facts=[f"the first: id '{first.id}'"],
                help="say version: v2 (--task squad_v2) with a model that was tuned for it, or leave those questions out.",
            )
        return "v2" if self.version == "v2" or lacking is not None else "v1"

    # ---- model

    def encode(self, examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> Features:
        special = tokenizer.num_special_tokens_to_add(True)
        longest = _question_room(max_length, special)
        if longest < 1 or self.stride >= room(max_length, special):
            raise DataError(
                f"windows of {max_length} tokens have no room for a context: they share {self.stride} tokens with their neighbours, "
                f"{special} are special, and up to {longest} hold the question.",
                help=f"choose a stride below {max(1, room(max_length, special))}, or a larger length limit if the model has one.",
            )
        columns: dict[str, list[Any]] = {"input_ids": [], "token_type_ids": [], "char_start": [], "char_end": [], "labels": []}
        owners: list[int] = []
        cut = 0
        with cutting(tokenizer, max_length):
            for first in range(0, len(examples), CHUNK):
                some = examples[first : first + CHUNK]
                tokenizer.no_truncation()
                questions = [item.texts[0] for item in some]
                for index, tokens in enumerate(tokenizer.encode_batch(questions, add_special_tokens=False)):
                    if len(tokens) > longest:
                        cut += 1
                        questions[index] = questions[index][: tokens.offsets[longest - 1][1]]
                tokenizer.enable_truncation(max_length, stride=self.stride, strategy="only_second")
                pairs = [(question, item.texts[1]) for question, item in zip(questions, some, strict=True)]
                for index, encoding in enumerate(tokenizer.encode_batch(pairs)):
                    for window in (encoding, *encoding.overflowing):
                        _add(columns, window, some[index].answer)
                        owners.append(first + index)
        if any(item.answer.texts and item.answer.start is None for item in examples):
            del columns["labels"]  # some places are not known: these rows can be scored, not trained on
        return Features(columns, owners, cut, pad_id_of(tokenizer))

    def configure(self) -> Mapping[str, Any]:
        return {"num_labels": 2, **self.marks()}

    def marks(self) -> Mapping[str, Any]:
        return {MARK: self.settled().version}

    def loss(self, output: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Cross entropy of start and end, averaged; padding takes no part, and a position out of range counts nothing."""
        import torch

        mask = batch.get("attention_mask")
        terms = []
        for column, name in enumerate(self.outputs):
            logits, wanted = output[name].float(), batch["labels"][:, column]  # (batch, seq), (batch,)
            if mask is not None:
                logits = logits.masked_fill(mask == 0, MASKED)
            inside = (wanted >= 0) & (wanted < logits.shape[1])
            likely = torch.log_softmax(logits, dim=-1).gather(1, (wanted * inside)[:, None])[:, 0]
            terms.append(-(likely * inside).sum() / inside.sum().clamp_min(1))
        return torch.stack(terms).mean()

    def divergence(
        self,
        student: Mapping[str, torch.Tensor],
        teacher: Mapping[str, torch.Tensor],
        batch: Mapping[str, torch.Tensor],
        temperature: float,
    ) -> torch.Tensor:
        """KL of start and of end, averaged; padding takes no part, whatever both models say there."""
        import torch

        mask = batch.get("attention_mask")
        terms = []
        for name in self.outputs:
            pair = (student[name].float(), teacher[name].float())  # (batch, seq)
            if mask is not None:
                pair = (pair[0].masked_fill(mask == 0, MASKED), pair[1].masked_fill(mask == 0, MASKED))
            ours, theirs = (torch.log_softmax(logits / temperature, dim=-1) for logits in pair)
            terms.append((theirs.exp() * (theirs - ours)).sum() / len(ours) * temperature**2)
        return torch.stack(terms).mean()

    # ---- judging

    @property
    def fits(self) -> bool:
        return self.version == "v2" and self.threshold is None

    def tune(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> QuestionAnswering:
        """This task with the threshold that makes its metric best on these examples; unchanged where nothing is to be fitted."""
        if not self.fits:
            return self
        texts, margins = self._spans(outputs, features, examples)
        if_answered = self._credits(texts, examples)
        if_not = self._credits([""] * len(examples), examples)
        return replace(self, threshold=best_threshold(margins, if_answered, if_not))

    def suits(
        self,
        config: PretrainedConfig | Mapping[str, Any],
        look: Callable[[], tuple[Outputs, Features, Sequence[Example]]],
    ) -> None:
        """A model of SQuAD v1.1 prefers some span to "no answer" always; one of v2.0 does not."""
        if self.version != "v2" or _mark(config) == "v2":
            return
        outputs, features, examples = look()
        _, margins = self._spans(outputs, features, examples)
        unanswerable = np.asarray([not item.answer.texts for item in examples], dtype=bool)
        if unanswerable.sum() >= FEWEST and not (margins[unanswerable] > 0).any():
            raise DataError(
                f"{self.data} has questions without an answer (SQuAD v2.0), and the model gave each of {unanswerable.sum()} such "
                "questions one: it seems to be tuned on v1.1, where every question has an answer.",
                help="start from an encoder, which is tuned first, or from a model tuned on such questions; if this one was, write "
                f'"{MARK}": "v2" into its config.json.',
            )

    def score(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> dict[str, float]:
        predictions = self.predict(outputs, features, examples)
        shares = {name: self._credits(predictions, examples, name) for name in METRICS}
        scores = {name: float(values.mean()) if len(values) else 0.0 for name, values in shares.items()}
        with_answer = np.asarray([bool(item.answer.texts) for item in examples], dtype=bool)
        if with_answer.any() and not with_answer.all():
            scores["f1_has_answer"] = float(shares["f1"][with_answer].mean())
            scores["f1_no_answer"] = float(shares["f1"][~with_answer].mean())
        return scores

    def answers(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> list[str]:
        return [text or NOTHING for text in self.predict(outputs, features, examples)]

    def credit(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> np.ndarray:
        """The metric of each example: the score is their mean."""
        return self._credits(self.predict(outputs, features, examples), examples)

    def predict(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> list[str]:
        """The answer to each example, "" for none."""
        texts, margins = self._spans(outputs, features, examples)
        if self._judged_as(examples) == "v1":
            return texts
        return ["" if margin > (self.threshold or 0.0) else text for text, margin in zip(texts, margins, strict=True)]

    def _spans(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> tuple[list[str], np.ndarray]:
        """Text of the best span of each example, and by how much its "no answer" is better: (examples,), inf without a span."""
        starts, ends = (np.asarray(outputs[name]) for name in self.outputs)  # (rows, seq)
        values, firsts, lasts = best_spans(starts, ends, _inside(features, starts.shape[1]), self.max_answer)
        with np.errstate(invalid="ignore", over="ignore"):
            empty = np.nan_to_num(starts[:, 0].astype(np.float64) + ends[:, 0], nan=np.inf)  # (rows,)
        owners = np.asarray(features.example, dtype=np.int64)
        none = np.full(len(examples), np.inf)
        np.minimum.at(none, owners, empty)
        texts, margins = [""] * len(examples), np.full(len(examples), np.inf)
        for row in np.lexsort((np.arange(len(owners)), -values, owners))[::-1]:  # the best row of each example comes last
            owner = int(owners[row])
            if values[row] == -np.inf:
                continue
            begin, end = features.columns["char_start"][row][firsts[row]], features.columns["char_end"][row][lasts[row]]
            texts[owner] = examples[owner].texts[1][int(begin) : int(end)].strip()
            margins[owner] = none[owner] - values[row]
        return texts, margins

    def _credits(self, predictions: Sequence[str], examples: Sequence[Example], metric: str = "") -> np.ndarray:
        judge = exact if (metric or self.metric) == "exact" else f1
        version = self._judged_as(examples)
        return np.asarray([judge(text, item.answer, version) for text, item in zip(predictions, examples, strict=True)])

    def _judged_as(self, examples: Sequence[Example]) -> Version:
        if self.version != "auto":
            return self.version
        return "v1" if all(item.answer.texts for item in examples) else "v2"


def _mark(config: PretrainedConfig | Mapping[str, Any]) -> Any:
    return config.get(MARK) if isinstance(config, Mapping) else getattr(config, MARK, None)


# ---- windows


def _question_room(max_length: int, special: int) -> int:
    """Tokens a question may have: half of what a window holds beside special tokens, at most 64."""
    return min(QUESTION, (max_length - special) // 2)


def room(max_length: int, special: int) -> int:
    """Tokens that a window has for the context even with the longest question."""
    return max_length - special - _question_room(max_length, special)


def _add(columns: Mapping[str, list[Any]], window: Encoding, answer: Answer) -> None:
    """Appends one window: ids, where in the context each token stands (-1: it is none of the context's), and its labels."""
    offsets = np.asarray(window.offsets, dtype=np.int32).reshape(-1, 2)  # (tokens, 2)
    inside = np.asarray([part == 1 for part in window.sequence_ids], dtype=bool) & (offsets[:, 1] > offsets[:, 0])
    columns["input_ids"].append(np.asarray(window.ids, dtype=np.int32))
    columns["token_type_ids"].append(np.asarray(window.type_ids, dtype=np.int32))
    starts, ends = (np.where(inside, offsets[:, side], -1) for side in (0, 1))
    columns["char_start"].append(starts)
    columns["char_end"].append(ends)
    columns["labels"].append(_labels(starts, ends, answer))


def _labels(starts: np.ndarray, ends: np.ndarray, answer: Answer) -> tuple[int, int]:
    """First and last token of the answer; the first token of the window, twice, where it does not hold the whole answer."""
    tokens = np.flatnonzero(starts >= 0)
    if answer.start is None or not len(tokens):
        return 0, 0
    begin, end = answer.start, answer.start + len(answer.texts[0])
    if begin < starts[tokens[0]] or end > ends[tokens[-1]]:
        return 0, 0
    first = tokens[np.searchsorted(ends[tokens], begin, side="right")]
    last = tokens[np.searchsorted(starts[tokens], end, side="left") - 1]
    return (int(first), int(last)) if first <= last else (0, 0)


def _inside(features: Features, width: int) -> np.ndarray:
    """Which positions of each row are tokens of the context: (rows, width)."""
    found = np.zeros((len(features), width), dtype=bool)
    for row, starts in enumerate(features.columns["char_start"]):
        found[row, : len(starts)] = np.asarray(starts) >= 0
    return found


def best_spans(
    starts: np.ndarray, ends: np.ndarray, inside: np.ndarray, max_answer: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, first and last token of the best span of each row, of at most `max_answer` tokens, all inside: (rows,) each.

    Of equal ones the shortest, then the leftmost. A row without any has the value -inf.
    """
    # padding may hold the smallest float, and two of those added would overflow
    starts, ends = (np.where(inside & np.isfinite(logits), logits, -np.inf) for logits in (starts, ends))
    rows = np.arange(len(starts))
    values = np.full(len(starts), -np.inf)
    firsts, lasts = np.zeros(len(starts), dtype=np.int64), np.zeros(len(starts), dtype=np.int64)
    for further in range(min(max_answer, starts.shape[1]) if len(starts) else 0):
        sums = starts[:, : starts.shape[1] - further] + ends[:, further:]
        places = sums.argmax(axis=1)
        found = sums[rows, places]
        better = found > values
        values[better], firsts[better], lasts[better] = found[better], places[better], places[better] + further
    return values, firsts, lasts


def best_threshold(margins: np.ndarray, if_answered: np.ndarray, if_not: np.ndarray) -> float:
    """The margin above which "no answer" is to be given, so that the credits add up to the most: (examples,) each.

    Halfway between the two examples that it has to tell apart; of equally good ones the nearest to 0.
    """
    if not len(margins):
        return 0.0
    order = np.argsort(margins, kind="stable")
    sorted_margins = margins[order]
    gains = np.concatenate([[0.0], np.cumsum((if_answered - if_not)[order])])  # gains[n]: the n lowest margins are answered
    finite = sorted_margins[np.isfinite(sorted_margins)]
    if not len(finite):
        return 0.0
    below = np.concatenate([[finite[0] - 2.0], sorted_margins])
    above = np.concatenate([sorted_margins, [finite[-1] + 2.0]])
    above = np.where(np.isfinite(above), above, finite[-1] + 2.0)
    possible = (below < above) & np.isfinite(below)
    best = gains[possible].max()
    good = possible & (gains >= best - 1e-9)
    middles = np.where((below + above) / 2 < above, (below + above) / 2, below)[good]
    return float(middles[np.abs(middles).argmin()])


# ---- reading


@lru_cache(maxsize=4)
def _hub(name: str) -> Mapping[str, Questions]:
    return read_hub_questions(name)


def _sources(data: str, dev: str | None, version: Version | None) -> Mapping[str, Questions]:
    found: dict[str, Questions] = {}
    if dev is not None:
        found["dev"] = read_questions([Path(dev).expanduser()])
    if not data:
        raise DataError("the task question_answering has no data.", help="name a folder or a SQuAD file: data: ./squad.")
    path = Path(data).expanduser()
    if os.path.isdir(path):
        files = dict(zip(("train", "dev"), find_squad(path, version), strict=True))
        if not any(files.values()):
            raise DataError(
                f"{data} holds no train file.",
                facts=[f"looked for: {', '.join(TRAIN_NAMES)} and {', '.join(DEV_NAMES)} with .json, .jsonl, .parquet"],
                help="name the files train.json and dev.json, or give the file itself.",
            )
        return {name: read_questions(some) for name, some in files.items() if some} | found
    if os.path.isfile(path):
        return {"train": read_questions([path])} | found
    if not is_hub_name(data):
        raise DataError(
            f"{data} does not exist.",
            help="name a folder with train.json and dev.json, a SQuAD file, or a hub name: owner/name.",
        )
    splits = _hub(data)
    named = {
        kind: next((splits[name] for name in names if name in splits), None)
        for kind, names in (("train", TRAIN_NAMES), ("dev", DEV_NAMES))
    }
    return {kind: questions for kind, questions in named.items() if questions is not None} | found


def _read_ids(name: str) -> dict[str, frozenset[str]]:
    """Ids to train on, and those of the dev questions where the file tells them."""
    file = Path(name).expanduser()
    shape = 'it should hold {"train": ["id1", ...], "dev": [...]}, or one list of ids to train on.'
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{file} does not exist.", help="train_ids is a JSON file, or how many questions to draw.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {error}.", help=shape) from None
    parts = content if isinstance(content, dict) else {"train": content}
    found = {}
    for kind in ("train", "dev"):
        ids = parts.get(kind)
        if ids is None and kind == "dev":
            continue
        if not isinstance(ids, list) or not ids or not all(isinstance(item, (str, int)) for item in ids):
            raise DataError(f"{file} holds no list of ids under '{kind}'.", help=shape)
        found[kind] = frozenset(map(str, ids))
    return found


def _split(
    sources: Mapping[str, Questions],
    name: Split,
    version: Version,
    validation_share: float,
    wanted: str | int | None,
    ids: Mapping[str, frozenset[str]],
) -> list[Example]:
    kind = "dev" if name is Split.DEV and "dev" in sources else "train"
    if kind not in sources:
        where = next(iter(sources.values())).where
        raise DataError(f"{where} has no training data beside it.", help="name the training file train.json.")
    source = sources[kind]
    examples = list(source.examples)
    if "dev" not in sources:
        aside = _drawn(examples, max(1, round(DEV_SHARE * len(examples))), "dev")
        examples = [item for item in examples if (item.id in aside) == (name is Split.DEV)]
    if name is Split.DEV:
        return _listed(examples, ids["dev"], source.where, "dev") if "dev" in ids else examples
    if "train" in ids:
        examples = _listed(examples, ids["train"], source.where, "train")
    usable = [item for item in examples if item.answer.start is not None or not item.answer.texts]
    if not usable or (version == "v1" and not any(item.answer.texts for item in usable)):
        raise DataError(
            f"{source.where}: not one of {len(examples):,} questions has an answer whose place in the context is known.",
            facts=[
                f"answers that do not occur in their context: {sum(item.id in source.absent for item in examples):,}",
                f"answers in several places: {sum(item.id in source.guessed for item in examples):,}",
            ],
            help=f"answers must be copied from the context letter by letter. {SHAPE}",
        )
    if isinstance(wanted, int):
        order = np.random.default_rng([SPLIT_SEED, *b"ids"]).permutation(len(usable))[:wanted]
        usable = [usable[index] for index in sorted(order.tolist())]
    aside = _drawn(usable, validation_count(validation_share, len(usable)), VALIDATION_SALT)
    return [item for item in usable if (item.id in aside) == (name is Split.VALIDATION)]


def _listed(examples: Sequence[Example], ids: frozenset[str], where: str, kind: str) -> list[Example]:
    found = [item for item in examples if item.id in ids]
    if len(found) < len(ids):
        missing = sorted(ids - {item.id for item in found})
        raise DataError(
            f"train_ids names {len(missing):,} ids under '{kind}' that {where} does not have.",
            facts=[f"for instance: {', '.join(map(repr, missing[:3]))}"],
            help="the ids belong to other data, or to the dev part of one file.",
        )
    return found


def _drawn(examples: Sequence[Example], count: int, purpose: str) -> frozenset[str]:
    """Ids of at least `count` examples, the same ones each time: whole contexts, because questions on one context help each other."""
    groups: dict[str, list[str]] = {}
    for item in examples:
        groups.setdefault(item.texts[1], []).append(item.id)
    if len(groups) < 2:
        groups = {item.id: [item.id] for item in examples}
    names = list(groups)
    drawn: list[str] = []
    for index in np.random.default_rng([SPLIT_SEED, *purpose.encode()]).permutation(len(names))[:-1]:  # never all
        if len(drawn) >= count:
            break
        drawn += groups[names[index]]
    return frozenset(drawn)


def from_cli(
    task: str,
    data: str | Path | None,
    *,
    metric: str | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    train_ids: str | int | None = None,
) -> QuestionAnswering:
    """The task that options of the command line mean; "squad" and "squad_v2" say the version, and name the hub's data where none is."""
    hub, version = SHORT.get(task, (None, "auto"))
    if data is None and hub is None:
        raise RecipeError("no data is named.", help="give --data <folder or SQuAD file>, or --task squad or squad_v2.")
    given = {"metric": metric, "max_length": max_length, "stride": stride, "train_ids": train_ids}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return QuestionAnswering(data=str(data if data is not None else hub), version=version, **options)  # type: ignore[arg-type]
