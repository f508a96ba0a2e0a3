"""How routing changed while a run learned: token types, loss terms and entropy, from what its trainer wrote down."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from dymoe.analysis.figures import Figure, Trace, escape, look, room, scatter
from dymoe.analysis.runs import Analysed, stage_folders
from dymoe.analysis.storage import COLUMNS
from dymoe.errors import DymoeError
from dymoe.numbers import number

TYPES = {"share_new": "new", "share_ambiguous": "ambiguous", "share_old": "old"}
WEIGHT = {"new_group_weight": "weight on the new group"}
TERMS = {name: name.replace("_", " ") for name in ("load_balance", "exclusivity", "specialization")}
ENTROPY = {"entropy": "entropy"}
# How the areas of the types are hatched, so that colour is not the only sign, and the characters for it.
PATTERNS = {"-": "▤", "/": "▨", "x": "▦"}


def dynamics(run: str | Path) -> pd.DataFrame:
    """Token types, routing weights and loss terms of every layer over the steps of every task.

    Nothing is computed: the trainer writes a line every `training.dynamics_every` steps into the stage's
    dynamics.jsonl. A run that is at work can be read at any moment.

    Args:
        run: a run folder.

    Returns:
        One row per stage, step and wrapped layer; columns as in docs/analysis.md. Without rows where nothing was
        written: the gate has no scores, or `training.dynamics_every` is 0.

    Raises:
        DymoeError: it is no run folder, or a line is broken.
    """
    from dymoe.adapter.trace import place_of
    from dymoe.learning.dynamics import lines
    from dymoe.learning.folder import StageFolder

    path = Path(run)
    if not (path / "run.yaml").is_file():
        raise DymoeError(f"{path}: no run.yaml here; give a run folder, as `dymoe run` makes it")
    rows = []
    for stage, task, folder in stage_folders(path):
        for line in lines(StageFolder(folder).dynamics):
            for name, values in line["layers"].items():
                layer, projection = place_of(name)
                row = {"task": task, "stage": stage, "step": line["step"], "layer": layer, "projection": projection}
                rows.append({**row, **dict(zip(line["values"], values, strict=True))})
    return pd.DataFrame(rows, columns=[*COLUMNS["dynamics"]])


def tables(frame: pd.DataFrame, run: Path) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Token types, weight on the new group, entropy and specialization at the first and last logged step of each task.

    Raises:
        DymoeError: nothing was logged.
    """
    if frame.empty:
        raise DymoeError(
            f"{run}: no dynamics were logged; the run's gate has no scores, its training.dynamics_every is 0, or it is "
            "older than this log"
        )
    rows = []
    for (stage, task), part in frame.groupby(["stage", "task"], sort=False):
        for step in sorted({part["step"].min(), part["step"].max()}):
            now = part[part["step"] == step]
            shares = {name: f"{now[f'share_{name}'].mean():.1%}" for name in ("new", "ambiguous", "old")}
            rest = {"entropy": f"{now['entropy'].mean():.2f}", "specialization": f"{now['specialization'].mean():.3f}"}
            weight = f"{now['new_group_weight'].mean():.1%}"
            row = {"stage": str(stage), "task": task, "step": str(step), **shares, "new group's weight": weight}
            rows.append({**row, **rest})
    yield "Routing at the first and last logged step of each task, mean over layers", rows


def figures(have: Sequence[Analysed]) -> list[Figure]:
    """Token types with the weight on the new group, and loss terms with entropy; two plots of each a method."""
    choices = {"method": [one.label for one in have]}
    types = Figure(
        "token-types",
        "Training dynamics: token types",
        "The types of the training tokens over the optimizer steps, the tasks one behind the other, each with its "
        "own count of steps: the share of new, ambiguous and old tokens in percent (a mean over layers), and the "
        "share of the routing weight that goes to the group in training. DyMoE's guidance keeps ambiguous and old "
        "tokens off the new experts.",
        ("method: task", "step", *TYPES.values(), *WEIGHT.values()),
        legend=[look(index, name, [*PATTERNS.values()][index]) for index, name in enumerate(TYPES.values())],
        choices=choices,
    )
    terms = Figure(
        "loss-terms",
        "Training dynamics: loss terms and entropy",
        "The routing losses before their weights, and the entropy of the routing weights in nats (a mean over "
        "tokens and layers), over the same steps. Entropy 0: each token goes to one expert; the higher, the more "
        "experts share it. A term that a method does not have stays at 0.",
        ("method: task", "step", *TERMS.values(), *ENTROPY.values()),
        legend=[look(index, name) for index, name in enumerate(TERMS.values())],
        choices=choices,
    )
    for one in have:
        means = _over_layers(one.frame)
        percent = means.assign(**{name: means[name] * 100 for name in (*TYPES, *WEIGHT)})
        _plot(types, one.label, percent, TYPES, "Share of tokens by type (%)", stacked=True)
        _plot(types, one.label, percent, WEIGHT, "Routing weight on the new group (%)")
        _plot(terms, one.label, means, TERMS, "Loss terms")
        _plot(terms, one.label, means, ENTROPY, "Entropy (nats)")
        for figure, values, names, digits in (
            (types, percent, (*TYPES, *WEIGHT), 1),
            (terms, means, (*TERMS, *ENTROPY), 3),
        ):
            for row in values.to_dict("records"):
                cells = (number(row[name], digits) for name in names)
                figure.row(f"{one.label}: {row['task']}", str(row["step"]), *cells, key=(one.label,))
    return [types, terms]


def _over_layers(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over layers and projections by stage, task and step; `at` counts steps on over the tasks."""
    columns = [*TYPES, *WEIGHT, *TERMS, *ENTROPY]
    means = frame.groupby(["stage", "task", "step"], as_index=False)[columns].mean()
    means = means.sort_values(["stage", "step"], ignore_index=True)
    lengths = means.groupby("stage")["step"].max()
    return means.assign(at=means["step"] + means["stage"].map(lengths.cumsum() - lengths))


def _plot(
    figure: Figure, label: str, means: pd.DataFrame, names: dict[str, str], title: str, stacked: bool = False
) -> None:
    """Lines (or stacked areas) over all steps, a gap and a thin rule between tasks."""
    stages = [part for _, part in means.groupby("stage", sort=True)]
    tasks = [str(part["task"].iloc[0]) for part in stages]
    traces: list[Trace] = []
    for index, (name, words) in enumerate(names.items()):
        one = look(index, words)
        for stage, (task, part) in enumerate(zip(tasks, stages, strict=True)):
            hover = f"{words}, {escape(task)}, step %{{customdata}}: %{{y:.3g}}"
            area: Trace = {}
            if stacked:
                # Areas must not lean on those of another task.
                pattern: Trace = {"shape": [*PATTERNS][index], "fgcolor": one.colour, "bgcolor": "var(--paper)"}
                pattern |= {"fgopacity": 0.8, "size": 6, "solidity": 0.4}
                area = {"stackgroup": f"stage{stage}", "fillcolor": one.colour, "fillpattern": pattern, "mode": "lines"}
            traces.append(scatter(one, part["at"], part[name], hover, {"size": 5}, customdata=part["step"], **area))
    ends = [float(part["at"].max()) + 0.5 for part in stages]
    starts = [0.5, *ends[:-1]]
    rule = {"type": "line", "xref": "x", "yref": "paper", "y0": 0, "y1": 1}
    rule["line"] = {"color": "var(--muted)", "width": 1, "dash": "dot"}
    figure.plot(
        f"{label}: {title}",
        f"{title} over training steps, {label}",
        traces,
        280,
        (label,),
        margin={"l": 44, "r": 12, "t": 8, "b": 16 + 0.7 * room(tasks)},
        shapes=[{**rule, "x0": end, "x1": end} for end in ends[:-1]],
        xaxis={
            "tickmode": "array",
            "tickvals": [(start + end) / 2 for start, end in zip(starts, ends, strict=True)],
            "ticktext": [escape(task) for task in tasks],
            "tickangle": -45,
            "ticklabeloverflow": "allow",
            "automargin": False,
            "showgrid": False,
            "zeroline": False,
            "range": [0.5, ends[-1]],
        },
        yaxis={"range": [0, 101]} if stacked else {"rangemode": "tozero"},
    )
