"""The cells of a sweep and the records they leave: what names one, what proves it is of the recipe and data planned."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from dymoe.errors import DymoeError
from dymoe.learning import inspection
from dymoe.learning.folder import FREE
from dymoe.learning.formats import KEY, Description, Record, run_results
from dymoe.learning.recipe import Recipe
from dymoe.models.options import ModelOptions
from dymoe.schema import check
from dymoe.tasks.source import Source
from dymoe.yamls import read_yaml

COPIED = (
    "method",
    "settings",
    "with",
    "stream",
    "tasks",
    "base",
    "split",
    "samples",
    "matrix",
    "lenient_matrix",
    "joint",
    "lenient_joint",
    "zero_shot",
    "answers",
    "watch",
    "metrics",
    "forgetting",
    "format_drift",
    "drift",
    "group_hashes",
    "training",
    "trainable_parameters",
    "stored_parameters",
    "steps",
    "seconds",
    "resumed_at",
    "machine",
    "versions",
    "environments",
    "accepted",
)


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a sweep.

    Attributes:
        label: the row it belongs to.
        order: order of the tasks.
        instructions: instruction type.
        seed: the seed.
        file: the recipe.
        words: what ``dymoe run`` is told after the recipe.
        recipe: the resolved recipe without what does not change the outcome.
        fingerprint: of `recipe` and the data.
        folder: the run folder.
        rate: the learning rate tried, in a tuning sweep.
        of: the label without what varies.
    """

    label: str
    order: str
    instructions: str
    seed: int
    file: Path
    words: tuple[str, ...]
    recipe: Mapping[str, Any]
    fingerprint: str
    folder: Path
    rate: float | None
    of: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What names the cell's record."""
        return (self.label, self.order, self.instructions, self.seed)

    @property
    def name(self) -> str:
        """As a reader says it."""
        return title(self.key)

    @property
    def log(self) -> Path:
        """Where the process writes what it says."""
        return self.folder.with_name(f"{self.folder.name}.log")


def title(key: Sequence[Any]) -> str:
    """A record's name: label and seed, order and instructions where they are not the usual ones."""
    label, order, instructions, seed = key
    parts = [label, *([order] if order != "origin" else []), *([instructions] if instructions != "original" else [])]
    return f"{', '.join(parts)}, seed {seed}"


def comparable(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved recipe as JSON holds it, without the keys that do not change what is computed."""
    values: dict[str, Any] = json.loads(json.dumps(dict(resolved)))
    for key in FREE:
        *path, last = key.split(".")
        inner = values
        for part in path:
            following = inner.get(part)
            inner = following if isinstance(following, dict) else {}
        inner.pop(last, None)
    return values


def fingerprint(recipe: Mapping[str, Any], data: str) -> str:
    """SHA-256 over a comparable recipe and its data's fingerprint."""
    text = json.dumps({"recipe": recipe, "data": data}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=64)
def data_fingerprint(
    stream: str,
    order: str,
    instructions: str,
    tasks: tuple[str, ...] | None,
    train_limit: int | None,
    limit: int | None,
    split: Literal["test", "validation"],
    seed: int,
    source: Source,
    reader: tuple[str, ModelOptions, str] | None = None,
) -> str:
    """The fingerprint that run.yaml will hold; all that it depends on are the arguments.

    `reader` is (model, its options, method), on which depends which samples ``on_bad: skip`` leaves out.
    """
    from dymoe.learning.conditions import data_description
    from dymoe.learning.recipe import Evaluation, Training
    from dymoe.learning.run import checked

    chosen: dict[str, Any] = {"order": order, "instructions": instructions, "tasks": tasks, "seed": seed}
    recipe = Recipe(
        stream=stream,
        data=source,
        training=Training(steps_per_task=1, limit=train_limit),
        evaluation=Evaluation(limit=limit, split=split),
        **chosen,
    )
    if reader is None:
        return str(data_description(checked(recipe.load_stream(), recipe))["fingerprint"])
    model, options, method = reader
    recipe = replace(recipe, model=model, model_options=options, method=method)
    return str(data_description(checked(inspection.load(recipe), recipe))["fingerprint"])


def record(cell: Cell) -> dict[str, Any]:
    """The cell's record from its finished run folder.

    Raises:
        DymoeError: the folder holds no results, those of another recipe or other data, or what is no record.
    """
    results = run_results(cell.folder)
    run = check(read_yaml(cell.folder / "run.yaml"), Description, str(cell.folder / "run.yaml"))
    mark = fingerprint(comparable(run["recipe"]), run["data"]["fingerprint"])
    if mark != cell.fingerprint:
        raise DymoeError(f"{cell.folder}: the run is not the one planned (fingerprint differs); remove the folder")
    copied = {name: value for name, value in results.items() if name in COPIED}
    last = (results.get("reports") or [{}])[-1]
    if "locator" in last:
        copied["locator"] = last["locator"]
    row = {**names_of(cell), "fingerprint": cell.fingerprint, **copied, "recipe": dict(cell.recipe)}
    return dict(
        check(row, Record, f"{cell.folder}: results.json")
    )  # or the file of all records could not be read again


def names_of(cell: Cell) -> dict[str, Any]:
    """What a record says about its place in the sweep."""
    names = {**dict(zip(KEY, cell.key, strict=True)), "file": cell.file.as_posix()}
    return names if cell.rate is None else {**names, "of": cell.of, "rate": cell.rate}


def choose(rows: Sequence[Mapping[str, Any]], cells: Sequence[Cell]) -> dict[str, float]:
    """The learning rate of each method whose whole grid is learned: best mean MFN, ties to the smaller rate.

    Args:
        rows: the records of a tuning sweep.
        cells: all its cells.
    """
    by_key = {tuple(row[name] for name in KEY): row for row in rows}
    chosen = {}
    for method in dict.fromkeys(cell.of for cell in cells):
        mine = [cell for cell in cells if cell.of == method]
        if not all(cell.key in by_key for cell in mine):
            continue
        scores: dict[float, list[float]] = {}
        for cell in mine:
            scores.setdefault(cell.rate or 0.0, []).append(by_key[cell.key]["metrics"]["MFN"])
        chosen[method] = min(scores, key=lambda rate: (-sum(scores[rate]) / len(scores[rate]), rate))
    return chosen
