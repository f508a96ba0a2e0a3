"""`dymoe doctor RECIPE`: check everything before a run begins."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dymoe.cli.options import parse, whole
from dymoe.errors import DymoeError
from dymoe.messages import brief

if TYPE_CHECKING:
    from dymoe.preflight.findings import Checkup, Finding

HELP = """usage: dymoe doctor RECIPE [--all] [--samples N] [--json] [--KEY VALUE ...]

Check what a run needs before it begins: every sample that it takes (picture, special tokens, length, right answer),
sizes against the published ones, questions that are both learned and asked, the model's processor, disk, memory, time,
versions; and say which of the recipes beside this one fit the machine. What was found of samples is kept in the cache,
also for the run. Exit code 1 if something is wrong, 0 if there are only notes.

  RECIPE       a YAML file, or one of `dymoe list recipes`, for example coin/dymoe
  --all        look at every sample of the files, also at those that the recipe's limits and split leave aside
  --samples N  look at the first N of each split alone
  --json       print JSON instead of tables; all samples that cannot be used are listed in it
  --KEY VALUE  set a key of the recipe, for example --data.root /data/coin"""


def main(argv: Sequence[str]) -> int:
    """Check, print, and return 1 if something is wrong."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0 if argv else 2
    if argv[0].startswith("-"):
        raise DymoeError(f"doctor: expected a recipe before {brief(argv[0])}, for example coin/dymoe")
    samples, words = _samples(argv[1:])
    from dymoe.learning.catalog import locate
    from dymoe.learning.recipe import load_recipe

    recipe = load_recipe(argv[0], [word for word in words if word not in ("--all", "--json")])
    from dymoe.learning.progress import Display
    from dymoe.preflight.doctor import check

    ahead = Display("doctor", 0)
    found = check(recipe, argv[0], samples, locate(argv[0]).parent, "--all" in words, ahead.inspecting)
    if "--json" in words:
        print(json.dumps(found.as_dict(), indent=1, ensure_ascii=True))
        return 1 if found.wrong else 0
    from dymoe.terminal import tables as terminal

    console = terminal()
    for table in tables(found):
        console.print(table)
    notes = sum(finding.level == "note" for finding in found.findings)
    print(f"{found.wrong} wrong, {notes} notes")
    return 1 if found.wrong else 0


def _samples(words: Sequence[str]) -> tuple[int | None, list[str]]:
    """The value of --samples, and the other words (the recipe's keys are known to the recipe alone)."""
    own: list[str] = []
    rest: list[str] = []
    given = list(words)
    while given:
        word = given.pop(0)
        if word.partition("=")[0] != "--samples":
            rest.append(word)
            continue
        own += [word] if "=" in word else [word, *given[:1]]
        del given[: 0 if "=" in word else 1]
    options, _ = parse("doctor", own, ("--samples",))
    return whole("doctor", options, "--samples"), rest


def tables(found: "Checkup") -> Iterator[Any]:
    """What was found, for a terminal: findings, tasks, recipes."""
    from rich.table import Table
    from rich.text import Text

    def made(title: str, *heads: str) -> Table:
        table = Table(title=title)
        for head in heads:
            table.add_column(head, overflow="fold")
        return table

    colours = {"wrong": "red", "note": "yellow", "fine": "green"}
    first = made("What was checked", "", "what", "where", "found", "how to mend it")
    order: Callable[[Finding], int] = lambda finding: list(colours).index(finding.level)  # noqa: E731
    for finding in sorted(found.findings, key=order):
        words = (finding.what, finding.where, finding.found, finding.mend)
        first.add_row(Text(finding.level, style=colours[finding.level]), *words)
    yield first
    if found.tasks:
        second = made("Tasks", "task", "train", "test", "tokens, mean", "longest", "hours")
        for row in found.tasks:
            hours = "-" if row["hours"] is None else f"{row['hours']:,.2f}"
            counts = (f"{row['train']:,}", f"{row['test']:,}", f"{row['tokens_mean']:.0f}", str(row["tokens_longest"]))
            second.add_row(row["task"], *counts, hours)
        yield second
    if found.fits:
        third = made(f"Recipes on {found.machine['device']}", "recipe", "GB", "fits")
        for row in found.fits:
            third.add_row(row["recipe"], f"{row['bytes'] / 1e9:.1f}", "yes" if row["fits"] else "no")
        yield third
