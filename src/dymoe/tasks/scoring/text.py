"""Bringing free-text answers to one form, as the evaluation of the VQA challenges does.

The rules (Goyal et al. 2017, VQA v2 evaluation; the same are used by TextVQA and VizWiz and known as the EvalAI
answer processor): lower case, no commas and question marks, possessives apart, punctuation dropped or turned into
a space, number words to digits, no articles, apostrophes put back into contractions.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

MOST = 10**1000  # a number beyond is none that an answer holds, and Python does not write out any

Scorer = Callable[[str, Mapping[str, Any]], float]

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {
    word: str(max(0, value))
    for value, word in enumerate(
        ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], start=-1
    )
}
_ARTICLES = {"a", "an", "the"}
# A contraction is known by its spelling with one apostrophe missing (dont, couldnt've). Those are left out whose bare
# spelling is a commoner word of its own (id, ill, its, lets, shed, shell, wed, well, were), and im and ive, which the
# published table spells with a capital and so never meets in lower case.
_WITH_APOSTROPHE = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've "
    "mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that'd that'd've that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas "
    "wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've "
    "who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd "
    "you'd've you'll you're you've"
)
_CONTRACTIONS = {
    word[:index] + word[index + 1 :]: word
    for word in _WITH_APOSTROPHE.split()
    for index, letter in enumerate(word)
    if letter == "'"
}
_COMMA_IN_NUMBER = re.compile(r"[0-9],[0-9]")
_LOOSE_PERIOD = re.compile(r"\.(?!\d)")
# The published evaluation passes a flag where the number of replacements stands, so it strips this many periods.
_MOST_PERIODS = int(re.UNICODE)


@functools.lru_cache(maxsize=1 << 16)
def process_answer(answer: str) -> str:
    """Return `answer` in the form in which answers are compared."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return _words(_LOOSE_PERIOD.sub("", _punctuation(text), count=_MOST_PERIODS))


def same_answer(first: str, second: str) -> bool:
    """Whether two answers are the same once processed; one that vanishes ("a", "...") is compared as it stands."""
    one, other = process_answer(first), process_answer(second)
    return one == other if other else first.strip().lower() == second.strip().lower()


def _punctuation(text: str) -> str:
    result = text
    for mark in (mark for mark in _PUNCTUATION if mark in text):
        # A mark that touches a space joins nothing and goes; one between two words stands for a space.
        loose = f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text) is not None
        result = result.replace(mark, "" if loose else " ")
    return result


def _words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def as_text(value: Any) -> Any:
    """A number as the text that is learned in its place; anything else as it is."""
    integer = isinstance(value, int) and not isinstance(value, bool) and abs(value) < MOST
    return str(value) if integer or (isinstance(value, float) and math.isfinite(value)) else value


def contains_words(text: str, phrase: str, longest: int = 24) -> bool:
    """Whether `phrase` occurs in `text` as whole words in a row; never in a text of more than `longest` words.

    A long text that happens to name the answer among everything else is no answer.
    """
    words, sequence = text.split(), phrase.split()
    if not sequence or len(words) > longest:
        return False
    return any(words[start : start + len(sequence)] == sequence for start in range(len(words)))
