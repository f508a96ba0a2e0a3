"""Where a shared result goes to and comes from: a folder of this machine or a repository of the Hub."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dymoe.errors import DymoeError
from dymoe.files import expand, read_bytes
from dymoe.share.manifest import MANIFEST, MANIFEST_BYTES, tree

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def location_of(text: str) -> Path | str:
    """The folder (a Path) or the repository (``owner/name``, a str) that a word of the command line means.

    ``file:PATH`` is a folder and ``hub:owner/name`` a repository. Of the rest ``owner/name`` is a repository, unless
    there is a folder of that path or one to put it in: where both are possible nothing is published.

    Raises:
        DymoeError: an empty name, or no repository behind ``hub:``.
    """
    kind, colon, rest = text.partition(":")
    if colon and kind == "hub":
        if not REPOSITORY.fullmatch(rest):
            raise DymoeError(f"{text}: expected hub:owner/name")
        return rest
    if colon and kind == "file":
        text = rest[2:] if rest.startswith("//") else rest
    if not text:
        raise DymoeError("expected a folder or a Hub repository owner/name, got an empty name")
    path = expand(text)
    if colon and kind == "file":
        return path
    if REPOSITORY.fullmatch(text) and not path.exists() and not path.parent.is_dir():
        return text
    return path


class FolderSource:
    """A folder that `dymoe push` or `dymoe pull` wrote, or a clone of such a repository.

    Raises:
        DymoeError: there is no such folder or it has no manifest.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.where = root, str(root)
        if not root.is_dir():
            raise DymoeError(f"{root}: no such folder; give a folder that dymoe push wrote, or hub:owner/name")
        if not (root / MANIFEST).is_file():
            raise DymoeError(f"{root}: no {MANIFEST} here; give a folder that dymoe push wrote")

    def names(self) -> dict[str, int]:
        """Every file below the folder; links are refused."""
        return tree(self.root, self.where)

    def fetch(self, name: str, folder: Path | None = None) -> Path:
        """The file, itself or copied; refused where a link leads to it.

        Raises:
            DymoeError: it is missing or reached through a link.
        """
        path = self.root
        for part in name.split("/"):
            path = path / part
            if path.is_symlink():
                raise DymoeError(f"{self.where}: {name}: is reached through a link; plain files alone are read")
        if not path.is_file():
            raise DymoeError(f"{self.where}: {name}: is missing")
        if folder is None:
            return path
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        return target


@dataclass
class HubSource:
    """A model repository of the Hub, as it is at one commit.

    Raises:
        DymoeError: it is not there, not to be seen, or the Hub cannot be reached.
    """

    repository: str

    def __post_init__(self) -> None:
        from huggingface_hub import HfApi

        self.where = self.repository
        with hub_errors(self.repository):
            info = HfApi().model_info(self.repository, files_metadata=True)
        self.commit = info.sha
        self.sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        if MANIFEST not in self.sizes:
            raise DymoeError(f"{self.where}: no {MANIFEST} there; give a repository that dymoe push wrote")
        if self.sizes[MANIFEST] > MANIFEST_BYTES:
            raise DymoeError(f"{self.where}: {MANIFEST}: larger than {MANIFEST_BYTES} bytes")

    def names(self) -> dict[str, int]:
        """Every file of the repository with its size as the Hub states it."""
        return dict(self.sizes)

    def fetch(self, name: str, folder: Path | None = None) -> Path:
        """Download the file, into the Hub client's cache or below `folder`.

        Raises:
            DymoeError: the download failed.
        """
        from huggingface_hub import hf_hub_download

        if name not in self.sizes:
            raise DymoeError(f"{self.where}: {name}: is missing")
        with hub_errors(self.repository):
            return Path(hf_hub_download(self.repository, name, revision=self.commit, local_dir=folder))


Source = FolderSource | HubSource


def open_source(source: str | Path) -> tuple[Source, bytes]:
    """The place that `source` names (see `location_of`; a Path is a folder), and its manifest's bytes, not checked yet.

    Raises:
        DymoeError: the folder or repository is not there or cannot be read.
    """
    named = source if isinstance(source, Path) else location_of(source)
    origin = FolderSource(named) if isinstance(named, Path) else HubSource(named)
    return origin, read_bytes(origin.fetch(MANIFEST), MANIFEST_BYTES)


def upload(folder: Path, repository: str, private: bool, message: str) -> str:
    """Make the repository unless it is there, and put the folder into it in one commit. Returns the commit's address.

    Raises:
        DymoeError: the repository holds something else, is public though `private` is asked, or the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with hub_errors(repository):
        api.create_repo(repository, private=private or None, exist_ok=True)
        info: Any = api.model_info(repository)
    there = {file.rfilename for file in info.siblings or ()}
    if private and info.private is False:
        raise DymoeError(f"{repository}: --private: the repository is there already and public; nothing was sent")
    if there - {".gitattributes", "README.md", "LICENSE"} and MANIFEST not in there:
        raise DymoeError(f"{repository}: holds something that dymoe push did not write; give another repository")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    added = {path.relative_to(folder).as_posix(): path for path in files}
    old = sorted(name for name in there - set(added) if name.startswith("groups/"))
    operations: list[Any] = [CommitOperationAdd(name, path) for name, path in added.items()]
    operations += [CommitOperationDelete(name) for name in old]
    with hub_errors(repository):
        # Not upload_folder, which may make several commits; and none on top of what another push sent meanwhile.
        commit = api.create_commit(repository, operations, commit_message=message, parent_commit=info.sha)
    return str(commit.commit_url)


@contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """Turn whatever the Hub's client raises into one line; its errors have no base in common.

    Raises:
        DymoeError: the block failed.
    """
    try:
        yield
    except DymoeError:
        raise
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise DymoeError(f"{repository}: the Hub: {' '.join(lines[:3])}") from error
