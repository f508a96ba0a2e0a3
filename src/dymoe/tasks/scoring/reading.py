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
from dymoe.files import sha256_of
from dymoe.messages import brief
from dymoe.tasks.llava import Names, record_id, reference
from dymoe.tasks.recordfile import numbered, read_records
from dymoe.tasks.scoring import annotations as files
from dymoe.tasks.scoring import letter
from dymoe.tasks.scoring.text import as_text


@dataclass(frozen=True)
class Source:
    """A file as it was read: its path, the SHA-256 of its bytes, and how many records it holds."""

    path: str
    sha256: str
    records: int


@dataclass(frozen=True)
class Prediction:
    """One answer of a model: the line it stands on, counted from 1, the question's id and the text.

    `of_run` says that it stands in the form of a run's own answers.
    """

    line: int
    id: str
    text: str
    of_run: bool = False


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
    predictions = []
    for number, record in numbered(Path(path)):
        where = f"{path}: line {number}"
        if not isinstance(record, dict):
            raise DymoeError(f"{where}: must be a JSON object with question_id and text, not {brief(record)}")
        of_run = {"id", "prediction"} <= record.keys() and "question_id" not in record
        if not of_run and "prompt" not in record and record.keys() & {"answer", "answer_bbox"} and "text" in record:
            raise DymoeError(f"{where}: is a test record, whose 'text' is the question; were the two files exchanged?")
        identity = _identity(record, where)
        text = as_text(record.get("prediction" if of_run else "text"))
        if not isinstance(text, str):
            raise DymoeError(
                f"{where} (question_id {identity!r}): 'text' must be a text, not {brief(record.get('text'))}"
            )
        predictions.append(Prediction(number, identity, text, of_run))
    return predictions, _source(path, len(predictions))


def name_predictions(predictions: Sequence[Prediction], right: References, path: str) -> list[Prediction]:
    """The predictions by the names of their questions, where several questions have one id.

    A run's own answers have these names (``7``, ``7#2``, see `dymoe.tasks.llava.Names`); in a file of another tool the
    answers to an id belong to its questions in their order, if they are as many.

    Raises:
        DymoeError: they are not as many, so nobody knows which answers are missing.
    """
    questions = Counter(record["question_id"] for record in right.records.values())
    counts = Counter(each.id for each in predictions)
    names, named = Names(), []
    for each in predictions:
        if questions[each.id] < 2 or each.of_run or f"{each.id}#2" in counts:
            named.append(each)
            continue
        if counts[each.id] != questions[each.id]:
            raise DymoeError(
                f"{path}: line {each.line}: question_id {each.id!r} is there {counts[each.id]} times, in "
                f"{right.origin} {questions[each.id]} times; which answer belongs to which question is not known"
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
    references = References(records, str(path), (_source(path, len(records)),))
    if annotations is None:
        return replace(references, remarks=files.remarks_without(task, records.values(), str(path)))
    folder = Path(annotations)
    if not folder.is_dir():
        raise DymoeError(f"{folder}: no such folder; give the image root (cl_dataset) or the task's folder in it")
    if task == "ScienceQA":
        return _with_problems(references, folder)
    return _extended(references, task, folder) if task in files.FILES else references


def _with_problems(references: References, folder: Path) -> References:
    problems_path, splits_path = (_find(folder, "ScienceQA", name) for name in files.FILES["ScienceQA"])
    problems, ids = files.load("ScienceQA", problems_path), files.split_questions(splits_path)
    records = {identity: {"question_id": identity, **problems.fields(identity)} for identity in ids}
    remarks = []
    outside = [identity for identity in references.records if identity not in records]
    if outside:
        remarks.append(
            f"{len(outside)} records of {references.origin} are not in the {files.SPLIT} split of {splits_path} and do "
            f"not count (first: {outside[0]!r})"
        )
    other = [key for key, record in references.records.items() if key in records and _differ(record, records[key])]
    if other:
        remarks.append(
            f"{len(other)} records of {references.origin} have another answer than {problems_path}, which counts "
            f"(first: {other[0]!r})"
        )
    sources = (_source(problems_path, len(problems.entries)), _source(splits_path, len(ids)))
    return References(records, str(problems_path), (*references.sources, *sources), tuple(remarks))


def _differ(record: Mapping[str, Any], problem: Mapping[str, Any]) -> bool:
    """Whether both name an answer, and not the same."""
    try:
        return letter.read_choice({"answer": record.get("answer")})[0] != problem["answer"]
    except DymoeError:
        return False


def _extended(references: References, task: str, folder: Path) -> References:
    """The references with what the task's annotation file says of each, which has to know them all."""
    path = _find(folder, task, files.FILES[task][0])
    more = files.load(task, path)
    ids = [record["question_id"] for record in references.records.values()]
    if lacking := [identity for identity in ids if identity not in more.entries]:
        raise DymoeError(
            f"{path}: record {lacking[0]!r} of {references.origin} is missing ({len(lacking)} are); do the two belong "
            "together?"
        )
    records = {name: {**record, **more.fields(record["question_id"])} for name, record in references.records.items()}
    return References(records, str(path), (*references.sources, _source(path, len(more.entries))))


def _find(folder: Path, task: str, name: str) -> Path:
    for path in (folder / name, folder / task / name):
        if path.is_file():
            return path
    raise DymoeError(
        f"{folder}: no {name} here and none in {task}/; give the image root (cl_dataset) or its {task} folder"
    )


def _source(path: str | Path, records: int) -> Source:
    return Source(str(path), sha256_of(Path(path)), records)


def _identity(record: Mapping[str, Any], where: str) -> str:
    try:
        return record_id(record, test=True)
    except DymoeError as error:
        raise DymoeError(f"{where}: {error}") from None
