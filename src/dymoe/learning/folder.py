"""The run folder: what a run keeps on disk, each file written in full or not at all."""

import fcntl
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from dymoe.errors import DymoeError
from dymoe.files import TEMPORARY, atomic_json, atomic_write, read_json

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


# How a step's samples are shared out; what they come to together is compared instead.
SHARED = ("training.gradient_accumulation", "training.samples_per_step")


class StageFolder:
    """Paths and state of one stage below ``stages/NN-name``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter = path / "adapter"
        self.trainer = path / "trainer"
        self.memory = path / "method"
        self.predictions = path / "predictions"
        self.dynamics = path / "dynamics.jsonl"

    @property
    def trained(self) -> bool:
        """Whether the stage's group has been saved."""
        return (self.adapter / "adapter_config.json").is_file()

    @property
    def done(self) -> dict[str, Any] | None:
        """The stage's marker, None as long as it is not done."""
        marker = self.path / "done.json"
        return read_json(marker) if marker.is_file() else None

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the stage, empty if it is not there yet."""
        file = self.path / name
        return read_json(file) if file.is_file() else {}

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file of the stage, atomically."""
        atomic_json(self.path / name, value)

    def write_predictions(self, task: str, records: list[dict[str, Any]]) -> None:
        """Write predictions/<task>.jsonl, atomically."""
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        atomic_write(self.predictions / f"{task}.jsonl", "".join(f"{line}\n" for line in lines))


class RunFolder:
    """A run on disk: ``run.yaml``, ``events.jsonl``, ``stages/``, ``results.json``; `found` says whether it was there.

    Args:
        path: the folder.
        description: everything that determines the run, as ``run.yaml`` holds it; its part ``recipe`` decides
            whether an existing folder is of the same run.
        resume: go on with an existing folder; a run that never began begins.
        writes: whether this process is the one that makes, checks and locks the folder; the others of a run know where
            it is.

    Raises:
        DymoeError: the folder exists and `resume` is off, it holds another recipe's run (the keys that differ
            are named), or another run works in it.
    """

    def __init__(self, path: Path, description: Mapping[str, Any], resume: bool, writes: bool = True) -> None:
        self.path = path
        self._lock_file: IO[str] | None = None
        marker = path / "run.yaml"
        self.found = marker.is_file()
        if not writes:
            return
        if self.found:
            if not resume:
                raise DymoeError(f"{path}: there is a run in this folder; give --resume to go on, or another --output")
            self._refuse_other(marker, description)
        elif path.exists() and any(path.iterdir()):
            raise DymoeError(f"{path}: the folder is not empty and holds no run; give another --output")
        else:
            import yaml

            atomic_write(marker, yaml.safe_dump(dict(description), sort_keys=False, allow_unicode=True))
        self._lock()

    def _lock(self) -> None:
        """Keep other runs out as long as this process lives."""
        self._lock_file = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DymoeError(f"{self.path}: another process is working in this run folder") from None

    def close(self) -> None:
        """Let other runs in again."""
        if self._lock_file is not None:
            self._lock_file.close()

    def _refuse_other(self, marker: Path, description: Mapping[str, Any]) -> None:
        import yaml

        try:
            found = yaml.safe_load(marker.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise DymoeError(f"{marker}: cannot be read ({error})") from None
        if not isinstance(found, dict):
            raise DymoeError(f"{marker}: expected a mapping of keys; this is no run's description")
        for part in ("recipe", "data"):
            there, here = _flat(found.get(part)), _flat(description.get(part))
            names = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
            told = [
                f"{name} is {there.get(name)!r} there, {here.get(name)!r} here"
                for name in names
                if name not in (*FREE, *SHARED)
            ]
            if told:
                raise DymoeError(f"{self.path}: run of another {part}: {'; '.join(told)}; give another --output")
        was, now = _samples_of_step(found), _samples_of_step(description)
        if was != now:
            raise DymoeError(
                f"{self.path}: a step of this run takes {was} samples, here {now}; let batch_size x "
                "gradient_accumulation x processes be the same, or give training.samples_per_step"
            )

    def stage(self, index: int, name: str) -> StageFolder:
        """The folder of stage `index`, counted from 1."""
        return StageFolder(self.path / "stages" / f"{index:02d}-{name}")

    def clear_partial(self) -> None:
        """Remove what a killed process left of writes that it did not finish, and nothing else."""
        below = ("", "stages/**/", "zero-shot/**/")
        for rest in [rest for place in below for rest in self.path.glob(f"{place}{TEMPORARY}*")]:
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

    def rewind_events(self, stage: int, step: int, kind: str = "step") -> None:
        """Drop the events of this kind of `stage` after `step`: a resumed run does these steps again."""
        file = self.path / "events.jsonl"
        if not file.is_file():
            return
        kept = []
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that a kill cut short
            again = event.get("event") == kind and event.get("step", 0) > step
            if event.get("stage", 0) < stage or (event.get("stage") == stage and not again):
                kept.append(line + "\n")
        atomic_write(file, "".join(kept))


def _samples_of_step(description: Mapping[str, Any]) -> int | None:
    """Samples of an optimizer step; of an older description, which names none, those of one process."""
    step = description.get("step")
    if isinstance(step, Mapping):
        return step.get("samples")
    training = _flat(description.get("recipe"))
    size, passes = training.get("training.batch_size"), training.get("training.gradient_accumulation")
    return size * passes if isinstance(size, int) and isinstance(passes, int) else None


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested mappings."""
    if not isinstance(values, Mapping):
        return {prefix.rstrip("."): values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return found
