"""Runs a saved model folder, dense or cut, in PyTorch in float32, to compare exported files with.

An encoder-decoder writes texts, by transformers' `generate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np

from slimformer.errors import ExtraError
from slimformer.runtimes._texts import read_tokenizer, texts_of
from slimformer.runtimes.base import Runner, Runtime


@final
@dataclass(frozen=True)
class Torch(Runtime):
    """`generation`: options of the search for a text that go before those of generation_config.json."""

    extra: ClassVar[str | None] = None

    generation: Mapping[str, Any] = field(default_factory=dict)

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
        writes = subject.model.config.is_encoder_decoder
        tokenizer = read_tokenizer(path) if writes else None

        def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                with torch.inference_mode():
                    if writes:
                        feeds = subject.feed({name: array for name, array in inputs.items() if not name.startswith("decoder_")})
                        rows = subject.model.generate(**feeds, **self.generation).numpy()  # type: ignore[operator]
                        return texts_of(tokenizer, _unfilled(rows, subject.model.generation_config.eos_token_id))
                    output = subject.model(**subject.feed(inputs), return_dict=True)
                return {name: value.numpy() for name, value in output.items() if isinstance(value, torch.Tensor)}
            finally:
                torch.set_num_threads(before)

        return run


def _unfilled(rows: np.ndarray, ends: Any) -> list[np.ndarray]:
    """Rows of tokens without what `generate` puts behind the end."""
    stops = np.isin(rows, [] if ends is None else ends)
    stops[:, 0] = False  # the token that a decoder starts with may be that which ends a text
    last = np.where(stops.any(axis=1), stops.argmax(axis=1), rows.shape[1] - 1)
    return [row[: end + 1] for row, end in zip(rows, last, strict=True)]
