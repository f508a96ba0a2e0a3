"""What was forgotten: the accuracy matrices in figures and in words, and what these must not be read without."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dymoe.analysis.figures import Figure, Heatmap, error_bars, escape, listed, positions, room, scatter
from dymoe.analysis.runs import Method, Run
from dymoe.numbers import Stat, number

# Points below which a loss is not told: the page shows one digit.
VISIBLE = 0.05


def ranked(methods: Sequence[Method]) -> list[Method]:
    """The methods that learned task by task and have come farthest, the one that forgot least first."""
    sequential = [method for method in methods if not method.level]
    stages = max((method.stages for method in sequential), default=0)
    farthest = [method for method in sequential if method.stages == stages]
    return sorted(farthest, key=lambda method: _mean(method.metric("BWT")), reverse=True)


def _mean(stat: Stat | None) -> float:
    return math.nan if stat is None else stat.mean


# ---------------------------------------------------------------- in figures


def losses(methods: Sequence[Method]) -> Figure | None:
    """Change of each task since it was learned, and change of all older tasks at each stage, a row a method."""
    order = ranked(methods)
    if not order or order[0].stages < 2:
        return None
    labels, tasks = [method.label for method in order], order[0].tasks[: order[0].stages]
    figure = Figure(
        "losses",
        "What was lost, and when",
        "Rows: methods, the one that forgot least first. What: points each task lost (−) or gained (+) from when it "
        "was learned to the end. When: points all older tasks together lost while the task of that column was learned. "
        "Both rows of a method add up to the same number, which divided by the number of tasks T is its backward "
        "transfer.",
        ("method: task", *(f"{t} {task}" for t, task in enumerate(tasks[1:], start=2)), "since learned"),
        fold="Each method, task by task and stage by stage",
    )
    style: dict[str, Any] = {"change": True, "numbered": False, "small": len(order) > 6}
    what = _means([method.changes_of_tasks() for method in order], labels, tasks[:-1])
    title = "What: change of each task since learned (points)"
    label = "Change of each task since it was learned, by method"
    figure.panels.append(Heatmap(title, label, what, "{row}: {value} points on {column}", **style))
    when = _means([method.changes_at_stages() for method in order], labels, tasks[1:])
    title = "When: change of older tasks while learning … (points)"
    label = "Change of all older tasks together while each task was learned, by method"
    hover = "{row}: {value} points while learning {column}"
    figure.panels.append(Heatmap(title, label, when, hover, first=2, **style))
    for method in order:
        changes = list(zip(*method.changes(), strict=True))[: len(tasks) - 1]  # by task
        label = f"Change of each task at each stage of {method.label}"
        each = _means(changes, tasks[:-1], tasks[1:])
        figure.folded.append(Heatmap(method.label, label, each, hover, change=True, first=2))
        for task, row, since in zip(tasks[:-1], changes, method.changes_of_tasks(), strict=True):
            figure.row(f"{method.label}: {task}", *(number(stat, sign=True) for stat in (*row, since)))
        total = (*method.changes_at_stages(), what.loc[method.label].sum())
        figure.row(f"{method.label}: all older tasks", *(number(stat, sign=True) for stat in total))
    return figure


def _means(stats: Sequence[Sequence[Stat | None]], rows: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame([map(_mean, row) for row in stats], index=[*rows], columns=[*columns])


def side_by_side(methods: Sequence[Method]) -> Figure:
    """Every method as a line from its accuracy when learned (MFT) to its accuracy at the end (MFN)."""
    figure = Figure(
        "side-by-side",
        "The methods side by side",
        "The open mark is the mean accuracy just after each task was learned (MFT), the filled one the mean over all "
        "tasks at the end (MFN). The shorter the line, the less was forgotten; the farther right the filled mark, the "
        "better the result. A method without stages (all tasks at once, or none) has no open mark. Thin bars: standard "
        "deviation over seeds.",
        ("method", "MFT (%)", "MFN (%)", "BWT (points)"),
    )
    traces = []
    for row, method in enumerate(methods):
        look, learned, final = method.look, method.metric("MFT"), method.metric("MFN")
        # An open mark and a filled one, or the latter alone.
        stats = [stat for stat in (learned, final) if stat is not None]
        symbols = [f"{look.marker}-open", look.marker][-len(stats) :]
        traces.append(
            scatter(
                look,
                [stat.mean for stat in stats],
                [row] * len(stats),
                "%{fullData.name} %{customdata}: %{x:.1f} %",
                {"size": 11, "symbol": symbols, "line": {"color": look.colour, "width": 2}},
                customdata=["when learned (MFT)", "at the end (MFN)"][-len(stats) :],
                **error_bars("x", stats),
            )
        )
        figure.row(method.label, number(learned), number(final), number(method.metric("BWT"), sign=True))
    axes: dict[str, Any] = {
        "xaxis": {"title": {"text": "mean accuracy (%)"}},
        "yaxis": listed([method.label for method in methods]),
    }
    label = "Mean accuracy of each method when learned and at the end"
    figure.plot("", label, traces, 70 + 40 * len(methods), **axes)
    return figure


def over_stages(methods: Sequence[Method]) -> Figure:
    """Accuracy of each task from the stage that learned it to the end, one small plot a task."""
    tasks = methods[0].tasks
    last = max((method.stages for method in methods), default=0)
    figure = Figure(
        "over-stages",
        "Accuracy of each task over stages",
        "One plot for each task: accuracy in percent against the stage (how many tasks have been learned). A line "
        "starts where its task is learned; where it falls, learning the task of that stage cost it.",
        ("task: method", *(f"stage {t}" for t in range(1, last + 1))) if last else ("task: method", "accuracy"),
        legend=[method.look for method in methods],
        layout="",
    )
    for i, task in enumerate(tasks[: last or len(tasks)]):
        traces = []
        for method in methods:
            if method.level:
                level = method.levels()[i]
                values = {1: level, max(last, 2): level}
                shown = {max(last, 1): level}
            else:
                values = shown = dict(enumerate(method.accuracy.mean(0)[i:, i].tolist(), start=i + 1))
            if values:
                mode = "lines" if method.level else "lines+markers"
                hover = "%{fullData.name}, stage %{x}: %{y:.1f} %"
                traces.append(scatter(method.look, [*values], [*values.values()], hover, mode=mode))
                figure.row(f"{task}: {method.label}", *(number(shown.get(t)) for t in range(1, max(last, 1) + 1)))
        figure.small_plot(task, f"Accuracy on {task} over stages", traces, last)
    return figure


def matrices(methods: Sequence[Method]) -> Figure | None:
    """The accuracy matrix of every sequential method as a heatmap, its single runs in a fold."""
    sequential = [method for method in methods if not method.level]
    if not sequential:
        return None
    tasks = methods[0].tasks

    def draw(title: str, rows: np.ndarray) -> Heatmap:
        names = tasks[: len(rows)]
        frame = pd.DataFrame(rows[:, : len(rows)], names, names)
        return Heatmap(title, f"Accuracy matrix of {title}", frame, "after learning {row}: {value} % on {column}")

    figure = Figure(
        "matrices",
        "Accuracy matrices",
        "Row t, column i: accuracy in percent on task i after task t was learned. The diagonal is each task as just "
        "learned, the last row what is left at the end. Read a column downwards: where it fades, that task is being "
        "forgotten.",
        ("stage", *tasks),
        folded=[
            draw(f"{method.label}, seed {run.seed}", rows)
            for method in sequential
            if len(method.runs) > 1
            for run, rows in zip(method.runs, method.accuracy, strict=True)
        ],
        fold="The matrix of each seed",
    )
    for method in sequential:
        seeds = "" if len(method.runs) == 1 else f", mean of {len(method.runs)} seeds"
        figure.heatmap(draw(f"{method.label}{seeds}", method.accuracy.mean(0)), f"{method.label}, after ")
    return figure


def lost_per_task(methods: Sequence[Method]) -> Figure | None:
    """Forgetting of every task and, beside it, format drift, as bars for each method."""
    sequential = [method for method in methods if not method.level and method.stages > 1]
    if not sequential:
        return None
    last = max(method.stages for method in sequential)
    tasks = methods[0].tasks[:last]
    nothing = [None] * last
    lost = [[*method.forgetting(), *nothing][:last] for method in sequential]
    drifts = [method.format_drift()[:last] for method in sequential]
    figure = Figure(
        "lost",
        "What each task lost",
        "Forgetting: the best accuracy at an earlier stage minus the final one, so a bar upwards is lost. Format "
        "drift: the part of a task's loss since it was learned that is form alone (lost by the task's rule, not lost "
        "for a lenient reader): what looks forgotten but is not. Below zero the form got better.",
        ("task: method", "forgetting (points)", "format drift (points)"),
        legend=[method.look for method in sequential],
    )
    for what, stats in (("Forgetting", lost), ("Format drift", drifts)):
        if all(stat is None or stat.mean == 0 for row in stats for stat in row):
            continue  # nothing known, or bars of no height on an axis that says nothing
        bars = [
            {
                "type": "bar",
                "name": escape(method.label),
                "x": list(range(last)),
                "y": [None if stat is None else stat.mean for stat in row],
                "customdata": [escape(task) for task in tasks],
                "marker": {"color": method.look.colour},
                "hovertemplate": "%{fullData.name}, %{customdata}: %{y:.1f} points<extra></extra>",
                **error_bars("y", row),
            }
            for method, row in zip(sequential, stats, strict=True)
        ]
        figure.plot(
            f"{what} (points)",
            f"{what} of each task in percentage points",
            bars,
            300,
            barmode="group",
            bargap=0.3,
            margin={"l": 40, "r": 12, "t": 8, "b": 20 + 0.7 * room(tasks)},
            # Slanted for every width: left to itself, plotly turns and measures labels without end.
            xaxis={**positions(tasks), "tickangle": -45, "automargin": False, "showgrid": False, "zeroline": False},
        )
    for i, task in enumerate(tasks):
        for method, *pair in zip(sequential, lost, drifts, strict=True):
            figure.row(f"{task}: {method.label}", *(number(stats[i], sign=True) for stats in pair))
    known = [stat for row in drifts for stat in row if stat is not None]
    if known and all(stat.mean == 0 for stat in known):
        figure.caption += " Format drift was 0 for every task and method, so it has no plot."
    return figure


# ---------------------------------------------------------------- in words


@dataclass(frozen=True)
class Card:
    """One answer of the first screen: a question's `title`, the answer in a few words, and what belongs to it."""

    title: str
    lead: str
    text: str


def headline(methods: Sequence[Method]) -> str:
    """The one sentence that a reader came for: which method forgot least, with its numbers."""
    order = ranked(methods)
    if not order:
        how = "All tasks were learned at once" if methods[0].runs[0].trained else "No task was learned"
        return f"{how}: {_percent(methods[0], 'MFN')} correct on average."
    best = order[0]
    if best.stages == 1:
        return f"Only {best.tasks[0]} has been learned so far, so nothing could be forgotten yet."
    scope = "" if best.complete else f" (after {best.stages} of {len(best.tasks)} tasks)"
    if len(order) == 1:
        return (
            f"{best.label} went from {_percent(best, 'MFT')} just after learning each task to {_percent(best, 'MFN')} "
            f"at the end: backward transfer of {_bwt(best)} points{scope}."
        )
    others = [f"{_bwt(method)} for {method.label}" for method in order[1:]]
    shown = (
        f"{others[0]} down to {others[-1]}"
        if len(others) > 4
        else " and ".join(part for part in (", ".join(others[:-1]), others[-1]) if part)
    )
    return f"{best.label} forgot least: backward transfer of {_bwt(best)} points against {shown}{scope}."


def _percent(method: Method, key: str) -> str:
    return f"{number(_mean(method.metric(key)))} %"


def _bwt(method: Method) -> str:
    return number(method.metric("BWT"), sign=True)


def cards(methods: Sequence[Method]) -> list[Card]:
    """What the best method forgot, when, what is left, and the method that forgot most; nothing before stage 2."""
    order = ranked(methods)
    if not order or order[0].stages < 2:
        return []
    best, worst = order[0], order[-1]
    answers = [_what(best), _when(best), _left(best, methods)]
    if len(order) > 1:
        most = f" of backward transfer. Most of {lost_most(worst)}." if _losses(worst) else "."
        answers.append(Card("Forgot most", worst.label, f"{_bwt(worst)} points{most}"))
    return answers


def _losses(method: Method) -> list[tuple[float, int]]:
    """(change in points, task) of every task that ended below what it was when learned, the greatest loss first."""
    changes = [(change.mean, task) for task, change in enumerate(method.changes_of_tasks())]
    return sorted(pair for pair in changes if pair[0] <= -VISIBLE)


def lost_most(method: Method) -> str:
    """The task that lost most since it was learned, and the later task whose learning cost it most."""
    lost = _losses(method)
    if not lost:
        return "nothing" if method.stages > 1 else "–"
    points, task = lost[0]
    changes = [(change.mean, stage) for stage, row in enumerate(method.changes(), start=1) if (change := row[task])]
    return f"{method.tasks[task]} ({number(-points)} points, mostly while learning {method.tasks[min(changes)[1]]})"


def _what(method: Method) -> Card:
    title = f"What {method.label} forgot"
    lost = [f"{method.tasks[task]} {number(points, sign=True)}" for points, task in _losses(method)]
    if not lost:
        return Card(title, "Nothing", "No task ended below its accuracy when it was learned.")
    older = method.stages - 1
    text = f"Then {', '.join(lost[1:])}." if lost[1:] else "No other task."
    if len(lost) < older:
        text += f" {older - len(lost)} of {older} older tasks lost nothing."
    return Card(title, f"{lost[0]} points", text)


def _when(method: Method) -> Card:
    points, stage = min((change.mean, stage) for stage, change in enumerate(method.changes_at_stages(), start=2))
    if points > -VISIBLE:
        text = "Every stage left the older tasks, taken together, where they were or better."
        return Card("When", "At no stage", text)
    worst, task = min((change.mean, task) for task, change in enumerate(method.changes()[stage - 2]) if change)
    older = "the task before it" if stage == 2 else f"the {stage - 1} tasks before it taken together"
    text = f"{number(points, sign=True)} points over {older}"
    if stage > 2:
        text += f", most of all {method.tasks[task]} ({number(worst, sign=True)})"
    return Card("When", f"Learning {method.tasks[stage - 1]}", f"{text}.")


def _left(best: Method, methods: Sequence[Method]) -> Card:
    text = f"{best.label}, from {_percent(best, 'MFT')} as each task was just learned."
    complete = [method for method in methods if method.complete and method is not best]
    if best.complete and complete:
        complete.sort(key=lambda method: (_mean(method.metric("MFN")), method.label), reverse=True)
        others = [f"{method.label} {_percent(method, 'MFN')}" for method in complete]
        text += f" The others: {', '.join(others[:3])}{', …' if len(others) > 3 else '.'}"
    title = "What is left" if best.complete else "What is left so far"
    return Card(title, f"{_percent(best, 'MFN')} correct", text)


def remarks(methods: Sequence[Method]) -> list[str]:
    """What the headline must not be read without: chance, what is unfinished or unlike."""
    order = ranked(methods)
    notes = [_chance(order[0], order[1])] if len(order) > 1 and order[0].stages > 1 else []
    notes += [
        f"{method.label} is shown as far as its runs have come: {method.stages} of {len(method.tasks)} tasks."
        for method in methods
        if not method.complete
    ]
    # A comparison needs these equal.
    settings: dict[str, Callable[[Run], object]] = {
        "base model": lambda run: run.base,
        "steps per task": lambda run: run.facts.get("steps_per_task"),
        "evaluation split": lambda run: run.facts.get("split"),
        "instructions": lambda run: run.facts.get("instructions"),
    }
    for what, read in settings.items():
        values = sorted({str(read(run)) for method in methods for run in method.runs})
        if len(values) > 1:
            notes.append(f"These runs differ in their {what} ({', '.join(values)}); compare them with care.")
    return notes


def _chance(best: Method, second: Method) -> str:
    """Whether the first two can be told apart by the seeds there are."""
    first, other = best.metric("BWT"), second.metric("BWT")
    if first is None or other is None or first.spread is None or other.spread is None:
        return "A method with a single seed has no spread: a small difference to it may be chance."
    gap, spread = first.mean - other.mean, max(first.spread, other.spread)
    verdict = "more than" if gap > spread else "no more than"
    return (
        f"The first two differ by {number(gap)} points, {verdict} the larger spread over seeds "
        f"({number(spread)}); ± is the standard deviation over seeds."
    )
