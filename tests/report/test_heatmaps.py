"""Heatmaps: what each cell says, and which share of the strongest colour it gets."""

import math

import pandas as pd
import pytest
from reading import Text

from dymoe.analysis.figures import Figure, Heatmap
from dymoe.report.layout import environment


def drawn(heatmap: Heatmap) -> list[tuple[str, str, dict[str, str | None]]]:
    """(tag, text, attributes) of the table and its heads and cells."""
    figure = Figure("f", "", panels=[heatmap])
    macros = environment().get_template("parts.html.jinja").module
    return Text(macros.heat(heatmap, figure)).cells  # type: ignore[attr-defined]


def values(heatmap: Heatmap) -> list[tuple[str, str | None, bool]]:
    """Text, value and whether it is drawn as a loss, of each cell with a value."""
    cells = [(text, attributes) for tag, text, attributes in drawn(heatmap) if tag == "td" and "style" in attributes]
    return [(text, attributes["style"], attributes.get("class") == "l") for text, attributes in cells]


def test_percentages_are_cells_out_of_a_hundred() -> None:
    frame = pd.DataFrame([[12.3456789, math.nan], [0.0, 100.0]], ["A", "B"], ["A", "B"])
    made = Heatmap("t", "l", frame, "{row}")
    assert made.reach == 100
    assert values(made) == [("12", "--v:12.346", False), ("0", "--v:0", False), ("100", "--v:100", False)]
    assert [text for tag, text, _ in drawn(made) if tag == "th"] == ["1 A", "2 B", "1 A", "2 B"]


@pytest.mark.parametrize(("z", "reach"), [([-40.0, 10.0], 40), ([0.0, 0.0], 1), ([math.nan] * 2, 1)])
def test_changes_reach_to_the_largest_of_either_sign(z: list[float], reach: float) -> None:
    made = Heatmap("", "", pd.DataFrame([z], ["m"], ["A", "B"]), "", change=True, numbered=False, first=2)
    assert made.reach == reach
    assert [text for tag, text, _ in drawn(made) if tag == "th"] == ["2 A", "3 B", "m"]
    if reach == 40:
        assert values(made) == [("−40", "--v:-40", True), ("+10", "--v:10", False)]


def test_long_names_are_clipped_and_kept_whole_beside() -> None:
    name = "a name of more than twenty letters"
    cells = drawn(Heatmap("", "", pd.DataFrame([[1.0]], [name], [name]), ""))
    heads = [(text, attributes["title"]) for tag, text, attributes in cells if tag == "th"]
    assert heads == [("1 a name of more than…", f"1 {name}")] * 2
    assert len("a name of more than…") == 20
