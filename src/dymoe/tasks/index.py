"""An index: the records of one file, understood once, kept as a memory-mapped Arrow file in the cache.

The cache's folder of a file is named by a key over its path, size, time of change and first mebibyte, those of the
annotation files joined into it, the image root and the task. What could not be used is listed in it as well, so that
the second start is as honest as the first.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dymoe.errors import DymoeError
from dymoe.files import atomic_dir, atomic_json, expand, read_json
from dymoe.tasks.lazy import image_size
from dymoe.tasks.llava import Names, Record, parse, record_id
from dymoe.tasks.recordfile import read_records

FORMAT = 2  # of the index; another number makes all of them anew
HEAD = 1 << 20  # bytes of a file that its identity covers
CHUNK = 1000  # records written together
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


@dataclass(frozen=True)
class Plan:
    """What one file is and how its records become rows.

    Attributes:
        path: the file.
        images: the image root.
        test: whether its records are asked (else trained on).
        name: what is done to the records, for the key: the task, or a scoring rule.
        extra: annotation files whose contents `reference` joins.
        outside_links: whether images may lie behind links that leave the image root.
    """

    path: Path
    images: Path
    test: bool
    name: str
    extra: tuple[Path, ...] = ()
    outside_links: bool = False


@dataclass(frozen=True)
class Index:
    """What a file holds, without its records.

    Attributes:
        path: the file.
        table: the Arrow file of the records that can be used.
        records: how many the file has.
        kept: how many of them can be used.
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
    kept: int
    with_image: int
    repeated_ids: int
    without_instruction: int
    digest: str
    bad: tuple[Mapping[str, Any], ...]

    def refuse_bad(self) -> None:
        """Raise the error of the first record that cannot be used, if there is one.

        Raises:
            DymoeError: naming file, record, id and what is wrong.
        """
        if self.bad:
            first, more = self.bad[0], len(self.bad) - 1
            rest = f"; {more} more cannot be used" if more else ""
            name = "" if first["id"] is None else f" (id {first['id']!r})"
            raise DymoeError(
                f"{self.path}: record {first['record']}{name}: {first['error']}{rest}; "
                "data.on_bad: skip leaves such records out and lists them"
            )


#: record -> (the reference for the scorer, whether the record may be held out for validation).
Reference = Callable[[Record], tuple[dict[str, Any], bool]]


def cache_folder() -> Path:
    """Where indexes are kept: ``$DYMOE_CACHE/coin``, else ``~/.cache/dymoe/coin``."""
    return expand(os.environ.get("DYMOE_CACHE") or "~/.cache/dymoe") / "coin"


def identity(path: Path) -> dict[str, Any]:
    """What tells one state of a file from another: path, size, time of change, SHA-256 of its first mebibyte.

    Raises:
        DymoeError: the file cannot be read.
    """
    try:
        found = path.stat()
        with path.open("rb") as file:
            head = hashlib.sha256(file.read(HEAD)).hexdigest()
    except OSError as error:
        raise DymoeError(f"{path}: cannot be read ({error.strerror or error})") from None
    return {"path": str(path.resolve()), "size": found.st_size, "mtime_ns": found.st_mtime_ns, "head": head}


def index(
    plan: Plan,
    reference: Callable[[], Reference],
    text_only: bool = True,
    rewrite: Callable[[Record], Record] = lambda record: record,
) -> Index:
    """The index of a file, made if the cache has none of this state of the file.

    Args:
        plan: the file.
        reference: makes the function that gives a record's reference; called only if the index has to be made, so
            that annotation files are not read for nothing.
        text_only: whether a record without an image can be used.
        rewrite: makes of a record the one that is used (another path of its image, another form of its answer); it
            depends on `plan` alone.

    Raises:
        DymoeError: a file cannot be read or is no list of records, or the cache cannot be written.
    """
    key = {
        "format": FORMAT,
        "files": [identity(path) for path in (plan.path, *plan.extra)],
        "images": str(plan.images.resolve()),
        "test": plan.test,
        "name": plan.name,
        "text_only": text_only,
        "outside_links": plan.outside_links,
    }
    folder = cache_folder() / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    with locked(folder):
        found = _cached(plan, folder)
        if found is None:
            with atomic_dir(folder) as place:
                _write(plan, reference(), text_only, rewrite, place, key)
            found = _cached(plan, folder, fresh=True)
        assert found is not None
        return found


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep others from what is kept at `path` in the cache while the block works on it.

    Raises:
        DymoeError: the cache cannot be written.
    """
    from filelock import FileLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        lock.acquire()
    except OSError as error:
        told = f"{path}: cannot be written ({error.strerror or error}); DYMOE_CACHE names another folder for the cache"
        raise DymoeError(told) from error
    try:
        yield
    finally:
        lock.release()


def _cached(plan: Plan, folder: Path, fresh: bool = False) -> Index | None:
    marker = folder / "index.json"
    if not marker.is_file():
        return None
    values = read_json(marker)
    table = folder / values.pop("table")
    values.pop("key")
    made = Index(path=plan.path, table=table, **{**values, "bad": tuple(values["bad"])})
    if not table.is_file():
        return None
    # An image that was missing may have been put in its place since: then the records are read again.
    if not fresh and any(_mended(plan, row["image"]) for row in made.bad if row["image"] is not None):
        return None
    if not fresh and _changed(plan, table):
        return None
    return made


def _changed(plan: Plan, table: Path) -> bool:
    """Whether an image is gone, or has another size than when the records were read."""
    from dymoe.tasks.lazy import open_table

    columns = open_table(table).data.select(["image", "size"]).to_pydict()
    sizes = dict(zip(columns["image"], columns["size"], strict=True))
    sizes.pop(None, None)
    root = str(plan.images)
    for name, size in sizes.items():
        try:
            if os.stat(os.path.join(root, name)).st_size != size:
                return True
        except OSError:
            return True
    return False


def _mended(plan: Plan, image: str) -> bool:
    try:
        image_size(plan.images, image, plan.outside_links)
    except DymoeError:
        return False
    return True


def _write(
    plan: Plan,
    reference: Reference,
    text_only: bool,
    rewrite: Callable[[Record], Record],
    place: Path,
    key: Mapping[str, Any],
) -> None:
    from datasets import Features, Value
    from datasets.arrow_writer import ArrowWriter

    from dymoe.tasks import instructions

    digest = hashlib.sha256()
    counts: Counter[str] = Counter()
    ids: Counter[str] = Counter()
    names = Names()
    bad: list[dict[str, Any]] = []
    table = place / "records.arrow"
    writer = ArrowWriter(path=str(table), features=Features({name: Value(kind) for name, kind in SCHEMA.items()}))
    try:
        waiting: list[dict[str, Any]] = []
        for number, value in enumerate(read_records(plan.path)):
            counts["records"] += 1
            wrong_image = None
            try:
                record = rewrite(parse(value, plan.test))
                if not record.has_image and not text_only:
                    raise DymoeError("'image' is missing; a question of this task needs its picture")
                size = len(record.data or b"")
                if record.image is not None:
                    wrong_image = record.image
                    size = image_size(plan.images, wrong_image, plan.outside_links)
                    wrong_image = None
                told, scorable = reference(record)
            except DymoeError as error:
                row = {"file": str(plan.path), "record": number, "id": _name(value, plan.test)}
                bad.append({**row, "error": str(error), "image": wrong_image})
                continue
            ids[record.id] += 1
            counts["kept"] += 1
            counts["with_image"] += record.has_image
            counts["repeated_ids"] += ids[record.id] == 2
            counts["without_instruction"] += instructions.strip(record.question) == record.question
            row = _row(record, number, names.name(record.id), size, told, scorable)
            picture = None if record.data is None else hashlib.sha256(record.data).hexdigest()
            seen = [row[name] for name in SCHEMA if name not in ("data", "record")]
            digest.update(json.dumps([*seen, picture]).encode())
            waiting.append(row)
            if len(waiting) == CHUNK:
                _flush(writer, waiting)
        _flush(writer, waiting)
        writer.finalize()
    finally:
        writer.close()
    # The name holds the contents, so that a process that has an older state open never mixes the two.
    table.rename(place / f"records-{digest.hexdigest()[:16]}.arrow")
    values = {name: counts[name] for name in ("records", "kept", "with_image", "repeated_ids", "without_instruction")}
    shown = {"table": f"records-{digest.hexdigest()[:16]}.arrow", "digest": digest.hexdigest(), "key": key}
    atomic_json(place / "index.json", {**values, **shown, "bad": bad})


def _row(record: Record, number: int, name: str, size: int, told: Mapping[str, Any], scorable: bool) -> dict[str, Any]:
    return {
        "record": number,
        "id": name,
        "image": record.image,
        "size": size,
        "data": record.data,
        "question": record.question,
        "answer": record.answer,
        "turns": json.dumps(record.turns) if record.turns else None,
        "reference": json.dumps(told, default=str),
        "held": stable_hash(record.id) if scorable else -1,
    }


def _flush(writer: Any, waiting: list[dict[str, Any]]) -> None:
    import pyarrow as pa

    if waiting:
        columns = {name: [row[name] for row in waiting] for name in SCHEMA}
        writer.write_table(pa.Table.from_pydict(columns, schema=writer.schema))
        waiting.clear()


def _name(value: Any, test: bool) -> str | None:
    try:
        return record_id(value, test) if isinstance(value, Mapping) else None
    except DymoeError:
        return None


def stable_hash(text: str) -> int:
    """62 bits of a text's SHA-256, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def held_out(table: Path, share: float, most: int) -> tuple[Any, Any]:
    """Split an index's rows into (training, validation), see `split`."""
    return split(_held(table), share, most)


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

    held = np.asarray(hashes, dtype=np.int64)
    every = np.arange(len(held), dtype=np.int64)
    possible = every[held >= 0]
    count = min(most, len(possible), max(1, round(share * len(held)))) if share > 0 else 0
    if count == 0 or len(held) < 2:
        return every, every[:0]
    order = possible[np.argsort(held[possible], kind="stable")]
    chosen = order[:count]
    if count < len(order) and held[order[count]] == held[chosen[-1]]:
        chosen = chosen[held[chosen] != held[chosen[-1]]]  # the last id would lie on both sides
    mask = np.zeros(len(held), dtype=bool)
    mask[chosen] = True
    return every[~mask], np.sort(chosen)


def _held(table: Path) -> Any:
    from dymoe.tasks.lazy import open_table

    return open_table(table).data.column("held").to_numpy()


def scorable(table: Path) -> Any:
    """The rows that count in a score, int64, rising."""
    import numpy as np

    return np.flatnonzero(_held(table) >= 0)


def listed(task: str, indexes: Mapping[str, Index]) -> list[Mapping[str, Any]]:
    """The records left out of a task's files.

    Args:
        task: its name.
        indexes: of its files, by split.
    """
    return [
        {**{key: row[key] for key in ("file", "record", "id", "error")}, "task": task, "split": split}
        for split, found in indexes.items()
        for row in found.bad
    ]


def usable(found: Index, on_bad: str) -> Index:
    """The index, once its bad records are dealt with as the recipe says.

    Raises:
        DymoeError: there are bad records and `on_bad` is ``error``, or nothing is left.
    """
    if on_bad == "error":
        found.refuse_bad()
    if not found.kept:
        if found.bad:
            first = found.bad[0]
            raise DymoeError(f"{found.path}: no record can be used; record {first['record']}: {first['error']}")
        raise DymoeError(f"{found.path}: it holds no records")
    return found
