"""Reads files as text: unpacked, decoded, with one kind of line end, and never more than the memory holds.

UTF-8 is what a file must hold; UTF-16 is told by its byte order mark or by its zeros. Anything else is refused with the place and
its cause: a Git LFS pointer, a web page, a spreadsheet or a Parquet file under the name of a table.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from slimformer.errors import DataError, nearest
from slimformer.log import remark

_PACKERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
PACKED = (*_PACKERS, ".zip")
_MOST = 8 << 30  # bytes of one file, unpacked; more than any data set that a classifier is tuned on
_MEMORY_SHARE = 0.3  # of the free memory: text takes about twice its bytes as Python strings
_CHUNK = 1 << 24
_HEAD = 4096  # bytes that tell what a file is
_TORN = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, OSError)
_STRANGERS = (
    (b"PAR1", "is a Parquet file", "call it .parquet."),
    (b"\x89HDF", "is an HDF5 file", "save it as .csv or .jsonl."),
    (b"\xd0\xcf\x11\xe0", "is a spreadsheet of Excel", "save it as 'CSV UTF-8'."),
    (b"ARROW1", "is an Arrow file", "call it .arrow."),
    (b"\x28\xb5\x2f\xfd", "is packed by zstd", "unpack it."),
    (b"7z\xbc\xaf\x27\x1c", "is an archive", "unpack it, and name the folder or one of its files."),
    (b"SQLite format 3", "is a database of SQLite", "export its table as .csv."),
    (b"\x80\x04", "is a pickle, and pickles are never read", "save it as .csv, .jsonl or .parquet."),
    (b"\x80\x05", "is a pickle, and pickles are never read", "save it as .csv, .jsonl or .parquet."),
    (b"%PDF", "is a PDF", "save its table as .csv."),
)


def suffix_of(path: Path) -> str:
    """The suffix that tells how a file is read, in lower case and without that of a packer: ".jsonl" for train.jsonl.gz."""
    return _unpacked_name(path).suffix.lower()


def stem_of(path: Path) -> str:
    """The name of a file without the suffixes of its kind and of a packer: "train" for train.jsonl.gz."""
    return _unpacked_name(path).stem


def _unpacked_name(path: Path) -> Path:
    if path.suffix.lower() not in PACKED:
        return path
    inner = Path(path.stem)
    if inner.suffix or path.suffix.lower() != ".zip" or not path.is_file():
        return inner
    try:  # reviews.zip: the file inside tells
        return inner.with_suffix(Path(_member(path)[0]).suffix)
    except DataError:
        return inner


def read_text(path: Path, shape: str = "a table needs a line of column names and at least one row.") -> str:
    """The text of a file; DataError if it is empty (`shape` says what it should hold), too large, or not UTF-8, with the place.

    Lines end in \\n or \\r\\n; those of old Mac files are made to.
    """
    content = read_bytes(path)
    text = _decoded(path, content)
    if "\r" in text and "\n" not in text:
        text = text.replace("\r", "\n")
        remark(f"{path}: its lines end as on old Macs (\\r).")
    if not text.strip("\0 \t\r\n\v\f\x1c\x1d\x1e\x1f\x85\xa0"):
        raise DataError(f"{path} is empty.", help=shape)
    refuse_page(path, text)
    return text


def stream_lines(path: Path) -> Iterator[str]:
    """The lines of a text file one by one, however large it is; DataError as for `read_text`, with the line.

    A file in UTF-16, an archive and a file of old Mac lines are read whole.
    """
    try:
        with _opened(path) as file:
            head = file.read(_HEAD)
    except _TORN as error:
        raise _torn(path, error) from None
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff", b"PK\x03\x04")) or (b"\r" in head and b"\n" not in head):
        yield from read_text(path).split("\n")
        return
    for magic, what, help in _STRANGERS:
        if head.startswith(magic):
            raise DataError(f"{path} {what}.", help=help)
    if b"\0" in head:
        if head[1::2].count(0) > 0.6 * len(head[1::2]) or head[::2].count(0) > 0.6 * len(head[::2]):
            yield from read_text(path).split("\n")
            return
        raise DataError(f"{path} is a binary file: it holds NUL bytes.", help="give text in UTF-8, a text on each line.")
    refuse_page(path, head.decode("utf-8", "ignore").removeprefix("\ufeff"))
    with _opened(path) as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                yield (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} in line {number} is no character.",
                help="save it as UTF-8, for instance: iconv -f latin1 -t utf-8 old > new (cp1252 for files of Windows).",
            ) from None
        except _TORN as error:
            raise _torn(path, error) from None


def _torn(path: Path, error: BaseException) -> DataError:
    return DataError(f"{path} cannot be read: {error}.", help="fetch it again, or unpack it yourself.")


def _opened(path: Path) -> Any:
    """A file for reading bytes, unpacked if it is packed; DataError if it is not there."""
    try:
        start = _start_of(path)
        if start.startswith(b"\x1f\x8b"):
            return gzip.open(path)
        return _PACKERS.get(path.suffix.lower(), open)(path, "rb")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.", help=_beside(path)) from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}.", help="check the path and its permissions."
        ) from None


def _start_of(path: Path) -> bytes:
    """The first eight bytes of a file; DataError if it is none."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is no ordinary file.", help="write the data to a file and name that.")
    with open(path, "rb") as file:
        return file.read(8)


def refuse_page(path: Path, text: str) -> None:
    """DataError for a pointer of Git LFS and for a web page in the place of a file, by how it begins."""
    head = text[:200].lstrip().lower()
    if head.startswith("version https://git-lfs"):
        raise DataError(
            f"{path} is a pointer of Git LFS, and the data itself was not fetched.", help="run `git lfs pull` in its folder."
        )
    if head.startswith(("<!doctype html", "<html", "<?xml")):
        raise DataError(
            f"{path} is a web page or XML, no table.",
            help="a download that was refused looks like this; fetch the file itself again.",
        )


def read_bytes(path: Path) -> bytes:
    """What a file holds, unpacked if it is packed; DataError if it cannot be read or is larger than the memory allows."""
    try:
        start = _start_of(path)
        suffix = path.suffix.lower()
        if start.startswith(b"PK\x03\x04"):
            content = _unzipped(path)
        elif start.startswith(b"\x1f\x8b"):
            content = _bounded(path, gzip.GzipFile(path))
        elif suffix in _PACKERS:
            content = _bounded(path, _PACKERS[suffix](path))
        else:
            content = _bounded(path, path.open("rb"), path.stat().st_size)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.", help=_beside(path)) from None
    except (
        EOFError,
        zlib.error,
        lzma.LZMAError,
        zipfile.BadZipFile,
        gzip.BadGzipFile,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise DataError(f"{path} cannot be unpacked: {error}.", help="fetch it again, or unpack it yourself.") from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}.", help="check the path and its permissions."
        ) from None
    if content[257:262] == b"ustar":
        raise DataError(f"{path} is an archive (tar).", help="unpack it, and name the folder or one of its files.")
    for magic, what, help in _STRANGERS:
        if content.startswith(magic) and suffix_of(path) != ".parquet":
            raise DataError(f"{path} {what}.", help=help)
    return content


def most_bytes() -> int:
    """The most that the unpacked contents of one file may have, in bytes: less than the free memory."""
    import psutil

    return min(_MOST, int(_MEMORY_SHARE * psutil.virtual_memory().available))


def too_large(path: Path | str, size: int) -> DataError:
    """The error for a file whose contents are larger than `most_bytes`."""
    return DataError(
        f"{path} holds more than the memory does: {size / 1e9:,.1f} GB of unpacked data, or more; {most_bytes() / 1e9:,.1f} GB fit.",
        help="give fewer rows, or leave out columns that are not needed.",
    )


def repair_text(text: str) -> str:
    """The text without halves of surrogate pairs, as cut-off JSON escapes leave them; tokenizers refuse those."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _bounded(path: Path, file: Any, size: int = 0) -> bytes:
    most = most_bytes()
    with file:
        if size > most:
            raise too_large(path, size)
        parts, total = [], 0
        while part := file.read(_CHUNK):
            parts.append(part)
            total += len(part)
            if total > most:
                raise too_large(path, total)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _member(path: Path) -> tuple[str, int]:
    """The name and the size of the one file of an archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [item for item in archive.infolist() if not item.is_dir() and not item.filename.startswith("__MACOSX/")]
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise DataError(f"{path} cannot be unpacked: {error}.", help="fetch it again, or unpack it yourself.") from None
    names = [item.filename for item in infos]
    if "xl/workbook.xml" in names:
        raise DataError(f"{path} is a spreadsheet of Excel.", help="save it as 'CSV UTF-8'.")
    if len(infos) != 1:
        raise DataError(
            f"{path} holds {len(infos)} files, not one.",
            facts=[f"inside: {', '.join(names[:8])}"[:200]],
            help="unpack it, and name the folder or one of its files.",
        )
    return names[0], infos[0].file_size


def _unzipped(path: Path) -> bytes:
    name, size = _member(path)
    with zipfile.ZipFile(path) as archive:
        return _bounded(path, archive.open(name), size)


def _decoded(path: Path, content: bytes) -> str:
    """The text; UTF-16 is known by its mark, or by a zero in every other byte."""
    if content.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        kind = "utf-32"
    elif content.startswith((b"\xff\xfe", b"\xfe\xff")):
        kind = "utf-16"
    else:
        head = content[:2000]
        odd, even = head[1::2], head[::2]
        little, big = odd.count(0), even.count(0)
        kind = "utf-8-sig"
        if len(head) >= 20 and max(little, big) > 0.6 * len(odd) and min(little, big) < 0.1 * len(odd):
            kind = "utf-16-le" if little > big else "utf-16-be"
    try:
        text = content.decode(kind)
    except UnicodeDecodeError as error:
        if kind != "utf-8-sig":
            raise DataError(
                f"{path} looks like {kind.upper()[:6]}, and byte {error.start} is no character of it.", help="save it as UTF-8."
            ) from None
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} is not UTF-8: byte {error.start} (0x{content[error.start]:02x}), in line {line}, is no character.",
            help="save it as UTF-8, for instance: iconv -f latin1 -t utf-8 old > new (cp1252 for files of Windows).",
        ) from None
    if kind != "utf-8-sig":
        remark(f"{path} is read as {kind.upper()[:6]}.")
    return text


def _beside(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else None
    if folder is None:
        return "check the path."
    return f"in {folder}: {nearest(path.name, (item.name for item in folder.iterdir()))}."
