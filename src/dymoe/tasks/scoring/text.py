"""Bringing free-text answers to one form, as the evaluation of the VQA challenges does.

The rules (Goyal et al. 2017, VQA v2 evaluation; the same are used by TextVQA and VizWiz): lower case, no commas
and question marks, possessives apart, punctuation dropped or turned into a space, number words to digits, no
articles, apostrophes put back into contractions.
"""

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {
    word: str(max(0, value))
    for value, word in enumerate(
        ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], start=-1
    )
}
_ARTICLES = {"a", "an", "the"}
_WITH_APOSTROPHE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how's "
    "i'd i'm i've isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't not've o'clock "
    "oughtn't shan't she'd she's should've shouldn't somebody's someone's something's that'd that's there'd "
    "there're there's they'd they'll they're they've 'twas wasn't we'd we've weren't what'll what're what's "
    "what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've "
    "wouldn't y'all you'd you'll you're you've"
)
_CONTRACTIONS = {word.replace("'", ""): word for word in _WITH_APOSTROPHE.split()}
_COMMA_IN_NUMBER = re.compile(r"[0-9],[0-9]")
_LOOSE_PERIOD = re.compile(r"\.(?![0-9])")


def process_answer(answer: str) -> str:
    """Return `answer` in the form in which answers are compared."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return _words(_LOOSE_PERIOD.sub("", _punctuation(text)))


def _punctuation(text: str) -> str:
    result = text
    for mark in _PUNCTUATION:
        # A mark that touches a space joins nothing and goes; one between two words stands for a space.
        loose = f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text) is not None
        result = result.replace(mark, "" if loose else " ")
    return result


def _words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def contains_words(text: str, phrase: str, longest: int = 24) -> bool:
    """Whether `phrase` occurs in `text` as whole words in a row; never in a text of more than `longest` words.

    A long text that happens to name the answer among everything else is no answer.
    """
    words, wanted = text.split(), phrase.split()
    if not wanted or len(words) > longest:
        return False
    return any(words[start : start + len(wanted)] == wanted for start in range(len(words)))
