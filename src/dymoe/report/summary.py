"""What the runs say: seeds gathered into methods, means with spread, and the answer in words."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dymoe.report.runs import Run

METRICS = ("MFT", "MFN", "MAA", "BWT", "BWT_T-1")


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """A number as the page shows it, with a real minus sign; an en dash where there is none."""
    if value is None:
        return "–"
    rounded = round(value, digits) + 0.0  # -0.0 becomes 0.0
    return f"{rounded:+.{digits}f}".replace("-", "−") if sign else f"{rounded:.{digits}f}".replace("-", "−")


@dataclass(frozen=True)
class Stat:
    """A mean over the seeds of a method and the sample standard deviation (None for a single seed)."""

    mean: float
    spread: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Stat":
        """Mean and spread of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def text(self, digits: int = 1, sign: bool = False) -> str:
        """As in "61.2 ± 0.4"."""
        spread = "" if self.spread is None else f" ± {number(self.spread, digits)}"
        return number(self.mean, digits, sign) + spread


@dataclass(frozen=True)
class Method:
    """The runs (seeds) of one method; `index` picks its colour and its marker everywhere on the page."""

    label: str
    runs: tuple[Run, ...]
    index: int

    @property
    def joint(self) -> bool:
        """Whether all tasks were learned at once (an upper bound that has no stages and forgets nothing)."""
        return self.runs[0].joint is not None

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
        return self.joint or self.stages == len(self.tasks)

    @property
    def seeds(self) -> str:
        """As in "seeds 0, 1"."""
        numbers = ", ".join(str(run.seed) for run in self.runs)
        return f"seed {numbers}" if len(self.runs) == 1 else f"seeds {numbers}"

    def metric(self, key: str) -> Stat | None:
        """One of METRICS over the runs; of a joint run only the final accuracy (MFN) has a meaning."""
        if not self.joint:
            return Stat.of([run.matrix(self.stages).to_dict()[key] for run in self.runs])
        return Stat.of([statistics.fmean(run.joint or ()) for run in self.runs]) if key == "MFN" else None

    def rows(self) -> list[list[float]]:
        """The accuracy matrix, averaged over the runs cell by cell."""
        return [
            [statistics.fmean(run.rows[t][i] for run in self.runs) for i in range(t + 1)] for t in range(self.stages)
        ]

    def joint_accuracy(self, task: int) -> float:
        """Mean accuracy in percent of a joint method on one task."""
        return statistics.fmean(run.joint[task] for run in self.runs if run.joint)

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

    def worst_loss(self) -> str:
        """Which task lost most and the later task whose learning cost it most, in words."""
        lost = [
            (stat.mean, task)
            for task in range(self.stages - 1)
            if (stat := self.forgetting(task)) is not None and stat.mean >= 0.05
        ]
        if not lost:
            return "nothing" if self.stages > 1 else "–"
        points, task = max(lost, key=lambda pair: pair[0])
        rows = self.rows()
        drops = [(rows[t - 1][task] - rows[t][task], t) for t in range(task + 1, self.stages)]
        stage = max(drops, key=lambda pair: pair[0])[1]
        return f"{self.tasks[task]} ({number(points)} points, mostly while learning {self.tasks[stage]})"


def gather(runs: Sequence[Run]) -> list[Method]:
    """Group runs by method and settings, in the order given.

    Runs that differ in their seed alone are averaged. Where a method comes with several settings, the label names
    what differs. Two runs with the same settings and seed cannot be two seeds of one configuration, so then each
    stands alone under its own name.
    """
    grouped: dict[tuple[str, str, bool], list[Run]] = {}
    for run in runs:
        grouped.setdefault((run.method, _settings(run), run.joint is not None), []).append(run)
    labelled: list[tuple[str, list[Run]]] = []
    for (method, _, _), members in grouped.items():
        variants = [other[0] for other in grouped.values() if other[0].method == method]
        label = f"{method}{_difference(members[0], variants)}"
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


def _settings(run: Run) -> str:
    """The method's settings as one text that is equal for equal settings."""
    return json.dumps(run.facts.get("settings") or {}, sort_keys=True, default=str)


def _difference(run: Run, variants: Sequence[Run]) -> str:
    """The settings of `run` in which the variants of its method differ, " (key value, ...)" or nothing."""
    held = [variant.facts.get("settings") or {} for variant in variants]
    keys = sorted({key for settings in held for key in settings})
    own = run.facts.get("settings") or {}
    told = [f"{key} {own.get(key)}" for key in keys if any(settings.get(key) != own.get(key) for settings in held)]
    return f" ({', '.join(told)})" if told else ""


def _listing(parts: Sequence[str], most: int = 4) -> str:
    """Parts as in "a, b and c"; of more than `most` only the first and the last."""
    if len(parts) > most:
        return f"{parts[0]} down to {parts[-1]}"
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def headline(methods: Sequence[Method]) -> str:
    """The one sentence that a reader came for: which method forgot least, with its numbers."""
    sequential = [method for method in methods if not method.joint]
    if not sequential:
        return f"All tasks were learned at once: {number(_metric(methods[0], 'MFN'))} % correct on average."
    stages = max(method.stages for method in sequential)
    ranked = sorted(
        (method for method in sequential if method.stages == stages),
        key=lambda method: _metric(method, "BWT"),
        reverse=True,
    )
    best = ranked[0]
    if stages == 1:
        return f"Only {best.tasks[0]} has been learned so far, so nothing could be forgotten yet."
    scope = "" if best.complete else f" (after {stages} of {len(best.tasks)} tasks)"
    if len(ranked) == 1:
        return (
            f"{best.label} went from {number(_metric(best, 'MFT'))} % just after learning each task to "
            f"{number(_metric(best, 'MFN'))} % at the end: backward transfer of {_bwt(best)} points{scope}."
        )
    others = _listing([f"{_bwt(method)} for {method.label}" for method in ranked[1:]])
    return f"{best.label} forgot least: backward transfer of {_bwt(best)} points against {others}{scope}."


def remarks(methods: Sequence[Method]) -> list[str]:
    """What the headline must not be read without: final accuracy, chance, what is unfinished or unlike."""
    notes = []
    shown = [(m, _metric(m, "MFN")) for m in methods if m.complete]
    if len(shown) > 1:
        ranked = sorted(shown, key=lambda pair: pair[1], reverse=True)
        notes.append(
            "Mean accuracy at the end: "
            + _listing([f"{number(value)} % for {method.label}" for method, value in ranked])
            + "."
        )
    sequential = sorted(
        (m for m in methods if not m.joint and m.stages == max(x.stages for x in methods) > 1),
        key=lambda method: _metric(method, "BWT"),
        reverse=True,
    )
    if len(sequential) > 1:
        notes.append(_chance(sequential[0], sequential[1]))
    for method in methods:
        if not method.complete:
            notes.append(
                f"{method.label} is shown as far as its runs have come: {method.stages} of {len(method.tasks)} tasks."
            )
    notes += _unlike([run for method in methods for run in method.runs])
    return notes


def _metric(method: Method, key: str) -> float:
    stat = method.metric(key)
    return math.nan if stat is None else stat.mean


def _bwt(method: Method) -> str:
    stat = method.metric("BWT")
    return "–" if stat is None else stat.text(sign=True)


def _chance(best: Method, second: Method) -> str:
    """Whether the first two can be told apart by the seeds there are."""
    first, other = best.metric("BWT"), second.metric("BWT")
    if first is None or other is None or first.spread is None or other.spread is None:
        return "A method with a single seed has no spread: a small difference to it may be chance."
    gap, spread = first.mean - other.mean, max(first.spread, other.spread)
    verdict = "more than" if gap > spread else "no more than"
    return (
        f"The first two differ by {number(gap)} points, {verdict} the larger spread over seeds "
        f"({number(spread)}); ± is the standard deviation over seeds."
    )


def _unlike(runs: Sequence[Run]) -> list[str]:
    """One remark for each setting in which the runs differ although a comparison needs it equal."""
    settings: dict[str, Callable[[Run], object]] = {
        "base model": lambda run: run.base,
        "steps per task": lambda run: run.facts.get("steps_per_task"),
        "evaluation split": lambda run: run.facts.get("split"),
        "instructions": lambda run: run.facts.get("instructions"),
    }
    notes = []
    for what, read in settings.items():
        values = sorted({str(read(run)) for run in runs})
        if len(values) > 1:
            notes.append(f"These runs differ in their {what} ({', '.join(values)}); compare them with care.")
    return notes
