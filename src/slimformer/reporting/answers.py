"""The examples that two models answer differently, the worst changes first, and how much of a long text is shown of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from slimformer.measuring.scoring import Scored
from slimformer.tasks.base import Example

BRIEF = 320  # characters that are shown of a longer text


@dataclass(frozen=True)
class ChangedAnswer:
    """An example that two models answer differently. `gain` is the new answer's credit minus the old one's."""

    id: str
    texts: tuple[str, ...]
    gold: str
    before: str
    after: str
    gain: float


def changed_answers(before: Scored, after: Scored, examples: Sequence[Example]) -> tuple[ChangedAnswer, ...]:
    """The examples that two models answer differently: the largest losses first, then the largest gains."""
    changed = [
        ChangedAnswer(
            id=example.id,
            texts=tuple(example.texts),
            gold="" if example.answer is None else str(example.answer),
            before=old,
            after=new,
            gain=float(gain),
        )
        for example, old, new, gain in zip(examples, before.answers, after.answers, after.credit - before.credit, strict=True)
        if old != new
    ]
    return tuple(sorted(changed, key=lambda answer: (answer.gain >= 0, -abs(answer.gain))))


def shortened_answer(answer: ChangedAnswer) -> ChangedAnswer:
    """The same example with long texts cut to where the answers are."""
    return replace(answer, texts=tuple(excerpt(text, (answer.gold, answer.after, answer.before)) for text in answer.texts))


def excerpt(text: str, around: Sequence[str]) -> str:
    """At most BRIEF characters, cut between words: around the first of these answers that occurs, or from the start."""
    if len(text) <= BRIEF:
        return text
    parts = [part for answer in around for part in answer.split(" | ") if part]
    place = next((text.find(part) for part in parts if part in text), 0)
    begin = max(0, min(place - BRIEF // 3, len(text) - BRIEF))
    shown = text[begin : begin + BRIEF]
    if begin + BRIEF < len(text):
        shown = shown.rsplit(" ", 1)[0] + " …"
    return f"… {shown[shown.find(' ', 0, place - begin) + 1 :]}" if begin else shown
