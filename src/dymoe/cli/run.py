"""`dymoe run RECIPE`: learn a stream of tasks."""

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dymoe.cli.options import Command, part_accepted
from dymoe.errors import DymoeError
from dymoe.messages import brief, say

if TYPE_CHECKING:
    from dymoe.preflight.dryrun import Measured

HELP = """usage: dymoe run RECIPE [--resume [--accept PART ...] | --dry-run] [--KEY VALUE ...]

Learn the recipe's stream and write a run folder (runs/NAME unless the recipe or --output says otherwise).

  RECIPE      a YAML file, or one of `dymoe list recipes`, for example pocket/dymoe
  --resume    go on with the run in this folder from its last complete checkpoint, under the conditions it began with
  --accept PART
              go on although this differs, which run.yaml and results.json then say; once for every part:
                base      the base model's weights, configuration or processor
                data      records or pictures of tasks that the run has begun
                versions  Python and the packages that compute
                machine   what computes: the kind of device, the number of CPU threads
  --dry-run   random weights of the true shapes and made data: a few steps of each task, peak memory, projected hours;
              writes nothing unless --output names a JSON file
  --KEY VALUE set a key of the recipe, for example --training.steps_per_task 20 --seed 1
"""

OPTIONS = {"--resume": None, "--dry-run": None, "--accept": part_accepted}
COMMAND = Command("run", HELP, "RECIPE", OPTIONS, repeated=("--accept",), keys="dymoe.learning.recipe.Recipe")


def main(argv: Sequence[str]) -> int:
    """Parse the command line, check the recipe in full, then learn."""
    from dymoe.learning.recipe import load_recipe, require_folder

    arguments = COMMAND.parse(argv)
    if "--accept" in arguments and "--resume" not in arguments:
        raise DymoeError("run: --accept goes with --resume: it is about a run that is there already")
    (path,) = arguments.words
    recipe = load_recipe(path, arguments.keys)
    if "--dry-run" in arguments:
        return _dry_run(recipe, arguments.keys)
    require_folder(recipe.model)
    from dymoe.learning.distributed import first, together

    command = shlex.join(["dymoe", "run", path, *arguments.keys, "--resume"])
    try:
        with together(f"accelerate launch ... -m {command}"):
            # Here the heavy imports begin: the recipe is known to be right.
            from dymoe.learning.run import run

            folder = run(recipe, resume="--resume" in arguments, accept=arguments["--accept"] or ())
    except KeyboardInterrupt:
        say(f"dymoe: interrupted; go on with: {command}", error=True)
        return 130
    if not first():
        return 0
    from dymoe.cli.show import show

    show(folder)
    say(f"Report: dymoe report {shlex.quote(str(folder))}")
    return 0


def _dry_run(recipe: Any, overrides: Sequence[str]) -> int:
    """Measure, print, and write JSON where --output says so."""
    from dymoe.files import atomic_json
    from dymoe.preflight.dryrun import as_dict, dry_run, paper_times
    from dymoe.terminal import tables

    output = recipe.output if any(word.partition("=")[0] == "--output" for word in overrides) else ""
    if output and not output.endswith(".json"):
        raise DymoeError(f"run: --dry-run --output: expected a JSON file, got {brief(output)}")
    rows = dry_run(recipe)
    tables().print(_table(rows, paper_times(recipe).get("hardware", "no times")))
    if output:
        atomic_json(output, as_dict(rows, recipe))
        say(f"Measured: {output}")
    return 0


def _table(rows: "Sequence[Measured]", hardware: str) -> Any:
    """The measurement as a table for a terminal."""
    from dymoe.terminal import table

    heads = ("task", "s/step", "tokens/s", "answers/s", "peak GB", "by arithmetic", "steps", "hours", "hours to ask")

    def cells(row: "Measured") -> list[str]:
        values = (
            *((row.step_seconds, 2), (row.tokens_per_second, 0), (row.answers_per_second, 2)),
            *((row.peak_bytes / 1e9, 1), (row.estimated_bytes and row.estimated_bytes / 1e9, 1), (row.steps, 0)),
            *((row.hours, 2), (row.asking_hours, 2), (row.paper_hours, 2)),
        )
        return [row.task, *("-" if value is None else f"{value:,.{digits}f}" for value, digits in values)]

    return table((*heads, f"paper ({hardware})"), map(cells, rows), "Dry run: random weights, made data", numbers=1)
