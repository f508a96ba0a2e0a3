"""Intervals and paired comparisons: hand-computed cases, the matrix's own metrics, and simulated coverage."""

import numpy as np
import pytest

from dymoe.errors import DymoeError
from dymoe.evaluation.intervals import METRICS, Answers, accuracy, change, compare, digest, metric_names, metrics
from dymoe.evaluation.metrics import AccuracyMatrix
from tests.evaluation.coverage import coverage


def run_of(rows, seed=0, names=None):
    """`rows[task][stage since it was learned]` is a list of scores."""
    names = names or [f"task {place}" for place in range(len(rows))]
    scores = dict(zip(names, rows, strict=True))
    return Answers(tuple(names), scores, {name: digest([f"{name} {i}" for i in range(3)]) for name in names}, seed)


def random_run(random, tasks, questions, seed=0):
    rows = [[random.integers(0, 11, questions) / 10 for _ in range(tasks - place)] for place in range(tasks)]
    return run_of(rows, seed)


@pytest.mark.parametrize("right, wrong", [(30, 0), (0, 30), (12, 18), (1, 99)])
def test_right_and_wrong_answers_have_the_quantiles_of_a_beta_distribution(right, wrong):
    interval = accuracy([[1] * right + [0] * wrong])
    random = np.random.default_rng(5).beta(right + 1, wrong + 1, 400_000)
    low, high = np.percentile(100 * random, [2.5, 97.5])
    value = 100 * right / (right + wrong)
    assert interval.value == pytest.approx(value)
    assert interval.low == pytest.approx(min(low, value), abs=0.7)
    assert interval.high == pytest.approx(max(high, value), abs=0.7)


def test_thirty_of_thirty_by_hand():
    """Beta(31, 1) has the distribution function x^31: its 2.5 % quantile is 0.025^(1/31) = 0.888."""
    interval = accuracy([[1.0] * 30])
    assert interval.low == pytest.approx(100 * 0.025 ** (1 / 31), abs=0.5)
    assert interval.high == 100.0


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_values_are_those_of_the_matrix(tasks):
    random = np.random.default_rng(tasks)
    run = random_run(random, tasks, 20)
    rows = [[100 * float(np.mean(run.scores[run.tasks[i]][t - i])) for i in range(t + 1)] for t in range(tasks)]
    matrix = AccuracyMatrix(rows).to_dict()
    measured = metrics([run])
    assert set(measured) == set(METRICS) == set(matrix)
    for name, interval in measured.items():
        assert interval.value == pytest.approx(matrix[name], abs=1e-9)
        assert interval.low <= interval.value <= interval.high


def test_the_value_over_seeds_is_their_mean():
    random = np.random.default_rng(1)
    runs = [random_run(random, 3, 15, seed) for seed in range(3)]
    for name in METRICS:
        alone = [metrics([run])[name].value for run in runs]
        assert metrics(runs)[name].value == pytest.approx(sum(alone) / 3)


def test_a_run_without_stages_has_its_final_accuracy_alone():
    run = run_of([[[1, 0, 1]], [[0, 0, 1]]])
    assert metric_names([run]) == ("MFN",)
    assert metrics([run])["MFN"].value == pytest.approx(50.0)


def test_the_same_answers_are_not_told_apart():
    run = random_run(np.random.default_rng(2), 4, 50)
    for interval in compare([run], [run]).values():
        assert interval.value == 0
        assert interval.verdict == "not told apart"


def test_pairing_tells_apart_what_two_intervals_do_not():
    """One method answers ten of a hundred questions more, loses none: intervals overlap, the difference is clear."""
    first, second = [1] * 60 + [0] * 40, [1] * 50 + [0] * 50
    ours, theirs = run_of([[first]]), run_of([[second]])
    assert metrics([ours])["MFN"].low < metrics([theirs])["MFN"].high
    difference = compare([ours], [theirs])["MFN"]
    assert difference.value == pytest.approx(10.0)
    assert difference.verdict == "more"
    assert compare([theirs], [ours])["MFN"].verdict == "less"
    # Ten more right, none lost: the share of questions won has nearly the quantiles of Beta(11, 91).
    random = np.random.default_rng(3).beta(11, 91, 400_000)
    assert difference.low == pytest.approx(100 * np.percentile(random, 2.5), abs=2.5)
    assert difference.high == pytest.approx(100 * np.percentile(random, 97.5), abs=2.5)


def test_a_change_is_paired_question_by_question():
    random = np.random.default_rng(5)
    before = random.random((2, 80)) < 0.5
    after = before.copy()
    after[:, :20] = True
    found, back = change(before, after), change(after, before)
    assert found.value == pytest.approx(100 * (after.mean() - before.mean()))
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low), abs=0.5)
    assert found.verdict == "more"  # while the two accuracies' intervals overlap
    assert accuracy(before).high > accuracy(after).low
    # One question that was right and is wrong now: -1 + 2 w with w of Beta(1, 2), whose quantiles are 1 - sqrt(1 - p).
    single = change([[1]], [[0]])
    assert single.value == -100
    assert single.high == pytest.approx(100 * (1 - 2 * np.sqrt(0.025)), abs=4)


def test_tasks_are_paired_by_name_in_another_order():
    ours = run_of([[[1, 1, 0], [1, 0, 0]], [[1, 1, 1]]], names=["a", "b"])
    theirs = run_of([[[1, 1, 1], [1, 1, 1]], [[1, 0, 0]]], names=["b", "a"])
    assert compare([ours], [theirs])["MFN"].value == pytest.approx(0.0)


def test_seeds_that_only_one_has_are_left_out():
    random = np.random.default_rng(4)
    ours = [random_run(random, 2, 10, seed) for seed in (0, 1)]
    theirs = [random_run(random, 2, 10, seed) for seed in (1, 2)]
    assert compare(ours, theirs)["MFN"].value == pytest.approx(compare(ours[1:], theirs[:1])["MFN"].value)
    with pytest.raises(DymoeError, match="no seed in common"):
        compare(ours[:1], theirs)


def test_other_questions_or_tasks_are_refused():
    one = run_of([[[1, 0, 1]]], names=["a"])
    other = Answers(("a",), one.scores, {"a": digest(["x"])}, 0)
    with pytest.raises(DymoeError, match="task 'a': other questions"):
        compare([one], [other])
    with pytest.raises(DymoeError, match="other tasks: b beside a"):
        compare([one], [run_of([[[1, 0, 1]]], names=["b"])])
    with pytest.raises(DymoeError, match="no run"):
        metrics([])


@pytest.mark.parametrize("seeds, between", [(1, 0.0), (3, 0.0), (3, 0.6), (5, 0.4)])
def test_nineteen_of_twenty_intervals_hold_the_truth(seeds, between):
    streams = 120
    for name, (share, _) in coverage(seeds, between, questions=80, streams=streams, draws=500).items():
        assert share >= 0.89, name  # 0.95 minus three standard errors of 120 streams
