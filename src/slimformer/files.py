"""Writing to disk: files and folders appear whole or not at all, and one run owns its folder.

Everything is written beside its place under a temporary name and renamed when complete. A full or read-only disk becomes an
OutputError; a killed run leaves at most a hidden temporary that the next run removes.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from slimformer.errors import OutputError, output_errors

if TYPE_CHECKING:
    from filelock import BaseFileLock

T = TypeVar("T")

_log = logging.getLogger(__name__)
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_OWNED = ".slimformer"  # every folder that slimformer makes has this file, which names the purpose


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write; it becomes `path` when the block ends well, and is removed when it does not."""
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".part-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        part = Path(name)
        try:
            yield part
            part.chmod(0o644)
            _sync(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def whole_group(path: Path, beside: Collection[str]) -> Iterator[Path]:
    """Yields a path of the same name in a temporary folder; it becomes `path` when the block ends well.

    `beside`: names of files that belong to it. Those that the block writes there move too, and older ones that it does not write are
    removed. A kill while the files move leaves no `path`, rather than one beside files of another.
    """
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".part-", dir=path.parent))
        part = folder / path.name
        try:
            yield part
            written = [folder / name for name in beside if (folder / name).is_file()]
            for file in (*written, part):
                file.chmod(0o644)
                _sync(file)
            if any(path.with_name(name).exists() for name in beside):
                path.unlink(missing_ok=True)
            for name in beside:
                path.with_name(name).unlink(missing_ok=True)
            for file in (*written, part):
                file.replace(path.with_name(file.name))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill; it becomes `path` when the block ends well. A folder that was there is replaced."""
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=path.parent))
        try:
            yield part
            part.chmod(0o755)
            for file in part.rglob("*"):
                if file.is_file():
                    _sync(file)
            old = path.with_name(f".part-old-{path.name}")
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                path.replace(old)
            part.replace(path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def read_small(path: Path, most: int = 1 << 30) -> bytes:
    """What an ordinary file holds; OSError if it is not there, ValueError if it is a device or pipe, or has more than `most` bytes."""
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError("it is no ordinary file")
    if facts.st_size > most:
        raise ValueError(f"it has {facts.st_size:,} bytes")
    return path.read_bytes()


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def remembered(file: Path, make: Callable[[], T], kind: Any) -> T:
    """The result of `make`, which runs once: the result is kept in `file` as JSON and read from there the next time.

    `kind`: its type as pydantic understands it (a dataclass, `list[Trial]`, `float`). If the file does not hold one, it is made anew.
    """
    from pydantic import TypeAdapter, ValidationError

    adapter = TypeAdapter(kind)
    if file.is_file():
        try:
            value: T = adapter.validate_json(file.read_bytes())
        except ValidationError:
            pass  # another version wrote it
        else:
            return value
    value = make()
    write_text(file, json.dumps(adapter.dump_python(value, mode="json"), indent=1))  # dump_json would write NaN as null
    return value


def remove_parts(folder: Path) -> None:
    """Removes the parts that killed writes left in a folder; the caller owns the folder."""
    for part in folder.glob(".part-*"):
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder that must not be met half removed: a kill leaves at most a part, for `remove_parts` or another call."""
    gone = folder.with_name(f".part-{folder.name}")
    if gone.exists():
        shutil.rmtree(gone, ignore_errors=True)
    if folder.is_dir():
        folder.replace(gone)
        shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def claim(folder: Path, purpose: str) -> Iterator[None]:
    """Owns `folder` for one run: OutputError if it holds something we did not make, or another run is in it.

    `purpose` names what the run does ("compress ./my-bert"); the same purpose may come back and resume, another one may not.
    """
    refuse_foreign(folder)
    with in_turn(folder, lambda: _refuse(folder)):
        refuse_other_purpose(folder, purpose)
        if owned_purpose(folder) is None:
            write_text(folder / _OWNED, json.dumps({"purpose": purpose}))
        remove_parts(folder)
        yield


def refuse_foreign(folder: Path) -> None:
    """OutputError if `folder` is a file, or holds something that no run of ours made."""
    with output_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file.", help="choose another --out.")
        if folder.is_dir() and owned_purpose(folder) is None and not all(map(_is_ours, folder.iterdir())):
            raise OutputError(f"{folder} holds something else already.", help="choose another --out, or empty the folder.")


def _is_ours(item: Path) -> bool:
    """Whether a run that was killed before it left its mark could have made this."""
    return item.name in {".lock", ".lock.soft"} or item.name.startswith(".part-") or (item / _OWNED).is_file()


def owned_purpose(folder: Path) -> str | None:
    """The purpose that the mark of a folder names; None if it has no mark."""
    with output_errors(folder):
        if not (folder / _OWNED).exists():
            return None
    return str(_mark_of(folder).get("purpose", "something unreadable"))


def _mark_of(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads(read_small(folder / _OWNED, 1 << 20))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def refuse_other_purpose(folder: Path, purpose: str) -> None:
    """OutputError that says what differs if `folder` was claimed for another purpose."""
    there = owned_purpose(folder)
    if there not in (None, purpose):
        raise OutputError(
            f"{folder} belongs to another run.",
            facts=_differences(str(there), purpose),
            help="choose another --out, or delete the folder to start over.",
        )


def _differences(there: str, now: str) -> list[str]:
    """What two purposes do not share: options, if both are one word and options in JSON; otherwise both whole."""
    (first, _, before), (second, _, after) = there.partition(" "), now.partition(" ")
    try:
        if first != second:
            return [f"there: {first if '{' in before else there}", f"now: {second if '{' in after else now}"]
        old, new = json.loads(before), json.loads(after)
        changed = [name for name in {**new, **old} if old.get(name) != new.get(name)]
        return [f"{name}: {' there, '.join(_apart(old.get(name), new.get(name)))} now" for name in changed]
    except (ValueError, AttributeError, TypeError, RecursionError):
        return [f"there: {there}", f"now: {now}"]


def _apart(*values: Any) -> list[str]:
    """Two values as text; of two objects of one class, "Task(data='a', ...)", only the fields that differ."""
    texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
    fields = [re.split(r", (?=\w+=)", text.partition("(")[2].removesuffix(")")) for text in texts]
    alike = len({text.partition("(")[0] for text in texts}) == 1 and len(fields[0]) == len(fields[1]) > 1
    if not alike or fields[0] == fields[1]:
        return texts
    pairs = [pair for pair in zip(*fields, strict=True) if pair[0] != pair[1]]
    return [", ".join(parts) for parts in zip(*pairs, strict=True)]


def mark_finished(folder: Path, wish: Mapping[str, Any]) -> None:
    """Notes that the run in a claimed folder is finished, and what was wished for beside its purpose."""
    write_text(folder / _OWNED, json.dumps(_mark_of(folder) | {"wish": dict(wish)}))


def finished_wish(folder: Path) -> Mapping[str, Any] | None:
    """What the finished run in `folder` was asked for; None if it is not finished, or was killed just before its last note."""
    wish = _mark_of(folder).get("wish")
    return wish if isinstance(wish, dict) else None


@contextmanager
def own_folder(folder: Path, purpose: str) -> Iterator[Path]:
    """A new folder with our mark, to be filled: whole or not there."""
    with whole_folder(folder) as part:
        (part / _OWNED).write_text(json.dumps({"purpose": purpose}), encoding="utf-8")
        yield part


@contextmanager
def in_turn(folder: Path, taken: Callable[[], None]) -> Iterator[None]:
    """Owns a folder while the block lasts. If another process owns it, calls `taken`, which may raise, and waits for it.

    The operating system drops the lock with the process, `kill -9` included. Some network file systems have no locks; there a
    file that names host and process stands in, and a process of this host that is gone no longer counts.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquired(folder / ".lock", taken)
        try:
            yield
        finally:
            lock.release()


def _acquired(file: Path, taken: Callable[[], None]) -> BaseFileLock:
    from filelock import FileLock, SoftFileLock, Timeout  # its import takes as long as everything else that --help needs

    def acquire(lock: BaseFileLock) -> BaseFileLock:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            taken()
            lock.acquire()
        return lock

    try:
        return acquire(FileLock(file, fallback_to_soft=False))
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
    _log.info("the file system of %s has no locks: %s.soft names who is at work there.", file.parent, file.name)
    return acquire(SoftFileLock(f"{file}.soft"))


def _refuse(folder: Path) -> None:
    raise OutputError(
        f"another run is at work in {folder}.", help="wait for it, or choose another --out for this one."
    ) from None


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
