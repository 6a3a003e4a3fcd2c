"""What a model folder answers: texts become rows of tokens, and the outputs of rows become vectors, classes, scores or spans.

Which of them it is follows from the folder: `slimformer.json` names its task, and of other folders with ONNX files config.json names the
head. Neither torch nor transformers is needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from scipy.special import expit, softmax

from slimformer.core.answers import answer_slices
from slimformer.core.pooling import QUERY, SENTENCE_VECTOR, VectorHead, vector_head
from slimformer.core.relevance import RELEVANCE, ScoreActivation, relevance_of, score_activation
from slimformer.data.labels import model_labels
from slimformer.data.tagged import WORD
from slimformer.data.tokenizer import LONGEST, cutting, load_tokenizer, max_length_of, pad_id_of
from slimformer.data.tokenizer_files import encoding_errors
from slimformer.errors import ModelError, RecipeError, nearest, shown
from slimformer.measuring.records import Facts
from slimformer.reporting.delivered import ONNX_FOLDER, file_to_run
from slimformer.saving.checkpoint import read_config
from slimformer.tasks._tags import OUTSIDE, Tagset
from slimformer.tasks._words import add_windows, window_stride

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

TextOrPair = str | tuple[str, str]  # one text, or a pair
_STRIDE = 64  # tokens that neighbouring windows of a long text share
_HEADS = {"ForSequenceClassification": "classes", "ForTokenClassification": "spans"}


@dataclass(frozen=True)
class TokenRow:
    """One row for the model: its tokens, and of a tagger's the word that each of them answers for (-1: none)."""

    ids: Sequence[int]
    types: Sequence[int]
    words: np.ndarray | None = None  # (tokens,)

    def __len__(self) -> int:
        return len(self.ids)


def whole_characters(text: str) -> str:
    r"""A text without halves of characters, which JSON may hold and no tokenizer reads; each becomes one sign.

    >>> whole_characters("a\ud800b")
    'a\ufffdb'
    """
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class TooLongError(ValueError):
    """A text has more tokens than the model reads, and its sender did not want it cut."""


class Answerer(ABC):
    """Subclasses say what the rows of one text are, and what their outputs mean."""

    path: ClassVar[str]  # the endpoint that asks for this kind of answer
    per_token: ClassVar[bool] = False  # whether the output has a row for each token

    def __init__(self, folder: Path, config: Mapping[str, Any], max_length: int) -> None:
        self.tokenizer: Tokenizer = load_tokenizer(folder)
        self.pad_id = pad_id_of(self.tokenizer, folder)
        self.config, self.max_length = config, max_length
        with cutting(self.tokenizer, max_length):
            pass  # so few tokens leave room for a text
        stride = window_stride(self.tokenizer, max_length, _STRIDE) if self.per_token else 0
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_length, stride=stride)  # once: several threads encode

    def rows(self, texts: Sequence[TextOrPair], *, cut: bool = True) -> list[list[TokenRow]]:
        """The rows of each text; one, if the kind of answer needs no windows. TooLongError if a text must be cut and may not."""
        found = self._encoded(texts)
        for text, row in zip(texts, found, strict=True):
            if row.overflowing and not cut:
                raise TooLongError(
                    f"{shown(text if isinstance(text, str) else text[0], 40)} has more than {self.max_length} tokens."
                )
        return [[TokenRow(row.ids, row.type_ids)] for row in found]

    def _encoded(self, texts: Sequence[TextOrPair]) -> Sequence[Encoding]:
        plain = [whole_characters(text) if isinstance(text, str) else tuple(map(whole_characters, text)) for text in texts]
        with encoding_errors():
            found: Sequence[Encoding] = self.tokenizer.encode_batch(plain)
        return found

    def read(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Of the outputs of a batch the one that answers, a row for each row."""
        return outputs["logits"]

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What a caller may want to know of these answers."""


class Vectors(Answerer):
    """A vector for each text."""

    path = "/v1/embeddings"

    def __init__(self, folder: Path, config: Mapping[str, Any], max_length: int) -> None:
        head = vector_head(config)
        assert head is not None
        super().__init__(folder, config, min(max_length, head.max_length or max_length))
        self.head: VectorHead = head

    def read(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return outputs[SENTENCE_VECTOR]

    def prompt(self, name: str | None, side: str | None) -> str:
        """The text before each text: that of a prompt's name, or of a side, query or passage.

        RecipeError if there is no such prompt, or if the sides differ and nobody said which one these texts are.
        """
        prompts, (query, passage) = self.head.prompts, self.head.sides
        if name is not None:
            if name not in prompts:
                raise RecipeError(
                    f"the model has no prompt '{name}'.", help=nearest(name, prompts) if prompts else "leave it out."
                )
            return prompts[name]
        if side is not None:
            return (query if side == QUERY else passage) or ""
        if self.head.default_prompt in prompts:
            return prompts[str(self.head.default_prompt)]
        if (query or "") != (passage or ""):
            raise RecipeError(
                f"the model puts {shown(query or '')} before a query and {shown(passage or '')} before a passage, and nothing says "
                "which these are.",
                help='add "input_type": "query" or "passage".',
            )
        return query or ""

    def prompted(self, texts: Sequence[str], prompt: str) -> list[TextOrPair]:
        """The texts as the model reads them."""
        return [(prompt + text).lower() if self.head.lower else prompt + text for text in texts]

    def facts(self) -> dict[str, Any]:
        return {"prompts": dict(self.head.prompts), "similarity": self.head.similarity, "normalized": self.head.normalize}


class Classes(Answerer):
    """The share of each class, of several tasks within each; or of each label by itself, if a text may have several; or one number."""

    path = "/classify"

    def __init__(self, folder: Path, config: Mapping[str, Any], max_length: int) -> None:
        super().__init__(folder, config, max_length)
        self.labels, problem = model_labels(config)
        self.several = problem == "multi_label_classification"
        self.tasks = answer_slices(config)

    def shares(self, logits: np.ndarray) -> list[dict[str, Any]]:
        """(classes,) -> each label with its share, the largest first, task by task; the score itself if there is but one."""
        values, found = np.asarray(logits, np.float64), []
        for part in self.tasks.values() or (slice(0, len(values)),):
            some = values[part]
            some = expit(some) if self.several else softmax(some) if len(some) > 1 else some
            order = np.argsort(-some, kind="stable")
            found += [{"label": self.labels[part.start + place], "score": float(some[place])} for place in order]
        return found

    def facts(self) -> dict[str, Any]:
        several = {"tasks": {name: list(self.labels[part]) for name, part in self.tasks.items()}} if self.tasks else {}
        return {"labels": list(self.labels), "several_labels": self.several, **several}


class Scores(Answerer):
    """One number for a query with a text: how well the text answers it."""

    path = "/rerank"

    def __init__(self, folder: Path, config: Mapping[str, Any], max_length: int) -> None:
        super().__init__(folder, config, max_length)
        self.activation: ScoreActivation = score_activation(config) or "sigmoid"  # as CrossEncoder takes it

    def read(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Our files give the score; of other tools' the output becomes one, as the folder says."""
        if RELEVANCE in outputs:
            return outputs[RELEVANCE]
        return relevance_of(outputs["logits"], self.activation)

    def facts(self) -> dict[str, Any]:
        return {"activation": self.activation}


class Spans(Answerer):
    """The spans of words that a tagger marks, with their places in the text; of tags without an outside one every word."""

    path = "/tag"
    per_token = True

    def __init__(self, folder: Path, config: Mapping[str, Any], max_length: int) -> None:
        super().__init__(folder, config, max_length)
        self.labels, _ = model_labels(config)
        self.tagset = Tagset.of(self.labels)

    def rows(self, texts: Sequence[TextOrPair], *, cut: bool = True) -> list[list[TokenRow]]:
        """Windows over each text; nothing is cut off."""
        plain = [whole_characters(str(text)) for text in texts]
        rows = []
        for text, encoding in zip(plain, self._encoded(plain), strict=True):
            columns: dict[str, list[Any]] = {"input_ids": [], "token_type_ids": [], "words": [], "labels": []}
            places = self.words(text)
            add_windows(columns, [encoding, *encoding.overflowing], places, np.zeros(len(places), np.int32))
            parts = (columns[name] for name in ("input_ids", "token_type_ids", "words"))
            rows.append([TokenRow(*window) for window in zip(*parts, strict=True)])
        return rows

    def words(self, text: str) -> list[tuple[int, int]]:
        """First and last character (exclusive) of each word."""
        return [match.span() for match in WORD.finditer(text)]

    def spans(self, text: str, rows: Sequence[TokenRow], logits: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """(tokens, tags) of each window -> the spans of a text. A word has the tag of its first token, where most text is around it."""
        words = self.words(text)
        tags, sure = np.full(len(words), -1), np.zeros(len(words))
        for row, values in zip(rows, logits, strict=True):
            assert row.words is not None
            there = np.flatnonzero(row.words >= 0)
            shares = softmax(np.asarray(values, np.float64)[there], axis=-1)  # (words, tags)
            tags[row.words[there]], sure[row.words[there]] = shares.argmax(axis=-1), shares.max(axis=-1)
        return self._joined(text, words, tags, sure)

    def _joined(self, text: str, words: Sequence[tuple[int, int]], tags: np.ndarray, sure: np.ndarray) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        shares: list[list[float]] = []
        before = (OUTSIDE, "")
        for (start, end), tag, share in zip(words, tags, sure, strict=True):
            letter, kind = (OUTSIDE, "") if tag < 0 else self.tagset.parts[tag]
            begins = not self.tagset.has_spans or letter in "BS" or before[0] in "OES" or kind != before[1]
            if letter != OUTSIDE and begins:
                found.append({"label": kind if self.tagset.has_spans else self.labels[tag], "start": start, "end": end})
                shares.append([float(share)])
            elif letter != OUTSIDE:
                found[-1]["end"] = end
                shares[-1].append(float(share))
            before = letter, kind
        for item, values in zip(found, shares, strict=True):
            item["text"], item["score"] = text[item["start"] : item["end"]], sum(values) / len(values)
        return found

    def facts(self) -> dict[str, Any]:
        return {"labels": list(self.labels)}


@dataclass(frozen=True)
class Served:
    """A folder that is served, with its card and page: the file that runs, what it answers, and what its slimformer.json says."""

    name: str
    folder: Path
    file: Path
    answerer: Answerer
    facts: Facts | None


def served_model(path: Path, max_length: int | None = None) -> Served:
    """What a folder with ONNX files, or one of these files, answers.

    Args:
        path: A folder as `slimformer compress` writes it, one of other tools with config.json, tokenizer.json and ONNX files, or a file.
        max_length: Tokens that a text may have; by default as many as the folder was made for, or as the model can take.

    Raises:
        ModelError: There is no model, no tokenizer, or one that answers what no endpoint asks for.

    Example:
        >>> served_model(Path("small")).answerer.path
        '/classify'
    """
    file, home, facts = file_to_run(path)
    config = read_config(home)
    folder = path if path.is_dir() else home.parent if home.name == ONNX_FOLDER else home
    length = min(max_length or (facts.max_length if facts is not None else LONGEST), max_length_of(home))
    return Served(folder.resolve().name, folder, file, _kind(home, config, facts)(home, config, length), facts)


def _kind(home: Path, config: Mapping[str, Any], facts: Facts | None) -> type[Answerer]:
    """Vectors, classes, scores or spans: as config.json tells."""
    if config.get(SENTENCE_VECTOR) is not None:
        return Vectors
    used = str(facts.task.get("use", "")) if facts is not None else ""
    heads = [str(name) for name in config.get("architectures") or ()]
    found = next((kind for name in heads for end, kind in _HEADS.items() if name.endswith(end)), None)
    if used == "reranking":
        return Scores
    if found == "classes":
        one = len(model_labels(config)[0]) == 1
        return Scores if one and score_activation(config) is not None else Classes
    if found == "spans":
        return Spans
    kind = used or (heads[0] if heads else "unknown")
    raise ModelError(
        f"{home} holds a model of the kind {shown(kind, 60)}, and no endpoint asks for its answers.",
        help="served are embeddings, classifiers, rerankers and taggers.",
    )
