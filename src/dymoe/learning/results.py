"""results.json: the run's numbers, put together from its finished stages."""

import base64
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from dymoe.evaluation.intervals import answers
from dymoe.evaluation.metrics import AccuracyMatrix, drift
from dymoe.files import atomic_json
from dymoe.learning import clock, conditions, inspection
from dymoe.learning.folder import RunFolder, StageFolder
from dymoe.learning.recipe import Recipe
from dymoe.pictures import for_browser

if TYPE_CHECKING:
    from dymoe.tasks import Stream, Task

# Those that compute; of the second row what is installed.
PACKAGES = ("dymoe", "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy", "pillow")
OPTIONAL = ("torchvision", "timm", "numba", "triton", "bitsandbytes", "deepspeed")
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
    run = conditions.read(folder.path)
    done = [stage for stage in stages if stage.done is not None]
    records = [stage.record for stage in done]
    scores = [stage.scores for stage in done]
    strict = [[row[task]["strict"] for task in row] for row in scores]
    lenient = [[row[task]["lenient"] for task in row] for row in scores]
    joint = len(stages) == 1 and len(tasks) > 1
    results = {
        **_described(folder, recipe, tasks),
        "samples": {task: row[task]["samples"] for row in scores for task in row},
        "matrix": [] if joint else strict,
        "lenient_matrix": [] if joint else lenient,
        "metrics": {},
    }
    zero_shot = folder.zero_shot.scores
    if zero_shot:
        results["zero_shot"] = [zero_shot[task]["strict"] for task in tasks]
    if not stages:
        results["samples"] = {task: row["samples"] for task, row in zero_shot.items()}
        results["metrics"] = {"MFN": sum(results["zero_shot"]) / len(tasks)} if zero_shot else {}
    elif joint:
        results.update(_joint(strict, lenient))
    elif done:
        matrix = AccuracyMatrix(strict, tasks[: len(strict)])
        results["metrics"] = matrix.to_dict()
        results["forgetting"] = matrix.forgetting_by_task()
        results["format_drift"] = format_drift(strict, lenient, tasks)
    results["answers"] = answers([stage.answers() for stage in (done if stages else [folder.zero_shot])])
    results["group_hashes"] = [
        {"stage": number, "groups": record["hashes"], "before": record["hashes_before"]}
        for number, record in enumerate(records, start=1)
    ]
    results["trainable_parameters"] = records[-1]["trainable_parameters"] if done else 0
    results["stored_parameters"] = records[-1]["stored_parameters"] if done else 0
    results["steps"] = [record["steps"] for record in records]
    results["resumed_at"] = [record["resumed_at"] for record in records]
    results["seconds"] = _seconds(done)
    results["drift"] = routing_drift([stage.routing for stage in done])
    names = [stage.path.name.partition("-")[2] for stage in done]
    results["training"] = {name: record["training"] for name, record in zip(names, records, strict=True)}
    reports = [_report(stage) for stage in done]
    if any(reports):
        results["reports"] = reports
    if left_out := inspection.counts(folder.path / inspection.SKIPPED):
        results["left_out"] = left_out
    results.update(computed_by(run))
    atomic_json(folder.path / "results.json", results)


def _described(folder: RunFolder, recipe: Recipe, tasks: Sequence[str]) -> dict[str, Any]:
    """What ran."""
    resolved = recipe.resolved()
    own = {"scoring": recipe.data.scoring if recipe.stream == "coin" else "own"} if "data" in resolved else {}
    return {
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
        **own,
    }


def _joint(strict: Sequence[list[float]], lenient: Sequence[list[float]]) -> dict[str, Any]:
    """Of a run that learns all tasks in one stage: its accuracies, once that stage is done."""
    there = (strict[0], lenient[0]) if strict else (None, None)
    metrics = {"MFN": sum(strict[0]) / len(strict[0])} if strict else {}
    return {
        **dict(zip(("joint", "lenient_joint"), there, strict=True)),
        **{"metrics": metrics, "forgetting": {}, "format_drift": {}},
    }


def computed_by(run: conditions.Description) -> dict[str, Any]:
    """What computed the numbers: the last `machine`, all `versions`, and where they changed what was accepted."""
    environments = run["environments"]
    names = {name: None for one in environments for name in one["versions"]}
    told = {name: dict.fromkeys(one["versions"].get(name, "none") for one in environments) for name in names}
    found: dict[str, Any] = {
        "machine": environments[-1]["machine"],
        "versions": {name: ", ".join(values) for name, values in told.items()},
        "base_identity": run["base"],
    }
    if len(environments) > 1:
        found["environments"] = environments
    if run["accepted"]:
        found["accepted"] = run["accepted"]
    return found


def _report(stage: StageFolder) -> dict[str, Any]:
    """What the method itself reports of a stage (`report.json` in its memory), and what its probe took."""
    probe = stage.probed
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


def _seconds(done: Sequence[StageFolder]) -> dict[str, list[float]]:
    """What each stage took, by what it went to."""
    spent = [marker["seconds"] for stage in done if (marker := stage.done) is not None]
    seconds = {key: [row.get(key, 0.0) for row in spent] for key in ("train", "method", "evaluate")}
    return {**seconds, "probe": [_probe_seconds(stage) for stage in done]}


def _probe_seconds(stage: StageFolder) -> float:
    """What the method's temporary group took to train."""
    probe = stage.probed
    return probe["seconds"]["train"] if probe else 0.0


def routing_drift(routing: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Earlier task -> its drift (`evaluation.metrics.drift`), one value for every stage since the task was learned.

    A task without drift at some stage (no group of its own, or nothing is routed) is left out.

    Args:
        routing: routing.json of the stages in order; without groups where a method routes nothing.
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


def routing_over_steps(logs: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Name -> values at the first, middle and last logged step of a stage.

    Args:
        logs: what the trainer logged, in order.
    """
    places = (0, len(logs) // 2, len(logs) - 1)
    return {
        name: [round(round(logs[place][name], 6), 4) for place in places]  # as events.jsonl holds them
        for name in SHARES
        if logs and all(name in row for row in logs)
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
    """Versions of Python and of the packages that compute; of a user's own files (`dymoe.plugins`) the SHA-256."""
    from dymoe import plugins

    found = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    for name in OPTIONAL:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return {**found, **plugins.digests()}


def machine() -> dict[str, Any]:
    """What the run was computed on, and by which clock its seconds are counted (`learning.clock`).

    `kernels` are those that choose the experts on a CPU: of Numba where it works, else torch's.
    """
    import torch

    from dymoe.adapter.ops import numba

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "kernels": "numba" if numba.available() else "torch",
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "clock": clock.clock(),
    }
