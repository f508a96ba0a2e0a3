"""Values and texts of others as messages show them: short, and without characters that a terminal obeys."""

import re
import sys
from collections.abc import Iterable
from typing import Any

LONGEST = 60  # characters of a value in a message
LONGEST_LINE = 1500  # of a whole message; what dymoe itself says is shorter
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
    return shorten(text, longest)


def shorten(text: str, longest: int = LONGEST) -> str:
    """A text, of a long one both ends and how many characters it has."""
    if len(text) <= longest:
        return text
    end = longest // 4
    return f"{text[: longest - end - 1]} ... {text[-end + 1 :]} ({len(text)} characters)"


def listed(names: Iterable[str], longest: int = 2 * LONGEST) -> str:
    """As many of the names as fit, with commas between, and how many more there are.

    >>> listed(["tau", "top_k", "temperature"], longest=12)
    'tau, top_k and 1 more'
    """
    names = [shorten(name) for name in names]
    count = len(names)
    while count > 1 and len(", ".join(names[:count])) > longest:
        count -= 1
    more = f" and {len(names) - count} more" if count < len(names) else ""
    return ", ".join(names[:count]) + more


def nearest(name: object, options: Iterable[str]) -> str:
    """The end of a message about a name that is not known: the option most like it, else the options there are.

    Case does not count, and of dotted options their last part may be meant.

    >>> nearest("tua", ["tau", "top_k"])
    'did you mean tau?'
    """
    from difflib import get_close_matches  # here, since `dymoe --help` needs none

    options, name = list(options), str(name).lower()
    by_name = {option.lower(): option for option in options}
    close = get_close_matches(name, by_name, n=1, cutoff=0.5)
    if close:
        return f"did you mean {by_name[close[0]]}?"
    last = {option.lower().rsplit(".", 1)[-1]: option for option in options}
    close = get_close_matches(name.rsplit(".", 1)[-1], last, n=1)
    if close:
        return f"did you mean {last[close[0]]}?"
    return f"there is {listed(options)}" if options else "there is none"


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """Say that `name` is no known `kind`, and which is nearest to it.

    >>> unknown("order", "reversed", ["origin", "reverse"])
    "unknown order 'reversed'; did you mean reverse?"
    """
    return f"unknown {kind} {brief(name)}; {nearest(name, known)}"


def printable(text: str) -> str:
    r"""`text` with everything escaped that a terminal would obey, line ends too: ``\x1b[31m`` for red letters."""
    return _OBEYED.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def say(*lines: object, error: bool = False) -> None:
    """Print lines to standard output, or standard error; a line's own ends of lines are escaped like all else."""
    file = sys.stderr if error else sys.stdout
    print("\n".join(printable(str(line)) for line in lines), file=file, flush=True)


def one_line(error: object) -> str:
    """An error as the one line that a terminal shows, whatever names and values it repeats."""
    return shorten(printable(" ".join(str(error).split())), LONGEST_LINE)
