"""Tags for the words of a text, such as the names in it or parts of speech: CoNLL files, rows of words and tags, texts with spans.

A word's tag is read at its first token, and a long text in windows that overlap (`tasks/_words.py`). What tags mean, how BIO, IOB1,
BIOES, BILOU, BMES and plain tags become spans, and F1 as seqeval counts it stand in `tasks/_tags.py`. Spans are compared, so the tags of
data and model may follow different schemes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from slimformer.data.conll import LINES_SHAPE, claims_lines
from slimformer.data.labels import are_placeholders, enumerate_labels, model_labels
from slimformer.data.memory import data_source
from slimformer.data.sources import Format, Stamp, is_training, no_training_data, read_sources, settle_dev, stamp
from slimformer.data.splits import FOR_DEV, FOR_VALIDATION, dev_count, draw_rows, draw_some, validation_count
from slimformer.data.tagged import TAGGED_SUFFIXES, WORD, Tagged, match_tagged, read_hub_tagged, read_tagged
from slimformer.data.untagged import read_untagged
from slimformer.errors import DataError, RecipeError, nearest
from slimformer.log import remark, remarks_on
from slimformer.tasks._corpus import TagCorpus
from slimformer.tasks._judging import check_classes
from slimformer.tasks._losses import kl_divergence
from slimformer.tasks._snippet import INPUT_NAMES, OPEN_TOKENIZER, open_file, python_literal
from slimformer.tasks._tags import TAG_METRICS, Tagset, count_spans, scores_of
from slimformer.tasks._unlabelled import (
    AGREEMENT,
    FEWEST_TOLD,
    TELLINGS,
    drawn_classes,
    drawn_shares,
    half_of_dev,
    telling_of,
    told_names,
    untold_rows,
)
from slimformer.tasks.base import IGNORED, Example, Features, Outputs, Split, Task, option

if TYPE_CHECKING:
    import numpy as np
    import torch
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig

_METRICS = ("f1", "accuracy")
_TEXTS_AT_ONCE = 2048  # encoded together: bounds the memory of the tokenizer's own objects
_TOKENLESS = 0.5  # a share of words without a token from which a tokenizer was made for other texts


@dataclass(frozen=True)
class Tags:
    """The answer to a text: first and last character (exclusive) of each word, and its tag."""

    words: tuple[tuple[int, int], ...]
    tags: tuple[str, ...]
    text: str = field(default="", repr=False)

    def __str__(self) -> str:
        return described(self, self.tags, Tagset.of(self.tags))


@dataclass(frozen=True)
class Tagging(Task):
    """Token classification: a tag for each word.

    `data` is a folder with train and dev files, one file (a tenth of it becomes dev), or `owner/name[:config][@revision]` on the hub; or
    data in memory: a list of dicts, a DataFrame, a Dataset, a DatasetDict, or a dict of such data by split. A file has a word and its
    tags on each line (CoNLL), or rows with lists of words and tags, or with a text and the places of its spans. `text` and `label` name
    the columns of words and of tags, by numbers from 1 where columns have no names; without them usual names and places are looked for,
    and the log says what was taken.

    `labels` are the names of the tags in the order of the model's ids, for data that holds numbers; `bind` fills them. `labels: none`
    says that nobody told any: the teacher tags the texts, and what counts is the "agreement" with it, the F1 of its spans; `labels: dev`
    that only the dev data has tags, half of which is then chosen on. `answers_from` keeps which it is: "teacher", "dev", or "data".

    `metric` "auto" is the F1 of spans, or the accuracy of words if no tag stands for "outside". Tags that break their scheme, such as
    I-PER after O in BIO, are refused unless `breaks` is "mend": they then begin a span, as seqeval counts it.

    `stride` is the number of tokens that neighbouring windows of a long text share. `train_rows` is how many sentences to train on.
    `validation_share` of them, but between 200 and 2,000 and at most a fifth, is set aside as validation examples.

    RecipeError names every option that is wrong. What is wrong with the data becomes a DataError when it is read.

    >>> from slimformer.tasks.base import Split
    >>> rows = [{"tokens": ["in", "Berlin", str(n)], "ner_tags": ["O", "B-LOC", "O"]} for n in range(10, 50)]
    >>> task = Tagging(data=rows).settled()
    >>> task.labels, task.metric, [len(task.split(split)) for split in (Split.TRAIN, Split.VALIDATION, Split.DEV)]
    (('O', 'B-LOC', 'I-LOC'), 'f1', [29, 7, 4])
    >>> task.split(Split.DEV)[0].answer
    Tags(words=((0, 2), (3, 9), (10, 12)), tags=('O', 'B-LOC', 'O'))
    """

    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    per_token: ClassVar[tuple[str, ...]] = ("logits",)
    paths: ClassVar[tuple[str, ...]] = ("data",)

    data: Any = option("", "A folder with train and dev files, one file, or a hub name.", required=True)  # noqa: RUF009
    text: str | None = option(None, "Column of the words, or its number; guessed if it is a usual one.")
    label: str | None = option(None, "Column of the tags, or its number; guessed if it is a usual one.")
    metric: str = option("auto", "The metric that counts: f1 (of spans) or accuracy (of words).")
    breaks: Literal["refuse", "mend"] = option("refuse", "Tags that break BIO: refuse, or mend (such a tag begins a span).")
    max_length: int = option(256, "Tokens an input may have; longer ones are read in windows.")
    stride: int = option(64, "Tokens that neighbouring windows of a long text share.")
    validation_share: float = 0.05
    train_rows: int | None = option(None, "How many sentences to train on.")
    labels: Any = option(  # noqa: RUF009
        (), "Names of the tags in the order of their ids, if data has numbers; none (the teacher answers) or dev."
    )
    answers_from: str = "data"

    def __post_init__(self) -> None:
        object.__setattr__(self, "answers_from", telling_of(self.labels) or self.answers_from)
        object.__setattr__(self, "labelled", self.answers_from == "data")
        object.__setattr__(self, "data", data_source(self.data))
        for name in ("text", "label"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else str(value))
        names = () if telling_of(self.labels) else told_names(self.labels)
        object.__setattr__(self, "labels", tuple(name.strip() for name in names))
        mistakes = list(self._mistakes())
        if mistakes:
            raise RecipeError("the task tagging cannot be set up like that.", facts=mistakes)
        if self.answers_from == "teacher":
            object.__setattr__(self, "metric", AGREEMENT)

    def _mistakes(self) -> Iterable[str]:
        if self.answers_from not in TELLINGS:
            yield f"answers_from: '{self.answers_from}'; known: {', '.join(TELLINGS)}"
        elif self.answers_from == "teacher" and self.metric not in ("auto", AGREEMENT):
            yield f"metric: '{self.metric}' needs labels; without any it is the {AGREEMENT} with the teacher"
        elif self.answers_from != "teacher" and self.metric not in ("auto", *_METRICS):
            yield f"metric: there is no '{self.metric}'; {nearest(self.metric, ('auto', *_METRICS))}"
        if self.breaks not in ("refuse", "mend"):
            yield f"breaks: there is no '{self.breaks}'; {nearest(self.breaks, ('refuse', 'mend'))}"
        if not 8 <= self.max_length <= 100_000:
            yield f"max_length: at least 8 tokens, not {self.max_length}"
        if not 0 <= self.stride <= self.max_length // 2:
            yield f"stride: from 0 to {self.max_length // 2} tokens in windows of {self.max_length}, not {self.stride}"
        if not 0 < self.validation_share < 0.5:
            yield f"validation_share: a share above 0 and below 0.5, not {self.validation_share}"
        if self.train_rows is not None and self.train_rows < 10:
            yield f"train_rows: at least 10, not {self.train_rows}"
        twice = [name for name, count in Counter(self.labels).items() if count > 1]
        if twice:
            yield f"labels: '{twice[0]}' stands there twice"

    @classmethod
    def claims(cls, data: str) -> bool:
        return claims_lines(data)

    def title(self) -> str:
        return f"tagging {Path(self.data).resolve().name}" if self.data else "tagging"

    # ---- data

    def split(self, name: Split) -> Sequence[Example]:
        return _examples(self, Split(name), stamp(self.data))

    def settled(self) -> Tagging:
        """This task with the names of its tags and its metric filled from its data; what was filled before stays."""
        if self.answers_from == "teacher":
            return self
        corpus = _corpus(self, stamp(self.data))
        lacking = corpus.unknown_to(self.labels) if self.labels else []
        if lacking:
            raise DataError(
                f"the tag{'s' * (len(lacking) > 1)} {enumerate_labels(lacking)} of {corpus.first.where} are not among the known tags.",
                facts=[f"known: {enumerate_labels(self.labels)}"],
                help="a model that was trained on other tags cannot give these: start from an encoder, which is tuned first, or from a "
                "model with these tags.",
            )
        names = self.labels or corpus.own_names()
        spans = Tagset.of(names).has_spans
        if self.metric == "f1" and not spans:
            raise DataError(
                f"the metric 'f1' does not fit: no tag of {self.data} stands for 'outside', so there are no spans.",
                facts=[f"tags: {enumerate_labels(names)}"],
                help="say accuracy, or leave it out.",
            )
        return replace(self, labels=names, metric=self.metric if self.metric != "auto" else "f1" if spans else "accuracy")

    def notes(self) -> tuple[str, ...]:
        """What was found or guessed in the data: columns, tags and their scheme, and what is odd about the sentences."""
        if self.answers_from == "teacher":
            remark(f"{self.data}: no tags are read; what is measured is the F1 of the teacher's own spans, not of right ones.")
            return remarks_on(self.data)
        task = self.settled()
        corpus = _corpus(task, stamp(task.data))
        where, tagset = corpus.first.where, Tagset.of(task.labels)
        kind = {"plain": "plain tags", "BIOES": "tags that name ends (BIOES, BILOU, BMES)"}.get(
            corpus.scheme, f"{corpus.scheme} tags"
        )
        also = "" if corpus.scheme == tagset.scheme else f", which are rewritten as {tagset.scheme}"
        remark(f"{where}: {kind}{also}; {len(task.labels)} of them, in the order of their ids: {enumerate_labels(task.labels)}")
        seen = {item.texts[0].casefold() for name in (Split.TRAIN, Split.VALIDATION) for item in task.split(name)}
        dev = task.split(Split.DEV)
        leaked = sum(item.texts[0].casefold() in seen for item in dev)
        if leaked:
            source = corpus.sources.get("dev", corpus.first)
            remark(
                f"{source.where}: {leaked:,} of {len(dev):,} texts of dev are in the training data too, so scores on dev are too good."
            )
        unknown = sorted({tag for item in dev for tag in item.answer.tags} - set(task.labels))
        if unknown:
            remark(f"{where}: dev has tags that no model learns from the training data: {enumerate_labels(unknown)}.")
        return remarks_on(self.data)

    # ---- model

    def bind(self, config: PretrainedConfig | Mapping[str, Any]) -> Tagging:
        names, _ = model_labels(config)
        if self.answers_from == "teacher":
            return replace(self, labels=names)
        if are_placeholders(names):  # the model only knows an order, so the data's own order is the best there is
            task = self.settled()
            if len(task.labels) != len(names):
                raise DataError(
                    f"the model has {len(names)} tags without names, the data has {len(task.labels)}: {enumerate_labels(task.labels)}.",
                    help="the model was trained on other tags; name them in its config.json (id2label), or in the recipe (labels).",
                )
            return task
        return replace(self, labels=names).settled()

    def encode(self, examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> Features:
        import numpy as np

        from slimformer.data.tokenizer import cutting, pad_id_of
        from slimformer.tasks._words import add_windows, window_stride

        ids = Tagset.of(self._names()).places
        columns: dict[str, list[Any]] = {"input_ids": [], "token_type_ids": [], "words": [], "labels": []}
        owners: list[int] = []
        tokenless = total = 0
        stride = window_stride(tokenizer, max_length, self.stride)
        with cutting(tokenizer, max_length):
            tokenizer.enable_truncation(max_length, stride=stride)
            for first in range(0, len(examples), _TEXTS_AT_ONCE):
                some = examples[first : first + _TEXTS_AT_ONCE]
                for index, encoding in enumerate(tokenizer.encode_batch([item.texts[0] for item in some])):
                    answer = some[index].answer
                    wanted = np.asarray([ids.get(tag, IGNORED) for tag in answer.tags], dtype=np.int32)  # (words,)
                    if not answer.tags:  # nobody told any: a number that stands for no tag marks where a word is
                        wanted = np.zeros(len(answer.words), dtype=np.int32)
                    windows = [encoding, *encoding.overflowing]
                    tokenless += add_windows(columns, windows, answer.words, wanted)
                    total += len(answer.words)
                    owners += [first + index] * len(windows)
        if tokenless > _TOKENLESS * total:
            raise DataError(
                f"{self.data}: the model's tokenizer gives no token for {tokenless:,} of {total:,} words.",
                help="it lacks the characters of this language: start from a model that was made for it.",
            )
        if tokenless:
            remark(
                f"{self.data}: words that give no token, such as signs of no width, are not trained on and count as '{self._nothing()}'."
            )
        return Features(columns, owners, 0, pad_id_of(tokenizer))

    def configure(self) -> Mapping[str, Any]:
        names = self._names()
        if not names:
            raise DataError(
                "with labels: none the tags are those of a model that was tuned, and this one has no head for them.",
                help="name a tuned model, or a teacher; or give labels.",
            )
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
        }

    def loss(self, output: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Cross entropy at the first token of each word, a mean over words; of tags drawn by the model itself, if nobody told any."""
        import torch
        from torch.nn import functional

        logits = output["logits"].float().flatten(0, 1)  # (batch * seq, tags)
        if self.labelled:
            labels = batch["labels"].flatten()
        else:
            shares = drawn_shares(batch, output["logits"].shape[1]).flatten()  # (batch * seq,)
            drawn = drawn_classes(logits.detach(), shares[:, None])
            labels = torch.where(_counted(batch).flatten(), drawn, torch.full_like(drawn, IGNORED))
        lost = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return lost / self.terms(batch)

    def terms(self, batch: Mapping[str, torch.Tensor]) -> int:
        """The words of a batch; of rows without labels all tokens."""
        return max(1, int(_counted(batch).sum()))

    def divergence(
        self,
        student: Mapping[str, torch.Tensor],
        teacher: Mapping[str, torch.Tensor],
        batch: Mapping[str, torch.Tensor],
        temperature: float,
    ) -> torch.Tensor:
        """KL at the first token of each word, a mean over words; of rows without labels at all tokens."""
        counted = _counted(batch)  # (batch, seq)
        ours, theirs = (side["logits"].float()[counted] for side in (student, teacher))  # (words, tags)
        return kl_divergence(ours, theirs, temperature) if len(ours) else ours.sum()

    # ---- judging

    def predict(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> list[tuple[str, ...]]:
        """The tag of each word of each example."""
        from slimformer.tasks._words import told_tags

        names = self._names()
        nothing = names.index(self._nothing())
        told = told_tags(outputs, features, [len(item.answer.words) for item in examples], nothing)
        return [tuple(names[index] for index in ids) for ids in told]

    def score(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> dict[str, float]:
        """Of tags with spans F1, precision and recall as seqeval counts them; of all the accuracy of words."""
        found = scores_of(self._counts(outputs, features, examples).sum(0))
        if self.answers_from == "teacher":
            return {AGREEMENT: float(found[self._metric(examples)])}
        return {name: float(found[name]) for name in (TAG_METRICS if self._tagset(examples).has_spans else ("accuracy",))}

    def credit(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> np.ndarray:
        """The F1 of each text by itself, 1 where it has no span and none is predicted; or its share of right words."""
        import numpy as np

        counts = self._counts(outputs, features, examples)
        found = scores_of(counts)
        if self.metric == "accuracy" or not self._tagset(examples).has_spans:
            return found["accuracy"]
        return np.where(counts[:, 0] + counts[:, 1] > 0, found["f1"], 1.0)

    def resampled(
        self, outputs: Outputs, features: Features, examples: Sequence[Example], draws: Sequence[np.ndarray]
    ) -> np.ndarray | None:
        import numpy as np

        counts, metric = self._counts(outputs, features, examples), self._metric(examples)
        return np.asarray([scores_of(counts[draw].sum(0))[metric] for draw in draws])

    def _metric(self, examples: Sequence[Example]) -> str:
        """What counts as seqeval calls it."""
        usual = "f1" if self._tagset(examples).has_spans else "accuracy"
        return usual if self.metric in ("auto", AGREEMENT) else self.metric

    def answered(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> Sequence[Example]:
        """Without labels the teacher's tags."""
        if self.answers_from != "teacher":
            return examples
        told = self.predict(outputs, features, examples)
        return tuple(replace(item, answer=replace(item.answer, tags=tags)) for item, tags in zip(examples, told, strict=True))

    def check_model(
        self,
        config: PretrainedConfig | Mapping[str, Any],
        predict: Callable[[], tuple[Outputs, Features, Sequence[Example]]],
    ) -> str:
        """A warning if the model is no better than chance; DataError if its tags have another order than those of the data.

        Words outside of spans are most, and say little: no more of them are looked at than of words with another tag.
        """
        import numpy as np

        if self.answers_from == "teacher":
            return ""
        outputs, features, examples = predict()
        names = self._names()
        ids, nothing = {name: index for index, name in enumerate(names)}, self._nothing()
        told = [ids[tag] for tags in self.predict(outputs, features, examples) for tag in tags]
        gold = [ids.get(tag, -1) for item in examples for tag in item.answer.tags]
        predicted, wanted = np.asarray(told, dtype=np.int64), np.asarray(gold, dtype=np.int64)
        inside = np.flatnonzero((wanted >= 0) & (wanted != (ids[nothing] if Tagset.of(names).has_spans else -1)))
        outside = np.flatnonzero(wanted == ids[nothing]) if Tagset.of(names).has_spans else inside[:0]
        most = int(np.bincount(wanted[inside]).max(initial=0)) if len(inside) else 0
        kept = np.sort(np.concatenate([inside, outside[:most]]))
        return check_classes(predicted[kept], wanted[kept], names, "words of validation examples")

    def answers(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> list[str]:
        tagset = self._tagset(examples)
        told = self.predict(outputs, features, examples)
        return [described(item.answer, tags, tagset) for item, tags in zip(examples, told, strict=True)]

    def snippet(self, folder: Path, file: str, texts: Sequence[tuple[str, ...]], max_length: int) -> str:
        """Start, end, type and words of each span of a text; without an outside tag those of each word."""
        from slimformer.data.tokenizer import load_tokenizer
        from slimformer.tasks._words import window_stride

        text = min((item[0] for item in texts), key=lambda item: abs(len(item) - 80))
        tagset = Tagset.of(self._names())
        stride = window_stride(load_tokenizer(folder), max_length, self.stride)
        lines = [
            "import json, pathlib, re, numpy as np, onnxruntime, tokenizers",
            OPEN_TOKENIZER,
            f"tokenizer.enable_truncation({max_length}, stride={stride})",
            *open_file(file),
            f"text = {python_literal(text)}",
            f'words = [match.span() for match in re.finditer({WORD.pattern!r}, text)]  # of a text that is cut already: r"\\S+"',
            INPUT_NAMES,
            'labels = json.loads(pathlib.Path("config.json").read_text("utf-8"))["id2label"]',
            f"tags, rooms = [{python_literal(self._nothing())}] * len(words), [-1] * len(words)",
            "row = tokenizer.encode(text)",
            "for window in (row, *row.overflowing):",
            "    feeds = {i.name: np.array([getattr(window, names[i.name])], np.int64) for i in session.get_inputs()}",
            '    best = session.run(["logits"], feeds)[0][0].argmax(axis=1)',
            "    tokens = [(place, *window.offsets[place]) for place in range(len(best)) if not window.special_tokens_mask[place]]",
            "    for index, (start, end) in enumerate(words):  # a word has the tag of its first token",
            "        place, begin, _ = next((token for token in tokens if token[2] > start), (0, end, 0))",
            "        room = min(place, len(best) - 1 - place)  # of several windows that with the most text around it counts",
            "        if begin < end and room > rooms[index]:",
            "            tags[index], rooms[index] = labels[str(best[place])], room",
        ]
        if not tagset.has_spans:
            return "\n".join([*lines, "print([(start, end, tag, text[start:end]) for (start, end), tag in zip(words, tags)])"])
        if tagset.plain:
            read = f'    letter, kind = ("O", "") if tag == {python_literal(tagset.outside)} else ("I", tag)'
        else:
            read = f'    letter, kind = ("O", "") if tag == {python_literal(tagset.outside)} else (tag[0], tag[2:])'
        return "\n".join(
            [
                *lines,
                'spans, before = [], ("O", "")',
                "for (start, end), tag in zip(words, tags):",
                read,
                '    if letter != "O" and (before[0] in "OELSUW" or kind != before[1] or letter in "BSUW"):',
                "        spans.append([start, end, kind])",
                '    elif letter != "O":',
                "        spans[-1][1] = end",
                "    before = letter, kind",
                "print([(start, end, kind, text[start:end]) for start, end, kind in spans])",
            ]
        )

    def _names(self) -> tuple[str, ...]:
        return self.labels or self.settled().labels

    def _nothing(self) -> str:
        """The tag of words that have no token: the outside one, or else the first."""
        tagset = Tagset.of(self._names())
        return tagset.outside if tagset.outside in tagset.names else tagset.names[0]

    def _tagset(self, examples: Sequence[Example]) -> Tagset:
        """The model's tags, and those of the examples that the model does not know."""
        names = self._names()
        return _tagset(names, tuple(sorted({tag for item in examples for tag in item.answer.tags} - set(names))))

    def _counts(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> np.ndarray:
        """What metrics count in each example: (examples, counts)."""
        told = self.predict(outputs, features, examples)
        return count_spans([item.answer.tags for item in examples], told, self._tagset(examples))


def described(answer: Tags, tags: Sequence[str], tagset: Tagset) -> str:
    """The spans that tags make of an answer's words, as a person reads them: "Ada Lovelace (PER), London (LOC)"."""
    words = answer.words
    if not tagset.has_spans:
        return " ".join(tags)
    spans = [f"{answer.text[words[first][0] : words[last][1]]} ({kind})" for kind, first, last in tagset.spans(tags)]
    return ", ".join(spans) or "nothing"


def _counted(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which tokens count: those with a label, or all if the rows have none: (batch, seq)."""
    return batch["labels"] != IGNORED if "labels" in batch else batch["attention_mask"] == 1


@lru_cache(maxsize=32)
def _tagset(names: tuple[str, ...], more: tuple[str, ...]) -> Tagset:
    return Tagset.of((*names, *more))


# ---- reading


@lru_cache(maxsize=4)
def _read(data: str, text: str | None, label: str | None, judged_alone: bool, _key: Stamp) -> Mapping[str, Tagged]:
    """The sentences "train" and "dev", one or both of them; those of "test" stand in for dev if they have tags.

    `judged_alone`: of dev, because the training data has no tags.
    """
    form = Format(
        task="tagging",
        suffixes=TAGGED_SUFFIXES,
        match=match_tagged,
        read=lambda files: (
            Tagged(str(files[0]), (), "row") if judged_alone and is_training(files[0]) else read_tagged(files, text, label)
        ),
        read_hub=lambda name: read_hub_tagged(name, text, label),
        example="./conll2003",
        forms="a folder or a file",
    )
    sources = read_sources(data, form)
    if judged_alone:
        sources = {kind: source for kind, source in sources.items() if kind != "train"}
        if not sources:
            raise DataError(
                f"{data} has no dev data, and labels: dev says that only that has labels.", help="add a dev file with tags."
            )
    return settle_dev(sources, lambda source: source.where, lambda test: _lacking(sources.get("train", test), test))


def _lacking(train: Tagged, test: Tagged) -> str:
    """What tags the test data lacks that stands in for dev, "" if none."""
    said = {tag for item in test.sentences for tag in item.tags}
    return (
        f"each word has the tag {next(iter(said))}"
        if len(said) == 1 and {t for s in train.sentences for t in s.tags} > said
        else ""
    )


def _corpus(task: Tagging, key: Stamp) -> TagCorpus:
    alone = task.answers_from == "dev"
    sources = _read(task.data, task.text, task.label, alone, key)
    first = sources.get("train", next(iter(sources.values())))
    numbers = not first.names and all(tag.removeprefix("-").isdecimal() for tag in first.sentences[0].tags)
    return _built(task.data, task.text, task.label, task.labels if numbers else (), task.breaks == "mend", alone, key)


@lru_cache(maxsize=4)
def _built(
    data: str, text: str | None, label: str | None, labels: tuple[str, ...], mends: bool, alone: bool, key: Stamp
) -> TagCorpus:
    return TagCorpus(_read(data, text, label, alone, key), labels, mends)


def _without_tags(task: Tagging, name: Split, key: Stamp) -> tuple[Example, ...]:
    """The examples where the data, or its training part, tells no tags."""
    taught = task.answers_from == "teacher"
    if not taught and name is not Split.TRAIN:
        return tuple(half_of_dev(_told_examples(task, Split.DEV, key), name, task.data, "sentences of dev"))
    sources = read_untagged(task.data, task.text, key)
    if "train" not in sources and not (name is Split.DEV and "dev" in sources):
        raise no_training_data(task.data, "name the file train.txt, .jsonl or .parquet.")

    def chosen(rows: list[int]) -> list[int]:
        return rows if task.train_rows is None else draw_some(rows, task.train_rows, "rows")

    counts = {kind: len(sentences) for kind, sentences in sources.items()}
    kind, rows = untold_rows(counts, name, task.validation_share if taught else None, chosen)
    if not rows:
        raise DataError(
            f"{task.data}: {counts[kind]} texts are too few to set some aside.", help=f"give at least {FEWEST_TOLD}."
        )
    some = ((row, sources[kind][row]) for row in rows)
    return tuple(Example(f"{kind}/{row}", (item.text,), Tags(item.words, (), item.text)) for row, item in some)


@lru_cache(maxsize=12)
def _examples(task: Tagging, name: Split, key: Stamp) -> tuple[Example, ...]:
    return _told_examples(task, name, key) if task.labelled else _without_tags(task, name, key)


def _told_examples(task: Tagging, name: Split, key: Stamp) -> tuple[Example, ...]:
    """The examples of a split with their tags."""
    task = task if task.labels else task.settled()
    corpus = _corpus(task, key)
    kind = "dev" if name is Split.DEV and "dev" in corpus.sources else "train"
    if kind not in corpus.sources:
        raise no_training_data(task.data, "name the file train.conll, train.txt, .jsonl or .parquet.")
    source, naming = corpus.sources[kind], corpus.naming(task.labels)
    rows = list(range(len(source.sentences)))
    if "dev" not in corpus.sources:
        dev = draw_rows(rows, None, dev_count(len(rows)), FOR_DEV)
        rows = [row for row in rows if (row in dev) == (name is Split.DEV)]
    if name is not Split.DEV:
        rows = rows if task.train_rows is None else draw_some(rows, task.train_rows, "rows")
        validation = draw_rows(rows, None, validation_count(task.validation_share, len(rows)), FOR_VALIDATION)
        rows = [row for row in rows if (row in validation) == (name is Split.VALIDATION)]
    if not rows:
        count = len(source.sentences)
        raise DataError(
            f"{source.where} holds {count} sentence{'s' * (count != 1)}, too few to set some aside.",
            help=f"give at least 20. Sentences are told apart by blank lines: {LINES_SHAPE}"
            if source.lines
            else "give at least 20.",
        )
    return tuple(
        Example(
            f"{kind}/{row}",
            (source.sentences[row].text,),
            Tags(source.sentences[row].words, corpus.rewritten(corpus.tags[kind][row], naming), source.sentences[row].text),
        )
        for row in rows
    )
