"""The page of the token's dilemma: what each strategy taught the new task, what it cost the old one, and the drift."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from dymoe.errors import DymoeError
from dymoe.files import atomic_write
from dymoe.numbers import Stat, number
from dymoe.report.layout import render
from dymoe.report.parts import Figure, Plot, Sign, Table
from dymoe.report.plots import MARKERS, build, error_bars, escape, listed

if TYPE_CHECKING:
    import pandas as pd

ALL = "all pairs"
# What a strategy's name means to a reader who has not read the documentation.
TOKENS = {
    "new": "new tokens",
    "ambiguous": "ambiguous tokens",
    "old": "old tokens",
    "all": "all tokens",
    "none": "no token",
}


def write_dilemma(results: Path, out: Path) -> Path:
    """Write one self-contained HTML page about the token's dilemma and return its path.

    Args:
        results: the JSON of its sweep, as `dymoe analyze dilemma` writes it.
        out: the HTML file to write; replaced atomically.

    Raises:
        DymoeError: there is no such file, it holds no runs of the token's dilemma, or `out` cannot be written.
    """
    from dymoe.analysis import dilemma
    from dymoe.learning.formats import read_results

    if not results.is_file():
        raise DymoeError(f"{results}: no such results; `dymoe analyze dilemma` writes them")
    found = read_results(results)
    if not found["rows"]:
        raise DymoeError(f"{results}: holds no finished runs yet; go on with `dymoe analyze dilemma`")
    try:
        frame = dilemma(found["rows"])
    except DymoeError as error:
        raise DymoeError(f"{results}: {error}") from None
    atomic_write(out, dilemma_page(frame, found["about"]).encode("utf-8", "replace"))
    return out


def dilemma_page(frame: "pd.DataFrame", about: Mapping[str, Any]) -> str:
    """The page as HTML text.

    Args:
        frame: of `dymoe.analysis.dilemma`.
        about: of the sweep: its title, command, budget, machine and versions, where they are known.
    """
    from dymoe.analysis import by_strategy, conclusion
    from dymoe.analysis.token_dilemma import complete

    table = by_strategy(frame)
    left_out = len(frame) - len(complete(frame))
    why = "Runs that do not count, since not every strategy has their pair and seed yet"
    remarks = [f"{why}: {left_out}."] if left_out else []
    shown = [trade(table, complete(frame)), drift(table, complete(frame))] if len(table) else []
    return render(
        "dilemma.html.jinja",
        title=str(about.get("title") or "Token's dilemma"),
        headline=headline(table),
        conclusion=conclusion(frame).replace(" -", " \u2212"),
        remarks=remarks,
        figures=[figure for figure in shown if figure is not None],
        made=_made(about),
    )


def headline(table: "pd.DataFrame") -> str:
    """What new, ambiguous and old tokens taught and cost, in one sentence.

    Args:
        table: of `dymoe.analysis.by_strategy`.
    """
    rows = {row["strategy"]: row for row in _of(table, ALL)}
    if "new" not in rows:
        return "No pair of tasks has been learned under every strategy yet."

    def told(kind: str, what: str = "", whose: str = "") -> str:
        learned, lost = number(rows[kind]["new_task_accuracy"]), number(rows[kind]["forgetting"])
        return f"{TOKENS[kind]} alone {what}to {learned} % for {lost}{whose}"

    others = [told(kind) for kind in ("ambiguous", "old") if kind in rows]
    first = told("new", "took the new task ", " points of the old one")
    return f"{', '.join([first.capitalize(), *others])}."


def trade(table: "pd.DataFrame", learnings: "pd.DataFrame") -> Figure:
    """New-task accuracy against forgetting of the old task, a mark a strategy; all pairs together and each apart.

    Args:
        table: of `dymoe.analysis.by_strategy`.
        learnings: of `dymoe.analysis.dilemma`, the learnings that count.
    """
    pairs = [ALL, *(pair for pair in dict.fromkeys(table["pair"]) if pair != ALL)]
    plots = [_trade_plot(pair, table, learnings) for pair in (pairs if len(pairs) > 2 else pairs[:1])]
    rows = []
    for pair in pairs:
        for row in _of(table, pair):
            names = ("new_task_accuracy", "old_task_before", "old_task_after", "forgetting")
            stats = [_stat(row, name).text(sign=name == "forgetting") for name in names]
            rows.append((f"{pair}: {row['strategy']}", str(row["seeds"]), *stats))
    caption = (
        "Upwards: accuracy on the new task after it, in percent. To the right: points that the old task lost to it. "
        "The best place is the top left: learned, and nothing forgotten. A large open mark is a mean over seeds (in "
        "the first plot of all pairs together), its bars the standard deviation over seeds; a small filled one is one "
        "learning, a pair with a seed. Each strategy lets only these tokens reach the new experts while the new task "
        "is learned. All plots have the same scales."
    )
    head = ("pair: strategy", "seeds", "new task (%)", "old task before (%)", "after (%)", "forgetting (points)")
    return Figure(
        "dilemma",
        "What each strategy taught and what it cost",
        caption,
        tuple(plots),
        Table(head, tuple(rows)),
        legend=_signs(table),
        wide=True,
    )


def _trade_plot(pair: str, table: "pd.DataFrame", learnings: "pd.DataFrame") -> Plot:
    there = learnings if pair == ALL else learnings[learnings["pair"] == pair]
    traces = []
    for row in _of(table, pair):
        shade, mark, _ = _look(row["strategy"])
        mine = there[there["strategy"] == row["strategy"]]
        lost, learned = _stat(row, "forgetting"), _stat(row, "new_task_accuracy")
        traces.append(
            go.Scatter(
                x=mine["forgetting"].tolist(),
                y=mine["new_task_accuracy"].tolist(),
                customdata=[f"{escape(one.pair)}, seed {one.seed}" for one in mine.itertuples()],
                mode="markers",
                cliponaxis=False,
                marker={"symbol": mark, "size": 8, "color": shade, "opacity": 0.5},
                hovertemplate=f"{TOKENS[row['strategy']]}, %{{customdata}}: new task %{{y:.1f}} %, old task lost "
                "%{x:.1f} points<extra></extra>",
            )
        )
        traces.append(
            go.Scatter(
                x=[lost.mean],
                y=[learned.mean],
                mode="markers",
                cliponaxis=False,
                marker=_mean_mark(shade, mark),
                hovertemplate=f"{TOKENS[row['strategy']]}, mean: new task %{{y:.1f}} %, old task lost %{{x:.1f}} points"
                "<extra></extra>",
                **error_bars("x", [lost]),
                **error_bars("y", [learned]),
            )
        )
    seen = "each pair and seed" if pair == ALL else "each seed"
    return build(
        pair[0].upper() + pair[1:],
        f"New-task accuracy against forgetting of the old task by strategy, {pair}, mean and {seen}",
        traces,
        300,
        xaxis={
            "title": {"text": "forgetting of the old task (points)"},
            "range": _range(table, learnings, "forgetting"),
        },
        yaxis={"title": {"text": "new task (%)"}, "range": _range(table, learnings, "new_task_accuracy")},
    )


def drift(table: "pd.DataFrame", learnings: "pd.DataFrame") -> Figure | None:
    """Weight of the old task's tokens on the new group at the end, a row a strategy; None where no run measured it.

    Args:
        table: of `dymoe.analysis.by_strategy`.
        learnings: of `dymoe.analysis.dilemma`, the learnings that count.
    """
    known = learnings[learnings["drift"].notna()]
    if known.empty:
        return None
    rows = [row for row in _of(table, ALL) if not math.isnan(row["drift"])]
    traces = []
    for place, row in enumerate(rows):
        shade, mark, _ = _look(row["strategy"])
        mine = known[known["strategy"] == row["strategy"]]
        mean = _stat(row, "drift", 100)
        traces.append(
            go.Scatter(
                x=(mine["drift"] * 100).tolist(),
                y=[place] * len(mine),
                customdata=[f"{escape(one.pair)}, seed {one.seed}" for one in mine.itertuples()],
                mode="markers",
                marker={"symbol": mark, "size": 8, "color": shade, "opacity": 0.5},
                hovertemplate=f"{TOKENS[row['strategy']]}, %{{customdata}}: %{{x:.1f}} %<extra></extra>",
            )
        )
        traces.append(
            go.Scatter(
                x=[mean.mean],
                y=[place],
                mode="markers",
                marker=_mean_mark(shade, mark),
                hovertemplate=f"{TOKENS[row['strategy']]}, mean: %{{x:.1f}} %<extra></extra>",
                **error_bars("x", [mean]),
            )
        )
    plot = build(
        "",
        "Routing drift of the old task by strategy",
        traces,
        70 + 40 * len(rows),
        xaxis={"title": {"text": "weight on the new group (%)"}, "rangemode": "tozero"},
        yaxis=listed([TOKENS[row["strategy"]] for row in rows]),
    )
    caption = (
        "Routing drift: the share of routing weight that the old task's test tokens put on the group that the new task "
        "added. Large open marks are means over pairs and seeds, their bars the standard deviation over seeds; small "
        "ones single learnings. With no token the new experts learn nothing: what drifts there is drawn by their "
        "untrained router rows alone."
    )
    pairs = dict.fromkeys(table["pair"])
    numbers = [
        (f"{pair}: {row['strategy']}", _stat(row, "drift", 100).text())
        for pair in pairs
        for row in _of(table, pair)
        if not math.isnan(row["drift"])
    ]
    head = ("pair: strategy", "drift (%)")
    return Figure(
        "dilemma-drift",
        "Which tokens make the old ones follow",
        caption,
        (plot,),
        Table(head, tuple(numbers)),
        wide=True,
    )


def _of(table: "pd.DataFrame", pair: str) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table[table["pair"] == pair].to_dict("records")]


def _stat(row: Mapping[str, Any], name: str, scale: float = 1) -> Stat:
    """Mean and deviation of a measure; no deviation with one seed."""
    mean, spread = float(row[name]) * scale, float(row[f"{name}_std"]) * scale
    return Stat(mean, None if math.isnan(spread) else spread)


def _look(strategy: str) -> tuple[str, str, str]:
    """Colour, marker and its character of a strategy."""
    place = list(TOKENS).index(strategy)
    mark, glyph = list(MARKERS.items())[place]
    return f"var(--m{place})", mark, glyph


def _mean_mark(shade: str, mark: str) -> dict[str, Any]:
    """Open, so that two means in one place are both seen."""
    return {"symbol": f"{mark}-open", "size": 14, "color": shade, "line": {"color": shade, "width": 3}}


def _range(table: "pd.DataFrame", learnings: "pd.DataFrame", name: str) -> list[float]:
    """From zero or below to beyond the largest, for all marks and bars of all plots."""
    bars = table[f"{name}_std"].fillna(0)
    ends = [*learnings[name], *(table[name] - bars), *(table[name] + bars)]
    least, most = min(0.0, *ends), max(1.0, *ends)
    room = 0.05 * (most - least)
    return [least - room, most + room]


def _signs(table: "pd.DataFrame") -> tuple[Sign, ...]:
    there = dict.fromkeys(table["strategy"])
    return tuple(Sign(TOKENS[one], _look(one)[0], _look(one)[2]) for one in TOKENS if one in there)


def _made(about: Mapping[str, Any]) -> Table:
    """Command, budget, machine and versions of the sweep, those that are known."""
    rows = []
    for name in ("command", "budget", "machine", "versions"):
        value = about.get(name)
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
        if value:
            rows.append((name, str(value)))
    return Table(("what", "how"), tuple(rows))
