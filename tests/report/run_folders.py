"""Makes run folders as the learner writes them, from a seeded generator: they are the report's input."""

import base64
import hashlib
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from dymoe.evaluation import AccuracyMatrix
from dymoe.files import atomic_json, atomic_write

TASKS = ("scienceqa", "textvqa", "imagenet", "gqa", "vizwiz", "grounding", "vqav2", "ocrvqa")
FORGETS = {"lora": 9.0, "incmoelora": 6.0, "dymoe": 2.5}


def picture(seed: int) -> bytes:
    draw_from = random.Random(seed)
    image = Image.new("RGB", (96, 72), tuple(draw_from.randrange(160, 255) for _ in range(3)))
    canvas = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = draw_from.randrange(60), draw_from.randrange(40)
        canvas.ellipse((x, y, x + 30, y + 30), fill=tuple(draw_from.randrange(200) for _ in range(3)))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def make_run(
    folder: Path,
    method: str = "dymoe",
    seed: int = 0,
    tasks: Sequence[str] = TASKS,
    stages: int | None = None,
    samples: int = 4,
    routed: bool = True,
    text: str = "a red round thing",
) -> Path:
    """A run folder of a sequential method; `stages` below len(tasks) is a run in progress."""
    draw_from = random.Random(f"{method} {seed}")
    done = len(tasks) if stages is None else stages
    pace = FORGETS.get(method, 7.0)
    rows: list[list[float]] = []
    for t in range(done):
        before = rows[-1] if t else []
        lost = [draw_from.uniform(0, 2 * pace / (1 + 0.3 * i)) for i in range(t)]
        row = [max(3.0, value - loss) for value, loss in zip(before, lost, strict=True)]
        rows.append([*row, draw_from.uniform(50, 92)])
    records = [
        {
            "task": task,
            "id": f"{task}-{i}",
            "question": f"{text} {i}?\nAnswer with a word.",
            "answer": f"{text} {i}",
            **({"image_base64": base64.b64encode(picture(i)).decode(), "mime": "image/jpeg"} if i else {}),
        }
        for task in tasks
        for i in range(samples)
    ]
    for t in range(1, done + 1):
        write_stage(folder / "stages" / f"{t:02d}-{tasks[t - 1]}", tasks[:t], records, rows[t - 1], routed, draw_from)
    if samples:
        atomic_write(folder / "samples.json", json.dumps(records))
    matrix = AccuracyMatrix(rows, tasks[:done])
    write_results(
        folder,
        method=method,
        seed=seed,
        tasks=list(tasks),
        matrix=rows,
        metrics=matrix.to_dict(),
        forgetting=matrix.forgetting_by_task(),
        format_drift={task: draw_from.uniform(0, 4) for task in tasks[:done]},
        group_hashes=[
            {"stage": t, "groups": {g: hashlib.sha256(f"{g}{seed}".encode()).hexdigest() for g in tasks[:t]}}
            for t in range(1, done + 1)
        ],
    )
    return folder


def write_results(folder: Path, **values: Any) -> None:
    """results.json with every key that the format has; `values` override."""
    base: dict[str, Any] = {
        "name": folder.name,
        "stream": "pocket-coin",
        "base": "pocket",
        "steps_per_task": 60,
        "format_drift": {},
        "group_hashes": [],
        "trainable_parameters": 1234567,
        "seconds": {"train": [61.5, 60.0], "evaluate": [12.0, 20.0]},
        "machine": {"cpu": 2, "gpu": "none"},
        "versions": {"torch": "2.13.0", "peft": "0.21.0"},
    }
    atomic_json(folder / "results.json", base | values)


def make_joint(folder: Path, seed: int = 0, tasks: Sequence[str] = TASKS) -> Path:
    """A run folder of the joint method: one row over all tasks, one stage, no matrix and no routing."""
    draw_from = random.Random(f"joint {seed}")
    row = [draw_from.uniform(70, 90) for _ in tasks]
    records = [
        {"task": task, "id": f"{task}-{i}", "question": "what?", "answer": f"joint answer {i}"}
        for task in tasks
        for i in range(4)
    ]
    write_stage(folder / "stages" / "01-joint", tasks, records, row, False, draw_from)
    write_results(folder, method="joint", seed=seed, tasks=list(tasks), matrix=[], joint=row)
    return folder


def write_stage(
    folder: Path,
    tasks: Sequence[str],
    records: Sequence[dict[str, Any]],
    accuracy: Sequence[float],
    routed: bool,
    draw_from: random.Random,
) -> None:
    """predictions/<task>.jsonl of every task seen, and routing.json."""
    for task, percent in zip(tasks, accuracy, strict=True):
        lines = []
        for record in (r for r in records if r["task"] == task):
            right = draw_from.uniform(0, 100) < percent
            lines.append(
                {
                    "id": record["id"],
                    "question": record["question"],
                    "answer": record["answer"],
                    "prediction": record["answer"] if right else f"not {record['answer']}",
                    "score": float(right),
                    "lenient": float(right or draw_from.random() < 0.3),
                }
            )
        atomic_write(folder / "predictions" / f"{task}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    if not routed:
        return
    weights = {}
    for i, task in enumerate(tasks):
        raw = [draw_from.random() + (4 if j == i else 0) for j in range(len(tasks))]
        weights[task] = {"weight": [value / sum(raw) for value in raw], "by_layer": {}}
    atomic_json(folder / "routing.json", {"groups": list(tasks), "tasks": weights})
    atomic_write(folder / "dynamics.jsonl", "")  # the page looks whether there is one, not into it
