"""Routing drift against single samples without batches, padding or shared models."""

import shutil
import statistics
from collections import defaultdict

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from dymoe import analysis
from dymoe.adapter import group_hash
from dymoe.analysis.routing_drift import correlation, drift_and_forgetting, drift_by_task
from dymoe.files import atomic_json, read_json
from dymoe.learning.groups import load_group
from dymoe.models import load
from tests.analysis.conftest import TASKS
from tests.analysis.oracle import EXPERTS, close, place, sample_routing, task_samples

KEYS = ["task", "stage", "layer", "projection", "part", "group"]


@pytest.fixture(scope="module")
def frame(learned):
    return analysis.drift(learned)


def expected_rows(learned, run):
    """Every number of the frame with loops over samples and tokens."""
    weight, changed, tokens = defaultdict(float), defaultdict(float), defaultdict(int)
    for own, task in enumerate(TASKS, start=1):
        for stage in range(own, 4):
            for sample in task_samples(learned, task):
                parts, found = sample_routing(run, stage, sample)
                _, before = sample_routing(run, own, sample)
                for name, (_, rows) in found.items():
                    for part, row, old in zip(parts, rows, before[name][1], strict=True):
                        key = (task, stage, *place(name), part)
                        tokens[key] += 1
                        changed[key] += row.index(max(row)) != old.index(max(old))
                        for number, group in enumerate(TASKS[:stage]):
                            weight[*key, group] += sum(row[number * EXPERTS : (number + 1) * EXPERTS])
    return {
        (*key, group): (total / tokens[key], tokens[key], changed[key] / tokens[key])
        for (*key, group), total in weight.items()
        for key in [tuple(key)]
    }


def test_every_number_is_that_of_single_samples(frame, learned, run):
    expected = expected_rows(learned, run)
    found = {tuple(row[key] for key in KEYS): row for row in frame.to_dict("records")}
    assert set(found) == set(expected)
    assert len({row["changed"] for row in found.values()}) > 5, "nothing moved: the comparison says nothing"
    rows = [(found[key], *values) for key, values in expected.items()]
    assert all(row["tokens"] == tokens for row, _, tokens, _ in rows)
    for column, place_of_it in (("weight", 1), ("changed", 3)):
        close([row[0][column] for row in rows], [row[place_of_it] for row in rows], [row[2] for row in rows])


def test_at_its_own_stage_nothing_changed_and_weights_sum_to_one(frame):
    own = {task: stage for stage, task in enumerate(TASKS, start=1)}
    at_home = frame[frame["stage"] == frame["task"].map(own)]
    assert (at_home["changed"] == 0).all()
    sums = frame.groupby(KEYS[:-1])["weight"].sum()
    assert sums.to_numpy() == pytest.approx(1, abs=1e-5)


def test_fewer_samples_and_stages(learned, frame):
    few = analysis.drift(learned, samples=1, stages=[3])
    assert set(few["stage"]) == {3}
    assert few["tokens"].sum() < frame[frame["stage"] == 3]["tokens"].sum()
    whole = frame[frame["stage"] == 3].reset_index(drop=True)
    pd.testing.assert_frame_equal(analysis.drift(learned, stages=[3]), whole)


def test_the_drift_of_a_task_is_the_weight_on_later_groups(frame, learned, run):
    found = drift_by_task(frame).set_index(["task", "stage"])
    assert list(found.index) == [(task, stage) for own, task in enumerate(TASKS, 1) for stage in range(own, 4)]
    parts = [sample_routing(run, 3, sample) for sample in task_samples(learned, "ImageNet")]
    by_layer = [
        statistics.fmean(sum(row[2 * EXPERTS :]) for _, layers in parts for row in layers[name][1])
        for name in parts[0][1]
    ]
    assert found.loc[("ImageNet", 3), "drift"] == pytest.approx(statistics.fmean(by_layer), abs=1e-4)
    assert found.loc[("VQAv2", 3), "drift"] == 0


def ranks(values):
    return [
        statistics.fmean([sorted(values).index(v) + 1, len(values) - sorted(values)[::-1].index(v)]) for v in values
    ]


def test_correlation():
    drifts, lost = [0.5, 0.1, 0.3, 0.3], [9.0, 1.0, 8.0, -2.0]
    found = correlation(pd.DataFrame({"drift": drifts, "forgetting": lost}))
    assert found["tasks"] == 4
    assert found["pearson"] == pytest.approx(statistics.correlation(drifts, lost))
    assert found["spearman"] == pytest.approx(statistics.correlation(ranks(drifts), ranks(lost)))
    for few in (
        pd.DataFrame({"drift": [0.1, 0.2], "forgetting": [1.0, 2.0]}),
        pd.DataFrame({"drift": [0.1] * 4, "forgetting": lost}),
    ):
        assert correlation(few)["pearson"] is None


def test_forgetting_stands_beside_the_drift_of_the_last_finished_stage(frame, tmp_path):
    matrix = [[50.0], [40.0, 30.0], [20.0, 30.0, 10.0]]
    results = {"name": "r", "method": "dymoe", "stream": "s", "seed": 0, "tasks": TASKS}
    atomic_json(tmp_path / "results.json", {**results, "matrix": matrix})
    found = drift_and_forgetting(tmp_path, frame)
    assert list(found["task"]) == TASKS[:2]
    assert list(found["forgetting"]) == [30.0, 0.0]
    atomic_json(tmp_path / "results.json", {**results, "matrix": matrix[:2]})
    found = drift_and_forgetting(tmp_path, frame)  # the third stage has trained and is not evaluated yet
    assert found[["task", "stage", "forgetting"]].to_numpy().tolist() == [["ScienceQA", 2, 10.0]]
    assert drift_and_forgetting(tmp_path / "nothing", frame).empty


def test_a_group_that_two_stages_trained_is_what_each_of_them_left(run, tmp_path, tiny_folder):
    shutil.copytree(run, tmp_path / "run")
    first, second, third = sorted((tmp_path / "run" / "stages").iterdir())
    shutil.rmtree(third)
    shutil.rmtree(second / "adapter")
    shutil.copytree(first / "adapter", second / "adapter")
    file = second / "adapter" / "adapter_model.safetensors"
    save_file({name: value + 0.5 for name, value in load_file(file).items()}, file)
    changed = load_group(load(str(tiny_folder), "float32").model, None, "ScienceQA", second / "adapter")
    record = read_json(second / "training.json")
    hashes = [read_json(first / "training.json")["hashes"]["ScienceQA"], group_hash(changed, "ScienceQA")]
    atomic_json(second / "training.json", {**record, "group": "ScienceQA", "hashes": {"ScienceQA": hashes[1]}})
    learned = analysis.open_run(tmp_path / "run")
    for stage in (2, 1, 2):
        assert learned.activate(stage) == ("ScienceQA",)
        assert group_hash(learned.model, "ScienceQA") == hashes[stage - 1]
    assert not any(parameter.requires_grad for parameter in learned.model.parameters())
    assert torch.is_grad_enabled()
