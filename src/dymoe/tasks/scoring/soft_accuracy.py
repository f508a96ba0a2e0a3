"""The VQA challenges' soft accuracy over ten people's answers.

Antol et al. 2015: an answer is right to the degree min(matches / 3, 1), averaged over the ten ways to leave one
person out; so 0, 1, 2, 3 and 4 or more matches of 10 give 0, 0.3, 0.6, 0.9 and 1.

Also `coin/textvqa` and `corrected/textvqa`: CoIN scores TextVQA with the published evaluation, so the rules are the
same. Their denominators are not: CoIN's is the number of predictions, the corrected one the number of questions.
"""

from collections.abc import Mapping
from typing import Any

from dymoe.errors import DymoeError
from dymoe.messages import brief
from dymoe.tasks.scoring.text import as_text, contains_words, process_answer

PEOPLE = 10


def strict(prediction: str, reference: Mapping[str, Any]) -> float:
    """The soft accuracy of the prediction against `reference["answers"]`, both sides processed.

    Args:
        reference: `answers` holds ten texts, or ten mappings with the text under `answer` (VQAv2's and VizWiz's files).

    Raises:
        DymoeError: the reference does not hold ten answers.
    """
    return _accuracy(process_answer(prediction), _processed(reference))


def lenient(prediction: str, reference: Mapping[str, Any]) -> float:
    """The best soft accuracy of any reference answer that the prediction holds as whole words.

    A prediction that holds both yes and no is neither.

    Raises:
        DymoeError: the reference does not hold ten answers.
    """
    answers, text = _processed(reference), process_answer(prediction)
    best = _accuracy(text, answers)
    both = contains_words(text, "yes") and contains_words(text, "no")
    for answer in set(answers):
        if not (both and answer in ("yes", "no")) and contains_words(text, answer):
            best = max(best, _accuracy(answer, answers))
    return best


def readable(prediction: str, reference: Mapping[str, Any]) -> bool:
    """Whether anything is left of the prediction once it is processed."""
    return bool(process_answer(prediction))


def _accuracy(text: str, answers: list[str]) -> float:
    matches = answers.count(text)
    # Leaving out one of the matching people leaves matches - 1, leaving out any other leaves all of them.
    total = matches * min(1.0, (matches - 1) / 3) + (PEOPLE - matches) * min(1.0, matches / 3)
    return max(0.0, total) / PEOPLE if matches else 0.0


def _processed(reference: Mapping[str, Any]) -> list[str]:
    return [process_answer(answer) for answer in read_answers(reference)]


def read_answers(reference: Mapping[str, Any]) -> list[str]:
    """The ten texts of a reference, as they stand.

    Raises:
        DymoeError: there are not ten, or one is no text.
    """
    answers = reference.get("answers")
    if isinstance(answers, list | tuple):
        answers = [as_text(answer.get("answer") if isinstance(answer, Mapping) else answer) for answer in answers]
    if not isinstance(answers, list | tuple) or not all(isinstance(answer, str) for answer in answers):
        raise DymoeError(f"reference: 'answers' must be a list of {PEOPLE} texts, not {brief(answers)}")
    if len(answers) != PEOPLE:
        raise DymoeError(f"reference: 'answers' must hold {PEOPLE} texts, it holds {len(answers)}")
    return list(answers)
