"""Reads the headers of a model folder's safetensors files: the name, type and shape of each tensor, before any tensor is read.

Nothing else is opened as weights: no pickle, no device, no file outside the folder, whatever config.json or an index names. The cache of
the hub keeps its files as links into a folder `blobs`, and only such links may lead out.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from slimformer.errors import ModelError
from slimformer.files import read_small
from slimformer.saving.sparse import KEY

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
LONGEST_JSON = 64 << 20  # bytes: the largest index of a model that exists has a few megabytes
_SHARD = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
_AGAIN = "copy it again from where the model came from, or save the model again."


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of one tensor: safetensors' name of its type ("F32"), its shape and its file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path


@dataclass(frozen=True)
class StoredWeights:
    """The safetensors files of a model folder and what their headers say; all bytes that the headers promise are there."""

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]
    matrices: Mapping[str, tuple[int, ...]]  # those that are stored without their zeros, as our own metadata says

    @cached_property
    def largest(self) -> int:
        """The largest dimension of any tensor: no size in config.json can be larger."""
        shapes = [*(tensor.shape for tensor in self.tensors.values()), *self.matrices.values()]
        return max((size for shape in shapes for size in shape), default=0)


def stored_weights(folder: Path) -> StoredWeights:
    """The weights of a model folder, one file or shards.

    Raises:
        ModelError: There are none, a file is torn or a pointer of git-lfs, or an index names anything but safetensors files beside it.
    """
    whole = inner_file(folder, WEIGHTS)
    if whole is not None:
        tensors, matrices = _read_header(whole)
        return StoredWeights(folder, (whole,), tensors, matrices)
    index = inner_file(folder, INDEX)
    if index is None:
        raise ModelError(f"{folder} holds no {WEIGHTS}.", help="name a folder that save_pretrained() wrote.")
    places = _read_index(folder, index)
    files = {name: inner_file(folder, name) for name in sorted(set(places.values()))}
    missing = [name for name, file in files.items() if file is None]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of its {len(files)} files of weights: {missing[0]}.",
            help="copy the whole folder again.",
        )
    found: dict[str, StoredTensor] = {}
    for file in filter(None, files.values()):
        tensors, matrices = _read_header(file)
        if matrices:
            raise ModelError(f"{file} leaves out zeros, which a file in shards cannot.", help="make the model again.")
        twice = sorted(set(tensors) & set(found))
        if twice:
            raise ModelError(f"{file} holds '{twice[0]}', and so does {found[twice[0]].file.name}.", help=_AGAIN)
        found |= tensors
    lost = sorted(name for name, place in places.items() if name not in found or found[name].file.name != place)
    if lost:
        raise ModelError(f"{folder / places[lost[0]]} lacks '{lost[0]}', which {INDEX} looks for there.", help=_AGAIN)
    return StoredWeights(folder, tuple(filter(None, files.values())), found, {})


def has_weights(folder: Path) -> bool:
    """Whether a folder has a safetensors file of weights, or an index of shards."""
    return os.path.lexists(folder / WEIGHTS) or os.path.lexists(folder / INDEX)


def inner_file(folder: Path, name: str) -> Path | None:
    """A file of a folder; None if it has none of that name. ModelError for a device and for a link that leads out of the folder."""
    file = folder / name
    if not os.path.lexists(file):
        return None
    real, root = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
    if not real.is_relative_to(root) and not _is_cached(real):
        raise ModelError(
            f"{file} is a link that leads out of its folder, and is not followed.",
            facts=[f"it leads to {real}"],
            help=f"if you trust that file, put a copy in its place: cp --remove-destination {real} {file}",
        )
    if not real.is_file():
        raise ModelError(f"{file} is {'a link to nothing' if not real.exists() else 'no file'}.", help=_AGAIN)
    return file


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; ModelError if it holds anything else."""
    try:
        raw = read_small(file, LONGEST_JSON)
        if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
            raise ValueError("it begins with a byte order mark, as some editors write it, and must be UTF-8 without one")
        text = raw.decode("utf-8")
        if text.startswith(POINTER.decode()):
            raise ValueError(f"it is {_POINTS}, not the file; `git lfs pull` fetches that")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}.", help=_AGAIN) from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} cannot be read: it holds no JSON object.", help=_AGAIN)
    return content


def _is_cached(real: Path) -> bool:
    """Whether a file lies where the hub's cache keeps what its links lead to."""
    return real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")


def _read_index(folder: Path, index: Path) -> dict[str, str]:
    """The shard of each tensor; ModelError that names the first that is not plainly a safetensors file beside the index."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise ModelError(f"{index} names no files (weight_map).", help=_AGAIN)
    for name, place in places.items():
        if _SHARD.fullmatch(place):
            continue
        if place.lower().endswith(PICKLES):
            why, help = "a pickle, which can run code and is not read", PICKLE_HELP
        else:
            why, help = "no plain name of a safetensors file in this folder", _AGAIN
        raise ModelError(f"{index} says that '{name}' is in '{place}': that is {why}.", help=help)
    return places


# -- One file ------------------------------------------------------------------------------------------------------------------

PICKLE_HELP = "load it where you trust it and call model.save_pretrained(folder): that writes model.safetensors."
POINTER = b"version https://git-lfs"
_POINTS = "a pointer of git-lfs"
_STRANGERS = (  # how files begin that lie under the name of another
    (POINTER, f"is {_POINTS}, not the file", "fetch it: git lfs install, then git lfs pull in that folder."),
    (b"PK\x03\x04", "is a zip file or a pickle of torch, no safetensors file", PICKLE_HELP),
    (b"\x80\x02", "is a pickle, no safetensors file", PICKLE_HELP),
    (b"GGUF", "is a GGUF file, no safetensors file", "name the folder of the model that it was made from."),
    (b"\x89HDF", "is an HDF5 file, no safetensors file", "save the model with PyTorch: model.save_pretrained(folder)."),
    (b"<!DOC", "is a web page, no safetensors file", "download the file itself."),
    (b"<html", "is a web page, no safetensors file", "download the file itself."),
)


def _read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, tuple[int, ...]]]:
    """The tensors of a file, and the shapes of those stored without zeros; ModelError if it is cut off or no safetensors file."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            head = stream.read(64)
            for start, what, help in _STRANGERS:
                if head.startswith(start):
                    raise ModelError(f"{file} {what} ({size:,} bytes).", help=help)
            length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else size
            if length > size - 8:
                raise ModelError(f"{file} is cut off or no safetensors file ({size} bytes).", help="copy or save it again.")
            stream.seek(8)
            header = json.loads(stream.read(min(length, LONGEST_JSON)))
        metadata = header.pop("__metadata__", {})
        tensors = {
            str(name): StoredTensor(str(entry["dtype"]), tuple(map(int, entry["shape"])), file)
            for name, entry in header.items()
        }
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        shapes = _sparse_shapes(metadata[KEY]) if KEY in metadata else {}
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}.", help=_AGAIN) from None
    except (ValueError, ArithmeticError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise ModelError(f"{file} has no readable safetensors header.", help="copy or save it again.") from None
    if 8 + length + end != size:
        raise ModelError(
            f"{file} is truncated: its header promises {8 + length + end} bytes, it has {size}.",
            help="copy or save it again.",
        )
    return tensors, shapes


def _sparse_shapes(text: str) -> dict[str, tuple[int, ...]]:
    """The shapes of matrices that are stored without zeros; what is wrong with the metadata, `read_tensors` says."""
    try:
        matrices = json.loads(text)["matrices"]
        return {str(name): tuple(map(int, facts["shape"])) for name, facts in matrices.items()}
    except (ValueError, ArithmeticError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
