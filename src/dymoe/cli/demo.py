"""`dymoe demo`: three pocket tasks, IncMoELoRA and DyMoE, what each forgot."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dymoe.cli.options import Command, integer
from dymoe.libraries import require_extra
from dymoe.messages import say

HELP = """usage: dymoe demo [--output FOLDER] [--steps N]

Learn three tasks of the pocket stream one after another, with IncMoELoRA and with DyMoE, and compare them.

  --output FOLDER  where the two runs go (runs/demo); finished runs there are kept, an interrupted one goes on
  --steps N        optimizer steps per task (16)"""

COMMAND = Command("demo", HELP, "", options={"--output": str, "--steps": integer})

METHODS = ("incmoelora", "dymoe")
TASKS = ["ScienceQA", "ImageNet", "VQAv2"]
STEPS = 16
BATCH = 8
QUESTIONS = 40  # per task and stage
METRICS = (
    "MFT: mean accuracy of the tasks as just learned; MFN: at the end; MAA: mean over the stages; BWT: change of the "
    "earlier tasks since they were learned, summed and divided by the number of tasks (BWT_T-1: of earlier tasks)."
)


def main(argv: Sequence[str]) -> int:
    """Run both methods, print their matrices, say in one sentence what they show, write the report."""
    arguments = COMMAND.parse(argv)
    output, steps = Path(arguments["--output"] or "runs/demo"), arguments["--steps"] or STEPS
    for extra in ("pocket", "report"):
        require_extra(extra, "demo")
    print(
        f"{len(TASKS)} tasks of {steps} steps ({', '.join(TASKS)}), first with IncMoELoRA, then with DyMoE; after each "
        f"task {QUESTIONS} questions of every task so far. All goes to {output}; interrupted, call it again to go on.",
        file=sys.stderr,
        flush=True,
    )
    try:
        runs = [_run(method, output / method, steps) for method in METHODS]
    except KeyboardInterrupt:
        say(f"dymoe: interrupted; go on with: {shlex.join(['dymoe', 'demo', *argv])}", error=True)
        return 130
    from dymoe.cli.show import show
    from dymoe.learning.formats import run_results
    from dymoe.report.page import write_report

    for run in runs:
        show(run)
    say(METRICS)
    say(sentence(*(run_results(run) for run in runs)))
    page = write_report(runs, output / "report.html")
    say(f"Report: {page}")
    return 0


def _run(method: str, output: Path, steps: int) -> Path:
    """One method on the three tasks; a run that is there already goes on or is kept."""
    from dymoe.learning.recipe import Evaluation, Recipe, Training
    from dymoe.learning.run import run

    recipe = Recipe(
        tasks=TASKS,
        method=method,
        settings={"lora_dropout": 0.0},
        training=Training(steps_per_task=steps, batch_size=BATCH, limit=steps * BATCH),
        evaluation=Evaluation(limit=QUESTIONS, batch_size=QUESTIONS),
        output=str(output),
    )
    return run(recipe, resume=True)


def sentence(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """What the two results show: as the same questions tell them apart, or do not (docs/intervals.md).

    Args:
        first: results.json of the baseline.
        second: results.json of the method compared with it.
    """
    from dymoe.evaluation.intervals import Answers, compare

    one, two = first["metrics"], second["metrics"]
    names = {"incmoelora": "IncMoELoRA", "dymoe": "DyMoE"}
    a, b = (names.get(results["method"], results["method"]) for results in (first, second))
    differences = compare([Answers.of(second, b)], [Answers.of(first, a)])

    def comparison(metric: str, what: str, unit: str) -> str:
        difference = differences[metric]
        return (
            f"{what} {two[metric]:.1f} against {one[metric]:.1f} {unit}, {difference.verdict} "
            f"(difference {difference.text(sign=True)})"
        )

    return (
        f"{b} beside {a}: {comparison('BWT', 'backward transfer', 'points')}; "
        f"{comparison('MFT', 'accuracy when just trained', '%')}; {comparison('MFN', 'accuracy at the end', '%')}. "
        f"One seed, {sum(first['steps'])} steps, {min(first['samples'].values())} questions a task; 95 % intervals "
        "over questions, paired."
    )
