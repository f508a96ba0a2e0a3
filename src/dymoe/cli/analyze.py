"""`dymoe analyze NAME RUN`: where a run's tokens go, computed, printed in short and kept below the run."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from dymoe.cli.options import Command, Help, Kind, integer, integers, names
from dymoe.errors import DymoeError
from dymoe.libraries import require_extra
from dymoe.messages import nearest, say

HELP = """usage: dymoe analyze NAME RUN [options]
       dymoe analyze dilemma RECIPE [--dry-run] [--KEY VALUE ...]

Look into a run, finished or not, and keep what was found as RUN/analysis/NAME.parquet (docs/analysis.md).

  drift       the weight that each task's tokens (image, instruction, answer) put on each group, stage by stage, and how
              it goes with what was forgotten
  activation  how much each task uses each expert; which are dead; what pruning 1/8 and 1/4 would remove
  overlay     for some samples: type and serving group of each patch and each word
  dynamics    token types, loss terms and entropy by layer while the run learned (read, not computed)
  dilemma     learn two tasks with the new experts open to some tokens alone: a sweep such as
              pocket/dilemma, or a recipe of two tasks; called again it goes on; keys as in `dymoe sweep`

  --samples N    of each task, the first N (drift, activation: those the run was asked; overlay: 3)
  --stages LIST  these stages alone, for example 1,4,8 (drift, activation)
  --tasks LIST   these tasks alone (overlay)
  --layer L      decoder layer, from 0 (overlay; the middle one)"""


def main(argv: Sequence[str]) -> int:
    """Compute one analysis, print it in short, keep it."""
    name = argv[0] if argv else ""
    if not argv or name in ("-h", "--help"):
        raise Help(HELP, 0 if argv else 2)
    if name == "dilemma":
        return _dilemma(argv)
    if name not in OPTIONS:
        raise DymoeError(f"analyze: {name}: unknown analysis; {nearest(name, [*OPTIONS, 'dilemma'])}")
    arguments = Command(f"analyze {name}", HELP, "NAME RUN", OPTIONS[name]).parse(argv)
    run = Path(arguments.words[1])
    chosen = {option.removeprefix("--"): value for option, value in arguments.options.items()}
    from dymoe import analysis
    from dymoe.libraries import quiet

    facts: dict[str, Any] = {}
    with quiet():
        if name == "dynamics":  # read, not computed
            frame = analysis.dynamics(run)
        else:
            learned = analysis.open_run(run)
            evaluation, seed = learned.recipe.evaluation, learned.recipe.seed
            facts = {"stages": len(learned.stages), "samples": evaluation.limit, "seed": seed}
            with _progress() as tell:
                frame = getattr(analysis, name)(learned, tell=tell, **chosen)
    for title, rows in import_module(f"dymoe.analysis.{HOMES[name]}").tables(frame, run):
        _print_table(title, rows)
    facts.setdefault("stages", int(frame["stage"].max()))
    if name == "overlay":
        facts |= {"samples": int(frame.groupby("task")["sample"].nunique().max()), "layer": int(frame["layer"].iloc[0])}
    facts |= {f"only_{key}" if key == "stages" else key: value for key, value in chosen.items()}
    command = shlex.join(["dymoe", "analyze", *argv])
    say(f"Kept: {analysis.store(run, name, frame, {'command': command, **facts})}")
    return 0


def _dilemma(words: Sequence[str]) -> int:
    """Learn what is missing, tell what each strategy taught and cost, keep it in the sweep's folder."""
    from dymoe.cli.sweep import FLAGS, learn

    arguments = Command("analyze dilemma", HELP, "NAME RECIPE", FLAGS, keys="dymoe.sweep.sweep.Sweep").parse(words)
    require_extra("report", "analyze dilemma")
    from dymoe import analysis
    from dymoe.analysis.token_dilemma import dilemma_sweep, markdown
    from dymoe.files import atomic_write
    from dymoe.learning.formats import read_results
    from dymoe.report.page import write_dilemma

    sweep = dilemma_sweep(arguments.words[1], arguments.keys)
    command = shlex.join(["dymoe", "analyze", *arguments.words, *arguments.keys])
    code = learn(sweep, arguments, command)
    rows = read_results(sweep.results)["rows"]
    if code == 130 or "--dry-run" in arguments or not rows:
        return code
    frame = analysis.dilemma(rows)
    text = markdown(frame, sweep.title, command)
    atomic_write(sweep.table, text)
    say("", *text.splitlines())
    say(f"Figures: {write_dilemma(Path(sweep.results), Path(sweep.table).with_suffix('.html'))}")
    facts = {"command": command, "stages": 2, "samples": None, "seed": sorted({int(seed) for seed in frame["seed"]})}
    say(f"Kept: {analysis.store(sweep.output, 'dilemma', frame, facts)}")
    return code


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error in a terminal, nothing elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from dymoe.terminal import Terminal

    console = Terminal(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        bar = bars.add_task("")

        def tell(what: str, done: int, total: int) -> None:
            bars.update(bar, description=what, completed=done, total=total)

        yield tell


def _print_table(title: str, rows: Sequence[dict[str, str]]) -> None:
    """Rows with the same keys as a table, or its title alone."""
    from dymoe.terminal import table, tables

    tables().print(title, soft_wrap=True)  # a table's own title would wrap at the table's width
    if rows:
        tables().print(table(list(rows[0]), [[str(value) for value in row.values()] for row in rows]))


OPTIONS: dict[str, dict[str, Kind]] = {
    "drift": {"--samples": integer, "--stages": integers},
    "activation": {"--samples": integer, "--stages": integers},
    "overlay": {"--tasks": names, "--samples": integer, "--layer": partial(integer, least=0)},
    "dynamics": {},
}
HOMES = {
    "drift": "routing_drift",
    "activation": "expert_activation",
    "overlay": "token_overlay",
    "dynamics": "training_dynamics",
}
