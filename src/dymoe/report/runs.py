"""Reads run folders and sweeps' results for the report; nothing is shown that was not checked here first."""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from dymoe.errors import DymoeError
from dymoe.evaluation.metrics import ROUNDING, AccuracyMatrix, drift
from dymoe.files import read_json
from dymoe.learning.formats import KEY, RoutingWeights, read_results, run_results
from dymoe.messages import brief, shorten
from dymoe.sweep.records import told

STAGE_FOLDER = re.compile(r"(\d+)-.+")


@dataclass(frozen=True)
class Routing:
    """Weight that each task's test tokens put on each expert group at one stage.

    A row sums to 1, to less where layers have no experts, and to more where a method adds up all groups at full weight.
    """

    groups: tuple[str, ...]
    weights: Mapping[str, tuple[float, ...]]

    def drift(self, task: str) -> float | None:
        """The task's drift (`evaluation.metrics.drift`), in 0..1, None where there is none or it was not asked."""
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
        runs += read_sweep(path) if path.suffix == ".jsonl" else [read_run(path)]
    first = runs[0]
    for run in runs[1:]:
        for key, here, there in (
            ("stream", run.stream, first.stream),
            ("tasks", list(run.tasks), list(first.tasks)),
        ):
            if here != there:
                raise DymoeError(
                    f"{_where(run)}: {key} is {brief(here)}, but {_where(first)} has {brief(there)}; only runs of one "
                    "stream with the same tasks in the same order can be compared"
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
    if not os.path.lexists(file):
        raise DymoeError(f"{file}: no such file; a run folder, or the results of `dymoe sweep`, is needed")
    rows = read_results(file)["rows"]
    if not rows:
        raise DymoeError(f"{file}: holds no finished run yet; go on with the sweep")
    runs = []
    for row in rows:
        name = told([row[key] for key in KEY])
        steps = row["recipe"]["training"].get("steps_per_task")
        data = {**row, "name": name, **({} if steps is None else {"steps_per_task": steps})}
        runs.append(replace(_run(file, f"{file}: {name}", data, {}), label=row["label"]))
    return runs


def read_run(path: Path) -> Run:
    """Read one run folder.

    Raises:
        DymoeError: results.json or a stage's routing.json is missing or broken; the message names the file.
    """
    results = run_results(path)
    routing = {n: _routing(f) for n, folder in stage_folders(path) if (f := folder / "routing.json").exists()}
    return _run(path, str(path / "results.json"), results, routing)


def _run(path: Path, file: str, data: Mapping[str, Any], routing: Mapping[int, Routing]) -> Run:
    """A run from its checked results; `file` is where they stand, for messages."""
    # A run that learns may have a zero-shot row beside its matrix.
    level = data.get("zero_shot" if data.get("joint") is None and not data.get("matrix") else "joint")
    if level is None and not data.get("matrix"):
        raise DymoeError(f"{file}: matrix: the run has finished no stage yet, so nothing can be shown")
    known = {"tasks", "matrix", "lenient_matrix", "metrics", "forgetting", "format_drift", "group_hashes"}
    hashes = sorted(((entry["stage"], entry["groups"]) for entry in data.get("group_hashes") or []), key=itemgetter(0))
    return Run(
        path=path,
        name=data["name"],
        method=data["method"],
        stream=data["stream"],
        tasks=tuple(data["tasks"]),
        seed=data["seed"],
        base=data.get("base", ""),
        rows=() if level else tuple(map(tuple, data["matrix"])),
        level=tuple(level) if level else None,
        format_drift=data.get("format_drift") or {},
        group_hashes=tuple(hashes),
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


def _routing(file: Path) -> Routing:
    data = read_json(file, RoutingWeights)
    for task, row in data["tasks"].items():
        if len(row["weight"]) != len(data["groups"]):
            count = len(data["groups"])
            where = f"{file}: tasks.{shorten(task)}.weight"
            raise DymoeError(f"{where}: expected one weight for each of {count} groups, got {brief(row['weight'])}")
    return Routing(tuple(data["groups"]), {task: tuple(row["weight"]) for task, row in data["tasks"].items()})
