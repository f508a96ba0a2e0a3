"""Pictures with captions for training the pocket model's projector, composed from the packages' raw pictures.

Only items that no task's test split may use go in: the pools "caption" and "train" of `scripts.pocket.sources`.
An item serves the training or the held-out pairs, never both, and a composition takes its parts from one side.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image

from scripts.pocket.draw import sign
from scripts.pocket.sources import Item, iterate, stable_hash

SIZE = 128  # pixels of a composed picture, both sides
COLOURS = {
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "gray": (128, 128, 128),
    "red": (200, 40, 40),
    "green": (50, 160, 70),
    "blue": (50, 90, 200),
    "yellow": (240, 210, 60),
}
# Words for signs: common short ones, the twelve of the task TextVQA among them (its pictures are others).
# fmt: off
WORDS = (
    "stop", "exit", "taxi", "open", "cafe", "hotel", "sale", "bus", "zoo", "park", "bank", "milk", "shop", "food",
    "closed", "gym", "pool", "press", "ice", "beach", "tea", "coffee", "pizza", "books", "toys", "fish", "meat",
    "bread", "wine", "art", "music", "news", "tickets", "lift", "stairs", "police", "school", "farm", "lake", "bar",
)
# fmt: on
NUMBERS = ("one", "two", "three", "four", "five", "six")
GRID = {
    f"{row} {column}".replace("middle middle", "middle"): (x, y)
    for y, row in enumerate(("top", "middle", "bottom"))
    for x, column in enumerate(("left", "middle", "right"))
}


@dataclass(frozen=True)
class Pair:
    """A picture (PNG bytes), what it shows, and the items in it; `kind` is the maker that composed it."""

    kind: str
    image: bytes
    caption: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Stock:
    """The raw pictures on one side (training or held out)."""

    photos: Sequence[Item]
    drawings: Sequence[Item]
    digits: Sequence[Item]
    garments: Sequence[Item]


def stocks(cifar_limit: int = 6000, grey_limit: int = 3000) -> tuple[Stock, Stock]:
    """All usable raw pictures as (training, held out); one item in twenty, by the hash of its id, is held out.

    An emoji is held out in both vendors' drawings. The limits cap the items read of each large source.
    """
    sides: tuple[list[list[Item]], list[list[Item]]] = ([], [])
    for source, limit in (
        ("cifar10", cifar_limit),
        ("emoji", None),
        ("mnist", grey_limit),
        ("fashion-mnist", grey_limit),
    ):
        items = [item for pool in ("caption", "train") for item in iterate(source, pool)]
        items = [item for item in items if nameable(item)]
        items.sort(key=lambda item: stable_hash(item.id))
        for side, held_out in zip(sides, (False, True), strict=True):
            side.append([item for item in items[:limit] if _held_out(item) is held_out])
    train, held_out_stock = (Stock(*side) for side in sides)
    return train, held_out_stock


def nameable(item: Item) -> bool:
    """Whether a caption may name it: nobody could guess which country's a flag is."""
    return item.extra.get("category") != "Flags"


def _held_out(item: Item) -> bool:
    key = item.id.split("/")[-1] if item.source == "emoji" else item.id
    return stable_hash(f"held out {key}") % 20 == 0


def pairs(stock: Stock, count: int, seed: int) -> list[Pair]:
    """`count` pairs: photos, drawings, digits, garments, signs and compositions, shuffled by `seed`.

    Drawings come once each before any comes again.
    """
    random = Random(seed)
    drawings = _endless(stock.drawings, random)
    photos = _endless(stock.photos, random)
    result = []
    for number in range(count):
        share = number % 20
        if share < 4:
            item = next(photos)
            result.append(Pair("photo", _png(item.picture), f"a photo of {_name(item)}", (item,)))
        elif share < 8:
            item = next(drawings)
            result.append(Pair("drawing", _png(_on(item, "white", SIZE)), f"a drawing: {item.label}", (item,)))
        elif share < 10:
            result.append(_digits(stock, random))
        elif share == 10:
            item = random.choice(stock.garments)
            result.append(Pair("garment", _png(item.picture), f"a picture of {_name(item)}", (item,)))
        elif share < 14:
            word, item = random.choice(WORDS), next(photos)
            result.append(Pair("sign", _png(sign(item.picture, word, random)), f"a sign that says {word}", (item,)))
        elif share < 16:
            result.append(_two(stock, random))
        elif share < 18:
            result.append(_placed(stock, random))
        else:
            result.append(_several(stock, random))
    random.shuffle(result)
    return result


# --- makers --------------------------------------------------------------------------------------------------


def _digits(stock: Stock, random: Random) -> Pair:
    """One to three handwritten digits in a row: "the number 407"."""
    items = [random.choice(stock.digits) for _ in range(random.choice((1, 1, 2, 3)))]
    canvas = Image.new("RGB", (SIZE, SIZE), COLOURS["black"])
    side = SIZE // len(items)
    for column, item in enumerate(items):
        left = (SIZE - side * len(items)) // 2 + side * column
        canvas.paste(item.picture.convert("RGB").resize((side, side)), (left, (SIZE - side) // 2))
    return Pair("digits", _png(canvas), "the number " + "".join(item.label for item in items), tuple(items))


def _two(stock: Stock, random: Random) -> Pair:
    """Two things beside or above each other, with their places."""
    colour = random.choice(list(COLOURS))
    first, second = _any(stock, random), _any(stock, random)
    canvas = Image.new("RGB", (SIZE, SIZE), COLOURS[colour])
    half = SIZE // 2
    if random.random() < 0.5:
        names, corners = ("on the left", "on the right"), ((4, SIZE // 4), (half + 4, SIZE // 4))
    else:
        names, corners = ("at the top", "at the bottom"), ((SIZE // 4, 4), (SIZE // 4, half + 4))
    for item, corner in zip((first, second), corners, strict=True):
        canvas.paste(_on(item, colour, half - 8), corner)
    caption = f"{_name(first)} {names[0]} and {_name(second)} {names[1]}"
    return Pair("two", _png(canvas), caption, (first, second))


def _placed(stock: Stock, random: Random) -> Pair:
    """One thing in one of nine places on a coloured ground."""
    colour, position = random.choice(list(COLOURS)), random.choice(list(GRID))
    item = _any(stock, random)
    side = random.randint(36, 60)
    canvas = Image.new("RGB", (SIZE, SIZE), COLOURS[colour])
    x, y = ((SIZE - side) * step // 2 for step in GRID[position])
    canvas.paste(_on(item, colour, side), (x, y))
    return Pair("placed", _png(canvas), f"{_name(item)} in the {position} on a {colour} background", (item,))


def _several(stock: Stock, random: Random) -> Pair:
    """Up to six copies of one thing on a coloured ground, with their number."""
    colour = random.choice(list(COLOURS))
    item = _any(stock, random)
    number = random.randint(1, 6)
    side = 40
    canvas = Image.new("RGB", (SIZE, SIZE), COLOURS[colour])
    for cell in random.sample(range(9), number):
        canvas.paste(_on(item, colour, side), (cell % 3 * 43 + 1, cell // 3 * 43 + 1))
    return Pair("several", _png(canvas), f"{NUMBERS[number - 1]} times {_name(item)}", (item,))


# --- small helpers -------------------------------------------------------------------------------------------


def _any(stock: Stock, random: Random) -> Item:
    """A photo, drawing or garment; drawings with a short name only, to keep captions of two things short."""
    kind = random.random()
    if kind < 0.4:
        return random.choice(stock.photos)
    if kind < 0.5:
        return random.choice(stock.garments)
    while True:
        item = random.choice(stock.drawings)
        if len(item.label.split()) <= 2:
            return item


def _name(item: Item) -> str:
    """The label with its article ("trousers" and drawings' names stand alone)."""
    if item.source == "emoji" or item.label == "trousers":
        return item.label
    return f"{'an' if item.label[0] in 'aeiou' else 'a'} {item.label}"


def _on(item: Item, colour: str, side: int) -> Image.Image:
    """The item's picture scaled to `side` pixels, its transparent parts filled with `colour`."""
    picture = item.picture.convert("RGBA").resize((side, side), Image.Resampling.BICUBIC)
    ground = Image.new("RGBA", picture.size, (*COLOURS[colour], 255))
    return Image.alpha_composite(ground, picture).convert("RGB")


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _endless(items: Sequence[Item], random: Random) -> Iterator[Item]:
    """The items in random order, again and again."""
    while True:
        yield from random.sample(items, len(items))
