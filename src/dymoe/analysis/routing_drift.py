"""Where an earlier task's tokens go as later groups are added, and how that goes with what is forgotten.

Torch and the model are loaded where the frame is computed; the figures are drawn from frames without either.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dymoe.analysis.figures import Figure, Heatmap, escape, look, scatter
from dymoe.analysis.runs import Analysed, Method, divides
from dymoe.analysis.storage import joined
from dymoe.analysis.tokens import KINDS as PARTS
from dymoe.analysis.tokens import image_tokens, kinds
from dymoe.errors import DymoeError
from dymoe.evaluation.metrics import ROUNDING, AccuracyMatrix
from dymoe.learning.formats import run_results
from dymoe.numbers import number

if TYPE_CHECKING:
    from torch import Tensor

    from dymoe.adapter import LayerRouting
    from dymoe.analysis.learned import Learned, Tell

NOTHING = -1  # in place of an expert: no expert has weight
ALL = "all tokens"
FEWEST = 3  # pairs of drift and forgetting below which a correlation says nothing


# ---------------------------------------------------------------- the frame


def drift(
    run: "str | Path | Learned",
    samples: int | None = None,
    stages: Sequence[int] | None = None,
    tell: "Tell | None" = None,
) -> pd.DataFrame:
    """The weight that each task's tokens put on each group, at the stage that learned the task and at all later ones.

    Prompt and reference answer go through the model in one forward pass. The data are streamed: memory does not grow
    with the samples.

    Args:
        run: a run folder, or a run that is open.
        samples: the first so many of each task's samples; those that the run was asked when None.
        stages: the stages to look at, from 1; all when None. A task's own stage is always computed, to compare with.
        tell: called as the work goes on.

    Returns:
        One row per task, stage, layer, projection, part and group, groups in the order they were added; columns as in
        docs/analysis.md.

    Raises:
        DymoeError: see `open_run`; no such stage; a method that routes nothing.
    """
    from dymoe.analysis.learned import open_run

    learned = open_run(run)
    learned.require_routing()
    chosen, images = learned.chosen_stages(stages), image_tokens(learned.lvlm)
    frames = []
    for task, first in learned.chosen_tasks(None):
        sums: dict[int, Sums] = {stage: {} for stage in (first.index, *chosen) if stage >= first.index}
        for batch in learned.batches(task, samples, tell):
            parts = kinds(batch, images)
            top: dict[str, Tensor] = {}
            for stage in sums:
                learned.activate(stage)
                learned.observe(batch, _observer(parts, sums[stage], top, first=stage == first.index))
            if not top:
                raise DymoeError(f"{learned.path}: no wrapped layer sees the prompt's tokens, so nothing was observed")
        for stage in sums:
            if stage in chosen:
                frames.append(pd.DataFrame(_rows(sums[stage])).assign(task=task.name, stage=stage))
    return joined("drift", frames)


# Layer -> its groups, and (parts, groups + 2): routing weight by group, tokens, tokens whose top expert changed.
Sums = dict[str, tuple[tuple[str, ...], "Tensor"]]


def _observer(parts: "Tensor", sums: Sums, top: "dict[str, Tensor]", first: bool) -> "Callable[[LayerRouting], None]":
    """What adds the layers of one forward pass to `sums`.

    Args:
        parts: of every token, see `tokens.kinds`.
        sums: where to add.
        top: layer -> each token's top expert at the task's own stage; filled there, compared with later.
        first: whether this is that stage.
    """
    import torch

    member = torch.nn.functional.one_hot(parts.reshape(-1).long() + 1, len(PARTS) + 1)[:, 1:].double()  # no padding

    def add(routing: "LayerRouting") -> None:
        weights, name = routing.weights, routing.layer
        if weights[..., 0].numel() != len(member):
            return  # it sees other tokens, as a vision tower's does
        weights = weights.reshape(len(member), -1).double()
        largest, expert = weights.max(-1)
        expert = torch.where(largest > 0, expert, NOTHING)
        if first:
            top[name] = expert
        # A layer may get its first experts at a later stage: before, none was a token's top expert.
        changed = expert != top.get(name, torch.full_like(expert, NOTHING))
        by_group = [part.sum(-1) for part in weights.split(list(routing.sizes), dim=-1)]
        values = torch.stack([*by_group, torch.ones_like(largest), changed.double()], dim=-1)
        before = sums[name][1] if name in sums else 0
        sums[name] = (routing.groups, before + (member.T @ values).cpu())

    return add


def _rows(sums: Sums) -> Iterator[dict[str, Any]]:
    """The frame's rows of one task at one stage, without both."""
    from dymoe.adapter.trace import place_of

    for name, (groups, by_part) in sums.items():
        layer, projection = place_of(name)
        for part, (*weights, tokens, changed) in zip(PARTS, by_part.tolist(), strict=True):
            if not tokens:
                continue
            for group, weight in zip(groups, weights, strict=True):
                row = {"layer": layer, "projection": projection, "part": part, "group": group}
                yield {**row, "weight": weight / tokens, "tokens": int(tokens), "changed": changed / tokens}


# ---------------------------------------------------------------- what it says


def later_weight(frame: pd.DataFrame) -> pd.DataFrame:
    """The weight that tokens put on groups added after their task's own: one row for each place and part.

    Args:
        frame: of `drift`.

    Returns:
        Columns task, stage, layer, projection, part, later (0..1), changed (0..1), tokens. Tasks that have no drift
        (see `dymoe.evaluation.metrics.drift`) are left out.
    """
    order = {group: index for index, group in enumerate(dict.fromkeys(frame["group"]))}
    home = frame["task"].map(order)
    after = frame["weight"].where(frame["group"].map(order) > home, 0.0)
    by = ["task", "stage", "layer", "projection", "part"]
    cells = (
        frame.assign(later=after, home=home)
        .groupby(by, sort=False, as_index=False)
        .agg(
            later=("later", "sum"),
            sum=("weight", "sum"),
            home=("home", "first"),
            changed=("changed", "first"),
            tokens=("tokens", "first"),
        )
    )
    divided = cells.groupby("task")["sum"].transform("max") <= 1 + ROUNDING
    return cells[divided & cells["home"].notna()].drop(columns=["sum", "home"]).reset_index(drop=True)


def mean_over(cells: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """`later` and `changed`: means over tokens within each layer and projection, then over these.

    Args:
        cells: of `later_weight`.
        by: columns that the result has one row for each value of.
    """
    linears = [*by, *(column for column in ("layer", "projection") if column not in by)]
    weighted = cells.assign(later=cells["later"] * cells["tokens"], changed=cells["changed"] * cells["tokens"])
    sums = weighted.groupby(linears, sort=False)[["later", "changed", "tokens"]].sum()
    means = sums[["later", "changed"]].div(sums["tokens"], axis=0)
    return means.groupby(list(by), sort=False).mean().reset_index()


def drift_by_task(frame: pd.DataFrame) -> pd.DataFrame:
    """The drift of each task at each stage (`evaluation.metrics.drift`), a mean over tokens and wrapped layers.

    Args:
        frame: of `drift`.

    Returns:
        Columns task, stage, drift (0..1), changed (0..1); tasks without drift (no group of their own) are left out.
    """
    return mean_over(later_weight(frame), ["task", "stage"]).rename(columns={"later": "drift"})


def drift_and_forgetting(run: str | Path, frame: pd.DataFrame) -> pd.DataFrame:
    """Drift and forgetting of every earlier task at the last stage that both are known for.

    Args:
        run: the run folder; results.json holds the accuracies.
        frame: of `drift`.

    Returns:
        Columns task, stage, drift (0..1), changed (0..1), forgetting (percentage points, best earlier minus final
        accuracy).

    Raises:
        DymoeError: results.json is broken.
    """
    results: Any = run_results(run) if (Path(run) / "results.json").is_file() else {}
    matrix, names = results.get("matrix") or [], results.get("tasks") or []
    drifts = drift_by_task(frame)
    known = drifts[drifts["stage"] <= len(matrix)]
    if known.empty:
        return pd.DataFrame(columns=["task", "stage", "drift", "changed", "forgetting"])
    last = int(known["stage"].max())
    forgetting = AccuracyMatrix(matrix[:last], names[:last]).forgetting_by_task()
    earlier = known[(known["stage"] == last) & known["task"].isin(names[: last - 1])].reset_index(drop=True)
    return earlier.assign(forgetting=earlier["task"].map(forgetting))


def correlation(pairs: pd.DataFrame) -> dict[str, float | int | None]:
    """Correlation of drift with forgetting over tasks.

    Args:
        pairs: of `drift_and_forgetting`.

    Returns:
        tasks (how many), pearson and spearman; the two are None with fewer than three tasks or where one side is
        constant.
    """
    result: dict[str, float | int | None] = {"tasks": len(pairs), "pearson": None, "spearman": None}
    if len(pairs) >= FEWEST and pairs["drift"].nunique() > 1 and pairs["forgetting"].nunique() > 1:
        result["pearson"] = float(pairs["drift"].corr(pairs["forgetting"]))
        result["spearman"] = float(pairs["drift"].rank().corr(pairs["forgetting"].rank()))
    return result


def correlation_line(result: Mapping[str, Any]) -> str:
    """The correlation of drift with forgetting in one line."""
    if result["pearson"] is None:
        return f"Drift and forgetting: earlier tasks too few, or too alike, to correlate ({result['tasks']})"
    return (
        f"Drift and forgetting over {result['tasks']} earlier tasks: Pearson {result['pearson']:.2f}, "
        f"Spearman {result['spearman']:.2f}"
    )


def tables(frame: pd.DataFrame, run: Path) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """For each task at the last stage: drift by part, changed top experts, forgetting; below, how these go together."""
    last, pairs = frame[frame["stage"] == frame["stage"].max()], drift_and_forgetting(run, frame)
    parts = {kind: drift_by_task(last[last["part"] == kind]).set_index("task")["drift"] for kind in PARTS}
    lost = pairs.set_index("task")["forgetting"]
    rows = []
    for entry in drift_by_task(last).to_dict("records"):
        task = entry["task"]
        by_part = {kind: f"{values[task]:.1%}" if task in values else "–" for kind, values in parts.items()}
        forgotten = f"{lost[task]:.1f}" if task in lost else "–"
        shares = {"drift": f"{entry['drift']:.1%}", **by_part, "changed top expert": f"{entry['changed']:.1%}"}
        rows.append({"task": task, **shares, "forgetting": forgotten})
    yield "Routing drift", rows
    yield correlation_line(correlation(pairs)), []


# ---------------------------------------------------------------- figures from the stages' routing.json


def over_stages(methods: Sequence[Method]) -> Figure | None:
    """Weight that old tasks' tokens put on newer groups, over stages."""
    routed = [method for method in methods if any(stat for row in method.drift() for stat in row)]
    if not routed:
        return None
    last = max(method.stages for method in routed)
    figure = Figure(
        "routing-drift",
        "Routing drift over stages",
        "Routing drift: the share of routing weight that the test tokens of old tasks put on expert groups added after "
        "their own, averaged over the old tasks. At 0 old tasks are served by the experts they were learned with; the "
        "higher, the more newer experts interfere.",
        ("method: task", *(f"stage {t}" for t in range(2, last + 1))),
        legend=[method.look for method in routed],
    )
    traces = []
    for method in routed:
        by_stage = pd.DataFrame(method.drift()[1:]).map(lambda stat: stat.mean if stat else None).astype(float)
        stages, means = by_stage.index + 2, by_stage.mean(axis=1)
        traces.append(scatter(method.look, stages, means, "%{fullData.name}, stage %{x}: %{y:.1f} %", {"size": 8}))
        figure.row(f"{method.label}: mean of old tasks", *map(number, means))
        for i, task in enumerate(method.tasks[: method.stages - 1]):
            figure.row(f"{method.label}: {task}", *map(number, by_stage[i]))
    xaxis = {"dtick": 1, "title": {"text": "stage"}, "showgrid": False, "range": [1.8, last + 0.2]}
    yaxis = {"title": {"text": "weight on newer groups (%)"}, "rangemode": "tozero"}
    figure.plot("", "Routing drift of each method over stages", traces, 280, xaxis=xaxis, yaxis=yaxis)
    return figure


def maps(methods: Sequence[Method]) -> Figure | None:
    """Where each task's tokens go at the last stage: weight on every group, of each method's first run."""
    figure = Figure(
        "routing-maps",
        "Where tokens go",
        "Row: the task whose test tokens are routed; column: the expert group that the weight goes to, in the order "
        "the groups were added; each row sums to 100 %, or less where layers have no experts. Weight to the right of "
        "the diagonal goes to groups that were added after the task was learned: that is routing drift.",
    )
    groups: list[str] = []
    for method in methods:
        run = method.runs[0]
        stages = [stage for stage in run.routing if stage <= run.stages and divides(run.routing[stage])]
        if not stages:
            continue
        frame = run.routing[max(stages)] * 100
        frame = frame.loc[[task for task in run.tasks if task in frame.index]]
        title = f"{method.label}, seed {run.seed}, stage {max(stages)}"
        label, hover = f"Routing weight of tasks on groups: {title}", "tokens of {row} put {value} % on group {column}"
        figure.heatmap(Heatmap(title, label, frame, hover), f"{method.label}: ")
        groups = max(groups, list(frame), key=len)
    figure.head = ("method: task", *groups)
    return figure if figure.panels else None


# ---------------------------------------------------------------- figures of the frame

Cells = list[tuple[Analysed, pd.DataFrame]]


def figures(have: Sequence[Analysed]) -> list[Figure]:
    """By part and stage, by layer, changed top experts, and beside what was forgotten; none where no task has drift."""
    known = [(one, later_weight(one.frame)) for one in have]
    known = [(one, cells) for one, cells in known if len(cells)]
    return [_by_part(known), _by_layer(known), _changed(known), _beside_forgetting(known)] if known else []


def _last(known: Cells) -> int:
    return max(int(cells["stage"].max()) for _, cells in known)


def _by_part(known: Cells) -> Figure:
    last = _last(known)
    looks = [look(index, part) for index, part in enumerate(PARTS)]
    figure = Figure(
        "drift-parts",
        "Routing drift by part of the input",
        "One plot for each task: the routing weight in percent that its test tokens put on groups added after its own, "
        "against the stage; image tokens, the instruction's and the answer's apart (a mean over tokens, then over "
        "layers). A line that rises says that newer experts take over the old task's tokens.",
        ("method: task, part", *(f"stage {t}" for t in range(1, last + 1))),
        legend=looks,
        choices={"method": [one.label for one, _ in known]},
        layout="",
    )
    for one, cells in known:
        means = mean_over(cells, ["task", "part", "stage"])
        for task in one.run.tasks:
            mine = means[means["task"] == task]
            if mine["stage"].nunique() < 2:
                continue
            traces = []
            for part in looks:
                values = (100 * mine[mine["part"] == part.label].set_index("stage")["later"]).to_dict()
                if values:
                    hover = f"{part.label} tokens, stage %{{x}}: %{{y:.1f}} %"
                    traces.append(scatter(part, [*values], [*values.values()], hover))
                    cells_ = (number(values.get(t)) for t in range(1, last + 1))
                    figure.row(f"{one.label}: {task}, {part.label}", *cells_, key=(one.label,))
            label = f"Weight of {task}'s tokens on later groups over stages, {one.label}"
            figure.small_plot(task, label, traces, last, (one.label,))
    return figure


def _grids(known: Cells) -> Iterator[tuple[Analysed, str, pd.DataFrame]]:
    """Of each method the cells of all its tokens, then those of each part."""
    for one, cells in known:
        yield one, ALL, cells
        for part in PARTS:
            if len(rows := cells[cells["part"] == part]):
                yield one, part, rows


def _grid(cells: pd.DataFrame, value: str, rows: str, columns: str) -> pd.DataFrame:
    """Mean values in percent by two columns of `cells`, NaN where there are none."""
    return mean_over(cells, [rows, columns]).pivot_table(index=rows, columns=columns, values=value) * 100


def _by_layer(known: Cells) -> Figure:
    tasks = known[0][0].run.tasks
    figure = Figure(
        "drift-layers",
        "Routing drift by layer",
        "Row: decoder layer, from the first at the top; column: task. The weight in percent that the task's test "
        "tokens put on groups added after its own at the last stage. Strongly coloured rows are the layers where "
        "routing drifts.",
        ("method: layer", "part", *tasks[:-1]),
        choices={"method": [one.label for one, _ in known], "tokens": (ALL, *PARTS)},
        layout="",
    )
    for one, part, cells in _grids(known):
        last = int(cells["stage"].max())
        grid = _grid(cells[cells["stage"] == last], "later", "layer", "task")
        grid = grid[[task for task in tasks[: last - 1] if task in grid]]
        title = f"{one.label}, after stage {last}: {part}"
        label = f"Weight on later groups by layer and task, {part}, {one.label}"
        hover = "layer {row}: tokens of {column} put {value} % on later groups"
        key, small = (one.label, part), len(grid) > 12
        heatmap = Heatmap(title, label, grid, hover, key, numbered=False, small=small)
        figure.heatmap(heatmap, f"{one.label}: layer ", part)
    return figure


def _changed(known: Cells) -> Figure:
    tasks = known[0][0].run.tasks
    figure = Figure(
        "drift-changed",
        "Changed top experts",
        "Row: task; column: the task learned since. The share of the row's test tokens, in percent, whose top expert "
        "is no longer the one it was when the task had just been learned, a mean over layers. 0: every token is served "
        "as it was.",
        ("method: task", "part", *(f"stage {t}" for t in range(2, _last(known) + 1))),
        choices={"method": [one.label for one, _ in known], "tokens": (ALL, *PARTS)},
        layout="",
    )
    for one, part, cells in _grids(known):
        last = int(cells["stage"].max())
        later = cells[cells["stage"] > cells["task"].map(tasks.index) + 1]
        grid = _grid(later, "changed", "task", "stage").reindex(columns=range(2, last + 1))
        grid = grid.loc[[task for task in tasks[: last - 1] if task in grid.index]].set_axis(tasks[1:last], axis=1)
        label = f"Share of changed top experts by task and stage, {part}, {one.label}"
        hover = "{row}: {value} % of tokens have another top expert after {column}"
        heatmap = Heatmap(f"{one.label}: {part}", label, grid, hover, (one.label, part), first=2)
        figure.heatmap(heatmap, f"{one.label}: ", part)
    return figure


def _beside_forgetting(known: Cells) -> Figure:
    figure = Figure(
        "drift-forgetting",
        "Does drift go with forgetting?",
        head=("method: task", "drift (%)", "forgetting (points)"),
        legend=[one.method.look for one, _ in known],
    )
    traces, sentences, every = [], [], []
    for one, _ in known:
        pairs = drift_and_forgetting(one.run.path, one.frame)
        every.append(pairs)
        percent = pairs["drift"] * 100
        traces.append(
            scatter(
                one.method.look,
                percent,
                pairs["forgetting"],
                "%{fullData.name}, %{text}: drift %{x:.1f} %, lost %{y:.1f} points",
                {"size": 10},
                text=[escape(task) for task in pairs["task"]],
                mode="markers+text" if len(known) == 1 else "markers",
                textposition="top center",
                textfont={"size": 11, "color": "var(--muted)"},
                cliponaxis=False,
            )
        )
        for task, weight, lost in zip(pairs["task"], percent, pairs["forgetting"], strict=True):
            figure.row(f"{one.label}: {task}", number(weight), number(lost, sign=True))
        sentences.append(f"{one.label} {_correlation(pairs)}")
    if len(known) > 1:
        sentences.append(f"all together {_correlation(pd.concat(every))}")
    figure.caption = (
        "A point is a task of a method: to the right, the weight its test tokens put on later groups at the last "
        "stage; upwards, the points it lost since its best stage. If drift is what forgets, the points rise to the"
        f" right. Correlation over tasks (Pearson r, Spearman ρ): {'; '.join(sentences)}. A correlation over "
        "so few tasks says little by itself."
    )
    axes: dict[str, Any] = {
        "xaxis": {"title": {"text": "weight on later groups (%)"}, "rangemode": "tozero", "showgrid": False},
        "yaxis": {"title": {"text": "forgetting (points)"}},
    }
    margin = {"l": 8, "r": 40, "t": 24, "b": 8}
    figure.plot("", "Drift and forgetting of each task", traces, 340, margin=margin, **axes)
    return figure


def _correlation(pairs: pd.DataFrame) -> str:
    result = correlation(pairs)
    if result["pearson"] is None:
        return "– (too few or too equal)"
    return f"r {number(result['pearson'], 2, sign=True)}, ρ {number(result['spearman'], 2, sign=True)}"
