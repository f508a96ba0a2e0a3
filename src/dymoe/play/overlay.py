"""The routing of one question's tokens as HTML: patches of the picture and words, by serving group and by token type.

Every colour has a mark beside it (the group's number, the type's letter), every patch and word a title that says the
same in words, and the shares stand in a table. All text is escaped; the markup needs no script and no network.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

# For eight groups; numbers stand on them as well. Readable under dark ink.
COLOURS = ("#7fb5f2", "#f2a15f", "#5cc9a8", "#e08fca", "#d9be55", "#9adcf5", "#f58a97", "#b4bac4")
TYPES = {"new": ("N", "#f58a97"), "ambiguous": ("A", "#e6d27a"), "old": ("O", "#c3c8d0")}
PARTS = {"image": "picture", "instruction": "question", "answer": "answer"}
NOTHING = ("–", "#d5d8dc")  # a token that no group serves, or of no type

Signs = dict[str, tuple[str, str]]  # value -> (mark, colour)

STYLE = """
.routing { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1.5rem; }
.routing h4 { margin: 0 0 .5rem; }
.routing svg { display: block; width: 100%; max-width: 18rem; border-radius: .35rem; margin-bottom: .75rem; }
.routing p { margin: 0 0 .75rem; line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere; }
.routing mark { display: inline-block; max-width: 100%; line-height: 1.3; }
.routing mark { border-radius: .2rem; padding: .1rem .05rem; margin-right: 1px; }
.routing mark, .routing mark * { color: #14171b !important; }
.routing mark sub { font-size: .65em; font-weight: 600; margin-left: 1px; }
.routing table, .routing thead, .routing tbody, .routing tr { border: 0; border-collapse: collapse; }
.routing th, .routing td { border: 0; padding: .15rem 0 .15rem .6rem; text-align: right; white-space: nowrap; }
.routing th { font-weight: 400; }
.routing thead th { line-height: 1.2; vertical-align: bottom; }
.routing tbody th { padding-left: 0; text-align: left; }
.routing th mark { min-width: 1.5em; margin-right: .35rem; text-align: center; font-weight: 600; }
"""


def draw(frame: "pd.DataFrame", picture: "Image | None", groups: Sequence[str]) -> Markup:
    """The tokens twice, side by side: by the group that serves them and, where there are older groups, by their type.

    Args:
        frame: rows of one layer and projection, as `dymoe.analysis.token_routing` gives them.
        picture: as the model sees it, None for a question of text alone.
        groups: the active groups in order; the last is the newest.
    """
    serving = {group: (str(place + 1), COLOURS[place % len(COLOURS)]) for place, group in enumerate(groups)}
    seen = None if picture is None else _data_uri(picture)
    blocks = [_block("Serving group", frame, "group", serving, seen)]
    if len(groups) > 1 and frame["type"].ne("").any():  # to a single group every token is new
        blocks.append(_block("Token type", frame, "type", TYPES, seen, {"new": f"new ({groups[-1]})"}))
    return Markup('<div class="routing">{}</div>').format(Markup("").join(blocks))


def _block(
    title: str,
    frame: "pd.DataFrame",
    column: str,
    signs: Signs,
    seen: str | None,
    names: Mapping[str, str] | None = None,
) -> Markup:
    """Picture, words and legend, coloured by one column; `names` are the legend's words for some of its values."""
    parts = [Markup("<h4>{}</h4>").format(title)]
    patches = frame[(frame["kind"] == "image") & (frame["row"] >= 0)]
    if seen is not None and len(patches):
        parts.append(_picture(title, patches, column, signs, seen))
    for kind in ("instruction", "answer"):
        words = frame[frame["kind"] == kind]
        if len(words):
            said = Markup("").join(_word(row, column, signs) for row in words.to_dict("records"))
            parts.append(Markup("<p><strong>{}</strong>\n{}</p>").format(PARTS[kind].capitalize(), said))
    parts.append(_shares(frame, column, signs, names or {}))
    return Markup("<section>{}</section>").format(Markup("").join(parts))


def _picture(title: str, patches: "pd.DataFrame", column: str, signs: Signs, seen: str) -> Markup:
    """The picture under one coloured square with its mark for every patch."""
    rows, columns = int(patches["row"].max()) + 1, int(patches["column"].max()) + 1
    squares = []
    for row in patches.to_dict("records"):
        mark, colour = signs.get(row[column], NOTHING)
        x, y = int(row["column"]), int(row["row"])
        square = Markup(
            '<g><title>{}</title><rect x="{}" y="{}" width="1" height="1" fill="{}" fill-opacity=".45" stroke="#fff" '
            'stroke-width=".02"/><text x="{}" y="{}" font-size=".34" font-weight="600" fill="#14171b" stroke="#fff" '
            'stroke-width=".07" paint-order="stroke">{}</text></g>'
        )
        where = f"patch in row {y + 1}, column {x + 1}: {_told(row)}"
        squares.append(square.format(where, x, y, colour, x + 0.06, y + 0.34, mark))
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}"><image href="{}" width="{}" height="{}" '
        'preserveAspectRatio="none"/>{}</svg>'
    ).format(columns, rows, f"{title} of the picture's patches", seen, columns, rows, Markup("").join(squares))


def _word(row: dict[str, object], column: str, signs: Signs) -> Markup:
    mark, colour = signs.get(str(row[column]), NOTHING)
    text = str(row["text"]).replace("\n", "⏎\n")
    # White space at the ends stands outside, where a line may break.
    inner = text.strip(" \n")
    before, after = text[: len(text) - len(text.lstrip(" \n"))], text[len(text.rstrip(" \n")) :]
    return Markup('{}<mark style="background:{}" title="{}">{}<sub>{}</sub></mark>{}').format(
        before if inner else "", colour, _told(row), inner or "␣", mark, after
    )


def _told(row: dict[str, object]) -> str:
    """A token's routing in words."""
    serving = f"{row['group']}, weight {row['weight']:.2f}" if row["group"] else "no group"
    return f"{serving}, {row['type']} token" if row["type"] else serving


def _shares(frame: "pd.DataFrame", column: str, signs: Signs, names: Mapping[str, str]) -> Markup:
    """The legend: each sign with its share of the tokens of each part, in percent."""
    kinds = [kind for kind in PARTS if (frame["kind"] == kind).any()]
    tokens = {kind: frame.loc[frame["kind"] == kind, column] for kind in kinds}
    head = Markup("").join(
        Markup("<th scope=col>{}<br>{} tokens</th>").format(PARTS[kind], len(tokens[kind])) for kind in kinds
    )
    rows = []
    found = {**signs, **({"": NOTHING} if frame[column].eq("").any() else {})}
    for value, (mark, colour) in found.items():
        cells = Markup("").join(
            Markup("<td>{:.0f} %</td>").format(100 * tokens[kind].eq(value).mean()) for kind in kinds
        )
        rows.append(
            Markup('<tr><th scope=row><mark style="background:{}">{}</mark> {}</th>{}</tr>').format(
                colour, mark, names.get(value, value) or "none", cells
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
