"""A cache of the hub with models in it, as a download leaves it: what tests read in place of the network."""

from __future__ import annotations

from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, model: str, folder: Path) -> Path:
    """The files of `folder` in a hub cache, as huggingface_hub lays them out after a download of branch main."""
    home = cache / f"models--{model.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    (home / "blobs").mkdir()
    for number, file in enumerate(sorted(item for item in folder.rglob("*") if item.is_file())):
        blob, link = home / "blobs" / f"{number:040}", snapshot / file.relative_to(folder)
        blob.write_bytes(file.read_bytes())
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot
