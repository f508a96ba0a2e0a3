"""The first screen: who forgot least, what it forgot, and when."""

from pathlib import Path

import pytest
from reading import THREE, matrix_run, page
from run_folders import TASKS, make_joint, make_run

from dymoe.analysis.forgetting import cards, losses, lost_most, ranked
from dymoe.analysis.runs import gather, read_runs
from dymoe.numbers import number


def test_the_first_screen_names_what_was_lost_and_when(tmp_path: Path) -> None:
    lora = matrix_run(tmp_path / "lora", "lora", [[80], [55, 80], [20, 50, 80]])
    dymoe = matrix_run(tmp_path / "dymoe", "dymoe", [[70], [72, 60], [61, 64, 62]])
    told = {card.title: f"{card.lead} | {card.text}" for card in cards(gather(read_runs([lora, dymoe])))}
    assert told == {
        "What dymoe forgot": "scienceqa −9.0 points | No other task. 1 of 2 older tasks lost nothing.",
        "When": "Learning imagenet | "
        "−7.0 points over the 2 tasks before it taken together, most of all scienceqa (−11.0).",
        "What is left": "62.3 % correct | dymoe, from 64.0 % as each task was just learned. The others: lora 50.0 %.",
        "Forgot most": "lora | −30.0 points of backward transfer. "
        "Most of scienceqa (60.0 points, mostly while learning imagenet).",
    }
    text = page(tmp_path, lora, dymoe).sections[""]
    assert "Learning imagenet" in text


def test_nothing_forgotten_is_said_so(tmp_path: Path) -> None:
    told = cards(gather(read_runs([matrix_run(tmp_path / "a", "cmoe", [[80], [80, 70], [80, 75, 60]])])))
    assert [card.lead for card in told] == ["Nothing", "At no stage", "71.7 % correct"]
    assert lost_most(gather(read_runs([tmp_path / "a"]))[0]) == "nothing"


def test_before_the_second_stage_there_is_nothing_to_tell(tmp_path: Path) -> None:
    methods = gather(read_runs([matrix_run(tmp_path / "a", "lora", [[80]]), make_joint(tmp_path / "j", 0, THREE)]))
    assert cards(methods) == []
    assert losses(methods) is None


def test_both_heatmaps_add_up_to_backward_transfer(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{m}{s}", m, s) for m in ("lora", "dymoe", "incmoelora") for s in (0, 1)]
    methods = gather(read_runs(runs))
    order = ranked(methods)
    assert [m.label for m in order] == sorted(
        (m.label for m in methods),
        key=lambda label: -next(m.metric("BWT").mean for m in methods if m.label == label),  # type: ignore[union-attr]
    )
    for method in order:
        backward = method.metric("BWT")
        assert backward is not None
        rows = [method.rows()[t] for t in range(8)]
        by_task = [method.change_of_task(i) for i in range(7)]
        by_stage = [method.change_at(t) for t in range(2, 9)]
        assert sum(stat.mean for stat in by_task if stat) == pytest.approx(8 * backward.mean)
        assert sum(stat.mean for stat in by_stage if stat) == pytest.approx(8 * backward.mean)
        for i in range(7):
            assert by_task[i].mean == pytest.approx(rows[7][i] - rows[i][i])  # type: ignore[union-attr]
            for t in range(i + 2, 9):
                change = method.change(i, t)
                assert change is not None
                assert change.mean == pytest.approx(rows[t - 1][i] - rows[t - 2][i])
        assert method.change(3, 4) is None
    figure = losses(methods)
    assert figure is not None
    table = {row[0]: row[1:] for row in figure.rows}
    first = order[0]
    assert table[f"{first.label}: {TASKS[0]}"][-1] == first.change_of_task(0).text(sign=True)  # type: ignore[union-attr]
    total = sum(first.change_of_task(i).mean for i in range(7))  # type: ignore[union-attr]
    assert table[f"{first.label}: all older tasks"][-1] == number(total, sign=True)
    assert [plot.title for plot in figure.folded] == [method.label for method in order]
