"""What each task's scorer reads: the test record, with the annotation files of the image root joined into it.

A training record becomes a reference as well, so that some can be held out for validation.
"""

import re
from pathlib import Path
from typing import Any

from dymoe.errors import DymoeError
from dymoe.tasks.index import Reference, verify
from dymoe.tasks.llava import Record, box_text, read_box
from dymoe.tasks.scoring import soft_accuracy
from dymoe.tasks.scoring.annotations import FILES, Annotations, counts, load

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CHOICE = re.compile(r"^([A-Z])\. (.+)$", re.MULTILINE)
_LETTER = re.compile(r"^\(?([A-Z])\)?[.:)]?(?:\s|$)")


def make(task: str, test: bool, files: tuple[Path, ...], rule: str) -> Reference:
    """The function that gives the reference of a task's records and says whether the record can be scored by it.

    Args:
        task: the task.
        test: whether the records are of its test file.
        files: the task's annotation files.
        rule: the scoring rule's name.

    Raises:
        DymoeError: an annotation file is missing or has another form, or there is no such rule.
    """
    return verify(_reader(task, test, files), rule, test)


def _reader(task: str, test: bool, files: tuple[Path, ...]) -> Reference:
    if task == "Grounding":
        return _grounding_test if test else _grounding_train
    if task == "ScienceQA" and not test:
        return _science_train(load(task, files[0]))
    if test:
        return _joined(load(task, files[0])) if task in FILES else _plain
    return {"TextVQA": _one_person, "GQA": _balanced}.get(task, _plain)


def _plain(record: Record) -> tuple[dict[str, Any], bool]:
    return {"question_id": record.id, **record.fields, "answer": record.answer}, True


def _joined(annotations: Annotations) -> Reference:
    """Test records, each with what the task's annotation file says of it."""

    def read(record: Record) -> tuple[dict[str, Any], bool]:
        fields = {**_plain(record)[0], **annotations.fields(record.id)}
        return fields, counts(fields)

    return read


def _science_train(problems: Annotations) -> Reference:
    """A training record has the letter and the choices in its text where the problems do not know it."""

    def read(record: Record) -> tuple[dict[str, Any], bool]:
        fields, _ = _plain(record)
        if record.id in problems.entries:
            return {**fields, **problems.fields(record.id)}, True
        choices = [text for _, text in _CHOICE.findall(record.question)]
        letter = _LETTER.match(record.answer)
        right = letter is not None and LETTERS.index(letter[1]) < max(len(choices), 1)
        return {**fields, "answer": letter[1] if letter and right else record.answer, "choices": choices}, right

    return read


def _one_person(record: Record) -> tuple[dict[str, Any], bool]:
    """In training TextVQA has one answer where ten people's are scored: it stands ten times."""
    return {**_plain(record)[0], "answers": [record.answer] * soft_accuracy.PEOPLE}, True


def _balanced(record: Record) -> tuple[dict[str, Any], bool]:
    return {**_plain(record)[0], "isBalanced": True}, True


def _grounding_test(record: Record) -> tuple[dict[str, Any], bool]:
    fields, _ = _plain(record)
    value = record.fields.get("answer_bbox", record.answer)
    size = _size(record.fields.get("size"))
    return {**fields, "answer_bbox": box_text(value), **_normalised(value), "size": size}, True


def _grounding_train(record: Record) -> tuple[dict[str, Any], bool]:
    fields, _ = _plain(record)
    if read_box(record.answer) is None:
        return fields, False
    # The size scales both boxes alike, so the overlap does not depend on it; no picture is opened for it.
    return {**fields, "answer_bbox": record.answer, **_normalised(record.answer), "size": [1, 1]}, True


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
