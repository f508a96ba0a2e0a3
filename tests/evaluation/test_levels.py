"""From the cells of a run's stages to what results.json says of them."""

import pytest

from dymoe.evaluation.metrics import AccuracyMatrix, accuracies


def cells(**strict):
    return {task: {"strict": value, "lenient": value + 1, "samples": 7} for task, value in strict.items()}


def test_a_task_a_stage_gives_a_matrix():
    found = accuracies(["a", "b"], "ab", [cells(a=80), cells(a=60, b=90)], cells(a=1, b=2))
    assert found["matrix"] == [[80], [60, 90]]
    assert found["lenient_matrix"] == [[81], [61, 91]]
    assert found["metrics"] == AccuracyMatrix([[80], [60, 90]]).to_dict()
    assert found["forgetting"] == {"a": 20, "b": 0}
    assert found["zero_shot"] == [1, 2]
    assert "joint" not in found


def test_a_run_that_has_not_come_far_has_the_rows_it_has():
    assert accuracies(["a", "b"], "ab", [cells(a=80)], {})["metrics"]["MFN"] == 80
    assert accuracies(["a", "b"], "ab", [], {})["metrics"] == {}


@pytest.mark.parametrize("learned", [["ab"], ["a", "bc"]])
def test_a_stage_that_learns_several_tasks_gives_a_level(learned):
    """After its last stage; also where a method of a user's learns some tasks alone and others together."""
    names = "".join(learned)
    stages = [cells(**dict.fromkeys("".join(learned[: number + 1]), 60)) for number in range(len(learned))]
    found = accuracies(list(names), learned, stages, {})
    assert found["joint"] == [60] * len(names)
    assert found["lenient_joint"] == [61] * len(names)
    assert found["matrix"] == []
    assert found["metrics"] == {"MFN": 60}
    assert accuracies(list(names), learned, [], {})["joint"] is None


def test_without_stages_the_base_model_is_the_level():
    found = accuracies(["a", "b"], [], [], cells(a=10, b=30))
    assert found["metrics"] == {"MFN": 20}
    assert found["samples"] == {"a": 7, "b": 7}
    assert "joint" not in found
