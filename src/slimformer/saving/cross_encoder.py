"""Folders of sentence-transformers' CrossEncoder: a transformers model with one score; newer versions add files of their own.

Version 6 says in `config_sentence_transformers.json` what becomes of the score, where older ones say it in config.json, and lists steps
in `modules.json`, as folders of vectors have it. Steps other than a transformer with a head are refused, never left out in silence.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from slimformer.core.relevance import CROSS_ENCODER, score_activation
from slimformer.errors import ModelError, shown
from slimformer.files import read_small
from slimformer.saving.folders import CONFIG
from slimformer.saving.headers import WEIGHTS, read_object
from slimformer.saving.sentence_texts import text_facts

STEPS, FACTS = "modules.json", "config_sentence_transformers.json"
_LONGEST = 512  # tokens that are read of a pair at most
_HELP = "take a reranker whose score is the one output of a transformer's own head (AutoModelForSequenceClassification)."


def is_cross_encoder(folder: Path) -> bool:
    """Whether a folder is one of CrossEncoder of version 6; older ones have no file that tells."""
    return os.path.isfile(folder / FACTS) and read_object(folder / FACTS).get("model_type") == CROSS_ENCODER


def loads_as_cross_encoder(folder: Path) -> bool:
    """Whether a delivered folder holds a plain model that CrossEncoder loads."""
    if not os.path.isfile(folder / WEIGHTS) or not os.path.isfile(folder / CONFIG):
        return False
    return score_activation(read_object(folder / CONFIG)) is not None


def cross_encoder_facts(folder: Path) -> dict[str, Any]:
    """Fields that the files of a CrossEncoder's folder add to its config.json; ModelError if its score is not computed here."""
    if not is_cross_encoder(folder):
        return {}
    facts = read_object(folder / FACTS)
    kinds = _kinds(folder / STEPS) if os.path.isfile(folder / STEPS) else ["Transformer"]
    if kinds != ["Transformer"]:
        raise ModelError(f"{folder / STEPS} names the steps {', '.join(kinds) or 'none'}.", help=_HELP)
    prompts, default = facts.get("prompts"), facts.get("default_prompt_name")
    prompt = prompts.get(default) if isinstance(prompts, dict) else None
    if prompt:
        raise ModelError(
            f"{folder / FACTS} puts {shown(prompt)} before each pair, which is not done here.",
            help="write it into the queries of the data, and take default_prompt_name out of that file.",
        )
    length, tokenizer = text_facts(folder).max_length, folder / "tokenizer_config.json"
    own = read_object(tokenizer).get("model_max_length") if os.path.isfile(tokenizer) else None
    if length is not None and min(length, _LONGEST) != min(own if type(own) is int else _LONGEST, _LONGEST):
        raise ModelError(
            f"{folder} says that a pair has at most {length} tokens, and {tokenizer.name} says {own}, which is what is read.",
            help=f"write model_max_length: {length} into {tokenizer.name}.",
        )
    said = facts.get("activation_fn")
    return {} if said is None else {"sentence_transformers": {"activation_fn": said}}


def _kinds(file: Path) -> list[str]:
    """The last part of each step's type."""
    try:
        return [str(step["type"]).rpartition(".")[2] for step in json.loads(read_small(file).decode("utf-8"))]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}.", help="copy the whole folder again.") from None
