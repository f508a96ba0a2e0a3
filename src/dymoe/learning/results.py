"""results.json: the run's numbers, put together from its finished stages."""

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dymoe.evaluation.intervals import answers
from dymoe.evaluation.metrics import accuracies, routing_drift
from dymoe.files import atomic_json
from dymoe.images import for_browser
from dymoe.learning import conditions, inspection
from dymoe.learning.folder import RunFolder, StageFolder
from dymoe.learning.recipe import Recipe
from dymoe.tasks.base import from_files, hook

if TYPE_CHECKING:
    from dymoe.tasks import Task

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
    done = [stage for stage in stages if stage.done is not None]
    records = [stage.record for stage in done]
    results = {
        **_described(folder, recipe, tasks),
        **accuracies(
            tasks, [stage.tasks for stage in stages], [stage.scores for stage in done], folder.zero_shot.scores
        ),
        "answers": answers([stage.answers() for stage in (done if stages else [folder.zero_shot])]),
        "group_hashes": [
            {"stage": number, "groups": record["hashes"], "before": record["hashes_before"]}
            for number, record in enumerate(records, start=1)
        ],
        **{key: records[-1][key] if records else 0 for key in ("trainable_parameters", "stored_parameters")},
        "steps": [record["steps"] for record in records],
        "resumed_at": [record["resumed_at"] for record in records],
        "seconds": _seconds(done),
        "drift": routing_drift([stage.routing for stage in done]),
        "training": {stage.name: record["training"] for stage, record in zip(done, records, strict=True)},
        **computed_by(conditions.read(folder.path)),
    }
    optional = {
        "watch": _watch([folder.zero_shot.watch, *(stage.watch for stage in done)]),
        "reports": _reports(done),
        "left_out": inspection.counts(folder.path / inspection.SKIPPED),
    }
    atomic_json(folder.path / "results.json", {**results, **{key: value for key, value in optional.items() if value}})


def _described(folder: RunFolder, recipe: Recipe, tasks: Sequence[str]) -> dict[str, Any]:
    """What ran."""
    resolved = recipe.resolved()
    rules = hook(recipe.stream, "rules")
    rules_entry = {"scoring": rules(recipe.data) if rules else "own"} if from_files(recipe.stream) else {}
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
        **rules_entry,
    }


def _watch(folders: Sequence[StageFolder]) -> dict[str, dict[str, Any]]:
    """Of every task that is only asked its numbers before the first stage and after each (`formats.Watch`)."""
    scores = [folder.scores for folder in folders]
    return {
        task: {
            "samples": row["samples"],
            "accuracy": [stage[task]["strict"] for stage in scores],
            "lenient": [stage[task]["lenient"] for stage in scores],
            "measures": {name: [stage[task]["measures"][name] for stage in scores] for name in row["measures"]},
            **single,
        }
        for (task, single) in answers([folder.answers() for folder in folders]).items()
        for row in (scores[0][task],)
    }


def computed_by(run: conditions.Description) -> dict[str, Any]:
    """What computed the numbers: the last `machine`, all `versions`, and where they changed what was accepted."""
    environments = run["environments"]
    names = {name: None for one in environments for name in one["versions"]}
    by_name = {name: dict.fromkeys(one["versions"].get(name, "none") for one in environments) for name in names}
    result: dict[str, Any] = {
        "machine": environments[-1]["machine"],
        "versions": {name: ", ".join(values) for name, values in by_name.items()},
        "base_identity": run["base"],
    }
    if len(environments) > 1:
        result["environments"] = environments
    if run["accepted"]:
        result["accepted"] = run["accepted"]
    return result


def _reports(done: Sequence[StageFolder]) -> list[dict[str, Any]]:
    """What the method itself reports of each stage (`report.json` in its memory), and what its probe took."""
    reports = []
    for stage in done:
        probe = {"probe": stage.probed} if stage.probed else {}
        reports.append({**(stage.read(f"{stage.memory.name}/report.json", dict[str, Any]) or {}), **probe})
    return reports if any(reports) else []


def _seconds(done: Sequence[StageFolder]) -> dict[str, list[float]]:
    """What each stage took, by what it went to; `probe` is what its temporary group took to train."""
    spent = [marker["seconds"] for stage in done if (marker := stage.done) is not None]
    seconds = {key: [row.get(key, 0.0) for row in spent] for key in ("train", "method", "evaluate")}
    return {**seconds, "probe": [probe["seconds"]["train"] if (probe := stage.probed) else 0.0 for stage in done]}


def routing_over_steps(logs: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Name -> values at the first, middle and last logged step of a stage.

    Args:
        logs: what the trainer logged, in order.
    """
    indices = (0, len(logs) // 2, len(logs) - 1)
    return {
        name: [round(round(logs[index][name], 6), 4) for index in indices]  # as events.jsonl holds them
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
