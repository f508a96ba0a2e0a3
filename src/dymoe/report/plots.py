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
from plotly.io.json import to_json_plotly

from dymoe.report.summary import Method, Stat, number

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


# Which option of each of a figure's choices something belongs to; nothing for what is always shown.
Keys = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """A question that the reader answers with a select: `options` in order, the one at `chosen` to begin with."""

    label: str
    options: tuple[str, ...]
    chosen: int = 0

    @property
    def several(self) -> bool:
        """Whether there is anything to choose."""
        return len(self.options) > 1


@dataclass(frozen=True)
class Table:
    """Column heads and rows of text; the first cell of a row is its head.

    Where `keys` are given there is one for each row, and only the rows of the reader's choice are shown.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    keys: tuple[Keys, ...] = ()


@dataclass(frozen=True)
class Plot:
    """One plotly graph: `spec` is JSON that may stand inside a script element, `label` says what it shows.

    `height` and `width` are in pixels; where the page is narrower than `width` the plot scrolls sideways.
    """

    title: str
    label: str
    spec: str
    height: int
    keys: Keys = ()
    width: int = 0


@dataclass(frozen=True)
class Sign:
    """One entry of a legend: a name with its colour (a CSS variable) and a character, never the colour alone."""

    label: str
    colour: str
    glyph: str


@dataclass(frozen=True)
class Figure:
    """One or several plots under one caption; `table` holds every number that they draw.

    `wide` plots stand two beside each other, a `full` one takes the page's whole width. `made` says, under the numbers,
    which commands made them. `note` says what is missing and `command` makes it; a figure without plots is its title
    and its note.
    """

    id: str
    title: str
    caption: str
    plots: tuple[Plot, ...]
    table: Table
    folded: tuple[Plot, ...] = ()
    fold_title: str = ""
    legend: tuple[Sign, ...] = ()
    wide: bool = False
    full: bool = False
    choices: tuple[Choice, ...] = ()
    note: str = ""
    command: str = ""
    made: tuple[str, ...] = ()

    @property
    def chosen(self) -> Keys:
        """What is chosen to begin with."""
        return tuple(choice.chosen for choice in self.choices)

    @property
    def single(self) -> bool:
        """Whether one plot is shown at a time."""
        return sum(plot.keys in ((), self.chosen) for plot in self.plots) == 1


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
    """The method's marker as a character; a dotted line for one without stages, which is drawn without markers."""
    if method.level:
        return "┄" if method.runs[0].trained else "╌"
    return MARKERS[marker(method)]


def signs(methods: Sequence[Method]) -> tuple[Sign, ...]:
    """The methods' colours and marks as a legend."""
    return tuple(Sign(method.label, colour(method), glyph(method)) for method in methods)


def line(method: Method) -> dict[str, Any]:
    """The method's line: its colour, dotted or dashed without stages, dashed where colours come round again."""
    level = "dot" if method.runs[0].trained else "longdashdot"
    dash = level if method.level else DASHES[(method.index // COLOURS) % len(DASHES)]
    return {"color": colour(method), "width": 2, "dash": dash}


def build(
    title: str, label: str, traces: Sequence[Any], height: int, keys: Keys = (), width: int = 0, **layout: Any
) -> Plot:
    """A plotly graph in the page's look; `height` and `width` in pixels, `layout` overrides plotly's layout keys."""
    axis = {
        "gridcolor": "var(--grid)",
        "zerolinecolor": "var(--grid)",
        "automargin": True,
        "fixedrange": True,
    }
    look = go.Layout(
        {
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
    # Not through go.Figure, which checks every trace a second time; an empty template keeps out plotly's own look.
    whole = {"data": [trace.to_plotly_json() for trace in traces], "layout": look.to_plotly_json() | {"template": {}}}
    spec = _short(json.loads(to_json_plotly(whole)))
    text = json.dumps(spec, separators=(",", ":"))
    # Inside a script element only "<" can end the data; the other two are escaped for good measure.
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Plot(title, label, text, height, keys, width)


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
    z: Sequence[Sequence[float | None]],
    columns: Sequence[str],
    rows: Sequence[str],
    what: str,
    change: bool = False,
    row_numbers: bool = True,
    first: int = 1,
    keys: Keys = (),
    cell: int = 30,
) -> Plot:
    """A heatmap of percentages (0 to 100) or, with `change`, of points from loss to gain; None is left blank.

    Args:
        title: the plot's heading.
        label: what it shows, for screen readers.
        z: one row of values for each of `rows`.
        columns: names, shown with their numbers.
        rows: names, shown with their numbers unless `row_numbers` is off.
        what: the text under the pointer.
        change: values are changes in points; below 0 is loss.
        row_numbers: see `rows`.
        first: number of the first column.
        keys: the choice that the plot belongs to.
        cell: height of a row in pixels.
    """
    names = [f"{i} {escape(name)}" for i, name in enumerate(columns, start=first)]
    sides = [f"{i} {escape(name)}" for i, name in enumerate(rows, start=1)] if row_numbers else _distinct(rows)
    axis = {"type": "category", "showgrid": False, "dtick": 1, "automargin": False}
    top = 20 + 0.7 * room(columns, prefix=2)
    if change:
        reach = max((abs(value) for row in z for value in row if value is not None), default=0) or 1
        scale = [[0, "var(--heat-lost)"], [0.5, "var(--heat-low)"], [1, "var(--heat-high)"]]
        text = [["" if value is None else number(value, 0, sign=True) for value in row] for row in z]
        colours: dict[str, Any] = {"zmin": -reach, "zmax": reach, "colorscale": scale, "text": text}
        colours["texttemplate"] = "%{text}"
    else:
        scale = [[0, "var(--heat-low)"], [1, "var(--heat-high)"]]
        colours = {"zmin": 0, "zmax": 100, "colorscale": scale, "texttemplate": "%{z:.0f}"}
    trace = go.Heatmap(
        z=[list(row) for row in z],
        x=names,
        y=sides,
        showscale=False,
        xgap=2,
        ygap=2 if cell > 20 else 1,
        textfont={"size": 11 if cell > 20 else 9, "color": "var(--ink)"},
        hoverongaps=False,
        hovertemplate=what,
        **colours,
    )
    return build(
        title,
        label,
        [trace],
        round(top) + cell * len(rows) + 8,
        keys,
        margin={"l": 14 + room(rows, prefix=2 * row_numbers), "r": 0.5 * room(columns), "t": top, "b": 8},
        xaxis={"side": "top", "tickangle": -45, **axis},
        yaxis={"autorange": "reversed", **axis},
    )


def _distinct(names: Sequence[str]) -> list[str]:
    """Names as labels; plotly would merge those that look alike once clipped, so they get a space of no width."""
    labels: list[str] = []
    for name in names:
        label = escape(name)
        while label in labels:
            label += "\u200b"
        labels.append(label)
    return labels


def _short(value: Any) -> Any:
    """Numbers with as many digits as can be seen; the page carries thousands of them."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list):
        return [_short(item) for item in value]
    return {key: _short(item) for key, item in value.items()} if isinstance(value, dict) else value
