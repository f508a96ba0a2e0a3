"""The token's dilemma: two tasks, the second learned with the new experts open to some tokens alone."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dymoe.analysis.storage import COLUMNS
from dymoe.errors import DymoeError
from dymoe.evaluation import AccuracyMatrix
from dymoe.learning.formats import read_results
from dymoe.sweep.sweep import Sweep, is_sweep, load_sweep

GUIDANCE = "settings.guidance"
# Which tokens reach the new experts while the second task is learned -> the mask that does it (`dymoe.routing`).
STRATEGIES = {
    "new": "protect",
    "ambiguous": "only-ambiguous",
    "old": "only-old",
    "all": "none",
    "none": "no-token",
}
MEASURES = ("new_task_accuracy", "old_task_before", "old_task_after", "forgetting", "drift")


def dilemma_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep of a dilemma: a sweep file as it is, or a recipe of two tasks under every strategy.

    Args:
        path: a sweep file whose rows vary ``settings.guidance``, or a recipe.
        overrides: keys of the sweep, ``--seeds`` ``[0, 1]``.

    Raises:
        DymoeError: a broken file, an unknown key, or a recipe that does not learn two tasks by a method with guidance.
    """
    path = Path(path)
    if is_sweep(path):
        return load_sweep(path, overrides)
    from dymoe.learning.recipe import load_recipe, parse_overrides, set_key
    from dymoe.methods.settings import build
    from dymoe.tasks import task_names

    recipe = load_recipe(path)
    names = task_names(recipe.stream, recipe.order, recipe.tasks)
    if len(names) != 2 or recipe.method != "dymoe":
        raise DymoeError(
            f"{path}: tasks: the token's dilemma needs two tasks learned by method dymoe, this recipe has "
            f"{len(names)} by {recipe.method}; set tasks and method, or give a sweep (pocket/dilemma)"
        )
    row = {"recipe": path.name, "label": " -> ".join(names), "vary": {GUIDANCE: [*STRATEGIES.values()]}}
    output = str(Path("runs") / f"{path.stem}-dilemma")
    values: dict[str, Any] = {"title": "Token's dilemma", "recipes": [row], "output": output}
    values.update(seeds=[recipe.seed], orders=[recipe.order], instructions=[recipe.instructions])
    for key, value in parse_overrides(overrides, Sweep).items():
        set_key(values, key, value)
    sweep = build(Sweep, values, str(path))
    sweep.results = sweep.results or f"{sweep.output}.jsonl"
    sweep.table = sweep.table or f"{sweep.output}.md"
    return sweep


def dilemma(source: str | Path | Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """What each strategy taught and what it cost, from the records of a sweep.

    Args:
        source: a sweep's results (JSON), the sweep file or recipe they come from, or the records themselves. Learning
            is `dymoe analyze dilemma`'s or `dymoe sweep`'s work; here finished records are read.

    Returns:
        One row per pair of tasks, strategy and seed: pair ("A -> B"), seed, strategy (a key of `STRATEGIES`),
        new_task_accuracy (percent, on B after B), old_task_before and old_task_after (percent, on A before and after
        B), forgetting (points, before minus after), drift (0..1, weight of A's tokens on B's group at the end; NaN
        where the run has none).

    Raises:
        DymoeError: no such file, or a record that is not of two tasks under one of the strategies.
    """
    if isinstance(source, str | Path):
        file = Path(source) if Path(source).suffix == ".jsonl" else Path(dilemma_sweep(source).results)
        if not file.is_file():
            raise DymoeError(f"{file}: no such results; learn them with `dymoe analyze dilemma {source}`")
        return dilemma(read_results(file)["rows"])
    named = {mask: strategy for strategy, mask in STRATEGIES.items()}
    rows = []
    for record in source:
        tasks: list[str] = record.get("tasks") or []
        matrix: list[list[float]] = record.get("matrix") or []
        mask = (record.get("settings") or {}).get("guidance")
        if len(tasks) != 2 or len(matrix) != 2 or not isinstance(mask, str) or mask not in named:
            raise DymoeError(
                f"{record.get('label')}, seed {record.get('seed')}: not a record of the token's dilemma (two tasks, "
                f"settings.guidance one of {', '.join(named)})"
            )
        (before,), (after, new) = AccuracyMatrix(matrix).rows
        weights = (record.get("drift") or {}).get(tasks[0])
        rows.append(
            {
                "pair": " -> ".join(tasks),
                "seed": record["seed"],
                "strategy": named[mask],
                "new_task_accuracy": float(new),
                "old_task_before": float(before),
                "old_task_after": float(after),
                "forgetting": float(before) - float(after),
                "drift": float(weights[-1]) if weights else math.nan,
            }
        )
    frame = pd.DataFrame(rows, columns=[*COLUMNS["dilemma"]])
    order = {strategy: number for number, strategy in enumerate(STRATEGIES)}
    keys = {"pair": frame["pair"], "seed": frame["seed"], "order": frame["strategy"].map(order)}
    return frame.loc[pd.DataFrame(keys).sort_values(["pair", "seed", "order"]).index].reset_index(drop=True)


def is_dilemma(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a sweep's records are of two tasks each, learned under several strategies."""
    masks = [(row.get("settings") or {}).get("guidance") for row in rows if len(row.get("tasks") or ()) == 2]
    return sum(mask in masks for mask in STRATEGIES.values()) > 1


def complete(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the pairs and seeds that were learned under every strategy the frame holds."""
    wanted = frame["strategy"].nunique()
    return frame[frame.groupby(["pair", "seed"])["strategy"].transform("nunique") == wanted]


def by_strategy(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean and sample standard deviation over seeds, for each pair and for all pairs together.

    Args:
        frame: of `dilemma`; only pairs and seeds with every strategy count.

    Returns:
        Columns pair ("all pairs" for the mean over pairs), strategy, seeds, and for every measure its mean and, with
        `_std` behind its name, the deviation over seeds (NaN with one seed).
    """
    whole = complete(frame)
    together = whole.groupby(["strategy", "seed"], as_index=False)[[*MEASURES]].mean().assign(pair="all pairs")
    parts = []
    for part in (whole, together):
        grouped = part.groupby(["pair", "strategy"])[[*MEASURES]]
        spread = grouped.std(ddof=1).add_suffix("_std")
        parts.append(pd.concat([grouped.size().rename("seeds"), grouped.mean(), spread], axis=1).reset_index())
    found = pd.concat(parts, ignore_index=True)
    place = {strategy: number for number, strategy in enumerate(STRATEGIES)}
    keys = pd.DataFrame(
        {"last": found["pair"] == "all pairs", "pair": found["pair"], "place": found["strategy"].map(place)}
    )
    return found.loc[keys.sort_values(["last", "pair", "place"]).index].reset_index(drop=True)


def conclusion(frame: pd.DataFrame) -> str:
    """One sentence with the numbers: what ambiguous, old and all tokens teach the new experts, and what they cost.

    Differences to the strategy "new" are means over pairs and seeds, each with its standard error, compared within the
    same pair and seed.

    Args:
        frame: of `dilemma`; only pairs and seeds with every strategy count.
    """
    whole = complete(frame)
    cells = whole[["pair", "seed"]].drop_duplicates()
    if cells.empty or not {"new", "ambiguous", "old"} <= {*whole["strategy"]}:
        return "No pair and seed has been learned under the strategies new, ambiguous and old yet."
    wide = whole.pivot(index=["pair", "seed"], columns="strategy", values=["new_task_accuracy", "forgetting", "drift"])
    told = []
    subjects = {"ambiguous": "ambiguous tokens alone", "old": "old tokens alone", "all": "all tokens together"}
    for kind, subject in subjects.items():
        if kind not in {*whole["strategy"]}:
            continue
        learned, lost, drifted = (
            _difference(wide[measure][kind] - wide[measure]["new"], scale)
            for measure, scale in (("new_task_accuracy", 1), ("forgetting", 1), ("drift", 100))
        )
        told.append(
            f"{subject} changed new-task accuracy by {learned} points, forgetting by {lost} and drift by {drifted}"
        )
    new = {measure: wide[measure]["new"].mean() for measure in ("new_task_accuracy", "forgetting")}
    pairs, seeds = (counted(cells[key].nunique(), key) for key in ("pair", "seed"))
    over = f"means over {len(cells)} learnings of {pairs} by {seeds}, ± standard error"
    if len(cells) == 1:
        over = "one pair and seed, so no standard error"
    return (
        f"Against new tokens alone, with which the new task reached {new['new_task_accuracy']:.1f} % and the old one "
        f"lost {new['forgetting']:.1f} points, {'; '.join(told)} ({over})."
    )


def counted(number: int, what: str) -> str:
    """As in "1 pair" and "3 pairs"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _difference(values: pd.Series, scale: float) -> str:
    """Mean difference with its sign and standard error."""
    values = values.dropna() * scale
    if values.empty:
        return "an unknown number of"
    error = f" ± {values.sem():.1f}" if len(values) > 1 else ""
    return f"{values.mean():+.1f}{error}"
