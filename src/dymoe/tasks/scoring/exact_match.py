"""Exact match: the answer itself, but for case, space around it and a trailing period.

Also `corrected/gqa` and `corrected/ocrvqa`. CoIN's rules differ in little things: its GQA rule keeps the space around a
prediction and drops any number of periods (`coin_gqa`), its OCRVQA rule keeps both and calls every prediction wrong
that holds the word Unanswerable (`coin_ocrvqa`). What matters more is the denominator: corrected counts a missing
prediction as wrong, CoIN leaves it out.
"""

from collections.abc import Mapping
from typing import Any

from dymoe.errors import DymoeError
from dymoe.messages import brief
from dymoe.tasks.scoring.text import Scorer, as_text, contains_words, process_answer

_OPPOSITE = {"yes": "no", "no": "yes"}


def strict(prediction: str, reference: Mapping[str, Any]) -> float:
    """1.0 when the prediction is `reference["answer"]`, case and one trailing period aside.

    Raises:
        DymoeError: the reference has no answer.
    """
    return float(_plain(prediction) == _plain(read_answer(reference)))


def lenient(prediction: str, reference: Mapping[str, Any]) -> float:
    """1.0 also when the answer stands among other words, or in another spelling (`text.process_answer`).

    A prediction that holds both yes and no is neither.

    Raises:
        DymoeError: the reference has no answer.
    """
    if strict(prediction, reference):
        return 1.0
    answer, text = process_answer(read_answer(reference)), process_answer(prediction)
    if answer in _OPPOSITE and contains_words(text, _OPPOSITE[answer]):
        return 0.0
    return float(contains_words(text, answer))


def readable(prediction: str, reference: Mapping[str, Any]) -> bool:
    """Whether the prediction says anything."""
    return bool(_plain(prediction))


def read_answer(reference: Mapping[str, Any]) -> str:
    """Return the reference's answer, a number as text.

    Raises:
        DymoeError: it is missing, empty or not text.
    """
    answer = as_text(reference.get("answer"))
    if not isinstance(answer, str) or not answer.strip():
        raise DymoeError(f"reference: 'answer' must be a text that is not empty, not {brief(answer)}")
    return answer


def either(strict: Scorer, twin: Scorer) -> Scorer:
    """The lenient rule of a CoIN rule: what `strict` or the corrected rule's lenient twin accepts.

    An empty answer is left to `strict`; the twin would refuse it. The rule raises a DymoeError where the reference's
    answer is not text.
    """

    def lenient(prediction: str, reference: Mapping[str, Any]) -> float:
        if strict(prediction, reference) or not read_text(reference).strip():
            return strict(prediction, reference)
        return twin(prediction, reference)

    return lenient


def read_text(reference: Mapping[str, Any]) -> str:
    """Return the reference's answer, which CoIN's own rules take even when it is empty.

    Raises:
        DymoeError: it is missing or not text.
    """
    answer = as_text(reference.get("answer"))
    if not isinstance(answer, str):
        raise DymoeError(f"reference: 'answer' must be a text, not {brief(answer)}")
    return answer


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").strip().lower()
