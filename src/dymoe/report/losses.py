"""The first figure: what each method lost and when, two heatmaps whose rows add up to the same."""

from collections.abc import Sequence

from dymoe.numbers import Stat, number
from dymoe.report.heatmaps import heatmap
from dymoe.report.parts import Figure, Heatmap, Table
from dymoe.report.summary import Method
from dymoe.report.words import ranked


def losses(methods: Sequence[Method]) -> Figure | None:
    """Change of each task since it was learned, and change of all older tasks at each stage, a row a method."""
    order = ranked(methods)
    if not order or order[0].stages < 2:
        return None
    stages = order[0].stages
    tasks = order[0].tasks[:stages]
    by_task = [[_mean(method.change_of_task(i)) for i in range(stages - 1)] for method in order]
    by_stage = [[_mean(method.change_at(t)) for t in range(2, stages + 1)] for method in order]
    labels = [method.label for method in order]
    small = len(order) > 6
    plots = (
        heatmap(
            "What: change of each task since learned (points)",
            "Change of each task since it was learned, by method",
            by_task,
            tasks[:-1],
            labels,
            "{row}: {value} points on {column}",
            change=True,
            row_numbers=False,
            small=small,
        ),
        heatmap(
            "When: change of older tasks while learning … (points)",
            "Change of all older tasks together while each task was learned, by method",
            by_stage,
            tasks[1:],
            labels,
            "{row}: {value} points while learning {column}",
            change=True,
            row_numbers=False,
            first=2,
            small=small,
        ),
    )
    rows: list[tuple[str, ...]] = []
    for method in order:
        for i, task in enumerate(tasks[:-1]):
            cells = [_points(method.change(i, t)) for t in range(2, stages + 1)]
            rows.append((f"{method.label}: {task}", *cells, _points(method.change_of_task(i))))
        cells = [_points(method.change_at(t)) for t in range(2, stages + 1)]
        total = number(sum(by_task[order.index(method)]), sign=True)
        rows.append((f"{method.label}: all older tasks", *cells, total))
    caption = (
        "Rows: methods, the one that forgot least first. What: points each task lost (−) or gained (+) from when it "
        "was learned to the end. When: points all older tasks together lost while the task of that column was learned. "
        "Both rows of a method add up to the same number, which divided by the number of tasks T is its backward "
        "transfer."
    )
    head = ("method: task", *(f"{t} {tasks[t - 1]}" for t in range(2, stages + 1)), "since learned")
    return Figure(
        "losses",
        "What was lost, and when",
        caption,
        plots,
        Table(head, tuple(rows)),
        tuple(_each(method) for method in order),
        "Each method, task by task and stage by stage",
        wide=True,
    )


def _each(method: Method) -> Heatmap:
    """One method: the change of each older task at each stage."""
    stages = method.stages
    z = [
        [None if (change := method.change(i, t)) is None else change.mean for t in range(2, stages + 1)]
        for i in range(stages - 1)
    ]
    return heatmap(
        method.label,
        f"Change of each task at each stage of {method.label}",
        z,
        method.tasks[1:stages],
        method.tasks[: stages - 1],
        "{row}: {value} points while learning {column}",
        change=True,
        first=2,
    )


def _mean(stat: Stat | None) -> float:
    return 0.0 if stat is None else stat.mean


def _points(stat: Stat | None) -> str:
    return "–" if stat is None else stat.text(sign=True)
