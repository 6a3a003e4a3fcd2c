"""Finds texts that are parallel line by line, by the names that people give their files, and reads them.

`train.en` and `train.de`, `europarl.de-en.en`, `src-val.txt` and `tgt-val.txt`, `newstest.src` and `newstest.ref`, each packed or not:
one part of the name says the side, and the rest is the same for both. What is guessed is said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slimformer.data.files import SUFFIXES
from slimformer.data.splits import DEV_NAMES, TEST_NAMES, TRAIN_NAMES
from slimformer.data.texts import PACKED, read_text, suffix_of
from slimformer.errors import DataError, nearest
from slimformer.log import remark

# Sides by what they are for; each may have a number, as the references ref0 and ref1 have.
_SOURCES = ("source", "src", "input", "article", "document", "dialogue", "text", "original")
_TARGETS = ("target", "tgt", "trg", "ref", "reference", "references", "output", "summary", "title", "highlights", "abstract",
            "translation")  # fmt: skip
_LANGUAGES = frozenset(re.findall(r"\w+", """
    af am ar az be bg bn bs ca cs cy da de el en eo es et eu fa fi fr ga gl gu ha he hi hr hu hy id ig is it ja ka kk km
    kn ko ku ky la lb lo lt lv mg mi mk ml mn mr ms mt my ne nl no pa pl ps pt ro ru sd si sk sl so sq sr st su sv sw ta
    te tg th tl tr uk ur uz vi xh yi yo zh zu eng deu ger fra fre spa ita por rus zho cmn jpn kor ara tur nld dut pol ces
    cze ukr hin vie fin swe dan nor ell ron rum hun heb english german french spanish italian portuguese russian chinese
    japanese korean arabic turkish dutch polish czech ukrainian hindi vietnamese finnish swedish danish norwegian greek
    romanian hungarian hebrew
"""))  # fmt: skip
_ENGLISH = ("en", "eng", "english")
_PART = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}(?![^\W_])|[a-z]{2}[-_][A-Z]{2}(?![^\W_])|[^\W_]+")  # eng_Latn, pt_BR, train
_PAIR = re.compile(r"(?<![^\W_])([A-Za-z]{2,3})-([A-Za-z]{2,3})(?![^\W_])")  # en-de
_NO_TEXTS = {"vocab", "vocabulary", "dict", "bpe", "codes", "readme", "license", "ids"}
_TABLES = {*SUFFIXES, ".md", ".py", ".sh", ".yaml", ".yml", ".xml", ".sgm", ".html", ".bin", ".idx", ".model"} - {".txt"}
_SPLITS = ((TRAIN_NAMES, r"train\w*"), (DEV_NAMES, r"(news)?dev\d*"), (TEST_NAMES, r"(news)?te?st\d*"))


@dataclass(frozen=True)
class Corpus:
    """Texts that are parallel: their common name, "train", and the file of each side, "en" and "de"."""

    title: str
    files: Mapping[str, Path]
    direction: tuple[str, str] | None = None  # if the name tells it: de-en

    def tokens(self) -> set[str]:
        """The parts of its name."""
        return {part.lower() for part in _PART.findall(self.title)}


def is_language(name: str) -> bool:
    """Whether a part of a name means a language: en, deu, eng_Latn, pt-BR, german."""
    return re.split(r"[-_]", name)[0].lower() in _LANGUAGES


def find_corpora(folder: Path, names: Sequence[str] = ()) -> list[Corpus]:
    """The parallel texts of a folder, and of folders in it that are called as splits; `names` are sides that a user named."""
    groups, directions = _grouped(folder, names)
    return [
        Corpus(title, files, directions.get(title))
        for title, files in groups.items()
        if len(files) > 1 and not _NO_TEXTS & Corpus(title, files).tokens()
    ]


def refuse_alone(folder: Path, names: Sequence[str], found: Mapping[str, Corpus]) -> None:
    """DataError if a text is called as training or dev data, has a side, and lacks its other side; `found`: the whole ones by split."""
    groups, _ = _grouped(folder, names)
    whole = {file for files in groups.values() if len(files) > 1 for file in files.values()}
    for kind, (known, pattern) in (("train", _SPLITS[0]), ("dev", _SPLITS[1])):
        for title, files in groups.items() if kind not in found else ():
            (side, file), *more = files.items()
            called = any(part in known or re.fullmatch(pattern, part) for part in Corpus(title, files).tokens())
            if called and not more and file not in whole:
                others = sorted({other for corpus in found.values() for other in corpus.files} - {side})
                raise DataError(
                    f"{file} has no other side: "
                    + ("without references nothing can be scored." if kind == "dev" else "there is nothing to learn to write."),
                    facts=[f"looked for: {title}.{others[0]}"] if others else [],
                    help="put the other side beside it, or take this file away: dev data are then drawn from the training data.",
                )


def _grouped(folder: Path, names: Sequence[str]) -> tuple[dict[str, dict[str, Path]], dict[str, tuple[str, str]]]:
    """Files by title and side, in each way that their names can be read, and the direction that a title tells."""
    groups: dict[str, dict[str, Path]] = {}
    directions: dict[str, tuple[str, str]] = {}
    for file, told in _texts(folder):
        bare = _bare(told)
        pair = next((found for found in _PAIR.finditer(bare) if all(map(is_language, found.groups()))), None)
        rest = bare[: pair.start()] + bare[pair.end() :] if pair else bare
        for title, side in _readings(rest, names) or (_readings(bare, names) if pair else []):
            groups.setdefault(title, {})[side] = file
            if pair:
                directions[title] = (pair[1], pair[2])
    return groups, directions


def _texts(folder: Path) -> list[tuple[Path, str]]:
    """Files that may be texts, each with the name to be read: that of a split's folder belongs to it."""
    found = []
    try:
        items = sorted(item for item in folder.iterdir() if not item.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}.", help="check its permissions.") from None
    for item in items:
        if item.is_dir() and any(item.name.lower() in names for names, _ in _SPLITS):
            found += [(file, f"{item.name}.{file.name}") for file in sorted(item.iterdir()) if file.is_file()]
        elif item.is_file():
            found.append((item, item.name))
    return [(file, name) for file, name in found if suffix_of(file) not in _TABLES and not file.name.startswith(".")]


def _bare(name: str) -> str:
    """A file's name without the suffixes that say nothing of its side."""
    for suffix in (*PACKED, ".txt"):
        name = name[: -len(suffix)] if name.lower().endswith(suffix) and len(name) > len(suffix) else name
    return name


def _readings(name: str, named: Sequence[str]) -> list[tuple[str, str]]:
    """Each way to read a name as a title and a side."""
    found = []
    for part in _PART.finditer(name):
        side = part[0]
        if side.lower() in {item.lower() for item in named} or _role(side) or is_language(side):
            rest = [name[: part.start()].strip("._- "), name[part.end() :].strip("._- ")]
            found.append((".".join(item for item in rest if item), side))
    return found


def _role(side: str) -> str:
    """ "source" or "target" if a side is called after its use, else ""."""
    name = side.lower().rstrip("0123456789")
    return "source" if name in _SOURCES else "target" if name in _TARGETS else ""


def corpus_of(file: Path, corpora: Sequence[Corpus]) -> tuple[Corpus, str] | None:
    """The corpus that a file belongs to, and the side that it is; None if it stands alone."""
    for corpus in corpora:
        for side, other in corpus.files.items():
            if other == file:
                return corpus, side
    return None


def by_split(folder: Path, corpora: Sequence[Corpus]) -> dict[str, Corpus]:
    """The "train", "dev" and "test" corpora, as far as they are there; the only one of all is "train"."""
    found = {}
    for kind, (names, pattern) in zip(("train", "dev", "test"), _SPLITS, strict=True):
        exact = [corpus for name in names for corpus in corpora if corpus.title.lower() == name]
        some = exact[:1] or [
            corpus for corpus in corpora if any(part in names or re.fullmatch(pattern, part) for part in corpus.tokens())
        ]
        if len(some) > 1 and not (kind == "test" and "dev" in found):
            raise DataError(
                f"{folder} holds several texts for {kind}: {', '.join(corpus.title for corpus in some)}.",
                help="name one: --dev <name>." if kind != "train" else "leave one of them, or name a file: --data <file>.",
            )
        if some and not (kind == "test" and "dev" in found):
            found[kind] = some[0]
    if not found and len(corpora) == 1:
        found["train"] = corpora[0]
    return found


def choose_sides(
    corpus: Corpus, source: str | None, target: str | None, hint: str = "", usual: tuple[str, str] | None = None
) -> tuple[str, tuple[str, ...]]:
    """The side to read and those that are its references: as named, as their roles or the name say, or from English.

    `usual` are the sides of other texts of this data, `hint` is the side that the user named by its file. DataError if that is a guess.
    """
    sides = list(corpus.files)
    for option, name in (("source", source), ("target", target)):
        if name is not None and _find(name, sides) is None:
            raise DataError(
                f"{corpus.title or 'the texts'}: there is no file for the {option} '{name}' beside {next(iter(corpus.files.values()))}.",
                help=f"{nearest(name, sides)}.",
            )
    first = _find(source, sides) if source else _find(hint, sides) if hint else None
    second = _find(target, sides) if target else None
    if not (first and second) and usual and all(_find(name, sides) for name in usual) and not hint:
        first, second = first or _find(usual[0], sides), second or _find(usual[1], sides)
    roles = {role: [side for side in sides if _role(side) == role] for role in ("source", "target")}
    if len(roles["source"]) == 1 and roles["target"] and first in (None, roles["source"][0]) and second is None:
        return roles["source"][0], tuple(sorted(roles["target"]))
    if first is None and second is None and corpus.direction and all(_find(name, sides) for name in corpus.direction):
        first, second = (_find(name, sides) for name in corpus.direction)
        remark(
            f"{corpus.files[str(first)]}: reading {first}, writing {second}, as its name says; --source and --target name others."
        )
    elif first is None or second is None:
        others = [side for side in sides if side not in (first, second)]
        english = [side for side in others if re.split(r"[-_]", side)[0].lower() in _ENGLISH]
        if first is None:
            first = english[0] if english else others[0] if second and len(others) == 1 else None
        others = [side for side in others if side != first]
        if second is None and len(others) == 1:
            second = others[0]
        if first is None or second is None:
            raise DataError(
                f"{corpus.title or 'the data'} has the sides {', '.join(sides)}: which is to be read, and which is to be written?",
                facts=[str(file) for file in corpus.files.values()],
                help="name them: --source <side> --target <side>.",
            )
        if source is None or target is None:
            remark(f"{corpus.files[first]}: reading {first}, writing {second}; --source and --target name others.")
    return first, (second,)  # type: ignore[return-value]


def _find(name: str, sides: Sequence[str]) -> str | None:
    return next((side for side in sides if side == name), next((side for side in sides if side.lower() == name.lower()), None))


def read_lines(file: Path) -> list[str]:
    """The lines of a text; only \\n ends one, because texts hold other characters at which Python's splitlines breaks."""
    lines = read_text(file, "it should hold a text on each line.").split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_parallel(files: Sequence[Path]) -> list[list[str]]:
    """The lines of parallel texts, a list for each file; DataError if it is one file twice, or if their numbers differ."""
    for place, file in enumerate(files):
        if any(file.samefile(other) for other in files[:place] if file.exists() and other.exists()):
            raise DataError(f"{file} is given for both sides.", help="name the file of the other side.")
    texts = [read_lines(file) for file in files]
    for file, lines in zip(files[1:], texts[1:], strict=True):
        if len(lines) != len(texts[0]):
            raise DataError(
                f"{files[0]} has {len(texts[0]):,} lines, and {file} has {len(lines):,}: they are not parallel.",
                facts=[f"their last lines: {texts[0][-1][:60]!r} and {lines[-1][:60]!r}"],
                help="a file that was cut off looks like this, or one whose texts hold line breaks; each line must be the other's "
                "translation or summary.",
            )
    return texts
