"""Reads run folders and sweeps' results for the report; nothing is shown that was not checked here first."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dymoe.errors import DymoeError
from dymoe.evaluation.drift import ROUNDING, drift
from dymoe.evaluation.matrix import AccuracyMatrix
from dymoe.files import read_json
from dymoe.learning.records import KEY, read_results, told

STAGE_FOLDER = re.compile(r"(\d+)-.+")


@dataclass(frozen=True)
class Routing:
    """Weight that each task's test tokens put on each expert group at one stage.

    A row sums to 1, to less where layers have no experts, and to more where a method adds up all groups at full weight.
    """

    groups: tuple[str, ...]
    weights: Mapping[str, tuple[float, ...]]

    def drift(self, task: str) -> float | None:
        """The task's drift (see `dymoe.evaluation.drift`), in 0..1, None where there is none or it was not asked."""
        return drift(task, self.groups, self.weights[task]) if task in self.weights else None

    @property
    def divides(self) -> bool:
        """Whether there are several groups among which tokens are divided."""
        return len(self.groups) > 1 and all(math.fsum(row) <= 1 + ROUNDING for row in self.weights.values())


@dataclass(frozen=True)
class Run:
    """One run: what results.json and the stages' routing.json say, or a record of a sweep, checked.

    `path` is the run folder, or the sweep's file; `label` the sweep's row, empty in a run folder. `rows` is the
    accuracy matrix as far as the run has come; a run without stages (joint: all tasks learned at once; zero-shot: none)
    has one row over all tasks in `level` instead.
    """

    path: Path
    name: str
    method: str
    stream: str
    tasks: tuple[str, ...]
    seed: int
    base: str
    rows: tuple[tuple[float, ...], ...]
    level: tuple[float, ...] | None
    format_drift: Mapping[str, float]
    group_hashes: tuple[tuple[int, Mapping[str, str]], ...]
    routing: Mapping[int, Routing]
    facts: Mapping[str, Any]
    label: str = ""

    @property
    def trained(self) -> bool:
        """Whether any task was learned."""
        return bool(self.rows) or self.facts.get("joint") is not None

    @property
    def stages(self) -> int:
        """How many stages are done (0 for a run without any)."""
        return len(self.rows)

    def matrix(self, stages: int | None = None) -> AccuracyMatrix:
        """The accuracy matrix after the first `stages` stages (all that are done by default)."""
        rows = self.rows[:stages]
        return AccuracyMatrix(rows, self.tasks[: len(rows)])


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read what is to be compared: run folders, and sweeps' results (.json), which stand for all their runs.

    Raises:
        DymoeError: no folder, one given twice, one that is no run or is broken, or runs of different streams.
    """
    if not paths:
        raise DymoeError("report: no run folder given; at least one is needed")
    resolved = [Path(path).resolve() for path in paths]
    for path, real in zip(paths, resolved, strict=True):
        if resolved.count(real) > 1:
            raise DymoeError(f"{path}: this run folder is given more than once; give each run once")
    runs: list[Run] = []
    for path in map(Path, paths):
        runs += read_sweep(path) if path.suffix == ".json" else [read_run(path)]
    first = runs[0]
    for run in runs[1:]:
        for key, here, there in (
            ("stream", run.stream, first.stream),
            ("tasks", list(run.tasks), list(first.tasks)),
        ):
            if here != there:
                raise DymoeError(
                    f'{_where(run)}: "{key}" is {here!r}, but {_where(first)} has {there!r}; only runs of one stream '
                    "with the same tasks in the same order can be compared"
                )
    return runs


def _where(run: Run) -> str:
    """The file that a run was read from, as a message names it."""
    return f"{run.path}: {run.name}" if run.label else str(run.path / "results.json")


def read_sweep(file: Path) -> list[Run]:
    """Read the records of a sweep's results as runs; predictions and routing by stage are not in them.

    Raises:
        DymoeError: no such file, no sweep's results, no record yet, or a broken one; the message names it.
    """
    if not file.is_file():
        raise DymoeError(f"{file}: no such file; a run folder, or the results of `dymoe sweep`, is needed")
    rows = read_results(file)["rows"]
    if not rows:
        raise DymoeError(f"{file}: holds no finished run yet; go on with the sweep")
    runs = []
    for row in rows:
        name = told([row[key] for key in KEY])
        recipe = row.get("recipe") or {}
        steps = (recipe.get("training") or {}).get("steps_per_task")
        data = {**row, "name": name, **({} if steps is None else {"steps_per_task": steps})}
        runs.append(replace(_run(file, f"{file}: {name}", data, {}), label=str(row["label"])))
    return runs


def read_run(path: Path) -> Run:
    """Read one run folder.

    Raises:
        DymoeError: results.json or a stage's routing.json is missing or broken; the message names the file.
    """
    file = path / "results.json"
    if not file.is_file():
        raise DymoeError(
            f"{file}: no such file; a run folder as `dymoe run` writes it is needed (results.json is "
            "written when the first stage is done)"
        )
    data = read_json(file)
    if not isinstance(data, dict):
        raise DymoeError(f"{file}: holds a {type(data).__name__}; an object with the run's results is needed")
    routing = {n: _routing(f) for n, folder in stage_folders(path) if (f := folder / "routing.json").exists()}
    return _run(path, str(file), data, routing)


def _run(path: Path, file: str, data: Mapping[str, Any], routing: Mapping[int, Routing]) -> Run:
    """A run from its results; `file` is where they stand, for messages."""
    tasks = _strings(file, data, "tasks")
    if len(set(tasks)) != len(tasks) or not tasks:
        raise DymoeError(f'{file}: "tasks" is {list(tasks)}; different task names are needed')
    level = _level(file, data, len(tasks))
    known = {"tasks", "matrix", "lenient_matrix", "metrics", "forgetting", "format_drift", "group_hashes"}
    return Run(
        path=path,
        name=_field(file, data, "name", str),
        method=_field(file, data, "method", str),
        stream=_field(file, data, "stream", str),
        tasks=tasks,
        seed=_field(file, data, "seed", int),
        base=_field(file, data, "base", str),
        rows=() if level else _rows(file, data, tasks),
        level=level,
        format_drift=_points(file, data, "format_drift"),
        group_hashes=_hashes(file, data),
        routing=routing,
        facts={key: value for key, value in data.items() if key not in known},
    )


def stage_folders(path: Path) -> Iterator[tuple[int, Path]]:
    """(stage number, folder) of every folder stages/NN-TASK, in order of the stages."""
    if not (path / "stages").is_dir():
        return
    found = [
        (int(match[1]), folder)
        for folder in (path / "stages").iterdir()
        if folder.is_dir() and (match := STAGE_FOLDER.fullmatch(folder.name))
    ]
    yield from sorted(found)


def _field(file: Path | str, data: Mapping[str, Any], key: str, kind: type) -> Any:
    if key not in data:
        raise DymoeError(f'{file}: "{key}" is missing; a {kind.__name__} is needed')
    value = data[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DymoeError(f'{file}: "{key}" is {value!r}; a {kind.__name__} is needed')
    return value


def _strings(file: Path | str, data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = _field(file, data, key, list)
    if not all(isinstance(value, str) for value in values):
        raise DymoeError(f'{file}: "{key}" is {values!r}; a list of strings is needed')
    return tuple(values)


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rows(file: Path | str, data: Mapping[str, Any], tasks: tuple[str, ...]) -> tuple[tuple[float, ...], ...]:
    rows = _field(file, data, "matrix", list)
    if not rows:
        raise DymoeError(f'{file}: "matrix" is empty; the run has finished no stage yet, so nothing can be shown')
    if len(rows) > len(tasks):
        raise DymoeError(f'{file}: "matrix" has {len(rows)} rows for {len(tasks)} tasks; one for each task at most')
    try:
        return AccuracyMatrix(rows).rows
    except DymoeError as error:
        raise DymoeError(f'{file}: "matrix": {error}') from error


def _level(file: Path | str, data: Mapping[str, Any], tasks: int) -> tuple[float, ...] | None:
    """The one row over all tasks of a run without stages; a run that learns may have a zero-shot row beside it."""
    key = "zero_shot" if data.get("joint") is None and not data.get("matrix") else "joint"
    row = data.get(key)
    if row is None:
        return None
    if not (isinstance(row, list) and len(row) == tasks and all(is_number(v) and 0 <= v <= 100 for v in row)):
        raise DymoeError(f'{file}: "{key}" is {row!r}; one percentage for each of the {tasks} tasks is needed')
    return tuple(float(value) for value in row)


def _points(file: Path | str, data: Mapping[str, Any], key: str) -> dict[str, float]:
    points = data.get(key) or {}
    if not (isinstance(points, dict) and all(is_number(value) for value in points.values())):
        raise DymoeError(f'{file}: "{key}" is {points!r}; percentage points by task name are needed')
    return {task: float(value) for task, value in points.items()}


def _hashes(file: Path | str, data: Mapping[str, Any]) -> tuple[tuple[int, Mapping[str, str]], ...]:
    entries = data.get("group_hashes") or []
    for entry in entries if isinstance(entries, list) else [entries]:
        good = isinstance(entry, dict) and is_number(entry.get("stage")) and isinstance(entry.get("groups"), dict)
        if not good or not all(isinstance(value, str) for value in entry["groups"].values()):
            raise DymoeError(
                f'{file}: "group_hashes" holds {entry!r}; '
                'a list of {"stage": number, "groups": {name: hash}} is needed'
            )
    return tuple(sorted(((int(e["stage"]), e["groups"]) for e in entries), key=lambda entry: entry[0]))


def _routing(file: Path) -> Routing:
    data = read_json(file)
    if not isinstance(data, dict):
        raise DymoeError(f'{file}: holds a {type(data).__name__}; an object with "groups" and "tasks" is needed')
    groups = _strings(file, data, "groups")
    weights = {}
    for task, entry in _field(file, data, "tasks", dict).items():
        weight = entry.get("weight") if isinstance(entry, dict) else None
        if not (
            isinstance(weight, list)
            and len(weight) == len(groups)
            and all(is_number(value) and value >= -1e-6 for value in weight)
        ):
            raise DymoeError(
                f'{file}: task {task!r}: "weight" is {weight!r}; one weight for each of the '
                f"{len(groups)} groups, not below 0, is needed"
            )
        weights[task] = tuple(float(value) for value in weight)
    return Routing(groups, weights)
