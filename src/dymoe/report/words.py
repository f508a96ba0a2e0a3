"""The answer in words: who forgot least, what it forgot and when, and what this must not be read without."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dymoe.numbers import number
from dymoe.report.runs import Run
from dymoe.report.summary import Method

# Points below which a loss is not told: the page shows one digit.
SEEN = 0.05


@dataclass(frozen=True)
class Card:
    """One answer of the first screen: a question's `title`, the answer in a few words, and what belongs to it."""

    title: str
    lead: str
    text: str


def _listing(parts: Sequence[str], most: int = 4) -> str:
    """Parts as in "a, b and c"; of more than `most` only the first and the last."""
    if len(parts) > most:
        return f"{parts[0]} down to {parts[-1]}"
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def ranked(methods: Sequence[Method]) -> list[Method]:
    """The methods that learned task by task and have come farthest, the one that forgot least first."""
    sequential = [method for method in methods if not method.level]
    stages = max((method.stages for method in sequential), default=0)
    farthest = [method for method in sequential if method.stages == stages]
    return sorted(farthest, key=lambda method: _metric(method, "BWT"), reverse=True)


def headline(methods: Sequence[Method]) -> str:
    """The one sentence that a reader came for: which method forgot least, with its numbers."""
    order = ranked(methods)
    if not order:
        how = "All tasks were learned at once" if methods[0].runs[0].trained else "No task was learned"
        return f"{how}: {number(_metric(methods[0], 'MFN'))} % correct on average."
    best = order[0]
    if best.stages == 1:
        return f"Only {best.tasks[0]} has been learned so far, so nothing could be forgotten yet."
    scope = "" if best.complete else f" (after {best.stages} of {len(best.tasks)} tasks)"
    if len(order) == 1:
        return (
            f"{best.label} went from {number(_metric(best, 'MFT'))} % just after learning each task to "
            f"{number(_metric(best, 'MFN'))} % at the end: backward transfer of {_bwt(best)} points{scope}."
        )
    others = _listing([f"{_bwt(method)} for {method.label}" for method in order[1:]])
    return f"{best.label} forgot least: backward transfer of {_bwt(best)} points against {others}{scope}."


def cards(methods: Sequence[Method]) -> list[Card]:
    """What the best method forgot, when, what is left, and the method that forgot most; nothing before stage 2."""
    order = ranked(methods)
    if not order or order[0].stages < 2:
        return []
    best = order[0]
    told = [Card(f"What {best.label} forgot", *_what(best)), Card("When", *_when(best)), _left(best, methods)]
    if len(order) > 1:
        worst = order[-1]
        text = f"{_bwt(worst)} points of backward transfer. Most of {lost_most(worst)}."
        told.append(Card("Forgot most", worst.label, text if _losses(worst) else f"{_bwt(worst)} points."))
    return told


def lost_most(method: Method) -> str:
    """The task that lost most since it was learned, and the later task whose learning cost it most."""
    lost = _losses(method)
    if not lost:
        return "nothing" if method.stages > 1 else "–"
    points, task = lost[0]
    drops = [
        (change.mean, stage)
        for stage in range(task + 2, method.stages + 1)
        if (change := method.change(task, stage)) is not None
    ]
    stage = min(drops)[1]
    return f"{method.tasks[task]} ({number(-points)} points, mostly while learning {method.tasks[stage - 1]})"


def _losses(method: Method) -> list[tuple[float, int]]:
    """(change in points, task) of every task that ended below what it was when learned, the greatest loss first."""
    changes = [(change.mean, task) for task in range(method.stages) if (change := method.change_of_task(task))]
    return sorted(pair for pair in changes if pair[0] <= -SEEN)


def _what(method: Method) -> tuple[str, str]:
    lost = [f"{method.tasks[task]} {number(points, sign=True)}" for points, task in _losses(method)]
    kept = method.stages - 1 - len(lost)
    if not lost:
        return "Nothing", "No task ended below its accuracy when it was learned."
    also = [f"Then {', '.join(lost[1:])}." if lost[1:] else "No other task."]
    also += [f"{kept} of {method.stages - 1} older tasks lost nothing."] if kept else []
    return f"{lost[0]} points", " ".join(also)


def _when(method: Method) -> tuple[str, str]:
    costs = [(change.mean, stage) for stage in range(2, method.stages + 1) if (change := method.change_at(stage))]
    points, stage = min(costs)
    if points > -SEEN:
        return "At no stage", "Every stage left the older tasks, taken together, where they were or better."
    each = [(change.mean, task) for task in range(stage - 1) if (change := method.change(task, stage))]
    worst, task = min(each)
    older = "the task before it" if stage == 2 else f"the {stage - 1} tasks before it taken together"
    text = f"{number(points, sign=True)} points over {older}"
    if stage > 2:
        text += f", most of all {method.tasks[task]} ({number(worst, sign=True)})"
    return f"Learning {method.tasks[stage - 1]}", f"{text}."


def _left(best: Method, methods: Sequence[Method]) -> Card:
    title = "What is left" if best.complete else "What is left so far"
    text = f"{best.label}, from {number(_metric(best, 'MFT'))} % as each task was just learned."
    finals = sorted(((_metric(m, "MFN"), m.label) for m in methods if m.complete), reverse=True)
    if best.complete and len(finals) > 1:
        others = [f"{label} {number(value)} %" for value, label in finals if label != best.label]
        text += f" The others: {', '.join(others[:3])}{', …' if len(others) > 3 else '.'}"
    return Card(title, f"{number(_metric(best, 'MFN'))} % correct", text)


def remarks(methods: Sequence[Method]) -> list[str]:
    """What the headline must not be read without: chance, what is unfinished or unlike."""
    notes = []
    order = ranked(methods)
    if len(order) > 1 and order[0].stages > 1:
        notes.append(_chance(order[0], order[1]))
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
