"""The recipes that come with dymoe, by name: `pocket/dymoe` is the file pocket/dymoe.yaml of this package's `recipes`.

In a checkout that folder is a link to `recipes/` at the root; a wheel holds the files themselves.
"""

import os
from pathlib import Path

from dymoe.messages import nearest

FOLDER = (Path(__file__).parents[1] / "recipes").resolve()
LAUNCHER = "accelerate"  # holds configs of `accelerate launch`, which are no recipes


def shipped() -> dict[str, Path]:
    """Every recipe and sweep that comes with dymoe, by name; in its checkout by relative paths, the same everywhere."""
    folder = FOLDER.relative_to(Path.cwd()) if FOLDER.is_relative_to(Path.cwd()) else FOLDER
    files = sorted(path for path in folder.rglob("*.yaml") if path.parent.name != LAUNCHER)
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def locate(name: str | Path, folder: Path = Path()) -> Path:
    """The file that a recipe's or sweep's name stands for: one below `folder`, else one that comes with dymoe.

    What is neither is given back as a path in `folder`, for the message of whoever opens it.
    """
    path = folder / name
    return path if os.path.isfile(path) else shipped().get(str(name), path)


def suggestion(path: Path) -> str:
    """The nearest recipes to one that is not there: those of its folder, else those that come with dymoe."""
    files = sorted(str(file) for file in path.parent.glob("*.y*ml")) if os.path.isdir(path.parent) else []
    return nearest(str(path), files or list(shipped()))
