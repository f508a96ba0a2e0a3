"""Records in LLaVA's format, understood one at a time.

Two kinds are understood. A conversation (LLaVA, CoIN's training files, chat data of other tools): ``id`` or
``question_id``, ``image`` or ``images`` unless the question is of text alone, ``conversations: [{from: human|gpt,
value}]`` or ``messages: [{role: user|assistant, content}]``. A question (CoIN's test files): ``question_id`` or ``id``,
``image``, ``text`` and ``answer``, for boxes ``answer_bbox`` and ``size`` instead. The image token may stand in the
text or not; where it stands, there must be a picture for it. What is unambiguous is read, the rest refused.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dymoe.errors import DymoeError
from dymoe.messages import brief
from dymoe.tasks.conversation import FORMS, IMAGE_TOKEN, Turn, read_turns, without_tokens

PICTURES = ("image", "images")
ELSEWHERE = ("video", "videos", "audio", "audios")  # what a record may hold and no model here is shown
_APART = (*FORMS, "text", *PICTURES)  # of a record, what does not go into its reference
_LISTS = ("answers", "choices")  # of texts, none of them missing
_DEEPEST, _MOST_BITS, _LARGEST_ID = 50, 4096, 2**53
_LONGEST_PATH = 4096  # letters
_NEAR = 0.01  # of the largest number of a box: how far two spellings of it may differ

Box = tuple[float, float, float, float]


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
    _refuse_missing(value)
    form, turns, shown = _turns(value)
    if test and len(turns) > 1:
        raise DymoeError(f"{form!r}: {len(turns)} questions; a test record must have one, so that it is scored")
    questions = [question for question, _ in turns]
    for number, question in enumerate(questions, start=1):
        if not question.replace(IMAGE_TOKEN, "").strip():
            raise DymoeError(f"{form!r}: {'' if form == 'text' else f'question {number}: '}it is empty")
    answers = [answer_text(answer, "'answer'" if form == "text" else f"{form!r}: an answer") for _, answer in turns]
    separate = value.get("answer")
    if test and form != "text" and isinstance(separate, str) and not _agree(separate, answers[0]):
        raise DymoeError(f"'answer' {brief(separate)} is another than that of {form!r}, {brief(answers[0])}; keep one")
    image, data = _picture(value, shown)
    questions = without_tokens(questions, int(image is not None or data is not None))
    fields = reference_fields(value, answers[0])
    later = tuple(zip(questions[1:], answers[1:], strict=True))
    record = Record(record_id(value, test), image, data, questions[0], answers[0], later, fields)
    for text in (record.id, record.image or "", *questions, *answers):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DymoeError(f"{brief(text)} holds half of a surrogate pair, which is no text") from None
    return record


def reference(value: Any) -> tuple[str, dict[str, Any]]:
    """A test record's id and what a scoring rule reads of it, its answer as it stands; the question may be missing.

    Raises:
        DymoeError: as `parse`.
    """
    if not isinstance(value, Mapping):
        raise DymoeError(f"expected an object with keys, found {type(value).__name__}")
    if any(value.get(form) is not None for form in FORMS):
        record = parse(value, test=True)
        return record.id, {**record.fields, "answer": record.answer}
    _refuse_missing(value)
    answer = value.get("answer")
    return record_id(value, test=True), reference_fields(value, answer if isinstance(answer, str | list) else None)


class Names:
    """Names for the records of a file in which an id may stand more than once: later ones get ``#2``, ``#3`` behind."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def name(self, identity: str) -> str:
        """The next record's name, by its id."""
        self._counts[identity] += 1
        count = self._counts[identity]
        return identity if count == 1 else self.name(f"{identity}#{count}")


def record_id(value: Mapping[str, Any], test: bool) -> str:
    """A record's name: ``id`` or, where it has none, ``question_id``; the other way round in a test file.

    A float without a fraction counts as the whole number that some tools write so.

    Raises:
        DymoeError: it has neither.
    """
    for key in ("question_id", "id") if test else ("id", "question_id"):
        name = value.get(key)
        if isinstance(name, float) and name.is_integer() and abs(name) <= _LARGEST_ID:
            name = int(name)
        if isinstance(name, int | str) and not isinstance(name, bool) and str(name).strip():
            return str(name)
    raise DymoeError("neither 'id' nor 'question_id' is a text or a whole number")


def _refuse_missing(value: Mapping[str, Any]) -> None:
    """Refuse what stands for a missing value (NaN, an infinity), or can be no value of a record.

    Raises:
        DymoeError: the message names the key.
    """
    for key, item in value.items():
        level: list[Any] = [item]
        for _ in range(_DEEPEST):
            for each in level:
                if isinstance(each, float) and not math.isfinite(each):
                    raise DymoeError(f"{key!r}: {each} stands for a missing value; write what is right or leave it out")
                if isinstance(each, int) and each.bit_length() > _MOST_BITS:
                    raise DymoeError(f"{key!r}: a number of more digits than any value has")
            level = [part for each in level for part in _parts(each)]
            if not level:
                break
        else:
            raise DymoeError(f"{key!r}: nested more than {_DEEPEST} deep")
    for key in ELSEWHERE:
        if value.get(key):
            raise DymoeError(f"{key!r}: only pictures are shown to a model, under 'image' or 'images'")


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()


def _turns(value: Mapping[str, Any]) -> tuple[str, list[Turn], list[Any]]:
    """The key that holds the question, the (question, answer) pairs, the pictures in the conversation."""
    read = {form: read_turns(form, value[form]) for form in FORMS if value.get(form) is not None}
    if len(read) == 2 and read["conversations"] != read["messages"]:
        raise DymoeError("'conversations' and 'messages' say two things; keep one of them")
    for form, (turns, pictures) in read.items():
        return form, turns, pictures
    if value.get("text") is None:
        raise DymoeError("it has neither 'conversations' nor 'text' nor 'messages'; one of them must hold the question")
    if not isinstance(value["text"], str):
        raise DymoeError(f"'text': expected a text, found {type(value['text']).__name__}")
    answer, box = _right(value), value.get("answer_bbox")
    if box is None and answer is None:
        raise DymoeError("it has neither 'answer' nor 'answer_bbox'; one of them must hold what is right")
    text = answer if box is None or (read_box(answer) and not _agree(answer, box)) else box_text(box)
    return "text", [(value["text"], text)], []


def _right(value: Mapping[str, Any]) -> Any:
    """What a record says is right: its answer, in POPE's files its label."""
    return value.get("label") if value.get("answer") is None else value["answer"]


def _picture(value: Mapping[str, Any], shown: list[Any]) -> tuple[str | None, bytes | None]:
    """Path or bytes of a record's picture; None and None without one.

    Args:
        value: the record.
        shown: the pictures that stand in its conversation.
    """
    values = {key: value[key] for key in PICTURES if value.get(key) is not None}
    lists = {key: item if isinstance(item, list) else [item] for key, item in values.items()}
    if shown:
        lists["messages"] = shown
    read = {key: [_source(key, item) for item in items] for key, items in lists.items()}
    for key, sources in read.items():
        if sources != next(iter(read.values())):
            raise DymoeError(f"{next(iter(read))!r} and {key!r} name other pictures; keep one of them")
        if len(sources) > 1:
            raise DymoeError(
                f"{key!r}: expected one path, found {len(sources)}; several pictures a sample are not supported yet"
            )
    return next((sources[0] for sources in read.values() if sources), (None, None))


def _source(key: str, item: Any) -> tuple[str | None, bytes | None]:
    """Path or bytes of one picture; `datasets` writes both as {bytes, path}."""
    if isinstance(item, Mapping):
        item = item["bytes"] if item.get("bytes") is not None else item.get("path")
    if isinstance(item, str | bytes) and not item.strip():
        raise DymoeError(f"{key!r}: it is empty; leave the key out where there is no picture")
    if isinstance(item, str) and ("://" in item or item.startswith("data:") or len(item) > _LONGEST_PATH):
        raise DymoeError(f"{key!r}: {brief(item)} is no path relative to the image root; nothing is fetched")
    if isinstance(item, str):
        return item, None
    if isinstance(item, bytes):
        return None, item
    raise DymoeError(f"{key!r}: expected one path relative to the image root, found {type(item).__name__}")


def reference_fields(value: Mapping[str, Any], answer: Any) -> dict[str, Any]:
    """What a scoring rule reads of a record beside its answer; a ``bbox`` is one with the answer's box.

    Args:
        value: the record.
        answer: its answer, if that is a text or a list.

    Raises:
        DymoeError: a text of ``answers`` or ``choices`` is missing, or boxes contradict each other.
    """
    fields = {key: item for key, item in value.items() if key not in _APART}
    for key in _LISTS:
        for number, item in enumerate(fields[key] if isinstance(fields.get(key), list) else ()):
            text = item.get("answer") if isinstance(item, Mapping) else item
            if text is None or (isinstance(text, str) and not text.strip()):
                raise DymoeError(f"{key!r}: text {number + 1} is missing; it must not be empty")
    right = read_box(fields.get("answer")) or read_box(answer) or read_box(fields.get("answer_bbox"))
    for key in ("answer_bbox", "bbox"):
        box = read_box(fields.get(key))
        if right is None or box is None or _near(box, right):
            continue
        if not any(_near(other, right) for other in _spellings(box, fields.get("size"))):
            raise DymoeError(
                f"{key!r} {brief(fields[key])} and the answer {brief(list(right))} are two boxes, also as x, y, width, "
                "height and in pixels of 'size'; keep the right one"
            )
        fields[key] = list(right)
    return fields


def _spellings(box: Box, size: Any) -> list[Box]:
    """The boxes that four numbers may mean: corners or x, y, width, height; in pixels too where there is a size."""
    x, y, w, h = box
    corners = [box, (x, y, x + w, y + h)]
    sides = read_box([*size, *size]) if isinstance(size, list) and len(size) == 2 else None
    if sides is None or min(sides) <= 0:
        return corners
    width, height = sides[:2]
    units = [(max(width, height),) * 2, (width, height)]
    return corners + [(a / u, b / v, c / u, d / v) for a, b, c, d in corners for u, v in units]


def _agree(first: Any, second: Any) -> bool:
    """Whether two answers are one: the same text, or the same box."""
    boxes = read_box(first), read_box(second)
    if boxes[0] is not None and boxes[1] is not None:
        return _near(boxes[0], boxes[1])
    return str(first).strip() == str(second).strip()


def _near(first: Box, second: Box) -> bool:
    slack = _NEAR * max(1.0, *map(abs, second))
    return all(abs(one - other) <= slack for one, other in zip(first, second, strict=True))


def answer_text(value: Any, where: str) -> str:
    """An answer as text; numbers are written out, a box as ``[x1,y1,x2,y2]``.

    Raises:
        DymoeError: it is empty or no answer.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and read_box(value) is not None:
        return box_text(value)
    if not isinstance(value, str):
        raise DymoeError(f"{where}: expected a text, a number or a box of four numbers, found {brief(value)}")
    if not value.strip():
        raise DymoeError(f"{where}: it is empty")
    return value.strip()


def read_box(value: Any) -> Box | None:
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
