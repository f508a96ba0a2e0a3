"""Routing drift token by token: by part and stage, by layer, changed top experts, and beside what was forgotten."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from dymoe.numbers import number
from dymoe.report.frames import ALL, PARTS, Analysed, analysed, later_weight, made, mean_over, missing, routed
from dymoe.report.heatmaps import heatmap
from dymoe.report.parts import Choice, Figure, Heatmap, Keys, Plot, Sign, Table
from dymoe.report.plots import MARKERS, build, colour, escape, marker, signs
from dymoe.report.summary import Method
from dymoe.sweep.table import rank_correlation

if TYPE_CHECKING:
    import pandas as pd

# Pairs of drift and forgetting below which a correlation says nothing.
FEWEST = 3
Cells = list[tuple[Analysed, "pd.DataFrame"]]


def drift_figures(methods: Sequence[Method]) -> list[Figure]:
    """The figures of the analysis `drift`; a note with the command where there is none; nothing if none is routed."""
    found = analysed(methods, "drift")
    note, command = missing(methods, found, "drift")
    known = [(one, later_weight(one.frame)) for one in found]
    known = [(one, cells) for one, cells in known if len(cells)]
    if not known:
        title = "Routing drift, token by token"
        empty = Figure("drift-parts", title, "", (), Table((), ()), note=note, command=command)
        return [empty] if any(map(routed, methods)) and note else []
    return [_by_part(known, note, command), _by_layer(known), _changed(known), _beside_forgetting(known)]


def _methods(known: Cells) -> Choice:
    return Choice("method", tuple(one.method.label for one, _ in known))


def _parts_of(cells: "pd.DataFrame") -> dict[str, "pd.DataFrame"]:
    """Part -> its rows; all tokens first."""
    held = {part: cells[cells["part"] == part] for part in PARTS}
    return {ALL: cells, **{part: rows for part, rows in held.items() if len(rows)}}


def _by_part(known: Cells, note: str, command: str) -> Figure:
    plots: list[Plot] = []
    rows: list[tuple[str, ...]] = []
    keys: list[Keys] = []
    last = max(int(cells["stage"].max()) for _, cells in known)
    for place, (one, cells) in enumerate(known):
        means = mean_over(cells, ["task", "part", "stage"])
        for task in one.run.tasks:
            mine = means[means["task"] == task]
            if mine["stage"].nunique() < 2:
                continue
            traces = []
            for part, at in zip(PARTS, range(len(PARTS)), strict=True):
                values = mine[mine["part"] == part].set_index("stage")["later"].to_dict()
                if not values:
                    continue
                traces.append(
                    go.Scatter(
                        x=list(values),
                        y=list(values.values()),
                        name=part,
                        mode="lines+markers",
                        line={"color": f"var(--m{at})", "width": 2},
                        marker={"symbol": list(MARKERS)[at], "size": 7, "color": f"var(--m{at})"},
                        hovertemplate=f"{part} tokens, stage %{{x}}: %{{y:.1f}} %<extra></extra>",
                    )
                )
                rows.append((f"{one.method.label}: {task}, {part}", *(number(values.get(t)) for t in _stages(last))))
                keys.append((place,))
            plots.append(
                build(
                    task,
                    f"Weight of {task}'s tokens on later groups over stages, {one.method.label}",
                    traces,
                    190,
                    (place,),
                    xaxis={"range": [0.7, max(last, 2) + 0.3], "dtick": 1, "showgrid": False},
                    yaxis={"range": [-3, 103], "dtick": 25},
                )
            )
    caption = (
        "One plot for each task: the routing weight in percent that its test tokens put on groups added after its own, "
        "against the stage; image tokens, the instruction's and the answer's apart (a mean over tokens, then over "
        "layers). A line that rises says that newer experts take over the old task's tokens."
    )
    legend = tuple(Sign(part, f"var(--m{at})", list(MARKERS.values())[at]) for at, part in enumerate(PARTS))
    return Figure(
        "drift-parts",
        "Routing drift by part of the input",
        caption,
        tuple(plots),
        Table(("method: task, part", *(f"stage {t}" for t in _stages(last))), tuple(rows), tuple(keys)),
        legend=legend,
        choices=(_methods(known),),
        made=made([one for one, _ in known]),
        note=note,
        command=command,
    )


def _stages(last: int) -> range:
    return range(1, last + 1)


def _by_layer(known: Cells) -> Figure:
    plots: list[Heatmap] = []
    rows: list[tuple[str, ...]] = []
    keys: list[Keys] = []
    options = (ALL, *PARTS)
    tasks = known[0][0].run.tasks
    for place, (one, cells) in enumerate(known):
        last = int(cells["stage"].max())
        end = cells[cells["stage"] == last]
        older = [task for task in tasks[: last - 1] if task in set(end["task"])]
        for part, mine in _parts_of(end).items():
            key = (place, options.index(part))
            table = mean_over(mine, ["layer", "task"]).pivot_table(index="layer", columns="task", values="later")
            layers = [str(layer) for layer in table.index]
            z = [[_value(table, layer, task) for task in older] for layer in table.index]
            plots.append(
                heatmap(
                    f"{one.method.label}, after stage {last}: {part}",
                    f"Weight on later groups by layer and task, {part}, {one.method.label}",
                    z,
                    older,
                    layers,
                    "layer {row}: tokens of {column} put {value} % on later groups",
                    row_numbers=False,
                    keys=key,
                    small=len(layers) > 12,
                )
            )
            by_task = [dict(zip(older, row, strict=True)) for row in z]
            rows += [
                (f"{one.method.label}: layer {layer}", part, *(number(values.get(task)) for task in tasks[:-1]))
                for layer, values in zip(layers, by_task, strict=True)
            ]
            keys += [key] * len(layers)
    caption = (
        "Row: decoder layer, from the first at the top; column: task. The weight in percent that the task's test "
        "tokens put on groups added after its own at the last stage. Strongly coloured rows are the layers where "
        "routing drifts."
    )
    return Figure(
        "drift-layers",
        "Routing drift by layer",
        caption,
        tuple(plots),
        Table(("method: layer", "part", *tasks[:-1]), tuple(rows), tuple(keys)),
        choices=(_methods(known), Choice("tokens", options)),
        made=made([one for one, _ in known]),
    )


def _value(table: "pd.DataFrame", row: object, column: object) -> float | None:
    """A cell of a pivot table, None where it is not there."""
    if row not in table.index or column not in table.columns:
        return None
    value = float(table.at[row, column])  # type: ignore[arg-type]
    return None if value != value else value


def _changed(known: Cells) -> Figure:
    plots: list[Heatmap] = []
    rows: list[tuple[str, ...]] = []
    keys: list[Keys] = []
    options = (ALL, *PARTS)
    tasks = known[0][0].run.tasks
    last = max(int(cells["stage"].max()) for _, cells in known)
    for place, (one, cells) in enumerate(known):
        end = int(cells["stage"].max())
        for part, mine in _parts_of(cells).items():
            key = (place, options.index(part))
            table = mean_over(mine, ["task", "stage"]).pivot_table(index="task", columns="stage", values="changed")
            older = [task for task in tasks[: end - 1] if task in table.index]
            stages = [stage for stage in range(2, end + 1) if stage in table.columns]
            z = [
                [_value(table, task, stage) if stage > tasks.index(task) + 1 else None for stage in stages]
                for task in older
            ]
            plots.append(
                heatmap(
                    f"{one.method.label}: {part}",
                    f"Share of changed top experts by task and stage, {part}, {one.method.label}",
                    z,
                    [tasks[stage - 1] for stage in stages],
                    older,
                    "{row}: {value} % of tokens have another top expert after {column}",
                    first=stages[0] if stages else 2,
                    keys=key,
                )
            )
            for task, row in zip(older, z, strict=True):
                values = dict(zip(stages, row, strict=True))
                rows.append((f"{one.method.label}: {task}", part, *(number(values.get(t)) for t in range(2, last + 1))))
                keys.append(key)
    caption = (
        "Row: task; column: the task learned since. The share of the row's test tokens, in percent, whose top expert "
        "is no longer the one it was when the task had just been learned, a mean over layers. 0: every token is served "
        "as it was."
    )
    head = ("method: task", "part", *(f"stage {t}" for t in range(2, last + 1)))
    return Figure(
        "drift-changed",
        "Changed top experts",
        caption,
        tuple(plots),
        Table(head, tuple(rows), tuple(keys)),
        choices=(_methods(known), Choice("tokens", options)),
        made=made([one for one, _ in known]),
    )


def _beside_forgetting(known: Cells) -> Figure:
    traces = []
    rows: list[tuple[str, ...]] = []
    told: list[str] = []
    every: list[tuple[float, float]] = []
    for one, cells in known:
        pairs = drift_and_forgetting(one, cells)
        traces.append(
            go.Scatter(
                x=[drift for _, drift, _ in pairs],
                y=[lost for *_, lost in pairs],
                text=[escape(task) for task, *_ in pairs],
                name=escape(one.method.label),
                mode="markers+text" if len(known) == 1 else "markers",
                textposition="top center",
                textfont={"size": 11, "color": "var(--muted)"},
                cliponaxis=False,
                marker={"symbol": marker(one.method), "size": 10, "color": colour(one.method)},
                hovertemplate="%{fullData.name}, %{text}: drift %{x:.1f} %, lost %{y:.1f} points<extra></extra>",
            )
        )
        rows += [(f"{one.method.label}: {task}", number(drift), number(lost, sign=True)) for task, drift, lost in pairs]
        points = [(drift, lost) for _, drift, lost in pairs]
        every += points
        told.append(f"{one.method.label} {_correlation(points)}")
    if len(known) > 1:
        told.append(f"all together {_correlation(every)}")
    caption = (
        "A point is a task of a method: to the right, the weight its test tokens put on later groups at the last "
        "stage; upwards, the points it lost since its best stage. If drift is what forgets, the points rise to the"
        f" right. Correlation over tasks (Pearson r, Spearman ρ): {'; '.join(told)}. A correlation over "
        "so few tasks says little by itself."
    )
    plot = build(
        "",
        "Drift and forgetting of each task",
        traces,
        340,
        margin={"l": 8, "r": 40, "t": 24, "b": 8},
        xaxis={"title": {"text": "weight on later groups (%)"}, "rangemode": "tozero", "showgrid": False},
        yaxis={"title": {"text": "forgetting (points)"}},
    )
    return Figure(
        "drift-forgetting",
        "Does drift go with forgetting?",
        caption,
        (plot,),
        Table(("method: task", "drift (%)", "forgetting (points)"), tuple(rows)),
        legend=signs([one.method for one, _ in known]),
        made=made([one for one, _ in known]),
        wide=True,
    )


def drift_and_forgetting(one: Analysed, cells: "pd.DataFrame") -> list[tuple[str, float, float]]:
    """(task, drift in percent, forgetting in points) at the last stage that both are known for, without its task."""
    known = cells[cells["stage"] <= one.run.stages]
    if known.empty:
        return []
    last = int(known["stage"].max())
    drifts = mean_over(known[known["stage"] == last], ["task"]).set_index("task")["later"].to_dict()
    lost = one.run.matrix(last).forgetting_by_task()
    return [(task, drifts[task], lost[task]) for task in one.run.tasks[: last - 1] if task in drifts]


def _correlation(points: Sequence[tuple[float, float]]) -> str:
    drifts, lost = [drift for drift, _ in points], [value for _, value in points]
    if len(points) < FEWEST or len(set(drifts)) == 1 or len(set(lost)) == 1:
        return "– (too few or too equal)"
    pearson = statistics.correlation(drifts, lost)
    return f"r {number(pearson, 2, sign=True)}, ρ {number(rank_correlation(drifts, lost), 2, sign=True)}"
