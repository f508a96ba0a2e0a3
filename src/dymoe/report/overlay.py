"""Token overlay: a sample's patches and words by the group that serves them and by type, before and after."""

import base64
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dymoe.errors import DymoeError
from dymoe.files import read_bytes
from dymoe.pictures import MAGIC, opened
from dymoe.report.frames import Analysed, analysed, made, missing, routed
from dymoe.report.parts import Choice, Keys, Sign, Table
from dymoe.report.summary import Method
from dymoe.report.tokens import TYPES, View, group_sign, served, type_sign, view_of

if TYPE_CHECKING:
    import pandas as pd

# What the page holds at most: samples over all methods, tokens (a patch or word at one stage), base64 of the pictures.
SAMPLES = 24
TOKENS = 20_000
PICTURE_BUDGET = 1_000_000
# Of the wrapped layers of one decoder layer the one that is shown.
PROJECTION = "v_proj"
FILE = re.compile(r"[\w-]+\.(webp|png|jpe?g)")


@dataclass(frozen=True)
class Overlaid:
    """One sample of one method; `picture` is the name of its style rule, `shape` its width divided by its height."""

    keys: Keys
    title: str
    picture: str
    shape: float
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

    @property
    def types(self) -> tuple[Sign, ...]:
        """The legend of token types."""
        return tuple(map(type_sign, TYPES))


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
        layer = f"layer {frame['layer'].iloc[0]}, {frame['projection'].iloc[0]}"
        title = f"{one.method.label}: {task}, {sample} ({layer})"
        shown.append(Overlaid(key, title, name, shape, tuple(view for view, _ in views)))
        for view, part in views:
            for kind, tokens in part.groupby("kind", sort=False):
                rows.append((f"{one.method.label}: {task}, {sample}", view.title, *_numbers(str(kind), tokens)))
                keys.append(key)
    shown_groups = {group for *_, frame in chosen for group in frame["group"]}
    legend = tuple(group_sign(at, group) for at, group in enumerate(groups) if group in shown_groups)
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
        part = frame[frame["stage"] == stage]
        learned = one.run.tasks[stage - 1] if stage <= len(one.run.tasks) else str(stage)
        title = f"After learning {learned}" + (" (its own task)" if learned == task else "")
        views.append((view_of(part, groups, title, before), part))
        before = before or dict(zip(part["position"], part["group"], strict=True))
    return views


def _numbers(kind: str, rows: "pd.DataFrame") -> tuple[str, ...]:
    counts = Counter(str(value) for value in rows["type"])
    return (kind, str(len(rows)), *(str(counts[value]) for value in TYPES), served(rows))


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
    try:
        with opened(data) as image:
            return image.width / image.height
    except DymoeError as error:
        raise DymoeError(f"{file}: not a readable picture ({error}); run `dymoe analyze overlay` again") from None
