"""`coin/grounding`: CoIN's rule, flaw for flaw: brackets go, and with them the first and the last character.

"[0.12,0.2,0.5,0.67]" becomes "0.12,0.2,0.5,0.67" and then ".12,0.2,0.5,0.6": the last number loses its last digit, a
leading minus or 1 disappears. What remains between commas goes through Python's `float` (spaces, 1e-2, nan and inf
included); four numbers are multiplied by the long side and must overlap with an IoU strictly above 0.5.
`iou` is the corrected rule.
"""

from collections.abc import Mapping
from typing import Any

from dymoe.tasks.scoring import iou
from dymoe.tasks.scoring.policy import PREDICTIONS

POLICY = PREDICTIONS
remarks = iou.remarks


def strict(prediction: str, reference: Mapping[str, Any]) -> float:
    """1.0 when the box that CoIN's code reads overlaps `answer_bbox` with an IoU strictly above 0.5.

    Args:
        reference: `answer_bbox`, "[x0,y0,x1,y1]" divided by the long side, and `size`, [width, height] in pixels.

    Raises:
        DymoeError: the reference's box or size cannot be read.
    """
    truth, side = iou.read_published(reference), iou.read_long_side(reference)
    box = parse(prediction)
    if box is None:
        return 0.0
    return float(_overlap([value * side for value in box], [value * side for value in truth]) > iou.THRESHOLD)


def lenient(prediction: str, reference: Mapping[str, Any]) -> float:
    """What `strict` or the corrected rule's lenient twin accepts.

    Raises:
        DymoeError: the reference's box or size cannot be read.
    """
    return strict(prediction, reference) or float(iou.loosely(prediction, iou.read_published(reference)))


def readable(prediction: str, reference: Mapping[str, Any]) -> bool:
    """Whether four numbers are left of the prediction."""
    return parse(prediction) is not None


def parse(prediction: str) -> list[float] | None:
    """The four numbers that CoIN's code reads out of a prediction, None when it gives up."""
    inner = prediction.replace("[", "").replace("]", "")[1:-1]
    try:
        numbers = [float(part) for part in inner.split(",")]
    except ValueError:
        return None
    return numbers if len(numbers) == 4 else None


def _overlap(first: list[float], second: list[float]) -> float:
    # Boxes with swapped corners have areas below zero here, as they have in CoIN's code; nan ends in no overlap.
    shared = max(0, min(first[2], second[2]) - max(first[0], second[0]))
    shared *= max(0, min(first[3], second[3]) - max(first[1], second[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    union = areas[0] + areas[1] - shared
    return shared / union if union > 0 else 0.0
