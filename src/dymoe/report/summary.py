"""What the runs say in numbers: seeds gathered into methods, means with spread."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dymoe.numbers import Stat
from dymoe.report.runs import Run

METRICS = ("MFT", "MFN", "MAA", "BWT", "BWT_T-1")


@dataclass(frozen=True)
class Method:
    """The runs (seeds) of one method; `index` picks its colour and its marker everywhere on the page."""

    label: str
    runs: tuple[Run, ...]
    index: int

    @property
    def level(self) -> bool:
        """Whether there are no stages, so that nothing is forgotten: all tasks learned at once, or none."""
        return self.runs[0].level is not None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The stream's tasks in learned order."""
        return self.runs[0].tasks

    @property
    def stages(self) -> int:
        """Stages that every run of the method has done; all means are over these."""
        return min(run.stages for run in self.runs)

    @property
    def complete(self) -> bool:
        """Whether every run has learned the whole stream."""
        return self.level or self.stages == len(self.tasks)

    @property
    def seeds(self) -> str:
        """As in "seeds 0, 1"."""
        numbers = ", ".join(str(run.seed) for run in self.runs)
        return f"seed {numbers}" if len(self.runs) == 1 else f"seeds {numbers}"

    def metric(self, key: str) -> Stat | None:
        """One of METRICS over the runs; without stages only the final accuracy (MFN) has a meaning."""
        if not self.level:
            return Stat.of([run.matrix(self.stages).to_dict()[key] for run in self.runs])
        return Stat.of([statistics.fmean(run.level or ()) for run in self.runs]) if key == "MFN" else None

    def rows(self) -> list[list[float]]:
        """The accuracy matrix, averaged over the runs cell by cell."""
        return [
            [statistics.fmean(run.rows[t][i] for run in self.runs) for i in range(t + 1)] for t in range(self.stages)
        ]

    def level_accuracy(self, task: int) -> float:
        """Mean accuracy in percent on one task of a method without stages."""
        return statistics.fmean(run.level[task] for run in self.runs if run.level)

    def forgetting(self, task: int) -> Stat | None:
        """Percentage points lost on a task since its best earlier stage; None before it was learned."""
        if task >= self.stages:
            return None
        return Stat.of([run.matrix(self.stages).forgetting()[task] for run in self.runs])

    def format_drift(self, task: int) -> Stat | None:
        """Format drift in points as results.json gives it; None where a run does not give it."""
        name = self.tasks[task]
        given = [run.format_drift[name] for run in self.runs if name in run.format_drift]
        return Stat.of(given) if len(given) == len(self.runs) else None

    def drift(self, stage: int, task: int) -> float | None:
        """Mean weight in percent that a task's tokens put on newer groups at a stage (1-based)."""
        name = self.tasks[task]
        given = [run.routing[stage].drift(name) for run in self.runs if stage in run.routing]
        known = [value for value in given if value is not None]
        return 100 * statistics.fmean(known) if len(known) == len(self.runs) else None

    def mean_drift(self, stage: int) -> float | None:
        """`drift` averaged over the old tasks of a stage; None at the first stage or without routing."""
        known = [value for i in range(stage - 1) if (value := self.drift(stage, i)) is not None]
        return statistics.fmean(known) if known else None

    def change(self, task: int, stage: int) -> Stat | None:
        """Points that a task's accuracy changed by at a stage (1-based) that learned another; None before that."""
        if not task + 1 < stage <= self.stages:
            return None
        return Stat.of([run.rows[stage - 1][task] - run.rows[stage - 2][task] for run in self.runs])

    def change_of_task(self, task: int) -> Stat | None:
        """Points that a task's accuracy changed by since it was learned; None where nothing was learned after it.

        The sum over tasks is T times backward transfer, and so is the sum over stages of `change_at`.
        """
        if not task + 1 < self.stages:
            return None
        return Stat.of([run.rows[self.stages - 1][task] - run.rows[task][task] for run in self.runs])

    def change_at(self, stage: int) -> Stat | None:
        """Points that the tasks before it changed by at a stage (1-based), summed over them; None at the first."""
        if not 1 < stage <= self.stages:
            return None
        return Stat.of(
            [math.fsum(run.rows[stage - 1][i] - run.rows[stage - 2][i] for i in range(stage - 1)) for run in self.runs]
        )


def gather(runs: Sequence[Run]) -> list[Method]:
    """Group runs by method and settings, in the order given.

    Runs that differ in their seed alone are averaged. Where a method comes with several settings, the label names
    what differs. Two runs with the same settings and seed cannot be two seeds of one configuration, so then each
    stands alone under its own name.
    """
    grouped: dict[tuple[str, str, bool], list[Run]] = {}
    for run in runs:
        settings = json.dumps(_settings(run), sort_keys=True, default=str)
        grouped.setdefault((_name(run), settings, run.level is not None), []).append(run)
    labelled: list[tuple[str, list[Run]]] = []
    for (name, _, _), members in grouped.items():
        variants = [other[0] for other in grouped.values() if _name(other[0]) == name]
        label = f"{name}{_difference(members[0], variants)}"
        if len({run.seed for run in members}) == len(members):
            labelled.append((label, sorted(members, key=lambda run: run.seed)))
        else:
            labelled.extend((f"{label} ({run.name})", [run]) for run in members)
    labels = [label for label, _ in labelled]
    methods = []
    for index, (label, members) in enumerate(labelled):
        if labels.count(label) > 1:
            label = f"{label} [{members[0].path.name}]"
        methods.append(Method(label, tuple(members), index))
    return methods


def _name(run: Run) -> str:
    """The sweep's row, or the method with its companions, as in "dymoe with replay"."""
    if run.label:
        return run.label
    companions = run.facts.get("with")
    return f"{run.method} with {', '.join(companions)}" if companions else run.method


def _settings(run: Run) -> dict[str, object]:
    """The method's settings and, as "replay.size", those of its companions; none where a sweep names the row."""
    if run.label:
        return {}
    found = dict(run.facts.get("settings") or {})
    companions = run.facts.get("with") or {}
    for name in companions:
        values = companions[name] if isinstance(companions, dict) else None
        found |= {f"{name}.{key}": value for key, value in (values or {}).items()}
    return found


def _difference(run: Run, variants: Sequence[Run]) -> str:
    """The settings of `run` in which the variants of its method differ, " (key value, ...)" or nothing."""
    held = [_settings(variant) for variant in variants]
    keys = sorted({key for settings in held for key in settings})
    own = _settings(run)
    told = [f"{key} {own.get(key)}" for key in keys if any(settings.get(key) != own.get(key) for settings in held)]
    return f" ({', '.join(told)})" if told else ""
