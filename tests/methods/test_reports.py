"""What a method reports of a stage: how often a locator is right, counted by hand; parts stand beside one another."""

import json

from dymoe.methods import Stage
from dymoe.methods.reports import add_report, report_locator


def read(stage):
    return json.loads((stage.memory / "report.json").read_text())


def test_how_often_a_locator_is_right_by_hand(tmp_path):
    stage = Stage(2, "b", (), tmp_path / "method")
    report_locator(stage, {"a": ["a", "b", "a", "a"], "b": ["a", "b"]})
    assert read(stage)["locator"] == {
        "accuracy": 62.5,  # the mean of 75 and 50, not 4 of 6
        "tasks": {
            "a": {"accuracy": 75.0, "chosen": {"a": 3, "b": 1}, "right": [1, 0, 1, 1]},
            "b": {"accuracy": 50.0, "chosen": {"a": 1, "b": 1}, "right": [0, 1]},
        },
    }


def test_parts_stand_beside_one_another_and_are_replaced_whole(tmp_path):
    stage = Stage(1, "a", (), tmp_path / "method")
    add_report(stage, growth={"parameters": 1}, other=0)
    report_locator(stage, {"a": ["b"]})
    add_report(stage, growth={"candidates": 2})
    found = read(stage)
    assert (found["growth"], found["other"], found["locator"]["accuracy"]) == ({"candidates": 2}, 0, 0.0)
    nothing = Stage(1, "a", (), tmp_path / "other")
    report_locator(nothing, {})
    assert not nothing.memory.exists()
