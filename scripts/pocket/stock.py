"""What the eight makers draw from: one pool's source items by class, and the drafts they hand back."""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from dymoe.errors import DymoeError
from scripts.pocket import sources
from scripts.pocket.sources import Item


@dataclass
class Draft:
    """One sample before it is encoded; `sources` are the ids of every source item in it, `image` may be None."""

    image: Image.Image | None
    question: str
    answer: str
    sources: list[str]
    reference: dict[str, Any] = field(default_factory=dict)


class Stock:
    """The items of one pool, handed out class by class in a fixed shuffled order.

    Photos and digits are handed out once and never again; emoji and movies, of which there are few, come round.
    """

    def __init__(self, items: Iterable[Item], seed: int):
        self._items = list(items)
        self._stacks: dict[tuple[str, str], list[Item]] = {}
        self._position: dict[tuple[str, str], int] = {}
        for item in self._items:
            for key in _keys(item):
                self._stacks.setdefault(key, []).append(item)
        for key, stack in sorted(self._stacks.items()):
            random.Random(f"{seed}/{key}").shuffle(stack)

    def items(self, source: str | None = None) -> list[Item]:
        """All items, or those of one source, in the order in which they came; none is handed out by this."""
        return [item for item in self._items if source in (None, item.source)]

    def take(self, source: str, kind: str) -> Item:
        """Return the next item of a class.

        cifar10: class name; emoji: code point, category or "vendor|short name"; movies: genre.

        Raises:
            DymoeError: there is none (left).
        """
        key = (source, kind)
        stack, position = self._stacks.get(key, []), self._position.get(key, 0)
        if source in ("emoji", "movies") and stack:
            position %= len(stack)
        if position >= len(stack):
            raise DymoeError(f"source {source}: no item of class {kind!r} (left); the pool has {len(stack)}")
        self._position[key] = position + 1
        return stack[position]

    def take_any(self, source: str, kinds: Iterable[str], rng: random.Random) -> Item:
        """Return the next item of a class picked at random among those of `kinds` that this pool has."""
        present = [kind for kind in kinds if (source, kind) in self._stacks]
        if not present:
            raise DymoeError(f"source {source}: this pool has nothing of {', '.join(kinds)}")
        return self.take(source, rng.choice(present))


def _keys(item: Item) -> list[tuple[str, str]]:
    if item.source == "emoji":
        kinds = (
            item.id.rsplit("/", 1)[1],
            item.extra["subcategory"],
            f"{item.extra['vendor']}|{item.extra['short_name']}",
        )
        return [(item.source, kind) for kind in kinds]
    if item.source == "movies":
        genre, rating = item.extra["genre"], item.extra["rating"]
        return [(item.source, genre), (item.source, f"{genre}|{rating}"), (item.source, f"|{rating}")]
    return [(item.source, item.label)]


def fill(pool: str, seed: int, cache: Path | None = None) -> Stock:
    """Read every source's items of one pool ("train" or "test")."""
    return Stock((item for name in sources.READERS for item in sources.iterate(name, pool, cache)), seed)


def cycle(options: Mapping[str, int], count: int, rng: random.Random) -> list[str]:
    """`count` option names in the proportions given (integer weights), evenly spread, then shuffled."""
    once = [name for name, weight in options.items() for _ in range(weight)]
    names = [once[index % len(once)] for index in range(count)]
    rng.shuffle(names)
    return names
