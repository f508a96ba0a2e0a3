"""Runs side by side: folders and sweeps' results read and checked, seeds gathered into methods, means with spread."""

import json
import math
import os
import re
import shlex
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dymoe.analysis.figures import Look, look
from dymoe.analysis.storage import stored
from dymoe.errors import DymoeError
from dymoe.evaluation.metrics import ROUNDING, AccuracyMatrix, drift
from dymoe.files import read_json
from dymoe.learning.formats import KEY, Routing, read_results, run_results
from dymoe.messages import brief, shorten
from dymoe.numbers import Stat
from dymoe.sweep.records import title

STAGE_FOLDER = re.compile(r"(\d+)-(.+)")


@dataclass(frozen=True)
class Run:
    """One run: what results.json and the stages' routing.json say, or a record of a sweep, checked.

    Attributes:
        path: the run folder, or the sweep's file.
        rows: the accuracy matrix as far as the run has come.
        level: one row over all tasks in place of `rows`, of a run without stages (joint: all tasks learned at once;
            zero-shot: none).
        routing: stage -> weight that each task's test tokens (row) put on each expert group (column). A row sums to 1,
            to less where layers have no experts, and to more where a method adds up all groups at full weight.
        label: the sweep's row, empty in a run folder.
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
    routing: Mapping[int, pd.DataFrame]
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


@dataclass(frozen=True)
class Method:
    """The runs (seeds) of one method; `index` picks its look everywhere on the page."""

    label: str
    runs: tuple[Run, ...]
    index: int

    @property
    def look(self) -> Look:
        """The method's line and mark; without stages a line alone, dotted (joint) or dashed (nothing learned)."""
        mine = look(self.index, self.label)
        if not self.level:
            return mine
        glyph, dash = ("┄", "dot") if self.runs[0].trained else ("╌", "longdashdot")
        return replace(mine, glyph=glyph, dash=dash)

    @property
    def level(self) -> bool:
        """Whether there are no stages, so that nothing is forgotten: all tasks learned at once, or none."""
        return self.runs[0].level is not None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The stream's tasks in learned order."""
        return self.runs[0].tasks

    @property
    def stages(self) -> int:
        """Stages that every run of the method has done; all means are over these."""
        return min(run.stages for run in self.runs)

    @property
    def complete(self) -> bool:
        """Whether every run has learned the whole stream."""
        return self.level or self.stages == len(self.tasks)

    @property
    def seeds(self) -> str:
        """As in "seeds 0, 1"."""
        numbers = ", ".join(str(run.seed) for run in self.runs)
        return f"seed {numbers}" if len(self.runs) == 1 else f"seeds {numbers}"

    @property
    def routed(self) -> bool:
        """Whether its tokens are divided among groups, as its stages' routing.json say."""
        return any(divides(weights) for run in self.runs for weights in run.routing.values())

    @cached_property
    def accuracy(self) -> np.ndarray:
        """Percent, (runs, stages, tasks); NaN before a task is learned."""
        values = np.full((len(self.runs), self.stages, len(self.tasks)), np.nan)
        for index, run in enumerate(self.runs):
            for stage, row in enumerate(run.rows[: self.stages]):
                values[index, stage, : stage + 1] = row
        return values

    def metric(self, key: str) -> Stat | None:
        """MFT, MFN, MAA, BWT or BWT_T-1 over the runs; without stages only MFN, the final accuracy, has a meaning."""
        if not self.level:
            return Stat.of([run.matrix(self.stages).to_dict()[key] for run in self.runs])
        return Stat.of([statistics.fmean(run.level or ()) for run in self.runs]) if key == "MFN" else None

    def levels(self) -> list[float]:
        """Mean accuracy in percent on each task of a method without stages."""
        return np.mean([run.level for run in self.runs if run.level], axis=0).tolist()

    def forgetting(self) -> list[Stat | None]:
        """Percentage points lost on each task since its best earlier stage; none before it was learned."""
        return over_seeds(np.array([run.matrix(self.stages).forgetting() for run in self.runs]))

    def format_drift(self) -> list[Stat | None]:
        """Format drift of each task in points as results.json gives it; None where a run does not give it."""
        shares = [[run.format_drift.get(task, math.nan) for task in self.tasks] for run in self.runs]
        return over_seeds(np.array(shares))

    def drift(self) -> list[list[Stat | None]]:
        """Weight in percent that each task's tokens put on newer groups, by stage; None for what is new or unknown."""
        values = np.full(self.accuracy.shape, np.nan)
        for index, run in enumerate(self.runs):
            for stage, weights in run.routing.items():
                for task, name in enumerate(self.tasks[: stage - 1] if stage <= self.stages else ()):
                    share = drift(name, list(weights), weights.loc[name].tolist()) if name in weights.index else None
                    values[index, stage - 1, task] = math.nan if share is None else 100 * share
        return over_seeds(values)

    def changes(self) -> list[list[Stat | None]]:
        """Points that each task's accuracy changed by at each stage from the second on; None before it was learned."""
        return over_seeds(np.diff(self.accuracy, axis=1))

    def changes_of_tasks(self) -> list[Stat]:
        """Points that each task but the last changed by since it was learned.

        Their sum is T times backward transfer, and so is that of `changes_at_stages`.
        """
        learned = np.diagonal(self.accuracy, axis1=1, axis2=2)[:, :-1]
        return over_seeds(self.accuracy[:, -1, : learned.shape[1]] - learned)

    def changes_at_stages(self) -> list[Stat]:
        """Points that the tasks before it changed by at each stage from the second on, summed over them."""
        return over_seeds(np.nansum(np.diff(self.accuracy, axis=1), axis=2))


def divides(weights: pd.DataFrame) -> bool:
    """Whether a stage's routing divides tokens among several groups."""
    return len(weights.columns) > 1 and bool((weights.sum(axis=1) <= 1 + ROUNDING).all())


def over_seeds(values: np.ndarray) -> Any:
    """Mean and spread over the first axis, for every place of the others; None where a run has no number."""
    if values.ndim > 1:
        return [over_seeds(values[:, index]) for index in range(values.shape[1])]
    return None if np.isnan(values).any() else Stat.of(values.tolist())


# ---------------------------------------------------------------- reading


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read what is to be compared: run folders, and sweeps' results (.jsonl), which stand for all their runs.

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
        for key in ("stream", "tasks"):
            here, there = getattr(run, key), getattr(first, key)
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
        name = title([row[key] for key in KEY])
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
    files = {stage: folder / "routing.json" for stage, _, folder in stage_folders(path)}
    routing = {stage: _routing(file) for stage, file in files.items() if file.exists()}
    return _run(path, str(path / "results.json"), results, routing)


def _run(path: Path, file: str, data: Mapping[str, Any], routing: Mapping[int, pd.DataFrame]) -> Run:
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


def stage_folders(path: Path) -> Iterator[tuple[int, str, Path]]:
    """(number, name, folder) of every folder stages/NN-NAME, in order of the stages."""
    folders = [folder for folder in (path / "stages").glob("*") if folder.is_dir()]
    matches = [(match, folder) for folder in folders if (match := STAGE_FOLDER.fullmatch(folder.name))]
    yield from sorted((int(match[1]), match[2], folder) for match, folder in matches)


def _routing(file: Path) -> pd.DataFrame:
    data = read_json(file, Routing)
    for task, row in data["tasks"].items():
        if len(row["weight"]) != len(data["groups"]):
            count = len(data["groups"])
            where = f"{file}: tasks.{shorten(task)}.weight"
            raise DymoeError(f"{where}: expected one weight for each of {count} groups, got {brief(row['weight'])}")
    weights = {task: row["weight"] for task, row in data["tasks"].items()}
    return pd.DataFrame.from_dict(weights, orient="index", columns=data["groups"])


# ---------------------------------------------------------------- seeds and settings


def gather(runs: Sequence[Run]) -> list[Method]:
    """Group runs by method and settings, in the order given.

    Runs that differ in their seed alone are averaged. Where a method comes with several settings, the label names
    what differs. Two runs with the same settings and seed cannot be two seeds of one configuration, so then each
    stands alone under its own name.
    """
    grouped: dict[tuple[str, str, bool], list[Run]] = {}
    for run in runs:
        settings = json.dumps(_settings(run), sort_keys=True, default=str)
        grouped.setdefault((_name(run), settings, run.level is not None), []).append(run)
    labelled: list[tuple[str, list[Run]]] = []
    for (name, _, _), members in grouped.items():
        variants = [other[0] for other in grouped.values() if _name(other[0]) == name]
        label = f"{name}{_difference(members[0], variants)}"
        if len({run.seed for run in members}) == len(members):
            labelled.append((label, sorted(members, key=lambda run: run.seed)))
        else:
            labelled.extend((f"{label} ({run.name})", [run]) for run in members)
    labels = [label for label, _ in labelled]
    return [
        Method(f"{label} [{members[0].path.name}]" if labels.count(label) > 1 else label, tuple(members), index)
        for index, (label, members) in enumerate(labelled)
    ]


def _name(run: Run) -> str:
    """The sweep's row, or the method with its plugins, as in "dymoe with replay"."""
    if run.label:
        return run.label
    plugins = run.facts.get("with")
    return f"{run.method} with {', '.join(plugins)}" if plugins else run.method


def _settings(run: Run) -> dict[str, object]:
    """The method's settings and, as "replay.size", those of its plugins; none where a sweep names the row."""
    if run.label:
        return {}
    settings = dict(run.facts.get("settings") or {})
    plugins = run.facts.get("with") or {}
    for name in plugins:
        values = plugins[name] if isinstance(plugins, dict) else None
        settings |= {f"{name}.{key}": value for key, value in (values or {}).items()}
    return settings


def _difference(run: Run, variants: Sequence[Run]) -> str:
    """The settings of `run` in which the variants of its method differ, " (key value, ...)" or nothing."""
    others = [_settings(variant) for variant in variants]
    mine = _settings(run)
    keys = sorted({key for settings in others for key in settings})
    parts = [f"{key} {mine.get(key)}" for key in keys if any(other.get(key) != mine.get(key) for other in others)]
    return f" ({', '.join(parts)})" if parts else ""


# ---------------------------------------------------------------- their analyses


@dataclass(frozen=True)
class Analysed:
    """A kept analysis of one method: the frame of its first run that has one, with at least one row.

    `command` says how it was made, after the method's name.
    """

    method: Method
    run: Run
    frame: pd.DataFrame
    command: str

    @property
    def label(self) -> str:
        """The method's name."""
        return self.method.label


def analysed(methods: Sequence[Method], name: str) -> list[Analysed]:
    """The methods with a kept analysis `name` (see `dymoe.analysis.stored`), in their order.

    Raises:
        DymoeError: a file is broken or of another analysis; the message names it.
    """
    result = []
    for method in methods:
        for run in method.runs:
            frame = stored(run.path, name)
            if frame is not None and len(frame):
                command = frame.attrs.get("command", f"dymoe analyze {name}")
                result.append(Analysed(method, run, frame, f"{method.label}, seed {run.seed}: {command}"))
                break
    return result


def missing(methods: Sequence[Method], have: Sequence[Analysed], name: str) -> tuple[str, str]:
    """Which methods lack an analysis, and the command that makes it for the first of them; empty where none does."""
    there = {one.method.index for one in have}
    lacking = [method for method in methods if method.routed and method.index not in there]
    unlogged = [method for method in lacking if name == "dynamics" and not any(map(_logged, method.runs))]
    able = [method for method in lacking if method not in unlogged]
    note = f"Nothing was logged while {_names(unlogged)} learned (training.dynamics_every). " if unlogged else ""
    if not able:
        return note.strip(), ""
    how = "This makes it" if len(able) == 1 else "For the first, this makes it"
    command = f"dymoe analyze {name} {shlex.quote(str(able[0].runs[0].path))}"
    return f"{note}Not analysed yet: {_names(able)}. {how}:", command


def _names(methods: Iterable[Method]) -> str:
    return ", ".join(method.label for method in methods)


def _logged(run: Run) -> bool:
    """Whether the trainer wrote down how routing changed; older runs have no such log."""
    return any(run.path.glob("stages/*/dynamics.jsonl"))
