"""Picks sample questions that show best what one method still answers and another has lost."""

import base64
import binascii
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from pathlib import Path
from typing import Any

from dymoe.analysis.forgetting import ranked
from dymoe.analysis.runs import Method, Run, stage_folders
from dymoe.errors import DymoeError
from dymoe.files import read_json, read_json_lines
from dymoe.learning.formats import Scored, ShownSample
from dymoe.messages import brief, listed
from dymoe.pictures import MAGIC

# Samples of each task at least, of each pair of methods (one still answers, one has lost) and in all at most.
PER_TASK = 3
PER_PAIR = 8
MOST = 96
# Base64 characters of all images together: with plotly.js (5 MB) the page stays well under 10 MB.
IMAGE_BUDGET = 2_000_000


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
class Told:
    """One method's answers to a question: one per stage from the task's own on, None where it was not asked."""

    method: Method
    answers: tuple[Answer | None, ...]

    @cached_property
    def given(self) -> tuple[tuple[int, Answer], ...]:
        """(place of the stage, answer) where it was asked."""
        return tuple((place, answer) for place, answer in enumerate(self.answers) if answer is not None)

    @cached_property
    def lost(self) -> bool:
        """Right at an earlier stage and wrong at the last one."""
        return len(self.given) > 1 and not self.last.right and any(answer.right for _, answer in self.given)

    @cached_property
    def kept(self) -> bool:
        """Right at the last stage and at an earlier one; a method without stages has but one answer to be right."""
        before = self.method.level or any(answer.right for _, answer in self.given[:-1])
        return bool(self.given) and self.last.right and before

    @property
    def last(self) -> Answer:
        """The answer at the last stage."""
        return self.given[-1][1]

    @property
    def lost_at(self) -> int:
        """Place of the stage since which a lost answer is wrong."""
        right = max(number for number, (_, answer) in enumerate(self.given) if answer.right)
        return self.given[right + 1][0]

    @property
    def before(self) -> Answer:
        """The last right answer to a lost sample."""
        return [answer for _, answer in self.given if answer.right][-1]


@dataclass(frozen=True)
class Shown:
    """A question with the answers of each method; `stages` are the tasks learned since its own."""

    question: Question
    stages: tuple[str, ...]
    answers: tuple[Told, ...]

    @cached_property
    def kept(self) -> list[int]:
        """Indices of the methods that still answer it."""
        return [told.method.index for told in self.answers if told.kept]

    @cached_property
    def lost(self) -> list[int]:
        """Indices of the methods that have lost it."""
        return [told.method.index for told in self.answers if told.lost]

    @property
    def lost_by(self) -> list[str]:
        """Names of the methods that have lost it."""
        return [told.method.label for told in self.answers if told.lost]


@dataclass(frozen=True)
class Comparison:
    """The samples to show, in the order of their tasks, and how many there are of each kind in all.

    `counts[a][b]`: samples that method a still answers and method b has lost, of all that samples.json holds, shown or
    not. `pair` is what to compare first (who still answers, who has lost), None where no pair of methods differs.
    """

    shown: tuple[Shown, ...]
    total: int
    counts: tuple[tuple[int, ...], ...]
    pair: tuple[int, int] | None
    id: str = "samples"
    title: str = "What one still answers and another has lost"


def compare(methods: Sequence[Method]) -> Comparison:
    """Pick samples so that every pair of methods has some that one still answers and the other has lost.

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
    tasks = methods[0].tasks
    candidates.sort(key=lambda shown: (-tasks.index(shown.question.task), *_interest(shown)), reverse=True)
    counts = [[0] * len(methods) for _ in methods]
    for shown in candidates:
        for a in shown.kept:
            for b in shown.lost:
                counts[a][b] += 1
    chosen = _choose(candidates)
    return Comparison(
        tuple(shown for place, shown in enumerate(candidates) if place in chosen),
        len(candidates),
        tuple(map(tuple, counts)),
        _first_pair(methods, counts),
    )


def _choose(candidates: Sequence[Shown]) -> set[int]:
    """Places of the samples to show: some for each pair of methods, then some of each task."""
    chosen: set[int] = set()
    refused: set[int] = set()
    budget = IMAGE_BUDGET
    tasks: Counter[str] = Counter()
    pairs = [[(a, b) for a in shown.kept for b in shown.lost] for shown in candidates]
    lacking = dict.fromkeys({pair for found in pairs for pair in found}, PER_PAIR)

    def take(place: int) -> None:
        nonlocal budget
        shown = candidates[place]
        if (size := len(shown.question.image or "")) > budget:
            refused.add(place)
            return
        budget -= size
        chosen.add(place)
        tasks[shown.question.task] += 1
        for pair in pairs[place]:
            lacking[pair] -= 1

    while len(chosen) < MOST:
        # What helps most pairs first; of equals a task that is shown less often, then an earlier one.
        gains = [
            (-sum(lacking[pair] > 0 for pair in pairs[place]), tasks[shown.question.task], place)
            for place, shown in enumerate(candidates)
            if place not in chosen and place not in refused
        ]
        if not gains or not min(gains)[0]:
            break
        take(min(gains)[2])
    for place, shown in enumerate(candidates):
        if place not in chosen and tasks[shown.question.task] < PER_TASK:
            take(place)
    return chosen


def _first_pair(methods: Sequence[Method], counts: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """The method that forgot least beside the one that lost most of what it still answers."""
    order = [method.index for method in ranked(methods)]
    pairs = sorted(permutations(range(len(methods)), 2), key=lambda pair: -counts[pair[0]][pair[1]])
    for first in [*order, None]:
        for a, b in pairs:
            if counts[a][b] and first in (a, None):
                return a, b
    return None


def _interest(shown: Shown) -> tuple[int, int, int]:
    """Lost by some and kept by others, lost at all, by how many."""
    return (int(bool(shown.lost and shown.kept)), int(bool(shown.lost)), len(shown.lost))


def _shown(question: Question, methods: Sequence[Method], told: Mapping[str, Any]) -> Shown:
    sequential = [method for method in methods if not method.level]
    first = methods[0].tasks.index(question.task)
    last = max((method.stages for method in sequential), default=0)
    key = (question.task, question.id)
    answers = []
    for method in methods:
        by_stage = told[method.label]
        if method.level:  # one stage after all tasks: its answer stands in the last column
            row = [None] * max(0, last - first - 1) + [by_stage.get((1, *key))]
        else:
            row = [by_stage.get((stage, *key)) for stage in range(first + 1, last + 1)]
        answers.append(Told(method, tuple(row)))
    stages = methods[0].tasks[first:last] if last > first else ("all tasks",)
    return Shown(question, stages, tuple(answers))


def _questions(run: Run) -> Iterator[Question]:
    """The records of the run's samples.json, checked; none if the run has no such file."""
    file = run.path / "samples.json"
    if not file.exists():
        return
    for position, record in enumerate(read_json(file, list[ShownSample]), start=1):
        if record["task"] not in run.tasks:
            raise DymoeError(
                f"{file}: {position}.task: expected one of {listed(run.tasks)}, got {brief(record['task'])}"
            )
        image = _data_uri(f"{file}: {position}", record.get("image_base64"), record.get("mime"))
        yield Question(record["task"], record["id"], record["question"], record["answer"], image)


def _data_uri(where: str, encoded: str | None, mime: str | None) -> str | None:
    if encoded is None:
        return None
    if mime not in MAGIC:
        raise DymoeError(f"{where}.mime: expected one of {', '.join(MAGIC)}, got {brief(mime)}")
    try:
        image = base64.b64decode(encoded, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise DymoeError(f"{where}.image_base64: is no base64 text") from None
    if not image.startswith(MAGIC[mime]):
        raise DymoeError(f"{where}.image_base64: is no {mime} image")
    return f"data:{mime};base64,{encoded}"


def _answers(run: Run, wanted: set[tuple[str, str]]) -> dict[tuple[int, str, str], Answer]:
    """(stage, task, id) -> answer, for the wanted (task, id) of the stages that are done."""
    found = {}
    tasks = {task for task, _ in wanted}
    folders = stage_folders(run.path) if run.trained else [(1, "", run.path / "zero-shot")]
    for stage, _, folder in folders:
        if run.level:
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
    for record in read_json_lines(file, Scored):
        score, lenient = record["score"], record.get("lenient", record["score"])
        yield str(record["id"]), Answer(record["prediction"], score >= 0.5, lenient >= 0.5)
