"""Picks sample questions that show best what was lost, with the answers of each method at each stage."""

import base64
import binascii
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dymoe.errors import DymoeError
from dymoe.files import read_json
from dymoe.report.runs import Run, is_number, stage_folders
from dymoe.report.summary import Method

MAGIC = {"image/png": b"\x89PNG\r\n\x1a\n", "image/jpeg": b"\xff\xd8\xff", "image/webp": b"RIFF"}
PER_TASK = 3
# Base64 characters of all images together: with plotly.js (5 MB) the page stays well under 10 MB.
IMAGE_BUDGET = 3_000_000
LONGEST = 400


@dataclass(frozen=True)
class Answer:
    """What a method answered at one stage; `lenient` is right in content though perhaps not in format."""

    text: str
    right: bool
    lenient: bool


@dataclass(frozen=True)
class Question:
    """A sample as samples.json holds it; `image` is a data: URI or None for a text-only sample."""

    task: str
    id: str
    question: str
    answer: str
    image: str | None


@dataclass(frozen=True)
class Shown:
    """A question with its answers: for each method one per stage, None where the task was not asked."""

    question: Question
    stages: tuple[str, ...]
    answers: tuple[tuple[Method, tuple[Answer | None, ...]], ...]

    @property
    def lost_by(self) -> list[str]:
        """The methods that were right at an earlier stage and are wrong at their last one."""
        return [method.label for method, answers in self.answers if _lost(answers)]


def pick(methods: Sequence[Method]) -> list[Shown]:
    """The samples to show, task by task: lost by some methods and kept by others first, then lost by all.

    Answers are those of each method's first run (its lowest seed). Empty if no run wrote samples.json.

    Raises:
        DymoeError: a samples.json or a predictions file is broken; the message names the file and the record.
    """
    questions: dict[tuple[str, str], Question] = {}
    for method in methods:
        for run in method.runs:
            for question in _questions(run):
                questions.setdefault((question.task, question.id), question)
    told = {method.label: _answers(method.runs[0], set(questions)) for method in methods}
    candidates = [_shown(question, methods, told) for question in questions.values()]
    chosen: list[Shown] = []
    budget = IMAGE_BUDGET
    for task in methods[0].tasks:
        mine = sorted((c for c in candidates if c.question.task == task), key=_interest, reverse=True)
        for shown in mine[:PER_TASK]:
            size = len(shown.question.image or "")
            if size <= budget:
                budget -= size
                chosen.append(shown)
    return chosen


def by_task(chosen: Sequence[Shown]) -> list[tuple[str, list[Shown]]]:
    """The chosen samples under their tasks, in the order they come in."""
    grouped: dict[str, list[Shown]] = {}
    for shown in chosen:
        grouped.setdefault(shown.question.task, []).append(shown)
    return list(grouped.items())


def shorten(text: str) -> str:
    """At most LONGEST characters of a text, saying how many were left out."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST} more characters)"


def _lost(answers: Sequence[Answer | None]) -> bool:
    given = [answer for answer in answers if answer is not None]
    return len(given) > 1 and not given[-1].right and any(answer.right for answer in given[:-1])


def _interest(shown: Shown) -> tuple[bool, bool, int]:
    lost = len(shown.lost_by)
    kept = any(answers[-1] is not None and answers[-1].right for _, answers in shown.answers if not _lost(answers))
    return (lost > 0 and kept, lost > 0, lost)


def _shown(question: Question, methods: Sequence[Method], told: dict[str, Any]) -> Shown:
    sequential = [method for method in methods if not method.joint]
    first = methods[0].tasks.index(question.task)
    last = max((method.stages for method in sequential), default=0)
    key = (question.task, question.id)
    answers = []
    for method in methods:
        by_stage = told[method.label]
        if method.joint:  # one stage after all tasks: its answer stands in the last column
            row = [None] * max(0, last - first - 1) + [by_stage.get((1, *key))]
        else:
            row = [by_stage.get((stage, *key)) for stage in range(first + 1, last + 1)]
        answers.append((method, tuple(row)))
    stages = methods[0].tasks[first:last] if last > first else ("joint",)
    return Shown(question, stages, tuple(answers))


def _questions(run: Run) -> Iterator[Question]:
    """The records of the run's samples.json, checked; none if the run has no such file."""
    file = run.path / "samples.json"
    if not file.exists():
        return
    records = read_json(file)
    if not isinstance(records, list):
        raise DymoeError(f"{file}: holds a {type(records).__name__}; a list of samples is needed")
    for position, record in enumerate(records, start=1):
        where = f"{file}: sample {position}"
        if not isinstance(record, dict):
            raise DymoeError(f"{where} is {record!r}; an object is needed")
        for key in ("task", "id", "question", "answer"):
            if not isinstance(record.get(key), str):
                raise DymoeError(f'{where}: "{key}" is {record.get(key)!r}; a string is needed')
        if record["task"] not in run.tasks:
            raise DymoeError(f'{where}: "task" is {record["task"]!r}; one of {list(run.tasks)} is needed')
        image = _data_uri(where, record.get("image_base64"), record.get("mime"))
        yield Question(record["task"], record["id"], record["question"], record["answer"], image)


def _data_uri(where: str, encoded: Any, mime: Any) -> str | None:
    if encoded is None:
        return None
    if mime not in MAGIC:
        raise DymoeError(f'{where}: "mime" is {mime!r}; one of {", ".join(MAGIC)} is needed')
    try:
        image = base64.b64decode(encoded, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise DymoeError(f'{where}: "image_base64" is no base64 text') from None
    if not image.startswith(MAGIC[mime]):
        raise DymoeError(f'{where}: "image_base64" is no {mime} image')
    return f"data:{mime};base64,{encoded}"


def _answers(run: Run, wanted: set[tuple[str, str]]) -> dict[tuple[int, str, str], Answer]:
    """(stage, task, id) -> answer, for the wanted (task, id) of the stages that are done."""
    found = {}
    tasks = {task for task, _ in wanted}
    for stage, folder in stage_folders(run.path):
        if run.joint:
            stage = 1
        elif stage > run.stages:
            continue
        for file in sorted((folder / "predictions").glob("*.jsonl")):
            if file.stem in tasks:
                for id_, answer in _predictions(file):
                    if (file.stem, id_) in wanted:
                        found[stage, file.stem, id_] = answer
    return found


def _predictions(file: Path) -> Iterator[tuple[str, Answer]]:
    with file.open(encoding="utf-8") as lines:
        for position, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                id_, text = record["id"], record["prediction"]
                score, lenient = record["score"], record.get("lenient", record["score"])
            except (ValueError, KeyError, TypeError, AttributeError):
                record = None
            if record is None or not (isinstance(text, str) and is_number(score) and is_number(lenient)):
                raise DymoeError(
                    f'{file}: line {position} is no prediction; an object with "id", "prediction" (text), '
                    '"score" and "lenient" (numbers) is needed'
                )
            yield str(id_), Answer(text, score >= 0.5, lenient >= 0.5)
