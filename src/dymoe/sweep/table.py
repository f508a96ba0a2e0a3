"""The Markdown tables of a sweep: methods side by side, the published order beside them, the rates chosen."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from dymoe.errors import DymoeError
from dymoe.messages import brief, nearest
from dymoe.numbers import Stat, number

REFERENCE = "lora"  # training time is told relative to this row
METRICS = ("MFN", "MAA", "BWT", "MFT")
SHARED = ("MFN", "BWT")  # whose order is compared with the published one
PUBLISHED_STREAM = "coin"  # that the published numbers are of
FEWEST = 3  # rows below which a rank correlation says nothing

COLUMNS = """Sorted by MFN. Accuracy in percent: MFN
after the last task, MAA averaged over stages, MFT of each task as just learned; BWT in points, divided by the number of
tasks T. *Forgetting* (best earlier minus final accuracy), *format drift* (points lost under the strict rule and not
under the lenient one) and *drift* (percent of routing weight that a task's tokens put on later groups at the end) are
means over all tasks but the last. *Trained* parameters are the last task's and *stored* ones all that is kept, in
millions."""
TIME = f"""
*Time* is training time relative to `{REFERENCE}` of the same seed (without a GPU: CPU time), where both ran on a like
machine without a break."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """The records of one row of the table: a label with an order and instructions, one record a seed."""

    label: str
    order: str
    instructions: str
    rows: tuple[Row, ...]
    references: tuple[Row | None, ...]

    def stat(self, value: Callable[[Row], float | None]) -> Stat | None:
        """Mean and spread over the seeds that have the number; None where no seed has it."""
        known = [found for row in self.rows if (found := value(row)) is not None]
        return Stat.of(known) if known else None

    def metric(self, name: str) -> Stat | None:
        """One of the metrics, as the records hold it."""
        return self.stat(lambda row: row["metrics"].get(name))

    def time(self) -> Stat | None:
        """Training time relative to the reference's of the same seed, where both are told and comparable."""
        known = []
        for row, reference in zip(self.rows, self.references, strict=True):
            mine, other = training_seconds(row), training_seconds(reference) if reference else None
            if mine and other and reference and row.get("machine") == reference.get("machine"):
                known.append(mine / other)
        return Stat.of(known) if known else None


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
    by_place = {_place(row): row for row in rows}
    gathered: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        gathered.setdefault((row["label"], row["order"], row["instructions"]), []).append(row)
    found = []
    for place, members in gathered.items():
        members.sort(key=lambda row: int(row["seed"]))
        references = tuple(by_place.get((REFERENCE, *_place(row)[1:])) for row in members)
        found.append(Line(*place, tuple(members), references))
    return sorted(found, key=lambda line: (-_mean(line.metric("MFN")), line.label, line.order, line.instructions))


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
        results: the sweep's JSON: ``about`` (title, command, budget, seeds, machine, versions, published) and
            ``rows``.
    """
    about, rows = results["about"], results["rows"]
    head = [f"# {about.get('title') or 'Sweep'}", "", *_head(about)]
    if not rows:
        return "\n".join([*head, "", "No run is finished yet.", ""])
    found = lines(rows)
    planned = len({*(about.get("seeds") or ()), *(row["seed"] for row in rows)})
    parts = [*head, "", *_table(found, planned), "", *_notes(found, planned), "", *_at_the_end(found)]
    if about.get("published"):
        parts += ["", *_beside(found, published(about["published"]))]
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
    scores: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        scores.setdefault(row["of"], {}).setdefault(row["rate"], []).append(row["metrics"]["MFN"])
    head += [
        "Mean final accuracy (MFN, percent) on the validation split by learning rate. The best is chosen (bold), of",
        "equals the smaller rate; a method whose grid is not complete has none.",
        "",
    ]
    table = [_cells(["method", *(f"{rate:g}" for rate in grid), "chosen"]), _rule(len(grid) + 2)]
    for method in sorted(scores):
        cells = []
        for rate in grid:
            values = scores[method].get(rate)
            text = Stat.of(values).text() if values else "–"
            cells.append(f"**{text}**" if values and chosen.get(method) == rate else text)
        table.append(_cells([method, *cells, f"{chosen[method]:g}" if method in chosen else "–"]))
    return "\n".join([*head, *table, ""])


def _place(row: Row) -> tuple[str, str, str, int]:
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
    told = [f"Written by `{about['command']}`; not edited by hand."] if about.get("command") else []
    budget = about.get("budget") or {}
    if budget:
        told.append(f"Budget: {', '.join(f'{key} {_plain(value)}' for key, value in budget.items())}.")
    machine = about.get("machine") or {}
    if machine:
        told.append(f"Machine (of the last run): {', '.join(f'{key} {_plain(v)}' for key, v in machine.items())}.")
    versions = about.get("versions") or {}
    if versions:
        told.append(f"Versions: {', '.join(f'{key} {value}' for key, value in versions.items())}.")
    return told


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)


def _table(found: Sequence[Line], planned: int) -> list[str]:
    """One line of the table for each row, best final accuracy first."""
    rates = {row["recipe"]["training"]["lr"] for line in found for row in line.rows}
    timed = _timed(found)
    head = ["method", "seeds", *METRICS, "forgetting", "format drift", "drift", "trained", "stored"]
    head += [*(["time"] if timed else []), *(["lr"] if len(rates) > 1 else [])]
    table = [_cells(head), _rule(len(head))]
    for line in found:
        count = len(line.rows)
        cells = [_name(line), str(count) if count == planned else f"{count} of {planned}"]
        cells += [_text(line.metric(name), sign=name == "BWT") for name in METRICS]
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


def _timed(found: Sequence[Line]) -> bool:
    """Whether the row that training time is relative to is there, and another beside it."""
    labels = {line.label for line in found}
    return REFERENCE in labels and len(labels) > 1


def _notes(found: Sequence[Line], planned: int) -> list[str]:
    """What the columns mean."""
    fewer = [_name(line) for line in found if len(line.rows) < planned]
    several = any(len(line.rows) > 1 for line in found)
    told = "Mean ± sample standard deviation over seeds" if several else "One seed, so no standard deviation"
    notes = [f"{told}. {COLUMNS}{TIME if _timed(found) else ''}"]
    if fewer:
        notes += ["", f"Fewer seeds than {planned}: {', '.join(fewer)}. Such means are not over the same seeds."]
    return notes


def _at_the_end(found: Sequence[Line]) -> list[str]:
    """Accuracy on each task after the last one, by row."""
    tasks = sorted({task for line in found for row in line.rows for task in row["tasks"]}, key=_first_seen(found))
    table = ["## Accuracy on each task at the end", "", _cells(["method", *tasks]), _rule(len(tasks) + 1)]
    for line in found:
        cells = [_text(line.stat(lambda row, task=task: final(row).get(task))) for task in tasks]  # type: ignore[misc]
        table.append(_cells([_name(line), *cells]))
    return table


def final(row: Row) -> dict[str, float]:
    """Accuracy on each task at the end: the matrix's last row, or what a method without stages has."""
    values = row.get("joint") or (row["matrix"][-1] if row.get("matrix") else None) or row.get("zero_shot") or ()
    return dict(zip(row["tasks"], values, strict=False))


def _first_seen(found: Sequence[Line]) -> Callable[[str], int]:
    order = list(dict.fromkeys(task for line in found for row in line.rows for task in row["tasks"]))
    return order.index


def _beside(found: Sequence[Line], part: Mapping[str, Any]) -> list[str]:
    """The published rows beside the sweep's, and how well the orders agree."""
    by_place = {(line.label, line.order, line.instructions): line for line in found}
    rows = sorted(part["rows"], key=lambda row: -row["MFN"])
    shared = []
    for row in rows:
        line = by_place.get((row["label"], row.get("order", "origin"), row.get("instructions", "original")))
        if line is not None and all(line.metric(name) is not None for name in SHARED):
            shared.append((row, line))
    told = [
        "## Beside the published order",
        "",
        f"Published: {part['source']}. {_worth(found)}",
        "",
    ]
    head = ["row", *(f"published {name}" for name in (*SHARED, "MAA"))]
    head += [f"{name} here" for name in SHARED]
    head += [f"rank by {name}, published / here" for name in SHARED]
    told += [_cells(head), _rule(len(head))]
    theirs = {name: ranks([row[name] for row, _ in shared if row.get(name) is not None]) for name in SHARED}
    here = {name: ranks([_mean(line.metric(name)) for _, line in shared]) for name in SHARED}
    place = {id(row): index for index, (row, _) in enumerate(shared)}
    for row in rows:
        index = place.get(id(row))
        values = [number(row.get(name), 2, sign=name == "BWT") for name in (*SHARED, "MAA")]
        label = ", ".join([row["label"], *(row[key] for key in ("order", "instructions") if key in row)])
        if index is None:
            told.append(_cells([label, *values, *["–"] * (2 * len(SHARED))]))
            continue
        line = shared[index][1]
        values += [_text(line.metric(name), sign=name == "BWT") for name in SHARED]
        values += [f"{theirs[name][index]:g} / {here[name][index]:g}" for name in SHARED]
        told.append(_cells([label, *values]))
    found_words = []
    for name in SHARED:
        value = rank_correlation([row[name] for row, _ in shared], [_mean(line.metric(name)) for _, line in shared])
        if value is not None:
            found_words.append(f"{name} {number(value, 2, sign=True)}")
    told.append("")
    if found_words:
        told.append(f"Spearman's rank correlation over the {len(shared)} shared rows: {', '.join(found_words)}.")
    else:
        told.append(f"Shared rows: {len(shared)}. A rank correlation needs {FEWEST} that are not all equal.")
    return told


def _worth(found: Sequence[Line]) -> str:
    """What a published number is worth beside the sweep's: it depends on the stream they were learned on."""
    if {row.get("stream") for line in found for row in line.rows} == {PUBLISHED_STREAM}:
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
