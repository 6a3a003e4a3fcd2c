"""Gives the teacher's outputs for each batch: they are read from disk if possible, and computed otherwise.

The one idea: a teacher does not change, so its outputs for a row are computed once, sorted by length, and kept on disk under a
digest of weights, rows and precision. They are written in parts of half a minute each, so that a kill loses no more than that.
Outputs always fit; hidden states and attention scores are kept in half precision if both fit under a limit: scores of short texts do,
those of 4,000 SQuAD questions would be tens of gigabytes. Otherwise the teacher is live.
"""

from __future__ import annotations

import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
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
from slimformer.files import in_turn, remove_parts, whole, whole_folder, write_text
from slimformer.hooks.capture import RELATED, Capture, Captured, Recorder, capturing, related_width, state_count
from slimformer.log import Log
from slimformer.methods.base import Batch
from slimformer.saving.tensors import fixed_digest
from slimformer.tasks.base import Features, Task

TEACHER_FOLDER = "teacher"
BATCH = 64  # rows per pass while the cache is filled; a quarter of that if scores are read, which take most of the memory
LAYOUT = 4  # a version number of the files below; it is part of their digest, so that another layout fills its cache anew
LARGE = frozenset({Capture.HIDDEN, Capture.SCORES, Capture.RELATIONS})  # these outputs may not fit
PADDING = -1e4  # outputs with a value per token have this at padding; tasks leave padding out
CACHE_FACTS = "facts.json"  # of a cache, written last; and of each of its parts
PARTS_FOLDER = "parts"
PART_SECONDS = 30.0  # a part is closed after the batch that passes this


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


class _Kept:
    """Numbers in the order of visits, (total, ...), read from the files of several parts; a slice must lie in one of them."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._maps = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
        sizes = [len(part) for part in self._maps]
        self._ends = np.cumsum(sizes)
        self.shape = (sum(sizes), *self._maps[0].shape[1:])

    def __getitem__(self, wanted: slice) -> np.ndarray:
        part = min(int(np.searchsorted(self._ends, wanted.start, side="right")), len(self._maps) - 1)
        before = int(self._ends[part]) - len(self._maps[part])
        return self._maps[part][wanted.start - before : wanted.stop - before]


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
        parts = [folder / PARTS_FOLDER / name for name in facts["parts"]]
        self._outputs = {
            name: np.concatenate([np.load(part / f"output-{name}.npy", allow_pickle=False) for part in parts])
            for name in self._per_token
        }
        self._heads: dict[str, int] = facts["heads"]  # site -> its heads; empty if scores are not kept
        self._hidden, self._scores, self._relations = (
            _Kept([part / f"{kind}.npy" for part in parts]) if (parts[0] / f"{kind}.npy").exists() else None
            for kind in (Capture.HIDDEN, Capture.SCORES, Capture.RELATIONS)
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

    def _padded(self, tokens: np.ndarray | _Kept, rows: Sequence[int], width: int, fill: float) -> Tensor:
        out = np.full((len(rows), width, *tokens.shape[1:]), fill, dtype=np.float32)
        for index, row in enumerate(rows):
            start, length = int(self._start[row]), int(self._lengths[row])
            out[index, :length] = tokens[start : start + length]
        return torch.from_numpy(out).to(self._device)

    def _scores_of(self, kept: _Kept, rows: Sequence[int], width: int) -> dict[str, Tensor]:
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
        begun = kept and (home / PARTS_FOLDER).is_dir()  # what is there counts no longer as free
        if not made and not begun and is_live(teacher, features, needs, cap_bytes):
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


@dataclass(frozen=True)
class RowShare:
    """One of `count` runs of rows, of about as many tokens each; the first is 0."""

    number: int
    count: int


def fill_share(
    teacher: Teacher,
    features: Features,
    needs: Collection[Capture],
    folder: Path,
    log: Log,
    share: RowShare,
    *,
    cap_bytes: int,
) -> bool:
    """Computes a share of what `teacher_outputs` with the same arguments will read; False if that keeps nothing.

    Shares are computed side by side. Each batch is the one that a filling of all rows has, so that no number depends on their count.
    """
    large = LARGE & set(needs)
    home = folder / TEACHER_FOLDER / _key(teacher, features, large)
    if (home / CACHE_FACTS).exists():
        return True
    if not (home / PARTS_FOLDER).is_dir() and is_live(teacher, features, needs, cap_bytes):
        return False
    visits = _visits(features, needs)
    bounds = visits.bounds(share.count)
    first, last = bounds[share.number], bounds[share.number + 1]
    with teacher.subject.evaluating(), _filling(teacher, features, large, visits) as filler:
        done = first
        for part in _parts_from(home / PARTS_FOLDER, first):
            done = part.rows
        with log.track("teacher outputs", last - first) as advance:
            for rows in _filled(filler, visits, home, done, last):
                advance(rows - first)
    return True


@dataclass(frozen=True)
class _Visits:
    """All rows in the order in which they are computed, from short ones to long ones."""

    batches: Sequence[Sequence[int]]
    lengths: np.ndarray  # (rows,)

    @property
    def rows(self) -> np.ndarray:
        """(rows,): by their place in that order."""
        return np.asarray([row for rows in self.batches for row in rows], dtype=np.int64)

    @property
    def ends(self) -> np.ndarray:
        """(batches,): the rows that are done after each."""
        return np.cumsum([len(rows) for rows in self.batches])

    def bounds(self, count: int) -> list[int]:
        """Where `count` shares begin and end, in rows that are done: at ends of batches, and with about as many tokens in each."""
        ends, tokens = self.ends, np.cumsum([int(self.lengths[list(rows)].sum()) for rows in self.batches])
        steps = [int(np.searchsorted(tokens, tokens[-1] * number / count)) for number in range(1, count)]
        return [0, *(int(ends[step]) for step in steps), int(ends[-1])]


def _visits(features: Features, needs: Collection[Capture]) -> _Visits:
    lengths = features.lengths().astype(np.int64)
    return _Visits(sorted_by_length(lengths, BATCH // 4 if Capture.SCORES in needs else BATCH), lengths)


def _fill(teacher: Teacher, features: Features, needs: Collection[Capture], home: Path, log: Log) -> None:
    """Computes everything once, from short rows to long ones, in parts that are each written whole; a filling that was killed goes on."""
    visits = _visits(features, needs)
    lengths, visited = visits.lengths, visits.rows
    place, start, pair = (np.empty_like(visited) for _ in range(3))
    place[visited] = np.arange(len(visited))
    start[visited] = np.cumsum(lengths[visited]) - lengths[visited]
    pair[visited] = np.cumsum(lengths[visited] ** 2) - lengths[visited] ** 2
    parts = _parts_of(home)
    with _filling(teacher, features, needs, visits) as filler, log.track("teacher outputs", len(visited)) as advance:
        for done in _filled(filler, visits, home, parts[-1].rows if parts else 0, len(visited)):
            advance(done)
    for word, array in (("lengths", lengths), ("place", place), ("start", start), ("pair", pair)):
        with whole(home / f"{word}.npy") as file, open(file, "wb") as plain:
            np.save(plain, array, allow_pickle=False)
    facts = {"outputs": filler.per_token, "heads": filler.heads, "parts": [part.name for part in _parts_of(home)]}
    write_text(home / CACHE_FACTS, json.dumps(facts))


@contextmanager
def _filling(teacher: Teacher, features: Features, needs: Collection[Capture], visits: _Visits) -> Iterator[_Filler]:
    """What computes batches of rows and writes what is kept of them."""
    heads = _heads(teacher.subject.anatomy) if Capture.SCORES in needs else {}
    with capturing(teacher.subject.model, teacher.subject.anatomy, needs) as recorder:
        filler = _Filler(teacher, features, visits.lengths, frozenset(needs), heads, recorder)
        if teacher.kept:
            filler.per_token.update(_per_token(teacher, recorder, filler.batch(visits.batches[0])))
        yield filler


def _filled(filler: _Filler, visits: _Visits, home: Path, done: int, last: int) -> Iterator[int]:
    """Writes the parts from row `done` to row `last`, both ends of batches; gives the rows that are done after each batch."""
    ends = visits.ends
    stop = int(np.searchsorted(ends, last)) + 1
    while done < last:
        with whole_folder(home / PARTS_FOLDER / f"{done:012d}") as folder:
            for rows in filler.fill(folder, visits.batches[int(np.searchsorted(ends, done, side="right")) : stop]):
                done += len(rows)
                yield done
            (folder / CACHE_FACTS).write_text(json.dumps({"rows": done}), encoding="utf-8")


@dataclass(frozen=True)
class _Part:
    """A part of a cache; with it so many rows are done."""

    name: str
    rows: int


def _parts_of(home: Path) -> list[_Part]:
    """The parts that a filling which was killed, or shares of one, have left, from the first on without a gap; all others are removed."""
    folder = home / PARTS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    remove_parts(home)
    remove_parts(folder)
    found = _parts_from(folder, 0)
    for place in {item.name for item in folder.iterdir()} - {part.name for part in found}:
        shutil.rmtree(folder / place, ignore_errors=True)
    return found


def _parts_from(folder: Path, first: int) -> list[_Part]:
    """The parts that follow each other from row `first` on; one that something other than slimformer damaged is removed."""
    found: list[_Part] = []
    while (place := folder / f"{(done := found[-1].rows if found else first):012d}").is_dir():
        try:
            rows = int(json.loads((place / CACHE_FACTS).read_text(encoding="utf-8"))["rows"])
        except (OSError, ValueError, KeyError, TypeError):
            rows = 0
        if rows <= done:
            shutil.rmtree(place, ignore_errors=True)
            break
        found.append(_Part(place.name, rows))
    return found


@dataclass(frozen=True)
class _Filler:
    """Computes the teacher's outputs for batches, and writes what is kept of them."""

    teacher: Teacher
    features: Features
    lengths: np.ndarray  # (rows,)
    needs: frozenset[Capture]
    heads: Mapping[str, int]
    recorder: Recorder
    per_token: dict[str, bool] = field(default_factory=dict)  # which outputs have one value per token

    def fill(self, folder: Path, batches: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
        """Writes a part: the first of these batches, about half a minute of them; gives the rows of each when it is computed."""
        anatomy, begin = self.teacher.subject.anatomy, time.perf_counter()
        shapes: dict[Capture, tuple[int, ...]] = {
            Capture.HIDDEN: (state_count(anatomy), anatomy.hidden_size),
            Capture.SCORES: (),
            Capture.RELATIONS: (len(RELATED), related_width(anatomy)),
        }
        outputs: dict[str, list[np.ndarray]] = {name: [] for name in self.teacher.kept}
        counts = dict.fromkeys(self.needs, 0)
        with ExitStack() as stack:
            files = {kind: stack.enter_context(open(folder / f"{kind}.npy", "wb")) for kind in self.needs}
            for kind, file in files.items():
                _header(file, (0, *shapes[kind]))
            for rows in batches:
                seen = self.teacher.forward(self.recorder, batch := self.batch(rows))
                for name, arrays in outputs.items():
                    array = seen.output[name].cpu().numpy()
                    own = (
                        [array[index, : self.lengths[row]] for index, row in enumerate(rows)]
                        if self.per_token[name]
                        else [array]
                    )
                    arrays.extend(own)
                for kind, numbers in self._large(seen, batch, rows):
                    # plain writes in order raise if the disk is full; a memory map would kill the process
                    files[kind].write(numbers.tobytes())
                    counts[kind] += len(numbers)
                yield rows
                if time.perf_counter() - begin > PART_SECONDS:
                    break
            for kind, file in files.items():
                file.seek(0)
                _header(file, (counts[kind], *shapes[kind]))  # as long as before: numpy leaves room for a larger first number
        for name, arrays in outputs.items():
            np.save(folder / f"output-{name}.npy", np.concatenate(arrays), allow_pickle=False)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The columns of rows."""
        columns = collate(self.features, rows, width=least_width(self.lengths, rows, self.teacher.precision))
        return {name: torch.from_numpy(column).to(self.teacher.subject.device) for name, column in columns.items()}

    def _large(self, seen: Captured, batch: Batch, rows: Sequence[int]) -> Iterator[tuple[Capture, np.ndarray]]:
        """What is kept in half precision, without padding."""
        real = batch["attention_mask"].bool()
        if Capture.HIDDEN in self.needs:
            yield Capture.HIDDEN, torch.stack(seen.hidden, dim=2)[real].half().cpu().numpy()  # (tokens, layers + 1, hidden)
        if Capture.RELATIONS in self.needs and seen.relations:
            yield Capture.RELATIONS, torch.stack(seen.relations, dim=2)[real].half().cpu().numpy()  # (tokens, 3, all heads)
        if Capture.SCORES in self.needs and self.heads:
            every = torch.cat([seen.scores[site] for site in self.heads], dim=1).half().cpu().numpy()
            for scores, row in zip(every, rows, strict=True):  # (heads of all layers, seq, seq)
                yield Capture.SCORES, scores[:, : self.lengths[row], : self.lengths[row]].reshape(-1)


def _per_token(teacher: Teacher, recorder: Recorder, batch: Batch) -> dict[str, bool]:
    """The outputs with one value per token: their shape changes if the batch is one token narrower."""
    width = batch["input_ids"].shape[1]
    other = slice(0, width - 1) if width > 1 else [0, 0]
    changed = {name: value[:, other] if value.ndim > 1 else value for name, value in batch.items()}
    shapes = {name: value.shape for name, value in teacher.forward(recorder, batch).output.items()}
    return {name: value.shape != shapes[name] for name, value in teacher.forward(recorder, changed).output.items()}


def _header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    """The head of a file of half-precision numbers."""
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False, "shape": shape}
    )
