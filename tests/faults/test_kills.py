"""Killed at any change of its folder, a run goes on and ends bit for bit as if nothing had happened: every method."""

import random
from pathlib import Path

import pytest

from dymoe.learning.run import run
from tests.faults.kill import Killed, run_child
from tests.methods.test_matrix import CASES, Quiet, recipe, same_run

pytestmark = pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="kills need a forked child")
KILLS = 2  # in a row, of one run
FEW = [("dymoe", None), ("same", None)]  # in the default suite


def killed_and_resumed(tiny_folder: Path, folder: Path, method: str, plugin: str | None, seed: int) -> None:
    """Learn once undisturbed and once with kills at random changes; both must end the same."""
    whole = recipe(folder / "whole", tiny_folder, method, plugin, save_steps=2)
    changes = run_child(lambda: run(whole, display=Quiet()), folder / "whole")
    assert changes > 50  # or the hook does not see what it should
    settings = recipe(folder / "run", tiny_folder, method, plugin, save_steps=2)
    dice = random.Random(f"{seed}/{method}/{plugin}")
    for _ in range(KILLS):
        try:
            run_child(lambda: run(settings, resume=True, display=Quiet()), folder / "run", dice.randint(1, changes))
        except Killed:
            continue
    run_child(lambda: run(settings, resume=True, display=Quiet()), folder / "run")
    same_run(folder / "run", folder / "whole")
    left = [path for path in (folder / "run").rglob("*") if "dymoe-tmp" in path.name or path.name == "trainer"]
    assert not left


@pytest.mark.parametrize("method, plugin", FEW)
def test_a_killed_run_ends_the_same(tiny_folder, tmp_path, method, plugin):
    killed_and_resumed(tiny_folder, tmp_path, method, plugin, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("method, plugin", CASES)
def test_every_method_killed_at_random_changes_ends_the_same(tiny_folder, tmp_path, method, plugin, seed):
    killed_and_resumed(tiny_folder, tmp_path, method, plugin, seed)


@pytest.mark.slow
def test_killed_at_every_change_of_a_run(tiny_folder, tmp_path):
    """One run, one kill before each of its changes in turn."""
    whole = recipe(tmp_path / "whole", tiny_folder, "dymoe", None, save_steps=2)
    changes = run_child(lambda: run(whole, display=Quiet()), tmp_path / "whole")
    for place in range(1, changes + 1):
        folder = tmp_path / f"run-{place}"
        settings = recipe(folder, tiny_folder, "dymoe", None, save_steps=2)
        try:
            run_child(lambda: run(settings, resume=True, display=Quiet()), folder, place)  # noqa: B023
        except Killed:
            run_child(lambda: run(settings, resume=True, display=Quiet()), folder)  # noqa: B023
        same_run(folder, tmp_path / "whole")
