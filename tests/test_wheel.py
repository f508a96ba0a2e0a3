"""The wheel in an empty environment, without the checkout: its recipes by name, and a run."""

import json
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


def tracked():
    """The paths that git tracks, links as such."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [Path(name) for name in listed.split("\0") if name]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of what git tracks, so that nothing else gets into it."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    pip = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*pip, str(copy)], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def scripts(wheel, tmp_path_factory):
    """The commands of a new environment that has this wheel and the lock's versions."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    install = [folder / "bin" / "python", ROOT / "tools" / "install.py"]
    subprocess.run([*install, "--wheel", f"{wheel}[pocket]"], check=True)
    return folder / "bin"


def test_the_wheel_holds_every_recipe_and_all_data_of_the_package(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"dymoe/{path}" for path in tracked() if path.parts[0] == "recipes"}
    wanted |= {str(path.relative_to("src")) for path in tracked() if path.parts[0] == "src" and path.name != "recipes"}
    assert wanted <= held
    assert not {name for name in held if name.startswith(("tests", "recipes"))}


def test_an_empty_environment_lists_and_runs_the_recipes(scripts, tmp_path):
    def dymoe(*words):
        done = subprocess.run([scripts / "dymoe", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "\npocket/dymoe " in dymoe("list", "recipes")
    small = ["--training.steps_per_task", "1", "--training.batch_size", "1", "--evaluation.limit", "1"]
    dymoe("run", "pocket/dymoe", "--tasks", "[ScienceQA, ImageNet]", *small)
    (run,) = (tmp_path / "runs").iterdir()
    assert [len(row) for row in json.loads((run / "results.json").read_text())["matrix"]] == [1, 2]
