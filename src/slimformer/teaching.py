"""What the teacher sees in each batch: read from disk where that is possible, computed where it must be.

The one idea: a teacher does not change, so its outputs for a row are computed once, sorted by length, and kept on disk under a
digest of weights, rows and precision. Outputs always fit; hidden states are kept in half precision under a cap of bytes;
attention scores never are (4,000 SQuAD questions would be tens of gigabytes): a method that asks for them gets a live teacher.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from slimformer.anatomy import Anatomy
from slimformer.batching import collate, sorted_by_length
from slimformer.capture import Recorder, capturing
from slimformer.files import whole_folder
from slimformer.log import Log
from slimformer.methods.base import Batch, Capture, Captured
from slimformer.runstate import features_digest, model_digest
from slimformer.tasks.base import Features, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOLDER = "teacher"
BATCH = 64  # rows per pass while the cache is filled
PADDING = -1e4  # what stands at padding in outputs with a value per token; tasks leave padding out, and never see it
FACTS = "facts.json"


@dataclass(frozen=True)
class Teacher:
    """A model that is only looked at, the names of its inputs, and how it is to be computed."""

    model: PreTrainedModel
    anatomy: Anatomy
    inputs: tuple[str, ...]
    task: Task
    autocast: Callable[[], AbstractContextManager[object]]
    precision: str
    device: torch.device

    def look(self, recorder: Recorder, batch: Batch) -> Captured:
        """One forward pass, without gradients."""
        with torch.no_grad(), self.autocast():
            output = self.model(**{name: batch[name] for name in self.inputs if name in batch})
        return recorder.take({name: output[name] for name in self.task.outputs})


class Lessons(ABC):
    """What the teacher sees in the rows of a batch; `seconds` went into computing it beforehand."""

    seconds: float = 0.0

    @abstractmethod
    def see(self, rows: Sequence[int], batch: Batch) -> Captured: ...


class Live(Lessons):
    """A teacher that runs beside the student."""

    def __init__(self, teacher: Teacher, recorder: Recorder) -> None:
        self._teacher, self._recorder = teacher, recorder

    def see(self, rows: Sequence[int], batch: Batch) -> Captured:
        return self._teacher.look(self._recorder, batch)


class Remembered(Lessons):
    """A teacher that looks at each batch once and remembers: stands in for cached outputs while a training is estimated."""

    def __init__(self, teacher: Teacher, recorder: Recorder) -> None:
        self._teacher, self._recorder = teacher, recorder
        self._seen: dict[tuple[int, ...], Captured] = {}

    def see(self, rows: Sequence[int], batch: Batch) -> Captured:
        key = tuple(rows)
        if key not in self._seen:
            self._seen[key] = self.look(batch)
        return self._seen[key]

    def look(self, batch: Batch) -> Captured:
        """A look that is not remembered: what making the outputs costs."""
        return self._teacher.look(self._recorder, batch)


class Cached(Lessons):
    """A teacher's outputs (and hidden states) read from a folder that `fill` wrote."""

    def __init__(self, folder: Path, device: torch.device, seconds: float) -> None:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        self.seconds = seconds
        self._device = device
        self._per_token: dict[str, bool] = facts["outputs"]
        self._lengths: np.ndarray = np.load(folder / "lengths.npy", allow_pickle=False)  # (rows,)
        self._place: np.ndarray = np.load(folder / "place.npy", allow_pickle=False)  # row -> position in visiting order
        self._start: np.ndarray = np.load(folder / "start.npy", allow_pickle=False)  # row -> its first token
        self._outputs = {name: np.load(folder / f"output-{name}.npy", allow_pickle=False) for name in self._per_token}
        hidden = folder / "hidden.npy"
        self._hidden: np.ndarray | None = np.load(hidden, mmap_mode="r", allow_pickle=False) if hidden.exists() else None

    def see(self, rows: Sequence[int], batch: Batch) -> Captured:
        width = max(int(self._lengths[row]) for row in rows)
        output = {
            name: self._padded(self._outputs[name], rows, width, PADDING)
            if per_token
            else torch.from_numpy(self._outputs[name][self._place[list(rows)]]).to(self._device)
            for name, per_token in self._per_token.items()
        }
        if self._hidden is None:
            return Captured(output)
        hidden = self._padded(self._hidden, rows, width, 0.0)  # (batch, seq, layers + 1, hidden)
        return Captured(output, hidden.unbind(2))

    def _padded(self, tokens: np.ndarray, rows: Sequence[int], width: int, fill: float) -> Tensor:
        out = np.full((len(rows), width, *tokens.shape[1:]), fill, dtype=np.float32)
        for index, row in enumerate(rows):
            start, length = int(self._start[row]), int(self._lengths[row])
            out[index, :length] = tokens[start : start + length]
        return torch.from_numpy(out).to(self._device)


def is_live(teacher: Teacher, features: Features, needs: Collection[Capture], cap_bytes: int) -> bool:
    """Whether the teacher must run beside the student, because what is asked of it is too large to keep."""
    return Capture.SCORES in needs or (Capture.HIDDEN in needs and _hidden_bytes(teacher.anatomy, features) > cap_bytes)


@contextmanager
def teaching(
    teacher: Teacher,
    features: Features,
    needs: Collection[Capture],
    folder: Path,
    log: Log,
    *,
    cap_bytes: int,
    writes: bool = True,
    wait: Callable[[], None] = lambda: None,
) -> Iterator[Lessons]:
    """The teacher's lessons for these rows: from `folder`, which is filled first where it must be, or live.

    Of several processes one `writes` and all `wait` for it.
    """
    trained = teacher.model.training
    teacher.model.train(False)
    try:
        if is_live(teacher, features, needs, cap_bytes):
            with capturing(teacher.model, teacher.anatomy, needs) as recorder:
                yield Live(teacher, recorder)
            return
        kept = {Capture.HIDDEN} & set(needs)
        home = folder / FOLDER / _key(teacher, features, kept)
        seconds = 0.0
        if writes and not (home / FACTS).exists():
            begin = time.perf_counter()
            _fill(teacher, features, kept, home, log)
            seconds = time.perf_counter() - begin
        wait()
        yield Cached(home, teacher.device, seconds)
    finally:
        teacher.model.train(trained)


@contextmanager
def remembering(teacher: Teacher, needs: Collection[Capture]) -> Iterator[Remembered]:
    """Lessons for a few batches, kept in memory."""
    trained = teacher.model.training
    teacher.model.train(False)
    try:
        with capturing(teacher.model, teacher.anatomy, needs) as recorder:
            yield Remembered(teacher, recorder)
    finally:
        teacher.model.train(trained)


def forget(folder: Path) -> None:
    """Removes all cached lessons under `folder`."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def _key(teacher: Teacher, features: Features, needs: Collection[Capture]) -> str:
    parts = [model_digest(teacher.model), features_digest(features, teacher.inputs), str(features.pad_id)]
    parts += [teacher.precision, *teacher.task.outputs, *sorted(needs)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]


def _hidden_bytes(anatomy: Anatomy, features: Features) -> int:
    return int(features.lengths().sum()) * (len(anatomy.layers) + 1) * anatomy.hidden_size * 2


def _fill(teacher: Teacher, features: Features, needs: Collection[Capture], home: Path, log: Log) -> None:
    """Computes everything once, from short rows to long ones, and writes it whole."""
    lengths = features.lengths()
    batches = sorted_by_length(lengths, BATCH)
    visited = np.asarray([row for rows in batches for row in rows], dtype=np.int64)
    place, start = np.empty_like(visited), np.empty_like(visited)
    place[visited] = np.arange(len(visited))
    start[visited] = np.cumsum(lengths[visited]) - lengths[visited]
    outputs: dict[str, list[np.ndarray]] = {name: [] for name in teacher.task.outputs}
    for stale in home.parent.glob(".part-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with whole_folder(home) as part, open(part / "hidden.npy", "wb") as file:
        if needs:
            shape = (int(lengths.sum()), len(teacher.anatomy.layers) + 1, teacher.anatomy.hidden_size)
            _header(file, shape, np.dtype(np.float16))
        with (
            capturing(teacher.model, teacher.anatomy, needs) as recorder,
            log.track("teacher outputs", len(visited)) as advance,
        ):
            done = 0
            per_token: dict[str, bool] = {}
            for rows in batches:
                batch = {name: torch.from_numpy(array).to(teacher.device) for name, array in collate(features, rows).items()}
                per_token = per_token or _per_token(teacher, recorder, batch)
                seen = teacher.look(recorder, batch)
                for name, value in seen.output.items():
                    outputs[name].append(value.cpu().numpy())
                if needs:
                    stacked = torch.stack(seen.hidden, dim=2)  # (batch, seq, layers + 1, hidden)
                    real = batch["attention_mask"].bool()
                    # written in order with plain writes: a full disk then raises, where a memory map would kill the process
                    file.write(stacked[real].half().cpu().numpy().tobytes())
                done += len(rows)
                advance(done)
        for name, arrays in outputs.items():
            if per_token[name]:
                arrays = [a[i, : lengths[row]] for a, rows in zip(arrays, batches, strict=True) for i, row in enumerate(rows)]
            np.save(part / f"output-{name}.npy", np.concatenate(arrays), allow_pickle=False)
        for name, array in (("lengths", lengths), ("place", place), ("start", start)):
            np.save(part / f"{name}.npy", array, allow_pickle=False)
        if not needs:
            (part / "hidden.npy").unlink()
        (part / FACTS).write_text(json.dumps({"outputs": per_token}), encoding="utf-8")


def _per_token(teacher: Teacher, recorder: Recorder, batch: Batch) -> dict[str, bool]:
    """Which outputs have one value per token: those that change shape when the batch is one token narrower."""
    width = batch["input_ids"].shape[1]
    other = slice(0, width - 1) if width > 1 else [0, 0]
    changed = {name: value[:, other] if value.ndim > 1 else value for name, value in batch.items()}
    shapes = {name: value.shape for name, value in teacher.look(recorder, batch).output.items()}
    return {name: value.shape != shapes[name] for name, value in teacher.look(recorder, changed).output.items()}


def _header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> None:
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
