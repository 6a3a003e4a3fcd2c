"""Runs encoder-decoders in CTranslate2 on the CPU, and writes its int8 files: what many who translate on CPUs use today.

Needs the extra `slimformer[ctranslate2]`. It is a rival, beside the files that ONNX Runtime runs: a model that was cut has no such
file, since CTranslate2's layers have heads of one number and size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np

from slimformer.decoding import Settings
from slimformer.errors import ExtraError, ModelError
from slimformer.files import whole_folder
from slimformer.log import remark
from slimformer.runtimes._texts import read_tokenizer, settings_of, texts_of
from slimformer.runtimes.base import Runner, Runtime

_INSTALL = "pip install 'slimformer[ctranslate2]'"
TRANSLATOR_FILE = "model.bin"
_NOT_TOLD = ("begin_suppress_tokens", "forced_eos_token_id", "renormalize_logits", "early_stopping")  # to CTranslate2
_LOADERS = {"bart": "BartLoader", "marian": "BartLoader", "t5": "T5Loader"}


@final
@dataclass(frozen=True)
class CTranslate2(Runtime):
    """CTranslate2's translator, on the model.bin of a folder that lies in a folder with config.json and tokenizer.json.

    `generation`: options of the search that go before those of generation_config.json. Its search follows the same beams by the same
    length penalty, and ends a sentence when it has as many texts as beams.
    """

    generation: Mapping[str, Any] = field(default_factory=dict)

    extra: ClassVar[str | None] = "ctranslate2"
    foreign: ClassVar[bool] = True

    def available(self) -> bool:
        return find_spec("ctranslate2") is not None

    def version(self) -> str:
        import ctranslate2

        return str(ctranslate2.__version__)

    def accepts(self, path: Path) -> bool:
        return path.is_file() and path.name == TRANSLATOR_FILE and (path.parent / "config.json").is_file()

    def load(self, path: Path, threads: int) -> Runner:
        if not self.available():
            raise ExtraError("the runtime 'ctranslate2' is not installed.", help=_INSTALL)
        import ctranslate2

        home = path.parent.parent
        tokenizer, settings = read_tokenizer(home), settings_of(home, self.generation)
        try:
            translator = ctranslate2.Translator(
                str(path.parent), device="cpu", compute_type="default", inter_threads=1, intra_threads=threads
            )
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"CTranslate2 {self.version()} cannot load {path}.",
                facts=str(error).strip().splitlines()[:1],
                help="name the model.bin of a folder that its converter wrote.",
            ) from error
        pieces = _pieces(tokenizer, 0)
        numbers = {piece: number for number, piece in enumerate(pieces)}
        options = _options(settings, pieces)
        untold = [name for name in _NOT_TOLD if getattr(settings, name) != getattr(Settings, name)]
        if untold:
            remark(f"{home}: CTranslate2 searches without {', '.join(untold)}, which it has no option for.")

        def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            ids = inputs["input_ids"]
            mask = inputs.get("attention_mask", np.ones_like(ids))
            texts = [[pieces[word] for word in row[there > 0]] for row, there in zip(ids, mask, strict=True)]
            forced = settings.forced_bos_token_id
            begin = None if forced is None else [[pieces[forced]]] * len(texts)
            found = translator.translate_batch(texts, begin, **options)
            rows = [np.asarray([settings.decoder_start_token_id, *map(numbers.get, item.hypotheses[0])]) for item in found]
            return texts_of(tokenizer, rows)

        return run


def _pieces(tokenizer: Any, size: int) -> list[str]:
    """The word of each id, as many as the model has."""
    words = tokenizer.get_vocab()
    pieces = [f"<unused_{number}>" for number in range(max(size, max(words.values()) + 1))]
    for word, number in words.items():
        pieces[number] = word
    return pieces


def _options(settings: Settings, pieces: list[str]) -> dict[str, Any]:
    """A search in the words of CTranslate2; what it has no word for is left out (_NOT_TOLD)."""
    barred = [*settings.bad_words_ids, *((word,) for word in settings.suppress_tokens)]
    ends = [pieces[word] for word in settings.eos_token_id]
    return {
        "beam_size": settings.num_beams,
        "length_penalty": settings.length_penalty,
        "max_decoding_length": settings.max_length - 1,
        "min_decoding_length": max(0, settings.min_length - 1),
        "no_repeat_ngram_size": settings.no_repeat_ngram_size,
        "repetition_penalty": settings.repetition_penalty,
        "suppress_sequences": [[pieces[word] for word in words] for words in barred],
        "max_input_length": 0,
        "return_end_token": True,
        **({"end_token": ends} if ends else {}),
    }


def convertible(model: Any) -> bool:
    """Whether CTranslate2 has layers for a model that is not cut."""
    return model.config.model_type in _LOADERS


def ctranslate2_file(model: Any, home: Path, folder: Path, quantization: str = "int8") -> Path:
    """Writes a model that is not cut as CTranslate2's file, in int8 as its users do: `folder`/model.bin and what lies beside it.

    Args:
        model: A Marian, BART or T5 of transformers.
        home: The folder with its tokenizer; `folder` lies in it.
        folder: Where the file goes, all at once.
        quantization: What its weights are stored in: "int8", or "float32".

    Returns:
        The path of model.bin.

    Raises:
        ExtraError: CTranslate2 is missing.

    Example:
        >>> ctranslate2_file(model, Path("marian"), Path("marian/ctranslate2"))
        PosixPath('marian/ctranslate2/model.bin')
    """
    if find_spec("ctranslate2") is None:
        raise ExtraError("making CTranslate2's file needs ctranslate2, which is not installed.", help=_INSTALL)
    import ctranslate2.converters.transformers as converters

    tokenizer = read_tokenizer(home)
    seen: Any = _Seen(copy.deepcopy(model))  # CTranslate2 scales the weights that it is given where they lie
    pieces = _pieces(tokenizer, model.config.vocab_size)
    spec = getattr(converters, _LOADERS[model.config.model_type])().get_model_spec(seen)
    spec.register_source_vocabulary(pieces)
    spec.register_target_vocabulary(pieces)
    config, said = spec.config, model.generation_config
    ends = said.eos_token_id if said.eos_token_id is not None else model.config.eos_token_id
    config.eos_token = pieces[ends[0] if isinstance(ends, list) else ends]
    config.bos_token = config.decoder_start_token = pieces[said.decoder_start_token_id]
    config.unk_token = next((word for word in ("<unk>", "[UNK]") if word in tokenizer.get_vocab()), pieces[0])
    spec.validate()
    spec.optimize(quantization=quantization)
    with whole_folder(folder) as part:
        spec.save(str(part))
    return folder / TRANSLATOR_FILE


class _Seen:
    """A model whose config says what CTranslate2 asks: transformers 5 leaves out what is the same for all models of a type."""

    def __init__(self, model: Any) -> None:
        self._model, self.config = model, copy.copy(model.config)
        if model.config.model_type in ("bart", "marian"):
            self.config.normalize_before = False
            self.config.normalize_embedding = model.config.model_type == "bart"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
