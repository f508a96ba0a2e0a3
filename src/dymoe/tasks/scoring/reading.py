"""Reading what a file of answers is scored with: predictions, references, published annotations.

Formats: CoIN's. A prediction has `question_id` and `text` (in a run's own files `id` and `prediction`); a reference has
`question_id` and the fields that its rule reads. Files and records are read as a run reads them
(`dymoe.tasks.recordfile`, `dymoe.tasks.llava`). Ids are numbers in some files and texts in others, so they are compared
as texts.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dymoe.errors import DymoeError
from dymoe.files import parse_json, read_bytes, sha256_of
from dymoe.messages import brief
from dymoe.tasks.llava import Names, record_id, reference
from dymoe.tasks.recordfile import numbered, read_records
from dymoe.tasks.scoring import letter
from dymoe.tasks.scoring.text import as_text

ANNOTATIONS: Mapping[str, tuple[str, ...]] = {
    "ScienceQA": ("problems.json", "pid_splits.json"),
    "TextVQA": ("TextVQA_0.5.1_val.json",),
    "GQA": ("testdev_balanced_questions.json",),
}
SPLIT = "test"


@dataclass(frozen=True)
class Source:
    """A file as it was read: its path, the SHA-256 of its bytes, and how many records it holds."""

    path: str
    sha256: str
    records: int


@dataclass(frozen=True)
class Prediction:
    """One answer of a model: the line it stands on, counted from 1, the question's id and the text.

    `own` says that it stands in the form of a run's own answers.
    """

    line: int
    id: str
    text: str
    own: bool = False


@dataclass(frozen=True)
class References:
    """What is right, by question id in the order of the file; `origin` is the file that messages name."""

    records: Mapping[str, Mapping[str, Any]]
    origin: str
    sources: tuple[Source, ...]
    remarks: tuple[str, ...] = field(default=())


def read_predictions(path: str | Path) -> tuple[list[Prediction], Source]:
    """Read a predictions file, CoIN's or one of a run (`stages/*/predictions/<task>.jsonl`): JSON lines or a JSON list.

    Raises:
        DymoeError: names the file and the first line that is no JSON object with a `question_id` and a `text`.
    """
    found = []
    for number, record in numbered(Path(path)):
        where = f"{path}: line {number}"
        if not isinstance(record, dict):
            raise DymoeError(f"{where}: must be a JSON object with question_id and text, not {brief(record)}")
        own = {"id", "prediction"} <= record.keys() and "question_id" not in record
        if not own and "prompt" not in record and record.keys() & {"answer", "answer_bbox"} and "text" in record:
            raise DymoeError(f"{where}: is a test record, whose 'text' is the question; were the two files exchanged?")
        identity = _identity(record, where)
        text = as_text(record.get("prediction" if own else "text"))
        if not isinstance(text, str):
            raise DymoeError(
                f"{where} (question_id {identity!r}): 'text' must be a text, not {brief(record.get('text'))}"
            )
        found.append(Prediction(number, identity, text, own))
    return found, _source(path, len(found))


def name_predictions(said: Sequence[Prediction], right: References, path: str) -> list[Prediction]:
    """The predictions by the names of their questions, where several questions have one id.

    A run's own answers have these names (``7``, ``7#2``, see `dymoe.tasks.llava.Names`); in a file of another tool the
    answers to an id belong to its questions in their order, if they are as many.

    Raises:
        DymoeError: they are not as many, so nobody knows which answers are missing.
    """
    asked = Counter(record["question_id"] for record in right.records.values())
    counts = Counter(each.id for each in said)
    names, named = Names(), []
    for each in said:
        if asked[each.id] < 2 or each.own or f"{each.id}#2" in counts:
            named.append(each)
            continue
        if counts[each.id] != asked[each.id]:
            raise DymoeError(
                f"{path}: line {each.line}: question_id {each.id!r} is there {counts[each.id]} times, in "
                f"{right.origin} {asked[each.id]} times; which answer belongs to which question is not known"
            )
        named.append(replace(each, id=names.name(each.id)))
    return named


def read_references(path: str | Path, task: str, annotations: str | Path | None = None) -> References:
    """Read a references file and, where the task has them, its annotation files.

    Args:
        path: the test records, CoIN's test.json or val.json, or one's own in any form that a run reads.
        task: CoIN's name of the task.
        annotations: the image root (cl_dataset) or the folder with the task's annotation files. ScienceQA's
            problems.json and pid_splits.json then say which questions there are and what is right, TextVQA's
            validation file gives `answers`, GQA's testdev file `answer` and `isBalanced`. Other tasks have none.

    Raises:
        DymoeError: names the file and the record that cannot be used.
    """
    records: dict[str, Mapping[str, Any]] = {}
    names = Names()
    for number, value in enumerate(read_records(Path(path))):
        try:
            identity, record = reference(value)
        except DymoeError as error:
            raise DymoeError(f"{path}: record {number}: {error}") from None
        records[names.name(identity)] = {**record, "question_id": identity}
    if not records:
        raise DymoeError(f"{path}: it holds no records")
    found = References(records, str(path), (_source(path, len(records)),))
    if annotations is None:
        return found
    folder = Path(annotations)
    if not folder.is_dir():
        raise DymoeError(f"{folder}: no such folder; give the image root (cl_dataset) or the task's folder in it")
    if task == "ScienceQA":
        return _with_problems(found, folder)
    if task == "TextVQA":
        return _with_answers(found, folder)
    return _with_balance(found, folder) if task == "GQA" else found


def _with_problems(references: References, folder: Path) -> References:
    problems_path, splits_path = (_find(folder, "ScienceQA", name) for name in ANNOTATIONS["ScienceQA"])
    problems, first = _object(problems_path)
    splits, second = _object(splits_path)
    ids = splits.get(SPLIT)
    if not isinstance(ids, list) or not ids:
        raise DymoeError(f"{splits_path}: {SPLIT!r} must be a list of question ids, not {brief(ids)}")
    records: dict[str, Mapping[str, Any]] = {}
    for identity in map(str, ids):
        problem = problems.get(identity)
        if not isinstance(problem, dict):
            raise DymoeError(f"{problems_path}: record {identity!r}: must be an object, as {splits_path} names it")
        records[identity] = {"question_id": identity, **{key: problem.get(key) for key in ("answer", "choices")}}
    remarks = []
    outside = [identity for identity in references.records if identity not in records]
    if outside:
        remarks.append(
            f"{len(outside)} records of {references.origin} are not in the {SPLIT} split of {splits_path} and do not "
            f"count (first: {outside[0]!r})"
        )
    other = [key for key, record in references.records.items() if key in records and _differ(record, records[key])]
    if other:
        remarks.append(
            f"{len(other)} records of {references.origin} have another answer than {problems_path}, which counts "
            f"(first: {other[0]!r})"
        )
    return References(records, str(problems_path), (*references.sources, first, second), tuple(remarks))


def _differ(record: Mapping[str, Any], problem: Mapping[str, Any]) -> bool:
    """Whether both name an answer, and not the same."""
    try:
        return letter.read_choice({"answer": record.get("answer")})[0] != letter.read_choice(problem)[0]
    except DymoeError:
        return False


def _with_answers(references: References, folder: Path) -> References:
    path = _find(folder, "TextVQA", ANNOTATIONS["TextVQA"][0])
    content, source = _object(path)
    answers = answers_by_question(content, path)
    return _extended(references, path, source, {key: {"answers": value} for key, value in answers.items()})


def answers_by_question(content: Any, path: Path) -> dict[str, Any]:
    """The answers in TextVQA's annotation file (its value, for messages its path) by question id, as they stand.

    Raises:
        DymoeError: names the first entry that cannot be used.
    """
    entries = content.get("data") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise DymoeError(f"{path}: 'data' must be a list of questions, not {brief(entries)}")
    answers = {}
    for number, entry in enumerate(entries, start=1):
        where = f"{path}: record number {number} of 'data'"
        if not isinstance(entry, dict):
            raise DymoeError(f"{where}: must be a JSON object, not {brief(entry)}")
        answers[_identity(entry, where)] = entry.get("answers")
    return answers


def _with_balance(references: References, folder: Path) -> References:
    path = _find(folder, "GQA", ANNOTATIONS["GQA"][0])
    content, source = _object(path)
    more = {}
    for identity in {record["question_id"] for record in references.records.values()}:
        question = content.get(identity)
        if not isinstance(question, dict):
            continue
        balanced = question.get("isBalanced")
        if not isinstance(balanced, bool):
            raise DymoeError(f"{path}: record {identity!r}: 'isBalanced' must be true or false, not {brief(balanced)}")
        more[identity] = {key: question.get(key) for key in ("answer", "isBalanced")}
    return _extended(references, path, source, more)


def _extended(references: References, path: Path, source: Source, more: Mapping[str, Mapping[str, Any]]) -> References:
    asked = {name: record["question_id"] for name, record in references.records.items()}
    lacking = [identity for identity in asked.values() if identity not in more]
    if lacking:
        raise DymoeError(
            f"{path}: record {lacking[0]!r} of {references.origin} is missing ({len(lacking)} are); do the two belong "
            "together?"
        )
    records = {name: {**record, **more[asked[name]]} for name, record in references.records.items()}
    return References(records, str(path), (*references.sources, source))


def _find(folder: Path, task: str, name: str) -> Path:
    for path in (folder / name, folder / task / name):
        if path.is_file():
            return path
    raise DymoeError(
        f"{folder}: no {name} here and none in {task}/; give the image root (cl_dataset) or its {task} folder"
    )


def _object(path: Path) -> tuple[dict[str, Any], Source]:
    value = parse_json(read_bytes(path), str(path))
    if not isinstance(value, dict):
        raise DymoeError(f"{path}: must be a JSON object, not {brief(value)}")
    return value, _source(path, len(value))


def _source(path: str | Path, records: int) -> Source:
    return Source(str(path), sha256_of(Path(path)), records)


def _identity(record: Mapping[str, Any], where: str) -> str:
    try:
        return record_id(record, test=True)
    except DymoeError as error:
        raise DymoeError(f"{where}: {error}") from None
