"""What a base model is: the same wherever its folder lies, another with one bit of it; of the Hub at one commit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dymoe.cli import main
from dymoe.errors import DymoeError
from dymoe.models import load
from dymoe.models.identity import identity
from tests.learning.tiny import write_recipe

HUB = "owner/tiny"
OLD, NEW = "a" * 40, "b" * 40


def test_a_folder_is_what_is_read_of_it(tiny_folder, tmp_path):
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    whole = identity(str(tiny_folder))
    assert identity(str(model)) == whole
    (model / "README.md").write_text("notes")
    (model / "model.safetensors").touch()
    assert identity(str(model)) == whole
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        kept = (model / name).read_bytes()
        (model / name).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        assert identity(str(model)) != whole
        (model / name).write_bytes(kept)
    (model / "chat_template.jinja").unlink()
    assert identity(str(model)) != whole


@pytest.fixture
def hub(tiny_folder, tmp_path, monkeypatch):
    """The client's cache with two commits of a model; the newer one, `main`, has other weights."""
    room = tmp_path / "hub" / "models--owner--tiny"
    for commit in (OLD, NEW):
        shutil.copytree(tiny_folder, room / "snapshots" / commit)
    weights = room / "snapshots" / NEW / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    (room / "refs").mkdir()
    (room / "refs" / "main").write_text(OLD)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return room


def weight(**how) -> torch.Tensor:
    return load(HUB, "float32", **how).model.get_input_embeddings().weight


def test_a_hub_model_is_loaded_at_its_commit(hub, tmp_path):
    assert identity(HUB) == identity(HUB, cache_dir=tmp_path / "hub") == {"commit": OLD}
    old = weight()
    (hub / "refs" / "main").write_text(NEW)
    assert identity(HUB) == {"commit": NEW}
    assert identity(HUB, revision=OLD) == {"commit": OLD}
    assert torch.equal(weight(revision=OLD), old)
    assert torch.equal(weight(), old + 1)
    with pytest.raises(DymoeError, match=r"model 'owner/none': cannot be .*give 'pocket', a folder or a Hub id"):
        load("owner/none")


def test_a_run_stays_with_its_commit(hub, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "run.yaml", Path(HUB), tasks=["ImageNet"], training={"steps_per_task": 2})
    assert main(["run", str(recipe)]) == 0
    described = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert described["base"] == {"commit": OLD}
    hashes = json.loads((tmp_path / "run" / "results.json").read_text())["group_hashes"]
    (hub / "refs" / "main").write_text(NEW)
    shutil.rmtree(tmp_path / "run" / "stages")
    assert main(["run", str(recipe), "--resume"]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["group_hashes"] == hashes
    assert main(["analyze", "drift", str(tmp_path / "run"), "--samples", "1"]) == 0
    shutil.rmtree(hub / "snapshots" / OLD)
    shutil.rmtree(tmp_path / "run" / "stages")
    assert main(["run", str(recipe), "--resume"]) == 2
    assert f"model 'owner/tiny' at {OLD}: cannot be fetched from the Hub" in capsys.readouterr().err


def test_another_base_is_refused_wherever_the_run_is_used(tiny_folder, tmp_path, capsys):
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    recipe = write_recipe(tmp_path / "run.yaml", model, training={"steps_per_task": 2})
    assert main(["run", str(recipe)]) == 0
    weights = model / "model.safetensors"
    save_file({name: value * 2 for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    shutil.rmtree(tmp_path / "run" / "stages" / "02-VQAv2")
    assert main(["run", str(recipe), "--resume"]) == 2
    assert "(base): base sha256 is" in capsys.readouterr().err
    assert main(["analyze", "drift", str(tmp_path / "run")]) == 2
    assert "its base model" in capsys.readouterr().err
    assert main(["run", str(recipe), "--resume", "--accept", "base"]) == 0
    (entry,) = json.loads((tmp_path / "run" / "results.json").read_text())["accepted"]
    assert (entry["part"], entry["stage"]) == ("base", 2)
