"""The stream "coin": CoIN's eight tasks from its published files (docs/coin.md)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dymoe.errors import DymoeError
from dymoe.tasks.base import Stream, Task
from dymoe.tasks.coin import TASKS, references
from dymoe.tasks.coin.layout import Layout, find
from dymoe.tasks.coin.preflight import findings, published_times, stand_in
from dymoe.tasks.index import Index, Plan, index, listed, scorable, splits, usable
from dymoe.tasks.lazy import View
from dymoe.tasks.llava import Record
from dymoe.tasks.source import Source

__all__ = ["TASKS", "TaskIndexes", "findings", "indexes", "load", "published_times", "rules", "stand_in"]


def rules(source: Source) -> str:
    """By which rules the answers are scored."""
    return source.scoring


@dataclass(frozen=True)
class TaskIndexes:
    """The indexes of a task's two files; what the checks before a run look at."""

    task: str
    train: Index
    test: Index

    def counts(self) -> dict[str, int]:
        """Records of the files, and those with an image that can be used, by the keys of `published.json`."""
        files = {"train": self.train, "test": self.test}
        with_image = {f"{name}_with_image": each.with_image for name, each in files.items()}
        return {**{name: each.records for name, each in files.items()}, **with_image}


def indexes(layout: Layout, task: str, source: Source) -> TaskIndexes:
    """Index a task's files, or take the indexes from the cache; records that cannot be used are listed in them.

    Raises:
        DymoeError: a file is missing, unreadable or no list of records, or the cache cannot be written.
    """
    annotations = layout.annotations(task)

    rule = f"{source.scoring}/{task.lower()}"

    def rewrite(record: Record) -> Record:
        return record if record.image is None else replace(record, image=layout.image_name(record.image))

    def one(path: Path, test: bool) -> Index:
        # Training records need their task's annotation file only for ScienceQA's choices.
        extra = annotations if test or task == "ScienceQA" else ()
        plan = Plan(
            path,
            layout.images,
            test,
            rule,
            lambda: references.make(task, test, extra, rule),
            extra,
            source.outside_links,
            task == "ScienceQA",
            rewrite,
        )
        return index(plan)

    return TaskIndexes(task, one(layout.train_file(task, source.train_file), False), one(layout.test_file(task), True))


def load(names: Sequence[str], instructions: str, seed: int, source: Source) -> Stream:
    """Load the tasks `names` in this order.

    Args:
        names: tasks.
        instructions: instruction type.
        seed: of the sentence that a template of type "10type" gives a sample.
        source: the recipe's part `data`.

    Raises:
        DymoeError: something is missing or broken; the message names file and record.
    """
    layout = find(source, instructions, names)
    files = [indexes(layout, name, source) for name in names]
    tasks = [_task(layout, each, instructions, seed, source) for each in files]
    skipped = [row for both in files for row in listed(both.task, {"train": both.train, "test": both.test})]
    for task, both in zip(tasks, files, strict=True):
        if uncounted := both.test.usable - len(task.test):
            message = f"{uncounted} questions are not of the balanced set, which alone counts"
            entry = {"file": str(both.test.path), "record": None, "id": None, "error": message}
            skipped.append({**entry, "task": task.name, "split": "test"})
    return Stream("coin", tuple(tasks), tuple(skipped))


def _task(layout: Layout, files: TaskIndexes, kind: str, seed: int, source: Source) -> Task:
    template = (files.task, kind, seed) if layout.replaced else None
    for each in (files.train, files.test):
        usable(each, source.on_bad)
        if template is not None and each.without_instruction:
            raise DymoeError(
                f"{each.path}: {each.without_instruction} of {each.usable} questions carry no known instruction, so "
                "data.templates cannot replace it"
            )
    view = View(files.train.path, layout.images, source.outside_links, template=template)
    limits = TASKS[files.task]
    return Task(
        files.task,
        **splits(files.train, files.test, view, source.validation_share, rows=scorable(files.test.table)),
        scorer=f"{source.scoring}/{files.task.lower()}",
        max_new_tokens=limits.coin if source.generation == "coin" else limits.short,
    )
