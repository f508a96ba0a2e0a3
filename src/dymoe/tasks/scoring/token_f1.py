"""Token F1: how many content words an answer shares with the right one, for captions.

F1 of the words that both hold, as SQuAD's evaluation counts it (Rajpurkar et al. 2016), words brought to one form as
the VQA challenges do (`text.process_answer`: lower case, no punctuation, no articles, number words as digits). Words
that join others ("on", "of", "and") count for nothing, so that two captions of one form do not agree by it.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from dymoe.tasks.scoring.exact_match import read_answer
from dymoe.tasks.scoring.text import process_answer

JOINING = frozenset(["of", "in", "on", "at", "and", "that", "with", "to", "is", "it", "this", "there", "are"])
LONGEST = 24  # words; a text that goes on naming things is no caption


def strict(prediction: str, reference: Mapping[str, Any]) -> float:
    """2 x shared words / (words of the prediction + words of the answer), 0 to 1.

    Raises:
        DymoeError: the reference has no answer.
    """
    words, right = _words(prediction), _words(read_answer(reference))
    return 2 * (words & right).total() / max(words.total() + right.total(), 1)


def lenient(prediction: str, reference: Mapping[str, Any]) -> float:
    """The share of the answer's words that the prediction holds, where that is more: further words cost nothing.

    Raises:
        DymoeError: the reference has no answer.
    """
    words, right = _words(prediction), _words(read_answer(reference))
    recall = (words & right).total() / max(right.total(), 1) if words.total() <= LONGEST else 0.0
    return max(strict(prediction, reference), recall)


def readable(prediction: str, reference: Mapping[str, Any]) -> bool:
    """Whether the prediction holds a content word."""
    return bool(_words(prediction))


def _words(text: str) -> Counter[str]:
    words = process_answer(text).split()
    return Counter([word for word in words if word not in JOINING] or words)
