"""What a run shows while it works: bars in a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from dymoe.terminal import Terminal


def silent() -> Terminal:
    """A console that shows nothing, for the processes beside the first."""
    return Terminal(stderr=True, quiet=True, force_terminal=False)


class Bars:
    """Progress bars while a `with` block runs, in a terminal alone.

    Args:
        clock: the last column: time left, or time gone.
        console: where to write; standard error by default.
    """

    def __init__(self, clock: ProgressColumn, console: Terminal | None = None) -> None:
        self.console = console or Terminal(stderr=True)
        self._clock = clock
        self._bars: Progress | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                self._clock,
                console=self.console,
            )
            self._bars.start()
            self._begin(self._bars)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def _begin(self, bars: Progress) -> None:
        """Draw the first bars."""
        raise NotImplementedError


class Display(Bars):
    """Progress over stages, steps and evaluated samples.

    Args:
        title: what the run is called.
        stages: how many stages there are.
        console: where to write; standard error by default.
    """

    def __init__(self, title: str, stages: int, console: Terminal | None = None) -> None:
        super().__init__(TimeRemainingColumn(), console)
        self.title = title
        self.stages = stages
        self._all: TaskID | None = None
        self._now: TaskID | None = None
        self._last_note = 0.0
        self._stage = ""

    def _begin(self, bars: Progress) -> None:
        self._all = bars.add_task(self.title, total=self.stages, note="tasks")
        self._now = bars.add_task("", total=None, note="")

    def note(self, text: str) -> None:
        """Say one line."""
        if self._bars is not None:
            self._bars.console.print(text)
        else:
            self.console.print(f"{self.title}: {text}", soft_wrap=True)

    def stage(self, index: int, name: str) -> None:
        """Stage `index` (from 1) begins."""
        self._stage = f"task {index}/{self.stages} {name}"
        self._last_note = 0.0
        if self._bars is not None and self._all is not None:
            self._bars.update(self._all, completed=index - 1)

    def step(self, step: int, steps: int, logs: Mapping[str, float]) -> None:
        """Optimizer step `step` of `steps` is done."""
        loss = f"loss {logs['loss']:.3f}" if "loss" in logs else ""
        share = f", {logs['share_new']:.0%} new tokens" if "share_new" in logs else ""
        self._show("learning", step, steps, loss + share)

    def evaluating(self, task: str, done: int, samples: int) -> None:
        """`done` of `samples` of `task` are answered."""
        self._show(f"asking {task}", done, samples, "")

    def inspecting(self, samples: str, done: int, count: int) -> None:
        """`done` of `count` samples were looked at before the run; said only where it takes long."""
        self._last_note = self._last_note or time.monotonic()
        if time.monotonic() - self._last_note > 15:
            self._last_note = time.monotonic()
            self.note(f"looking at {samples}: {done}/{count}")

    def finish(self) -> None:
        """Show all stages as done, and no task at work."""
        if self._bars is not None and self._all is not None and self._now is not None:
            self._bars.update(self._all, completed=self.stages)
            self._bars.update(self._now, visible=False)

    def _show(self, what: str, done: int, total: int, note: str) -> None:
        if self._bars is not None and self._now is not None:
            bar = self._bars.tasks[1]
            label = f"{self._stage}: {what}"
            if bar.description != label:
                self._bars.reset(self._now, total=total, description=label, note=note)
            self._bars.update(self._now, completed=done, total=total, note=note)
        elif done == total or time.monotonic() - self._last_note > 15:
            self._last_note = time.monotonic()
            self.note(f"{self._stage}: {what} {done}/{total} {note}".rstrip())
