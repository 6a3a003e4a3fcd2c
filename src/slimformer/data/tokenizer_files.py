"""Says which tokenizer the files of a model folder stand for, as the text of a tokenizer.json.

transformers builds many tokenizers from the arguments in tokenizer_config.json and takes only the vocabulary from tokenizer.json, so
that the two may give other ids. A model was tuned with what AutoTokenizer gave: that is taken, and the log says so. Folders without a
tokenizer.json are converted by transformers. Nothing is downloaded, and no code of a model is run.
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
_BERT_TYPES = {"bert", "distilbert", "electra"}  # model types whose class is one of these if the folder names none
# Settings that hold for the machine or the files of the source alone; tokenizer.json has the added tokens.
_OF_THE_SOURCE = (
    *("name_or_path", "is_local", "local_files_only", "auto_map", "backend", "tokenizer_file", "vocab_file"),
    *("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"),
)
_MOST_IDS = 10_000_000  # of any vocabulary: the tokenizers package walks over all ids up to the largest one
_PROBES = (
    "Good films, isn't it?",
    "DÉJÀ VU: naïve Ça, 12,345.67 €",
    "東京 is here on 2024-05-01",
    " two  spaces\tand a tab ",
    "qxzj ☃",
)
_VOCABULARY_PROBES = 48  # tokens of the vocabulary, evenly spaced, in texts of eight


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
        segments = (read_json(source / "config.json").get("type_vocab_size") or 1) > 1
        settings["model_input_names"] = ["input_ids", *(["token_type_ids"] if segments else []), "attention_mask"]
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
    probes = [*_PROBES, *_vocabulary_probes(data)]
    try:
        theirs, kind = _auto_tokenizer(folder)
        expected = {probe: _ids(folder, theirs, probe) for probe in probes}
    except Exception as error:  # a class that transformers does not know, files of another class, ...
        _log.debug("transformers cannot read the tokenizer in %s: %s", folder, error)
        return text
    differing = next((probe for probe in probes if _ids(folder, ours, probe) != expected[probe]), None)
    if differing is None:
        return text
    ids, others = _ids(folder, ours, differing), expected[differing]
    taken = max(others, default=0) <= _largest_id(data, _said_tokens(folder))
    _log.warning(
        "the tokenizer files in %s disagree: of %r tokenizer.json makes %s, and %s of transformers makes %s. %s",
        folder,
        differing,
        _short(ids),
        kind,
        _short(others),
        f"{kind} is taken, because a model is tuned with what AutoTokenizer gives."
        if taken
        else "tokenizer.json is taken, because the other ids are beyond its vocabulary.",
    )
    return _plain_text(theirs, _said_tokens(folder) | _added(data)) if taken else text


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
    settings, normalizer = read_json(folder / _CONFIG), data.get("normalizer") or {}
    expected = {
        "lowercase": ("do_lower_case", True),
        "strip_accents": ("strip_accents", None),
        "handle_chinese_chars": ("tokenize_chinese_chars", True),
    }
    if normalizer.get("type") != "BertNormalizer":
        yield f"its normalizer is {normalizer.get('type', 'missing')}, a BERT tokenizer has a BertNormalizer"
    else:
        for name, (option, default) in expected.items():
            there, said = normalizer.get(name), settings.get(option, default)
            if there != said:
                yield f"tokenizer.json has {name}: {there}, and by tokenizer_config.json it is {option}: {said}"
    if data["model"].get("continuing_subword_prefix") != "##" or data["model"].get("type", "WordPiece") != "WordPiece":
        yield f"its model is {data['model'].get('type')}, that of a BERT tokenizer is WordPiece"
    if (data.get("pre_tokenizer") or {}).get("type") != "BertPreTokenizer":
        yield "its texts are split otherwise than a BERT tokenizer splits them"
    if not data.get("post_processor"):
        yield "tokenizer.json adds no [CLS] and [SEP]"


def _vocabulary_probes(data: Mapping[str, Any]) -> list[str]:
    """Texts of words of the vocabulary, as they are and with capitals."""
    special = {item["content"] for item in data.get("added_tokens") or []}
    vocabulary = data["model"].get("vocab") or {}
    words = [str(item if isinstance(item, str) else item[0]).strip("#▁Ġ@</w>") for item in vocabulary]
    words = [word for word in words if word and word not in special]
    some = words[:: max(1, len(words) // _VOCABULARY_PROBES)]
    texts = [" ".join(some[start : start + 8]) for start in range(0, len(some), 8)]
    return [*texts, *(text.title() for text in texts)]


def _ids(folder: Path, tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text, and of it as a pair with itself."""
    with encoding_errors(folder):
        return [*tokenizer.encode(text).ids, *tokenizer.encode(text, text).ids]


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
        tokens |= {str(item["content"] if isinstance(item, dict) else item) for items in lists for item in items}
    return tokens


def _special_tokens(folder: Path, data: Mapping[str, Any]) -> dict[str, str]:
    """The names that transformers gives to special tokens ("pad_token"), as the folder or its vocabulary has them."""
    said = read_json(folder / "special_tokens_map.json")
    usual = {"pad_token": ("[PAD]", "<pad>"), "unk_token": ("[UNK]", "<unk>"), "cls_token": ("[CLS]", "<s>")}
    usual |= {"sep_token": ("[SEP]", "</s>"), "mask_token": ("[MASK]", "<mask>")}
    there = _words(data) | _added(data)
    names = {}
    for name, candidates in usual.items():
        given = said.get(name)
        given = given.get("content") if isinstance(given, dict) else given
        token = next((token for token in (given, *candidates) if token in there), None)
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


def _short(ids: list[int]) -> str:
    return f"[{', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}]"
