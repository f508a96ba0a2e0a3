"""`dymoe run RECIPE`: learn a stream of tasks."""

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dymoe.errors import DymoeError
from dymoe.messages import brief, say

if TYPE_CHECKING:
    from rich.table import Table

    from dymoe.preflight.dryrun import Measured

HELP = """usage: dymoe run RECIPE [--resume [--accept PART ...] | --dry-run] [--KEY VALUE ...]

Learn the recipe's stream and write a run folder (runs/NAME unless the recipe or --output says otherwise).

  RECIPE      a YAML file, or one of `dymoe list recipes`, for example pocket/dymoe
  --resume    go on with the run in this folder from its last complete checkpoint, under the conditions it began with
  --accept PART
              go on although this differs, which run.yaml and results.json then say; once for every part:
{parts}
  --dry-run   random weights of the true shapes and made data: a few steps of each task, peak memory, projected hours;
              writes nothing unless --output names a JSON file
  --KEY VALUE set a key of the recipe, for example --training.steps_per_task 20 --seed 1

keys and their defaults:"""


def main(argv: Sequence[str]) -> int:
    """Parse the command line, check the recipe in full, then learn."""
    from dymoe.learning.recipe import load_recipe, require_folder

    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0 if argv else 2
    if argv[0].startswith("-"):
        raise DymoeError(f"run: expected a recipe before {brief(argv[0])}, for example pocket/dymoe")
    words, accept = accepted(argv[1:])
    overrides = [word for word in words if word not in ("--resume", "--dry-run")]
    if accept and "--resume" not in words:
        raise DymoeError("run: --accept goes with --resume: it is about a run that is there already")
    recipe = load_recipe(argv[0], overrides)
    if "--dry-run" in words:
        return _dry_run(recipe, overrides)
    require_folder(recipe.model)
    from dymoe.learning.distributed import first, together

    command = shlex.join(["dymoe", "run", argv[0], *overrides, "--resume"])
    try:
        with together(f"accelerate launch ... -m {command}"):
            # Here the heavy imports begin: the recipe is known to be right.
            from dymoe.learning.run import run

            folder = run(recipe, resume="--resume" in words, accept=accept)
    except KeyboardInterrupt:
        say(f"dymoe: interrupted; go on with: {command}", error=True)
        return 130
    if not first():
        return 0
    from dymoe.cli.show import show

    show(folder)
    say(f"Report: dymoe report {shlex.quote(str(folder))}")
    return 0


def accepted(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without ``--accept PART`` and ``--accept=PART``, and the parts.

    Raises:
        DymoeError: a part that there is not, or none.
    """
    from dymoe.learning.conditions import ACCEPTABLE

    rest, parts, waiting = [], [], iter(words)
    for word in waiting:
        flag, equals, part = word.partition("=")
        if flag != "--accept":
            rest.append(word)
            continue
        parts.append(part if equals else next(waiting, ""))
        if parts[-1] not in ACCEPTABLE:
            raise DymoeError(f"run: --accept: expected one of {', '.join(ACCEPTABLE)}, got {parts[-1]!r}")
    return rest, parts


def _dry_run(recipe: Any, overrides: Sequence[str]) -> int:
    """Measure, print, and write JSON where --output says so."""
    from dymoe.files import atomic_json
    from dymoe.preflight.dryrun import as_dict, dry_run
    from dymoe.terminal import tables

    output = recipe.output if any(word.partition("=")[0] == "--output" for word in overrides) else ""
    if output and not output.endswith(".json"):
        raise DymoeError(f"run: --dry-run --output: expected a JSON file, got {brief(output)}")
    rows = dry_run(recipe)
    tables().print(_table(rows))
    if output:
        atomic_json(output, as_dict(rows, recipe))
        say(f"Measured: {output}")
    return 0


def _table(rows: "Sequence[Measured]") -> "Table":
    """The measurement as a table for a terminal."""
    from rich.table import Table

    from dymoe.preflight.dryrun import published

    made = Table(title="Dry run: random weights, made data")
    heads = ("task", "s/step", "tokens/s", "answers/s", "peak GB", "by arithmetic", "steps", "hours", "hours to ask")
    for head in (*heads, f"paper ({published()['hardware']})"):
        made.add_column(head, justify="left" if head == "task" else "right", overflow="fold")

    def number(value: float | None, places: int = 2) -> str:
        return "-" if value is None else f"{value:,.{places}f}"

    for row in rows:
        made.add_row(
            row.task,
            number(row.step_seconds),
            number(row.tokens_per_second, 0),
            number(row.answers_per_second),
            number(row.peak_bytes / 1e9, 1),
            number(None if row.estimated_bytes is None else row.estimated_bytes / 1e9, 1),
            number(row.steps, 0),
            number(row.hours),
            number(row.asking_hours),
            number(row.paper_hours),
        )
    return made


def help_text() -> str:
    """The usage with every key of a recipe, its type and default."""
    from dymoe.learning.conditions import ACCEPTABLE
    from dymoe.learning.recipe import Recipe
    from dymoe.methods.settings import describe

    rows = [(f"--{key}", kind, default) for key, kind, default in describe(Recipe)]
    width = max(len(key) for key, _, _ in rows)
    lines = [f"  {key:<{width}}  {kind}{f' ({default})' if default else ''}" for key, kind, default in rows]
    parts = "\n".join(f"                {part:<9} {what}" for part, what in ACCEPTABLE.items())
    return "\n".join([HELP.format(parts=parts), *lines])
