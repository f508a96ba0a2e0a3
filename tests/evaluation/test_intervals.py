"""Intervals and paired comparisons: hand-computed cases, the matrix's own metrics, and simulated coverage."""

import math

import numpy as np
import pytest

from dymoe.errors import DymoeError
from dymoe.evaluation.intervals import METRICS, Answers, accuracy, compare, digest, metric_names, metrics
from dymoe.evaluation.matrix import AccuracyMatrix


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
    """Questions of random difficulty, seeds that shift whole tasks: what all of them would give is known."""
    random = np.random.default_rng(7)
    tasks, questions, trials = 4, 80, 120
    level, loss, spread = np.array([1.5, 0.5, 0.0, -0.5]), np.array([0.6, 0.4, 0.2, 0.0]), 1.5
    hits = {"MFN": 0, "BWT": 0}
    logistic = lambda values: 1 / (1 + np.exp(-values))  # noqa: E731
    noise = random.normal(0, 1, 40_000)
    for _ in range(trials):
        # A single seed's interval speaks of that training alone, so its shift belongs to the truth.
        shifts = random.normal(0, between, (seeds, tasks))
        difficulty = random.normal(level[:, None], spread, (tasks, questions))
        runs = []
        for seed in range(seeds):
            rows = []
            for task in range(tasks):
                places = [logistic(difficulty[task] + shifts[seed, task])] + [
                    logistic(difficulty[task] + shifts[seed, task] - loss[task])
                ] * (tasks - 1 - task)
                rows.append([(random.random(questions) < chance).astype(float) for chance in places])
            runs.append(run_of(rows, seed))
        sd = math.hypot(spread, between if seeds > 1 else 0)
        first = [logistic(level[i] + sd * noise).mean() for i in range(tasks)]
        last = [logistic(level[i] - loss[i] + sd * noise).mean() for i in range(tasks)]
        last[-1] = first[-1]
        truth = {"MFN": 100 * np.mean(last), "BWT": 100 * (np.mean(last) - np.mean(first))}
        for name, interval in metrics(runs, draws=500).items():
            if name in truth:
                hits[name] += interval.low <= truth[name] <= interval.high
    for name, count in hits.items():
        assert count / trials >= 0.89, name  # 0.95 minus three standard errors of 120 trials
