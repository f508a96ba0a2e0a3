"""`dymoe sweep SWEEP`: many recipes and seeds, each learned in a process of its own."""

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dymoe.cli.options import Arguments, Command, Kind, part_accepted
from dymoe.messages import say

HELP = """usage: dymoe sweep SWEEP [--dry-run] [--replace] [--accept PART ...] [--KEY VALUE ...]

Learn every cell (recipe, order, instructions, seed) of a sweep file, several at a time, seed by seed; write the records
(JSON) and the table (Markdown) after each. Called again it goes on: what stands in the JSON is not learned again.

  SWEEP       a YAML file, or one of `dymoe list recipes`, for example pocket/leaderboard
  --dry-run   print the cells that are still to be learned and stop
  --replace   drop records that this sweep would make otherwise, instead of refusing to start
  --accept PART
              of cells that were begun under other conditions, as `dymoe run --resume --accept PART`
  --KEY VALUE set a key of the sweep, for example --seeds '[0]' --jobs 6 --base.training.steps_per_task 120
"""

FLAGS: dict[str, Kind] = {"--dry-run": None, "--replace": None}
COMMAND = Command(
    "sweep",
    HELP,
    "SWEEP",
    {**FLAGS, "--accept": part_accepted},
    repeated=("--accept",),
    keys="dymoe.sweep.sweep.Sweep",
)


def main(argv: Sequence[str]) -> int:
    """Check the sweep in full, learn what is missing; 1 if a cell failed."""
    from dymoe.sweep.sweep import load_sweep

    arguments = COMMAND.parse(argv)
    command = shlex.join(["dymoe", "sweep", *arguments.words, *arguments.keys])
    return learn(load_sweep(arguments.words[0], arguments.keys), arguments, command)


def learn(sweep: Any, arguments: Arguments, command: str) -> int:
    """Learn what is missing of a sweep and write its records and table; 1 if a cell failed, 130 if interrupted.

    Args:
        sweep: the sweep.
        arguments: its file, or the recipe that it is about (recipes are looked for beside it), `FLAGS`, and in what a
            cell that was begun may differ here (``--accept``, as of `dymoe run`).
        command: what goes on with it.
    """
    from dymoe.learning.formats import read_results
    from dymoe.sweep.jobs import only_one
    from dymoe.sweep.plan import Plan

    if sweep.published:
        from dymoe.sweep.table import published

        published(sweep.published)
    path = arguments.words[-1]
    plan = Plan(sweep, path)
    dry = "--dry-run" in arguments
    # The records are read under the lock, or those of a sweep that just ends would be lost.
    with nullcontext() if dry else only_one(Path(sweep.output)):
        results = read_results(sweep.results)
        rows, todo = plan.sort_out(results["rows"], "--replace" in arguments, sweep.results)
        say(f"{path}: {len(plan.cells)} cells, {len(plan.cells) - len(todo)} stand in {sweep.results}")
        if dry:
            for cell in todo:
                say(f"  {cell.name}")
            return 0
        book = _Book(plan, {**results["about"], **_about(plan, command)}, rows)
        return _work(plan, todo, book, command, arguments["--accept"] or ())


def _about(plan: Any, command: str) -> dict[str, Any]:
    """What the results say about themselves before anything has run."""
    sweep = plan.sweep
    return {
        "title": sweep.title,
        "command": command,
        "published": sweep.published,
        "reference": sweep.reference,
        "seeds": sweep.seeds,
        "budget": plan.budget(),
    }


class _Book:
    """The records, written with their table whenever one is added."""

    def __init__(self, plan: Any, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        self.plan = plan
        self.about = about
        self.rows = rows

    def add(self, row: dict[str, Any]) -> None:
        """A finished cell."""
        self.about = {**self.about, "machine": row.get("machine"), "versions": row.get("versions")}
        rows, _ = self.plan.sort_out([*self.rows, row], False, self.plan.sweep.results)
        self.rows = rows
        self.write()

    def write(self) -> None:
        """Both files, each in full or not at all."""
        from dymoe.files import atomic_write
        from dymoe.learning.formats import write_results
        from dymoe.sweep.records import choose
        from dymoe.sweep.table import markdown, tuning_markdown

        if self.rows and not self.about.get("machine"):
            self.about = {**self.about, **{key: self.rows[-1].get(key) for key in ("machine", "versions")}}
        head: dict[str, Any] = {"about": self.about}
        tuning = bool(self.plan.sweep.tune.grid)
        if tuning:
            head["chosen"] = choose(self.rows, self.plan.cells)
        write_results(self.plan.sweep.results, head, self.rows)
        results = {**head, "rows": self.rows}
        atomic_write(self.plan.sweep.table, tuning_markdown(results) if tuning else markdown(results))


def _work(plan: Any, todo: Sequence[Any], book: _Book, command: str, accept: Sequence[str]) -> int:
    """Learn what is missing, tell what failed."""
    from dymoe.sweep.jobs import SweepDisplay, work

    sweep = plan.sweep
    failed: list[tuple[Any, str]] = []
    if not todo:
        book.write()
    try:
        with SweepDisplay(len(plan.cells), len(plan.cells) - len(todo)) as display:
            failed = work(todo, sweep.jobs, sweep.threads, book.add, display, accept)
    except KeyboardInterrupt:
        say(f"dymoe: interrupted; go on with: {command}", error=True)
        return 130
    for cell, why in failed:
        say(f"dymoe: {cell.name} failed: {why} (see {cell.log})", error=True)
    say(f"Records: {sweep.results}", f"Table: {sweep.table}")
    return 1 if failed else 0
