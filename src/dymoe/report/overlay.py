"""Token overlay: a sample's patches and words by the group that serves them and by type, before and after."""

import base64
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dymoe.errors import DymoeError
from dymoe.files import read_bytes
from dymoe.report.frames import Analysed, analysed, made, missing, routed
from dymoe.report.parts import Choice, Keys, Sign, Table
from dymoe.report.plots import COLOURS
from dymoe.report.samples import MAGIC
from dymoe.report.summary import Method, number

if TYPE_CHECKING:
    import pandas as pd

# What the page holds at most: samples over all methods, tokens (a patch or word at one stage), base64 of the pictures.
SAMPLES = 24
TOKENS = 20_000
PICTURE_BUDGET = 1_000_000
# Of the wrapped layers of one decoder layer the one that is shown.
PROJECTION = "v_proj"
TYPES = ("new", "ambiguous", "old")
FILE = re.compile(r"[\w-]+\.(webp|png|jpe?g)")


@dataclass(frozen=True)
class Token:
    """One patch or word: `kind` is its class names, `group` the number of its group ("" for none), `told` says all.

    `text` is what is shown of a word, `end` the line breaks behind it.
    """

    kind: str
    group: str
    text: str
    told: str
    end: str


@dataclass(frozen=True)
class View:
    """A sample at one stage: `patches` row by row on the picture's grid, `loose` for image tokens without a place."""

    title: str
    patches: tuple[Token, ...]
    loose: tuple[Token, ...]
    instruction: tuple[Token, ...]
    answer: tuple[Token, ...]
    told: str


@dataclass(frozen=True)
class Overlaid:
    """One sample of one method; `picture` is the name of its style rule, `rows` and `columns` those of the grid."""

    keys: Keys
    title: str
    picture: str
    shape: float
    rows: int
    columns: int
    views: tuple[View, ...]


@dataclass(frozen=True)
class Overlay:
    """The section: its samples, choices, legends, pictures as style rules, numbers, and what is missing."""

    note: str
    command: str
    samples: tuple[Overlaid, ...] = ()
    choices: tuple[Choice, ...] = ()
    groups: tuple[Sign, ...] = ()
    pictures: tuple[tuple[str, str], ...] = ()
    table: Table = field(default_factory=lambda: Table((), ()))
    made: tuple[str, ...] = ()

    @property
    def chosen(self) -> Keys:
        """What is chosen to begin with."""
        return tuple(choice.chosen for choice in self.choices)


def overlay(methods: Sequence[Method]) -> Overlay | None:
    """The section of the analysis `overlay`; its note and command alone where there is none; None if nothing is routed.

    Raises:
        DymoeError: a kept analysis or a picture of it is missing or broken; the message names the file.
    """
    found = analysed(methods, "overlay")
    note, command = missing(methods, found, "overlay")
    if not found:
        return Overlay(note, command) if any(map(routed, methods)) and note else None
    groups = list(methods[0].tasks)
    groups += [group for one in found for group in dict.fromkeys(one.frame["group"]) if group and group not in groups]
    groups = list(dict.fromkeys(groups))
    pictures = _Pictures()
    chosen = list(_chosen(found))
    options = list(dict.fromkeys((task, sample) for *_, task, sample, _ in chosen))
    shown: list[Overlaid] = []
    rows: list[tuple[str, ...]] = []
    keys: list[Keys] = []
    for place, one, task, sample, frame in chosen:
        key = (place, options.index((task, sample)))
        views = _views(one, task, frame, groups)
        name, shape = pictures.add(one.run.path, str(frame["picture"].iloc[0]))
        grid = frame[frame["row"] >= 0]
        rows_, columns = (int(grid["row"].max()) + 1, int(grid["column"].max()) + 1) if len(grid) else (0, 0)
        layer = f"layer {frame['layer'].iloc[0]}, {frame['projection'].iloc[0]}"
        title = f"{one.method.label}: {task}, {sample} ({layer})"
        shown.append(Overlaid(key, title, name, shape, rows_, columns, tuple(view for view, _ in views)))
        for view, part in views:
            for kind, tokens in part.groupby("kind", sort=False):
                rows.append((f"{one.method.label}: {task}, {sample}", view.title, *_numbers(str(kind), tokens)))
                keys.append(key)
    served = {group for *_, frame in chosen for group in frame["group"]}
    legend = tuple(
        Sign(group, f"var(--m{at % COLOURS})", str(at + 1)) for at, group in enumerate(groups) if group in served
    )
    head = ("method: sample", "stage", "part", "tokens", *TYPES, "served by")
    choices = (
        Choice("method", tuple(one.method.label for one in found)),
        Choice("sample", tuple(f"{task}: {sample}" for task, sample in options)),
    )
    table = Table(head, tuple(rows), tuple(keys))
    return Overlay(note, command, tuple(shown), choices, legend, tuple(pictures.rules), table, made(found))


def _chosen(found: Sequence[Analysed]) -> "Iterator[tuple[int, Analysed, str, str, pd.DataFrame]]":
    """(place, method, task, sample, its rows) of what is shown: of each task the first sample, then the second ..."""
    tokens = TOKENS
    each = max(2, SAMPLES // len(found))
    for place, one in enumerate(found):
        kinds = one.frame["projection"].unique()
        rows = one.frame[one.frame["projection"] == (PROJECTION if PROJECTION in kinds else kinds[0])]
        turn: Counter[str] = Counter()
        ordered = []
        for (task, sample), part in rows.groupby(["task", "sample"], sort=False):
            if task in one.run.tasks:
                ordered.append((turn[str(task)], one.run.tasks.index(task), str(task), str(sample), part))
                turn[str(task)] += 1
        ordered.sort(key=lambda entry: entry[:2])
        for *_, task, sample, part in ordered[:each]:
            if len(part) <= tokens:
                tokens -= len(part)
                yield place, one, task, sample, part


def _views(one: Analysed, task: str, frame: "pd.DataFrame", groups: Sequence[str]) -> "list[tuple[View, pd.DataFrame]]":
    """The sample at the first and at the last stage it was looked at."""
    stages = sorted(int(stage) for stage in frame["stage"].unique())
    views = []
    before: dict[int, str] = {}
    for stage in dict.fromkeys((stages[0], stages[-1])):
        part = frame[frame["stage"] == stage].sort_values("position")
        learned = one.run.tasks[stage - 1] if stage <= len(one.run.tasks) else str(stage)
        title = f"After learning {learned}" + (" (its own task)" if learned == task else "")
        tokens = [(row, _token(row, groups, before)) for row in part.to_dict("records")]
        before = before or dict(zip(part["position"], part["group"], strict=True))
        patches = sorted((row["row"], row["column"], token) for row, token in tokens if row["row"] >= 0)  # type: ignore[type-var]
        views.append(
            (
                View(
                    title,
                    tuple(token for *_, token in patches),
                    tuple(token for row, token in tokens if row["kind"] == "image" and row["row"] < 0),
                    tuple(token for row, token in tokens if row["kind"] == "instruction"),
                    tuple(token for row, token in tokens if row["kind"] == "answer"),
                    _told(part),
                ),
                part,
            )
        )
    return views


def _token(row: dict[str, Any], groups: Sequence[str], before: dict[int, str]) -> Token:
    group = str(row["group"])
    place = groups.index(group) if group in groups else None
    changed = bool(before) and before.get(row["position"]) != group
    names = [f"g{place % COLOURS}"] if place is not None else []
    names += [str(row["type"])[:1]] if row["type"] in TYPES else []
    names += ["c"] if changed else []
    told = f"{group} {number(100 * row['weight'], 0)} %" if group else "no group"
    told += f", {row['type']}" if row["type"] in TYPES else ""
    told += f", before: {before.get(row['position']) or 'no group'}" if changed else ""
    text, end = _seen(str(row["text"]))
    return Token(" ".join(names), str(place + 1) if place is not None else "", text, told, end)


def _seen(text: str) -> tuple[str, str]:
    """A word as it is shown, and its line breaks apart: they have a sign, so that their colour is seen."""
    word = text.rstrip("\n")
    end = text[len(word) :]
    return (word + "↵" * len(end)) or "∅", end


def _told(part: "pd.DataFrame") -> str:
    """Who serves the patches and the words, in words."""
    said = []
    for name, rows in (("Patches", part[part["kind"] == "image"]), ("Words", part[part["kind"] != "image"])):
        if len(rows):
            said.append(f"{name}: {_served(rows)}; {_types(rows)}.")
    return " ".join(said)


def _served(rows: "pd.DataFrame") -> str:
    counts = Counter(str(group) or "no group" for group in rows["group"])
    return ", ".join(f"{count} by {group}" for group, count in counts.most_common())


def _types(rows: "pd.DataFrame") -> str:
    counts = Counter(str(kind) for kind in rows["type"])
    return ", ".join(f"{counts[kind]} {kind}" for kind in TYPES if counts[kind]) or "no types"


def _numbers(kind: str, rows: "pd.DataFrame") -> tuple[str, ...]:
    counts = Counter(str(value) for value in rows["type"])
    return (kind, str(len(rows)), *(str(counts[value]) for value in TYPES), _served(rows))


class _Pictures:
    """The pictures as style rules, each once however many methods show it."""

    def __init__(self) -> None:
        self.rules: list[tuple[str, str]] = []
        self._known: dict[bytes, tuple[str, float]] = {}
        self._left = PICTURE_BUDGET

    def add(self, run: Path, name: str) -> tuple[str, float]:
        """Name of the picture's rule and its width divided by its height; "" and 1 where there is none to show."""
        if not name:
            return "", 1.0
        if not FILE.fullmatch(name):
            raise DymoeError(f"{run / 'analysis' / 'overlay.parquet'}: picture {name!r} is no plain file name")
        file = run / "analysis" / "overlay" / name
        data = read_bytes(file)
        if data not in self._known:
            if (size := len(data) * 4 // 3) > self._left:
                return "", 1.0
            self._left -= size
            mime = next((mime for mime, magic in MAGIC.items() if data.startswith(magic)), None)
            shape = _shape(file, data)
            if mime is None:
                raise DymoeError(f"{file}: no PNG, JPEG or WebP picture; run `dymoe analyze overlay` again")
            rule = f"p{len(self.rules)}"
            self.rules.append((rule, f"data:{mime};base64,{base64.b64encode(data).decode()}"))
            self._known[data] = (rule, shape)
        return self._known[data]


def _shape(file: Path, data: bytes) -> float:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.width / image.height
    except (OSError, ValueError, UnidentifiedImageError) as error:
        raise DymoeError(f"{file}: not a readable picture ({error}); run `dymoe analyze overlay` again") from None
