"""The tensors of a module by name, and twelve digits that name these very weights."""

from __future__ import annotations

from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from slimformer.digests import Content, digest_all

_digests: WeakKeyDictionary[nn.Module, tuple[object, str]] = (
    WeakKeyDictionary()
)  # model -> which tensors it held, and their digest


def tensors_of(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The module's parameters and saved buffers, each once under its first name: tied weights have two."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    found = {}
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{type(module).__name__}.{name} is no tensor: what a state changes belongs in buffers")
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        found[prefix + name] = tensor
    return found


def fixed_digest(model: nn.Module) -> str:
    """`model_digest` of a model that is not trained any more, such as a teacher: it is read once as long as its tensors are the same."""
    tensors = tuple((name, tensor.data_ptr(), tensor._version) for name, tensor in tensors_of(model, "").items())
    if model not in _digests or _digests[model][0] != tensors:
        _digests[model] = tensors, model_digest(model)
    return _digests[model][1]


def model_digest(model: nn.Module) -> str:
    """Twelve hexadecimal digits that name these very weights."""

    def parts() -> Iterator[Content]:
        for name, tensor in sorted(tensors_of(model, "").items()):
            yield f"{name} {tuple(tensor.shape)} {tensor.dtype}"
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return digest_all(parts())
