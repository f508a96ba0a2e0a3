"""Multiple choice: the letter of the right choice, A to E. Also `corrected/scienceqa`.

CoIN's rule (`coin_scienceqa`) takes the first word of one character wherever it stands: "I think B" answers I, and
"a whale" answers A because of the article. Here a letter counts as an answer where it stands alone or leads
("B", "(B)", "B. whale"); everything else is format drift at best.
"""

import re
from collections.abc import Mapping
from typing import Any

from dymoe.errors import DymoeError
from dymoe.messages import brief
from dymoe.tasks.scoring.text import as_text, contains_words, process_answer

LETTERS = "ABCDE"
_ALONE = re.compile(r"\(?([A-Ea-e])[.):]?")
_LEADING = re.compile(r"\(?([A-E])[.):]\s.*", re.DOTALL)
_NAMED = re.compile(r"\b(?:answer|option|choice|letter)(?: is)?:? *\(?([A-Ea-e])\b")
# "A" among other words is mostly the article; it counts in brackets and as the last word.
_STANDING = re.compile(r"(?<![\w'])(?:([B-E])(?![\w'])|\(([A-E])\)|(A)[.)]?$)")


def strict(prediction: str, reference: Mapping[str, Any]) -> float:
    """1.0 when the prediction is the right letter ("B", "b", "B.", "(B)") or starts with it ("B. bird").

    Args:
        reference: `answer` is a letter A to E, as in CoIN's test files, or an index 0 to 4, as in ScienceQA's
            problems.json; `choices` (texts) may be missing.

    Raises:
        DymoeError: the reference's letter or choices cannot be read.
    """
    answer, choices = read_choice(reference)
    letter = _letter(prediction)
    return float(letter is not None and _valid(letter, choices) == answer)


def lenient(prediction: str, reference: Mapping[str, Any]) -> float:
    """1.0 also for "The answer is B", for one letter among other words, or for the right choice's text.

    When the prediction names several choices, it is wrong.

    Raises:
        DymoeError: the reference's letter or choices cannot be read.
    """
    answer, choices = read_choice(reference)
    if strict(prediction, reference):
        return 1.0
    text = prediction.strip()
    if _letter(text) is not None:
        return 0.0
    named = {letter.upper() for letter in _NAMED.findall(text)}
    if not named:
        named = {"".join(groups) for groups in _STANDING.findall(text)}
    if not named:
        named = _by_text(process_answer(text), choices)
    return float(len(named) == 1 and _valid(named.pop(), choices) == answer)


def readable(prediction: str, reference: Mapping[str, Any]) -> bool:
    """Whether the strict rule finds a letter in the prediction that one of the choices has."""
    letter = _letter(prediction)
    return letter is not None and _valid(letter, read_choice(reference)[1]) is not None


def right(reference: Mapping[str, Any]) -> str:
    """The right letter.

    Raises:
        DymoeError: the reference's letter or choices cannot be read.
    """
    return read_choice(reference)[0]


def _letter(prediction: str) -> str | None:
    text = prediction.strip()
    match = _ALONE.fullmatch(text) or _LEADING.fullmatch(text)
    return None if match is None else match[1]


def _by_text(text: str, choices: list[str]) -> set[str]:
    hits = {
        LETTERS[index]: process_answer(choice)
        for index, choice in enumerate(choices)
        if contains_words(text, process_answer(choice))
    }
    # "on land" in "fish on land" is one hit, not two: a choice inside a longer named choice does not count.
    return {
        letter
        for letter, choice_text in hits.items()
        if not any(other != choice_text and contains_words(other, choice_text) for other in hits.values())
    }


def _valid(letter: str, choices: list[str]) -> str | None:
    upper = letter.upper()
    return upper if not choices or LETTERS.index(upper) < len(choices) else None


def read_choice(reference: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the letter of the right choice and the choices (an empty list when the reference has none).

    Raises:
        DymoeError: the answer is no letter and no index, the choices are no texts, or there is no such choice.
    """
    answer, choices = reference.get("answer"), reference.get("choices")
    choices = [] if choices is None else choices
    choices = [as_text(choice) for choice in choices] if isinstance(choices, list | tuple) else choices
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)  # an index in a table with holes
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(LETTERS):
        answer = LETTERS[answer]
    if not isinstance(answer, str) or len(answer) != 1 or answer not in LETTERS:
        raise DymoeError(f"reference: 'answer' must be one letter of A to E or its index 0 to 4, not {brief(answer)}")
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) for choice in choices):
        raise DymoeError(f"reference: 'choices' must be a list of texts, not {brief(choices)}")
    if len(choices) > len(LETTERS):
        raise DymoeError(f"reference: {len(choices)} choices, at most {len(LETTERS)} have a letter")
    if choices and LETTERS.index(answer) >= len(choices):
        raise DymoeError(f"reference: the answer is {answer}, but there are only {len(choices)} choices")
    return answer, list(choices)
