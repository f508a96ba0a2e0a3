"""The token's dilemma: two tasks, the second learned with the new experts open to some tokens alone.

What each strategy taught the new task, what it cost the old one, and the drift: in a frame, a sentence and figures.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dymoe.analysis.figures import Figure, Look, Trace, error_bars, escape, listed, look, scatter
from dymoe.analysis.storage import COLUMNS
from dymoe.errors import DymoeError
from dymoe.evaluation.metrics import AccuracyMatrix
from dymoe.learning.formats import read_results
from dymoe.numbers import Stat, number
from dymoe.sweep.sweep import Sweep, is_sweep, load_sweep

GUIDANCE = "settings.guidance"
# Which tokens reach the new experts while the second task is learned -> the mask that does it (`dymoe.routing`).
STRATEGIES = {
    "new": "protect",
    "ambiguous": "only-ambiguous",
    "old": "only-old",
    "all": "none",
    "none": "no-token",
}
# What a strategy's name means to a reader who has not read the documentation.
TOKENS = {
    "new": "new tokens",
    "ambiguous": "ambiguous tokens",
    "old": "old tokens",
    "all": "all tokens",
    "none": "no token",
}
ALL = "all pairs"
MEASURES = ("new_task_accuracy", "old_task_before", "old_task_after", "forgetting", "drift")


def dilemma_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep of a dilemma: a sweep file as it is, or a recipe of two tasks under every strategy.

    Args:
        path: a sweep file whose rows vary ``settings.guidance``, or a recipe.
        overrides: keys of the sweep, ``--seeds`` ``[0, 1]``.

    Raises:
        DymoeError: a broken file, an unknown key, or a recipe that does not learn two tasks by a method with guidance.
    """
    path = Path(path)
    if is_sweep(path):
        return load_sweep(path, overrides)
    from dymoe.learning.recipe import load_recipe, parse_overrides, set_key
    from dymoe.methods.settings import build
    from dymoe.tasks import task_names

    recipe = load_recipe(path)
    names = task_names(recipe.stream, recipe.order, recipe.tasks)
    if len(names) != 2 or recipe.method != "dymoe":
        raise DymoeError(
            f"{path}: tasks: the token's dilemma needs two tasks learned by method dymoe, this recipe has "
            f"{len(names)} by {recipe.method}; set tasks and method, or give a sweep (pocket/dilemma)"
        )
    row = {"recipe": path.name, "label": " -> ".join(names), "vary": {GUIDANCE: [*STRATEGIES.values()]}}
    output = str(Path("runs") / f"{path.stem}-dilemma")
    values: dict[str, Any] = {"title": "Token's dilemma", "recipes": [row], "output": output}
    values.update(seeds=[recipe.seed], orders=[recipe.order], instructions=[recipe.instructions])
    for key, value in parse_overrides(overrides).items():
        set_key(values, key, value)
    sweep = build(Sweep, values, str(path))
    sweep.results = sweep.results or f"{sweep.output}.jsonl"
    sweep.table = sweep.table or f"{sweep.output}.md"
    return sweep


def dilemma(source: str | Path | Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """What each strategy taught and what it cost, from the records of a sweep.

    Args:
        source: a sweep's results (JSON), the sweep file or recipe they come from, or the records themselves. Learning
            is `dymoe analyze dilemma`'s or `dymoe sweep`'s work; here finished records are read.

    Returns:
        One row per pair of tasks, strategy and seed: pair ("A -> B"), seed, strategy (a key of `STRATEGIES`),
        new_task_accuracy (percent, on B after B), old_task_before and old_task_after (percent, on A before and after
        B), forgetting (points, before minus after), drift (0..1, weight of A's tokens on B's group at the end; NaN
        where the run has none).

    Raises:
        DymoeError: no such file, or a record that is not of two tasks under one of the strategies.
    """
    if isinstance(source, str | Path):
        file = Path(source) if Path(source).suffix == ".jsonl" else Path(dilemma_sweep(source).results)
        if not file.is_file():
            raise DymoeError(f"{file}: no such results; learn them with `dymoe analyze dilemma {source}`")
        return dilemma(read_results(file)["rows"])
    strategies = {mask: strategy for strategy, mask in STRATEGIES.items()}
    rows = []
    for record in source:
        tasks: list[str] = record.get("tasks") or []
        matrix: list[list[float]] = record.get("matrix") or []
        mask = (record.get("settings") or {}).get("guidance")
        if len(tasks) != 2 or len(matrix) != 2 or not isinstance(mask, str) or mask not in strategies:
            raise DymoeError(
                f"{record.get('label')}, seed {record.get('seed')}: not a record of the token's dilemma (two tasks, "
                f"settings.guidance one of {', '.join(strategies)})"
            )
        (before,), (after, new) = AccuracyMatrix(matrix).rows
        weights = (record.get("drift") or {}).get(tasks[0])
        rows.append(
            {
                "pair": " -> ".join(tasks),
                "seed": record["seed"],
                "strategy": strategies[mask],
                "new_task_accuracy": float(new),
                "old_task_before": float(before),
                "old_task_after": float(after),
                "forgetting": float(before) - float(after),
                "drift": float(weights[-1]) if weights else math.nan,
            }
        )
    frame = _ordered(pd.DataFrame(rows, columns=[*COLUMNS["dilemma"]]))
    return frame.sort_values(["pair", "seed", "strategy"], ignore_index=True).astype({"strategy": str})


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """The same rows, whose strategies sort in the order of `STRATEGIES`."""
    return frame.assign(strategy=pd.Categorical(frame["strategy"], [*STRATEGIES], ordered=True))


def is_dilemma(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a sweep's records are of two tasks each, learned under several strategies."""
    masks = [(row.get("settings") or {}).get("guidance") for row in rows if len(row.get("tasks") or ()) == 2]
    return sum(mask in masks for mask in STRATEGIES.values()) > 1


def complete(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the pairs and seeds that were learned under every strategy the frame holds."""
    strategies = frame["strategy"].nunique()
    return frame[frame.groupby(["pair", "seed"])["strategy"].transform("nunique") == strategies]


def by_strategy(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean and sample standard deviation over seeds, for each pair and for all pairs together.

    Args:
        frame: of `dilemma`; only pairs and seeds with every strategy count.

    Returns:
        Columns pair ("all pairs" for the mean over pairs), strategy, seeds, and for every measure its mean and, with
        `_std` behind its name, the deviation over seeds (NaN with one seed).
    """
    learnings = _ordered(complete(frame))
    together = learnings.groupby(["strategy", "seed"], observed=True, as_index=False)[[*MEASURES]].mean()
    parts = []
    for part in (learnings, together.assign(pair=ALL)):
        grouped = part.groupby(["pair", "strategy"], observed=True)[[*MEASURES]]
        spread = grouped.std(ddof=1).add_suffix("_std")
        parts.append(pd.concat([grouped.size().rename("seeds"), grouped.mean(), spread], axis=1).reset_index())
    return pd.concat(parts, ignore_index=True).astype({"strategy": str})


def conclusion(frame: pd.DataFrame) -> str:
    """One sentence with the numbers: what ambiguous, old and all tokens teach the new experts, and what they cost.

    Differences to the strategy "new" are means over pairs and seeds, each with its standard error, compared within the
    same pair and seed.

    Args:
        frame: of `dilemma`; only pairs and seeds with every strategy count.
    """
    learnings = complete(frame)
    cells = learnings[["pair", "seed"]].drop_duplicates()
    if cells.empty or not {"new", "ambiguous", "old"} <= {*learnings["strategy"]}:
        return "No pair and seed has been learned under the strategies new, ambiguous and old yet."
    wide = learnings.pivot(
        index=["pair", "seed"], columns="strategy", values=["new_task_accuracy", "forgetting", "drift"]
    )
    changes = []
    subjects = {"ambiguous": "ambiguous tokens alone", "old": "old tokens alone", "all": "all tokens together"}
    for kind, subject in subjects.items():
        if kind in {*learnings["strategy"]}:
            learned, lost, drifted = (
                _difference(wide[measure][kind] - wide[measure]["new"], scale)
                for measure, scale in (("new_task_accuracy", 1), ("forgetting", 1), ("drift", 100))
            )
            changes.append(
                f"{subject} changed new-task accuracy by {learned} points, forgetting by {lost} and drift by {drifted}"
            )
    accuracy, forgetting = (wide[measure]["new"].mean() for measure in ("new_task_accuracy", "forgetting"))
    pairs, seeds = (counted(cells[key].nunique(), key) for key in ("pair", "seed"))
    over = f"means over {len(cells)} learnings of {pairs} by {seeds}, ± standard error"
    if len(cells) == 1:
        over = "one pair and seed, so no standard error"
    return (
        f"Against new tokens alone, with which the new task reached {accuracy:.1f} % and the old one lost "
        f"{forgetting:.1f} points, {'; '.join(changes)} ({over})."
    )


def counted(number: int, what: str) -> str:
    """As in "1 pair" and "3 pairs"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _difference(values: pd.Series, scale: float) -> str:
    """Mean difference with its sign and standard error."""
    values = values.dropna() * scale
    if values.empty:
        return "an unknown number of"
    error = f" ± {values.sem():.1f}" if len(values) > 1 else ""
    return f"{values.mean():+.1f}{error}"


def markdown(frame: pd.DataFrame, title: str, command: str) -> str:
    """The table over strategies with the conclusion, as Markdown."""
    lines = [f"# {title or 'Dilemma'}", "", f"`{command}`", "", conclusion(frame), ""]
    head = "pair | tokens that reach the new experts | seeds | new task | old task before | old task after"
    lines += [f"| {head} | forgetting | drift |", "|" + "---|" * 8]
    for row in by_strategy(frame).to_dict("records"):
        stats = [number(_stat(row, name, 100 if name == "drift" else 1)).replace("−", "-") for name in MEASURES]
        pair = row["pair"].replace("|", "\\|")
        lines.append(f"| {pair} | {row['strategy']} | {row['seeds']} | {' | '.join(stats)} |")
    lines += [
        "",
        "Accuracies in percent, forgetting in points, drift in percent; mean ± standard deviation over seeds.",
    ]
    return "\n".join(lines) + "\n"


def headline(table: pd.DataFrame) -> str:
    """What new, ambiguous and old tokens taught and cost, in one sentence.

    Args:
        table: of `by_strategy`.
    """
    rows = {row["strategy"]: row for row in _of(table, ALL)}
    if "new" not in rows:
        return "No pair of tasks has been learned under every strategy yet."
    parts = []
    for strategy in ("new", "ambiguous", "old"):
        if row := rows.get(strategy):
            learned, lost = number(row["new_task_accuracy"]), number(row["forgetting"])
            first = strategy == "new"
            what, whose = ("took the new task ", " points of the old one") if first else ("", "")
            parts.append(f"{TOKENS[strategy]} alone {what}to {learned} % for {lost}{whose}")
    return f"{', '.join([parts[0].capitalize(), *parts[1:]])}."


# ---------------------------------------------------------------- figures


def figures(table: pd.DataFrame, learnings: pd.DataFrame) -> list[Figure]:
    """New-task accuracy against forgetting, and drift where runs measured it; none before anything counts.

    Args:
        table: of `by_strategy`.
        learnings: of `dilemma`, those that count (`complete`).
    """
    return [trade(table, learnings), *drift(table, learnings)] if len(table) else []


def trade(table: pd.DataFrame, learnings: pd.DataFrame) -> Figure:
    """New-task accuracy against forgetting of the old task, a mark a strategy; all pairs together and each apart."""
    figure = Figure(
        "dilemma",
        "What each strategy taught and what it cost",
        "Upwards: accuracy on the new task after it, in percent. To the right: points that the old task lost to it. "
        "The best place is the top left: learned, and nothing forgotten. A large open mark is a mean over seeds (in "
        "the first plot of all pairs together), its bars the standard deviation over seeds; a small filled one is one "
        "learning, a pair with a seed. Each strategy lets only these tokens reach the new experts while the new task "
        "is learned. All plots have the same scales.",
        ("pair: strategy", "seeds", "new task (%)", "old task before (%)", "after (%)", "forgetting (points)"),
        legend=[_look(strategy) for strategy in STRATEGIES if strategy in {*table["strategy"]}],
    )
    pairs = [ALL, *(pair for pair in dict.fromkeys(table["pair"]) if pair != ALL)]
    for pair in pairs if len(pairs) > 2 else pairs[:1]:
        _trade_plot(figure, pair, table, learnings)
    for pair in pairs:
        for row in _of(table, pair):
            accuracies = (_stat(row, name) for name in ("new_task_accuracy", "old_task_before", "old_task_after"))
            forgetting = number(_stat(row, "forgetting"), sign=True)
            figure.row(f"{pair}: {row['strategy']}", str(row["seeds"]), *map(number, accuracies), forgetting)
    return figure


def _trade_plot(figure: Figure, pair: str, table: pd.DataFrame, learnings: pd.DataFrame) -> None:
    there = learnings if pair == ALL else learnings[learnings["pair"] == pair]
    traces: list[Trace] = []
    for row in _of(table, pair):
        mine = there[there["strategy"] == row["strategy"]]
        stats = _stat(row, "forgetting"), _stat(row, "new_task_accuracy")
        hover = "new task %{y:.1f} %, old task lost %{x:.1f} points"
        traces += _marks(row["strategy"], mine, mine["forgetting"], mine["new_task_accuracy"], stats, hover)
    each = "each pair and seed" if pair == ALL else "each seed"
    x, y = (_range(table, learnings, name) for name in ("forgetting", "new_task_accuracy"))
    figure.plot(
        pair[0].upper() + pair[1:],
        f"New-task accuracy against forgetting of the old task by strategy, {pair}, mean and {each}",
        traces,
        300,
        xaxis={"title": {"text": "forgetting of the old task (points)"}, "range": x},
        yaxis={"title": {"text": "new task (%)"}, "range": y},
    )


def drift(table: pd.DataFrame, learnings: pd.DataFrame) -> list[Figure]:
    """Weight of the old task's tokens on the new group at the end, a row a strategy; none where no run measured it."""
    known = learnings[learnings["drift"].notna()]
    if known.empty:
        return []
    figure = Figure(
        "dilemma-drift",
        "Which tokens make the old ones follow",
        "Routing drift: the share of routing weight that the old task's test tokens put on the group that the new task "
        "added. Large open marks are means over pairs and seeds, their bars the standard deviation over seeds; small "
        "ones single learnings. With no token the new experts learn nothing: what drifts there is drawn by their "
        "untrained router rows alone.",
        ("pair: strategy", "drift (%)"),
    )
    measured = table[table["drift"].notna()]
    rows = _of(measured, ALL)
    traces: list[Trace] = []
    for index, row in enumerate(rows):
        mine = known[known["strategy"] == row["strategy"]]
        stats = _stat(row, "drift", 100), Stat(index, None)
        traces += _marks(row["strategy"], mine, mine["drift"] * 100, [index] * len(mine), stats, "%{x:.1f} %")
    xaxis = {"title": {"text": "weight on the new group (%)"}, "rangemode": "tozero"}
    yaxis = listed([TOKENS[row["strategy"]] for row in rows])
    label = "Routing drift of the old task by strategy"
    figure.plot("", label, traces, 70 + 40 * len(rows), xaxis=xaxis, yaxis=yaxis)
    for pair in dict.fromkeys(measured["pair"]):
        for row in _of(measured, pair):
            figure.row(f"{pair}: {row['strategy']}", number(_stat(row, "drift", 100)))
    return [figure]


def _marks(strategy: str, learnings: pd.DataFrame, x: Any, y: Any, stats: tuple[Stat, Stat], hover: str) -> list[Trace]:
    """A small mark for each learning and a large one for their mean, open so that two in one place are both seen."""
    one = _look(strategy)
    names = [f"{escape(row.pair)}, seed {row.seed}" for row in learnings.itertuples()]
    small = {"size": 8, "opacity": 0.5}
    large = {"symbol": f"{one.marker}-open", "size": 14, "line": {"color": one.colour, "width": 3}}
    means, bars = zip(
        *((stat.mean, error_bars(axis, [stat])) for axis, stat in zip("xy", stats, strict=True)), strict=True
    )
    marks: Trace = {"mode": "markers", "cliponaxis": False}
    return [
        scatter(one, x, y, f"{one.label}, %{{customdata}}: {hover}", small, customdata=names, **marks),
        scatter(one, [means[0]], [means[1]], f"{one.label}, mean: {hover}", large, **bars[0], **bars[1], **marks),
    ]


def _of(table: pd.DataFrame, pair: str) -> list[dict[Any, Any]]:
    return table[table["pair"] == pair].to_dict("records")


def _stat(row: Mapping[Any, Any], name: str, scale: float = 1) -> Stat:
    """Mean and deviation of a measure; no deviation with one seed."""
    mean, spread = float(row[name]) * scale, float(row[f"{name}_std"]) * scale
    return Stat(mean, None if math.isnan(spread) else spread)


def _look(strategy: str) -> Look:
    return look(list(STRATEGIES).index(strategy), TOKENS[strategy])


def _range(table: pd.DataFrame, learnings: pd.DataFrame, name: str) -> list[float]:
    """From zero or below to beyond the largest, for all marks and bars of all plots."""
    bars = table[f"{name}_std"].fillna(0)
    ends = [*learnings[name], *(table[name] - bars), *(table[name] + bars)]
    least, most = min(0.0, *ends), max(1.0, *ends)
    room = 0.05 * (most - least)
    return [least - room, most + room]
