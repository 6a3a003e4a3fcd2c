"""Runs a saved model folder, dense or cut, in PyTorch in float32, to compare exported files with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, final

import numpy as np

from slimformer.errors import ExtraError
from slimformer.runtimes.base import Runner, Runtime


@final
@dataclass(frozen=True)
class Torch(Runtime):
    extra: ClassVar[str | None] = None

    def available(self) -> bool:
        return find_spec("torch") is not None and find_spec("transformers") is not None

    def version(self) -> str:
        import torch

        return str(torch.__version__)

    def accepts(self, path: Path) -> bool:
        return path.is_dir() and (path / "config.json").is_file() and any(path.glob("*.safetensors"))

    def load(self, path: Path, threads: int) -> Runner:
        """Threads are PyTorch's, for the whole process, so they are set around each call and put back."""
        if not self.available():
            raise ExtraError("the runtime 'torch' is not installed.", help="pip install torch transformers")
        import torch

        from slimformer.families.base import subject_of
        from slimformer.saving.checkpoint import load

        subject = subject_of(load(path))

        def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                with torch.inference_mode():
                    output = subject.model(**subject.feed(inputs), return_dict=True)
                return {name: value.numpy() for name, value in output.items() if isinstance(value, torch.Tensor)}
            finally:
                torch.set_num_threads(before)

        return run
