"""`dymoe show RUN`: the accuracy matrix and the metrics in the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dymoe.cli.options import Command

if TYPE_CHECKING:
    from dymoe.evaluation.intervals import Interval
    from dymoe.learning.formats import Results

HELP = """usage: dymoe show RUN [RUN ...]

Print the accuracy matrix and the metrics of each run."""

COMMAND = Command("show", HELP, "RUN ...")
UNITS = {"loss": "nats/token"}  # of what is measured beside accuracy


def main(argv: Sequence[str]) -> int:
    """Print one run after the other."""
    for path in COMMAND.parse(argv).words:
        show(Path(path))
    return 0


def show(path: Path) -> None:
    """Print the matrix and the metrics of the run in `path`.

    Raises:
        DymoeError: the folder holds no results, or broken ones.
    """
    from dymoe.learning.formats import run_results
    from dymoe.terminal import Terminal

    results = run_results(path)
    console = Terminal()
    # Not as the table's own title, which would be broken to the table's width.
    console.print(title(results), soft_wrap=True, style="italic")
    console.print(matrix_table(results))
    console.print(metrics_line(results), soft_wrap=True)
    if results.get("watch"):
        console.print("only asked, never learned (accuracy in percent)", soft_wrap=True, style="italic")
        console.print(watch_table(results))


def title(results: "Results") -> str:
    """What the table shows, of which run."""
    return f"{results['method']} on {results['stream']}, seed {results['seed']} (accuracy in percent)"


def matrix_table(results: "Results") -> Any:
    """The accuracy matrix as a rich table: a row per stage, a column per task, percent."""
    from rich.text import Text

    from dymoe.terminal import table

    tasks = results["tasks"]
    rows: list[list[str | Text]] = []
    for label, accuracies in (("no task", results.get("zero_shot")), ("all at once", results.get("joint"))):
        if accuracies:
            rows.append([label, *(f"{value:.1f}" for value in accuracies)])
    for number, row in enumerate(results.get("matrix", [])):
        cells = [_cell(results, tasks[index], number - index, value) for index, value in enumerate(row)]
        # The last one is of the task just learned.
        rows.append([tasks[number], *cells[:-1], Text(cells[-1], style="bold"), *[""] * (len(tasks) - len(row))])
    return table(("after", *tasks), rows, numbers=1)


def watch_table(results: "Results") -> Any:
    """The tasks that are only asked as a rich table: a row before the first stage, one per stage, and the change."""
    from rich.table import Table

    from dymoe.evaluation.intervals import accuracy, change

    watch = results["watch"]
    table = Table()
    table.add_column("after")
    for task, row in watch.items():
        table.add_column(task, justify="right")
        for name in row["measures"]:
            table.add_column(UNITS.get(name, name), justify="right")
    stages = max(len(row["accuracy"]) for row in watch.values())
    for index, label in enumerate(stage_names(results)[:stages]):
        cells = []
        for row in watch.values():
            cells.append(_interval(accuracy([row["scores"][index]])))
            cells += [f"{values[index]:.2f}" for values in row["measures"].values()]
        table.add_row(label, *cells)
    if stages > 1:
        cells = []
        for row in watch.values():
            cells.append(change(row["scores"][:1], row["scores"][-1:]).text(sign=True))
            cells += [f"{values[-1] - values[0]:+.2f}".replace("-", "−") for values in row["measures"].values()]
        table.add_row("change", *cells, style="bold")
    return table


def stage_names(results: "Results") -> list[str]:
    """What stands before the rows of the tasks that are only asked: nothing learned, then what was learned last."""
    return ["no task", *(["all at once"] if results.get("joint") else results["tasks"])]


def _interval(interval: "Interval") -> str:
    return f"{interval.value:.1f} ({interval.low:.0f}–{interval.high:.0f})"


def _cell(results: "Results", task: str, stage: int, value: float) -> str:
    """An accuracy with its 95 % interval, where the scores of single questions are there."""
    from dymoe.evaluation.intervals import accuracy

    if task not in results.get("answers", {}):
        return f"{value:.1f}"
    return _interval(accuracy([results["answers"][task]["scores"][stage]]))


def metrics_line(results: "Results") -> str:
    """The metrics in one line, those there are, with 95 % intervals (docs/intervals.md)."""
    from dymoe.evaluation.intervals import Answers, metrics

    parts = [f"{name} {value:.2f}" for name, value in results.get("metrics", {}).items()]
    if parts and results.get("answers"):
        intervals = metrics([Answers.of(results, "results.json")])
        parts = [f"{name} {interval.text(sign=name.startswith('BWT'))}" for name, interval in intervals.items()]
    drift = results.get("format_drift") or {}
    if drift:
        parts.append(f"format drift {sum(drift.values()) / len(drift):.2f}")
    return "  ".join(parts) or "no stage is done yet"
