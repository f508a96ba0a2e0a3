"""What a rule divides by when a whole file is scored, and what becomes of ids that do not fit."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Policy:
    """How a rule counts; a rule that has none of its own counts `QUESTIONS`.

    Attributes:
        over: what the sum of scores is divided by; under ``positions`` line n belongs to record n, whatever their ids.
        what: the same in words.
        twice: of answers with one id, each counts, or the last one alone, or they are refused.
        strange: answers to no question are refused, passed over, or counted as wrong.
    """

    over: Literal["questions", "predictions", "positions"]
    what: str
    twice: Literal["each", "last", "refuse"] = "refuse"
    strange: Literal["refuse", "ignore", "count"] = "refuse"


QUESTIONS = Policy("questions", "every question; one without a prediction is wrong")
PREDICTIONS = Policy(
    "predictions", "every line of the predictions file; a question without one is left out", twice="each"
)
