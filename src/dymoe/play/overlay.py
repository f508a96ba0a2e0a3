"""The routing of one question's tokens as HTML: the report's drawing twice, by serving group and by token type.

Beside each stands a table of its signs with their shares. The markup needs no script and no network.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from dymoe.analysis.figures import Look
from dymoe.analysis.token_overlay import NOTHING, TYPES, as_webp, group_look, type_look, view_of
from dymoe.images import data_uri
from dymoe.report.layout import environment, source

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

PARTS = {"image": "picture", "instruction": "question", "answer": "answer"}

# The report's colours and drawing, and what Gradio's own style would change of them.
STYLE = f"""
.routing {{ {source("light.css.jinja")} }}
.dark .routing {{ {source("dark.css.jinja")} }}
{source("tokens.css.jinja")}
.routing {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 1.5rem; }}
.routing.routing, .routing.routing * {{ color: var(--ink); }}
.routing h4 {{ margin: 0 0 .5rem; }}
.routing table, .routing thead, .routing tbody, .routing tr {{ border: 0; border-collapse: collapse; }}
.routing table {{ margin-top: .75rem; }}
.routing th, .routing td {{ border: 0; padding: .15rem 0 .15rem .6rem; text-align: right; white-space: nowrap; }}
.routing th {{ font-weight: 400; }}
.routing thead th {{ line-height: 1.2; vertical-align: bottom; }}
.routing tbody th {{ padding-left: 0; text-align: left; }}
"""


def draw(frame: "pd.DataFrame", picture: "Image | None", groups: Sequence[str]) -> Markup:
    """The tokens twice, side by side: by the group that serves them and, where there are older groups, by their type.

    Args:
        frame: rows of one layer and projection, as `dymoe.analysis.token_routing` gives them.
        picture: as the model sees it, None for a question of text alone.
        groups: the active groups in order; the last is the newest.
    """
    looks = {group: group_look(index, group) for index, group in enumerate(groups)}
    blocks = [_block("Serving group", "group", frame, looks)]
    if len(groups) > 1 and frame["type"].ne("").any():  # to a single group every token is new
        looks = {kind: type_look(kind, f"new ({groups[-1]})" if kind == "new" else "") for kind in TYPES}
        blocks.append(_block("Token type", "type", frame, looks))
    counts = frame["kind"].value_counts()
    html = (
        environment()
        .get_template("routing.html.jinja")
        .render(
            blocks=blocks,
            view=view_of(frame, groups),
            shape=1.0 if picture is None else picture.width / picture.height,
            uri="" if picture is None else data_uri(as_webp(picture)),
            parts=[(name, counts[kind]) for kind, name in PARTS.items() if kind in counts],
        )
    )
    return Markup(html)


def _block(title: str, column: str, frame: "pd.DataFrame", looks: Mapping[str, Look]) -> dict[str, Any]:
    """A title, the column that colours the tokens, and the share of the tokens of each part for each of its values."""
    if frame[column].eq("").any():
        looks = {**looks, "": Look("none", "var(--grid)", NOTHING)}
    parts = [frame.loc[frame["kind"] == kind, column] for kind in PARTS if frame["kind"].eq(kind).any()]
    rows = [(look, [100 * part.eq(value).mean() for part in parts]) for value, look in looks.items()]
    return {"title": title, "column": column, "rows": rows}


def note(text: str) -> Markup:
    """A line of text where the routing would stand."""
    return Markup("<p>{}</p>").format(text)
