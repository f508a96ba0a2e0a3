"""The routing of one question's tokens as HTML: the report's drawing twice, by serving group and by token type.

Beside each stands a table of its signs with their shares. The markup needs no script and no network.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from dymoe.report.layout import source
from dymoe.report.parts import Sign
from dymoe.report.tokens import NOTHING, TYPES, body, group_sign, type_sign, view_of

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
    seen = view_of(frame, groups)
    shape, uri = (1.0, "") if picture is None else (picture.width / picture.height, _data_uri(picture))
    tokens = body(seen, shape, uri)
    serving = {group: group_sign(place, group) for place, group in enumerate(groups)}
    blocks = [_block("Serving group", "group", tokens, frame, serving)]
    if len(groups) > 1 and frame["type"].ne("").any():  # to a single group every token is new
        types = {kind: type_sign(kind, f"new ({groups[-1]})" if kind == "new" else "") for kind in TYPES}
        blocks.append(_block("Token type", "type", tokens, frame, types))
    return Markup('<div class="routing">{}</div>').format(Markup("").join(blocks))


def _block(title: str, column: str, tokens: Markup, frame: "pd.DataFrame", signs: Mapping[str, Sign]) -> Markup:
    """Picture and words coloured by one column, with the shares of its values."""
    return Markup('<section class="overlays" data-colour="{}"><h4>{}</h4>{}{}</section>').format(
        column, title, tokens, _shares(frame, column, signs)
    )


def _shares(frame: "pd.DataFrame", column: str, signs: Mapping[str, Sign]) -> Markup:
    """The legend: each sign with its share of the tokens of each part, in percent."""
    kinds = [kind for kind in PARTS if (frame["kind"] == kind).any()]
    tokens = {kind: frame.loc[frame["kind"] == kind, column] for kind in kinds}
    head = Markup("").join(
        Markup("<th scope=col>{}<br>{} tokens</th>").format(PARTS[kind], len(tokens[kind])) for kind in kinds
    )
    rows = []
    found = {**signs, **({"": Sign("none", "var(--grid)", NOTHING)} if frame[column].eq("").any() else {})}
    for value, sign in found.items():
        cells = Markup("").join(
            Markup("<td>{:.0f} %</td>").format(100 * tokens[kind].eq(value).mean()) for kind in kinds
        )
        rows.append(
            Markup('<tr><th scope=row><span class="chip" style="--c: {}">{}</span>{}</th>{}</tr>').format(
                sign.colour, sign.glyph, sign.label, cells
            )
        )
    return Markup("<table><thead><tr><th></th>{}</tr></thead><tbody>{}</tbody></table>").format(
        head, Markup("").join(rows)
    )


def note(text: str) -> Markup:
    """A line of text where the routing would stand."""
    return Markup("<p>{}</p>").format(escape(text))


def _data_uri(picture: "Image") -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
