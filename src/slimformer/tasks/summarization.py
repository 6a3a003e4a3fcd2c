"""Summarization: a model reads a text and writes a short one, judged by ROUGE.

Texts are tables, JSON lines, parallel files (`train.source` and `train.target`) or a data set of the hub. A text may be a list of
sentences, and a summary a list of several that all count. ROUGE (Lin 2004, https://aclanthology.org/W04-1013) is that of Google's
rouge-score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slimformer.tasks._generation import Generation
from slimformer.tasks._text_metrics import ROUGE, rouge_scores, rouge_signature
from slimformer.tasks.base import Example, Split, option

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Summarization(Generation):
    """Summarization.

    `data` is a folder with train.* and dev.* (tables, or the parallel texts `train.source` and `train.target`), one file, or a hub name;
    or data in memory. `target_data` is the file of summaries if `data` is one of texts and their names do not say that they belong
    together. `dev` names other data to report on: a file, or a split of the data. `source` and `target` are the columns of texts and of
    summaries; without them usual names are looked for (document and summary, article and highlights, ...), and the log says what was
    taken.

    `prefix` is put before each text. `max_length` and `max_target_length` count tokens; longer texts are cut off. `label_smoothing` is
    the share of a label that all words get. `train_rows` is how many rows to train on. `targets` are other summaries to train on, such
    as the teacher's: a text with a line for each row of the training data, a table with the columns id and text, or in Python a dict of
    these. `validation_share` of the training rows, but between 200 and 2,000 and at most a fifth, is set aside.

    `metric` is the F1 of "rouge1", "rouge2" or "rougeL": against the best of several references, words stemmed, the mean over texts.
    `start_id` and `end_id` are the tokens that the model's decoder starts and ends with; `bind` fills them.

    >>> from slimformer.tasks.base import Split
    >>> rows = [{"document": ["It rained.", f"It was day {n}."], "summary": [f"Rain, day {n}.", "Rain."]} for n in range(50)]
    >>> example = Summarization(data=rows).split(Split.DEV)[0]
    >>> example.texts, example.answer.references
    (('It rained. It was day 3.',), ('Rain, day 3.', 'Rain.'))
    """

    metrics: ClassVar[tuple[str, ...]] = ROUGE

    metric: str = option("rougeL", "The metric that counts: rouge1, rouge2 or rougeL.")
    max_length: int = option(512, "Tokens an input may have; longer ones are cut off.")

    def _name(self) -> str:
        return "summarization"

    def signatures(self) -> Mapping[str, str]:
        return dict.fromkeys(ROUGE, rouge_signature())

    def notes(self) -> tuple[str, ...]:
        foreign = [
            item for item in self.split(Split.DEV) if 2 * sum(map(str.isascii, item.answer.train)) < len(item.answer.train)
        ]
        told = super().notes()
        if not foreign:
            return told
        return (
            *told,
            f"{self.data}: ROUGE counts ASCII letters and digits alone, of which {len(foreign):,} summaries of dev have few.",
        )

    def _text_scores(self, texts: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        return {name: float(values.mean()) if len(values) else 0.0 for name, values in self._rouge(texts, examples).items()}

    def _text_credit(self, texts: Sequence[str], examples: Sequence[Example]) -> np.ndarray:
        """ROUGE of each text: the score is their mean."""
        return self._rouge(texts, examples)[self.metric]

    def _rouge(self, texts: Sequence[str], examples: Sequence[Example]) -> dict[str, np.ndarray]:
        return rouge_scores(texts, [item.answer.references for item in examples])
