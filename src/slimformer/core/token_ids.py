"""The numbers of word pieces that a model's configs hold, such as that of the padding: they follow when the vocabulary is cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from slimformer.errors import PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SIZES = ("vocab_size", "decoder_vocab_size")
_MAY_GO = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens")  # what must not be written: a piece that is gone is not


def named_ids(model: PreTrainedModel) -> dict[int, str]:
    """The ids that the configs of a model name, each with the name of a field: no cut may drop them."""
    size = int(model.config.vocab_size)
    found: dict[int, str] = {}
    for config in _configs(model):
        for name, value in vars(config).items():
            if name.endswith("_token_id"):
                for index in value if isinstance(value, list) else [value]:
                    if type(index) is int and 0 <= index < size:
                        found.setdefault(index, name)
    return found


def renumber(model: PreTrainedModel, keep: tuple[int, ...]) -> None:
    """Lets the configs of a model speak of a vocabulary of which the pieces `keep` stay; PlanError if they name another."""
    place = {old: new for new, old in enumerate(keep)}
    lost = {index: name for index, name in named_ids(model).items() if index not in place}
    if lost:
        index, name = next(iter(lost.items()))
        raise PlanError(f"the plan drops the piece {index}, which config.json names as {name}.", help="keep it.")
    size = int(model.config.vocab_size)
    for config in _configs(model):
        for name, value in list(vars(config).items()):
            if name in _SIZES and value == size:
                setattr(config, name, len(keep))
            elif name.endswith("_token_id"):
                setattr(
                    config, name, [place.get(item, item) for item in value] if isinstance(value, list) else _new(value, place)
                )
            elif name in _MAY_GO and isinstance(value, list):
                setattr(config, name, [_list(item, place) for item in value if _stays(item, place)])


def _configs(model: PreTrainedModel) -> Iterator[Any]:
    """The config of the model, those of its parts, and how it generates; each once."""
    found: dict[int, Any] = {}
    for module in model.modules():
        for name in ("config", "generation_config"):
            config = getattr(module, name, None)
            if config is not None:
                found.setdefault(id(config), config)
    yield from found.values()


def _new(value: Any, place: Mapping[int, int]) -> Any:
    return place.get(value, value) if type(value) is int else value


def _stays(item: Any, place: Mapping[int, int]) -> bool:
    return all(index in place for index in item) if isinstance(item, list) else item in place


def _list(item: Any, place: Mapping[int, int]) -> Any:
    return [place[index] for index in item] if isinstance(item, list) else place[item]
