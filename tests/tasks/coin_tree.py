"""Made CoIN trees in the published layouts, irregularities included."""

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from dymoe.tasks.instructions import instruction

TASKS = ("ScienceQA", "TextVQA", "ImageNet", "GQA", "VizWiz", "Grounding", "VQAv2", "OCRVQA")
VAL = ("TextVQA", "VizWiz", "VQAv2")  # whose test file is called val.json
PLACES = {
    "ScienceQA": "ScienceQA/images/{split}/{n}/image.png",
    "TextVQA": "TextVQA/{split}_images/{n:016x}.jpg",
    "ImageNet": "ImageNet_withlabel/{split}/n0144{n:04d}/{n}.JPEG",
    "GQA": "GQA/images/{n}.jpg",
    "VizWiz": "VizWiz/{split}/VizWiz_{split}_{n:08d}.jpg",
    "Grounding": "COCO2014/train2014/COCO_train2014_{n:012d}.jpg",
    "VQAv2": "COCO2014/{split}2014/COCO_{split}2014_{n:012d}.jpg",
    "OCRVQA": "OCR-VQA/images/{n}.jpg",
}
LETTER = "Answer with the option's letter from the given choices directly."
BOX = "Please provide the bounding box coordinate of the region this sentence describes"


def picture(number: int, side: int = 24) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (number * 37 % 256, number * 91 % 256, 99)).save(buffer, "PNG")
    return buffer.getvalue()


def image(root: Path, task: str, split: str, number: int) -> str:
    name = PLACES[task].format(split=split, n=number)
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_bytes(picture(number))
    return name


def asked(task: str, number: int, kind: str = "original") -> tuple[str, str]:
    """Question with instruction, and answer."""
    if task == "ScienceQA":
        return f"Context: A note {number}.\nWhich is cold?\nA. ice\nB. fire\nC. sand\n{LETTER}", "ABC"[number % 3]
    if task == "Grounding":
        return f"{BOX}: the cup number {number}", f"[0.1{number % 10},0.2,0.5,0.67]"
    sentence = f"{instruction(task, kind, str(number))}."
    question = "What is the object in the image?" if task == "ImageNet" else f"What is number {number}?"
    return f"{question}\n{sentence}", ("cat", "dog", "red")[number % 3]


def train(task: str, count: int, images: Path, kind: str = "original") -> list[dict[str, Any]]:
    """Training records: the second has only question_id, the third of ScienceQA is of text alone, VQAv2 has turns."""
    records = []
    for number in range(count):
        question, answer = asked(task, number, kind)
        record: dict[str, Any] = {"id": f"{task}-{number}" if number % 2 else number}
        if number % 4 == 1:
            record = {"question_id": 5000 + number}
        if task == "ScienceQA":
            record["id"] = str(number)
        text_only = task == "ScienceQA" and number % 3 == 2
        if not text_only:
            record["image"] = image(images, task, "train", number)
        said = [
            {"from": "human", "value": question if text_only else f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ]
        if task == "VQAv2" and number % 2:
            said += [{"from": "human", "value": "And what else?"}, {"from": "gpt", "value": "a spoon"}]
        records.append({**record, "conversations": said})
    return records


def asked_records(task: str, count: int, images: Path, kind: str) -> list[dict[str, Any]]:
    """Test records: every other text holds the image token, boxes are texts, ids numbers or texts."""
    records = []
    for place in range(count):
        number = 100 + place
        question, answer = asked(task, number, kind)
        text_only = task == "ScienceQA" and place % 2 == 1
        record: dict[str, Any] = {
            "question_id": str(number) if task in ("ScienceQA", "GQA") else number,
            "text": question if place % 2 else f"<image>\n{question}",
        }
        if not text_only:
            record["image"] = image(images, task, "test" if task == "TextVQA" else "val", number)
        if task == "Grounding":
            record |= {"answer_bbox": answer, "size": [640, 480]}
        else:
            record["answer"] = answer
        records.append(record)
    return records


def annotations(images: Path, count: int) -> None:
    problems = {
        str(number): {
            "question": "q",
            "choices": ["ice", "fire", "sand"],
            "answer": number % 3,
            "hint": "",
            "image": None,
        }
        for number in (*range(40), *range(100, 100 + count))
    }
    split = {"train": [str(n) for n in range(40)], "test": [str(100 + n) for n in range(count)]}
    answers = [
        {"question_id": 100 + n, "image_id": "x", "answers": [asked("TextVQA", 100 + n)[1]] * 7 + ["other"] * 3}
        for n in range(count)
    ]
    gqa = {str(100 + n): {"answer": asked("GQA", 100 + n)[1], "isBalanced": True, "imageId": "1"} for n in range(count)}
    for name, value in (
        ("ScienceQA/problems.json", problems),
        ("ScienceQA/pid_splits.json", split),
        ("TextVQA/TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": answers}),
        ("GQA/testdev_balanced_questions.json", gqa),
    ):
        save(images / name, value)


def save(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def build(
    root: Path, variant: str = "coin", trained: int = 12, tested: int = 4, tasks: tuple[str, ...] = TASKS
) -> Path:
    """A tree of this variant; `coin` is the repository's, `release` the data set's."""
    images = root / {"coin": "cl_dataset", "fork": "playground/cl_dataset"}.get(variant, "cl_dataset")
    annotations(images, tested)
    folders = {
        "coin": [("playground/Instructions_Original", "original")],
        "release": [("Instruction_Original", "original"), ("Instruction_Type2", "diverse")],
        "fork": [("playground/Instructions", "original"), ("playground/Instructions_Diverse", "diverse")],
        "sefe": [("annotations", "original")],
    }[variant]
    for name, kind in folders:
        for task in tasks:
            records = train(task, trained, images, kind)
            if variant == "sefe":
                save(root / name / task / "train_ori.json", records)
                save(root / name / task / "train_x20.json", [{**record, "x": 20} for record in records[:-1]])
            else:
                save(root / name / task / "train.json", records)
            evaluated = "val.json" if task in VAL and variant != "sefe" else "test.json"
            save(root / name / task / evaluated, asked_records(task, tested, images, kind))
    return root
