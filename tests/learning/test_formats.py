"""Broken results of runs and sweeps to every command that reads them: one short line, never a traceback."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from dymoe.analysis.runs import gather, read_runs
from dymoe.cli import main
from dymoe.errors import DymoeError
from dymoe.learning.formats import read_results, run_results
from dymoe.messages import one_line

RUN: dict[str, Any] = {
    "name": "r",
    "method": "dymoe",
    "stream": "s",
    "base": "pocket",
    "seed": 0,
    "tasks": ["a", "b"],
    "settings": {"tau": 0.2},
    "with": {"replay": {"size": 4}},
    "matrix": [[60.0], [40.0, 70.0]],
    "metrics": {"MFN": 55.0},
    "format_drift": {"a": 1.0, "b": 0.0},
    "group_hashes": [{"stage": 1, "groups": {"a": "f0"}}],
    "zero_shot": [1.0, 2.0],
    "steps": [4, 4],
    "seconds": {"train": [1.0, 2.0]},
    "trainable_parameters": 5,
    "stored_parameters": 5,
    "versions": {"torch": "2"},
}
RECORD = RUN | {"label": "l", "order": "origin", "instructions": "original", "fingerprint": "f"}
RECORD |= {"recipe": {"training": {"lr": 1e-3, "steps_per_task": 4}}}
BAD = [None, "", "x", "\x1b[2J", [], {}, [1], [[1]], {"a": 1}, {"a": None}, True, -1, 0, 3, 1e9, 10**400, "x" * 5000]


def broken(value: Any, draw: random.Random) -> Any:
    """A copy with one value, somewhere, replaced or left out."""
    whole = copy.deepcopy(value)
    place: Any = whole
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw.choice(keys)
        if not isinstance(place[key], dict | list) or not place[key] or draw.random() < 0.5:
            break
        place = place[key]
    if draw.random() < 0.2:
        del place[key]
    else:
        place[key] = draw.choice(BAD)
    return whole


@pytest.mark.parametrize("seed, count", [(3, 1000), pytest.param(4, 10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sweep", [False, True])
def test_a_broken_value_anywhere_is_one_short_line_or_changes_nothing(tmp_path, sweep, seed, count):
    draw = random.Random(seed)
    file = tmp_path / ("r.jsonl" if sweep else "results.json")
    refused = 0
    for _ in range(count):
        values = broken([{"about": {"title": "t"}}, RECORD] if sweep else RUN, draw)
        lines = values if sweep and isinstance(values, list) else [values]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        try:
            read_results(file) if sweep else run_results(tmp_path)
            gather(read_runs([file if sweep else tmp_path]))
        except DymoeError as error:
            refused += 1
            told = one_line(error)
            assert str(tmp_path) in told
            assert len(told.replace(str(tmp_path), "")) < 300
    assert 0.4 * count < refused < count


@pytest.mark.parametrize(
    "change, message",
    [
        ({"matrix": [[60.0], ["x", 1.0]]}, "results.json: matrix.2.1: expected a number from 0 to 100, got 'x'"),
        ({"matrix": [[160.0], [1.0, 1.0]]}, "results.json: matrix.1.1: expected a number from 0 to 100, got 160.0"),
        ({"matrix": [[60.0], [1.0]]}, "results.json: matrix.2: expected 2 accuracies, got [1.0]"),
        ({"matrix": [[1.0] * 3] * 3}, "results.json: matrix: expected a row for each of the 2 tasks, got 3"),
        ({"tasks": []}, "results.json: tasks: expected different names, got []"),
        ({"joint": [1.0]}, "results.json: joint: expected 2 accuracies, got [1.0]"),
        ({"metrics": {"MFN": None}}, "results.json: metrics.MFN: expected float, got nothing"),
        ({"settings": 5}, "results.json: settings: expected a mapping of keys or nothing, got 5"),
        ({"with": {"replay": 5}}, "results.json: with"),
        ({"seed": "0"}, "results.json: seed: expected a whole number from 0, got '0'"),
        ({"name": None}, "results.json: name: expected str, got nothing"),
    ],
)
@pytest.mark.parametrize("command", ["show", "report"])
def test_show_and_report_refuse_the_same_with_the_same_words(tmp_path, capsys, command, change, message):
    (tmp_path / "results.json").write_text(json.dumps(RUN | change))
    assert main([command, str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert not (tmp_path / "report.html").exists()


def test_words_that_are_no_numbers_of_json_and_keys_twice(tmp_path, capsys):
    for text, message in (
        (json.dumps(RUN).replace("60.0", "NaN"), "NaN is no number of JSON"),
        (json.dumps(RUN).replace('"seed"', '"name": "q", "seed"'), "the key 'name' is there twice"),
        ("[]", "the file: expected a mapping of keys, got []"),
        ("", "is empty"),
    ):
        (tmp_path / "results.json").write_text(text)
        assert main(["show", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


def test_predictions_that_are_no_utf8_or_nested_are_named(tmp_path):
    from dymoe.files import read_json_lines
    from dymoe.learning.formats import Scored

    file = Path(tmp_path / "a.jsonl")
    good = b'{"id": 1, "prediction": "x", "score": 1}\n'
    for line, message in (
        (b'{"id": 1, "prediction": "\xff", "score": 1}', "line 2: not usable JSON"),
        (b"[" * 100_000, "line 2: not usable JSON (nested too deeply)"),
        (b'{"id": 1, "prediction": "x", "score": "1"}', "line 2: score: expected float, got '1'"),
        (b'{"id": [1], "prediction": "x", "score": 1}', "line 2: id: expected str or int, got [1]"),
        (b"\x00", "line 2: not valid JSON"),
    ):
        file.write_bytes(good + line)
        with pytest.raises(DymoeError, match=r"^[^\n]+$") as caught:
            list(read_json_lines(file, Scored))
        assert f"a.jsonl: {message}" in str(caught.value)
    file.write_bytes(good * 2)
    assert len(list(read_json_lines(file, Scored))) == 2
