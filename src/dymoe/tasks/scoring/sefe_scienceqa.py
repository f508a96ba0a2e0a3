"""`sefe/scienceqa`: SEFE's variant of CoIN's rule, flaw for flaw: the third step wants a sentence.

As `coin_scienceqa`, but in place of any single character it looks for "The answer is X" with one more character behind
(the period of the published pattern stands for any), and takes it only when there is exactly one. "B." is therefore no
answer. SEFE divides by the number of predictions. HiDe-LLaVA reads answers in the same way.
"""

import re

from dymoe.tasks.scoring import letter
from dymoe.tasks.scoring.coin_scienceqa import leading, rules
from dymoe.tasks.scoring.policy import Policy

POLICY = Policy(
    "predictions",
    "every question with a prediction, known or not; the others are left out",
    twice="last",
    strange="count",
)

_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def parse(prediction: str) -> str | None:
    """The answer that SEFE's code reads out of a prediction, None when it finds nothing."""
    answer = leading(prediction)
    if answer is None:
        letters = _SENTENCE.findall(prediction)
        answer = str(letters[0]) if len(letters) == 1 else None
    return answer


strict, lenient, readable = rules(parse)
right = letter.right
