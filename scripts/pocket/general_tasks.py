"""The tasks of pocket-general: captions of held-out pictures, and questions of text alone.

Each maker takes a stock of source items, a generator and a count and returns that many drafts.
"""

import io
import random
from collections.abc import Callable
from functools import partial

from PIL import Image

from dymoe.tasks.pocket.general import DESCRIBE
from scripts.pocket import captions
from scripts.pocket.sources import stable_hash
from scripts.pocket.stock import Draft, Stock

# Each word's opposite is the other one of its pair; no word stands in two pairs.
OPPOSITES = (
    *("hot cold", "big small", "up down", "left right", "day night", "open closed", "black white", "good bad"),
    *("fast slow", "high low", "wet dry", "rich poor", "early late", "full empty", "strong weak", "happy sad"),
    *("light dark", "long short", "inside outside", "before after", "above below", "true false", "love hate"),
    *("war peace", "win lose", "buy sell", "push pull", "first last", "north south", "east west", "summer winter"),
    *("wide narrow", "thick thin", "clean dirty", "deep shallow", "safe dangerous", "near far", "accept reject"),
    *("cheap expensive", "asleep awake", "alive dead", "ancient modern", "front back", "top bottom"),
    *("entrance exit", "success failure", "always never", "increase decrease", "positive negative"),
    *("guilty innocent", "smooth rough", "major minor", "public private", "simple complex", "real fake"),
    *("rise fall", "friend enemy", "heaven hell", "soft hard", "male female", "maximum minimum"),
)
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna",
    "Poland": "Warsaw", "Norway": "Oslo", "Sweden": "Stockholm", "Ireland": "Dublin", "Cuba": "Havana",
    "Peru": "Lima", "Canada": "Ottawa", "Kenya": "Nairobi", "India": "New Delhi", "Denmark": "Copenhagen",
    "Finland": "Helsinki", "Hungary": "Budapest", "Turkey": "Ankara", "Thailand": "Bangkok", "Vietnam": "Hanoi",
    "Australia": "Canberra", "Argentina": "Buenos Aires", "Chile": "Santiago", "Colombia": "Bogota",
    "Iran": "Tehran", "Iraq": "Baghdad", "Syria": "Damascus", "Lebanon": "Beirut", "Romania": "Bucharest",
    "Bulgaria": "Sofia", "Serbia": "Belgrade", "Croatia": "Zagreb", "Ukraine": "Kyiv", "Belgium": "Brussels",
    "Switzerland": "Bern", "Iceland": "Reykjavik", "Estonia": "Tallinn", "Latvia": "Riga", "Lithuania": "Vilnius",
    "Ghana": "Accra", "Ethiopia": "Addis Ababa", "Morocco": "Rabat", "Tunisia": "Tunis", "Indonesia": "Jakarta",
    "South Korea": "Seoul", "Philippines": "Manila", "Nepal": "Kathmandu", "Jamaica": "Kingston",
    "Venezuela": "Caracas", "Ecuador": "Quito", "Bolivia": "La Paz", "Senegal": "Dakar", "Qatar": "Doha",
    "New Zealand": "Wellington",
}  # fmt: skip
SUMS = range(1, 13)
SHORT = "Answer the question using a single word or phrase."
NAME = "Answer with its name."


def described(stock: Stock, rng: random.Random, count: int) -> list[Draft]:
    """Captions of pictures composed as those that the projector was trained on (`scripts.pocket.captions`)."""
    kinds = ("cifar10", "emoji", "mnist", "fashion-mnist")
    photos, drawings, digits, garments = (list(filter(captions.nameable, stock.items(kind))) for kind in kinds)
    pairs = captions.pairs(captions.Stock(photos, drawings, digits, garments), count, rng.randrange(2**32))
    return [
        Draft(
            Image.open(io.BytesIO(pair.image), formats=("PNG",)).convert("RGB"),
            DESCRIBE,
            pair.caption,
            [item.id for item in pair.items],
            {"answer": pair.caption},
        )
        for pair in pairs
    ]


def text(stock: Stock, rng: random.Random, count: int, split: str) -> list[Draft]:
    """Opposites, sums and capitals without a picture; of no question both splits have some."""
    pairs = [pair.split() for pair in OPPOSITES]
    questions = [(f"What is the opposite of {a}?\n{SHORT}", b) for pair in pairs for a, b in (pair, pair[::-1])]
    questions += [(f"What is {a} + {b}?\n{SHORT}", str(a + b)) for a in SUMS for b in SUMS]
    questions += [(f"What is the capital of {country}? {NAME}", city) for country, city in CAPITALS.items()]
    chosen = rng.sample(sorted(filter(lambda pair: side(pair[0], split), questions)), count)
    return [Draft(None, question, answer, [], {"answer": answer}) for question, answer in chosen]


def side(name: str, split: str) -> bool:
    """Whether a source item's id or a question serves this split: a fifth is for validation, the rest for the test."""
    return (stable_hash(f"validation {name}") % 5 == 0) is (split == "validation")


def makers(split: str) -> dict[str, Callable[[Stock, random.Random, int], list[Draft]]]:
    """The makers of a split's tasks."""
    return {"Captions": described, "Text": partial(text, split=split)}
