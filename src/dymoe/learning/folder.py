"""The run folder: what a run keeps on disk, each file written in full or not at all."""

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from dymoe.errors import DymoeError
from dymoe.files import (
    TEMPORARY,
    atomic_json,
    atomic_write,
    parse_json,
    read_bytes,
    read_json,
    read_json_lines,
    sha256_of,
)
from dymoe.learning.formats import Done, Event, Probed, Routing, Row, Score, Scored, Trained

if TYPE_CHECKING:
    from dymoe.evaluation.generate import TaskResult

T = TypeVar("T")
# Keys that change how a run works but not what it computes; they may differ when a run goes on.
FREE = (
    "output",
    "data.root",
    "data.images",
    "training.threads",
    "training.workers",
    "training.save_steps",
    "training.log_steps",
    "training.dynamics_every",
    "training.report_to",
)
LOCK = ".lock"
MEMORY = "method"  # where a method keeps what it remembers between tasks
# The files of a stage that a marker vouches for, as patterns below its folder.
TRAINED = ("adapter/*", f"{MEMORY}/**/*", "dynamics.jsonl", "probed.json")
ANSWERS = ("scores.json", "routing.json", "predictions/*.jsonl")
WATCH = "watch"  # the answers to what is only asked, in the same files
EVALUATED = ("training.json", *ANSWERS, *(f"{WATCH}/{name}" for name in ANSWERS))


class StageFolder:
    """Paths and state of one stage below ``stages/NN-name``; `tasks` are the names of those that it learns.

    What reads a file raises a DymoeError where it is missing or not as dymoe writes it; the message names it.
    """

    def __init__(self, path: Path, tasks: Sequence[str] = ()) -> None:
        self.path = path
        self.tasks = tuple(tasks)
        self.adapter = path / "adapter"
        self.trainer = path / "trainer"
        self.probe = path / "probe"
        self.memory = path / MEMORY
        self.predictions = path / "predictions"
        self.dynamics = path / "dynamics.jsonl"

    @property
    def name(self) -> str:
        """The stage's name, without its number."""
        return self.path.name.partition("-")[2]

    @property
    def watch(self) -> "StageFolder":
        """The answers of this stage to the tasks that are only asked; its marker is this folder's."""
        return StageFolder(self.path / WATCH)

    @property
    def trained(self) -> bool:
        """Whether the stage's group has been saved."""
        return (self.path / "training.json").is_file()

    @property
    def record(self) -> Trained:
        """The record of the stage's training."""
        return read_json(self.path / "training.json", Trained)

    @property
    def probed(self) -> Probed | None:
        """What the method's temporary group took, None as long as there was none."""
        return self.read("probed.json", Probed)

    @property
    def done(self) -> Done | None:
        """The stage's marker, None as long as it is not done."""
        return self.read("done.json", Done)

    @property
    def scores(self) -> dict[str, Score]:
        """Task -> score, of the tasks evaluated so far."""
        return self.read("scores.json", dict[str, Score]) or {}

    @property
    def routing(self) -> Routing:
        """Where the tokens of the tasks evaluated so far were routed."""
        return self.read("routing.json", Routing) or {"groups": [], "tasks": {}}

    def read(self, name: str, kind: type[T]) -> T | None:
        """The value of a JSON file of the stage as `kind`, None where there is no such file."""
        file = self.path / name
        return read_json(file, kind) if file.is_file() else None

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file of the stage, atomically."""
        atomic_json(self.path / name, value)

    def mark_trained(self, record: Mapping[str, Any]) -> None:
        """Write training.json, which says that the stage's group is saved."""
        self._mark("training.json", {**record, "files": self._digests(*TRAINED)})

    def mark_done(self, seconds: float) -> None:
        """Write done.json: the stage is evaluated, which took `seconds`."""
        record = self.read("training.json", dict[str, Any]) or {}
        spent = {**record.get("seconds", {}), "evaluate": seconds}
        self._mark("done.json", {**record, "seconds": spent, "files": self._digests(*TRAINED, *EVALUATED)})

    def _mark(self, name: str, record: Mapping[str, Any]) -> None:
        self.write(name, {**record, "sha256": _digest({**record, "sha256": ""})})

    def _digests(self, *patterns: str) -> dict[str, str]:
        """SHA-256 of the files that match, by path below the stage; hidden ones are none of ours."""
        files = (file for pattern in patterns for file in sorted(self.path.glob(pattern)) if file.is_file())
        return {file.relative_to(self.path).as_posix(): sha256_of(file) for file in files if file.name[0] != "."}

    def verify(self, last: bool = True) -> None:
        """Compare the stage's files with what its markers say of them.

        Args:
            last: whether no later stage is trained; of an earlier one a method may have removed folders of its memory.

        Raises:
            DymoeError: a marker or a file is missing, is not as dymoe writes it, or was changed.
        """
        marks = self.done or (self.record if self.trained else None)
        if marks is None:
            return
        for name in ("training.json", "done.json"):
            record = self.read(name, dict[str, Any])
            if record and record.get("sha256") != _digest({**record, "sha256": ""}):
                raise self._damaged(self.path / name, "was changed since it was written")
        for name, digest in marks["files"].items():
            file = self.path / name
            if not file.is_file():
                if last or not name.startswith(f"{MEMORY}/") or name.count("/") == 1:
                    raise self._damaged(file, "is missing")
            elif sha256_of(file) != digest:
                raise self._damaged(file, "was changed since the stage wrote it (hash differs)")

    def _damaged(self, file: Path, how: str) -> DymoeError:
        return DymoeError(
            f"{file}: {how}; restore it from a copy of the run, or remove {self.path} and the stages after it, which "
            "are then learned anew"
        )

    def add_score(self, result: "TaskResult") -> None:
        """Write a task's predictions, its row of routing.json if it has one, and last its score."""
        lines = [json.dumps(record, ensure_ascii=False) for record in result.records()]
        atomic_write(self.predictions / f"{result.task}.jsonl", "".join(f"{line}\n" for line in lines))
        scores, routing = self.scores, self.routing
        if result.groups:
            by_layer = {str(layer): row for layer, row in (result.by_layer or {}).items()}
            row: Row = {"weight": list(result.weight), "by_layer": by_layer}
            routing = {"groups": list(result.groups), "tasks": {**routing["tasks"], result.task: row}}
            self.write("routing.json", routing)
        numbers: dict[str, Any] = {"strict": result.strict, "lenient": result.lenient}
        numbers["samples"] = len(result.predictions)
        if result.measures:
            numbers["measures"] = dict(result.measures)
        self.write(
            "scores.json", {**scores, result.task: {**numbers, "sha256": self._seal(result.task, numbers, routing)}}
        )

    def answers(self) -> dict[str, tuple[list[str], list[float]]]:
        """Task -> (ids, strict scores 0 to 1) of its questions, of all tasks evaluated so far.

        Raises:
            DymoeError: predictions are missing or malformed.
        """
        by_task = {}
        for task in self.scores:
            records = list(read_json_lines(self.predictions / f"{task}.jsonl", Scored))
            by_task[task] = [str(record["id"]) for record in records], [record["score"] for record in records]
        return by_task

    def intact(self) -> list[str]:
        """The tasks evaluated so far whose score, predictions and routing stand as they were written."""
        routing = self.routing
        return [task for task, score in self.scores.items() if score["sha256"] == self._seal(task, score, routing)]

    def _seal(self, task: str, score: Mapping[str, Any], routing: Routing) -> str:
        numbers = [score[key] for key in ("strict", "lenient", "samples", "measures") if key in score]
        row = routing["tasks"].get(task)
        predictions = self.predictions / f"{task}.jsonl"
        answers = sha256_of(predictions) if predictions.is_file() else None
        return _digest([numbers, answers, None if row is None else [routing["groups"], row]])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def verify(stages: Sequence[StageFolder]) -> None:
    """Compare the files of all stages that are trained or done with their markers, before anything builds on them.

    Raises:
        DymoeError: as `StageFolder.verify`; or a stage is trained though one before it is not done.
    """
    marked = [stage for stage in stages if stage.trained or stage.done is not None]
    for stage in marked:
        undone = next((earlier for earlier in stages if earlier.done is None), stage)
        if stages.index(undone) < stages.index(stage):
            raise DymoeError(
                f"{undone.path}: is not done, though {stage.path.name}, which builds on it, is; restore it from a copy "
                "of the run, or remove the stages after it, which are then learned anew"
            )
        stage.verify(last=stage is marked[-1])


class RunFolder:
    """A run on disk: ``run.yaml``, ``events.jsonl``, ``stages/``, ``results.json``, kept from other runs by a lock.

    Nothing is read and nothing written before the lock is taken, so of runs that begin together in a new folder exactly
    one goes on.

    Args:
        path: the folder; made where it is missing.
        resume: go on with the run that is there; one that never began begins.
        writes: whether this process is the one that makes and locks the folder; the others of a run know where it is.

    Attributes:
        begun: whether a run was there already.

    Raises:
        DymoeError: there is a run and `resume` is off, the folder holds something else, another run works in it, or it
            cannot be written.
    """

    def __init__(self, path: Path, resume: bool, writes: bool = True) -> None:
        self.path = path
        self.marker = path / "run.yaml"
        self.begun = False
        self._lock_file: IO[str] | None = None
        if not writes:
            return
        try:
            self._refuse_foreign()
            path.mkdir(parents=True, exist_ok=True)
            self._lock()
            self.begun = self.marker.is_file()
        except OSError as error:
            raise DymoeError(
                f"{path}: cannot be used as a run folder ({error.strerror or error}); give another --output"
            ) from error
        if self.begun and not resume:
            self.close()
            raise DymoeError(f"{path}: there is a run in this folder; give --resume to go on, or another --output")

    def _refuse_foreign(self) -> None:
        """Leave alone what is no run's folder."""
        if self.path.exists() and not self.path.is_dir():
            raise DymoeError(f"{self.path}: is a file, not a folder; give another --output")
        # A run that was killed before it wrote anything leaves its lock, and what it had not finished.
        rests = ("run.yaml", LOCK)
        files = [] if self.marker.is_file() or not self.path.is_dir() else self.path.iterdir()
        if any(file.name not in rests and not file.name.startswith(TEMPORARY) for file in files):
            raise DymoeError(f"{self.path}: the folder is not empty and holds no run; give another --output")

    def _lock(self) -> None:
        """Keep other runs out as long as this process lives."""
        self._lock_file = (self.path / LOCK).open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise DymoeError(f"{self.path}: another process is working in this run folder") from None

    def close(self) -> None:
        """Let other runs in again."""
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None

    @property
    def zero_shot(self) -> StageFolder:
        """The folder of what the base model answers."""
        return StageFolder(self.path / "zero-shot")

    def stage(self, index: int, name: str, tasks: Sequence[str] = ()) -> StageFolder:
        """The folder of stage `index`, counted from 1, which learns `tasks`."""
        return StageFolder(self.path / "stages" / f"{index:02d}-{name}", tasks)

    def clear_partial(self) -> None:
        """Remove what a killed process left of writes that it did not finish, and nothing else."""
        below = ("", "stages/**/", "zero-shot/**/")
        for rest in [rest for prefix in below for rest in self.path.glob(f"{prefix}{TEMPORARY}*")]:
            if rest.is_dir() and not rest.is_symlink():
                shutil.rmtree(rest, ignore_errors=True)
            else:
                rest.unlink(missing_ok=True)

    def event(self, kind: str, **values: Any) -> None:
        """Append one line to events.jsonl.

        Raises:
            DymoeError: the file cannot be written.
        """
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **values}, ensure_ascii=False)
        try:
            with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise DymoeError(f"{self.path / 'events.jsonl'}: cannot be written ({error.strerror})") from error

    def events(self) -> list[Event]:
        """The lines of events.jsonl, without a last one that a kill cut short; none where there is no file.

        Raises:
            DymoeError: a line is no event; the message names it.
        """
        file = self.path / "events.jsonl"
        if not file.is_file():
            return []
        *lines, _ = read_bytes(file).split(b"\n")
        return [parse_json(line, f"{file}: line {number}", Event) for number, line in enumerate(lines, start=1)]

    def rewind_events(self, stage: int, step: int, kind: str = "step") -> None:
        """Drop the events of this kind of `stage` after `step`: a resumed run does these steps again."""

        def before(event: Event) -> bool:
            at = event.get("stage", 0)
            return at < stage or (at == stage and (event["event"] != kind or event.get("step", 0) <= step))

        self.keep_events(before)

    def keep_events(self, keep: Callable[[Event], bool]) -> None:
        """Rewrite events.jsonl with the events that `keep` wants, where it has others."""
        file = self.path / "events.jsonl"
        lines = [json.dumps(event, ensure_ascii=False) + "\n" for event in self.events() if keep(event)]
        if file.is_file() and "".join(lines).encode() != read_bytes(file):
            atomic_write(file, "".join(lines))
