"""How a folder of sentence-transformers says that its transformer reads texts: in how many tokens, and whether in lower case.

`sentence_bert_config.json` says so, in fields of its own and in arguments that are handed on to transformers. Arguments that would change
the answers and are not followed here are refused, never left out in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimformer.errors import ModelError, shown
from slimformer.saving.headers import read_object

ENCODER_FACTS = tuple(
    f"sentence_{name}_config.json" for name in ("bert", "roberta", "distilbert", "camembert", "xlm-roberta", "albert", "xlnet")
)
_LOADING = ("model_args", "model_kwargs", "config_args", "config_kwargs", "tokenizer_args", "processor_kwargs")
_LENGTHS = ("max_length", "model_max_length")  # where the tokenizer is loaded and where it is called; the call counts
_BY_SIDE = ("query_length", "document_length", "query_expansion")  # of queries and of passages apart
_NO_EFFECT = (  # on answers: where files come from, number formats, speed, padding
    "torch_dtype", "dtype", "attn_implementation", "trust_remote_code", "revision", "cache_dir", "token", "local_files_only",
    "use_safetensors", "low_cpu_mem_usage", "device_map", "add_pooling_layer", "use_cache", "use_fast", "clean_up_tokenization_spaces",
    "padding", "pad_to_multiple_of", "return_tensors", "return_attention_mask", "file_name", "export", "provider",
)  # fmt: skip


@dataclass(frozen=True)
class TextFacts:
    """The most tokens of a text, None if no file says it, and whether texts are put into lower case."""

    max_length: int | None = None
    lower: bool = False


def text_facts(folder: Path) -> TextFacts:
    """How texts are read in the folder of a transformer; ModelError if that is not done here."""
    file = next((folder / name for name in ENCODER_FACTS if (folder / name).is_file()), None)
    if file is None:
        return TextFacts()
    said = read_object(file)
    lengths = [said.get("max_seq_length")]
    for where, name, value in _arguments(said):
        if name in _LENGTHS:
            lengths.append(value)
        elif name not in _NO_EFFECT and (name, value) not in (("truncation", True), ("padding_side", "right")):
            raise ModelError(
                f"{file} says {where}{name}: {shown(value)}, which is not followed here and could change the answers.",
                help="if the folder's other files say the same, take this entry out; else take a model without it.",
            )
    length = next((value for value in reversed(lengths) if type(value) is int and value > 0), None)
    return TextFacts(length, bool(said.get("do_lower_case", False)))


def _arguments(said: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """What is handed on, in the order in which it counts: the entry that holds it, its name and its value."""
    calls = said.get("processing_kwargs") or {}
    inner = (
        {f"processing_kwargs: {part}: ": calls.get(part) for part in ("common", "text")} if isinstance(calls, Mapping) else {}
    )
    for where, given in {**{f"{part}: ": said.get(part) for part in _LOADING}, **inner}.items():
        yield from ((where, name, value) for name, value in (given if isinstance(given, Mapping) else {}).items())
    yield from (("", name, said[name]) for name in _BY_SIDE if said.get(name) is not None)
