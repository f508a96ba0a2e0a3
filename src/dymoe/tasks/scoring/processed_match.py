"""`corrected/imagenet`: the class name, in the form in which the VQA challenges compare answers.

CoIN's rule (`coin_imagenet`) asks whether one text contains the other, by position in the file: an empty prediction
is right, "cat" is right for "catamaran", case matters, and one lost line shifts all answers after it. Here the whole
processed names must be equal (so "Great_White_Shark." is "great white shark"), found by question_id.
"""

from collections.abc import Mapping
from typing import Any

from dymoe.tasks.scoring import exact_match
from dymoe.tasks.scoring.text import same_answer


def strict(prediction: str, reference: Mapping[str, Any]) -> float:
    """1.0 when prediction and `reference["answer"]` are equal once processed; an empty prediction is wrong.

    Raises:
        DymoeError: the reference has no answer.
    """
    return float(same_answer(prediction, exact_match.read_answer(reference)))


def lenient(prediction: str, reference: Mapping[str, Any]) -> float:
    """1.0 also when the name stands as whole words among others.

    Raises:
        DymoeError: the reference has no answer.
    """
    return max(strict(prediction, reference), exact_match.lenient(prediction, reference))


readable = exact_match.readable
