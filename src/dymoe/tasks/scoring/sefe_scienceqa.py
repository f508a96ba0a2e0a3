"""`sefe/scienceqa`: SEFE's variant of CoIN's rule, flaw for flaw: the third step wants a sentence.

As `coin_scienceqa`, but in place of any single character it looks for "The answer is X" with one more character behind
(the period of the published pattern stands for any), and takes it only when there is exactly one. "B." is therefore no
answer. SEFE divides by the number of predictions. HiDe-LLaVA reads answers in the same way.
"""

import re
from collections.abc import Mapping
from typing import Any

from dymoe.tasks.scoring import letter
from dymoe.tasks.scoring.coin_scienceqa import is_choice, leading

_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def strict(prediction: str, reference: Mapping[str, Any]) -> float:
    """1.0 when SEFE's parser finds the right letter.

    Raises:
        DymoeError: the reference's letter or choices cannot be read.
    """
    return float(parse(prediction) == letter.read_choice(reference)[0])


def lenient(prediction: str, reference: Mapping[str, Any]) -> float:
    """What `strict` or the corrected rule's lenient twin accepts.

    Raises:
        DymoeError: the reference's letter or choices cannot be read.
    """
    return max(strict(prediction, reference), letter.lenient(prediction, reference))


def readable(prediction: str, reference: Mapping[str, Any]) -> bool:
    """Whether the parser finds the letter of one of the choices."""
    return is_choice(parse(prediction), reference)


def parse(prediction: str) -> str | None:
    """The answer that SEFE's code reads out of a prediction, None when it finds nothing."""
    found = leading(prediction)
    if found is None:
        told = _SENTENCE.findall(prediction)
        found = str(told[0]) if len(told) == 1 else None
    return found
