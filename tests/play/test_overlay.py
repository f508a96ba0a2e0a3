"""The drawn routing holds every token with its mark, its shares are right, and text stays text."""

from collections import Counter
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


def test_every_patch_lies_in_its_place_twice(drawn):
    places = [*zip(drawn.attributes("rect", "x"), drawn.attributes("rect", "y"), strict=True)]
    assert places == 2 * [(str(place % 3), str(place // 3)) for place in range(6)]
    assert drawn.attributes("svg", "viewbox") == ["0 0 3 2"] * 2
    assert all(uri.startswith("data:image/webp;base64,") for uri in drawn.attributes("image", "href"))


def test_colour_is_never_the_only_sign(drawn):
    rows = frame()
    told = drawn.attributes("mark", "title")
    words = [*rows[rows["kind"] != "image"].to_dict("records")] * 2
    assert len(told) == len(words)
    for title, row in zip(told, words, strict=True):
        assert (row["group"] or "no group") in title
        assert f"{row['type']} token" in title
    marks = Counter(drawn.text)  # of every token and once in the legend
    tokens, groups = rows.to_dict("records"), [*GROUPS, ""]
    for group, mark in zip(groups, ("1", "2", "3", "–"), strict=True):
        assert marks[mark] == sum(row["group"] == group for row in tokens) + 1
    for kind in ("new", "ambiguous", "old"):
        assert marks[kind[0].upper()] == sum(row["type"] == kind for row in tokens) + 1
    titles = [text for text in drawn.text if text.startswith("patch in row")]
    assert titles[:1] == ["patch in row 1, column 1: A&B, weight 0.00, new token"]
    assert len(titles) == 12


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
    allowed = {"div", "section", "h4", "svg", "image", "g", "title", "rect", "text", "p", "strong", "mark", "sub"}
    allowed |= {"table", "thead", "tbody", "tr", "th", "td", "br"}
    assert {tag for tag, _ in drawn.found} <= allowed
    assert not [name for _, values in drawn.found for name in values if name.startswith("on")]
    assert HOSTILE in drawn.text
    assert Tags(note("<script>")).found == [("p", {})]


def test_without_scores_and_picture_the_group_alone_is_drawn():
    tags = Tags(draw(frame(types=("",)), None, GROUPS))
    assert [tag for tag, _ in tags.found].count("h4") == 1
    assert not tags.attributes("rect", "x")
    assert not any("token" in title for title in tags.attributes("mark", "title"))
