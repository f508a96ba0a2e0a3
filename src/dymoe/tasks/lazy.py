"""Samples that stay on disk: a record is read when it is asked for, its picture when `Sample.image` is."""

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

from dymoe.errors import DymoeError
from dymoe.tasks import instructions
from dymoe.tasks.base import Sample

BESIDE = 8  # names beside a missing folder that a message gives
CHUNK = 256  # records read together when samples are gone through in order
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".tar.xz", ".tar.bz2")


def image_path(root: Path, name: str, outside_links: bool = False) -> Path:
    """The path of the image `name` below `root`.

    Args:
        root: the image root.
        name: what a record says, relative to the root, with forward slashes.
        outside_links: allow symbolic links that leave the root.

    Raises:
        DymoeError: the name is absolute, goes up (``..``), is empty, or a link leads out of the root.
    """
    parts = name.replace("\\", "/").split("/")  # what goes up or away on any system
    absolute = parts[0] == "" or parts[0][1:2] == ":"
    if absolute or ".." in parts or "\0" in name:
        raise DymoeError(f"image {name!r}: expected a path relative to the image root, without '..'")
    if not outside_links:
        top = _real(root)
        if not f"{os.path.realpath(os.path.join(top, name))}/".startswith(f"{top.rstrip('/')}/"):
            raise DymoeError(
                f"image {name!r}: a symbolic link leads out of the image root {root}; "
                "data.outside_links: true allows it"
            )
    return root / name


@lru_cache(maxsize=64)
def _real(root: Path) -> str:
    return os.path.realpath(root)


def image_size(root: Path, name: str, outside_links: bool = False) -> int:
    """Bytes of the image `name` below `root`.

    Raises:
        DymoeError: as `image_path`; or there is no such file, or it is empty.
    """
    path = image_path(root, name, outside_links)
    try:
        state = path.stat()
    except OSError as error:
        raise DymoeError(
            f"image {name!r}: {_why_missing(root, path) or f'{path}: {error.strerror or error}'}"
        ) from None
    if not stat.S_ISREG(state.st_mode):
        raise DymoeError(f"image {name!r}: {path} is no file")
    if not state.st_size:
        raise DymoeError(f"image {name!r}: {path} is empty")
    return state.st_size


def _why_missing(root: Path, path: Path) -> str | None:
    """Which folder above a missing picture is not there, and what stands in its place; None where all are."""
    above = [folder for folder in path.parents if folder.is_relative_to(root)]
    lacking = [folder for folder in above if not folder.is_dir()]
    return f"no folder {lacking[-1]}{what_is_there(lacking[-1])}" if lacking else None


def what_is_there(folder: Path) -> str:
    """The end of a message about a missing folder: its archive where nobody unpacked it, else what is beside it."""
    names = sorted(path.name for path in folder.parent.iterdir()) if folder.parent.is_dir() else []
    packed = [name for name in names if name.lower().startswith(f"{folder.name.lower()}.") and name.endswith(ARCHIVES)]
    if packed:
        return f"; unpack {folder.parent / packed[0]}"
    more = f" and {len(names) - BESIDE} more" if len(names) > BESIDE else ""
    return f"; in {folder.parent} there is {', '.join(names[:BESIDE]) or 'nothing'}{more}"


@dataclass(frozen=True)
class ImageFile:
    """A picture in a file below an image root, opened by `read` alone.

    Attributes:
        root: the image root.
        name: path relative to it.
        size: bytes that the file had when the records were read.
        where: file and record that name the picture, for messages.
        outside_links: whether a symbolic link may leave the root.
    """

    root: Path
    name: str
    size: int
    where: str
    outside_links: bool = False

    def read(self) -> bytes:
        """The encoded picture.

        Raises:
            DymoeError: the file is gone, has another size than when the records were read, or lies outside the root.
        """
        try:
            size = image_size(self.root, self.name, self.outside_links)
            if size != self.size:
                raise DymoeError(
                    f"image {self.name!r}: it has {size} bytes, {self.size} when the records were read; start again, "
                    "and they are read anew"
                )
            return image_path(self.root, self.name, self.outside_links).read_bytes()
        except OSError as error:
            raise DymoeError(f"{self.where}: image {self.name!r}: {error.strerror or error}") from None
        except DymoeError as error:
            raise DymoeError(f"{self.where}: {error}") from None


@dataclass(frozen=True)
class StoredImage:
    """A picture whose bytes came with its record (parquet); they stay in the memory-mapped table."""

    table: Path
    row: int

    def read(self) -> bytes:
        """The encoded picture."""
        from dymoe.tasks.arrow import open_table

        data: bytes = open_table(str(self.table)).data.column("data")[self.row].as_py()
        return data


@dataclass(frozen=True)
class View:
    """How rows of an index become samples.

    Attributes:
        source: the file that the records come from, for messages.
        images: the image root.
        outside_links: whether images may lie behind links that leave the root.
        first_turn: leave out the later turns of a conversation, which are trained on but cannot be scored.
        template: (task, instruction type, seed) whose sentence replaces the one in the text; None keeps it.
    """

    source: Path
    images: Path
    outside_links: bool = False
    first_turn: bool = False
    template: tuple[str, str, int] | None = None

    def sample(self, row: dict[str, Any], table: Path, number: int) -> Sample:
        """The sample of one row (number `number` of the table)."""
        picture: ImageFile | StoredImage | None = None
        if row["image"] is not None:
            where = f"{self.source}: record {row['record']}"
            picture = ImageFile(self.images, row["image"], row["size"], where, self.outside_links)
        elif row["size"]:
            picture = StoredImage(table, number)
        question = row["question"]
        if self.template is not None:
            task, kind, seed = self.template
            question = instructions.apply(task, instructions.strip(question), kind, row["id"], seed)
        turns = () if self.first_turn or not row["turns"] else tuple((q, a) for q, a in json.loads(row["turns"]))
        source = (str(self.source), row["record"])
        return Sample(row["id"], picture, question, row["answer"], json.loads(row["reference"]), turns, source)


@dataclass(frozen=True)
class Records(Sequence[Sample]):
    """Samples in an index on disk; one is made each time it is asked for, and none is kept.

    Slices are views as well, and so is what a worker process gets: the paths and row numbers alone travel.

    Attributes:
        table: the index's Arrow file.
        rows: row numbers (an int64 array or a range).
        view: how rows become samples.
        digest: SHA-256 over the contents of the whole index.
    """

    table: Path
    rows: Any
    view: View
    digest: str = field(default="", repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, position: int) -> Sample: ...
    @overload
    def __getitem__(self, position: slice) -> "Records": ...
    def __getitem__(self, position: int | slice) -> "Sample | Records":
        if isinstance(position, slice):
            return Records(self.table, self.rows[position], self.view, self.digest)
        number = int(self.rows[position])
        return self.view.sample(self._columns()[number], self.table, number)

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self.rows), CHUNK):
            numbers = [int(number) for number in self.rows[start : start + CHUNK]]
            columns = self._columns()[numbers]
            for position, number in enumerate(numbers):
                yield self.view.sample({key: value[position] for key, value in columns.items()}, self.table, number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Records) and self.fingerprint == other.fingerprint and self.table == other.table

    def __hash__(self) -> int:
        return hash((self.table, self.fingerprint))

    def picture_files(self) -> str:
        """SHA-256 over where the pictures' files are, their sizes and times of change."""
        import numpy as np

        from dymoe.tasks.arrow import open_table

        names = open_table(str(self.table)).data.column("image").take(np.asarray(self.rows)).unique().to_pylist()
        root, states = str(self.view.images.resolve()), []
        for name in names:
            try:
                state = None if name is None else os.stat(os.path.join(root, name))
            except OSError:
                state = None  # its sample says why when its picture is read
            states.append([name, None if state is None else [state.st_size, state.st_mtime_ns]])
        return hashlib.sha256(json.dumps([root, states]).encode()).hexdigest()

    def _columns(self) -> Any:
        from dymoe.tasks.arrow import without_pictures

        return without_pictures(str(self.table))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over which samples these are: the index's contents, the rows, the instruction template.

        The index's contents are the records' texts, answers and references and the images' paths and sizes.
        """
        rows = ",".join(map(str, self.rows)) if not isinstance(self.rows, range) else repr(self.rows)
        text = json.dumps([self.digest, rows, self.view.first_turn, self.view.template])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Joined(Sequence[Sample]):
    """Several sequences of samples, one after another, none of them copied."""

    parts: tuple[Sequence[Sample], ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @overload
    def __getitem__(self, position: int) -> Sample: ...
    @overload
    def __getitem__(self, position: slice) -> Sequence[Sample]: ...
    def __getitem__(self, position: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(position, slice):
            return [self[number] for number in range(*position.indices(len(self)))]
        number = position + len(self) if position < 0 else position
        for part in self.parts:
            if 0 <= number < len(part):
                return part[number]
            number -= len(part)
        raise IndexError(position)

    def __iter__(self) -> Iterator[Sample]:
        for part in self.parts:
            yield from part


def joined(parts: Iterable[Sequence[Sample]]) -> Sequence[Sample]:
    """The samples of all parts in order: a new list, or a view where a part stays on disk."""
    filled = [part for part in parts if len(part)]
    if not any(isinstance(part, Records | Joined) for part in filled):
        return [sample for part in filled for sample in part]
    return filled[0] if len(filled) == 1 else Joined(tuple(filled))


def fingerprint(samples: Sequence[Sample]) -> str:
    """SHA-256 over samples: which they are, their texts, answers, references and pictures.

    A sample in memory counts with its picture's bytes. Samples on disk count with `Records.fingerprint`, so that this
    takes no longer for big data: of each picture file the path and the size.
    """
    if isinstance(samples, Records):
        return samples.fingerprint
    digest = hashlib.sha256()
    if isinstance(samples, Joined):
        digest.update("".join(fingerprint(part) for part in samples.parts).encode())
        return digest.hexdigest()
    for sample in samples:
        texts = [sample.id, sample.question, sample.answer, sample.reference, sample.turns]
        digest.update(json.dumps(texts, sort_keys=True, default=str).encode() + b"\0")
        digest.update(hashlib.sha256(sample.image or b"").digest())
    return digest.hexdigest()


def subset(samples: Sequence[Sample], positions: Sequence[int]) -> Sequence[Sample]:
    """The samples at these positions (rising), a view where they stay on disk; all of them are the samples."""
    if len(positions) == len(samples):
        return samples
    if isinstance(samples, Records):
        import numpy as np

        rows = np.asarray(samples.rows, dtype=np.int64)[np.asarray(positions, dtype=np.int64)]
        return Records(samples.table, rows, samples.view, samples.digest)
    return [samples[position] for position in positions]
