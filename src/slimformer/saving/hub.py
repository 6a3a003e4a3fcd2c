"""Models that the user names by their id on the hub: `owner/name`, or `owner/name@revision` for one commit, tag or branch.

Only what a model folder needs is downloaded: config, tokenizer, safetensors, and the files of a model that slimformer made. Pickled
weights and code stay where they are. A name that exists as a path here is that path, and the network is not used.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

from slimformer.errors import ModelError
from slimformer.saving.folders import model_folder

HUB_MODEL = re.compile(r"(?P<id>\w[\w.-]*/[\w.-]+?)(@(?P<revision>[\w./-]+))?", re.ASCII)  # ./my-bert and ../my-bert are paths
MODEL_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "plan.json", "ranges.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model", "spiece.model", "spm.model", "source.spm", "target.spm",
)  # fmt: skip
_STEPS = ("config_sentence_transformers.json", "sentence_*_config.json", "[0-9]_*/config.json", "[0-9]_*/model.safetensors")
DOWNLOADED = (*MODEL_FILES, *(f"model/{name}" for name in MODEL_FILES), "adapter_config.json", "modules.json", *_STEPS)


def local_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of the model `name`: a folder here, or the hub's files of that id in the local cache, downloaded if need be.

    In a delivered folder it is `model/`. `revision` is that of a hub id, like an `@revision` in its name.

    Raises:
        ModelError: `name` is no folder here and the hub does not give it, for example offline.

    Examples:
        >>> from slimformer.testing.tiny import tiny
        >>> tiny("bert").save_pretrained("my-bert")
        >>> local_folder("./my-bert").name
        'my-bert'
    """
    hub = HUB_MODEL.fullmatch(str(name)) if not os.path.exists(name) else None  # os.path takes any text
    if hub:
        return model_folder(_downloaded(hub["id"], revision or hub["revision"]))
    return model_folder(Path(name))


@lru_cache  # one run reads one commit, whatever is pushed meanwhile
def _downloaded(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # its import takes as long as everything else here

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(DOWNLOADED)))
    except Exception as error:  # network, names and permissions fail in as many ways as there are repositories
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"'{model}' is no folder here, and the hub does not give it.",
            facts=[f"{type(error).__name__}: {reason[0] if reason else ''}"],
            help="for a folder, check the path; for a model on the hub, check its name and the network, or download it first, "
            f"on a machine with a network: hf download {model} --local-dir my-model",
        ) from None
