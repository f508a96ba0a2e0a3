"""The run that several modules compare theirs with."""

from pathlib import Path

import pytest

from dymoe.cli import main
from tests.learning.tiny import write_recipe


@pytest.fixture(scope="session")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `write_recipe`'s recipe as it is, undisturbed; its recipe stands beside it."""
    path = tmp_path_factory.mktemp("whole")
    assert main(["run", str(write_recipe(path / "run.yaml", tiny_folder))]) == 0
    return path / "run"
