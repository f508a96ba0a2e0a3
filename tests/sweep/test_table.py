"""The sweep's tables: every number against a computation of its own, every gap said."""

import json
import math
import random
import re
import statistics

import numpy as np
import pytest

from dymoe.errors import DymoeError
from dymoe.sweep.table import (
    drift,
    earlier,
    lines,
    markdown,
    published,
    rank_correlation,
    ranks,
    training_seconds,
    tuning_markdown,
)

TASKS = ["A", "B", "C"]


def row(label="dymoe", seed=0, mfn=50.0, **changes):
    found = {
        "label": label,
        "order": "origin",
        "instructions": "original",
        "seed": seed,
        "tasks": TASKS,
        "matrix": [[60.0], [55.0, 70.0], [mfn - 10, mfn, mfn + 10]],
        "metrics": {"MFN": mfn, "MAA": 58.0, "MFT": 61.0, "BWT": mfn - 61.0, "BWT_T-1": 1.5 * (mfn - 61.0)},
        "forgetting": {"A": 12.0, "B": 6.0, "C": 0.0},
        "format_drift": {"A": 3.0, "B": 0.0, "C": 0.0},
        "drift": {"A": [0.0, 0.2, 0.5], "B": [0.0, 0.25], "C": [0.0]},
        "trainable_parameters": 1_500_000,
        "stored_parameters": 4_500_000,
        "steps": [8, 8, 8],
        "seconds": {"train": [10.0, 10.0, 10.0], "method": [1.0, 1.0, 1.0], "probe": [0.0, 0.0, 0.0]},
        "resumed_at": [0, 0, 0],
        "machine": {"cores": 2, "clock": "cpu"},
        "recipe": {"training": {"lr": 2e-3}},
    }
    return {**found, **changes}


def page(rows, **about):
    return markdown({"about": {"title": "T", "seeds": [0, 1, 2], **about}, "rows": rows})


def cells(text, label):
    """The cells of the table's row that begins with `label`, by column."""
    table = [line for line in text.splitlines() if line.startswith("|")]
    head = next(line for line in table if line.startswith("| method | seeds"))
    mine = next(line for line in table if line.startswith(f"| {label} |"))
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, mine)]
    return dict(zip(*split, strict=True))


def test_the_row_of_a_method_against_an_oracle():
    values = [50.0, 40.0, 45.0]
    rows = [row(seed=seed, mfn=mfn) for seed, mfn in enumerate(values)]
    rows += [row("lora", seed, 20.0 + seed, seconds={"train": [8.0, 7.0, 7.0]}, drift={}) for seed in range(3)]
    found = cells(page(rows), "dymoe")
    mean = sum(values) / 3
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / 2)
    assert found["seeds"] == "3"
    assert found["MFN"] == f"{mean:.1f} ± {spread:.1f}"
    assert found["BWT"] == f"−{61 - mean:.1f} ± {spread:.1f}"
    assert found["forgetting"] == f"{(12 + 6) / 2:.1f} ± 0.0"
    assert found["format drift"] == f"{(3 + 0) / 2:.1f} ± 0.0"
    assert found["drift"] == f"{100 * (0.5 + 0.25) / 2:.1f} ± 0.0"
    assert (found["trained"], found["stored"]) == ("1.50", "4.50")
    grown = [*rows[:2], row(seed=2, mfn=45.0, stored_parameters=7_500_000)]
    assert cells(page(grown), "dymoe")["stored"] == f"5.50 ± {math.sqrt(3):.2f}"
    assert found["time"] == f"{33 / 22:.2f} ± 0.00"
    assert cells(page(rows), "lora")["drift"] == "–"
    assert "| dymoe | 35.0 ± 5.0 | 45.0 ± 5.0 | 55.0 ± 5.0 |" in page(rows)


def answered(label, seed, right, asked=100, questions="digest", **changes):
    """A record of one task of which the first `right` questions of `asked` were answered rightly."""
    mfn = 100 * right / asked
    scores = {"A": {"questions": questions, "scores": [[1] * right + [0] * (asked - right)]}}
    same = {"tasks": ["A"], "matrix": [[mfn]], "forgetting": {"A": 0.0}, "answers": scores}
    return row(label, seed, **{**same, "metrics": {"MFN": mfn, "MFT": mfn, "MAA": mfn, "BWT": 0.0}, **changes})


def numbers(cell):
    """Value, low and high of a cell such as "−1.0 (−2.5 to +0.5)"."""
    return [float(part) for part in re.findall(r"[+-]?\d+\.\d", cell.replace("−", "-"))]


def test_intervals_by_hand():
    """Beta(31, 1), of 30 right of 30, has the distribution function x^31: its 2.5 % quantile is 0.025^(1/31)."""
    text = page([answered("sure", 0, 30, 30), row("old")])
    value, low, high = numbers(cells(text, "sure")["MFN"])
    assert (value, high) == (100.0, 100.0)
    assert low == pytest.approx(100 * 0.025 ** (1 / 31), abs=0.5)
    assert f"| sure | {cells(text, 'sure')['MFN']} | – | – |" in text, "the task's accuracy at the end"
    assert cells(text, "old")["MFN"] == "50.0"
    # A, all right just learned and half right at the end; B all right: MFN (50 + 100) / 2, BWT (50 - 100) / 2.
    stages = {"A": [[1] * 30, [1] * 15 + [0] * 15], "B": [[1] * 30]}
    held = {task: {"questions": task, "scores": scores} for task, scores in stages.items()}
    staged = page([row("staged", tasks=["A", "B"], answers=held, forgetting={}, format_drift={}, drift={})])
    found = {name: numbers(cells(staged, "staged")[name])[0] for name in ("MFN", "MAA", "BWT", "MFT")}
    assert found == {"MFN": 75.0, "MAA": 87.5, "BWT": -25.0, "MFT": 100.0}
    at_the_end = [numbers(cell)[0] for cell in staged.splitlines()[-1].split("|")[2:4]]
    assert at_the_end == [50.0, 100.0]
    assert "In brackets" in text
    assert "In brackets" not in page([row("old")])


def test_a_row_beside_the_reference_by_hand():
    """Ten of a hundred questions more and none less: the share won has nearly the quantiles of Beta(11, 91)."""
    rows = [answered("ours", 0, 60), answered("dymoe", 0, 50), answered("dymoe", 1, 99), answered("like", 0, 51)]
    rows += [answered("worse", 0, 20), answered("other", 0, 50, questions="else"), row("old"), row("apart", seed=7)]
    joint = answered("joint", 0, 90, matrix=[], joint=[90.0], metrics={"MFN": 90.0}, forgetting={})
    rows += [answered("ours", 0, 60, order="reverse"), joint]
    text = page(rows, reference="dymoe")
    found = cells(text, "ours")
    value, low, high = numbers(found["MFN against dymoe"].partition(",")[0])
    random = np.random.default_rng(0).beta(11, 91, 100_000)
    assert value == 10.0, "seed 1 of the reference has no pair"
    assert low == pytest.approx(100 * np.percentile(random, 2.5), abs=2.5)
    assert high == pytest.approx(100 * np.percentile(random, 97.5), abs=2.5)
    for label, verdict in (("ours", "more"), ("like", "not told apart"), ("worse", "less")):
        assert cells(text, label)["MFN against dymoe"].endswith(f"), {verdict}")
    assert found["BWT against dymoe"].endswith(", not told apart")
    for label in ("dymoe", "old", "other", "apart", "ours, reverse"):
        assert cells(text, label)["MFN against dymoe"] == "–"
    missing = next(line for line in text.splitlines() if line.startswith("Not compared with dymoe: "))
    assert "old (no scores of single questions)" in missing
    assert "other (task 'A': other questions were asked" in missing
    assert "ours, reverse (that row is not there" in missing
    assert "dymoe (" not in missing


def test_the_reference_is_compared_with_nothing_where_no_record_can_be():
    old = [row(), row("lora"), answered("new", 0, 3)]
    for text in (page(old, reference="dymoe"), page([answered("a", 0, 1), answered("b", 0, 2)])):
        assert "gainst" not in text
        assert "Not compared" not in text


def test_how_often_the_locator_is_right():
    def locator(*right):
        tasks = {name: {"accuracy": 100 * sum(row) / len(row), "chosen": {}, "right": row} for name, row in right}
        return {"accuracy": statistics.fmean(row["accuracy"] for row in tasks.values()), "tasks": tasks}

    one, two = locator(("A", [1] * 30)), locator(("A", [1] * 30), ("B", [1] * 15 + [0] * 15))
    text = page([row("sure", locator=one), row("half", locator=two), row()])
    value, low, high = numbers(cells(text, "sure")["locator"])
    assert (value, high) == (100.0, 100.0)
    assert low == pytest.approx(100 * 0.025 ** (1 / 31), abs=0.5)
    value, low, high = numbers(cells(text, "half")["locator"])
    assert value == 75.0
    assert 60 < low < 75 < high < 90
    assert cells(text, "dymoe")["locator"] == "–"
    assert "*Locator*" in text
    assert "ocator" not in page([row()])


def test_rows_are_sorted_and_fewer_seeds_are_said():
    rows = [row("low", mfn=10.0), row("high", mfn=90.0), *(row("mid", seed, 50.0) for seed in range(3))]
    assert [line.label for line in lines(rows)] == ["high", "mid", "low"]
    text = page(rows)
    assert cells(text, "high")["seeds"] == "1 of 3"
    assert cells(text, "high")["MFN"] == "90.0"
    assert cells(text, "mid")["seeds"] == "3"
    assert "Fewer seeds than 3: high, low." in text
    assert "Fewer seeds" not in page([row("mid", seed) for seed in range(3)])


def test_orders_and_instructions_are_rows_of_their_own():
    rows = [row(), row(order="reverse"), row(instructions="10type"), row(order="reverse", instructions="diverse")]
    text = page(rows)
    for name in ("dymoe", "dymoe, reverse", "dymoe, 10type", "dymoe, reverse, diverse"):
        assert cells(text, name)["MFN"] == "50.0"


def test_training_time_only_where_it_can_be_compared():
    lora = row("lora")
    assert training_seconds(row()) == 33.0
    assert training_seconds(row(resumed_at=[0, 4, 0])) is None
    assert training_seconds(row(steps=[])) is None
    assert training_seconds(row(machine={"cores": 2})) is None, "wall time, perhaps of a shared machine"
    for other in (
        row(machine={"cores": 9, "clock": "cpu"}),
        row(resumed_at=[0, 4, 0]),
        row(seed=1),
        row(order="reverse"),
    ):
        assert [line.time() for line in lines([lora, other]) if line.label == "dymoe"] == [None]
    assert [line.time().mean for line in lines([lora, row()])] == [1.0, 1.0]


def test_methods_without_stages():
    joint = row("joint", matrix=[], joint=[30.0, 60.0, 90.0], metrics={"MFN": 60.0}, forgetting={}, format_drift={})
    nothing = row("zero-shot", matrix=[], zero_shot=[0.0, 3.0, 6.0], metrics={"MFN": 3.0}, steps=[], forgetting={})
    text = page([joint, nothing, row(), row("lora")])
    assert cells(text, "joint")["BWT"] == cells(text, "joint")["forgetting"] == "–"
    assert "| joint | 30.0 | 60.0 | 90.0 |" in text
    assert "| zero-shot | 0.0 | 3.0 | 6.0 |" in text
    assert cells(text, "zero-shot")["time"] == "–"


def test_means_leave_out_the_last_task():
    assert earlier({"A": 4.0, "B": 8.0, "C": 100.0}, TASKS) == 6.0
    assert earlier({}, TASKS) is None
    assert earlier({"A": 4.0}, ["A"]) is None
    # The record's order is that of the first stage that asked a task, which need not be the stream's.
    assert drift(row(drift={"C": [0.0], "A": [0.1, 0.3], "B": [0.5]})) == pytest.approx(40.0)


def test_rank_correlation_against_the_sum_of_squared_rank_differences():
    draw = random.Random(0)
    for size in (3, 5, 8):
        first = draw.sample(range(100), size)
        second = draw.sample(range(100), size)
        place = {v: sorted(first).index(v) for v in first}, {v: sorted(second).index(v) for v in second}
        squares = sum((place[0][a] - place[1][b]) ** 2 for a, b in zip(first, second, strict=True))
        assert rank_correlation(first, second) == pytest.approx(1 - 6 * squares / (size * (size**2 - 1)))
    assert ranks([5.0, 7.0, 5.0, 1.0]) == [2.5, 1.0, 2.5, 4.0]
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 2, 3], [4, 4, 4]) is None


def test_the_published_order_stands_beside():
    rows = [row("lora", mfn=20.0), row("ewc", mfn=30.0), row("dymoe", mfn=40.0), row("sefe", mfn=99.0)]
    text = page(rows, published="leaderboard")
    tail = text[text.index("## Beside") :]
    assert "| dymoe | 57.03 | −4.67 | 57.70 | 40.0 | −21.0 | 1 / 1 | 1 / 1 |" in tail
    assert "| ewc | 40.86 | −21.76 | 43.75 | 30.0 | −31.0 | 3 / 2 | 2 / 2 |" in tail
    assert "| olora | 49.53 | −17.54 | 46.65 | – | – | – | – |" in tail
    assert "sefe" not in tail
    assert "numbers are not comparable, only the order" in tail
    # lora is second by MFN there and last here; by BWT the orders are the same.
    assert "over the 3 shared rows: MFN +0.50, BWT +1.00." in tail
    assert "Shared rows: 1. A rank correlation needs 3" in page([row()], published="leaderboard")
    assert "Shared rows: 0." in page([row("sefe")], published="leaderboard")


def test_on_the_papers_own_benchmark_numbers_may_be_compared():
    told = page([row(stream="coin"), row("lora", stream="coin")], published="leaderboard")
    assert "The same benchmark" in told
    assert "not comparable" not in told
    mixed = page([row(stream="coin"), row("lora", stream="pocket-coin")], published="leaderboard")
    assert "numbers are not comparable, only the order" in mixed


def test_the_notes_say_what_there_is():
    assert "One seed, so no standard deviation. Sorted" in page([row(), row("ewc")])
    assert "Mean ± sample standard deviation over seeds. Sorted" in page([row(seed=0), row(seed=1)])
    with_time, without = page([row(), row("lora")]), page([row(), row("ewc")])
    assert "*Time* is" in with_time
    assert "time" in cells(with_time, "dymoe")
    assert "Time" not in without
    assert "time" not in cells(without, "dymoe")


def test_published_numbers_have_sources_and_unique_rows():
    for name in ("leaderboard", "orders", "instructions", "top-k", "experts", "rank", "tau", "replay", "pruning"):
        part = published(name)
        places = [(r["label"], r.get("order"), r.get("instructions")) for r in part["rows"]]
        assert len(set(places)) == len(places) >= 3
        assert "arXiv" in part["source"]
        assert all(0 < r["MFN"] < 100 and r["BWT"] < 0 for r in part["rows"])
    with pytest.raises(DymoeError, match="did you mean top-k"):
        published("topk")


def test_the_tuning_page_marks_what_was_chosen():
    scores = {
        ("lora", 2e-4): 30.0,
        ("lora", 2e-3): 30.0,
        ("dymoe", 2e-4): 10.0,
        ("dymoe", 2e-3): 20.0,
        ("ewc", 2e-4): 5,
    }
    rows = [row(f"{of} lr={rate:g}", mfn=mfn, of=of, rate=rate) for (of, rate), mfn in scores.items()]
    results = {"about": {"title": "Rates"}, "rows": rows, "chosen": {"lora": 2e-4, "dymoe": 2e-3}}
    text = tuning_markdown(json.loads(json.dumps(results)))
    assert "| method | 0.0002 | 0.002 | chosen |" in text
    assert "| lora | **30.0** | 30.0 | 0.0002 |" in text
    assert "| dymoe | 10.0 | **20.0** | 0.002 |" in text
    assert "| ewc | 5.0 | – | – |" in text
    assert "In brackets" not in text
    rows = [answered("lora lr=0.1", 0, 30, 30, of="lora", rate=0.1)]
    text = tuning_markdown({"about": {}, "rows": rows, "chosen": {"lora": 0.1}})
    low = numbers(text.splitlines()[-1])[1]
    assert text.splitlines()[-1].startswith("| lora | **100.0 (")
    assert low == pytest.approx(100 * 0.025 ** (1 / 31), abs=0.5)
    assert "In brackets" in text


def test_nothing_finished_is_a_page_too():
    assert "No run is finished yet." in page([])
    assert "No run is finished yet." in tuning_markdown({"about": {}, "rows": []})


def test_spread_is_the_sample_standard_deviation():
    (line,) = lines([row(seed=0, mfn=1.0), row(seed=1, mfn=4.0)])
    assert line.metric("MFN").spread == pytest.approx(statistics.stdev([1.0, 4.0]))
