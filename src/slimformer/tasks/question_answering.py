"""Questions that are answered by a span of a context: SQuAD v1.1 and v2.0, Natural Questions with its gold passage, files like them.

A long context is read in windows that overlap by `stride` tokens, and the best span over all windows of a question is its answer. In
v2.0 the first token competes with it, and the margin at which "no answer" wins (`threshold`) is fitted on validation examples.
Training and prediction follow Devlin et al. 2018 (https://arxiv.org/abs/1810.04805, sections 4.2 and 4.3), with one difference: all
spans of at most `max_answer` tokens are compared, not only those between the 20 best starts and ends. F1 and exact match are those of
SQuAD's own scripts (`data/squad.py`).
"""

from __future__ import annotations

import math
import os.path
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from slimformer.data.memory import data_source
from slimformer.data.sources import Format, read_sources, settle_dev
from slimformer.data.splits import (
    FOR_DEV,
    FOR_VALIDATION,
    dev_count,
    draw_groups,
    draw_some,
    read_json_option,
    validation_count,
)
from slimformer.data.squad import (
    NOTHING,
    QUESTION_SUFFIXES,
    SHAPE,
    Questions,
    Version,
    exact,
    f1,
    match_files,
    read_hub_questions,
    read_questions,
)
from slimformer.errors import DataError, RecipeError, nearest
from slimformer.log import remarks_on
from slimformer.tasks._judging import check_spans
from slimformer.tasks._losses import kl_divergence
from slimformer.tasks._snippet import INPUT_NAMES, OPEN_TOKENIZER, open_file, python_literal
from slimformer.tasks.base import Example, Features, Outputs, Split, Task, option

if TYPE_CHECKING:
    import numpy as np
    import torch
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig

_METRICS = ("f1", "exact")
_QUESTION = 64  # tokens of a question, as in BERT; longer ones are cut so that the context has room
_SPECIAL = 4  # tokens around question and context, at most: <s> </s></s> </s>
_QUESTIONS_AT_ONCE = 512  # encoded together: bounds the memory of the tokenizer's own objects
_VERSION_KEY = "squad_version"  # of a model's config: the kind of questions it was trained on
_FEWEST = 20  # unanswerable questions from which a model can be judged
_PADDING_LOGIT = -1e4  # gives padding no probability after a softmax


@dataclass(frozen=True)
class QuestionAnswering(Task):
    """Extractive question answering.

    `data` is a folder with `train*.json` and `dev*.json`, one SQuAD file (a tenth of its contexts becomes dev), or a hub name such as
    rajpurkar/squad_v2, for short squad_v2; .jsonl and .parquet files with the hub's columns are read too. So are rows in memory: a list
    of dicts, a DataFrame, a Dataset, a DatasetDict, or a dict of such data by split. `dev` names the dev file if it lies elsewhere.
    `version` is v1 if every question has an answer and v2 if some have none; "auto" looks at the data.

    `stride` is the number of tokens that neighbouring windows share, `max_answer` the most tokens an answer may have. `threshold` is
    how much better "no answer" must be than the best span (a difference of logit sums) to be given; None fits it on validation examples.
    `train_ids` is a JSON file of the ids to train on, {"train": [...], "dev": [...]} or one list, or how many questions to draw.
    `validation_share` of the training questions, but between 200 and 2,000 and at most a fifth, is set aside by whole contexts.

    A window without the answer is trained to point at its first token, in v1 too: the best spans of several windows are compared by
    their logits, and a window that was never taught to hold back scores as high as the right one. RecipeError names every option that
    is wrong; what is wrong with the data becomes a DataError when it is read.

    >>> from slimformer.tasks.base import Split
    >>> rows = [
    ...     {"question": "Which colour?", "context": f"Room {n} is red.", "answers": {"text": ["red"], "answer_start": [None]}}
    ...     for n in range(30)
    ... ]
    >>> task = QuestionAnswering(data=rows).settled()
    >>> task.version, [len(task.split(split)) for split in (Split.TRAIN, Split.VALIDATION, Split.DEV)]
    ('v1', [22, 5, 3])
    >>> task.split(Split.DEV)[0].answer
    Answer(texts=('red',), start=10)
    """

    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    outputs: ClassVar[tuple[str, ...]] = ("start_logits", "end_logits")
    per_token: ClassVar[tuple[str, ...]] = outputs
    paths: ClassVar[tuple[str, ...]] = ("data", "dev", "train_ids")
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "squad": {"data": "rajpurkar/squad", "version": "v1"},
        "squad_v2": {"data": "rajpurkar/squad_v2", "version": "v2"},
    }

    data: Any = option("", "A folder with train and dev files, one file, or a hub name.", required=True)  # noqa: RUF009
    dev: str | None = None
    version: Literal["auto", "v1", "v2"] = "auto"
    metric: str = option("f1", "The metric that counts: f1 or exact.")
    max_length: int = option(384, "Tokens an input may have; longer ones are read in windows.")
    stride: int = option(128, "Tokens that neighbouring windows of a long context share.")
    max_answer: int = 30
    validation_share: float = 0.05
    train_ids: str | int | None = option(None, "How many questions to train on, or a JSON file of ids.", flag="--train-rows")
    threshold: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", data_source(self.data, paths=False))
        object.__setattr__(self, "dev", None if self.dev is None else data_source(self.dev, paths=False))
        if self.data in self.aliases and not os.path.exists(self.data):
            alias = self.aliases[self.data]
            object.__setattr__(self, "data", alias["data"])
            object.__setattr__(self, "version", alias["version"] if self.version == "auto" else self.version)
        mistakes = list(self._mistakes())
        if mistakes:
            raise RecipeError("the task question_answering cannot be set up like that.", facts=mistakes)

    def _mistakes(self) -> Iterable[str]:
        if self.version not in {"auto", "v1", "v2"}:
            yield f"version: there is no '{self.version}'; {nearest(self.version, ('auto', 'v1', 'v2'))}"
        if self.metric not in _METRICS:
            yield f"metric: there is no '{self.metric}'; {nearest(self.metric, _METRICS)}"
        if not 8 <= self.max_length <= 100_000:
            yield f"max_length: at least 8 tokens, not {self.max_length}"
        elif not 0 <= self.stride < room(self.max_length, _SPECIAL):
            most = room(self.max_length, _SPECIAL) - 1
            yield f"stride: from 0 to {most} tokens in windows of {self.max_length}, not {self.stride}"
        if self.max_answer < 1:
            yield f"max_answer: at least 1 token, not {self.max_answer}"
        if not 0 < self.validation_share < 0.5:
            yield f"validation_share: a share above 0 and below 0.5, not {self.validation_share}"
        if isinstance(self.train_ids, int) and self.train_ids < 10:
            yield f"train_ids: at least 10, not {self.train_ids}"
        if self.threshold is not None and not math.isfinite(self.threshold):
            yield f"threshold: a finite number, not {self.threshold}"

    def title(self) -> str:
        return f"question_answering {Path(self.data).resolve().name}" if self.data else "question_answering"

    # ---- data

    def split(self, name: Split) -> Sequence[Example]:
        sources = self._sources()
        ids = _read_ids(self.train_ids) if isinstance(self.train_ids, str) else {}
        examples = self._examples(sources, Split(name), self._version(sources), ids)
        if not examples:
            raise DataError(
                f"{self.data}: there are too few questions to set some aside for {name}.", help="give at least 20 questions."
            )
        return examples

    def notes(self) -> tuple[str, ...]:
        """What was found or guessed in the data, and how many questions are not trained on."""
        sources = self._sources()
        told = remarks_on(self.data)
        source, dev = sources.get("train"), sources.get("dev")
        if source is None:
            return told
        contexts = {item.texts[1] for item in source.examples}
        shared = [item for item in dev.examples if item.texts[1] in contexts] if dev is not None else []
        if dev is not None and shared:
            told += (
                f"{dev.where}: {len(shared):,} of {len(dev.examples):,} questions of dev have a context of the training data.",
            )
        if dev is not None and dev.absent:
            told += (f"{dev.where}: {len(dev.absent):,} of {len(dev.examples):,} questions have an answer that does not occur in their "
                     "context: no model can find it.",)  # fmt: skip
        ids = _read_ids(self.train_ids)["train"] if isinstance(self.train_ids, str) else {item.id for item in source.examples}
        parts = (
            (source.absent, "have an answer that does not occur in their context"),
            (source.guessed, "have an answer that occurs in several places, and which is meant is not known"),
        )
        return told + tuple(
            f"{source.where}: {len(found & ids):,} of {len(ids):,} questions {what}: not trained on."
            for found, what in parts
            if found & ids
        )

    def settled(self) -> QuestionAnswering:
        """This task with its version found from the data."""
        return replace(self, version=self._version(self._sources()))

    def bind(self, config: PretrainedConfig | Mapping[str, Any]) -> QuestionAnswering:
        task = self.settled()
        if _version_of(config) == "v1" and task.version == "v2":
            raise DataError(
                f"{self.data} has questions without an answer (SQuAD v2.0), and the model was tuned on questions that all have "
                "one (v1.1): it cannot say that there is none.",
                help="tune it on such questions first: begin the recipe with '- train: {epochs: 3}', or start from an encoder; or name "
                "data in which each has an answer.",
            )
        return task

    def _sources(self) -> Mapping[str, Questions]:
        return _read_sources(self.data, self.dev, None if self.version == "auto" else self.version)

    def _examples(
        self, sources: Mapping[str, Questions], name: Split, version: Version, ids: Mapping[str, frozenset[str]]
    ) -> list[Example]:
        """The examples of a split, drawn by whole contexts; `ids` are those that `train_ids` lists."""
        kind = "dev" if name is Split.DEV and "dev" in sources else "train"
        if kind not in sources:
            where = next(iter(sources.values())).where
            raise DataError(f"{where} has no training data beside it.", help="name the training file train.json.")
        source = sources[kind]
        examples = list(source.examples)
        if "dev" not in sources:
            dev = _draw(examples, dev_count(len(examples)), FOR_DEV)
            examples = [item for item in examples if (item.id in dev) == (name is Split.DEV)]
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
        if isinstance(self.train_ids, int):
            usable = draw_some(usable, self.train_ids, "ids")
        validation = _draw(usable, validation_count(self.validation_share, len(usable)), FOR_VALIDATION)
        return [item for item in usable if (item.id in validation) == (name is Split.VALIDATION)]

    def _version(self, sources: Mapping[str, Questions]) -> Version:
        """v2 if a question has no answer, or if the task says so; DataError if it says v1 and one has none."""
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
        from slimformer.data.tokenizer import cutting, pad_id_of
        from slimformer.tasks._spans import add_window

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
            for first in range(0, len(examples), _QUESTIONS_AT_ONCE):
                some = examples[first : first + _QUESTIONS_AT_ONCE]
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
                        add_window(columns, window, some[index].answer)
                        owners.append(first + index)
        if any(item.answer.texts and item.answer.start is None for item in examples):
            del columns["labels"]  # some places are not known: these rows can be scored, not trained on
        return Features(columns, owners, cut, pad_id_of(tokenizer))

    def configure(self) -> Mapping[str, Any]:
        return {"num_labels": 2, **self.trained_on()}

    def trained_on(self) -> Mapping[str, Any]:
        return {_VERSION_KEY: self.settled().version}

    def loss(self, output: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Cross entropy of start and end, averaged; padding takes no part, and a position out of range counts nothing."""
        import torch

        mask = batch.get("attention_mask")
        terms = []
        for column, name in enumerate(self.outputs):
            logits, wanted = output[name].float(), batch["labels"][:, column]  # (batch, seq), (batch,)
            if mask is not None:
                logits = logits.masked_fill(mask == 0, _PADDING_LOGIT)
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
            ours, theirs = student[name].float(), teacher[name].float()  # (batch, seq)
            if mask is not None:
                ours, theirs = (logits.masked_fill(mask == 0, _PADDING_LOGIT) for logits in (ours, theirs))
            terms.append(kl_divergence(ours, theirs, temperature))
        return torch.stack(terms).mean()

    # ---- judging

    @property
    def tunes(self) -> bool:
        return self.version == "v2" and self.threshold is None

    def tune(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> QuestionAnswering:
        """This task with the threshold that makes its metric best on these examples; unchanged if nothing is to be fitted."""
        from slimformer.tasks._spans import best_threshold, span_texts

        if not self.tunes:
            return self
        texts, margins = span_texts(outputs, features, examples, self.max_answer)
        if_answered = self._credits(texts, examples)
        if_not = self._credits([""] * len(examples), examples)
        return replace(self, threshold=best_threshold(margins, if_answered, if_not))

    def check_model(
        self,
        config: PretrainedConfig | Mapping[str, Any],
        predict: Callable[[], tuple[Outputs, Features, Sequence[Example]]],
    ) -> str:
        """A warning if the model finds hardly any answer; one whose config names the version was tuned by us, and is not judged.

        DataError if it never prefers "no answer" to a span, as models of SQuAD v1.1 do, or if it has start and end swapped.
        """
        from slimformer.tasks._spans import span_texts

        if _version_of(config) == self.version:
            return ""
        outputs, features, examples = predict()
        texts, margins = span_texts(outputs, features, examples, self.max_answer)
        answerable = [bool(item.answer.texts) for item in examples]
        unanswerable = [not known for known in answerable]
        if self.version == "v2" and sum(unanswerable) >= _FEWEST and not (margins[unanswerable] > 0).any():
            raise DataError(
                f"{self.data} has questions without an answer (SQuAD v2.0), and the model gave each of {sum(unanswerable)} such "
                "questions one: it seems to be tuned on v1.1, in which every question has an answer.",
                help="start from an encoder, which is tuned first, or from a model tuned on such questions; if this one was, write "
                f'"{_VERSION_KEY}": "v2" into its config.json.',
            )
        start, end = self.outputs
        turned, _ = span_texts({start: outputs[end], end: outputs[start]}, features, examples, self.max_answer)
        told = [
            [f1(text, item.answer, "v1") for text, item, known in zip(found, examples, answerable, strict=True) if known]
            for found in (texts, turned)
        ]
        score, swapped = (sum(values) / max(1, len(values)) for values in told)
        return check_spans(score, swapped, len(told[0]))

    def score(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> dict[str, float]:
        predictions = self.predict(outputs, features, examples)
        shares = {name: self._credits(predictions, examples, name) for name in _METRICS}
        scores = {name: float(values.mean()) if len(values) else 0.0 for name, values in shares.items()}
        with_answer = [bool(item.answer.texts) for item in examples]
        if any(with_answer) and not all(with_answer):
            scores["f1_has_answer"] = float(shares["f1"][with_answer].mean())
            scores["f1_no_answer"] = float(shares["f1"][[not answered for answered in with_answer]].mean())
        return scores

    def answers(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> list[str]:
        return [text or NOTHING for text in self.predict(outputs, features, examples)]

    def credit(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> np.ndarray:
        """The metric of each example: the score is their mean."""
        return self._credits(self.predict(outputs, features, examples), examples)

    def snippet(self, folder: Path, file: str, texts: Sequence[tuple[str, ...]], max_length: int) -> str:
        """All windows of a question and its context, and the best span inside the context; "" if no answer is better."""
        question, context = min(texts, key=lambda pair: len(pair[1]))
        declines = self.version == "v2"
        lines = [
            "import numpy as np, onnxruntime, tokenizers",
            OPEN_TOKENIZER,
            f'tokenizer.enable_truncation({max_length}, stride={self.stride}, strategy="only_second")',
            *open_file(file),
            f"question = {python_literal(question)}",
            f"context = {python_literal(context)}",
            INPUT_NAMES,
            'none, best, answer = np.inf, -np.inf, ""' if declines else 'best, answer = -np.inf, ""',
            "row = tokenizer.encode(question, context)",
            "for window in (row, *row.overflowing):",
            "    feeds = {i.name: np.array([getattr(window, names[i.name])], np.int64) for i in session.get_inputs()}",
            '    start, end = (logits[0] for logits in session.run(["start_logits", "end_logits"], feeds))',
            *(["    none = min(none, start[0] + end[0])"] if declines else []),
            "    inside = np.array([part == 1 for part in window.sequence_ids])  # tokens of the context",
            "    steps = np.arange(len(start)) - np.arange(len(start))[:, None]  # from the first token of a span to its last",
            f"    valid = inside[:, None] & inside & (steps >= 0) & (steps < {self.max_answer})",
            "    scores = np.where(valid, start[:, None] + end, -np.inf)",
            "    first, last = np.unravel_index(scores.argmax(), scores.shape)",
            "    if scores[first, last] > best:",
            "        best = scores[first, last]",
            "        answer = context[window.offsets[first][0] : window.offsets[last][1]]",
            f'print("" if none - best > {self.threshold or 0.0} else answer)' if declines else "print(answer)",
        ]
        return "\n".join(lines)

    def predict(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> list[str]:
        """The answer to each example, "" for none."""
        from slimformer.tasks._spans import span_texts

        texts, margins = span_texts(outputs, features, examples, self.max_answer)
        if self._judged_as(examples) == "v1":
            return texts
        return ["" if margin > (self.threshold or 0.0) else text for text, margin in zip(texts, margins, strict=True)]

    def _credits(self, predictions: Sequence[str], examples: Sequence[Example], metric: str = "") -> np.ndarray:
        import numpy as np

        judge = exact if (metric or self.metric) == "exact" else f1
        version = self._judged_as(examples)
        return np.asarray([judge(text, item.answer, version) for text, item in zip(predictions, examples, strict=True)])

    def _judged_as(self, examples: Sequence[Example]) -> Version:
        if self.version != "auto":
            return self.version
        return "v1" if all(item.answer.texts for item in examples) else "v2"


def _version_of(config: PretrainedConfig | Mapping[str, Any]) -> Any:
    return config.get(_VERSION_KEY) if isinstance(config, Mapping) else getattr(config, _VERSION_KEY, None)


# ---- windows


def _question_room(max_length: int, special: int) -> int:
    """Tokens a question may have: half of what a window holds beside special tokens, at most 64."""
    return min(_QUESTION, (max_length - special) // 2)


def room(max_length: int, special: int) -> int:
    """Tokens that a window has for the context even with the longest question."""
    return max_length - special - _question_room(max_length, special)


# ---- reading


@lru_cache(maxsize=4)
def _read_hub(name: str) -> Mapping[str, Questions]:
    return read_hub_questions(name)


def _read_sources(data: str, dev: str | None, version: Version | None) -> Mapping[str, Questions]:
    """The questions "train" and "dev", one or both of them."""
    apart = {} if dev is None else {"dev": read_questions([Path(os.path.expanduser(dev))])}
    form = Format(
        task="question_answering",
        suffixes=QUESTION_SUFFIXES,
        match=lambda files, name: match_files(files, name, version),
        read=read_questions,
        read_hub=_read_hub,
        example="./squad",
        forms="a folder with train.json and dev.json, a SQuAD file",
        advice="say the version (--task squad or --task squad_v2), ",
    )
    sources = read_sources(data, form)
    if apart:
        sources.pop("test", None)
    return settle_dev(sources | apart, lambda source: source.where, lambda test: _lacking(sources.get("train", test), test))


def _lacking(train: Questions, test: Questions) -> str:
    """What answers the test data lacks that stands in for dev, "" if none."""
    none = test.unanswerable == len(test.examples) and train.unanswerable < len(train.examples)
    return "no question has an answer" if none else ""


def _read_ids(name: str) -> dict[str, frozenset[str]]:
    """Ids to train on, and those of the dev questions if the file tells them."""
    shape = 'it should hold {"train": ["id1", ...], "dev": [...]}, or one list of ids to train on.'
    content = read_json_option(name, "train_ids", "questions", shape)
    parts = content if isinstance(content, dict) else {"train": content}
    listed = {}
    for kind in ("train", "dev"):
        ids = parts.get(kind)
        if ids is None and kind == "dev":
            continue
        if not isinstance(ids, list) or not ids or not all(isinstance(item, (str, int)) for item in ids):
            raise DataError(f"{name} holds no list of ids under '{kind}'.", help=shape)
        listed[kind] = frozenset(map(str, ids))
    return listed


def _draw(examples: Sequence[Example], count: int, purpose: str) -> frozenset[str]:
    """Ids of at least `count` examples: whole contexts, because questions on one context help each other."""
    return draw_groups([(item.id, item.texts[1]) for item in examples], count, purpose)


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
