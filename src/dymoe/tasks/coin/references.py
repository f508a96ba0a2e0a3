"""What each task's scorer reads: the test record, with the annotation files of the image root joined into it.

CoIN keeps the truth of three tasks outside the records: ScienceQA in ``problems.json``, TextVQA's ten answers in
``TextVQA_0.5.1_val.json``, GQA in ``testdev_balanced_questions.json``. A training record becomes a reference as well,
so that some can be held out for validation.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dymoe.errors import DymoeError
from dymoe.files import read_json
from dymoe.tasks.index import Reference
from dymoe.tasks.llava import Record, box_text, read_box
from dymoe.tasks.scoring.reading import answers_by_question

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CHOICE = re.compile(r"^([A-Z])\. (.+)$", re.MULTILINE)
_LETTER = re.compile(r"^\(?([A-Z])\)?[.:)]?(?:\s|$)")


def make(task: str, test: bool, files: tuple[Path, ...], rule: str) -> Reference:
    """The function that gives the reference of a task's records and says whether the record can be scored by it.

    A test record whose reference the rule cannot read raises, so that this shows before any training; a training
    record is then only never held out.

    Args:
        task: the task.
        test: whether the records are of its test file.
        files: the task's annotation files.
        rule: the scoring rule's name.

    Raises:
        DymoeError: an annotation file is missing or has another form, or there is no such rule.
    """
    from dymoe.tasks.scoring import scorer

    read, score = _reader(task, test, files), scorer(rule)

    def reference(record: Record) -> tuple[dict[str, Any], bool]:
        told, scorable = read(record)
        if scorable:
            try:
                score(record.answer, told)
            except DymoeError:
                if test:
                    raise
                scorable = False
        return told, scorable

    return reference


def _reader(task: str, test: bool, files: tuple[Path, ...]) -> Reference:
    if task == "ScienceQA":
        return _ScienceQA(files[0], test)
    if task == "TextVQA":
        return _TextVQA(files[0] if test else None)
    if task == "GQA":
        return _GQA(files[0] if test else None)
    if task == "Grounding":
        return _grounding_test if test else _grounding_train
    return _plain


def _plain(record: Record) -> tuple[dict[str, Any], bool]:
    return {"question_id": record.id, **record.fields, "answer": record.answer}, True


class _ScienceQA:
    """The letter and the choices by the problem's number; a training record may have them in its text alone."""

    def __init__(self, path: Path, test: bool) -> None:
        self.path = path
        self.test = test
        self.problems = _mapping(path)

    def __call__(self, record: Record) -> tuple[dict[str, Any], bool]:
        told, _ = _plain(record)
        problem = self.problems.get(record.id)
        if problem is None:
            if self.test:
                raise DymoeError(f"{self.path} has no problem {record.id!r}, so its answer is not known")
            choices = [text for _, text in _CHOICE.findall(record.question)]
            letter = _LETTER.match(record.answer)
            right = letter is not None and LETTERS.index(letter[1]) < max(len(choices), 1)
            return {**told, "answer": letter[1] if letter and right else record.answer, "choices": choices}, right
        choices, answer = _key(problem, "choices", self.path, record.id), _key(problem, "answer", self.path, record.id)
        right = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
        if not right or not isinstance(answer, int) or not 0 <= answer < min(len(choices), len(LETTERS)):
            raise DymoeError(f"{self.path}: problem {record.id!r}: 'answer' must be the place of one of its 'choices'")
        return {**told, "answer": LETTERS[answer], "choices": choices}, True


class _TextVQA:
    """Ten people's answers by the question's number; in training the one answer there is, ten times."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.answers = {} if path is None else answers_by_question(read_json(path), path)

    def __call__(self, record: Record) -> tuple[dict[str, Any], bool]:
        told, _ = _plain(record)
        if self.path is None:
            return {**told, "answers": [record.answer] * 10}, True
        if record.id not in self.answers:
            raise DymoeError(f"{self.path} has no question {record.id!r}, so its ten answers are not known")
        answers = self.answers[record.id]
        if not isinstance(answers, list) or len(answers) != 10 or not all(isinstance(text, str) for text in answers):
            raise DymoeError(f"{self.path}: question {record.id!r}: 'answers' must be ten texts")
        return {**told, "answers": answers}, True


class _GQA:
    """The answer, and whether the question is of the balanced set, by the question's number."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.questions = {} if path is None else _mapping(path)

    def __call__(self, record: Record) -> tuple[dict[str, Any], bool]:
        told, _ = _plain(record)
        if self.path is None:
            return {**told, "isBalanced": True}, True
        if record.id not in self.questions:
            raise DymoeError(f"{self.path} has no question {record.id!r}, so its answer is not known")
        question = self.questions[record.id]
        answer = _key(question, "answer", self.path, record.id)
        if not isinstance(answer, str):
            raise DymoeError(f"{self.path}: question {record.id!r}: 'answer' must be a text")
        balanced = question.get("isBalanced", True)
        if not isinstance(balanced, bool):
            raise DymoeError(f"{self.path}: question {record.id!r}: 'isBalanced' must be true or false")
        return {**told, "answer": answer, "isBalanced": balanced}, balanced  # no rule counts the others


def _grounding_test(record: Record) -> tuple[dict[str, Any], bool]:
    told, _ = _plain(record)
    value = record.fields.get("answer_bbox", record.answer)
    size = _size(record.fields.get("size"))
    return {**told, "answer_bbox": box_text(value), **_normalised(value), "size": size}, True


def _grounding_train(record: Record) -> tuple[dict[str, Any], bool]:
    told, _ = _plain(record)
    if read_box(record.answer) is None:
        return told, False
    # The size scales both boxes alike, so the overlap does not depend on it; no picture is opened for it.
    return {**told, "answer_bbox": record.answer, **_normalised(record.answer), "size": [1, 1]}, True


def _normalised(value: Any) -> dict[str, Any]:
    """The box as numbers under "bbox", where it is a box between 0 and 1."""
    box = read_box(value)
    right = box is not None and all(0 <= part <= 1 for part in box) and box[0] < box[2] and box[1] < box[3]
    return {"bbox": list(box)} if box is not None and right else {}


def _size(value: Any) -> list[float]:
    if isinstance(value, str):
        value = [float(part) if part.strip().isdigit() else None for part in value.strip(" []()").split(",")]
    parts = value if isinstance(value, list) else []
    right = [isinstance(part, int | float) and not isinstance(part, bool) and part > 0 for part in parts]
    if len(right) != 2 or not all(right):
        raise DymoeError(f"'size' must be the picture's width and height [w, h], found {value!r}")
    return list(parts)


def _mapping(path: Path) -> Mapping[str, Any]:
    values = read_json(path)
    if not isinstance(values, Mapping):
        raise DymoeError(f"{path}: expected an object with one entry per question")
    return values


def _key(entry: Any, key: str, path: Path, name: str) -> Any:
    if not isinstance(entry, Mapping) or key not in entry:
        raise DymoeError(f"{path}: {name!r}: it has no {key!r}")
    return entry[key]
