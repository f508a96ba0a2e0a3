"""`coin/scienceqa`: CoIN's rule, flaw for flaw: the first word of one character is the answer.

The whole text is a letter; else it starts with a letter and ". "; else the first single character between word
boundaries, upper-cased. So "a whale" answers A and "I think B" answers I. A letter beyond the question's choices is
wrong; as the right answer is always one of the choices, that never changes a score, and `choices` may be missing.
`letter` is the corrected rule.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from dymoe.tasks.scoring import letter
from dymoe.tasks.scoring.policy import Policy
from dymoe.tasks.scoring.text import Scorer

POLICY = Policy(
    "questions",
    "every question of the test split; one without a prediction is wrong",
    twice="last",
    strange="ignore",
)

_LONE = re.compile(r"\b(\w)\b")


_Reads = Callable[[str, Mapping[str, Any]], bool]


def rules(parse: Callable[[str], str | None]) -> tuple[Scorer, Scorer, _Reads]:
    """The functions `strict`, `lenient` and `readable` of a rule that reads a letter out of a prediction.

    `strict` gives 1.0 for the right letter, `lenient` for what `strict` or the corrected rule's lenient twin accepts;
    `readable` says whether the letter of one of the choices is found. A reference's `answer` is a letter A to E (CoIN's
    test files) or an index 0 to 4 (problems.json); each raises a DymoeError where it or the choices cannot be read.

    Args:
        parse: gives the answer that a prediction holds, None when it finds nothing.
    """

    def strict(prediction: str, reference: Mapping[str, Any]) -> float:
        return float(parse(prediction) == letter.read_choice(reference)[0])

    def lenient(prediction: str, reference: Mapping[str, Any]) -> float:
        return max(strict(prediction, reference), letter.lenient(prediction, reference))

    def readable(prediction: str, reference: Mapping[str, Any]) -> bool:
        count = len(letter.read_choice(reference)[1]) or len(letter.LETTERS)
        answer = parse(prediction)
        return answer is not None and answer in list(letter.LETTERS[:count])

    return strict, lenient, readable


def leading(prediction: str) -> str | None:
    """The first two steps, which CoIN and SEFE share: the text is a letter, or starts with a letter and ". "."""
    if prediction in list(letter.LETTERS):
        return prediction
    if prediction[:1] in list(letter.LETTERS) and prediction[1:3] == ". ":
        return prediction[0]
    return None


def parse(prediction: str) -> str | None:
    """The answer that CoIN's code reads out of a prediction, None when it finds nothing."""
    answer = leading(prediction)
    if answer is None:
        lone = _LONE.search(prediction)
        answer = None if lone is None else lone[1].upper()
    return answer


strict, lenient, readable = rules(parse)
right = letter.right
