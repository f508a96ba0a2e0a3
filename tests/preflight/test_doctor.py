"""`dymoe doctor`: each thing that can be wrong in a tree is found, named, and the exit code says so."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dymoe import DymoeError
from dymoe.cli import main
from dymoe.learning.learner import Substitute
from dymoe.learning.recipe import load_recipe
from dymoe.learning.run import run
from dymoe.models import load
from dymoe.preflight.doctor import check
from dymoe.preflight.findings import Checkup
from dymoe.tasks import Stream, load_stream
from tests.learning.tiny import save_tiny, write_recipe
from tests.tasks import coin_tree


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYMOE_CACHE", str(tmp_path / "cache"))


def coin(tmp_path: Path, tiny: Path, **data: Any) -> Path:
    root = coin_tree.build(tmp_path / "tree", "release", trained=6, tested=3, tasks=("ImageNet", "ScienceQA"))
    told = {"root": str(root), "validation_share": 0, **data}
    return write_recipe(tmp_path / "r.yaml", tiny, stream="coin", tasks=["ScienceQA", "ImageNet"], data=told)


def wrong(found: Checkup) -> set[tuple[str, str]]:
    return {(finding.what, finding.where) for finding in found.findings if finding.level == "wrong"}


def test_a_good_tree_has_notes_alone(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = coin(tmp_path, tiny)
    assert main(["doctor", str(recipe), "--json", "--samples", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    sizes = [row for row in found["findings"] if row["what"] == "size"]
    assert {row["level"] for row in sizes} == {"note"}
    assert any("6 train records, 129,833 are published" in row["result"] for row in sizes)
    assert [row["task"] for row in found["tasks"]] == ["ScienceQA", "ImageNet"]
    assert all(row["tokens_longest"] >= row["tokens_mean"] > 0 and row["hours"] > 0 for row in found["tasks"])
    assert found["fits"] == [{"recipe": str(recipe), "bytes": found["fits"][0]["bytes"], "fits": True}]


def test_what_is_wrong_is_found_and_named(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = coin(tmp_path, tiny, scoring="coin")
    tree = tmp_path / "tree"
    images = tree / "cl_dataset"
    file = tree / "Instruction_Original/ImageNet/train.json"
    asked = tree / "Instruction_Original/ImageNet/test.json"
    records, tests = coin_tree.load(file), coin_tree.load(asked)
    broken = images / records[0]["image"]
    broken.write_bytes(broken.read_bytes()[:40])
    # The second test question again, as a training record.
    records[2] |= {
        "image": tests[1]["image"],
        "conversations": [{"from": "human", "value": f"<image>\n{tests[1]['text']}"}, {"from": "gpt", "value": "cat"}],
    }
    coin_tree.save(file, records)
    found = check(load_recipe(recipe, ["--model_options.max_length", "40"]), str(recipe))
    assert {("pictures", "ImageNet"), ("train in test", "ImageNet"), ("tokens", "ScienceQA")} <= wrong(found)
    assert {("size", "ImageNet"), ("size", "ScienceQA")} <= wrong(found)  # CoIN's numbers are wanted
    told = {finding.what: finding for finding in found.findings if finding.level == "wrong"}
    assert "1 of" in told["pictures"].result
    assert all(finding.mend for finding in told.values())
    assert main(["doctor", str(recipe)]) == 1
    assert " wrong, " in capsys.readouterr().out


def test_a_missing_picture_file_and_model_are_wrong(tmp_path: Path, tiny: Path) -> None:
    recipe = load_recipe(coin(tmp_path, tiny))
    records = coin_tree.load(tmp_path / "tree/Instruction_Original/ImageNet/train.json")
    (tmp_path / "tree/cl_dataset" / records[0]["image"]).unlink()
    found = check(recipe)
    assert any(what == "records" and "ImageNet" in where for what, where in wrong(found))
    recipe = load_recipe("recipes/coin/dymoe.yaml", ["--data.root", str(tmp_path / "nowhere")])
    assert {("folders", "data.root"), ("model", "./models/llava-7b-base")} <= wrong(check(recipe))


def test_the_pocket_stream(tmp_path: Path, tiny: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tiny, tasks=["ImageNet"]))
    found = check(recipe, samples=3)
    assert {finding.what for finding in found.findings} >= {
        "records",
        "pictures",
        "tokens",
        "memory",
        "disk",
        "packages",
    }
    assert not {what for what, _ in wrong(found)} - {"train in test"}


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "recipes/coin/dymoe.yaml", "--samples", "no"]) == 2
    assert "--samples: expected a whole number" in capsys.readouterr().err
    assert main(["doctor", "--all"]) == 2


def test_a_task_that_has_the_name_of_a_part_of_the_model_is_found_before_anything_is_trained(
    tmp_path: Path, tiny: Path
) -> None:
    shipped = load_stream("pocket-coin", tasks=["ImageNet"]).tasks[0]
    stream = Stream("mine", (replace(shipped, name="birds"), replace(shipped, name="mlp")))
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tiny))
    with pytest.raises(DymoeError, match=r"task of stream 'mine': 'mlp': it is a part of the model's own names"):
        run(recipe, substitute=Substitute(stream, load(str(tiny), "float32"), 0))
    assert not (tmp_path / "r/stages/01-birds/adapter").exists()
    tree = tmp_path / "tree"
    coin_tree.save(tree / "train.json", coin_tree.train("VQAv2", 6, tree))
    coin_tree.save(tree / "test.json", coin_tree.asked_records("ImageNet", 3, tree, "original"))
    (tree / "mine.yaml").write_text("tasks:\n  mlp: {train: train.json, test: test.json}\n")
    found = check(load_recipe(write_recipe(tmp_path / "s.yaml", tiny, stream=str(tree / "mine.yaml"), tasks=None)))
    assert ("names", "mine") in wrong(found)
