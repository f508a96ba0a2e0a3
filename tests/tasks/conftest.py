import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dymoe.tasks.base import Stream, load_stream


def picture(color: str = "red", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), color).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def stream() -> Stream:
    return load_stream("pocket-coin")


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [
        {
            "id": f"r{number}",
            "image": picture(),
            "question": "What is it?",
            "answer": "dog",
            "reference": json.dumps({"answer": "dog"}),
            "split": split,
        }
        for number, split in enumerate(["train", "train", "validation"])
    ]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[list[dict[str, Any]], str], Path]:
    def save(rows: list[dict[str, Any]], name: str = "task.parquet") -> Path:
        path = tmp_path / name
        schema = pa.schema([(key, pa.binary() if key == "image" else pa.string()) for key in rows[0]])
        pq.write_table(pa.Table.from_pylist([row for row in rows if row["id"] != "DROP"], schema), path)
        return path

    return save
