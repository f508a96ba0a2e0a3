import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dymoe.errors import DymoeError
from dymoe.tasks import records
from dymoe.tasks.pocket import stream as pocket
from tests.tasks.conftest import picture

Rows = list[dict[str, Any]]
Write = Callable[..., Path]


def load(path: Path, rule: str = "exact_match") -> dict[str, list[Any]]:
    return records.samples(path, records.read_table(path), rule)


def test_good_rows_become_samples_by_split(rows: Rows, write: Write) -> None:
    rows[1]["image"] = None
    rows[2]["image"] = picture("blue", "WEBP")
    splits = load(write(rows))
    assert {split: [sample.id for sample in found] for split, found in splits.items()} == {
        "train": ["r0", "r1"],
        "validation": ["r2"],
    }
    assert splits["train"][1].image is None
    assert splits["train"][0].reference == {"answer": "dog"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("question", "  ", "record r1: 'question' is empty; it must be a text"),
        ("answer", "", "record r1: 'answer' is empty; it must be a text"),
        ("answer", None, "record r1: 'answer' is empty; it must be a text"),
        ("id", "", "record number 2: 'id' is empty; it must be a text"),
        ("id", "r0", "record r0: the id is there twice; ids must be unique"),
        ("split", None, "record r1: 'split' is empty"),
        ("image", b"", "record r1: 'image' is no picture that can be used: broken image of 0 bytes (it is empty)"),
        ("image", b"not a picture", "record r1: 'image' is no picture that can be used: broken image of 13 bytes"),
        ("image", picture()[:60], "record r1: 'image' is no picture that can be used: broken image of 60 bytes"),
        ("image", picture(kind="ICO"), "record r1: 'image' is no picture that can be used: broken image of"),
        ("reference", "{", "record r1: 'reference' is not valid JSON"),
        ("reference", "[1]", "record r1: 'reference' must be a JSON object"),
        ("reference", None, "record r1: 'reference' must be a JSON object"),
        ("reference", "{}", "record r1: reference: 'answer' must be a text that is not empty, not None"),
    ],
)
def test_a_bad_record_is_named_with_its_file(rows: Rows, write: Write, key: str, value: object, message: str) -> None:
    rows[1][key] = value
    path = write(rows)
    with pytest.raises(DymoeError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("box", [[0, 0, 0, 1], [0.5, 0.5, 1.5, 1], ["a", 0, 1, 1], [float("nan"), 0, 1, 1], None])
def test_a_bad_box_is_named(rows: Rows, write: Write, box: object) -> None:
    for row in rows:
        row["reference"] = json.dumps({"bbox": [0, 0, 1, 1]})
    rows[2]["reference"] = json.dumps({"bbox": box})
    with pytest.raises(DymoeError, match="record r2: reference: 'bbox' must be four numbers"):
        load(write(rows), "iou")


def test_files_that_cannot_be_used(rows: Rows, write: Write, tmp_path: Path) -> None:
    with pytest.raises(DymoeError, match=r"none\.parquet: no such file"):
        records.read_table(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(DymoeError, match=r"text\.parquet: cannot be read as parquet"):
        records.read_table(tmp_path / "text.parquet")
    whole = write(rows, "cut.parquet")
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(DymoeError, match=r"cut\.parquet: cannot be read as parquet"):
        records.read_table(whole)
    with pytest.raises(DymoeError, match="column 'answer' is missing"):
        records.read_table(write([{key: row[key] for key in row if key != "answer"} for row in rows]))
    with pytest.raises(DymoeError, match="the task is empty"):
        records.read_table(write([{**row, "id": "DROP"} for row in rows], "empty.parquet"))


def test_a_task_needs_every_split_and_no_other(rows: Rows, write: Write, tmp_path: Path) -> None:
    write([{**row, "split": "test"} for row in rows], "GQA-test.parquet")
    assert len(pocket_task(write(rows, "GQA-train.parquet"), tmp_path).train) == 2
    with pytest.raises(DymoeError, match=r"GQA-train\.parquet: no record has split 'validation'"):
        pocket_task(write(rows[:2], "GQA-train.parquet"), tmp_path)
    extra = [*rows, {**rows[0], "id": "r9", "split": "test"}]
    with pytest.raises(DymoeError, match=r"GQA-train\.parquet: split 'test' does not belong here"):
        pocket_task(write(extra, "GQA-train.parquet"), tmp_path)


def pocket_task(_: Path, folder: Path) -> Any:
    return pocket.load_task("GQA", folder=folder)
