"""Finds out which class of transformers a plain model folder's weights are for, from the names in their headers.

config.json names a class, and may be wrong or silent. The names of the tensors outside the encoder tell which head was trained: a class
fits if all tensors of its head are there. What was found against the word of config.json is a remark.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimformer.core.pooling import EMBEDDER
from slimformer.errors import ModelError, shown
from slimformer.families.base import family_of
from slimformer.saving.building import MOST_LABELS, silence
from slimformer.saving.folders import CONFIG
from slimformer.saving.headers import StoredTensor, StoredWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PURPOSES = (  # of the heads that are looked for; of two that fit alike the first is taken
    "SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM", "PreTraining", "NextSentencePrediction",
    "MultipleChoice", "Seq2SeqLM",
)  # fmt: skip
_OF_WORDS = ("MaskedLM", "PreTraining")  # one file may hold both heads, and names the class of one
_WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_KEPT_HEAD = re.compile(r"\.modules_to_save\.[^.]+\.")  # the trained copy of a module, in PEFT's words
_OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))  # of checkpoints from TensorFlow
_NO_WEIGHTS = re.compile(r"(^|\.)(position_ids|token_type_ids)$")  # buffers that older versions saved
_CONVERTED = (
    "make PyTorch weights of them with transformers 4: "
    "AutoModel....from_pretrained(<this folder>, {}=True).save_pretrained(<another folder>)."
)
_FOREIGN = (  # names that other tools give to tensors: how, what the weights then are, and what to do
    (
        re.compile(
            r"\.(SCB|absmax|quant_map|qweight|qzeros|g_idx|weight_packed|weight_scale|_packed_params\w*|quant_state\..*)$"
        ),
        "are quantized by another tool ({}), and slimformer cuts float weights",
        "name the folder of the model before it was quantized.",
    ),
    (
        re.compile(r"\.(lora_\w+|base_layer|ia3_l|adapters?|adapter_\w+|hada_w\w*|oft_\w+)\."),
        "hold an adapter beside the matrices that it adds to ({})",
        "merge it where it was trained: model.merge_and_unload().save_pretrained(folder), and name that folder.",
    ),
    (re.compile(r"/.*:\d+$"), "are TensorFlow's ({})", _CONVERTED.format("from_tf")),
    (re.compile(r"[./]kernel$"), "are Flax's ({})", _CONVERTED.format("from_flax")),
    (
        re.compile(r"\.(weight|bias)_mask$"),
        "hold masks of torch.nn.utils.prune beside the matrices ({})",
        'make each final where the model was pruned: prune.remove(module, "weight"), then model.save_pretrained(folder).',
    ),
    (
        re.compile(r"\.weight_g$"),
        "hold the length and the direction of a matrix apart, as weight_norm does ({})",
        "join them where the model was trained: torch.nn.utils.remove_weight_norm(module), then model.save_pretrained(folder).",
    ),
    (
        re.compile(r"\.parametrizations\."),
        "hold a matrix in the parts of torch.nn.utils.parametrize ({})",
        'join them where the model was trained: parametrize.remove_parametrizations(module, "weight"), then '
        "model.save_pretrained(folder).",
    ),
)
_LABELS = 7  # a number of labels that is no other size of a tiny model
STEPS_UNREAD = "its transformer is read, not the steps behind it"  # of a folder of sentence-transformers, for any other task
LABEL_FIELDS = ("num_labels", "id2label", "label2id", "problem_type")
_TAG = re.compile(r"[BILUES]-\w+")


@dataclass(frozen=True)
class Parts:
    """The names of a class's tensors: those of the encoder, without its prefix, and those of the head.

    `per_label` names one that has a row for each label, `spare` those that weights may lack: they are tied, or computed. `ties`: names of
    one tensor, each with the one that transformers keeps it under, those in the encoder first.
    """

    cls: type[PreTrainedModel]
    prefix: str
    body: frozenset[str]
    head: frozenset[str]
    per_label: str | None
    spare: frozenset[str] = frozenset()
    ties: tuple[tuple[str, str], ...] = ()

    @property
    def pooled(self) -> bool:
        """Whether the class has a pooler."""
        return any(name.startswith("pooler.") for name in self.body)

    @property
    def purpose(self) -> str:
        """ "SequenceClassification" and the like; "" for an encoder."""
        return purpose_of(self.cls.__name__)


@dataclass(frozen=True)
class Source:
    """What the weights of a plain transformers folder are: the class they are for, and each tensor by its name in that class.

    `parts.head` is empty if they have no trained head. `problem` says why they cannot be loaded as they are, if so, `cure` what to do.
    """

    folder: Path
    raw: Mapping[str, Any]  # config.json, with the labels that the head has
    stored: StoredWeights
    parts: Parts
    body: Mapping[str, str]  # name in the encoder -> name in the file
    tops: Mapping[str, str]  # name outside it -> name in the file
    remarks: tuple[str, ...] = ()
    problem: str = ""
    cure: str = ""

    @property
    def tuned(self) -> str:
        """What the trained head is for: "SequenceClassification" and the like; "" if there is none."""
        return "" if self.problem else self.parts.purpose

    def holds(self, parts: Parts) -> bool:
        """Whether the weights have the trained head of that class, also if config.json names another that they hold too."""
        if self.problem or parts.cls is self.parts.cls:
            return not self.problem
        words = {self.parts.purpose, parts.purpose} <= set(_OF_WORDS)
        return words and bool(parts.head) and _fits(parts, self.body, self.tops)

    def tensor(self, name: str) -> StoredTensor:
        """What the headers say of a tensor by its name in the file."""
        return self.stored.tensors[name]


def find_source(folder: Path, raw: Mapping[str, Any], stored: StoredWeights) -> Source:
    """The class that a plain transformers folder's weights are for. `raw`: the content of its config.json.

    ModelError if the weights are quantized by another tool, or config.json contradicts the trained head.
    """
    kind, stated = str(raw["model_type"]), _stated(folder, raw)
    encoder = encoder_of(kind)
    _refuse_empty(folder, stored)
    renamed, remarks = _plain_names(folder, raw, stored, encoder)
    body, tops = _divide(renamed, encoder)
    if not encoder.body & set(body):
        raise ModelError(
            f"{folder}: its weights hold nothing of the encoder of {with_article(kind)} model; they begin with {min(stored.tensors)}.",
            facts=[f"looked for: {min(encoder.body)} and {len(encoder.body) - 1} more"],
            help="does config.json belong to these weights? A head alone, or another model's weights, cannot be loaded.",
        )
    cls = class_named(stated, kind)
    parts = _parts_of(cls, kind) if cls is not None else None
    _take_partners(body, tops, (encoder, *((parts,) if parts else ()), *_candidates(kind)), raw)
    problem, cure = "", "mend architectures in config.json; without it, the class is found from the weights."
    if parts is None or not (parts.head <= set(tops) if parts.head else set(tops) <= parts.spare):
        fitting = [other for other in _candidates(kind) if _fits(other, body, tops)]
        if fitting:
            own, better = parts, max(fitting, key=lambda other: _rank(other, raw))
            parts = better
            if own is None or own.head or better.cls is not own.cls:
                said = f"names {stated}" if stated else "names no class"
                named = min(better.head, default="tied to the word table")
                head = f"the head of {better.cls.__name__} ({named})"
                guess = _guessed(better, fitting, raw)
                remarks.append(f"{folder}: config.json {said}, and the weights hold {head}: that is used.{guess}")
        elif parts is None or (parts.head and not parts.head & set(tops)):
            if parts is not None:
                problem = f"config.json names {stated}, and the weights hold no such head ({min(parts.head)})"
                if tops:
                    problem += f", but {min(tops)}, which no class of transformers reads"
                    cure = f"if {min(tops)} is of that head, rename its tensors to {' and '.join(sorted(parts.head))}."
            elif stated and tops:
                problem = f"config.json names {stated}, which transformers does not have, and no other class reads {min(tops)}"
                cure = "rename the tensors of its head to those of a class of transformers; without architectures, that class is found."
            elif stated:
                remarks.append(f"{folder}: config.json names {stated}, which transformers does not have; the encoder is read.")
            parts = encoder
    if cls is None and stated and raw.get("auto_map"):
        problem = f"config.json names {stated}, whose code came with the model (auto_map); such code is never run"
    readers = (parts, *_candidates(kind)) if tops else ()
    unread = sorted(name for name in tops if not any(name in other.head | other.spare for other in readers))
    if unread and not problem:
        remarks.append(
            f"{folder}: {len(unread)} tensors belong to no head of transformers and are not read, the first is {unread[0]}."
        )
    if (folder / "modules.json").is_file() and not parts.head:
        head = " Its classifier is SetFit's own, and is not read." if (folder / "config_setfit.json").is_file() else ""
        remarks.append(f"{folder} is a sentence-transformers model: {STEPS_UNREAD}.{head}")
    settled = _with_labels(folder, raw, parts, tops, stored, remarks)
    return Source(folder, settled, stored, parts, body, tops, tuple(remarks), problem, cure)


def _refuse_empty(folder: Path, stored: StoredWeights) -> None:
    """ModelError for weights without a number in them."""
    if not stored.tensors:
        raise ModelError(f"{folder}: its weights hold no tensor.", help="save the model again.")
    if all(0 in tensor.shape for tensor in stored.tensors.values()):
        raise ModelError(
            f"{folder}: all {len(stored.tensors)} tensors of its weights are empty.",
            help="DeepSpeed (ZeRO stage 3) leaves that: gather the weights with its zero_to_fp32.py, then save the model again.",
        )


def _stated(folder: Path, raw: Mapping[str, Any]) -> str | None:
    names = raw.get("architectures") or None
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{folder / CONFIG}: architectures is {shown(names)}, not a list of names.", help="mend it there.")
    return str(names[0])


def class_named(name: str | None, kind: str) -> type[PreTrainedModel] | None:
    """The class of transformers of that name, if it is one for models of this kind."""
    import transformers

    cls = family_of(kind).model_class(name) if name and name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        return None
    return cls if getattr(cls.config_class, "model_type", None) == kind else None


def type_of_class(name: object) -> str | None:
    """The model type of the class of that name; None if transformers has none."""
    import transformers

    cls = getattr(transformers, name, None) if isinstance(name, str) and name else None
    kind = getattr(getattr(cls, "config_class", None), "model_type", None)
    return kind if isinstance(kind, str) else None


def purpose_of(class_name: str) -> str:
    """ "SequenceClassification" and the like, as in the names of Auto classes; "" for an encoder."""
    if class_name.endswith(("ForConditionalGeneration", "MTModel")):
        return "Seq2SeqLM"
    return class_name.partition("For")[2]


def with_article(noun: str) -> str:
    """The noun behind "a" or "an", by the sound of its first letters.

    >>> with_article("ElectraModel"), with_article("xlm-roberta"), with_article("UNet")
    ('an ElectraModel', 'an xlm-roberta', 'a UNet')
    """
    return f"{'an' if noun.lower().startswith(('a', 'e', 'i', 'o', 'xl', 'mp')) else 'a'} {noun}"


# -- The classes of a model type -----------------------------------------------------------------------------------------------


@lru_cache
def encoder_of(kind: str) -> Parts:
    """The parts of the class without a head."""
    import transformers

    with silence():
        cls = type(_tiny(transformers.AutoModel.from_config, kind))
    return _parts_of(cls, kind)


@lru_cache
def _candidates(kind: str) -> tuple[Parts, ...]:
    """The parts of all classes with a head for a purpose that we know."""
    found = []
    for purpose in _PURPOSES:
        parts = parts_for(f"AutoModelFor{purpose}", kind)
        if parts is not None:
            found.append(parts)
    return tuple(found)


@lru_cache
def parts_for(auto_class: str, kind: str) -> Parts | None:
    """The parts of the class that an Auto class takes for a model type; None if it has none."""
    try:
        with silence():
            cls = type(_tiny(auto_class_named(auto_class).from_config, kind))
    except (ValueError, KeyError):
        return None
    return _parts_of(cls, kind)


def auto_class_named(name: str) -> Any:
    """The Auto class of that name: one of transformers, or ours for the vectors of texts."""
    import transformers

    if name == EMBEDDER:
        from slimformer.families._embedder import AutoModelForSentenceEmbedding

        return AutoModelForSentenceEmbedding
    return getattr(transformers, name)


def _parts_of(cls: type[PreTrainedModel], kind: str) -> Parts:
    """The names of a class's tensors, from a tiny model on the meta device."""
    if cls not in _known:
        _known[cls] = _read_parts(cls, kind)
    return _known[cls]


_known: dict[type[PreTrainedModel], Parts] = {}


def _read_parts(cls: type[PreTrainedModel], kind: str) -> Parts:
    with silence():
        model = _tiny(cls, kind)
    state, tied = model.state_dict(), dict(model.all_tied_weights_keys or {})
    base = model.base_model is model
    prefix = "" if base else f"{model.base_model_prefix}."
    body = frozenset(name.removeprefix(prefix) for name in state if name.startswith(prefix))
    if base and purpose_of(cls.__name__):  # a T5 has its head beside the encoder
        body &= encoder_of(kind).body
    tops = frozenset(name for name in state if name.removeprefix(prefix) not in body)
    spare = frozenset(name for name in tops if name in tied or is_computed(model, name))
    head = tops - spare
    per_label = min((name for name in head if state[name].shape[0] == _LABELS and name.endswith("weight")), default=None)
    ties = tuple(sorted(tied.items(), key=lambda names: names[0] in tops))
    return Parts(cls, prefix, body, head, per_label, spare, ties)


def is_computed(model: PreTrainedModel, name: str) -> bool:
    """Whether a class fills a tensor itself if weights lack it, such as sinusoidal positions."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())


def _tiny(make: Any, kind: str) -> PreTrainedModel:
    """A tiny model without weights; `make` takes a config."""
    import torch
    import transformers

    family = family_of(kind)
    family.model_class("")  # the Auto classes know its models from here on
    sizes = family.tiny(kind) | {"vocab_size": 99, "max_position_embeddings": 64}
    with torch.device("meta"):
        try:
            return make(transformers.AutoConfig.for_model(kind, **sizes, num_labels=_LABELS))  # type: ignore[no-any-return]
        except ValueError:  # some classes have two outputs and no other number
            return make(transformers.AutoConfig.for_model(kind, **sizes))  # type: ignore[no-any-return]


# -- What the weights hold -----------------------------------------------------------------------------------------------------


def _plain_names(
    folder: Path, raw: Mapping[str, Any], stored: StoredWeights, encoder: Parts
) -> tuple[dict[str, str], list[str]]:
    """Today's name of each tensor -> its name in the file, and remarks; ModelError if they are quantized, or with an adapter."""
    import transformers

    for pattern, what, help in _FOREIGN:
        strange = next((name for name in stored.tensors if pattern.search(name)), None)
        if strange is not None:
            raise ModelError(f"the weights of {folder} {what.format(strange)}.", help=help)
    own = {name: name for name in stored.tensors if not _NO_WEIGHTS.search(name) and ".original_module." not in name}
    remarks = []
    unread = set(family_of(str(raw["model_type"])).unread(raw))
    for name in [name for name in own if unread.intersection(_endings(name))]:
        remarks.append(f"{folder}: nothing that the model computes reads {name}, so it is left out.")
        del own[name]
    plain = {name: _KEPT_HEAD.sub(".", _WRAPPERS.sub("", name)) for name in own}
    twice = [name for name, short in plain.items() if short != name and short in own]
    if twice:
        remarks.append(
            f"{folder}: {len(twice)} tensors are there twice, such as {twice[0]} and {plain[twice[0]]}: the plain name is taken."
        )
    names = {short: name for name, short in plain.items() if name not in twice}
    wrapper = next((_WRAPPERS.search(name) for name in names.values() if _WRAPPERS.search(name)), None)
    if wrapper is not None:
        where = "begin with" if all(name.startswith(wrapper[0]) for name in names.values()) else "hold"
        remarks.append(f"{folder}: the names of its tensors {where} '{wrapper[0]}', which is left out.")
    names, prefix = _under_one_prefix(names, encoder)
    kind, other = str(raw["model_type"]), prefix.rstrip(".").rpartition(".")[2].replace("_", "-")
    usual = {"bert"} - {type_of_class(_stated(folder, raw))}  # many call any encoder that
    if other in transformers.CONFIG_MAPPING and other not in usual | {kind, encoder.cls.base_model_prefix}:
        raise ModelError(
            f"{folder}: its weights are those of {with_article(other)} model (they begin with '{prefix}'), "
            f"and config.json says that it is {with_article(kind)} (model_type).",
            help=f'write "model_type": "{other}" there if the rest of config.json is of that type; else copy the whole folder again.',
        )
    if prefix:
        remarks.append(f"{folder}: the names of its tensors begin with '{prefix}', which is left out.")
    for old, new in _OLD_NAMES:
        names = {name.replace(old, new) if name.endswith(old) else name: own for name, own in names.items()}
    return names, remarks


def _under_one_prefix(names: Mapping[str, str], encoder: Parts) -> tuple[dict[str, str], str]:
    """The names with the encoder's under the usual prefix, and what stood before it: the name of a person's own module."""
    counts = Counter(
        name[: len(name) - len(rest)] for name in names for rest in _endings(name) if rest in encoder.body
    ).most_common(2)
    usual = f"{encoder.cls.base_model_prefix}."
    if not counts or counts[0][0] in ("", usual) or len({count for _, count in counts}) < len(counts):
        return dict(names), ""  # two encoders of one size are none that we know
    prefix = counts[0][0]
    inner = usual if prefix.endswith(f".{usual}") else ""
    outer = prefix.removesuffix(inner)
    new = "" if inner else usual
    return {new + name.removeprefix(outer) if name.startswith(outer) else name: own for name, own in names.items()}, outer


def _endings(name: str) -> Iterator[str]:
    """The name, and what is left of it after each of its points."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _divide(names: Mapping[str, str], encoder: Parts) -> tuple[dict[str, str], dict[str, str]]:
    """The tensors of the encoder, without its prefix, and those outside it."""
    prefix = f"{encoder.cls.base_model_prefix}."
    if any(name.startswith(prefix) for name in names):
        inside = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    else:
        firsts = {name.partition(".")[0] for name in encoder.body}
        inside = {name: name for name in names if name.partition(".")[0] in firsts}
    return {inside[name]: own for name, own in names.items() if name in inside}, {
        name: own for name, own in names.items() if name not in inside
    }


def _take_partners(body: dict[str, str], tops: dict[str, str], readers: Iterable[Parts], raw: Mapping[str, Any]) -> None:
    """Adds tied tensors under the names that transformers keeps them under: a file has each once, and perhaps under another."""
    if raw.get("share_encoder_decoder_embeddings") is False:  # a Marian of two vocabularies has no table for both
        return
    for parts in readers:
        for alias, source in parts.ties:
            (there, name), (home, usual) = _home(parts, alias, body, tops), _home(parts, source, body, tops)
            if name in there and (there is body or raw.get("tie_word_embeddings") is not False):
                home.setdefault(usual, there[name])


def _home(parts: Parts, name: str, body: dict[str, str], tops: dict[str, str]) -> tuple[dict[str, str], str]:
    """Which of the two a tensor of a class belongs to, and its name there."""
    short = name.removeprefix(parts.prefix)
    return (body, short) if short in parts.body else (tops, name)


def _fits(parts: Parts, body: Mapping[str, str], tops: Mapping[str, str]) -> bool:
    """Whether all tensors of the head are there, and a pooler if the class has one."""
    pooled = not parts.pooled or any(name.startswith("pooler.") for name in body)
    return parts.head <= set(tops) and (pooled if parts.head else set(tops) <= parts.spare)


def _rank(parts: Parts, raw: Mapping[str, Any]) -> tuple[bool, int, bool]:
    """The better of two classes that fit: tags say what they are for, then the one that reads more."""
    names = raw.get("id2label")
    tags = isinstance(names, Mapping) and any(isinstance(name, str) and _TAG.match(name) for name in names.values())
    return tags and parts.purpose == "TokenClassification", len(parts.head), parts.pooled


def _guessed(parts: Parts, fitting: Iterable[Parts], raw: Mapping[str, Any]) -> str:
    """A sentence if the class is one of several that fit alike; of those with a row for each label alone."""
    twins = [
        other.cls.__name__
        for other in fitting
        if other is not parts and other.per_label and other.head == parts.head and _rank(other, raw) == _rank(parts, raw)
    ]
    if not twins:
        return ""
    return (
        f" That is a guess: the tensors of {' and '.join(twins)} have the same names; architectures in config.json would tell."
    )


def _with_labels(
    folder: Path, raw: Mapping[str, Any], parts: Parts, tops: Mapping[str, str], stored: StoredWeights, remarks: list[str]
) -> dict[str, Any]:
    """config.json with as many labels as the head has rows; ModelError if it names another number."""
    if parts.per_label is None or parts.per_label not in tops:
        return dict(raw)
    own = tops[parts.per_label]
    shape = stored.tensors[own].shape
    rows = shape[0] if len(shape) == 2 else 0
    named = named_labels(raw)
    if named:
        remarks.append(f"{folder}: config.json names its labels in label2id alone: {shown(named, 80)}.")
        raw = {**raw, "id2label": named}
    else:
        remarks += [f"{folder}: {said}" for said in _contradictions(raw)]
    names, count = raw.get("id2label"), raw.get("num_labels")
    told = len(names) if names else count
    if parts.purpose == "QuestionAnswering":  # its two outputs have no names
        return {key: value for key, value in raw.items() if key not in ("id2label", "label2id")} | {"num_labels": rows}
    if told is not None and told != rows:
        raise ModelError(
            f"{folder / CONFIG} names {told:,} labels, and the head has {rows:,} ({own}).",
            help="mend id2label in config.json, or copy the whole folder again.",
        )
    if told is None and rows != 2 and 0 < rows <= MOST_LABELS:
        remarks.append(f"{folder}: config.json names no labels, and the head has {rows} of them: LABEL_0 to LABEL_{rows - 1}.")
    return {key: value for key, value in raw.items() if key != "num_labels"} | ({} if names else {"num_labels": rows})


def named_labels(raw: Mapping[str, Any]) -> dict[str, str]:
    """The names of a config's labels by their ids, out of label2id, if its id2label names none; else empty."""
    names, turned = raw.get("id2label"), _turned(raw)
    if not turned or _are_unnamed(turned) or (names and not (len(names) == len(turned) and _are_unnamed(names))):
        return {}
    return turned


def _contradictions(raw: Mapping[str, Any]) -> Iterator[str]:
    names, turned = raw.get("id2label") or {}, _turned(raw)
    wrong = None if _are_unnamed(turned) else next((index for index in turned if str(names.get(index)) != turned[index]), None)
    if names and wrong is not None:
        yield (
            f"config.json contradicts itself: id {wrong} is {shown(names.get(wrong), 40)} in id2label, and "
            f"{shown(turned[wrong], 40)} in label2id. id2label is taken."
        )


def _turned(raw: Mapping[str, Any]) -> dict[str, str]:
    """label2id by ids; empty if they do not run from 0."""
    ids = raw.get("label2id")
    turned = {str(index): str(name) for name, index in ids.items()} if isinstance(ids, Mapping) else {}
    order = [str(index) for index in range(len(turned))]
    return {index: turned[index] for index in order} if set(order) == set(turned) else {}


def _are_unnamed(names: Mapping[str, Any]) -> bool:
    return all(re.fullmatch(r"(LABEL_)?\d+", str(name)) for name in names.values())
