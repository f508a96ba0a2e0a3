"""Drift is the weight on later groups; where nothing is divided there is none."""

import pytest

from dymoe.evaluation.metrics import drift, routing_drift


@pytest.mark.parametrize(
    "task, weights, expected",
    [
        ("a", [0.5, 0.3, 0.2], 0.5),
        ("b", [0.5, 0.3, 0.2], 0.2),
        ("c", [0.5, 0.3, 0.2], 0.0),
        ("a", [0.4, 0.1, 0.2], 0.3),  # some layers have no experts
        ("joint", [0.5, 0.3, 0.2], None),
        ("a", [1.0, 1.0, 1.0], None),  # every group at full weight
    ],
)
def test_drift(task, weights, expected):
    found = drift(task, ("a", "b", "c"), weights)
    assert found is None if expected is None else found == pytest.approx(expected)


def stage(groups, **weights):
    return {"groups": groups, "tasks": {task: {"weight": row} for task, row in weights.items()}}


def test_drift_over_stages():
    routed = [stage(["a"], a=[1.0]), stage(["a", "b"], a=[0.7, 0.3], b=[0.1, 0.9])]
    assert routing_drift(routed) == {"a": [0.0, 0.3], "b": [0.0]}
    added = [stage(["a"], a=[1.0]), stage(["a", "b"], a=[1.0, 1.0], b=[1.0, 1.0])]
    assert routing_drift(added) == {}
    assert routing_drift([{}, {}]) == {}
    assert routing_drift([stage(["joint"], a=[1.0], b=[1.0])]) == {}
