"""What CoIN says before a run: of its files, of runs without them, and how long the paper's took."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dymoe.errors import DymoeError
from dymoe.files import read_json
from dymoe.tasks.base import Sample, Stream, Task
from dymoe.tasks.coin.layout import find, published
from dymoe.tasks.source import Source

TIMES = Path(__file__).parent / "published_times.json"


@cache
def published_times() -> dict[str, Any]:
    """Table 15 of the paper (minutes by method and task), the lengths that made samples have, with their sources."""
    values: dict[str, Any] = read_json(TIMES)
    return values


def findings(names: Sequence[str], instructions: str, source: Source) -> Iterator[tuple[str, ...]]:
    """Sizes, repeated ids and bad records of the files: level, what, where, found and what mends it, of each."""
    from dymoe.tasks.coin.stream import indexes

    try:
        layout = find(source, instructions, names)
    except DymoeError as error:
        yield ("wrong", "folders", "data.root", str(error), "give --data.root FOLDER (docs/coin.md)")
        return
    yield ("fine", "folders", str(layout.instructions), f"layout {layout.variant}, pictures in {layout.images}")
    compared = source.scoring == "coin"
    for name in names:
        try:
            both = indexes(layout, name, source)
        except DymoeError as error:
            yield ("wrong", "records", name, str(error), "fetch the file, or leave the task out with --tasks")
            continue
        for what, count in both.counts().items():
            if count != (right := published()["tasks"][name].get(what, count)):
                message = f"{count:,} {what.replace('_', ' ')} records, {right:,} are published"
                mend = "fetch the published files; with data.scoring: corrected other sizes are a note"
                yield ("wrong" if compared else "note", "size", name, message, mend)
        for each in (both.train, both.test):
            if each.bad:
                first = each.bad[0]
                message = f"{len(each.bad)} cannot be used, the first: record {first['record']}: {first['error']}"
                level = "wrong" if source.on_bad == "error" else "note"
                yield (level, "records", str(each.path), message, "mend them; data.on_bad: skip leaves them out")
            if each.repeated_ids:
                yield ("note", "ids", str(each.path), f"{each.repeated_ids} ids are there more than once")


@dataclass(frozen=True)
class Lengths:
    """Tokens of text in a task's samples: of a question, an answer, and how many of both a record has."""

    question: int
    answer: int
    turns: int = 1


def stand_in(names: Sequence[str], train: int, test: int) -> tuple[Stream, dict[str, tuple[int, int]]]:
    """A stream of made samples, so many a task, and the true numbers of samples (training, test) of each task."""
    rows = {name: published()["tasks"][name] for name in names}
    lengths = {name: Lengths(**published_times()["lengths"][name]) for name in names}
    tasks = tuple(made_task(name, lengths[name], train, test) for name in names)
    return Stream("coin", tasks), {name: (row["train"], row["test"]) for name, row in rows.items()}


def made_task(name: str, lengths: Lengths, train: int, test: int) -> Task:
    """A task of made samples: noise pictures of 336 x 336 and texts of so many words.

    Generation stops where the model says so, and a random model hardly ever does: answers get as many tokens as the
    task's have, not CoIN's limit.
    """
    picture = _noise()
    question, answer = _words(lengths.question, 3), _words(lengths.answer, 7)
    turns = tuple((question, answer) for _ in range(lengths.turns - 1))

    def some(count: int, later: tuple[tuple[str, str], ...]) -> list[Sample]:
        reference = {"answer": answer}
        return [Sample(f"{name}-{n}", picture, question, answer, reference, later) for n in range(count)]

    return Task(name, some(train, turns), [], some(test, ()), "exact_match", lengths.answer + 1)


def _words(count: int, first: int) -> str:
    """So many words that a made tokenizer knows; a real one makes more tokens of them."""
    return " ".join(f"w{first + number % 50}" for number in range(count))


@cache
def _noise() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.effect_noise((336, 336), 64).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()
