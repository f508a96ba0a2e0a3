"""The drawn routing holds every token with its mark, its shares are right, and text stays text."""

from html.parser import HTMLParser

import pandas as pd
import pytest
from PIL import Image

from dymoe.play.overlay import PARTS, draw, note

HOSTILE = "</mark><script>alert(1)</script><img src=x onerror=alert(1)>\"' onload=alert(1)"
GROUPS = ("A&B", "<b>new</b>", "third")


class Tags(HTMLParser):
    """Elements with their attributes and the text below them."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.text = []
        self.feed(str(html))

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)

    def attributes(self, tag, name):
        return [values[name] for found, values in self.found if found == tag and name in values]


def frame(types=("new", "ambiguous", "old")):
    rows = []
    for place in range(13):
        image = place < 6
        kind = "image" if image else "instruction" if place < 10 else "answer"
        rows.append(
            {
                "position": place,
                "kind": kind,
                "text": "" if image else (HOSTILE if place == 7 else f" w{place}\n"),
                "row": place // 3 if image else -1,
                "column": place % 3 if image else -1,
                "type": types[place % len(types)],
                "group": GROUPS[place % 4] if place % 4 < 3 else "",
                "weight": place / 13,
            }
        )
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def drawn():
    return Tags(draw(frame(), Image.new("RGB", (30, 20)), GROUPS))


def tokens(drawn):
    """The drawn patches and words, as their attributes."""
    return [values for tag, values in drawn.found if tag == "b"]


def test_every_patch_lies_in_its_place_twice(drawn):
    grids = [style for style in drawn.attributes("div", "style") if "--rows" in style]
    assert len(grids) == 2
    assert all(style.startswith("--rows: 2; --columns: 3; aspect-ratio: 1.5000; ") for style in grids)
    assert all("background-image: url(data:image/webp;base64," in style for style in grids)
    rows = frame()
    # Line by line, as the grid fills.
    expected = [row["group"] or "no group" for row in rows.sort_values(["row", "column"]).to_dict("records")]
    told = [values["title"].split(" ")[0] for values in tokens(drawn)]
    patches = [group.split(" ")[0] for group in expected[-6:]]
    assert (told[:6], told[13:19]) == (patches, patches)


def test_colour_is_never_the_only_sign(drawn):
    rows = frame().to_dict("records")
    assert len(tokens(drawn)) == 2 * len(rows)
    for values, row in zip(tokens(drawn), [*rows, *rows], strict=True):
        place = GROUPS.index(row["group"]) if row["group"] else None
        assert values["data-g"] == ("–" if place is None else str(place + 1))
        assert values["class"].split() == [*([] if place is None else [f"g{place}"]), row["type"][0]]
        share = f"{row['group']} {100 * row['weight']:.0f} %" if row["group"] else "no group"
        assert values["title"] == f"{share}, {row['type']}"
    legend = [text for text in drawn.text if text in ("1", "2", "3", "–", "n", "a", "o")]
    assert legend == ["1", "2", "3", "–", "n", "a", "o"]


@pytest.mark.parametrize("column", ["group", "type"])
def test_the_shares_are_those_of_the_tokens(drawn, column):
    rows = frame()
    cells = [text for text in drawn.text if text.endswith(" %")]
    values = [*GROUPS, ""] if column == "group" else ["new", "ambiguous", "old"]
    expected = []
    for value in values:
        for kind in PARTS:
            part = [row[column] for row in rows.to_dict("records") if row["kind"] == kind]
            expected.append(f"{100 * sum(one == value for one in part) / len(part):.0f} %")
    assert (cells[:12] if column == "group" else cells[12:]) == expected


def test_text_stays_text(drawn):
    allowed = {"div", "section", "h4", "p", "b", "span", "table", "thead", "tbody", "tr", "th", "td", "br"}
    assert {tag for tag, _ in drawn.found} <= allowed
    assert not [name for _, values in drawn.found for name in values if name.startswith("on")]
    assert HOSTILE in drawn.text
    assert Tags(note("<script>")).found == [("p", {})]


def test_without_scores_and_picture_the_group_alone_is_drawn():
    tags = Tags(draw(frame(types=("",)), None, GROUPS))
    assert [tag for tag, _ in tags.found].count("h4") == 1
    assert not any("background-image" in style for style in tags.attributes("div", "style"))
    assert not any(title.endswith(("new", "old", "ambiguous")) for title in tags.attributes("b", "title"))
