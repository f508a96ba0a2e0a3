"""`pull`: a shared result from a folder or a Hub repository, checked in full before it is there."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from dymoe.errors import DymoeError
from dymoe.files import atomic_dir, expand
from dymoe.share.locations import open_source
from dymoe.share.manifest import MANIFEST, check_tree, file_of, parse


@dataclass(frozen=True)
class Pulled:
    """What a pull did: the folder, its stages' names, files that were left behind, SHA-256 of the manifest."""

    folder: Path
    stages: tuple[str, ...]
    left: tuple[str, ...]
    manifest: str


def pull(source: str | Path, folder: str | Path) -> Pulled:
    """Fetch a shared result; `folder` appears when every file's SHA-256 and every group's hash were found right.

    Args:
        source: a folder (a Path, ``file:PATH`` or a path) or a Hub repository ``owner/name``.
        folder: where to; it must not exist or be empty.

    Raises:
        DymoeError: the source is not there or is no shared result; a file is missing, changed or a link; a path leads
            out of the folder; `folder` holds something or cannot be written.
    """
    target = expand(folder)
    if target.is_symlink() or (target.exists() and not target.is_dir()) or (target.is_dir() and any(target.iterdir())):
        raise DymoeError(f"{target}: is there already; give a folder that does not exist or is empty")
    origin, text = open_source(source)
    manifest = parse(text, origin.where)
    names = origin.names()
    left = sorted(set(names) - set(manifest.files) - {MANIFEST, ".gitattributes"})  # whatever it is, it stays there
    for name, expected in manifest.files.items():
        # Before anything is fetched: what is too long to be right is not worth a download.
        if name not in names:
            raise DymoeError(f"{origin.where}: {name}: is missing")
        if names[name] != expected.size:
            raise DymoeError(f"{origin.where}: {name}: has {names[name]} bytes, {MANIFEST} says {expected.size}")
    with atomic_dir(target) as new:
        (new / MANIFEST).write_bytes(text)
        for name in manifest.files:
            origin.fetch(name, new)
        shutil.rmtree(new / ".cache", ignore_errors=True)  # the Hub client's notes on its downloads
        check_tree(new, origin.where)
        digest = file_of(new / MANIFEST).sha256
    return Pulled(target, tuple(name for name, _ in manifest.stages), tuple(left), digest)
