"""What a method reports of a stage: ``report.json`` in its memory, which results.json repeats (key ``reports``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dymoe.files import atomic_json, read_json
from dymoe.methods.base import Stage

FILE = "report.json"


def add_report(stage: Stage, **parts: Any) -> None:
    """Set parts of the stage's report, beside what the method or a plugin has set before.

    Raises:
        DymoeError: the file is damaged, or cannot be written.
    """
    file = stage.memory / FILE
    earlier = read_json(file, dict[str, Any]) if file.is_file() else {}
    atomic_json(file, {**earlier, **parts})


def report_locator(stage: Stage, chosen: Mapping[str, Sequence[str]]) -> None:
    """Report how often a task locator is right (key ``locator``), in the same way for each that there is.

    The part holds ``accuracy`` in percent, the mean over the tasks, and by task its ``accuracy``, how often each task
    was ``chosen``, and of each prompt in order whether that was ``right`` (1) or not (0). Without a task there is none.

    Args:
        stage: just trained.
        chosen: task seen -> the task that the locator chose for each of its prompts, at least one.
    """
    tasks: dict[str, Any] = {}
    for task, names in chosen.items():
        right = [int(name == task) for name in names]
        counts = dict(Counter(names).most_common())
        tasks[task] = {"accuracy": 100 * sum(right) / len(right), "chosen": counts, "right": right}
    if tasks:
        accuracy = sum(row["accuracy"] for row in tasks.values()) / len(tasks)
        add_report(stage, locator={"accuracy": accuracy, "tasks": tasks})
