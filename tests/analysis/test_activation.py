"""How much each expert is used, against single samples; dead experts and pruning against plain definitions."""

import statistics

import pandas as pd
import pytest

from dymoe import analysis
from dymoe.methods.pruning import keep
from tests.analysis.conftest import TASKS
from tests.analysis.oracle import EXPERTS, close, place, sample_routing, task_samples


@pytest.fixture(scope="module")
def frame(learned):
    return analysis.activation(learned)


def test_every_number_is_that_of_single_samples(frame, learned, run):
    rows = frame.set_index(["task", "stage", "layer", "projection", "group", "expert"]).sort_index()
    pairs = [(task, stage) for own, task in enumerate(TASKS, 1) for stage in range(own, 4)]
    assert len(rows) == sum(stage * EXPERTS * 14 for _, stage in pairs)
    found, expected, counts = [], [], []
    for task, stage in pairs:
        singles = [sample_routing(run, stage, sample)[1] for sample in task_samples(learned, task)]
        for name in singles[0]:
            tokens = [row for layers in singles for row in layers[name][1]]
            for column in range(stage * EXPERTS):
                values = [row[column] for row in tokens]
                row = rows.loc[(task, stage, *place(name), TASKS[column // EXPERTS], column % EXPERTS)]
                found += [row["weight"], row["active"], row["top"]]
                top = statistics.fmean(row.index(max(row)) == column for row in tokens)
                expected += [statistics.fmean(values), statistics.fmean(v > 0 for v in values), top]
                counts += [len(tokens)] * 3
    close(found, expected, counts)


def made(rows):
    columns = ["task", "stage", "layer", "projection", "group", "expert", "weight"]
    return pd.DataFrame([dict(zip(columns, row, strict=True)) for row in rows]).assign(active=0.0, top=0.0)


def test_an_expert_is_dead_if_no_task_uses_it():
    frame = made(
        [
            ("a", 1, 0, "q", "a", 0, 0.0),
            ("a", 1, 0, "q", "a", 1, 1.0),
            *[("a", 2, 0, "q", "a", e, w) for e, w in ((0, 0.0), (1, 0.0002))],
            *[("b", 2, 0, "q", "a", e, w) for e, w in ((0, 0.6), (1, 0.0005))],
        ]
    )
    assert analysis.dead(frame, 1)["expert"].tolist() == [0]
    last = analysis.dead(frame)
    assert last[["expert", "weight"]].to_numpy().tolist() == [[1, 0.0005]]
    assert analysis.dead(frame, below=0.0001).empty


def test_pruning_removes_by_the_plugins_criterion(frame):
    for share in (1 / 8, 1 / 4, 1 / 2):
        gone = analysis.pruned(frame, share)
        for stage, group in enumerate(TASKS, start=1):
            own = frame[(frame["stage"] == stage) & (frame["task"] == group) & (frame["group"] == group)]
            for key, part in own.groupby(["layer", "projection"]):
                kept = keep(part.sort_values("expert")["weight"].tolist(), share)
                removed = gone[(gone["group"] == group) & (gone["layer"] == key[0]) & (gone["projection"] == key[1])]
                assert sorted({*range(EXPERTS)} - {*removed["expert"]}) == kept
    shares = analysis.pruned_share(frame, 1 / 4).set_index("group")
    assert (shares["experts"] == 14).all()
    assert (shares["of"] == 14 * EXPERTS).all()
    own = frame[(frame["stage"] == 2) & (frame["task"] == "ImageNet") & (frame["group"] == "ImageNet")]
    lowest = [part["weight"].min() for _, part in own.groupby(["layer", "projection"])]
    assert shares.loc["ImageNet", "weight"] == pytest.approx(statistics.fmean(lowest))
    assert shares.loc["ImageNet", "group_weight"] == pytest.approx(own["weight"].sum() / 14)


def test_pruning_says_nothing_about_groups_whose_own_stage_is_missing(frame):
    assert analysis.pruned(frame[frame["stage"] == 3], 1 / 4).empty
    later = frame[frame["stage"].isin([1, 3])]
    assert set(analysis.pruned(later, 1 / 4)["group"]) == {"ScienceQA"}
    assert analysis.pruned_share(frame, 1 / 8)["experts"].tolist() == [0, 0, 0]
