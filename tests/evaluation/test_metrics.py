"""The accuracy matrix against loop-written oracles, and its refusals."""

import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dymoe.errors import DymoeError
from dymoe.evaluation import AccuracyMatrix

PERCENT = st.floats(min_value=0, max_value=100, allow_nan=False)


@st.composite
def triangles(draw: st.DrawFn, least: int = 1) -> list[list[float]]:
    tasks = draw(st.integers(least, 7))
    return [draw(st.lists(PERCENT, min_size=t, max_size=t)) for t in range(1, tasks + 1)]


def oracle(rows: list[list[float]]) -> dict[str, object]:
    """Every metric by its definition, with exact fractions, indices spelled out 1-based."""
    tasks = len(rows)
    a = {(t, i): Fraction(rows[t - 1][i - 1]) for t in range(1, tasks + 1) for i in range(1, t + 1)}
    mft = mfn = maa = change = Fraction(0)
    forgetting = []
    for i in range(1, tasks + 1):
        mft += a[i, i] / tasks
        mfn += a[tasks, i] / tasks
        change += a[tasks, i] - a[i, i]
        best = None
        for t in range(i, tasks):
            best = a[t, i] if best is None or a[t, i] > best else best
        forgetting.append(Fraction(0) if best is None else best - a[tasks, i])
    for t in range(1, tasks + 1):
        seen = Fraction(0)
        for i in range(1, t + 1):
            seen += a[t, i]
        maa += seen / t / tasks
    return {
        "MFT": mft,
        "MFN": mfn,
        "MAA": maa,
        "BWT": change / tasks,
        "BWT_T-1": change / (tasks - 1) if tasks > 1 else Fraction(0),
        "forgetting": forgetting,
    }


@given(triangles())
def test_every_metric_equals_its_exact_oracle(rows: list[list[float]]) -> None:
    matrix, expected = AccuracyMatrix(rows), oracle(rows)
    assert matrix.forgetting() == pytest.approx([float(f) for f in expected.pop("forgetting")], abs=1e-9)
    assert matrix.to_dict() == pytest.approx({key: float(value) for key, value in expected.items()}, abs=1e-9)


@given(triangles())
def test_identities(rows: list[list[float]]) -> None:
    matrix = AccuracyMatrix(rows)
    tasks = len(rows)
    assert matrix.mfn() - matrix.mft() == pytest.approx(matrix.bwt("T"), abs=1e-9)
    assert matrix.bwt("T-1") * (tasks - 1) == pytest.approx(matrix.bwt("T") * tasks, abs=1e-9)
    assert matrix.bwt() == matrix.bwt("T")
    assert matrix.forgetting()[-1] == 0.0
    # The best earlier accuracy is at least the diagonal, so mean forgetting bounds -BWT from above.
    assert sum(matrix.forgetting()) >= -matrix.bwt("T") * tasks - 1e-9
    if min(map(min, rows)) == max(map(max, rows)):
        assert matrix.bwt() == 0 == max(matrix.forgetting())


@given(triangles(least=2), st.data())
def test_prefix_is_the_matrix_of_the_run_in_progress(rows: list[list[float]], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(rows)))
    assert AccuracyMatrix(rows[:stages]).rows == AccuracyMatrix(rows).rows[:stages]


def test_a_worked_example() -> None:
    matrix = AccuracyMatrix([[80], [60, 70], [70, 40, 90]], names=["a", "b", "c"])
    assert matrix.mft() == pytest.approx(80)
    assert matrix.mfn() == pytest.approx(200 / 3)
    assert matrix.maa() == pytest.approx((80 + 65 + 200 / 3) / 3)
    assert matrix.bwt() == pytest.approx(-40 / 3)
    assert matrix.bwt("T-1") == pytest.approx(-20)
    assert matrix.forgetting() == [10, 30, 0]
    assert matrix.forgetting_by_task() == {"a": 10, "b": 30, "c": 0}


def test_a_task_that_ends_better_than_ever_has_negative_forgetting() -> None:
    assert AccuracyMatrix([[50], [80, 10]]).forgetting() == [-30, 0]


def test_one_task_forgets_nothing() -> None:
    matrix = AccuracyMatrix([[42.5]])
    assert matrix.to_dict() == {"MFT": 42.5, "MFN": 42.5, "MAA": 42.5, "BWT": 0.0, "BWT_T-1": 0.0}
    assert matrix.forgetting() == [0.0]


def test_tuples_and_arrays_are_rows() -> None:
    square = np.array([[80, 0, 0], [60, 70, 0], [70, 40, 90]], dtype=np.float32)
    expected = AccuracyMatrix([[80], [60, 70], [70, 40, 90]])
    assert AccuracyMatrix([row[: t + 1] for t, row in enumerate(square)]) == expected
    assert AccuracyMatrix(((80,), (60, 70), (np.int64(70), Fraction(40), 90.0))) == expected
    assert AccuracyMatrix(np.array([[80.0]])).mft() == 80
    assert all(type(cell) is float for row in expected.rows for cell in row)


@pytest.mark.parametrize("square", [np.zeros((3, 3)), [[1, 2], [3, 4]], np.full((2, 2), np.nan)])
def test_a_square_matrix_is_refused_and_told_the_lower_triangle(square: object) -> None:
    with pytest.raises(DymoeError, match=r"square.*row\[: t \+ 1\] for t, row in enumerate\(rows\)"):
        AccuracyMatrix(square)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "it is empty"),
        (np.zeros((0, 0)), "it is empty"),
        ([[]], "row 1 has 0 columns, 1 needed"),
        ([[1], [2]], "row 2 has 1 columns, 2 needed"),
        ([[1], [2, 3], [4, 5]], "row 3 has 2 columns, 3 needed"),
        ([[1, 2], [3]], "row 1 has 2 columns, 1 needed"),
        ([[1], [2, True]], r"row 2, column 2 is True \(bool\)"),
        ([[np.bool_(True)]], "row 1, column 1 is .*bool"),
        ([["50"]], r"row 1, column 1 is '50' \(str\)"),
        ([[None]], "row 1, column 1 is None"),
        ([[1], [2, [3]]], r"row 2, column 2 is \[3\] \(list\)"),
        ([[1 + 2j]], "row 1, column 1 is .*complex"),
        ([[1], [math.nan, 2]], "row 2, column 1 is nan"),
        ([[math.inf]], "row 1, column 1 is inf"),
        ([[-math.inf]], "row 1, column 1 is -inf"),
        ([[1], [2, 100.0001]], "row 2, column 2 is 100.0001; percent lie in 0 to 100"),
        ([[-0.5]], "row 1, column 1 is -0.5"),
        ([[10**400]], "row 1, column 1 is 1000"),
        (["5", "55"], "row 1 is '5'; a list of numbers"),
        ([5], "row 1 is 5; a list of numbers"),
        ([{1}], "row 1 is {1}"),
        ([[1], {2: 3, 4: 5}], "row 2 is {2: 3, 4: 5}"),
        (None, "the matrix is None"),
        ("", "the matrix is ''"),
        ({}, "the matrix is {}"),
        (np.float64(3), "the matrix is .*3.0"),
        (np.array(3.0), "the matrix is"),
        (np.arange(3), "row 1 is .*0"),
    ],
)
def test_refusals_name_row_and_column(rows: object, message: str) -> None:
    with pytest.raises(DymoeError, match=message):
        AccuracyMatrix(rows)


@pytest.mark.parametrize("names", [["a"], ["a", "a"], "ab", ["a", 1]])
def test_names_must_fit(names: object) -> None:
    with pytest.raises(DymoeError, match="names"):
        AccuracyMatrix([[1], [2, 3]], names=names)


@pytest.mark.parametrize("divisor", ["t", "T - 1", 2, None])
def test_an_unknown_divisor_is_refused(divisor: object) -> None:
    with pytest.raises(DymoeError, match='"T-1"'):
        AccuracyMatrix([[1]]).bwt(divisor)


def test_importing_the_matrix_does_not_import_torch() -> None:
    code = "import sys, dymoe.evaluation; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
