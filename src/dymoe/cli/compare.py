"""`dymoe compare A B`: the metrics of two methods, their difference and whether it is told apart."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dymoe.cli.options import Command
from dymoe.errors import DymoeError
from dymoe.messages import nearest, say

if TYPE_CHECKING:
    from dymoe.evaluation.intervals import Answers

HELP = """usage: dymoe compare A B

Compare two methods on the questions that both were asked: every metric with its 95 % interval, the difference A - B,
paired by question and by seed, and a verdict: more, less or not told apart.

  A, B   a run folder; several (one a seed) as a quoted pattern, 'runs/dymoe-seed*'; or a row of a sweep's results,
         FILE:ROW, for example results/leaderboard.jsonl:dymoe

How intervals are made: docs/intervals.md."""

COMMAND = Command("compare", HELP, "A B")


def main(argv: Sequence[str]) -> int:
    """Print the comparison."""
    say(*table(*COMMAND.parse(argv).words))
    return 0


def table(first: str, second: str) -> list[str]:
    """The comparison as lines of text.

    Raises:
        DymoeError: no such runs, results without the scores of single questions, or other questions.
    """
    from dymoe.evaluation.intervals import compare, metrics

    ours, theirs = runs(first), runs(second)
    try:
        differences = compare(ours, theirs)
    except DymoeError as error:
        raise DymoeError(f"{first}, {second}: {error}") from None
    seeds = sorted({run.seed for run in ours} & {run.seed for run in theirs})
    shared = [[run for run in group if run.seed in seeds] for group in (ours, theirs)]
    sides = [metrics(group) for group in shared]
    rows: list[tuple[str, ...]] = [("", "A", "B", "A - B", "A is")]
    for name, difference in differences.items():
        cells = [side[name].text(sign=name.startswith("BWT")) for side in sides]
        rows.append((name, *cells, difference.text(sign=True), difference.verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    count = {len(run.scores[task][0]) for run in ours for task in run.tasks}
    per_task = f"{min(count)}" if len(count) == 1 else f"{min(count)} to {max(count)}"
    seed_list = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    head = [
        f"A: {first}",
        f"B: {second}",
        f"{len(ours[0].tasks)} tasks, {per_task} questions each, {seed_list}",
        "",
    ]
    return head + [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def runs(name: str) -> "list[Answers]":
    """The runs of a method, one a seed: a folder, a pattern of folders, or FILE:ROW of a sweep's results.

    Raises:
        DymoeError: there are none, two have one seed, or their results hold no scores of single questions.
    """
    from dymoe.evaluation.intervals import Answers
    from dymoe.learning.formats import read_results, run_results

    file, colon, label = name.rpartition(":")
    if colon and Path(file).is_file():
        rows = read_results(file)["rows"]
        chosen = [row for row in rows if row["label"] == label]
        if not chosen:
            raise DymoeError(f"{file}: has no row {label!r}; {nearest(label, {row['label'] for row in rows})}")
        answers = [Answers.of(row, f"{name}, seed {row['seed']}") for row in chosen]
    else:
        folders = sorted(glob.glob(name)) or [name]
        answers = [Answers.of(run_results(folder), folder) for folder in folders]
    seeds = [run.seed for run in answers]
    if len(set(seeds)) < len(seeds):
        raise DymoeError(f"{name}: names several runs of one seed; give one configuration, with one run a seed")
    return answers
