"""Puts a page together, about runs or about the token's dilemma: headline, figures, samples, tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dymoe.analysis import (
    expert_activation,
    forgetting,
    routing_drift,
    token_dilemma,
    token_overlay,
    training_dynamics,
)
from dymoe.analysis.figures import Figure, Table
from dymoe.analysis.runs import Method, Run, analysed, gather, missing, read_runs
from dymoe.analysis.token_dilemma import counted
from dymoe.errors import DymoeError
from dymoe.files import atomic_write
from dymoe.learning.formats import read_results
from dymoe.numbers import number
from dymoe.report.layout import render
from dymoe.report.samples import Comparison, compare
from dymoe.report.watch import watch_table

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("MFT", "MFN", "MAA", "BWT", "BWT_T-1")
# Analysis -> what draws it, and the section that says what is missing where nothing is drawn.
ANALYSES = {
    "drift": (routing_drift.figures, "drift-parts", "Routing drift, token by token"),
    "activation": (expert_activation.figures, "activation", "Activation by group and layer"),
    "overlay": (token_overlay.figures, "overlay", "Token by token"),
    "dynamics": (training_dynamics.figures, "token-types", "Training dynamics"),
}


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write one self-contained HTML page about one or several runs of a stream and return its path.

    Everything on the page is computed from the run folders' accuracy matrices, routing and predictions. Runs
    of one method are averaged over their seeds; a run in progress is shown as far as it has come.

    Args:
        runs: run folders, each with a results.json.
        out: the HTML file to write; replaced atomically.

    Raises:
        DymoeError: a run folder is missing something or is broken, the runs are not of one stream, or `out`
            cannot be written. The message names the file; nothing is written then.
    """
    methods = gather(read_runs([Path(run) for run in runs]))
    page = page_of(methods)
    # Half a surrogate pair is legal in a model's JSON, but cannot be written as UTF-8.
    atomic_write(out, page.encode("utf-8", "replace"))
    return Path(out)


def write_dilemma(results: Path, out: Path) -> Path:
    """Write one self-contained HTML page about the token's dilemma and return its path.

    Args:
        results: the results (.jsonl) of its sweep, as `dymoe analyze dilemma` writes them.
        out: the HTML file to write; replaced atomically.

    Raises:
        DymoeError: there is no such file, it holds no runs of the token's dilemma, or `out` cannot be written.
    """
    if not results.is_file():
        raise DymoeError(f"{results}: no such results; `dymoe analyze dilemma` writes them")
    study = read_results(results)
    if not study["rows"]:
        raise DymoeError(f"{results}: holds no finished runs yet; go on with `dymoe analyze dilemma`")
    try:
        frame = token_dilemma.dilemma(study["rows"])
    except DymoeError as error:
        raise DymoeError(f"{results}: {error}") from None
    atomic_write(out, dilemma_page(frame, study["about"]).encode("utf-8", "replace"))
    return out


@dataclass(frozen=True)
class Tables:
    """A section of tables: the open ones, a caption, those in folds."""

    id: str
    title: str
    tables: Sequence[Table]
    caption: str = ""


def page_of(methods: Sequence[Method]) -> str:
    """The page about runs as HTML text."""
    drift, activation, overlay, dynamics = (analysis_figures(methods, name) for name in ANALYSES)
    runs = [run for method in methods for run in method.runs]
    samples = compare(methods)
    stream, tasks = runs[0].stream, counted(len(methods[0].tasks), "task")
    sections: dict[str, list[Any]] = {
        "Forgetting": [
            forgetting.losses(methods),
            metrics(methods),
            general_ability(methods),
            forgetting.side_by_side(methods),
            forgetting.over_stages(methods),
            forgetting.matrices(methods),
            forgetting.lost_per_task(methods),
            samples,
        ],
        "Routing": [
            routing_drift.over_stages(methods),
            routing_drift.maps(methods),
            *drift,
            *activation,
            *overlay,
            *dynamics,
        ],
        "Evidence": [hashes(runs), run_tables(runs)],
    }
    return render(
        "page.html.jinja",
        title=f"What was forgotten: {stream}",
        kicker=f"dymoe report · {stream} · {tasks} · {counted(len(methods), 'method')}",
        headline=forgetting.headline(methods),
        cards=forgetting.cards(methods),
        remarks=forgetting.remarks(methods),
        sections={part: [section for section in those if section is not None] for part, those in sections.items()},
        methods=methods,
        pairs=pair_table(methods, samples),
    )


def dilemma_page(frame: "pd.DataFrame", about: Mapping[str, Any]) -> str:
    """The page about the token's dilemma as HTML text.

    Args:
        frame: of `dymoe.analysis.dilemma`.
        about: of the sweep: its title, command, budget, machine and versions, where they are known.
    """
    table, learnings = token_dilemma.by_strategy(frame), token_dilemma.complete(frame)
    remarks = [token_dilemma.conclusion(frame).replace(" -", " \u2212")]
    if left_out := len(frame) - len(learnings):
        why = "Runs that do not count, since not every strategy has their pair and seed yet"
        remarks.append(f"{why}: {left_out}.")
    facts = [(name, in_words(about.get(name))) for name in ("command", "budget", "machine", "versions")]
    how = Table("How it was made", "machines", ("what", "how"), [fact for fact in facts if fact[1]])
    title = str(about.get("title") or "Token's dilemma")
    return render(
        "page.html.jinja",
        title=title,
        kicker=f"dymoe analyze dilemma · {title}",
        headline=token_dilemma.headline(table),
        cards=[],
        remarks=remarks,
        sections={
            "Dilemma": token_dilemma.figures(table, learnings),
            "Evidence": [Tables("made", "How it was made", [how])],
        },
    )


def analysis_figures(methods: Sequence[Method], name: str) -> list[Figure]:
    """The figures of a kept analysis; where some methods lack it, a note with the command that makes it.

    Raises:
        DymoeError: a kept analysis is broken; the message names the file.
    """
    draw, section, title = ANALYSES[name]
    have = analysed(methods, name)
    note, command = missing(methods, have, name)
    figures = draw(have) if have else []
    if not figures and note:
        figures = [Figure(section, title)]
    if figures:
        figures[0] = replace(figures[0], note=note, command=command)
    return [replace(figure, commands=[one.command for one in have]) for figure in figures]


def general_ability(methods: Sequence[Method]) -> Tables | None:
    """What was asked and never learned; None where there is nothing of it."""
    table = watch_table(methods)
    if table is None:
        return None
    caption = (
        "Tasks that were asked before the first task and after every stage, and never learned: accuracy in percent "
        "with 95 % intervals over questions and seeds. Change: percentage points from the first to the last column, "
        "paired question by question."
    )
    return Tables("watch", "General ability", [table], caption)


def metrics(methods: Sequence[Method]) -> Tables:
    """MFT, MFN, MAA and BWT of each method, and which task it lost most of."""
    rows = []
    for method in methods:
        cells = [number(method.metric(key), sign=key.startswith("BWT")) for key in METRICS]
        rows.append((method.label, method.seeds, *cells, "–" if method.level else forgetting.lost_most(method)))
    head = ("method", "runs", "MFT", "MFN", "MAA", "BWT (÷ T)", "BWT (÷ T−1)", "lost most")
    caption = (
        "In percent and percentage points. MFT: mean accuracy of each task as just learned. MFN: mean accuracy over "
        "all tasks at the end. MAA: mean over stages of the mean over the tasks seen so far. BWT: backward transfer, "
        "the change of each task since it was learned, summed and divided by the number of tasks T or by T−1; below "
        "zero is forgetting. Lost most: the task that ended farthest below its accuracy when learned. ± is the "
        "standard deviation over seeds."
    )
    return Tables("metrics", "Metrics", [Table("Metrics of each method", "numbers metrics", head, rows)], caption)


def pair_table(methods: Sequence[Method], samples: Comparison) -> Table | None:
    """How many samples each method (row) still answers that another (column) has lost; None for a single method."""
    if len(methods) < 2:
        return None
    others = [method for method in methods if not method.level]
    rows = []
    for method in methods:
        counts = samples.counts[method.index]
        rows.append((method.label, *("–" if other is method else str(counts[other.index]) for other in others)))
    head = ("still answered by", *(f"lost by {method.label}" for method in others))
    return Table("Samples that one method still answers and another has lost", "numbers", head, rows)


def hashes(runs: Sequence[Run]) -> Tables:
    """For every expert group of every run: its hash when learned and whether it ever changed; and the sum in words."""
    rows: list[tuple[str, ...]] = []
    same, different, shared = 0, [], []
    for run in runs:
        history: dict[str, list[tuple[int, str]]] = {}
        for stage, groups in run.group_hashes:
            for name, digest in groups.items():
                history.setdefault(name, []).append((stage, digest))
        for name, ((begun, first), *later) in history.items():
            changed = sorted({stage for stage, digest in later if digest != first})
            if changed and len(history) == 1:  # later tasks added none, so they train this one
                verdict = "shared by all tasks, which train it on"
                shared.append(run.name)
            elif changed:
                verdict = f"differs at stage {', '.join(map(str, changed))}: not frozen"
                different.append(f"{name} of {run.name}")
            elif not later:
                verdict = "new at this stage"
            else:
                verdict = f"identical through stage {later[-1][0]}"
                same += 1
            rows.append((run.name, name, str(begun), first, verdict))
    if not rows:
        return Tables("hashes", "Frozen groups", [], "These runs recorded no hashes of expert groups.")
    sentences = [
        f"Expert groups checked at a later stage that are identical: {same}." if same else "",
        f"Changed after they were learned: {', '.join(different)}." if different else "",
        f"Not frozen, since all tasks share and train it: the one group of {', '.join(shared)}." if shared else "",
    ]
    caption = (
        f"{' '.join(filter(None, sentences)) or 'No group has been followed by a later stage yet.'} The hash of each "
        "group when it was learned is compared with its hash at every later stage: a frozen group must stay identical "
        "bit for bit."
    )
    head = ("run", "group", "learned at stage", "hash when learned", "since then")
    return Tables(
        "hashes", "Frozen groups", [Table("Hashes of the expert groups", "hashes", head, rows, "Hashes")], caption
    )


def run_tables(runs: Sequence[Run]) -> Tables:
    """Where the numbers come from: folder, seed, base model, steps and time; machines and versions."""
    rows = []
    for run in runs:
        facts = run.facts
        # Thousands stand apart by spaces that never break a line.
        count = facts.get("trainable_parameters")
        trained = "–" if count is None else f"{count:,}".replace(",", "\u202f")
        cells = (str(run.seed), run.base, str(facts.get("steps_per_task") or "–"), trained)
        rows.append((run.name, run.method, *cells, _minutes(facts, "train"), _minutes(facts, "evaluate")))
    head = ("run", "method", "seed", "base model", "steps a task", "trained parameters", "training", "evaluation")
    names = ("machine", "versions")
    machines = [(run.name, *(in_words(run.facts.get(name)) or "–" for name in names)) for run in runs]
    label, fold = "Machines and versions of the runs", "Machines and versions"
    tables = [
        Table("The runs behind the numbers", "runs", head, rows),
        Table(label, "machines", ("run", *names), machines, fold),
    ]
    return Tables("runs", "Runs", tables)


def _minutes(facts: Mapping[str, Any], part: str) -> str:
    """What a part of a run took, a sum or a list of seconds, in minutes."""
    seconds = (facts.get("seconds") or {}).get(part)
    values = seconds if isinstance(seconds, list) else [] if seconds is None else [seconds]
    return f"{number(sum(values) / 60)} min" if values else "–"


def in_words(value: Any) -> str:
    """A fact on one line, a mapping as in "cores 2, gpu none"; what is None is left out."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
    return "" if value is None else str(value)
