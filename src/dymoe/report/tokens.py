"""One sample's tokens as HTML: patches and words by the group that serves them and by token type.

The report draws kept samples with it, `dymoe play` the question just asked: each colour has a mark beside it (the
group's number, the type's letter), each patch and word says the same in words under the pointer. All text is escaped.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from dymoe.numbers import number
from dymoe.report.layout import environment
from dymoe.report.parts import Sign
from dymoe.report.plots import COLOURS

if TYPE_CHECKING:
    import pandas as pd

TYPES = ("new", "ambiguous", "old")
NOTHING = "–"  # in place of the number of a group that there is not


@dataclass(frozen=True)
class Token:
    """One patch or word: `kind` is its class names, `group` the number of its group, `told` says all.

    `text` is what is shown of a word, `end` the line breaks behind it.
    """

    kind: str
    group: str
    text: str
    told: str
    end: str


@dataclass(frozen=True)
class View:
    """A sample at one stage: `patches` line by line on a grid of `rows` by `columns`, `loose` for those without one."""

    title: str
    patches: tuple[Token, ...]
    loose: tuple[Token, ...]
    instruction: tuple[Token, ...]
    answer: tuple[Token, ...]
    told: str
    rows: int
    columns: int


def view_of(
    frame: "pd.DataFrame", groups: Sequence[str], title: str = "", before: Mapping[int, str] | None = None
) -> View:
    """The tokens of one sample at one stage.

    Args:
        frame: rows of one layer and projection, as `dymoe.analysis.token_routing` gives them.
        groups: all groups in order; their places are their numbers and colours.
        title: what is seen.
        before: the serving group of each position at an earlier stage; tokens that another serves now are framed.
    """
    tokens = [(row, _token(row, groups, before)) for row in frame.sort_values("position").to_dict("records")]
    placed = sorted(((row["row"], row["column"], token) for row, token in tokens if row["row"] >= 0), key=_place)
    return View(
        title,
        tuple(token for *_, token in placed),
        tuple(token for row, token in tokens if row["kind"] == "image" and row["row"] < 0),
        tuple(token for row, token in tokens if row["kind"] == "instruction"),
        tuple(token for row, token in tokens if row["kind"] == "answer"),
        _told(frame),
        max((row + 1 for row, *_ in placed), default=0),
        max((column + 1 for _, column, _ in placed), default=0),
    )


def _place(patch: tuple[int, int, Token]) -> tuple[int, int]:
    return patch[:2]


def body(seen: View, shape: float, uri: str) -> Markup:
    """A view's picture and words without its title; `shape` is width divided by height, `uri` the picture's address."""
    macros: Any = environment().get_template("tokens.html.jinja").module
    return Markup(macros.body(seen, shape, "", uri))


def group_sign(place: int, group: str) -> Sign:
    """A group's entry in a legend: its name, its colour and its number."""
    return Sign(group, f"var(--m{place % COLOURS})", str(place + 1))


def type_sign(kind: str, label: str = "") -> Sign:
    """A token type's entry in a legend: its name (or another label), its colour and its letter."""
    return Sign(label or kind, f"var(--m{TYPES.index(kind)})", kind[0])


def _token(row: Mapping[str, Any], groups: Sequence[str], before: Mapping[int, str] | None) -> Token:
    group = str(row["group"])
    place = groups.index(group) if group in groups else None
    changed = bool(before) and before is not None and before.get(row["position"]) != group
    names = [f"g{place % COLOURS}"] if place is not None else []
    names += [str(row["type"])[:1]] if row["type"] in TYPES else []
    names += ["c"] if changed else []
    told = f"{group} {number(100 * row['weight'], 0)} %" if group else "no group"
    told += f", {row['type']}" if row["type"] in TYPES else ""
    told += f", before: {before.get(row['position']) or 'no group'}" if changed and before is not None else ""
    text, end = _seen(str(row["text"]))
    return Token(" ".join(names), str(place + 1) if place is not None else NOTHING, text, told, end)


def _seen(text: str) -> tuple[str, str]:
    """A word as it is shown, and its line breaks apart: they have a sign, so that their colour is seen."""
    word = text.rstrip("\n")
    end = text[len(word) :]
    return (word + "↵" * len(end)) or "∅", end


def _told(frame: "pd.DataFrame") -> str:
    """Who serves the patches and the words, in words."""
    said = []
    for name, rows in (("Patches", frame[frame["kind"] == "image"]), ("Words", frame[frame["kind"] != "image"])):
        if len(rows):
            said.append(f"{name}: {served(rows)}; {_types(rows)}.")
    return " ".join(said)


def served(rows: "pd.DataFrame") -> str:
    """How many tokens each group serves, as in "12 by scienceqa, 4 by textvqa"."""
    counts = Counter(str(group) or "no group" for group in rows["group"])
    return ", ".join(f"{count} by {group}" for group, count in counts.most_common())


def _types(rows: "pd.DataFrame") -> str:
    counts = Counter(str(kind) for kind in rows["type"])
    return ", ".join(f"{counts[kind]} {kind}" for kind in TYPES if counts[kind]) or "no types"
