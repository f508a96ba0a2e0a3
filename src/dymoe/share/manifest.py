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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from dymoe.errors import DymoeError
from dymoe.files import parse_json, sha256_of
from dymoe.messages import brief, printable
from dymoe.names import safe_names
from dymoe.schema import Count

FORMAT = "dymoe-results/1"
MANIFEST = "manifest.json"
TEXTS = ("README.md", "recipe.yaml", "results.json", "run.yaml")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

MANIFEST_BYTES = 4 * 2**20  # no manifest of a real run comes near
CONFIG_BYTES = 2**20
STAGES = 256
TEXT_BYTES = 64 * 2**20
WEIGHTS_BYTES = 2**40
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


class _GroupRow(TypedDict):
    name: str
    folder: str
    hash: str


class _StageRow(TypedDict):
    name: str
    groups: list[_GroupRow]


class _FileRow(TypedDict):
    bytes: Count
    sha256: str


class _Values(TypedDict):
    format: Literal["dymoe-results/1"]
    base: str
    stages: list[_StageRow]
    files: dict[str, _FileRow]


def parse(text: bytes, where: str) -> Manifest:
    """Read a manifest and check all it says: no file has another path than the layout gives it.

    Raises:
        DymoeError: it is no manifest of a shared result, lacks something, or names a file outside the layout.
    """
    source = f"{where}: {MANIFEST}"
    if len(text) > MANIFEST_BYTES:
        raise DymoeError(f"{source}: larger than {MANIFEST_BYTES} bytes; this is no manifest of dymoe push")
    values = parse_json(text, source, _Values)
    if not 0 < len(values["stages"]) <= STAGES:
        raise DymoeError(f"{source}: stages: expected 1 to {STAGES}, got {len(values['stages'])}")
    names = safe_names((stage["name"] for stage in values["stages"]), f"{source}: stages")
    folders = [f"groups/{number:02d}-{name}" for number, name in enumerate(names, start=1)]
    rows = (stage["groups"] for stage in values["stages"])
    stages = [
        (name, tuple(Group(group["name"], group["folder"], group["hash"]) for group in groups))
        for name, groups in zip(names, rows, strict=True)
    ]
    known: dict[str, Group] = {}
    for number, (_, groups) in enumerate(stages, start=1):
        if not groups or len({group.name for group in groups}) < len(groups):
            raise DymoeError(f"{source}: stage {number}: expected groups of different names")
        for group in groups:
            if group.folder not in folders[:number]:
                raise DymoeError(f"{source}: stage {number}: folder {brief(group.folder)}: expected groups/NN-STAGE")
            if known.setdefault(group.folder, group) != group:
                raise DymoeError(f"{source}: {group.folder!r} is two different groups")
    safe_names(dict.fromkeys(group.name for group in known.values()), f"{source}: groups")
    files = {name: File(row["bytes"], row["sha256"]) for name, row in values["files"].items()}
    _check_files(files, known, source)
    return Manifest(values["base"], tuple(stages), files)


def _check_files(files: Mapping[str, File], groups: Mapping[str, Group], source: str) -> None:
    """Refuse other files than those of the groups and the texts, sizes out of bounds and what is no digest."""
    expected = {*TEXTS, *(f"{folder}/{name}" for folder in groups for name in (CONFIG, WEIGHTS))}
    if missing := sorted(expected - set(files)):
        raise DymoeError(f"{source}: files: {brief(missing[0])} is not listed")
    if strange := sorted(set(files) - expected):
        raise DymoeError(f"{source}: files: {brief(strange[0])} does not belong to a shared result")
    for name, file in files.items():
        if file.size > (WEIGHTS_BYTES if name.endswith(WEIGHTS) else TEXT_BYTES):
            raise DymoeError(f"{source}: files: {brief(name)}: {brief(file.size)} bytes are too many for this file")
    for digest in (*(file.sha256 for file in files.values()), *(group.hash for group in groups.values())):
        if not SHA.fullmatch(digest):
            raise DymoeError(f"{source}: expected the 64 digits of a SHA-256, got {brief(digest)}")


def tree(root: Path, where: str) -> dict[str, int]:
    """Size of every file below `root` by its path; git's and the Hub client's own folders are passed over.

    Raises:
        DymoeError: a link, or something that is neither file nor folder.
    """
    sizes: dict[str, int] = {}
    try:
        for parent, folders, files in os.walk(root, followlinks=False, onerror=_raise):
            if Path(parent) == root:
                folders[:] = [name for name in folders if name not in (".git", ".cache")]
            for name in (*folders, *files):
                path = Path(parent) / name
                inside, mode = path.relative_to(root).as_posix(), path.lstat().st_mode
                label = printable(inside)
                if stat.S_ISLNK(mode):
                    raise DymoeError(f"{where}: {label}: is a link; a shared result has plain files alone")
                if stat.S_ISREG(mode):
                    sizes[inside] = path.stat().st_size
                elif not stat.S_ISDIR(mode):
                    raise DymoeError(f"{where}: {label}: is no plain file")
    except OSError as error:
        raise DymoeError(f"{where}: cannot be read ({error.strerror or error})") from error
    return sizes


def _raise(error: OSError) -> None:
    raise error


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
    sizes = tree(root, where)
    if strange := sorted(set(sizes) - set(manifest.files) - {MANIFEST}):
        raise DymoeError(f"{where}: {strange[0]}: {MANIFEST} does not list it")
    for name, expected in manifest.files.items():
        check_file(root / name, name, expected, where)
    from dymoe.share.group import read_group

    for group in {group.folder: group for _, groups in manifest.stages for group in groups}.values():
        read_group(root / group.folder, group, where)
    return manifest
