"""Translation from one language to another, by a model that reads a sentence and writes one: judged by BLEU and chrF.

Texts are parallel files (`train.en` and `train.de`), tables, JSON lines or a data set of the hub. BLEU (Papineni et al. 2002,
https://aclanthology.org/P02-1040) and chrF (Popovic 2015, https://aclanthology.org/W15-3049) are sacrebleu's (Post 2018,
https://aclanthology.org/W18-6319), with its signatures in the notes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from slimformer.errors import nearest
from slimformer.tasks._generation import Generation
from slimformer.tasks._text_metrics import CORPUS_METRICS, TOKENS, corpus_counts, corpus_metric, of_counts
from slimformer.tasks.base import Example, Features, Outputs, Split, option

if TYPE_CHECKING:
    import numpy as np

_CUT_BY = {"zh": "zh", "zho": "zh", "cmn": "zh", "chinese": "zh", "ja": "char", "jpn": "char", "japanese": "char", "th": "char"}


@dataclass(frozen=True)
class Translation(Generation):
    """Translation.

    `data` is a folder of parallel texts (`train.en`, `train.de`, `val.en`, ..., packed or not) or of tables, one table, one file of a
    pair, or a hub name; or data in memory. `target_data` is the other file of two whose names do not say that they belong together.
    `dev` names other data to report on: a test set in the folder (`test_2016_flickr`), a split of the hub, or a file. `source` and
    `target` are the languages, suffixes or columns; without them usual names are looked for, English is translated from, and the log
    says what was taken.

    `prefix` is put before each text. `max_length` and `max_target_length` count tokens. `label_smoothing` is the share of a label that
    all words get (Szegedy et al. 2015). `train_rows` is how many pairs to train on. `targets` are other texts to train on, such as the
    teacher's translations (sequence-level distillation, Kim and Rush 2016): a text with a line for each row of the training data, a
    table with the columns id and text, or in Python a dict of these. `validation_share` of the training pairs, but between 200 and
    2,000 and at most a fifth, is set aside.

    `metric` is "bleu" or "chrf". `tokenize` is how BLEU cuts words, by sacrebleu's names; "auto" takes 13a, and characters for languages
    without spaces. `start_id` and `end_id` are the tokens that the model's decoder starts and ends with; `bind` fills them.

    >>> from slimformer.tasks.base import Split
    >>> task = Translation(data={"en": [f"room {n}" for n in range(50)], "de": [f"Raum {n}" for n in range(50)]}).settled()
    >>> task.source, task.target, [len(task.split(split)) for split in (Split.TRAIN, Split.VALIDATION, Split.DEV)]
    ('en', 'de', [36, 9, 5])
    >>> task.split(Split.DEV)[0].answer
    Targets(references=('Raum 3',), train='Raum 3')
    """

    metrics: ClassVar[tuple[str, ...]] = CORPUS_METRICS
    usual_for: ClassVar[tuple[str, ...]] = ("marian",)

    metric: str = option("bleu", "The metric that counts: bleu or chrf.")
    tokenize: str = "auto"

    def _mistakes(self) -> Iterable[str]:
        yield from super()._mistakes()
        if self.tokenize not in ("auto", *TOKENS):
            yield f"tokenize: there is no '{self.tokenize}'; {nearest(self.tokenize, ('auto', *TOKENS))}"

    def _name(self) -> str:
        return "translation"

    def _tokens(self) -> str:
        if self.tokenize != "auto":
            return self.tokenize
        target = self.target or next(iter(self._pairs().values())).sides[1]
        return _CUT_BY.get(re.split(r"[-_]", target.rpartition(".")[2].lower())[0], "13a")

    def signatures(self) -> Mapping[str, str]:
        references = [item.answer.references for item in self.split(Split.DEV)]
        told = {}
        for name in CORPUS_METRICS:
            metric = corpus_metric(name, self._tokens())
            corpus_counts(metric, [items[0] for items in references], references)  # the signature tells how many there are
            told[name] = f"sacrebleu|{metric.get_signature()}"
        return told

    def _text_scores(self, texts: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        return {name: of_counts(self._metric(name), self._counted(name, texts, examples).sum(0)) for name in CORPUS_METRICS}

    def _text_credit(self, texts: Sequence[str], examples: Sequence[Example]) -> np.ndarray:
        """BLEU or chrF of each text by itself. Their mean is not that of all texts, which `resampled` follows."""
        import numpy as np

        alone = corpus_metric(self.metric, self._tokens(), alone=True)
        return np.asarray([of_counts(alone, counts) for counts in self._counted(self.metric, texts, examples)])

    def resampled(
        self, outputs: Outputs, features: Features, examples: Sequence[Example], draws: Sequence[np.ndarray]
    ) -> np.ndarray | None:
        import numpy as np

        if "text" not in outputs:
            return None
        metric, counts = self._metric(self.metric), self._counted(self.metric, list(outputs["text"]), examples)
        return np.asarray([of_counts(metric, counts[draw].sum(0)) for draw in draws])

    def _metric(self, name: str) -> Any:
        return corpus_metric(name, self._tokens())

    def _counted(self, name: str, texts: Sequence[str], examples: Sequence[Example]) -> np.ndarray:
        """What a metric counts in each text: (examples, counts)."""
        return corpus_counts(self._metric(name), texts, [item.answer.references for item in examples])
