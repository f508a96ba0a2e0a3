"""A small learned run that the analyses look at."""

import pytest

from dymoe import analysis
from dymoe.cli import main
from tests.learning.tiny import write_recipe

TASKS = ["ScienceQA", "ImageNet", "VQAv2"]


def learn(folder, model, **changes):
    """A run of three tasks, four steps each."""
    training = {"steps_per_task": 4, "save_steps": 2, "limit": 12, **changes.pop("training", {})}
    recipe = write_recipe(folder / "run.yaml", model, **{"tasks": TASKS, "training": training, **changes})
    assert main(["run", str(recipe)]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def run(tiny_folder, tmp_path_factory):
    # Experts in few layers in some places, so that not every layer has every group.
    return learn(tmp_path_factory.mktemp("analysed"), tiny_folder)


@pytest.fixture(scope="session")
def learned(run):
    return analysis.open_run(run)
