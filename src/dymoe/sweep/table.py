"""The Markdown tables of a sweep: methods side by side, the published order beside them, the rates chosen."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

from dymoe.errors import DymoeError
from dymoe.evaluation.intervals import Answers, Interval, accuracy, compare, metrics
from dymoe.messages import brief, nearest
from dymoe.numbers import Stat, number

UNIT = "lora"  # the row whose training time is 1
METRICS = ("MFN", "MAA", "BWT", "MFT")
SHARED = ("MFN", "BWT")  # compared with the published order, and with the sweep's reference
PUBLISHED_STREAM = "coin"  # that the published numbers are of
FEWEST = 3  # rows below which a rank correlation says nothing

COLUMNS = """Sorted by MFN. Accuracy in percent: MFN
after the last task, MAA averaged over stages, MFT of each task as just learned; BWT in points, divided by the number of
tasks T. *Forgetting* (best earlier minus final accuracy), *format drift* (points lost under the strict rule and not
under the lenient one) and *drift* (percent of routing weight that a task's tokens put on later groups at the end) are
means over all tasks but the last. *Trained* parameters are the last task's and *stored* ones all that is kept, in
millions."""
TIME = f"""
*Time* is training time relative to `{UNIT}` of the same seed (without a GPU: CPU time), where both ran on a like
machine without a break."""
INTERVALS = """ In brackets,
where the records hold the scores of single questions, the 95 % interval over questions and seeds (docs/intervals.md);
that of a row with one seed holds for this training alone."""
LOCATOR = """
*Locator*: percent of validation prompts for which a task locator is right after the last task, mean over tasks."""
PAIRED = """
*Against {reference}*: the row's value minus that of `{reference}`, paired by question and by the seeds that both have,
with its interval, and what the row is: more, less or not told apart."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """The records of one row of the table: a label with an order and instructions, one record a seed."""

    label: str
    order: str
    instructions: str
    rows: tuple[Row, ...]
    units: tuple[Row | None, ...]

    def stat(self, value: Callable[[Row], float | None]) -> Stat | None:
        """Mean and spread over the seeds that have the number; None where no seed has it."""
        numbers = [count for row in self.rows if (count := value(row)) is not None]
        return Stat.of(numbers) if numbers else None

    def metric(self, name: str) -> Stat | None:
        """One of the metrics, as the records hold it."""
        return self.stat(lambda row: row["metrics"].get(name))

    @cached_property
    def runs(self) -> list[Answers]:
        """The scores of single questions, a run a seed; none where a record lacks them."""
        return answers(self.rows)

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """The metrics with their 95 % intervals; none without the scores of single questions."""
        return metrics(self.runs) if self.runs else {}

    def metric_text(self, name: str) -> str:
        """One of the metrics with its interval, or with the spread over seeds where there is none."""
        sign = name == "BWT"
        return self.intervals[name].text(sign) if name in self.intervals else _text(self.metric(name), sign=sign)

    def task_text(self, task: str) -> str:
        """Accuracy on a task at the end, likewise."""
        if self.runs and all(task in run.scores for run in self.runs):
            return accuracy([run.scores[task][-1] for run in self.runs]).text()
        return _text(self.stat(lambda row: final(row).get(task)))

    def locator_text(self) -> str:
        """How often the task locator was right after the last task, of the records that say it."""
        answers = [
            Answers(
                tasks=tuple(row["locator"]["tasks"]),
                scores={task: [located["right"]] for task, located in row["locator"]["tasks"].items()},
                questions=dict.fromkeys(row["locator"]["tasks"], ""),
            )
            for row in self.rows
            if "locator" in row
        ]
        # The mean over tasks at one time, which is what MFN is.
        return metrics(answers)["MFN"].text() if answers else "–"

    def time(self) -> Stat | None:
        """Training time relative to the `UNIT`'s of the same seed, where both are told and comparable."""
        known = []
        for row, unit in zip(self.rows, self.units, strict=True):
            mine, other = training_seconds(row), training_seconds(unit) if unit else None
            if mine and other and unit and row.get("machine") == unit.get("machine"):
                known.append(mine / other)
        return Stat.of(known) if known else None


def answers(rows: Sequence[Row]) -> list[Answers]:
    """The scores of single questions of each record; none where one lacks them, as those of earlier versions do."""
    return [Answers.of(row, row["label"]) for row in rows] if all(row.get("answers") for row in rows) else []


def paired(averages: Sequence[Line], reference: str) -> dict[str, dict[str, Interval] | str]:
    """By row its differences to the reference of the same order and instructions, or why there are none.

    The reference itself is left out. Nothing where no two rows have the scores of single questions.

    Args:
        averages: all rows.
        reference: the label of one.
    """
    beside = {(line.order, line.instructions): line for line in averages if line.label == reference}
    differences: dict[str, dict[str, Interval] | str] = {}
    for line in averages:
        other = beside.get((line.order, line.instructions))
        if line is other:
            continue
        if other is None:
            differences[_name(line)] = "that row is not there with this order and instructions"
        elif not (line.runs and other.runs):
            differences[_name(line)] = "no scores of single questions"
        else:
            try:
                differences[_name(line)] = compare(line.runs, other.runs)
            except DymoeError as error:
                differences[_name(line)] = str(error)
    return {} if all(isinstance(difference, str) for difference in differences.values()) else differences


def training_seconds(row: Row) -> float | None:
    """Seconds that a run trained, the method's own work between tasks and its probes included.

    None for a run that trained nothing, for one that was interrupted (its seconds are those since then), and for an
    early record of wall time on a machine that may have been shared.
    """
    seconds = row.get("seconds") or {}
    if not row.get("steps") or any(row.get("resumed_at") or ()) or "clock" not in (row.get("machine") or {}):
        return None
    return float(sum(sum(seconds.get(key, ())) for key in ("train", "method", "probe")))


def lines(rows: Sequence[Row]) -> list[Line]:
    """The records gathered over seeds, best mean MFN first (ties by label)."""
    by_key = {_key(row): row for row in rows}
    gathered: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        gathered.setdefault((row["label"], row["order"], row["instructions"]), []).append(row)
    averaged = []
    for condition, members in gathered.items():
        members.sort(key=lambda row: int(row["seed"]))
        units = tuple(by_key.get((UNIT, *_key(row)[1:])) for row in members)
        averaged.append(Line(*condition, tuple(members), units))
    return sorted(averaged, key=lambda line: (-_mean(line.metric("MFN")), line.label, line.order, line.instructions))


def earlier(by_task: Mapping[str, float] | None, tasks: Sequence[str]) -> float | None:
    """Mean over all tasks but the last one learned, which had nothing to lose; None without such a task."""
    values = [by_task[task] for task in tasks[:-1] if task in by_task] if by_task else []
    return statistics.fmean(values) if values else None


def drift(row: Row) -> float | None:
    """Mean share of routing weight, in percent, that earlier tasks' tokens put on later groups at the end."""
    last = {task: 100 * values[-1] for task, values in (row.get("drift") or {}).items() if values}
    return earlier(last, row["tasks"])


def ranks(values: Sequence[float]) -> list[float]:
    """Rank of each value, 1 for the greatest; equal values share the mean of their ranks."""
    return [
        sum(other > value for other in values) + (1 + sum(other == value for other in values)) / 2 for value in values
    ]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None for fewer than `FEWEST` pairs or where one side is all equal."""
    if len(first) < FEWEST or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    # Python 3.12's method="ranked" is this; 3.11 has no such argument.
    return statistics.correlation(ranks(first), ranks(second))


def published(name: str) -> dict[str, Any]:
    """A part of the published numbers: its title, source and rows.

    Raises:
        DymoeError: there is no such part.
    """
    parts = json.loads(files("dymoe.sweep").joinpath("published.json").read_text(encoding="utf-8"))["parts"]
    if name not in parts:
        raise DymoeError(f"published: no published numbers {brief(name)}; {nearest(name, parts)}")
    return dict(parts[name])


def markdown(results: Mapping[str, Any]) -> str:
    """The page of a sweep: what was run, the table, accuracy at the end, the published rows beside it.

    Args:
        results: the sweep's JSON: ``about`` (title, command, budget, seeds, machine, versions, published, reference)
            and ``rows``.
    """
    about, rows = results["about"], results["rows"]
    head = [f"# {about.get('title') or 'Sweep'}", "", *_head(about)]
    if not rows:
        return "\n".join([*head, "", "No run is finished yet.", ""])
    averages = lines(rows)
    planned = len({*(about.get("seeds") or ()), *(row["seed"] for row in rows)})
    reference = about.get("reference") or ""
    differences = paired(averages, reference)
    table, notes = _table(averages, planned, reference, differences), _notes(averages, planned, reference, differences)
    parts = [*head, "", *table, "", *notes, "", *_at_the_end(averages)]
    if about.get("published"):
        parts += ["", *_beside(averages, published(about["published"]))]
    return "\n".join([*parts, ""])


def tuning_markdown(results: Mapping[str, Any]) -> str:
    """The page of a tuning sweep: mean final accuracy by learning rate, the chosen one in bold.

    Args:
        results: the sweep's JSON: ``about``, ``rows`` (each with ``of`` and ``rate``) and ``chosen``.
    """
    about, rows, chosen = results["about"], results["rows"], results.get("chosen") or {}
    head = [f"# {about.get('title') or 'Learning rates'}", "", *_head(about), ""]
    if not rows:
        return "\n".join([*head, "No run is finished yet.", ""])
    grid = sorted({row["rate"] for row in rows})
    tried: dict[str, dict[float, list[Row]]] = {}
    for row in rows:
        tried.setdefault(row["of"], {}).setdefault(row["rate"], []).append(row)
    intervals = INTERVALS if any(row.get("answers") for row in rows) else ""
    head += [
        "Mean final accuracy (MFN, percent) on the validation split by learning rate. The best is chosen (bold), of",
        f"equals the smaller rate; a method whose grid is not complete has none.{intervals}",
        "",
    ]
    table = [_cells(["method", *(f"{rate:g}" for rate in grid), "chosen"]), _rule(len(grid) + 2)]
    for method in sorted(tried):
        cells = []
        for rate in grid:
            members = tried[method].get(rate)
            text = Line(method, "", "", tuple(members), ()).metric_text("MFN") if members else "–"
            cells.append(f"**{text}**" if members and chosen.get(method) == rate else text)
        table.append(_cells([method, *cells, f"{chosen[method]:g}" if method in chosen else "–"]))
    return "\n".join([*head, *table, ""])


def _key(row: Row) -> tuple[str, str, str, int]:
    return (row["label"], row["order"], row["instructions"], row["seed"])


def _mean(stat: Stat | None) -> float:
    return float("-inf") if stat is None else stat.mean


def _name(line: Line) -> str:
    """The label, order and instructions said where they are not the usual ones."""
    parts = [line.order] if line.order != "origin" else []
    parts += [line.instructions] if line.instructions != "original" else []
    return ", ".join([line.label, *parts])


def _head(about: Mapping[str, Any]) -> list[str]:
    """Command, budget and machine."""
    sentences = [f"Written by `{about['command']}`; not edited by hand."] if about.get("command") else []
    budget = about.get("budget") or {}
    if budget:
        sentences.append(f"Budget: {', '.join(f'{key} {_plain(value)}' for key, value in budget.items())}.")
    machine = about.get("machine") or {}
    if machine:
        sentences.append(f"Machine (of the last run): {', '.join(f'{key} {_plain(v)}' for key, v in machine.items())}.")
    versions = about.get("versions") or {}
    if versions:
        sentences.append(f"Versions: {', '.join(f'{key} {value}' for key, value in versions.items())}.")
    return sentences


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)


def _table(
    averages: Sequence[Line], planned: int, reference: str, differences: Mapping[str, dict[str, Interval] | str]
) -> list[str]:
    """One line of the table for each row, best final accuracy first."""
    rates = {row["recipe"]["training"]["lr"] for line in averages for row in line.rows}
    timed, located = _any_time(averages), _any_locator(averages)
    head = ["method", "seeds", *METRICS, *(f"{name} against {reference}" for name in SHARED if differences)]
    head += ["locator"] if located else []
    head += ["forgetting", "format drift", "drift", "trained", "stored"]
    head += [*(["time"] if timed else []), *(["lr"] if len(rates) > 1 else [])]
    table = [_cells(head), _rule(len(head))]
    for line in averages:
        count = len(line.rows)
        cells = [_name(line), str(count) if count == planned else f"{count} of {planned}"]
        cells += [line.metric_text(name) for name in METRICS]
        cells += [_difference(differences.get(_name(line)), name) for name in SHARED if differences]
        cells += [line.locator_text()] if located else []
        cells += [
            _text(line.stat(lambda row: earlier(row.get("forgetting"), row["tasks"]))),
            _text(line.stat(lambda row: earlier(row.get("format_drift"), row["tasks"]))),
            _text(line.stat(drift)),
            _count(line.stat(lambda row: row["trainable_parameters"] / 1e6)),
            _count(line.stat(lambda row: row["stored_parameters"] / 1e6)),
        ]
        if timed:
            cells.append(_text(line.time(), digits=2))
        if len(rates) > 1:
            cells.append(", ".join(f"{lr:g}" for lr in sorted({r["recipe"]["training"]["lr"] for r in line.rows})))
        table.append(_cells(cells))
    return table


def _difference(differences: dict[str, Interval] | str | None, name: str) -> str:
    """The cell of a paired difference: value, interval and verdict."""
    if not isinstance(differences, dict) or name not in differences:
        return "–"
    return f"{differences[name].text(sign=True)}, {differences[name].verdict}"


def _any_locator(averages: Sequence[Line]) -> bool:
    """Whether a record says how often a task locator is right."""
    return any("locator" in row for line in averages for row in line.rows)


def _any_time(averages: Sequence[Line]) -> bool:
    """Whether the row that training time is relative to is there, and another beside it."""
    labels = {line.label for line in averages}
    return UNIT in labels and len(labels) > 1


def _notes(
    averages: Sequence[Line], planned: int, reference: str, differences: Mapping[str, dict[str, Interval] | str]
) -> list[str]:
    """What the columns mean."""
    fewer = [_name(line) for line in averages if len(line.rows) < planned]
    several = any(len(line.rows) > 1 for line in averages)
    opening = "Mean ± sample standard deviation over seeds" if several else "One seed, so no standard deviation"
    paragraph = f"{opening}.{INTERVALS if any(line.runs for line in averages) else ''} {COLUMNS}"
    paragraph += PAIRED.format(reference=reference) if differences else ""
    paragraph += (LOCATOR if _any_locator(averages) else "") + (TIME if _any_time(averages) else "")
    notes = [paragraph]
    if fewer:
        notes += ["", f"Fewer seeds than {planned}: {', '.join(fewer)}. Such means are not over the same seeds."]
    missing = [f"{name} ({why})" for name, why in differences.items() if isinstance(why, str)]
    if missing:
        notes += ["", f"Not compared with {reference}: {'; '.join(missing)}."]
    return notes


def _at_the_end(averages: Sequence[Line]) -> list[str]:
    """Accuracy on each task after the last one, by row."""
    tasks = list(dict.fromkeys(task for line in averages for row in line.rows for task in row["tasks"]))
    table = ["## Accuracy on each task at the end", "", _cells(["method", *tasks]), _rule(len(tasks) + 1)]
    for line in averages:
        table.append(_cells([_name(line), *(line.task_text(task) for task in tasks)]))
    return table


def final(row: Row) -> dict[str, float]:
    """Accuracy on each task at the end: the matrix's last row, or what a method without stages has."""
    values = row.get("joint") or (row["matrix"][-1] if row.get("matrix") else None) or row.get("zero_shot") or ()
    return dict(zip(row["tasks"], values, strict=False))


def _beside(averages: Sequence[Line], part: Mapping[str, Any]) -> list[str]:
    """The published rows beside the sweep's, and how well the orders agree."""
    by_key = {(line.label, line.order, line.instructions): line for line in averages}
    pairs: list[tuple[Row, Line | None]] = []
    for row in sorted(part["rows"], key=lambda row: -row["MFN"]):
        line = by_key.get((row["label"], row.get("order", "origin"), row.get("instructions", "original")))
        measured = line is not None and all(line.metric(name) is not None for name in SHARED)
        pairs.append((row, line if measured else None))
    shared = [(row, line) for row, line in pairs if line is not None]
    theirs = {name: [row[name] for row, _ in shared] for name in SHARED}
    here = {name: [_mean(line.metric(name)) for _, line in shared] for name in SHARED}
    text = ["## Beside the published order", "", f"Published: {part['source']}. {_worth(averages)}", ""]
    head = ["row", *(f"published {name}" for name in (*SHARED, "MAA"))]
    head += [f"{name} here" for name in SHARED]
    head += [f"rank by {name}, published / here" for name in SHARED]
    text += [_cells(head), _rule(len(head))]
    both = {name: zip(ranks(theirs[name]), ranks(here[name]), strict=True) for name in SHARED}
    for row, line in pairs:
        values = [number(row.get(name), 2, sign=name == "BWT") for name in (*SHARED, "MAA")]
        label = ", ".join([row["label"], *(row[key] for key in ("order", "instructions") if key in row)])
        if line is None:
            values += ["–"] * (2 * len(SHARED))
        else:
            values += [line.metric_text(name) for name in SHARED]
            values += [f"{rank:g} / {other:g}" for rank, other in (next(both[name]) for name in SHARED)]
        text.append(_cells([label, *values]))
    agreement = {name: rank_correlation(theirs[name], here[name]) for name in SHARED}
    correlations = [f"{name} {number(value, 2, sign=True)}" for name, value in agreement.items() if value is not None]
    text.append("")
    if correlations:
        text.append(f"Spearman's rank correlation over the {len(shared)} shared rows: {', '.join(correlations)}.")
    else:
        text.append(f"Shared rows: {len(shared)}. A rank correlation needs {FEWEST} that are not all equal.")
    return text


def _worth(averages: Sequence[Line]) -> str:
    """What a published number is worth beside the sweep's: it depends on the stream they were learned on."""
    if {row.get("stream") for line in averages for row in line.rows} == {PUBLISHED_STREAM}:
        return (
            "The same benchmark: a number is comparable where base model, budget and scoring rules are the paper's too "
            "(recipes/coin/base.yaml)."
        )
    return (
        "Another model, other data and another budget: the numbers are not comparable, only the order of the rows is."
    )


def _text(stat: Stat | None, digits: int = 1, sign: bool = False) -> str:
    return "–" if stat is None else stat.text(digits, sign)


def _count(stat: Stat | None) -> str:
    """Parameters in millions; most methods have as many with every seed."""
    return _text(Stat(stat.mean, None) if stat and not stat.spread else stat, digits=2)


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _rule(columns: int) -> str:
    return "|---" * columns + "|"
