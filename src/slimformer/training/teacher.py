"""Gives the teacher's outputs for each batch: they are read from disk if possible, and computed otherwise.

The one idea: a teacher does not change, so its outputs for a row are computed once, sorted by length, and kept on disk under a
digest of weights, rows and precision. Outputs always fit; hidden states and attention scores are kept in half precision if both
fit under a limit: scores of short texts do, those of 4,000 SQuAD questions would be tens of gigabytes. Otherwise the teacher is live.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from slimformer.core.anatomy import Anatomy, Kind
from slimformer.data.batching import collate, least_width, sorted_by_length
from slimformer.data.material import features_digest
from slimformer.digests import digest
from slimformer.families.base import Subject
from slimformer.files import in_turn, remove_parts, whole_folder
from slimformer.hooks.capture import RELATED, Capture, Captured, Recorder, capturing, related_width, state_count
from slimformer.log import Log
from slimformer.methods.base import Batch
from slimformer.saving.tensors import fixed_digest
from slimformer.tasks.base import Features, Task

TEACHER_FOLDER = "teacher"
BATCH = 64  # rows per pass while the cache is filled; a quarter of that if scores are read, which take most of the memory
LAYOUT = 3  # a version number of the files below; it is part of their digest, so that another layout fills its cache anew
LARGE = frozenset({Capture.HIDDEN, Capture.SCORES, Capture.RELATIONS})  # these outputs may not fit
PADDING = -1e4  # outputs with a value per token have this at padding; tasks leave padding out
CACHE_FACTS = "facts.json"


@dataclass(frozen=True)
class Teacher:
    """A model that only gives outputs, and how these are computed."""

    subject: Subject
    task: Task
    autocast: Callable[[], AbstractContextManager[object]]
    precision: str

    def forward(self, recorder: Recorder, batch: Batch) -> Captured:
        """One forward pass, without gradients."""
        with torch.no_grad(), self.autocast(), self.task.decoding(self.subject.model, batch):
            output = self.subject.model(**self.subject.feed(batch))
        return recorder.take({name: output[name] for name in self.task.outputs})

    @property
    def kept(self) -> tuple[str, ...]:
        """The outputs that are small enough to keep."""
        return () if self.task.pretraining or self.task.stand_in else self.task.outputs


class TeacherOutputs(ABC):
    """The teacher's outputs for the rows of a batch; computing them beforehand took `seconds`."""

    seconds: float = 0.0

    @abstractmethod
    def see(self, rows: Sequence[int], batch: Batch) -> Captured: ...


class LiveTeacher(TeacherOutputs):
    """A teacher that runs beside the student."""

    def __init__(self, teacher: Teacher, recorder: Recorder) -> None:
        self._teacher, self._recorder = teacher, recorder

    def see(self, rows: Sequence[int], batch: Batch) -> Captured:
        return self._teacher.forward(self._recorder, batch)


class MemoizedTeacher(TeacherOutputs):
    """A teacher that computes each batch once and remembers it; it replaces cached outputs while a training is estimated."""

    def __init__(self, teacher: Teacher, recorder: Recorder) -> None:
        self._teacher, self._recorder = teacher, recorder
        self._seen: dict[tuple[int, ...], Captured] = {}

    def see(self, rows: Sequence[int], batch: Batch) -> Captured:
        key = tuple(rows)
        if key not in self._seen:
            self._seen[key] = self.compute(batch)
        return self._seen[key]

    def compute(self, batch: Batch) -> Captured:
        """A pass that is not remembered, to time how long making the outputs takes."""
        return self._teacher.forward(self._recorder, batch)


class CachedTeacher(TeacherOutputs):
    """A teacher's outputs, and what else was kept, read from a folder that `_fill` wrote."""

    def __init__(self, folder: Path, device: torch.device, seconds: float) -> None:
        facts = json.loads((folder / CACHE_FACTS).read_text(encoding="utf-8"))
        self.seconds = seconds
        self._device = device
        self._per_token: dict[str, bool] = facts["outputs"]
        self._lengths: np.ndarray = np.load(folder / "lengths.npy", allow_pickle=False)  # (rows,)
        self._place: np.ndarray = np.load(folder / "place.npy", allow_pickle=False)  # row -> position in visiting order
        self._start: np.ndarray = np.load(folder / "start.npy", allow_pickle=False)  # row -> its first token
        self._first_pair: np.ndarray = np.load(folder / "pair.npy", allow_pickle=False)  # row -> its first pair of tokens
        self._outputs = {name: np.load(folder / f"output-{name}.npy", allow_pickle=False) for name in self._per_token}
        self._heads: dict[str, int] = facts["heads"]  # site -> its heads; empty if scores are not kept
        self._hidden, self._scores, self._relations = (
            np.load(file, mmap_mode="r", allow_pickle=False) if file.exists() else None
            for file in (folder / f"{kind}.npy" for kind in (Capture.HIDDEN, Capture.SCORES, Capture.RELATIONS))
        )

    def see(self, rows: Sequence[int], batch: Batch) -> Captured:
        width = batch["input_ids"].shape[1]
        output = {
            name: self._padded(self._outputs[name], rows, width, PADDING)
            if per_token
            else torch.from_numpy(self._outputs[name][self._place[list(rows)]]).to(self._device)
            for name, per_token in self._per_token.items()
        }
        hidden: tuple[Tensor, ...] = ()
        if self._hidden is not None:
            hidden = self._padded(self._hidden, rows, width, 0.0).unbind(2)  # layers + 1 of (batch, seq, hidden)
        scores = self._scores_of(self._scores, rows, width) if self._scores is not None else {}
        relations: tuple[Tensor, ...] = ()
        if self._relations is not None and self._relations.shape[-1]:
            relations = self._padded(self._relations, rows, width, 0.0).unbind(2)  # three of (batch, seq, width of all heads)
        return Captured(output, hidden, scores, relations)

    def _padded(self, tokens: np.ndarray, rows: Sequence[int], width: int, fill: float) -> Tensor:
        out = np.full((len(rows), width, *tokens.shape[1:]), fill, dtype=np.float32)
        for index, row in enumerate(rows):
            start, length = int(self._start[row]), int(self._lengths[row])
            out[index, :length] = tokens[start : start + length]
        return torch.from_numpy(out).to(self._device)

    def _scores_of(self, kept: np.ndarray, rows: Sequence[int], width: int) -> dict[str, Tensor]:
        """Heads site -> (batch, heads, seq, seq), 0 at padding."""
        every = sum(self._heads.values())
        out = np.zeros((len(rows), every, width, width), dtype=np.float32)
        for index, row in enumerate(rows):
            length, start = int(self._lengths[row]), every * int(self._first_pair[row])
            out[index, :, :length, :length] = kept[start : start + every * length**2].reshape(every, length, length)
        parts = torch.from_numpy(out).to(self._device).split(list(self._heads.values()), dim=1)
        return dict(zip(self._heads, parts, strict=True))


def is_live(teacher: Teacher, features: Features, needs: Collection[Capture], cap_bytes: int) -> bool:
    """Whether the teacher must run beside the student, because its outputs are too large to keep.

    Of an encoder-decoder only the task's outputs are kept: the files here have one length for each row.
    """
    if len(teacher.subject.anatomy.stacks) > 1 and LARGE & set(needs):
        return True
    if Capture.LOGITS in needs and not teacher.kept:
        return True
    return cached_bytes(teacher.subject.anatomy, features.lengths(), needs) > cap_bytes


def cached_bytes(anatomy: Anatomy, lengths: np.ndarray, needs: Collection[Capture]) -> int:
    """The bytes that hidden states and attention scores of texts of these lengths (rows,) take on disk."""
    tokens = lengths.astype(np.int64)
    hidden = int(tokens.sum()) * state_count(anatomy) * anatomy.hidden_size
    scores = int((tokens**2).sum()) * sum(_heads(anatomy).values())
    relations = int(tokens.sum()) * len(RELATED) * related_width(anatomy)
    sizes = {Capture.HIDDEN: hidden, Capture.SCORES: scores, Capture.RELATIONS: relations}
    return 2 * sum(size for kind, size in sizes.items() if kind in needs)


@contextmanager
def teacher_outputs(
    teacher: Teacher,
    features: Features,
    needs: Collection[Capture],
    folder: Path,
    log: Log,
    *,
    cap_bytes: int,
    writes: bool = True,
    wait: Callable[[], None] = lambda: None,
) -> Iterator[TeacherOutputs]:
    """The teacher's outputs for these rows: from `folder`, which is filled first if it is empty, or live.

    Of several processes of one run one `writes` and all `wait` for it; runs that share `folder` fill it in turn.
    """
    large = LARGE & set(needs)
    home = folder / TEACHER_FOLDER / _key(teacher, features, large)
    subject = teacher.subject
    with subject.evaluating():
        kept = Capture.LOGITS not in needs or bool(teacher.kept)
        made = kept and (home / CACHE_FACTS).exists()  # an existing cache is read even if the disk is full by now
        if not made and is_live(teacher, features, needs, cap_bytes):
            with capturing(subject.model, subject.anatomy, needs) as recorder:
                yield LiveTeacher(teacher, recorder)
            return
        seconds = 0.0
        if writes and not made:
            with in_turn(home.parent, lambda: log.say("another run makes teacher outputs here: waiting for it.")):
                if not (home / CACHE_FACTS).exists():  # another run may have made it meanwhile
                    begin = time.perf_counter()
                    _fill(teacher, features, large, home, log)
                    seconds = time.perf_counter() - begin
        wait()
        yield CachedTeacher(home, subject.device, seconds)


@contextmanager
def memoized_teacher(teacher: Teacher, needs: Collection[Capture]) -> Iterator[MemoizedTeacher]:
    """TeacherOutputs for a few batches, kept in memory."""
    subject = teacher.subject
    with subject.evaluating(), capturing(subject.model, subject.anatomy, needs) as recorder:
        yield MemoizedTeacher(teacher, recorder)


def _key(teacher: Teacher, features: Features, needs: Collection[Capture]) -> str:
    parts = [fixed_digest(teacher.subject.model), features_digest(features, teacher.subject.inputs), str(features.pad_id)]
    parts += [str(LAYOUT), teacher.precision, *teacher.task.outputs, *sorted(needs)]
    return digest(" ".join(parts))


def _heads(anatomy: Anatomy) -> dict[str, int]:
    """The number of heads of each attention that have scores, by its site."""
    return {site.id: len(anatomy.asking_heads(site)) for site in anatomy.of_kind(Kind.HEADS)}


def _fill(teacher: Teacher, features: Features, needs: Collection[Capture], home: Path, log: Log) -> None:
    """Computes everything once, from short rows to long ones, and writes it whole."""
    lengths = features.lengths().astype(np.int64)
    batches = sorted_by_length(lengths, BATCH // 4 if Capture.SCORES in needs else BATCH)
    visited = np.asarray([row for rows in batches for row in rows], dtype=np.int64)
    place, start, pair = (np.empty_like(visited) for _ in range(3))
    place[visited] = np.arange(len(visited))
    start[visited] = np.cumsum(lengths[visited]) - lengths[visited]
    pair[visited] = np.cumsum(lengths[visited] ** 2) - lengths[visited] ** 2
    heads = _heads(teacher.subject.anatomy) if Capture.SCORES in needs else {}
    shapes = {
        Capture.HIDDEN: (int(lengths.sum()), state_count(teacher.subject.anatomy), teacher.subject.anatomy.hidden_size),
        Capture.SCORES: (int((lengths**2).sum()) * sum(heads.values()),),
        Capture.RELATIONS: (int(lengths.sum()), len(RELATED), related_width(teacher.subject.anatomy)),
    }
    outputs: dict[str, list[np.ndarray]] = {name: [] for name in teacher.kept}
    remove_parts(home.parent)
    with whole_folder(home) as part, ExitStack() as stack:
        files = {kind: stack.enter_context(open(part / f"{kind}.npy", "wb")) for kind in needs}
        for kind, file in files.items():
            _header(file, shapes[kind], np.dtype(np.float16))
        recorder = stack.enter_context(capturing(teacher.subject.model, teacher.subject.anatomy, needs))
        advance = stack.enter_context(log.track("teacher outputs", len(visited)))
        done = 0
        per_token: dict[str, bool] = {}
        for rows in batches:
            columns = collate(features, rows, width=least_width(lengths, rows, teacher.precision))
            batch = {name: torch.from_numpy(column).to(teacher.subject.device) for name, column in columns.items()}
            if teacher.kept:
                per_token = per_token or _per_token(teacher, recorder, batch)
            seen = teacher.forward(recorder, batch)
            for name, arrays in outputs.items():
                arrays.append(seen.output[name].cpu().numpy())
            # plain writes in order raise if the disk is full; a memory map would kill the process
            if Capture.HIDDEN in files:
                real = torch.stack(seen.hidden, dim=2)[batch["attention_mask"].bool()]  # (tokens, layers + 1, hidden)
                files[Capture.HIDDEN].write(real.half().cpu().numpy().tobytes())
            if Capture.RELATIONS in files and seen.relations:
                real = torch.stack(seen.relations, dim=2)[batch["attention_mask"].bool()]  # (tokens, 3, width of all heads)
                files[Capture.RELATIONS].write(real.half().cpu().numpy().tobytes())
            if Capture.SCORES in files and heads:
                every = torch.cat([seen.scores[site] for site in heads], dim=1).half().cpu().numpy()
                for scores, row in zip(every, rows, strict=True):  # (heads of all layers, seq, seq)
                    files[Capture.SCORES].write(scores[:, : lengths[row], : lengths[row]].tobytes())
            done += len(rows)
            advance(done)
        for name, arrays in outputs.items():
            if per_token[name]:
                arrays = [a[i, : lengths[row]] for a, rows in zip(arrays, batches, strict=True) for i, row in enumerate(rows)]
            np.save(part / f"output-{name}.npy", np.concatenate(arrays), allow_pickle=False)
        for name, array in (("lengths", lengths), ("place", place), ("start", start), ("pair", pair)):
            np.save(part / f"{name}.npy", array, allow_pickle=False)
        (part / CACHE_FACTS).write_text(json.dumps({"outputs": per_token, "heads": heads}), encoding="utf-8")


def _per_token(teacher: Teacher, recorder: Recorder, batch: Batch) -> dict[str, bool]:
    """The outputs with one value per token: their shape changes if the batch is one token narrower."""
    width = batch["input_ids"].shape[1]
    other = slice(0, width - 1) if width > 1 else [0, 0]
    changed = {name: value[:, other] if value.ndim > 1 else value for name, value in batch.items()}
    shapes = {name: value.shape for name, value in teacher.forward(recorder, batch).output.items()}
    return {name: value.shape != shapes[name] for name, value in teacher.forward(recorder, changed).output.items()}


def _header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> None:
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
