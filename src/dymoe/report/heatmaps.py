"""Heatmaps as tables with coloured cells: read without scripts, by screen readers and on paper, and there at once."""

from collections.abc import Sequence

from dymoe.numbers import number
from dymoe.report.parts import Cell, Heatmap, Keys
from dymoe.report.plots import clip


def heatmap(
    title: str,
    label: str,
    z: Sequence[Sequence[float | None]],
    columns: Sequence[str],
    rows: Sequence[str],
    told: str,
    change: bool = False,
    row_numbers: bool = True,
    first: int = 1,
    keys: Keys = (),
    small: bool = False,
) -> Heatmap:
    """A heatmap of percentages (0 to 100) or, with `change`, of points from loss to gain; None is left blank.

    Args:
        title: the plot's heading.
        label: what it shows, for screen readers.
        z: one row of values for each of `rows`.
        columns: names, shown with their numbers.
        rows: names, shown with their numbers unless `row_numbers` is off.
        told: the text under the pointer, see `Heatmap`.
        change: values are changes in points; below 0 is loss.
        row_numbers: see `rows`.
        first: number of the first column.
        keys: the choice that the heatmap belongs to.
        small: low rows, for many of them.
    """
    reach = 100.0
    if change:
        reach = max((abs(value) for row in z for value in row if value is not None), default=0.0) or 1.0

    def cell(value: float | None) -> Cell | None:
        return None if value is None else Cell(number(value, 0, sign=change), f"{value:.5g}", value < 0)

    return Heatmap(
        title,
        label,
        told,
        tuple(_head(f"{i} {name}", i) for i, name in enumerate(columns, start=first)),
        tuple(
            (_head(f"{i} {name}", i) if row_numbers else _head(name), tuple(map(cell, row)))
            for i, (name, row) in enumerate(zip(rows, z, strict=True), start=1)
        ),
        f"{reach:.5g}",
        small,
        keys,
    )


def _head(name: str, place: int | None = None) -> tuple[str, str]:
    """A head as it is shown, and the whole name; its number does not count against its length."""
    prefix = "" if place is None else f"{place} "
    return prefix + clip(name.removeprefix(prefix)), name
