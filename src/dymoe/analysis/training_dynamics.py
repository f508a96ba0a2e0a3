"""How routing changed while a run learned, from what its trainer wrote down."""

import re
from pathlib import Path

import pandas as pd

from dymoe.adapter.trace import place_of
from dymoe.analysis.storage import COLUMNS
from dymoe.errors import DymoeError
from dymoe.learning.dynamics import lines
from dymoe.learning.folder import StageFolder

FOLDER = re.compile(r"(\d+)-(.+)")


def dynamics(run: str | Path) -> pd.DataFrame:
    """Token types, routing weights and loss terms of every layer over the steps of every task.

    Nothing is computed: the trainer writes a line every `training.dynamics_every` steps into the stage's
    dynamics.jsonl. A run that is at work can be read at any moment.

    Args:
        run: a run folder.

    Returns:
        One row per stage, step and wrapped layer; columns as in docs/analysis.md. Without rows where nothing was
        written: the gate has no scores, or `training.dynamics_every` is 0.

    Raises:
        DymoeError: it is no run folder, or a line is broken.
    """
    path = Path(run)
    if not (path / "run.yaml").is_file():
        raise DymoeError(f"{path}: no run.yaml here; give a run folder, as `dymoe run` makes it")
    rows = []
    for folder in sorted((path / "stages").glob("*-*")):
        named = FOLDER.fullmatch(folder.name)
        for line in lines(StageFolder(folder).dynamics) if named else ():
            for name, values in line["layers"].items():
                layer, projection = place_of(name)
                place = {"task": named[2], "stage": int(named[1]), "step": line["step"]}  # type: ignore[index]
                found = dict(zip(line["values"], values, strict=True))
                rows.append({**place, "layer": layer, "projection": projection, **found})
    return pd.DataFrame(rows, columns=[*COLUMNS["dynamics"]])
