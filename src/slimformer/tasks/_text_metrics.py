"""Metrics of written texts: BLEU and chrF as sacrebleu has them, ROUGE as rouge-score has it. Both packages are optional.

BLEU and chrF of a set of texts are no means: they follow from counts that add up over texts. These counts are kept for each text, so that
the metric of a resample is a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from slimformer.errors import ExtraError

if TYPE_CHECKING:
    import numpy as np

CORPUS_METRICS = ("bleu", "chrf")
ROUGE = ("rouge1", "rouge2", "rougeL")
TOKENS = ("13a", "intl", "zh", "char", "none")  # how BLEU cuts words, by sacrebleu's names


def corpus_metric(name: str, tokens: str, *, alone: bool = False) -> Any:
    """sacrebleu's BLEU or chrF; ExtraError without the package.

    `alone`: for a text by itself, in which BLEU counts only the lengths of n-grams that the text has.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        raise _missing("BLEU and chrF need the package sacrebleu.") from None
    return BLEU(tokenize=tokens, effective_order=alone) if name == "bleu" else CHRF()


def corpus_counts(metric: Any, texts: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """What a corpus metric counts in each text: (texts, counts)."""
    import numpy as np

    most = max(map(len, references), default=1)
    streams = [[items[place] if place < len(items) else None for items in references] for place in range(most)]
    # the two functions of this module that begin with an underscore are those that sacrebleu's own bootstrap is made of
    return np.asarray(metric._extract_corpus_statistics(list(texts), streams), dtype=np.int64)


def of_counts(metric: Any, counts: np.ndarray) -> float:
    """The metric of counts that were added up, in [0, 1]."""
    return float(metric._compute_score_from_stats(counts.tolist()).score) / 100


def rouge_scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L of each text against its best reference, words stemmed: (texts,) each, in [0, 1]."""
    import numpy as np

    scorer = _rouge()
    rows = [scorer.score_multi(list(items), text) for text, items in zip(texts, references, strict=True)]
    return {name: np.asarray([row[name].fmeasure for row in rows], dtype=np.float64) for name in ROUGE}


def rouge_signature() -> str:
    """The package and its settings, as sacrebleu's signatures have them."""
    _rouge()
    return f"rouge-score|stem:yes|refs:best|aggregate:mean of f1|version:{version('rouge-score')}"


def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise _missing("ROUGE needs the package rouge-score.") from None
    return RougeScorer([*ROUGE], use_stemmer=True)


def _missing(what: str) -> ExtraError:
    return ExtraError(what, help="pip install 'slimformer[generation]'")
