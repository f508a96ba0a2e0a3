"""Names and texts of data in the terminal: escaped everywhere, neither obeyed by it nor read as rich's markup."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.table import Table

from dymoe.cli import main
from dymoe.learning.progress import Display
from dymoe.sweep.jobs import SweepDisplay
from dymoe.sweep.records import Cell
from dymoe.terminal import Terminal

HOSTILE = "a\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp\u2066[bold]b[/bold][/x]:smile:"
SHOWN = r"a\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp\u2066[bold]b[/bold][/x]:smile:"
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def test_lines_and_tables_show_what_was_there():
    out = io.StringIO()
    terminal = Terminal(file=out, width=200)
    terminal.print(HOSTILE, soft_wrap=True)
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    terminal.print(table)
    told = out.getvalue()
    assert told.count(SHOWN) == 4
    assert not OBEYED.search(told)
    borders = [line for line in told.splitlines() if line and line[0] in "┏┃┡│└"]
    assert len({len(line) for line in borders}) == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_and_notes(terminal):
    out = io.StringIO()
    with Display(HOSTILE, 1, Terminal(file=out, force_terminal=terminal, width=400)) as display:
        display.stage(1, HOSTILE)
        display.evaluating(HOSTILE, 1, 1)
        display.note(HOSTILE)
    cell = Cell(HOSTILE, "origin", "original", 0, Path("r.yaml"), (), {"tasks": None}, "f", Path("runs/x"), None, "r")
    with SweepDisplay(1, 0, Terminal(file=out, force_terminal=terminal, width=400)) as sweep:
        sweep.started(cell)
        sweep.at(cell, f"task 1 {HOSTILE} done")
        sweep.ended(cell, HOSTILE)
    told = out.getvalue()
    assert SHOWN in told
    for sequence in ("\x1b]0;", "\x1b[2J", "\x9b", "\u202e", "\x07"):
        assert sequence not in told


def lines(capsys, code, *words):
    assert main(list(map(str, words))) == code
    told = capsys.readouterr()
    assert not OBEYED.search(told.out + told.err)
    return told.out + told.err


def test_commands_escape_what_data_say(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = {"name": "r", "method": HOSTILE, "stream": HOSTILE, "seed": 0, "tasks": [HOSTILE], "matrix": [[5.0]]}
    (tmp_path / "results.json").write_text(json.dumps({**run, "metrics": {HOSTILE: 1.0}}))
    shown = lines(capsys, 0, "show", tmp_path)
    assert shown.splitlines()[0] == f"{SHOWN} on {SHOWN}, seed 0 (accuracy in percent)"
    assert f"{SHOWN} 1.00" in shown
    (tmp_path / "results.json").write_text(json.dumps({**run, "tasks": [HOSTILE, HOSTILE]}))
    assert lines(capsys, 2, "show", tmp_path).count("\n") == 1
    quoted = json.dumps(HOSTILE + "\n")
    for text in (f"{quoted}: 1", f"method: {quoted}", f"training: {{{quoted}: 1}}", f"tasks: [{quoted}]", quoted):
        (tmp_path / "r.yaml").write_text(text)
        for command in ("run", "doctor", "sweep"):
            assert lines(capsys, 2, command, "r.yaml").count("\n") == 1
    assert lines(capsys, 2, HOSTILE).count("\n") == 1
    assert lines(capsys, 2, "run", "r.yaml", f"--{HOSTILE}", "1").count("\n") == 1
    (tmp_path / "x.yaml").write_text(f"# {HOSTILE}\n")
    monkeypatch.setattr("dymoe.learning.catalog.FOLDER", tmp_path)
    assert SHOWN in lines(capsys, 0, "list", "recipes")


def test_what_the_system_refuses_is_one_line(tmp_path, capsys):
    for words in (("show", "x" * 300), ("report", "x" * 300), ("run", "x" * 300), ("push", "x" * 300, "y")):
        told = lines(capsys, 2, *words)
        assert told.count("\n") == 1
        assert told.startswith("dymoe: ")
    assert len(lines(capsys, 2, "show", "x" * 100_000)) < 1600
