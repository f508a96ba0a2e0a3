"""results.json: the run's numbers, put together from its finished stages."""

import base64
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dymoe.evaluation.drift import drift
from dymoe.evaluation.matrix import AccuracyMatrix
from dymoe.learning import clock, preflight
from dymoe.learning.folder import RunFolder, StageFolder
from dymoe.learning.recipe import Recipe
from dymoe.pictures import for_browser

if TYPE_CHECKING:
    from dymoe.tasks import Stream, Task

PACKAGES = ("dymoe", "torch", "transformers", "peft", "accelerate", "safetensors")
SHARES = ("share_new", "share_ambiguous", "share_old", "new_group_weight", "next_token")  # kept of every task
SHOWN_BYTES, SHOWN_SIDE = 40_000, 320  # a larger picture is kept there as a small one
SHOWN_SAMPLES = 20  # per task in samples.json; the report prefers those that were lost


def write_results(folder: RunFolder, recipe: Recipe, tasks: Sequence[str], stages: Sequence[StageFolder]) -> None:
    """Write results.json from the stages that are done, and from the zero-shot answers if there are any.

    Args:
        folder: the run.
        recipe: what ran.
        tasks: all tasks' names in learned order.
        stages: the stages in order, done or not.
    """
    done = [(stage, marker) for stage in stages if (marker := stage.done) is not None]
    scores = [stage.read("scores.json") for stage, _ in done]
    strict = [[row[task]["strict"] for task in row] for row in scores]
    lenient = [[row[task]["lenient"] for task in row] for row in scores]
    joint = len(stages) == 1 and len(tasks) > 1
    resolved = recipe.resolved()
    results: dict[str, Any] = {
        "name": folder.path.name,
        "method": recipe.method,
        "settings": resolved["settings"],
        "with": resolved["with"],
        "stream": recipe.stream,
        "order": recipe.order,
        "instructions": recipe.instructions,
        "tasks": list(tasks),
        "seed": recipe.seed,
        "base": recipe.model,
        "steps_per_task": recipe.training.steps_per_task,
        "split": recipe.evaluation.split,
        "samples": {task: row[task]["samples"] for row in scores for task in row},
        "matrix": [] if joint else strict,
        "lenient_matrix": [] if joint else lenient,
        "metrics": {},
    }
    if "data" in resolved:
        results["scoring"] = recipe.data.scoring if recipe.stream == "coin" else "own"
    if joint:
        results["joint"], results["lenient_joint"] = (strict[0], lenient[0]) if done else (None, None)
        results["metrics"] = {"MFN": sum(strict[0]) / len(strict[0])} if done else {}
        results["forgetting"], results["format_drift"] = {}, {}
    elif done:
        matrix = AccuracyMatrix(strict, tasks[: len(strict)])
        results["metrics"] = matrix.to_dict()
        results["forgetting"] = matrix.forgetting_by_task()
        results["format_drift"] = format_drift(strict, lenient, tasks)
    zero_shot = StageFolder(folder.path / "zero-shot").read("scores.json")
    if zero_shot:
        results["zero_shot"] = [zero_shot[task]["strict"] for task in tasks]
        if not stages:
            results["metrics"] = {"MFN": sum(results["zero_shot"]) / len(tasks)}
            results["samples"] = {task: row["samples"] for task, row in zero_shot.items()}
    results["group_hashes"] = [
        {"stage": number, "groups": marker["hashes"], "before": marker["hashes_before"]}
        for number, (_, marker) in enumerate(done, start=1)
    ]
    for key in ("trainable_parameters", "stored_parameters"):
        results[key] = done[-1][1][key] if done else 0
    results["steps"] = [marker["steps"] for _, marker in done]
    results["resumed_at"] = [marker["resumed_at"] for _, marker in done]
    results["seconds"] = {
        key: [marker["seconds"].get(key, 0.0) for _, marker in done] for key in ("train", "method", "evaluate")
    }
    results["seconds"]["probe"] = [_probe_seconds(stage) for stage, _ in done]
    results["drift"] = routing_drift([stage.read("routing.json") for stage, _ in done])
    results["training"] = routing_over_steps(folder.path / "events.jsonl")
    reports = [_report(stage) for stage, _ in done]
    if any(reports):
        results["reports"] = reports
    if left_out := preflight.counts(folder.path / "skipped.jsonl"):
        results["left_out"] = left_out
    results["machine"], results["versions"] = machine(), versions()
    from dymoe.files import atomic_json

    atomic_json(folder.path / "results.json", results)


def _report(stage: StageFolder) -> dict[str, Any]:
    """What the method itself reports of a stage (`report.json` in its memory), and what its probe took."""
    probe = stage.read("probed.json")
    return {**stage.read(f"{stage.memory.name}/report.json"), **({"probe": probe} if probe else {})}


def format_drift(
    strict: Sequence[Sequence[float]], lenient: Sequence[Sequence[float]], tasks: Sequence[str]
) -> dict[str, float]:
    """Points of a task's loss since it was learned that are format alone, by task.

    The loss under the strict rule minus the loss under the lenient one: what the model still knows but says
    in another task's form. Strict loss = format drift + lenient loss, exactly, so it may be below 0 (the form
    got better while the content got worse).

    Args:
        strict: accuracy matrix in percent, row t over tasks 1..t.
        lenient: the same under the format-tolerant rules.
        tasks: names in learned order.
    """
    last = len(strict) - 1

    def lost(rows: Sequence[Sequence[float]], task: int) -> float:
        return rows[task][task] - rows[last][task]

    return {tasks[i]: lost(strict, i) - lost(lenient, i) for i in range(last + 1)}


def _probe_seconds(stage: StageFolder) -> float:
    """What the method's temporary group took to train."""
    return float(stage.read("probed.json").get("seconds", {}).get("train", 0.0))


def routing_drift(routing: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Earlier task -> its drift (see `dymoe.evaluation.drift`), one value for every stage since the task was learned.

    A task without drift at some stage (no group of its own, or nothing is routed) is left out.

    Args:
        routing: routing.json of the stages in order; empty where a method routes nothing.
    """
    found: dict[str, list[float | None]] = {}
    for stage in routing:
        for task, row in stage.get("tasks", {}).items():
            found.setdefault(task, []).append(drift(task, stage["groups"], row["weight"]))
    return {
        task: [round(value, 4) for value in values if value is not None]
        for task, values in found.items()
        if None not in values
    }


def routing_over_steps(events: Path) -> dict[str, dict[str, list[float]]]:
    """Task -> name -> values at the first, middle and last logged step of its training.

    Args:
        events: events.jsonl of a run.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in events.read_text(encoding="utf-8").splitlines() if events.is_file() else ():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that a kill cut short
        if event["event"] == "step":
            rows.setdefault(event["task"], []).append(event)
    return {
        task: {
            name: [round(steps[i][name], 4) for i in (0, len(steps) // 2, len(steps) - 1)]
            for name in SHARES
            if all(name in step for step in steps)
        }
        for task, steps in rows.items()
    }


def shown_samples(tasks: "Sequence[Task]", split: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The first evaluated samples of every task with their images, for samples.json and the report."""
    from dymoe.evaluation.generate import evaluated

    records = []
    for task in tasks:
        for sample in evaluated(task, split, limit)[:SHOWN_SAMPLES]:
            record = {
                "task": task.name,
                "id": sample.id,
                "question": sample.question,
                "answer": sample.answer,
            }
            if (image := sample.image) is not None:
                shown, record["mime"] = for_browser(image, SHOWN_BYTES, SHOWN_SIDE)
                record["image_base64"] = base64.b64encode(shown).decode()
            records.append(record)
    return records


def data_description(stream: "Stream") -> dict[str, Any]:
    """Sizes of the tasks and a fingerprint over every sample.

    A sample in memory counts with its text, answer and picture. Samples on disk count with their index's fingerprint,
    which was computed when the records were read: texts, answers, references, and of each picture file the path and the
    size, not the contents; so this takes no longer for big data. Their tasks also say how they are scored.
    """
    import hashlib

    from dymoe.tasks.lazy import Records

    digest = hashlib.sha256()
    sizes: dict[str, dict[str, int]] = {}
    rules: dict[str, dict[str, Any]] = {}
    for task in stream.tasks:
        sizes[task.name] = {split: len(getattr(task, split)) for split in ("train", "validation", "test")}
        for split in ("train", "validation", "test"):
            samples = getattr(task, split)
            if isinstance(samples, Records):
                digest.update(f"{task.name}\0{split}\0{samples.fingerprint}".encode())
                rules[task.name] = {"scorer": task.scorer, "max_new_tokens": task.max_new_tokens}
                continue
            for sample in samples:
                for part in (task.name, split, sample.id, sample.question, sample.answer):
                    digest.update(part.encode() + b"\0")
                digest.update(hashlib.sha256(sample.image or b"").digest())
    return {"samples": sizes, "fingerprint": digest.hexdigest(), **({"scorers": rules} if rules else {})}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def machine() -> dict[str, Any]:
    """What the run was computed on, and by which clock its seconds are counted (`learning.clock`)."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "clock": clock.clock(),
    }
