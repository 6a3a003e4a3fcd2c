"""Trains a new vocabulary for a WordPiece tokenizer, and says what its pieces are made of in the old one.

Everything but the pieces is taken over from the old tokenizer: how a text is normalized (lower case, accents), how it is split into
words, the mark of pieces inside a word, the special and added tokens, and where they stand around a text. So both tokenizers see the
same words, and differ only in how they split each of them. Other kinds are refused: in a BPE or a Unigram, words cannot be told from
pieces in the same way.

Paper: Schuster and Nakajima 2012 for the pieces; Zhao et al. 2019 for a student that reads fewer of them than its teacher. The training
is that of the tokenizers package, which merges the most frequent pair of neighbours until there are enough pieces.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slimformer.data.tokenizer_files import parsed_tokenizer
from slimformer.data.trimming import id_places
from slimformer.errors import DataError, ModelError, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NET = [chr(code) for code in range(33, 127)]  # signs and letters of ASCII: words of them can be read though no text had them
TWICE = 2  # a pair that occurs once in all texts makes no piece


def check_retrainable(text: str) -> None:
    """ModelError unless the tokenizer.json in `text` is a WordPiece."""
    kind = kind_of(text)
    if kind != "WordPiece":
        raise ModelError(
            f"the tokenizer is a {kind}, and a new vocabulary can be trained for a WordPiece alone.",
            help="leave vocabulary out, or begin with a teacher such as BERT, DistilBERT or ELECTRA.",
        )


def kind_of(text: str) -> str:
    """What the model of a tokenizer.json is called: "WordPiece", "BPE", ..."""
    model = json.loads(text)["model"]
    return str(model.get("type") or ("WordPiece" if "max_input_chars_per_word" in model else "tokenizer of an old file"))


def retrain_tokenizer(text: str, texts: Iterable[str], size: int, named: Iterable[str] = ()) -> str:
    """The tokenizer.json `text` with a new vocabulary of `size` pieces, trained on the texts.

    Special and added tokens and those in `named` come first, in their old order, then single characters: those of the texts, and ASCII.
    ModelError if it is no WordPiece, DataError if the size has no room for these, or if the texts give fewer pieces.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    check_retrainable(text)
    data, old = json.loads(text), parsed_tokenizer(text)
    ids = old.get_vocab(with_added_tokens=True)
    mark = mark_of(data)
    special = {item["content"] for item in data.get("added_tokens") or []} | {data["model"]["unk_token"], *named}
    first = sorted((token for token in special if token in ids), key=ids.__getitem__)
    words = Counter(word for item in texts for word in words_of(old, item))
    singles = _singles(old, words, mark)
    singles = [token for token in singles if token not in first]
    needed = len(first) + len(singles)
    if size < needed:
        raise DataError(
            f"a vocabulary of {size:,} pieces has no room for {len(first):,} special tokens and {len(singles):,} single characters of "
            "these texts.",
            help=f"ask for {needed:,} or more; some hundreds more make pieces of words.",
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=TWICE,
        special_tokens=[*first, *singles],  # listed, so that their ids, and with them the order of merges, are always the same
        continuing_subword_prefix=mark,
        show_progress=False,
    )
    maker = Tokenizer(models.WordPiece(unk_token=data["model"]["unk_token"]))
    maker.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    repeated = (word for word, count in sorted(words.items()) for _ in range(count))
    maker.train_from_iterator(repeated, trainer)
    found = maker.get_vocab()
    if len(found) != size:
        raise DataError(
            f"the texts give a vocabulary of {len(found):,} pieces, not of {size:,}.",
            help=f"ask for at most {len(found):,}, or give more texts.",
        )
    data["model"]["vocab"] = dict(sorted(found.items(), key=lambda item: item[1]))
    _move_ids(data, found, {index: token for token, index in ids.items()})
    return json.dumps(data, ensure_ascii=False)


def descent(old: str, new: str) -> list[tuple[int, ...]]:
    """The old ids that each piece of the tokenizer.json `new` is made of: one if both vocabularies have it, in the order of new ids."""
    known, data = parsed_tokenizer(old).get_vocab(with_added_tokens=True), json.loads(old)
    unknown, mark = known[data["model"]["unk_token"]], mark_of(data)
    made = parsed_tokenizer(new).get_vocab(with_added_tokens=True)
    parts = {index: (known[piece],) if piece in known else _split(piece, known, mark, unknown) for piece, index in made.items()}
    return [parts[index] for index in range(len(parts))]


def shared_pieces(old: str, new: str) -> dict[int, int]:
    """The old id of each piece of the tokenizer.json `new` that `old` has too, of any kind, by its new id."""
    known, made = (parsed_tokenizer(text).get_vocab(with_added_tokens=True) for text in (old, new))
    return {made[piece]: known[piece] for piece in sorted(made, key=made.__getitem__) if piece in known}


def word_starts(text: str) -> list[bool]:
    """Whether each piece of a WordPiece tokenizer.json begins a word, by id; special tokens are words of their own."""
    mark, tokens = mark_of(json.loads(text)), parsed_tokenizer(text).get_vocab(with_added_tokens=True)
    starts = {index: not (token.startswith(mark) and len(token) > len(mark)) for token, index in tokens.items()}
    return [starts.get(index, True) for index in range(max(starts) + 1)]


def same_words(one: str, other: str) -> bool:
    """Whether two tokenizer.json split texts into the same words, and only words into other pieces."""
    if {kind_of(one), kind_of(other)} != {"WordPiece"}:
        return False
    parts = ("normalizer", "pre_tokenizer")
    first, second = (json.loads(text) for text in (one, other))
    return all(first.get(part) == second.get(part) for part in parts) and mark_of(first) == mark_of(second)


def mark_of(data: Mapping[str, Any]) -> str:
    """What stands before a piece inside a word: "##"."""
    return str(data["model"].get("continuing_subword_prefix") or "##")


def words_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words of a text, normalized, as a tokenizer splits them before it looks for pieces."""
    plain = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer is not None else text
    if tokenizer.pre_tokenizer is None:
        return plain.split()
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(plain)]


def _singles(tokenizer: Tokenizer, words: Mapping[str, int], mark: str) -> list[str]:
    """Single characters, with the mark if they stand inside of words."""
    net = sorted({word for sign in NET for word in words_of(tokenizer, sign)})
    inner = [sign for sign in net if len(words_of(tokenizer, f"a{sign}")) == 1]
    begins = {word[0] for word in words} | {sign for sign in net if len(sign) == 1}
    inside = {sign for word in words for sign in word[1:]} | {sign for sign in inner if len(sign) == 1}
    return [*sorted(begins | inside), *(mark + sign for sign in sorted(inside))]


def _split(piece: str, known: Mapping[str, int], mark: str, unknown: int) -> tuple[int, ...]:
    """The longest pieces first, as WordPiece does; the unknown piece if there are none."""
    inner = piece.startswith(mark) and len(piece) > len(mark)
    body, found = piece.removeprefix(mark) if inner else piece, list[int]()
    while body:
        prefix = mark if inner or found else ""
        end = next((end for end in range(len(body), 0, -1) if prefix + body[:end] in known), 0)
        if not end:
            return (unknown,)
        found.append(known[prefix + body[:end]])
        body = body[end:]
    return tuple(found)


def _move_ids(data: Mapping[str, Any], made: Mapping[str, int], tokens: Mapping[int, str]) -> None:
    """Gives the tokens that a tokenizer.json names outside of its vocabulary their new ids; `tokens`: by their old ones."""
    added: Sequence[dict[str, Any]] = data.get("added_tokens") or []
    for item in added:
        item["id"] = made[item["content"]]
    for holder, key in id_places(data):
        token = tokens.get(holder[key])
        if token is not None and token not in made:
            raise ModelError(
                f"the tokenizer puts {shown(token, 40)} around texts, and does not say that it is a special token."
            )
        holder[key] = made.get(token, 0) if token is not None else 0
