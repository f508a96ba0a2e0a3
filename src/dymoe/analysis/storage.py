"""Analyses on disk: RUN/analysis/NAME.parquet, with how they were made in the file's own metadata."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dymoe.errors import DymoeError
from dymoe.files import atomic_write, read_bytes
from dymoe.messages import nearest

if TYPE_CHECKING:
    import pandas as pd

POSITION = ("task", "stage", "layer", "projection")
COLUMNS: dict[str, tuple[str, ...]] = {
    "drift": (*POSITION, "part", "group", "weight", "tokens", "changed"),
    "activation": (*POSITION, "group", "expert", "weight", "active", "top"),
    "overlay": (
        *("task", "sample", "picture", "stage", "layer", "projection", "position", "kind", "text", "row", "column"),
        *("type", "group", "weight"),
    ),
    "dynamics": (
        *("task", "stage", "step", "layer", "projection", "share_new", "share_ambiguous", "share_old"),
        *("new_group_weight", "entropy", "load_balance", "exclusivity", "specialization"),
    ),
    "dilemma": (
        *("pair", "seed", "strategy", "new_task_accuracy", "old_task_before", "old_task_after", "forgetting", "drift"),
    ),
}
KEY = b"dymoe"  # of the metadata


def joined(name: str, frames: "Sequence[pd.DataFrame]") -> "pd.DataFrame":
    """The parts of an analysis as one frame, its columns in their order."""
    import pandas as pd

    columns = [*COLUMNS[name]]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def file_of(run: str | Path, name: str) -> Path:
    """Where an analysis of a run is kept.

    Raises:
        DymoeError: there is no such analysis.
    """
    if name not in COLUMNS:
        raise DymoeError(f"analyze: {name}: unknown analysis; {nearest(name, COLUMNS)}")
    return Path(run) / "analysis" / f"{name}.parquet"


def store(run: str | Path, name: str, frame: "pd.DataFrame", facts: Mapping[str, Any]) -> Path:
    """Write a frame to RUN/analysis/NAME.parquet, atomically.

    Args:
        run: the run folder (of a sweep: its output folder).
        name: the analysis.
        frame: its columns are those of `COLUMNS`, in any order.
        facts: how it was made, of what JSON can hold; versions are added.

    Raises:
        DymoeError: an unknown analysis, or the file cannot be written.
        ValueError: a column is missing or there is one too many.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = file_of(run, name)
    if set(frame.columns) != set(COLUMNS[name]):
        raise ValueError(f"{name}: expected the columns {COLUMNS[name]}, got {tuple(frame.columns)}")
    from dymoe.learning.conditions import versions

    table = pa.Table.from_pandas(frame[[*COLUMNS[name]]], preserve_index=False)
    described = json.dumps({"analysis": name, **facts, "versions": versions()}, ensure_ascii=False).encode()
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), KEY: described}), buffer)
    atomic_write(file, buffer.getvalue())
    return file


def stored(run: str | Path, name: str) -> "pd.DataFrame | None":
    """The frame that `store` wrote, with how it was made in its `attrs`; None where the run has none.

    Raises:
        DymoeError: an unknown analysis, a file that is broken, or one that holds something else.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = file_of(run, name)
    if not file.is_file():
        return None
    again = f"run `dymoe analyze {name}` again"
    try:
        table = pq.read_table(io.BytesIO(read_bytes(file)))
    except (pa.ArrowException, OSError) as error:
        raise DymoeError(f"{file}: not a readable parquet file ({' '.join(str(error).split())}); {again}") from None
    try:
        facts = json.loads((table.schema.metadata or {}).get(KEY, b"{}"))
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or facts.get("analysis") != name or tuple(table.column_names) != COLUMNS[name]:
        raise DymoeError(f"{file}: holds no {name} analysis of dymoe; {again}")
    frame = table.to_pandas()
    frame.attrs = facts
    return frame


def about(run: str | Path, name: str) -> dict[str, Any] | None:
    """How a kept analysis was made: stages, samples, seed, versions, command; None where there is none.

    Raises:
        DymoeError: as `stored`.
    """
    frame = stored(run, name)
    return None if frame is None else {str(key): value for key, value in frame.attrs.items()}
