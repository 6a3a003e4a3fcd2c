"""A family: a table of the names under which a skeleton keeps its attentions, feed-forward blocks and embeddings.

One file per skeleton. A family declares names, it never searches for them in a graph, and everything that is known of
an architecture stands in its file. Reading a family needs no torch; only its anatomy of a model does.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from slimformer import registry
from slimformer.core.anatomy import Anatomy, Skip
from slimformer.errors import ModelError
from slimformer.families._skeleton import BERT_FFN, Attention, Bottleneck, FeedForward, Skeleton, StackTable, Surroundings

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel

__all__ = [
    "BERT_FFN",
    "Attention",
    "Bottleneck",
    "Family",
    "FeedForward",
    "Skeleton",
    "Skip",
    "StackTable",
    "Subject",
    "Surroundings",
    "anatomy_of",
    "family_of",
    "find_family",
    "subject_of",
]


SETTLED: Mapping[str, tuple[Any, ...]] = {  # of any encoder
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "position_embedding_type": ("absolute",),  # transformers 5 computes no other, and says nothing
    "pruned_heads": ({},),  # transformers 5 does not read it: the shapes would differ
    "feed_forward_type": ("original",),  # of encoders with code of their own
}


SETTLED_DECODING: Mapping[str, tuple[Any, ...]] = {  # of any encoder-decoder
    "is_decoder": (False,),
    "is_encoder_decoder": (True,),
    "encoder_layerdrop": (0,),  # it would drop whole layers in training
    "decoder_layerdrop": (0,),
}


class Family(ABC):
    """Final classes without state; `model_types` are transformers' `config.model_type` values.

    A family whose parts do not fit into a `Skeleton` gives its own `anatomy` and `width` instead. `config` is the
    content of config.json. `settled`: fields of config.json with the values for which the anatomy describes what a model computes,
    the usual one first; a model with another is refused. `auto_class`: what transformers calls the models that the checks run on.
    `special_tokens`: role -> token, in the order of their ids, for a vocabulary that is trained for a model from scratch; none if that
    makes no sense. `decoder_start`: the role of the token that its decoder starts with. `classes`: the module that defines the classes
    of its configs and models; one that is not transformers' own registers them with the Auto classes when it is imported. `per_layer`:
    fields of a config with an entry for each layer, which its class makes anew if they are left out. `any_teacher`: whether a student of
    this type can be made from a teacher of another.
    """

    model_types: ClassVar[tuple[str, ...]]
    skeleton: ClassVar[Skeleton]
    settled: ClassVar[Mapping[str, tuple[Any, ...]]] = SETTLED
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    special_tokens: ClassVar[Mapping[str, str]] = {}
    per_layer: ClassVar[tuple[str, ...]] = ()
    decoder_start: ClassVar[str] = "pad_token"
    classes: ClassVar[str] = "transformers"
    any_teacher: ClassVar[bool] = False

    def anatomy(self, model: PreTrainedModel) -> Anatomy:
        """The anatomy of a model of this family, dense or already cut."""
        from slimformer.families._builder import build  # needs torch

        return build(model, self.skeleton_of(model))

    def skeleton_of(self, model: PreTrainedModel) -> Skeleton:
        """The table for a model, if its config decides between two."""
        return self.skeleton

    def model_class(self, name: str) -> Any:
        """What its `classes` have under a name; None if there is no such thing. Afterwards the Auto classes know its models."""
        found = getattr(importlib.import_module(self.classes), name, None)
        if found is None and name.endswith("ForSentenceEmbedding") and self.classes == "transformers":
            from slimformer.families._embedder import embedder_named  # needs torch

            return embedder_named(name, self.model_types)
        return found

    @property
    def decodes(self) -> bool:
        """Whether its models have a decoder beside the encoder."""
        return self.skeleton.decoder is not None

    def surroundings(self, model: PreTrainedModel) -> Surroundings:
        """What a model computes around its layers; ModelError for a family without a decoder."""
        raise ModelError(f"{type(model).__name__} is no encoder-decoder: it writes no text.")

    def refusal(self, class_name: str, where: str = "this") -> ModelError:
        """The error for a model of its types that lacks a decoder, or whose decoder writes no text. `where`: the folder that holds it."""
        return ModelError(
            f"{where} is a model of the class {class_name}, and of the type {', '.join(self.model_types)} only models for translation "
            "and summarization are cut.",
            help="take a model that writes text, or for classes, tags and vectors one of another type, such as bert or roberta.",
        )

    def inputs(self, model: PreTrainedModel) -> tuple[str, ...]:
        """Names of the model's inputs."""
        names = ("input_ids", "attention_mask")
        return (*names, "decoder_input_ids", "decoder_attention_mask") if self.decodes else names

    def width(self, config: Mapping[str, Any]) -> int | None:
        """The size of the hidden states; None if the config does not say."""
        return _whole(config.get(self.skeleton.hidden_size))

    def positions(self, config: Mapping[str, Any]) -> int | None:
        """The largest number of tokens that the model has positions for; None if the config does not say."""
        return _whole(config.get("max_position_embeddings"))

    def settled_pieces(self, config: Mapping[str, Any]) -> int:
        """So many of the first token ids must keep their numbers when the vocabulary is cut: positions may be counted from one."""
        return 0

    def unread(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Parameters of the base model that a folder may hold, though a model with this config has none of that name."""
        return ()

    @abstractmethod
    def tiny(self, model_type: str) -> dict[str, Any]:
        """Config options for a model of a few thousand parameters, four heads or more and three layers: the checks run
        on it."""


def find_family(model_type: str) -> Family | None:
    """The family of a `config.model_type`; None if no family knows it."""
    known = _known()
    return registry.find("families", known[model_type])() if model_type in known else None


def family_of(model_type: str) -> Family:
    """The family of a `config.model_type`; ModelError that lists the known ones if there is none."""
    family = find_family(model_type)
    if family is None:
        raise ModelError(
            f"no family knows the architecture '{model_type}'.",
            help=f"supported: {', '.join(sorted(_known()))}. docs/extend.md shows how to add one.",
        )
    return family


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """The anatomy of a model: what can be cut in it.

    Args:
        model: A transformers model of a supported type, dense or already cut.

    Returns:
        Its sites, matrices and points, by name.

    Raises:
        ModelError: Its type is not supported; the message lists those that are.

    Example:
        >>> from slimformer import anatomy_of
        >>> from slimformer.testing.tiny import tiny
        >>> anatomy = anatomy_of(tiny("distilbert"))
        >>> {site.id: site.size for site in anatomy.sites.values() if site.layer == 2}
        {'encoder.2.attention': 1, 'encoder.2.heads': 4, 'encoder.2.ffn': 1, 'encoder.2.neurons': 24}
    """
    return family_of(model.config.model_type).anatomy(model)


@dataclass(frozen=True)
class Subject:
    """A model and the facts about it, which are derived once and then carried along.

    >>> from slimformer.testing.tiny import tiny
    >>> subject = subject_of(tiny("bert"))
    >>> subject.inputs
    ('input_ids', 'attention_mask', 'token_type_ids')
    >>> with subject.evaluating():
    ...     logits = subject.model(**subject.feed({"input_ids": [[5, 6, 7]], "labels": [1]})).logits
    """

    model: PreTrainedModel
    family: Family
    anatomy: Anatomy
    inputs: tuple[str, ...]  # names of the model's inputs

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next(self.model.parameters()).device

    @property
    def beams(self) -> int | None:
        """How many texts the model writes at once by its generation_config; None if it has no decoder."""
        if len(self.anatomy.stacks) == 1:
            return None
        return int(getattr(self.model.generation_config, "num_beams", None) or 1)

    def feed(self, batch: Mapping[str, torch.Tensor | np.ndarray]) -> dict[str, torch.Tensor]:
        """The columns of a batch that the model reads, as tensors on its device; labels and other columns are left out."""
        import torch

        device = self.device
        return {name: torch.as_tensor(batch[name], device=device) for name in self.inputs if name in batch}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Puts the model into eval mode while the context lasts; each module is then as it was before."""
        training = {module: module.training for module in self.model.modules()}
        self.model.train(False)
        try:
            yield
        finally:
            for module, before in training.items():
                module.training = before


def subject_of(model: PreTrainedModel) -> Subject:
    """The subject of any supported model; ModelError that lists the supported ones for another."""
    family = family_of(model.config.model_type)
    if family.decodes and not model.can_generate():
        raise family.refusal(type(model).__name__)
    return Subject(model, family, family.anatomy(model), family.inputs(model))


def _known() -> dict[str, str]:
    """model_type -> the name of its family."""
    names = registry.names("families")
    return {model_type: name for name in names for model_type in registry.find("families", name).model_types}


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
