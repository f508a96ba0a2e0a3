"""The report's figures: each with a caption that says how to read it and its numbers as a table."""

from collections.abc import Sequence

import plotly.graph_objects as go

from dymoe.numbers import number
from dymoe.report.heatmaps import heatmap
from dymoe.report.parts import Figure, Heatmap, Table
from dymoe.report.plots import build, colour, error_bars, escape, line, listed, marker, positions, room, signs
from dymoe.report.summary import Method


def side_by_side(methods: Sequence[Method]) -> Figure:
    """Every method as a line from its accuracy when learned (MFT) to its accuracy at the end (MFN)."""
    traces = []
    for place, method in enumerate(methods):
        final = method.metric("MFN")
        learned = method.metric("MFT")
        stats = [stat for stat in (learned, final) if stat is not None]
        traces.append(
            go.Scatter(
                x=[stat.mean for stat in stats],
                y=[place] * len(stats),
                name=escape(method.label),
                mode="lines+markers",
                line=line(method),
                marker={
                    "size": 11,
                    "symbol": [f"{marker(method)}-open", marker(method)][-len(stats) :],
                    "color": colour(method),
                    "line": {"color": colour(method), "width": 2},
                },
                customdata=["when learned (MFT)", "at the end (MFN)"][-len(stats) :],
                hovertemplate="%{fullData.name} %{customdata}: %{x:.1f} %<extra></extra>",
                **error_bars("x", stats),
            )
        )
    rows = []
    for method in methods:
        values = [method.metric(key) for key in ("MFT", "MFN", "BWT")]
        rows.append((method.label, *(v.text(sign=i == 2) if v is not None else "–" for i, v in enumerate(values))))
    plot = build(
        "",
        "Mean accuracy of each method when learned and at the end",
        traces,
        70 + 40 * len(methods),
        xaxis={"title": {"text": "mean accuracy (%)"}},
        yaxis=listed([method.label for method in methods]),
    )
    caption = (
        "The open mark is the mean accuracy just after each task was learned (MFT), the filled one the mean "
        "over all tasks at the end (MFN). The shorter the line, the less was forgotten; the farther right "
        "the filled mark, the better the result. A method without stages (all tasks at once, "
        "or none) has no open mark. Thin bars: standard deviation over seeds."
    )
    table = Table(("method", "MFT (%)", "MFN (%)", "BWT (points)"), tuple(rows))
    return Figure("side-by-side", "The methods side by side", caption, (plot,), table, wide=True)


def over_stages(methods: Sequence[Method]) -> Figure:
    """Accuracy of each task from the stage that learned it to the end, one small plot a task."""
    tasks = methods[0].tasks
    last = max((method.stages for method in methods), default=0)
    plots = []
    rows = []
    means = [method.rows() for method in methods]
    for i, task in enumerate(tasks[: last or len(tasks)]):
        traces = []
        for method, mean in zip(methods, means, strict=True):
            if method.level:
                x = [1, max(last, 2)]
                y = [method.level_accuracy(i)] * 2
            else:
                x = list(range(i + 1, method.stages + 1))
                y = [mean[t - 1][i] for t in x]
            if not y:
                continue
            traces.append(
                go.Scatter(
                    x=x,
                    y=y,
                    name=escape(method.label),
                    mode="lines" if method.level else "lines+markers",
                    line=line(method),
                    marker={"symbol": marker(method), "size": 7, "color": colour(method)},
                    hovertemplate="%{fullData.name}, stage %{x}: %{y:.1f} %<extra></extra>",
                )
            )
            values = dict(zip(x, y, strict=True)) if not method.level else {max(last, 1): y[-1]}
            stages = (number(values.get(t)) for t in range(1, max(last, 1) + 1))
            rows.append((f"{task}: {method.label}", *stages))
        plots.append(
            build(
                task,
                f"Accuracy on {task} over stages",
                traces,
                190,
                xaxis={"range": [0.7, max(last, 2) + 0.3], "dtick": 1, "showgrid": False},
                yaxis={"range": [-3, 103], "dtick": 25},
            )
        )
    caption = (
        "One plot for each task: accuracy in percent against the stage (how many tasks have been learned). A "
        "line starts where its task is learned; where it falls, learning the task of that stage cost it."
    )
    head = ("task: method", *(f"stage {t}" for t in range(1, last + 1))) if last else ("task: method", "accuracy")
    return Figure(
        "over-stages",
        "Accuracy of each task over stages",
        caption,
        tuple(plots),
        Table(head, tuple(rows)),
        legend=signs(methods),
    )


def _mean_title(method: Method) -> str:
    return method.label if len(method.runs) == 1 else f"{method.label}, mean of {len(method.runs)} seeds"


def matrices(methods: Sequence[Method]) -> Figure | None:
    """The accuracy matrix of every sequential method as a heatmap, its single runs in a fold."""
    sequential = [method for method in methods if not method.level]
    if not sequential:
        return None
    tasks = methods[0].tasks
    what = "after learning {row}: {value} % on {column}"

    def draw(title: str, rows: Sequence[Sequence[float]]) -> Heatmap:
        columns = tasks[: len(rows)]
        z = [[*row, *[None] * (len(rows) - len(row))] for row in rows]
        return heatmap(title, f"Accuracy matrix of {title}", z, columns, columns, what)

    means = [(method, method.rows()) for method in sequential]
    several = [method for method in sequential if len(method.runs) > 1]
    rows = [
        (f"{method.label}, after {tasks[t]}", *map(number, row), *["–"] * (len(tasks) - len(row)))
        for method, mean in means
        for t, row in enumerate(mean)
    ]
    caption = (
        "Row t, column i: accuracy in percent on task i after task t was learned. The diagonal is each task "
        "as just learned, the last row what is left at the end. Read a column downwards: where it fades, "
        "that task is being forgotten."
    )
    return Figure(
        "matrices",
        "Accuracy matrices",
        caption,
        tuple(draw(_mean_title(method), mean) for method, mean in means),
        Table(("stage", *tasks), tuple(rows)),
        tuple(draw(f"{m.label}, seed {run.seed}", run.rows) for m in several for run in m.runs),
        "The matrix of each seed",
        wide=True,
    )


def lost_per_task(methods: Sequence[Method]) -> Figure | None:
    """Forgetting of every task and, beside it, format drift, as bars for each method."""
    sequential = [method for method in methods if not method.level and method.stages > 1]
    if not sequential:
        return None
    last = max(method.stages for method in sequential)
    tasks = methods[0].tasks[:last]
    values = {
        "forgetting": [[m.forgetting(i) for i in range(last)] for m in sequential],
        "format drift": [[m.format_drift(i) for i in range(last)] for m in sequential],
    }
    plots = []
    for what, stats in values.items():
        if all(stat is None or stat.mean == 0 for row in stats for stat in row):
            continue  # nothing known, or bars of no height on an axis that says nothing
        bars = [
            go.Bar(
                name=escape(method.label),
                x=list(range(last)),
                customdata=[escape(task) for task in tasks],
                y=[None if stat is None else stat.mean for stat in row],
                marker={"color": colour(method)},
                hovertemplate="%{fullData.name}, %{customdata}: %{y:.1f} points<extra></extra>",
                **error_bars("y", row),
            )
            for method, row in zip(sequential, stats, strict=True)
        ]
        plots.append(
            build(
                f"{what.capitalize()} (points)",
                f"{what.capitalize()} of each task in percentage points",
                bars,
                300,
                barmode="group",
                bargap=0.3,
                margin={"l": 40, "r": 12, "t": 8, "b": 20 + 0.7 * room(tasks)},
                # Slanted for every width: left to itself, plotly turns and measures labels without end.
                xaxis={**positions(tasks), "tickangle": -45, "automargin": False, "showgrid": False, "zeroline": False},
            )
        )
    rows = [
        (f"{task}: {method.label}", *(s.text(sign=True) if (s := values[w][m][i]) else "–" for w in values))
        for i, task in enumerate(tasks)
        for m, method in enumerate(sequential)
    ]
    caption = (
        "Forgetting: the best accuracy at an earlier stage minus the final one, so a bar upwards is lost. "
        "Format drift: the part of a task's loss since it was learned that is form alone (lost by the task's "
        "rule, not lost for a lenient reader): what looks forgotten but is not. Below zero the form got better."
    )
    drifts = [stat for row in values["format drift"] for stat in row if stat is not None]
    if drifts and all(stat.mean == 0 for stat in drifts):
        caption += " Format drift was 0 for every task and method, so it has no plot."
    table = Table(("task: method", "forgetting (points)", "format drift (points)"), tuple(rows))
    return Figure("lost", "What each task lost", caption, tuple(plots), table, legend=signs(sequential), wide=True)


def routing_drift(methods: Sequence[Method]) -> Figure | None:
    """Weight that old tasks' tokens put on newer groups, over stages."""
    routed = [m for m in methods if any(m.mean_drift(t) is not None for t in range(2, m.stages + 1))]
    if not routed:
        return None
    last = max(method.stages for method in routed)
    traces = []
    rows: list[tuple[str, ...]] = []
    for method in routed:
        drift = [method.mean_drift(t) for t in range(2, method.stages + 1)]
        traces.append(
            go.Scatter(
                x=list(range(2, method.stages + 1)),
                y=drift,
                name=escape(method.label),
                mode="lines+markers",
                line=line(method),
                marker={"symbol": marker(method), "size": 8, "color": colour(method)},
                hovertemplate="%{fullData.name}, stage %{x}: %{y:.1f} %<extra></extra>",
            )
        )
        pad = [None] * (last - method.stages)
        rows.append((f"{method.label}: mean of old tasks", *(number(v) for v in [*drift, *pad])))
        for i, task in enumerate(method.tasks[: method.stages - 1]):
            each = [method.drift(t, i) if t > i + 1 else None for t in range(2, method.stages + 1)]
            rows.append((f"{method.label}: {task}", *(number(v) for v in [*each, *pad])))
    plot = build(
        "",
        "Routing drift of each method over stages",
        traces,
        280,
        xaxis={"dtick": 1, "title": {"text": "stage"}, "showgrid": False, "range": [1.8, last + 0.2]},
        yaxis={"title": {"text": "weight on newer groups (%)"}, "rangemode": "tozero"},
    )
    caption = (
        "Routing drift: the share of routing weight that the test tokens of old tasks put on expert groups "
        "added after their own, averaged over the old tasks. At 0 old tasks are served by the experts they "
        "were learned with; the higher, the more newer experts interfere."
    )
    head = ("method: task", *(f"stage {t}" for t in range(2, last + 1)))
    table = Table(head, tuple(rows))
    return Figure(
        "routing-drift", "Routing drift over stages", caption, (plot,), table, legend=signs(routed), wide=True
    )


def routing_maps(methods: Sequence[Method]) -> Figure | None:
    """Where each task's tokens go at the last stage: weight on every group, of each method's first run."""
    plots = []
    rows = []
    groups: tuple[str, ...] = ()
    for method in methods:
        run = method.runs[0]
        stages = [stage for stage in run.routing if stage <= run.stages and run.routing[stage].divides]
        if not stages:
            continue
        routing = run.routing[max(stages)]
        tasks = [task for task in run.tasks if task in routing.weights]
        z: list[list[float | None]] = [[100 * w for w in routing.weights[task]] for task in tasks]
        title = f"{method.label}, seed {run.seed}, stage {max(stages)}"
        what = "tokens of {row} put {value} % on group {column}"
        plots.append(heatmap(title, f"Routing weight of tasks on groups: {title}", z, routing.groups, tasks, what))
        groups = max(groups, routing.groups, key=len)
        rows += [(f"{method.label}: {t}", *map(number, r)) for t, r in zip(tasks, z, strict=True)]
    if not plots:
        return None
    caption = (
        "Row: the task whose test tokens are routed; column: the expert group that the weight goes to, in the "
        "order the groups were added; each row sums to 100 %, or less where layers have no experts. Weight to the "
        "right of the diagonal goes to groups that were added after the task was learned: that is routing drift."
    )
    padded = tuple((*row, *["–"] * (len(groups) + 1 - len(row))) for row in rows)
    table = Table(("method: task", *groups), padded)
    return Figure("routing-maps", "Where tokens go", caption, tuple(plots), table, wide=True)
