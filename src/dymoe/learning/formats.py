"""What the JSON files of a run and of a sweep hold, typed, and the one reader of each.

Keys that are not named here pass unchecked: later versions write more of them.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from dymoe.errors import DymoeError
from dymoe.files import atomic_write, json_text, read_json, read_json_lines
from dymoe.messages import brief
from dymoe.schema import Count, Percent, Range, check

Accuracies = list[Percent]
Seconds = Annotated[float, Range(0)]
KEY = ("label", "order", "instructions", "seed")  # what names a record of a sweep


class Hashes(TypedDict):
    """Hashes of the expert groups after a stage, and of the older ones before it."""

    stage: Count
    groups: dict[str, str]
    before: NotRequired[dict[str, str]]


class Answered(TypedDict):
    """One task's questions: a digest of their ids, and their scores after every stage since it was learned."""

    questions: str
    scores: list[list[Annotated[float, Range(0, 1)]]]


class Located(TypedDict):
    """Of one task's prompts: percent for which the locator was right, what it chose how often, right or not of each."""

    accuracy: Percent
    chosen: dict[str, Count]
    right: list[Annotated[int, Range(0, 1)]]


class Locator(TypedDict):
    """How often a task locator was right after a stage: percent, the mean over the tasks seen, and by task."""

    accuracy: Percent
    tasks: dict[str, Located]


class Watch(TypedDict):
    """A task that was only asked, before the first stage and after every one.

    Attributes:
        samples: how many questions.
        accuracy: in percent, before the first stage first.
        lenient: the same by the format-tolerant rule.
        measures: "loss", of the right answers in nats per token, and what the task's rule tells of all answers; a
            number for every accuracy.
        questions: digest of the questions' ids.
        scores: of the questions, 0 to 1, a row for every accuracy.
    """

    samples: Count
    accuracy: Accuracies
    lenient: Accuracies
    measures: dict[str, list[float]]
    questions: str
    scores: list[list[Annotated[float, Range(0, 1)]]]


Facts = TypedDict(
    "Facts",
    {
        "method": str,
        "stream": str,
        "tasks": list[str],
        "seed": Count,
        "base": NotRequired[str],
        "split": NotRequired[str],
        "settings": NotRequired[dict[str, Any] | None],
        "with": NotRequired[dict[str, dict[str, Any]] | list[str] | None],
        "steps_per_task": NotRequired[Count | None],
        "samples": NotRequired[dict[str, Count]],
        "matrix": NotRequired[list[Accuracies]],
        "lenient_matrix": NotRequired[list[Accuracies]],
        "joint": NotRequired[Accuracies | None],
        "lenient_joint": NotRequired[Accuracies | None],
        "zero_shot": NotRequired[Accuracies | None],
        "answers": NotRequired[dict[str, Answered]],
        "watch": NotRequired[dict[str, Watch]],
        "forgetting": NotRequired[dict[str, float] | None],
        "format_drift": NotRequired[dict[str, float] | None],
        "drift": NotRequired[dict[str, list[float]] | None],
        "training": NotRequired[dict[str, dict[str, list[float]]]],
        "group_hashes": NotRequired[list[Hashes] | None],
        "steps": NotRequired[list[Count]],
        "resumed_at": NotRequired[list[Count]],
        "seconds": NotRequired[dict[str, list[Seconds] | Seconds] | None],
        "machine": NotRequired[dict[str, Any] | None],
        "versions": NotRequired[dict[str, Any] | None],
    },
)
Facts.__doc__ = "What results.json of a run and a sweep's record of it have in common."


class Results(Facts):
    """results.json of a run."""

    name: str
    order: NotRequired[str]
    instructions: NotRequired[str]
    metrics: NotRequired[dict[str, float]]
    trainable_parameters: NotRequired[Count]
    stored_parameters: NotRequired[Count]
    reports: NotRequired[list[dict[str, Any]]]


class _Training(TypedDict):
    lr: float
    steps_per_task: NotRequired[Count | None]


class _Recipe(TypedDict):
    training: _Training


class Record(Facts):
    """One run in a sweep's results."""

    label: str
    order: str
    instructions: str
    fingerprint: str
    metrics: dict[str, float]
    trainable_parameters: Count
    stored_parameters: Count
    recipe: _Recipe
    locator: NotRequired[Locator]
    of: NotRequired[str]
    rate: NotRequired[float]


class About(TypedDict, total=False):
    """What a sweep's results say about themselves."""

    title: str
    command: str
    published: str
    reference: str
    seeds: list[Count]
    budget: dict[str, Any]
    machine: dict[str, Any] | None
    versions: dict[str, Any] | None


class SweepHead(TypedDict):
    """The first line of a sweep's results; the chosen rates by label of a tuning sweep. A record a line follows."""

    about: About
    chosen: NotRequired[dict[str, float]]


class Saved(TypedDict):
    """Of a stage's training.json: the group it trained, and the hashes of all groups after it."""

    group: str
    hashes: dict[str, str]


class Trained(Saved):
    """training.json: what a stage's training came to; it is there once the group is saved.

    `training` holds the stage's routing over its steps (`dymoe.learning.results.routing_over_steps`), `logged` how many
    lines it has in events.jsonl, `files` the SHA-256 of every file that the training left, `sha256` that of all this.
    """

    steps: Count
    resumed_at: Count
    seconds: dict[str, float]
    trainable_parameters: Count
    stored_parameters: Count
    hashes_before: dict[str, str]
    training: dict[str, list[float]]
    logged: Count
    files: dict[str, str]
    sha256: str


class Spent(TypedDict):
    """Seconds by what they went to."""

    train: float


class Probed(TypedDict):
    """probed.json: what a method's temporary group took to train."""

    steps: Count
    resumed_at: Count
    seconds: Spent


class Done(TypedDict):
    """What every done.json has, beside what training.json says: SHA-256 of every file of the stage, and of all this."""

    seconds: dict[str, float]
    files: dict[str, str]
    sha256: str


class Score(TypedDict):
    """A task's entry of scores.json; `sha256` is over the numbers, the predictions and the row of routing.json.

    `measures` are further numbers where there are any (`dymoe.evaluation.generate.TaskResult`).
    """

    strict: Percent
    lenient: Percent
    samples: Count
    measures: NotRequired[dict[str, float]]
    sha256: str


class Row(TypedDict):
    """A task's row of routing.json: mean routing weight of every group, over all layers and by layer."""

    weight: list[Annotated[float, Range(-1e-6)]]
    by_layer: NotRequired[dict[str, list[float]]]


class Routing(TypedDict):
    """routing.json; without groups where nothing is routed."""

    groups: list[str]
    tasks: dict[str, Row]


class Event(TypedDict):
    """One line of events.jsonl."""

    event: str
    stage: NotRequired[Count]
    task: NotRequired[str]
    step: NotRequired[Count]


class Skipped(TypedDict):
    """One line of skipped.jsonl: a record that was left out."""

    task: str
    split: str


class Description(TypedDict):
    """What is read of run.yaml where a run is compared with a plan."""

    recipe: dict[str, Any]
    data: "DataDescription"


class DataDescription(TypedDict):
    """The data of a run."""

    fingerprint: str


class ShownSample(TypedDict):
    """One entry of samples.json."""

    task: str
    id: str
    question: str
    answer: str
    image_base64: NotRequired[str | None]
    mime: NotRequired[str | None]


class Scored(TypedDict):
    """One line of a stage's predictions."""

    id: str | int
    prediction: str
    score: float
    lenient: NotRequired[float]


def run_results(run: str | Path) -> Results:
    """results.json of a run folder, its accuracies checked against its tasks.

    Raises:
        DymoeError: the folder has no results yet, or broken ones; the message names file and key.
    """
    file = Path(run) / "results.json"
    if not os.path.lexists(file):
        raise DymoeError(f"{run}: no results.json here; give a run folder with at least one finished stage")
    results = read_json(file, Results)
    _consistent(results, str(file))
    return results


def read_results(file: str | Path) -> dict[str, Any]:
    """A sweep's results, JSON lines: `SweepHead`, then one `Record` a line (``rows``); none where there is no file yet.

    Raises:
        DymoeError: the file is no sweep's results, or a record's accuracies do not fit its tasks; the line is named.
    """
    if not os.path.lexists(file):
        return {"about": {}, "rows": []}
    first, *lines = [*read_json_lines(file, dict[str, Any])] or [{}]
    head = check(first, SweepHead, f"{file}: line 1")
    rows = [check(row, Record, f"{file}: line {number}") for number, row in enumerate(lines, start=2)]
    for number, row in enumerate(rows, start=2):
        _consistent(row, f"{file}: line {number}")
    return {**head, "rows": rows}


def write_results(file: str | Path, head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a sweep's results, a line each, atomically; `read_results` reads them.

    Raises:
        DymoeError: the file cannot be written, or a number is not finite.
    """
    atomic_write(file, "".join(json_text(line, file) + "\n" for line in (head, *rows)))


def _consistent(values: Mapping[str, Any], where: str) -> None:
    """Refuse tasks that are there twice, a matrix that is no triangle, accuracies of another number of tasks."""
    tasks = values["tasks"]
    if not tasks or len(set(tasks)) != len(tasks):
        raise DymoeError(f"{where}: tasks: expected different names, got {brief(tasks)}")
    for key in ("matrix", "lenient_matrix"):
        rows = values.get(key) or []
        if len(rows) > len(tasks):
            raise DymoeError(f"{where}: {key}: expected a row for each of the {len(tasks)} tasks, got {len(rows)}")
        for number, row in enumerate(rows, start=1):
            if len(row) != number:
                raise DymoeError(f"{where}: {key}.{number}: expected {number} accuracies, got {brief(row)}")
    for key in ("joint", "lenient_joint", "zero_shot"):
        row = values.get(key)
        if row is not None and len(row) != len(tasks):
            raise DymoeError(f"{where}: {key}: expected {len(tasks)} accuracies, got {brief(row)}")
    for task, entry in (values.get("watch") or {}).items():
        rows = [entry["accuracy"], entry["lenient"], *entry["measures"].values(), entry["scores"]]
        counts = {len(row) for row in rows}
        if len(counts) > 1 or not 1 <= len(rows[0]) <= len(tasks) + 1:
            raise DymoeError(
                f"{where}: watch.{task}: expected as many numbers of each kind, before the first of {len(tasks)} tasks "
                f"and after each, got {', '.join(str(len(row)) for row in rows)}"
            )
        if any(len(row) != entry["samples"] for row in entry["scores"]):
            raise DymoeError(f"{where}: watch.{task}.scores: expected {entry['samples']} scores in each row")
