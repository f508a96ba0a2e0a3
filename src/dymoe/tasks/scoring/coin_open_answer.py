"""`coin/vizwiz` and `coin/vqav2`: CoIN's rule, flaw for flaw: equal to one answer, upper-cased, and nothing else.

Not the data sets' soft accuracy over ten answers; a space or a period too many is wrong, "two" is not "2".
`open_answer` is the corrected rule.
"""

from collections.abc import Mapping
from typing import Any

from dymoe.tasks.scoring import processed_match
from dymoe.tasks.scoring.exact_match import either, read_text
from dymoe.tasks.scoring.policy import PREDICTIONS

POLICY = PREDICTIONS


def strict(prediction: str, reference: Mapping[str, Any]) -> float:
    """1.0 when prediction and `reference["answer"]` are equal in upper case.

    Raises:
        DymoeError: the reference's answer is not text.
    """
    return float(prediction.upper() == read_text(reference).upper())


lenient = either(strict, processed_match.lenient)


def readable(prediction: str, reference: Mapping[str, Any]) -> bool:
    """Whether the prediction says anything."""
    return bool(prediction.strip())
