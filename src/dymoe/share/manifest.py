"""The manifest of a shared result: every file with its SHA-256, every stage with its groups; and all the checks.

A shared result is a folder::

    README.md  manifest.json  recipe.yaml  results.json  run.yaml
    groups/NN-NAME/adapter_config.json
    groups/NN-NAME/adapter_model.safetensors

one folder per stage, as PEFT saves an adapter. Nothing else belongs to it.
"""

import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dymoe.errors import DymoeError
from dymoe.files import parse_json, sha256_of
from dymoe.messages import brief, printable
from dymoe.names import safe_names

FORMAT = "dymoe-results/1"
MANIFEST = "manifest.json"
TEXTS = ("README.md", "recipe.yaml", "results.json", "run.yaml")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

MANIFEST_BYTES = 4 * 2**20  # no manifest of a real run comes near
CONFIG_BYTES = 2**20
STAGES = 256
TEXT_BYTES = 64 * 2**20
WEIGHTS_BYTES = 2**40
STRAY_BYTES = 2**20  # a file that the manifest does not list may have this size, and is left behind
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz", ".th", ".t7")
PART = r"[^/\\:*?\"<>|\x00-\x1f\x7f]+"
SHA = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Group:
    """One expert group as a stage has it: its name in the model, its folder, its `dymoe.group_hash`."""

    name: str
    folder: str
    hash: str


@dataclass(frozen=True)
class File:
    """What a file must be: size in bytes and SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A checked manifest.

    Attributes:
        base: the base model's name.
        stages: name and groups, in the order they were added, of every stage.
        files: every file by its path in the folder; the manifest itself is not among them.
    """

    base: str
    stages: tuple[tuple[str, tuple[Group, ...]], ...]
    files: Mapping[str, File]

    def groups(self, stage: int | None, where: str) -> tuple[Group, ...]:
        """The groups of `stage` (counted from 1), of the last one when None.

        Raises:
            DymoeError: there is no such stage.
        """
        count = len(self.stages)
        number = count if stage is None else stage
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= count:
            raise DymoeError(f"{where}: stage {stage!r}: there are stages 1 to {count}")
        return self.stages[number - 1][1]

    def to_json(self, **facts: Any) -> dict[str, Any]:
        """The manifest as JSON values, `facts` (for readers, never read again) among them."""
        return {
            "format": FORMAT,
            "base": self.base,
            **facts,
            "stages": [
                {"stage": number, "name": name, "groups": [vars(group) for group in groups]}
                for number, (name, groups) in enumerate(self.stages, start=1)
            ],
            "files": {name: {"bytes": file.size, "sha256": file.sha256} for name, file in sorted(self.files.items())},
        }


def parse(text: bytes, where: str) -> Manifest:
    """Read a manifest and check all it says.

    Raises:
        DymoeError: it is no manifest of a shared result, lacks something, or names a file outside the layout.
    """
    told = f"{where}: {MANIFEST}"
    if len(text) > MANIFEST_BYTES:
        raise DymoeError(f"{told}: larger than {MANIFEST_BYTES} bytes; this is no manifest of dymoe push")
    values = parse_json(text, told)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise DymoeError(f"{told}: format is {brief(found)}, expected {FORMAT!r}; this is no result of dymoe push")
    files = _files(values.get("files"), told)
    entries = _list(values, "stages", told)
    if len(entries) > STAGES:
        raise DymoeError(f"{told}: 'stages': {len(entries)} stages, at most {STAGES} are read")
    rows = [_row(number, entry, told) for number, entry in enumerate(entries, start=1)]
    names = safe_names((row["name"] for row in rows), f"{told}: stages")
    folders = [f"groups/{number:02d}-{name}" for number, name in enumerate(names, start=1)]
    stages = tuple(
        (name, _groups(number, row, folders[:number], told))
        for number, (name, row) in enumerate(zip(names, rows, strict=True), start=1)
    )
    known: dict[str, Group] = {}
    for _, groups in stages:
        for group in groups:
            if known.setdefault(group.folder, group) != group:
                raise DymoeError(f"{told}: {group.folder!r} is two different groups")
    safe_names(dict.fromkeys(group.name for group in known.values()), f"{told}: groups")
    expected = {*TEXTS, *(f"{folder}/{name}" for folder in known for name in (CONFIG, WEIGHTS))}
    if missing := sorted(expected - set(files)):
        raise DymoeError(f"{told}: files: {brief(missing[0])} is not listed")
    if strange := sorted(set(files) - expected):
        raise DymoeError(f"{told}: files: {brief(strange[0])} does not belong to a shared result")
    base = values.get("base")
    return Manifest(base if isinstance(base, str) else "", stages, files)


def _list(values: Mapping[str, Any], key: str, told: str) -> list[Any]:
    found = values.get(key)
    if not isinstance(found, list) or not found:
        raise DymoeError(f"{told}: {key!r} is missing or empty; a list is needed")
    return found


def _files(values: Any, told: str) -> dict[str, File]:
    if not isinstance(values, dict):
        raise DymoeError(f"{told}: 'files' is missing; an object of paths is needed")
    files = {}
    for name, entry in values.items():
        check_name(name, told)
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if not (type(size) is int and size >= 0 and isinstance(digest, str) and SHA.fullmatch(digest)):
            raise DymoeError(f"{told}: files: {brief(name)}: bytes (a whole number) and sha256 (64 digits) are needed")
        if size > (WEIGHTS_BYTES if name.endswith(WEIGHTS) else TEXT_BYTES):
            raise DymoeError(f"{told}: files: {brief(name)}: {brief(size)} bytes are too many for this file")
        files[name] = File(size, digest)
    return files


def _row(number: int, entry: Any, told: str) -> dict[str, Any]:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise DymoeError(f"{told}: stage {number}: an object with name and groups is needed")
    return entry


def _groups(number: int, entry: dict[str, Any], folders: list[str], told: str) -> tuple[Group, ...]:
    groups = []
    for row in _list(entry, "groups", f"{told}: stage {number}"):
        parts = [row.get(key) for key in ("name", "folder", "hash")] if isinstance(row, dict) else [None]
        if not all(isinstance(part, str) and part for part in parts):
            raise DymoeError(f"{told}: stage {number}: a group needs name, folder and hash, got {brief(row)}")
        group = Group(*parts)  # type: ignore[arg-type]
        check_name(group.folder, told)
        if group.folder not in folders:
            raise DymoeError(f"{told}: stage {number}: folder {brief(group.folder)}: expected groups/NN-STAGE")
        if not SHA.fullmatch(group.hash):
            raise DymoeError(f"{told}: stage {number}: group {brief(group.name)}: hash needs 64 digits")
        groups.append(group)
    if len({group.name for group in groups}) != len(groups):
        raise DymoeError(f"{told}: stage {number}: two groups of one name")
    return tuple(groups)


def check_name(name: str, told: str) -> None:
    """Refuse the path of a file that would leave the folder, or that some machine would read otherwise.

    Raises:
        DymoeError: an absolute path, a ``..``, a backslash, a drive, an empty part or a control character.
    """
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        raise DymoeError(f"{told}: {brief(name)} is an absolute path; only paths inside the folder are taken")
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise DymoeError(f"{told}: {brief(name)} leads out of the folder; only plain paths inside it are taken")
    if not re.fullmatch(rf"{PART}(/{PART})*", name):
        raise DymoeError(f"{told}: {brief(name)} has a character that no path may have here")


def check_strays(names: Mapping[str, int], listed: Iterable[str], where: str) -> list[str]:
    """Look at the files (size in bytes by path) beside those that are listed; those that are left behind come back.

    Raises:
        DymoeError: a pickle, or a large file that nothing is known about.
    """
    known = {*listed, MANIFEST}
    strays = sorted(name for name in names if name not in known)
    for name in strays:
        told = printable(name)
        if name.lower().endswith(PICKLES):
            raise DymoeError(f"{where}: {told}: a pickle can run code when it is read; a shared result has none")
        if names[name] > STRAY_BYTES:
            raise DymoeError(f"{where}: {told}: an unknown file of {names[name]} bytes that {MANIFEST} does not list")
    return [name for name in strays if name != ".gitattributes"]


def tree(root: Path, where: str) -> dict[str, int]:
    """Size of every file below `root` by its path; git's and the Hub client's own folders are passed over.

    Raises:
        DymoeError: a link, or something that is neither file nor folder; a file that begins like a pickle though the
            manifest cannot know it.
    """
    found: dict[str, int] = {}
    try:
        for place, folders, files in os.walk(root, followlinks=False, onerror=_raise):
            if Path(place) == root:
                folders[:] = [name for name in folders if name not in (".git", ".cache")]
            for name in (*folders, *files):
                path = Path(place) / name
                inside, mode = path.relative_to(root).as_posix(), path.lstat().st_mode
                told = printable(inside)
                if stat.S_ISLNK(mode):
                    raise DymoeError(f"{where}: {told}: is a link; a shared result has plain files alone")
                if stat.S_ISREG(mode):
                    # The header's length, with which safetensors files begin, may look like a pickle's first bytes.
                    if not name.endswith(".safetensors") and pickled(path):
                        raise DymoeError(f"{where}: {told}: begins like a pickle, which can run code when it is read")
                    found[inside] = path.stat().st_size
                elif not stat.S_ISDIR(mode):
                    raise DymoeError(f"{where}: {told}: is no plain file")
    except OSError as error:
        raise DymoeError(f"{where}: cannot be read ({error.strerror or error})") from error
    return found


def _raise(error: OSError) -> None:
    raise error


def pickled(path: Path) -> bool:
    """Whether a file begins as pickles of protocol 2 to 5 do, or as the zip files that torch.save writes."""
    with path.open("rb") as file:
        head = file.read(4)
    return head[:4] == b"PK\x03\x04" or (len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5)


def file_of(path: Path) -> File:
    """Size and SHA-256 of a file."""
    return File(path.stat().st_size, sha256_of(path))


def check_file(path: Path, name: str, expected: File, where: str) -> None:
    """Compare a file with what the manifest says of it.

    Raises:
        DymoeError: it is missing, cannot be read, or differs.
    """
    if not path.is_file():
        raise DymoeError(f"{where}: {name}: is missing")
    try:
        size = path.stat().st_size
        if size != expected.size:
            raise DymoeError(f"{where}: {name}: has {size} bytes, {MANIFEST} says {expected.size}")
        if file_of(path).sha256 != expected.sha256:
            raise DymoeError(f"{where}: {name}: its SHA-256 is not the one in {MANIFEST}; the file was changed")
    except OSError as error:
        raise DymoeError(f"{where}: {name}: cannot be read ({error.strerror or error})") from error


def check_tree(root: Path, where: str) -> Manifest:
    """Check a whole shared result: exactly the files that its manifest lists, each as it says, every group's hash.

    Args:
        root: the folder.
        where: what messages call it.

    Raises:
        DymoeError: the first thing that is wrong.
    """
    manifest = parse((root / MANIFEST).read_bytes(), where)
    found = tree(root, where)
    if strange := sorted(set(found) - set(manifest.files) - {MANIFEST}):
        raise DymoeError(f"{where}: {strange[0]}: {MANIFEST} does not list it")
    for name, expected in manifest.files.items():
        check_file(root / name, name, expected, where)
    from dymoe.share.group import read_group

    for group in {group.folder: group for _, groups in manifest.stages for group in groups}.values():
        read_group(root / group.folder, group, where)
    return manifest
