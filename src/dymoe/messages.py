"""Values and texts of others as messages show them: short, and without characters that a terminal obeys."""

import re
from typing import Any

LONGEST = 60  # characters of a value in a message
# What moves a cursor, ends a line, turns the writing's direction or shows nothing; the joiners that scripts need stay.
_OBEYED = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


def brief(value: Any, longest: int = LONGEST) -> str:
    """`repr(value)`, of a long one both ends and how many characters it has.

    >>> brief("a" * 100_000)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ... aaaaaaaaaaaaa' (100002 characters)"
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a list that holds itself
        return f"a value of type {type(value).__name__}"
    if len(text) <= longest:
        return text
    end = longest // 4
    return f"{text[: longest - end - 1]} ... {text[-end + 1 :]} ({len(text)} characters)"


def printable(text: str) -> str:
    r"""`text` with everything escaped that a terminal would obey, line ends too: ``\x1b[31m`` for red letters."""
    return _OBEYED.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def one_line(error: object) -> str:
    """An error as the one line that a terminal shows."""
    return printable(" ".join(str(error).split()))
