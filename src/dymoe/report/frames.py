"""The kept analyses of the runs, and what the routing figures take from them."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dymoe.evaluation.metrics import ROUNDING
from dymoe.report.runs import Run
from dymoe.report.summary import Method

if TYPE_CHECKING:
    import pandas as pd

PARTS = ("image", "instruction", "answer")
ALL = "all tokens"


@dataclass(frozen=True)
class Analysed:
    """A kept analysis of one method: the frame of its first run that has one, with at least one row.

    `made` says how it was made: the method and the command.
    """

    method: Method
    run: Run
    frame: "pd.DataFrame"
    made: str


def analysed(methods: Sequence[Method], name: str) -> list[Analysed]:
    """The methods with a kept analysis `name` (see `dymoe.analysis.stored`), in their order.

    Raises:
        DymoeError: a file is broken or of another analysis; the message names it.
    """
    from dymoe.analysis import about, stored

    found = []
    for method in methods:
        frames = ((run, stored(run.path, name)) for run in method.runs)
        known = next(((run, frame) for run, frame in frames if frame is not None and len(frame)), None)
        if known is not None:
            run, frame = known
            command = (about(run.path, name) or {}).get("command", f"dymoe analyze {name}")
            found.append(Analysed(method, run, frame, f"{method.label}, seed {run.seed}: {command}"))
    return found


def made(found: Sequence[Analysed]) -> tuple[str, ...]:
    """How the analyses were made, a line each."""
    return tuple(one.made for one in found)


def routed(method: Method) -> bool:
    """Whether a method's tokens are divided among groups, as its stages' routing.json say."""
    return any(routing.divides for run in method.runs for routing in run.routing.values())


def missing(methods: Sequence[Method], found: Sequence[Analysed], name: str) -> tuple[str, str]:
    """Which methods lack an analysis, and the command that makes it for the first of them; empty where none does."""
    there = {one.method.index for one in found}
    lacking = [method for method in methods if routed(method) and method.index not in there]
    unlogged = [method for method in lacking if name == "dynamics" and not any(map(_logged, method.runs))]
    able = [method for method in lacking if method not in unlogged]
    note = f"Nothing was logged while {_names(unlogged)} learned (training.dynamics_every). " if unlogged else ""
    if not able:
        return note.strip(), ""
    how = "This makes it" if len(able) == 1 else "For the first, this makes it"
    command = f"dymoe analyze {name} {shlex.quote(str(able[0].runs[0].path))}"
    return f"{note}Not analysed yet: {_names(able)}. {how}:", command


def _names(methods: Sequence[Method]) -> str:
    return ", ".join(method.label for method in methods)


def _logged(run: Run) -> bool:
    """Whether the trainer wrote down how routing changed; older runs have no such log."""
    return any(run.path.glob("stages/*/dynamics.jsonl"))


def later_weight(frame: "pd.DataFrame") -> "pd.DataFrame":
    """The weight that tokens put on groups added after their task's own: one row for each place and part.

    Args:
        frame: the analysis `drift`, groups in the order they were added.

    Returns:
        Columns task, stage, layer, projection, part, later (0..1), changed (0..1), tokens. Tasks that have no drift
        (see `dymoe.evaluation.metrics.drift`) are left out.
    """
    place = {group: number for number, group in enumerate(dict.fromkeys(frame["group"]))}
    own = frame["task"].map(place)
    after = frame["weight"].where(frame["group"].map(place) > own, 0.0)
    by = ["task", "stage", "layer", "projection", "part"]
    rows = frame.assign(later=after, own=own).groupby(by, sort=False, as_index=False)
    cells = rows.agg(
        later=("later", "sum"),
        whole=("weight", "sum"),
        own=("own", "first"),
        changed=("changed", "first"),
        tokens=("tokens", "first"),
    )
    divided = cells.groupby("task")["whole"].transform("max") <= 1 + ROUNDING
    return cells[divided & cells["own"].notna()].drop(columns=["whole", "own"]).reset_index(drop=True)


def mean_over(cells: "pd.DataFrame", by: Sequence[str]) -> "pd.DataFrame":
    """`later` and `changed` in percent: means over tokens within each layer and projection, then over these.

    Args:
        cells: of `later_weight`.
        by: columns that the result has one row for each value of.
    """
    weighted = cells.assign(later=cells["later"] * cells["tokens"], changed=cells["changed"] * cells["tokens"])
    places = [*by, *(column for column in ("layer", "projection") if column not in by)]
    sums = weighted.groupby(places, sort=False)[["later", "changed", "tokens"]].sum()
    means = sums[["later", "changed"]].div(sums["tokens"], axis=0) * 100
    return means.groupby(list(by), sort=False).mean().reset_index()
