"""Grounding: the box in the answer must overlap the true one with an intersection over union above one half."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dymoe.errors import DymoeError

THRESHOLD = 0.5
_NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_BOX = re.compile(rf"\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]")
_NUMBERS = re.compile(rf"(?<![0-9.A-Za-z]){_NUMBER}(?![0-9A-Za-z])")

Box = tuple[float, float, float, float]


def strict(prediction: str, reference: Mapping[str, Any]) -> float:
    """1.0 when the prediction is "[x0,y0,x1,y1]" and its IoU with `reference["bbox"]` is strictly above 0.5.

    Raises:
        DymoeError: the reference's box cannot be read.
    """
    truth = read_box(reference)
    found = _BOX.fullmatch(prediction.strip())
    return float(found is not None and iou(_floats(found.groups()), truth) > THRESHOLD)


def lenient(prediction: str, reference: Mapping[str, Any]) -> float:
    """1.0 also for four numbers with other separators or words around, corners swapped, or on a 0-100 scale.

    Raises:
        DymoeError: the reference's box cannot be read.
    """
    truth = read_box(reference)
    if strict(prediction, reference):
        return 1.0
    numbers = _NUMBERS.findall(prediction)
    if len(numbers) != 4:
        return 0.0
    x0, y0, x1, y1 = _floats(numbers)
    scale = 100.0 if max(x0, y0, x1, y1) > 1.5 else 1.0
    box = (min(x0, x1) / scale, min(y0, y1) / scale, max(x0, x1) / scale, max(y0, y1) / scale)
    return float(iou(box, truth) > THRESHOLD)


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
    """Return the reference's box.

    Raises:
        DymoeError: it is not four finite numbers x0 < x1, y0 < y1 between 0 and 1.
    """
    box = reference.get("bbox")
    right = "four numbers [x0, y0, x1, y1] between 0 and 1 with x0 < x1 and y0 < y1"
    if not isinstance(box, Sequence) or isinstance(box, str) or len(box) != 4:
        raise DymoeError(f"reference: 'bbox' must be {right}, not {box!r}")
    if not all(isinstance(value, int | float) and 0 <= value <= 1 for value in box):
        raise DymoeError(f"reference: 'bbox' must be {right}, not {box!r}")
    x0, y0, x1, y1 = (float(value) for value in box)
    if x0 >= x1 or y0 >= y1:
        raise DymoeError(f"reference: 'bbox' must be {right}, not {box!r}")
    return x0, y0, x1, y1


def _floats(texts: Sequence[str]) -> Box:
    x0, y0, x1, y1 = (float(text) for text in texts)
    return x0, y0, x1, y1
