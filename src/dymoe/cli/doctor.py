"""`dymoe doctor RECIPE`: check everything before a run begins."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dymoe.cli.options import parse, whole
from dymoe.errors import DymoeError

HELP = """usage: dymoe doctor RECIPE [--all] [--samples N] [--json] [--KEY VALUE ...]

Check what a run needs before it begins: records, pictures, sizes against the published ones, token lengths, samples
without a loss, questions that are both learned and asked, disk, memory, time, versions; and say which of the recipes
beside this one fit the machine. Exit code 1 if something is wrong, 0 if there are only notes.

  RECIPE       a YAML file, for example recipes/coin/dymoe.yaml
  --all        look at every picture and every sample's tokens (default: 64 of each split, and the longest texts)
  --samples N  look at N of each split
  --json       print JSON instead of tables
  --KEY VALUE  set a key of the recipe, for example --data.root /data/coin"""


def main(argv: Sequence[str]) -> int:
    """Check, print, and return 1 if something is wrong."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0 if argv else 2
    if argv[0].startswith("-"):
        raise DymoeError(f"doctor: expected a recipe before {argv[0]!r}, for example recipes/coin/dymoe.yaml")
    samples, words = _samples(argv[1:])
    from dymoe.learning.recipe import load_recipe

    recipe = load_recipe(argv[0], [word for word in words if word not in ("--all", "--json")])
    from dymoe.learning.doctor import check, tables

    found = check(recipe, argv[0], None if "--all" in words else samples, Path(argv[0]).parent)
    if "--json" in words:
        print(json.dumps(found.as_dict(), indent=1, ensure_ascii=False))
        return 1 if found.wrong else 0
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 140)
    for table in tables(found):
        console.print(table)
    notes = sum(finding.level == "note" for finding in found.findings)
    print(f"{found.wrong} wrong, {notes} notes")
    return 1 if found.wrong else 0


def _samples(words: Sequence[str]) -> tuple[int, list[str]]:
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
    return whole("doctor", options, "--samples") or 64, rest
