"""How routing changed while each task was learned: token types, loss terms and entropy over steps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from dymoe.numbers import number
from dymoe.report.frames import Analysed, analysed, made, missing, routed
from dymoe.report.parts import Choice, Figure, Keys, Plot, Sign, Table
from dymoe.report.plots import MARKERS, build, escape, room
from dymoe.report.summary import Method

if TYPE_CHECKING:
    import pandas as pd

TYPES = ("share_new", "share_ambiguous", "share_old")
TERMS = ("load_balance", "exclusivity", "specialization")
OTHERS = ("new_group_weight", "entropy")
COLUMNS = (*TYPES, *TERMS, *OTHERS)
WORDS = {
    "share_new": "new",
    "share_ambiguous": "ambiguous",
    "share_old": "old",
    "new_group_weight": "weight on the new group",
}
# How the areas of the types are hatched, so that colour is not the only sign.
PATTERNS = ("-", "/", "x")
# Colour and mark of a line by its place.
LOOKS = tuple((f"var(--m{place})", mark, glyph) for place, (mark, glyph) in enumerate(list(MARKERS.items())[:3]))


def dynamics_figures(methods: Sequence[Method]) -> list[Figure]:
    """The figures of the analysis `dynamics`; a note with the command where there is none."""
    found = analysed(methods, "dynamics")
    note, command = missing(methods, found, "dynamics")
    if not found:
        empty = Figure("token-types", "Training dynamics", "", (), Table((), ()), note=note, command=command)
        return [empty] if any(map(routed, methods)) and note else []
    choice = Choice("method", tuple(one.method.label for one in found))
    means = [_over_layers(one.frame) for one in found]
    figures = [
        Figure(
            "token-types",
            "Training dynamics: token types",
            "The types of the training tokens over the optimizer steps, the tasks one behind the other, each with its "
            "own count of steps: the share of new, ambiguous and old tokens in percent (a mean over layers), and the "
            "share of the routing weight that goes to the group in training. DyMoE's guidance keeps ambiguous and old "
            "tokens off the new experts.",
            tuple(
                _plot(one, mean, key, names, title, unit=100.0, stacked=stacked)
                for key, (one, mean) in enumerate(zip(found, means, strict=True))
                for title, names, stacked in (
                    ("Share of tokens by type (%)", TYPES, True),
                    ("Routing weight on the new group (%)", OTHERS[:1], False),
                )
            ),
            _table(found, means, (*TYPES, OTHERS[0]), 100.0),
            legend=tuple(Sign(WORDS[name], LOOKS[at][0], "▤▨▦"[at]) for at, name in enumerate(TYPES)),
            choices=(choice,),
            made=made(found),
            wide=True,
            note=note,
            command=command,
        ),
        Figure(
            "loss-terms",
            "Training dynamics: loss terms and entropy",
            "The routing losses before their weights, and the entropy of the routing weights in nats (a mean over "
            "tokens and layers), over the same steps. Entropy 0: each token goes to one expert; the higher, the more "
            "experts share it. A term that a method does not have stays at 0.",
            tuple(
                _plot(one, mean, key, names, title)
                for key, (one, mean) in enumerate(zip(found, means, strict=True))
                for title, names in (("Loss terms", TERMS), ("Entropy (nats)", OTHERS[1:]))
            ),
            _table(found, means, (*TERMS, OTHERS[1]), 1.0),
            legend=tuple(Sign(_words(name), LOOKS[at][0], LOOKS[at][2]) for at, name in enumerate(TERMS)),
            choices=(choice,),
            made=made(found),
            wide=True,
        ),
    ]
    return figures


def _words(name: str) -> str:
    return WORDS.get(name, name.replace("_", " "))


def _over_layers(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Means over layers and projections by stage, task and step; `at` counts steps on over the tasks."""
    means = frame.groupby(["stage", "task", "step"], as_index=False)[[*COLUMNS]].mean()
    means = means.sort_values(["stage", "step"], ignore_index=True)
    lengths = means.groupby("stage")["step"].max()
    before = lengths.cumsum() - lengths
    return means.assign(at=means["step"] + means["stage"].map(before))


def _plot(
    one: Analysed,
    means: "pd.DataFrame",
    key: int,
    names: Sequence[str],
    title: str,
    unit: float = 1.0,
    stacked: bool = False,
) -> Plot:
    """Lines (or stacked areas) over all steps, a gap and a thin rule between tasks."""
    stages = [part for _, part in means.groupby("stage", sort=True)]
    traces = []
    for place, name in enumerate(names):
        shade, mark, _ = LOOKS[place]
        for number_, part in enumerate(stages):
            look: dict[str, Any] = {"line": {"color": shade, "width": 2}, "mode": "lines"}
            if stacked:
                # Areas must not lean on those of another task.
                pattern = {"shape": PATTERNS[place], "fgcolor": shade, "bgcolor": "var(--paper)", "fgopacity": 0.8}
                look |= {"stackgroup": f"stage{number_}", "fillcolor": shade, "fillpattern": pattern | _FINE}
            else:
                look |= {"mode": "lines+markers", "marker": {"symbol": mark, "size": 5, "color": shade}}
            task = escape(str(part["task"].iloc[0]))
            traces.append(
                go.Scatter(
                    x=part["at"].tolist(),
                    y=(part[name] * unit).tolist(),
                    customdata=part["step"].tolist(),
                    name=_words(name),
                    hovertemplate=f"{_words(name)}, {task}, step %{{customdata}}: %{{y:.3g}}<extra></extra>",
                    **look,
                )
            )
    ends = [float(part["at"].max()) + 0.5 for part in stages]
    starts = [0.5, *ends[:-1]]
    tasks = [str(part["task"].iloc[0]) for part in stages]
    rules = [
        {"type": "line", "xref": "x", "yref": "paper", "x0": end, "x1": end, "y0": 0, "y1": 1, "line": _RULE}
        for end in ends[:-1]
    ]
    return build(
        f"{one.method.label}: {title}",
        f"{title} over training steps, {one.method.label}",
        traces,
        280,
        (key,),
        margin={"l": 44, "r": 12, "t": 8, "b": 16 + 0.7 * room(tasks)},
        shapes=rules,
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


_FINE = {"size": 6, "solidity": 0.4}
_RULE = {"color": "var(--muted)", "width": 1, "dash": "dot"}


def _table(found: Sequence[Analysed], means: Sequence["pd.DataFrame"], names: Sequence[str], unit: float) -> Table:
    rows: list[tuple[str, ...]] = []
    keys: list[Keys] = []
    digits = 1 if unit == 100 else 3
    for key, (one, mean) in enumerate(zip(found, means, strict=True)):
        for row in mean.to_dict("records"):
            cells = (number(float(row[name]) * unit, digits) for name in names)
            rows.append((f"{one.method.label}: {row['task']}", str(row["step"]), *cells))
            keys.append((key,))
    return Table(("method: task", "step", *map(_words, names)), tuple(rows), tuple(keys))
