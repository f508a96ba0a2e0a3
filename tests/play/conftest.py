"""Two tiny learned runs that are asked: one that routes its tokens, one that does not."""

import pytest

from dymoe.cli import main
from dymoe.play.ask import Runs
from tests.learning.tiny import write_recipe

TRAINING = {"steps_per_task": 2, "limit": 8}


@pytest.fixture(scope="session")
def folders(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("played")
    write_recipe(folder / "routed.yaml", tiny_folder, training=TRAINING)
    lora = {"method": "lora", "settings": {"rank": 2}, "tasks": ["ImageNet"]}
    text = (folder / "routed.yaml").read_text()
    import yaml

    (folder / "plain.yaml").write_text(
        yaml.safe_dump({**yaml.safe_load(text), **lora, "output": str(folder / "plain")})
    )
    for name in ("routed", "plain"):
        assert main(["run", str(folder / f"{name}.yaml")]) == 0
    return folder / "routed", folder / "plain"


@pytest.fixture(scope="session")
def runs(folders):
    return Runs(folders)
