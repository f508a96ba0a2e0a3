"""Reading the records of a parquet file, each one checked; an error names the file and the record."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dymoe.errors import DymoeError
from dymoe.images import decode
from dymoe.tasks.base import Sample
from dymoe.tasks.recordfile import read_records
from dymoe.tasks.scoring import Scorer, scorer

COLUMNS = ("id", "image", "question", "answer", "reference", "split")


def read_table(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a parquet file with the columns `COLUMNS`.

    Raises:
        DymoeError: the file is missing, is no parquet file, lacks a column, or has no rows.
    """
    rows = list(read_records(Path(path)))
    if not rows:
        raise DymoeError(f"{path}: the task is empty; it must hold at least one record")
    missing = [name for name in COLUMNS if name not in rows[0]]
    if missing:
        raise DymoeError(f"{path}: column {missing[0]!r} is missing; needed are {', '.join(COLUMNS)}")
    return rows


def samples(
    path: str | Path,
    rows: Iterable[Mapping[str, Any]],
    rule: str,
    question: Callable[[str, str], str] = lambda text, _: text,
) -> dict[str, list[Sample]]:
    """Check rows and return them as samples by split.

    Args:
        path: the file that the rows come from, for messages.
        rows: rows with the columns `COLUMNS`.
        rule: the task's scoring rule; every reference must be readable to it.
        question: makes a sample's question from (question, id); adds the instruction.

    Raises:
        DymoeError: names the file and the first record that cannot be used, and what is wrong with it.
    """
    score = scorer(rule)
    splits: dict[str, list[Sample]] = {}
    ids: set[str] = set()
    for number, row in enumerate(rows, start=1):
        name = f"record {row['id']}" if row["id"] else f"record number {number}"
        try:
            sample = _sample(row, score, question)
        except DymoeError as error:
            raise DymoeError(f"{path}: {name}: {error}") from error
        if sample.id in ids:
            raise DymoeError(f"{path}: {name}: the id is there twice; ids must be unique")
        ids.add(sample.id)
        splits.setdefault(row["split"], []).append(sample)
    return splits


def _sample(row: Mapping[str, Any], score: Scorer, question: Callable[[str, str], str]) -> Sample:
    for key in ("id", "question", "answer", "split"):
        if not isinstance(row[key], str) or not row[key].strip():
            raise DymoeError(f"{key!r} is empty; it must be a text")
    reference = _reference(row["reference"])
    check_image(row["image"])
    score(row["answer"], reference)
    return Sample(row["id"], row["image"], question(row["question"], row["id"]), row["answer"], reference)


def _reference(text: object) -> dict[str, Any]:
    try:
        reference = json.loads(text) if isinstance(text, str) else None
    except json.JSONDecodeError as error:
        raise DymoeError(f"'reference' is not valid JSON ({error.msg})") from error
    if not isinstance(reference, dict):
        raise DymoeError("'reference' must be a JSON object")
    return reference


def check_image(data: bytes | None) -> None:
    """Refuse a picture that cannot be decoded (see `dymoe.images`); None (a question of text alone) is fine.

    Raises:
        DymoeError: what is wrong with it.
    """
    if data is None:
        return
    try:
        decode(data)
    except DymoeError as error:
        raise DymoeError(f"'image' is no picture that can be used: {error}") from None
