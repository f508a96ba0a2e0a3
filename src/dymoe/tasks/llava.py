"""Records in LLaVA's format: reading the file, understanding one record.

Two kinds are understood. A conversation (LLaVA, CoIN's training files): ``id`` or ``question_id``, ``image`` unless the
question is of text alone, ``conversations: [{from: human|gpt, value}]``. A question (CoIN's test files):
``question_id`` or ``id``, ``image``, ``text`` and ``answer``, for boxes ``answer_bbox`` and ``size`` instead. The image
token may stand in the text or not; the picture decides whether there is one, the text never does.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dymoe.errors import DymoeError
from dymoe.files import not_itself, read_bytes

IMAGE_TOKEN = "<image>"
ASKING, ANSWERING = ("human", "user"), ("gpt", "assistant")
_SPACE = re.compile(r"[ \t\r\n]*")
_KEPT_APART = ("conversations", "text", "image")  # of a record, what does not go into its reference


@dataclass(frozen=True)
class Record:
    """One record understood.

    Attributes:
        id: as the file has it, a text.
        image: path relative to the image root, None without one.
        data: the encoded picture itself where the file holds it.
        question: without image token.
        answer: text.
        turns: the later (question, answer) pairs of the conversation.
        fields: the record's other keys.
    """

    id: str
    image: str | None
    data: bytes | None
    question: str
    answer: str
    turns: tuple[tuple[str, str], ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_image(self) -> bool:
        """Whether a picture belongs to it."""
        return self.image is not None or self.data is not None


def read_records(path: Path) -> Iterator[Any]:
    """The records of a JSON list, JSON lines or parquet file, one after another, not yet understood.

    A JSON list is decoded record by record, so that the whole of it is never in memory as objects.

    Raises:
        DymoeError: no such file, another format, or text that breaks off; the message names the record reached.
    """
    if not path.is_file():
        raise DymoeError(f"{path}: no such file")
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    data = read_bytes(path)
    lines = path.suffix == ".jsonl"  # of which there may be none
    if (instead := not_itself(data)) and not (lines and not data.strip()):
        raise DymoeError(f"{path}: {instead}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DymoeError(f"{path}: cannot be read ({error})") from error
    del data
    yield from (_lines(path, text) if lines else _list(path, text))


def _list(path: Path, text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    place = _after_space(text, 0)
    if text[place : place + 1] != "[":
        raise DymoeError(f"{path}: expected a JSON list of records, it starts with {text[place : place + 10]!r}")
    place = _after_space(text, place + 1)
    number = 0
    closed = text[place : place + 1] == "]"
    while not closed:
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise DymoeError(f"{path}: record {number}: not valid JSON ({error}); is the file whole?") from None
        yield value
        place = _after_space(text, place)
        mark = text[place : place + 1]
        closed = mark == "]"
        if not closed and mark != ",":
            raise DymoeError(f"{path}: after record {number}: expected ',' or ']', found {mark!r}; is the file whole?")
        if not closed:
            place = _after_space(text, place + 1)
            number += 1
    if _after_space(text, place + 1) != len(text):
        raise DymoeError(f"{path}: something stands behind the end of the list, after record {number}")


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return place if found is None else found.end()


def _lines(path: Path, text: str) -> Iterator[Any]:
    number = 0
    for line in text.split("\n"):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DymoeError(f"{path}: record {number}: not valid JSON ({error})") from None
            number += 1


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DymoeError(f"{path}: cannot be read as parquet ({error})") from error


def parse(value: Any, test: bool) -> Record:
    """Understand one record.

    Args:
        value: what the file holds.
        test: whether it is a test record: its ``question_id`` is its name, and one question alone can be scored.

    Raises:
        DymoeError: what is wrong with it and what would be right; the caller adds file and record.
    """
    if not isinstance(value, Mapping):
        raise DymoeError(f"expected an object with keys, found {type(value).__name__}")
    turns = _conversation(value["conversations"]) if value.get("conversations") is not None else (_question(value),)
    if test and len(turns) > 1:
        raise DymoeError(f"'conversations': {len(turns)} questions; a test record must have one, so that it is scored")
    (question, answer), *later = turns
    image, data = _image(value.get("image"))
    fields = {key: item for key, item in value.items() if key not in _KEPT_APART}
    record = Record(record_id(value, test), image, data, question, answer, tuple(later), fields)
    for told in (record.id, record.image or "", question, answer, *(text for turn in later for text in turn)):
        try:
            told.encode()
        except UnicodeEncodeError:
            raise DymoeError(f"{told[:40]!r} holds half of a surrogate pair, which is no text") from None
    return record


def record_id(value: Mapping[str, Any], test: bool) -> str:
    """A record's name: ``id`` or, where it has none, ``question_id``; the other way round in a test file.

    Raises:
        DymoeError: it has neither.
    """
    for key in ("question_id", "id") if test else ("id", "question_id"):
        found = value.get(key)
        if isinstance(found, int | str) and not isinstance(found, bool) and str(found).strip():
            return str(found)
    raise DymoeError("neither 'id' nor 'question_id' is a text or a whole number")


def _conversation(value: Any) -> tuple[tuple[str, str], ...]:
    right = "expected a list of {from, value} with human and gpt in turn"
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise DymoeError(f"'conversations': {right}, found {type(value).__name__}")
    if value and value[0].get("from") == "system":
        value = value[1:]  # the prompt has its own system message, as in LLaVA
    if len(value) < 2 or len(value) % 2:
        raise DymoeError(f"'conversations': {right}, found {len(value)} turns; every question needs its answer")
    pairs = []
    for number in range(0, len(value), 2):
        for turn, speakers in ((value[number], ASKING), (value[number + 1], ANSWERING)):
            if turn.get("from") not in speakers:
                raise DymoeError(f"'conversations': {right}, found {turn.get('from')!r} where {speakers[0]} speaks")
        question = without_token(value[number].get("value"), f"'conversations': question {number // 2 + 1}")
        pairs.append((question, answer_text(value[number + 1].get("value"), "'conversations': an answer")))
    return tuple(pairs)


def _question(value: Mapping[str, Any]) -> tuple[str, str]:
    if "text" not in value:
        raise DymoeError("it has neither 'conversations' nor 'text'; one of them must hold the question")
    question = without_token(value["text"], "'text'")
    if value.get("answer_bbox") is not None:
        return question, box_text(value["answer_bbox"])
    if value.get("answer") is None:
        raise DymoeError("it has neither 'answer' nor 'answer_bbox'; one of them must hold what is right")
    return question, answer_text(value["answer"], "'answer'")


def without_token(text: Any, where: str) -> str:
    """A question without its image token.

    Raises:
        DymoeError: it is no text, or nothing is left.
    """
    if not isinstance(text, str):
        raise DymoeError(f"{where}: expected a text, found {type(text).__name__}")
    question = text.replace(IMAGE_TOKEN, "").strip()
    if not question:
        raise DymoeError(f"{where}: it is empty")
    return question


def answer_text(value: Any, where: str) -> str:
    """An answer as text; numbers are written out, a box as ``[x1,y1,x2,y2]``.

    Raises:
        DymoeError: it is empty or no answer.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list):
        return box_text(value)
    if not isinstance(value, str):
        raise DymoeError(f"{where}: expected a text, found {type(value).__name__}")
    if not value.strip():
        raise DymoeError(f"{where}: it is empty")
    return value.strip()


def read_box(value: Any) -> tuple[float, float, float, float] | None:
    """A box given as text ``[x1,y1,x2,y2]`` or as a list, any unit; None if it is none."""
    if isinstance(value, str):
        text = value.strip()
        if not (text.startswith("[") and text.endswith("]")):
            return None
        try:
            value = [float(part) for part in text[1:-1].split(",")]
        except ValueError:
            return None
    if not isinstance(value, list) or len(value) != 4:
        return None
    if not all(isinstance(part, int | float) and not isinstance(part, bool) for part in value):
        return None
    try:
        x1, y1, x2, y2 = (float(part) for part in value)
    except OverflowError:
        return None
    return (x1, y1, x2, y2) if all(map(math.isfinite, (x1, y1, x2, y2))) else None


def box_text(value: Any) -> str:
    """A box as the text that a model learns to write; a text stays as it is.

    Raises:
        DymoeError: it is no box.
    """
    if read_box(value) is None:
        raise DymoeError(f"expected a box '[x1,y1,x2,y2]' of four finite numbers, found {str(value)[:60]!r}")
    return value.strip() if isinstance(value, str) else "[" + ",".join(map(str, value)) + "]"


def _image(value: Any) -> tuple[str | None, bytes | None]:
    """Path or bytes of a record's picture; `datasets` writes both as {bytes, path}."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or value == "":
        return None, None
    if isinstance(value, str):
        return value, None
    if isinstance(value, bytes):
        return None, value or None
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes) and value["bytes"]:
        return None, value["bytes"]
    if isinstance(value, Mapping) and isinstance(value.get("path"), str) and value["path"]:
        return value["path"], None
    raise DymoeError(f"'image': expected one path relative to the image root, found {type(value).__name__}")
