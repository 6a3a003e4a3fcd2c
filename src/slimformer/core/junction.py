"""A junction: what stands at a layer, where the model itself decides, input by input, how much more is computed.

An `Exit` is a small classifier behind a layer: an input whose answer is sure enough leaves with it. A `Sieve` stands between a layer's
attention and its feed-forward: words that little attention goes to get no further. `Apart` (`apart.py`) is the place where two segments
meet, which attended apart in all layers before. A plan names the junctions by layer, so that a saved model is rebuilt with them.
Only data stands here, small enough for plan.json; `deciding.py`, `sieving.py` and `dividing.py` compute.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

from slimformer.core.apart import APART, Apart
from slimformer.core.plain_data import made_from

Confidence = Literal["entropy", "maximum", "patience"]
EXIT = "exit"  # what the module of an exit is called in its layer
SIEVE = "sieve"
SHARE_PARTS = 10_000  # a share is counted in these, so that no rounding decides how many words stay


@final
@dataclass(frozen=True)
class Exit:
    """A classifier behind a layer, and when an input leaves there. It reads the first token.

    `outputs`: classes, or 1 for a score. `confidence` and `threshold`: an input leaves if the entropy of its classes, in nats, is at
    most `threshold` ("entropy"); if the largest probability is at least `threshold` ("maximum"); or if so many exits in a row, up to
    this one, have given the answer of the one before, `patience` of them ("patience"): the same class, or a score that differs by
    at most `threshold`. `pooler`: a matrix and tanh stand before the last matrix.

    >>> Exit(2, "entropy", 0.3).parameters(8), Exit(2, "entropy", 0.3, pooler=True).parameters(8)
    (18, 90)
    """

    outputs: int
    confidence: Confidence = "entropy"
    threshold: float = 0.0
    patience: int = 0
    pooler: bool = False

    def problem(self) -> str | None:
        """Why there can be no such exit; None if there can."""
        if type(self.outputs) is not int or type(self.patience) is not int or type(self.pooler) is not bool:
            return "outputs and patience are whole numbers, and pooler is true or false"
        if self.confidence not in get_args(Confidence) or type(self.threshold) not in (int, float):
            return f"confidence is one of {', '.join(get_args(Confidence))}, and threshold is a number"
        if self.outputs < 1 or not math.isfinite(self.threshold) or self.threshold < 0:
            return "outputs must be 1 or more, and threshold 0 or above"
        return unreachable(self.confidence, self.threshold, self.patience, self.outputs)

    def parameters(self, width: int) -> int:
        """Numbers stored, for hidden states of this width."""
        return self.outputs * (width + 1) + (width * (width + 1) if self.pooler else 0)

    def to_data(self) -> dict[str, Any]:
        """The exit as plain data; `junction_from_data` gives it back."""
        return {"use": EXIT} | dataclasses.asdict(self)


@final
@dataclass(frozen=True)
class Sieve:
    """Words that leave at a layer, once its attention is computed. The first one, which a classifier reads, always stays.

    `share`: of the words that came so far, those that stay, rounded up; with a `threshold` it is the mean over examples, to which the
    threshold is settled again when weights change. `threshold`: a word stays if it gets so many times the attention that it would get
    if all words were alike, on average over the heads and the words that ask.

    >>> Sieve(0.5).problem() is None, Sieve(1.5).problem()
    (True, 'share is a number above 0, and at most 1')
    """

    share: float
    threshold: float | None = None

    def problem(self) -> str | None:
        """Why there can be no such sieve; None if there can."""
        if type(self.share) not in (int, float) or not 0 < self.share <= 1:
            return "share is a number above 0, and at most 1"
        if self.threshold is not None and (type(self.threshold) not in (int, float) or not 0 <= self.threshold < math.inf):
            return "threshold is a number from 0, or null"
        return None

    @property
    def parts(self) -> int:
        """The share in `SHARE_PARTS`."""
        return max(1, round(self.share * SHARE_PARTS))

    def parameters(self, width: int) -> int:
        """Numbers stored: none, at any width of the hidden states."""
        return 0

    def to_data(self) -> dict[str, Any]:
        """The sieve as plain data; `junction_from_data` gives it back."""
        return {"use": SIEVE} | dataclasses.asdict(self)


def operator_name(use: str, layer: str | None, number: int) -> str:
    """What an operator that only a junction needs is called in a file; `layer`: its layer's id, or None at the end of the model.

    >>> operator_name(SIEVE, "encoder.3", 7), junction_named("fused sieve/encoder.3/7"), junction_named("node_MatMul_7")
    ('sieve/encoder.3/7', ('sieve', 'encoder.3'), None)
    """
    return f"{use}/{layer or _END}/{number}"


def junction_named(name: str) -> tuple[str, str | None] | None:
    """The kind of the junction and its layer, if an operator has a name of `operator_name`, with a runtime's words around it or not."""
    found = re.search(rf"({EXIT}|{SIEVE})/([^/]+)/\d+", name)
    return None if found is None else (found[1], None if found[2] == _END else found[2])


Junction = Exit | Sieve | Apart
_END = "end"
_KINDS: Mapping[str, type[Junction]] = {EXIT: Exit, SIEVE: Sieve, APART: Apart}


def junction_from_data(data: Any, layer: str) -> Junction:
    """The junction that `to_data` wrote for a layer; PlanError for anything else.

    >>> junction_from_data(Exit(3, "maximum", 0.9).to_data(), "encoder.1") == Exit(3, "maximum", 0.9)
    True
    """
    return made_from(_KINDS, data, f"layer '{layer}'", "junction")


def unreachable(confidence: Confidence, threshold: float | None, patience: int | None, outputs: int) -> str | None:
    """Why no input, or every input, would leave at an exit with these options, whatever it says; None if it depends on the input.

    >>> unreachable("maximum", 1.0, None, 2)
    'the largest probability of 2 classes lies between 0.5 and 1, so no input reaches a threshold of 1'
    """
    if confidence == "patience":
        if patience is not None and patience < 1:
            return "patience must be 1 or more"
        return None
    if outputs == 1:
        return f"{confidence} is that of classes, and a score has none: take confidence: patience"
    if threshold is None:
        return None
    least, most = (0.0, math.log(outputs)) if confidence == "entropy" else (1 / outputs, 1.0)
    what = f"the {'entropy' if confidence == 'entropy' else 'largest probability'} of {outputs} classes lies between"
    span = f"{what} {least:.3g} and {most:.3g}"
    none, every = (
        (threshold <= least, threshold >= most) if confidence == "entropy" else (threshold >= most, threshold <= least)
    )
    if none:
        return f"{span}, so no input reaches a threshold of {threshold:.3g}"
    return f"{span}, so every input leaves at once with a threshold of {threshold:.3g}" if every else None
