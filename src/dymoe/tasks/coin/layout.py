"""Finding the parts of a CoIN tree: instruction folders, task folders, image root, annotation files.

Published layouts (`published.json`): CoIN's repository (``playground/Instructions_Original``) and data set
(``Instruction_Original``, ``Instruction_Type2``), the fork (``Instructions``, ``Instructions_Diverse``,
``Instructions_10Type``) and SEFE (``annotations`` with ``train_ori.json``, ``train_x20.json`` ..). Which instruction
type a folder holds is read off its text where that says so, else off its name.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dymoe.errors import DymoeError
from dymoe.files import expand, read_json
from dymoe.tasks import instructions
from dymoe.tasks.coin import TASKS
from dymoe.tasks.lazy import what_is_there
from dymoe.tasks.llava import parse
from dymoe.tasks.scoring.annotations import FILES
from dymoe.tasks.source import Source

PUBLISHED = Path(__file__).parent / "published.json"
BELOW = ("", "playground", "data", "datasets")  # where below the root the folders may stand
NAMED = ("Instructions_Original", "Instruction_Original", "Instructions", "annotations", "playground")
PEEK_BYTES, PEEK_RECORDS = 1 << 18, 40


@cache
def published() -> dict[str, Any]:
    """What is published about the data: sizes and folder names, with the source."""
    values: dict[str, Any] = read_json(PUBLISHED)
    return values


@dataclass(frozen=True)
class Layout:
    """Where everything is.

    Attributes:
        root: the tree.
        instructions: the folder with a folder per task.
        images: the image root.
        variant: whose tree it is, ``coin``, ``fork``, ``sefe``, or ``unknown``.
        replaced: whether the text there is of the original type while another was asked for, so that templates
            replace it.
    """

    root: Path
    instructions: Path
    images: Path
    variant: str
    replaced: bool

    def task_folder(self, task: str) -> Path:
        """The folder of a task's files.

        Raises:
            DymoeError: there is none; the message says which there are.
        """
        path = task_folders(self.instructions).get(task)
        if path is None:
            folder = self.instructions / task
            reason = "it holds no training file" if folder.is_dir() else f"no such folder{what_is_there(folder)}"
            raise DymoeError(f"{folder}: no folder for task {task!r}: {reason}")
        return path

    def train_file(self, task: str, name: str | None = None) -> Path:
        """A task's training file, `name` if it is given.

        Raises:
            DymoeError: there is none; the message says which files there are.
        """
        folder = self.task_folder(task)
        return _file(folder, "train", [json_name(name)] if name else train_names(self.variant))

    def test_file(self, task: str) -> Path:
        """A task's test file: the published name first, then the other one.

        Raises:
            DymoeError: there is none; the message says which files there are.
        """
        first: str = published()["tasks"][task]["test_file"]
        return _file(self.task_folder(task), "test", [first, "test.json" if first == "val.json" else "val.json"])

    def annotations(self, task: str) -> tuple[Path, ...]:
        """The annotation files that are joined into a task's references to score it.

        Raises:
            DymoeError: one is missing.
        """
        paths = tuple(self.images / task / name for name in FILES.get(task, ()))
        for path in paths:
            if not path.is_file():
                raise DymoeError(f"{path}: no such file; {task} cannot be scored without it (docs/coin.md)")
        return paths

    def image_name(self, name: str) -> str:
        """A record's image path relative to the image root: without ``./`` and the root's own name before it."""
        while name.startswith("./"):
            name = name[2:]
        first, slash, rest = name.partition("/")
        return rest if slash and first in ("cl_dataset", self.images.name) and not self._holds(first) else name

    def _holds(self, name: str) -> bool:
        return (self.images / name).is_dir()


def train_names(variant: str) -> list[str]:
    """Names of training files, the wanted one first; SEFE's unchanged file says so in its name."""
    return ["train_ori.json", "train.json"] if variant == "sefe" else ["train.json"]


def json_name(name: str) -> str:
    """A file name with its ending."""
    return name if name.endswith((".json", ".jsonl", ".parquet")) else f"{name}.json"


def _file(folder: Path, what: str, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    there = sorted(path.name for path in folder.iterdir() if path.is_file())
    raise DymoeError(f"{folder}: no {what} file {' or '.join(names)}; there is {', '.join(there) or 'nothing'}")


def task_folders(folder: Path) -> dict[str, Path]:
    """Task -> its folder below `folder`, whatever the case and dashes of its name (``OCR-VQA``)."""
    plain = {re.sub("[^a-z0-9]", "", task.lower()): task for task in TASKS}
    folders: dict[str, Path] = {}
    for path in _folders(folder):
        task = plain.get(re.sub("[^a-z0-9]", "", path.name.lower()))
        if task is not None and (task not in folders or path.name == task) and next(_training_files(path), None):
            folders[task] = path
    return folders


def _training_files(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.glob("train*.json") if path.is_file())


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


def find(source: Source, kind: str, tasks: Sequence[str]) -> Layout:
    """Find the parts of the tree that `source` names.

    Args:
        source: the recipe's part.
        kind: instruction type asked for.
        tasks: the tasks wanted.

    Raises:
        DymoeError: no root, nothing in it that fits, or several things that do; the message says what was found.
    """
    if source.root is None:
        raise DymoeError("data.root: stream 'coin' needs the folder that holds CoIN's files (docs/coin.md)")
    root = expand(source.root)
    if not root.is_dir():
        raise DymoeError(f"data.root: no such folder {root}")
    folder, replaced = _instructions(root, source, kind, tasks)
    known = {row["name"]: row["variant"] for row in published()["folders"]}
    return Layout(root, folder, _images(root, source), known.get(folder.name, "unknown"), replaced)


def instruction_folders(root: Path) -> list[Path]:
    """The folders in a tree that hold a folder with training files for at least one task."""
    candidates = [root] + [path for name in BELOW for path in _folders(root / name)]
    return [path for path in dict.fromkeys(candidates) if task_folders(path)]


def _candidates(root: Path, source: Source) -> list[Path]:
    """The instruction folders that `source` allows: the one that it names, or those of its variant."""
    if source.instructions_folder is None:
        known = {row["name"]: row["variant"] for row in published()["folders"]}
        folders = instruction_folders(root)
        return [path for path in folders if source.variant in ("auto", known.get(path.name))]
    name = expand(source.instructions_folder)
    paths = [name] if name.is_absolute() else [root / below / name for below in BELOW]
    folders = [path for path in paths if task_folders(path)][:1]
    if not folders:
        there = ", ".join(str(path) for path in instruction_folders(root)) or "none"
        raise DymoeError(f"data.instructions_folder: {name}: holds no task's training files; found: {there}")
    return folders


def _instructions(root: Path, source: Source, kind: str, tasks: Sequence[str]) -> tuple[Path, bool]:
    """The instruction folder, and whether its original text is to be replaced."""
    kinds = {folder: kinds_of(folder, tasks) for folder in _candidates(root, source)}
    for type_, replaced in ((kind, False), ("original", True)):
        fits = [folder for folder in kinds if type_ in kinds[folder]]
        if len(fits) > 1:
            raise DymoeError(
                f"{root}: several folders hold {type_} instructions: {', '.join(map(str, fits))}; "
                "choose one with data.instructions_folder or data.variant"
            )
        if fits and (not replaced or source.templates):
            return fits[0], replaced
    of = "" if source.variant == "auto" else f" of variant {source.variant!r}"
    if not kinds and not instruction_folders(root):
        raise DymoeError(
            f"{root}: no instruction folder{of} (for example {NAMED[0]}/GQA/train.json or "
            f"{BELOW[1]}/{NAMED[0]}/GQA/train.json below it){_unpacked(root, NAMED) or _there(root)}"
        )
    there = "; ".join(f"{folder} ({' or '.join(types)})" for folder, types in kinds.items()) or "none"
    hint = "; data.templates: true puts the type's sentences into the original text" if kinds else ""
    raise DymoeError(f"{root}: no instruction folder{of} with {kind!r} text; found: {there}{hint}")


def _unpacked(root: Path, names: Sequence[str]) -> str:
    """The end of a message: an archive with one of these names that nobody has unpacked."""
    for folder in (root / below for below in BELOW):
        for name in names:
            if "; unpack" in (hint := what_is_there(folder / name)):
                return hint
    return ""


def _there(root: Path) -> str:
    return what_is_there(root / "*")


def kinds_of(folder: Path, tasks: Sequence[str]) -> tuple[str, ...]:
    """The instruction types that a folder may hold: by its text, or by its name where the text does not say.

    Some sentences belong to several types and some tasks have the same one in all, so there may be more than one;
    a folder with an unknown name whose sentences are unknown or contradict each other counts as original.
    """
    possible = set(instructions.TYPES)
    known = False
    for task, path in task_folders(folder).items():
        if task not in tasks:
            continue
        names = [path / name for name in ("train_ori.json", "train.json")]
        file = next((name for name in names if name.is_file()), next(_training_files(path)))
        for question in _peek(file):
            kinds = instructions.kinds(task, question)
            possible &= kinds or possible
            known = known or bool(kinds)
    by_name = {row["name"]: row["type"] for row in published()["folders"]}.get(folder.name, "original")
    if not known or not possible or by_name in possible:
        return (by_name,)
    return tuple(kind for kind in instructions.TYPES if kind in possible)


def _peek(path: Path) -> Iterator[str]:
    """The first questions of a training file, from its beginning alone; what cannot be read is passed over."""
    try:
        with path.open("rb") as file:
            text = file.read(PEEK_BYTES).decode("utf-8-sig", errors="ignore")
    except OSError:
        return
    decoder, position = json.JSONDecoder(), text.find("[") + 1
    for _ in range(PEEK_RECORDS):
        position += len(text[position:]) - len(text[position:].lstrip(" \t\r\n,"))
        try:
            value, position = decoder.raw_decode(text, position)
            yield parse(value, test=False).question
        except DymoeError:
            continue
        except (ValueError, RecursionError):
            return


def _images(root: Path, source: Source) -> Path:
    if source.images is not None:
        images = expand(source.images)
        images = images if images.is_absolute() or images.is_dir() else root / images
        if not images.is_dir():
            raise DymoeError(f"data.images: no such folder {images}")
        return images
    known = set(published()["image_folders"])
    paths = [root / below / name for below in BELOW for name in ("cl_dataset", "images", "")]
    for candidate in dict.fromkeys(paths):
        # A task's instruction folder may have the same name as its image folder: then it holds training files.
        if any(path.name in known and not any(_training_files(path)) for path in _folders(candidate)):
            return candidate
    raise DymoeError(
        f"{root}: no image root found (cl_dataset with {', '.join(sorted(known))}); say where it is with data.images"
        f"{_unpacked(root, ('cl_dataset', 'images')) or _there(root)}"
    )
