"""What tasks have in common whose model writes a text for a text: their data, their rows, their losses, and scores without texts.

The batch holds `labels`, the tokens to be written (-100 behind them), and `decoder_input_ids`, the same a place later behind the token
that a decoder starts with. Models that shift labels themselves get the same numbers; the model is given ids and never labels, so that
the loss stands in one place.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slimformer.data.memory import data_source
from slimformer.data.pairs import Pairs, Place, Targets, read_pairs, read_targets
from slimformer.data.sources import Stamp, no_training_data, stamp
from slimformer.data.splits import FOR_DEV, FOR_VALIDATION, dev_count, draw_groups, draw_some, validation_count
from slimformer.errors import DataError, RecipeError, nearest, shown
from slimformer.log import remark, remarks_on
from slimformer.tasks._losses import kl_divergence
from slimformer.tasks._snippet import python_literal
from slimformer.tasks.base import IGNORED, Example, Features, Outputs, Split, Task, option

if TYPE_CHECKING:
    import numpy as np
    import torch
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig

_TEXTS_AT_ONCE = 4096  # encoded together: bounds the memory of the tokenizer's own objects
_LANGUAGE_CODE = re.compile(r"__\w+__|[a-z]{2,3}_[A-Z]{2}|[a-z]{3}_[A-Z][a-z]{3}|<2\w+>")  # of m2m100, mBART, NLLB, MADLAD
_UNKNOWN = ("<unk>", "[UNK]", "<UNK>")
_MANY, _MOST = 0.01, 0.5  # shares of unknown tokens: what is said, and what no model can learn from
_FEWEST = 20  # examples from which a model is judged
_LOW = {"token_accuracy": 0.15, "bleu": 0.02, "chrf": 0.1, "rouge1": 0.05, "rouge2": 0.01, "rougeL": 0.05}


@dataclass(frozen=True)
class Generation(Task):
    """Subclasses say how written texts are judged; everything before that stands here."""

    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    stand_in: ClassVar[str] = "token_accuracy"
    piece_columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels")
    paths: ClassVar[tuple[str, ...]] = ("data", "target_data", "dev", "targets")
    metrics: ClassVar[tuple[str, ...]] = ()

    data: Any = option("", "A folder with train and dev files, one file, or a hub name.", required=True)  # noqa: RUF009
    target_data: str | None = option(None, "The file of the other side, if data is one text file.")
    dev: str | None = option(None, "Other dev data: the name of a test set in data, such as test_2016_flickr, or a file.")
    source: str | None = option(None, "Column, language or suffix of the texts to read; guessed if it has a usual name.")
    target: str | None = option(None, "Column, language or suffix of the texts to write; guessed if it has a usual name.")
    prefix: str = option("", "Text put before each input, as T5 wants it: 'translate English to German: '.")
    metric: str = ""
    max_length: int = option(128, "Tokens an input may have; longer ones are cut off.")
    max_target_length: int = option(128, "Tokens a written text may have; longer ones are cut off.")
    label_smoothing: float = 0.1
    train_rows: int | None = option(None, "How many rows to train on.")
    targets: Any = option(None, "Other texts to train on, such as a teacher's: a file of lines, or a table of id and text.")  # noqa: RUF009
    validation_share: float = 0.05
    start_id: int | None = None
    end_id: int | None = None

    def __post_init__(self) -> None:
        data = self.data
        if isinstance(data, (list, tuple)) and len(data) == 2 and all(isinstance(item, (str, Path)) for item in data):
            object.__setattr__(self, "target_data", str(data[1]))
            data = data[0]
        object.__setattr__(self, "data", data_source(data))
        if isinstance(self.targets, Mapping):
            rows = [{"id": str(key), "text": str(text)} for key, text in self.targets.items()]
            object.__setattr__(self, "targets", data_source(rows))
        elif self.targets is not None:
            object.__setattr__(self, "targets", data_source(self.targets))
        mistakes = list(self._mistakes())
        if mistakes:
            raise RecipeError(f"the task {self._name()} cannot be set up like that.", facts=mistakes)

    def _mistakes(self) -> Iterable[str]:
        if self.metric not in self.metrics:
            yield f"metric: there is no '{self.metric}'; {nearest(self.metric, self.metrics)}"
        if self.source is not None and self.source == self.target:
            yield f"source, target: both are '{self.source}'; name two sides"
        for name in ("max_length", "max_target_length"):
            if not 4 <= getattr(self, name) <= 100_000:
                yield f"{name}: at least 4 tokens, not {getattr(self, name)}"
        if not 0 <= self.label_smoothing < 1:
            yield f"label_smoothing: a share from 0 and below 1, not {self.label_smoothing}"
        if not 0 < self.validation_share < 0.5:
            yield f"validation_share: a share above 0 and below 0.5, not {self.validation_share}"
        if self.train_rows is not None and self.train_rows < 10:
            yield f"train_rows: at least 10, not {self.train_rows}"

    @abstractmethod
    def _name(self) -> str:
        """Name of the task, and of the columns that are usual for it."""

    def title(self) -> str:
        sides = f" {self.source}-{self.target}" if self.source and self.target else ""
        return f"{self._name()} {Path(self.data).resolve().name}{sides}" if self.data else self._name()

    # ---- data

    def split(self, name: Split) -> Sequence[Example]:
        return _examples(self._place(), self.targets, self.train_rows, self.validation_share, Split(name), self._stamp())

    def settled(self) -> Generation:
        """This task with both sides named as in its data."""
        pairs = self._pairs()
        source, target = next(iter(pairs.values())).sides
        return replace(self, source=self.source or source, target=self.target or target)

    def _place(self) -> Place:
        return Place(self._name(), self.data, self.target_data, self.dev, self.source, self.target)

    def _stamp(self) -> Stamp:
        return (*self._place().stamp(), *stamp(self.targets))

    def _pairs(self) -> Mapping[str, Pairs]:
        return _read(self._place(), self._place().stamp())

    def signatures(self) -> Mapping[str, str]:
        """What stands for the settings of each metric: sacrebleu's signature, the package and its version. ExtraError without it."""
        return {}

    def notes(self) -> tuple[str, ...]:
        """What was guessed or left out, and how the metrics are set; ExtraError before a run if their package is missing."""
        self.split(Split.TRAIN)
        told = dict.fromkeys(
            line for name in (self.data, self.dev, self.target_data, self.targets) for line in remarks_on(name or "")
        )
        return (*told, *(f"{name} is {signature}" for name, signature in self.signatures().items()))

    # ---- model

    def configure(self) -> Mapping[str, Any]:
        return {}

    def bind(self, config: PretrainedConfig | Mapping[str, Any]) -> Generation:
        """This task with the ids that the model's decoder starts and ends with, and targets no longer than its positions."""
        said: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
        kind = said.get("model_type", "")
        if not said.get("is_encoder_decoder"):
            raise DataError(
                f"the model is no encoder-decoder ({kind or 'its config names no type'}): it cannot write a text.",
                help="start from one, such as Helsinki-NLP/opus-mt-en-de, facebook/bart-base or google-t5/t5-small.",
            )
        start = said.get("decoder_start_token_id")
        if start is None:
            start = said.get("pad_token_id")
            remark(
                f"{self.data}: the model's config has no decoder_start_token_id; its decoder starts with the padding token {start}."
            )
        if not isinstance(start, int):
            raise DataError(
                "the model's config says with which token its decoder starts neither by decoder_start_token_id nor by pad_token_id.",
                help="write decoder_start_token_id into its config.json: that of padding for T5 and Marian, of </s> for BART.",
            )
        end, room = said.get("eos_token_id"), said.get("max_position_embeddings")
        longest = self.max_target_length
        if isinstance(room, int) and 0 < room < longest and kind != "t5":
            remark(f"{self.data}: the model has {room} positions, so texts of at most {room} tokens are written.")
            longest = room
        self._tell_task_params(said)
        end = end[0] if isinstance(end, list) and end else end
        return replace(self, start_id=start, end_id=end if isinstance(end, int) else None, max_target_length=longest)

    def _tell_task_params(self, config: Mapping[str, Any]) -> None:
        """Says what config.json holds for this task alone: pipelines of transformers 4 applied it, `generate` and ours do not."""
        params = config.get("task_specific_params")
        names = [name for name in params if name.startswith(self._name())] if isinstance(params, Mapping) else []
        exact = f"{self._name()}_{self.source}_to_{self.target}"
        name = exact if exact in names else names[0] if len(names) == 1 else ""
        if not name or not isinstance(params[name], Mapping) or not params[name]:  # type: ignore[index]
            return
        own = dict(params[name])  # type: ignore[index]
        prefix = own.pop("prefix", "")
        told = [f"put {', '.join(f'{key}: {value}' for key, value in own.items())} into generation_config.json"] if own else []
        told += [f"give --prefix {str(prefix)!r}"] if prefix and prefix != self.prefix else []
        if told:
            remark(
                f"{self.data}: config.json has task_specific_params for {name}, which are not applied: if the model was tuned with them, "
                f"{' and '.join(told)}."
            )

    def encode(
        self, examples: Sequence[Example], tokenizer: Tokenizer, max_length: int, writer: Tokenizer | None = None
    ) -> Features:
        """`writer`: the tokenizer of what is written, if it is another one than that of what is read."""
        from slimformer.data.tokenizer import cutting, pad_id_of

        writer = writer or tokenizer

        _refuse_language_codes(tokenizer)
        special = _special_tokens(tokenizer)
        sources = [self.prefix + text for text in _without(special, [item.texts[0] for item in examples], self.data)]
        targets = _without(special, [item.answer.train for item in examples], self.data)
        with cutting(tokenizer, max_length):
            read, cut = _ids(tokenizer, sources)
        with cutting(writer, self.max_target_length):
            written, shortened = _ids(writer, targets)
        if shortened:
            remark(
                f"{self.data}: {shortened:,} of {len(examples):,} texts to be written are cut off at {self.max_target_length} tokens."
            )
        _check_unknown(tokenizer, read, "read", self.data)
        _check_unknown(writer, written, "written", self.data)
        if self.end_id is not None and any(row[-1] != self.end_id for row in written):
            raise DataError(
                f"the tokenizer does not end a text with the model's end token, id {self.end_id} ({tokenizer.id_to_token(self.end_id)}): "
                "a model trained on such texts never stops.",
                help="mend the template in tokenizer.json (post_processor), or eos_token_id in config.json.",
            )
        pad = pad_id_of(tokenizer)
        start = pad if self.start_id is None else self.start_id
        shifted = [_shifted(row, start) for row in written]
        columns = {"input_ids": read, "labels": written, "decoder_input_ids": shifted}
        return Features(columns, range(len(examples)), cut, pad)

    def loss(self, output: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Cross entropy of each token to be written, given those before it; the mean over tokens, labels smoothed."""
        from torch.nn import functional

        logits = output["logits"].float()  # (batch, target, words)
        return functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, label_smoothing=self.label_smoothing
        )

    def terms(self, batch: Mapping[str, torch.Tensor]) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def divergence(
        self,
        student: Mapping[str, torch.Tensor],
        teacher: Mapping[str, torch.Tensor],
        batch: Mapping[str, torch.Tensor],
        temperature: float,
    ) -> torch.Tensor:
        """KL(teacher || student) of the next token, the mean over tokens to be written; padding takes no part."""
        real = batch["labels"] != IGNORED  # (batch, target)
        return kl_divergence(student["logits"][real].float(), teacher["logits"][real].float(), temperature)

    def snippet(self, folder: Path, file: str, texts: Sequence[tuple[str, ...]], max_length: int) -> str:
        """It needs decode.py beside the file: the search of `slimformer.decoding`, which stands alone."""
        prefix = f", prefix={python_literal(self.prefix)}" if self.prefix else ""
        return "\n".join(
            (
                "from decode import TextWriter  # decode.py lies beside the files",
                f'write = TextWriter(".", {python_literal(file)}, threads=2, max_input={max_length}{prefix})',
                f"print(write([{', '.join(python_literal(text[0]) for text in texts)}]))",
            )
        )

    # ---- judging

    def kept(
        self, output: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor | np.ndarray]
    ) -> dict[str, torch.Tensor]:
        """By row: tokens to be written, those that are likeliest, and the sum of the logarithms of their probabilities."""
        import torch

        logits = output["logits"].float()  # (batch, target, words)
        wanted = torch.as_tensor(batch["labels"], device=logits.device)  # (batch, target)
        real = wanted != IGNORED
        likely = torch.log_softmax(logits, -1).gather(2, wanted.clamp_min(0)[..., None])[..., 0]
        return {
            "tokens": real.sum(1).float(),  # (batch,)
            "right": ((logits.argmax(-1) == wanted) & real).sum(1).float(),
            "likely": (likely * real).sum(1),
        }

    def score(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> dict[str, float]:
        """The metrics of texts, if the outputs hold them, and else those of right tokens.

        `token_accuracy` is the share of tokens that are the likeliest behind the right ones before them, and `token_likelihood` their
        mean probability (geometric): exp(-cross entropy), or one by the perplexity.
        """
        import numpy as np

        if "text" in outputs:
            return self._text_scores(_texts(outputs), examples)
        tokens = max(1.0, float(outputs["tokens"].sum()))
        return {
            "token_accuracy": float(outputs["right"].sum()) / tokens,
            "token_likelihood": float(np.exp(outputs["likely"].sum() / tokens)),
        }

    def credit(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> np.ndarray:
        """The metric of each text by itself; without texts the share of its tokens that are right."""
        import numpy as np

        if "text" in outputs:
            return self._text_credit(_texts(outputs), examples)
        return np.asarray(outputs["right"] / np.maximum(1, outputs["tokens"]), dtype=np.float64)

    def answers(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> list[str]:
        return _texts(outputs) if "text" in outputs else [""] * len(examples)

    def check_model(
        self,
        config: PretrainedConfig | Mapping[str, Any],
        predict: Callable[[], tuple[Outputs, Features, Sequence[Example]]],
    ) -> str:
        """A warning if the model writes next to nothing right."""
        outputs, features, examples = predict()
        if len(examples) < _FEWEST:
            return ""
        scores = self.score(outputs, features, examples)
        name = self.metric if self.metric in scores else self.stand_in
        if scores[name] >= _LOW[name]:
            return ""
        return (
            f"warning: the model reaches {name} {scores[name]:.3f} on {len(examples)} validation examples, as one that was never tuned "
            "for this would. What is lost against it proves nothing. Is it made for these languages, and this direction?"
        )

    @abstractmethod
    def _text_scores(self, texts: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """All metrics of written texts."""

    @abstractmethod
    def _text_credit(self, texts: Sequence[str], examples: Sequence[Example]) -> np.ndarray:
        """`metric` of each text by itself: (examples,)."""


# ---- reading


@lru_cache(maxsize=4)
def _read(place: Place, _key: Stamp) -> Mapping[str, Pairs]:
    return read_pairs(place)


@lru_cache(maxsize=8)
def _examples(
    place: Place, targets: str | None, train_rows: int | None, validation_share: float, name: Split, key: Stamp
) -> tuple[Example, ...]:
    sources = _read(place, place.stamp())
    kind = "dev" if name is Split.DEV and "dev" in sources else "train"
    if kind not in sources:
        raise no_training_data(place.data, "name the file train.<side>, or train.tsv, .jsonl, .parquet.")
    pairs = sources[kind]
    rows = list(range(len(pairs)))
    if "dev" not in sources:
        dev = _drawn(pairs, rows, dev_count(len(rows)), FOR_DEV)
        rows = [row for row in rows if (row in dev) == (name is Split.DEV)]
    if name is not Split.DEV:
        rows = rows if train_rows is None else draw_some(rows, train_rows, "rows")
        validation = _drawn(pairs, rows, validation_count(validation_share, len(rows)), FOR_VALIDATION)
        rows = [row for row in rows if (row in validation) == (name is Split.VALIDATION)]
    if not rows:
        raise DataError(f"{pairs.where}: {len(pairs)} rows are too few to set some aside.", help="give at least 20.")
    taught = read_targets(targets, pairs) if targets is not None and name is Split.TRAIN else {}
    if targets is not None and name is Split.TRAIN:
        count = sum(pairs.numbers[row] in taught for row in rows)
        remark(f"{targets}: {count:,} of {len(rows):,} training examples learn its texts instead of their reference.")
    return tuple(
        Example(
            f"{kind}/{pairs.numbers[row]}",
            (pairs.sources[row],),
            Targets(pairs.references[row], taught.get(pairs.numbers[row], pairs.references[row][0])),
        )
        for row in rows
    )


def _drawn(pairs: Pairs, rows: Sequence[int], count: int, purpose: str) -> frozenset[int]:
    """Rows that are set aside: all of a source text, so that none of its translations is trained on."""
    drawn = draw_groups([(str(row), pairs.sources[row]) for row in rows], count, purpose)
    return frozenset(map(int, drawn))


# ---- rows of tokens


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[list[np.ndarray], int]:
    """The tokens of each text, and how many texts lost some."""
    import numpy as np

    rows: list[np.ndarray] = []
    cut = 0
    for first in range(0, len(texts), _TEXTS_AT_ONCE):
        for row in tokenizer.encode_batch_fast(list(texts[first : first + _TEXTS_AT_ONCE])):
            rows.append(np.asarray(row.ids, dtype=np.int32))
            cut += bool(row.overflowing)
    return rows, cut


def _shifted(row: np.ndarray, start: int) -> np.ndarray:
    """What a decoder reads to write `row`: the start token, and all tokens but the last."""
    import numpy as np

    return np.concatenate([np.asarray([start], dtype=row.dtype), row[:-1]])


def _refuse_language_codes(tokenizer: Tokenizer) -> None:
    code = next((token for token in tokenizer.encode("").tokens if _LANGUAGE_CODE.fullmatch(token)), None)
    if code is not None:
        raise DataError(
            f"the tokenizer puts the code of a language around each text ({code}), as those of mBART, M2M100 and NLLB do.",
            help="such models are not supported; start from one of a single pair of languages, such as Helsinki-NLP/opus-mt-en-de.",
        )


def _special_tokens(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    names = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None


def _without(special: re.Pattern[str] | None, texts: Sequence[str], data: str) -> list[str]:
    """The texts without the tokenizer's special tokens, which would end a text in its middle or hide a part of it; said and counted."""
    if special is None:
        return list(texts)
    held = [row for row, text in enumerate(texts) if special.search(text)]
    if not held:
        return list(texts)
    first = special.search(texts[held[0]])
    token = first[0] if first else ""
    remark(
        f"{data}: {len(held):,} of {len(texts):,} texts hold special tokens of the tokenizer, such as {token}: they are left out there."
    )
    clean = list(texts)
    for row in held:
        clean[row] = " ".join(special.sub(" ", texts[row]).split())
    return clean


def _check_unknown(tokenizer: Tokenizer, rows: Sequence[np.ndarray], side: str, data: str) -> None:
    """Says if many tokens are unknown to the tokenizer; DataError if most are: it was made for another language."""
    unknown = next((found for token in _UNKNOWN if (found := tokenizer.token_to_id(token)) is not None), None)
    total = sum(map(len, rows))
    if unknown is None or not total:
        return
    count = sum(int((row == unknown).sum()) for row in rows)
    if count > _MOST * total:
        raise DataError(
            f"{data}: {count / total:.0%} of the tokens of the texts to be {side} are unknown to the model's tokenizer.",
            help="it lacks the characters of this language: start from a model that was made for it.",
        )
    if count > _MANY * total:
        remark(f"{data}: {count / total:.1%} of the tokens of the texts to be {side} are unknown to the model's tokenizer.")


def _texts(outputs: Outputs) -> list[str]:
    texts = list(map(str, outputs["text"]))
    wrong = next((text for text in outputs["text"] if not isinstance(text, str)), None)
    if wrong is not None:
        raise TypeError(f"outputs['text'] holds {shown(wrong)}, which is no text")
    return texts
