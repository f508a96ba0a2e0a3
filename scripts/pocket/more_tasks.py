"""The tasks of pocket-classes and pocket-domains: single pictures under one question.

Each maker takes a stock of source items, a generator and a count and returns that many drafts.
"""

import random
from functools import partial

from PIL import Image

from dymoe.tasks.pocket import classes, domains
from scripts.pocket import draw
from scripts.pocket.photo_tasks import PHOTO_SIDE, wear
from scripts.pocket.sources import Item
from scripts.pocket.stock import Draft, Stock, cycle

# Answer -> the classes of photos that it stands for.
PHOTOS = {
    "bird": ("bird",),
    "mammal": ("cat", "deer", "dog", "horse"),
    "road vehicle": ("automobile", "truck"),
    "ship": ("ship",),
}
# Answer -> the drawings that it stands for, by the emoji's short names; both pools have some of each.
DRAWINGS = {
    "bird": (
        *("hatching_chick", "bird", "dove_of_peace", "eagle", "duck", "swan", "phoenix"),
        *("turkey", "rooster", "hatched_chick", "penguin", "owl", "peacock", "parrot", "black_bird", "goose"),
    ),
    "mammal": (
        *("dog2", "poodle", "raccoon", "black_cat", "lion_face", "horse", "moose", "donkey", "racehorse", "goat"),
        *("water_buffalo", "pig", "llama", "elephant", "rhinoceros", "hippopotamus", "mouse2", "rabbit", "polar_bear"),
        *("service_dog", "wolf", "fox_face", "cat", "cat2", "tiger", "leopard", "zebra_face", "bison", "cow", "ox"),
        *("cow2", "pig2", "boar", "ram", "camel", "giraffe_face", "mammoth", "mouse", "hamster", "rabbit2", "otter"),
    ),
    "road vehicle": (
        *("bus", "trolleybus", "taxi", "oncoming_taxi", "car", "blue_car", "pickup_truck", "auto_rickshaw"),
        *("minibus", "fire_engine", "police_car", "oncoming_automobile", "truck", "articulated_lorry", "tractor"),
        "racing_car",
    ),
    "ship": ("passenger_ship", "ship", "boat", "motor_boat"),
}


def recognition(name: str, stock: Stock, rng: random.Random, count: int) -> list[Draft]:
    """A task of pocket-classes: a real photo of one of its four classes."""
    photos, garments = classes.CLASSES[name]
    source_of = {**dict.fromkeys(photos, "cifar10"), **dict.fromkeys(garments, "fashion-mnist")}
    drafts = []
    for label in cycle(dict.fromkeys(source_of, 1), count, rng):
        item = stock.take(source_of[label], label)
        image = draw.enlarge(item.picture, PHOTO_SIDE)
        drafts.append(Draft(image, classes.QUESTION, label, [item.id], {"answer": label}))
    return drafts


def domain(name: str, stock: Stock, rng: random.Random, count: int) -> list[Draft]:
    """A task of pocket-domains: something of one of the four kinds, as this domain shows it."""
    drafts = []
    for answer in cycle(dict.fromkeys(domains.ANSWERS, 1), count, rng):
        item, image = _in_domain(name, answer, stock, rng)
        drafts.append(Draft(image, domains.QUESTION, answer, [item.id], {"answer": answer}))
    return drafts


def _in_domain(name: str, answer: str, stock: Stock, rng: random.Random) -> tuple[Item, Image.Image]:
    """A source item and its picture in the domain."""
    if name in ("Photos", "Worn"):
        item = stock.take("cifar10", rng.choice(PHOTOS[answer]))
        image = draw.enlarge(item.picture, PHOTO_SIDE)
        return item, wear(image, rng, always=True) if name == "Worn" else image
    vendors = {"Twemoji": ("Twemoji",), "Noto": ("Noto",), "Outlines": ("Twemoji", "Noto")}[name]
    item = stock.take_any("emoji", [f"{vendor}|{short}" for vendor in vendors for short in DRAWINGS[answer]], rng)
    ground = (255, 255, 255) if name == "Outlines" else draw.pastel(rng)
    image = draw.canvas((PHOTO_SIDE, PHOTO_SIDE), ground)
    side = rng.randint(40, 60)
    left, top = rng.randint(2, PHOTO_SIDE - 2 - side), rng.randint(2, PHOTO_SIDE - 2 - side)
    cutout = item.picture.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    draw.paste_inside(image, cutout, (left, top, left + side, top + side))
    return item, draw.outline(image) if name == "Outlines" else image


CLASS_MAKERS = {name: partial(recognition, name) for name in classes.TASKS}
DOMAIN_MAKERS = {name: partial(domain, name) for name in domains.TASKS}
