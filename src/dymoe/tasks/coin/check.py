"""What can be said about a CoIN tree before a run: sizes against the published ones, pictures, overlaps."""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dymoe.errors import DymoeError
from dymoe.tasks.base import Sample
from dymoe.tasks.coin.layout import published
from dymoe.tasks.coin.stream import TaskIndexes
from dymoe.tasks.lazy import Records
from dymoe.tasks.records import check_image


@dataclass(frozen=True)
class Size:
    """How many records a file has, and how many are published.

    Attributes:
        task: its name.
        what: ``train`` or ``test``, or the same ``with image``.
        found: records in the file (with an image: of those that can be used).
        published: the published number.
    """

    task: str
    what: str
    found: int
    published: int

    @property
    def right(self) -> bool:
        """Whether the numbers agree."""
        return self.found == self.published


def sizes(found: TaskIndexes) -> list[Size]:
    """A task's numbers of records beside the published ones (`published.json`)."""
    row = published()["tasks"][found.task]
    rows = []
    for what, each in (("train", found.train), ("test", found.test)):
        rows.append(Size(found.task, what, each.records, row[what]))
        if f"{what}_with_image" in row:
            rows.append(Size(found.task, f"{what} with image", each.with_image, row[f"{what}_with_image"]))
    return rows


def broken_images(
    samples: Sequence[Sample],
    count: int | None = None,
    seed: int = 0,
    decode: Callable[[bytes], object] = check_image,
) -> Iterator[tuple[str, str]]:
    """(id, what is wrong) of the samples whose picture cannot be read or decoded.

    Args:
        samples: any samples; their pictures are opened one at a time.
        count: look at so many, drawn at random; all when None.
        seed: of the draw.
        decode: opens the encoded picture and raises `DymoeError` where it cannot.
    """
    places = range(len(samples))
    drawn = places if count is None or count >= len(samples) else random.Random(seed).sample(places, count)
    for place in sorted(drawn):
        sample = samples[place]
        try:
            if (data := sample.image) is not None:
                decode(data)
        except DymoeError as error:
            name = getattr(sample.picture, "name", None)
            yield sample.id, str(error) if name is None or name in str(error) else f"image {name!r}: {error}"


def overlap(train: Sequence[Sample], test: Sequence[Sample]) -> list[tuple[str, str]]:
    """(training id, test id) of the samples with the same question about the same picture.

    Pictures are told apart by their paths, or their bytes where a sample has no path; questions of all turns count.
    """
    asked: dict[bytes, str] = {}
    for sample in test:
        asked.setdefault(_key(sample, sample.question), sample.id)
    found = []
    for sample in train:
        for question in (sample.question, *(question for question, _ in sample.turns)):
            other = asked.get(_key(sample, question))
            if other is not None:
                found.append((sample.id, other))
    return found


def _key(sample: Sample, question: str) -> bytes:
    name = getattr(sample.picture, "name", None)
    told = name.encode() if isinstance(name, str) else hashlib.sha256(sample.image or b"").digest()
    return hashlib.sha256(told + b"\0" + question.encode()).digest()


def longest(samples: Records, count: int = 32) -> list[Sample]:
    """The samples with the most text, first the longest; a check of token lengths begins with them.

    The lengths are read off the index, without making samples of all records.
    """
    import numpy as np
    import pyarrow.compute as pc

    from dymoe.tasks.lazy import open_table

    columns = open_table(samples.table).data
    rows = np.asarray(samples.rows, dtype=np.int64)
    total = np.zeros(columns.num_rows, dtype=np.int64)
    for name in ("question", "answer", "turns"):
        lengths = pc.fill_null(pc.utf8_length(columns.column(name)), 0)
        total += np.asarray(lengths.to_numpy(zero_copy_only=False), dtype=np.int64)
    order = np.argsort(-total[rows], kind="stable")[:count]
    return [samples[int(place)] for place in order]
