"""`dymoe score`: what it prints, what it writes, how a mistake is told."""

import hashlib
import json
from pathlib import Path

import pytest

from dymoe.cli import main
from tests.tasks.test_scoring_runner import BOXES, line


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    said = [line("a", "[0.1,0.5,0.9,0.67]"), line("b", "no box")]
    (tmp_path / "predictions.jsonl").write_text("\n".join(said) + "\n")
    (tmp_path / "references.json").write_text(json.dumps(BOXES))
    return tmp_path


COMMAND = ["score", "--rule", "coin", "--task", "Grounding", "predictions.jsonl", "references.json"]


def test_it_prints_the_accuracy_and_writes_where_it_came_from(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(COMMAND) == 0
    told = capsys.readouterr().out
    for words in (
        "Grounding, rule coin/grounding: 0.00 % of 2",
        "right 0  partial 0  wrong 2",
        "unreadable 1  missing 0  skipped 0  duplicate ids 0  unknown ids 0",
        "lenient 50.00 %, so 50.00 points are format drift",
        "note: 1 boxes of references.json have no area",
        "Scores: predictions.coin.json",
    ):
        assert words in told
    written = json.loads((folder / "predictions.coin.json").read_text())
    assert written["rule"] == "coin/grounding"
    assert written["files"]["references"] == {
        "path": "references.json",
        "sha256": hashlib.sha256((folder / "references.json").read_bytes()).hexdigest(),
        "records": 2,
    }


def test_the_corrected_rule_and_another_output(folder: Path, capsys: pytest.CaptureFixture) -> None:
    words = [
        "score",
        "predictions.jsonl",
        "references.json",
        "--rule=corrected",
        "--task=grounding",
        "--output",
        "a/s.json",
    ]
    assert main(words) == 0
    assert "50.00 % of 2" in capsys.readouterr().out
    assert json.loads((folder / "a/s.json").read_text())["accuracy"] == 50


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score", "--rule", "coin", "predictions.jsonl", "references.json"], "score: --task is missing"),
        (COMMAND[:-1], "score: expected PREDICTIONS and REFERENCES, got "),
        ([*COMMAND, "--anotations", "x"], "score: --anotations: unknown option; did you mean --annotations?"),
        ([*COMMAND, "--output"], "score: --output: expected a value after it"),
        ([*COMMAND, "--task", "GQA"], "score: --task: is there twice"),
        ([*COMMAND, "--output", "./references.json"], "is one of the files to be read"),
        ([*COMMAND, "--variant", "hide"], "unknown variant 'hide'"),
        (["score", "--rule", "a/b", "--task", "GQA", "predictions.jsonl", "references.json"], "unknown rule 'a/b'"),
        ([*COMMAND[:-2], "none.jsonl", "references.json"], "none.jsonl: no such file"),
        ([*COMMAND[:-2], "", "references.json"], "cannot be read"),
        ([*COMMAND[:-2], "references.json", "references.json"], "references.json: line 1: is a test record"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert message in told
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
