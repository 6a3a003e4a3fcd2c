"""Short names for contents: equal digests mean equal contents, so files and rows can say what they were made from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

Content = str | bytes | memoryview


def digest(*parts: Content) -> str:
    """Twelve hexadecimal digits that name these texts or bytes, in this order.

    >>> digest("recipe"), digest("rec", "ipe")
    ('e1d8e5523309', 'e1d8e5523309')
    """
    return digest_all(parts)


def digest_files(places: Iterable[Path]) -> str:
    """Names what files hold, and what the files at the top of folders do; each is read piece by piece, and a path counts for nothing."""
    files = [file for place in places for file in (sorted(place.iterdir()) if place.is_dir() else [place]) if file.is_file()]
    sums = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            sums.update(hashlib.file_digest(stream, "sha256").digest())
    return sums.hexdigest()[:12]


def digest_all(parts: Iterable[Content]) -> str:
    """The same for parts that come one by one, and need not be in memory together."""
    sums = hashlib.sha256()
    for part in parts:
        sums.update(part.encode() if isinstance(part, str) else part)
    return sums.hexdigest()[:12]
