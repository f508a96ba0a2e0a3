"""`dymoe analyze NAME RUN`: where a run's tokens go, computed, printed in short and kept below the run."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dymoe.cli.options import Command, Help, Kind, names, whole, wholes
from dymoe.errors import DymoeError
from dymoe.libraries import require_extra
from dymoe.messages import nearest, say

if TYPE_CHECKING:
    import pandas as pd

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

Computed = tuple["pd.DataFrame", dict[str, Any]]  # the frame and how it was made


def main(argv: Sequence[str]) -> int:
    """Compute one analysis, print it in short, keep it."""
    name = argv[0] if argv else ""
    if not argv or name in ("-h", "--help"):
        raise Help(HELP, 0 if argv else 2)
    if name == "dilemma":
        return _dilemma(argv)
    if name not in OPTIONS:
        raise DymoeError(f"analyze: {name}: unknown analysis; {nearest(name, [*OPTIONS, 'dilemma'])}")
    given = Command(f"analyze {name}", HELP, "NAME RUN", OPTIONS[name]).parse(argv)
    _, run = given.words
    chosen = {option.removeprefix("--"): value for option, value in given.options.items()}
    from dymoe import analysis
    from dymoe.learning.learner import quiet

    with quiet():
        frame, facts = COMPUTE[name](Path(run), chosen)

    facts = {**facts, **{f"only_{key}" if key == "stages" else key: value for key, value in chosen.items()}}
    command = shlex.join(["dymoe", "analyze", *argv])
    say(f"Kept: {analysis.store(run, name, frame, {'command': command, **facts})}")
    return 0


def _drift(run: Path, chosen: dict[str, Any]) -> Computed:
    from dymoe import analysis

    learned, tell = _opened(run)
    with tell as told:
        frame = analysis.drift(learned, tell=told, **chosen)
    pairs = analysis.drift_and_forgetting(run, frame)
    _print_table("Routing drift", _drift_rows(frame, pairs))
    say(correlation_line(analysis.correlation(pairs)))
    return frame, _facts(learned)


def _drift_rows(frame: "pd.DataFrame", pairs: "pd.DataFrame") -> list[dict[str, str]]:
    """For each task at the last stage: drift by part, changed top experts, forgetting."""
    from dymoe import analysis
    from dymoe.analysis.tokens import KINDS

    last = frame[frame["stage"] == frame["stage"].max()]
    parts = {kind: analysis.drift_by_task(last[last["part"] == kind]).set_index("task")["drift"] for kind in KINDS}
    lost = pairs.set_index("task")["forgetting"]
    rows = []
    for entry in analysis.drift_by_task(last).to_dict("records"):
        task = entry["task"]
        by_part = {kind: f"{values[task]:.1%}" if task in values else "–" for kind, values in parts.items()}
        forgotten = f"{lost[task]:.1f}" if task in lost else "–"
        told = {"drift": f"{entry['drift']:.1%}", **by_part, "changed top expert": f"{entry['changed']:.1%}"}
        rows.append({"task": task, **told, "forgetting": forgotten})
    return rows


def correlation_line(found: dict[str, Any]) -> str:
    """The correlation of drift with forgetting in one line."""
    if found["pearson"] is None:
        return f"Drift and forgetting: earlier tasks too few, or too alike, to correlate ({found['tasks']})"
    return (
        f"Drift and forgetting over {found['tasks']} earlier tasks: Pearson {found['pearson']:.2f}, "
        f"Spearman {found['spearman']:.2f}"
    )


def _activation(run: Path, chosen: dict[str, Any]) -> Computed:
    from dymoe import analysis

    learned, tell = _opened(run)
    with tell as told:
        frame = analysis.activation(learned, tell=told, **chosen)
    rows = []
    for stage in sorted(frame["stage"].unique()):
        part = frame[frame["stage"] == stage]
        experts = len(part.drop_duplicates(["layer", "projection", "group", "expert"]))
        rows.append({"stage": str(stage), "experts": str(experts), "dead": str(len(analysis.dead(frame, stage)))})
    _print_table("Experts over all layers; dead: below 0.1 % of the weight on every task", rows)
    rows = []
    for name, share in (("1/8", 1 / 8), ("1/4", 1 / 4)):
        for entry in analysis.pruned_share(frame, share).to_dict("records"):
            weight = f"{entry['weight']:.1%} of {entry['group_weight']:.1%}"
            removed = f"{entry['experts']} of {entry['of']}"
            rows.append({"pruned": name, "group": entry["group"], "experts removed": removed, "weight lost": weight})
    _print_table("What pruning would remove after each task", rows)
    return frame, _facts(learned)


def _overlay(run: Path, chosen: dict[str, Any]) -> Computed:
    from dymoe import analysis

    learned, tell = _opened(run)
    with tell as told:
        frame = analysis.overlay(learned, tell=told, **chosen)
    rows = []
    for (task, sample, stage), part in frame.groupby(["task", "sample", "stage"], sort=False):
        shares = part["group"].value_counts(normalize=True)
        served = ", ".join(f"{group or 'none'} {share:.0%}" for group, share in shares.items())
        rows.append({"task": task, "sample": sample, "stage": str(stage), "tokens served by": served})
    _print_table(f"Layer {frame['layer'].iloc[0]}, all projections", rows)
    layer, samples = int(frame["layer"].iloc[0]), int(frame.groupby("task")["sample"].nunique().max())
    return frame, {**_facts(learned), "samples": samples, "layer": layer}


def _dynamics(run: Path, chosen: dict[str, Any]) -> Computed:
    from dymoe import analysis

    frame = analysis.dynamics(run)
    if frame.empty:
        raise DymoeError(
            f"{run}: no dynamics were logged; the run's gate has no scores, its training.dynamics_every is 0, or it is "
            "older than this log"
        )
    rows = []
    for (stage, task), part in frame.groupby(["stage", "task"], sort=False):
        for step in sorted({part["step"].min(), part["step"].max()}):
            now = part[part["step"] == step]
            shares = {name: f"{now[f'share_{name}'].mean():.1%}" for name in ("new", "ambiguous", "old")}
            rest = {"entropy": f"{now['entropy'].mean():.2f}", "specialization": f"{now['specialization'].mean():.3f}"}
            weight = f"{now['new_group_weight'].mean():.1%}"
            place = {"stage": str(stage), "task": task, "step": str(step)}
            rows.append({**place, **shares, "new group's weight": weight, **rest})
    _print_table("Routing at the first and last logged step of each task, mean over layers", rows)
    return frame, {"stages": int(frame["stage"].max())}


def _dilemma(words: Sequence[str]) -> int:
    """Learn what is missing, tell what each strategy taught and cost, keep it in the sweep's folder."""
    from dymoe.cli.sweep import FLAGS, learn

    given = Command("analyze dilemma", HELP, "NAME RECIPE", FLAGS, keys="dymoe.sweep.sweep.Sweep").parse(words)
    require_extra("report", "analyze dilemma")
    from dymoe import analysis
    from dymoe.analysis.token_dilemma import dilemma_sweep
    from dymoe.files import atomic_write
    from dymoe.learning.formats import read_results
    from dymoe.report.page import write_dilemma

    sweep = dilemma_sweep(given.words[1], given.keys)
    command = shlex.join(["dymoe", "analyze", *given.words, *given.keys])
    code = learn(sweep, given, command)
    rows = read_results(sweep.results)["rows"]
    if code == 130 or "--dry-run" in given or not rows:
        return code
    frame = analysis.dilemma(rows)
    text = dilemma_markdown(frame, sweep.title, command)
    atomic_write(sweep.table, text)
    say("", *text.splitlines())
    say(f"Figures: {write_dilemma(Path(sweep.results), Path(sweep.table).with_suffix('.html'))}")
    facts = {"command": command, "stages": 2, "samples": None, "seed": sorted({int(seed) for seed in frame["seed"]})}
    say(f"Kept: {analysis.store(sweep.output, 'dilemma', frame, facts)}")
    return code


def dilemma_markdown(frame: "pd.DataFrame", title: str, command: str) -> str:
    """The table over strategies with the conclusion, as Markdown."""
    from dymoe import analysis

    lines = [f"# {title or 'Dilemma'}", "", f"`{command}`", "", analysis.conclusion(frame), ""]
    lines += ["| pair | tokens that reach the new experts | seeds | new task | old task before | old task after |"]
    lines[-1] += " forgetting | drift |"
    lines.append("|" + "---|" * 8)
    for row in analysis.by_strategy(frame).to_dict("records"):
        cells = [_spread(row, name, 1) for name in ("new_task_accuracy", "old_task_before", "old_task_after")]
        cells += [_spread(row, "forgetting", 1), _spread(row, "drift", 100)]
        pair = row["pair"].replace("|", "\\|")
        lines.append(f"| {pair} | {row['strategy']} | {row['seeds']} | {' | '.join(cells)} |")
    lines += [
        "",
        "Accuracies in percent, forgetting in points, drift in percent; mean ± standard deviation over seeds.",
    ]
    return "\n".join(lines) + "\n"


def _spread(row: dict[str, Any], name: str, scale: float) -> str:
    mean, deviation = row[name] * scale, row[f"{name}_std"] * scale
    if mean != mean:  # NaN
        return "–"
    return f"{mean:.1f}" if deviation != deviation else f"{mean:.1f} ± {deviation:.1f}"


def _opened(run: Path) -> Any:
    """The run, loaded, and what tells its progress."""
    from dymoe import analysis

    return analysis.open_run(run), _progress()


def _facts(learned: Any) -> dict[str, Any]:
    recipe = learned.recipe
    return {"stages": len(learned.stages), "samples": recipe.evaluation.limit, "seed": recipe.seed}


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
    """Rows with the same keys as a table."""
    from dymoe.terminal import table, tables

    if rows:
        tables().print(title, soft_wrap=True)  # a table's own title would wrap at the table's width
        tables().print(table(list(rows[0]), [[str(value) for value in row.values()] for row in rows]))


OPTIONS: dict[str, dict[str, Kind]] = {
    "drift": {"--samples": whole, "--stages": wholes},
    "activation": {"--samples": whole, "--stages": wholes},
    "overlay": {"--tasks": names, "--samples": whole, "--layer": partial(whole, least=0)},
    "dynamics": {},
}
COMPUTE: dict[str, Callable[[Path, dict[str, Any]], Computed]] = {
    "drift": _drift,
    "activation": _activation,
    "overlay": _overlay,
    "dynamics": _dynamics,
}
