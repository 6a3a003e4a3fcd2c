"""Cuts a tokenizer to the word pieces that given texts need, so that those texts are split as before.

Everything is read from and written to the text of a tokenizer.json, which `tokenizer_files` gives for every kind of folder. What a piece
needs beside itself depends on the model of the tokenizer:

- WordPiece takes the longest piece that is there, WordLevel the word: the pieces that were taken stay, and nothing longer can come in.
- Unigram takes the best sum of scores. Other ways to split lose, so they may go; but an unknown character counts 10 less than the worst
  piece of all, so a piece with the worst score stays.
- BPE joins pairs in the order of its merges. The merges that made the pieces stay, and so do all pieces in between. A piece alone is made
  by the very merges that make it in a text: had a pair across its edge come first, the piece would not be there.

A safety net stays for texts that were not seen: special and added tokens, byte pieces, digits, signs, and single letters.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, Literal

from slimformer.data.tokenizer_files import parsed_tokenizer
from slimformer.errors import ModelError

Characters = Literal["seen", "all"]
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
SAMPLE_TEXTS = 200  # examples that show whether a vocabulary is one for some texts
UNREADABLE = 0.5  # a share of unknown pieces from which it is not
_AT_ONCE = 1000  # texts that are encoded together
_KINDS = ("WordPiece", "WordLevel", "Unigram", "BPE")


@dataclass(frozen=True)
class Trimmed:
    """A tokenizer with fewer pieces: the text of its tokenizer.json, and the old id of each new one, rising."""

    text: str
    keep: tuple[int, ...]


def trim_tokenizer(
    text: str,
    needed: Iterable[int],
    characters: Characters = "seen",
    named: Iterable[str] = (),
    settled: int = 0,
    common: int = 0,
) -> Trimmed:
    """The tokenizer of a tokenizer.json with the pieces `needed`, whatever these need, and the safety net.

    `named` tokens stay too, and the first `settled` ones keep their numbers. `characters`: "all" single letters stay, or those of the
    scripts that a needed piece has ("seen"). `common`: so many of the most common pieces of these letters stay, needed or not. ModelError
    for a tokenizer that cannot be cut.
    """
    data = json.loads(text)
    every = parsed_tokenizer(text).get_vocab(with_added_tokens=True)
    vocabulary = _Vocabulary(data)
    tokens = {index: token for token, index in every.items()}
    wanted = {tokens[index] for index in needed if index in tokens}
    net = vocabulary.net(wanted, characters) | vocabulary.common(wanted, characters, common)
    wanted |= {*named} | {tokens[index] for index in range(settled) if index in tokens}
    wanted |= {item["content"] for item in data.get("added_tokens") or []} | vocabulary.always()
    wanted |= {tokens[index] for index in _ids_in(data) if index in tokens}
    wanted |= net
    if vocabulary.kind == "BPE":
        wanted |= vocabulary.between(wanted)
    keep = tuple(sorted(every[token] for token in wanted if token in every))
    place = {tokens[old]: new for new, old in enumerate(keep)}
    made = Trimmed(json.dumps(_cut(data, vocabulary, place, dict(enumerate(keep))), ensure_ascii=False), keep)
    if parsed_tokenizer(made.text).get_vocab(with_added_tokens=True) != place:
        raise ModelError(
            "this tokenizer cannot be cut: its ids do not follow from its files.",
            facts=[f"its model is a {vocabulary.kind} of {len(vocabulary.tokens):,} pieces; {len(every):,} have an id"],
            help="save it anew with save_pretrained of transformers, or keep the whole vocabulary.",
        )
    return made


def count_pieces(text: str, texts: Iterable[str]) -> Counter[int]:
    """How often each piece of the tokenizer.json in `text` stands in these texts, special tokens left out."""
    counts: Counter[int] = Counter()
    for ids in _encoded(text, texts):
        counts.update(ids)
    return counts


@dataclass(frozen=True)
class Splitting:
    """How texts are split by a tokenizer that was cut: `otherwise` of `texts` in other pieces, `unreadable` with an unknown piece that
    they had not before; `longer` times as many pieces in all. `example`: the first that cannot be read."""

    texts: int
    otherwise: int
    unreadable: int
    longer: float
    example: str = ""


def compare_splits(before: str, after: Trimmed, texts: Sequence[str]) -> Splitting:
    """What becomes of these texts once the tokenizer.json `before` is cut."""
    place = {old: new for new, old in enumerate(after.keep)}
    unknown = unknown_id(before)
    otherwise = unreadable = 0
    sizes, example = [0, 0], ""
    for text, old, new in zip(texts, _encoded(before, texts), _encoded(after.text, texts), strict=True):
        sizes = [sizes[0] + len(old), sizes[1] + len(new)]
        if [place.get(index) for index in old] == new:
            continue
        otherwise += 1
        if unknown is not None and new.count(place[unknown]) > old.count(unknown):
            unreadable, example = unreadable + 1, example or text
    return Splitting(len(texts), otherwise, unreadable, sizes[1] / max(1, sizes[0]), example)


def unknown_share(text: str, texts: Iterable[str]) -> tuple[float, str]:
    """The share of unknown pieces in these texts by the tokenizer.json in `text`, and the first text with one."""
    unknown, total, found, example = unknown_id(text), 0, 0, ""
    known = list(texts)
    for one, ids in zip(known, _encoded(text, known), strict=True):
        total += len(ids)
        if unknown in ids:
            found, example = found + ids.count(unknown), example or one
    return found / max(1, total), example


def unknown_id(text: str) -> int | None:
    """The id of the piece that stands for what cannot be read in a tokenizer.json; None if there is no such piece."""
    model = json.loads(text)["model"]
    if isinstance(model.get("unk_id"), int):
        return int(model["unk_id"])
    token = model.get("unk_token")
    return parsed_tokenizer(text).token_to_id(token) if isinstance(token, str) else None


# -- What a piece needs --------------------------------------------------------------------------------------------------------


class _Vocabulary:
    """The pieces in the model of a tokenizer, and what its kind asks for."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.model = model = data["model"]
        self.kind = str(model.get("type") or _kind_of(model))
        if self.kind not in _KINDS or model.get("dropout"):
            what = f"a {self.kind}" if self.kind not in _KINDS else "one that leaves out merges by chance (dropout)"
            raise ModelError(f"the tokenizer is {what}, and its vocabulary cannot be cut.", help="keep the whole vocabulary.")
        self.tokens = [item if isinstance(item, str) else item[0] for item in model["vocab"]]
        self.prefix, self.suffix = (model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
        around = json.dumps([data.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")])
        self.of_bytes = '"ByteLevel"' in around  # its characters stand for bytes, not for letters
        self.ranks = {pair: rank for rank, pair in enumerate(_pairs(model.get("merges") or []))}

    def always(self) -> set[str]:
        """The unknown piece; in a Unigram also one of the lowest score, from which the score of the unknown is counted."""
        tokens = {self.model.get("unk_token")} - {None}
        if self.kind == "Unigram":
            tokens |= {min(self.model["vocab"], key=lambda item: item[1])[0]}
            if self.model.get("unk_id") is not None:
                tokens |= {self.tokens[self.model["unk_id"]]}
        return tokens

    def net(self, wanted: Iterable[str], characters: Characters) -> set[str]:
        """Byte pieces and single characters; of letters those of the scripts in `wanted`, or all."""
        single = {token: self.bare(token) for token in self.tokens}
        single = {token: bare for token, bare in single.items() if len(bare) == 1}
        bytes_ = {token for token in self.tokens if _BYTE.fullmatch(token)}
        if self.of_bytes or characters == "all":
            return bytes_ | set(single)
        scripts = _scripts(wanted)
        return bytes_ | {token for token, sign in single.items() if sign.isascii() or script_of(sign) in scripts}

    def common(self, wanted: Iterable[str], characters: Characters, count: int) -> set[str]:
        """The `count` most common pieces in the scripts of `wanted`: vocabularies are sorted so, a Unigram by its scores."""
        ranked = self.tokens
        if self.kind == "Unigram":
            ranked = [token for token, _ in sorted(self.model["vocab"], key=lambda item: -item[1])]
        elif isinstance(self.model["vocab"], dict):
            ranked = sorted(ranked, key=self.model["vocab"].__getitem__)
        scripts = None if self.of_bytes or characters == "all" else _scripts(wanted)
        fitting = (
            token for token in ranked if scripts is None or all(sign.isascii() or script_of(sign) in scripts for sign in token)
        )
        return set(islice(fitting, count))

    def bare(self, token: str) -> str:
        """A piece without the marks for its place in a word."""
        mark = "##" if self.kind == "WordPiece" and not self.prefix else self.prefix
        return (token.removeprefix(mark) if len(token) > len(mark) else token).removesuffix(self.suffix) or token

    def between(self, wanted: Iterable[str]) -> set[str]:
        """All that pieces of a BPE are made of: their characters and what stands in between."""
        return {part for token in wanted if not _BYTE.fullmatch(token) for part in self._steps(token)}

    def _steps(self, token: str) -> Iterator[str]:
        inner = bool(self.prefix) and token.startswith(self.prefix)
        body = token.removeprefix(self.prefix) if inner else token
        ends = bool(self.suffix) and body.endswith(self.suffix) and len(body) > len(self.suffix)
        body = body.removesuffix(self.suffix) if ends else body
        parts = [sign if place == 0 and not inner else self.prefix + sign for place, sign in enumerate(body)]
        if ends:
            parts[-1] += self.suffix
        yield from parts
        while len(parts) > 1:
            ranked = [(self.ranks[pair], place) for place, pair in enumerate(pairwise(parts)) if pair in self.ranks]
            if not ranked:
                return
            place = min(ranked)[1]
            parts[place : place + 2] = [parts[place] + parts[place + 1].removeprefix(self.prefix)]
            yield parts[place]


def _scripts(tokens: Iterable[str]) -> set[str]:
    return {"", *(script_of(sign) for sign in {sign for token in tokens for sign in token})}


def script_of(sign: str) -> str:
    """The script of a letter or mark, by the first word of its name in Unicode ("LATIN"); "" of any other sign."""
    return unicodedata.name(sign, "?").split()[0] if unicodedata.category(sign)[0] in "LM" else ""


def _kind_of(model: Mapping[str, Any]) -> str:
    """The kind of a model in an old file, which does not name it."""
    if "merges" in model:
        return "BPE"
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def _pairs(merges: Iterable[Any]) -> Iterator[tuple[str, str]]:
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


# -- The file ------------------------------------------------------------------------------------------------------------------


def _cut(data: dict[str, Any], vocabulary: _Vocabulary, place: Mapping[str, int], keep: Mapping[int, int]) -> dict[str, Any]:
    """The content of tokenizer.json with the tokens in `place` at their new ids; `keep`: the old id of each new one."""
    model, moved = data["model"], {old: new for new, old in keep.items()}
    if vocabulary.kind == "Unigram":
        model["vocab"] = [item for item in model["vocab"] if item[0] in place]
        if model.get("unk_id") is not None:
            model["unk_id"] = place[vocabulary.tokens[model["unk_id"]]]
    else:
        model["vocab"] = {token: place[token] for token in sorted(set(model["vocab"]) & set(place), key=place.__getitem__)}
    if "merges" in model:
        prefix = vocabulary.prefix
        model["merges"] = [
            merge
            for merge, (left, right) in zip(model["merges"], _pairs(model["merges"]), strict=True)
            if {left, right, left + right.removeprefix(prefix)} <= set(place)
        ]
    for item in data.get("added_tokens") or []:
        item["id"] = place[item["content"]]
    if data.get("added_tokens"):
        data["added_tokens"].sort(key=lambda item: item["id"])
    for holder, key in id_places(data):
        holder[key] = moved.get(holder[key], 0)  # what no token has is never used
    return data


def id_places(data: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Where a tokenizer.json names ids outside its vocabulary: a list or mapping, and the place in it."""
    if isinstance(data.get("padding"), dict) and isinstance(data["padding"].get("pad_id"), int):
        yield data["padding"], "pad_id"
    processor = data.get("post_processor") or {}
    for part in (processor, *(processor.get("processors") or [])):
        for token in (part.get("special_tokens") or {}).values():
            yield from ((token["ids"], number) for number in range(len(token["ids"])))
        yield from ((part[end], 1) for end in ("sep", "cls") if part.get(end))


def _ids_in(data: Mapping[str, Any]) -> set[int]:
    return {holder[key] for holder, key in id_places(data)}


# -- Small parts ---------------------------------------------------------------------------------------------------------------


def _encoded(text: str, texts: Iterable[str]) -> Iterator[list[int]]:
    """The ids of each of the texts by the tokenizer in `text`, special tokens left out."""
    tokenizer, rest = parsed_tokenizer(text), iter(texts)
    while some := list(islice(rest, _AT_ONCE)):
        yield from (row.ids for row in tokenizer.encode_batch_fast(some, add_special_tokens=False))
