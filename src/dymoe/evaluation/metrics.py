"""From the cells of a run's stages to its numbers: matrix, metrics, forgetting, drift of format and of routing."""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from dymoe.errors import DymoeError
from dymoe.messages import brief

ROUNDING = 1e-3  # of mean routing weights


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _cells(value: Any, what: str) -> list[Any]:
    """The items of a list, tuple or array; anything without an order of its own is refused."""
    if isinstance(value, str | bytes | Mapping | Set) or not isinstance(value, Iterable):
        raise DymoeError(f"accuracy matrix: {what} is {brief(value)}; a list of numbers is needed")
    try:
        return list(value)
    except TypeError:  # a 0-d array says it can be iterated and then cannot
        raise DymoeError(f"accuracy matrix: {what} is {brief(value)}; a list of numbers is needed") from None


def _percent(value: Any, row: int, column: int) -> float:
    where = f"accuracy matrix: row {row}, column {column}"
    # numpy's numbers are Real, its bool and strings are not; Python's bool is an int and has to be named.
    if isinstance(value, bool) or not isinstance(value, Real):
        raise DymoeError(f"{where} is {brief(value)} ({type(value).__name__}); a number from 0 to 100 is needed")
    number: Any = value
    if not 0 <= number <= 100:  # NaN too fails the comparison
        raise DymoeError(f"{where} is {number}; percent lie in 0 to 100")
    return float(number)


@dataclass(frozen=True)
class AccuracyMatrix:
    """Accuracy in percent on every task seen so far, after each stage of a stream.

    `rows[t - 1]` is stage t and holds t percentages: A[t][1] .. A[t][t], one for each task learned so far
    (1-based here, as in the papers). Lists, tuples and arrays of numbers are taken, if every row has its
    length; the matrix of a run in progress is simply one with fewer rows.

    Args:
        rows: stage by stage, the percentages (0 to 100) on tasks 1..t.
        names: the tasks' names in learned order, one for each row; "1", "2", ... where none are given.

    Raises:
        DymoeError: the matrix is empty, ragged or square, or a cell is no number from 0 to 100. The message
            names the row and the column, counted from 1.
    """

    rows: tuple[tuple[float, ...], ...]
    names: tuple[str, ...] = ()

    def __init__(self, rows: Iterable[Iterable[float]], names: Sequence[str] | None = None) -> None:
        raw = [_cells(row, f"row {t}") for t, row in enumerate(_cells(rows, "the matrix"), start=1)]
        _check_shape(raw)
        checked = tuple(
            tuple(_percent(cell, t, i) for i, cell in enumerate(row, start=1)) for t, row in enumerate(raw, start=1)
        )
        object.__setattr__(self, "rows", checked)
        object.__setattr__(self, "names", _check_names(names, len(checked)))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def diagonal(self) -> tuple[float, ...]:
        """A[i][i]: the accuracy on each task right after it was learned."""
        return tuple(row[-1] for row in self.rows)

    def mft(self) -> float:
        """Mean fine-tuning accuracy in percent: the mean of the diagonal (each task as just learned)."""
        return _mean(self.diagonal)

    def mfn(self) -> float:
        """Mean final accuracy in percent: the mean of the last row (what is left of all tasks at the end)."""
        return _mean(self.rows[-1])

    def maa(self) -> float:
        """Mean average accuracy in percent: the mean over stages of the mean over the tasks seen so far."""
        return _mean([_mean(row) for row in self.rows])

    def bwt(self, divisor: Literal["T", "T-1"] = "T") -> float:
        """Backward transfer in percentage points: sum_i (A[T][i] - A[i][i]) / divisor; below 0 is forgetting.

        "T" divides by the number of tasks (CoIN; equal to MFN - MFT), "T-1" by the number of tasks that could
        change (GEM, Lopez-Paz and Ranzato 2017, equation 3). With one task nothing can be forgotten and both
        are 0.0.

        Raises:
            DymoeError: `divisor` is neither.
        """
        if divisor not in ("T", "T-1"):
            raise DymoeError(f'bwt: divisor is {brief(divisor)}; "T" (CoIN) or "T-1" (GEM) is needed')
        tasks = len(self.rows)
        if tasks == 1:
            return 0.0
        change = math.fsum(last - learned for last, learned in zip(self.rows[-1], self.diagonal, strict=True))
        return change / (tasks if divisor == "T" else tasks - 1)

    def forgetting(self) -> list[float]:
        """Forgetting of each task in percentage points: its best earlier accuracy minus its final one.

        f_i = max over i <= t < T of A[t][i], minus A[T][i] (Chaudhry et al. 2018, equation 3). Positive is
        lost; negative means that the task ends better than it ever was before. The last task has no earlier
        stage and gets 0.0.
        """
        final = self.rows[-1]
        lost = [max(row[i] for row in self.rows[i:-1]) - final[i] for i in range(len(self.rows) - 1)]
        return [*lost, 0.0]

    def forgetting_by_task(self) -> dict[str, float]:
        """`forgetting()` by task name."""
        return dict(zip(self.names, self.forgetting(), strict=True))

    def to_dict(self) -> dict[str, float]:
        """The metrics as results.json holds them: MFT, MFN, MAA, BWT (divided by T) and BWT_T-1."""
        return {
            "MFT": self.mft(),
            "MFN": self.mfn(),
            "MAA": self.maa(),
            "BWT": self.bwt("T"),
            "BWT_T-1": self.bwt("T-1"),
        }


def _check_shape(rows: list[list[Any]]) -> None:
    """Row t must hold t cells."""
    if not rows:
        raise DymoeError("accuracy matrix: it is empty; row 1 with the accuracy on task 1 is needed at least")
    if len(rows) > 1 and all(len(row) == len(rows) for row in rows):
        raise DymoeError(
            f"accuracy matrix: row 1 has {len(rows)} columns, 1 is needed: this is a full square matrix of "
            f"{len(rows)} x {len(rows)}, but row t holds tasks 1..t only. Pass the lower triangle: "
            "AccuracyMatrix([row[: t + 1] for t, row in enumerate(rows)])"
        )
    for t, row in enumerate(rows, start=1):
        if len(row) != t:
            raise DymoeError(f"accuracy matrix: row {t} has {len(row)} columns, {t} needed: one for each task 1..{t}")


def _check_names(names: Sequence[str] | None, tasks: int) -> tuple[str, ...]:
    if names is None:
        return tuple(str(i) for i in range(1, tasks + 1))
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise DymoeError(f"accuracy matrix: names are {brief(names)}; a list of task names is needed")
    if len(names) != tasks or len(set(names)) != tasks:
        raise DymoeError(f"accuracy matrix: {tasks} rows need {tasks} different names, got {list(names)}")
    return tuple(names)


def drift(task: str, groups: Sequence[str], weights: Sequence[float]) -> float | None:
    """Share of routing weight that a task's tokens put on groups added after its own, 0 to 1.

    Args:
        task: its group has the same name.
        groups: in the order in which they were added.
        weights: mean weight of each group on the task's tokens; they sum to 1, or less where layers have no experts.

    Returns:
        None if the task has no group of its own, or if the weights sum to more than 1: a method that adds up all groups
        at full weight divides no token among them.
    """
    if task not in groups or math.fsum(weights) > 1 + ROUNDING:
        return None
    return math.fsum(weights[groups.index(task) + 1 :])


def routing_drift(routing: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Earlier task -> its `drift`, one value for every stage since the task was learned.

    A task without drift at some stage (no group of its own, or nothing is routed) is left out.

    Args:
        routing: routing.json of the stages in order; without groups where a method routes nothing.
    """
    by_task: dict[str, list[float | None]] = {}
    for stage in routing:
        for task, row in stage.get("tasks", {}).items():
            by_task.setdefault(task, []).append(drift(task, stage["groups"], row["weight"]))
    return {
        task: [round(value, 4) for value in values if value is not None]
        for task, values in by_task.items()
        if None not in values
    }


def format_drift(
    strict: Sequence[Sequence[float]], lenient: Sequence[Sequence[float]], tasks: Sequence[str]
) -> dict[str, float]:
    """Points of a task's loss since it was learned that are format alone, by task.

    The loss under the strict rule minus the loss under the lenient one: what the model still knows but says
    in another task's form. Strict loss = format drift + lenient loss, exactly, so it may be below 0 (the form
    got better while the content got worse).

    Args:
        strict: accuracy matrix in percent, row t over tasks 1..t.
        lenient: the same under the format-tolerant rules.
        tasks: names in learned order.
    """
    last = len(strict) - 1

    def lost(rows: Sequence[Sequence[float]], task: int) -> float:
        return rows[task][task] - rows[last][task]

    return {tasks[i]: lost(strict, i) - lost(lenient, i) for i in range(last + 1)}


def of_matrix(
    strict: Sequence[Sequence[float]], lenient: Sequence[Sequence[float]], tasks: Sequence[str]
) -> dict[str, Any]:
    """What results.json says of the two accuracy matrices of the tasks learned so far.

    Raises:
        DymoeError: `strict` is no accuracy matrix.
    """
    matrix = AccuracyMatrix(strict, tasks[: len(strict)])
    return {
        "matrix": strict,
        "lenient_matrix": lenient,
        "metrics": matrix.to_dict(),
        "forgetting": matrix.forgetting_by_task(),
        "format_drift": format_drift(strict, lenient, tasks),
    }


def accuracies(
    tasks: Sequence[str],
    learned: Sequence[Sequence[str]],
    stages: Sequence[Mapping[str, Mapping[str, Any]]],
    zero_shot: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """A run's accuracies and metrics as results.json holds them.

    Stages that learn a task each give a matrix. Where one learns several, nothing was "just learned" or can be
    forgotten: what counts is the level of all tasks after it (`joint`), as without stages it is `zero_shot`.

    Args:
        tasks: all tasks' names in learned order.
        learned: the tasks that each stage learns, of all stages.
        stages: of each stage that is done, task -> its "strict" and "lenient" accuracy in percent and its "samples".
        zero_shot: the same of the base model before it learns; empty where it was not asked.
    """
    known: dict[str, Any] = {"zero_shot": [zero_shot[task]["strict"] for task in tasks]} if zero_shot else {}
    rows = stages if learned else [zero_shot]
    known["samples"] = {task: cell["samples"] for row in rows for task, cell in row.items()}
    strict, lenient = ([[cell[rule] for cell in row.values()] for row in stages] for rule in ("strict", "lenient"))
    if learned and all(len(names) == 1 for names in learned):
        return {**known, **(of_matrix(strict, lenient, tasks) if strict else _NO_MATRIX)}
    if learned:
        known |= {"joint": strict[-1] if strict else None, "lenient_joint": lenient[-1] if lenient else None}
    level = known.get("joint" if learned else "zero_shot")
    return {**_NO_MATRIX, **known, "metrics": {"MFN": _mean(level)} if level else {}}


_NO_MATRIX: dict[str, Any] = {"matrix": [], "lenient_matrix": [], "metrics": {}, "forgetting": {}, "format_drift": {}}
