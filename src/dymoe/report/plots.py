"""How the report's plots are made: plotly graphs as JSON, one colour and marker a method.

Colours are CSS variables ("var(--m0)"): the page's script puts in their values, so that one figure serves
light and dark. Text is escaped here because plotly reads markup in labels.
"""

import html
import json
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.io.json import to_json_plotly

from dymoe.numbers import Stat
from dymoe.report.parts import Keys, Plot, Sign
from dymoe.report.summary import Method

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


def clip(text: str) -> str:
    """Text in one line, not too long for a label."""
    line = " ".join(text.split())
    return line if len(line) <= LABEL else f"{line[: LABEL - 1]}…"


def escape(text: str) -> str:
    """Text as plotly must get it to show it as it is: no markup, no line breaks, and not too long for a label."""
    return html.escape(clip(text), quote=False)


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


def error_bars(axis: str, stats: Sequence[Stat | None]) -> dict[str, Any]:
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


def _short(value: Any) -> Any:
    """Numbers with as many digits as can be seen; the page carries thousands of them."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list):
        return [_short(item) for item in value]
    return {key: _short(item) for key, item in value.items()} if isinstance(value, dict) else value
