"""What an analysis shows: plotly graphs and heatmaps under one caption with their numbers, as data that a page draws.

Colours are CSS variables ("var(--m0)"): the page's script puts in their values, so that one figure serves light and
dark. plotly reads markup in labels, so text that comes from data goes to it through `escape`.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dymoe.numbers import Stat, number

if TYPE_CHECKING:
    import pandas as pd

COLOURS = 8
LABEL = 20  # characters of a label
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

Key = tuple[str, ...]  # the option of each of a figure's choices that something belongs to; empty: always shown
Trace = dict[str, Any]


@dataclass(frozen=True)
class Look:
    """How one thing is drawn wherever it stands, never by its colour alone; `glyph` is its mark in a legend."""

    label: str
    colour: str
    glyph: str
    marker: str = ""
    dash: str = "solid"


def look(index: int, label: str, glyph: str = "") -> Look:
    """The look at a place: its colour and marker, a dashed line where the colours come round again."""
    marker, mark = list(MARKERS.items())[index % len(MARKERS)]
    return Look(label, f"var(--m{index % COLOURS})", glyph or mark, marker, DASHES[(index // COLOURS) % len(DASHES)])


@dataclass(frozen=True)
class Plot:
    """One plotly graph: `spec` is its JSON, `label` says what it shows.

    `height` and `width` are in pixels; where the page is narrower than `width` the plot scrolls sideways.
    """

    title: str
    label: str
    spec: Mapping[str, Any]
    height: int
    key: Key = ()
    width: int = 0


@dataclass(frozen=True)
class Heatmap:
    """A frame as a table of coloured cells, which is read without scripts, by screen readers and on paper.

    Attributes:
        title: its heading.
        label: what it shows, for screen readers.
        frame: percentages (0 to 100) or, with `change`, points, below 0 for a loss; NaN is left blank. Its names are
            shown with their numbers: columns from `first` on, rows if `numbered`.
        hover: the text under the pointer, with "{row}", "{column}" and "{value}" in it.
        small: low rows, for many of them.
    """

    title: str
    label: str
    frame: "pd.DataFrame"
    hover: str
    key: Key = ()
    change: bool = False
    numbered: bool = True
    first: int = 1
    small: bool = False

    @property
    def rows(self) -> list[tuple[str, list[float]]]:
        """Name and values of each row."""
        return [
            (str(name), values.tolist())
            for name, values in zip(self.frame.index, self.frame.to_numpy(float), strict=True)
        ]

    @property
    def reach(self) -> float:
        """The value of the strongest colour."""
        most = self.frame.abs().max(axis=None) if self.change else 100.0
        return float(most) if most > 0 else 1.0


@dataclass(frozen=True)
class Table:
    """Column heads and rows of text, the first cell of a row its head; with a `fold` it stands in one of that name.

    `label` says to screen readers what it is, `kind` is its class.
    """

    label: str
    kind: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    fold: str = ""
    keys: Sequence[Key] = ()


@dataclass
class Figure:
    """One or several plots or heatmaps under one caption; `head` and `rows` hold every number that they draw.

    Attributes:
        choices: label -> options, what the reader chooses with selects.
        chosen: the options to begin with; the first ones if empty.
        keys: the choice that each of `rows` belongs to, nothing where all are always shown.
        layout: "wide" plots stand two beside each other, small ones ("") more, a "full" one takes the whole width.
        folded: panels in a fold called `fold`.
        note: what is missing, and the `command` that makes it; a figure without panels is its title and note.
        commands: what made the numbers.
    """

    id: str
    title: str
    caption: str = ""
    head: Sequence[str] = ()
    panels: list[Any] = field(default_factory=list)
    rows: list[Sequence[str]] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    legend: Sequence[Look] = ()
    layout: str = "wide"
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    chosen: Key = ()
    folded: list[Heatmap] = field(default_factory=list)
    fold: str = ""
    note: str = ""
    command: str = ""
    commands: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.chosen = self.chosen or tuple(options[0] for options in self.choices.values())

    def row(self, *cells: str, key: Key = ()) -> None:
        """Add a row of numbers, its head first; cells that it lacks on the right are shown as dashes."""
        self.rows.append(cells)
        if key:
            self.keys.append(key)

    def heatmap(self, heatmap: Heatmap, whose: str, *cells: str) -> None:
        """Add a heatmap and its numbers: rows begin with `whose`, the row's name, and `cells`."""
        self.panels.append(heatmap)
        for name, values in heatmap.rows:
            self.row(f"{whose}{name}", *cells, *map(number, values), key=heatmap.key)

    def plot(
        self,
        title: str,
        label: str,
        traces: Iterable[Trace],
        height: int,
        key: Key = (),
        width: int = 0,
        **layout: Any,
    ) -> None:
        """Add a plotly graph in the page's look; see `Plot`, `layout` overrides plotly's layout keys."""
        axis = {"gridcolor": "var(--grid)", "zerolinecolor": "var(--grid)", "automargin": True, "fixedrange": True}
        ink = {"color": "var(--ink)"}
        spec = {
            "data": list(traces),
            "layout": {
                "template": {},  # keeps out plotly's own look
                "paper_bgcolor": "rgba(0,0,0,0)",
                "plot_bgcolor": "rgba(0,0,0,0)",
                "font": {**ink, "family": "system-ui, sans-serif", "size": 12},
                "hoverlabel": {"bgcolor": "var(--card)", "bordercolor": "var(--grid)", "font": ink},
                "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
                "showlegend": False,
                "height": height,
                "dragmode": False,
                **layout,
                "xaxis": axis | layout.get("xaxis", {}),
                "yaxis": axis | layout.get("yaxis", {}),
            },
        }
        self.panels.append(Plot(title, label, _plain(spec), height, key, width))

    def small_plot(self, title: str, label: str, traces: Iterable[Trace], last: int, key: Key = ()) -> None:
        """Add a small plot of percentages over the stages 1 to `last`."""
        xaxis = {"range": [0.7, max(last, 2) + 0.3], "dtick": 1, "showgrid": False}
        self.plot(title, label, traces, 190, key, xaxis=xaxis, yaxis={"range": [-3, 103], "dtick": 25})

    def indices(self, key: Key) -> str:
        """The options of a key as the page's script knows them: their numbers."""
        return " ".join(str(options.index(one)) for one, options in zip(key, self.choices.values(), strict=True))

    @property
    def single(self) -> bool:
        """Whether one panel is shown at a time."""
        return sum(panel.key in ((), self.chosen) for panel in self.panels) == 1


def clip(text: str) -> str:
    """Text in one line, not too long for a label."""
    line = " ".join(text.split())
    return line if len(line) <= LABEL else f"{line[: LABEL - 1]}…"


def escape(text: str) -> str:
    """Text as plotly must get it to show it as it is: no markup, no line breaks, and not too long for a label."""
    return html.escape(clip(text), quote=False)


def scatter(one: Look, x: Any, y: Any, hover: str, marker: Mapping[str, Any] | None = None, **more: Any) -> Trace:
    """A trace in a look, lines and marks; `marker` and `more` add plotly's keys or replace them."""
    return {
        "type": "scatter",
        "x": x,
        "y": y,
        "name": escape(one.label),
        "mode": "lines+markers",
        "line": {"color": one.colour, "width": 2, "dash": one.dash},
        "marker": {"symbol": one.marker, "size": 7, "color": one.colour, **(marker or {})},
        "hovertemplate": f"{hover}<extra></extra>",
        **more,
    }


def _plain(value: Any) -> Any:
    """What JSON can hold, numbers with as many digits as can be seen: the page carries thousands of them."""
    if hasattr(value, "tolist"):  # of numpy and pandas
        value = value.tolist()
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.5g}")
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def error_bars(axis: str, stats: Sequence[Stat | None]) -> Trace:
    """A trace's keys for thin bars of the spread over seeds along an axis; none where there is no spread."""
    spreads = [stat.spread or None if stat is not None else None for stat in stats]
    if all(spread is None for spread in spreads):
        return {}
    return {f"error_{axis}": {"array": spreads, "thickness": 1, "color": "var(--muted)"}}


def room(names: Sequence[str]) -> float:
    """Pixels that the longest of the names takes as a label."""
    return CHARACTER * min(LABEL, max(len(name) for name in names))


def positions(names: Sequence[str]) -> dict[str, Any]:
    """Axis keys that put names at 0, 1, ...; categories would merge names that look alike once clipped."""
    return {
        "tickmode": "array",
        "tickvals": list(range(len(names))),
        "ticktext": [escape(name) for name in names],
        "ticklabeloverflow": "allow",
    }


def listed(names: Sequence[str]) -> dict[str, Any]:
    """Keys of a vertical axis that is read from above, a row for each name and no lines."""
    return {**positions(names), "range": [len(names) - 0.5, -0.5], "showgrid": False, "zeroline": False}
