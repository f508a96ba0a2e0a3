"""`dymoe doctor RECIPE`: check everything before a run begins."""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dymoe.cli.options import Command, Kind, integer

if TYPE_CHECKING:
    from dymoe.preflight.findings import Checkup

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

OPTIONS: dict[str, Kind] = {"--all": None, "--samples": integer, "--json": None}
COMMAND = Command("doctor", HELP, "RECIPE", OPTIONS, keys="dymoe.learning.recipe.Recipe")


def main(argv: Sequence[str]) -> int:
    """Check, print, and return 1 if something is wrong."""
    arguments = COMMAND.parse(argv)
    (path,) = arguments.words
    from dymoe.learning.catalog import locate
    from dymoe.learning.recipe import load_recipe

    recipe = load_recipe(path, arguments.keys)
    from dymoe.learning.progress import Display
    from dymoe.preflight.doctor import check

    ahead = Display("doctor", 0)
    checkup = check(recipe, path, arguments["--samples"], locate(path).parent, "--all" in arguments, ahead.inspecting)
    if "--json" in arguments:
        print(json.dumps(checkup.as_dict(), indent=1, ensure_ascii=True))
        return 1 if checkup.wrong else 0
    from dymoe.terminal import tables as terminal

    for table in tables(checkup):
        terminal().print(table)
    notes = sum(finding.level == "note" for finding in checkup.findings)
    print(f"{checkup.wrong} wrong, {notes} notes")
    return 1 if checkup.wrong else 0


def tables(checkup: "Checkup") -> Iterator[Any]:
    """What was found, for a terminal: findings, tasks, recipes."""
    from rich.text import Text

    from dymoe.terminal import table

    colours = {"wrong": "red", "note": "yellow", "fine": "green"}
    findings = sorted(checkup.findings, key=lambda finding: list(colours).index(finding.level))
    levels = [Text(finding.level, style=colours[finding.level]) for finding in findings]
    yield table(
        ("", "what", "where", "result", "how to mend it"),
        [(level, each.what, each.where, each.result, each.mend) for level, each in zip(levels, findings, strict=True)],
        "What was checked",
    )
    if checkup.tasks:
        rows = []
        for row in checkup.tasks:
            counts = (f"{row['train']:,}", f"{row['test']:,}", f"{row['tokens_mean']:.0f}", str(row["tokens_longest"]))
            rows.append((row["task"], *counts, "-" if row["hours"] is None else f"{row['hours']:,.2f}"))
        yield table(("task", "train", "test", "tokens, mean", "longest", "hours"), rows, "Tasks")
    if checkup.fits:
        fits = [(row["recipe"], f"{row['bytes'] / 1e9:.1f}", "yes" if row["fits"] else "no") for row in checkup.fits]
        yield table(("recipe", "GB", "fits"), fits, f"Recipes on {checkup.machine['device']}")
