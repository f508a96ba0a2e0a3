"""A sweep at work: each cell learned by `dymoe run` in a process of its own, several at a time."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from rich.progress import Progress, TaskID, TimeElapsedColumn

from dymoe.errors import DymoeError
from dymoe.files import parse_json
from dymoe.learning.formats import Event
from dymoe.learning.progress import Bars
from dymoe.sweep.records import Cell, record
from dymoe.terminal import Terminal

GRACE = 30.0  # seconds that a stopped process has to end by itself
TAIL = 8192  # bytes of a file's end that are looked at


def work(
    cells: Sequence[Cell],
    jobs: int,
    threads: int,
    finished: Callable[[dict[str, Any]], None],
    display: "SweepDisplay",
    accept: Sequence[str] = (),
) -> list[tuple[Cell, str]]:
    """Learn the cells in their order, `jobs` at a time; one that fails does not stop the others.

    Args:
        cells: what is to be learned.
        jobs: processes at a time.
        threads: CPU threads of each.
        finished: called with each record as soon as there is one.
        display: shows what happens.
        accept: in what a cell that was begun may differ here.

    Returns:
        Each failed cell with the last line of its log.

    Raises:
        KeyboardInterrupt: by Ctrl-C or SIGTERM, after the processes have ended; what they did is kept.
        DymoeError: a log or what `finished` writes cannot be written; the processes are stopped first.
    """
    waiting = deque(cells)
    running: list[_Job] = []
    failed: list[tuple[Cell, str]] = []
    with _stopped_by_signals():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(_Job(waiting.popleft(), threads, accept))
                    display.started(running[-1].cell)
                for job in list(running):
                    code = job.poll()
                    if code is None:
                        display.at(job.cell, stage_of(job.cell.folder))
                        continue
                    running.remove(job)
                    why = _outcome(job.cell, code, finished)
                    if why is not None:
                        failed.append((job.cell, why))
                    display.ended(job.cell, why)
                time.sleep(0.1)
        finally:
            _stop(running)
    return failed


def _outcome(cell: Cell, code: int, finished: Callable[[dict[str, Any]], None]) -> str | None:
    """Hand on the record of a cell that ended; why it failed if it did."""
    if code != 0:
        end = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return last_line(cell.log) or end
    try:
        row = record(cell)
    except DymoeError as error:
        return f"{cell.folder}: its results cannot be read ({error})"
    finished(row)
    return None


class _Job:
    """One cell and its process; there is none as long as another one works in the cell's folder."""

    def __init__(self, cell: Cell, threads: int, accept: Sequence[str] = ()) -> None:
        self.cell = cell
        self.accept = [word for part in accept for word in ("--accept", part)]
        self.threads = threads
        self.process: subprocess.Popen[bytes] | None = None

    def poll(self) -> int | None:
        """Start the process if it can start; its exit code when it has ended."""
        if self.process is not None:
            return self.process.poll()
        # A sweep that was killed outright leaves its processes at work: they are waited for.
        if not _locked(self.cell.folder):
            self.process = self._start()
        return None

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [
            sys.executable,
            "-m",
            "dymoe",
            "run",
            str(self.cell.file),
            "--resume",
            *self.accept,
            *self.cell.words,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        # Threads that spin while they wait take the cores from the other processes.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        try:
            self.cell.log.parent.mkdir(parents=True, exist_ok=True)
            with self.cell.log.open("wb") as log:
                # A session of its own: Ctrl-C reaches it through us alone, once.
                return subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            raise DymoeError(f"{self.cell.log}: cannot be written ({error.strerror or error})") from error


def _locked(folder: Path) -> bool:
    """Whether a process works in the run folder."""
    lock = folder / ".lock"
    if not lock.is_file():
        return False
    with lock.open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _stop(jobs: Sequence[_Job]) -> None:
    """Ask the processes to end as Ctrl-C does, wait for them, kill those that stay."""
    alive = [job.process for job in jobs if job.process is not None and job.process.poll() is None]
    try:
        for process in alive:
            _signal(process, signal.SIGINT)
        end = time.monotonic() + GRACE
        for process in alive:
            process.wait(timeout=max(0.0, end - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in alive:
            _signal(process, signal.SIGKILL)
        for process in alive:
            process.wait()


def _signal(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and a closed terminal end the sweep as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Keep another sweep out of this one's folder.

    Raises:
        DymoeError: one is at work there, or the folder cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / ".sweep.lock").open("w")
    except OSError as error:
        raise DymoeError(f"{output}: cannot be written ({error.strerror or error})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DymoeError(f"{output}: another sweep is working in this folder") from None
        yield


def last_line(log: Path) -> str:
    """The last line of a log that says something; empty if there is none."""
    lines = [line.strip() for line in _tail(log).splitlines()]
    return next((line for line in reversed(lines) if line), "")


def stage_of(folder: Path) -> str:
    """Where a run is, from the end of its events.jsonl."""
    for line in reversed(_tail(folder / "events.jsonl").splitlines()):
        try:
            event = parse_json(line.encode(), "events.jsonl", Event)
        except DymoeError:
            continue  # being written, or cut by looking at the end alone
        if "stage" not in event or "task" not in event:
            continue  # about the whole run
        if event["event"] == "stage":
            return f"task {event['stage']} {event['task']} done"
        return f"task {event['stage']} {event['task']}, {event['event']} {event.get('step', '')}".rstrip()
    return "starting"


def _tail(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""


class SweepDisplay(Bars):
    """Cells done, running and failed, and where each running one is; plain lines outside a terminal.

    Args:
        cells: how many cells the sweep has.
        done: how many stand already.
        console: where to write; standard error by default.
    """

    def __init__(self, cells: int, done: int, console: Terminal | None = None) -> None:
        super().__init__(TimeElapsedColumn(), console)
        self.cells = cells
        self.done = done
        self.failed = 0
        self._now: dict[Cell, str] = {}
        self._all: TaskID | None = None
        self._lines: dict[Cell, TaskID] = {}
        self._last_report = time.monotonic()

    def _begin(self, bars: Progress) -> None:
        self._all = bars.add_task("sweep", total=self.cells, completed=self.done, note="")

    def started(self, cell: Cell) -> None:
        """A cell's turn has come."""
        self._now[cell] = "starting"
        if self._bars is not None:
            stages = len(cell.recipe["tasks"] or ()) or None
            self._lines[cell] = self._bars.add_task(f"  {cell.name}", total=stages, note="starting")
        else:
            self._say(f"{cell.name}: started")

    def at(self, cell: Cell, stage: str) -> None:
        """Where a running cell is."""
        self._now[cell] = stage
        if self._bars is not None:
            done = stage.split()[1] if stage.startswith("task ") else "1"
            behind = int(done) - (0 if stage.endswith(" done") else 1)
            self._bars.update(self._lines[cell], completed=behind, note=stage)
        elif time.monotonic() - self._last_report > 60:
            where = "; ".join(f"{running.name}: {stage}" for running, stage in self._now.items())
            self._say(f"{self._counts()} ({where})")

    def ended(self, cell: Cell, why: str | None) -> None:
        """A cell has ended, well or not."""
        self._now.pop(cell, None)
        self.done, self.failed = self.done + (why is None), self.failed + (why is not None)
        self._say(f"{cell.name}: {'done' if why is None else f'failed: {why}'}; {self._counts()}")
        if self._bars is not None and self._all is not None:
            self._bars.remove_task(self._lines.pop(cell))
            self._bars.update(self._all, completed=self.done, note=f"{self.failed} failed" if self.failed else "")

    def _counts(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.done} of {self.cells} done, {len(self._now)} running{failed}"

    def _say(self, text: str) -> None:
        self._last_report = time.monotonic()
        console = self.console if self._bars is None else self._bars.console
        console.print(text, soft_wrap=True)
