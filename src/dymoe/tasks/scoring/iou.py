"""Grounding: the box in the answer must overlap the true one with an intersection over union above one half.

Also `corrected/grounding`. A box is (x0, y0, x1, y1), each number divided by the long side of the padded square. CoIN's
rule (`coin_grounding`) loses the first and the last character of the prediction, so that 0.67 at the end is read as
0.6, and takes whatever four numbers remain; here the prediction must be a box in brackets and nothing is cut off. An
intersection over union does not change with scale, so `size` is checked and not used.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dymoe.errors import DymoeError
from dymoe.messages import brief

THRESHOLD = 0.5
SLACK = 0.05
LARGEST_SIDE = 1e6
_NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_BOX = re.compile(rf"\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]")
_NUMBERS = re.compile(rf"(?<![0-9.A-Za-z]){_NUMBER}(?![0-9A-Za-z])")

Box = tuple[float, float, float, float]


def strict(prediction: str, reference: Mapping[str, Any]) -> float:
    """1.0 when the prediction is "[x0,y0,x1,y1]" and its IoU with the true box is strictly above 0.5.

    Args:
        reference: `answer_bbox` ("[x0,y0,x1,y1]") and `size` ([w, h]) as CoIN publishes them, or `bbox`, four numbers.

    Raises:
        DymoeError: the reference's box or size cannot be read.
    """
    truth = read_box(reference)
    match = _BOX.fullmatch(prediction.strip())
    return float(match is not None and iou(_floats(match.groups()), truth) > THRESHOLD)


def lenient(prediction: str, reference: Mapping[str, Any]) -> float:
    """1.0 also for four numbers with other separators or words around, corners swapped, or on a 0-100 scale.

    Raises:
        DymoeError: the reference's box cannot be read.
    """
    if strict(prediction, reference):
        return 1.0
    return float(loosely(prediction, read_box(reference)))


def loosely(prediction: str, truth: Box) -> bool:
    """Whether the four numbers in the prediction, however they are written, are a box that overlaps `truth`."""
    numbers = _NUMBERS.findall(prediction)
    if len(numbers) != 4:
        return False
    x0, y0, x1, y1 = _floats(numbers)
    scale = 100.0 if max(x0, y0, x1, y1) > 1.5 else 1.0
    box = (min(x0, x1) / scale, min(y0, y1) / scale, max(x0, x1) / scale, max(y0, y1) / scale)
    return iou(box, truth) > THRESHOLD


def readable(prediction: str, reference: Mapping[str, Any]) -> bool:
    """Whether the prediction is four numbers in brackets."""
    return _BOX.fullmatch(prediction.strip()) is not None


def remarks(references: Mapping[str, Mapping[str, Any]], origin: str) -> list[str]:
    """What is to be said of a file's references: boxes that rounding left without area, which no answer overlaps.

    Args:
        references: by question id, as published.
        origin: their file.

    Raises:
        DymoeError: a box cannot be read.
    """
    empty = []
    for identity, reference in references.items():
        try:
            x0, y0, x1, y1 = read_published(reference)
        except DymoeError as error:
            raise DymoeError(f"{origin}: record {identity!r}: {error}") from error
        if x0 >= x1 or y0 >= y1:
            empty.append(identity)
    if not empty:
        return []
    return [f"{len(empty)} boxes of {origin} have no area, so no answer is right (first: {empty[0]!r})"]


def iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1), any unit; 0 when one has no area or is not finite."""
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    if not all(math.isfinite(value) for value in (*first, *second, *areas)):
        return 0.0
    if any(box[2] <= box[0] or box[3] <= box[1] for box in (first, second)):
        return 0.0
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (areas[0] + areas[1] - shared)


def read_box(reference: Mapping[str, Any]) -> Box:
    """Return the reference's box: `answer_bbox` where it is there, else `bbox`.

    Published boxes are rounded: they may leave the picture by `SLACK` and a thin one may have no area (no answer can
    overlap it).

    Raises:
        DymoeError: it is not four finite numbers x0 < x1, y0 < y1 between 0 and 1, or the size is no size.
    """
    if reference.get("answer_bbox") is not None:
        if reference.get("size") is not None:
            read_long_side(reference)
        published = read_published(reference)
        inside = all(-SLACK <= value <= 1 + SLACK for value in published)
        if not inside or published[0] > published[2] or published[1] > published[3]:
            raise DymoeError(
                "reference: 'answer_bbox' must be [x0,y0,x1,y1] with x0 <= x1 and y0 <= y1, each divided by the long "
                f"side of the picture, not {brief(reference['answer_bbox'])}"
            )
        return published
    box = reference.get("bbox")
    right = "four numbers [x0, y0, x1, y1] between 0 and 1 with x0 < x1 and y0 < y1"
    if not isinstance(box, Sequence) or isinstance(box, str) or len(box) != 4:
        raise DymoeError(f"reference: 'bbox' must be {right}, not {brief(box)}")
    if not all(isinstance(value, int | float) and 0 <= value <= 1 for value in box):
        raise DymoeError(f"reference: 'bbox' must be {right}, not {brief(box)}")
    x0, y0, x1, y1 = (float(value) for value in box)
    if x0 >= x1 or y0 >= y1:
        raise DymoeError(f"reference: 'bbox' must be {right}, not {brief(box)}")
    return x0, y0, x1, y1


def read_published(reference: Mapping[str, Any]) -> Box:
    """Return the four numbers of `answer_bbox`, a text "[x0,y0,x1,y1]" or a list, in any order and size.

    Raises:
        DymoeError: it is not four finite numbers.
    """
    value = reference.get("answer_bbox")
    parts = value.replace("[", "").replace("]", "").split(",") if isinstance(value, str) else value
    try:
        if not isinstance(parts, list | tuple) or any(isinstance(part, bool) for part in parts):
            raise TypeError
        x0, y0, x1, y1 = (float(part) for part in parts)
        if not all(map(math.isfinite, (x0, y0, x1, y1))):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        right = 'four numbers, "[x0,y0,x1,y1]"'
        raise DymoeError(f"reference: 'answer_bbox' must be {right}, not {brief(value)}") from None
    return x0, y0, x1, y1


def read_long_side(reference: Mapping[str, Any]) -> float:
    """Return the longer of the two numbers of `size`, in pixels.

    Raises:
        DymoeError: `size` is not two positive numbers.
    """
    size = reference.get("size")
    if isinstance(size, list | tuple) and len(size) == 2:
        numbers = [isinstance(side, int | float) and not isinstance(side, bool) for side in size]
        if all(numbers) and all(0 < side <= LARGEST_SIDE for side in size):
            return float(max(size))
    raise DymoeError(f"reference: 'size' must be [width, height] in pixels, not {brief(size)}")


def _floats(texts: Sequence[str]) -> Box:
    x0, y0, x1, y1 = (float(text) for text in texts)
    return x0, y0, x1, y1
