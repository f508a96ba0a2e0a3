"""The page of the token's dilemma: its numbers, what it refuses, and that a browser draws it."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from browser import chromium
from reading import Text

from dymoe import analysis
from dymoe.analysis.token_dilemma import STRATEGIES, drift, headline, trade
from dymoe.cli import main
from dymoe.errors import DymoeError
from dymoe.learning.formats import write_results
from dymoe.report.page import write_dilemma

HOSTILE = '<img src=x onerror="window.hacked=1">'
PAIRS = (("A", "B"), ("B", HOSTILE))
KEYS = ("label", "order", "instructions", "fingerprint")


def record(pair: tuple[str, str], seed: int, strategy: str) -> dict[str, Any]:
    """A sweep's record with numbers of its own for every pair, seed and strategy."""
    place = 10 * PAIRS.index(pair) + 5 * seed + [*STRATEGIES].index(strategy)
    matrix = [[60.0 + seed], [60.0 - 2 * place, 10.0 + 3 * place]]
    weights = {pair[0]: [0, 0.02 * place], pair[1]: [0]}
    names = {**dict.fromkeys(KEYS, f"{pair}{seed}{strategy}"), "seed": seed, "tasks": list(pair), "metrics": {}}
    names |= {"method": "dymoe", "stream": "s", "trainable_parameters": 1, "stored_parameters": 1}
    names |= {"recipe": {"training": {"lr": 1e-3}}}
    return {**names, "settings": {"guidance": STRATEGIES[strategy]}, "matrix": matrix, "drift": weights}


def records(seeds: tuple[int, ...] = (0, 1)) -> list[dict[str, Any]]:
    return [record(pair, seed, strategy) for pair in PAIRS for seed in seeds for strategy in STRATEGIES]


def results(folder: Path, rows: list[dict[str, Any]]) -> Path:
    about = {
        "title": f"Dilemma {HOSTILE}",
        "command": "dymoe analyze dilemma x.yaml",
        "machine": {"cores": 2, "gpu": None},
    }
    write_results(folder / "study.jsonl", {"about": about}, rows)
    return folder / "study.jsonl"


def test_marks_and_table_are_the_means_and_deviations_of_the_records() -> None:
    rows = records()
    frame = analysis.dilemma(rows)
    figure = trade(analysis.by_strategy(frame), frame)
    assert [plot.title for plot in figure.panels] == ["All pairs", "A -> B", f"B -> {HOSTILE}"]
    marks = figure.panels[1].spec["data"]
    for place, (name, mask) in enumerate(STRATEGIES.items()):
        mine = [row for row in rows if row["tasks"] == ["A", "B"] and row["settings"]["guidance"] == mask]
        learned = [row["matrix"][1][1] for row in mine]
        lost = [row["matrix"][0][0] - row["matrix"][1][0] for row in mine]
        single, mean = marks[2 * place], marks[2 * place + 1]
        assert (single["x"], single["y"]) == (lost, learned)
        assert mean["x"] + mean["y"] == pytest.approx([statistics.mean(lost), statistics.mean(learned)], rel=1e-4)
        assert mean["error_x"]["array"] == pytest.approx([statistics.stdev(lost)], rel=1e-4)
        assert mean["error_y"]["array"] == pytest.approx([statistics.stdev(learned)], rel=1e-4)
        cells = next(row for row in figure.rows if row[0] == f"A -> B: {name}")
        assert cells[1:3] == ("2", f"{statistics.mean(learned):.1f} ± {statistics.stdev(learned):.1f}")
    ranges = {json.dumps(plot.spec["layout"]["xaxis"]["range"]) for plot in figure.panels}
    assert len(ranges) == 1


def test_drift_is_drawn_where_it_was_measured() -> None:
    frame = analysis.dilemma(records())
    (figure,) = drift(analysis.by_strategy(frame), frame)
    means = [trace["x"][0] for trace in figure.panels[0].spec["data"][1::2]]
    expected = [100 * frame[frame["strategy"] == strategy]["drift"].mean() for strategy in STRATEGIES]
    assert means == pytest.approx(expected, rel=1e-4)
    unmeasured = analysis.dilemma([{**row, "drift": {}} for row in records()])
    assert drift(analysis.by_strategy(unmeasured), unmeasured) == []


def test_the_headline_has_the_means_over_pairs() -> None:
    table = analysis.by_strategy(analysis.dilemma(records((0,))))
    # New: 10 and 40 % at losses of 0 and 20; ambiguous 13 and 43 at 2 and 22; old 16 and 46 at 4 and 24.
    assert headline(table) == (
        "New tokens alone took the new task to 25.0 % for 10.0 points of the old one, ambiguous tokens alone to 28.0 % "
        "for 12.0, old tokens alone to 31.0 % for 14.0."
    )
    one = analysis.dilemma(records((0,)))
    assert "error_x" not in trade(table, one).panels[0].spec["data"][1]  # one seed has no spread


def test_unfinished_pairs_are_said_not_to_count(tmp_path: Path) -> None:
    out = write_dilemma(results(tmp_path, records()[:-1]), tmp_path / "page.html")
    text = Text(out.read_text(encoding="utf-8"))
    assert "Runs that do not count, since not every strategy has their pair and seed yet: 4." in text.sections[""]
    assert "A -> B: new" in text.sections["dilemma"]
    few = write_dilemma(results(tmp_path, records()[:1] + records()[6:7]), tmp_path / "page.html")
    assert "No pair of tasks has been learned" in Text(few.read_text(encoding="utf-8")).sections[""]


def test_what_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DymoeError, match=r"none\.json: no such results"):
        write_dilemma(tmp_path / "none.json", tmp_path / "out.html")
    with pytest.raises(DymoeError, match=r"study\.jsonl: holds no finished runs yet"):
        write_dilemma(results(tmp_path, []), tmp_path / "out.html")
    with pytest.raises(DymoeError, match=r"study\.jsonl: .*not a record of the token's dilemma"):
        write_dilemma(results(tmp_path, [{**records()[0], "tasks": ["A"], "matrix": [[5.0]]}]), tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_the_command_writes_a_page_that_a_browser_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = results(tmp_path, records())
    assert main(["report", str(study)]) == 0
    out = study.with_suffix(".html")
    assert capsys.readouterr().out.strip() == str(out)
    with chromium(tmp_path / "profile") as tab:
        for width in (1280, 390):
            tab.size(width, 900)
            tab.open(out)
            tab.scroll_through()
            tab.wait("[...document.querySelectorAll('.plot')].every((plot) => plot.querySelector('svg.main-svg'))")
            assert tab.evaluate("document.documentElement.scrollWidth") == width
        marks = "document.querySelectorAll('#dilemma-1 .scatterlayer .trace').length"
        assert tab.evaluate(marks) == 2 * len(STRATEGIES)
        assert tab.evaluate("document.querySelectorAll('#dilemma .plot').length") == 1 + len(PAIRS)
        assert tab.evaluate("window.hacked === undefined && document.querySelectorAll('img').length === 0")
        assert tab.messages == []
    assert main(["report", str(study), str(tmp_path)]) == 2
    assert "make a page of their own; give them alone" in capsys.readouterr().err
