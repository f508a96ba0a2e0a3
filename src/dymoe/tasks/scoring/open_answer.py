"""`corrected/vizwiz` and `corrected/vqav2`: soft accuracy where ten people's answers are there.

CoIN compares with one answer, upper-cased and unprocessed (`coin_open_answer`), although both data sets were made for
the soft accuracy over ten answers: "2" for "two" or the second commonest answer is wrong. CoIN's own files hold one
answer; add `answers` to the records (ten texts, or the mappings of the published annotation files) to have the official
metric. Without them the processed texts must be equal.
"""

from collections.abc import Mapping
from typing import Any

from dymoe.tasks.scoring import processed_match, soft_accuracy


def strict(prediction: str, reference: Mapping[str, Any]) -> float:
    """The soft accuracy over `answers`, or 1.0 when the prediction equals `answer` once both are processed.

    Raises:
        DymoeError: the reference has neither ten answers nor one.
    """
    return float(_rule(reference).strict(prediction, reference))


def lenient(prediction: str, reference: Mapping[str, Any]) -> float:
    """Also counts an answer that stands as whole words among others.

    Raises:
        DymoeError: the reference has neither ten answers nor one.
    """
    return float(_rule(reference).lenient(prediction, reference))


def readable(prediction: str, reference: Mapping[str, Any]) -> bool:
    """Whether the prediction says anything."""
    return bool(_rule(reference).readable(prediction, reference))


def _rule(reference: Mapping[str, Any]) -> Any:
    return soft_accuracy if reference.get("answers") is not None else processed_match
