"""Build the pocket streams' parquet files from packaged pictures: `python -m scripts.pocket.build STREAM`.

The result depends on the pinned packages and the seed alone (and, in its last bits, on the versions of Pillow
and pyarrow that encode it).
"""

import argparse
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dymoe.errors import DymoeError
from dymoe.files import atomic_write
from dymoe.tasks.pocket import stream
from scripts.pocket import draw, general_tasks, more_tasks, photo_tasks, scene_tasks
from scripts.pocket.stock import Draft, Stock, fill

SEED = 20240
SIZES = {"train": 1000, "validation": 100, "test": 250}
SIZE_LIMIT = 16_000_000
DATA = Path(stream.__file__).parent / "data"
FOLDERS = {
    "pocket-coin": DATA,
    "pocket-classes": DATA / "classes",
    "pocket-domains": DATA / "domains",
    "pocket-general": DATA / "general",
}
GENERAL = "pocket-general"  # never learned: test and validation alone, both of the test pool
GENERAL_SIZES = {"validation": 50, "test": 200}

Maker = Callable[[Stock, random.Random, int], list[Draft]]
MAKERS: dict[str, Maker] = {
    "ScienceQA": photo_tasks.science,
    "TextVQA": scene_tasks.reading,
    "ImageNet": photo_tasks.classification,
    "GQA": scene_tasks.scenes,
    "VizWiz": photo_tasks.degraded,
    "Grounding": scene_tasks.grounding,
    "VQAv2": photo_tasks.open_questions,
    "OCRVQA": scene_tasks.covers,
}
STREAMS: dict[str, dict[str, Maker]] = {
    "pocket-coin": MAKERS,
    "pocket-classes": dict(more_tasks.CLASS_MAKERS),
    "pocket-domains": dict(more_tasks.DOMAIN_MAKERS),
    GENERAL: dict(general_tasks.makers("test")),
}
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("reference", pa.string()),
        ("source", pa.list_(pa.string())),
        ("split", pa.string()),
    ]
)

Row = dict[str, Any]


def make_rows(
    task: str, stock: Stock, split: str, makers: dict[str, Maker] = MAKERS, size: int | None = None
) -> list[Row]:
    """Draw one split of a task, of its usual size or another; the same task, pool and split give the same rows."""
    drafts = makers[task](stock, random.Random(f"{SEED}/{task}/{split}"), size or SIZES[split])
    return [
        {
            "id": f"{task.lower()}-{split}-{number:04d}",
            "image": None if draft.image is None else draw.encode(draft.image),
            "question": draft.question,
            "answer": draft.answer,
            "reference": json.dumps(draft.reference, sort_keys=True),
            "source": draft.sources,
            "split": split,
        }
        for number, draft in enumerate(drafts)
    ]


def check_disjoint(rows: dict[str, list[Row]]) -> None:
    """Refuse a benchmark in which a source item or a picture of the test files is also in a train file.

    Raises:
        DymoeError: names the first record that shares something with training.
    """
    train_sources: set[str] = set()
    train_images: set[bytes] = set()
    for name, entries in rows.items():
        if name.endswith("-train"):
            for row in entries:
                train_sources.update(row["source"])
                train_images.add(row["image"])
    for name, entries in rows.items():
        for row in entries if name.endswith("-test") else ():
            shared = train_sources.intersection(row["source"])
            if shared or row["image"] in train_images:
                what = ", ".join(sorted(shared)) or "its picture"
                raise DymoeError(f"{name}: record {row['id']} shares {what} with a train file")


def to_parquet(rows: list[Row]) -> bytes:
    """Encode rows as one parquet file."""
    buffer = io.BytesIO()
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pq.write_table(table, buffer, compression="zstd", compression_level=19, write_statistics=False)
    return buffer.getvalue()


def build(out: Path, cache: Path | None = None, stream: str = "pocket-coin") -> dict[str, int]:
    """Write the train and test file of every task of a stream to `out`; returns each file's size in bytes.

    Of a stream that is only asked there are test files alone, with the validation split in them. Nothing is written
    unless all files pass the checks.

    Raises:
        DymoeError: a package cannot be fetched, the pools are not disjoint, or the files are too large.
    """
    rows: dict[str, list[Row]] = {}
    test = fill("test", SEED, cache)
    makers = STREAMS[stream]
    if stream == GENERAL:
        for split, size in GENERAL_SIZES.items():
            part = Stock((item for item in test.items() if general_tasks.side(item.id, split)), SEED)
            for task, maker in general_tasks.makers(split).items():
                new = make_rows(task, part, split, {task: maker}, size)
                rows.setdefault(f"{task}-test", []).extend(new)
    else:
        train = fill("train", SEED, cache)
        for task in makers:
            pool = [make_rows(task, train, split, makers) for split in ("train", "validation")]
            rows[f"{task}-train"] = [row for split in pool for row in split]
            rows[f"{task}-test"] = make_rows(task, test, "test", makers)
    check_disjoint(rows)
    files = {f"{name}.parquet": to_parquet(entries) for name, entries in rows.items()}
    total = sum(map(len, files.values()))
    if total > SIZE_LIMIT:
        raise DymoeError(f"{out}: the files would take {total} bytes, more than the limit of {SIZE_LIMIT}")
    for name, data in files.items():
        atomic_write(out / name, data)
    return {name: len(data) for name, data in files.items()}


def main() -> None:
    """Command line: build and print each file's size."""
    parser = argparse.ArgumentParser(prog="python -m scripts.pocket.build", description=__doc__)
    parser.add_argument("stream", nargs="?", choices=STREAMS, default="pocket-coin", help="default: pocket-coin")
    parser.add_argument("--out", type=Path, default=None, help="folder of the parquet files")
    parser.add_argument("--cache", type=Path, default=None, help="folder of the package archives")
    options = parser.parse_args()
    sizes = build(options.out or FOLDERS[options.stream], options.cache, options.stream)
    for name, size in sizes.items():
        print(f"{size:10,} {name}")
    print(f"{sum(sizes.values()):10,} in all")


if __name__ == "__main__":
    main()
