"""Sweeps: many recipes, seeds, orders and instructions in one typed file; what it names, planned as cells."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

from dymoe.errors import DymoeError
from dymoe.files import read_json
from dymoe.learning.folder import FREE
from dymoe.learning.recipe import Recipe, load_recipe, parse_overrides, read_yaml, set_key
from dymoe.methods.base import require
from dymoe.methods.settings import build
from dymoe.tasks.source import Source

KEY = ("label", "order", "instructions", "seed")  # what names a record
OWN = {
    "seed": "seeds",
    "order": "orders",
    "instructions": "instructions",
    "output": "output",
    "training.threads": "threads",
}
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
)
BUDGET = (
    "model",
    "stream",
    "tasks",
    "training.steps_per_task",
    "training.epochs",
    "training.batch_size",
    "training.gradient_accumulation",
    "training.limit",
    "training.dtype",
    "evaluation.limit",
    "evaluation.split",
)


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

    grid: list[float] = field(default_factory=list)
    tasks: list[str] | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        """Refuse rates and steps that are not positive and rates named twice."""
        require(all(rate > 0 for rate in self.grid), "grid", "numbers above 0", self.grid)
        require(len(set(self.grid)) == len(self.grid), "grid", "each rate once", self.grid)
        require(self.tasks is None or len(self.tasks) > 0, "tasks", "at least one task", self.tasks)
        require(self.steps is None or self.steps >= 1, "steps", "1 or more", self.steps)


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
        results: JSON file of the records (``OUTPUT.json`` if empty).
        table: Markdown file of the table (the results' name with .md if empty).
        reuse: results files (or patterns of them) of other sweeps whose records of the same runs are taken over.
        published: the part of the published numbers that the table sets beside its own.
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
    jobs: int = 1
    threads: int = 1
    output: str = ""
    results: str = ""
    table: str = ""
    reuse: list[str] = field(default_factory=list)
    published: str = ""
    tuned: bool = False
    tuning: str = "docs/tuning.json"
    tune: Tune = field(default_factory=Tune)

    def __post_init__(self) -> None:
        """Refuse empty lists, repeated values and counts below 1."""
        require(len(self.recipes) > 0, "recipes", "at least one recipe", self.recipes)
        for key in ("seeds", "orders", "instructions"):
            values = getattr(self, key)
            require(len(values) > 0, key, "at least one value", values)
            require(len(set(values)) == len(values), key, "each value once", values)
        _refuse_empty(self.vary)
        for key in ("jobs", "threads"):
            require(getattr(self, key) >= 1, key, "1 or more", getattr(self, key))
        require(not (self.tuned and self.tune.grid), "tuned", "false in a tuning sweep", self.tuned)


def _refuse_empty(vary: Mapping[str, Sequence[Any]]) -> None:
    for name, values in vary.items():
        require(len(values) > 0, f"vary.{name}", "at least one value", values)


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
        return told(self.key)

    @property
    def log(self) -> Path:
        """Where the process writes what it says."""
        return self.folder.with_name(f"{self.folder.name}.log")


def told(key: Sequence[Any]) -> str:
    """A record's name: label and seed, order and instructions where they are not the usual ones."""
    label, order, instructions, seed = key
    parts = [label, *([order] if order != "origin" else []), *([instructions] if instructions != "original" else [])]
    return f"{', '.join(parts)}, seed {seed}"


def is_sweep(path: Path) -> bool:
    """Whether a YAML file is a sweep (it names recipes) and not a recipe."""
    try:
        return "recipes" in read_yaml(path)
    except DymoeError:
        return False


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file, the files it inherits from and the command line's overrides.

    Raises:
        DymoeError: a missing or unreadable file, an unknown key, a wrong type or range; one line.
    """
    path = Path(path)
    values = read_yaml(path)
    if not values.get("recipes"):
        raise DymoeError(f"{path}: recipes: no recipe is named; a recipe alone is learned with `dymoe run`")
    given = parse_overrides(overrides, Sweep)
    where = str(path)
    if given:
        build(Sweep, values, where)
        where = "command line"
    for key, value in given.items():
        set_key(values, key, value)
    sweep = build(Sweep, values, where)
    sweep.output = sweep.output or os.fspath(Path("runs") / path.stem)
    sweep.results = sweep.results or f"{sweep.output}.json"
    sweep.table = sweep.table or os.fspath(Path(sweep.results).with_suffix(".md"))
    if Path(sweep.table) == Path(sweep.results):
        raise DymoeError(f"{where}: table: expected another file than results, got {sweep.table!r}")
    return sweep


class Plan:
    """The cells of a sweep, every recipe checked.

    Args:
        sweep: the sweep.
        path: its file; recipes are looked for beside it first.

    Raises:
        DymoeError: a missing recipe, a key or value that a recipe refuses, two rows of one label, no chosen
            learning rate; one line.
    """

    def __init__(self, sweep: Sweep, path: str | Path) -> None:
        self.sweep = sweep
        self.where = str(path)
        self._rows: dict[str, _Row] = {}
        rates = self._rates()
        for number, values in enumerate(sweep.recipes, start=1):
            for row in self._entry(number, values, Path(path).parent, rates):
                if row.label in self._rows:
                    raise DymoeError(
                        f"{self.where}: recipes: two rows are called {row.label!r}; give one another label"
                    )
                self._rows[row.label] = row
        # Seed by seed: what an interrupted sweep leaves is a whole table of fewer seeds.
        places = product(sweep.seeds, sweep.orders, sweep.instructions, self._rows)
        self.cells = [self.cell(label, order, kind, seed) for seed, order, kind, label in places]

    @property
    def labels(self) -> list[str]:
        """The rows in the file's order."""
        return list(self._rows)

    def cell(self, label: str, order: str, instructions: str, seed: int) -> Cell:
        """The run of a row with an order, instructions and a seed."""
        row = self._rows[label]
        try:
            chosen: dict[str, Any] = {"order": order, "instructions": instructions, "seed": seed}
            recipe = replace(row.recipe, **chosen)
            data = _data_fingerprint(
                recipe.stream,
                order,
                instructions,
                tuple(recipe.tasks) if recipe.tasks is not None else None,
                recipe.training.limit,
                recipe.evaluation.limit,
                recipe.evaluation.split,
                seed if instructions == "10type" else 0,
                recipe.data,
            )
        except DymoeError as error:
            raise DymoeError(f"{self.where}: {label}: {error}") from None
        kept = comparable(recipe.resolved())
        mark = fingerprint(kept, data)
        slug = re.sub(r"[^\w.=+-]+", "-", label).strip("-.") or "row"
        # The fingerprint in its name keeps a changed recipe out of the old run's folder.
        folder = Path(self.sweep.output) / f"{slug}-{order}-{instructions}-{seed}-{mark[:8]}"
        words = [
            *row.words,
            *("--order", order, "--instructions", instructions, "--seed", str(seed)),
            *("--training.threads", str(self.sweep.threads), "--output", str(folder)),
        ]
        place = (label, order, instructions, seed)
        return Cell(*place, row.file, tuple(words), kept, mark, folder, row.rate, row.of)

    def budget(self) -> dict[str, Any]:
        """What all cells share of `BUDGET`."""
        found = {}
        for key in BUDGET:
            values = [_get(cell.recipe, key) for cell in self.cells]
            if all(value == values[0] for value in values) and values[0] is not None:
                found[key] = values[0]
        return found

    def sort_out(
        self, rows: Sequence[Mapping[str, Any]], replace_others: bool, where: str
    ) -> tuple[list[dict[str, Any]], list[Cell]]:
        """The records that hold and the cells that are still to be learned.

        Args:
            rows: the records of the results file.
            replace_others: drop records that this sweep would make otherwise, or not at all.
            where: the results file, for the message.

        Raises:
            DymoeError: there are such records and `replace_others` is off.
        """
        planned = {cell.key: cell for cell in self.cells}
        kept: dict[tuple[Any, ...], dict[str, Any]] = {}
        others: list[str] = []
        for row in rows:
            key = tuple(row[name] for name in KEY)
            why = self._refused(row, planned.get(key))
            if why is None:
                kept[key] = dict(row)
            else:
                others.append(f"{told(key)}: {why}")
        if others and not replace_others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise DymoeError(
                f"{where}: holds a record that is not of this sweep ({others[0]}){more}; give --replace to drop "
                "what differs, or another --results and --table"
            )
        same = self._elsewhere(where) if len(kept) < len(self.cells) else {}
        for cell in self.cells:
            if cell.key not in kept and cell.fingerprint in same:
                kept[cell.key] = {**same[cell.fingerprint], **_names(cell)}
        order = {key: number for number, key in enumerate(planned)}
        held = sorted(kept.values(), key=lambda row: order.get(tuple(row[name] for name in KEY), len(order)))
        return held, [cell for cell in self.cells if cell.key not in kept]

    def _elsewhere(self, where: str) -> dict[str, dict[str, Any]]:
        """The records of the files in `reuse` by fingerprint."""
        found: dict[str, dict[str, Any]] = {}
        for pattern in self.sweep.reuse:
            for file in sorted(glob.glob(pattern)):
                if Path(file) != Path(where):
                    found.update({row["fingerprint"]: row for row in read_results(file)["rows"]})
        return found

    def _refused(self, row: Mapping[str, Any], cell: Cell | None) -> str | None:
        """Why a record is not what this sweep would make; None if it is."""
        if cell is None:
            if row["label"] not in self._rows:
                return "no such row in this sweep"
            cell = self.cell(*(row[name] for name in KEY))
        if row["fingerprint"] == cell.fingerprint:
            return None
        there, here = _flat(row.get("recipe") or {}), _flat(cell.recipe)
        names = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
        if not names:
            return "other data"
        name = names[0]
        more = f" and {len(names) - 1} more keys" if len(names) > 1 else ""
        return f"{name} is {there.get(name)!r} there, {here.get(name)!r} here{more}"

    def _rates(self) -> dict[str, float] | None:
        """The chosen learning rates by label; None if the sweep takes the recipes' own."""
        if not self.sweep.tuned:
            return None
        file = Path(self.sweep.tuning)
        if not file.is_file():
            raise DymoeError(
                f"{self.where}: tuning: no such file {file}; run the tuning sweep first or give --tuned false"
            )
        found = read_json(file)
        chosen = found.get("chosen") if isinstance(found, dict) else None
        if not isinstance(chosen, dict):
            raise DymoeError(f"{file}: holds no chosen learning rates; a tuning sweep's results are needed")
        return {label: float(rate) for label, rate in chosen.items()}

    def _entry(self, number: int, values: Any, beside: Path, rates: Mapping[str, float] | None) -> "Iterator[_Row]":
        """The rows that an entry makes: one, or one for every varied value."""
        where = f"recipes.{number}"
        plain = {"recipe": values} if isinstance(values, str) else values
        if not isinstance(plain, Mapping) or not isinstance(plain.get("recipe"), str):
            raise DymoeError(f"{self.where}: {where}: expected a recipe's file or a mapping with the key recipe")
        entry = build(Entry, plain, self.where, f"{where}.")
        file = beside / entry.recipe
        if not file.is_file() and Path(entry.recipe).is_file():
            file = Path(entry.recipe)
        file = Path(os.path.normpath(file))
        label = entry.label or file.stem
        base, own = _flat(self.sweep.base), _flat(entry.set_)
        tuned = self._tuned(entry, label, rates) if "training.lr" not in own else {}
        for suffix, varied, rate in self._variants(entry.vary or self.sweep.vary):
            keys = {**base, **tuned, **own, **varied}
            self._refuse_own(keys)
            words = [word for key, value in keys.items() for word in (f"--{key}", _yaml(value))]
            try:
                recipe = load_recipe(file, words)
            except DymoeError as error:
                text = str(error).removeprefix("command line: ")
                raise DymoeError(f"{self.where}: {where} ({label}{suffix}): {text}") from None
            yield _Row(f"{label}{suffix}", file, tuple(words), recipe, rate, label)

    def _variants(self, vary: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, dict[str, Any], float | None]]:
        """End of the label, keys and learning rate for every combination of what varies."""
        tune = self.sweep.tune
        for values in product(*vary.values()):
            keys = dict(zip(vary, values, strict=True))
            suffix = "".join(f" {key.rsplit('.', 1)[-1]}={_short(value)}" for key, value in keys.items())
            if not tune.grid:
                yield suffix, keys, None
            for rate in tune.grid:
                fixed: dict[str, Any] = {"training.lr": rate, "evaluation.split": "validation"}
                if tune.tasks is not None:
                    fixed["tasks"] = tune.tasks
                if tune.steps is not None:
                    fixed["training.steps_per_task"] = tune.steps
                yield f"{suffix} lr={_short(rate)}", {**keys, **fixed}, rate

    def _tuned(self, entry: Entry, label: str, rates: Mapping[str, float] | None) -> dict[str, Any]:
        """The chosen learning rate of a row as a key."""
        if rates is None:
            return {}
        name = entry.tuned_as or label
        if name not in rates:
            raise DymoeError(
                f"{self.where}: {label}: {self.sweep.tuning} has no chosen learning rate for {name!r}; tune it, "
                "name another with tuned_as, or set training.lr"
            )
        return {"training.lr": rates[name]}

    def _refuse_own(self, keys: Mapping[str, Any]) -> None:
        """Refuse keys of a recipe that the sweep itself decides."""
        for key in keys:
            if key in OWN:
                raise DymoeError(f"{self.where}: {key}: the sweep's own key {OWN[key]} decides it; set that")


@dataclass(frozen=True)
class _Row:
    """One row of the table: a recipe as this sweep changes it."""

    label: str
    file: Path
    words: tuple[str, ...]
    recipe: Recipe
    rate: float | None
    of: str


def comparable(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved recipe as JSON holds it, without the keys that do not change what is computed."""
    values: dict[str, Any] = json.loads(json.dumps(dict(resolved)))
    for key in FREE:
        *path, last = key.split(".")
        inner = values
        for part in path:
            inner = inner.get(part, {})
        inner.pop(last, None)
    return values


def fingerprint(recipe: Mapping[str, Any], data: str) -> str:
    """SHA-256 over a comparable recipe and its data's fingerprint."""
    text = json.dumps({"recipe": recipe, "data": data}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=64)
def _data_fingerprint(
    stream: str,
    order: str,
    instructions: str,
    tasks: tuple[str, ...] | None,
    train_limit: int | None,
    limit: int | None,
    split: Literal["test", "validation"],
    seed: int,
    source: Source,
) -> str:
    """The fingerprint that run.yaml will hold; all that it depends on are the arguments."""
    from dymoe.learning.recipe import Evaluation, Training
    from dymoe.learning.results import data_description
    from dymoe.learning.run import checked

    chosen: dict[str, Any] = {"order": order, "instructions": instructions, "tasks": tasks, "seed": seed}
    recipe = Recipe(
        stream=stream,
        data=source,
        training=Training(steps_per_task=1, limit=train_limit),
        evaluation=Evaluation(limit=limit, split=split),
        **chosen,
    )
    return str(data_description(checked(recipe.load_stream(), recipe))["fingerprint"])


def record(cell: Cell) -> dict[str, Any]:
    """The cell's record from its finished run folder.

    Raises:
        DymoeError: the folder holds no results, or those of another recipe or other data.
    """
    results = read_json(cell.folder / "results.json")
    run = read_yaml(cell.folder / "run.yaml")
    made = fingerprint(comparable(run["recipe"]), run["data"]["fingerprint"])
    if made != cell.fingerprint:
        raise DymoeError(f"{cell.folder}: the run is not the one planned (fingerprint differs); remove the folder")
    kept = {name: results[name] for name in COPIED if name in results}
    return {**_names(cell), "fingerprint": cell.fingerprint, **kept, "recipe": dict(cell.recipe)}


def _names(cell: Cell) -> dict[str, Any]:
    """What a record says about its place in the sweep."""
    names = {**dict(zip(KEY, cell.key, strict=True)), "file": cell.file.as_posix()}
    return names if cell.rate is None else {**names, "of": cell.of, "rate": cell.rate}


def read_results(path: str | Path) -> dict[str, Any]:
    """A sweep's results; without rows if the file is not there yet.

    Raises:
        DymoeError: the file is no sweep's results.
    """
    path = Path(path)
    if not path.is_file():
        return {"about": {}, "rows": []}
    found = read_json(path)
    rows = found.get("rows") if isinstance(found, dict) else None
    names = (*KEY, "fingerprint", "metrics")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {*names} <= {*row} for row in rows):
        raise DymoeError(f"{path}: is not a sweep's results (rows with {', '.join(names)}); give another --results")
    return {**found, "about": found.get("about") or {}}


def choose(rows: Sequence[Mapping[str, Any]], cells: Sequence[Cell]) -> dict[str, float]:
    """The learning rate of each method whose whole grid is learned: best mean MFN, ties to the smaller rate.

    Args:
        rows: the records of a tuning sweep.
        cells: all its cells.
    """
    found = {tuple(row[name] for name in KEY): row for row in rows}
    chosen = {}
    for method in dict.fromkeys(cell.of for cell in cells):
        mine = [cell for cell in cells if cell.of == method]
        if not all(cell.key in found for cell in mine):
            continue
        scores: dict[float, list[float]] = {}
        for cell in mine:
            scores.setdefault(cell.rate or 0.0, []).append(found[cell.key]["metrics"]["MFN"])
        chosen[method] = min(scores, key=lambda rate: (-sum(scores[rate]) / len(scores[rate]), rate))
    return chosen


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested mappings; an empty mapping stays a value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping) and value
        found.update(_flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value})
    return found


def _get(values: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _yaml(value: Any) -> str:
    """A value as a word of the command line that reads back as the same value."""
    import yaml

    # JSON would write 2e-05, which YAML 1.1 reads as text.
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("...").rstrip("\n")


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
