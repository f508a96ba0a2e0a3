"""The routing sections: their numbers against plain recomputation, notes where an analysis is lacking, bad files."""

import html
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from frames import PARTS, activation_frame, add_analyses, drift_frame, dynamics_frame, overlay_frame
from reading import THREE, page
from run_folders import make_run

from dymoe import analysis
from dymoe.analysis.figures import Figure
from dymoe.analysis.routing_drift import later_weight, mean_over
from dymoe.analysis.runs import Method, gather, read_runs
from dymoe.analysis.token_overlay import Overlay
from dymoe.errors import DymoeError
from dymoe.numbers import number
from dymoe.report.page import analysis_figures

SECTIONS = {"drift-parts", "activation", "overlay", "token-types"}


def methods_of(*runs: Path) -> list[Method]:
    return gather(read_runs(runs))


def table_of(figure: Figure) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Rows by their text cells; the numbers."""
    words = 2 if "part" in figure.head[1] or figure.head[1] == "step" else 1
    return {tuple(row[:words]): tuple(row[words:]) for row in figure.rows}


def percent(share: float) -> str:
    return number(100 * share)


def drift_oracle(frame: pd.DataFrame, task: str, stage: int, **where: Any) -> tuple[float, float]:
    """Later weight and changed share, row by row: over the tokens of each layer and projection, then over these."""
    order = list(dict.fromkeys(frame["group"]))
    places: dict[tuple[int, str], list[float]] = {}
    for row in frame.to_dict("records"):
        if row["task"] != task or row["stage"] != stage or any(row[key] != value for key, value in where.items()):
            continue
        sums = places.setdefault((row["layer"], row["projection"]), [0.0, 0.0, 0.0])
        if order.index(row["group"]) > order.index(task):
            sums[0] += row["weight"] * row["tokens"]
        if row["group"] == order[0]:
            sums[1] += row["changed"] * row["tokens"]
            sums[2] += row["tokens"]
    later, changed = (statistics.mean(sums[i] / sums[2] for sums in places.values()) for i in (0, 1))
    return later, changed


def test_drift_by_part_and_layer_and_stage_are_plain_means() -> None:
    frame = drift_frame(3, THREE)
    cells = later_weight(frame)
    for by, where in (
        (["task", "part", "stage"], {"part": "image"}),
        (["layer", "task", "stage"], {"layer": 2}),
        (["task", "stage"], {}),
    ):
        means = mean_over(cells, by).set_index(by).sort_index()
        for task, stage in (("scienceqa", 1), ("scienceqa", 3), ("textvqa", 3)):
            key = tuple({"task": task, "stage": stage, **where}[name] for name in by)
            expected = drift_oracle(frame, task, stage, **where)
            assert (means.at[key, "later"], means.at[key, "changed"]) == pytest.approx(expected)


def test_tasks_without_drift_are_left_out() -> None:
    frame = drift_frame(4, THREE)
    frame.loc[frame["task"] == "scienceqa", "weight"] = 1.0  # all groups at full weight
    frame.loc[frame["task"] == "textvqa", "task"] = "no group of its own"
    assert set(later_weight(frame)["task"]) == {"imagenet"}


def test_the_drift_figures_show_these_numbers(tmp_path: Path) -> None:
    frame = drift_frame(5, THREE)
    run = make_run(tmp_path / "dymoe", "dymoe", 0, THREE)
    analysis.store(run, "drift", frame, {})
    figures = {figure.id: figure for figure in analysis_figures(methods_of(run), "drift")}
    parts, layers = table_of(figures["drift-parts"]), table_of(figures["drift-layers"])
    changed = table_of(figures["drift-changed"])
    for part in PARTS:
        row = parts[(f"dymoe: scienceqa, {part}",)]
        assert row == tuple(percent(drift_oracle(frame, "scienceqa", t, part=part)[0]) for t in (1, 2, 3))
    assert layers[("dymoe: layer 2", "answer")][1] == percent(
        drift_oracle(frame, "textvqa", 3, layer=2, part="answer")[0]
    )
    assert changed[("dymoe: scienceqa", "all tokens")] == tuple(
        percent(drift_oracle(frame, "scienceqa", t)[1]) for t in (2, 3)
    )
    pairs = analysis.drift_and_forgetting(run, frame)  # of two older tasks: too few for a correlation
    assert "too few" in figures["drift-forgetting"].caption
    expected = [
        (f"dymoe: {row.task}", percent(row.drift), number(row.forgetting, sign=True)) for row in pairs.itertuples()
    ]
    assert figures["drift-forgetting"].rows == expected


def test_the_correlation_stands_below_its_points(tmp_path: Path) -> None:
    run = add_analyses(make_run(tmp_path / "dymoe", "dymoe", samples=0), 6, names=["drift"])
    figure = analysis_figures(methods_of(run), "drift")[-1]
    drifts, lost = ([float(row[place].replace("−", "-")) for row in figure.rows] for place in (1, 2))
    shown = re.search(r"dymoe r ([+−]\d\.\d\d), ρ [+−]", figure.caption)
    assert shown
    assert float(shown[1].replace("−", "-")) == pytest.approx(statistics.correlation(drifts, lost), abs=0.02)


def test_activation_sums_experts_and_marks_dead_ones(tmp_path: Path) -> None:
    frame = activation_frame(7, THREE)
    run = make_run(tmp_path / "dymoe", "dymoe", 0, THREE)
    analysis.store(run, "activation", frame, {})
    (figure,) = analysis_figures(methods_of(run), "activation")
    rows = table_of(figure)
    at = frame[(frame["stage"] == 3) & (frame["group"] == "textvqa")]
    for layer in (0, 1):
        here = at[at["layer"] == layer]
        weight = 100 * np.mean([here[here["task"] == task]["weight"].sum() for task in THREE])
        assert rows[("dymoe, stage 3: textvqa",)][layer] == number(weight) + (" ✕1" if layer == 1 else "")
    assert figure.indices(figure.chosen) == "0 2"  # the last stage first
    assert [figure.indices(plot.key) for plot in figure.panels] == ["0 0", "0 1", "0 2"]


def test_a_groups_name_stands_in_the_activation_as_it_is(tmp_path: Path) -> None:
    tasks = ("a & b", "<i>c</i>")
    run = make_run(tmp_path / "dymoe", "dymoe", 0, tasks)
    analysis.store(run, "activation", activation_frame(7, tasks), {})
    (figure,) = analysis_figures(methods_of(run), "activation")
    axis = figure.panels[-1].spec["layout"]["yaxis"]
    assert [html.unescape(text) for text in axis["ticktext"]] == list(tasks)
    assert not any("<" in text for text in axis["ticktext"])


def test_the_overlay_names_group_and_type_of_every_token(tmp_path: Path) -> None:
    run = add_analyses(make_run(tmp_path / "dymoe", "dymoe", 0, THREE), 8, THREE)
    (found,) = analysis_figures(methods_of(run), "overlay")
    assert isinstance(found, Overlay)
    frame = overlay_frame(8, THREE)
    sample = next(one for one in found.panels if "scienceqa-0" in one.title)
    before, after = sample.views
    rows = frame[(frame["sample"] == "scienceqa-0") & (frame["kind"] == "image")]
    last = rows[rows["stage"] == 3].sort_values(["row", "column"])
    first = rows[rows["stage"] == 1].sort_values(["row", "column"])
    assert [token["group"] for token in after.patches] == [str(THREE.index(group) + 1) for group in last["group"]]
    assert [token["title"].split(",")[1].strip() for token in after.patches] == list(last["type"])
    moved = [a != b for a, b in zip(first["group"], last["group"], strict=True)]
    assert ["c" in token["classes"].split() for token in after.patches] == moved
    assert not any("c" in token["classes"].split() for token in before.patches)
    assert (before.rows, before.columns, sample.shape) == (4, 4, 1.0)
    assert [token["text"] for token in before.instruction] == ["What", " is", " this", "?↵", "Name it"]
    assert len(found.pictures) == len(set(found.pictures.values())) == 5  # one sample is text alone
    alone = next(one for one in found.panels if "scienceqa-1" in one.title)
    assert alone.picture == ""
    assert not alone.views[0].patches
    served = last["group"].value_counts()
    row = next(row for row in found.rows if row[0].endswith("scienceqa-0") and row[1] == after.title)
    assert row[2:4] == ("image", "16")
    assert all(f"{count} by {group}" in row[-1] for group, count in served.items())


def test_dynamics_are_means_over_layers_with_the_tasks_one_behind_the_other(tmp_path: Path) -> None:
    frame = dynamics_frame(9, THREE, steps=8)
    run = make_run(tmp_path / "dymoe", "dymoe", 0, THREE)
    analysis.store(run, "dynamics", frame, {})
    types, terms = analysis_figures(methods_of(run), "dynamics")
    here = frame[(frame["task"] == "imagenet") & (frame["step"] == 4)]
    shown = table_of(types)[("dymoe: imagenet", "4")]
    assert shown[0] == number(100 * here["share_new"].mean())
    assert table_of(terms)[("dymoe: imagenet", "4")][-1] == number(here["entropy"].mean(), 3)
    assert [row[1] for row in types.rows] == ["1", "4", "8"] * 3


def test_without_analyses_one_line_names_the_command(tmp_path: Path) -> None:
    run = make_run(tmp_path / "dy moe", "dymoe", 0, THREE)
    parsed = page(tmp_path, run, make_run(tmp_path / "lora", "lora", 0, THREE, routed=False))
    for section in SECTIONS:
        name = {"drift-parts": "drift", "token-types": "dynamics"}.get(section, section)
        text = " ".join(parsed.sections[section].split())
        assert text.endswith(f"Not analysed yet: dymoe. This makes it: dymoe analyze {name} '{run}'")
    assert not {"drift-layers", "drift-changed", "loss-terms"} & set(parsed.sections)


def test_without_a_log_no_command_is_named_that_could_not_work(tmp_path: Path) -> None:
    run = make_run(tmp_path / "dymoe", "dymoe", 0, THREE)
    for log in run.glob("stages/*/dynamics.jsonl"):
        log.unlink()
    text = " ".join(page(tmp_path, run).sections["token-types"].split())
    assert text.endswith("Nothing was logged while dymoe learned (training.dynamics_every).")


def test_with_analyses_the_sections_are_there_and_name_who_lacks_them(tmp_path: Path) -> None:
    run = add_analyses(make_run(tmp_path / "dymoe", "dymoe", 0, THREE), 1, THREE)
    text = page(tmp_path, run, make_run(tmp_path / "other", "incmoelora", 0, THREE)).sections
    assert {*SECTIONS, "drift-layers", "drift-changed", "drift-forgetting", "loss-terms"} <= set(text)
    for section in SECTIONS:
        assert "Not analysed yet: incmoelora." in text[section]
    assert "Not analysed yet" not in " ".join(page(tmp_path, run).sections.values())


def test_methods_that_route_nothing_have_no_routing_sections(tmp_path: Path) -> None:
    parsed = page(tmp_path, make_run(tmp_path / "lora", "lora", 0, THREE, routed=False))
    assert not SECTIONS & set(parsed.sections)


@pytest.mark.parametrize("name", ["drift", "activation", "overlay", "dynamics"])
def test_a_broken_analysis_is_one_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    run = add_analyses(make_run(tmp_path / "dymoe", "dymoe", 0, THREE), 1, THREE)
    file = run / "analysis" / f"{name}.parquet"
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(DymoeError, match=f"{name}.parquet.*`dymoe analyze {name}` again"):
        page(tmp_path, run)


@pytest.mark.parametrize(
    ("picture", "message"),
    [("../0.webp", "no plain file name"), ("0.svg", "no plain file name"), ("99.webp", "no such file")],
)
def test_a_picture_outside_its_folder_is_refused(tmp_path: Path, picture: str, message: str) -> None:
    run = make_run(tmp_path / "dymoe", "dymoe", 0, THREE)
    analysis.store(run, "overlay", overlay_frame(1, THREE).assign(picture=picture), {})
    with pytest.raises(DymoeError, match=message):
        page(tmp_path, run)


def test_a_file_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    run = add_analyses(make_run(tmp_path / "dymoe", "dymoe", 0, THREE), 1, THREE)
    (run / "analysis" / "overlay" / "0.webp").write_text("<svg onload=alert(1)>")
    with pytest.raises(DymoeError, match=r"0\.webp: not a readable picture"):
        page(tmp_path, run)
