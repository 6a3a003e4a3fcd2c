"""What tags of words mean: schemes that write spans as tags, how they are told apart, and the spans and F1 as seqeval counts them.

BIO begins a span with B and goes on with I. IOB1 begins it with I, unless a span of the same type ends just before. BIOES ends it with
E and marks a span of one word with S; BILOU calls these L and U, BMES calls the inside M. Plain tags (PER, O) have no letter: a span is
a run of one tag, and without an outside tag (NOUN, VERB) there are no spans.

Spans are those of seqeval's `get_entities` (https://github.com/chakki-works/seqeval, 1.2), which counts as conlleval does: an inside tag
without a beginning begins a span. It knows the letters B, I, E and S, so those of BILOU and BMES are read as these, and a plain tag PER
as I-PER: seqeval would take P for the letter and ER for the type, and ORG for O.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from slimformer.errors import ExtraError

if TYPE_CHECKING:
    import numpy as np

OUTSIDE = "O"
TAG_METRICS = ("f1", "precision", "recall", "accuracy")
Span = tuple[str, int, int]  # type, first word, last word
_PREFIXED = re.compile(r"([BIMLEUSWbimleusw])([-_:.])(\S.*)")
_SUFFIXED = re.compile(r"(\S*[^\s_:.-])[-_:.]([BIMLEUSW])")  # PER-B
_BARE = frozenset("BIMLEUSW")
_LETTERS = {"M": "I", "L": "E", "U": "S", "W": "S"}  # of other schemes, as BIOES has them
_OUTSIDES = ("o", "out", "outside", "other", "null", "none", "0")


@dataclass(frozen=True)
class Tagset:
    """The names of tags, read. `parts` are the letter (of BIOES) and the type of each; `plain` ones all have the letter I.

    Without an `outside` tag there are no spans.
    """

    names: tuple[str, ...]
    parts: tuple[tuple[str, str], ...]
    plain: bool
    outside: str

    @staticmethod
    def of(names: Iterable[str]) -> Tagset:
        """These names, read: they have letters if all but one outside tag begin with one.

        >>> Tagset.of(["O", "B-PER", "I-PER"]).scheme, Tagset.of(["NOUN", "VERB"]).spans(["NOUN", "NOUN"])
        ('BIO', [])
        """
        names = tuple(dict.fromkeys(names))
        outside = next((name for name in names if name.casefold() == "o"), "")
        rest = [name for name in names if name != outside]
        if not outside:
            others = [name for name in rest if not has_letter(name)]
            outside = others[0] if len(others) == 1 and len(rest) > 1 and others[0].casefold() in _OUTSIDES else ""
            rest = [name for name in rest if name != outside]
        last = bool(rest) and all(map(_SUFFIXED.fullmatch, rest)) and not all(map(has_letter, rest))
        plain = not rest or not (last or all(map(has_letter, rest)))
        read = _last_letter if last else _letter
        parts = tuple((OUTSIDE, "") if name == outside and outside else ("I", name) if plain else read(name) for name in names)
        return Tagset(names, parts, plain, outside or ("" if plain else OUTSIDE))

    @property
    def has_spans(self) -> bool:
        return bool(self.outside)

    @cached_property
    def chunks(self) -> Mapping[str, str]:
        """Each name as seqeval reads it: "B-PER" for "B-PER", "S-PER" for "U_PER", "I-PER" for the plain "PER"."""
        return {
            name: OUTSIDE if letter == OUTSIDE else f"{letter}-{kind}"
            for name, (letter, kind) in zip(self.names, self.parts, strict=True)
        }

    @cached_property
    def types(self) -> tuple[str, ...]:
        """The types of spans, sorted."""
        return tuple(sorted({kind for letter, kind in self.parts if letter != OUTSIDE}))

    @cached_property
    def scheme(self) -> str:
        """The scheme that the names alone tell: "plain", "IO", "BIO", "IOB1" if a type has no B but an I, or "BIOES"."""
        if self.plain:
            return "plain"
        letters: dict[str, set[str]] = {}
        for letter, kind in self.parts:
            if letter != OUTSIDE:
                letters.setdefault(kind, set()).add(letter)
        every = set().union(*letters.values()) if letters else set()
        if every & {"E", "S"}:
            return "BIOES"
        if "B" not in every:
            return "IO"
        return "BIO" if all("B" in some for some in letters.values()) else "IOB1"

    def spans(self, tags: Sequence[str]) -> list[Span]:
        """The spans of a sentence's tags, as seqeval's `get_entities` gives them; none for tags without an outside one."""
        if not self.has_spans:
            return []
        return [(kind, first, last) for kind, first, last in _entities()([self.chunks[tag] for tag in tags])]

    def name(self, letter: str, kind: str) -> str:
        """The name of the tag with this letter and type; one that is not there gets a name like the others."""
        known = self.ids.get((letter, kind))
        if known is not None:
            return self.names[known]
        return self.outside if letter == OUTSIDE else kind if self.plain else f"{letter}-{kind}"

    def tags(self, spans: Iterable[Span], count: int) -> list[tuple[str, str]]:
        """The letter and the type of each of `count` words that these spans have in this scheme."""
        found = [(OUTSIDE, "")] * count
        before = -2, ""
        for kind, first, last in spans:
            letters = ["I"] * (last + 1 - first)
            if self.scheme == "BIOES":
                letters[0], letters[-1] = ("B", "E") if len(letters) > 1 else ("S", "S")
            elif self.scheme == "BIO" or (self.scheme == "IOB1" and before == (first - 1, kind) and ("B", kind) in self.ids):
                letters[0] = "B"
            found[first : last + 1] = [(letter, kind) for letter in letters]
            before = last, kind
        return found

    @cached_property
    def places(self) -> Mapping[str, int]:
        """The place of each name."""
        return {name: index for index, name in enumerate(self.names)}

    @cached_property
    def ids(self) -> Mapping[tuple[str, str], int]:
        """The place of each letter and type among the names."""
        return {part: index for index, part in enumerate(self.parts)}


def has_letter(name: str) -> bool:
    """Whether a tag begins with the letter of a scheme: "B-PER", "U_PER", or "I" alone."""
    return _PREFIXED.fullmatch(name) is not None or name in _BARE


@lru_cache(maxsize=4096)
def _letter(name: str) -> tuple[str, str]:
    match = _PREFIXED.fullmatch(name)
    letter, kind = (match[1].upper(), match[3]) if match else (name, "_")
    return _LETTERS.get(letter, letter), kind


def _last_letter(name: str) -> tuple[str, str]:
    match = _SUFFIXED.fullmatch(name)
    assert match is not None
    return _LETTERS.get(match[2], match[2]), match[1]


def complete(names: Sequence[str]) -> tuple[str, ...]:
    """Names of tags in their usual order, the outside one first, with all letters that the scheme has for each of its types.

    >>> complete(["B-PER", "I-PER", "B-LOC"])
    ('O', 'B-LOC', 'I-LOC', 'B-PER', 'I-PER')
    """
    found = Tagset.of(names)
    rest = [name for name in found.names if name != found.outside]
    if found.plain or not all(map(has_letter, rest)):  # no letters, or letters that stand last
        return tuple(([found.outside] if found.outside else []) + sorted(rest))
    first = rest[0]
    match = _PREFIXED.fullmatch(first)
    joint = match[2] if match else ""
    written = {_letter(name)[0]: name[0] for name in found.names if name != found.outside}
    if {"E", "S"} & set(written):
        of_others = {"I": "M", "E": "E", "S": "S"} if written.get("I") == "M" else {}
        bilou = {"E": "L", "S": "U"} if {written.get("E"), written.get("S")} & {"L", "U"} else {}
        written = {"B": "B", "I": "I", "E": "E", "S": "S"} | of_others | bilou | written
    elif "B" in written:
        written = {"B": "B", "I": "I"} | written
    if first[0].islower():
        written = {letter: name.lower() for letter, name in written.items()}
    order = [written[letter] for letter in "BIES" if letter in written]
    bare = found.types == ("_",) and not joint
    return (found.outside, *(letter if bare else f"{letter}{joint}{kind}" for kind in found.types for letter in order))


def scheme_of(sequences: Iterable[Sequence[str]], tagset: Tagset) -> str:
    """The scheme of sentences' tags: that of the names, and of B and I by what spans begin with, for the most part."""
    if tagset.scheme not in ("BIO", "IOB1"):
        return tagset.scheme
    begun = {"B": 0, "I": 0}
    for tags in sequences:
        before = ""
        for tag in tags:
            letter, kind = tagset.parts[tagset.places[tag]]
            if letter != OUTSIDE and kind != before:
                begun[letter] += 1
            before = kind
    return "IOB1" if begun["I"] > 10 * begun["B"] else "BIO"


def break_in(tags: Sequence[str], tagset: Tagset, scheme: str) -> int | None:
    """The first word whose tag breaks the scheme; None if none does."""
    previous, kind_before = OUTSIDE, ""
    for place, tag in enumerate([*tags, None]):
        letter, kind = tagset.parts[tagset.places[tag]] if tag is not None else (OUTSIDE, "")
        goes_on = previous in "BI" and kind == kind_before
        if scheme == "BIO" and letter == "I" and not goes_on:
            return place
        if scheme == "IOB1" and letter == "B" and kind != kind_before:
            return place
        if scheme == "BIOES":
            if letter in "IE" and not goes_on:
                return place
            if previous in "BI" and not (letter in "IE" and goes_on):
                return place - 1
        previous, kind_before = letter, kind
    return None


# -- Counting ------------------------------------------------------------------------------------------------------------------

COUNTS = ("spans", "predicted", "correct", "words", "right")


def count_spans(wanted: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], tagset: Tagset) -> np.ndarray:
    """Of each sentence: spans that are there, that are predicted, that are both; words, and those with the right tag: (sentences, 5)."""
    import numpy as np

    rows = []
    for gold, told in zip(wanted, predicted, strict=True):
        there, said = set(tagset.spans(gold)), set(tagset.spans(told))
        right = sum(one == other for one, other in zip(gold, told, strict=True))
        rows.append((len(there), len(said), len(there & said), len(gold), right))
    return np.asarray(rows, dtype=np.int64).reshape(-1, len(COUNTS))


def scores_of(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and F1 of spans and the accuracy of words, of counts (..., 5); 0 where nothing is counted: (...) each."""
    import numpy as np

    there, said, both, words, right = np.moveaxis(np.asarray(counts, dtype=np.float64), -1, 0)

    def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)

    return {
        "f1": share(2 * both, there + said),
        "precision": share(both, said),
        "recall": share(both, there),
        "accuracy": share(right, words),
    }


def _entities() -> Callable[[list[str]], list[Span]]:
    try:
        from seqeval.metrics.sequence_labeling import get_entities
    except ImportError:
        raise ExtraError(
            "spans of tags are counted by the package seqeval.", help="pip install 'slimformer[tagging]'"
        ) from None
    return get_entities  # type: ignore[no-any-return]
