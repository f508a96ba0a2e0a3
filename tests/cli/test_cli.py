"""The command line: fast to start, one line per mistake, what it prints is what the run folder holds."""

import json
import subprocess
import sys
from importlib import import_module

import pytest

from dymoe.cli import COMMANDS, main
from dymoe.cli.demo import sentence
from dymoe.cli.options import Arguments
from dymoe.cli.run import COMMAND


def test_help_loads_no_heavy_library():
    script = "import sys; from dymoe.cli import main; main(['--help']); print('heavy', *HEAVY & {*sys.modules})"
    script = script.replace("HEAVY", "{'torch', 'transformers', 'peft'}")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in COMMANDS)
    assert done.stdout.splitlines()[-1] == "heavy"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"usage: dymoe {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_says_every_option(command, capsys):
    module = import_module(f"dymoe.cli.{'listing' if command == 'list' else command}")
    options = module.OPTIONS if command == "analyze" else {command: module.COMMAND.options}
    assert main([command, "--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"  {option}" in told for several in options.values() for option in several)


def test_keys_of_a_recipe_may_stand_before_it_and_flags_between(capsys):
    words = ["run", "--training.lr=1e-3", "--resume", "nowhere.yaml", "--seed", "3"]
    assert COMMAND.parse(words[1:]) == Arguments(
        ["nowhere.yaml"], {"--resume": True}, ["--training.lr=1e-3", "--seed", "3"]
    )
    assert main(words) == 2
    assert "nowhere.yaml: no such recipe" in capsys.readouterr().err


def test_only_run_is_started_in_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sweep", "recipes/pocket/leaderboard.yaml", "--dry-run"]) == 2
    assert "sweep: started in 2 processes by a launcher" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["sweep", "recipes/pocket/nothing.yaml"]) == 2
    assert "launcher" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["rnu"], "rnu: unknown command; did you mean run?"),
        (["list", "method"], "list: method: unknown; did you mean methods?"),
        (["show", "nowhere"], "nowhere: no results.json here"),
        (["report", "nowhere"], "nowhere"),
        (["report", "x", "--out"], "report: --out: unknown option; did you mean --output?"),
        (["report", "x", "--output"], "report: --output: expected a value after it"),
        (["demo", "--step", "3"], "demo: --step: unknown option; did you mean --steps?"),
        (["demo", "--steps", "0"], "demo: --steps: expected a whole number of at least 1, got '0'"),
        (["run", "x.yaml", "--resum"], "run: --resum: unknown option; did you mean --resume?"),
        (["run", "x.yaml", "--settings.tau"], "run: --settings.tau: expected a value after it"),
        (["run", "--seed", "1"], "run: expected RECIPE, got 0 words; see dymoe run --help"),
    ],
)
def test_a_mistake_is_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert message in told
    assert list(tmp_path.iterdir()) == []


def test_lists(capsys):
    for what, word in (("methods", "incmoelora"), ("streams", "pocket-coin"), ("recipes", "pocket/dymoe ")):
        assert main(["list", what]) == 0
        assert word in capsys.readouterr().out


def results(**changes):
    matrix = [[60.0], [40.0, 70.0]]
    found = {
        "name": "run",
        "method": "lora",
        "stream": "pocket-coin",
        "seed": 0,
        "tasks": ["[red]A", "B"],
        "matrix": matrix,
        "metrics": {"MFT": 65.0, "MFN": 55.0, "MAA": 57.5, "BWT": -10.0, "BWT_T-1": -20.0},
        "format_drift": {"[red]A": 5.0, "B": 0.0},
        "steps": [8, 8],
        "samples": {"[red]A": 40, "B": 40},
    }
    return {**found, **changes}


def test_show_prints_the_matrix_and_escapes_names(tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps(results()))
    assert main(["show", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[0] == "lora on pocket-coin, seed 0 (accuracy in percent)"
    for word in ("[red]A", "60.0", "40.0", "70.0", "MFN 55.00", "BWT_T-1 -20.00", "format drift 2.50"):
        assert word in told


def answered(method, first, after, second):
    """Results of two tasks of 40 questions, with so many right answers: task A at once and after B, and B."""
    rows = {"[red]A": [first, after], "B": [second]}
    scores = {task: [[1] * right + [0] * (40 - right) for right in counts] for task, counts in rows.items()}
    percent = [2.5 * right for right in (first, after, second)]
    metrics = {"MFT": (percent[0] + percent[2]) / 2, "MFN": (percent[1] + percent[2]) / 2}
    metrics["BWT"] = metrics["MFN"] - metrics["MFT"]
    answers = {task: {"questions": task, "scores": found} for task, found in scores.items()}
    return results(method=method, metrics=metrics, answers=answers)


@pytest.mark.parametrize(
    "right, words",
    [
        (
            (24, 24, 28),
            ("transfer 0.0 against -20.0 points, more", "just trained 65.0 against 65.0 %, not told apart"),
        ),
        ((24, 0, 28), ("transfer -30.0 against -20.0 points, less", "at the end 35.0 against 45.0 %, less")),
        ((24, 9, 28), ("transfer -18.8 against -20.0 points, not told apart",)),
    ],
)
def test_the_demo_says_what_its_questions_tell_apart(right, words):
    told = sentence(answered("incmoelora", 24, 8, 28), answered("dymoe", *right))
    assert told.startswith("DyMoE beside IncMoELoRA: ")
    assert all(word in told for word in words), told


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dymoe ")
