"""A model that is built from a config instead of read from a folder: random weights, and a vocabulary of the task's own texts.

    model: {use: marian, vocabulary: 8000, config: {d_model: 192, encoder_layers: 4, decoder_layers: 4}}

It is written once, as a folder that any other code reads like that of an encoder-decoder without a head; the recipe's leading stages
then train it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slimformer import registry
from slimformer.digests import digest
from slimformer.errors import RecipeError, nearest
from slimformer.families.base import family_of
from slimformer.registry import name_of
from slimformer.rules import Count, mistakes_in
from slimformer.saving.building import without_bars
from slimformer.tasks.base import Split, Task

OURS = ("vocab_size", "decoder_vocab_size", "is_encoder_decoder", "architectures", "model_type", "tie_word_embeddings")
BEAMS = 5


@dataclass(frozen=True)
class Fresh:
    """A model to be built from scratch, for a task that writes texts.

    Attributes:
        use: A type of model that writes a text for a text: "marian", "bart", "mbart" or "t5".
        vocabulary: Tokens of the vocabulary, which the texts that are read and those that are written share. It is trained on both.
        config: Fields of transformers' config of that type, which has sizes for all others.

    Raises:
        RecipeError: There is no such type of model, or it has no such field; the message lists all mistakes.

    Example:
        >>> Fresh("marian", vocabulary=500, config={"d_model": 32, "encoder_layers": 2}).vocabulary
        500
    """

    use: str
    vocabulary: Count = 8000
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = mistakes_in(self) or list(self._mistakes())
        if wrong:
            raise RecipeError("this model cannot be built.", facts=wrong, help="correct these values.")

    def _mistakes(self) -> Iterator[str]:
        import transformers

        kinds = sorted(
            kind
            for name in registry.names("families")
            for kind in registry.find("families", name).model_types
            if registry.find("families", name).special_tokens
        )
        if self.use not in kinds:
            yield f"use: '{self.use}' cannot be built from scratch; {nearest(self.use, kinds)}"
            return
        known = [*transformers.AutoConfig.for_model(self.use).to_dict(), "attn_implementation"]
        for name, value in self.config.items():
            if name in OURS or name.endswith("_token_id"):
                yield f"config.{name}: it follows from the vocabulary and the type; leave it out"
            elif name not in known:
                yield f"config.{name}: unknown field of a {self.use} config; {nearest(str(name), known)}"
            elif not isinstance(value, (bool, int, float, str)):
                yield f"config.{name}: must be a number, a text, true or false"

    def digest(self, task: Task, seed: int) -> str:
        """Names everything that the folder depends on."""
        return digest(json.dumps(asdict(self), sort_keys=True), str(seed), *_texts(task))

    def write(self, task: Task, seed: int, folder: Path) -> None:
        """Writes config, random weights and tokenizer into a folder that is there.

        Raises RecipeError if the task writes no texts or the sizes do not fit each other, DataError for too few texts.
        """
        import torch
        import transformers

        from slimformer.data.vocabulary import train_vocabulary

        family = family_of(self.use)
        texts = list(_texts(task))
        special = family.special_tokens
        tokenizer = train_vocabulary(texts, self.vocabulary, special)
        ids = {f"{role}_id": tokenizer.token_to_id(token) for role, token in special.items() if role != "unk_token"}
        ids["decoder_start_token_id"] = ids[f"{family.decoder_start}_id"]
        try:
            config = transformers.AutoConfig.for_model(self.use, vocab_size=self.vocabulary, **ids, **self.config)
            if hasattr(config, "forced_eos_token_id"):  # Marian's default is another model's
                config.forced_eos_token_id = ids["eos_token_id"]
            with torch.random.fork_rng(devices=[]), without_bars():
                torch.manual_seed(seed)
                model = transformers.AutoModel.from_config(config)
                model.save_pretrained(folder)
        except (ValueError, TypeError, RuntimeError, AssertionError, ZeroDivisionError) as error:
            raise RecipeError(
                f"a {self.use} model cannot be built from this config: {error}.", help="correct the sizes in model.config."
            ) from None
        most = int(getattr(task, "max_target_length", 128))
        generation = transformers.GenerationConfig(
            num_beams=BEAMS, max_length=most, forced_eos_token_id=ids["eos_token_id"], **ids
        )
        generation.save_pretrained(folder)
        positions = family.positions(config.to_dict())
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, model_max_length=positions or int(task.max_length), **special
        ).save_pretrained(folder)


def _texts(task: Task) -> Iterator[str]:
    """All texts that the task trains on, those to be read and those to be written."""
    if task.auto_class != "AutoModelForSeq2SeqLM":
        raise RecipeError(
            f"the task {name_of(task)} needs a model that has seen much text: one from scratch would learn little.",
            help="name a model's folder or its hub name as `model:`. Tasks that write texts can begin from scratch.",
        )
    for item in task.split(Split.TRAIN):
        yield from item.texts
        yield item.answer.train
