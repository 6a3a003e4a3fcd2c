"""The built-in task: customer sentences with one of 24 intents, which the library makes itself, so that a demo needs no download.

Sentences are drawn from the grammar in `data/intents.txt`. Training, validation and dev sentences come from different templates, and
dev also has slot values and small talk of its own: a model is judged on sentences it could not have learnt by heart. The same options
give the same sentences on every machine. It is no benchmark: figures on it say nothing about other data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from slimformer.data.labels import order_as_model
from slimformer.errors import RecipeError
from slimformer.tasks._labelled import Labelled
from slimformer.tasks._metrics import CLASS_METRICS
from slimformer.tasks._own_metric import known_or_own
from slimformer.tasks.base import Example, Split, option

if TYPE_CHECKING:
    import numpy as np
    from transformers import PretrainedConfig

Lines = tuple[tuple[str, ...], tuple[str, ...]]  # for training and validation, for dev


def _read_sections() -> dict[str, Lines]:
    """The sections of `data/intents.txt` in their order: "intent cancel_order" -> its lines."""
    text = (files("slimformer.data") / "intents.txt").read_text(encoding="utf-8")
    sections: dict[str, tuple[list[str], list[str]]] = {}
    part: list[str] = []
    for line in text.splitlines():
        if line.startswith("["):
            name = line.strip("[]")
            sections[name] = ([], [])
            part = sections[name][0]
        elif line == "--":
            part = sections[name][1]
        elif line and not line.startswith("#"):
            part.append(line)
    return {name: (tuple(training), tuple(dev)) for name, (training, dev) in sections.items()}


_SECTIONS = _read_sections()
GRAMMAR: Mapping[str, Lines] = {
    name.removeprefix("intent "): lines for name, lines in _SECTIONS.items() if name.startswith("intent ")
}
SLOTS: Mapping[str, Lines] = {
    name.removeprefix("slot "): lines for name, lines in _SECTIONS.items() if name.startswith("slot ")
}
# Shares of sentences with an opener, small talk before and after, in lower case, and without a full stop or question mark.
_OPENER_SHARE, _BEFORE_SHARE, _AFTER_SHARE, _LOWER_SHARE, _BARE_SHARE = 0.30, 0.22, 0.30, 0.35, 0.35
_VALIDATION_EVERY = 5  # every fifth of an intent's training templates is for validation
_SALTS = {Split.TRAIN: b"train", Split.VALIDATION: b"held", Split.DEV: b"dev"}  # other bytes would draw other sentences
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")  # a slip of the hand hits the key on either side


@dataclass(frozen=True)
class Intents(Labelled):
    """Customer sentences with one of 24 intents, made by the library itself.

    `examples` sentences are for training, of which `validation_share` are set aside, and `dev` more are for dev. `seed` draws other
    sentences from the same grammar; `typos` is the share of sentences with a typing mistake or two. `labels` are the intents in the
    order of the model's ids; `bind` fills them. RecipeError names every option that is out of range.

    >>> from slimformer.tasks.base import Split
    >>> Intents(typos=0.0).split(Split.DEV)[0].answer in GRAMMAR
    True
    """

    examples: int = 6000
    dev: int = 1200
    seed: int = 0
    typos: float = 0.2
    validation_share: float = 0.1
    max_length: int = option(48, "Tokens an input may have; longer ones are cut off.")
    metric: str = option("accuracy", "The metric that counts: accuracy, f1, f1_macro, matthews, or package.function.")
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(map(str, self.labels)))
        fewest, share = 2 * len(GRAMMAR), self.validation_share
        mistakes = [
            *([] if self.examples >= 2 * fewest else [f"examples: at least {2 * fewest}, not {self.examples}"]),
            *([] if self.dev >= fewest else [f"dev: at least {fewest}, not {self.dev}"]),
            *([] if self.seed >= 0 else [f"seed: a whole number from 0, not {self.seed}"]),
            *([] if 0 <= self.typos <= 1 else [f"typos: a share from 0 to 1, not {self.typos}"]),
            *([] if 0 < share <= 0.5 else [f"validation_share: a share above 0 and up to 0.5, not {share}"]),
            *([] if self.max_length >= 4 else [f"max_length: at least 4 tokens, not {self.max_length}"]),
            *(
                []
                if known_or_own(self.metric, CLASS_METRICS)
                else [f"metric: '{self.metric}'; known: {', '.join(CLASS_METRICS)}"]
            ),
        ]
        if mistakes:
            raise RecipeError("the task intents cannot be set up like that.", facts=mistakes)
        if self.metric == "f1":  # of many classes it is the macro mean
            object.__setattr__(self, "metric", "f1_macro")

    @property
    def classes(self) -> tuple[str, ...]:
        return self.labels or tuple(sorted(GRAMMAR))

    def split(self, name: Split) -> Sequence[Example]:
        validation = max(1, round(self.validation_share * self.examples))
        count = {Split.TRAIN: self.examples - validation, Split.VALIDATION: validation, Split.DEV: self.dev}[Split(name)]
        sentences = _sentences(Split(name), count, self.seed, self.typos)
        return [Example(f"{Split(name)}/{row}", (text,), intent) for row, (text, intent) in enumerate(sentences)]

    def bind(self, config: PretrainedConfig | Mapping[str, Any]) -> Intents:
        return replace(self, labels=order_as_model(tuple(sorted(GRAMMAR)), config))


def templates(name: Split, intent: str) -> list[str]:
    """The templates of an intent that a split draws from; no two splits share one."""
    training, dev = GRAMMAR[intent]
    if name is Split.DEV:
        return list(dev)
    return [line for index, line in enumerate(training) if (index % _VALIDATION_EVERY == 2) == (name is Split.VALIDATION)]


@lru_cache(maxsize=8)
def _sentences(name: Split, count: int, seed: int, typos: float) -> tuple[tuple[str, str], ...]:
    """`count` different sentences with their intents, each intent as often as any other, in a shuffled order."""
    import numpy as np

    generator = np.random.default_rng([seed, *_SALTS[name]])
    lines = {intent: templates(name, intent) for intent in GRAMMAR}
    seen: set[str] = set()
    sentences = []
    for index in range(count):
        intent = tuple(GRAMMAR)[index % len(GRAMMAR)]
        for _ in range(20):  # some templates have few sentences: after that many tries a repetition is let through
            text = _sentence(lines[intent], name is Split.DEV, typos, generator)
            if text.lower() not in seen:
                break
        seen.add(text.lower())
        sentences.append((text, intent))
    return tuple(sentences[index] for index in generator.permutation(count))


def _sentence(lines: Sequence[str], dev: bool, typos: float, generator: np.random.Generator) -> str:
    core = _decided(_pick(lines, generator), generator)
    before = _pick(_SECTIONS["before"][dev], generator) + " " if generator.random() < _BEFORE_SHARE else ""
    after = _pick(_SECTIONS["after"][dev], generator) if generator.random() < _AFTER_SHARE else ""
    opener = _pick(_SECTIONS["opener"][dev], generator) + " " if generator.random() < _OPENER_SHARE else ""
    joint = "" if after.startswith(",") or not after else " "
    text = _filled(f"{opener}{before}{core}{joint}{after}", dev, generator)
    if not text.endswith("?"):
        asks = re.match(r"(where|when|how|what|why|who|which|is|are|can|could|do|does|has|will)\b", core)
        text += "?" if asks and not after else "."
    if generator.random() < _BARE_SHARE:
        text = text.rstrip("?.")
    text = text.lower() if generator.random() < _LOWER_SHARE else _sentence_case(text)
    return _mistyped(text, generator) if generator.random() < typos else text


def _decided(text: str, generator: np.random.Generator) -> str:
    """One of each (a|b) taken."""
    return re.sub(r"\(([^()]*)\)", lambda match: _pick(match[1].split("|"), generator), text)


def _filled(text: str, dev: bool, generator: np.random.Generator) -> str:
    """Slots filled: one value per slot name, and {item2} never equals {item}."""
    used: dict[str, str] = {}
    for slot in dict.fromkeys(re.findall(r"\{(\w+)\}", text)):
        if slot == "order":
            value = _order_number(dev, generator)
        else:
            values = [value for value in SLOTS[slot.rstrip("2")][dev] if value not in used.values()]
            value = _pick(values, generator)
        used[slot] = value
        text = text.replace("{" + slot + "}", value)
    return re.sub(r"\ba(?= [aeio])", "an", text)


def _order_number(dev: bool, generator: np.random.Generator) -> str:
    number = int(generator.integers(10_000, 99_999))
    return f"no. {number}-{int(generator.integers(10, 99))}" if dev else f"{'#' if number % 2 else ''}{number}"


def _pick(values: Sequence[str], generator: np.random.Generator) -> str:
    return values[int(generator.integers(len(values)))]


def _sentence_case(text: str) -> str:
    return re.sub(r"(^|[.?] )([a-z])", lambda match: match[1] + match[2].upper(), text)


def _mistyped(text: str, generator: np.random.Generator) -> str:
    """One or two slips of the hand inside longer words: a neighbour key, a letter lost, doubled, or swapped with the next."""
    for _ in range(1 + int(generator.random() < 0.3)):
        inner = [match.start() for match in re.finditer(r"(?<=[a-z])[a-z](?=[a-z][a-z])", text)]
        if not inner:
            return text
        at = inner[int(generator.integers(len(inner)))]
        letter, following = text[at], text[at + 1]
        slip = _pick(["neighbour", "lost", "doubled", "swapped"], generator)
        text = text[:at] + {
            "neighbour": _beside(letter, generator) + following,
            "lost": following,
            "doubled": letter + letter + following,
            "swapped": following + letter,
        }[slip] + text[at + 2 :]  # fmt: skip
    return text


def _beside(letter: str, generator: np.random.Generator) -> str:
    row = next(keys for keys in _KEYS if letter in keys)
    at = row.index(letter)
    return _pick(row[max(0, at - 1) : at] + row[at + 1 : at + 2], generator)
