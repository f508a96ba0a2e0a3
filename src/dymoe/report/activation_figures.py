"""How much each expert group is used in each layer, as circles, and which experts are dead."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from dymoe.numbers import number
from dymoe.report.frames import Analysed, analysed, made, missing, routed
from dymoe.report.parts import Choice, Figure, Keys, Plot, Table
from dymoe.report.plots import COLOURS, build, escape, positions, room
from dymoe.report.summary import Method

if TYPE_CHECKING:
    import pandas as pd

# Diameter in pixels of a group that gets all of a layer's weight, and of a layer's column where the page is narrow.
LARGEST = 28
CROSS = 12  # of a cross where all experts are dead
COLUMN = 20
Circles = dict[tuple[str, int], tuple[float, int, int]]  # (group, layer) -> weight in percent, dead experts, experts


def activation_figures(methods: Sequence[Method]) -> list[Figure]:
    """The figure of the analysis `activation`; a note with the command where there is none."""
    found = analysed(methods, "activation")
    note, command = missing(methods, found, "activation")
    title = "Activation by group and layer"
    if not found:
        empty = Figure("activation", title, "", (), Table((), ()), note=note, command=command)
        return [empty] if any(map(routed, methods)) and note else []
    stages = sorted({int(stage) for one in found for stage in one.frame["stage"].unique()})
    layers = sorted({int(layer) for one in found for layer in one.frame["layer"].unique()})
    plots: list[Plot] = []
    rows: list[tuple[str, ...]] = []
    keys: list[Keys] = []
    for place, one in enumerate(found):
        for stage in sorted(one.frame["stage"].unique()):
            key = (place, stages.index(int(stage)))
            groups, circles = _circles(one.frame, int(stage))
            plots.append(_plot(one, int(stage), groups, layers, circles, key))
            for group in groups:
                cells = [_cell(circles.get((group, layer))) for layer in layers]
                rows.append((f"{one.method.label}, stage {stage}: {group}", *cells))
                keys.append(key)
    caption = (
        "Row: expert group, in the order of the tasks that added them, the first at the bottom; column: decoder "
        "layer. A circle's area is the routing weight that the group's experts get together, a mean over the test "
        "tokens of all tasks seen at that stage, over tasks and over projections. A cross marks dead experts, "
        "which no task gives a mean weight of 0.001 or more: the larger, the more of the group's experts in that "
        "layer. In the numbers, weight in percent and, after a cross, the dead experts."
    )
    names = tuple(f"{stage} {one_task}" for stage, one_task in ((t, _task(found, t)) for t in stages))
    return [
        Figure(
            "activation",
            title,
            caption,
            tuple(plots),
            Table(("group", *(f"layer {layer}" for layer in layers)), tuple(rows), tuple(keys)),
            full=True,
            choices=(
                Choice("method", tuple(one.method.label for one in found)),
                Choice("after", names, len(names) - 1),
            ),
            note=note,
            command=command,
            made=made(found),
        )
    ]


def _task(found: Sequence[Analysed], stage: int) -> str:
    tasks = found[0].run.tasks
    return tasks[stage - 1] if stage <= len(tasks) else ""


def _circles(frame: "pd.DataFrame", stage: int) -> tuple[list[str], Circles]:
    """The groups in order, and what each has in each layer."""
    from dymoe.analysis import dead

    rows = frame[frame["stage"] == stage]
    summed = rows.groupby(["task", "layer", "projection", "group"], sort=False)["weight"].sum()
    weights = (summed.groupby(["group", "layer"], sort=False).mean() * 100).to_dict()
    kinds = ["layer", "projection", "group", "expert"]
    experts = rows[kinds].drop_duplicates().groupby(["group", "layer"], sort=False).size().to_dict()
    gone = dead(frame, stage).groupby(["group", "layer"], sort=False).size().to_dict()
    groups = [str(group) for group in dict.fromkeys(rows["group"])]
    return groups, {
        (str(group), int(layer)): (float(weight), int(gone.get((group, layer), 0)), int(experts[group, layer]))
        for (group, layer), weight in weights.items()
    }


def _cell(circle: tuple[float, int, int] | None) -> str:
    if circle is None:
        return "–"
    weight, gone, _ = circle
    return f"{number(weight)} ✕{gone}" if gone else number(weight)


def _plot(
    one: Analysed, stage: int, groups: Sequence[str], layers: Sequence[int], circles: Circles, keys: Keys
) -> Plot:
    """One stage of one method."""
    there = [(group, layer) for group in groups for layer in layers if (group, layer) in circles]
    values = [circles[place] for place in there]
    traces = [
        go.Scatter(
            x=[layer for _, layer in there],
            y=[groups.index(group) for group, _ in there],
            mode="markers",
            marker={
                "size": [LARGEST * math.sqrt(weight / 100) for weight, *_ in values],
                "sizemin": 0.5,
                "opacity": 0.85,
                "color": [f"var(--m{groups.index(group) % COLOURS})" for group, _ in there],
                "line": {"width": 0},
            },
            customdata=[[number(weight), gone, experts] for weight, gone, experts in values],
            hovertemplate="layer %{x}: %{customdata[0]} % of the weight, %{customdata[1]} of %{customdata[2]} experts "
            "dead<extra></extra>",
        )
    ]
    marked = [place for place, (_, gone, _) in zip(there, values, strict=True) if gone]
    if marked:
        traces.append(
            go.Scatter(
                x=[layer for _, layer in marked],
                y=[groups.index(group) for group, _ in marked],
                mode="markers",
                marker={
                    "symbol": "x-thin",
                    "size": [CROSS * circles[place][1] / circles[place][2] for place in marked],
                    "line": {"width": 1.25, "color": "var(--ink)"},
                },
                hoverinfo="skip",
            )
        )
    label = room(groups)
    return build(
        f"{one.method.label}, after stage {stage}",
        f"Activation of each group in each layer, {one.method.label}, stage {stage}",
        traces,
        70 + 32 * len(groups),
        keys,
        round(label) + 40 + COLUMN * len(layers),
        margin={"l": 14 + label, "r": 12, "t": 8, "b": 44},
        xaxis={
            "title": {"text": "layer"},
            "range": [layers[0] - 0.7, layers[-1] + 0.7],
            "dtick": 1 if len(layers) < 12 else 5,
            "showgrid": False,
            "zeroline": False,
            "automargin": False,
        },
        yaxis={
            **positions([escape(group) for group in groups]),
            "range": [-0.7, len(groups) - 0.3],
            "zeroline": False,
            "automargin": False,
        },
    )
