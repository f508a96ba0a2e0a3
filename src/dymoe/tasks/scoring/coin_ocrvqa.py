"""`coin/ocrvqa`: CoIN's rule, flaw for flaw: equal in lower case; what holds "Unanswerable" is skipped.

A skipped prediction stays in the denominator and so is wrong. `exact_match` is the corrected rule.
"""

from collections.abc import Mapping
from typing import Any

from dymoe.tasks.scoring import exact_match
from dymoe.tasks.scoring.exact_match import either, read_text
from dymoe.tasks.scoring.policy import PREDICTIONS

POLICY = PREDICTIONS


def strict(prediction: str, reference: Mapping[str, Any]) -> float:
    """1.0 when prediction and `reference["answer"]` are equal in lower case and the prediction is not skipped.

    Raises:
        DymoeError: the reference's answer is not text.
    """
    answer = read_text(reference)
    return float(not skipped(prediction) and prediction.lower() == answer.lower())


lenient = either(strict, exact_match.lenient)


readable = exact_match.readable


def skipped(prediction: str) -> bool:
    """Whether CoIN's code passes over the prediction."""
    return "Unanswerable" in prediction
