"""What a file of records holds, one value after another, not yet understood: JSON lists, JSON lines, parquet.

Texts are UTF-8, or UTF-16 or UTF-32 as their first bytes say; blank lines are passed over.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dymoe.errors import DymoeError
from dymoe.files import not_itself, read_bytes, unique_keys
from dymoe.messages import brief

_SPACE = re.compile(r"[ \t\r\n]*")


def read_records(path: Path) -> Iterator[Any]:
    """The records of a file, one after another.

    A JSON list is decoded record by record, so that the whole of it is never in memory as objects.

    Raises:
        DymoeError: no such file, another format, or text that breaks off; the message names the record or line reached.
    """
    yield from (value for _, value in numbered(path))


def numbered(path: Path) -> Iterator[tuple[int, Any]]:
    """The same, each with its number: its line, or its place in the list, counted from 1.

    Raises:
        DymoeError: as `read_records`.
    """
    if path.suffix == ".parquet":
        if not path.is_file():
            raise DymoeError(f"{path}: no such file")
        yield from enumerate(_parquet(path), start=1)
        return
    text = _text(path)
    if path.suffix == ".jsonl" or _is_lines(text):
        yield from _lines(path, text)
    else:
        yield from enumerate(_list(path, text), start=1)


def _text(path: Path) -> str:
    data = read_bytes(path)
    if (instead := not_itself(data)) and not (path.suffix == ".jsonl" and not data.strip()):  # lines may be none
        raise DymoeError(f"{path}: {instead}")
    try:
        return data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as error:
        raise DymoeError(f"{path}: cannot be read ({error}); save it as UTF-8") from error


def _is_lines(text: str) -> bool:
    """Whether a text is one object after another, without commas."""
    start = _after_space(text, 0)
    try:
        end = json.JSONDecoder().raw_decode(text, start)[1] if text[start : start + 1] == "{" else start
    except (ValueError, RecursionError):
        return False
    following = _after_space(text, end)
    return "\n" in text[end:following] and text[following : following + 1] == "{"


def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=unique_keys)


def _list(path: Path, text: str) -> Iterator[Any]:
    decoder = _decoder()
    position = _after_space(text, 0)
    if text[position : position + 1] != "[":
        start = brief(text[position : position + 10])
        raise DymoeError(f"{path}: expected a JSON list of records, it starts with {start}")
    position = _after_space(text, position + 1)
    number = 0
    closed = text[position : position + 1] == "]"
    while not closed:
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DymoeError(f"{path}: record {number}: not valid JSON ({error}); is the file whole?") from None
        yield value
        position = _after_space(text, position)
        mark = text[position : position + 1]
        closed = mark == "]"
        if not closed and mark != ",":
            raise DymoeError(f"{path}: after record {number}: expected ',' or ']', found {mark!r}; is the file whole?")
        if not closed:
            position = _after_space(text, position + 1)
            number += 1
    if _after_space(text, position + 1) != len(text):
        raise DymoeError(f"{path}: something stands behind the end of the list, after record {number}")


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return position if match is None else match.end()


def _lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    # Lines end with a newline and nothing else: an answer may hold other characters that count as line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line, object_pairs_hook=unique_keys)
            except (ValueError, RecursionError) as error:
                reason = " ".join(str(error).split())
                raise DymoeError(f"{path}: line {number}: not valid JSON ({reason})") from None


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DymoeError(f"{path}: cannot be read as parquet ({error})") from error
