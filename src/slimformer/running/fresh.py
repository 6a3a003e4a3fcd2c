"""A model that is built from a config instead of read from a folder: one that writes, from scratch, or a student made from a teacher.

    model: {use: marian, vocabulary: 8000, config: {d_model: 192, encoder_layers: 4, decoder_layers: 4}}

    model: {use: bilstm, config: {hidden_size: 150}}
    teacher: ./my-bert

It is written once, as a folder that any other code reads like that of a model without a head; the recipe's stages then train it. What
writes has random weights and a vocabulary of the task's own texts; `students` says what a student takes from its teacher.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slimformer import registry
from slimformer.digests import digest, digest_files
from slimformer.errors import RecipeError, nearest
from slimformer.families.base import family_of
from slimformer.registry import name_of
from slimformer.rules import Count, mistakes_in
from slimformer.running.students import write_student
from slimformer.saving.building import without_bars
from slimformer.tasks.base import Split, Task
from slimformer.training.stage import Stage

OURS = ("vocab_size", "decoder_vocab_size", "is_encoder_decoder", "architectures", "model_type", "tie_word_embeddings")
BEAMS = 5
USUAL_PIECES = 8000


@dataclass(frozen=True)
class Fresh:
    """A model to be built: from scratch if it writes texts, otherwise as the student of the recipe's teacher.

    Attributes:
        use: A type of model that writes a text for a text ("marian", "bart", "mbart" or "t5"), a student without layers ("static",
            "bilstm" or "cnn"), one with bottlenecks ("mobilebert"), or the type of the teacher, such as "bert".
        vocabulary: Tokens of the vocabulary of a model that writes, 8000 by default, which the texts that are read and those that are
            written share. It is trained on both. A student reads with its teacher's tokenizer, unless it gets so many word pieces
            of its own here: these are trained on the texts of the task, and the teacher goes on reading its own.
        config: Fields of the config of that type. It has sizes for all others; a student of the teacher's type has the teacher's.

    Raises:
        RecipeError: There is no such type of model, or it has no such field; the message lists all mistakes.

    Example:
        >>> Fresh("marian", vocabulary=500, config={"d_model": 32, "encoder_layers": 2}).vocabulary
        500
    """

    use: str
    vocabulary: Count | None = None
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
            if registry.find("families", name).special_tokens or not registry.find("families", name)().decodes
        )
        if self.use not in kinds:
            yield f"use: '{self.use}' cannot be built; {nearest(self.use, kinds)}"
            return
        family_of(self.use).model_class("")
        usual = transformers.AutoConfig.for_model(self.use).to_dict() | {"attn_implementation": None}
        for name, value in self.config.items():
            several = isinstance(usual.get(name), list) and isinstance(value, list)
            if name in OURS or name.endswith("_token_id"):
                yield f"config.{name}: it follows from the vocabulary and the type; leave it out"
            elif name not in usual:
                yield f"config.{name}: unknown field of a {self.use} config; {nearest(str(name), usual)}"
            elif not all(isinstance(item, (bool, int, float, str)) for item in (value if several else [value])):
                yield f"config.{name}: must be a number, a text, true or false"

    @property
    def is_student(self) -> bool:
        """Whether it is made from a teacher; otherwise it is one that writes, from scratch."""
        return not family_of(self.use).decodes

    def digest(self, task: Task, seed: int, teacher: Path | None = None) -> str:
        """Names everything that the folder depends on."""
        if not self.is_student:
            return digest(json.dumps(asdict(self), sort_keys=True), str(seed), *_texts(task))
        assert teacher is not None, "a recipe with a student names its teacher"
        read = (text for item in task.split(Split.TRAIN) for text in item.texts)
        return digest(json.dumps(asdict(self), sort_keys=True), str(seed), digest_files([teacher]), *read)

    def write(self, task: Task, seed: int, folder: Path, teacher: Path | None = None, stages: Sequence[Stage] = ()) -> None:
        """Writes config, weights and tokenizer into a folder that is there; `teacher` is that of a student.

        Raises RecipeError if the task, the teacher or one of `stages` asks for another model or the sizes do not fit each other,
        DataError for too few texts.
        """
        if not self.is_student:
            self._write_writer(task, seed, folder)
            return
        assert teacher is not None, "a recipe with a student names its teacher"
        write_student(self.use, self.config, task, teacher, seed, folder, stages, vocabulary=self.vocabulary)

    def _write_writer(self, task: Task, seed: int, folder: Path) -> None:
        """A model that writes, with random weights and a vocabulary of its own."""
        import torch
        import transformers

        from slimformer.data.vocabulary import train_vocabulary

        family = family_of(self.use)
        texts, vocabulary = list(_texts(task)), self.vocabulary or USUAL_PIECES
        special = family.special_tokens
        tokenizer = train_vocabulary(texts, vocabulary, special)
        ids = {f"{role}_id": tokenizer.token_to_id(token) for role, token in special.items() if role != "unk_token"}
        ids["decoder_start_token_id"] = ids[f"{family.decoder_start}_id"]
        try:
            config = transformers.AutoConfig.for_model(self.use, vocab_size=vocabulary, **ids, **self.config)
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
            help="say use: bert, mobilebert, static, bilstm or cnn, and name a tuned `teacher:`. Tasks that write texts can begin "
            "from scratch.",
        )
    for item in task.split(Split.TRAIN):
        yield from item.texts
        yield item.answer.train
