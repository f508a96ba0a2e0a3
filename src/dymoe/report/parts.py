"""What the page is made of: figures with their choices, legends and tables, as data that the templates show."""

from dataclasses import dataclass

# Which option of each of a figure's choices something belongs to; nothing for what is always shown.
Keys = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """A question that the reader answers with a select: `options` in order, the one at `chosen` to begin with."""

    label: str
    options: tuple[str, ...]
    chosen: int = 0

    @property
    def several(self) -> bool:
        """Whether there is anything to choose."""
        return len(self.options) > 1


@dataclass(frozen=True)
class Table:
    """Column heads and rows of text; the first cell of a row is its head.

    Where `keys` are given there is one for each row, and only the rows of the reader's choice are shown.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    keys: tuple[Keys, ...] = ()


@dataclass(frozen=True)
class Plot:
    """One plotly graph: `spec` is JSON that may stand inside a script element, `label` says what it shows.

    `height` and `width` are in pixels; where the page is narrower than `width` the plot scrolls sideways.
    """

    title: str
    label: str
    spec: str
    height: int
    keys: Keys = ()
    width: int = 0


@dataclass(frozen=True)
class Sign:
    """One entry of a legend: a name with its colour (a CSS variable) and a character, never the colour alone."""

    label: str
    colour: str
    glyph: str


@dataclass(frozen=True)
class Cell:
    """One value as it is shown and, for its colour, as a number with five digits."""

    text: str
    value: str
    lost: bool


@dataclass(frozen=True)
class Heatmap:
    """A table of coloured cells; `reach` is the value of the strongest colour, None in `rows` a cell without a value.

    `told` is the text under the pointer, with "{row}", "{column}" and "{value}" in it. Heads are clipped, and come with
    the whole name.
    """

    title: str
    label: str
    told: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[tuple[str, str], tuple[Cell | None, ...]], ...]
    reach: str
    small: bool
    keys: Keys = ()


@dataclass(frozen=True)
class Figure:
    """One or several plots or heatmaps under one caption; `table` holds every number that they draw.

    `wide` plots stand two beside each other, a `full` one takes the page's whole width. `made` says, under the numbers,
    which commands made them. `note` says what is missing and `command` makes it; a figure without plots is its title
    and its note.
    """

    id: str
    title: str
    caption: str
    plots: tuple[Plot | Heatmap, ...]
    table: Table
    folded: tuple[Plot | Heatmap, ...] = ()
    fold_title: str = ""
    legend: tuple[Sign, ...] = ()
    wide: bool = False
    full: bool = False
    choices: tuple[Choice, ...] = ()
    note: str = ""
    command: str = ""
    made: tuple[str, ...] = ()

    @property
    def chosen(self) -> Keys:
        """What is chosen to begin with."""
        return tuple(choice.chosen for choice in self.choices)

    @property
    def single(self) -> bool:
        """Whether one plot is shown at a time."""
        return sum(plot.keys in ((), self.chosen) for plot in self.plots) == 1
