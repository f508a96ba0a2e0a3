"""The first screen: who forgot least, what it forgot, and when."""

import math
import statistics
from pathlib import Path

import pytest
from reading import THREE, matrix_run, page
from run_folders import TASKS, make_joint, make_run

from dymoe.analysis.forgetting import cards, losses, lost_most, ranked
from dymoe.analysis.runs import gather, read_runs
from dymoe.numbers import Stat, number


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
    figure = losses(methods)
    assert figure is not None
    what, when = (panel.frame for panel in figure.panels)
    backward = {method.label: statistics.mean(run.matrix().bwt() for run in method.runs) for method in methods}
    order = sorted(methods, key=lambda method: -backward[method.label])
    assert [method.label for method in order] == [method.label for method in ranked(methods)] == list(what.index)
    rows = {row[0]: row[1:] for row in figure.rows}
    for method, each in zip(order, figure.folded, strict=True):
        mean = [[statistics.mean(run.rows[t][i] for run in method.runs) for i in range(t + 1)] for t in range(8)]
        assert what.loc[method.label].sum() == pytest.approx(8 * backward[method.label])
        assert when.loc[method.label].sum() == pytest.approx(8 * backward[method.label])
        assert each.title == method.label
        for i in range(7):
            assert what.loc[method.label].iloc[i] == pytest.approx(mean[7][i] - mean[i][i])
            for t in range(1, 8):
                change = mean[t][i] - mean[t - 1][i] if t > i else math.nan
                assert each.frame.iloc[i, t - 1] == pytest.approx(change, nan_ok=True)
        first = Stat.of([run.rows[7][0] - run.rows[0][0] for run in method.runs])
        assert rows[f"{method.label}: {TASKS[0]}"][-1] == number(first, sign=True)
        assert rows[f"{method.label}: all older tasks"][-1] == number(8 * backward[method.label], sign=True)
