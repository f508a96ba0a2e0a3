"""`dymoe sweep SWEEP`: many recipes and seeds, each learned in a process of its own."""

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dymoe.cli.run import accepted
from dymoe.errors import DymoeError
from dymoe.messages import brief, say

HELP = """usage: dymoe sweep SWEEP [--dry-run] [--replace] [--accept PART ...] [--KEY VALUE ...]

Learn every cell (recipe, order, instructions, seed) of a sweep file, several at a time, seed by seed; write the records
(JSON) and the table (Markdown) after each. Called again it goes on: what stands in the JSON is not learned again.

  SWEEP       a YAML file, or one of `dymoe list recipes`, for example pocket/leaderboard
  --dry-run   print the cells that are still to be learned and stop
  --replace   drop records that this sweep would make otherwise, instead of refusing to start
  --accept PART
              of cells that were begun under other conditions, as `dymoe run --resume --accept PART`
  --KEY VALUE set a key of the sweep, for example --seeds '[0]' --jobs 6 --base.training.steps_per_task 120

keys and their defaults:"""

FLAGS = ("--dry-run", "--replace", "--resume")


def main(argv: Sequence[str]) -> int:
    """Check the sweep in full, learn what is missing; 1 if a cell failed."""
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0 if argv else 2
    if argv[0].startswith("-"):
        raise DymoeError(f"sweep: expected a sweep file before {brief(argv[0])}, for example pocket/leaderboard")
    from dymoe.sweep.sweep import load_sweep

    words, accept = accepted(argv[1:])
    overrides = [word for word in words if word not in FLAGS]
    command = shlex.join(["dymoe", "sweep", argv[0], *overrides])
    return learn(load_sweep(argv[0], overrides), argv[0], argv, command, accept)


def learn(sweep: Any, path: str, argv: Sequence[str], command: str, accept: Sequence[str] = ()) -> int:
    """Learn what is missing of a sweep and write its records and table; 1 if a cell failed, 130 if interrupted.

    Args:
        sweep: the sweep.
        path: its file, or the recipe that it is about; recipes are looked for beside it.
        argv: of its words `FLAGS` are read.
        command: what goes on with it.
        accept: in what a cell that was begun may differ here (`dymoe run --accept`).
    """
    from dymoe.learning.formats import read_results
    from dymoe.sweep.jobs import only_one
    from dymoe.sweep.plan import Plan

    if sweep.published:
        from dymoe.sweep.table import published

        published(sweep.published)
    plan = Plan(sweep, path)
    dry = "--dry-run" in argv
    # The records are read under the lock, or those of a sweep that just ends would be lost.
    with nullcontext() if dry else only_one(Path(sweep.output)):
        found = read_results(sweep.results)
        rows, todo = plan.sort_out(found["rows"], "--replace" in argv, sweep.results)
        say(f"{path}: {len(plan.cells)} cells, {len(plan.cells) - len(todo)} stand in {sweep.results}")
        if dry:
            for cell in todo:
                say(f"  {cell.name}")
            return 0
        book = _Book(plan, {**found["about"], **_about(plan, command)}, rows)
        return _work(plan, todo, book, command, accept)


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


def help_text() -> str:
    """The usage with every key of a sweep file, its type and default."""
    from dymoe.methods.settings import describe
    from dymoe.sweep.sweep import Sweep

    rows = [(f"--{key}", kind, default) for key, kind, default in describe(Sweep)]
    width = max(len(key) for key, _, _ in rows)
    lines = [f"  {key:<{width}}  {kind}{f' ({default})' if default else ''}" for key, kind, default in rows]
    return "\n".join([HELP, *lines])
