"""`coin/gqa`: CoIN's rule, flaw for flaw: the text without trailing periods, in lower case, is the answer.

Space around the prediction is kept, and the answer is taken as it stands, so one with a capital cannot be matched.
Only balanced questions count, and only those predicted (`POLICY`). `exact_match` is the corrected rule.
"""

from collections.abc import Mapping
from typing import Any

from dymoe.tasks.scoring import exact_match
from dymoe.tasks.scoring.exact_match import either, read_text
from dymoe.tasks.scoring.policy import Policy

POLICY = Policy("predictions", "every balanced question with a prediction; the others are left out", twice="last")


def strict(prediction: str, reference: Mapping[str, Any]) -> float:
    """1.0 when the prediction, without periods at its end and in lower case, is `reference["answer"]`.

    Raises:
        DymoeError: the reference's answer is not text.
    """
    return float(prediction.rstrip(".").lower() == read_text(reference))


lenient = either(strict, exact_match.lenient)


readable = exact_match.readable
