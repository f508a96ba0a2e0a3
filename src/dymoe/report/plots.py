"""What the report's figures are made of: plotly graphs as JSON, tables, one colour and marker a method.

Colours are CSS variables ("var(--m0)"): the page's script puts in their values, so that one figure serves
light and dark. Text is escaped here because plotly reads markup in labels.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from dymoe.report.summary import Method, Stat

COLOURS = 8
LABEL = 20
# Width of a label's character in pixels, on the generous side, to leave room beside slanted labels.
CHARACTER = 7.2
# plotly's name of each marker, and the character that stands for it in legends.
MARKERS = {
    "circle": "●",
    "square": "■",
    "diamond": "◆",
    "triangle-up": "▲",
    "cross": "✚",
    "x": "✖",
    "star": "★",
    "triangle-down": "▼",
    "pentagon": "⬟",
}
DASHES = ("solid", "dash", "dot")


@dataclass(frozen=True)
class Table:
    """Column heads and rows of text; the first cell of a row is its head."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Plot:
    """One plotly graph: `spec` is JSON that may stand inside a script element, `label` says what it shows."""

    title: str
    label: str
    spec: str
    height: int


@dataclass(frozen=True)
class Figure:
    """One or several plots under one caption; `table` holds every number that they draw."""

    id: str
    title: str
    caption: str
    plots: tuple[Plot, ...]
    table: Table
    folded: tuple[Plot, ...] = ()
    fold_title: str = ""
    legend: tuple[Method, ...] = ()
    wide: bool = False


def escape(text: str) -> str:
    """Text as plotly must get it to show it as it is: no markup, no line breaks, and not too long for a label."""
    line = " ".join(text.split())
    clipped = line if len(line) <= LABEL else f"{line[: LABEL - 1]}…"
    return html.escape(clipped, quote=False)


def colour(method: Method) -> str:
    """The method's colour as a CSS variable."""
    return f"var(--m{method.index % COLOURS})"


def marker(method: Method) -> str:
    """The method's marker, so that colour is never the only sign."""
    return list(MARKERS)[method.index % len(MARKERS)]


def glyph(method: Method) -> str:
    """The method's marker as a character; a dotted line for a joint method, which is drawn without markers."""
    return "┄" if method.joint else MARKERS[marker(method)]


def line(method: Method) -> dict[str, Any]:
    """The method's line: its colour, dotted for a joint method, dashed where colours come round again."""
    dash = "dot" if method.joint else DASHES[(method.index // COLOURS) % len(DASHES)]
    return {"color": colour(method), "width": 2, "dash": dash}


def build(title: str, label: str, traces: Sequence[Any], height: int, **layout: Any) -> Plot:
    """A plotly graph in the page's look; `height` in pixels, `layout` overrides plotly's layout keys."""
    axis = {
        "gridcolor": "var(--grid)",
        "zerolinecolor": "var(--grid)",
        "automargin": True,
        "fixedrange": True,
    }
    figure = go.Figure(
        list(traces),
        {
            "template": "none",
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": "var(--ink)", "family": "system-ui, sans-serif", "size": 12},
            "hoverlabel": {
                "bgcolor": "var(--card)",
                "bordercolor": "var(--grid)",
                "font": {"color": "var(--ink)"},
            },
            "margin": layout.pop("margin", {"l": 8, "r": 12, "t": 8, "b": 8}),
            "showlegend": False,
            "height": height,
            "dragmode": False,
            "xaxis": axis | layout.pop("xaxis", {}),
            "yaxis": axis | layout.pop("yaxis", {}),
            **layout,
        },
    )
    spec = json.loads(figure.to_json())
    spec["layout"]["template"] = {}
    text = json.dumps(spec, separators=(",", ":"))
    # Inside a script element only "<" can end the data; the other two are escaped for good measure.
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Plot(title, label, text, height)


def error(stat: Stat | None) -> float:
    """Length of an error bar: the spread over seeds, 0 where there is none."""
    return 0.0 if stat is None or stat.spread is None else stat.spread


def room(names: Sequence[str], prefix: int = 0) -> float:
    """Pixels that the longest of the names takes as a label, with so many characters before it."""
    return CHARACTER * (prefix + min(LABEL, max(len(name) for name in names)))


def positions(names: Sequence[str]) -> dict[str, Any]:
    """Axis keys that put names at 0, 1, ...; categories would merge names that look alike once clipped."""
    return {
        "tickmode": "array",
        "tickvals": list(range(len(names))),
        "ticktext": [escape(name) for name in names],
        "ticklabeloverflow": "allow",
    }


def heatmap(
    title: str,
    label: str,
    z: list[list[float | None]],
    columns: Sequence[str],
    rows: Sequence[str],
    what: str,
) -> Plot:
    """A heatmap of percentages (0 to 100, None is left blank); `what` is the text under the pointer."""
    names = [f"{i} {escape(name)}" for i, name in enumerate(columns, start=1)]
    sides = [f"{i} {escape(name)}" for i, name in enumerate(rows, start=1)]
    axis = {"type": "category", "showgrid": False, "dtick": 1, "automargin": False}
    top = 20 + 0.7 * room(columns, prefix=2)
    trace = go.Heatmap(
        z=z,
        x=names,
        y=sides,
        zmin=0,
        zmax=100,
        colorscale=[[0, "var(--heat-low)"], [1, "var(--heat-high)"]],
        showscale=False,
        xgap=2,
        ygap=2,
        texttemplate="%{z:.0f}",
        textfont={"size": 11, "color": "var(--ink)"},
        hoverongaps=False,
        hovertemplate=what,
    )
    return build(
        title,
        label,
        [trace],
        round(top) + 30 * len(rows) + 8,
        margin={"l": 14 + room(rows, prefix=2), "r": 0.5 * room(columns), "t": top, "b": 8},
        xaxis={"side": "top", "tickangle": -45, **axis},
        yaxis={"autorange": "reversed", **axis},
    )
