"""An index: the records of one file, understood once, kept as a table in the cache (`dymoe.tasks.arrow`).

A table's key covers the path of the file, its size, time of change and first mebibyte, those of the annotation files
joined into it, the image root and the task. What could not be used is listed beside it as well, so that the second
start is as honest as the first.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from typing import Any

from dymoe.errors import DymoeError
from dymoe.files import cache_root
from dymoe.tasks.lazy import Records, View, image_size
from dymoe.tasks.llava import Names, Record, parse, record_id
from dymoe.tasks.recordfile import read_records

FORMAT = 5  # of the index; another number makes all of them anew
HEAD = 1 << 20  # bytes of a file that its identity covers
CHUNK = 1000  # records written together
MOST_HELD_OUT = 1000  # of the training records, for validation
IMAGES = 1 << 17  # whose sizes are remembered while a file is read: records of one picture seldom stand together
SCHEMA = {
    "record": "int64",
    "id": "string",
    "image": "string",
    "size": "int64",
    "data": "large_binary",
    "question": "string",
    "answer": "string",
    "turns": "string",
    "reference": "string",
    "held": "int64",
}


#: record -> (the reference for the scorer, whether the record may be held out for validation).
Reference = Callable[[Record], tuple[dict[str, Any], bool]]


@dataclass(frozen=True)
class Plan:
    """What one file is and how its records become rows.

    Attributes:
        path: the file.
        images: the image root.
        test: whether its records are asked (else trained on).
        name: what is done to the records, for the key: the task, or a scoring rule.
        reference: makes the function that gives a record's reference; called only if the records are read, so that
            annotation files are not read for nothing.
        extra: annotation files whose contents `reference` joins.
        outside_links: whether images may lie behind links that leave the image root.
        text_only: whether a record without an image can be used.
        rewrite: makes of a record the one that is used (another path of its image, another form of its answer); it
            depends on the rest of the plan alone.
    """

    path: Path
    images: Path
    test: bool
    name: str
    reference: Callable[[], Reference]
    extra: tuple[Path, ...] = ()
    outside_links: bool = False
    text_only: bool = True
    rewrite: Callable[[Record], Record] = lambda record: record

    def key(self) -> str:
        """What tells this plan, and the present state of its files, from others.

        Raises:
            DymoeError: a file cannot be read.
        """
        values = {
            "format": FORMAT,
            "files": [identity(path) for path in (self.path, *self.extra)],
            "images": str(self.images.resolve()),
            "test": self.test,
            "name": self.name,
            "text_only": self.text_only,
            "outside_links": self.outside_links,
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Index:
    """What a file holds, without its records.

    Attributes:
        path: the file.
        table: the Arrow file of the records that can be used.
        records: how many the file has.
        usable: how many of them can be used.
        with_image: how many of these have a picture.
        repeated_ids: how many ids stand in the file more than once; the later ones got ``#2``, ``#3`` behind.
        without_instruction: how many questions end in no instruction of CoIN's templates.
        digest: SHA-256 over the used records: texts, references, image paths and sizes.
        bad: the records that cannot be used: "file", "record" (from 0), "id", "error", "image" (its path if the
            image is what is wrong).
    """

    path: Path
    table: Path
    records: int
    usable: int
    with_image: int
    repeated_ids: int
    without_instruction: int
    digest: str
    bad: tuple[Mapping[str, Any], ...]


def cache_folder() -> Path:
    """Where indexes are kept: ``$DYMOE_CACHE/coin``, else ``~/.cache/dymoe/coin``."""
    return cache_root() / "coin"


def identity(path: Path) -> dict[str, Any]:
    """What tells one state of a file from another: path, size, time of change, SHA-256 of its first mebibyte.

    Raises:
        DymoeError: the file cannot be read.
    """
    try:
        state = path.stat()
        with path.open("rb") as file:
            head = hashlib.sha256(file.read(HEAD)).hexdigest()
    except OSError as error:
        raise DymoeError(f"{path}: cannot be read ({error.strerror or error})") from None
    return {"path": str(path.resolve()), "size": state.st_size, "mtime_ns": state.st_mtime_ns, "head": head}


def index(plan: Plan) -> Index:
    """The index of a file, made if the cache has none of this state of the file.

    Raises:
        DymoeError: a file cannot be read or is no list of records, or the cache cannot be written.
    """
    from dymoe.tasks import arrow

    key = plan.key()
    # Pictures may have changed since, or one that was missing may be in its place: then the records are read again,
    # into another table, so that whoever has the older one open never mixes the two.
    for attempt in count():
        reading = _Reading(plan)
        try:
            folder, summary = arrow.store(str(cache_folder()), f"{key}-{attempt}", SCHEMA, reading)
        except OSError as error:
            message = f"{cache_folder()}: cannot be written ({error.strerror or error})"
            raise DymoeError(f"{message}; DYMOE_CACHE names another folder for the cache") from error
        values = json.loads(summary)
        (table,) = Path(folder).glob("*.arrow")
        result = Index(path=plan.path, table=table, **{**values, "bad": tuple(values["bad"])})
        if reading.begun or not (_mended(plan, result) or _changed(plan, result.table)):
            return result
    raise AssertionError("unreachable")


def _changed(plan: Plan, table: Path) -> bool:
    """Whether an image is gone, or has another size than when the records were read."""
    from dymoe.tasks.arrow import open_table

    columns = open_table(str(table)).data.table.select(["image", "size"])
    images = columns.group_by(["image", "size"]).aggregate([]).to_pydict()
    root = str(plan.images)
    for name, size in zip(images["image"], images["size"], strict=True):
        try:
            if name is not None and os.stat(os.path.join(root, name)).st_size != size:
                return True
        except OSError:
            return True
    return False


def _mended(plan: Plan, result: Index) -> bool:
    """Whether an image that could not be used is there now."""
    for image in (row["image"] for row in result.bad if row["image"] is not None):
        try:
            image_size(plan.images, image, plan.outside_links)
        except DymoeError:
            continue
        return True
    return False


class _Reading:
    """A file's records on their way into a table, and what is to be said of all of them afterwards."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.begun = False
        self._counts: Counter[str] = Counter()
        self._ids: Counter[str] = Counter()
        self._names = Names()
        self._bad: list[dict[str, Any]] = []
        self._digest = hashlib.sha256()
        self._size = lru_cache(IMAGES)(lambda image: image_size(plan.images, image, plan.outside_links))

    def blocks(self) -> Iterator[list[dict[str, Any]]]:
        """The rows of the records that can be used, `CHUNK` at a time."""
        self.begun = True
        rows = self._rows(self.plan.reference())
        while block := list(islice(rows, CHUNK)):
            yield block

    def _rows(self, reference: Reference) -> Iterator[dict[str, Any]]:
        from dymoe.tasks import instructions

        for number, value in enumerate(read_records(self.plan.path)):
            self._counts["records"] += 1
            wrong_image = None
            try:
                record = self.plan.rewrite(parse(value, self.plan.test))
                if not record.has_image and not self.plan.text_only:
                    raise DymoeError("'image' is missing; a question of this task needs its picture")
                size = len(record.data or b"")
                if record.image is not None:
                    wrong_image = record.image
                    size = self._size(wrong_image)
                    wrong_image = None
                fields, scorable = reference(record)
            except DymoeError as error:
                row = {"file": str(self.plan.path), "record": number, "id": _name(value, self.plan.test)}
                self._bad.append({**row, "error": str(error), "image": wrong_image})
                continue
            self._ids[record.id] += 1
            self._counts["usable"] += 1
            self._counts["with_image"] += record.has_image
            self._counts["repeated_ids"] += self._ids[record.id] == 2
            self._counts["without_instruction"] += instructions.strip(record.question) == record.question
            row = _row(record, number, self._names.name(record.id), size, fields, scorable)
            picture = None if record.data is None else hashlib.sha256(record.data).hexdigest()
            values = [row[name] for name in SCHEMA if name not in ("data", "record")]
            self._digest.update(json.dumps([*values, picture]).encode())
            yield row

    def summary(self) -> str:
        """What `Index` holds beside path and table, as JSON."""
        names = ("records", "usable", "with_image", "repeated_ids", "without_instruction")
        counts = {name: self._counts[name] for name in names}
        return json.dumps({**counts, "digest": self._digest.hexdigest(), "bad": self._bad})


def _row(
    record: Record, number: int, name: str, size: int, fields: Mapping[str, Any], scorable: bool
) -> dict[str, Any]:
    return {
        "record": number,
        "id": name,
        "image": record.image,
        "size": size,
        "data": record.data,
        "question": record.question,
        "answer": record.answer,
        "turns": json.dumps(record.turns) if record.turns else None,
        "reference": json.dumps(fields, default=str),
        "held": stable_hash(record.id) if scorable else -1,
    }


def _name(value: Any, test: bool) -> str | None:
    try:
        return record_id(value, test) if isinstance(value, Mapping) else None
    except DymoeError:
        return None


def stable_hash(text: str) -> int:
    """62 bits of a text's SHA-256, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def verify(read: Reference, rule: str, test: bool) -> Reference:
    """`read`, with every reference scored once by the rule, so that one it cannot read shows before any training.

    Args:
        read: gives a record's reference.
        rule: the scoring rule's name.
        test: whether the records are asked: then one that cannot be scored raises; a training record is only never
            held out.

    Raises:
        DymoeError: there is no such rule.
    """
    from dymoe.tasks.scoring import scorer

    score = scorer(rule)

    def reference(record: Record) -> tuple[dict[str, Any], bool]:
        fields, fits = read(record)
        if fits:
            try:
                score(record.answer, fields)
            except DymoeError:
                if test:
                    raise
                fits = False
        return fields, fits

    return reference


def splits(
    train: Index | None, test: Index, view: View, share: float, validation: Index | None = None, rows: Any = None
) -> dict[str, Records]:
    """The samples of a task's files: training, validation and test.

    Args:
        train: index of the training file; None for a task that is only asked, which has no training samples then.
        test: index of the test file.
        view: how rows become samples; each file is its own rows' source.
        share: of the training records that are held out for validation, where there is no file of them.
        validation: index of the validation file.
        rows: the rows of the test file that are asked, all of them when None.
    """

    def every(index: Index) -> Records:
        return Records(index.table, range(index.usable), replace(view, source=index.path), index.digest)

    tested = every(test) if rows is None else replace(every(test), rows=rows)
    learned = rest = tested[:0]
    if train is not None:
        learned = every(train)
        if validation is None:
            train_rows, validation_rows = split(_hashes(train.table), share, MOST_HELD_OUT)
            rest = replace(learned, rows=validation_rows, view=replace(learned.view, first_turn=True))
            learned = replace(learned, rows=train_rows)
    return {"train": learned, "validation": rest if validation is None else every(validation), "test": tested}


def split(hashes: Any, share: float, most: int) -> tuple[Any, Any]:
    """Split records into (training, validation) by the hashes of their ids.

    The records with the smallest hashes are held out, so the choice does not depend on their order; records that
    share an id stay on one side.

    Args:
        hashes: one per record, int64; below 0 where a record cannot be scored and so is never held out.
        share: of the records held out, rounded, at least one; 0 holds out none.
        most: at most so many.

    Returns:
        Two arrays of row numbers, int64, both rising.
    """
    import numpy as np

    hashes = np.asarray(hashes, dtype=np.int64)
    every = np.arange(len(hashes), dtype=np.int64)
    possible = every[hashes >= 0]
    count = min(most, len(possible), max(1, round(share * len(hashes)))) if share > 0 else 0
    if count == 0 or len(hashes) < 2:
        return every, every[:0]
    order = possible[np.argsort(hashes[possible], kind="stable")]
    chosen = order[:count]
    if count < len(order) and hashes[order[count]] == hashes[chosen[-1]]:
        chosen = chosen[hashes[chosen] != hashes[chosen[-1]]]  # the last id would lie on both sides
    mask = np.zeros(len(hashes), dtype=bool)
    mask[chosen] = True
    return every[~mask], np.sort(chosen)


def _hashes(table: Path) -> Any:
    from dymoe.tasks.arrow import open_table

    return open_table(str(table)).data.column("held").to_numpy()


def scorable(table: Path) -> Any:
    """The rows that count in a score, int64, rising."""
    import numpy as np

    return np.flatnonzero(_hashes(table) >= 0)


def listed(task: str, indexes: Mapping[str, Index]) -> list[Mapping[str, Any]]:
    """The records left out of a task's files.

    Args:
        task: its name.
        indexes: of its files, by split.
    """
    return [
        {**{key: row[key] for key in ("file", "record", "id", "error")}, "task": task, "split": split}
        for split, entry in indexes.items()
        for row in entry.bad
    ]


def usable(entry: Index, on_bad: str) -> Index:
    """The index, once its bad records are dealt with as the recipe says.

    Raises:
        DymoeError: there are bad records and `on_bad` is ``error``, or nothing is left.
    """
    first = entry.bad[0] if entry.bad else None
    if first is not None and on_bad == "error":
        rest = f"; {len(entry.bad) - 1} more cannot be used" if len(entry.bad) > 1 else ""
        name = "" if first["id"] is None else f" (id {first['id']!r})"
        raise DymoeError(
            f"{entry.path}: record {first['record']}{name}: {first['error']}{rest}; "
            "data.on_bad: skip leaves such records out and lists them"
        )
    if not entry.usable and first is not None:
        raise DymoeError(f"{entry.path}: no record can be used; record {first['record']}: {first['error']}")
    if not entry.usable:
        raise DymoeError(f"{entry.path}: it holds no records")
    return entry
