"""Samples, tasks and streams, and the one way to load them.

A stream is a loader in `STREAMS`: a module with `TASKS` (its task names in their original order) and either
`load_task(name, instructions, seed)` for a stream that comes with the package, or `load(names, instructions, seed,
source)` for one that lives in the user's files (entered in `FROM_FILES` as well). A path to a YAML file is a stream of
the user's own data (`dymoe.tasks.own`).

What else a stream can say stands in its module too, and is asked for by `hook`: `rules(source)`, by which rules its
answers are scored; `findings(names, instructions, source)`, what `dymoe doctor` shows about its files; `stand_in(names,
train, test)`, made samples for a dry run; `published_times()`, source, hardware and minutes by method and task.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from dymoe.errors import DymoeError
from dymoe.messages import brief, unknown
from dymoe.tasks.instructions import TYPES
from dymoe.tasks.source import Source

ORDERS = ("origin", "reverse", "alphabet")
STREAMS = {
    "pocket-coin": "dymoe.tasks.pocket.stream",
    "pocket-classes": "dymoe.tasks.pocket.classes",
    "pocket-domains": "dymoe.tasks.pocket.domains",
    "pocket-general": "dymoe.tasks.pocket.general",
    "coin": "dymoe.tasks.coin.stream",
}
FROM_FILES = ("coin",)


class Picture(Protocol):
    """An encoded picture that is somewhere else until it is read."""

    def read(self) -> bytes:
        """The encoded picture (PNG, JPEG or WebP).

        Raises:
            DymoeError: it cannot be read; the message says where it should be.
        """


@dataclass(frozen=True)
class Sample:
    """One question about one picture.

    `picture` is an encoded picture (PNG, JPEG or WebP), something that reads one when asked, or None for a question of
    text alone; `question` holds its instruction and no image token; `answer` is the training target; `reference` is
    what the task's scorer reads: "answer", and with some rules "answers" (ten texts), "choices" (texts), "bbox"
    ([x0, y0, x1, y1]); `turns` are the later (question, answer) pairs of a conversation about the same picture, which
    are trained on with the first; `source` is the file that it comes from and its record's number there, from 0.
    """

    id: str
    picture: bytes | Picture | None
    question: str
    answer: str
    reference: Mapping[str, Any]
    turns: tuple[tuple[str, str], ...] = ()
    source: tuple[str, int] | None = field(default=None, compare=False)

    @property
    def label(self) -> str:
        """What messages call it: its id, and where it is known its file, record number and picture's path."""
        name = getattr(self.picture, "name", None)
        parts = [] if self.source is None else [f"{self.source[0]}: record {self.source[1]}"]
        parts += [] if name is None else [f"image {brief(name)}"]
        return f"sample {brief(self.id)} ({', '.join(parts)})" if parts else f"sample {brief(self.id)}"

    @property
    def image(self) -> bytes | None:
        """The encoded picture, read now if it is not in memory, and not kept; None for a question of text alone.

        Raises:
            DymoeError: it cannot be read; the message says where it should be.
        """
        return self.picture if self.picture is None or isinstance(self.picture, bytes) else self.picture.read()

    @property
    def has_image(self) -> bool:
        """Whether there is a picture, without reading it."""
        return self.picture is not None


@dataclass(frozen=True)
class Task:
    """A named task: its three splits, its scoring rule and the longest answer it needs, in tokens."""

    name: str
    train: Sequence[Sample]
    validation: Sequence[Sample]
    test: Sequence[Sample]
    scorer: str
    max_new_tokens: int


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they are learned.

    `skipped` lists the records that were left out because they cannot be used (keys "file", "record" counted from 0,
    "id", "error", "task", "split"; file and record are None where samples come from no file of the user's); `notes` are
    what else is to be said of the data, a line each; `watch` holds tasks that are asked beside the others and never
    learned.
    """

    name: str
    tasks: tuple[Task, ...]
    skipped: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    watch: tuple[Task, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks' names in order."""
        return tuple(task.name for task in self.tasks)


def available() -> tuple[str, ...]:
    """The names of the streams that `load_stream` knows, beside the path of a YAML file."""
    return tuple(STREAMS)


def is_own(name: str) -> bool:
    """Whether a stream's name is the path of a YAML file about one's own data."""
    return name.endswith((".yaml", ".yml"))


def from_files(name: str) -> bool:
    """Whether a stream is read from the user's files, as a `Source` says."""
    return is_own(name) or name in FROM_FILES


def hook(stream: str, name: str) -> Any:
    """What a stream's module has under this name, None where it says nothing of it."""
    return getattr(import_module("dymoe.tasks.own" if is_own(stream) else STREAMS[stream]), name, None)


def task_names(name: str, order: str = "origin", tasks: Sequence[str] | None = None) -> tuple[str, ...]:
    """The names of a stream's tasks in the order asked for, without loading them.

    Raises:
        DymoeError: as `load_stream`.
    """
    if name not in STREAMS and not is_own(name):
        raise DymoeError(f"{unknown('stream', name, STREAMS)}, or the path of a YAML file about your own data")
    if order not in ORDERS:
        raise DymoeError(unknown("order", order, ORDERS))
    if is_own(name):
        from dymoe.tasks import own

        known = own.task_names(Path(name))
    else:
        known = tuple(import_module(STREAMS[name]).TASKS)
    for task in tasks or ():
        if task not in known:
            raise DymoeError(unknown("task", task, known))
    if tasks is not None and len(set(tasks)) != len(tasks):
        raise DymoeError(f"tasks: a task is named twice in {', '.join(tasks)}")
    if tasks is not None and not tasks:
        raise DymoeError(f"tasks: none asked for; stream {brief(name)} has {', '.join(known)}")
    chosen = [task for task in known if tasks is None or task in tasks]
    if order == "reverse":
        chosen.reverse()
    elif order == "alphabet":
        chosen.sort(key=str.lower)
    return tuple(chosen)


def load_stream(
    name: str,
    order: str = "origin",
    instructions: str = "original",
    tasks: Sequence[str] | None = None,
    seed: int = 0,
    source: Source | None = None,
) -> Stream:
    """Load a stream's tasks, every record checked.

    Args:
        name: one of `available()`, or the path of a YAML file about one's own data.
        order: "origin" (CoIN's), "reverse" or "alphabet"; it also orders a subset given by `tasks`.
        instructions: "original", "diverse" or "10type" (a sentence per sample, picked by a hash).
        tasks: names of the tasks wanted; all when None.
        seed: changes which sentence "10type" picks, nothing else.
        source: where the files are, for a stream that is read from files.

    Raises:
        DymoeError: an unknown stream, order, instruction type or task (the message names the nearest one), a
            missing or unreadable file, a record that cannot be used, or a task without samples.
    """
    names = task_names(name, order, tasks)
    if instructions not in TYPES:
        raise DymoeError(unknown("instruction type", instructions, TYPES))
    if is_own(name):
        from dymoe.tasks import own

        return own.load(Path(name), names, instructions, source or Source())
    loader = import_module(STREAMS[name])
    if name in FROM_FILES:
        stream: Stream = loader.load(names, instructions, seed, source or Source())
        return stream
    return Stream(name, tuple(loader.load_task(task, instructions, seed) for task in names))
