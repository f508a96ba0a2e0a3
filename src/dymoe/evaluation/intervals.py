"""95 % intervals of accuracies and metrics, and two methods compared on the same questions.

Every metric of a stream is linear in the questions' scores: with s[t][q] the score of question q of task i after stage
t, MFN is the sum over tasks of the mean over q of s[T][q] / T, and MFT, MAA and BWT likewise with other weights of the
stages. A metric is therefore a *share* for every question, averaged within each task and summed over tasks, and so is
the difference of two methods that answered the same questions.

What is not known is which other questions and which other seeds there might have been:

- Questions: the Bayesian bootstrap (Rubin 1981) within each task. The questions get random weights (Dirichlet, all
  ones), the same in every stage, for every seed and for both methods compared. Two questions that nobody asked stand
  beside them, one with the lowest and one with the highest share that is possible: for a single accuracy of right and
  wrong answers this is exactly Beta(right + 1, wrong + 1), so that 30 right answers of 30 do not count as certainty.
- Seeds, where there are several: random weights over them in the same way. Their deviation from the mean is stretched
  so that what of their spread goes beyond single answers that flipped is as wide as Student's interval of so few
  values. A single seed says nothing of others: its interval holds for that training alone.

An interval is what lies between the 2.5 % and 97.5 % quantiles of the draws, widened to the measured value if that lies
outside.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dymoe.errors import DymoeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DRAWS = 4000
LEVEL = 0.95
NORMAL = 1.96  # the 97.5 % quantiles: of the normal distribution, of Student's with 1, 2, .. degrees of freedom
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14)
METRICS = ("MFT", "MFN", "MAA", "BWT", "BWT_T-1")

Verdict = Literal["more", "less", "not told apart"]


@dataclass(frozen=True)
class Interval:
    """A measured value in percent (or points) with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """Of a difference: whether the interval leaves zero out, and on which side."""
        return "more" if self.low > 0 else "less" if self.high < 0 else "not told apart"

    def text(self, sign: bool = False) -> str:
        """As in "55.2 (51.0 to 59.1)", with real minus signs."""
        form = "+.1f" if sign else ".1f"
        # Adding 0.0 turns a rounded -0.0 into 0.0.
        value, low, high = (f"{round(number, 1) + 0.0:{form}}" for number in (self.value, self.low, self.high))
        return f"{value} ({low} to {high})".replace("-", "−")


@dataclass(frozen=True)
class Answers:
    """The scores of a run's questions, 0 to 1.

    Attributes:
        tasks: names in learned order.
        scores: task -> a row for every stage since it was learned, its own first; each row has one score a question. A
            run without stages (joint, zero-shot) has one row a task.
        questions: task -> digest of the ids asked, in their order (see `digest`); equal digests are equal questions.
        seed: of the run.
    """

    tasks: tuple[str, ...]
    scores: Mapping[str, Sequence[Sequence[float]]]
    questions: Mapping[str, str]
    seed: int = 0

    @property
    def staged(self) -> bool:
        """Whether there is a row for every stage, so that MFT, MAA and BWT exist."""
        return all(len(self.scores[task]) == len(self.tasks) - index for index, task in enumerate(self.tasks))

    @classmethod
    def of(cls, results: Mapping[str, Any], where: str) -> "Answers":
        """The scores that a run's results hold (key ``answers``).

        Raises:
            DymoeError: they hold none, as results do that an earlier version wrote; `where` names them.
        """
        entries = results.get("answers")
        if not entries:
            raise DymoeError(f"{where}: holds no scores of single questions (key answers), which an interval needs")
        tasks = tuple(task for task in results["tasks"] if task in entries)
        scores = {task: entries[task]["scores"] for task in tasks}
        return cls(tasks, scores, {task: entries[task]["questions"] for task in tasks}, results.get("seed", 0))


def answers(stages: Sequence[Mapping[str, tuple[Sequence[str], Sequence[float]]]]) -> dict[str, dict[str, Any]]:
    """The scores of single questions as results.json holds them.

    Args:
        stages: of each stage in order, task -> (ids, scores 0 to 1) of the questions asked.

    Returns:
        Task -> ``questions`` (see `digest`) and ``scores``, a row for every stage that asked the task.
    """
    entries: dict[str, dict[str, Any]] = {}
    for stage in stages:
        for task, (ids, scores) in stage.items():
            entry = entries.setdefault(task, {"questions": digest(ids), "scores": []})
            # A right answer as 1 rather than 1.0: a run's scores are some thousand numbers.
            entry["scores"].append([int(score) if score in (0, 1) else round(score, 4) for score in scores])
    return entries


def digest(ids: Sequence[str]) -> str:
    """A short digest of the questions asked, in their order."""
    import hashlib

    return hashlib.sha256("\0".join(ids).encode()).hexdigest()[:16]


def stage_weights(metric: str, tasks: int, index: int) -> list[float]:
    """How a metric weighs the stages of the task at `index` (from 0), its own stage first.

    The metric in percent is 100 times the sum over tasks and stages of weight times mean score (see `AccuracyMatrix`,
    whose formulas these are).
    """
    stages = tasks - index
    last, first = [0.0] * (stages - 1) + [1.0], [1.0] + [0.0] * (stages - 1)
    if metric == "MFN":
        return [weight / tasks for weight in last]
    if metric == "MFT":
        return [weight / tasks for weight in first]
    if metric == "MAA":
        return [1 / (tasks * (index + stage + 1)) for stage in range(stages)]
    divisor = tasks if metric == "BWT" else max(tasks - 1, 1)
    return [(end - start) / divisor for end, start in zip(last, first, strict=True)]


def metric_names(runs: Sequence[Answers]) -> tuple[str, ...]:
    """The metrics that these runs have: all of them, or MFN alone where a run has no stages."""
    return METRICS if all(run.staged for run in runs) else ("MFN",)


def metrics(runs: Sequence[Answers], draws: int = DRAWS) -> dict[str, Interval]:
    """Every metric of one method over its seeds.

    Args:
        runs: one a seed, of the same tasks and questions.
        draws: of the bootstrap.

    Raises:
        DymoeError: there is none, or they were asked different questions.
    """
    _same(runs)
    names = metric_names(runs)
    per_task = [_shares(runs, task, names) for task in runs[0].tasks]
    bounds = [_bounds(names, len(per_task), index) for index in range(len(per_task))]
    return dict(zip(names, _intervals(per_task, bounds, draws), strict=True))


def compare(first: Sequence[Answers], second: Sequence[Answers]) -> dict[str, Interval]:
    """Every metric's difference, first minus second, paired by question and by seed.

    Args:
        first: one run a seed.
        second: likewise; the seeds that both have are compared.

    Raises:
        DymoeError: no seed in common, or they were asked different questions.
    """
    seeds = sorted({run.seed for run in first} & {run.seed for run in second})
    if not seeds:
        raise DymoeError("no seed in common: two methods are compared seed by seed on the same questions")
    pairs = [
        (next(run for run in first if run.seed == seed), next(run for run in second if run.seed == seed))
        for seed in seeds
    ]
    _same([run for pair in pairs for run in pair])
    names = metric_names([run for pair in pairs for run in pair])
    ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    per_task = [_shares(ours, task, names) - _shares(theirs, task, names) for task in ours[0].tasks]
    bounds = []
    for task in ours[0].tasks:
        here = _bounds(names, len(per_task), ours[0].tasks.index(task))
        there = _bounds(names, len(per_task), theirs[0].tasks.index(task))
        bounds.append([(a[0] - b[1], a[1] - b[0]) for a, b in zip(here, there, strict=True)])
    return dict(zip(names, _intervals(per_task, bounds), strict=True))


def accuracy(scores: Sequence[Sequence[float]]) -> Interval:
    """One task's accuracy at one stage in percent, over seeds: a row a seed, a score (0 to 1) a question."""
    import numpy as np

    return _intervals([np.asarray(scores, dtype=float)[None]], [[(0.0, 1.0)]])[0]


def change(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> Interval:
    """How many points one task's accuracy changed by between two stages, paired by question and by seed.

    Args:
        before: a row a seed, a score (0 to 1) a question.
        after: of the same questions and seeds.
    """
    import numpy as np

    difference = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    return _intervals([difference[None]], [[(-1.0, 1.0)]])[0]


def _same(runs: Sequence[Answers]) -> None:
    """Refuse runs that did not answer the same questions."""
    if not runs:
        raise DymoeError("there is no run to take an interval of")
    for run in runs[1:]:
        if set(run.tasks) != set(runs[0].tasks):
            raise DymoeError(f"other tasks: {', '.join(run.tasks)} beside {', '.join(runs[0].tasks)}")
        for task in run.tasks:
            if run.questions[task] != runs[0].questions[task]:
                raise DymoeError(f"task {task!r}: other questions were asked; only answers to the same ones compare")


def _shares(runs: Sequence[Answers], task: str, names: Sequence[str]) -> "NDArray[np.float64]":
    """(metrics, seeds, questions): what every question of the task adds to each metric, per seed."""
    import numpy as np

    shares = []
    for run in runs:
        rows = np.asarray(run.scores[task], dtype=float)
        index, tasks = run.tasks.index(task), len(run.tasks)
        weights = [stage_weights(name, tasks, index) if run.staged else [1 / tasks] for name in names]
        shares.append(np.asarray(weights) @ rows[-len(weights[0]) :])
    return np.stack(shares, axis=1)


def _bounds(names: Sequence[str], tasks: int, index: int) -> list[tuple[float, float]]:
    """The lowest and the highest share that a question can have in each metric."""
    rows = [stage_weights(name, tasks, index) for name in names]
    return [(sum(min(weight, 0.0) for weight in row), sum(max(weight, 0.0) for weight in row)) for row in rows]


def _intervals(
    per_task: Sequence["NDArray[np.float64]"], bounds: Sequence[Sequence[tuple[float, float]]], count: int = DRAWS
) -> list[Interval]:
    """An interval for every metric from the questions' shares.

    Args:
        per_task: of each task (metrics, seeds, questions).
        bounds: of each task and metric the lowest and highest share possible.
        count: how many draws.
    """
    import numpy as np

    random = np.random.default_rng(0)  # the same draws every time: a number in a table does not move
    names, seeds = per_task[0].shape[:2]
    draws = np.zeros((count, names, seeds))
    value = np.zeros((names, seeds))
    for shares, limits in zip(per_task, bounds, strict=True):
        extremes = np.broadcast_to(np.asarray(limits)[:, None, :], (names, seeds, 2))
        atoms = np.concatenate([shares, extremes], axis=2)
        weights = random.dirichlet(np.ones(atoms.shape[2]), size=count)
        draws += np.einsum("dq,msq->dms", weights, atoms)
        value += shares.mean(axis=2)
    mean = draws.mean(axis=2)
    if seeds > 1:
        weights = random.dirichlet(np.ones(seeds), size=count)
        mean += _stretch(draws, value) * (np.einsum("ds,dms->dm", weights, draws) - mean)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(mean, [tail, 100 - tail], axis=0)
    measured = value.mean(axis=1)
    return [
        Interval(100 * float(v), 100 * float(min(a, v)), 100 * float(max(b, v)))
        for v, a, b in zip(measured, low, high, strict=True)
    ]


def _stretch(draws: "NDArray[np.float64]", value: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """By how much the deviation of a weighted mean over seeds is stretched, for every metric.

    Two seeds differ also where nothing but single answers flipped, which drawing questions has counted already: that
    part of their variance is taken off first. The rest is stretched so that Dirichlet weights over these few values
    vary as Student's interval says that their mean does.

    Args:
        draws: (draws, metrics, seeds), each with its own questions.
        value: (metrics, seeds), as measured.
    """
    import numpy as np

    seeds = value.shape[1]
    variance = value.var(axis=1, ddof=1)
    flips = (draws - draws.mean(axis=2, keepdims=True)).var(axis=0).mean(axis=1) * seeds / (seeds - 1)
    beyond = np.clip(1 - flips / np.maximum(variance, 1e-12), 0, None)
    quantile = STUDENT[seeds - 2] if seeds - 2 < len(STUDENT) else NORMAL
    return np.sqrt(beyond * (seeds + 1) / (seeds - 1)) * quantile / NORMAL
