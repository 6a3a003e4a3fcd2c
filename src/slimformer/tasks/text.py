"""Plain text: a model learns to find masked words, and on request whether one text follows another, before any task.

Devlin et al.: BERT (2019, https://arxiv.org/abs/1810.04805, section 3.1 and appendix A.1): 15 % of the tokens of a text are asked for, at
least one; of these 80 % are masked, 10 % become another token and 10 % stay. Half of the pairs for next-sentence prediction are
neighbours. Differences: a line is a text, nothing is packed to full length; which tokens are asked for is drawn from a text's place in
the data, in each of `masks` copies anew, and not in each epoch; a stranger comes from any other place of the same split.
"""

from __future__ import annotations

import math
import os.path
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slimformer.data.splits import FOR_DEV, FOR_VALIDATION, dev_count, draw_groups, validation_count
from slimformer.data.texts import read_text
from slimformer.errors import DataError, ModelError, RecipeError, nearest
from slimformer.tasks._losses import kl_divergence
from slimformer.tasks.base import IGNORED, Example, Features, Outputs, Split, Task

if TYPE_CHECKING:
    import numpy as np
    import torch
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig, PreTrainedModel

_METRICS = ("accuracy", "likelihood", "next_sentence")
_MASKS = ("[MASK]", "<mask>", "<MASK>", "<|mask|>")
_MASKED, _OTHER = 0.8, 0.1  # shares of the tokens that are asked for; the rest stays as it is
_BLOCK = 32  # neighbouring lines of a document that go to one split together: a large document must not be all of a split
_TEXTS_AT_ONCE = 4096  # encoded together: bounds the memory of the tokenizer's own objects
_NEXT, _STRANGER = 0, 1  # the classes of a pair, in BERT's order
_SHAPE = "put a sentence or a paragraph on each line; blank lines tell documents apart."

_Batch = Mapping[str, "torch.Tensor | np.ndarray"]


@dataclass(frozen=True)
class Text(Task):
    """Language modelling on a file of plain text; the model that leaves is for a recipe of a task to start from.

    - `data`: a text file with a sentence or a paragraph on each line, packed or not. Blank lines tell documents apart.
    - `dev`: such a file to report on; without it a tenth of `data` is set aside, by whole documents (blocks of 32 lines, if they
      are longer).
    - `next_sentence`: whether pairs of neighbouring lines are told from others too, as BERT was pre-trained. Order counts then, and
      the model must be a BERT.
    - `share`: the share of a text's tokens that are asked for.
    - `masks`: copies of the training texts, each masked in its own way; an epoch is a pass over all of them.
    - `metric`: "accuracy" of the masked words; "likelihood", the geometric mean of the probability of the right word, which is one
      over the perplexity; or the accuracy in "next_sentence".
    - `validation_share`: of the training texts, but between 200 and 2,000 and at most a fifth, is set aside to choose on.

    Raises:
        RecipeError: It names every option that is wrong. What is wrong with the data becomes a DataError when it is read.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("text.txt").write_text("A line.\\nThe next one.\\n\\nAnother document.\\n" * 30)
        >>> task = Text(data="text.txt", masks=2)
        >>> [len(task.split(split)) for split in (Split.TRAIN, Split.VALIDATION, Split.DEV)]
        [126, 18, 9]
    """

    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    pretraining: ClassVar[bool] = True
    paths: ClassVar[tuple[str, ...]] = ("data", "dev")

    data: str = ""
    dev: str | None = None
    next_sentence: bool = False
    share: float = 0.15
    masks: int = 1
    metric: str = "accuracy"
    max_length: int = 128
    validation_share: float = 0.05

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", os.fspath(self.data))
        mistakes = list(self._mistakes())
        if mistakes:
            raise RecipeError("the task text cannot be set up like that.", facts=mistakes)
        if self.next_sentence:  # the class with both heads
            object.__setattr__(self, "auto_class", "AutoModelForPreTraining")
            object.__setattr__(self, "outputs", ("prediction_logits", "seq_relationship_logits"))

    def _mistakes(self) -> Iterable[str]:
        if self.metric not in _METRICS:
            yield f"metric: there is no '{self.metric}'; {nearest(self.metric, _METRICS)}"
        elif self.metric == "next_sentence" and not self.next_sentence:
            yield "metric: next_sentence is measured if next_sentence is true"
        if not 0 < self.share < 1:
            yield f"share: above 0 and below 1, not {self.share}"
        if self.masks < 1:
            yield f"masks: at least 1, not {self.masks}"
        if not 8 <= self.max_length <= 100_000:
            yield f"max_length: at least 8 tokens, not {self.max_length}"
        if not 0 < self.validation_share < 0.5:
            yield f"validation_share: a share above 0 and below 0.5, not {self.validation_share}"

    def title(self) -> str:
        return f"text {Path(self.data).name}"

    # ---- data

    def split(self, name: Split) -> Sequence[Example]:
        texts = self._texts(Split(name))
        copies = self.masks if name is Split.TRAIN else 1
        examples = [example for copy in range(copies) for example in self._examples(texts, Split(name), copy)]
        if not examples:
            what = "neighbouring lines" if self.next_sentence else "texts"
            raise DataError(f"{self.data} has too few {what} to set some aside for {name}.", help=_SHAPE)
        return examples

    def _texts(self, name: Split) -> list[_Line]:
        """The lines of a split, in order."""
        if not self.data:
            raise DataError("the task text has no data.", help=f"name a text file: data: ./text.txt. In it, {_SHAPE}")
        if name is Split.DEV and self.dev is not None:
            return list(_lines(self.dev))
        lines = list(_lines(self.data))
        groups = self._groups(lines)
        if self.dev is None:
            dev = draw_groups(groups, dev_count(len(lines)), FOR_DEV)
            if name is Split.DEV:
                return [line for line in lines if line.id in dev]
            lines = [line for line in lines if line.id not in dev]
            groups = [group for group in groups if group[0] not in dev]
        held = draw_groups(groups, validation_count(self.validation_share, len(lines)), FOR_VALIDATION)
        return [line for line in lines if (line.id in held) == (name is Split.VALIDATION)]

    def _groups(self, lines: Sequence[_Line]) -> list[tuple[str, tuple[int, int]]]:
        """Each line's id, and what goes to one split with it: a block of its document; of texts without order, itself."""
        ordered = self.next_sentence or bool(lines and lines[-1].document)
        first = {line.document: line.place for line in reversed(lines)}
        size = _BLOCK if ordered else 1
        return [(line.id, (line.document, (line.place - first[line.document]) // size)) for line in lines]

    def _examples(self, lines: Sequence[_Line], name: Split, copy: int) -> list[Example]:
        marked = f"{name}/{copy}" if copy else str(name)
        if not self.next_sentence:
            return [Example(f"{marked}/{line.id}", (line.text,), None) for line in lines]
        import numpy as np

        draw = np.random.default_rng(zlib.crc32(marked.encode()))
        examples = []
        for place in range(len(lines) - 1):
            first, second = lines[place], lines[place + 1]
            if first.document != second.document or second.place != first.place + 1:
                continue  # the end of a document, or of what this split has of it
            strange = len(lines) > 2 and draw.random() < 0.5
            if strange:
                other = int(draw.integers(len(lines) - 2))
                second = lines[other + 2 * (other >= place)]  # any but these two
            examples.append(Example(f"{marked}/{first.id}", (first.text, second.text), _STRANGER if strange else _NEXT))
        return examples

    # ---- model

    def encode(self, examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> Features:
        import numpy as np

        from slimformer.data.tokenizer import cutting, pad_id_of

        mask, words = _mask_of(tokenizer), _words_of(tokenizer)
        columns: dict[str, list[Any]] = {"input_ids": [], "labels": []}
        if self.next_sentence:
            columns |= {"token_type_ids": [], "next": []}
        truncated = 0
        with cutting(tokenizer, max_length):
            for start in range(0, len(examples), _TEXTS_AT_ONCE):
                some = examples[start : start + _TEXTS_AT_ONCE]
                rows = tokenizer.encode_batch_fast([item.texts if len(item.texts) > 1 else item.texts[0] for item in some])
                for item, row in zip(some, rows, strict=True):
                    ids, special = np.asarray(row.ids, dtype=np.int32), np.asarray(row.special_tokens_mask, dtype=bool)
                    masked, labels = mask_tokens(ids, special, self.share, mask, words, item.id)
                    columns["input_ids"].append(masked)
                    columns["labels"].append(labels)
                    if self.next_sentence:
                        columns["token_type_ids"].append(np.asarray(row.type_ids, dtype=np.int8))
                        columns["next"].append(item.answer)
                    truncated += bool(row.overflowing)
        return Features(columns, range(len(examples)), truncated, pad_id_of(tokenizer))

    def configure(self) -> Mapping[str, Any]:
        return {}

    def bind(self, config: PretrainedConfig | Mapping[str, Any]) -> Text:
        kind = config.get("model_type") if isinstance(config, Mapping) else config.model_type
        if self.next_sentence and str(kind).removeprefix("slimformer_") != "bert":
            raise DataError(
                f"a {kind} model has no head that tells whether one text follows another.",
                help="leave next_sentence out: such models were pre-trained on masked words alone.",
            )
        return self

    def decoding(self, model: PreTrainedModel, batch: _Batch) -> AbstractContextManager[None]:
        import torch

        from slimformer.hooks.decoding import decoding_at

        if "labels" not in batch:
            return nullcontext()
        return decoding_at(model, torch.as_tensor(batch["labels"]) != IGNORED)

    def loss(self, output: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Cross entropy of the tokens that are asked for, a mean; that of the pairs is added to it, if the batch has their answers."""
        from torch.nn import functional

        words, wanted = self._asked(output, batch)
        lost = functional.cross_entropy(words, wanted, reduction="sum") / max(1, len(wanted))
        if self.next_sentence and "next" in batch:
            lost = lost + functional.cross_entropy(output[self.outputs[1]].float(), batch["next"])
        return lost

    def divergence(
        self,
        student: Mapping[str, torch.Tensor],
        teacher: Mapping[str, torch.Tensor],
        batch: Mapping[str, torch.Tensor],
        temperature: float,
    ) -> torch.Tensor:
        """KL at the tokens that are asked for; that of the pairs is added to it."""
        ours, theirs = (self._asked(side, batch)[0] for side in (student, teacher))
        apart = kl_divergence(ours, theirs, temperature) if len(ours) else ours.sum()
        if self.next_sentence:
            ours, theirs = (side[self.outputs[1]].float() for side in (student, teacher))
            apart = apart + kl_divergence(ours, theirs, temperature)
        return apart

    def _asked(self, output: Mapping[str, torch.Tensor], batch: _Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores of the tokens that are asked for, (tokens, words), and the right words, (tokens,)."""
        import torch

        scores = output[self.outputs[0]].float()
        labels = torch.as_tensor(batch["labels"], device=scores.device)  # (batch, seq)
        chosen = labels != IGNORED
        return scores[chosen] if scores.ndim == 3 else scores, labels[chosen]  # those of all tokens, if it was not told which

    # ---- judging

    def kept(self, output: Mapping[str, torch.Tensor], batch: _Batch) -> dict[str, torch.Tensor]:
        """By row: tokens asked for, those that were found, and the sum of the logarithms of the right ones' probabilities."""
        import torch

        words, wanted = self._asked(output, batch)
        labels = torch.as_tensor(batch["labels"], device=words.device)
        row = (labels != IGNORED).nonzero()[:, 0]
        found = (words.argmax(-1) == wanted).float()
        likely = torch.log_softmax(words, -1).gather(1, wanted[:, None])[:, 0]
        zeros = words.new_zeros(len(labels))
        sums = {"asked": torch.ones_like(found), "found": found, "likely": likely}
        judged = {name: zeros.index_add(0, row, values) for name, values in sums.items()}
        if self.next_sentence:
            told = output[self.outputs[1]].argmax(-1)
            judged["told"] = (told == torch.as_tensor(batch["next"], device=told.device)).float()
        return judged

    def score(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> dict[str, float]:
        asked = max(1.0, float(outputs["asked"].sum()))
        scores = {
            "accuracy": float(outputs["found"].sum()) / asked,
            "likelihood": math.exp(float(outputs["likely"].sum()) / asked),
        }
        return scores | ({"next_sentence": float(outputs["told"].mean())} if self.next_sentence else {})

    def credit(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> np.ndarray:
        import numpy as np

        if self.metric == "next_sentence":
            return np.asarray(outputs["told"], dtype=np.float64)
        asked = np.maximum(outputs["asked"], 1).astype(np.float64)
        return np.exp(outputs["likely"] / asked) if self.metric == "likelihood" else outputs["found"] / asked

    def answers(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> list[str]:
        return [f"{int(found)} of {int(asked)} words" for found, asked in zip(outputs["found"], outputs["asked"], strict=True)]


def mask_tokens(
    ids: np.ndarray, special: np.ndarray, share: float, mask: int, words: np.ndarray, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """A text's ids with some masked or replaced, and its labels: the right id where it is asked for, else `IGNORED`; (tokens,) each.

    Tokens that are `special` (tokens,) are never asked for. Others are replaced by one of `words`. `name` decides the draw.
    """
    import numpy as np

    draw = np.random.default_rng(zlib.crc32(name.encode()))
    free = np.flatnonzero(~special)
    chosen = draw.permutation(free)[: max(1, round(share * len(free)))]
    labels = np.full(len(ids), IGNORED, dtype=np.int32)
    labels[chosen] = ids[chosen]
    fate, masked = draw.random(len(chosen)), ids.copy()
    masked[chosen[fate < _MASKED]] = mask
    other = chosen[(fate >= _MASKED) & (fate < _MASKED + _OTHER)]
    masked[other] = draw.choice(words, len(other))
    return masked, labels


def _mask_of(tokenizer: Tokenizer) -> int:
    found = next((tokenizer.token_to_id(token) for token in _MASKS if tokenizer.token_to_id(token) is not None), None)
    if found is None:
        raise ModelError(
            "the model's tokenizer has no token that masks a word.",
            facts=[f"looked for: {', '.join(_MASKS)}"],
            help="take a model that was pre-trained with one, such as a BERT or a RoBERTa.",
        )
    return int(found)


def _words_of(tokenizer: Tokenizer) -> np.ndarray:
    """The ids that may stand in for a word: all but special tokens."""
    import numpy as np

    special = [index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    return np.setdiff1d(np.arange(tokenizer.get_vocab_size(), dtype=np.int32), np.asarray(special, dtype=np.int32))


@dataclass(frozen=True)
class _Line:
    """A text, its line in the file, and the number of its document, from 0."""

    text: str
    place: int
    document: int

    @property
    def id(self) -> str:
        return str(self.place)


def _lines(data: str) -> tuple[_Line, ...]:
    file = Path(os.path.expanduser(data))
    stat = file.stat() if file.is_file() else None
    return _read_lines(file, None if stat is None else (stat.st_size, stat.st_mtime_ns))


@lru_cache(maxsize=4)
def _read_lines(file: Path, stamp: tuple[int, int] | None) -> tuple[_Line, ...]:
    """The lines of a text file that are not blank; a file that was changed has another `stamp`."""
    lines: list[_Line] = []
    document, blank = 0, False
    for place, line in enumerate(read_text(file, _SHAPE).split("\n")):
        text = line.strip()
        if not text:
            blank = bool(lines)
            continue
        document, blank = document + blank, False
        lines.append(_Line(text, place, document))
    return tuple(lines)
