"""Opens a model and what is to stand beside it, and profiles them: `slimformer inspect --profile`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slimformer.errors import ModelError
from slimformer.families.base import Subject, subject_of
from slimformer.measuring.machine import cores
from slimformer.measuring.profile import Profiled, Texts, profile_all
from slimformer.saving import checkpoint
from slimformer.saving.hub import local_folder


def profile_model(
    model: str | Path,
    others: Sequence[str | Path] = (),
    *,
    lengths: Sequence[int] = (128,),
    batches: Sequence[int] = (1, 32),
    threads: int | None = None,
    rounds: int = 5,
) -> Profiled:
    """Measures where time and bytes of a model go, by component and layer.

    Args:
        model: A folder with a model, or its id on the hub.
        others: .onnx files of the model, and folders of compressed ones, to profile beside it.
        lengths: Tokens of each text.
        batches: Texts of a run.
        threads: Threads of each run; all cores by default.
        rounds: Runs that are watched, and as many that are not; the fastest of each count.

    Returns:
        What the model holds and computes by place, and the profiles.

    Raises:
        ModelError: A model is none of a known family, has no positions for so many tokens, or is an encoder-decoder; or a file is no
            .onnx file of the model.
    """
    folder = local_folder(model)
    beside: dict[str, Subject | Path] = {}
    for item in map(Path, others):
        name = next(name for name in _names(item) if name not in beside)
        if item.is_file() and item.suffix != ".onnx":
            raise ModelError(f"{item} is no .onnx file and no folder.", help="name .onnx files, or folders with a model.")
        beside[name] = item if item.is_file() else subject_of(checkpoint.load(local_folder(item)))
    texts = [Texts(batch, length) for length in lengths for batch in batches]
    subject = subject_of(checkpoint.load(folder))
    return profile_all(subject, folder.resolve().name, beside, texts, threads=threads or cores(), rounds=rounds)


def _names(item: Path) -> list[str]:
    """Names for a file or folder, the short one first."""
    whole = item.resolve()
    return [whole.stem, f"{whole.parent.name}/{whole.stem}", str(whole)]
