"""Puts the page about runs together: summary, figures, samples, tables."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dymoe.files import atomic_write
from dymoe.numbers import number
from dymoe.report import figures
from dymoe.report.activation_figures import activation_figures
from dymoe.report.drift_figures import drift_figures
from dymoe.report.dynamics_figures import dynamics_figures
from dymoe.report.layout import render
from dymoe.report.losses import losses
from dymoe.report.overlay import Overlay, overlay
from dymoe.report.parts import Figure, Table
from dymoe.report.runs import Run, read_runs
from dymoe.report.samples import Comparison, compare
from dymoe.report.summary import METRICS, Method, gather
from dymoe.report.words import cards, headline, lost_most, remarks


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


def page_of(methods: Sequence[Method]) -> str:
    """The page as HTML text."""
    first = _present(losses(methods))
    forgetting = _present(
        figures.side_by_side(methods),
        figures.over_stages(methods),
        figures.matrices(methods),
        figures.lost_per_task(methods),
    )
    routing = [
        *_present(figures.routing_drift(methods), figures.routing_maps(methods)),
        *drift_figures(methods),
        *activation_figures(methods),
    ]
    tokens, training = overlay(methods), dynamics_figures(methods)
    runs = [run for method in methods for run in method.runs]
    hashes, hash_verdict = hash_table(runs)
    samples = compare(methods)
    return render(
        "page.html.jinja",
        stream=methods[0].runs[0].stream,
        headline=headline(methods),
        cards=cards(methods),
        remarks=remarks(methods),
        contents=_contents(first, forgetting, routing, tokens, training),
        methods=methods,
        metrics=metrics_table(methods),
        first=first,
        forgetting=forgetting,
        routing=routing,
        overlay=tokens,
        training=training,
        hashes=hashes,
        hash_verdict=hash_verdict,
        samples=samples,
        pairs=pair_table(methods, samples),
        answered_by=[(method.label, method.runs[0].seed) for method in methods],
        runs=run_table(runs),
        machines=machine_table(runs),
    )


def _present(*figures: Figure | None) -> list[Figure]:
    return [figure for figure in figures if figure is not None]


Links = list[tuple[str, str]]


def _contents(
    first: Sequence[Figure],
    forgetting: Sequence[Figure],
    routing: Sequence[Figure],
    tokens: Overlay | None,
    training: Sequence[Figure],
) -> list[tuple[str, Links]]:
    """The page's sections as (id, title), under three names."""

    def links(figures: Sequence[Figure]) -> Links:
        return [(figure.id, figure.title) for figure in figures]

    samples = ("samples", "What one still answers and another has lost")
    about_routing = [*links(routing), *([("overlay", "Token by token")] if tokens else []), *links(training)]
    return [
        ("Forgetting", [*links(first), ("metrics", "Metrics"), *links(forgetting), samples]),
        *([("Routing", about_routing)] if about_routing else []),
        ("Evidence", [("hashes", "Frozen groups"), ("runs", "Runs")]),
    ]


def metrics_table(methods: Sequence[Method]) -> Table:
    """MFT, MFN, MAA and BWT of each method, and which task it lost most of."""
    rows = []
    for method in methods:
        values = [(method.metric(key), key.startswith("BWT")) for key in METRICS]
        cells = ["–" if stat is None else stat.text(sign=signed) for stat, signed in values]
        rows.append((method.label, method.seeds, *cells, "–" if method.level else lost_most(method)))
    head = ("method", "runs", "MFT", "MFN", "MAA", "BWT (÷ T)", "BWT (÷ T−1)", "lost most")
    return Table(head, tuple(rows))


def pair_table(methods: Sequence[Method], samples: Comparison) -> Table | None:
    """How many samples each method (row) still answers that another (column) has lost; None for a single method."""
    if len(methods) < 2:
        return None
    others = [method for method in methods if not method.level]
    rows = [
        (
            method.label,
            *("–" if other is method else str(samples.counts[method.index][other.index]) for other in others),
        )
        for method in methods
    ]
    return Table(("still answered by", *(f"lost by {method.label}" for method in others)), tuple(rows))


def hash_table(runs: Sequence[Run]) -> tuple[Table, str]:
    """For every expert group of every run: its hash when learned and whether it ever changed; and the sum in words."""
    rows = []
    kept, differing, shared = 0, [], []
    for run in runs:
        history: dict[str, list[tuple[int, str]]] = {}
        for stage, groups in run.group_hashes:
            for name, digest in groups.items():
                history.setdefault(name, []).append((stage, digest))
        for name, seen in history.items():
            first, last = seen[0], seen[-1]
            changed = sorted({stage for stage, digest in seen if digest != first[1]})
            if changed and len(history) == 1:  # later tasks added none, so they train this one
                verdict = "shared by all tasks, which train it on"
                shared.append(run.name)
            elif changed:
                verdict = f"differs at stage {', '.join(map(str, changed))}: not frozen"
                differing.append(f"{name} of {run.name}")
            elif last[0] == first[0]:
                verdict = "new at this stage"
            else:
                verdict = f"identical through stage {last[0]}"
                kept += 1
            rows.append((run.name, name, str(first[0]), first[1], verdict))
    words = [f"Expert groups checked at a later stage that are identical: {kept}."] if kept else []
    if differing:
        words.append(f"Changed after they were learned: {', '.join(differing)}.")
    if shared:
        words.append(f"Not frozen, since all tasks share and train it: the one group of {', '.join(shared)}.")
    if not words:
        words.append("No group has been followed by a later stage yet.")
    head = ("run", "group", "learned at stage", "hash when learned", "since then")
    return Table(head, tuple(rows)), " ".join(words)


def run_table(runs: Sequence[Run]) -> Table:
    """Where the numbers come from: folder, seed, base model, steps and time."""
    rows = []
    for run in runs:
        seconds = run.facts.get("seconds")
        timing = seconds if isinstance(seconds, dict) else {}
        rows.append(
            (
                run.name,
                run.method,
                str(run.seed),
                run.base,
                str(run.facts.get("steps_per_task", "–")),
                _grouped(run.facts.get("trainable_parameters")),
                _minutes(timing.get("train")),
                _minutes(timing.get("evaluate")),
            )
        )
    head = ("run", "method", "seed", "base model", "steps a task", "trained parameters", "training", "evaluation")
    return Table(head, tuple(rows))


def machine_table(runs: Sequence[Run]) -> Table:
    """What the runs were learned on and with: machine and versions."""
    facts = ("machine", "versions")
    rows = ((run.name, *(", ".join(_flat(run.facts.get(fact))) or "–" for fact in facts)) for run in runs)
    return Table(("run", *facts), tuple(rows))


def _grouped(count: Any) -> str:
    """A count with its thousands apart, by spaces that never break a line."""
    return f"{count:,}".replace(",", "\u202f") if isinstance(count, int) else "–"


def _minutes(seconds: Any) -> str:
    """The sum of a list of seconds (or one number of seconds) in minutes."""
    values = seconds if isinstance(seconds, list) else [seconds]
    known = [float(value) for value in values if isinstance(value, int | float)]
    return f"{number(sum(known) / 60)} min" if known else "–"


def _flat(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if item is not None:
                yield f"{key} {item}"
    elif value is not None:
        yield str(value)
