"""Picks sample questions that show best what one method still answers and another has lost."""

import base64
import binascii
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from dymoe.analysis.forgetting import ranked
from dymoe.analysis.runs import Method, Run, stage_folders
from dymoe.errors import DymoeError
from dymoe.files import read_json, read_json_lines
from dymoe.images import MAGIC
from dymoe.learning.formats import Scored, ShownSample
from dymoe.messages import brief, listed

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
class Fate:
    """What became of a question under one method.

    Attributes:
        answers: one per stage from the task's own on, None where it was not asked.
        last: the answer at the last stage, None where it was never asked.
        remembered: right at the last stage and at an earlier one; without stages one right answer is enough.
        lost: right at an earlier stage and wrong at the last one.
        lost_at: place of the stage since which a lost answer is wrong.
        before: the last right answer to a lost question.
    """

    method: Method
    answers: Sequence[Answer | None]
    last: Answer | None = None
    remembered: bool = False
    lost: bool = False
    lost_at: int = 0
    before: str = ""


@dataclass(frozen=True)
class Shown:
    """A question with its fate under each method; `stages` are the tasks learned since its own."""

    question: Question
    stages: Sequence[str]
    fates: Sequence[Fate]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(index of a method that still answers it, index of one that has lost it)."""
        remembered = [fate.method.index for fate in self.fates if fate.remembered]
        return [(one, fate.method.index) for one in remembered for fate in self.fates if fate.lost]


@dataclass(frozen=True)
class Comparison:
    """The samples to show, in the order of their tasks, and how many there are of each kind in all.

    `counts[a][b]`: samples that method a still answers and method b has lost, of all that samples.json holds, shown or
    not. `pair` is what to compare first (who still answers, who has lost), None where no pair of methods differs.
    """

    shown: Sequence[Shown]
    total: int
    counts: Sequence[Sequence[int]]
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
    answers = [_answers(method.runs[0], set(questions)) for method in methods]
    candidates = [_shown(question, methods, answers) for question in questions.values()]
    tasks = methods[0].tasks
    # Of each task first those that some lost and others remember, then those that most have lost.
    lost = {id(shown): sum(fate.lost for fate in shown.fates) for shown in candidates}
    candidates.sort(key=lambda shown: (bool(shown.pairs), lost[id(shown)]), reverse=True)
    candidates.sort(key=lambda shown: tasks.index(shown.question.task))
    pairs = Counter(pair for shown in candidates for pair in shown.pairs)
    counts = [[pairs[a, b] for b in range(len(methods))] for a in range(len(methods))]
    chosen = _choose(candidates)
    shown = [candidate for index, candidate in enumerate(candidates) if index in chosen]
    return Comparison(shown, len(candidates), counts, _first_pair(methods, pairs))


def _choose(candidates: Sequence[Shown]) -> set[int]:
    """Places of the samples to show: some for each pair of methods, then some of each task."""
    chosen: set[int] = set()
    budget = IMAGE_BUDGET
    pairs: Counter[tuple[int, int]] = Counter()
    tasks: Counter[str] = Counter()

    def take(index: int) -> None:
        nonlocal budget
        question = candidates[index].question
        size = len(question.image or "")
        if index not in chosen and size <= budget:
            budget -= size
            chosen.add(index)
            tasks[question.task] += 1
            pairs.update(candidates[index].pairs)

    # What tells most pairs apart first; of equals the tasks in turn.
    turns: Counter[str] = Counter()
    order = []
    for index, shown in enumerate(candidates):
        turns[shown.question.task] += 1
        order.append((-len(shown.pairs), turns[shown.question.task], index))
    for *_, index in sorted(order):
        if len(chosen) < MOST and any(pairs[pair] < PER_PAIR for pair in candidates[index].pairs):
            take(index)
    for index, shown in enumerate(candidates):
        if tasks[shown.question.task] < PER_TASK:
            take(index)
    return chosen


def _first_pair(methods: Sequence[Method], counts: Mapping[tuple[int, int], int]) -> tuple[int, int] | None:
    """The method that forgot least beside the one that lost most of what it still answers."""
    order = [method.index for method in ranked(methods)]
    pairs = sorted(permutations(range(len(methods)), 2), key=lambda pair: -counts[pair])
    for first in [*order, None]:
        for pair in pairs:
            if counts[pair] and first in (pair[0], None):
                return pair
    return None


def _shown(
    question: Question, methods: Sequence[Method], answers: Sequence[Mapping[tuple[int, str, str], Answer]]
) -> Shown:
    tasks, key = methods[0].tasks, (question.task, question.id)
    first = tasks.index(question.task)
    last = max((method.stages for method in methods if not method.level), default=0)
    fates = []
    for method, by_stage in zip(methods, answers, strict=True):
        if method.level:  # one stage after all tasks: its answer stands in the last column
            row = [None] * max(0, last - first - 1) + [by_stage.get((1, *key))]
        else:
            row = [by_stage.get((stage, *key)) for stage in range(first + 1, last + 1)]
        fates.append(_fate(method, row))
    return Shown(question, tasks[first:last] if last > first else ("all tasks",), fates)


def _fate(method: Method, answers: Sequence[Answer | None]) -> Fate:
    present = [index for index, answer in enumerate(answers) if answer]
    right = [index for index, answer in enumerate(answers) if answer and answer.right]
    if not present:
        return Fate(method, answers)
    last = answers[present[-1]]
    if right and right[-1] == present[-1]:
        return Fate(method, answers, last, remembered=method.level or len(right) > 1)
    if not right:
        return Fate(method, answers, last)
    before = answers[right[-1]]
    assert before is not None
    lost_at = next(index for index in present if index > right[-1])
    return Fate(method, answers, last, lost=True, lost_at=lost_at, before=before.text)


def _questions(run: Run) -> Iterator[Question]:
    """The records of the run's samples.json, checked; none if the run has no such file."""
    file = run.path / "samples.json"
    for position, record in enumerate(read_json(file, list[ShownSample]) if file.exists() else (), start=1):
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


def _answers(run: Run, keys: set[tuple[str, str]]) -> dict[tuple[int, str, str], Answer]:
    """(stage, task, id) -> answer, for the wanted (task, id) of the stages that are done."""
    answers = {}
    tasks = {task for task, _ in keys}
    folders = stage_folders(run.path) if run.trained else [(1, "", run.path / "zero-shot")]
    for stage, _, folder in folders:
        if not run.level and stage > run.stages:
            continue
        for file in sorted((folder / "predictions").glob("*.jsonl")):
            for record in read_json_lines(file, Scored) if file.stem in tasks else ():
                if (file.stem, str(record["id"])) in keys:
                    score, lenient = record["score"], record.get("lenient", record["score"])
                    key = (1 if run.level else stage, file.stem, str(record["id"]))
                    answers[key] = Answer(record["prediction"], score >= 0.5, lenient >= 0.5)
    return answers
