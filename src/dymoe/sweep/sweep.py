"""Sweeps: what a typed file says of many recipes, seeds, orders and instructions (`dymoe.sweep.plan` plans it)."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dymoe.errors import DymoeError
from dymoe.learning.recipe import parse_overrides, read_keys, set_key
from dymoe.messages import brief
from dymoe.methods.base import require
from dymoe.methods.settings import build
from dymoe.schema import Positive, Size, check_fields


@dataclass
class Entry:
    """One row of a sweep: a recipe with what is changed in it.

    Attributes:
        recipe: the recipe's file, beside the sweep file or below the folder it is called in.
        label: the row's name; the file's name without .yaml if empty.
        set_: keys of the recipe and their values, nested or dotted (key ``set``); they win over all others.
        vary: as the sweep's, for this row alone and in place of the sweep's.
        tuned_as: take the learning rate that was chosen for this label; the row's own label if empty.
    """

    recipe: str = ""
    label: str = ""
    set_: dict[str, Any] = field(default_factory=dict)
    vary: dict[str, list[Any]] = field(default_factory=dict)
    tuned_as: str = ""

    def __post_init__(self) -> None:
        """Refuse a key that varies over nothing."""
        _refuse_empty(self.vary)


@dataclass
class Tune:
    """A search for each recipe's learning rate on the validation split; an empty grid is none.

    Attributes:
        grid: the learning rates, the same for every recipe.
        tasks: the tasks that are learned, all if none.
        steps: optimizer steps per task, the recipe's own if none.
    """

    grid: list[Positive] = field(default_factory=list)
    tasks: list[str] | None = None
    steps: Size | None = None

    def __post_init__(self) -> None:
        """Refuse rates and steps that are not positive and rates named twice."""
        check_fields(self)
        require(len(set(self.grid)) == len(self.grid), "grid", "each rate once", self.grid)
        require(self.tasks is None or len(self.tasks) > 0, "tasks", "at least one task", self.tasks)


@dataclass
class Sweep:
    """Everything a sweep file says.

    Attributes:
        title: the table's heading.
        base: keys that override every recipe (``training``, ``evaluation``, ``model``, ...), nested or dotted.
        recipes: files, or mappings with the keys of `Entry`.
        vary: dotted key of a recipe -> values; every recipe is run with every value, which its label then names.
        seeds: the seeds.
        orders: orders of the stream's tasks.
        instructions: instruction types.
        jobs: processes at a time.
        threads: CPU threads of each process.
        output: folder of the run folders (``runs/NAME`` if empty).
        results: JSON lines of the records (``OUTPUT.jsonl`` if empty).
        table: Markdown file of the table (the results' name with .md if empty).
        reuse: results files (or patterns of them) of other sweeps whose records of the same runs are taken over.
        published: the part of the published numbers that the table sets beside its own.
        reference: the label of the row that the table compares every other with, paired on the same questions.
        tuned: take each row's learning rate from `tuning`.
        tuning: the results of a tuning sweep.
        tune: makes this sweep a tuning sweep.
    """

    title: str = ""
    base: dict[str, Any] = field(default_factory=dict)
    recipes: list[str | dict[str, Any]] = field(default_factory=list)
    vary: dict[str, list[Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    orders: list[Literal["origin", "reverse", "alphabet"]] = field(default_factory=lambda: ["origin"])
    instructions: list[Literal["original", "diverse", "10type"]] = field(default_factory=lambda: ["original"])
    jobs: Size = 1
    threads: Size = 1
    output: str = ""
    results: str = ""
    table: str = ""
    reuse: list[str] = field(default_factory=list)
    published: str = ""
    reference: str = ""
    tuned: bool = False
    tuning: str = "results/tuning.jsonl"
    tune: Tune = field(default_factory=Tune)

    def __post_init__(self) -> None:
        """Refuse empty lists, repeated values and counts below 1."""
        check_fields(self)
        require(len(self.recipes) > 0, "recipes", "at least one recipe", self.recipes)
        for key in ("seeds", "orders", "instructions"):
            values = getattr(self, key)
            require(len(values) > 0, key, "at least one value", values)
            require(len(set(values)) == len(values), key, "each value once", values)
        _refuse_empty(self.vary)
        require(not (self.tuned and self.tune.grid), "tuned", "false in a tuning sweep", self.tuned)
        require(not (self.reference and self.tune.grid), "reference", "none in a tuning sweep", self.reference)


def _refuse_empty(vary: Mapping[str, Sequence[Any]]) -> None:
    for name, values in vary.items():
        require(len(values) > 0, f"vary.{name}", "at least one value", values)


def is_sweep(path: Path) -> bool:
    """Whether a YAML file is a sweep (it names recipes) and not a recipe."""
    try:
        return "recipes" in read_keys(path)
    except DymoeError:
        return False


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file, the files it inherits from and the command line's overrides.

    Raises:
        DymoeError: a missing or unreadable file, an unknown key, a wrong type or range; one line.
    """
    path = Path(path)
    values = read_keys(path)
    if not values.get("recipes"):
        raise DymoeError(f"{path}: recipes: no recipe is named; a recipe alone is learned with `dymoe run`")
    keys = parse_overrides(overrides)
    where = str(path)
    if keys:
        build(Sweep, values, where)
        where = "command line"
    for key, value in keys.items():
        set_key(values, key, value)
    sweep = build(Sweep, values, where)
    sweep.output = sweep.output or os.fspath(Path("runs") / path.stem)
    sweep.results = sweep.results or f"{sweep.output}.jsonl"
    sweep.table = sweep.table or os.fspath(Path(sweep.results).with_suffix(".md"))
    if Path(sweep.table) == Path(sweep.results):
        raise DymoeError(f"{where}: table: expected another file than results, got {brief(sweep.table)}")
    return sweep
