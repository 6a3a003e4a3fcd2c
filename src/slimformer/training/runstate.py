"""A training run's state on disk: a killed run resumes from it and ends with exactly the numbers it would have had.

Each state is a folder with safetensors and JSON, renamed when whole; the one before stays until then, so that at every moment a
whole state exists. There is no pickle. This file knows tensors by name only; `loop.py` and `step.py` know their meaning.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimformer.files import remove_folder, remove_parts, whole_folder

STATE_FACTS = "state.json"
STATE_TENSORS = "state.safetensors"
STATES = "state"


@dataclass(frozen=True)
class RunState:
    """Tensors by name, and facts that JSON can hold; `step` optimiser steps are done."""

    step: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def save_state(folder: Path, state: RunState) -> None:
    """Writes the state under `folder` and removes the older ones. OutputError if the disk is full; the older ones then stay."""
    from safetensors.torch import save_file

    home = folder / STATES
    with whole_folder(home / f"step-{state.step:09d}") as part:
        save_file({name: tensor.detach().contiguous() for name, tensor in state.tensors.items()}, part / STATE_TENSORS)
        (part / STATE_FACTS).write_text(json.dumps({"step": state.step} | dict(state.facts)), encoding="utf-8")
    for older in _found(home)[1:]:
        shutil.rmtree(older, ignore_errors=True)


def latest_state(folder: Path) -> RunState | None:
    """The newest state that can be read, or None. Remains of interrupted writes are removed."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    home = folder / STATES
    remove_parts(home)
    for path in _found(home):
        try:
            facts = json.loads((path / STATE_FACTS).read_text(encoding="utf-8"))
            return RunState(int(facts.pop("step")), load_file(path / STATE_TENSORS), facts)
        except (OSError, ValueError, KeyError, SafetensorError):
            continue  # something other than slimformer damaged it; an older one may be whole
    return None


def forget_states(folder: Path) -> None:
    """Removes the state of a finished run: call it once the run's result is saved elsewhere."""
    remove_folder(folder / STATES)


def _found(home: Path) -> list[Path]:
    return sorted(home.glob("step-*"), reverse=True)


def restore(into: Mapping[str, Tensor], state: RunState, prefix: str) -> None:
    """Copies the saved tensors under `prefix` into these, in place; ValueError if names or shapes differ."""
    saved = {name: tensor for name, tensor in state.tensors.items() if name.startswith(prefix)}
    if {name: tensor.shape for name, tensor in saved.items()} != {name: tensor.shape for name, tensor in into.items()}:
        raise ValueError(f"the saved {prefix} holds other tensors than this run")
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(saved[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's moments, by the position of their parameter in the groups."""
    return {
        f"optimizer.{index}.{key}": value
        for index, parameter in enumerate(_parameters(optimizer))
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, state: RunState) -> None:
    """Puts saved moments back, each on its parameter's device; a parameter that had none gets none."""
    parameters = _parameters(optimizer)
    for name, tensor in state.tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            parameter = parameters[int(index)]
            optimizer.state[parameter][key] = tensor.to(parameter.device, copy=True)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
