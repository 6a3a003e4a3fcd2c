"""Models that the user names by their id on the hub: `owner/name`, or `owner/name@revision` for one commit, tag or branch.

Only what a model folder needs is downloaded: config, tokenizer, safetensors, and the files of a model that slimformer made. Pickled
weights and code stay where they are. A name that exists as a path here is that path, and the network is not used.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from huggingface_hub import snapshot_download

from slimformer.errors import ModelError
from slimformer.saving.checkpoint import model_folder

HUB_MODEL = re.compile(r"(?P<id>\w[\w.-]*/[\w.-]+?)(@(?P<revision>[\w./-]+))?", re.ASCII)  # ./my-bert and ../my-bert are paths
DOWNLOADED = (
    "config.json", "model*.safetensors", "model.safetensors.index.json", "plan.json", "ranges.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model", "spiece.model",
    "model/*.json", "model/*.txt", "model/*.model",  # a folder that slimformer delivered; model*.safetensors means its weights too
)  # fmt: skip


def local_folder(name: str | Path) -> Path:
    """The folder of the model `name`: the path itself, or the hub's files of that id in the local cache, downloaded if need be.

    Of a folder that slimformer delivered, it is the one inside with the PyTorch model.

    Raises:
        ModelError: `name` is no path here and the hub does not give it, for example offline.

    Examples:
        >>> local_folder("./my-bert").name
        'my-bert'
    """
    hub = HUB_MODEL.fullmatch(str(name)) if not Path(name).exists() else None
    return model_folder(_downloaded(hub["id"], hub["revision"]) if hub else name)


@lru_cache  # one run reads one commit, whatever is pushed meanwhile
def _downloaded(model: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(DOWNLOADED)))
    except Exception as error:  # network, names and permissions fail in as many ways as there are repositories
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"'{model}' is no folder here, and the hub does not give it.",
            facts=[f"{type(error).__name__}: {reason[0] if reason else ''}"],
            help="for a folder, check the path; for a model on the hub, check its name and the network, or download it first.",
        ) from None
