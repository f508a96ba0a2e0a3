"""Your own data as a stream: a YAML file that names JSON, JSON lines or parquet files in LLaVA's format.

name: birds-and-plates
images: pictures                # image root of all tasks, relative to this file
tasks:
  birds:
    train: birds/train.json
    test: birds/test.parquet
    scorer: exact_match
    max_new_tokens: 16
  plates: {train: plates/train.jsonl, test: plates/test.jsonl, images: plates, scorer: soft_accuracy}
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from dymoe import extensions
from dymoe.errors import DymoeError
from dymoe.files import expand
from dymoe.messages import shorten, unknown
from dymoe.names import safe_names
from dymoe.schema import Range, check
from dymoe.tasks import scoring
from dymoe.tasks.base import Stream, Task
from dymoe.tasks.index import Index, Plan, index, listed, splits, usable, verify
from dymoe.tasks.lazy import View
from dymoe.tasks.llava import Record, read_box
from dymoe.tasks.scoring import soft_accuracy
from dymoe.tasks.source import Source
from dymoe.yamls import read_yaml


class _TaskKeys(TypedDict):
    """One task of the file; docs/coin.md says what each key is."""

    train: NotRequired[str]
    test: str
    validation: NotRequired[str]
    images: NotRequired[str]
    scorer: NotRequired[str]
    max_new_tokens: NotRequired[Annotated[int, Range(1)]]


class _Keys(TypedDict):
    """The file."""

    name: NotRequired[str]
    images: NotRequired[str]
    tasks: dict[str, _TaskKeys]


@dataclass(frozen=True)
class TaskFiles:
    """One task of the file.

    Attributes:
        name: of the task.
        train: file of training records; none for a task that is only asked.
        test: file of test records.
        validation: file of validation records; none carves them out of the training records.
        images: image root.
        scorer: rule by name, see `dymoe.tasks.scoring`, or a function of your own, ``my_rule.py:rule``.
        max_new_tokens: longest answer in tokens, the end token included.
    """

    name: str
    train: Path | None
    test: Path
    validation: Path | None
    images: Path
    scorer: str
    max_new_tokens: int


def read(path: Path) -> tuple[str, tuple[TaskFiles, ...]]:
    """The stream's name and its tasks.

    Raises:
        DymoeError: a missing or unreadable file, an unknown, missing or wrong key; the message names it.
    """
    values = read_yaml(expand(path))
    if not isinstance(values, Mapping) or not isinstance(values.get("tasks"), Mapping) or not values["tasks"]:
        raise DymoeError(f"{path}: expected the keys name and tasks, tasks with one entry per task (docs/coin.md)")
    names = safe_names(values["tasks"], f"{path}: tasks")
    checked = check(values, _Keys, str(path))
    _refuse_unknown(path, "", checked, _Keys)
    folder = expand(path).parent
    tasks = []
    for name, keys in zip(names, checked["tasks"].values(), strict=True):
        _refuse_unknown(path, f"tasks.{name}.", keys, _TaskKeys)
        train, validation = keys.get("train"), keys.get("validation")
        tasks.append(
            TaskFiles(
                name,
                None if train is None else folder / expand(train),
                folder / expand(keys["test"]),
                None if validation is None else folder / expand(validation),
                folder / expand(keys.get("images", checked.get("images", "."))),
                keys.get("scorer", "exact_match"),
                keys.get("max_new_tokens", 32),
            )
        )
    return checked.get("name", path.stem), tuple(tasks)


def _refuse_unknown(path: Path, prefix: str, values: Mapping[str, Any], kind: type) -> None:
    for key in values:
        if key not in kind.__annotations__:
            raise DymoeError(f"{path}: {prefix}{shorten(key)}: {unknown('key', key, kind.__annotations__)}")


def task_names(path: Path) -> tuple[str, ...]:
    """The names of the file's tasks in its order.

    Raises:
        DymoeError: as `read`.
    """
    return tuple(task.name for task in read(path)[1])


def load(path: Path, names: Sequence[str], instructions: str, source: Source) -> Stream:
    """Load the tasks `names` of the file, in this order.

    Raises:
        DymoeError: as `read`; an unknown scorer; a record that cannot be used (unless `source.on_bad` is ``skip``);
            an instruction type other than ``original``, since your own text is taken as it is.
    """
    if instructions != "original":
        raise DymoeError(f"instructions: {instructions!r} is CoIN's; the text of {path} is taken as it is (original)")
    name, tasks = read(path)
    by_name = {task.name: task for task in tasks}
    chosen = [by_name[task_name] for task_name in names]
    for task in chosen:
        try:
            scoring.scorer(task.scorer)
        except DymoeError as error:
            raise DymoeError(f"{path}: tasks.{task.name}.scorer: {error}") from None
    loaded = [_load(task, source) for task in chosen]
    return Stream(
        name,
        tuple(task for task, _ in loaded),
        tuple(row for task, files in loaded for row in listed(task.name, files)),
    )


def _load(task: TaskFiles, source: Source) -> tuple[Task, dict[str, Index]]:
    def one(path: Path, test: bool) -> Index:
        # A rule of the user's may change in its file: what is kept of the records belongs to the rule as it is.
        rule = f"own/{task.scorer}{extensions.digests().get(task.scorer.rpartition(':')[0], '')}"
        plan = Plan(
            path,
            task.images,
            test,
            rule,
            lambda: verify(_reference, task.scorer, test),
            outside_links=source.outside_links,
            rewrite=_answer_as(task.scorer),
        )
        return usable(index(plan), source.on_bad)

    paths = {"train": task.train, "test": task.test, "validation": task.validation}
    files = {name: one(path, name != "train") for name, path in paths.items() if path is not None}
    view = View(task.test, task.images, source.outside_links)
    samples = splits(files.get("train"), files["test"], view, source.validation_share, files.get("validation"))
    return Task(task.name, **samples, scorer=task.scorer, max_new_tokens=task.max_new_tokens), files


def _reference(record: Record) -> tuple[dict[str, Any], bool]:
    """The reference of a record of one's own: its own keys and its answer in the forms that the rules read."""
    fields = {"question_id": record.id, **record.fields, "answer": record.answer}
    if fields.get("answers") is None:
        fields["answers"] = [record.answer] * soft_accuracy.PEOPLE
    if fields.get("bbox") is None and (box := read_box(record.answer)) is not None:
        fields["bbox"] = list(box)
    return fields, True


def _answer_as(rule: str) -> Callable[[Record], Record]:
    """What makes of a number that is an answer the text that the rule wants said: of a choice's index its letter."""
    right = scoring.rule(rule).right

    def rewrite(record: Record) -> Record:
        answer = record.fields.get("answer")
        if not isinstance(answer, int | float) or str(answer) != record.answer:
            return record  # a conversation's answer is what it says
        try:
            return replace(record, answer=right(record.fields))
        except DymoeError:
            return record

    return rewrite
