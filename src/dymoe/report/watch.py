"""The table of what was only asked (`evaluation.watch`): before the first task, after every stage, and the change."""

from collections.abc import Mapping, Sequence
from typing import Any

from dymoe.analysis.figures import Table
from dymoe.analysis.runs import Method
from dymoe.evaluation.intervals import Interval, accuracy, change

EMPTY = "–"


def watch_table(methods: Sequence[Method]) -> Table | None:
    """A row per method and task that its runs only asked; None where there is none.

    Accuracies have 95 % intervals over questions and seeds; the change is paired by question and seed.
    """
    stages = max((method.stages or len(method.tasks) for method in methods), default=0)
    rows = [
        (method.label, task, *_cells([run.facts["watch"][task] for run in method.runs], stages, method.level))
        for method in methods
        for task in method.runs[0].facts.get("watch", {})
        if all(task in run.facts.get("watch", {}) for run in method.runs)
    ]
    if not rows:
        return None
    learned = [f"after {name}" for name in methods[0].tasks[:stages]]
    head = ("method", "task", "before", *learned, "change", "beside accuracy")
    return Table("Accuracy on tasks that are only asked", "numbers", head, rows)


def _cells(runs: Sequence[Mapping[str, Any]], stages: int, level: bool) -> list[str]:
    """The cells of a row: accuracies, their change, and what was measured beside them.

    Args:
        runs: what each seed's results say of the task.
        stages: how many columns of stages there are.
        level: whether the method learns all tasks at once, or none: it has no other stage than the end.
    """
    rows = min(len(run["scores"]) for run in runs)
    by_stage = [[run["scores"][row] for run in runs] for row in range(rows)]
    cells = [_text(accuracy(scores)) for scores in by_stage]
    empty = [EMPTY] * (stages + 1 - rows)
    cells = [cells[0], *empty, *cells[1:]] if level else [*cells, *empty]
    ends = [
        f"{name} {_mean(runs, name, 0):.2f} → {_mean(runs, name, rows - 1):.2f}" + (" nats/token" * (name == "loss"))
        for name in runs[0]["measures"]
    ]
    changed = change(by_stage[0], by_stage[-1]).text(sign=True) if rows > 1 else EMPTY
    return [*cells, changed, "; ".join(ends) or EMPTY]


def _mean(runs: Sequence[Mapping[str, Any]], name: str, row: int) -> float:
    return sum(run["measures"][name][row] for run in runs) / len(runs)


def _text(interval: Interval) -> str:
    return f"{interval.value:.1f} ({interval.low:.0f}–{interval.high:.0f})"
