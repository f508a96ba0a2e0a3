"""POPE's yes-or-no questions about objects (Li et al. 2023), scored as its published script scores them.

The script (evaluate.py of AoiDragon/POPE, the same in LLaVA's eval_pope.py) keeps what stands before the first period,
drops commas and splits at single spaces; the answer is no where No, not or no is one of the words, and else yes. So an
empty answer is yes, and so are "NO" and "no!".
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dymoe.errors import DymoeError
from dymoe.messages import brief
from dymoe.tasks.scoring.exact_match import read_answer
from dymoe.tasks.scoring.text import process_answer


def strict(prediction: str, reference: Mapping[str, Any]) -> float:
    """1.0 where the script reads the right one of yes and no.

    Args:
        prediction: what the model said.
        reference: `answer` is yes or no, in any case (`label` in POPE's files).

    Raises:
        DymoeError: it is neither.
    """
    return float(_answer(prediction) == right(reference))


def lenient(prediction: str, reference: Mapping[str, Any]) -> float:
    """1.0 also where one of yes and no stands in the prediction in any form, and it is the right one.

    Raises:
        DymoeError: the reference is neither yes nor no.
    """
    return max(strict(prediction, reference), float(_named(prediction) == {right(reference)}))


def readable(prediction: str, reference: Mapping[str, Any]) -> bool:
    """Whether the prediction names exactly one of yes and no."""
    return len(_named(prediction)) == 1


def right(reference: Mapping[str, Any]) -> str:
    """The right answer, "yes" or "no".

    Raises:
        DymoeError: the reference is neither.
    """
    answer = read_answer(reference).strip().lower()
    if answer not in ("yes", "no"):
        raise DymoeError(f"reference: 'answer' must be yes or no, not {brief(answer)}")
    return answer


def measures(predictions: Sequence[str], references: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Precision, recall and F1 of yes, and how often yes was said, in percent; 0 where the script divides by zero."""
    positive = [_answer(prediction) == "yes" for prediction in predictions]
    true = [right(reference) == "yes" for reference in references]
    hits = sum(map(bool.__and__, positive, true))
    return {
        "precision": 100 * hits / max(sum(positive), 1),
        "recall": 100 * hits / max(sum(true), 1),
        "F1": 100 * 2 * hits / max(sum(positive) + sum(true), 1),
        "yes ratio": 100 * sum(positive) / max(len(positive), 1),
    }


def _answer(prediction: str) -> str:
    words = prediction.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def _named(prediction: str) -> set[str]:
    return {"yes", "no"} & set(process_answer(prediction).split())
