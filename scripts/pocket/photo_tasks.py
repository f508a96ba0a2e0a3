"""The four tasks on single pictures: ScienceQA, ImageNet, VizWiz, VQAv2.

Each maker takes a stock of source items, a generator and a count and returns that many drafts.
"""

import random
from collections.abc import Iterator

from PIL import Image, ImageDraw

from scripts.pocket import draw
from scripts.pocket.sources import CIFAR10
from scripts.pocket.stock import Draft, Stock, cycle

PHOTO_SIDE = 64
LETTERS = "ABCDE"

# Question -> choice -> the classes for which it is right. Choices stand in alphabetical order, and the four groups
# of classes come out in the same order under every question, so that a letter always stands for the same group.
SCIENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "What carries it?": {
        "hooves": ("deer", "horse"),
        "paws": ("cat", "dog"),
        "wheels": ("automobile", "truck"),
        "wings": ("bird",),
    },
    "What does it eat?": {
        "grass": ("deer", "horse"),
        "meat": ("cat", "dog"),
        "nothing": ("automobile", "truck"),
        "seeds": ("bird",),
    },
    "Where does it belong?": {
        "field": ("deer", "horse"),
        "home": ("cat", "dog"),
        "road": ("automobile", "truck"),
        "tree": ("bird",),
    },
}

GARMENTS = {
    "t-shirt": "shirt",
    "trousers": "pants",
    "dress": "gown",
    "coat": "jacket",
    "sandal": "shoe",
    "sneaker": "shoe",
    "bag": "handbag",
    "boot": "ankle boot",
}

THINGS: dict[str, tuple[str, ...]] = {
    "animal": ("animal-mammal", "animal-bird", "animal-marine", "animal-bug"),
    "food": ("food-fruit", "food-vegetable", "food-prepared", "food-sweet"),
    "face": ("face-concerned", "face-smiling", "face-neutral-skeptical"),
    "vehicle": ("transport-ground",),
    "flag": ("country-flag",),
    "building": ("place-building",),
}
ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
MACHINES = ("airplane", "automobile", "ship", "truck")


def science(stock: Stock, rng: random.Random, count: int) -> list[Draft]:
    """ScienceQA: a real photo and a multiple-choice question about what it shows."""
    pairs = []
    for index, question in enumerate(cycle(dict.fromkeys(SCIENCE, 1), count, rng)):
        options = SCIENCE[question]
        pairs.append((question, list(options)[index % len(options)]))
    rng.shuffle(pairs)
    drafts = []
    for question, choice in pairs:
        choices = list(SCIENCE[question])
        item = stock.take("cifar10", rng.choice(SCIENCE[question][choice]))
        lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False)]
        answer = LETTERS[choices.index(choice)]
        drafts.append(
            Draft(
                draw.enlarge(item.picture, PHOTO_SIDE),
                "\n".join([question, *lines]),
                answer,
                [item.id],
                {"answer": answer, "choices": choices},
            )
        )
    return drafts


def classification(stock: Stock, rng: random.Random, count: int) -> list[Draft]:
    """ImageNet: a real photo and its class."""
    drafts = []
    for label in cycle(dict.fromkeys(CIFAR10, 1), count, rng):
        item = stock.take("cifar10", label)
        image = draw.enlarge(item.picture, PHOTO_SIDE)
        drafts.append(Draft(image, "What is the object in the image?", label, [item.id], {"answer": label}))
    return drafts


def degraded(stock: Stock, rng: random.Random, count: int) -> list[Draft]:
    """VizWiz: a real photo of a garment taken badly, or so badly that nobody can tell."""
    drafts = []
    for label in cycle({**dict.fromkeys(GARMENTS, 1), "unanswerable": 2}, count, rng):
        shown = rng.choice(list(GARMENTS)) if label == "unanswerable" else label
        item = stock.take("fashion-mnist", shown)
        image = draw.enlarge(item.picture, PHOTO_SIDE)
        image = _destroy(image, rng) if label == "unanswerable" else wear(image, rng)
        synonym = GARMENTS.get(label, label)
        answers = [label] * 8 + [synonym] * 2
        reference = {"answer": label, "answers": answers}
        drafts.append(Draft(image, "What is this piece of clothing?", label, [item.id], reference))
    return drafts


def wear(image: Image.Image, rng: random.Random, always: bool = False) -> Image.Image:
    """A photo taken badly: blurred, dark, out of frame or noisy; one in five as it is unless `always`."""
    kind = rng.choice([*([] if always else ["none"]), "blur", "dark", "shift", "noise"])
    if kind == "blur":
        return draw.blur(image, rng.uniform(0.8, 2.0))
    if kind == "dark":
        return draw.darken(image, rng.uniform(0.35, 0.6))
    if kind == "shift":
        return draw.crop_shift(image, rng, 0.15)
    if kind == "noise":
        return draw.add_noise(image, rng, rng.uniform(8, 20))
    return image


def _destroy(image: Image.Image, rng: random.Random) -> Image.Image:
    kind = rng.choice(["blur", "dark", "glare", "finger"])
    if kind == "blur":
        return draw.blur(image, rng.uniform(14, 20))
    if kind == "dark":
        return draw.add_noise(draw.darken(image, rng.uniform(0.0, 0.04)), rng, 8)
    if kind == "glare":
        glare = Image.blend(image, draw.canvas(image.size, (255, 255, 250)), rng.uniform(0.95, 0.99))
        return draw.add_noise(glare, rng, 8)
    skin = (rng.randint(150, 225), rng.randint(100, 160), rng.randint(80, 130))
    covered = image.copy()
    side = image.width
    ImageDraw.Draw(covered).ellipse((-side // 5, -side // 3, side + side // 5, side - side // 10), fill=skin)
    return draw.blur(covered, 3)


def open_questions(stock: Stock, rng: random.Random, count: int) -> list[Draft]:
    """VQAv2: questions of the three types (yes/no, number, other) on photos, collages and emoji."""
    kinds = {"animal": 3, "drawing": 2, "number": 4, "thing": 5}
    counters: dict[str, Iterator[int]] = {kind: iter(range(count)) for kind in kinds}
    drafts = []
    for kind in cycle(kinds, count, rng):
        turn = next(counters[kind])
        if kind == "number":
            draft = _collage(stock, rng, turn % 4 + 1)
        elif kind == "thing":
            draft = _thing(stock, rng, list(THINGS)[turn % len(THINGS)])
        else:
            draft = _yes_no(stock, rng, kind, turn)
        draft.reference = {"answer": draft.answer, "answers": [draft.answer] * 10}
        drafts.append(draft)
    return drafts


def _collage(stock: Stock, rng: random.Random, number: int) -> Draft:
    image = draw.canvas((96, 96), draw.pastel(rng))
    items = []
    for cell in rng.sample(range(4), number):
        item = stock.take("cifar10", rng.choice(CIFAR10))
        image.paste(draw.enlarge(item.picture, 42), (3 + 48 * (cell % 2), 3 + 48 * (cell // 2)))
        items.append(item.id)
    return Draft(image, "How many photos are there?", str(number), items)


def _thing(stock: Stock, rng: random.Random, answer: str) -> Draft:
    item = stock.take_any("emoji", THINGS[answer], rng)
    return Draft(_single(item.picture, rng), "What kind of thing is this?", answer, [item.id])


def _single(cutout: Image.Image, rng: random.Random) -> Image.Image:
    image = draw.canvas((96, 96), draw.pastel(rng))
    draw.paste_inside(image, cutout, (10, 10, 86, 86))
    return image


def _yes_no(stock: Stock, rng: random.Random, kind: str, turn: int) -> Draft:
    yes, photo = turn % 2 == 0, turn // 2 % 2 == 0
    if kind == "drawing":
        photo, question = not yes, "Is this a drawing?"
    else:
        question = "Is this an animal?"
    wants_animal = yes if kind == "animal" else rng.random() < 0.5
    if photo:
        item = stock.take("cifar10", rng.choice(ANIMALS if wants_animal else MACHINES))
        image = draw.enlarge(item.picture, PHOTO_SIDE)
    else:
        other = rng.choice([name for name in THINGS if name != "animal"])
        item = stock.take_any("emoji", THINGS["animal" if wants_animal else other], rng)
        image = _single(item.picture, rng)
    return Draft(image, question, "yes" if yes else "no", [item.id])
