"""Labels as data sets spell them and as models name them, and how the two are matched."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from slimformer.errors import DataError, shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_PLACEHOLDER = re.compile(r"(label_?|class_?)?\d{1,18}", re.ASCII | re.IGNORECASE)
_COMMA_NUMBER = re.compile(r"[+-]?\d+(,\d+)?", re.ASCII)
_NO_LABEL = {  # how tables spell that there is none
    *(
        "",
        "n/a",
        "#n/a",
        "na",
        "<na>",
        "nan",
        "null",
        "-",
        "--",
        "?",
        "\\n",
        "n.a.",
        "(null)",
        "<null>",
        "<none>",
        "#value!",
        "#ref!",
    ),
    *("unlabeled", "unlabelled", "not labeled", "not labelled", "no label", "no_label"),
}
_MAYBE_NONE = {"none", "unknown", "unk", "undefined", "undef", "missing", "nil", "not available", "not applicable"}
_OUTSIDE = {-999, -99, -9, 9, 99, 255, 999, 9999}  # ids that often stand for "no answer" beside those from 0 on
_THOUSANDS = r"[+-]?(\d{1,3}(%s\d{3})+|\d+)(%s\d+)?"
_COMMA_STYLE = re.compile(_THOUSANDS % ("[. \xa0\u202f'\u2019]", ","), re.ASCII)  # 1.234,5
_POINT_STYLE = re.compile(_THOUSANDS % ("[, \xa0\u202f'\u2019]", r"\."), re.ASCII)  # 1,234.5
_EITHER_MARK = re.compile(r"[+-]?\d+([.,]\d+)?", re.ASCII)
_BOOLEANS = {"false": "0", "true": "1", "no": "0", "yes": "1"}
_LIST = re.compile(r"[\[({].*[\])}]", re.DOTALL)
_JOINTS = ("|", ";", ",", "/", "+", "&")


# ---- as data sets spell them


def spell_label(value: Any, *, words_for_none: bool = True) -> str | None:
    """A label as text, whole numbers without a decimal point, digits of any script as 0 to 9; None if the value is no label.

    `words_for_none`: a text such as "NA" or "-" is none.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        value = repr(value) if math.isfinite(value) else None
    if isinstance(value, int):
        value = str(value) if abs(value) < 2**53 else None
    if not isinstance(value, str):
        return None
    text = value.strip("\0 \t\r\n\v\f\x1c\x1d\x1e\x1f\x85\xa0\u2003\u3000\ufeff").strip()
    if not text or (words_for_none and text.lower() in _NO_LABEL):
        return None
    if not text.isascii() and any(char.isdecimal() for char in text):
        digits = "".join(str(unicodedata.decimal(char)) if char.isdecimal() else char for char in text).replace("\u066b", ".")
        digits = digits.replace("\u2212", "-")
        text = digits if _NUMBER.fullmatch(digits) else text
    if _NUMBER.fullmatch(text) and not text.lstrip("+-").isdigit() and float(text).is_integer() and abs(float(text)) < 2**53:
        return str(int(float(text)))
    return text


def spell_labels(values: Sequence[Any]) -> list[str | None]:
    """The labels of a column; numbers in local writing ("3,5", "1.234,5") are numbers if the whole column is written like that."""
    spelled = [spell_label(value) for value in values]
    distinct = {text for text in spelled if text is not None}
    if any(not _NUMBER.fullmatch(text) for text in distinct):
        numbers = _local_numbers(distinct)
        if numbers:
            return [None if text is None else numbers[text] for text in spelled]
    markers = {text for text in ("-1", "-100") if text in distinct and _marks_none(text, distinct)}
    return [None if text in markers else text for text in spelled]


def _local_numbers(texts: set[str]) -> Mapping[str, str | None]:
    """Numbers with a decimal comma, or with marks between thousands, as Python writes them; nothing if one is no such number."""
    plain = {text: text.replace("\u2212", "-") for text in texts}
    if all(_COMMA_NUMBER.fullmatch(text) for text in plain.values()):
        return {text: spell_label(number.replace(",", ".")) for text, number in plain.items()}
    for style, mark in ((_POINT_STYLE, "."), (_COMMA_STYLE, ",")):
        if all(style.fullmatch(text) for text in plain.values()):
            digits = {text: re.sub(rf"[^\d+\-{mark}]", "", number, flags=re.ASCII) for text, number in plain.items()}
            return {text: spell_label(number.replace(",", ".")) for text, number in digits.items()}
    if all(_EITHER_MARK.fullmatch(text) for text in plain.values()):
        return {text: spell_label(number.replace(",", ".")) for text, number in plain.items()}
    return {}


def _marks_none(marker: str, distinct: set[str]) -> bool:
    """Whether -1 or -100 stands for "no label", as in test sets of the hub and in PyTorch: alone, or before ids from 0.

    -1 and 1, or -1, 0 and 1, are classes: they are how people write for and against.
    """
    others = distinct - {"-1", "-100"}
    return not others or (
        len(others) > (2 if marker == "-1" else 0) and all(text.isascii() and text.isdigit() for text in others)
    )


def maybe_none(labels: Collection[str]) -> list[str]:
    """Classes that may rather mark rows without a label: "None", or 99 beside 0 and 1."""
    named = [label for label in labels if label.casefold() in _MAYBE_NONE]
    numbers = {int(label): label for label in labels if re.fullmatch(r"-?\d{1,6}", label, re.ASCII)}
    inner = {number for number in numbers if number not in _OUTSIDE}
    if len(numbers) == len(labels) and len(inner) > 1 and inner in ({*range(len(inner))}, {*range(1, len(inner) + 1)}):
        named += [numbers[number] for number in sorted(numbers.keys() & _OUTSIDE) if number not in (max(inner) + 1,)]
    return sorted(named)


def single_labels(values: Sequence[Any]) -> list[Any] | None:
    """The labels out of lists if each row's list holds just one; None if the rows are no such lists."""
    some = [value for value in values if value is not None]
    if not some or not all(isinstance(value, (list, tuple)) and len(value) == 1 for value in some):
        return None
    inner = [None if value is None else value[0] for value in values]
    return inner if all(isinstance(value, (str, int, float, type(None))) for value in inner) else None


def several_labels(values: Sequence[Any]) -> str:
    """How the rows of this column may have several labels, as a clause for a message; "" if each has one."""
    some = next((value for value in values if is_collection(value)), None)
    if some is not None:
        return f"it holds lists, such as {shown(some, 40)}"
    texts = [value for value in values if isinstance(value, str)]
    if are_lists(texts):
        return f"it holds lists, such as {shown(next(text for text in texts if _LIST.fullmatch(text.strip())), 40)}"
    joint = joint_of({text.strip() for text in texts})
    if not joint:
        return ""
    joined = [text.strip() for text in texts if joint in text.strip().strip(joint)]
    return f"it joins names by '{joint}', such as {shown(min(joined, key=len), 40)}"


def are_lists(texts: Sequence[str]) -> bool:
    """Whether most of these texts are lists that were written as text."""
    distinct = {text.strip() for text in texts}
    return 2 * sum(_LIST.fullmatch(text) is not None for text in distinct) > len(distinct)


def joint_of(texts: Collection[str]) -> str:
    """The mark that stands between the names of several labels; "" if each text is the name of one."""
    if all(_COMMA_NUMBER.fullmatch(text) or _NUMBER.fullmatch(text) for text in texts):
        return ""
    for joint in _JOINTS:
        joined = [text for text in texts if joint in text.strip(joint)]
        if not joined:
            continue
        parts = Counter(part.strip() for text in texts for part in text.split(joint))
        alone = {*texts} - {*joined}
        # "rock, pop" may be one name; its parts are classes if rows have them alone, or in several combinations
        split = [[part.strip() for part in text.split(joint) if part.strip()] for text in joined]
        sets = [names for names in split if all(name in alone or parts[name] > 1 for name in names)]
        if 2 * len(sets) > len(joined) and (len(sets) > 1 or any(name in alone for name in sets[0])):
            return joint
    return ""


def is_collection(value: Any) -> bool:
    """Whether a value holds several."""
    return isinstance(value, (list, tuple, set, frozenset, dict)) or type(value).__name__ == "ndarray"


def is_number(label: str) -> bool:
    """Whether a label is a finite number."""
    return _NUMBER.fullmatch(label) is not None and math.isfinite(float(label))


def guess_kind(labels: Iterable[str]) -> Literal["classes", "score"]:
    """ "score" if all labels are numbers and some have a fraction; whole numbers are classes."""
    distinct = set(labels)
    fractions = all(is_number(label) for label in distinct) and any(not float(label).is_integer() for label in distinct)
    return "score" if fractions else "classes"


def sort_labels(labels: Collection[str]) -> tuple[str, ...]:
    """Numbers by value, everything else by name."""
    if all(_NUMBER.fullmatch(label) for label in labels):
        return tuple(sorted(set(labels), key=lambda label: (float(label), label)))
    return tuple(sorted(set(labels)))


def one_spelling(labels: Sequence[str]) -> dict[str, str]:
    """The most frequent spelling of the class that each label is: case, spaces, hyphens and underscores do not count."""
    counts = Counter(labels)
    spellings: dict[str, str] = {}
    return {
        label: spellings.setdefault(_fold(label), label) for label in sorted(counts, key=lambda label: (-counts[label], label))
    }


def enumerate_labels(labels: Sequence[str]) -> str:
    """The labels in one line for a message; after twelve, their number."""
    names = [label if len(label) <= 40 else shown(label, 40) for label in labels[:12]]
    return ", ".join(names) + (f" and {len(labels) - 12} more" if len(labels) > 12 else "")


# ---- as models name them


def model_labels(config: PretrainedConfig | Mapping[str, Any]) -> tuple[tuple[str, ...], str | None]:
    """A model's class names in the order of their ids, and its problem_type; DataError if its id2label is broken."""
    from slimformer.saving.heads import named_labels  # it brings numpy, which --help does without

    def get(name: str) -> Any:
        return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)

    mapping = named_labels({name: get(name) for name in ("id2label", "label2id")}) or get("id2label")
    try:
        names = {int(key): str(name) for key, name in dict(mapping).items()} if mapping else {}
        count = int(get("num_labels") or len(names) or 2)
    except (TypeError, ValueError, OverflowError):
        raise DataError("the model's id2label is not a mapping of ids to names.", help="mend it in config.json.") from None
    names = names or {index: f"LABEL_{index}" for index in range(count)}
    if sorted(names) != list(range(len(names))):
        raise DataError(
            f"the model's id2label has the ids {', '.join(map(str, sorted(names)))[:80]}.",
            help="ids must run from 0 without a gap; mend it in config.json.",
        )
    twice = next((name for name, count in Counter(names.values()).items() if count > 1), None)
    if twice is not None:
        raise DataError(
            f"the model's id2label gives the name {shown(twice, 40)} to {list(names.values()).count(twice)} classes.",
            help="give each class a name of its own in config.json.",
        )
    return tuple(names[index] for index in range(len(names))), get("problem_type")


def are_placeholders(names: Sequence[str]) -> bool:
    """Whether a model's class names only repeat their ids, as LABEL_0, LABEL_1, ... do."""
    return all(_PLACEHOLDER.fullmatch(name) and int(re.sub(r"\D", "", name)) == index for index, name in enumerate(names))


def id_of(label: str) -> int | None:
    """The class id that a label spells: 1, LABEL_1 and true are 1; None if it is a name."""
    value = _id_of(label)
    return None if value is None else int(value)


# ---- matched


def match_labels(data: Iterable[str], names: Sequence[str], known: Sequence[str] = ()) -> dict[str, int]:
    """The class id of each label of the data; `names` are the model's classes in the order of their ids.

    Labels match by name, and case, spaces and hyphens do not count. If the data has ids and tells their names (`known`), those
    names are matched. Numbers match the numbers in the names ("4" is "4 stars"); otherwise ids match by value, and true and false are 1
    and 0. Names may be abbreviated: "pos" is "positive". Labels that match nothing are left out.

    >>> match_labels(["Not entailment", "entailment"], ["entailment", "not_entailment"])
    {'Not entailment': 1, 'entailment': 0}
    >>> match_labels(["1", "4"], ["1 star", "2 stars", "3 stars", "4 stars"])
    {'1': 0, '4': 3}
    """
    labels = list(data)
    exact = {name: index for index, name in enumerate(names)}
    counts = Counter(map(_fold, names))  # of "us" and "US" only the very names match
    ids = {_fold(name): index for index, name in enumerate(names) if counts[_fold(name)] == 1}
    matches = {label: [ids[form] for form in _forms(label, known) if form in ids] for label in labels}
    matches |= {label: [exact[label]] for label, places in matches.items() if not places and label in exact}
    by_name = {label: places[0] for label, places in matches.items() if places}
    if len(by_name) == len(labels):
        return by_name
    for attempt in (_match_numbers, _match_ids, _match_beginnings):
        found = attempt(labels, names)
        if len(found) == len(labels):
            return found
    return by_name


def ambiguous_ids(data: Iterable[str], names: Sequence[str], known: Sequence[str] = ()) -> bool:
    """Whether the labels are numbers that could be ids from 0 or from 1, or ids of any of the classes: an end is missing."""
    labels = set(data)
    if match_by_name(labels, names, known) or len(_match_numbers(list(labels), names)) == len(labels):
        return False
    ids = {_id_of(label) for label in labels}
    if None in ids:
        return False
    values = {int(value) for value in ids if value is not None}
    return max(values) <= len(names) and not {0, len(names) - 1} <= values


def match_by_name(labels: Iterable[str], names: Sequence[str], known: Sequence[str]) -> bool:
    """Whether every label of the data is one of the model's class names, up to case, spaces and hyphens."""
    folded = {_fold(name) for name in names}
    return all(any(form in folded for form in _forms(label, known)) for label in labels)


def _match_numbers(labels: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Labels by the number in each name: "1 star", "2 stars"; nothing if the names only repeat their ids or have none."""
    numbers = [_numbers_in(name) for name in names]
    if are_placeholders(names) or any(len(parts) != 1 for parts in numbers):
        return {}
    ids = {str(int(parts[0])): index for index, parts in enumerate(numbers)}
    if len(ids) < len(names):
        return {}
    found = {label: _numbers_in(label) for label in labels}
    plain = {label: str(int(parts[0])) for label, parts in found.items() if len(parts) == 1}
    return {label: ids[number] for label, number in plain.items() if number in ids}


def _numbers_in(text: str) -> list[str]:
    """The numbers in a name; none at all if one has a fraction or is written in local style."""
    found: list[str] = re.findall(r"-?\d+(?:[.,/]\d+)*", text)
    return (
        [re.sub(r"\.0+$", "", number) for number in found]
        if all(re.fullmatch(r"-?\d{1,18}(\.0+)?", number) for number in found)
        else []
    )


def _match_ids(labels: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Labels by their value: 0, LABEL_0 or false is the first class."""
    ids = {label: _id_of(label) for label in labels}
    return {label: int(value) for label, value in ids.items() if value is not None and int(value) < len(names)}


def _id_of(label: str) -> str | None:
    text = label.casefold()
    text = _BOOLEANS.get(text, text)
    if _PLACEHOLDER.fullmatch(text):
        text = re.sub(r"\D", "", text)
    return text if text.isascii() and text.isdigit() and len(text) < 7 else None


def _match_beginnings(labels: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Labels that are the beginning of one name each: neg, pos."""
    found = {}
    for label in labels:
        fits = [index for index, name in enumerate(names) if len(label) > 2 and _fold(name).startswith(_fold(label))]
        if len(fits) == 1:
            found[label] = fits[0]
    return found if len(set(found.values())) == len(found) else {}


def _forms(label: str, known: Sequence[str]) -> list[str]:
    """The names a label may have: the one that the data tells for an id, then the label itself."""
    return [*(_fold(name) for index, name in enumerate(known) if label == str(index)), _fold(label)]


def _fold(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", unicodedata.normalize("NFKC", name).strip().casefold())


def order_as_model(known: Sequence[str], config: PretrainedConfig | Mapping[str, Any]) -> tuple[str, ...]:
    """The `known` class names in the order of a model's ids; DataError if the model does not have them all."""
    names, _ = model_labels(config)
    if are_placeholders(names) and len(names) == len(known):
        return tuple(known)
    ids = match_labels(known, names)
    missing = [name for name in known if name not in ids]
    if missing:
        raise DataError(
            f"the model does not know the label '{missing[0]}'" + (f" and {len(missing) - 1} more." if missing[1:] else "."),
            facts=[f"the model's labels: {enumerate_labels(names)}"],
            help="the model was trained for another task; start from an encoder, or from a model with these labels.",
        )
    ours = {index: name for name, index in ids.items()}
    return tuple(ours.get(index, name) for index, name in enumerate(names))
