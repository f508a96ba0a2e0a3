"""The one door to the terminal: names and texts of others are shown there, never obeyed, neither by it nor by rich."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from dymoe.messages import printable

WIDE = 140  # columns of a table that is written to a file or a pipe


class Terminal(Console):
    """A console that takes texts as they are, without markup, and escapes what a terminal would obey.

    Style comes from `rich.text.Text` and the arguments of `print` alone.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        """Escaped before it is measured, so that columns stay in line."""
        return super().render_str(_lines(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Escaped also where a renderable makes texts of its own, as bars do."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(_lines(segment.text), segment.style)


def tables() -> Terminal:
    """Where tables go: standard output, wide enough where it is no terminal."""
    return Terminal(file=sys.stdout, width=None if sys.stdout.isatty() else WIDE)


def table(
    heads: Sequence[str], rows: Iterable[Sequence[str | Text]], title: str | None = None, numbers: int | None = None
) -> Table:
    """Rows as a table; columns from `numbers` on are right-aligned."""
    result = Table(title=title)
    for column, head in enumerate(heads):
        right = numbers is not None and column >= numbers
        result.add_column(head, justify="right" if right else "left", overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


def _lines(text: str) -> str:
    """`printable`, the ends of lines kept."""
    return text if text.isascii() and text.isprintable() else "\n".join(map(printable, text.split("\n")))
