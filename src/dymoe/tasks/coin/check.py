"""What can be said about a CoIN tree before a run: sizes against the published ones, pictures, overlaps."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from dymoe.tasks.base import Sample
from dymoe.tasks.coin.layout import published
from dymoe.tasks.coin.stream import TaskIndexes


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
