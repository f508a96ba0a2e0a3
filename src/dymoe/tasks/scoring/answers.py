"""Scores of answers and their mean, for a run's own answers and for a file of anyone's."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dymoe.errors import DymoeError
from dymoe.tasks.scoring import Rule

# What CoIN's ScienceQA code writes in place of an answer that is not there.
NO_ANSWER = "FAILED"


@dataclass(frozen=True)
class Answer:
    """A question's id, what was answered (None where nothing was) and what is right."""

    id: str
    text: str | None
    reference: Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """What an answer is worth, from 0 to 1, by the strict and by the lenient rule."""

    strict: float
    lenient: float


def score_answers(rule: Rule, answers: Iterable[Answer], where: str) -> list[Score]:
    """The scores of answers, in their order; one that is not there is wrong, and its reference is read all the same.

    Args:
        rule: the task's.
        answers: to be scored.
        where: what stands before an answer's id in a message.

    Raises:
        DymoeError: the reference of an answer cannot be read.
    """
    scores = []
    for answer in answers:
        try:
            if answer.text is None:
                rule.strict(NO_ANSWER, answer.reference)
                scores.append(Score(0.0, 0.0))
            else:
                strict = rule.strict(answer.text, answer.reference)
                scores.append(Score(strict, rule.lenient(answer.text, answer.reference)))
        except DymoeError as error:
            raise DymoeError(f"{where} {answer.id!r}: {error}") from error
    return scores


def percent(scores: Sequence[float], over: int | None = None) -> float:
    """The sum of scores in percent of `over`, which is their number unless it is given."""
    return 100 * math.fsum(scores) / (len(scores) if over is None else over)
