"""Samples, tasks and streams, and the one way to load them.

A stream is a loader in `STREAMS`: give it a task's name and it returns that task. To add a stream, write a
module with `TASKS` (its task names in their original order) and `load_task(name, instructions, seed)`, and enter
it there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dymoe.errors import DymoeError
from dymoe.tasks.instructions import TYPES
from dymoe.tasks.naming import unknown

ORDERS = ("origin", "reverse", "alphabet")
STREAMS = {"pocket-coin": "dymoe.tasks.pocket.stream"}


@dataclass(frozen=True)
class Sample:
    """One question about one picture.

    `image` is an encoded picture (PNG, JPEG or WebP) or None for a question of text alone; `question` holds its
    instruction and no image token; `answer` is the training target; `reference` is what the task's scorer
    reads: "answer", and with some rules "answers" (ten texts), "choices" (texts), "bbox" ([x0, y0, x1, y1]).
    """

    id: str
    image: bytes | None
    question: str
    answer: str
    reference: Mapping[str, Any]


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
    """Tasks in the order in which they are learned."""

    name: str
    tasks: tuple[Task, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks' names in order."""
        return tuple(task.name for task in self.tasks)


def available() -> tuple[str, ...]:
    """The names of the streams that `load_stream` knows."""
    return tuple(STREAMS)


def task_names(name: str, order: str = "origin", tasks: Sequence[str] | None = None) -> tuple[str, ...]:
    """The names of a stream's tasks in the order asked for, without loading them.

    Raises:
        DymoeError: as `load_stream`.
    """
    if name not in STREAMS:
        raise DymoeError(unknown("stream", name, STREAMS))
    if order not in ORDERS:
        raise DymoeError(unknown("order", order, ORDERS))
    known: tuple[str, ...] = tuple(import_module(STREAMS[name]).TASKS)
    for task in tasks or ():
        if task not in known:
            raise DymoeError(unknown("task", task, known))
    if tasks is not None and len(set(tasks)) != len(tasks):
        raise DymoeError(f"tasks: a task is named twice in {', '.join(tasks)}")
    if tasks is not None and not tasks:
        raise DymoeError(f"tasks: none asked for; stream {name!r} has {', '.join(known)}")
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
) -> Stream:
    """Load a stream's tasks, every record checked.

    Args:
        name: one of `available()`.
        order: "origin" (CoIN's), "reverse" or "alphabet"; it also orders a subset given by `tasks`.
        instructions: "original", "diverse" or "10type" (a sentence per sample, picked by a hash).
        tasks: names of the tasks wanted; all when None.
        seed: changes which sentence "10type" picks, nothing else.

    Raises:
        DymoeError: an unknown stream, order, instruction type or task (the message names the nearest one), a
            missing or unreadable file, a record that cannot be used, or a task without samples.
    """
    names = task_names(name, order, tasks)
    if instructions not in TYPES:
        raise DymoeError(unknown("instruction type", instructions, TYPES))
    loader = import_module(STREAMS[name])
    return Stream(name, tuple(loader.load_task(task, instructions, seed) for task in names))
