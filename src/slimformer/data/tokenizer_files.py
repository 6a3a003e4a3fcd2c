"""Says which tokenizer the files of a model folder stand for, as the text of a tokenizer.json.

A model was tuned with what AutoTokenizer gave at that time. transformers 4 took tokenizer.json as it is, but for a few settings of
tokenizer_config.json; transformers 5 takes only the vocabulary from it and builds the class that the folder names, which may give
other ids. Where the two disagree, `_why_the_file` decides, and the log says what is taken and why. Folders without a tokenizer.json
are converted by transformers. Nothing is downloaded, and no code of a model is run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimformer.data.two_sided import SIDES, TARGET, is_two_sided, lone_side, side_text
from slimformer.errors import ExtraError, ModelError, shown
from slimformer.files import read_small, write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_log = logging.getLogger(__name__)

OTHER_FORMS = ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "spm.model", "tokenizer.model")
_JSON, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_SIDES = ("source.spm", "target.spm")  # of a Marian: they hold the pieces of the two languages
_SIDE_FILES = (_CONFIG, "special_tokens_map.json", "added_tokens.json", "config.json", "merges.txt")
_AS_THE_FILE = {"PreTrainedTokenizer", "TokenizersBackend"}  # classes that take tokenizer.json as it is, "Fast" left out
_BERTS = {"BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer"}
_BERT_PARTS = (  # part and name in tokenizer.json; what a BERT tokenizer has there, or the setting that says it and its default
    ("normalizer", "type", None, "BertNormalizer"),
    ("normalizer", "clean_text", None, True),
    ("normalizer", "lowercase", "do_lower_case", True),
    ("normalizer", "strip_accents", "strip_accents", None),
    ("normalizer", "handle_chinese_chars", "tokenize_chinese_chars", True),
    ("pre_tokenizer", "type", None, "BertPreTokenizer"),
    ("model", "unk_token", None, "[UNK]"),
    ("model", "continuing_subword_prefix", None, "##"),
    ("model", "max_input_chars_per_word", None, 100),  # only a WordPiece has it
)
_BERT_TYPES = {"bert", "distilbert", "electra"}  # model types whose class is one of these if the folder names none
# Settings that hold for the machine or the files of the source alone; tokenizer.json has the added tokens.
_OF_THE_SOURCE = (
    *("name_or_path", "is_local", "local_files_only", "auto_map", "backend", "tokenizer_file", "vocab_file"),
    *("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"),
)
_USUAL = {  # the special tokens by the names that transformers gives to them: those of BERT, then those of others
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}
_MOST_IDS = 10_000_000  # of any vocabulary: the tokenizers package walks over all ids up to the largest one
_PROBES = (
    "Good films, isn't it?",
    "DÉJÀ VU: naïve Ça, 12,345.67 €",
    "東京 is here on 2024-05-01",
    " two  spaces\tand a tab ",
    "qxzj ☃",
)
_VOCABULARY_PROBES = 48  # tokens of the vocabulary, evenly spaced, in texts of eight
_FAR_MORE_UNKNOWN = 0.2  # of all tokens: two readings of sound files differ in a word here and there, wrong ones in most words


def tokenizer_text(folder: Path) -> str:
    """The tokenizer of a folder as the text of a tokenizer.json; ModelError if there is none, or none that can be used.

    The answer for a folder is kept as long as its files stay the same, and what is odd about them is logged once.
    """
    folder = Path(folder)
    stamps = []
    for name in (_JSON, *_SIDE_FILES, *OTHER_FORMS, *SIDES):
        file = folder / name
        if file.is_file():
            status = file.stat()
            stamps.append((name, status.st_mtime_ns, status.st_size))
    return _settle(folder.absolute(), tuple(stamps))


def named_tokens(folder: Path) -> set[str]:
    """The tokens of a folder's tokenizer that its files name: special ones, and those that were added."""
    data = json.loads(tokenizer_text(folder))
    return (_said_tokens(folder) | set(_special_tokens(folder, data).values())) & (_words(data) | _added(data))


def write_tokenizer(source: Path, folder: Path, cut: str | None = None) -> None:
    """Writes the tokenizer of `source` into `folder`: as tokenizer.json, with settings under which transformers gives the same ids.

    Files of other forms that were copied there are removed: transformers would add their tokens once more. `cut`: the tokenizer.json with
    fewer pieces that is written in the place of its own.
    """
    text = cut or tokenizer_text(source)
    write_text(folder / _JSON, text)
    if (written := target_text(source)) is not None:
        write_text(folder / TARGET, written)
    settings, data = read_json(source / _CONFIG), json.loads(text)
    for name in _OF_THE_SOURCE:
        settings.pop(name, None)
    if cut or _may_differ(source, data) or not settings.get("tokenizer_class"):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # for this, old and new versions read tokenizer.json as it is
        settings["model_input_names"] = ["input_ids", *(["token_type_ids"] if _has_types(source) else []), "attention_mask"]
    for name, token in _special_tokens(source, data).items():
        settings.setdefault(name, token)
    for name in ("special_tokens_map.json", "added_tokens.json", "merges.txt", *OTHER_FORMS, *(_SIDES if cut else ())):
        (folder / name).unlink(missing_ok=True)
    write_text(folder / _CONFIG, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def target_text(folder: Path) -> str | None:
    """The tokenizer of what a model writes, if it is another one than that of what it reads; else None."""
    if is_two_sided(folder):
        return side_text(folder, SIDES[1])
    file = Path(folder) / TARGET
    try:
        return read_small(file).decode("utf-8") if file.is_file() else None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}.", help="copy it again from where the model came from.") from None


@lru_cache(maxsize=8)
def _settle(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> str:
    there = {name for name, *_ in stamps}
    _refuse_strangers(folder, sorted(there))
    if is_two_sided(folder):
        text = side_text(folder, SIDES[0])
    else:
        text = _chosen(folder) if _JSON in there else _converted(folder, [name for name in OTHER_FORMS if name in there])
    text = _within_rows(folder, text)
    with encoding_errors(folder):
        tokenizer = parsed_tokenizer(text)
        for probe in ("", *_PROBES):
            tokenizer.encode(probe)
            tokenizer.encode(probe, probe)
        blind = all(tokenizer.encode(probe).ids == tokenizer.encode("").ids for probe in _PROBES)
    if blind:
        raise ModelError(
            f"the tokenizer in {folder} makes nothing of a text: of {_PROBES[0]!r} only {tokenizer.encode(_PROBES[0]).tokens}.",
            facts=[
                f"its files: {', '.join(sorted(there & {_JSON, *OTHER_FORMS}))}",
                f"its class: {_class_of(folder) or 'the usual one'}",
            ],
            help="name the right tokenizer_class in tokenizer_config.json (vocab.txt is of BertTokenizer), or copy its files again.",
        )
    settings = read_json(folder / _CONFIG)
    if "left" in (settings.get("padding_side"), settings.get("truncation_side")):
        _log.warning(
            "%s asks for padding or cutting on the left; texts are padded and cut on the right here.", folder / _CONFIG
        )
    return text


def _refuse_strangers(folder: Path, names: Iterable[str]) -> None:
    """ModelError for files that are not what their names say."""
    for name in names:
        with open(folder / name, "rb") as stream:
            head = stream.read(40).lstrip().lower()
        if head.startswith(b"version https://git-lfs"):
            raise ModelError(
                f"{folder / name} is a pointer of git-lfs, not the file.", help="fetch it: git lfs install, then git lfs pull."
            )
        if head.startswith((b"<!doctype", b"<html")):
            raise ModelError(
                f"{folder / name} is a web page.", help="a download that was refused looks like this; download it again."
            )


# -- A folder with a tokenizer.json --------------------------------------------------------------------------------------------


def _chosen(folder: Path) -> str:
    """The file as it is, unless transformers gives other ids for this folder."""
    file = folder / _JSON
    try:
        text = read_small(file).decode("utf-8")
        ours, data = parsed_tokenizer(text), json.loads(text)  # the two parsers do not agree on all that is no JSON
    except Exception as error:  # tokenizers raises bare Exception for whatever is wrong with the file
        raise ModelError(
            f"{file} cannot be read as a tokenizer: {_first_line(error)}.",
            help="copy tokenizer.json again from where the model came from.",
        ) from None
    _check_ids(folder, data)
    if not _may_differ(folder, data):
        return text
    if find_spec("transformers") is None:
        for reason in _bert_differences(folder, data):
            _log.warning("%s: %s. tokenizer.json is taken: without transformers nothing else can be.", folder, reason)
        return text
    return _agreed(folder, text, ours, data)


def _agreed(folder: Path, text: str, ours: Tokenizer, data: dict[str, Any]) -> str:
    """The file as it is if transformers reads the folder so, else what `_why_the_file` is for; tells what they disagree on."""
    said, special = _said_tokens(folder) - _added(data), set(_special_tokens(folder, data).values()) - _added(data)
    try:
        theirs, kind = _auto_tokenizer(folder)
        as_4 = _as_transformers_4(folder, data, theirs)
    except Exception as error:  # a class that transformers does not know, files of another class, ...
        _log.debug("transformers cannot read the tokenizer in %s: %s", folder, error)
        if lost := said - _words(data):
            _log.warning("%s: transformers cannot read it, and without it %s are no tokens.", folder, ", ".join(sorted(lost)))
        return text
    probes = [*_PROBES, *_vocabulary_probes(data, special), *_in_eights(sorted(said))]
    known = said | _added(data)
    try:
        expected = [_encoded(folder, theirs, probe) for probe in probes]
    except ModelError as error:  # its class needs an [UNK] that the vocabulary does not have
        _log.debug("what transformers makes of the tokenizer in %s is of no use: %s", folder, error)
        return _plain_text(as_4, known)
    as_in_4 = [_encoded(folder, as_4, probe) for probe in probes] == expected
    read = [_encoded(folder, ours, probe) for probe in probes]
    if read == expected:
        if not special or not as_in_4:
            return text
        _log.info("%s: tokenizer.json does not say that %s are special; they are.", folder, ", ".join(sorted(special)))
        return _plain_text(as_4, known)
    probe, mine, other = next(row for row in zip(probes, read, expected, strict=True) if row[1] != row[2])
    what = next(name for name in mine if mine[name] != other[name])
    reason = "" if as_in_4 else _why_the_file(folder, data, as_4, theirs, kind, probes)
    _log.warning(
        "the tokenizer files in %s disagree: of %r tokenizer.json makes the %s %s, and %s of transformers makes %s. %s",
        folder,
        probe,
        what,
        _short(mine[what], other[what]),
        kind,
        _short(other[what], mine[what]),
        f"tokenizer.json is taken, because {reason}."
        if reason
        else f"{kind} is taken, because a model is tuned with what AutoTokenizer gives.",
    )
    return _plain_text(as_4 if reason else theirs, known)


def _why_the_file(
    folder: Path, data: Mapping[str, Any], as_4: Tokenizer, theirs: Tokenizer, kind: str, probes: list[str]
) -> str:
    """What speaks for tokenizer.json where this transformers reads the folder otherwise; empty if nothing does."""
    model, other = type(as_4.model).__name__, type(theirs.model).__name__
    if model != other:
        return f"it holds a {model}, of whose vocabulary {kind} makes a {other}"
    if max(index for probe in probes for index in theirs.encode(probe, probe).ids) > _largest_id(data, _said_tokens(folder)):
        return "the other ids are beyond its vocabulary"
    unknown, others = _unknown_share(as_4, probes), _unknown_share(theirs, probes)
    if others > unknown + _FAR_MORE_UNKNOWN:
        return f"of such texts {others:.0%} is unknown to {kind}, and {unknown:.0%} to the file"
    version = str(read_json(folder / "config.json").get("transformers_version"))
    return f"the model was saved with transformers {version}, which took that file" if version.startswith("4.") else ""


def _as_transformers_4(folder: Path, data: dict[str, Any], theirs: Tokenizer) -> Tokenizer:
    """The file as transformers 4 read it: with a few settings of tokenizer_config.json, and the added tokens that `theirs` has."""
    kind, settings, parts = _class_of(folder), read_json(folder / _CONFIG), data.copy()
    if kind in {*_BERTS, "MPNetTokenizer"} and (data.get("normalizer") or {}).get("type") == "BertNormalizer":
        said = {name: settings.get(option, default) for _, name, option, default in _BERT_PARTS if option}
        parts["normalizer"] = data["normalizer"] | said
    if kind not in _AS_THE_FILE and (data.get("pre_tokenizer") or {}).get("type") == "ByteLevel":
        parts["pre_tokenizer"] = data["pre_tokenizer"] | {"add_prefix_space": bool(settings.get("add_prefix_space"))}
    tokenizer = parsed_tokenizer(json.dumps(parts, ensure_ascii=False))
    known = _words(data) | _added(data) | _said_tokens(folder)
    tokenizer.add_tokens([token for _, token in sorted(theirs.get_added_tokens_decoder().items()) if token.content in known])
    return tokenizer


def _may_differ(folder: Path, data: Mapping[str, Any]) -> bool:
    """Whether transformers may give other ids than tokenizer.json; decided from the files, without transformers."""
    if not _said_tokens(folder) <= _added(data):
        return True
    kind = _class_of(folder)
    if kind in _AS_THE_FILE:
        return False
    if kind in _BERTS:
        return any(True for _ in _bert_differences(folder, data))
    return True


def _class_of(folder: Path) -> str:
    """The tokenizer class that the folder names, "Fast" left out, or else that of its model type as far as it is known here."""
    config = read_json(folder / "config.json")
    named = read_json(folder / _CONFIG).get("tokenizer_class") or config.get("tokenizer_class")
    if named:
        return str(named).removesuffix("Fast")
    kind = str(config.get("model_type") or "")
    if not kind or kind != _base_type(config):
        return "TokenizersBackend"
    return "BertTokenizer" if kind in _BERT_TYPES else ""


def _bert_differences(folder: Path, data: Mapping[str, Any]) -> Iterator[str]:
    """Where tokenizer.json differs from what a BERT tokenizer of transformers is built of."""
    if _class_of(folder) not in _BERTS:
        return
    settings = read_json(folder / _CONFIG)
    for part, name, option, default in _BERT_PARTS:
        there, said = (data.get(part) or {}).get(name), settings.get(option, default) if option else default
        if there != said:
            yield f"tokenizer.json has {name}: {there}, and by tokenizer_config.json and its class it is {option or name}: {said}"
    if not _marks_as_bert(data):
        yield "tokenizer.json does not make [CLS] A [SEP] B [SEP] of two texts"
    for file in (_CONFIG, "special_tokens_map.json"):
        content = read_json(folder / file)
        for name, (usual, *_) in _USUAL.items():
            if (token := _content(content.get(name))) not in (None, usual):
                yield f"the {name} of a BERT tokenizer is {usual}, and in {file} it is {token}"
    if plain := {usual for usual, *_ in _USUAL.values()} & _words(data) - _added(data):
        yield f"tokenizer.json does not say that {', '.join(sorted(plain))} are special"


def _marks_as_bert(data: Mapping[str, Any]) -> bool:
    """Whether the post-processor puts the marks around one text and two that a BERT tokenizer puts there."""
    processor, ids = data.get("post_processor") or {}, data["model"].get("vocab") or {}
    if not {"[CLS]", "[SEP]"} <= _words(data) or not isinstance(ids, dict):
        return False
    if processor.get("type") == "BertProcessing":
        return all(processor.get(end) == [token, ids[token]] for end, token in (("cls", "[CLS]"), ("sep", "[SEP]")))
    single = [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
    ]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": "[SEP]", "type_id": 1}}]
    tokens = processor.get("special_tokens") or {}
    named = all((tokens.get(token) or {}).get("ids") == [ids[token]] for token in ("[CLS]", "[SEP]"))
    return named and (processor.get("single"), processor.get("pair")) == (single, pair)


def _vocabulary_probes(data: Mapping[str, Any], special: set[str]) -> list[str]:
    """Texts of words of the vocabulary, as they are and with capitals, without added and special tokens."""
    vocabulary, added = data["model"].get("vocab") or {}, _added(data)
    words = [str(item if isinstance(item, str) else item[0]).strip("#▁Ġ@</w>") for item in vocabulary]
    words = [word for word in words if word and word not in special | added]
    texts = _in_eights(words[:: max(1, len(words) // _VOCABULARY_PROBES)])
    return [*texts, *(text.title() for text in texts)]


def _in_eights(words: list[str]) -> list[str]:
    return [" ".join(words[start : start + 8]) for start in range(0, len(words), 8)]


def _encoded(folder: Path, tokenizer: Tokenizer, text: str) -> dict[str, list[int]]:
    """What the model gets of a text, and of it as a pair with itself; token types only if it has rows for them."""
    with encoding_errors(folder):
        one, two = tokenizer.encode(text), tokenizer.encode(text, text)
    encoded = {"ids": one.ids, "ids of a pair": two.ids}
    return encoded | {"token types of a pair": two.type_ids} if _has_types(folder) else encoded


def _has_types(folder: Path) -> bool:
    rows = read_json(folder / "config.json").get("type_vocab_size")
    return isinstance(rows, int) and rows > 1


def _unknown_share(tokenizer: Tokenizer, probes: Iterable[str]) -> float:
    """How many of the tokens of the texts are unknown, of 1."""
    model = json.loads(tokenizer.model.__getstate__())
    unknown = model.get("unk_id", tokenizer.token_to_id(str(model.get("unk_token"))))
    ids = [index for probe in probes for index in tokenizer.encode(probe, add_special_tokens=False).ids]
    return ids.count(unknown) / max(1, len(ids))


# -- What transformers makes of a folder ---------------------------------------------------------------------------------------


def _auto_tokenizer(folder: Path) -> tuple[Tokenizer, str]:
    """The tokenizer that AutoTokenizer gives for a folder, and the name of its class."""
    import transformers

    base = _base_type(read_json(folder / "config.json"))
    named = read_json(folder / _CONFIG).get("tokenizer_class")
    ours = (
        read_json(folder / "config.json").get("model_type") != base
    )  # a type that AutoTokenizer knows only if we are imported
    options = {"tokenizer_type": base} if ours and base and not named else {}
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        auto = transformers.AutoTokenizer.from_pretrained(
            folder, use_fast=True, local_files_only=True, trust_remote_code=False, **options
        )
        if not hasattr(auto, "backend_tokenizer"):
            raise ModelError(
                f"the tokenizer in {folder} is a {type(auto).__name__}, which exists in Python alone: it has no tokenizer.json, and so "
                "no file that serves an exported model.",
                help="start from a model whose tokenizer has a fast form.",
            )
        tokenizer: Tokenizer = auto.backend_tokenizer
    finally:
        transformers.logging.set_verbosity(level)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, type(auto).__name__


def _converted(folder: Path, there: list[str]) -> str:
    """The tokenizer of a folder without tokenizer.json."""
    if missing := lone_side(folder):
        raise ModelError(
            f"{folder} holds a part of a Marian's tokenizer, and no {missing}.",
            facts=[f"needed: {', '.join(SIDES)}, vocab.json"],
            help="copy all three from where the model came from.",
        )
    if not there:
        raise ModelError(
            f"{folder} holds no tokenizer.",
            facts=[f"looked for: {_JSON}, {', '.join(OTHER_FORMS)}"],
            help="save it beside the model: AutoTokenizer.from_pretrained(<base model>).save_pretrained(<this folder>).",
        )
    if find_spec("transformers") is None:
        raise ExtraError(
            f"{folder} holds {' and '.join(there)} and no tokenizer.json, and converting needs transformers, which is not installed.",
            help="pip install transformers, or save a tokenizer.json there on a machine that has it.",
        )
    if any(name.endswith(".model") for name in there) and find_spec("sentencepiece") is None:
        raise ExtraError(
            f"{folder} holds {' and '.join(there)} and no tokenizer.json, and converting needs sentencepiece, which is not installed.",
            help="pip install sentencepiece, or save a tokenizer.json there on a machine that has it.",
        )
    code = read_json(folder / _CONFIG).get("auto_map") or {}
    if isinstance(code, dict) and "AutoTokenizer" in code:
        raise ModelError(
            f"the tokenizer in {folder} is made by code that came with it ({_class_of(folder) or 'auto_map'}), which is never run.",
            facts=[f"there: {', '.join(there)}"],
            help="if its class has a fast form, save a tokenizer.json there on a machine where you trust the code.",
        )
    if "vocab.json" in there and not (folder / "merges.txt").is_file():
        raise ModelError(f"{folder} holds vocab.json without merges.txt.", help="copy both from where the model came from.")
    try:
        tokenizer, kind = _auto_tokenizer(folder)
    except ModelError:
        raise
    except Exception as error:  # conversion meets every kind of broken file
        raise ModelError(
            f"the tokenizer in {folder} cannot be converted: {_first_line(error)}",
            facts=[f"there: {', '.join(there)}"],
            help="save a tokenizer.json there: AutoTokenizer.from_pretrained(...).save_pretrained(<this folder>).",
        ) from None
    _log.info(
        "%s holds no tokenizer.json: one is made of %s, as %s of transformers reads it.", folder, " and ".join(there), kind
    )
    text = _plain_text(tokenizer, _said_tokens(folder))
    _check_ids(folder, json.loads(text))
    return text


def _plain_text(tokenizer: Tokenizer, known: set[str]) -> str:
    """A tokenizer of transformers as text, without tokens that transformers made up: ids that the model has no rows for."""
    data = json.loads(tokenizer.to_str())
    vocabulary = data["model"].get("vocab") or {}
    words = set(vocabulary) if isinstance(vocabulary, dict) else {item[0] for item in vocabulary}
    data["added_tokens"] = [item for item in data["added_tokens"] if item["content"] in words | known | _used(data)]
    return json.dumps(data, ensure_ascii=False)


# -- Ids and tokens ------------------------------------------------------------------------------------------------------------


def _within_rows(folder: Path, text: str) -> str:
    """The text without special tokens that no text needs and the model has no rows for; ModelError if others are beyond the rows."""
    rows = read_json(folder / "config.json").get("vocab_size")
    if not isinstance(rows, int) or isinstance(rows, bool):
        return text
    data = json.loads(text)
    idle = [
        item
        for item in data.get("added_tokens") or []
        if item.get("special") and item["id"] >= rows and item["content"] not in _used(data) | _words(data)
    ]
    if idle:
        data["added_tokens"] = [item for item in data["added_tokens"] if item not in idle]
        _log.warning(
            "%s: the special tokens %s have ids that the model has no rows for: they are left out.",
            folder,
            ", ".join(item["content"] for item in idle),
        )
        text = json.dumps(data, ensure_ascii=False)
    vocabulary = data["model"].get("vocab")
    if isinstance(vocabulary, dict) and vocabulary.get("", -1) >= rows:  # an empty line at the end of vocab.txt
        del vocabulary[""]
        text = json.dumps(data, ensure_ascii=False)
    largest = _largest_id(data)
    if largest >= rows:
        every = (vocabulary if isinstance(vocabulary, dict) else {}) | {
            item["content"]: item["id"] for item in data["added_tokens"] or []
        }
        beyond = [token for token, index in every.items() if index >= rows]
        raise ModelError(
            f"{folder}: the tokenizer has ids up to {largest:,}, and the model has {rows:,} rows of word embeddings.",
            facts=[
                f"tokens: {len(_words(data) | _added(data)):,}",
                f"vocab_size in config.json: {rows:,}",
                *([f"without a row: {', '.join(shown(token, 30) for token in beyond[:5])}"] if beyond else []),
            ],
            help="the tokenizer is that of another model: copy the one that the model was tuned with.",
        )
    return text


def _check_ids(folder: Path, data: Mapping[str, Any]) -> None:
    largest = _largest_id(data)
    if largest >= _MOST_IDS:
        raise ModelError(
            f"{folder}: a token has the id {largest:,}, and the vocabulary holds {len(_words(data)):,} tokens.",
            help="copy tokenizer.json again from where the model came from.",
        )


def _largest_id(data: Mapping[str, Any], more: Iterable[str] = ()) -> int:
    """The largest id of a vocabulary and its added tokens; `more` tokens that are in neither take the next ids."""
    vocabulary = data["model"].get("vocab") or {}
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    largest = max([*ids, *(item["id"] for item in data.get("added_tokens") or [])], default=-1)
    return int(largest) + len(set(more) - _words(data) - _added(data))


def _words(data: Mapping[str, Any]) -> set[str]:
    vocabulary = data["model"].get("vocab") or {}
    return set(vocabulary) if isinstance(vocabulary, dict) else {item[0] for item in vocabulary}


def _added(data: Mapping[str, Any]) -> set[str]:
    return {item["content"] for item in data.get("added_tokens") or []}


def _used(data: Mapping[str, Any]) -> set[str]:
    """Tokens that the post-processor adds to each text."""
    processor = data.get("post_processor") or {}
    parts = [processor, *(processor.get("processors") or [])]
    tokens = {str(token) for part in parts for token in (part.get("special_tokens") or {})}
    return tokens | {str(part[end][0]) for part in parts for end in ("sep", "cls") if part.get(end)}


def _said_tokens(folder: Path) -> set[str]:
    """Tokens that the files beside tokenizer.json add to the vocabulary."""
    tokens: set[str] = set(read_json(folder / "added_tokens.json"))
    for name in (_CONFIG, "special_tokens_map.json"):
        content = read_json(folder / name)
        decoder, extra = content.get("added_tokens_decoder") or {}, content.get("extra_special_tokens") or []
        lists = [
            decoder.values() if isinstance(decoder, dict) else (),
            extra.values() if isinstance(extra, dict) else extra,
            content.get("additional_special_tokens") or [],
        ]
        tokens |= {str(_content(item)) for items in lists for item in items}
    return tokens


def _content(token: Any) -> Any:
    """A special token of a settings file, where it is a text or an object that holds it."""
    return token.get("content") if isinstance(token, dict) else token


def _special_tokens(folder: Path, data: Mapping[str, Any]) -> dict[str, str]:
    """The names that transformers gives to special tokens ("pad_token"), as the folder or its vocabulary has them."""
    said = read_json(folder / "special_tokens_map.json")
    there = _words(data) | _added(data)
    names = {}
    for name, candidates in _USUAL.items():
        token = next((token for token in (_content(said.get(name)), *candidates) if token in there), None)
        if token is not None:
            names[name] = str(token)
    return names


# -- Small parts ---------------------------------------------------------------------------------------------------------------


@contextmanager
def encoding_errors(folder: Path | None = None) -> Iterator[None]:
    """Raises a ModelError for what the tokenizers package raises if it cannot encode a text: Exception, or a panic of its Rust code."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        where = f"the tokenizer in {folder}" if folder else "the tokenizer"
        raise ModelError(
            f"{where} cannot encode a text: {_first_line(error)}",
            help="its vocabulary lacks a token that it needs, such as [UNK], [CLS] or [SEP]: copy its files again, or save it anew.",
        ) from None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no file; ModelError if it cannot be read."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(read_small(file))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}.", help="copy it again from where the model came from.") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no JSON object.", help="copy it again from where the model came from.")
    return content


def _base_type(config: Mapping[str, Any]) -> str:
    return str(config.get("model_type") or "").removeprefix("slimformer_")


def parsed_tokenizer(text: str) -> Tokenizer:
    """The tokenizer, without the padding and cutting that a file may ask for."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _short(ids: list[int], others: list[int]) -> str:
    """Eight of the ids, from the first one on that is not as in `others`, or from the last one that both have."""
    both = list(zip(ids, others, strict=False))
    start = next((place for place, (mine, other) in enumerate(both) if mine != other), max(0, len(both) - 1))
    end = start + 8
    return f"[{'..., ' if start else ''}{', '.join(map(str, ids[start:end]))}{', ...' if len(ids) > end else ''}]"
