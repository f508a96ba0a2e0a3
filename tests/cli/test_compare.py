"""`dymoe compare` and the intervals of `dymoe show`, from results as runs and sweeps leave them."""

import json

import pytest

from dymoe.cli import main
from dymoe.evaluation.intervals import Answers, compare
from dymoe.learning.formats import write_results
from tests.methods.test_matrix import Quiet, recipe


def results(scores, seed=0, **values):
    """results.json of one task with these scores."""
    accuracy = 100 * sum(scores) / len(scores)
    return {
        **{"method": "dymoe", "stream": "pocket-coin", "seed": seed, "tasks": ["GQA"], "matrix": [[accuracy]]},
        **{"name": "run", "metrics": {"MFT": accuracy, "MFN": accuracy}},
        "answers": {"GQA": {"questions": "abc", "scores": [scores]}},
        **values,
    }


@pytest.fixture
def written(tmp_path):
    def write(name, value):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(value))
        return str(folder)

    return write


def test_a_run_leaves_what_a_comparison_needs(tiny_folder, tmp_path, capsys):
    from dymoe.learning.run import run

    one = run(recipe(tmp_path / "one", tiny_folder, "dymoe", None), display=Quiet())
    held = json.loads((one / "results.json").read_text())
    runs = Answers.of(held, "one")
    assert runs.staged
    for place, task in enumerate(held["tasks"]):
        means = [100 * sum(row) / len(row) for row in held["answers"][task]["scores"]]
        assert means == pytest.approx([row[place] for row in held["matrix"][place:]])
    capsys.readouterr()
    assert main(["compare", str(one), str(one)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("not told apart") == len(compare([runs], [runs])) == 5
    assert main(["show", str(one)]) == 0
    assert f"MFN {runs_interval(runs)}" in capsys.readouterr().out


def runs_interval(run):
    from dymoe.evaluation.intervals import metrics

    return metrics([run])["MFN"].text()


def test_a_row_of_a_sweep_beside_runs_by_pattern(written, tmp_path, capsys):
    for seed in (0, 1):
        written(f"mine-{seed}", results([1, 1, 1, 1, 1, 1, 0, 0] * 8, seed))
    rows = [
        {
            **results([0, 0, 0, 0, 0, 0, 1, 1] * 8, seed),
            **{"label": "lora", "order": "origin", "instructions": "original", "fingerprint": "x"},
            **{"trainable_parameters": 1, "stored_parameters": 1, "recipe": {"training": {"lr": 0.1}}},
        }
        for seed in (0, 1, 2)
    ]
    write_results(tmp_path / "board.jsonl", {"about": {}}, rows)
    assert main(["compare", str(tmp_path / "mine-*"), f"{tmp_path / 'board.jsonl'}:lora"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "1 tasks, 64 questions each, seeds 0, 1" in lines
    (line,) = (line for line in lines if line.startswith("MFN"))
    assert line.split()[1] == "75.0"
    assert line.endswith("more")
    assert main(["compare", f"{tmp_path / 'board.jsonl'}:lroa", str(tmp_path / "mine-0")]) == 2
    assert "has no row 'lroa'; did you mean lora?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answers": {}}, "holds no scores of single questions"),
        ({"answers": {"GQA": {"questions": "other", "scores": [[1, 0]]}}}, "task 'GQA': other questions were asked"),
        ({"seed": 7}, "no seed in common"),
        ({"answers": {"GQA": {"questions": "abc", "scores": [[2]]}}}, "answers.GQA.scores.1.1: expected"),
    ],
)
def test_what_cannot_be_compared_is_one_line(written, capsys, change, message):
    one, other = written("one", results([1, 0])), written("other", results([1, 0], **change))
    assert main(["compare", one, other]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_two_runs_of_one_seed_and_too_few_names_are_refused(written, tmp_path, capsys):
    written("a-0", results([1, 0]))
    written("a-1", results([1, 0]))
    assert main(["compare", str(tmp_path / "a-*"), str(tmp_path / "a-0")]) == 2
    assert "names several runs of one seed" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "a-0")]) == 2
    assert "compare: expected A and B, got " in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "gone"), str(tmp_path / "a-0")]) == 2
    assert "no results.json" in capsys.readouterr().err
