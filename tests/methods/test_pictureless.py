"""A task without pictures, and one that shows them in half of its records, for methods that look at whole prompts."""

import json

import pytest
import yaml

from dymoe.cli import main
from tests.models.conftest import png

COLOURS = ("red", "blue", "green", "white")


def write_stream(folder):
    """Sums, then colours of which every second is said and not shown."""
    (folder / "pictures").mkdir()
    for colour in COLOURS:
        (folder / "pictures" / f"{colour}.png").write_bytes(png(colour))
    sums = [{"id": f"s{n}", "text": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(4)]
    shown = [
        {"id": f"c{n}", "text": "Which colour is it?" if n % 2 else f"Which colour is {colour}?", "answer": colour}
        | ({"image": f"{colour}.png"} if n % 2 else {})
        for n, colour in enumerate(COLOURS)
    ]
    tasks = {}
    for name, records in (("sums", sums), ("colours", shown)):
        (folder / f"{name}.json").write_text(json.dumps(records))
        tasks[name] = {"train": f"{name}.json", "test": f"{name}.json", "max_new_tokens": 4}
    stream = folder / "stream.yaml"
    stream.write_text(yaml.safe_dump({"name": "own", "images": "pictures", "tasks": tasks}, sort_keys=False))
    return stream


@pytest.mark.parametrize(
    "method",
    [
        {"method": "cmoe", "settings": {"experts": 2, "rank": 2, "top_k": 2}},
        {"method": "dymoe", "settings": {"num_experts": 2, "rank": 2, "top_k": 2}, "with": ["task-router"]},
        {"method": "proglora", "settings": {"rank": 2}},
    ],
    ids=["cmoe", "task-router", "proglora"],
)
def test_tasks_without_pictures_are_learned_and_asked(method, tiny_folder, tmp_path):
    values = {
        "model": str(tiny_folder),
        "stream": str(write_stream(tmp_path)),
        "output": str(tmp_path / "run"),
        **method,
    }
    values["training"] = {"steps_per_task": 2, "batch_size": 2, "dtype": "float32", "threads": 1}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**values, "evaluation": {"batch_size": 4}}))
    assert main(["run", str(recipe)]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [len(row) for row in results["matrix"]] == [1, 2]
    answers = (tmp_path / "run" / "stages" / "02-colours" / "predictions" / "colours.jsonl").read_text()
    assert len(answers.splitlines()) == 4
