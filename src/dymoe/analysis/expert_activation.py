"""How much each expert is used by each task, which experts are dead, and what pruning would remove."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dymoe.analysis.figures import Figure, Key, look, positions, room, scatter
from dymoe.analysis.runs import Analysed
from dymoe.analysis.storage import joined
from dymoe.methods.pruning import keep
from dymoe.numbers import number

if TYPE_CHECKING:
    from torch import Tensor

    from dymoe.adapter import LayerRouting
    from dymoe.analysis.learned import Learned, Tell

EXPERT = ["layer", "projection", "group"]  # with its number within the group, what names an expert
DEAD = 1e-3  # mean routing weight
# Diameter in pixels of a group that gets all of a layer's weight, and of a layer's column where the page is narrow.
LARGEST = 28
CROSS = 12  # of a cross where all experts are dead
COLUMN = 20


# ---------------------------------------------------------------- the frame


def activation(
    run: "str | Path | Learned",
    samples: int | None = None,
    stages: Sequence[int] | None = None,
    tell: "Tell | None" = None,
) -> pd.DataFrame:
    """How each task's tokens use each expert, at every stage from the one that learned the task (Figure 4 in numbers).

    Prompt and reference answer go through the model in one forward pass; all their tokens count.

    Args:
        run: a run folder, or a run that is open.
        samples: the first so many of each task's samples; those that the run was asked when None.
        stages: the stages to look at, from 1; all when None.
        tell: called as the work goes on.

    Returns:
        One row per stage, task, layer, projection, group and expert; columns as in docs/analysis.md.

    Raises:
        DymoeError: see `open_run`; no such stage; a method that routes nothing.
    """
    from dymoe.analysis.learned import open_run

    learned = open_run(run)
    learned.require_routing()
    frames = []
    for stage in learned.chosen_stages(stages):
        for task, first in learned.chosen_tasks(None):
            if first.index > stage:
                continue
            learned.activate(stage)
            sums: Sums = {}
            for batch in learned.batches(task, samples, tell, f"stage {stage}, {task.name}"):
                learned.observe(batch, _observer(batch["attention_mask"], sums))
            frames.append(pd.DataFrame(_rows(sums)).assign(task=task.name, stage=stage))
    return joined("activation", frames)


# Layer -> its groups, their experts, and (4, experts) sums over tokens: routing weight, tokens with any weight, tokens
# whose top expert it is, tokens.
Sums = dict[str, tuple[tuple[str, ...], tuple[int, ...], "Tensor"]]


def _observer(mask: "Tensor", sums: Sums) -> "Callable[[LayerRouting], None]":
    """What adds the layers of one forward pass to `sums`; `mask` (samples, tokens) is 0 for padding."""
    import torch

    counted = mask.bool().reshape(-1)

    def add(routing: "LayerRouting") -> None:
        if routing.weights[..., 0].numel() != len(counted):
            return  # it sees other tokens, as a vision tower's does
        weights = routing.weights.reshape(len(counted), -1)[counted].double()
        largest, expert = weights.max(-1)
        top = torch.nn.functional.one_hot(expert, weights.shape[-1]) * (largest > 0).unsqueeze(-1)
        total = torch.stack([part.double().sum(0) for part in (weights, weights > 0, top, torch.ones_like(weights))])
        before = sums[routing.layer][-1] if routing.layer in sums else 0
        sums[routing.layer] = (routing.groups, routing.sizes, before + total.cpu())

    return add


def _rows(sums: Sums) -> Iterator[dict[str, Any]]:
    """The frame's rows, without task and stage."""
    from dymoe.adapter.trace import place_of

    for name, (groups, sizes, totals) in sums.items():
        layer, projection = place_of(name)
        by_group = (totals[:3] / totals[3]).split(list(sizes), dim=1)
        for group, values in zip(groups, by_group, strict=True):
            for expert, (weight, active, top) in enumerate(values.T.tolist()):
                row = {"layer": layer, "projection": projection, "group": group, "expert": expert}
                yield {**row, "weight": weight, "active": active, "top": top}


# ---------------------------------------------------------------- what it says


def dead(frame: pd.DataFrame, stage: int | None = None, below: float = DEAD) -> pd.DataFrame:
    """Experts that no task seen by a stage uses: their mean routing weight is below `below` on each of them.

    Args:
        frame: of `activation`.
        stage: the last one in the frame when None.
        below: 0.001 by default. At temperature 0.01 a softmax gives nearly every expert some weight, so that none
            would count as dead for having exactly none.

    Returns:
        Columns layer, projection, group, expert and weight, the largest mean weight that a task gives it.
    """
    rows = frame[frame["stage"] == (frame["stage"].max() if stage is None else stage)]
    most = rows.groupby([*EXPERT, "expert"], sort=False, as_index=False)["weight"].max()
    return most[most["weight"] < below].reset_index(drop=True)


def pruned(frame: pd.DataFrame, share: float) -> pd.DataFrame:
    """What the plugin `pruning` would remove from each group after its stage, by its own criterion.

    The weights are those of the task's evaluation samples, prompts and answers; the plugin measures on training
    prompts. A group that several tasks share is judged by the mean over those of its first stage.

    Args:
        frame: of `activation`.
        share: of each layer's experts of the group, for example 1/8 and 1/4.

    Returns:
        Columns stage, layer, projection, group, expert and weight (mean routing weight on the new task's tokens).
    """
    used = _new_use(frame)
    gone = [
        part.drop(index=part.index[keep(part["weight"].tolist(), share)])
        for _, part in used.groupby(EXPERT, sort=False)
    ]
    return pd.concat([used.head(0), *gone], ignore_index=True)


def _new_use(frame: pd.DataFrame) -> pd.DataFrame:
    """Each expert's weight on the tokens of what its group was first trained on, at that stage.

    A group whose first stage is not in the frame is left out.
    """
    begun = frame.groupby("group")["stage"].transform("min")  # a group's first stage
    learned = frame.groupby("task")["stage"].transform("min")  # a task is asked from the stage that learned it
    alone = frame["group"].groupby(begun).transform("nunique") == 1  # a stage adds one group, so none is missing before
    first = frame[(frame["stage"] == begun) & (begun == learned) & alone]
    return first.groupby(["stage", *EXPERT, "expert"], sort=False, as_index=False)["weight"].mean()


def pruned_share(frame: pd.DataFrame, share: float) -> pd.DataFrame:
    """How many experts `pruned` removes from each group and how much of the new task's routing goes with them.

    Returns:
        Columns group, experts (removed, over all layers), of (the group's experts), weight (mean over layers and
        projections of the removed experts' summed weight), group_weight (the same of all the group's experts).
    """
    used, gone = _new_use(frame).groupby("group", sort=False), pruned(frame, share).groupby("group", sort=False)
    linears = used[["layer", "projection"]].apply(lambda part: len(part.drop_duplicates()))
    shares = pd.DataFrame(
        {
            "experts": gone["expert"].count(),
            "of": used["expert"].count(),
            "weight": gone["weight"].sum() / linears,
            "group_weight": used["weight"].sum() / linears,
        }
    ).reindex(used["expert"].count().index)
    shares = shares.fillna({"experts": 0, "weight": 0.0}).astype({"experts": int})
    return shares.rename_axis("group").reset_index()


# ---------------------------------------------------------------- the figure


def tables(frame: pd.DataFrame, run: Path) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """How many experts there are and are dead after each stage, and what pruning would remove."""
    rows = []
    for stage in sorted(frame["stage"].unique()):
        part = frame[frame["stage"] == stage]
        experts = len(part.drop_duplicates(["layer", "projection", "group", "expert"]))
        rows.append({"stage": str(stage), "experts": str(experts), "dead": str(len(dead(frame, stage)))})
    yield "Experts over all layers; dead: below 0.1 % of the weight on every task", rows
    rows = []
    for name, share in (("1/8", 1 / 8), ("1/4", 1 / 4)):
        for entry in pruned_share(frame, share).to_dict("records"):
            weight = f"{entry['weight']:.1%} of {entry['group_weight']:.1%}"
            removed = f"{entry['experts']} of {entry['of']}"
            rows.append({"pruned": name, "group": entry["group"], "experts removed": removed, "weight lost": weight})
    yield "What pruning would remove after each task", rows


def figures(have: Sequence[Analysed]) -> list[Figure]:
    """Each group's weight in each layer as circles, dead experts as crosses; one plot a method and stage."""
    stages = sorted({int(stage) for one in have for stage in one.frame["stage"]})
    layers = sorted({int(layer) for one in have for layer in one.frame["layer"]})
    names = dict(enumerate(have[0].run.tasks, start=1))
    options = {stage: f"{stage} {names.get(stage, '')}" for stage in stages}
    labels = [one.label for one in have]
    figure = Figure(
        "activation",
        "Activation by group and layer",
        "Row: expert group, in the order of the tasks that added them, the first at the bottom; column: decoder "
        "layer. A circle's area is the routing weight that the group's experts get together, a mean over the test "
        "tokens of all tasks seen at that stage, over tasks and over projections. A cross marks dead experts, "
        "which no task gives a mean weight of 0.001 or more: the larger, the more of the group's experts in that "
        "layer. In the numbers, weight in percent and, after a cross, the dead experts.",
        ("group", *(f"layer {layer}" for layer in layers)),
        layout="full",
        choices={"method": labels, "after": [*options.values()]},
        chosen=(labels[0], options[stages[-1]]),
    )
    for one in have:
        for stage in sorted(one.frame["stage"].unique()):
            key = (one.label, options[int(stage)])
            circles = _circles(one.frame, stage)
            _plot(figure, one.label, stage, circles, layers, key)
            for group, rows in circles.groupby("group", sort=False):
                cells = {
                    row.layer: f"{number(row.weight)} ✕{row.dead}" if row.dead else number(row.weight)
                    for row in rows.itertuples()
                }
                values = (cells.get(layer, number(None)) for layer in layers)
                figure.row(f"{one.label}, stage {stage}: {group}", *values, key=key)
    return [figure]


def _circles(frame: pd.DataFrame, stage: int) -> pd.DataFrame:
    """Group and layer, with the weight in percent, the experts, and how many of them are dead; groups in order."""
    rows = frame[frame["stage"] == stage]
    by = ["group", "layer"]
    weight = rows.groupby(["task", "projection", *by], sort=False)["weight"].sum().groupby(by, sort=False).mean() * 100
    experts = rows.drop_duplicates([*EXPERT, "expert"]).groupby(by).size()
    counted = pd.DataFrame({"weight": weight, "experts": experts, "dead": dead(frame, stage).groupby(by).size()})
    return counted.reindex(weight.index).fillna({"dead": 0}).astype({"dead": int, "experts": int}).reset_index()


def _plot(figure: Figure, label: str, stage: int, circles: pd.DataFrame, layers: Sequence[int], key: Key) -> None:
    """One stage of one method."""
    groups = [str(group) for group in dict.fromkeys(circles["group"])]
    circles = circles.assign(row=circles["group"].map(groups.index))
    gone = circles[circles["dead"] > 0]
    hover = "layer %{x}: %{customdata[0]} % of the weight, %{customdata[1]} of %{customdata[2]} experts dead"
    traces = [
        scatter(
            look(0, ""),
            circles["layer"],
            circles["row"],
            hover,
            {
                "symbol": "circle",
                "size": [LARGEST * math.sqrt(weight / 100) for weight in circles["weight"]],
                "sizemin": 0.5,
                "opacity": 0.85,
                "color": [look(row, "").colour for row in circles["row"]],
                "line": {"width": 0},
            },
            mode="markers",
            customdata=[[number(row.weight), row.dead, row.experts] for row in circles.itertuples()],
        )
    ]
    if len(gone):
        size = gone["dead"] / gone["experts"] * CROSS
        cross = {"symbol": "x-thin", "size": size, "line": {"width": 1.25, "color": "var(--ink)"}}
        traces.append(scatter(look(0, ""), gone["layer"], gone["row"], "", cross, mode="markers", hoverinfo="skip"))
    names = room(groups)
    figure.plot(
        f"{label}, after stage {stage}",
        f"Activation of each group in each layer, {label}, stage {stage}",
        traces,
        70 + 32 * len(groups),
        key,
        round(names) + 40 + COLUMN * len(layers),
        margin={"l": 14 + names, "r": 12, "t": 8, "b": 44},
        xaxis={
            "title": {"text": "layer"},
            "range": [layers[0] - 0.7, layers[-1] + 0.7],
            "dtick": 1 if len(layers) < 12 else 5,
            "showgrid": False,
            "zeroline": False,
            "automargin": False,
        },
        yaxis={
            **positions(groups),
            "range": [-0.7, len(groups) - 0.3],
            "zeroline": False,
            "automargin": False,
        },
    )
