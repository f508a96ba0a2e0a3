"""A small stream of one's own on disk: pictures, records, a stream file."""

import io
import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

COLOURS = ("red", "blue", "green", "yellow")


def jpeg(colour: str, side: int = 24) -> bytes:
    """A picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def write_task(folder: Path, name: str, train: int = 6, validation: int = 4, test: int = 4) -> None:
    """Pictures and the files train.json, validation.json and test.json of a task that names colours."""
    (folder / "pictures" / name).mkdir(parents=True, exist_ok=True)
    (folder / name).mkdir(exist_ok=True)
    for split, count in (("train", train), ("validation", validation), ("test", test)):
        records: list[dict[str, Any]] = []
        for number in range(count):
            colour, image = COLOURS[number % 4], f"{name}/{split}-{number}.jpg"
            (folder / "pictures" / image).write_bytes(jpeg(colour, 24 + number))
            question = f"Which colour is it in {split}?"
            if split == "train":
                said = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": colour}]
                records.append({"id": f"{split}-{number}", "image": image, "conversations": said})
            else:
                records.append({"question_id": f"{split}-{number}", "image": image, "text": question, "answer": colour})
        save(folder, name, split, records)


def write_stream(folder: Path, tasks: dict[str, dict[str, Any]]) -> Path:
    """The stream file of tasks with what is said of each beside its files."""
    values = {
        name: {**{split: f"{name}/{split}.json" for split in ("train", "validation", "test")}, **more}
        for name, more in tasks.items()
    }
    path = folder / "stream.yaml"
    path.write_text(yaml.safe_dump({"name": "made", "images": "pictures", "tasks": values}, sort_keys=False))
    return path


def read(folder: Path, name: str, split: str) -> list[dict[str, Any]]:
    """The records of a split."""
    records: list[dict[str, Any]] = json.loads((folder / name / f"{split}.json").read_text())
    return records


def save(folder: Path, name: str, split: str, records: list[dict[str, Any]]) -> None:
    """Write the records of a split."""
    (folder / name / f"{split}.json").write_text(json.dumps(records))


def ask(record: dict[str, Any], question: str | None = None, answer: str | None = None) -> None:
    """Change a record's question or answer, in whichever form it has them."""
    if "conversations" in record:
        human, gpt = record["conversations"]
        human["value"], gpt["value"] = question or human["value"], answer or gpt["value"]
    else:
        record["text"], record["answer"] = question or record["text"], answer or record["answer"]
