"""The plan of a sweep: its recipes as cells, and which of them records of this or another sweep already hold."""

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from dymoe.errors import DymoeError
from dymoe.learning.catalog import locate
from dymoe.learning.formats import KEY, read_results
from dymoe.learning.recipe import Recipe, load_recipe
from dymoe.messages import brief, nearest, shorten
from dymoe.methods.settings import build
from dymoe.sweep.records import (
    Cell,
    comparable,
    data_fingerprint,
    fingerprint,
    names_of,
    title,
)
from dymoe.sweep.sweep import Entry, Sweep

AXES = {
    "seed": "seeds",
    "order": "orders",
    "instructions": "instructions",
    "output": "output",
    "training.threads": "threads",
}
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


class Plan:
    """The cells of a sweep, every recipe checked.

    Args:
        sweep: the sweep.
        path: its file or name (`catalog.locate`); recipes are looked for beside it first.

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
            for row in self._entry(number, values, locate(path).parent, rates):
                if row.label in self._rows:
                    raise DymoeError(
                        f"{self.where}: recipes: two rows are called {brief(row.label)}; give one another label"
                    )
                self._rows[row.label] = row
        if sweep.reference and sweep.reference not in self._rows:
            raise DymoeError(
                f"{self.where}: reference: no row {brief(sweep.reference)}; {nearest(sweep.reference, self._rows)}"
            )
        # Seed by seed: what an interrupted sweep leaves is a whole table of fewer seeds.
        combinations = product(sweep.seeds, sweep.orders, sweep.instructions, self._rows)
        self.cells = [self.cell(label, order, kind, seed) for seed, order, kind, label in combinations]

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
            data = data_fingerprint(
                recipe.stream,
                order,
                instructions,
                tuple(recipe.tasks) if recipe.tasks is not None else None,
                recipe.training.limit,
                recipe.evaluation.limit,
                recipe.evaluation.split,
                seed if instructions == "10type" else 0,
                recipe.data,
                (recipe.model, recipe.model_options, recipe.method) if recipe.data.on_bad == "skip" else None,
            )
        except DymoeError as error:
            raise DymoeError(f"{self.where}: {label}: {error}") from None
        recipe_keys = comparable(recipe.resolved())
        mark = fingerprint(recipe_keys, data)
        slug = re.sub(r"[^\w.=+-]+", "-", label).strip("-.") or "row"
        # The fingerprint in its name keeps a changed recipe out of the old run's folder.
        folder = Path(self.sweep.output) / f"{slug}-{order}-{instructions}-{seed}-{mark[:8]}"
        words = [
            *row.words,
            *("--order", order, "--instructions", instructions, "--seed", str(seed)),
            *("--training.threads", str(self.sweep.threads), "--output", str(folder)),
        ]
        names = (label, order, instructions, seed)
        return Cell(*names, row.file, tuple(words), recipe_keys, mark, folder, row.rate, row.of)

    def budget(self) -> dict[str, Any]:
        """What all cells share of `BUDGET`."""
        shared = {}
        for key in BUDGET:
            values = [_get(cell.recipe, key) for cell in self.cells]
            if all(value == values[0] for value in values) and values[0] is not None:
                shared[key] = values[0]
        return shared

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
        valid: dict[tuple[Any, ...], dict[str, Any]] = {}
        others: list[str] = []
        for row in rows:
            key = tuple(row[name] for name in KEY)
            why = self._refused(row, planned.get(key))
            if why is None:
                valid[key] = dict(row)
            else:
                others.append(f"{title(key)}: {why}")
        if others and not replace_others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise DymoeError(
                f"{where}: holds a record that is not of this sweep ({others[0]}){more}; give --replace to drop "
                "what differs, or another --results and --table"
            )
        same = self._elsewhere(where) if len(valid) < len(self.cells) else {}
        for cell in self.cells:
            if cell.key not in valid and cell.fingerprint in same:
                valid[cell.key] = {**same[cell.fingerprint], **names_of(cell)}
        order = {key: number for number, key in enumerate(planned)}
        result = sorted(valid.values(), key=lambda row: order.get(tuple(row[name] for name in KEY), len(order)))
        return result, [cell for cell in self.cells if cell.key not in valid]

    def _elsewhere(self, where: str) -> dict[str, dict[str, Any]]:
        """The records of the files in `reuse` by fingerprint."""
        by_fingerprint: dict[str, dict[str, Any]] = {}
        for pattern in self.sweep.reuse:
            for file in sorted(glob.glob(pattern)):
                if Path(file) != Path(where):
                    by_fingerprint.update({row["fingerprint"]: row for row in read_results(file)["rows"]})
        return by_fingerprint

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
        return f"{name} is {brief(there.get(name))} there, {brief(here.get(name))} here{more}"

    def _rates(self) -> dict[str, float] | None:
        """The chosen learning rates by label; None if the sweep takes the recipes' own."""
        if not self.sweep.tuned:
            return None
        file = Path(self.sweep.tuning)
        if not os.path.isfile(file):
            raise DymoeError(
                f"{self.where}: tuning: no such file {file}; run the tuning sweep first or give --tuned false"
            )
        return dict(read_results(file).get("chosen", {}))

    def _entry(self, number: int, values: Any, beside: Path, rates: Mapping[str, float] | None) -> "Iterator[_Row]":
        """The rows that an entry makes: one, or one for every varied value."""
        where = f"recipes.{number}"
        plain = {"recipe": values} if isinstance(values, str) else values
        if not isinstance(plain, Mapping) or not isinstance(plain.get("recipe"), str):
            raise DymoeError(f"{self.where}: {where}: expected a recipe's file or a mapping with the key recipe")
        entry = build(Entry, plain, self.where, f"{where}.")
        file = locate(entry.recipe, beside)
        if not os.path.isfile(file) and os.path.isfile(entry.recipe):
            file = Path(entry.recipe)
        file = Path(os.path.normpath(file))
        label = entry.label or file.stem
        try:
            base, entry_keys = _flat(self.sweep.base), _flat(entry.set_)
        except DymoeError as error:
            raise DymoeError(f"{self.where}: {where}: {error}") from None
        tuned = self._tuned(entry, label, rates) if "training.lr" not in entry_keys else {}
        for suffix, varied, rate in self._variants(entry.vary or self.sweep.vary):
            keys = {**base, **tuned, **entry_keys, **varied}
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
                f"{self.where}: {label}: {self.sweep.tuning} has no chosen learning rate for {brief(name)}; tune it, "
                "name another with tuned_as, or set training.lr"
            )
        return {"training.lr": rates[name]}

    def _refuse_own(self, keys: Mapping[str, Any]) -> None:
        """Refuse keys of a recipe that the sweep itself decides."""
        for key in keys:
            if key in AXES:
                raise DymoeError(f"{self.where}: {key}: the sweep's own key {AXES[key]} decides it; set that")


@dataclass(frozen=True)
class _Row:
    """One row of the table: a recipe as this sweep changes it."""

    label: str
    file: Path
    words: tuple[str, ...]
    recipe: Recipe
    rate: float | None
    of: str


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested mappings; an empty mapping stays a value.

    Raises:
        DymoeError: a key that is there twice.
    """
    dotted: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping) and value
        for name, leaf in (_flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}).items():
            if name in dotted:
                raise DymoeError(f"{shorten(name)}: is there twice, nested and dotted")
            dotted[name] = leaf
    return dotted


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
