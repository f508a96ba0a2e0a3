"""What a task's annotation file says of its questions: CoIN keeps the truth of three tasks outside the records.

ScienceQA's answers and choices stand in ``problems.json``, TextVQA's ten answers in ``TextVQA_0.5.1_val.json``, GQA's
answers and which of its questions are balanced in ``testdev_balanced_questions.json``. A run joins them into its
records (`dymoe.tasks.coin.references`), `dymoe score` into the references of a file (`dymoe.tasks.scoring.reading`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dymoe.errors import DymoeError
from dymoe.files import read_json
from dymoe.messages import brief
from dymoe.tasks.llava import record_id
from dymoe.tasks.scoring import letter, soft_accuracy

FILES: Mapping[str, tuple[str, ...]] = {
    "ScienceQA": ("problems.json", "pid_splits.json"),
    "TextVQA": ("TextVQA_0.5.1_val.json",),
    "GQA": ("testdev_balanced_questions.json",),
}
SPLIT = "test"


@dataclass(frozen=True)
class Annotations:
    """The entries of an annotation file by question id, as they stand; `read` makes an entry fields of a reference."""

    path: Path
    entries: Mapping[str, Any]
    read: Callable[[Any], dict[str, Any]]

    def fields(self, question: str) -> dict[str, Any]:
        """What the scoring rule of the task reads of a question.

        Raises:
            DymoeError: the file has no such question, or its entry cannot be used.
        """
        if question not in self.entries:
            raise DymoeError(f"{self.path} has no question {question!r}, so its answer is not known")
        try:
            return self.read(self.entries[question])
        except DymoeError as error:
            raise DymoeError(f"{self.path}: question {question!r}: {error}") from None


def load(task: str, path: Path) -> Annotations:
    """Read the annotation file of a task that has one (the first of `FILES`).

    Raises:
        DymoeError: the file cannot be read or is no object with one entry a question.
    """
    if task == "TextVQA":
        return Annotations(path, _by_question(mapping(path), path), _people)
    return Annotations(path, mapping(path), _problem if task == "ScienceQA" else _balance)


def counts(reference: Mapping[str, Any]) -> bool:
    """Whether a question counts in its task's score: of GQA's, those of the balanced set alone do."""
    return reference.get("isBalanced") is not False


def remarks_without(task: str, records: Iterable[Mapping[str, Any]], origin: str) -> tuple[str, ...]:
    """What is to be said where a task is scored by its records alone, without its annotation file.

    Args:
        task: the task.
        records: its references.
        origin: their file, for messages.

    Raises:
        DymoeError: the records do not hold what the rule needs.
    """
    if task == "TextVQA" and any(record.get("answers") is None for record in records):
        raise DymoeError(
            f"{origin}: TextVQA's records hold no 'answers'; give the folder with {FILES[task][0]} as annotations"
        )
    if task == "GQA" and any("isBalanced" not in record for record in records):
        return ("no annotation file: every question counts as balanced",)
    return ()


def split_questions(path: Path) -> list[str]:
    """The ids of ScienceQA's test split, from ``pid_splits.json``.

    Raises:
        DymoeError: the file holds no list of ids under "test".
    """
    ids = mapping(path).get(SPLIT)
    if not isinstance(ids, list) or not ids:
        raise DymoeError(f"{path}: {SPLIT!r} must be a list of question ids, not {brief(ids)}")
    return [str(question) for question in ids]


def mapping(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        DymoeError: the file cannot be read or holds no object.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise DymoeError(f"{path}: must be a JSON object, not {brief(value)}")
    return value


def _by_question(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    entries = content.get("data")
    if not isinstance(entries, list):
        raise DymoeError(f"{path}: 'data' must be a list of questions, not {brief(entries)}")
    questions = {}
    for number, entry in enumerate(entries, start=1):
        where = f"{path}: record number {number} of 'data'"
        if not isinstance(entry, dict):
            raise DymoeError(f"{where}: must be a JSON object, not {brief(entry)}")
        try:
            questions[record_id(entry, test=True)] = entry
        except DymoeError as error:
            raise DymoeError(f"{where}: {error}") from None
    return questions


def _entry(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise DymoeError(f"must be a JSON object, not {brief(value)}")
    return value


def _problem(value: Any) -> dict[str, Any]:
    answer, choices = letter.read_choice(_entry(value))
    return {"answer": answer, "choices": choices}


def _people(value: Any) -> dict[str, Any]:
    return {"answers": soft_accuracy.read_answers(_entry(value))}


def _balance(value: Any) -> dict[str, Any]:
    answer, balanced = _entry(value).get("answer"), _entry(value).get("isBalanced")
    if not isinstance(answer, str):
        raise DymoeError(f"'answer' must be a text, not {brief(answer)}")
    if not isinstance(balanced, bool):
        raise DymoeError(f"'isBalanced' must be true or false, not {brief(balanced)}")
    return {"answer": answer, "isBalanced": balanced}
