"""The four tasks on composed pictures: TextVQA, GQA, Grounding, OCRVQA.

Each maker takes a stock of source items, a generator and a count and returns that many drafts.
"""

import random

from PIL import Image, ImageDraw

from scripts.pocket import draw
from scripts.pocket.sources import CIFAR10, Item
from scripts.pocket.stock import Draft, Stock, cycle

SIDE = 128

# name -> code points of the emoji that show it; each pool has one vendor's drawing of each of them.
OBJECTS: dict[str, tuple[str, ...]] = {
    "dog": ("1f415", "1f429"),
    "cat": ("1f431", "1f408", "1f638"),
    "fish": ("1f41f", "1f420", "1f421"),
    "tree": ("1f333", "1f332", "1f334"),
    "flower": ("1f33b", "1f339", "1f337", "1f338"),
    "car": ("1f697", "1f698", "1f699"),
    "ball": ("26bd", "1f3c0", "1f3be"),
    "apple": ("1f34e", "1f34f"),
    "clock": ("1f550", "1f551", "1f552", "1f553"),
    "book": ("1f4d5", "1f4d9", "1f4d6"),
    "heart": ("1f49b", "1f49a", "1f499", "1f49c"),
    "cake": ("1f370", "1f382", "1f9c1"),
}
WORDS = ("stop", "exit", "taxi", "open", "cafe", "hotel", "sale", "bus", "zoo", "park", "bank", "milk")
NUMBERS = ("one", "two", "three", "four")

# Genre (as the movie table has it) -> what the cover calls it, its background colours, its emoji.
GENRES: dict[str, tuple[str, tuple[draw.Color, ...], tuple[str, ...]]] = {
    "Comedy": ("Comedy", ((255, 224, 102), (255, 200, 61)), ("1f602", "1f923", "1f606", "1f61d")),
    "Horror": ("Horror", ((20, 18, 28), (45, 10, 15)), ("2620-fe0f", "1f47b", "1f9db", "1f987", "1f9df")),
    "Romantic Comedy": ("Romance", ((250, 190, 205), (244, 143, 177)), ("1f496", "1f498", "1f491", "1f339")),
    "Musical": ("Musical", ((150, 120, 220), (110, 80, 190)), ("1f3b8", "1f3a4", "1f3b7", "1f3ba", "1f3bb")),
    "Western": ("Western", ((222, 184, 135), (205, 150, 90)), ("1f920", "1f335", "1f40e")),
    "Action": ("Action", ((200, 50, 40), (225, 95, 30)), ("1f4a5", "1f4a3", "1f52b", "1f94a")),
    "Adventure": ("Adventure", ((90, 170, 110), (70, 150, 150)), ("1f9ed", "26f0-fe0f", "1f3d5-fe0f")),
    "Documentary": ("Documentary", ((225, 228, 232), (200, 206, 214)), ("1f30d", "1f9d0", "1f427")),
}
RATINGS = ("G", "PG", "PG-13", "R")


def reading(stock: Stock, rng: random.Random, count: int) -> list[Draft]:
    """TextVQA: a word on a sign in front of a real photo, or a real handwritten digit."""
    drafts = []
    for answer in cycle({**dict.fromkeys(WORDS, 3), **dict.fromkeys("0123456789", 2)}, count, rng):
        if answer.isdigit():
            item = stock.take("mnist", answer)
            image, question = draw.enlarge(item.picture, 56), "What number is written?"
        else:
            item = stock.take("cifar10", rng.choice(CIFAR10))
            image, question = draw.sign(item.picture, answer, rng), "What does the sign say?"
        answers = [answer] * 9 + [f"{answer} sign" if not answer.isdigit() else f"number {answer}"]
        drafts.append(Draft(image, question, answer, [item.id], {"answer": answer, "answers": answers}))
    return drafts


def _object(stock: Stock, name: str, rng: random.Random) -> Item:
    return stock.take_any("emoji", OBJECTS[name], rng)


def _cell(cell: int, margin: int) -> draw.Box:
    left, top = cell % 2 * SIDE // 2, cell // 2 * SIDE // 2
    return left + margin, top + margin, left + SIDE // 2 - margin, top + SIDE // 2 - margin


def scenes(stock: Stock, rng: random.Random, count: int) -> list[Draft]:
    """GQA: a scene of one to four objects and a question of existence, number, attribute or position."""
    names, colors = list(OBJECTS), list(draw.COLORS)
    drafts = []
    kinds = cycle({"exist": 2, "count": 2, "color": 3, "side": 3}, count, rng)
    for kind, turn in zip(kinds, _turns(kinds), strict=True):
        if kind == "side":
            drafts.append(_side_scene(stock, rng, names[turn % len(names)], turn))
            continue
        total = {"count": turn % 4 + 1, "color": 1}.get(kind) or rng.randint(2, 3)
        present = rng.sample(names, total)
        ground = colors[turn % len(colors)]
        color = draw.COLORS[ground] if kind == "color" else draw.pastel(rng)
        image, items = draw.canvas((SIDE, SIDE), color), []
        cells = rng.sample(range(4), 4)
        for name, cell in zip(present, cells, strict=False):
            items.append(_object(stock, name, rng))
            draw.paste_inside(image, items[-1].picture, _cell(cell, 4))
        if kind == "exist":
            yes = turn % 2 == 0
            target = rng.choice(present if yes else [name for name in names if name not in present])
            question, answer = f"Is there a {target}?", "yes" if yes else "no"
        elif kind == "count":
            question, answer = "How many objects are there?", NUMBERS[total - 1]
        else:
            question, answer = "What color is the background?", ground
        drafts.append(Draft(image, question, answer, [item.id for item in items], {"answer": answer}))
    return drafts


def _side_scene(stock: Stock, rng: random.Random, answer: str, turn: int) -> Draft:
    side = ("left", "right")[turn // len(OBJECTS) % 2]
    other = rng.choice([name for name in OBJECTS if name != answer])
    pair = [answer, other] if side == "left" else [other, answer]
    items = [_object(stock, name, rng) for name in pair]
    image, top = draw.canvas((SIDE, SIDE), draw.pastel(rng)), rng.choice((16, 32, 48))
    for position, item in enumerate(items):
        left = position * SIDE // 2 + 2
        draw.paste_inside(image, item.picture, (left, top, left + 60, top + 60))
    question = f"What is on the {side}?"
    return Draft(image, question, answer, [item.id for item in items], {"answer": answer})


def _turns(kinds: list[str]) -> list[int]:
    counts: dict[str, int] = {}
    turns = []
    for kind in kinds:
        turns.append(counts.get(kind, 0))
        counts[kind] = turns[-1] + 1
    return turns


def grounding(stock: Stock, rng: random.Random, count: int) -> list[Draft]:
    """Grounding: the box of a named object, a quadrant or a half of the picture or its middle."""
    quarter = SIDE // 4
    corners = [(x, y, x + 2, y + 2) for x in (0, 2) for y in (0, 2)]
    sides = [(0, 0, 2, 4), (2, 0, 4, 4), (0, 0, 4, 2), (0, 2, 4, 4)]
    boxes = [*corners, *sides, (1, 1, 3, 3)]
    layout = {str(index): 1 for index in range(len(boxes))}
    drafts = []
    for index, choice in enumerate(cycle(layout, count, rng)):
        cells = boxes[int(choice)]
        name = rng.choice(list(OBJECTS))
        image = draw.canvas((SIDE, SIDE), draw.pastel(rng))
        item = _object(stock, name, rng)
        placed = [(item, cells)]
        free = [box for box in corners if not _overlap(box, cells)]
        if free and index % 2:
            other = rng.choice([other for other in OBJECTS if other != name])
            placed.append((_object(stock, other, rng), rng.choice(free)))
        for thing, (x0, y0, x1, y1) in placed:
            box = (x0 * quarter, y0 * quarter, x1 * quarter, y1 * quarter)
            draw.paste_cutout(image, thing.picture, box)
        bbox = [value / 4 for value in cells]
        answer = "[" + ",".join(f"{value:.2f}" for value in bbox) + "]"
        reference = {"answer": answer, "bbox": bbox}
        drafts.append(Draft(image, f"the {name}", answer, [thing.id for thing, _ in placed], reference))
    return drafts


def _overlap(first: draw.Box, second: draw.Box) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def covers(stock: Stock, rng: random.Random, count: int) -> list[Draft]:
    """OCRVQA: the cover of a real film, drawn from its real title, genre and rating."""
    genres = list(GENRES)
    drafts = []
    kinds = cycle({"genre": 4, "rating": 3, "check": 2}, count, rng)
    for kind, turn in zip(kinds, _turns(kinds), strict=True):
        genre = genres[turn % len(genres)]
        if kind == "rating":
            rating = RATINGS[turn % len(RATINGS)]
            movie = stock.take_any("movies", [f"{name}|{rating}" for name in genres], rng)
            genre = movie.extra["genre"]
        else:
            movie = stock.take("movies", genre)
        image, motif = _cover(stock, rng, movie, genre)
        name = GENRES[genre][0]
        if kind == "genre":
            question, answer = "What is the genre of this movie?", name
        elif kind == "rating":
            question, answer = "What is the rating of this movie?", movie.extra["rating"]
        else:
            yes = turn // len(genres) % 2 == 0
            proposal = name if yes else rng.choice([entry[0] for entry in GENRES.values() if entry[0] != name])
            question, answer = f"Is the genre {proposal}?", "Yes" if yes else "No"
        drafts.append(Draft(image, question, answer, [movie.id, motif.id], {"answer": answer}))
    return drafts


def _cover(stock: Stock, rng: random.Random, movie: Item, genre: str) -> tuple[Image.Image, Item]:
    _, grounds, motifs = GENRES[genre]
    ground = rng.choice(grounds)
    image = draw.canvas((SIDE, SIDE), ground)
    ink = (245, 245, 245) if sum(ground) < 380 else (20, 20, 20)
    motif = stock.take_any("emoji", motifs, rng)
    draw.paste_inside(image, motif.picture, (6, 34, 82, 110))
    draw.draw_words(image, movie.label[:24], (6, 6, SIDE - 6, 28), ink)
    badge = (88, 78, 124, 122)
    ImageDraw.Draw(image).rectangle(badge, fill=(255, 255, 255), outline=(0, 0, 0), width=2)
    shown = movie.extra["rating"] if movie.extra["rating"] in RATINGS else "NR"
    draw.draw_words(image, shown, (badge[0] + 4, badge[1] + 6, badge[2] - 4, badge[3] - 6), (0, 0, 0))
    return image, motif
