"""`coin/imagenet`: CoIN's rule, flaw for flaw: right when one text contains the other, case-sensitive.

An empty prediction is contained in every answer and so right, and so is a single letter of the name. The answers are
taken by position in the file, not by question_id (`POLICY`). `processed_match` is the corrected rule.
"""

from collections.abc import Mapping
from typing import Any

from dymoe.tasks.scoring import processed_match
from dymoe.tasks.scoring.exact_match import either, read_text
from dymoe.tasks.scoring.policy import Policy

POLICY = Policy(
    "positions",
    "every line of the predictions file, each with the answer at its position",
    twice="each",
    strange="ignore",
)


def strict(prediction: str, reference: Mapping[str, Any]) -> float:
    """1.0 when `reference["answer"]` is part of the prediction or the prediction part of it.

    Raises:
        DymoeError: the reference's answer is not text.
    """
    answer = read_text(reference)
    return float(answer in prediction or prediction in answer)


lenient = either(strict, processed_match.lenient)


readable = processed_match.readable
