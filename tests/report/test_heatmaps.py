"""Heatmaps: what each cell says, and which share of the strongest colour it gets."""

import pytest

from dymoe.report.heatmaps import heatmap


def test_percentages_are_cells_out_of_a_hundred() -> None:
    made = heatmap("t", "l", [[12.3456789, None], [0.0, 100.0]], ["A", "B"], ["A", "B"], "{row}")
    assert made.reach == "100"
    (head, first), (_, second) = made.rows
    assert head == ("1 A", "1 A")
    assert first[1] is None
    assert first[0] is not None
    assert (first[0].text, first[0].value, first[0].lost) == ("12", "12.346", False)
    assert [cell.text for cell in second if cell] == ["0", "100"]


@pytest.mark.parametrize(("z", "reach"), [([[-40.0, 10.0]], "40"), ([[0.0, 0.0]], "1"), ([[None, None]], "1")])
def test_changes_reach_to_the_largest_of_either_sign(z: list[list[float | None]], reach: str) -> None:
    made = heatmap("", "", z, ["A", "B"], ["m"], "", change=True, row_numbers=False, first=2)
    assert made.reach == reach
    assert [shown for shown, _ in made.columns] == ["2 A", "3 B"]
    assert made.rows[0][0] == ("m", "m")
    if reach == "40":
        assert [(cell.text, cell.lost) for cell in made.rows[0][1] if cell] == [("−40", True), ("+10", False)]


def test_long_names_are_clipped_and_kept_whole_beside() -> None:
    name = "a name of more than twenty letters"
    made = heatmap("", "", [[1.0]], [name], [name], "")
    assert made.columns == (("1 a name of more than…", f"1 {name}"),)
    assert len("a name of more than…") == 20
