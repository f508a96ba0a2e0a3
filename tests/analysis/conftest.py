"""A small learned run that the analyses look at."""

import pytest

from dymoe import analysis
from dymoe.cli import main
from tests.learning.tiny import write_recipe

TASKS = ["ScienceQA", "ImageNet", "VQAv2"]


def recipe_at(folder, model, **changes):
    """A recipe of three tasks, four steps each, a line of dynamics for every step."""
    training = {"steps_per_task": 4, "save_steps": 2, "limit": 12, "dynamics_every": 1, **changes.pop("training", {})}
    evaluation = {"limit": 3, "batch_size": 2}
    return write_recipe(
        folder / "run.yaml", model, **{"tasks": TASKS, "training": training, "evaluation": evaluation, **changes}
    )


@pytest.fixture(scope="session")
def run(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysed")
    # Few of many experts a token, so that some have no weight; a temperature at which several share it.
    settings = {"num_experts": 4, "rank": 2, "top_k": 3, "temperature": 0.1}
    assert main(["run", str(recipe_at(folder, tiny_folder, settings=settings))]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def learned(run):
    return analysis.open_run(run)
