"""The display: bars in a terminal, plain lines elsewhere; names are shown as they are."""

import io
import time
from pathlib import Path

import pytest

from dymoe.learning.progress import Display
from dymoe.sweep.jobs import SweepDisplay
from dymoe.sweep.records import Cell
from dymoe.terminal import Terminal


def show(terminal: bool) -> str:
    out = io.StringIO()
    with Display("dymoe on stream", 2, Terminal(file=out, force_terminal=terminal, width=100)) as display:
        for index, name in enumerate(("[red]A", "B"), start=1):
            display.stage(index, name)
            for step in (1, 2, 3):
                display.step(step, 3, {"loss": 1.5 / step, "share_new": 0.25})
            if terminal:
                time.sleep(0.25)  # the bars are drawn ten times a second
            display.evaluating(name, 4, 4)
        display.note("[bold]said")
        display.finish()
    return out.getvalue()


def test_plain_lines_say_each_end():
    told = show(terminal=False).splitlines()
    for line in (
        "dymoe on stream: task 1/2 [red]A: learning 3/3 loss 0.500, 25% new tokens",
        "dymoe on stream: task 2/2 B: asking B 4/4",
        "dymoe on stream: [bold]said",
    ):
        assert line in told
    assert len(told) <= 7


def test_bars_in_a_terminal_show_task_step_and_loss():
    told = show(terminal=True)
    assert "\x1b[" in told
    for word in ("dymoe on stream", "2/2", "loss 0.500", "[bold]said", "[red]A: learning"):
        assert word in told


@pytest.mark.parametrize("terminal", [False, True], ids=["lines", "bars"])
def test_a_sweep_shows_what_runs_and_what_failed(terminal):
    out = io.StringIO()
    place = ("origin", "original", 0, Path("lora.yaml"), (), {"tasks": ["A", "B"]}, "mark")
    cell = Cell("lora", *place, Path("runs/lora-0"), None, "lora")
    with SweepDisplay(3, 1, Terminal(file=out, force_terminal=terminal, width=100)) as display:
        display.started(cell)
        display.at(cell, "task 2 B, step 3")
        if terminal:
            time.sleep(0.25)  # the bars are drawn ten times a second
        display.ended(cell, "[red]no")
    told = out.getvalue()
    assert "lora, seed 0: failed: [red]no; 1 of 3 done, 0 running, 1 failed" in " ".join(told.split())
    assert ("task 2 B, step 3" in told) == terminal
    assert ("sweep" in told and "\x1b[" in told) == terminal
