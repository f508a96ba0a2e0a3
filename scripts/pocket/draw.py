"""Drawing for the pocket benchmark: canvases, pasted pictures, words, wear and tear, encoding.

Sizes are pixels; boxes are (x0, y0, x1, y1) in pixels. Every random choice comes from the caller's generator.
Text is set in the font that Pillow carries, so that the same pictures come out on every machine.
"""

import colorsys
import io
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Box = tuple[int, int, int, int]
Color = tuple[int, int, int]

COLORS: dict[str, Color] = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (245, 212, 30),
    "purple": (140, 60, 170),
    "black": (25, 25, 25),
}
SIGNS = {"red": "white", "blue": "white", "green": "white", "yellow": "black", "black": "white"}  # ground -> ink


def pastel(rng: random.Random) -> Color:
    """A light, weakly saturated colour, so that what is drawn on it stands out."""
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.05, 0.3), rng.uniform(0.85, 1.0))
    return int(red * 255), int(green * 255), int(blue * 255)


def canvas(size: tuple[int, int], color: Color) -> Image.Image:
    """A plain RGB picture of `size` (width, height)."""
    return Image.new("RGB", size, color)


def enlarge(photo: Image.Image, side: int) -> Image.Image:
    """A small photo as RGB, scaled to `side` x `side`."""
    return photo.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


def paste_cutout(target: Image.Image, cutout: Image.Image, box: Box) -> None:
    """Paste an RGBA picture, cropped to what is not transparent, so that it fills `box`."""
    cropped = cutout.crop(cutout.getchannel("A").getbbox() or (0, 0, *cutout.size))
    fitted = cropped.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.LANCZOS)
    target.paste(fitted, box[:2], fitted)


def paste_inside(target: Image.Image, cutout: Image.Image, box: Box) -> None:
    """Paste an RGBA picture centred in `box`, its proportions kept."""
    cropped = cutout.crop(cutout.getchannel("A").getbbox() or (0, 0, *cutout.size))
    width, height = box[2] - box[0], box[3] - box[1]
    scale = min(width / cropped.width, height / cropped.height)
    size = max(1, round(cropped.width * scale)), max(1, round(cropped.height * scale))
    left, top = box[0] + (width - size[0]) // 2, box[1] + (height - size[1]) // 2
    paste_cutout(target, cropped, (left, top, left + size[0], top + size[1]))


def draw_words(target: Image.Image, text: str, box: Box, color: Color) -> None:
    """Write one line of text as large as `box` allows, centred in it."""
    width, height = box[2] - box[0], box[3] - box[1]
    reference = ImageFont.load_default(100)
    left, top, right, bottom = reference.getbbox(text)
    size = max(6.0, 100 * min(width / max(1, right - left), height / max(1, bottom - top)))
    font = ImageFont.load_default(size)
    middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    left, top, right, bottom = font.getbbox(text)
    origin = middle[0] - (left + right) / 2, middle[1] - (top + bottom) / 2
    ImageDraw.Draw(target).text(origin, text, fill=color, font=font)


def sign(photo: Image.Image, word: str, rng: random.Random) -> Image.Image:
    """A word in capitals on a coloured sign in front of the blurred photo, 96 x 96 pixels."""
    image = blur(enlarge(photo, 96), 2)
    ground, ink = rng.choice(list(SIGNS.items()))
    top = rng.randint(22, 34)
    box = (4, top, 92, top + 42)
    ImageDraw.Draw(image).rounded_rectangle(box, 5, fill=COLORS[ground], outline=(255, 255, 255), width=2)
    color = (255, 255, 255) if ink == "white" else COLORS[ink]
    draw_words(image, word.upper(), (box[0] + 6, box[1] + 7, box[2] - 6, box[3] - 7), color)
    return image


def add_noise(image: Image.Image, rng: random.Random, spread: float) -> Image.Image:
    """Add Gaussian noise of standard deviation `spread` (grey levels, 0 to 255)."""
    noise = np.random.default_rng(rng.getrandbits(64)).normal(0, spread, (image.height, image.width, 3))
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) + noise
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def blur(image: Image.Image, radius: float) -> Image.Image:
    """Gaussian blur of `radius` pixels."""
    return image.filter(ImageFilter.GaussianBlur(radius))


def darken(image: Image.Image, factor: float) -> Image.Image:
    """Multiply every pixel by `factor` (0 black, 1 unchanged)."""
    return image.point([round(value * factor) for value in range(256)] * len(image.getbands()))


def crop_shift(image: Image.Image, rng: random.Random, share: float) -> Image.Image:
    """Move the picture by up to `share` of its size in both directions; what comes in from outside is black."""
    reach = int(image.width * share), int(image.height * share)
    moved = Image.new("RGB", image.size)
    moved.paste(image, (rng.randint(-reach[0], reach[0]), rng.randint(-reach[1], reach[1])))
    return moved


def outline(image: Image.Image) -> Image.Image:
    """Dark lines on white where the brightness changes (the length of Sobel's gradient)."""
    grey = np.pad(np.asarray(image.convert("L"), dtype=np.float32), 1, mode="edge")
    down = grey[2:] - grey[:-2]
    right = grey[:, 2:] - grey[:, :-2]
    down = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    right = right[:-2] + 2 * right[1:-1] + right[2:]
    ink = np.clip(np.hypot(down, right), 0, 255)
    return Image.fromarray((255 - ink).astype(np.uint8)).convert("RGB")


def encode(image: Image.Image, quality: int = 75) -> bytes:
    """Encode as lossy WebP."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()
