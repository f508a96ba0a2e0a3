"""Checkpoints inside a stage: a folder counts when its marker is there and every file is as the marker says."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dymoe.errors import DymoeError
from dymoe.files import atomic_json, read_json, sha256_of

MARKER = "complete.json"


def mark_complete(checkpoint: Path) -> None:
    """Write the marker of a checkpoint that is written: the SHA-256 of each of its files."""
    files = sorted(file for file in checkpoint.iterdir() if file.is_file() and file.name != MARKER)
    atomic_json(checkpoint / MARKER, {file.name: sha256_of(file) for file in files})


def last_checkpoint(folder: Path, tell: Callable[[str], None] = lambda message: None) -> Path | None:
    """The newest checkpoint below `folder` that is whole, None if there is none.

    One that a kill or a full disk cut short has no marker and is passed over without a word; of one that was damaged
    afterwards `tell` is given a line.
    """
    paths = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(paths, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        if not (path / MARKER).is_file():
            continue
        file = _damaged(path)
        if file is None:
            return path
        tell(f"{file}: was damaged since it was written; this checkpoint is passed over")
    return None


def _damaged(checkpoint: Path) -> Path | None:
    """The first file of a checkpoint that is not as the marker says, or the marker; None if all are."""
    marker = checkpoint / MARKER
    try:
        for name, digest in read_json(marker, dict[str, str]).items():
            if sha256_of(checkpoint / name) != digest:
                return checkpoint / name
    except DymoeError:
        return marker
    except OSError:
        return checkpoint / name
    return None


def remove_checkpoints(parent: Path, keep: Path | None = None) -> None:
    """Remove the checkpoints below `parent`, but `keep`, and `parent` itself if nothing else is in it."""
    for folder in parent.glob("checkpoint-*"):
        if folder != keep and folder.name.removeprefix("checkpoint-").isdigit():
            shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # not there, or somebody else's files are in it
        parent.rmdir()
