"""`dymoe analyze`: what it prints and keeps, and one line per mistake."""

import shutil

import pandas as pd
import pytest
import yaml

from dymoe import analysis
from dymoe.analysis.routing_drift import correlation_line
from dymoe.cli import main
from dymoe.files import atomic_json
from dymoe.learning.groups import hashes, save_group, train_group
from dymoe.models import load
from tests.adapter.conftest import small


@pytest.fixture
def copy(run, tmp_path):
    """The run with its last stage unfinished: trained, but not evaluated."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("analysis"))
    return tmp_path / "run"


@pytest.mark.parametrize(
    "name, options, shown",
    [
        ("drift", ["--samples", "1"], "Drift and forgetting: earlier tasks too few, or too alike, to correlate (2)"),
        ("activation", ["--stages", "1,3", "--samples=1"], "What pruning would remove"),
        ("overlay", ["--tasks", "ImageNet", "--samples", "1", "--layer", "0"], "imagenet-test-0000"),
        ("dynamics", [], "new group's weight"),
    ],
)
def test_each_analysis_is_printed_and_kept(copy, name, options, shown, capsys):
    assert main(["analyze", name, str(copy), *options]) == 0
    told = capsys.readouterr().out
    assert shown in told
    assert f"analysis/{name}.parquet" in told.splitlines()[-1]
    frame, facts = analysis.stored(copy, name), analysis.about(copy, name)
    assert len(frame) > 0
    assert facts["command"].startswith(f"dymoe analyze {name} ")
    assert facts["stages"] == 3
    if name in ("drift", "overlay"):
        assert facts["samples"] == 1
    if name == "dynamics":
        pd.testing.assert_frame_equal(frame, analysis.dynamics(copy))
    if name == "overlay":
        assert (copy / "analysis" / "overlay" / frame["picture"][0]).is_file()


def test_an_unfinished_run_works_as_far_as_it_is(copy, capsys):
    first, second, third = sorted((copy / "stages").iterdir())
    shutil.rmtree(third)
    (second / "training.json").unlink()  # at work: it trains, and has written what it does
    (copy / "results.json").unlink()
    assert main(["analyze", "drift", str(copy), "--samples", "1"]) == 0
    assert set(analysis.stored(copy, "drift")["stage"]) == {1}
    assert set(analysis.dynamics(copy)["stage"]) == {1, 2}
    (first / "training.json").unlink()
    assert main(["analyze", "drift", str(copy)]) == 2
    assert "no stage of this run has trained yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["drfit", "RUN"], "analyze: drfit: unknown analysis; did you mean drift?"),
        (["drift"], "analyze drift: expected NAME and RUN, got "),
        (["drift", "nowhere"], "nowhere: no run.yaml here; give a run folder"),
        (["dynamics", "nowhere"], "nowhere: no run.yaml here"),
        (["drift", "RUN", "--samples", "none"], "--samples: expected a whole number of at least 1, got 'none'"),
        (["drift", "RUN", "--stages", "0,1"], "--stages: expected whole numbers from 1"),
        (["drift", "RUN", "--stages", "9"], "stage 9: the run has stages 1 to 3 so far"),
        (["drift", "RUN", "--layer", "1"], "analyze drift: --layer: unknown option"),
        (["overlay", "RUN", "--layer", "x"], "--layer: expected a whole number of at least 0"),
        (["dilemma"], "analyze dilemma: expected NAME and RECIPE, got "),
        (["dilemma", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
    ],
)
def test_a_mistake_is_one_line(run, words, message, capsys):
    assert main(["analyze", *(str(run) if word == "RUN" else word for word in words)]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("dymoe: ")
    assert message in told


def test_runs_that_route_nothing_are_told(copy, tiny_folder, capsys):
    marker = copy / "run.yaml"
    description = yaml.safe_load(marker.read_text())
    lora = {**description["recipe"], "method": "lora", "settings": {}}
    marker.write_text(yaml.safe_dump({**description, "recipe": lora}))
    for folder in (copy / "stages").iterdir():
        shutil.rmtree(folder)
    model = train_group(load(str(tiny_folder), "float32").model, None, "shared", small(gate="uniform"))
    stage = copy / "stages" / "01-ScienceQA"
    save_group(model, "shared", stage / "adapter")
    atomic_json(stage / "training.json", {"group": "shared", "hashes": hashes(model)})
    assert main(["analyze", "drift", str(copy)]) == 2
    assert "method lora routes nothing" in capsys.readouterr().err
    assert main(["analyze", "dynamics", str(copy)]) == 2
    assert "no dynamics were logged" in capsys.readouterr().err
    none = {**description["recipe"], "method": "zero-shot", "settings": {}}
    marker.write_text(yaml.safe_dump({**description, "recipe": none}))
    assert main(["analyze", "activation", str(copy)]) == 2
    assert "method zero-shot has no experts" in capsys.readouterr().err
    marker.write_text("recipe: 7")
    assert main(["analyze", "activation", str(copy)]) == 2
    assert "has no recipe" in capsys.readouterr().err


def test_a_changed_group_is_noticed(copy, capsys):
    record = copy / "stages" / "02-ImageNet" / "training.json"
    record.write_text(
        record.read_text().replace('"hashes": {', '"hashes": {"x": "", ').replace('"ImageNet": "', '"ImageNet": "0')
    )
    assert main(["analyze", "drift", str(copy)]) == 2
    assert "expert group 'ImageNet' is not the one saved (hash differs)" in capsys.readouterr().err


def test_the_line_about_correlation():
    line = correlation_line({"tasks": 7, "pearson": 0.5, "spearman": -0.25})
    assert line == "Drift and forgetting over 7 earlier tasks: Pearson 0.50, Spearman -0.25"
